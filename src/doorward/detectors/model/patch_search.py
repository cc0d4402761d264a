"""Universal patch search: find, for every class, the place and pixels of the small patch it obeys most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from doorward.detectors.base import Detector
from doorward.errors import CouldNotTell
from doorward.inversion import Adam, SourcePools, chunk_images, margin, outside_class
from doorward.methods import Deadline, Pace, make_generator
from doorward.modalities.image import to_float, to_tensor
from doorward.models import Classifier
from doorward.outliers import gap_to_others
from doorward.records import Finding, RecoveredTrigger, Table
from doorward.registry import register
from doorward.subject import Subject
from doorward.triggers import MaskedPattern

#: Loss below which patches are not told apart: single precision cannot.
LEAST_LOSS = 1e-9


@dataclass(frozen=True)
class Patches:
    """Hold n patches, each for a target and at a place.

    Attributes:
        targets: (n,) class numbers.
        corner: (n, 2) row and column of the upper left corner.
        pattern: (n, c, h, w) in [0, 1]; it counts inside the window alone.
        strength: (n,) minus the logarithm of the mean loss on the target's sources, the worst few spared.
        success: (n,) share of these that go to the target.
    """

    targets: Tensor
    corner: Tensor
    pattern: Tensor
    strength: Tensor
    success: Tensor

    def best(self, target: int) -> int:
        """Return the position of a target's strongest patch."""
        return int(torch.where(self.targets == target, self.strength, -torch.inf).argmax())


@register("detector")
class PatchSearch(Detector):
    """Find the opaque square patch that each class obeys most, and score how firmly it does.

    Every class gets a canvas of the image's size; each step shows a window of it at a random place on each
    image and moves the pixels shown towards the class (margin loss). The windows are then tried on a grid of
    places; those that work best, of the classes that obey most, are moved on where they are. How firmly a
    class obeys is minus the logarithm of its mean loss under its best patch, the images that resist most left
    out; the score adds how far that lies above the median of the other classes. A mask that is small in the
    L1 norm (`neural-cleanse`) may be faint and all over the image, and a fine texture is hard to reach from
    there; here size and shape are given and obedience is measured.

    The patch is that of T. Brown et al.; the score and its use against backdoors are ours.
    """

    title = "Universal patch search"
    source = "T. Brown et al., Adversarial Patch, 2017, arXiv 1712.09665; the score is ours"
    limits = (
        "Sees backdoors that a compact, fixed patch can wake, of any texture; blended, warped, distributed, "
        "input-dependent or source-specific triggers and modules without gradients can escape it."
    )
    atlas = ("AML.T0018.000", "AML.T0020", "AML.T0043.004")
    needs = frozenset({"gradients", "clean"})
    order: ClassVar[int] = 15

    side: float = Field(0.18, gt=0, le=0.5, description="The patch's side, as a share of the image's shorter")
    steps: int = Field(100, ge=1, le=10_000, description="Steps with windows at random places")
    further_steps: int = Field(50, ge=1, le=10_000, description="Steps at the places that work best")
    batch_size: int = Field(16, ge=1, le=1024, description="Images per class and step")
    many_classes: int = Field(
        20, ge=1, description="Classes above which the first steps and trials have half the images"
    )
    learning_rate: float = Field(0.3, gt=0, description="Adam's step in the sigmoid's argument")
    tried: int = Field(8, ge=1, description="Images on which each place is tried")
    places: int = Field(2, ge=1, description="Places per class that are kept")
    doubtful: int = Field(3, ge=1, description="How many of the most obedient classes are worked on further")
    spared: float = Field(0.05, ge=0, lt=0.5, description="Share of the images on which a patch may fail")
    contrast: float = Field(1.0, ge=0, description="What standing out from the other classes counts")
    min_images: int = Field(20, ge=2, description="Clean images below which nothing is concluded")

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Return a finding with one score per class: how firmly it obeys its best patch."""
        classifier, samples = subject.classifier, subject.clean
        assert classifier is not None
        assert samples is not None
        if len(samples) < self.min_images:
            raise CouldNotTell(f"{len(samples)} clean images are too few; give at least {self.min_images}")
        images = to_float(to_tensor(samples, classifier.spec))  # (n, c, h, w)
        labels = None if samples.labels is None else torch.from_numpy(samples.labels)
        pools = SourcePools(outside_class(classifier, images, labels, deadline))
        k = len(classifier.classes)
        side = max(2, round(self.side * min(images.shape[2:])))
        search = _Search(
            classifier,
            images.to(classifier.device),
            pools,
            side=side,
            spared=self.spared,
            learning_rate=self.learning_rate,
            base=int(torch.randint(2**62, (), generator=generator)),
        )
        again, share = min(self.doubtful, k), 1 if k <= self.many_classes else 2
        work = k * self.steps + again * self.places * self.further_steps
        pace = Pace(deadline, work, work=f"searching patches for {k:,} classes")
        with classifier.quick(images[: chunk_images(classifier)]):
            first = search.over_the_image(
                torch.arange(k),
                self.steps,
                batch_size=max(1, self.batch_size // share),
                tried=max(1, self.tried // share),
                places=self.places,
                pace=pace,
            )
            strength = torch.stack([first.strength[first.best(t)] for t in range(k)])
            doubtful = strength.argsort(descending=True)[:again]
            kept = torch.isin(first.targets, doubtful).nonzero().flatten()
            second = search.in_place(first, kept, self.further_steps, batch_size=self.batch_size, pace=pace)
        return self._conclude(classifier.classes, side, first, second)

    def _conclude(self, classes: tuple[str, ...], side: int, first: Patches, second: Patches) -> Finding:
        again = set(second.targets.tolist())
        best: list[tuple[Patches, int]] = []  # the class's strongest
        for t in range(len(classes)):
            options = [(p, p.best(t)) for p in (first, *([second] if t in again else []))]
            best.append(max(options, key=lambda o: float(o[0].strength[o[1]])))
        strength = np.array([float(patches.strength[i]) for patches, i in best])
        score = strength + self.contrast * gap_to_others(strength)
        order = np.argsort(-score)
        top = int(order[0])
        success = [float(patches.success[i]) for patches, i in best]
        return self.finding(
            summary=(
                f"A patch of {side}x{side} pixels sends {success[top]:.0%} of other images to class "
                f"{classes[top]!r}; for the median class that is {np.median(success):.0%}."
            ),
            score=float(score[top]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="how firmly the class obeys a patch, in itself and beside the others (logarithms)",
            evidence=(
                *(
                    RecoveredTrigger(
                        title=f"Patch recovered for class {classes[t]!r}",
                        target=t,
                        trigger=_trigger(best[t][0], best[t][1], side).to_json(),
                    )
                    for t in order[: self.doubtful].tolist()
                ),
                Table(
                    title="Best patch by class",
                    columns=("class", "strength", "success on images used", "row", "column"),
                    rows=tuple(
                        (
                            classes[t],
                            round(float(strength[t]), 2),
                            round(success[t], 3),
                            *best[t][0].corner[best[t][1]].tolist(),
                        )
                        for t in order.tolist()
                    ),
                ),
            ),
        )


def _trigger(patches: Patches, position: int, side: int) -> MaskedPattern:
    """Return one patch as a trigger."""
    pattern = patches.pattern[position].cpu()
    mask = _windows(patches.corner[position : position + 1].cpu(), side, pattern.shape[1:])[0].float()
    return MaskedPattern(mask=mask, pattern=pattern * mask)


def _windows(corner: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """Return where n windows are whose upper left corners (n, 2) are given: (n, 1, h, w) bool."""
    top, left = corner[:, :1], corner[:, 1:]  # (n, 1)
    rows, columns = (torch.arange(length, device=corner.device)[None] for length in size)
    down = (rows >= top) & (rows < top + side)  # (n, h)
    across = (columns >= left) & (columns < left + side)  # (n, w)
    return (down[:, :, None] & across[:, None, :])[:, None]


class _Search:
    """Search patches of one size against one classifier.

    Args:
        images: (n, c, h, w) float in [0, 1], on the classifier's device.
        base: seed; every target draws from generators of its own, so that the grouping changes nothing.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: Tensor,
        pools: SourcePools,
        *,
        side: int,
        spared: float,
        learning_rate: float,
        base: int,
    ) -> None:
        self.classifier, self.images, self.pools, self.side = classifier, images, pools, side
        self.spared, self.learning_rate, self.base = spared, learning_rate, base
        self.most = [length - side + 1 for length in images.shape[2:]]  # corners: rows, columns
        self.chunk = chunk_images(classifier)

    def over_the_image(
        self, targets: Tensor, steps: int, *, batch_size: int, tried: int, places: int, pace: Pace
    ) -> Patches:
        """Move a canvas for each target and return its best windows: `places` for each, in order."""
        found = []
        for group in torch.split(targets, max(1, self.chunk // batch_size)):
            own = [make_generator(self.base, str(t)) for t in group.tolist()]
            at = torch.stack([torch.randn(self.images.shape[1:], generator=g) * 0.5 for g in own])
            at = at.to(self.images.device)
            self._descend(group, at, own, None, steps, batch_size, pace)
            for t, canvas, g in zip(group.tolist(), at.sigmoid(), own, strict=True):
                found.append(self._best_windows(t, canvas, g, tried, places))
        return self._measured(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def in_place(self, patches: Patches, kept: Tensor, steps: int, *, batch_size: int, pace: Pace) -> Patches:
        """Move some patches on where they are."""
        targets, corner, pattern = patches.targets[kept], patches.corner[kept], patches.pattern[kept]
        moved = []
        for group in torch.split(torch.arange(len(kept)), max(1, self.chunk // batch_size)):
            own = [make_generator(self.base, f"{int(targets[i])} {int(kept[i])}") for i in group]
            at = pattern[group].clamp(1e-6, 1 - 1e-6).logit()
            self._descend(targets[group], at, own, corner[group], steps, batch_size, pace)
            moved.append(at.sigmoid())
        return self._measured(targets, corner, torch.cat(moved))

    def _descend(
        self,
        targets: Tensor,
        at: Tensor,
        own: Sequence[torch.Generator],
        corner: Tensor | None,
        steps: int,
        batch_size: int,
        pace: Pace,
    ) -> None:
        """Move patterns (g, c, h, w), before the sigmoid; in windows anywhere if no corners are given."""
        adam, b = Adam(at, self.learning_rate), batch_size
        where = targets.repeat_interleave(b).to(at.device)  # (g * b,)
        windows = None if corner is None else self._windows(corner.repeat_interleave(b, 0))
        for _ in range(steps):
            x = self.images[self.pools.draw(targets, b, own).to(at.device)].flatten(0, 1)  # (g * b, c, h, w)
            pattern = at.sigmoid().requires_grad_()
            shown = self._windows(self._anywhere(own, b)) if windows is None else windows
            x = torch.where(shown, pattern.repeat_interleave(b, 0), x)
            loss = F.softplus(-margin(self.classifier.logits(x), where)).sum()
            (gradient,) = torch.autograd.grad(loss, pattern)
            pattern = pattern.detach()
            adam.step(gradient * pattern * (1 - pattern))  # the chain rule through the sigmoid
            pace.advance(len(targets))

    def _anywhere(self, own: Sequence[torch.Generator], count: int) -> Tensor:
        """Draw `count` corners for each target, each by its own generator: (g * count, 2).

        They are drawn from beyond the edges and moved inside, so that every pixel is shown about as often.
        """
        low, high = 1 - self.side, [most + self.side - 1 for most in self.most]
        drawn = [[torch.randint(low, end, (count,), generator=g) for end in high] for g in own]
        inside = [[at.clamp(0, most - 1) for at, most in zip(pair, self.most, strict=True)] for pair in drawn]
        return torch.cat([torch.stack(pair, 1) for pair in inside])

    def _best_windows(
        self, target: int, canvas: Tensor, generator: torch.Generator, tried: int, places: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a target's number, the corners and the patterns of its best windows, each `places` times."""
        stride = max(1, self.side // 2)
        grid = [sorted({*range(0, most, stride), most - 1}) for most in self.most]  # the far edges as well
        corner = torch.cartesian_prod(*(torch.tensor(places) for places in grid))  # (p, 2)
        drawn = self.pools.draw(torch.tensor([target]), tried, [generator])[0]
        x = self.images[drawn.to(canvas.device)]  # (tried, c, h, w)
        losses = []
        for part in torch.split(corner, max(1, self.chunk // tried)):
            shown = torch.where(self._windows(part)[:, None], canvas, x).flatten(0, 1)
            losses.append(self._losses(shown, target).view(len(part), tried).mean(1))
        least = torch.cat(losses).argsort()[:places].cpu()
        n = len(least)
        return torch.full((n,), target), corner[least], canvas.expand(n, *canvas.shape)

    def _measured(self, targets: Tensor, corner: Tensor, pattern: Tensor) -> Patches:
        """Return patches with what they do to all sources of their targets."""
        strength, success = [], []
        for t, where, shown in zip(targets.tolist(), self._windows(corner), pattern, strict=True):
            sources = self.images[self.pools.outside[:, t].to(self.images.device)]
            parts = torch.split(sources, self.chunk)
            losses = torch.cat([self._losses(torch.where(where, shown, part), t) for part in parts])
            # a few images that resist would hide how firmly all others obey
            obedient = losses.sort().values[: math.ceil((1 - self.spared) * len(losses))]
            strength.append(-obedient.mean().clamp_min(LEAST_LOSS).log())
            success.append((losses < F.softplus(losses.new_zeros(()))).float().mean())
        return Patches(targets, corner, pattern, torch.stack(strength).cpu(), torch.stack(success).cpu())

    def _losses(self, x: Tensor, target: int) -> Tensor:
        """Return the margin loss of each image (n, c, h, w) for a target: (n,), without gradients."""
        with torch.no_grad():
            logits = self.classifier.logits(x)
            return F.softplus(-margin(logits, torch.full((len(x),), target, device=x.device)))

    def _windows(self, corner: Tensor) -> Tensor:
        return _windows(corner.to(self.images.device), self.side, self.images.shape[2:])
