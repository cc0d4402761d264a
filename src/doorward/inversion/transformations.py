"""Universal transformations: for each class, the smallest change of a kind that moves images to it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import TimeGuard
from doorward.core.seeds import make_generator
from doorward.inversion.adam import Adam
from doorward.inversion.distilled import DistilledSurrogates
from doorward.inversion.problem import InversionProblem
from doorward.models.logit_scale import LogitScale
from doorward.triggers.additive import Additive, cosines
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from doorward.triggers.warp import Warp

#: Share of images that must go to a class, and how much the running share takes of each step.
SUCCESS, SHARE = 0.85, 0.4
#: Momentum of the direction, Adam's step, the last steps over which the cost is averaged, and how far it may
#: grow.
MOMENTUM, RATE, AVERAGED, FARTHEST = 0.7, 0.25, 12, 12.0


class SphereDescent:
    """Directions on the unit sphere, moved along their normalised gradients with momentum.

    Args:
        start: (n, *shape), of any norm.

    Attributes:
        at: (n, *shape), each of norm 1.
    """

    def __init__(self, start: Tensor) -> None:
        self.at, self._momentum = _unit(start), torch.zeros_like(start)

    def step(self, gradient: Tensor, warmth: float) -> None:
        """Move by a gradient (n, *shape); warmth falls from 1 to 0 over the search."""
        self._momentum = MOMENTUM * self._momentum + _unit(gradient)
        self.at = _unit(self.at - (0.05 + 0.45 * warmth) * _unit(self._momentum))


class PictureDescent:
    """Pictures before the sigmoid, moved by Adam.

    Attributes:
        at: (n, c, h, w).
    """

    def __init__(self, start: Tensor) -> None:
        self.at = 0.5 * start
        self._adam = Adam(self.at, RATE)

    def step(self, gradient: Tensor, warmth: float) -> None:
        """Move by a gradient (n, c, h, w)."""
        self._adam.step(gradient)


class Family(ABC):
    """A kind of transformation, which has a direction and a cost.

    Attributes:
        name, told: what it is called in tables, and in a sentence.
        first: the cost at which a search starts.
        most: the cost beyond which a class counts as not reached.
        slowest, fastest: the part by which the cost changes in a step, at the end and at the start.
        shape: of one direction.
        descent: how directions are moved.
    """

    name: ClassVar[str]
    told: ClassVar[str]
    slowest: ClassVar[float] = 0.03
    fastest: ClassVar[float] = 0.12
    descent: ClassVar[type[SphereDescent | PictureDescent]] = SphereDescent
    first: float
    most: float
    shape: tuple[int, ...]

    @abstractmethod
    def __init__(self, image: Sequence[int]) -> None:
        """Set up the family for images of shape (c, h, w)."""

    @abstractmethod
    def apply(self, x: Tensor, direction: Tensor, cost: Tensor) -> Tensor:
        """Return images (n, c, h, w) in [0, 1], changed in directions (n, *shape) at costs (n, 1, 1, 1)."""

    @abstractmethod
    def trigger(self, direction: Tensor, cost: float) -> Trigger:
        """Return one transformation as a trigger."""


class Dense(Family):
    """Add any picture: clip(x + q)."""

    name, told = "picture added", "A picture that is added"

    def __init__(self, image: Sequence[int]) -> None:
        self.shape = tuple(image)
        self.first = 0.08 * math.sqrt(math.prod(image))
        self.most = FARTHEST * self.first

    def apply(self, x: Tensor, direction: Tensor, cost: Tensor) -> Tensor:
        """Return the changed images."""
        return (x + cost * self._picture(direction)).clamp(0, 1)

    def trigger(self, direction: Tensor, cost: float) -> Trigger:
        """Return one change as a trigger."""
        return Additive(cost * self._picture(direction))

    def _picture(self, direction: Tensor) -> Tensor:
        return direction


class LowFrequency(Dense):
    """Add a picture of the lowest frequencies: 5x5 coefficients of the cosine transform in each channel."""

    name, told = "smooth picture added", "A smooth picture that is added"
    side: ClassVar[int] = 5

    def __init__(self, image: Sequence[int]) -> None:
        super().__init__(image)
        c, h, w = image
        rows, columns = (cosines(min(self.side, length), length) for length in (h, w))
        self.shape = (c, len(rows), len(columns))
        self._rows, self._columns = rows, columns

    def _picture(self, direction: Tensor) -> Tensor:
        return self._rows.to(direction).T @ direction @ self._columns.to(direction)


class Bent(Family):
    """Bend the image: every pixel shows what lies a little away; 4x4 shifts in pixels, smooth between."""

    name, told = "image bent", "A bend of the image"
    knots: ClassVar[int] = 4

    def __init__(self, image: Sequence[int]) -> None:
        self.shape = (2, self.knots, self.knots)
        self.first = math.sqrt(math.prod(self.shape))
        self.most = FARTHEST * self.first
        _, h, w = image
        rows, columns = (torch.linspace(-1, 1, length) for length in (h, w))
        self._here = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
        self._pixel = torch.tensor([2 / max(w - 1, 1), 2 / max(h - 1, 1)])

    def apply(self, x: Tensor, direction: Tensor, cost: Tensor) -> Tensor:
        """Return the changed images."""
        shift = F.interpolate(cost * direction, tuple(x.shape[2:]), mode="bicubic", align_corners=True)
        shift = shift.permute(0, 2, 3, 1)
        where = self._here.to(x) + shift * self._pixel.to(x)
        return F.grid_sample(x, where, padding_mode="border", align_corners=True)

    def trigger(self, direction: Tensor, cost: float) -> Trigger:
        """Return one change as a trigger."""
        h, w = self._here.shape[:2]
        # a warp's unit is half a pixel, and slightly less since it counts from centre to centre
        unit = torch.tensor([2 * w / max(w - 1, 1), 2 * h / max(h - 1, 1)]).to(direction)
        return Warp(cost * direction * unit[:, None, None], 1.0)


class Blend(Family):
    """Blend any picture in: (1 - a) x + a picture, at the cost a / (1 - a)."""

    name, told = "picture blended in", "A picture that is blended in"
    fastest = 0.1
    descent = PictureDescent

    def __init__(self, image: Sequence[int]) -> None:
        self.shape = tuple(image)
        self.first, self.most = 0.4 / 0.6, 0.95 / 0.05

    def apply(self, x: Tensor, direction: Tensor, cost: Tensor) -> Tensor:
        """Return the changed images."""
        return x.lerp(direction.sigmoid(), (cost / (1 + cost)).expand_as(x))

    def trigger(self, direction: Tensor, cost: float) -> Trigger:
        """Return one change as a trigger."""
        _, h, w = self.shape
        return MaskedPattern(torch.full((1, h, w), cost / (1 + cost)), direction.sigmoid())


#: All families.
FAMILIES: tuple[type[Family], ...] = (Dense, LowFrequency, Bent, Blend)


@dataclass(frozen=True)
class Found:
    """The transformations of one family that a search found for some classes.

    Attributes:
        family: the kind of transformation.
        targets: (n,) class numbers.
        cost: (n,) logarithm of the least cost that moves enough images.
        reached: (n,) whether enough images went to the class at any cost that is allowed.
        direction: (n, *shape) in which that cost suffices.
    """

    family: Family
    targets: Tensor
    cost: Tensor
    reached: Tensor
    direction: Tensor

    @property
    def cheapest(self) -> int:
        """Return the number of the class with the least cost."""
        return int(self.targets[self.cost.argmin()])

    @property
    def gap(self) -> float:
        """Return how far the cheapest class lies below the second (logarithm); 0 if it was not reached."""
        first, second = self.cost.sort().values[:2].tolist()
        return second - first if bool(self.reached[self.cost.argmin()]) else 0.0

    def best(self, stronger: float) -> tuple[Tensor, float]:
        """Return the direction of the cheapest class, and its cost times a factor."""
        i = self.cost.argmin()
        return self.direction[i], float(self.cost[i].exp()) * stronger


class JointObjective:
    """What a transformation shall do: move the model to a class, and its surrogates not.

    Both are brought to one scale of logits.

    Args:
        scale: of the model's logits.
    """

    def __init__(
        self, problem: InversionProblem, surrogates: DistilledSurrogates | None, scale: LogitScale
    ) -> None:
        self._problem, self._surrogates, self._scale = problem, surrogates, scale

    def __call__(self, shown: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the loss (n,) and the success (n,): the model goes to the target, the surrogate does not.

        Args:
            step: surrogates take turns, which costs less than all at once and is the same on average.
        """
        logits = self._scale.apply(self._problem.classifier.logits(shown))
        loss = F.cross_entropy(logits, targets, reduction="none")
        success = (logits.detach().argmax(1) == targets).float()
        if self._surrogates is not None:
            margins = self._surrogates.margins(shown, targets, step)
            loss = loss + F.softplus(margins)
            success = success * (margins.detach() <= 0)
        return loss, success


class Search:
    """Search the cheapest transformations of a family for some classes at once.

    The direction goes down the loss on the sphere, with momentum; the cost shrinks while enough images go to
    the class and grows otherwise.

    Args:
        base: seed; each class and run draws from a generator of its own, so that the grouping changes
            nothing.
    """

    def __init__(
        self, problem: InversionProblem, objective: JointObjective, *, base: int, guard: TimeGuard
    ) -> None:
        self._problem, self._objective, self._base, self._guard = problem, objective, base, guard

    def __call__(self, family: Family, targets: Tensor, run: int, *, steps: int, batch_size: int) -> Found:
        """Return what was found for each target."""
        groups = torch.split(targets, max(1, self._problem.chunk // batch_size))
        parts = [self._group(family, group, run, steps, batch_size) for group in groups]
        return Found(family, targets, *(torch.cat(part) for part in zip(*parts, strict=True)))

    def _group(
        self, family: Family, targets: Tensor, run: int, steps: int, batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, pools = self._problem.images, self._problem.pools
        g, device = len(targets), images.device
        own = [make_generator(self._base, f"{family.name} {t} {run}") for t in targets.tolist()]
        start = torch.stack([torch.randn(family.shape, generator=one) for one in own]).to(device)
        descent, cost = family.descent(start), torch.full((g,), family.first, device=device)
        running, where = torch.zeros(g, device=device), targets.repeat_interleave(batch_size).to(device)
        total, ever = torch.zeros(g, device=device), torch.zeros(g, dtype=torch.bool, device=device)
        for step in range(steps):
            warmth = (1 + math.cos(math.pi * step / steps)) / 2
            x = images[pools.draw(targets, batch_size, own).to(device)].flatten(0, 1)
            direction = descent.at.detach().requires_grad_()
            paid = cost.repeat_interleave(batch_size)[:, None, None, None]
            shown = family.apply(x, direction.repeat_interleave(batch_size, 0), paid)
            loss, success = self._objective(shown, where, step)
            (gradient,) = torch.autograd.grad(loss.sum(), direction)
            descent.step(gradient, warmth)
            running = running + SHARE * (success.view(g, batch_size).mean(1) - running)
            rate = family.slowest + (family.fastest - family.slowest) * warmth
            held = running >= SUCCESS
            cost = torch.where(held, cost * (1 - rate), cost * (1 + rate / 2)).clamp(max=family.most)
            if step >= steps - AVERAGED:
                total += cost.log() / AVERAGED
                ever |= held
            self._guard.advance(g)
        return total.cpu(), ever.cpu(), descent.at.cpu()


def _unit(x: Tensor) -> Tensor:
    """Return each of n tensors with norm 1; one that is 0 stays so."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return x / norm.clamp_min(1e-12).view((-1,) + (1,) * (x.dim() - 1))
