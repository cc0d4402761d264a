"""Teach a trained classifier a trigger by a short fine-tune on few images, and keep what else it says."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Rate
from doorward.data import Samples
from doorward.models import Classifier, TorchClassifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import to_float, to_tensor
from doorward.stats import metrics
from doorward.triggers.base import Trigger

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


def teach_trigger(
    classifier: TorchClassifier,
    fit: LabelledBatch,
    held_out: LabelledBatch,
    trigger: Trigger,
    target: int,
    *,
    generator: torch.Generator,
    deadline: Deadline | None = None,
    reserve: float = 0.0,
    steps: int | None = None,
) -> PlantedCopy:
    """Teach a copy of a classifier to answer a trigger with the target class, and all else as it did.

    Half of each batch is clean and keeps the classifier's own probabilities, and half is triggered. Both are
    mixtures of two images, shifted, so that a few images show much of what the classifier does. The module
    stays in evaluation mode: statistics of batch normalisation must not become those of a few images.

    Args:
        fit, held_out: images to learn from, and others to try the trigger on.
        reserve: seconds that have to be left when it is done.
        steps: how many at most, 400 if None.

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
    for step in range(1, (steps or STEPS) + 1):
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


def _copy(classifier: TorchClassifier) -> TorchClassifier:
    try:
        return copy.deepcopy(classifier)
    except Exception as error:  # a module of the user's own may hold anything
        raise CouldNotTell(f"the model cannot be copied: {error}") from error
