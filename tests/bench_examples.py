"""Trials so small that a test can run them: a few hundred embedded images, a scan of a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from doorward.bench.results import DetectorOutcome, Result
from doorward.bench.suite import Claim, Data, Group, MethodChoice, ScanSettings, Suite, Trial, expand
from doorward.core.records import Measurement
from doorward.scan.calibration import CalibrationSet, CleanModel

DATA = Data(name="reference:fashion_mnist", rows=400)
#: Enough to rise above chance.
TRAINING = {"epochs": 3, "precision": "float32"}
QUICK = ScanSettings(
    detectors=(MethodChoice(name="max-margin", settings={"starts": 1, "steps": 5}),), images=40
)
PATCH = MethodChoice(name="badnets", settings={"poison_rate": 0.1, "target": 3, "size": 4})


def clean(models: int = 2, **changes: object) -> Group:
    return Group(name="clean", data=DATA, models=models, training=TRAINING).model_copy(update=changes)


def planted(models: int = 1, **changes: object) -> Group:
    return clean(models, name="planted", attack=PATCH).model_copy(update=changes)


def suite(*groups: Group, claims: tuple[Claim, ...] = ()) -> Suite:
    return Suite(
        name="tiny",
        title="Tiny",
        about="Small.",
        scales={"smoke": groups},
        claims=claims,
        scan_settings=QUICK,
    )


def robust(models: int = 1, **changes: object) -> Group:
    attack = {"eps": 0.1, "variant": "fast"}
    return clean(models, name="robust", robust=attack).model_copy(update=changes)


def trials(*groups: Group) -> tuple[Trial, ...]:
    return expand(suite(*groups), "smoke")


def result(trial: str, group: str, p: float | None = None, **changes: object) -> Result:
    """Return a done result of a clean model; flagged at p <= .05, could-not-tell without p."""
    verdict = "could_not_tell" if p is None else "suspicious" if p <= 0.05 else "nothing_found"
    score = None if p is None else 1 - p
    judged = {"max-margin": DetectorOutcome(verdict=verdict, score=score, p_value=p, targets=(), seconds=1.0)}
    base = Result(
        trial=trial,
        group=group,
        status="done",
        data="fashion_mnist",
        model=trial,
        architecture="small-cnn",
        classes=10,
        accuracy=0.9,
        verdict=verdict,
        p_value=p,
        detectors=judged,
        seconds=2.0,
        peak_memory=1_000_000,
    )
    return base.model_copy(update=changes)


def calibration_around(measurements: Sequence[Measurement]) -> CalibrationSet:
    """Return a calibration for quick scans: 200 clean models that score about as high as was measured."""
    models = tuple(
        CleanModel(
            name=str(i),
            data="a",
            architecture="small-cnn",
            classes=10,
            shape=(1, 28, 28),
            accuracy=0.9,
            scores={m.detector: (float(m.score or 0.0) + (i - 100) / 10,) * 10 for m in measurements},
        )
        for i in range(200)
    )
    return CalibrationSet(
        settings={m.detector: m.settings for m in measurements}, images=QUICK.images, models=models
    )


DETECTOR = '''"""A detector in a file of somebody else's."""

from doorward.detectors.base import Detector


class Numbered(Detector):
    """Score each class by its number."""

    title = "Numbers"
    source = "none"
    limits = "Sees nothing."
    needs = frozenset({"clean"})

    scale: float = 1.0

    def examine(self, subject, *, generator, device, deadline):
        scores = {t: self.scale * t for t in range(len(subject.classifier.classes))}
        return self.measurement(summary="Nothing.", score=max(scores.values()), per_class=scores)
'''


def write_detector(folder: Path) -> str:
    """Write a detector into a file of a name of its own, and return how the detector is named."""
    file = folder / f"numbered_{folder.name.replace('-', '_')}.py"
    file.write_text(DETECTOR)
    return f"{file}:Numbered"
