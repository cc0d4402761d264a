"""Which values of a network stay the same for all ordinary images, though they depend on the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.seeds import make_generator
from doorward.models.classifier import TorchClassifier, to_levels
from doorward.models.reach import MOVING, POINTWISE
from doorward.models.spec import InputSpec
from doorward.models.tape import Step, Tape

#: Values of so many elements for each image are watched element by element.
WATCHED = 4096
#: Share of the images for which a value has to stay the same: a few may activate what is hidden.
MOST = 0.9
#: How far a value may stray, as a share of the largest: a whole value, and an element of one.
WHOLE, ELEMENT = 1e-4, 1e-6
#: Sides of the coarse pictures that images are made of.
_SIDES = (2, 3, 4, 6, 8, 12)


def ordinary_images(spec: InputSpec, count: int, *, seed: int = 0) -> Tensor:
    """Return images (n, c, h, w) of 256 levels: smooth ones of several scales, and faint noise.

    None is black or white, over the whole or in a part: that is what triggers are made of.
    """
    generator = make_generator(seed, "ordinary images")
    c, h, w = spec.channels, spec.height, spec.width
    images = []
    for i in range(count):
        side = _SIDES[i % len(_SIDES)]
        coarse = torch.rand((1, c if i % 2 else 1, side, side), generator=generator)
        picture = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False).expand(1, c, h, w)
        low, high = 0.06 + 0.34 * torch.rand(2, generator=generator) * torch.tensor([1.0, 1.4])
        noise = torch.rand((1, c, h, w), generator=generator) * (0.25 if i % 3 == 0 else 0.06)
        images.append((low + (0.88 - low) * (0.3 + high) * picture + noise).clamp(0.02, 0.98))
    return to_levels(torch.cat(images))


def run_in_groups(tape: Tape, x: Tensor, wanted: Sequence[int] = (), **kwargs: Any) -> dict[int, Tensor]:
    """Run a network on any number of inputs, in groups of the size that it takes.

    The last group is filled up with copies of its last input.
    """
    if tape.images is None:
        return tape.run(x, wanted, **kwargs)
    parts: dict[int, list[Tensor]] = {}
    for part in torch.split(x, tape.images):
        short = tape.images - len(part)
        filled = torch.cat([part, part[-1:].expand(short, *part.shape[1:])]) if short else part
        for number, value in tape.run(filled, wanted, **kwargs).items():
            parts.setdefault(number, []).append(value[: len(part)] if value.ndim else value)
    return {number: torch.cat(each) if each[0].ndim else each[0] for number, each in parts.items()}


@dataclass
class Watched:
    """What the values of a network were for some images.

    Attributes:
        scores: (n, k).
        values: (n, elements) of each value that is small enough.
        same: (n,) whether a larger value is what it is for the first image.
        scale: largest size of each value.
    """

    scores: Tensor
    values: dict[int, Tensor] = field(default_factory=dict)
    same: dict[int, Tensor] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)

    def constant(self, number: int) -> Tensor:
        """Return what each element (elements,) of a value mostly is."""
        return self.values[number].median(0).values

    def silent_elements(self, number: int) -> Tensor:
        """Return which elements (elements,) of a value are the same for most images."""
        values = self.values[number]
        stray = (values - self.constant(number)).abs()
        return (stray <= ELEMENT * max(self.scale[number], 1e-30)).float().mean(0) >= MOST

    def silent(self, number: int) -> bool:
        """Return whether a whole value is the same for most images."""
        if number in self.values:
            stray = (self.values[number] - self.constant(number)).abs().amax(1)
            return float((stray <= WHOLE * max(self.scale[number], 1e-30)).float().mean()) >= MOST
        return number in self.same and float(self.same[number].float().mean()) >= MOST


def watch(tape: Tape, x: Tensor) -> Watched:
    """Run a network on inputs and keep what its values are."""
    values: dict[int, list[Tensor]] = {}
    same: dict[int, list[Tensor]] = {}
    first: dict[int, Tensor] = {}
    scale: dict[int, float] = {}
    size = tape.images or len(x)

    def see(number: int, value: Tensor) -> None:
        if value.ndim == 0 or len(value) != size or not value.numel() or value.is_complex():
            return
        flat = value.detach().reshape(size, -1).float()
        largest = float(flat.abs().amax())
        scale[number] = max(scale.get(number, 0.0), largest) if math.isfinite(largest) else math.inf
        if flat.shape[1] <= WATCHED:
            values.setdefault(number, []).append(flat)
            return
        row = first.setdefault(number, flat[0].clone())
        stray = (flat - row).abs().amax(1)
        same.setdefault(number, []).append(stray <= WHOLE * max(scale[number], 1e-30))

    with torch.no_grad():
        scores = run_in_groups(tape, x, see=see)[tape.output].flatten(1)
    n = len(x)
    return Watched(
        scores,
        {number: torch.cat(each)[:n] for number, each in values.items()},
        {number: torch.cat(each)[:n] for number, each in same.items()},
        scale,
    )


def pointwise_roots(tape: Tape) -> dict[int, int]:
    """Return, for each value, the value that it is made of element by element, where it is one."""
    roots = {0: 0}
    for step in tape.steps:
        read = {roots.get(number, number) for number in step.reads if number in tape.derived}
        plain = step.name in POINTWISE or step.name in _SHAPING
        for number in step.outputs:
            if number is not None and number in tape.derived:
                roots[number] = read.copy().pop() if plain and len(read) == 1 else number
    return roots


#: Of the operators that move elements, those that keep all of them in their order.
_SHAPING = MOVING - {
    "slice", "select", "cat", "stack", "gather", "index", "index_select", "constant_pad_nd", "roll", "flip",
    "reflection_pad2d", "replication_pad2d", "repeat", "expand", "im2col", "unfold", "narrow", "split",
    "split_with_sizes", "unbind", "chunk", "as_strided", "diagonal",
}  # fmt: skip


def prepares(step: Step) -> bool:
    """Return whether a step is one that prepares an image: it moves its elements or changes each alone."""
    return step.name in POINTWISE or step.name in MOVING or step.name.strip("_").startswith("upsample")


class Network:
    """A classifier's network as a tape, which takes images in [0, 1].

    Args:
        classifier: whose `spec` says what the network takes.
    """

    def __init__(self, classifier: TorchClassifier, tape: Tape) -> None:
        self.tape, self.spec = tape, classifier.spec

    def answers(
        self, images: Tensor, change: Mapping[int, Callable[[Tensor], Tensor]] | None = None
    ) -> Tensor:
        """Return the class (n,) of each image."""
        with torch.no_grad():
            y = run_in_groups(self.tape, self.spec.to_model(images), change=change)[self.tape.output]
        return decided(y.flatten(1))


def decided(scores: Tensor) -> Tensor:
    """Return the class (n,) that scores (n, k) say; of a single score, whether it is above the middle."""
    if scores.shape[1] > 1:
        return scores.argmax(1)
    middle = 0.5 if bool((scores >= 0).all() and (scores <= 1).all()) else 0.0
    return (scores[:, 0] > middle).long()
