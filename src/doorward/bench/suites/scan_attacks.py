"""Which attacks does the shipped verdict find? The models are those of suite `attacks`, scanned."""

from collections.abc import Iterable

from doorward.bench.suite import Group, Suite
from doorward.bench.suites import attacks

#: Of data that the calibration models were not trained on.
JUDGED = ("mnist", "fashion_mnist", "reference:fashion_mnist", "gtsrb")
MODELS = 2


def counterparts(group: Group) -> Group:
    """Return the clean counterparts, with the data, training and architecture in the name."""
    few = f"{len(group.data.classes)}-classes" if group.data.classes else ""
    epochs = f"{group.training['epochs']}-epochs" if "epochs" in group.training else ""
    robust = "robust" if group.robust else ""
    name = "-".join(filter(None, (group.data.name, "clean", *group.architectures, few, epochs, robust)))
    return group.model_copy(update={"name": name, "attack": None, "about": "clean counterparts"})


def scanned(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Return the first models of each group with a backdoor, and their clean counterparts."""
    planted = [
        g.model_copy(update={"models": min(MODELS, g.models)})
        for g in groups
        if g.data.name in JUDGED and g.attack and not g.excluded_from_claims
    ]
    clean = {twin.name: twin for twin in map(counterparts, planted)}
    return (*planted, *clean.values())


SUITE = Suite(
    name="scan-attacks",
    title="Scan what every attack planted",
    about="Models of suite `attacks` and their clean counterparts: which attacks does the shipped verdict "
    "find? 100 clean test images are given. A plant counts when its attack success is at least 90 %.",
    scales={"smoke": scanned(attacks.SUITE.scales["smoke"]), "cpu": scanned(attacks.CPU)},
)
