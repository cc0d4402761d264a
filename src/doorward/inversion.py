"""Trigger inversion: the smallest masked pattern that sends images of other classes to a target.

All targets are worked on in one batch. This serves the detectors and the repairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.errors import CouldNotTell
from doorward.methods import Deadline, make_generator
from doorward.models import Classifier
from doorward.triggers import MaskedPattern

#: Elements of input that go through the model at once: 512 images of 32x32 with 3 channels.
CHUNK_ELEMENTS = 512 * 3 * 32 * 32


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


def outside_class(classifier: Classifier, images: Tensor, labels: Tensor | None) -> Tensor:
    """Tell which images (n, c, h, w) count as sources for which class: (n, k) bool.

    An image is no source for its own class, nor for the class that the model puts it in anyway.
    """
    with torch.no_grad():
        predicted = batched_logits(classifier, images).argmax(1).cpu()  # (n,)
    outside = torch.ones(len(images), len(classifier.classes), dtype=torch.bool)
    outside[torch.arange(len(images)), predicted] = False
    if labels is not None:
        outside[torch.arange(len(images)), labels] = False
    return outside


def chunk_images(classifier: Classifier) -> int:
    """Return how many images go through the model at once."""
    return max(1, CHUNK_ELEMENTS // math.prod(classifier.spec.shape))


def batched_logits(classifier: Classifier, images: Tensor) -> Tensor:
    """Return logits (n, k) for float images (n, c, h, w) of any number, without gradients."""
    with torch.no_grad():
        parts = torch.split(images, chunk_images(classifier))
        return torch.cat([classifier.logits(part.to(classifier.device)) for part in parts])


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
    progress: Callable[[int, int], None] | None = None,
) -> Inversion:
    """Find a small masked pattern for every target at once.

    Minimises, for each target t on its own, `mean softplus(-margin_t) + cost_t * |mask_t|_1` over mask and
    pattern (both through a sigmoid), with Adam. Each target's cost follows its own running success: it grows
    while the success is held and falls while it is not, so no target's schedule touches another's.

    Args:
        images: (n, c, h, w) float in [0, 1].
        targets: (k,) class numbers.
        success: share of the sources that must go to the target.

    Raises:
        CouldNotTell: if the deadline is too near; the message says how long it would take.

    Source: B. Wang et al., Neural Cleanse, IEEE S&P 2019. We depart from it: margin loss in place of
    cross-entropy (images that already go to the target stop pulling), a smooth dual update of the cost in
    place of doubling, all targets in one batch, sources outside the target class only.
    """
    device = classifier.device
    k, (c, h, w) = len(targets), images.shape[1:]
    images = images.to(device)
    base = int(torch.randint(2**62, (), generator=generator))
    own = [make_generator(base, str(t)) for t in targets.tolist()]
    # start from a faint mask: sigmoid(-2.2) is .1
    mask_at = torch.stack([torch.randn(1, h, w, generator=g) * 0.1 - 2.2 for g in own]).to(device)
    pattern_at = torch.stack([torch.randn(c, h, w, generator=g) * 0.5 for g in own]).to(device)
    state = [_Adam(mask_at, learning_rate), _Adam(pattern_at, learning_rate)]
    cost = torch.full((k,), math.log(initial_cost), device=device)
    held = torch.zeros(k, device=device)
    best_norm = torch.full((k,), float("inf"), device=device)
    best_mask, best_pattern = torch.ones_like(mask_at), torch.zeros_like(pattern_at)
    per_chunk = max(1, chunk_images(classifier) // batch_size)
    clock = Deadline()
    for step in range(steps):
        _check_time(deadline, clock, step, steps)
        drawn = pools.draw(targets, batch_size, own).to(device)  # (k, b)
        for part in torch.split(torch.arange(k), per_chunk):
            part = part.to(device)
            where = targets[part.cpu()].to(device).repeat_interleave(batch_size)  # (p * b,)
            mask = mask_at[part].sigmoid().requires_grad_()
            pattern = pattern_at[part].sigmoid().requires_grad_()
            x = images[drawn[part]]  # (p, b, c, h, w)
            x = torch.lerp(x, pattern[:, None].expand_as(x), mask[:, None].expand_as(x)).flatten(0, 1)
            gap = margin(classifier.logits(x), where).view(len(part), batch_size)  # (p, b)
            by_mask, by_pattern = torch.autograd.grad(F.softplus(-gap).mean(1).sum(), [mask, pattern])
            with torch.no_grad():
                norm = mask.sum((1, 2, 3))  # (p,)
                now = (gap > 0).float().mean(1)  # (p,)
                held[part] = torch.lerp(held[part], now, 0.2)
                # the running success lags behind a shrinking mask, so this step has to succeed as well
                better = (torch.minimum(held[part], now) >= success) & (norm < best_norm[part])
                best_norm[part[better]] = norm[better]
                best_mask[part[better]] = mask[better]
                best_pattern[part[better]] = pattern[better]
                by_mask += cost[part].exp()[:, None, None, None]
                # the chain rule through the sigmoids
                state[0].step(mask_at, part, by_mask * mask * (1 - mask), step)
                state[1].step(pattern_at, part, by_pattern * pattern * (1 - pattern), step)
        # full speed downwards, a third of it upwards while the wanted success is not held
        error = (held - success) / (1 - success)
        cost += 0.1 * torch.where(error > 0, error, 0.3 * error)
        if progress:
            progress(step + 1, steps)
    reached = best_norm.isfinite()
    final = torch.where(reached, best_norm, torch.full_like(best_norm, float(h * w)))
    rate = trigger_success(classifier, images, pools.outside[:, targets], targets, best_mask, best_pattern)
    return Inversion(targets, best_mask, best_pattern, final, rate, reached, steps)


class _Adam:
    """Adam's update for some rows of a tensor at a time (D. Kingma, J. Ba, arXiv 1412.6980)."""

    def __init__(self, like: Tensor, learning_rate: float, betas: tuple[float, float] = (0.5, 0.9)) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.learning_rate, self.betas = learning_rate, betas

    def step(self, at: Tensor, rows: Tensor, gradient: Tensor, steps_before: int) -> None:
        b1, b2 = self.betas
        mean = torch.lerp(self.mean[rows], gradient, 1 - b1)
        square = torch.lerp(self.square[rows], gradient * gradient, 1 - b2)
        self.mean[rows], self.square[rows] = mean, square
        t = steps_before + 1
        at[rows] -= self.learning_rate * (mean / (1 - b1**t)) / ((square / (1 - b2**t)).sqrt() + 1e-8)


def _check_time(deadline: Deadline, clock: Deadline, step: int, steps: int) -> None:
    """Give up as soon as the first steps show that the time will not suffice."""
    if deadline.left() == 0:
        raise CouldNotTell(f"the time budget ended after {step} of {steps} steps")
    if step == 3:
        needed = clock.spent() / step * (steps - step)
        if needed > deadline.left():
            raise CouldNotTell(
                f"it would need about {needed / 60:.0f} minutes, and {deadline.left() / 60:.0f} are left "
                "of the time budget; give more with --time-budget, or use a faster device"
            )


def trigger_success(
    classifier: Classifier, images: Tensor, outside: Tensor, targets: Tensor, masks: Tensor, patterns: Tensor
) -> Tensor:
    """Return, for each target, the share of its source images that its trigger sends to it: (k,).

    Args:
        images: (n, c, h, w) float in [0, 1].
        outside: (n, k) bool, the sources of each target.
        masks, patterns: (k, 1, h, w) and (k, c, h, w) in [0, 1].
    """
    rates = []
    for position, target in enumerate(targets.tolist()):
        sources = images[outside[:, position].to(images.device)].to(masks.device)
        triggered = torch.lerp(
            sources, patterns[position].expand_as(sources), masks[position].expand_as(sources)
        )
        rates.append((batched_logits(classifier, triggered).argmax(1) == target).float().mean())
    return torch.stack(rates)
