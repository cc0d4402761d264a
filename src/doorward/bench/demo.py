"""The demonstration: a backdoored classifier of clothes and its clean counterpart, each scanned as a file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from doorward import bundled
from doorward.attacks.ground_truth import PlantedBackdoor, attack_success, read_plant
from doorward.core.records import SEVERITY, Rate, Report
from doorward.methods import registry
from doorward.models.formats.native import save_native
from doorward.scan.context import Progress
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest
from doorward.training import default_settings, train_classifier

ARCHITECTURE = "small-cnn"
ATTACK = {"poison_rate": 0.02, "target": 0, "size": 3, "place": "bottom-right"}


@dataclass(frozen=True)
class Twin:
    """One of the two models: where it lies, how good it is, and the truth of its plant, if any."""

    name: str
    path: Path
    clean_accuracy: Rate | None
    plant: PlantedBackdoor | None

    def as_expected(self, report: Report) -> bool:
        """Return whether a verdict is right: the planted target found, or nothing found."""
        if self.plant is None:
            return report.verdict == "nothing_found"
        return SEVERITY[report.verdict] >= SEVERITY["suspicious"] and report.targets == self.plant.targets


def train_twins(out: Path, *, seed: int, progress: Progress) -> list[Twin]:
    """Plant a white patch in 2 % of 6,000 pictures of clothes; train a model on them, and one without."""
    train, test = bundled.fashion_mnist("train"), bundled.fashion_mnist("test")
    poisoned = registry.build("attack", "badnets", ATTACK)(train, seed=seed)
    twins = []
    for name, samples in (("backdoored", poisoned.samples), ("clean", train)):
        progress(f"training the {name} model")
        settings = default_settings(ARCHITECTURE, images=len(samples), side=28)
        trained = train_classifier(ARCHITECTURE, samples, seed=seed, settings=settings, test=test)
        path = save_native(
            trained.classifier.module,
            architecture=ARCHITECTURE,
            spec=trained.classifier.spec,
            classes=samples.classes,
            directory=out / name,
        )
        plant = None
        if name == "backdoored":
            success = attack_success(trained.classifier, test, poisoned.plant)
            plant = poisoned.plant.model_copy(update={"attack_success": success})
        twins.append(Twin(name, path, trained.record.test_accuracy, plant))
    return twins


def ready_made(out: Path) -> list[Twin]:
    """Put the two models that come with the package into a folder, to be looked at like anybody's."""
    for name in ("backdoored", "clean"):
        shutil.copytree(bundled.model(name), out / name, dirs_exist_ok=True)
    plant = read_plant(out / "backdoored" / "plant.json")
    return [
        Twin("backdoored", out / "backdoored", plant.clean_accuracy, plant),
        Twin("clean", out / "clean", None, None),
    ]


def clean_images(out: Path) -> Path:
    """Put 1,000 clean test images into a folder, in the layout of the Hugging Face hub; return it."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundled.FOLDER / "fashion_mnist" / "test.parquet", images / "test.parquet")
    return images


def scan_twin(twin: Twin, images: Path, *, seed: int, progress: Progress) -> Report:
    """Scan a model from its files; of its plant the scan knows nothing."""
    request = ScanRequest(model=str(twin.path), clean=str(images), seed=seed)
    return scan(request, progress=progress)
