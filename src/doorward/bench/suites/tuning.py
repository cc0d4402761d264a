"""Planted models of the calibration data: statistics and rules are chosen on them, and not on judged data."""

from doorward.bench.suite import Between, Data, Group, MethodChoice, OneOf, Suite, World
from doorward.bench.suites.scan_population import badnets

ARCHITECTURES = ("small-cnn", "resnet-8", "vgg")


def planted(data: Data, models: int, classes: int, epochs: int = 6) -> Group:
    """Return planted models of one data set; of generated data each has a world of its own."""
    attack = badnets(classes, poison_rate=Between(low=0.02, high=0.05), size=OneOf(values=(3, 4, 5)))
    return Group(
        name=f"{data.name}-{classes}-badnets",
        data=data,
        models=models,
        attack=attack,
        architectures=ARCHITECTURES,
        training={"epochs": epochs},
    )


def fine(data: Data, models: int) -> Group:
    """Return ten-class models with patches of fine texture, the hardest for masks, at any place and rate."""
    varied = {"size": OneOf(values=(3, 4, 5)), "colour": OneOf(values=("checker", "random"))}
    return Group(
        name=f"{data.name}-10-fine",
        about="patches of fine texture",
        data=data,
        models=models,
        attack=badnets(10, **varied),
        architectures=ARCHITECTURES[1:],
        training={"epochs": 6},
    )


def spread(data: Data, models: int, attack: str, epochs: int = 6, **settings: object) -> Group:
    """Return ten-class models whose trigger is spread over the image; reported on their own."""
    varied = {"target": OneOf(values=tuple(range(10))), "poison_rate": Between(low=0.04, high=0.1)}
    return Group(
        name=f"{data.name}-10-{attack}",
        about="spread over the image",
        data=data,
        models=models,
        attack=MethodChoice(name=attack, settings=varied | settings),
        architectures=ARCHITECTURES,
        training={"epochs": epochs},
        excluded_from_claims=True,
    )


def world(family: str, size: int, classes: int) -> Data:
    """Return a family of generated data sets with so many classes."""
    return Data(name=family, rows=8_000, world=World(size=size, classes=classes))


SUITE = Suite(
    name="tuning",
    title="Planted models to choose by",
    about="BadNets patches in models of the calibration data. Statistics, settings and rules are chosen on "
    "these and on suite calibration alone, so that other suites judge what they have not seen.",
    scales={
        "smoke": (planted(Data(name="glyphs", rows=3_000, world=World(size=28, classes=5)), 1, 5, 8),),
        "cpu": (
            planted(Data(name="cifar10", rows=10_000), 6, 10),
            planted(world("glyphs-hard", 28, 10), 4, 10),
            planted(world("textures", 32, 10), 4, 10),
            planted(world("objects", 32, 10), 4, 10),
            planted(world("shapes", 28, 5), 4, 5),
            planted(world("signs", 32, 30), 4, 30),
            fine(world("glyphs", 28, 10), 8),
            fine(world("shapes-hard", 28, 10), 8),
            spread(Data(name="cifar10", rows=10_000), 3, "blended", alpha=Between(low=0.1, high=0.2)),
            spread(world("glyphs-hard", 28, 10), 3, "blended", alpha=Between(low=0.1, high=0.2)),
            spread(world("textures", 32, 10), 3, "blended", alpha=Between(low=0.1, high=0.2)),
            spread(world("glyphs", 28, 10), 3, "warp", 12, strength=1.0),
            spread(world("objects", 32, 10), 3, "warp", 12, strength=2.0),
        ),
    },
)
