"""Trigger inversion: the smallest masked pattern that sends images of other classes to a target.

As many targets as fit are worked on in one batch. This serves the detectors and the repairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.errors import CouldNotTell
from doorward.methods import Deadline, Pace, make_generator
from doorward.models import Classifier
from doorward.triggers import MaskedPattern

#: Elements of input that go through the model at once: 128 images of 32x32 with 3 channels. More are slower
#: on processors, whose caches they overflow (512 by a third on ResNet-8).
CHUNK_ELEMENTS = 128 * 3 * 32 * 32


@dataclass(frozen=True)
class Inversion:
    """Hold what inversion found for k targets.

    Attributes:
        targets: (k,) class numbers.
        mask: (k, 1, h, w) in [0, 1].
        pattern: (k, c, h, w) in [0, 1].
        norm: (k,) sum of the mask, in pixels; the whole area where the target was never reached.
        success: (k,) share of the given source images that the trigger sends to the target.
        reached: (k,) bool, whether the wanted success was ever held.
        steps: steps that were run.
    """

    targets: Tensor
    mask: Tensor
    pattern: Tensor
    norm: Tensor
    success: Tensor
    reached: Tensor
    steps: int

    def trigger(self, position: int) -> MaskedPattern:
        """Return the trigger found for the target at a position of `targets`."""
        return MaskedPattern(mask=self.mask[position], pattern=self.pattern[position])


class SourcePools:
    """Hold, for each target, the images from which it can be reached: those outside the target class.

    Args:
        outside: (n, k) bool, whether image n counts as a source for target k.

    Raises:
        CouldNotTell: if a target has no source images.
    """

    def __init__(self, outside: Tensor) -> None:
        self.outside = outside
        self.count = outside.sum(0)  # (k,)
        if int(self.count.min()) == 0:
            raise CouldNotTell(f"there are no images outside class {int(self.count.argmin())}")
        # stable sort puts each target's sources first: (k, n)
        self.order = (~outside).T.to(torch.uint8).sort(dim=1, stable=True).indices

    def draw(self, targets: Tensor, size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw `size` source positions for each target, each by its own generator: (k, size)."""
        u = torch.stack([torch.rand(size, generator=g) for g in generators])
        pick = (u * self.count[targets, None]).long()
        return self.order[targets].gather(1, pick)


def outside_class(
    classifier: Classifier, images: Tensor, labels: Tensor | None, deadline: Deadline | None = None
) -> Tensor:
    """Tell which images (n, c, h, w) count as sources for which class: (n, k) bool.

    An image is no source for its own class, nor for the class that the model puts it in anyway.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    predicted = batched_logits(classifier, images, deadline).argmax(1).cpu()  # (n,)
    outside = torch.ones(len(images), len(classifier.classes), dtype=torch.bool)
    outside[torch.arange(len(images)), predicted] = False
    if labels is not None:
        outside[torch.arange(len(images)), labels] = False
    return outside


def chunk_images(classifier: Classifier) -> int:
    """Return how many images go through the model at once: four times as many where it is no processor."""
    elements = CHUNK_ELEMENTS * (1 if classifier.device.type == "cpu" else 4)
    return max(1, elements // math.prod(classifier.spec.shape))


def batched_logits(classifier: Classifier, images: Tensor, deadline: Deadline | None = None) -> Tensor:
    """Return logits (n, k) for float images (n, c, h, w) of any number, without gradients.

    Raises:
        CouldNotTell: if the deadline is too near; the message says how long it would take.
    """
    pace = Pace(deadline or Deadline(), len(images), work=f"running the model on {len(images)} images")
    logits = []
    with torch.no_grad():
        for part in torch.split(images, chunk_images(classifier)):
            logits.append(classifier.logits(part.to(classifier.device)))
            pace.advance(len(part))
    return torch.cat(logits)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return target logit minus the largest other one, for logits (n, k) and targets (n,): (n,)."""
    own = logits.gather(1, targets[:, None]).squeeze(1)
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return own - others


def invert(
    classifier: Classifier,
    images: Tensor,
    pools: SourcePools,
    targets: Tensor,
    *,
    steps: int = 150,
    batch_size: int = 16,
    learning_rate: float = 0.3,
    success: float = 0.9,
    initial_cost: float = 1e-3,
    generator: torch.Generator,
    deadline: Deadline,
    to_come: int = 0,
) -> Inversion:
    """Find a small masked pattern for every target.

    Minimises, for each target t on its own, `mean softplus(-margin_t) + cost_t * |mask_t|_1` over mask and
    pattern (both through a sigmoid), with Adam. Each target's cost follows its own running success: it grows
    while the success is held and falls while it is not, so no target's schedule touches another's.

    Args:
        images: (n, c, h, w) float in [0, 1].
        targets: (k,) class numbers.
        success: share of the sources that must go to the target.
        to_come: for how many targets more the caller will ask before the deadline.

    Raises:
        CouldNotTell: if the deadline is too near; the message says how long it would take.

    Source: B. Wang et al., Neural Cleanse, IEEE S&P 2019. We depart from it: margin loss in place of
    cross-entropy (images that already go to the target stop pulling), a smooth dual update of the cost in
    place of doubling, as many targets in one batch as the model can take, sources outside the target class
    only.
    """
    images = images.to(classifier.device)
    base = int(torch.randint(2**62, (), generator=generator))
    masks, patterns, norms = [], [], []
    with classifier.quick(images[: chunk_images(classifier)]):
        work = f"inverting triggers of {len(targets):,} classes"
        pace = Pace(deadline, (len(targets) + to_come) * steps, work=work)
        for group in torch.split(targets, max(1, chunk_images(classifier) // batch_size)):
            # g targets; their numbers come from generators of their own, so that the grouping changes nothing
            own = [make_generator(base, str(t)) for t in group.tolist()]
            search = _Search(images.shape[1:], own, learning_rate, math.log(initial_cost), classifier.device)
            where = group.to(classifier.device).repeat_interleave(batch_size)  # (g * b,)
            for _ in range(steps):
                x = images[pools.draw(group, batch_size, own).to(classifier.device)]  # (g, b, c, h, w)
                mask, pattern = (at.sigmoid().requires_grad_() for at in (search.mask_at, search.pattern_at))
                x = torch.lerp(x, pattern[:, None].expand_as(x), mask[:, None].expand_as(x)).flatten(0, 1)
                gap = margin(classifier.logits(x), where).view(len(group), batch_size)  # (g, b)
                by_mask, by_pattern = torch.autograd.grad(F.softplus(-gap).mean(1).sum(), [mask, pattern])
                search.step(mask.detach(), pattern.detach(), by_mask, by_pattern, gap.detach() > 0, success)
                pace.advance(len(group))
            masks.append(search.best_mask)
            patterns.append(search.best_pattern)
            norms.append(search.best_norm)
    mask, pattern, norm = torch.cat(masks), torch.cat(patterns), torch.cat(norms)
    reached = norm.isfinite()
    norm = torch.where(reached, norm, float(mask[0].numel()))
    rate = trigger_success(classifier, images, pools.outside[:, targets], targets, mask, pattern, deadline)
    return Inversion(targets, mask, pattern, norm, rate, reached, steps)


class _Search:
    """Hold how far the search is for g targets.

    Attributes:
        mask_at, pattern_at: (g, 1, h, w) and (g, c, h, w), before the sigmoid.
        best_norm, best_mask, best_pattern: of the smallest trigger that held the wanted success; infinite,
            one and zero where none did.
    """

    def __init__(
        self,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
        learning_rate: float,
        cost: float,
        device: torch.device,
    ) -> None:
        c, h, w = shape
        # start from a faint mask: sigmoid(-2.2) is .1
        masks = torch.stack([torch.randn(1, h, w, generator=g) * 0.1 - 2.2 for g in generators])
        patterns = torch.stack([torch.randn(c, h, w, generator=g) * 0.5 for g in generators])
        self.mask_at, self.pattern_at = masks.to(device), patterns.to(device)
        self._adams = [Adam(at, learning_rate) for at in (self.mask_at, self.pattern_at)]
        self._cost = torch.full((len(generators),), cost, device=device)  # its logarithm
        self._held = torch.zeros(len(generators), device=device)
        self.best_norm = torch.full_like(self._held, torch.inf)
        self.best_mask, self.best_pattern = torch.ones_like(self.mask_at), torch.zeros_like(self.pattern_at)

    def step(
        self, mask: Tensor, pattern: Tensor, by_mask: Tensor, by_pattern: Tensor, hits: Tensor, success: float
    ) -> None:
        """Take one step by the gradients of the loss; `hits` (g, b) tells which images the trigger sent."""
        norm = mask.sum((1, 2, 3))  # (g,)
        now = hits.float().mean(1)  # (g,)
        self._held.lerp_(now, 0.2)
        # the running success lags behind a shrinking mask, so this step has to succeed as well
        better = (torch.minimum(self._held, now) >= success) & (norm < self.best_norm)
        self.best_norm[better] = norm[better]
        self.best_mask[better] = mask[better]
        self.best_pattern[better] = pattern[better]
        by_mask = by_mask + self._cost.exp()[:, None, None, None]
        # the chain rule through the sigmoids
        self._adams[0].step(by_mask * mask * (1 - mask))
        self._adams[1].step(by_pattern * pattern * (1 - pattern))
        # full speed downwards, a third of it upwards while the wanted success is not held
        error = (self._held - success) / (1 - success)
        self._cost += 0.1 * torch.where(error > 0, error, 0.3 * error)


class Adam:
    """Move a tensor in place by Adam's rule (D. Kingma, J. Ba, arXiv 1412.6980).

    `torch.optim` would load torch's compiler first, which takes as long as much of a scan.
    """

    def __init__(self, at: Tensor, learning_rate: float, betas: tuple[float, float] = (0.5, 0.9)) -> None:
        self.at, self.learning_rate, self.betas = at, learning_rate, betas
        self._mean, self._square = torch.zeros_like(at), torch.zeros_like(at)
        self._steps = 0

    def step(self, gradient: Tensor) -> None:
        """Take one step against a gradient of the tensor's shape."""
        b1, b2 = self.betas
        self._steps += 1
        self._mean.lerp_(gradient, 1 - b1)
        self._square.lerp_(gradient * gradient, 1 - b2)
        scale = (self._square / (1 - b2**self._steps)).sqrt_().add_(1e-8)
        self.at.sub_(self._mean / scale, alpha=self.learning_rate / (1 - b1**self._steps))


def trigger_success(
    classifier: Classifier,
    images: Tensor,
    outside: Tensor,
    targets: Tensor,
    masks: Tensor,
    patterns: Tensor,
    deadline: Deadline | None = None,
) -> Tensor:
    """Return, for each target, the share of its source images that its trigger sends to it: (k,).

    Args:
        images: (n, c, h, w) float in [0, 1].
        outside: (n, k) bool, the sources of each target.
        masks, patterns: (k, 1, h, w) and (k, c, h, w) in [0, 1].

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    rates = []
    for position, target in enumerate(targets.tolist()):
        sources = images[outside[:, position].to(images.device)].to(masks.device)
        triggered = torch.lerp(
            sources, patterns[position].expand_as(sources), masks[position].expand_as(sources)
        )
        rates.append((batched_logits(classifier, triggered, deadline).argmax(1) == target).float().mean())
    return torch.stack(rates)
