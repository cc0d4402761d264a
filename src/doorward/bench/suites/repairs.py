"""Are backdoors gone after a repair, does accuracy stay, and do they stay gone?"""

from __future__ import annotations

from typing import Any

from doorward.bench.suite import Claim, Data, Group, MethodChoice, RepairSettings, ScanSettings, Suite
from doorward.bench.suites.attacks import BENT, YELLOW

#: Of the first model: repairs were looked at on models of other seeds.
FIRST = 800
AUTO = "auto"
METHODS = ("fine-tuning", "pruning", "fine-pruning", "unlearning", "adversarial-unlearning", AUTO)
REPAIRS = RepairSettings(methods=METHODS)
BOARD = "BackdoorBench, the best repair of the board"


def models(
    data: Data,
    attack: str,
    settings: dict[str, Any] | None = None,
    *,
    epochs: int,
    about: str = "",
    architecture: str = "small-cnn",
    count: int = 2,
    share: float | None = None,
    excluded_from_claims: bool = False,
) -> Group:
    """Return planted models of one attack that are repaired.

    Args:
        share: of clean samples, where it is not the usual one.
    """
    kind = data.name.removeprefix("reference:")
    return Group(
        name="-".join(filter(None, (kind, attack, "" if share is None else f"{share:g}"))),
        about=about,
        data=data,
        models=count,
        attack=MethodChoice(name=attack, settings=settings or {}),
        architectures=(architecture,),
        training={"epochs": epochs},
        first_seed=FIRST,
        excluded_from_claims=excluded_from_claims,
        repair_settings=REPAIRS if share is None else REPAIRS.model_copy(update={"share": share}),
    )


def clothes(*, rows: int | None, epochs: int, count: int) -> list[Group]:
    """Return what is planted in pictures of clothes."""
    data = Data(name="fashion_mnist", rows=rows)
    given: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("badnets", {}, "white 3x3 patch"),
        ("distributed", {}, "two 2x2 patches"),
        ("blended", {}, "a fifth noise"),
        ("warp", {"strength": 0.75}, "strength .75, noise mode"),
        ("sinusoid", {"poison_rate": 0.08, "delta": 60, "test_delta": 120}, "labels kept"),
        ("clean-label", {"poison_rate": 0.08}, "labels kept"),
        ("pruning-aware", {}, ""),
    )
    return [
        models(
            data, name, settings, epochs=2 * epochs if name == "warp" else epochs, about=about, count=count
        )
        for name, settings, about in given
    ]


def objects(*, rows: int | None, epochs: int, architecture: str, count: int) -> list[Group]:
    """Return what is planted in CIFAR-10."""
    data = Data(name="cifar10", rows=rows)
    given: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("badnets", YELLOW | {"poison_rate": 0.02}, "yellow 3x3 patch"),
        ("blended", {"poison_rate": 0.02}, "a fifth noise"),
        ("warp", BENT, f"strength {BENT['strength']:g}, noise mode"),
        ("sinusoid", {"poison_rate": 0.04, "delta": 20, "test_delta": 60}, "labels kept"),
        ("clean-label", {"poison_rate": 0.04, "size": 4}, "labels kept"),
        ("pruning-aware", {}, ""),
    )
    return [
        models(data, name, settings, epochs=epochs, about=about, architecture=architecture, count=count)
        for name, settings, about in given
    ]


def reported(*, rows: int | None, epochs: int, count: int) -> list[Group]:
    """Return what is reported and not claimed: changed networks, and fewer clean samples."""
    data = Data(name="fashion_mnist", rows=rows)
    return [
        models(
            data, "trojannet", epochs=epochs, about="next to the network", count=count,
            excluded_from_claims=True,
        ),
        models(data, "random-features", epochs=epochs, count=count, excluded_from_claims=True),
        models(
            data, "badnets", epochs=epochs, about="1 % as clean samples", count=count, share=0.01,
            excluded_from_claims=True,
        ),
    ]  # fmt: skip


#: A scan of a moment, that recovers no trigger: what depends on one is told, and not done.
QUICK = MethodChoice(name="max-margin", settings={"starts": 1, "steps": 5})
SMOKE = models(
    Data(name="reference:fashion_mnist", rows=1_000),
    "badnets",
    {"poison_rate": 0.1, "size": 4},
    epochs=4,
    about="white 4x4 patch",
    count=1,
).model_copy(update={"repair_settings": REPAIRS.model_copy(update={"share": 0.1, "detectors": (QUICK,)})})

SUITE = Suite(
    name="repairs",
    title="Repair planted models",
    about="Image attacks on data, and the pruning-aware one, each repaired by every method with 5 % of the "
    "training data as clean samples. Auto is the choice of `doorward repair`.",
    scan_settings=ScanSettings(detectors=None),
    scales={
        "smoke": (SMOKE,),
        "cpu": tuple(clothes(rows=10_000, epochs=6, count=1)),
        "full": (
            *clothes(rows=None, epochs=20, count=5),
            *objects(rows=None, epochs=60, architecture="resnet-18", count=5),
            *reported(rows=None, epochs=20, count=5),
        ),
    },
    claims=(
        Claim(
            text="at most 5 % attack success after auto; 16.7 % at 88.1 % accuracy is published",
            source=f"our bar; {BOARD}",
            measure="success_repaired",
            at_most=0.05,
        ),
        Claim(
            text="at most 20 % in every group after auto",
            source="our bar",
            measure="groups_repaired",
            at_least=1.0,
        ),
        Claim(
            text="at most a point of accuracy lost by auto, in every group",
            source="our bar",
            measure="accuracy_repaired",
            at_least=1.0,
        ),
        Claim(
            text="at most 5 % attack success after further training",
            source="our bar",
            measure="success_returned",
            at_most=0.05,
        ),
        Claim(
            text="a scan finds nothing in models that auto has mended",
            source="our bar",
            measure="nothing_found_repaired",
            at_least=1.0,
        ),
    ),
)
