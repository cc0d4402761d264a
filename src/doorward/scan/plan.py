"""What each detector would cost on this model, and which of them, at which settings, fit into the time.

A plan is made before the first detector runs and again after each: what is left is shared out by what the
model was seen to take.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from doorward.core.records import Cost
from doorward.detectors.base import Detector
from doorward.inversion.transformations import FAMILIES
from doorward.models import Classifier
from doorward.models.batching import chunk_images
from doorward.scan.calibration import calibrations

#: Images on which the pace of a model is measured, at most.
MEASURED = 16
#: What a detector of unknown cost is taken to need for each class: a search of 100 steps with 16 images.
UNKNOWN = 1_600
#: What a measurement is worth that has no calibration, next to one that has: it is evidence alone.
UNCALIBRATED = 0.1
#: What a measurement at quick settings is worth, next to one at full settings.
REDUCED = 0.7
#: Detectors beyond which plans are made one detector at a time.
MOST = 7


@dataclass(frozen=True)
class Pace:
    """Seconds that an image takes through a model, without and with its gradient."""

    forward: float
    gradient: float

    def seconds(self, work: Cost) -> float:
        """Return how long some work takes."""
        return work.forwards * self.forward + work.gradients * self.gradient


@dataclass(frozen=True)
class Option:
    """A detector with settings, and what it would cost and bring.

    Attributes:
        name: of the detector.
        reduced: names and values of the settings that were lowered; empty at full settings.
        seconds: how long it would take, without the surrogates that it shares with others.
        worth: its weight in the verdict, much less where it has no calibration at these settings.
        lesson: images that those surrogates learn from, 0 if they are there or it uses none.
        lesson_seconds: how long the model takes to answer them.
    """

    name: str
    detector: Detector
    reduced: Mapping[str, Any]
    seconds: float
    worth: float
    lesson: int = 0
    lesson_seconds: float = 0.0


def duration(plan: Iterable[Option]) -> float:
    """Return how long options take together; surrogates that several use are made once."""
    plan = tuple(plan)
    return sum(one.seconds for one in plan) + sum({one.lesson: one.lesson_seconds for one in plan}.values())


#: Settings with which the detectors that come with the package are several times as fast. They stand here
#: since the code of a detector keys its calibration.
QUICK: dict[str, dict[str, Any]] = {
    "max-margin": {"starts": 4, "steps": 40},
    "patch-search": {
        "steps": 40,
        "further_steps": 20,
        "restarts": 1,
        "batch_size": 8,
        "tried": 4,
        "candidates": 2,
        "mixtures": 1_600,
    },
    "blend-search": {"steps": 60, "batch_size": 4},
    "trigger-families": {
        "screening_steps": 24,
        "steps": 40,
        "finalists": 2,
        "batch_size": 8,
        "screening_batch": 4,
    },
    "neural-cleanse": {"steps": 80, "first_steps": 25, "batch_size": 8, "restarts": 0, "candidates": 2},
}


def quick_settings(detector: Detector) -> dict[str, Any]:
    """Return settings with which a detector is several times as fast, none where none are known.

    What the user has set lower already stays.
    """
    own = detector.settings()
    quick = detector.quick or QUICK.get(detector.method(), {})
    return {name: value for name, value in quick.items() if own.get(name, 0) > value}


def _max_margin(s: Mapping[str, Any], k: int, n: int) -> Cost:
    starts = s["starts"] if k <= 20 else max(1, s["starts"] // 2)
    return Cost(gradients=k * starts * s["steps"])


def _uniform_blends(k: int) -> int:
    """Return how many images `inversion.uniform_blend` sends through: 14 opacities of 16 sources, or of 8."""
    return k * 14 * (16 if k <= 20 else 8)


def _blend_search(s: Mapping[str, Any], k: int, n: int) -> Cost:
    return Cost(forwards=_uniform_blends(k) + k * n, gradients=k * s["steps"] * s["batch_size"])


def _patch_search(s: Mapping[str, Any], k: int, n: int) -> Cost:
    share, rerun = (1 if k <= s["many_classes"] else 2), min(s["candidates"], k)
    windows = math.ceil(2 * (1 - s["side"]) / s["side"] + 2) ** 2
    tried = windows * s["tried"] * (k / share + rerun * s["restarts"])
    measured = (k + rerun * (s["restarts"] + 1)) * s["places"] * n
    again = rerun * (s["restarts"] * s["steps"] + s["places"] * s["further_steps"]) * s["batch_size"]
    return Cost(
        forwards=int(tried + measured),
        gradients=k * s["steps"] * max(1, s["batch_size"] // share) + again,
    )


def _neural_cleanse(s: Mapping[str, Any], k: int, n: int) -> Cost:
    rerun, batch = min(s["candidates"], k), s["batch_size"]
    finalists = min(k, max(s["candidates"] + 1, math.ceil(s["finalists"] * k)))
    first = s["steps"] if finalists == k else min(s["first_steps"], s["steps"])
    once = k * first + finalists * (s["steps"] - first)
    again = (s["restarts"] * rerun + 1) * s["steps"]
    few = batch if k <= s["many_classes"] else max(1, batch // 2)
    return Cost(
        forwards=_uniform_blends(k) + (k + s["restarts"] * rerun + 1) * n,
        gradients=once * few + again * batch,
    )


def _trigger_families(s: Mapping[str, Any], k: int, n: int) -> Cost:
    if k < 3:  # it says that it cannot tell once it has seen the images
        return Cost()
    size = max(1, s["screening_batch"] // (1 if k <= s["many_classes"] else 2))
    screening = k * s["screening_steps"] * size if k > s["finalists"] else 0
    finals = min(k, s["finalists"]) * s["steps"] * s["batch_size"]
    return Cost(gradients=len(FAMILIES) * (screening + finals))


_WORK: dict[str, Callable[[Mapping[str, Any], int, int], Cost]] = {
    "max-margin": _max_margin,
    "blend-search": _blend_search,
    "patch-search": _patch_search,
    "trigger-families": _trigger_families,
    "neural-cleanse": _neural_cleanse,
}


def work_of(detector: Detector, *, classes: int, images: int) -> Cost:
    """Return how many images a detector sends through a model, about; without those of `lesson`."""
    said = detector.work(classes=classes, images=images)
    if said is not None:
        return said
    known = _WORK.get(detector.method())
    if known is None:
        return Cost(gradients=classes * UNKNOWN)
    return known(detector.settings(), classes, images)


def measure_pace(classifier: Classifier, images: Tensor) -> Pace:
    """Measure how long an image (n, c, h, w) takes through a model that runs as fast as it can."""
    x = images[:MEASURED].to(classifier.device)
    gradients = "gradients" in classifier.capabilities
    with classifier.frozen(), classifier.fast_inference(images[: chunk_images(classifier)]):
        with torch.no_grad():
            forward = _seconds(lambda: classifier.logits(x), classifier.device)
        if not gradients:
            return Pace(forward / len(x), forward / len(x))

        def step() -> None:
            y = classifier.logits(at := x.clone().requires_grad_())
            torch.autograd.grad(y.sum(), at, allow_unused=True)

        with torch.enable_grad():
            gradient = _seconds(step, classifier.device)
    return Pace(forward / len(x), gradient / len(x))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return how long something takes; twice where it is quick, the first time being slower."""
    took = []
    for _ in range(2):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begun)
        if took[0] > 1:
            break
    return min(took)


def options_of(detector: Detector, pace: Pace, *, classes: int, images: int) -> tuple[Option, ...]:
    """Return a detector at full settings and, where some are known, at quick ones."""
    name, quick = detector.method(), quick_settings(detector)
    ways: list[tuple[Detector, dict[str, Any]]] = [(detector, {})]
    if quick:
        ways.append((type(detector)(**(detector.settings() | quick)), quick))
    found = []
    for one, reduced in ways:
        calibration = calibrations([name], {name: one.settings()})
        weight, known = calibration.weights.get(name, 1.0), calibration.knows(one, classes)
        seconds = pace.seconds(work_of(one, classes=classes, images=images))
        worth = weight * (1.0 if known else UNCALIBRATED) * (REDUCED if reduced else 1.0)
        lesson = one.lesson()
        found.append(Option(name, one, reduced, seconds, worth, lesson, lesson * pace.forward))
    return tuple(found)


def best_plan(choices: Sequence[Sequence[Option]], seconds: float) -> list[Option]:
    """Return which options are worth most together within the time, at most one of each detector's.

    Those of most worth a second come first. Of plans that are worth the same, it is the shortest. Where none
    fits, it is the cheapest option of all: the estimate may be wrong, and nothing is lost by a try.
    """
    if not choices:
        return []
    if len(choices) > MOST:
        plans = [_greedily(choices, seconds)]
    else:
        every = itertools.product(*((None, *options) for options in choices))
        plans = [[one for one in plan if one is not None] for plan in every]
    fitting = [plan for plan in plans if duration(plan) <= seconds]
    best = max(fitting, key=lambda plan: (sum(one.worth for one in plan), -duration(plan)), default=[])
    best = best or [min((one for options in choices for one in options), key=lambda one: duration([one]))]
    return sorted(best, key=_slowness)


def _greedily(choices: Sequence[Sequence[Option]], seconds: float) -> list[Option]:
    """Return a plan that takes detectors one after the other, those of most worth a second first."""
    plan: list[Option] = []
    for options in sorted(choices, key=lambda some: min(map(_slowness, some))):
        fitting = [one for one in options if duration([*plan, one]) <= seconds]
        if fitting:
            plan.append(max(fitting, key=lambda one: (one.worth, -one.seconds)))
    return plan


def _slowness(option: Option) -> float:
    """Return the seconds that an option takes for what it is worth, alone."""
    return duration([option]) / max(option.worth, 1e-9)


def reduced_note(option: Option) -> str:
    """Return what a report says first of a detector that ran at quick settings."""
    lowered = ", ".join(f"{name} {value}" for name, value in option.reduced.items())
    return f"{option.name} ran at a reduced setting, so that the scan ends in time: {lowered}"
