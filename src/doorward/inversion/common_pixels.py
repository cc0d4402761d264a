"""What images translated to a class have in common, brought down to the few pixels that send others there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.inversion.distilled import DistilledSurrogates
from doorward.inversion.problem import InversionProblem
from doorward.inversion.sources import SourcePools
from doorward.inversion.translation import target_gradient, translate
from doorward.triggers.masked import MaskedPattern

#: Steps of the translation after which the images are looked at.
SNAPSHOTS = (5, 10, 20)
#: Shares of the pixels that are kept, one after the other. Dropped many at once, a trigger is lost.
SHARES = (0.08, 0.064, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.0115, 0.0095, 0.0075)
#: Those at which it is tried what the pixels do.
TRIED = (0.015, 0.0115, 0.0075)
#: What an image takes without its gradient, next to one with it.
FORWARD = 0.4


@dataclass(frozen=True)
class Sources:
    """Images outside a class, by their positions (n,): some are translated to it, others kept back."""

    target: int
    translated: Tensor
    kept_back: Tensor


@dataclass(frozen=True)
class CommonPixels:
    """The pixels that images translated to a class have in common, for shares m and snapshots s.

    Attributes:
        masks: (m, s, h, w) bool, in the order of `TRIED` and `SNAPSHOTS`.
        values: (s, c, h, w) in [0, 1].
        success: (m, s) share of the images kept back that the pixels send to the class.
        alone: (m,) share of them that go there in the model and not in all surrogates, of the best snapshot.
    """

    target: int
    masks: Tensor
    values: Tensor
    success: Tensor
    alone: Tensor

    @property
    def snapshot(self) -> int:
        """Return the position of the snapshot whose pixels do most."""
        return int(self.success.mean(0).argmax())

    @property
    def reached(self) -> float:
        """Return the mean success over the shares, of the best snapshot."""
        return float(self.success.mean(0).max())

    @property
    def reached_alone(self) -> float:
        """Return the same, of images that do not go there in all surrogates."""
        return float(self.alone.mean())

    @property
    def trigger(self) -> MaskedPattern:
        """Return the pixels that do most as a trigger, and the fewest of those that do as much."""
        own = self.success[:, self.snapshot].tolist()
        share = max(range(len(own)), key=lambda m: (own[m], m))
        mask = self.masks[share, self.snapshot][None].float().cpu()
        return MaskedPattern(mask=mask, pattern=self.values[self.snapshot].cpu() * mask)


def rightly_classified(pools: SourcePools) -> Tensor:
    """Return which images the model takes for their own class, or all where there are no labels: (n,) bool.

    An image is outside all classes but its own, and but the one that the model sees in it.
    """
    return pools.outside.sum(1) == pools.outside.shape[1] - 1


def work(translated: int, tried: int) -> tuple[int, int]:
    """Return how many images go through the model for a class, without and with gradients."""
    return (
        len(SNAPSHOTS) * len(TRIED) * tried,
        translated * (SNAPSHOTS[-1] + len(SNAPSHOTS) * (len(SHARES) - 1)),
    )


def find_common_pixels(
    problem: InversionProblem,
    surrogates: DistilledSurrogates,
    *,
    images: int,
    tried: int,
    length: float,
    base: int,
    deadline: Deadline,
) -> Iterator[CommonPixels]:
    """Yield what images translated to each class have in common, class by class.

    Args:
        surrogates: what the pixels do in them as well is natural in a class.
        images: how many are translated to a class.
        tried: on how many others the pixels are tried, at most.
        length: L2 length of a step, as a share of that of an image that is white all over.
        base: seed of the draws; each class has its own, so that grouping changes nothing.

    Raises:
        CouldNotTell: if the deadline is too near, or there are too few images outside a class.
    """
    k = len(problem.classes)
    forwards, gradients = work(images, tried)
    guard = TimeGuard(
        deadline, k * (gradients + FORWARD * forwards), work=f"translating images to {k:,} classes"
    )
    for group in torch.split(torch.arange(k), max(1, problem.chunk // images)):
        sources = [_sources(problem, t, base, images, tried) for t in group.tolist()]
        yield from _search(problem, surrogates, sources, length, guard)
        guard.advance(FORWARD * sum(forwards - work(0, len(one.kept_back))[0] for one in sources))


def _sources(problem: InversionProblem, target: int, base: int, images: int, tried: int) -> Sources:
    """Draw which images are translated to a class, and which others the pixels are tried on.

    Those that the model takes for their own class come first.

    Raises:
        CouldNotTell: if there are none for one of both.
    """
    outside, right = problem.pools.outside, rightly_classified(problem.pools)
    drawn = torch.randperm(len(outside), generator=make_generator(base, f"class {target}"))
    drawn = drawn[outside[drawn, target]]
    drawn = drawn[(~right[drawn]).to(torch.uint8).argsort(stable=True)]
    n = min(images, len(drawn) // 2)
    if n == 0:
        raise CouldNotTell(f"there are too few images outside class {problem.classes[target]!r}")
    # as many for each class, so that classes go through in one batch
    picked = drawn[:n].repeat(math.ceil(images / n))[:images]
    return Sources(target, picked, drawn[n : n + tried])


def _search(
    problem: InversionProblem,
    surrogates: DistilledSurrogates,
    sources: list[Sources],
    length: float,
    guard: TimeGuard,
) -> Iterator[CommonPixels]:
    """Yield the pixels for some classes, which go through the model together."""
    device, shape, s = problem.images.device, problem.images.shape[1:], len(SNAPSHOTS)
    x = torch.cat([problem.images[one.translated.to(device)] for one in sources])  # (g * n, c, h, w)
    g, n = len(sources), len(x) // len(sources)
    targets = torch.tensor([one.target for one in sources], device=device).repeat_interleave(n)
    moved = translate(
        problem.classifier,
        x,
        targets,
        length=length * math.sqrt(math.prod(shape)),
        snapshots=SNAPSHOTS,
        guard=guard,
    )
    change = torch.cat([(to - x).view(g, n, *shape).mean(1) for to in moved])  # (s * g, c, h, w)
    values = (change > 0).to(x)
    masks = _pruned(problem, x.repeat(s, 1, 1, 1), targets.repeat(s), change, values, guard)
    masks, values = masks.view(len(TRIED), s, g, *shape[1:]), values.view(s, g, *shape)
    for i, one in enumerate(sources):
        yield _tried(problem, surrogates, one, masks[:, :, i], values[:, i], guard)


def _pruned(
    problem: InversionProblem, x: Tensor, targets: Tensor, change: Tensor, values: Tensor, guard: TimeGuard
) -> Tensor:
    """Return the pixels that are left at each share that is tried: (m, r, h, w) bool.

    Args:
        x, targets: (r * n, c, h, w) and (r * n,), n images for each of r changes.
        change, values: (r, c, h, w), by which the first pixels are chosen, and what is pasted.
    """
    n = len(x) // len(change)
    pasted, kept = values.repeat_interleave(n, 0), []
    masks = _strongest(torch.linalg.vector_norm(change, dim=1), SHARES[0])
    for share in SHARES[1:]:
        shown = torch.where(masks.repeat_interleave(n, 0)[:, None], pasted, x)
        gradient = target_gradient(problem.classifier, shown, targets, guard)
        # by how much the loss rises, to first order, where a pixel becomes again what it was
        rise = (gradient * (x - pasted)).sum(1).view(len(change), n, *x.shape[2:]).mean(1)  # (r, h, w)
        masks = _strongest(rise.masked_fill(~masks, -torch.inf), share)
        if share in TRIED:
            kept.append(masks)
    return torch.stack(kept)


def _strongest(strength: Tensor, share: float) -> Tensor:
    """Return the pixels of most strength (r, h, w) that are this share of all: (r, h, w) bool."""
    flat = strength.flatten(1)
    best = flat.topk(max(1, round(share * flat.shape[1])), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).view_as(strength)


def _tried(
    problem: InversionProblem,
    surrogates: DistilledSurrogates,
    sources: Sources,
    masks: Tensor,
    values: Tensor,
    guard: TimeGuard,
) -> CommonPixels:
    """Try pixels on the images that were kept back.

    Args:
        masks, values: (m, s, h, w) bool and (s, c, h, w).
    """
    held = problem.images[sources.kept_back.to(problem.images.device)]

    def shown(place: Tensor, value: Tensor) -> Iterator[Tensor]:
        return (torch.where(place, value, part) for part in torch.split(held, problem.chunk))

    def reached(place: Tensor, value: Tensor) -> Tensor:
        found = []
        for pasted in shown(place, value):
            with torch.no_grad():
                found.append(problem.classifier.logits(pasted).argmax(1) == sources.target)
            guard.advance(FORWARD * len(pasted))
        return torch.cat(found)

    hits = torch.stack(
        [torch.stack([reached(*one) for one in zip(row, values, strict=True)]) for row in masks]
    )  # (m, s, n)
    success = hits.float().mean(2)
    best = int(success.mean(0).argmax())
    natural = [
        torch.cat([surrogates.all_predict(some, sources.target) for some in shown(row[best], values[best])])
        for row in masks
    ]
    alone = (hits[:, best] & ~torch.stack(natural)).float().mean(1)
    return CommonPixels(sources.target, masks, values, success.cpu(), alone.cpu())
