"""Universal patch search: the place and pixels of the small patch that moves most images to a class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.formatting import percent
from doorward.core.records import Measurement, RecoveredTrigger, Table
from doorward.core.seeds import make_generator
from doorward.detectors.model.base import ImageDetector
from doorward.inversion.adam import Adam
from doorward.inversion.distilled import DistilledSurrogates
from doorward.inversion.problem import InversionProblem
from doorward.methods.registry import register
from doorward.models.batching import margin
from doorward.stats.outliers import gap_to_others
from doorward.triggers.masked import MaskedPattern

#: Loss below which patches are not told apart: single precision cannot.
LEAST_LOSS = 1e-9


@dataclass(frozen=True)
class Patches:
    """N patches, each for a target and at a place.

    Attributes:
        targets: (n,) class numbers.
        corner: (n, 2) row and column of the upper left corner.
        pattern: (n, c, h, w) in [0, 1]; it counts inside the window alone.
        strength: (n,) minus the logarithm of a mean margin loss.
        success: (n,) share of the target's sources that go to it.
        natural: (n,) share of them that go to it in every surrogate of the model as well.
    """

    targets: Tensor
    corner: Tensor
    pattern: Tensor
    strength: Tensor
    success: Tensor
    benign_ease: Tensor

    @property
    def excess_margin(self) -> Tensor:
        """Return the part of the strength that is not natural: (n,)."""
        return self.strength - self.benign_ease * self.strength.clamp_min(0)

    def best(self, target: int, count: int = 1) -> list[int]:
        """Return the positions of the patches that are strongest for a target."""
        order = torch.where(self.targets == target, self.excess_margin, -torch.inf).argsort(descending=True)
        return order[: min(count, int((self.targets == target).sum()))].tolist()

    def only(self, positions: Sequence[int]) -> Patches:
        """Return some of these."""
        return Patches(*(getattr(self, f.name)[list(positions)] for f in fields(self)))

    def trigger(self, position: int, side: int) -> MaskedPattern:
        """Return one patch as a trigger."""
        pattern = self.pattern[position].cpu()
        mask = _windows(self.corner[position : position + 1].cpu(), side, pattern.shape[1:])[0].float()
        return MaskedPattern(mask=mask, pattern=pattern * mask)

    def with_others(self, *others: Patches) -> Patches:
        """Return these and others as one."""
        every = (self, *others)
        return Patches(*(torch.cat([getattr(one, f.name) for one in every]) for f in fields(self)))


@register("detector")
class PatchSearch(ImageDetector):
    """Find the opaque square patch that moves images to each class most, and score the margin it reaches.

    Use it on image classifiers with gradients, with 20 clean images or more, against patches of any texture.

    Every class gets a canvas of the image's size; each step shows a window of it at a random place on each
    image and moves the pixels shown towards the class (margin loss). The windows are then tried on a grid of
    places. The classes that respond most begin again from other canvases, and their best windows are moved on
    where they are.

    A class's strength is minus the logarithm of its mean loss under its best patch, the images that resist
    most left out; the score adds how far that lies above the median of the other classes. A mask that is
    small in the L1 norm (`neural-cleanse`) may be faint and all over the image, and a fine texture is hard to
    reach from there; here size and shape are given and the margin is measured.

    Some classes are easy to reach by nature: a stroke at the right place turns digits into others. Distilled
    surrogates, which learn the model's answers on clean images, learn what is natural as well, and never see
    a planted trigger. So the share of images that a patch sends to its class in every surrogate too is taken
    off.

    The patch is that of T. Brown et al.; the score and its use against backdoors are ours.
    """

    title = "Universal patch search"
    source = "T. Brown et al., Adversarial Patch, 2017, arXiv 1712.09665; the score is ours"
    limits = (
        "It can miss triggers other than a compact, fixed patch (blended, warped, distributed, "
        "input-dependent or source-specific ones), and it needs gradients."
    )
    order: ClassVar[int] = 15

    side: float = Field(0.18, gt=0, le=0.5, description="The patch's side, as a share of the image's shorter")
    steps: int = Field(100, ge=1, le=10_000, description="Steps with windows at random places")
    further_steps: int = Field(50, ge=1, le=10_000, description="Steps at the places that work best")
    restarts: int = Field(2, ge=0, le=20, description="Further canvases for the classes that respond most")
    batch_size: int = Field(16, ge=1, le=1024, description="Images per class and step")
    many_classes: int = Field(20, ge=1, description="Classes above which images are halved at first")
    learning_rate: float = Field(0.3, gt=0, description="Adam's step in the sigmoid's argument")
    tried: int = Field(8, ge=1, description="Images on which each place is tried")
    places: int = Field(2, ge=1, description="Places per class that are kept")
    candidates: int = Field(
        3, ge=1, description="How many of the classes that respond most are searched again"
    )
    trim_fraction: float = Field(
        0.05, ge=0, lt=0.5, description="Share of the images on which a patch may fail"
    )
    mixtures: int = Field(
        6_400, ge=64, description="Mixtures of clean images from which the surrogates learn"
    )
    contrast: float = Field(1.0, ge=0, description="What standing out from the other classes counts")

    def lesson(self) -> int:
        """Return how many images its surrogates learn from."""
        return self.mixtures

    def score_classes(
        self, problem: InversionProblem, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a measurement with one score per class: the strength of its best patch."""
        k = len(problem.classes)
        side = max(2, round(self.side * min(problem.images.shape[2:])))
        base = int(torch.randint(2**62, (), generator=generator))
        rerun, share = min(self.candidates, k), 1 if k <= self.many_classes else 2
        work = k * self.steps + rerun * (self.restarts * self.steps + self.places * self.further_steps)
        surrogates = DistilledSurrogates.of(problem, images=self.mixtures, deadline=deadline)
        guard = TimeGuard(deadline, work, work=f"searching patches for {k:,} classes")
        search = _Search(
            problem,
            surrogates,
            side=side,
            places=self.places,
            trim_fraction=self.trim_fraction,
            learning_rate=self.learning_rate,
            base=base,
            guard=guard,
        )

        def start(targets: Tensor, run: int, share: int) -> Patches:
            batch, tried = (max(1, count // share) for count in (self.batch_size, self.tried))
            return search.over_the_image(targets, run, self.steps, batch_size=batch, tried=tried)

        with problem.fast_inference():
            found = start(torch.arange(k), 0, share)
            excess_margin = torch.stack([found.excess_margin[found.best(t)[0]] for t in range(k)])
            candidates = excess_margin.argsort(descending=True)[:rerun].sort().values
            found = found.with_others(*(start(candidates, run, 1) for run in range(1, self.restarts + 1)))
            kept = torch.tensor([i for t in candidates.tolist() for i in found.best(t, self.places)])
            moved = search.in_place(found, kept, self.further_steps, batch_size=self.batch_size)
        found = found.with_others(moved)
        best = found.only([found.best(t)[0] for t in range(k)])
        return self._conclude(problem.classes, surrogates, side, best)

    def _conclude(
        self, classes: tuple[str, ...], surrogates: DistilledSurrogates, side: int, best: Patches
    ) -> Measurement:
        """Return the finding for the best patch of every class, in order."""
        excess_margin = best.excess_margin.double().numpy()
        success, benign_ease = best.success.tolist(), best.benign_ease.tolist()
        score = excess_margin + self.contrast * gap_to_others(excess_margin)
        order = np.argsort(-score).tolist()
        top = order[0]
        return self.measurement(
            summary=(
                f"A patch of {side}x{side} pixels sends {percent(success[top])} of other images to class "
                f"{classes[top]!r}, and {percent(benign_ease[top])} in surrogates that learnt from clean "
                f"images alone; for the median class that is {percent(float(np.median(success)))} and "
                f"{percent(float(np.median(benign_ease)))}."
            ),
            doubt=surrogates.doubt,
            score=float(score[top]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="the margin that a patch reaches, in itself and next to other classes (logarithms)",
            evidence=(
                *(
                    RecoveredTrigger(
                        title=f"Patch recovered for class {classes[t]!r}",
                        target=t,
                        trigger=best.trigger(t, side).to_json(),
                    )
                    for t in order[: self.candidates]
                ),
                Table(
                    title="Best patch by class",
                    columns=(
                        "class",
                        "strength",
                        "success on images used",
                        "success in surrogates",
                        "row",
                        "column",
                    ),
                    rows=tuple(
                        (
                            classes[t],
                            round(float(best.strength[t]), 2),
                            round(success[t], 3),
                            round(benign_ease[t], 3),
                            *best.corner[t].tolist(),
                        )
                        for t in order
                    ),
                ),
            ),
        )


def _windows(corner: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """Return where n windows are whose upper left corners (n, 2) are given: (n, 1, h, w) bool."""
    top, left = corner[:, :1], corner[:, 1:]  # (n, 1)
    rows, columns = (torch.arange(length, device=corner.device)[None] for length in size)
    down = (rows >= top) & (rows < top + side)  # (n, h)
    across = (columns >= left) & (columns < left + side)  # (n, w)
    return (down[:, :, None] & across[:, None, :])[:, None]


class _Search:
    """Search patches of one size.

    Args:
        places: windows that are kept of each canvas.
        trim_fraction: share of the sources that may resist.
        base: seed; every target draws from generators of its own, so that the grouping changes nothing.
    """

    def __init__(
        self,
        problem: InversionProblem,
        surrogates: DistilledSurrogates,
        *,
        side: int,
        places: int,
        trim_fraction: float,
        learning_rate: float,
        base: int,
        guard: TimeGuard,
    ) -> None:
        self.problem, self.surrogates, self.images, self.side, self.places = (
            problem,
            surrogates,
            problem.images,
            side,
            places,
        )
        self.trim_fraction, self.learning_rate, self.base, self.guard = (
            trim_fraction,
            learning_rate,
            base,
            guard,
        )
        self.most = [length - side + 1 for length in problem.images.shape[2:]]  # corners: rows, columns

    def over_the_image(
        self, targets: Tensor, run: int, steps: int, *, batch_size: int, tried: int
    ) -> Patches:
        """Move a canvas for each target and return its best windows; each run starts elsewhere."""
        found = []
        for group in torch.split(targets, max(1, self.problem.chunk // batch_size)):
            own = [make_generator(self.base, f"{t} {run}") for t in group.tolist()]
            at = torch.stack([torch.randn(self.images.shape[1:], generator=g) * 0.5 for g in own])
            at = at.to(self.images.device)

            def show(x: Tensor, pattern: Tensor, own: Sequence[torch.Generator] = own) -> Tensor:
                return torch.where(self._at(self._anywhere(own, batch_size)), pattern, x)

            self._descend(group, at, own, show, steps, batch_size)
            for t, canvas, g in zip(group.tolist(), at.sigmoid(), own, strict=True):
                found.append(self._best_windows(t, canvas, g, tried))
        return self._measured(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def in_place(self, patches: Patches, kept: Tensor, steps: int, *, batch_size: int) -> Patches:
        """Move some patches on where they are."""
        targets, corner, pattern = patches.targets[kept], patches.corner[kept], patches.pattern[kept]
        moved = []
        for group in torch.split(torch.arange(len(kept)), max(1, self.problem.chunk // batch_size)):
            own = [make_generator(self.base, f"{int(targets[i])} in place {int(kept[i])}") for i in group]
            at = pattern[group].clamp(1e-6, 1 - 1e-6).logit()
            windows = self._at(corner[group].repeat_interleave(batch_size, 0))

            def show(x: Tensor, pattern: Tensor, windows: Tensor = windows) -> Tensor:
                return torch.where(windows, pattern, x)

            self._descend(targets[group], at, own, show, steps, batch_size)
            moved.append(at.sigmoid())
        return self._measured(targets, corner, torch.cat(moved))

    def _descend(
        self,
        targets: Tensor,
        at: Tensor,
        own: Sequence[torch.Generator],
        show: Callable[[Tensor, Tensor], Tensor],
        steps: int,
        batch_size: int,
    ) -> None:
        """Move patterns (g, c, h, w), before the sigmoid, so that images which show them go to their targets.

        Args:
            show: makes of images and of patterns, (g * batch_size, c, h, w) each, what the model sees.
        """
        adam, device = Adam(at, self.learning_rate), self.images.device
        where = targets.repeat_interleave(batch_size).to(device)  # (g * b,)
        for _ in range(steps):
            x = self.images[self.problem.pools.draw(targets, batch_size, own).to(device)].flatten(0, 1)
            pattern = at.sigmoid().requires_grad_()
            shown = show(x, pattern.repeat_interleave(batch_size, 0))
            loss = F.softplus(-margin(self.problem.classifier.logits(shown), where)).sum()
            (gradient,) = torch.autograd.grad(loss, pattern)
            pattern = pattern.detach()
            adam.step(gradient * pattern * (1 - pattern))  # the chain rule through the sigmoid
            self.guard.advance(len(targets))

    def _anywhere(self, own: Sequence[torch.Generator], count: int) -> Tensor:
        """Draw `count` corners for each target, each by its own generator: (g * count, 2).

        They are drawn from beyond the edges and moved inside, so that every pixel is shown about as often.
        """
        low, high = 1 - self.side, [most + self.side - 1 for most in self.most]
        drawn = [[torch.randint(low, end, (count,), generator=g) for end in high] for g in own]
        inside = [[at.clamp(0, most - 1) for at, most in zip(pair, self.most, strict=True)] for pair in drawn]
        return torch.cat([torch.stack(pair, 1) for pair in inside])

    def _best_windows(
        self, target: int, canvas: Tensor, generator: torch.Generator, tried: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a target's number, the corners and the patterns of its best windows, once for each."""
        stride = max(1, self.side // 2)
        grid = [sorted({*range(0, most, stride), most - 1}) for most in self.most]  # the far edges as well
        corner = torch.cartesian_prod(*(torch.tensor(places) for places in grid))  # (p, 2)
        drawn = self.problem.pools.draw(torch.tensor([target]), tried, [generator])[0]
        x = self.images[drawn.to(canvas.device)]  # (tried, c, h, w)
        losses = []
        for part in torch.split(corner, max(1, self.problem.chunk // tried)):
            shown = torch.where(self._at(part)[:, None], canvas, x).flatten(0, 1)
            losses.append(self._losses(shown, target).view(len(part), tried).mean(1))
        least = torch.cat(losses).argsort()[: self.places].cpu()
        n = len(least)
        return torch.full((n,), target), corner[least], canvas.expand(n, *canvas.shape)

    def _measured(self, targets: Tensor, corner: Tensor, pattern: Tensor) -> Patches:
        """Return patches with what they do to all sources of their targets."""
        measured = []
        for t, window, shown in zip(targets.tolist(), self._at(corner), pattern, strict=True):

            def show(x: Tensor, window: Tensor = window, shown: Tensor = shown) -> Tensor:
                return torch.where(window, shown, x)

            measured.append(torch.stack(self._reached(t, show)))
        strength, success, benign_ease = torch.stack(measured).cpu().unbind(1)
        return Patches(targets, corner, pattern, strength, success, benign_ease)

    def _reached(self, target: int, show: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean log margin, and the share of sources that model and surrogates send there."""
        sources = self.images[self.problem.pools.outside[:, target].to(self.images.device)]
        shown = [show(part) for part in torch.split(sources, self.problem.chunk)]
        losses = torch.cat([self._losses(part, target) for part in shown])
        benign_ease = torch.cat([self.surrogates.all_predict(part, target) for part in shown])
        # a few images that resist would hide how large the margin of all others is
        kept = losses.sort().values[: math.ceil((1 - self.trim_fraction) * len(losses))]
        reached = losses < F.softplus(losses.new_zeros(()))
        return (
            -kept.mean().clamp_min(LEAST_LOSS).log(),
            reached.float().mean(),
            benign_ease.float().mean(),
        )

    def _losses(self, x: Tensor, target: int) -> Tensor:
        """Return the margin loss of each image (n, c, h, w) for a target: (n,), without gradients."""
        with torch.no_grad():
            logits = self.problem.classifier.logits(x)
            return F.softplus(-margin(logits, torch.full((len(x),), target, device=x.device)))

    def _at(self, corner: Tensor) -> Tensor:
        return _windows(corner.to(self.images.device), self.side, self.images.shape[2:])
