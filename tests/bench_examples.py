"""Trials so small that a test can run them: a few hundred embedded images, a scan of a second."""

from __future__ import annotations

from doorward.bench.results import DetectorOutcome, Result
from doorward.bench.suite import Claim, Data, Group, MethodChoice, ScanSettings, Suite, Trial, expand

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
