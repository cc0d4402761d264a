"""Is a planted patch found without any data, and are clean models left alone?"""

from __future__ import annotations

from doorward.bench.suite import Between, Claim, Data, Group, MethodChoice, OneOf, ScanSettings, Suite
from doorward.bench.suites.scan_population import EPOCHS, PLACES, badnets

MODELS = 10
#: Of the first model: no other suite has models of these seeds.
FIRST = 400
#: Signs are the most work: fewer images, and the quickest network.
DATA = (
    Data(name="mnist", rows=10_000),
    Data(name="fashion_mnist", rows=10_000),
    Data(name="gtsrb", rows=10_000),
)
EPOCH = EPOCHS | {"mnist": {"epochs": 4}, "fashion_mnist": {"epochs": 4}}
SIGNS = {"size": OneOf(values=(3, 4, 5)), "poison_rate": Between(low=0.03, high=0.05)}


def clean(data: Data) -> Group:
    """Return the clean models of a data set."""
    return Group(
        name=f"{data.name}-clean", data=data, models=MODELS, training=EPOCH[data.name], first_seed=FIRST
    )


def planted(data: Data, classes: int, **settings: object) -> Group:
    """Return models with a planted patch, of any place, colour and size."""
    group = clean(data)
    attack = badnets(classes, place=PLACES, **settings)
    return group.model_copy(update={"name": f"{data.name}-badnets", "attack": attack})


SETS = tuple(data.name for data in DATA)
SMALL = Data(name="reference:fashion_mnist", rows=3_000)
SMOKE = (
    Group(name="fashion-clean", data=SMALL, models=1, training={"epochs": 8}),
    Group(
        name="fashion-badnets",
        data=SMALL,
        models=1,
        training={"epochs": 8},
        attack=badnets(10, size=4, place="bottom-right", colour="checker", poison_rate=0.05),
    ),
)

SUITE = Suite(
    name="deepinspect",
    title="Inspect models without data",
    about="BadNets patches of 2 to 5 pixels, varied in place, colour, target and rate, in small networks, "
    "and clean models; no image is given. A plant counts when its attack success is at least 90 %. The "
    "published rule, a deviation factor above 2, has columns of its own.",
    scan_settings=ScanSettings(detectors=(MethodChoice(name="deepinspect"),), images=0),
    scales={
        "smoke": SMOKE,
        "cpu": tuple(
            group
            for data in DATA
            for group in (
                clean(data),
                planted(data, 43, **SIGNS) if data.name == "gtsrb" else planted(data, 10),
            )
        ),
    },
    claims=(
        Claim(
            text="at least 90 % of planted models flagged", source="our bar", measure="flagged", at_least=0.9
        ),
        *(
            Claim(
                text="at most 1 of 10 clean models flagged",
                source="our bar",
                measure="clean_wrong",
                groups=(f"{name}-clean",),
                at_most=0.1,
            )
            for name in SETS
        ),
    ),
)
