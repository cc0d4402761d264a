"""Clean models to calibrate on. No model is judged by those of its own data (`bench.holdout`)."""

from typing import Any

from doorward.bench.suite import Data, Group, Suite, World

ARCHITECTURES = ("small-cnn", "resnet-8", "vgg")
ROBUST_ARCHITECTURES = ("small-cnn", "resnet-8")
#: As most people train, where the others here are trained by AdamW.
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4}
FEW, SOME, MANY = (3, 4, 5, 6, 7, 8, 9), (10, 12, 15, 20), (25, 30, 43)


def worlds(family: str, size: int, models: int, counts: tuple[int, ...], rows: int = 4_000) -> Group:
    """Return clean models of generated data, each of a world of its own."""
    return Group(
        name=f"{family}-{min(counts)}-{max(counts)}",
        data=Data(name=family, rows=rows, world=World(size=size)),
        models=models,
        class_counts=counts,
        architectures=ARCHITECTURES,
        training={"epochs": 5},
    )


def real(
    name: str,
    models: int,
    counts: tuple[int, ...],
    out_of: int,
    rows: int | None,
    epochs: int,
    architectures: tuple[str, ...] = ARCHITECTURES,
    **training: Any,
) -> Group:
    """Return clean models of some classes of a real data set; `training` changes how they are trained."""
    return Group(
        name=f"{name}-{min(counts)}-{max(counts)}",
        data=Data(name=name, rows=rows),
        models=models,
        class_counts=counts,
        out_of=out_of,
        architectures=architectures,
        training={"epochs": epochs} | training,
    )


def robust(group: Group, eps: float) -> Group:
    """Return the group, trained against the fast attack within an l2 radius."""
    return group.model_copy(
        update={
            "name": f"{group.name}-robust",
            "architectures": ROBUST_ARCHITECTURES,
            "robust": {"norm": "l2", "eps": eps, "variant": "fast"},
        }
    )


CPU = (
    # two classes
    real("cifar10", 18, (2,), 10, 3_000, 6),
    real("pneumoniamnist", 15, (2,), 2, 2_500, 5),
    worlds("glyphs", 28, 12, (2,), 2_500),
    worlds("objects-hard", 32, 12, (2,), 2_500),
    # three to nine
    real("cifar10", 24, FEW, 10, 5_000, 6),
    worlds("glyphs-hard", 28, 12, FEW),
    worlds("signs", 32, 12, FEW),
    worlds("shapes", 28, 12, FEW),
    # ten to twenty
    real("cifar10", 18, (10,), 10, 8_000, 6),
    worlds("glyphs", 28, 12, SOME),
    worlds("textures", 32, 12, SOME),
    worlds("objects", 32, 12, SOME, 5_000),
    worlds("shapes-hard", 28, 8, SOME, 5_000),
    # some classes of what other suites judge by, where these models are left out; trained as most people do
    real("fashion_mnist", 6, FEW, 10, 5_000, 8, **SGD),
    real("mnist", 4, FEW, 10, 5_000, 6, **SGD),
    real("gtsrb", 6, (*SOME, *MANY[:2]), 43, 6_000, 12, augment="shift", **SGD),
    # adversarially trained, for the detectors that need it
    robust(worlds("glyphs", 28, 6, (4, 6, 8, 10, 12, 15)), 1.0),
    robust(real("cifar10", 4, (5, 6, 7, 8, 9, 10), 10, 4_000, 6), 0.5),
    # more
    real("orl_faces", 2, (25, 40), 40, None, 20, ("resnet-8",)),  # large images cost most
    worlds("signs-hard", 32, 8, MANY, 6_000),
    worlds("glyphs-hard", 28, 8, MANY, 6_000),
    worlds("shapes", 28, 7, MANY, 6_000),
    worlds("signs", 32, 7, MANY, 6_000),
    worlds("glyphs", 28, 3, (60, 100), 8_000),
)

#: As many models of a few classes as a calibration needs at least.
SMOKE = worlds("glyphs", 28, 10, (10, 12), 1_000).model_copy(update={"architectures": ("small-cnn",)})

SUITE = Suite(
    name="calibration",
    title="Clean models to calibrate on",
    drawn_as="bank",
    about="Clean models of 2 to 100 classes by which scans are calibrated; 100 clean test images are given.",
    scales={
        "smoke": (SMOKE,),
        "cpu": CPU,
    },
)
