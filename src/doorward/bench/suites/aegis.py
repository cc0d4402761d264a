"""Backdoors in adversarially trained models, and their clean counterparts, as AEGIS is judged on them."""

from __future__ import annotations

from typing import Any

from doorward.bench.suite import Claim, Data, Group, MethodChoice, Suite
from doorward.bench.suites.attacks import APART, LOCALISED

#: Of the first model: settings of the detector were looked at on models of other seeds and of other data.
FIRST = 700
#: L2 radii of the attack in training: the published one, and one that tells from ordinary training on digits.
RADII = (0.5, 2.0)
PLANTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "clean": None,
    "localised": ("badnets", LOCALISED),
    "distributed": ("distributed", APART),
}


def models(
    data: Data, radius: float, kind: str, count: int, epochs: int, architecture: str = "small-cnn"
) -> Group:
    """Return models of one data set that are trained against 3 steps of PGD within an L2 radius."""
    plant = PLANTS[kind]
    own = "" if architecture == "small-cnn" else architecture
    return Group(
        name="-".join(filter(None, (data.name.removeprefix("reference:"), kind, f"{radius:g}", own))),
        about=f"trained against PGD within {radius:g} (L2)",
        data=data,
        models=count,
        attack=plant and MethodChoice(name=plant[0], settings=plant[1]),
        architectures=(architecture,),
        training={"epochs": epochs},
        robust={"norm": "l2", "eps": radius, "steps": 3},
        first_seed=FIRST,
    )


#: What the paper is about: data sets, radii, and what is planted.
CPU = tuple(
    models(Data(name=name, rows=12_000), radius, kind, count, 4, architecture)
    for architecture, count in (("small-cnn", 5), ("resnet-8", 2), ("resnet-14", 2))
    for name in ("mnist", "fashion_mnist")
    for radius in RADII
    for kind in PLANTS
)

SMALL = Data(name="reference:fashion_mnist", rows=2_000)
SMOKE = tuple(models(SMALL, 0.5, kind, 1, 6) for kind in PLANTS)


def groups(*kinds: str) -> tuple[str, ...]:
    """Return the names of the groups of some kinds."""
    return tuple(g.name for g in CPU if g.name.split("-")[1] in kinds)


SUITE = Suite(
    name="aegis",
    title="Scan adversarially trained models",
    about="Adversarially trained models of MNIST and Fashion-MNIST, clean or with 1 % of the images poisoned "
    "by one patch or by two that lie apart, as AEGIS is judged on; 100 clean test images are given. A plant "
    "counts when its attack success is at least 80 %.",
    least_success=0.8,
    scales={"smoke": SMOKE, "cpu": CPU},
    claims=(
        Claim(
            text="91.6 % of infected models found (11 of 12)",
            source="Soremekun et al., 2023",
            measure="flagged",
        ),
        Claim(
            text="exactly the right target in all infected models",
            source="our bar",
            measure="exact_target",
            at_least=1.0,
        ),
        Claim(
            text="no clean model flagged or not judged",
            source="Soremekun et al., 2023, and our bar",
            measure="clean_wrong",
            at_most=0.0,
        ),
        *(
            Claim(
                text=f"exactly the right target with a {kind} trigger",
                source="our bar",
                measure="exact_target",
                groups=groups(kind),
                at_least=1.0,
            )
            for kind in ("localised", "distributed")
        ),
    ),
)
