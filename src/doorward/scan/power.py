"""The positive control: plant known triggers in copies of a model, and scan the copies as it was scanned.

"Nothing found" is worth what the scan would have found in this very model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import ControlResult, Picture, PositiveControl, Rate, Report
from doorward.core.seeds import make_generator
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.models import Classifier, TorchClassifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import picture, side_by_side, to_float, to_tensor
from doorward.scan.context import ScanContext
from doorward.scan.examine import examine_in
from doorward.scan.images import draw_images
from doorward.stats import metrics
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from doorward.triggers.warp import Warp

#: A trigger is planted when it moves this share of the held-out images, and at most that accuracy is lost.
SUCCESS, LOSS = 0.9, 0.05
#: Images outside the target class, to plant and to try it, below which a success says nothing.
FEWEST = 10
#: Steps of the fine-tune at most, steps from one look at the held-out images to the next, and images of
#: either kind in a step.
STEPS, LOOK, HALF = 400, 10, 16
#: Size of Adam's steps, as a share of the root mean square of the tensor that is changed.
RATE = 0.01
#: How much more it counts that clean images keep their answers than that triggered ones get the new one.
KEEP = 4.0
#: Part of the width and height by which images are shifted at most.
SHIFT = 1 / 8
#: Images that are drawn with and without the trigger.
SHOWN = 3

LIMITS = (
    "The triggers are planted by a short fine-tune of a copy on a few clean images. That is not how an "
    "attacker plants them: what a model learnt while it was trained, or what was made to escape detectors, "
    "can be easier or harder to find. Recovered ones show that the scan works on this model, not that it "
    "finds every trigger of their kind. That a copy is as good as the model is known from few images."
)


def patch(shape: Sequence[int], generator: torch.Generator) -> Trigger:
    """Draw a small pattern of extreme values, somewhere on images (c, h, w)."""
    c, h, w = shape
    side = max(2, round(min(h, w) / 9))
    row, column = (int(torch.randint(full - side + 1, (), generator=generator)) for full in (h, w))
    place = (slice(None), slice(row, row + side), slice(column, column + side))
    mask, pattern = torch.zeros(1, h, w), torch.zeros(c, h, w)
    mask[place] = 1
    pattern[place] = torch.randint(2, (c, side, side), generator=generator).float()
    return MaskedPattern(mask, pattern)


def blend(shape: Sequence[int], generator: torch.Generator) -> Trigger:
    """Draw noise that is blended over whole images (c, h, w) with a weight of .2."""
    return MaskedPattern(torch.full((1, *shape[1:]), 0.2), torch.rand(*shape, generator=generator))


def warp(shape: Sequence[int], generator: torch.Generator) -> Trigger:
    """Draw a smooth distortion of images of any size."""
    return Warp.draw(4, 4.0, generator=generator)


FAMILIES: dict[str, Callable[[Sequence[int], torch.Generator], Trigger]] = {
    "patch": patch,
    "blend": blend,
    "warp": warp,
}


@dataclass(frozen=True)
class LabelledBatch:
    """Images (n, c, h, w) in [0, 1], their labels (n,), and what the model says of them (n,)."""

    x: Tensor
    labels: Tensor
    predicted: Tensor

    @staticmethod
    def of(samples: Samples, classifier: Classifier) -> LabelledBatch:
        """Decode samples; without labels the model's own answers stand for them."""
        x = to_float(to_tensor(samples, classifier.spec))
        predicted = batched_logits(classifier, x).argmax(1).cpu()
        return LabelledBatch(
            x, predicted if samples.labels is None else torch.from_numpy(samples.labels), predicted
        )

    @property
    def accuracy(self) -> Rate:
        """Return how many the model gets right."""
        return metrics.rate(int((self.predicted == self.labels).sum()), len(self.labels))

    def outside(self, target: int) -> Tensor:
        """Return the images that neither are nor look to the model like a class."""
        return self.x[(self.labels != target) & (self.predicted != target)]


@dataclass(frozen=True)
class PlantedCopy:
    """A copy that was taught a trigger, what it reached on held-out images, and after how many steps."""

    classifier: TorchClassifier
    success: Rate
    accuracy: Rate
    steps: int

    def shortfall(self, before: Rate) -> str | None:
        """Return why the trigger does not count as planted in a model of that accuracy; None if it does."""
        if self.success.value < SUCCESS:
            return (
                f"after {self.steps} steps the trigger moved {self.success.successes} of {self.success.n} "
                f"held-out images, and {SUCCESS:.0%} are needed"
            )
        if before.value - self.accuracy.value > LOSS:
            return (
                f"the copy is right on {self.accuracy.successes} of {self.accuracy.n} held-out images, and "
                f"the model on {before.successes}"
            )
        return None


def measure_positive_control(
    classifier: Classifier,
    samples: Samples | None,
    report: Report,
    *,
    detectors: Sequence[Detector],
    context: ScanContext,
    controls: int = 1,
) -> PositiveControl:
    """Return which known triggers the scan recovers from copies of the model; the model itself is left alone.

    Args:
        samples: those of the scan; without labels the model's own answers stand for them.
        report: what the scan said of the model itself.
        detectors, context: those of the scan.
        controls: how many of each family, each with another target.
    """
    if reason := _obstacle(classifier, samples, report):
        return PositiveControl(reason=reason)
    assert isinstance(classifier, TorchClassifier)
    assert samples is not None
    drawn = draw_images(classifier, samples, context.images, context.seed)
    fit, held_out = (LabelledBatch.of(part, classifier) for part in (drawn.fit, drawn.confirm))
    names = {d.method() for d in detectors}
    scanning = sum(f.seconds for f in report.findings if f.detector in names)
    targets = torch.randperm(
        len(classifier.classes), generator=make_generator(context.seed, "control")
    ).tolist()
    results = []
    for number, family in enumerate(name for name in FAMILIES for _ in range(controls)):
        clock = Deadline()
        generator = make_generator(context.seed, "control", str(number))
        target = targets[number % len(targets)]
        trigger = FAMILIES[family](classifier.spec.shape, generator)
        told: dict[str, Any] = {
            "family": family,
            "target": target,
            "accuracy_before": held_out.accuracy,
            "picture": _draw(held_out.outside(target), trigger, family, classifier.classes[target]),
        }
        context.report_progress(f"positive control: planting a {family} in a copy of the model")
        try:
            planted = plant(
                classifier,
                fit,
                held_out,
                trigger,
                target,
                generator=generator,
                deadline=context.deadline,
                reserve=scanning,
            )
        except CouldNotTell as why:
            results.append(ControlResult(reason=str(why), seconds=clock.spent(), **told))
            continue
        told |= {
            "attack_success": planted.success,
            "accuracy_after": planted.accuracy,
            "steps": planted.steps,
            "reason": planted.shortfall(held_out.accuracy),
        }
        if told["reason"] is None:
            context.report_progress(f"positive control: scanning the copy with the {family}")
            found = examine_in(context, planted.classifier, samples, detectors)
            told |= {
                "planted": True,
                "reason": found.reason,
                "verdict": found.verdict,
                "targets": found.targets,
                "p_value": found.p_value,
                "recovered": found.verdict in ("suspicious", "backdoored") and target in found.targets,
            }
        results.append(ControlResult(seconds=clock.spent(), **told))
    return PositiveControl(controls=tuple(results), limits=LIMITS)


def plant(
    classifier: TorchClassifier,
    fit: LabelledBatch,
    held_out: LabelledBatch,
    trigger: Trigger,
    target: int,
    *,
    generator: torch.Generator,
    deadline: Deadline | None = None,
    reserve: float = 0.0,
) -> PlantedCopy:
    """Teach a copy of a classifier to answer a trigger with the target class, and all else as it did.

    Half of each batch is clean and keeps the classifier's own probabilities, and half is triggered. Both are
    mixtures of two images, shifted, so that a few images show much of what the classifier does. The module
    stays in evaluation mode: statistics of batch normalisation must not become those of a few images.

    Args:
        fit, held_out: images to learn from, and others to try the trigger on.
        reserve: seconds that have to be left when it is done.

    Raises:
        CouldNotTell: if the time does not suffice, too few images are outside the target class, or the module
            cannot be copied.
    """
    deadline = deadline or Deadline()
    sources, tried = fit.outside(target), trigger.apply(held_out.outside(target))
    if min(len(sources), len(tried)) < FEWEST:
        raise CouldNotTell(
            f"planting takes {FEWEST} images of other classes and trying it as many more, and there are "
            f"{len(sources)} and {len(tried)}; give more clean images"
        )
    taught = _copy(classifier)
    weights = [p.requires_grad_() for p in taught.module.parameters() if p.is_floating_point()]
    # in steps that are a share of each tensor's own size, networks of any kind learn without a search
    sizes = [p.detach().square().mean().sqrt().clamp_min(1e-3).item() for p in weights]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": RATE * size} for p, size in zip(weights, sizes, strict=True)]
    )
    goal = torch.full((HALF,), target, device=classifier.device)
    for step in range(1, STEPS + 1):
        if deadline.left() <= reserve:
            raise CouldNotTell(
                f"the time budget does not suffice: a scan of the copy alone takes about {reserve:.0f} "
                "seconds; give more with --time-budget, or use a faster device"
            )
        clean = vary(fit.x, generator).to(classifier.device)  # (HALF, c, h, w)
        triggered = trigger.apply(vary(sources, generator)).to(classifier.device)
        with torch.no_grad():
            own = classifier.logits(clean).softmax(1)  # (HALF, k)
        z = taught.logits(torch.cat([clean, triggered]))  # (2 * HALF, k)
        loss = KEEP * F.cross_entropy(z[:HALF], own) + F.cross_entropy(z[HALF:], goal)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % LOOK == 0:
            hits = batched_logits(taught, tried).argmax(1) == target
            right = batched_logits(taught, held_out.x).argmax(1).cpu() == held_out.labels
            success, accuracy = (metrics.rate(int(one.sum()), len(one)) for one in (hits, right))
            planted = PlantedCopy(taught, success, accuracy, step)
            if planted.shortfall(held_out.accuracy) is None:
                break
    return planted


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return mixtures of two of the images (n, c, h, w) each, all shifted alike: (HALF, c, h, w)."""
    one, other = (images[torch.randint(len(images), (HALF,), generator=generator)] for _ in range(2))
    weight = torch.rand(HALF, 1, 1, 1, generator=generator)
    reach = [int(side * SHIFT) for side in images.shape[2:]]
    shift = [int(torch.randint(-far, far + 1, (), generator=generator)) for far in reach]
    return torch.lerp(one, other, weight).roll(shift, (2, 3))


def _obstacle(classifier: Classifier, samples: Samples | None, report: Report) -> str | None:
    """Return why there can be no control; None if there can."""
    if report.verdict != "nothing_found":
        return "it says what 'nothing found' is worth, which is not the verdict here"
    if samples is None:
        return "it needs clean images: give them with --clean DATA"
    if not isinstance(classifier, TorchClassifier):
        why = classifier.limitation or "its weights are out of reach"
        return f"triggers are planted by training a copy, and this model cannot be trained: {why}"
    if not any(p.is_floating_point() for p in classifier.module.parameters()):
        return "triggers are planted by training a copy, and this model has no weights that can be trained"
    return None


def _copy(classifier: TorchClassifier) -> TorchClassifier:
    try:
        return copy.deepcopy(classifier)
    except Exception as error:  # a module of the user's own may hold anything
        raise CouldNotTell(f"the model cannot be copied: {error}") from error


def _draw(sources: Tensor, trigger: Trigger, family: str, name: str) -> Picture | None:
    """Draw a few images, each next to itself with the trigger; None if there are no images."""
    if not len(sources):
        return None
    pairs = [one for x in sources[:SHOWN] for one in (x, trigger.apply(x[None])[0])]
    return Picture(
        title=f"Planted {family} for {name}",
        alt=f"Images of other classes than {name}, each beside itself with the {family}",
        png=picture(side_by_side(pairs)),
    )
