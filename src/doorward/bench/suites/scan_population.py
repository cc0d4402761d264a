"""Does the shipped verdict find planted patches, name their target, and leave clean models alone?"""

from doorward.bench.suite import Between, Claim, Data, Group, MethodChoice, OneOf, Suite

MIXED = ("small-cnn", "resnet-8", "vgg", "resnet-14")
#: How long each data set trains: its classifiers reach what such networks reach, in a minute at most.
FASHION, MNIST = Data(name="fashion_mnist", rows=20_000), Data(name="mnist", rows=20_000)
GTSRB = Data(name="gtsrb", rows=15_000)
#: Of the first model: those below were seen when some rules were made (docs/design.md), so none is judged.
UNSEEN = 200
EPOCHS = {"fashion_mnist": {"epochs": 3}, "mnist": {"epochs": 3}, "gtsrb": {"epochs": 12}}
CORNERS = OneOf(values=("top-left", "top-right", "bottom-left", "bottom-right"))
PLACES = OneOf(values=(*CORNERS.values, "centre", "random"))


def badnets(classes: int, **settings: object) -> MethodChoice:
    """Return BadNets with everything varied that is not fixed here."""
    varied = {
        "size": OneOf(values=(2, 3, 4, 5)),
        "place": PLACES,
        "colour": OneOf(values=("white", "checker", "random")),
        "target": OneOf(values=tuple(range(classes))),
        "poison_rate": Between(low=0.01, high=0.05),
    }
    return MethodChoice(name="badnets", settings=varied | settings)


def clean(data: Data, models: int) -> Group:
    """Return the clean models of a data set; those of other suites with the same training are the same."""
    return Group(
        name=f"{data.name}-clean",
        data=data,
        models=models,
        # of the large data set, at 12 epochs, the larger networks would take most of a run's time
        architectures=MIXED[:2] if data == GTSRB else MIXED,
        training=EPOCHS[data.name],
        first_seed=UNSEEN,
    )


def planted(data: Data, models: int, classes: int, **settings: object) -> Group:
    """Return the planted models that claims are made of."""
    return clean(data, models).model_copy(
        update={"name": f"{data.name}-badnets", "attack": badnets(classes, **settings)}
    )


def repeated(name: str, group: Group, models: int) -> Group:
    """Return the first models of a group, scanned with several seeds and several draws of images."""
    changes = {
        "name": f"{name}-repeated",
        "first_of": group.name,
        "models": models,
        "excluded_from_claims": True,
    }
    return group.model_copy(update=changes | {"seeds": 5, "draws": 5})


def harder(data: Data, kind: str, models: int, about: str, **settings: object) -> Group:
    """Return planted models of a kind that is harder to find, or to plant; reported on their own."""
    named = {
        "name": f"{data.name}-{kind}",
        "about": about,
        "attack": badnets(10, **settings),
        "excluded_from_claims": True,
    }
    return clean(data, models).model_copy(update=named)


LARGE = OneOf(values=(4, 5))
TWO_SOURCES = {"source_classes": (1, 5), "target": 3, "poison_rate": 0.04, "cover_rate": 0.03}
ALL_TO_ALL = {"mapping": "all-to-all", "target": None, "poison_rate": 0.1, "place": CORNERS}
PLANTED_FASHION, PLANTED_MNIST = planted(FASHION, 24, 10), planted(MNIST, 24, 10)

CPU = (
    clean(FASHION, 20),
    PLANTED_FASHION,
    clean(MNIST, 20),
    PLANTED_MNIST,
    clean(GTSRB, 10),
    # of few images with many colours, many a patch does not take; at least ten shall
    planted(GTSRB, 16, 43, size=OneOf(values=(3, 4, 5)), poison_rate=Between(low=0.03, high=0.05)),
    harder(
        FASHION, "rate-0.3", 3, "0.3 % of the images poisoned", poison_rate=0.003, place=CORNERS, size=LARGE
    ),
    harder(FASHION, "one-pixel", 2, "one white pixel", size=1, colour="white"),
    harder(FASHION, "alpha-0.2", 2, "a patch blended in at 20 %", alpha=0.2, poison_rate=0.05),
    harder(FASHION, "source-specific", 2, "for images of two classes alone", **TWO_SOURCES),
    # success is at most the accuracy, which is below 90 % on Fashion-MNIST
    harder(MNIST, "all-to-all", 2, "sends every class to the next", **ALL_TO_ALL),
    repeated("fashion_mnist-badnets", PLANTED_FASHION, 2),
    repeated("mnist-badnets", PLANTED_MNIST, 2),
)

#: For a GPU, in shards: --only 'gtsrb-*', or 'mnist-badnets-0*', and so on.
FULL = tuple(
    make(Data(name=name), models, *classes).model_copy(
        update={"architectures": ("resnet-18", "vgg"), "training": {"epochs": epochs}}
    )
    for name, models, k, epochs in (("fashion_mnist", 24, 10, 6), ("mnist", 24, 10, 4), ("gtsrb", 12, 43, 15))
    for make, classes in ((clean, ()), (planted, (k,)))
)

SMALL = Data(name="reference:fashion_mnist", rows=3_000)
SMOKE = (
    Group(name="fashion-clean", data=SMALL, models=2, training={"epochs": 8}),
    Group(
        name="fashion-badnets",
        data=SMALL,
        models=2,
        training={"epochs": 8},
        attack=badnets(10, size=4, place="bottom-right", colour="checker", poison_rate=0.05),
    ),
)

SUITE = Suite(
    name="scan-population",
    title="Scan planted and clean models",
    about="BadNets patches of 2 to 5 pixels, varied in place, colour, target and rate (1 to 5 %; GTSRB from "
    "3 pixels and 3 %); 100 clean test images are given; the verdict is the shipped one. A plant counts when "
    "its attack success is at least 90 %.",
    scales={"smoke": SMOKE, "cpu": CPU, "full": FULL},
    claims=(
        Claim(
            text="exactly the right target in at least 96 % of planted models",
            source="our bar",
            measure="exact_target",
            at_least=0.96,
        ),
        Claim(
            text="at most 4 % of clean models flagged or not judged",
            source="our bar",
            measure="clean_wrong",
            at_most=0.04,
        ),
        Claim(
            text="the same verdict and target over 5 seeds and 5 draws of images in at least 95 % of them",
            source="our bar",
            measure="stable",
            groups=("fashion_mnist-badnets-repeated", "mnist-badnets-repeated"),
            at_least=0.95,
        ),
    ),
)
