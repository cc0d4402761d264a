"""The demonstration: a backdoored classifier of clothes and a clean one, scanned as files, and a repair."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doorward import bundled
from doorward.attacks.ground_truth import PlantedBackdoor, attack_success, read_plant
from doorward.core.records import SEVERITY, Rate, RecoveredTrigger, Report
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.models import TorchClassifier, open_classifier
from doorward.models.formats.native import save_native
from doorward.repair import RepairReport, RepairRequest
from doorward.repair.by_clean_data import Scanned, repair_by_clean_data
from doorward.scan.context import Progress, ScanContext
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest
from doorward.training import default_settings, train_classifier

ARCHITECTURE = "small-cnn"
#: Images that the planted trigger is tried on after the repair, and how often it may still work then.
TRIED, LEFT = 500, 0.1
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


@dataclass(frozen=True)
class MendedTwin:
    """The backdoored model after its repair: where it lies, what was done, and the truth of what is left.

    Attributes:
        success: of the planted trigger, on images that the repair has not seen.
    """

    path: Path
    report: RepairReport
    success: Rate

    @property
    def as_expected(self) -> bool:
        """Return whether a scan finds nothing in it, and neither planted nor recovered triggers work."""
        return self.report.exit_code == 0 and self.success.value <= LEFT


def mend_twin(
    twin: Twin, scanned: Report, images: Path, out: Path, *, seed: int, progress: Progress
) -> MendedTwin:
    """Mend the backdoored model by what its scan found, and scan it again by the detectors that found it."""
    assert twin.plant is not None, "the clean model needs no repair"
    classifier = open_classifier(twin.path)
    assert isinstance(classifier, TorchClassifier)
    request = RepairRequest(model=str(twin.path), clean=str(images), seed=seed, detectors=_alarming(scanned))
    outcome = repair_by_clean_data(
        request,
        classifier,
        ScanContext(seed=seed, report_progress=progress),
        Scanned(scanned.verdict, scanned.findings, scanned.not_run),
    )
    mended = outcome.classifier
    assert mended is not None
    others = bundled.fashion_mnist("train").draw(TRIED, np.random.default_rng(seed))
    return MendedTwin(outcome.save(out), outcome.report, attack_success(mended, others, twin.plant))


def _alarming(scanned: Report) -> tuple[Detector, ...]:
    """Return the detectors that recovered a trigger of a class that the verdict names."""
    built = [
        registry.build("detector", finding.detector, {})
        for finding in scanned.findings
        if finding.flagged
        and any(isinstance(e, RecoveredTrigger) and e.target in finding.targets for e in finding.evidence)
    ]
    return tuple(one for one in built if isinstance(one, Detector))
