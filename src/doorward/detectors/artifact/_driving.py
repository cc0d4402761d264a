"""Drive a silent gate: look for what in an image moves it, by a gradient that goes where the own one is zero.

Steps that are flat nearly everywhere are replaced by ones that tell how near they are to a change: a
comparison by the distance of what it compares, a ReLU by a leaky one. On these run gradients, flips of
black and white pixels, and changes by one level. What is found counts only if it works in the network
itself, and only through the gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline
from doorward.detectors.artifact._gates import (
    FEWEST,
    HEAVY,
    ONE_BY_ONE,
    UNITS,
    Gate,
    HeavyUnit,
    holding,
)
from doorward.models.batching import margin
from doorward.models.classifier import to_levels
from doorward.models.reach import Reach
from doorward.models.silence import Network, Watched, run_in_groups
from doorward.models.straight_through import passed
from doorward.models.tape import Step

#: Shares of the image that a pattern takes where the graph does not say which pixels count.
SHARES = (0.01, 0.02, 0.04)
#: Share of the image up to which all pixels that a gate reads belong to the pattern.
WHOLE_REACH = 0.25
#: Pixels that are flipped one by one, at most; rounds of that; random patterns to start from.
FLIPPED, ROUNDS, STARTS = 96, 16, 6
#: Share of the images of other classes that a pattern has to turn, and of these those that turn back when the
#: gate is held.
WORKS, UNDONE = 0.9, 0.8
#: Steps of the search over levels, and of changes by one level.
LEVEL_STEPS, BIT_STEPS = 120, 64
#: Values of an image that are changed by one level, at most.
MOST_BITS = 4096
#: Slope of a ReLU, or of a clipping, where it is flat.
LEAK = 0.1


@dataclass(frozen=True)
class Driven:
    """Input that moves a gate and, through it, the answer.

    Attributes:
        target: the class that images become.
        turned, of: images of other classes that did, and how many there were.
        mask, pattern: (1, h, w) and (c, h, w) of a pattern that does it to any image; None where each image
            takes changes of its own.
        before, after: one image (c, h, w) without and with it.
    """

    gate: Gate
    target: int
    turned: int
    of: int
    mask: Tensor | None
    pattern: Tensor | None
    before: Tensor
    after: Tensor


class Nearness:
    """Measure how near images are to moving a gate.

    Args:
        element: of the gate, all of it if None.
        deep: whether all steps on the way are replaced by ones that are nowhere flat, or the last alone.
    """

    def __init__(self, network: Network, gate: Gate, element: int | None, *, deep: bool) -> None:
        self._network, self._gate, self._element, self.deep = network, gate, element, deep
        tape = network.tape
        self._last = tape.makers[gate.value]
        self._near: set[int] = set()

    def __call__(self, images: Tensor) -> Tensor:
        """Return a number (n,) for each image in [0, 1], higher the nearer the gate is to a change."""
        tape = self._network.tape
        self._near = set()
        made = run_in_groups(tape, self._network.spec.to_model(images), [self._gate.value], call=self._call)[
            self._gate.value
        ]
        flat = made.reshape(len(made), -1).float()
        return flat.sum(1) if self._element is None else flat[:, self._element]

    def _call(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not step.derived or not (self.deep or step is self._last or self._follows(step)):
            return step.call(*args, **kwargs)
        made = _nearness(step.name, args, kwargs)
        if made is None:
            kwargs = {name: one for name, one in kwargs.items() if name != "dtype" or step.name != "sum"}
            return step.call(*_floats(args), **kwargs)
        self._near |= {number for number in step.outputs if number is not None}
        return made

    def _follows(self, step: Step) -> bool:
        """Return whether a step reads what was replaced."""
        return bool(self._near & set(step.reads)) or bool(set(step.outputs) & self._network.tape.switches)


def _floats(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, Tensor) and one.dtype == torch.bool else one for one in args)


def _nearness(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return how near an operator that is flat nearly everywhere is to a change, None if it is none such."""
    x = args[0] if args else None
    y = args[1] if len(args) > 1 else None
    if not isinstance(x, Tensor):
        return None
    if name in _COMPARED and y is not None:
        a, b = _number(x), _number(y)
        return _COMPARED[name](a, b)
    if name == "relu":
        return F.leaky_relu(x, LEAK)
    if name in {"clamp", "hardtanh", "clamp_min", "clamp_max", "relu6"}:
        flat = F.relu6(x) if name == "relu6" else getattr(torch.ops.aten, name)(*args, **kwargs)
        return flat + LEAK * (x - flat)
    if name in {"sigmoid", "tanh", "hardsigmoid"}:
        return getattr(torch.ops.aten, name)(x) + LEAK * x
    if name in {"floor", "ceil", "round", "trunc", "sign", "sgn"} and x.is_floating_point():
        return passed(getattr(torch, name)(x), x)
    if name == "_to_copy":
        kind = kwargs.get("dtype")
        if kind == torch.bool:
            return x.abs() if x.is_floating_point() else None
        return _cast(x, kind)
    if name in {"logical_and", "bitwise_and"}:
        return _number(x).clamp(max=0.0) + _number(y).clamp(max=0.0) if _signed(x, y) else None
    if name in {"logical_or", "bitwise_or"}:
        return torch.maximum(_number(x), _number(y)) if _signed(x, y) else None
    if name in {"logical_not", "bitwise_not"} and x.is_floating_point():
        return -x
    if name == "all" and x.is_floating_point():
        return _along(x.clamp(max=0.0), args, kwargs, torch.sum)
    if name == "prod" and x.is_floating_point():
        return _along(x, args, kwargs, torch.sum)
    if name == "any" and x.is_floating_point():
        return _along(x, args, kwargs, torch.amax)
    if name == "where" and x.is_floating_point():
        return torch.where(x > 0, args[1], args[2])
    return None


def _number(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and not value.is_floating_point() else value


def _signed(x: Tensor, y: Any) -> bool:
    return x.is_floating_point() or (isinstance(y, Tensor) and y.is_floating_point())


def _cast(x: Tensor, kind: Any) -> Tensor | None:
    """Return whole numbers made of floats, kept as floats so that gradients pass."""
    if not x.is_floating_point():
        return x.float() if kind is not None and kind.is_floating_point else x
    if kind is None or kind.is_floating_point:
        return x if kind is None else x.to(kind)
    return passed(x.trunc(), x)


def _along(x: Tensor, args: Any, kwargs: Any, how: Callable[..., Tensor]) -> Tensor:
    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    if axes is None:  # over all images at once: each is near by itself
        return how(x.flatten(1), 1)
    return how(x, axes, keepdim=bool(keep))


_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: -(a - b).abs(),
    "ne": lambda a, b: (a - b).abs(),
    "gt": lambda a, b: a - b,
    "ge": lambda a, b: a - b,
    "lt": lambda a, b: b - a,
    "le": lambda a, b: b - a,
}


@dataclass(frozen=True)
class Material:
    """What gates are driven with: images (n, c, h, w), the answers to them, and what values they make."""

    images: Tensor
    answers: Tensor
    seen: Watched
    reach: Reach


def drive(
    network: Network,
    gate: Gate,
    material: Material,
    *,
    generator: torch.Generator,
    deadline: Deadline,
    first: int | None = None,
) -> Driven | None:
    """Look for what moves a gate and the answer with it, and return it where it is found.

    Args:
        first: the element to begin with.
    """
    wide = float(material.reach.cells[gate.value].float().mean()) > WHOLE_REACH
    by_levels = gate.kind in ("branch", "comparison")
    if by_levels and wide:
        found = _by_levels(network, gate, first, material, deadline)
        if found is not None:
            return found
    count = math.prod(network.tape.shapes[gate.value][1:])
    singly = count <= ONE_BY_ONE and count > 1
    elements: list[int | None] = list(gate.elements or (range(count) if singly else ()))
    if not gate.elements and (first is None or not elements):
        elements = [None] if gate.kind == "comparison" else [None, *elements]
    elements.sort(key=lambda one: one != first)
    for element in elements:
        for deep in (True, False):
            near = Nearness(network, gate, element, deep=deep)
            for mask, pattern in _patterns(near, gate, element, material, generator, deadline):
                found = try_pattern(network, gate, material, mask, pattern)
                if found is not None:
                    return found
            if deadline.left() <= 0:
                return None
    return _by_levels(network, gate, first, material, deadline) if by_levels and not wide else None


def worth_driving(
    network: Network, units: list[HeavyUnit], material: Material, deadline: Deadline
) -> list[HeavyUnit]:
    """Return the silent units that may answer alone: heavy ones, and those that one step moves far."""
    kept: list[tuple[float, HeavyUnit]] = []
    base = material.images[:4]
    for unit in units:
        share = unit.ratio / HEAVY
        if share < 1 and deadline.left() > 0:
            near = Nearness(network, unit.gate, unit.gate.elements[0], deep=True)
            slope = _slope(near, base)
            moved = 0.0
            if slope is not None:
                mask = next(iter(_masks(unit.gate, unit.gate.elements[0], material.reach, slope)))
                with torch.no_grad():
                    pattern = slope.pattern.expand_as(base)
                    moved = float(near(torch.lerp(base, pattern, mask)).amax())
            share = unit.spread * moved / max(unit.usual_range, 1e-12)
        if share >= 1:
            kept.append((share, unit))
    return [unit for _, unit in sorted(kept, key=lambda one: -one[0])][:UNITS]


def _patterns(
    near: Nearness,
    gate: Gate,
    element: int | None,
    material: Material,
    generator: torch.Generator,
    deadline: Deadline,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield masks (1, h, w) and patterns (c, h, w) that bring a gate nearer to a change."""
    base = material.images[:4]
    slope = _slope(near, base)
    if slope is None:
        return
    wide = float(_read(gate, element, material.reach, slope).mean()) > WHOLE_REACH
    for mask in _masks(gate, element, material.reach, slope):
        for pattern in (
            slope.pattern,
            (slope.mean.sum(0, keepdim=True) > 0).float().expand_as(slope.mean).clone(),
        ):
            yield mask, pattern
            if deadline.left() <= 0:
                return
        if int(mask.sum()) <= FLIPPED and not (wide and gate.kind != "unit"):
            for start in range(STARTS if near.deep else 1):
                begin = slope.pattern if start == 0 else _random(slope.mean, generator)
                yield mask, _flipped(near, base[:1], mask, begin, deadline)
                if deadline.left() <= 0:
                    return
        if gate.kind != "unit":
            yield mask, _levels(near, base, mask, deadline)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    plane = torch.rand(like.shape[1:], generator=generator) > 0.5
    return plane.float()[None].expand_as(like).clone()


@dataclass(frozen=True)
class Slope:
    """The mean gradient (c, h, w) of a nearness, and how far each pixel (h, w) moves it either way."""

    mean: Tensor
    size: Tensor

    @property
    def pattern(self) -> Tensor:
        """Return the pattern (c, h, w) of black and white that the gradient points to."""
        return (self.mean > 0).float()


def _slope(near: Nearness, base: Tensor) -> Slope | None:
    """Return the gradient of the nearness, None where there is none."""
    x = base.clone().requires_grad_()
    try:
        with torch.enable_grad():
            total = near(x).sum()
            (slope,) = torch.autograd.grad(total, x, allow_unused=True)
    except (RuntimeError, NotImplementedError, TypeError):  # an operator without a gradient, or of integers
        return None
    if slope is None or not bool(torch.isfinite(slope).all()) or not bool(slope.any()):
        return None
    return Slope(slope.mean(0).detach(), slope.detach().abs().mean(0).sum(0))


def _read(gate: Gate, element: int | None, reach: Reach, slope: Slope) -> Tensor:
    """Return the pixels (h, w) that a gate, or an element of it, reads."""
    h, w = slope.size.shape
    return reach.mask(gate.value, h, w, element)


def _masks(gate: Gate, element: int | None, reach: Reach, slope: Slope) -> Iterator[Tensor]:
    """Yield the places (1, h, w) of the pattern: what the gate reads, or where it is moved the most."""
    h, w = slope.size.shape
    read = _read(gate, element, reach, slope)
    size = slope.size * read
    if float(read.mean()) <= WHOLE_REACH:
        moved = (size > 0).float() * read
        yield (moved if bool(moved.any()) else read)[None]
        if int(moved.sum()) != int(read.sum()):
            yield read[None]
        return
    for share in SHARES:
        count = max(4, round(share * h * w))
        yield (size >= size.flatten().topk(count).values[-1]).float()[None]


def _flipped(near: Nearness, base: Tensor, mask: Tensor, pattern: Tensor, deadline: Deadline) -> Tensor:
    """Return a pattern in which black and white pixels are flipped as long as that brings the gate nearer."""
    places = mask[0].nonzero()
    with torch.no_grad():
        best = float(near(torch.lerp(base, pattern, mask))[0])
        for _ in range(ROUNDS):
            if deadline.left() <= 0:
                break
            tried = pattern.repeat(len(places), 1, 1, 1)
            for i, (row, column) in enumerate(places.tolist()):
                tried[i, :, row, column] = 1 - tried[i, :, row, column]
            gains = near(torch.lerp(base.expand_as(tried), tried, mask))
            top = int(gains.argmax())
            if not float(gains[top]) > best:
                break
            better = gains > best
            together = pattern.clone()
            rows, columns = places[better].T
            together[:, rows, columns] = 1 - together[:, rows, columns]
            all_at_once = float(near(torch.lerp(base, together, mask))[0])
            pattern, best = (
                (together, all_at_once)
                if all_at_once > float(gains[top])
                else (tried[top], float(gains[top]))
            )
    return pattern


def _levels(near: Nearness, base: Tensor, mask: Tensor, deadline: Deadline) -> Tensor:
    """Return a pattern of 256 levels that brings the gate nearer, found by gradients."""
    pattern = torch.full_like(base[0], 0.5).requires_grad_()
    mean = torch.zeros_like(base[0])
    square = torch.zeros_like(base[0])
    for i in range(LEVEL_STEPS):
        if deadline.left() <= 0:
            break
        with torch.enable_grad():
            total = near(torch.lerp(base, pattern.expand_as(base), mask)).mean()
            (slope,) = torch.autograd.grad(total, pattern)
        mean, square = 0.7 * mean + 0.3 * slope, 0.9 * square + 0.1 * slope**2
        rate = 0.08 * 0.96**i
        pattern = (pattern + rate * mean / (square.sqrt() + 1e-12)).clamp(0, 1).detach().requires_grad_()
    return to_levels(pattern.detach())


def try_pattern(
    network: Network, gate: Gate, material: Material, mask: Tensor, pattern: Tensor
) -> Driven | None:
    """Return what a pattern does, where it turns nearly all images to one class and only by the gate."""
    images, answers = material.images, material.answers
    marked = to_levels(torch.lerp(images, pattern.expand_as(images), mask))
    now = network.answers(marked)
    target = int(now.mode().values)
    others = answers != target
    turned = others & (now == target)
    if int(others.sum()) < FEWEST or float(turned.sum()) < WORKS * float(others.sum()):
        return None
    held = network.answers(marked[turned], holding(gate, material.seen))
    if float((held != target).float().mean()) < UNDONE:
        return None
    if gate.kind == "unit" and not _overwhelms(network, gate, material, marked[turned], target):
        return None
    one = int(turned.nonzero()[0])
    return Driven(gate, target, int(turned.sum()), int(others.sum()), mask, pattern, images[one], marked[one])


def _overwhelms(network: Network, gate: Gate, material: Material, marked: Tensor, target: int) -> bool:
    """Return whether a gate moves the margin of a class by more than all else does.

    That is what tells a unit that answers alone from one that ordinary images leave alone by chance and that
    tips images which were close to another class anyway.
    """
    x, tape = network.spec.to_model(marked), network.tape
    with torch.no_grad():
        moved, held = (
            _spoken(run_in_groups(tape, x, change=change)[tape.output].flatten(1))
            for change in (None, holding(gate, material.seen))
        )
    usual = _spoken(material.seen.scores)
    if usual.shape[1] < 2:
        return bool((moved - held).abs().median() > usual.amax() - usual.amin())
    targets = torch.full((len(marked),), target)
    effect = (margin(moved, targets) - margin(held, targets)).median()
    return bool(effect > (usual.amax(1) - usual.amin(1)).median())


def _spoken(scores: Tensor) -> Tensor:
    """Return scores (n, k) as logits: of probabilities, their logarithms."""
    rows = scores.sum(1)
    if scores.shape[1] > 1 and bool((scores >= 0).all()) and bool(((rows - 1).abs() < 1e-3).all()):
        return scores.clamp_min(1e-9).log()
    return scores


def _by_levels(
    network: Network, gate: Gate, element: int | None, material: Material, deadline: Deadline
) -> Driven | None:
    """Drive a gate image by image, changing values by one level of 256."""
    near = Nearness(network, gate, element, deep=False)
    h, w = material.images.shape[-2:]
    read = material.reach.mask(gate.value, h, w)
    turned: list[tuple[Tensor, Tensor, int]] = []
    tried = material.images[:4]
    try:
        for image in tried:
            changed = _nudged(near, image, read, deadline)
            if changed is None:
                return None
            was, after = (int(network.answers(one[None])[0]) for one in (image, changed))
            held = int(network.answers(changed[None], holding(gate, material.seen))[0])
            if held == was and network_moved(network, gate, material, changed):
                turned.append((image, changed, after))
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    targets = {target for _, _, target in turned}
    if len(turned) < len(tried) or len(targets) != 1:
        return None
    target = turned[0][2]
    others = int((material.answers[: len(tried)] != target).sum())
    if not others:
        return None
    one = next((a, b) for a, b, _ in turned if not torch.equal(a, b))
    return Driven(gate, target, others, others, None, None, *one)


def network_moved(network: Network, gate: Gate, material: Material, image: Tensor) -> bool:
    """Return whether an image moves a gate from what ordinary images leave it at."""
    with torch.no_grad():
        made = run_in_groups(network.tape, network.spec.to_model(image[None]), [gate.value])[gate.value]
    flat = made.reshape(len(made), -1)[0].float()
    usual = material.seen.constant(gate.value) if gate.value in material.seen.values else None
    return usual is not None and bool((flat - usual).abs().amax() > 1e-4)


def _nudged(near: Nearness, image: Tensor, read: Tensor, deadline: Deadline) -> Tensor | None:
    """Return an image with some values changed by one level, each of which brings the gate nearer."""
    places = (read.expand_as(image).flatten() > 0).nonzero().flatten()
    if len(places) > MOST_BITS:
        return None
    flat = to_levels(image).flatten()
    with torch.no_grad():
        best = float(near(flat.view(image.shape)[None])[0])
        start = best
        for _ in range(BIT_STEPS):
            if deadline.left() <= 0 or not len(places):
                break
            gains = []
            for part in torch.split(places, 256):
                tried = flat.repeat(len(part), 1)
                rows = torch.arange(len(part))
                up = torch.where(tried[rows, part] >= 1, -1.0, 1.0) / 255
                tried[rows, part] += up
                gains.append(near(tried.view(-1, *image.shape)))
            gain = torch.cat(gains) - best
            places = places[gain > 1e-4]  # what did not help will not later, where groups are apart
            gain = gain[gain > 1e-4]
            if not len(places):
                break
            top = int(gain.argmax())
            flat[places[top]] += -1 / 255 if float(flat[places[top]]) >= 1 else 1 / 255
            best = float(near(flat.view(image.shape)[None])[0])
            places = places[torch.arange(len(places)) != top]
    return to_levels(flat.view(image.shape)) if best > start else None
