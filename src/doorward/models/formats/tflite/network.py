"""A TensorFlow Lite graph as a torch module: exact for one image, and tried for several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from doorward.models.formats.rebuilt import (
    Does,
    LayerGraph,
    Unknown,
    Unreadable,
    last_uses,
)
from doorward.models.formats.tflite.operators import Call, fused_activation, make, work
from doorward.models.formats.tflite.reading import TfliteFile, Value

#: Numbers that all values of one image may take at a time, those of constants, and products that it may cost.
MOST_HELD, MOST_CONSTANT, MOST_WORK = 1 << 26, 1 << 26, 1 << 38
#: Operators whose weights stay whole numbers while values are rounded to such as the model runs.
_WEIGHTED = frozenset({"BATCH_MATMUL", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"})
#: Operators that scores of classes go through at the end.
_ENDING = frozenset({"DEQUANTIZE", "LOGISTIC", "LOG_SOFTMAX", "QUANTIZE", "RESHAPE", "SOFTMAX", "SQUEEZE"})
#: Operators that move whole numbers as they are, whatever these stand for before and after.
_MOVING = frozenset(
    {
        "BROADCAST_TO", "DEPTH_TO_SPACE", "EXPAND_DIMS", "GATHER", "MAX_POOL_2D", "MIRROR_PAD", "RESHAPE",
        "REVERSE_V2", "SLICE", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQUEEZE", "STRIDED_SLICE", "TILE",
        "TRANSPOSE", "UNPACK",
    }
)  # fmt: skip
#: Operators that make no number beyond those that they are given.
_PASSING = _MOVING | {
    "AVERAGE_POOL_2D", "CONCATENATION", "DEQUANTIZE", "MAXIMUM", "MEAN", "MINIMUM", "PACK", "PAD", "QUANTIZE",
    "REDUCE_MAX", "REDUCE_MIN", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR",
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A graph as a module.

    Attributes:
        module: takes images (n, h, w, c).
        rounded: whether the model itself computes with whole numbers, in all of it or in its products.
    """

    module: nn.Module
    rounded: bool


def build_network(file: TfliteFile, shape: Sequence[int]) -> Network:
    """Return a file's graph as a torch module.

    Args:
        shape: of one image, (1, h, w, c).

    Raises:
        Unknown: if it has an operator, or a setting of one, that is not read.
        Unreadable: if it does not fit together, or would take too much.
    """
    builder = _Builder(file)
    with torch.no_grad():
        builder.run(torch.empty(tuple(shape), device="meta"))
    return Network(builder.graph.eval(), builder.rounded)


class _Builder:
    """Build a graph while a trial runs through it that computes sizes alone."""

    def __init__(self, file: TfliteFile) -> None:
        self.file, self.graph, self.rounded = file, LayerGraph(), False
        self._held: dict[int, Tensor] = {}
        self._known: set[int] = set()
        self._constant = self._work = 0
        self._scores = _scores(file)

    def run(self, image: Tensor) -> None:
        """Build all operators."""
        file = self.file
        (start,) = file.inputs
        self._held[start] = image
        self._known.add(start)
        dead = last_uses([node.takes for node in file.nodes], file.outputs)
        for number, (node, done) in enumerate(zip(file.nodes, dead, strict=True)):
            name = f"{node.kind.lower()}_{number}"
            takes = tuple(None if one == -1 else file.value(one) for one in node.takes)
            gives = tuple(file.value(one) for one in node.gives)
            given = tuple(None if one is None else self._given(one, name) for one in takes)
            call = Call(node, name, given, takes, gives, file.constants)
            made = self._run(call)
            if len(made) != len(gives):
                raise Unreadable(f"its operator {name} gives {len(gives)} values, and makes {len(made)}")
            for value, result in zip(gives, made, strict=True):
                self._keep(value, result, name)
            self._refuse_endless(call, made)
            for one in done:
                self._held.pop(int(str(one)), None)
        for number in file.outputs:
            if number not in self._held or not self._held[number].is_meta:
                raise Unreadable("its outputs are not made of its images")
        self.graph.settle(file.inputs, file.outputs)

    def _given(self, value: Value, name: str) -> Tensor:
        """Return a value that an operator takes."""
        if value.number not in self._held:
            if value.number in self._known or value.data is None:
                raise Unreadable(f"its operator {name} is given what no operator before it makes")
            return torch.from_numpy(self.file.constants.real(value).copy())
        return self._held[value.number]

    def _run(self, call: Call) -> tuple[Tensor, ...]:
        """Return what an operator makes in the trial, and add it to the graph if that depends on images."""
        made = make(call)
        if isinstance(made, Tensor):
            return (made,)
        there = [one for one in call.given if one is not None]
        images = [one for one in call.node.takes if one != -1 and self._is_image(one)]
        if isinstance(made, nn.Module):
            there, images = [call.value(call.place)], images[:1]
        elif images:
            made = Does(made, call.node.kind, {i: one for i, one in enumerate(there) if not one.is_meta})
            there = [one for one in there if one.is_meta]
        module = Then(made, fused_activation(call.node), self._bounds(call) if images else None)
        if not images:
            return _several(module(*there))
        if not all(one.is_meta for one in there):
            raise Unknown(f"an operator {call.node.kind} whose weights or settings are computed")
        self.rounded |= call.node.kind in _WEIGHTED and any(
            one is not None and one.data is not None and one.quantization is not None for one in call.takes
        )
        self.graph.layers[call.name] = module
        self.graph.call(call.name, images, call.node.gives)
        return _several(functional_call(module, _sizes_alone(module), tuple(there)))

    def _is_image(self, number: int) -> bool:
        return number in self._held and self._held[number].is_meta

    def _bounds(self, call: Call) -> nn.Module | None:
        """Return what keeps a result within what its whole numbers can stand for, None where it is."""
        ranges = {value.range for value in call.gives}
        self.rounded |= ranges != {None}
        taken = {one.range for one in call.takes if one is not None and one.data is None}
        if ranges == {None} or (ranges == taken and call.node.kind in _PASSING):
            return None
        if len(ranges) > 1:
            raise Unknown("several results of one operator that are quantised otherwise")
        if call.node.kind in _MOVING:
            raise Unknown(
                f"an operator {call.node.kind} whose results are quantised otherwise than its values"
            )
        ((low, high),) = (one for one in ranges if one is not None)
        return Clip(low, high, None if set(call.node.gives) <= self._scores else call.gives[0].step)

    def _keep(self, value: Value, result: Tensor, name: str) -> None:
        """Hold a result, if it is what the file says of it."""
        if value.number in self._known or value.data is not None:
            raise Unreadable("two operators make one value")
        sizes = zip(value.shape, result.shape, strict=False)
        if result.ndim != len(value.shape) or any(told not in (-1, own) for told, own in sizes):
            raise Unreadable(
                f"its operator {name} makes a value of the shape {tuple(result.shape)}, "
                f"where the file says {value.shape}"
            )
        if result.is_meta and value.dtype.kind in "iu" and value.range is None:
            raise Unknown(f"whole numbers that are computed from images, by {name}")
        self._known.add(value.number)
        self._held[value.number] = result

    def _refuse_endless(self, call: Call, made: Sequence[Tensor]) -> None:
        self._work += work(call, made)
        self._constant += sum(one.numel() for one in made if not one.is_meta)
        held = sum(one.numel() for one in self._held.values() if one.is_meta)
        if self._work > MOST_WORK or self._constant > MOST_CONSTANT or held > MOST_HELD:
            raise Unreadable(f"its operator {call.name} would take too much time or memory")


class Then(nn.Module):
    """A function or module, and what comes after it."""

    def __init__(self, start: Callable[..., Any], *after: nn.Module | None) -> None:
        super().__init__()
        self.start, self.after = start, nn.Sequential(*(one for one in after if one is not None))

    def forward(self, *values: Tensor) -> Any:
        """Return what they make of values."""
        made = self.start(*values)
        return self.after(made) if len(self.after) else made


class Clip(nn.Module):
    """Keep values within what the whole numbers that stand for them can hold.

    Args:
        step: between two of these numbers, which values are rounded to; None leaves them between. The
            gradient passes straight through.
    """

    def __init__(self, low: float, high: float, step: float | None = None) -> None:
        super().__init__()
        self.low, self.high, self.step = low, high, step

    def forward(self, x: Tensor) -> Tensor:
        """Return values that are neither lower nor higher."""
        x = x.clamp(self.low, self.high)
        return x if self.step is None else x + ((x / self.step).round() * self.step - x).detach()

    def extra_repr(self) -> str:
        """Return its bounds."""
        told = f"{self.low:g} to {self.high:g}"
        return told if self.step is None else f"{told} in steps of {self.step:g}"


@contextmanager
def unrounded(module: nn.Module) -> Iterator[None]:
    """Leave values between the whole numbers for a while: there, a tie may be rounded either way."""
    steps = {one: one.step for one in module.modules() if isinstance(one, Clip)}
    try:
        for one in steps:
            one.step = None
        yield
    finally:
        for one, step in steps.items():
            one.step = step


def _scores(file: TfliteFile) -> set[int]:
    """Return the values that are a file's outputs, or that become them without a further layer.

    They are not rounded here: how far classes are apart shows between two whole numbers.
    """
    makers = {number: node for node in file.nodes for number in node.gives}
    waiting, found = list(file.outputs), set[int]()
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            maker = makers.get(number)
            waiting += maker.takes if maker is not None and maker.kind in _ENDING else ()
    return found


def _several(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)


def _sizes_alone(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors as sizes alone."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: torch.empty_like(one, device="meta") for name, one in tensors}
