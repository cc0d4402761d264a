"""How often is a clean model flagged, by number of classes, and does the verdict stay when a seed changes?"""

from doorward.bench.suite import Claim, Data, Group, Suite
from doorward.bench.suites.scan_population import FASHION, GTSRB, MNIST, UNSEEN, clean, repeated

QUICK = ("small-cnn", "resnet-8")
#: Of the first model, where no other suite has the same. Three rules were made after a look at these models:
#: that scores are measured among models of two classes, or of more, and not by finer buckets; that what an
#: uniform blend does as well speaks less for a class; and that one detector alone weighs less the further it
#: goes.
FIRST = 100
#: Of models that were made when all rules were.
NEWEST = 300


def subsets(
    name: str,
    models: int,
    counts: tuple[int, ...],
    out_of: int,
    epochs: int,
    architectures: tuple[str, ...] = QUICK,
) -> Group:
    """Return clean models of some classes of a data set."""
    kind = f"-{architectures[0]}" if architectures != QUICK else ""
    return Group(
        name=f"{name}-subsets-{min(counts)}-{max(counts)}{kind}",
        data=Data(name=name, rows=4_000),
        models=models,
        class_counts=counts,
        out_of=out_of,
        architectures=architectures,
        training={"epochs": epochs},
        first_seed=FIRST,
    )


def others(group: Group, kind: str, first_seed: int) -> Group:
    """Return as many other models of a group."""
    return group.model_copy(update={"name": f"{group.name}-{kind}", "first_seed": first_seed})


WHOLE = (clean(FASHION, 20), clean(MNIST, 20), clean(GTSRB, 10))
FURTHER = tuple(others(group, "further", FIRST) for group in WHOLE)
FEW, SOME, MANY = (3, 4, 5, 6, 7, 8, 9), (10, 12, 15, 20), (25, 30, 35, 40)
#: The quickest, so that there are enough models in every bucket.
CHEAP = QUICK[:1]

CPU = (
    *WHOLE,
    *FURTHER,
    subsets("fashion_mnist", 50, (2,), 10, 5),
    subsets("mnist", 50, (2,), 10, 5),
    subsets("fashion_mnist", 20, FEW, 10, 6),
    subsets("mnist", 20, FEW, 10, 6),
    subsets("fashion_mnist", 30, FEW, 10, 6, CHEAP),
    subsets("mnist", 30, FEW, 10, 6, CHEAP),
    subsets("gtsrb", 20, SOME, 43, 12, CHEAP),
    subsets("gtsrb", 12, MANY, 43, 12),
    subsets("gtsrb", 56, MANY, 43, 12, CHEAP),
    # made after the first of the three rules
    others(subsets("gtsrb", 24, MANY, 43, 12, CHEAP), "newer", UNSEEN),
    *(
        others(group, "newest", NEWEST)
        for group in (
            subsets("fashion_mnist", 20, (2,), 10, 5),
            subsets("mnist", 20, (2,), 10, 5),
            subsets("gtsrb", 40, MANY, 43, 12, CHEAP),
        )
    ),
    *(repeated(group.data.name, group, models) for group, models in zip(FURTHER[:2], (3, 3), strict=True)),
)

SMALL = Data(name="reference:fashion_mnist", rows=2_000)
SMOKE = (
    Group(name="fashion-clean", data=SMALL, models=2, training={"epochs": 8}),
    Group(
        name="fashion-subsets",
        data=SMALL,
        models=2,
        class_counts=(2, 5),
        out_of=10,
        training={"epochs": 6},
        seeds=2,
    ),
)

SUITE = Suite(
    name="null",
    title="Scan clean models only",
    about="Clean models alone: what is flagged is a false alarm. 100 clean test images are given.",
    scales={"smoke": SMOKE, "cpu": CPU},
    claims=(
        Claim(
            text="p <= .05 in at most 5 % of clean models",
            source="our bar",
            measure="alarm_at_5",
            at_most=0.05,
        ),
        Claim(
            text="p <= .01 in at most 1 % of clean models",
            source="our bar",
            measure="alarm_at_1",
            at_most=0.01,
        ),
        Claim(
            text="could not tell in at most 5 % of clean models",
            source="our bar",
            measure="could_not_tell",
            at_most=0.05,
        ),
        Claim(
            text="the same verdict and target over 5 seeds and 5 draws of images in at least 95 % of models",
            source="our bar",
            measure="stable",
            groups=("fashion_mnist-repeated", "mnist-repeated"),
            at_least=0.95,
        ),
    ),
)
