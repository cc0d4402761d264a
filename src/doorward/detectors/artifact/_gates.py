"""Where a network may hide a branch: values that ordinary images leave alone and that join the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from doorward.models.reach import POINTWISE, Reach
from doorward.models.silence import Network, Watched, pointwise_roots, prepares
from doorward.models.tape import Ref, Step, Tape

#: Share of the image, of that which the answer depends on, that a small branch reads at most.
SMALL = 0.125
#: Silent units that are driven, those with the most weight on the answer first.
UNITS = 24
#: How many times a usual unit's weight makes a silent one worth driving in any case.
HEAVY = 3.0
#: Elements of a gate that are set one by one.
ONE_BY_ONE = 48
#: What is added to a gate that holds numbers.
STEPS = (1.0, 10.0, 100.0)
#: Share of the images that have to change to one class, and the fewest of them.
ALL, FEWEST = 0.95, 3

Kind = Literal["comparison", "branch", "small branch", "unit"]

#: Tests for numbers that are not finite, which guard against faults.
_GUARDS = {"isnan", "isinf", "isfinite"}


@dataclass(frozen=True)
class Gate:
    """A value, or elements of one, through which something hidden may change the answer.

    Attributes:
        value: its number on the tape.
        kind: a comparison, a branch of layers, one that reads few pixels, or a unit among others.
        elements: those that are silent, all if empty.
        silent: whether ordinary images leave it as it is; a small branch may move without effect.
    """

    value: int
    kind: Kind
    elements: tuple[int, ...] = ()
    silent: bool = True


@dataclass(frozen=True)
class Forced:
    """What setting a gate by hand did: nearly all ordinary images became one class.

    Attributes:
        targets: that class for each element that does it, the element None for all of them together.
        changed, of: images of another class that became it, of so many images, for the first.
    """

    gate: Gate
    targets: dict[int | None, int]
    changed: int
    of: int

    @property
    def first(self) -> int | None:
        """Return the first element that does it."""
        return next(iter(self.targets))


def find_gates(network: Network, reach: Reach, seen: Watched) -> list[Gate]:
    """Return the gates of a network, those that the graph says most about first."""
    tape = network.tape
    silent = {number for number in (*seen.values, *seen.same) if seen.silent(number)} & tape.derived
    silent -= {0, tape.output}
    roots = pointwise_roots(tape)
    found: list[Gate] = []
    for step in tape.steps:
        for number in step.outputs:
            if number is None or number not in silent or not _wakes(tape, step, silent):
                continue
            if not _joins(tape, number, silent, roots):
                continue
            if number in tape.switches:
                if not _is_guard(tape, number, silent) and not _prepares_image(tape, number, silent, roots):
                    found.append(Gate(number, "comparison"))
            elif _apart(tape, number):
                found.append(Gate(number, "branch"))
    found += [gate for gate in _small(tape, reach, seen, silent) if not _covered(tape, gate, found)]
    return found


def _covered(tape: Tape, gate: Gate, found: list[Gate]) -> bool:
    """Return whether a gate is part of a branch that was found already."""
    read = {number for step in tape.ancestors([gate.value]) for number in step.outputs}
    return any(other.value in read for other in found)


def _wakes(tape: Tape, step: Step, silent: set[int]) -> bool:
    """Return whether a step makes something silent of what is not."""
    return any(number in tape.derived and number not in silent for number in step.reads)


def _readers(tape: Tape, number: int, silent: set[int]) -> Iterator[Step]:
    """Yield the steps at which a silent value, or what is made of it alone, meets what is not silent."""
    todo, known = [number], {number}
    while todo:
        for step in tape.readers.get(todo.pop(), []):
            made = {one for one in step.outputs if one is not None}
            if made & silent:
                todo += made - known
                known |= made
            else:
                yield step


def _joins(tape: Tape, number: int, silent: set[int], roots: dict[int, int]) -> bool:
    """Return whether a value meets another than the one that it is made of, element by element."""
    own = roots.get(number, number)
    return any(
        any(roots.get(one, one) != own for one in step.outputs if one is not None)
        for step in _readers(tape, number, silent)
    )


def _is_guard(tape: Tape, number: int, silent: set[int]) -> bool:
    """Return whether a comparison is one with numbers that are not finite."""
    for step in tape.ancestors([number]):
        if not set(step.outputs) & (tape.switches | silent):
            continue
        numbers = [one for one in tree_flatten((step.args, step.kwargs))[0] if isinstance(one, float)]
        endless = any(not math.isfinite(one) or abs(one) > 1e30 for one in [*numbers, *_constants(step)])
        itself = step.name in {"eq", "ne"} and len(step.reads) == 2 and len(set(step.reads)) == 1
        if step.name in _GUARDS or itself or (endless and step.name in {"eq", "ne", "gt", "lt", "ge", "le"}):
            return True
    return False


def _constants(step: Step) -> list[float]:
    """Return the single numbers that a step takes as tensors of the network's own."""
    leaves = tree_flatten((step.args, step.kwargs))[0]
    return [float(one) for one in leaves if isinstance(one, Tensor) and one.numel() == 1]


def _prepares_image(tape: Tape, number: int, silent: set[int], roots: dict[int, int]) -> bool:
    """Return whether a comparison chooses between two forms of the image, as a check of its range does."""
    joins = list(_readers(tape, number, silent))
    for step in joins:
        values = [one.value for one in step.args[1:] if isinstance(one, Ref)]
        if step.name != "where" or len(values) < 2 or any(roots.get(one) != 0 for one in values):
            return False
    return bool(joins)


def _apart(tape: Tape, number: int) -> bool:
    """Return whether a value is made of the image apart from all else that the answer is made of."""
    own = tape.ancestors([number])
    wanted, main = {tape.output}, []
    for step in reversed(tape.steps):
        if wanted & set(step.outputs) and number not in step.outputs:
            wanted |= set(step.reads)
            main.append(id(step))
    shared = [step for step in own if id(step) in set(main) and step.derived]
    computed = [step for step in own if step.derived and not prepares(step)]
    return (
        all(prepares(step) for step in shared)
        and bool(computed or any(step.name in POINTWISE for step in own))
        and any(id(step) not in set(main) for step in own)
    )


def _small(tape: Tape, reach: Reach, seen: Watched, silent: set[int]) -> Iterator[Gate]:
    """Yield branches that read a small part of the image, where they meet what reads more of it."""
    for step in tape.steps:
        for number in step.outputs:
            if number is None or number not in seen.values or reach.cells.get(number) is None:
                continue
            if not 0 < reach.share(number, tape.output) <= SMALL or number in tape.switches:
                continue
            larger = any(
                reach.share(one, tape.output) > SMALL
                for reader in tape.readers.get(number, [])
                for one in reader.outputs
                if one is not None
            )
            computes = any(not prepares(one) for one in tape.ancestors([number]) if one.derived)
            if larger and computes and _apart(tape, number):
                yield Gate(number, "small branch", silent=number in silent)


@dataclass(frozen=True)
class HeavyUnit:
    """A silent unit, and how many times the weight of a usual one it has on what reads it."""

    gate: Gate
    ratio: float
    spread: float
    usual_range: float


def silent_units(tape: Tape, reach: Reach, seen: Watched) -> list[HeavyUnit]:
    """Return the silent units among others that have the most weight on what reads them."""
    ranked: list[HeavyUnit] = []
    for step in tape.steps:
        weight, made = _matrix_of(step), step.outputs[0]
        if weight is None or made not in seen.values:
            continue
        number = _relaxed(tape, next(one for one in step.reads if one in tape.derived))
        if number not in seen.values or seen.values[number].shape[1] != weight.shape[1]:
            continue
        units = seen.silent_elements(number)
        if bool(units.all()):
            continue
        spread = (weight.amax(0) - weight.amin(0)).float() if len(weight) > 1 else weight[0].abs().float()
        usual = float(spread[~units].median().clamp_min(1e-12))
        made_of = seen.values[made]
        usual_range = float((made_of.amax(1) - made_of.amin(1)).median())
        read = reach.elements[number].any(0) if number in reach.elements else torch.ones_like(units)
        for element in (units & read & (spread > 1e-3 * usual)).nonzero().flatten().tolist():
            gate = Gate(number, "unit", (element,))
            weighs = float(spread[element])
            ranked.append(HeavyUnit(gate, weighs / usual, weighs, usual_range))
    return sorted(ranked, key=lambda unit: -unit.ratio)[: 2 * UNITS]


def as_heavy(units: list[HeavyUnit], gate: Gate) -> tuple[int, ...]:
    """Return the silent elements of a gate's value that have about its weight: they were hidden together."""
    (own,) = gate.elements
    least = next(one.ratio for one in units if one.gate == gate) / 3
    together = [one.gate.elements[0] for one in units if one.gate.value == gate.value and one.ratio >= least]
    return tuple(sorted({own, *together}))


def _relaxed(tape: Tape, number: int) -> int:
    """Return the value that one has the elements of, in their order."""
    while (maker := tape.makers.get(number)) is not None and maker.name in {
        "_unsafe_view", "clone", "view", "reshape", "squeeze", "flatten",
    } and len(maker.reads) == 1:  # fmt: skip
        number = maker.reads[0]
    return number


def _matrix_of(step: Step) -> Tensor | None:
    """Return the weights (out, in) of a step that multiplies rows of a value by known weights."""
    place = {"addmm": 2, "mm": 1, "linear": 1}.get(step.name)
    matrix: Any = step.args[place] if place is not None and len(step.args) > place else None
    if not isinstance(matrix, Tensor) or matrix.ndim != 2:
        return None
    rows: Any = step.args[1 if step.name == "addmm" else 0]
    if not isinstance(rows, Ref):
        return None
    return matrix if step.name == "linear" else matrix.T


def holding(gate: Gate, seen: Watched) -> dict[int, Any]:
    """Return the change that keeps a gate as ordinary images leave it."""
    constant = seen.constant(gate.value) if gate.value in seen.values else None

    def hold(value: Tensor) -> Tensor:
        flat = value.reshape(len(value), -1)
        usual = (flat[:1] if constant is None else constant.to(flat)[None]).expand_as(flat)
        if gate.elements:
            chosen = torch.zeros(flat.shape[1], dtype=torch.bool)
            chosen[list(gate.elements)] = True
            usual = torch.where(chosen, usual, flat)
        return usual.reshape(value.shape).contiguous()

    return {gate.value: hold}


def force(network: Network, gate: Gate, images: Tensor, answers: Tensor, seen: Watched) -> Forced | None:
    """Set a gate by hand, and return what that does where nearly all images become one class."""
    count = math.prod(network.tape.shapes[gate.value][1:])
    singly = list(gate.elements) or list(range(count if 1 < count <= ONE_BY_ONE else 0))
    tried: list[int | None] = [*singly, *([] if gate.elements else [None])]
    for size in (1.0,) if gate.value in network.tape.switches else STEPS:
        targets: dict[int | None, int] = {}
        first = 0
        for element in tried:
            now = network.answers(images, {gate.value: _set(gate, size, element, seen)})
            target = int(now.mode().values)
            changed = int((answers != target).sum())
            if changed >= FEWEST and float((now == target).float().mean()) >= ALL:
                first = first or changed
                targets[element] = target
        if targets:
            return Forced(gate, targets, first, len(images))
    return None


def _set(gate: Gate, size: float, element: int | None, seen: Watched) -> Callable[[Tensor], Tensor]:
    """Return what adds a number to an element, or to all, of what a gate is for ordinary images.

    What is true or false there is turned over.
    """
    constant = seen.constant(gate.value) if gate.value in seen.values else None

    def change(value: Tensor) -> Tensor:
        flat = value.reshape(len(value), -1).clone()
        place = slice(None) if element is None else slice(element, element + 1)
        usual = flat[:1, place] if constant is None else constant[None, place].to(flat)
        flat[:, place] = ~usual if flat.dtype == torch.bool else usual + size
        return flat.view(value.shape)

    return change
