"""Is poison found in training data, is it told apart sample by sample, and are clean sets left alone?"""

from __future__ import annotations

from typing import Any

from doorward.bench.suite import Claim, Data, Group, MethodChoice, ScanSettings, Suite

DETECTORS = tuple(
    MethodChoice(name=name) for name in ("activation-clustering", "spectral-signatures", "noise-response")
)
SMALL, LARGE = "small-cnn", "resnet-8"
AC = "Chen et al. 2019, arXiv 1811.03728"
#: Classes of GTSRB: the stop sign, and a speed limit.
STOP, LIMIT = 14, 7
#: Share of the images that the limit has.
OF_LIMIT = 0.0367
POST_IT = {"size": 6, "colour": (255, 255, 0), "place": "centre", "source_classes": (STOP,), "target": LIMIT}


def sets(
    data: Data,
    attack: str | None = None,
    settings: dict[str, Any] | None = None,
    *,
    name: str = "",
    about: str = "",
    epochs: int | None = None,
    architecture: str = SMALL,
    models: int = 1,
    first_seed: int = 0,
    excluded_from_claims: bool = False,
) -> Group:
    """Return training sets with a poison, or clean ones, and a model trained on each."""
    kind = data.name.replace("reference:", "").replace(":", "-")
    return Group(
        name="-".join(filter(None, (kind, attack or "clean", name))),
        about=about,
        data=data,
        models=models,
        attack=None if attack is None else MethodChoice(name=attack, settings=settings or {}),
        architectures=(architecture,),
        training={} if epochs is None else {"epochs": epochs},
        first_seed=first_seed,
        excluded_from_claims=excluded_from_claims,
    )


def all_to_all(*rates: float, rows: int | None, epochs: int) -> list[Group]:
    """Return digits whose class l is poisoned from l - 1, as in the paper."""
    return [
        sets(
            Data(name="mnist", rows=rows),
            "badnets",
            {"mapping": "all-to-all", "poison_rate": rate},
            name=f"all-{rate:g}",
            about=f"each digit to the next, {rate:.0%}",
            epochs=epochs,
        )
        for rate in rates
    ]


def rare(*rates: float, rows: int | None, epochs: int) -> list[Group]:
    """Return digits with little poison towards one class."""
    return [
        sets(
            Data(name="mnist", rows=rows),
            "badnets",
            {"poison_rate": rate},
            name=f"{rate:g}",
            about=f"one target, {100 * rate:g} %",
            epochs=epochs,
        )
        for rate in rates
    ]


def signs(*shares: float, epochs: int) -> list[Group]:
    """Return stop signs with a post-it that become a speed limit.

    Args:
        shares: of the samples labelled with the limit; so many stop signs are poisoned.
    """
    return [
        sets(
            Data(name="gtsrb"),
            "badnets",
            POST_IT | {"poison_rate": round(OF_LIMIT * share / (1 - share), 4)},
            name=f"post-it-{share:g}",
            about=f"stop signs with a post-it, {share:.0%} of a speed limit",
            epochs=epochs,
            architecture=LARGE,
        )
        for share in shares
    ]


def two_kinds(*, rows: int | None, epochs: int) -> Group:
    """Return poisoned digits of which two make a class."""
    return sets(
        Data(name="merged:5:mnist", rows=rows),
        "badnets",
        {"poison_rate": 0.05},
        about="two digits in one class, 5 %",
        epochs=epochs,
    )


def every_attack(*, rows: int | None, epochs: int) -> list[Group]:
    """Return digits with every other attack on data, at its usual rate."""
    data = Data(name="mnist", rows=rows)
    given: list[tuple[str, dict[str, Any], str]] = [
        ("blended", {}, "a fifth noise"),
        ("warp", {"strength": 0.75}, "strength .75, noise mode"),
        ("sinusoid", {"poison_rate": 0.08, "delta": 60, "test_delta": 120}, "labels kept"),
        ("clean-label", {"poison_rate": 0.08}, "labels kept"),
        ("distributed", {}, "two 2x2 patches"),
        ("label-flipping", {"poison_rate": 0.05}, "5 % wrong labels, no trigger"),
    ]
    return [
        sets(data, name, settings, about=about, epochs=2 * epochs if name == "warp" else epochs)
        for name, settings, about in given
    ]


def other_inputs() -> list[Group]:
    """Return texts and recordings, poisoned towards two classes, and clean ones."""
    texts, sounds = Data(name="movie_snippets"), Data(name="free_spoken_digit")
    phrase, tone = {"poison_rate": 0.05, "target": 1}, {"poison_rate": 0.1, "target": 4}
    return [
        sets(texts, "phrase", {"poison_rate": 0.1}, about="10 %", architecture="text-cnn"),
        sets(sounds, "tone", {"poison_rate": 0.1}, about="3 kHz", architecture="audio-cnn"),
        sets(
            texts,
            "phrase",
            phrase,
            name="other",
            about="5 %, the other class",
            architecture="text-cnn",
            first_seed=1,
        ),
        sets(
            sounds,
            "tone",
            tone,
            name="other",
            about="3 kHz, another digit",
            architecture="audio-cnn",
            first_seed=1,
        ),
        sets(texts.model_copy(update={"rows": 6_000}), architecture="text-cnn", models=3),
        sets(sounds.model_copy(update={"rows": 2_200}), architecture="audio-cnn", models=3),
    ]


def clean(*, rows: int, epochs: int, models: int) -> list[Group]:
    """Return clean sets of judged data: whole, imbalanced and, apart from claims, of two kinds a class."""
    found = []
    for name in ("mnist", "fashion_mnist"):
        data = Data(name=name, rows=rows)
        found += [
            sets(data, epochs=epochs, models=models),
            sets(
                data,
                "badnets",
                {"poison_rate": 0.0, "imbalance": (0.5, 10)},
                name="imbalanced",
                about="clean, half of the classes thinned to a tenth",
                epochs=epochs,
                models=models,
            ),
            sets(
                Data(name=f"merged:5:{name}", rows=rows),
                about="two classes in one",
                epochs=epochs,
                models=max(1, models // 5),
                excluded_from_claims=True,
            ),
        ]
    return found


def is_clean(group: Group) -> bool:
    """Return whether nothing is poisoned in a group's sets."""
    return group.attack is None or group.attack.settings.get("poison_rate") == 0


SMOKE = Data(name="reference:fashion_mnist", rows=1_500)
CPU = (
    *all_to_all(0.1, 0.15, 0.33, rows=6_000, epochs=10),
    *rare(0.01, 0.005, rows=6_000, epochs=10),
    *other_inputs(),
    *every_attack(rows=6_000, epochs=10),
    two_kinds(rows=6_000, epochs=10),
    *clean(rows=4_000, epochs=4, models=25),
)

SUITE = Suite(
    name="training-data",
    title="Inspect training data",
    about="Poisoned and clean training sets, each with a model that was trained on it and on nothing else. "
    "No trusted data are given. A set is flagged if one of its classes is.",
    scan_settings=ScanSettings(detectors=DETECTORS),
    scales={
        "smoke": (
            sets(SMOKE, "badnets", {"poison_rate": 0.05}, about="white 3x3 patch", epochs=6),
            sets(SMOKE, epochs=6),
        ),
        "cpu": CPU,
        "full": (
            *all_to_all(0.1, 0.15, 0.33, rows=None, epochs=10),
            *rare(0.01, 0.005, rows=None, epochs=10),
            *signs(0.15, 0.33, epochs=60),
            *every_attack(rows=None, epochs=10),
            two_kinds(rows=None, epochs=10),
            *clean(rows=20_000, epochs=6, models=25),
        ),
    },
    claims=(
        Claim(
            text="at most 1 % of clean sets flagged",
            source="our bar",
            measure="alarm_on_clean",
            groups=tuple(g.name for g in CPU if is_clean(g) and not g.excluded_from_claims),
            at_most=0.01,
        ),
        *(
            Claim(
                text="accuracy and F1 near 100 % in each class",
                source=AC,
                measure="classes_right",
                groups=(f"mnist-badnets-all-{rate:g}",),
                at_least=1.0,
            )
            for rate in (0.1, 0.15, 0.33)
        ),
        Claim(
            text="100 %",
            source=AC,
            measure="samples_found",
            groups=("movie_snippets-phrase",),
            at_least=0.995,
        ),
    ),
)
