"""Trigger inversion: the smallest masked pattern that sends images of other classes to a target.

As many targets as fit are worked on in one batch. This serves the detectors and the repairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.seeds import make_generator
from doorward.inversion.adam import Adam
from doorward.inversion.sources import SourcePools
from doorward.models import Classifier
from doorward.models.batching import batched_logits, chunk_images, margin
from doorward.triggers.masked import MaskedPattern


@dataclass(frozen=True)
class Inversion:
    """What inversion found for k targets.

    Attributes:
        targets: (k,) class numbers.
        mask: (k, 1, h, w) in [0, 1].
        pattern: (k, c, h, w) in [0, 1].
        norm: (k,) sum of the mask, in pixels; the whole area where the target was never reached.
        success: (k,) share of the given source images that the trigger sends to the target.
        reached: (k,) bool, whether the wanted success was ever held.
        early_norm: (k,) the norm after the first steps, where not all targets went on.
        finished: (k,) bool, whether the target went on to the end.
    """

    targets: Tensor
    mask: Tensor
    pattern: Tensor
    norm: Tensor
    success: Tensor
    reached: Tensor
    early_norm: Tensor
    finished: Tensor

    def expected_norm(self) -> Tensor:
        """Return the norms (k,); those of targets that did not go on shrunk as far as the others' did.

        The least of all targets went on, so that none of these is less than that.
        """
        if not bool((self.finished & self.reached).any()):
            return self.norm
        shrunk = (self.norm / self.early_norm)[self.finished & self.reached].median()
        return torch.where(self.finished | ~self.reached, self.norm, self.early_norm * shrunk)

    def trigger(self, position: int) -> MaskedPattern:
        """Return the trigger found for the target at a position of `targets`."""
        return MaskedPattern(mask=self.mask[position], pattern=self.pattern[position])


def invert(
    classifier: Classifier,
    images: Tensor,
    pools: SourcePools,
    targets: Tensor,
    *,
    steps: int = 110,
    batch_size: int = 16,
    learning_rate: float = 0.3,
    success: float = 0.9,
    initial_cost: float = 1e-2,
    first_steps: int | None = None,
    finalists: int = 1,
    generator: torch.Generator,
    deadline: Deadline,
    reserved_steps: int = 0,
) -> Inversion:
    """Find a small masked pattern for every target.

    Minimises, for each target t on its own, `mean softplus(-margin_t) + cost_t * |mask_t|_1` over mask and
    pattern (both through a sigmoid), with Adam. Each target's cost follows its own running success: it grows
    while the success is held and falls while it is not, so no target's schedule touches another's.

    Args:
        images: (n, c, h, w) float in [0, 1].
        targets: (k,) class numbers.
        success: share of the sources that must go to the target.
        first_steps: after so many, only some targets go on; all do if None.
        finalists: how many go on: those with the smallest masks.
        reserved_steps: how many steps of one target more the caller will ask for before the deadline.

    Raises:
        CouldNotTell: if the deadline is too near; the message says how long it would take.

    Source: B. Wang et al., Neural Cleanse, IEEE S&P 2019. We depart from it: margin loss in place of
    cross-entropy (images that already go to the target stop pulling), a smooth dual update of the cost in
    place of doubling, as many targets in one batch as the model can take, sources outside the target class
    only, and targets that are far behind are given up, as in successive halving (K. Jamieson, A. Talwalkar,
    AISTATS 2016, arXiv 1502.07943).
    """
    images = images.to(classifier.device)
    base, k = int(torch.randint(2**62, (), generator=generator)), len(targets)
    finalists = min(finalists, k)
    first = steps if first_steps is None or finalists == k else min(first_steps, steps)
    size = max(1, chunk_images(classifier) // batch_size)
    with classifier.fast_inference(images[: chunk_images(classifier)]):
        work = f"inverting triggers of {k:,} classes"
        guard = TimeGuard(deadline, k * first + finalists * (steps - first) + reserved_steps, work=work)

        def draw(some: Tensor, own: Sequence[torch.Generator]) -> Tensor:
            return images[pools.draw(some, batch_size, own).to(images.device)]

        searches = []
        for group in torch.split(targets, size):
            searches.append(_Search.begin(classifier, draw, group, base, learning_rate, initial_cost))
            searches[-1].run(first, success, guard)
        found = _Search.joined(searches)
        early, finished = found.norm, torch.ones(k, dtype=torch.bool, device=found.norm.device)
        if first < steps:
            going_on = found.norm.argsort(stable=True)[:finalists].sort().values
            for part in torch.split(going_on, size):
                search = found.only(part)
                search.run(steps - first, success, guard)
                found.take_best(part, search)
            finished = torch.isin(torch.arange(k, device=going_on.device), going_on)
    mask, pattern = found.best_mask, found.best_pattern
    rate = trigger_success(classifier, images, pools.outside[:, targets], targets, mask, pattern, deadline)
    return Inversion(targets, mask, pattern, found.norm, rate, found.reached, early, finished)


@dataclass(frozen=True)
class _Search:
    """How far the search is for k targets; each stays on its own.

    Attributes:
        draw: returns sources (m, b, c, h, w) of targets (m,), by a generator of each.
        masks, patterns: (k, 1, h, w) and (k, c, h, w), before the sigmoid, and what moves them.
        cost: (k,) the logarithm of what a pixel of the mask costs.
        success_ema: (k,) the running success.
        best_norm, best_mask, best_pattern: of the smallest trigger that held the wanted success; infinite,
            one and zero where none did.
    """

    classifier: Classifier
    draw: Callable[[Tensor, Sequence[torch.Generator]], Tensor]
    targets: Tensor
    own: list[torch.Generator]
    masks: Adam
    patterns: Adam
    cost: Tensor
    success_ema: Tensor
    best_norm: Tensor
    best_mask: Tensor
    best_pattern: Tensor

    @staticmethod
    def begin(
        classifier: Classifier,
        draw: Callable[[Tensor, Sequence[torch.Generator]], Tensor],
        targets: Tensor,
        base: int,
        learning_rate: float,
        cost: float,
    ) -> _Search:
        """Begin with faint masks (sigmoid(-2.2) is .1) and patterns around grey."""
        (c, h, w), device = classifier.spec.shape, classifier.device
        # numbers come from a generator of each target's own, so that the grouping changes nothing
        own = [make_generator(base, str(t)) for t in targets.tolist()]
        masks = torch.stack([torch.randn(1, h, w, generator=g) * 0.1 - 2.2 for g in own]).to(device)
        patterns = torch.stack([torch.randn(c, h, w, generator=g) * 0.5 for g in own]).to(device)
        zeros = torch.zeros(len(own), device=device)
        return _Search(
            classifier=classifier,
            draw=draw,
            targets=targets,
            own=own,
            masks=Adam(masks, learning_rate),
            patterns=Adam(patterns, learning_rate),
            cost=zeros + math.log(cost),
            success_ema=zeros.clone(),
            best_norm=zeros + torch.inf,
            best_mask=torch.ones_like(masks),
            best_pattern=torch.zeros_like(patterns),
        )

    @staticmethod
    def joined(parts: Sequence[_Search]) -> _Search:
        """Return searches as one."""
        first = parts[0]
        if len(parts) == 1:
            return first
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_TARGET
        }
        return replace(
            first,
            own=[one for part in parts for one in part.own],
            masks=Adam.joined([part.masks for part in parts]),
            patterns=Adam.joined([part.patterns for part in parts]),
            **tensors,
        )

    def only(self, rows: Tensor) -> _Search:
        """Return a copy of the search for the targets at some positions."""
        tensors: dict[str, Any] = {
            name: (success_ema := getattr(self, name))[rows.to(success_ema.device)] for name in _PER_TARGET
        }
        own = [self.own[i] for i in rows.tolist()]
        return replace(
            self, own=own, masks=self.masks.only(rows), patterns=self.patterns.only(rows), **tensors
        )

    def take_best(self, rows: Tensor, other: _Search) -> None:
        """Take over what a search for the targets at some positions found."""
        for name in ("best_norm", "best_mask", "best_pattern"):
            getattr(self, name)[rows] = getattr(other, name)

    @property
    def reached(self) -> Tensor:
        """Return whether the wanted success was ever held: (k,) bool."""
        return self.best_norm.isfinite()

    @property
    def norm(self) -> Tensor:
        """Return the norms (k,), the whole area where the wanted success was never held."""
        return torch.where(self.reached, self.best_norm, float(self.best_mask[0].numel()))

    def run(self, steps: int, success: float, guard: TimeGuard) -> None:
        """Take some steps."""
        m = len(self.targets)
        for _ in range(steps):
            x = self.draw(self.targets, self.own)  # (m, b, c, h, w)
            b = x.shape[1]
            where = self.targets.to(x.device).repeat_interleave(b)  # (m * b,)
            mask, pattern = (adam.at.sigmoid().requires_grad_() for adam in (self.masks, self.patterns))
            x = torch.lerp(x, pattern[:, None].expand_as(x), mask[:, None].expand_as(x)).flatten(0, 1)
            gap = margin(self.classifier.logits(x), where).view(m, b)
            by_mask, by_pattern = torch.autograd.grad(F.softplus(-gap).mean(1).sum(), [mask, pattern])
            self._step(mask.detach(), pattern.detach(), by_mask, by_pattern, gap.detach() > 0, success)
            guard.advance(m)

    def _step(
        self, mask: Tensor, pattern: Tensor, by_mask: Tensor, by_pattern: Tensor, hits: Tensor, success: float
    ) -> None:
        """Take one step by the gradients of the loss; `hits` (m, b) tells which images the trigger sent."""
        norm = mask.sum((1, 2, 3))  # (m,)
        now = hits.float().mean(1)  # (m,)
        self.success_ema.lerp_(now, 0.2)
        # the running success lags behind a shrinking mask, so this step has to succeed as well
        better = (torch.minimum(self.success_ema, now) >= success) & (norm < self.best_norm)
        self.best_norm[better] = norm[better]
        self.best_mask[better] = mask[better]
        self.best_pattern[better] = pattern[better]
        by_mask = by_mask + self.cost.exp()[:, None, None, None]
        # the chain rule through the sigmoids
        self.masks.step(by_mask * mask * (1 - mask))
        self.patterns.step(by_pattern * pattern * (1 - pattern))
        # full speed downwards, a third of it upwards while the wanted success is not held
        error = (self.success_ema - success) / (1 - success)
        self.cost.add_(0.1 * torch.where(error > 0, error, 0.3 * error))


_PER_TARGET = ("targets", "cost", "success_ema", "best_norm", "best_mask", "best_pattern")


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
