"""How often is a clean model flagged, by number of classes, and does the verdict stay when a seed changes?"""

from doorward.bench.suite import Claim, Data, Group, Suite
from doorward.bench.suites.scan_population import FASHION, GTSRB, MNIST, UNSEEN, clean, repeated

QUICK = ("small-cnn", "resnet-8")


def subsets(name: str, models: int, counts: tuple[int, ...], out_of: int, epochs: int) -> Group:
    """Return clean models of some classes of a data set."""
    return Group(
        name=f"{name}-subsets-{min(counts)}-{max(counts)}",
        data=Data(name=name, rows=4_000),
        models=models,
        class_counts=counts,
        out_of=out_of,
        architectures=QUICK,
        training={"epochs": epochs},
        first_seed=UNSEEN,
    )


WHOLE = (clean(FASHION, 20), clean(MNIST, 20), clean(GTSRB, 10))

CPU = (
    *WHOLE,
    subsets("fashion_mnist", 20, (2,), 10, 5),
    subsets("mnist", 20, (2,), 10, 5),
    subsets("fashion_mnist", 20, (3, 4, 5, 6, 7, 8, 9), 10, 6),
    subsets("mnist", 20, (3, 4, 5, 6, 7, 8, 9), 10, 6),
    subsets("gtsrb", 12, (25, 30, 35, 40), 43, 12),
    *(repeated(group.data.name, group, models) for group, models in zip(WHOLE[:2], (3, 3), strict=True)),
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
