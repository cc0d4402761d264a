"""Clean training sets to calibrate detectors of poison on: generated ones, and real ones but where judged."""

from __future__ import annotations

from typing import Any

from doorward.bench.suite import Data, Group, MethodChoice, ScanSettings, Suite, World

EPOCHS = 12
THINNED = {"poison_rate": 0.0, "imbalance": (0.5, 5)}
FEW, SOME, MANY = (3, 4, 5, 6, 7, 8, 9), (10, 12), (20, 30)


def clean(
    family: str,
    models: int,
    counts: tuple[int, ...],
    kind: str = "",
    attack: str | None = None,
    settings: dict[str, Any] | None = None,
    rows: int = 1_000,
) -> Group:
    """Return clean training sets of generated data, each of a world of its own.

    Args:
        attack: thins classes or gives wrong labels, and plants nothing.
    """
    return Group(
        name="-".join(filter(None, (family.replace(":", "-"), str(min(counts)), kind))),
        about=kind,
        data=Data(name=family, rows=rows, world=World(size=28)),
        models=models,
        class_counts=counts,
        attack=None if attack is None else MethodChoice(name=attack, settings=settings or {}),
        training={"epochs": EPOCHS},
    )


def real(name: str, models: int, *, rows: int = 1_000, thinned: bool = False) -> Group:
    """Return clean parts of a real data set; what judges that set is compared with the others alone."""
    return Group(
        name="-".join(filter(None, (name, "imbalanced" if thinned else ""))),
        about="imbalanced" if thinned else "",
        data=Data(name=name, rows=rows),
        models=models,
        attack=MethodChoice(name="badnets", settings=THINNED) if thinned else None,
        training={"epochs": EPOCHS},
    )


def kinds(family: str, models: int, counts: tuple[int, ...], rows: int = 1_000) -> list[Group]:
    """Return plain sets, imbalanced ones, and sets with wrong labels.

    Classes of several kinds are not among them: a kind that a network has not seen looks like another class,
    so that no threshold tells such a set from one whose classes are poisoned from each other.
    """
    wrong = {"poison_rate": 0.05}
    return [
        clean(family, models, counts, rows=rows),
        clean(family, models, counts, "imbalanced", "badnets", THINNED, rows=rows),
        clean(family, models, counts, "noisy", "label-flipping", wrong, rows=rows),
    ]


SUITE = Suite(
    name="training-calibration",
    title="Clean training sets to calibrate on",
    about="Clean training sets by which detectors of poison are calibrated, most of generated data: plain, "
    "imbalanced, and with wrong labels. What judges real data is compared with the others alone.",
    scan_settings=ScanSettings(detectors=(MethodChoice(name="activation-clustering"),)),
    scales={
        "smoke": (clean("glyphs", 2, (3,), rows=400),),
        "cpu": (
            *kinds("glyphs", 8, FEW),
            *kinds("shapes", 8, SOME),
            *kinds("textures", 6, FEW),
            *kinds("glyphs-hard", 4, MANY, rows=1_500),
            *kinds("signs", 4, SOME),
            real("fashion_mnist", 6),
            real("fashion_mnist", 4, thinned=True),
            real("mnist", 4),
            real("gtsrb", 6, rows=3_000),
        ),
    },
)
