"""Operators of TensorFlow Lite as torch modules.

Values have TensorFlow's axes, (n, h, w, c), and the numbers that stand behind quantised ones. Operators are
built while a trial of one image runs through the model, on torch's meta device: it knows sizes and computes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doorward.models.formats.rebuilt import (
    Array,
    Unknown,
    Unreadable,
    Window,
    average_pooling,
    convolution,
    fill,
    first,
    last,
    linear,
    max_pooling,
    refuse_large,
)
from doorward.models.formats.tflite.reading import Constants, Node, Value
from doorward.models.straight_through import straight

#: A function of all that an operator is given, a module that takes what is no constant, or a constant.
Made = Callable[..., Any] | nn.Module | Tensor


@dataclass(frozen=True)
class Call:
    """An operator, with what it is given in the trial.

    Attributes:
        name: what it is called in messages.
        given: constants as they are, other values on the meta device; None for one that is left out.
        takes: what the file says of the same values.
        gives: what the file says of its results.
        constants: reads constants.
    """

    node: Node
    name: str
    given: tuple[Tensor | None, ...]
    takes: tuple[Value | None, ...]
    gives: tuple[Value, ...]
    constants: Constants

    def __getitem__(self, setting: str) -> Any:
        """Return a setting.

        Raises:
            Unreadable: if the file does not have it.
        """
        if setting not in self.node.settings:
            raise Unreadable(f"its operator {self.name} has no settings of its own kind")
        return self.node.settings[setting]

    def value(self, place: int) -> Tensor:
        """Return what is given.

        Raises:
            Unreadable: if nothing is.
        """
        found = self.given[place] if place < len(self.given) else None
        if found is None:
            raise Unreadable(f"its operator {self.name} is given too little")
        return found

    def constant(self, place: int) -> Tensor:
        """Return a constant that is given.

        Raises:
            Unknown: if it is computed from the image.
        """
        found = self.value(place)
        if found.is_meta:
            raise Unknown(f"an operator {self.node.kind} whose weights or settings are computed")
        return found

    def numbers(self, place: int) -> list[int]:
        """Return whole numbers that are given as a constant."""
        found = self.constant(place)
        if found.is_floating_point():
            raise Unreadable(f"its operator {self.name} is given fractions for whole numbers")
        return [int(one) for one in found.flatten().tolist()]

    def axis(self, axis: int, *, more: int = 0) -> int:
        """Return an axis of the first value, counted from the first.

        Args:
            more: how many axes the result has more.

        Raises:
            Unreadable: if there is no such axis.
        """
        axes = self.image.ndim + more
        if not -axes <= axis < axes:
            raise Unreadable(f"its operator {self.name} names an axis that its values do not have")
        return axis % axes

    @property
    def image(self) -> Tensor:
        """Return the first value that is no constant, or else the first."""
        there = [one for one in self.given if one is not None]
        return next((one for one in there if one.is_meta), there[0])

    @property
    def place(self) -> int:
        """Return where the value is that an operator with weights or settings works on."""
        return 2 if self.node.kind == "TRANSPOSE_CONV" else 0

    def planes(self) -> Tensor:
        """Return the value that the operator works on, with channels first.

        Raises:
            Unreadable: if it has not four axes.
        """
        x = self.value(self.place)
        if x.ndim != 4:
            raise Unreadable(f"its operator {self.name} is given other values than images")
        return first(x)

    def weight(self, axes: int) -> Array:
        """Return the weights of a layer.

        Raises:
            Unreadable: if they have another number of axes.
        """
        found = self.constant(1)
        if found.ndim != axes or not found.is_floating_point():
            raise Unreadable(f"weights of its operator {self.name} are of another kind")
        return found.numpy()

    def bias(self) -> Array | None:
        """Return the bias of a layer, None where it has none.

        Whole numbers have the scale of what they are added to: products of values and weights.
        """
        place = self.place + 1 if self.place else 2
        if len(self.given) <= place or self.given[place] is None:
            return None
        found, value = self.constant(place), self.takes[place]
        x, weight = self.takes[self.place], self.takes[1]
        if value is None or value.dtype.kind == "f":
            return found.numpy()
        scales = [one.quantization.scale for one in (x, weight) if one is not None and one.quantization]
        if len(scales) != 2:
            raise Unreadable(f"the bias of its operator {self.name} has no scale")
        return np.asarray(self.constants.whole(value) * scales[0] * scales[1], dtype=np.float32)


Builder = Callable[[Call], Made]
#: Builders, and the tables of settings that they read, by the names of operators.
OPERATORS: dict[str, tuple[Builder, str | None]] = {}


def _reads(options: str | None, *kinds: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        OPERATORS.update(dict.fromkeys(kinds, (builder, options)))
        return builder

    return register


def make(call: Call) -> Made:
    """Return an operator as it is computed here, without what is fused into it.

    Raises:
        Unknown: if it is of a kind that is not read, or has a setting that is not.
        Unreadable: if its settings and weights do not fit.
    """
    if call.node.kind not in OPERATORS:
        raise Unknown(f"an operator {call.node.kind}")
    builder, options = OPERATORS[call.node.kind]
    if options is not None and call.node.options != options:
        raise Unreadable(f"its operator {call.name} has no settings of its own kind")
    return builder(call)


def fused_activation(node: Node) -> nn.Module | None:
    """Return the activation that an operator ends with, None if it has none.

    Raises:
        Unknown: if it is one that is not read.
    """
    number = node.settings.get("FusedActivationFunction", 0) if OPERATORS[node.kind][1] else 0
    if number not in _FUSED:
        raise Unknown(f"the activation {number} within {node.kind}")
    return _FUSED[number]()


_FUSED: dict[int, Callable[[], nn.Module | None]] = {
    0: lambda: None,
    1: nn.ReLU,
    2: nn.Hardtanh,
    3: nn.ReLU6,
    4: nn.Tanh,
}


def work(call: Call, made: Sequence[Tensor]) -> int:
    """Return about how many products an operator computes in the trial."""
    each, node = 1, call.node
    if node.kind in ("CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"):
        each = call.value(1)[0].numel()
    elif node.kind == "DEPTHWISE_CONV_2D":
        each = math.prod(call.value(1).shape[1:3])
    elif node.kind.endswith("POOL_2D"):
        each = call["FilterHeight"] * call["FilterWidth"]
    elif node.kind == "BATCH_MATMUL":
        each = max(call.value(0).shape[-2:])
    elif node.kind.startswith("RESIZE"):
        each = sum(call.value(0).shape[1:3])
    return each * sum(one.numel() for one in made) + sum(one.numel() for one in call.given if one is not None)


# --- layers with weights -----------------------------------------------------------------------------------


class ChannelsFirst(nn.Module):
    """A module that takes channels first, where values have them last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module makes of a value (n, h, w, c)."""
        return last(self.inner(first(x)))


def _window(call: Call, size: tuple[int, int]) -> Window:
    settings = call.node.settings
    dilation = settings.get("DilationHFactor", 1), settings.get("DilationWFactor", 1)
    window = Window(size, (call["StrideH"], call["StrideW"]), dilation=dilation)
    padding = {0: "same", 1: "valid"}.get(call["Padding"], str(call["Padding"]))
    return window.padded_as(call.name, padding, call.planes())


@_reads("Conv2DOptions", "CONV_2D")
def _convolution(call: Call) -> Made:
    weight, (channels, height, width) = call.weight(4), call.planes().shape[1:]  # (out, h, w, in)
    groups = channels // max(weight.shape[3], 1)
    if groups * weight.shape[3] != channels or not groups or len(weight) % groups:
        raise Unreadable(f"weights of its operator {call.name} do not fit its values")
    window = _window(call, (weight.shape[1], weight.shape[2]))
    if (*window.size, height, width, groups) == (1, 1, 1, 1, 1):
        return linear(call.name, weight[:, 0, 0], call.bias())
    return ChannelsFirst(convolution(call.name, window, weight.transpose(0, 3, 1, 2), call.bias(), groups))


@_reads("DepthwiseConv2DOptions", "DEPTHWISE_CONV_2D")
def _depthwise_convolution(call: Call) -> Made:
    weight, channels = call.weight(4), call.planes().shape[1]  # (1, h, w, out)
    if len(weight) != 1 or weight.shape[3] % channels:
        raise Unreadable(f"weights of its operator {call.name} do not fit its values")
    window = _window(call, (weight.shape[1], weight.shape[2]))
    return ChannelsFirst(convolution(call.name, window, weight.transpose(3, 0, 1, 2), call.bias(), channels))


class TransposedConvolution(nn.Module):
    """A transposed convolution of values (n, c, h, w).

    Args:
        kernel: (in, out, height, width).
        corner: rows above and columns to the left that are left out of its result.
        size: rows and columns that are kept.
        more: rows below and columns to the right that the bias alone reaches.
    """

    def __init__(
        self,
        name: str,
        kernel: Array,
        bias: Array | None,
        stride: tuple[int, int],
        corner: tuple[int, int],
        size: tuple[int, int],
        more: tuple[int, int],
    ) -> None:
        super().__init__()
        taken, given, *window = kernel.shape
        self.inner = nn.ConvTranspose2d(
            taken, given, (window[0], window[1]), stride, output_padding=more, bias=bias is not None
        )
        fill(name, self.inner, weight=kernel, bias=bias)
        self.corner, self.size = corner, size

    def forward(self, x: Tensor) -> Tensor:
        """Return what is kept."""
        (top, left), (height, width) = self.corner, self.size
        kept: Tensor = self.inner(x)[:, :, top : top + height, left : left + width]
        return kept


@_reads("TransposeConvOptions", "TRANSPOSE_CONV")
def _transposed_convolution(call: Call) -> Made:
    weight, x, sizes = call.weight(4), call.planes(), call.numbers(0)  # weights (out, h, w, in)
    kernel, stride = weight.shape[1:3], (call["StrideH"], call["StrideW"])
    if len(sizes) != 4 or min(*sizes, *stride) < 1 or weight.shape[3] != x.shape[1]:
        raise Unreadable(f"weights of its operator {call.name} do not fit its values")
    whole = [(own - 1) * step + wide for own, step, wide in zip(x.shape[2:], stride, kernel, strict=True)]
    refuse_large(call.name, len(weight), *whole)
    spare = [full - kept for full, kept in zip(whole, sizes[1:3], strict=True)]
    return ChannelsFirst(
        TransposedConvolution(
            call.name, weight.transpose(3, 0, 1, 2), call.bias(), stride,
            corner=(max(spare[0], 0) // 2, max(spare[1], 0) // 2),
            size=(sizes[1], sizes[2]),
            more=(max(-spare[0], 0), max(-spare[1], 0)),
        )
    )  # fmt: skip


@_reads("FullyConnectedOptions", "FULLY_CONNECTED")
def _fully_connected(call: Call) -> Made:
    if call["WeightsFormat"]:
        raise Unknown("weights in an order of their own")
    x, weight = call.value(0), call.value(1)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise Unreadable(f"weights of its operator {call.name} are of another kind")
    rows = partial(_rows, width=weight.shape[1])
    if weight.is_meta:
        return lambda x, weight, bias=None: F.linear(rows(x), weight, bias)
    layer = linear(call.name, call.weight(2), call.bias())
    if call["KeepNumDims"] or x.ndim == 2:
        return layer
    return nn.Sequential(Rows(weight.shape[1]), layer)


def _rows(x: Tensor, width: int) -> Tensor:
    return x.reshape(-1, width)


class Rows(nn.Module):
    """Lay values out in rows of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return rows (n, width)."""
        return _rows(x, self.width)


@_reads("BatchMatMulOptions", "BATCH_MATMUL")
def _matrix_product(call: Call) -> Made:
    turn_x, turn_y = call["AdjX"], call["AdjY"]
    return lambda x, y: (x.mT if turn_x else x) @ (y.mT if turn_y else y)


# --- windows and sizes -------------------------------------------------------------------------------------


@_reads("Pool2DOptions", "AVERAGE_POOL_2D", "MAX_POOL_2D")
def _pooling(call: Call) -> Made:
    window = _window(call, (call["FilterHeight"], call["FilterWidth"]))
    if call.node.kind == "MAX_POOL_2D":
        return ChannelsFirst(max_pooling(window))
    return ChannelsFirst(average_pooling(window, call.planes()))


class Resize(nn.Module):
    """Resize images (n, h, w, c) by sums of rows and of columns.

    Args:
        rows: the share that each row has in each new one, (new, old).
        columns: that of columns.
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        """Return resized images."""
        return last(self.rows @ first(x) @ self.columns.mT)


@_reads("ResizeBilinearOptions", "RESIZE_BILINEAR")
@_reads("ResizeNearestNeighborOptions", "RESIZE_NEAREST_NEIGHBOR")
def _resize(call: Call) -> Made:
    sizes, (channels, *own) = call.numbers(1), call.planes().shape[1:]
    if len(sizes) != 2 or min(sizes) < 1:
        raise Unreadable(f"its operator {call.name} is given no size")
    refuse_large(call.name, channels, *sizes)
    bilinear = call.node.kind == "RESIZE_BILINEAR"
    shares = [
        _shares(old, new, bilinear, call["AlignCorners"], call["HalfPixelCenters"])
        for old, new in zip(own, sizes, strict=True)
    ]
    return Resize(*shares)


def _shares(old: int, new: int, bilinear: bool, corners: bool, middle: bool) -> Tensor:
    """Return the share that each old row has in each new one, (new, old).

    Args:
        corners: whether the first and the last rows lie on each other.
        middle: whether rows are counted from their middle.
    """
    step = np.float32((old - 1) / (new - 1) if corners and new > 1 else old / new)
    at = np.arange(new, dtype=np.float32)
    at = (at + np.float32(0.5)) * step - np.float32(0.5) if middle and bilinear else at * step
    if bilinear:
        low = np.maximum(np.floor(at), 0).astype(np.int64)
        high = np.minimum(np.ceil(at), old - 1).astype(np.int64)
        part = at - low
    else:
        at = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * step if middle else at
        low = high = np.minimum(np.floor(at + 0.5) if corners else np.floor(at), old - 1).astype(np.int64)
        part = np.zeros_like(at)
    shares = np.zeros((new, old), dtype=np.float32)
    np.add.at(shares, (np.arange(new), np.minimum(low, old - 1)), 1 - part)
    np.add.at(shares, (np.arange(new), high), part)
    return torch.from_numpy(shares)


@_reads(None, "PAD", "PADV2")
def _padding(call: Call) -> Made:
    edges = _edges(call)
    value = float(call.constant(2)) if call.node.kind == "PADV2" else 0.0
    around = [side for edge in reversed(edges) for side in edge]
    return Function(lambda x: F.pad(x, around, value=value))


@_reads("MirrorPadOptions", "MIRROR_PAD")
def _mirror_padding(call: Call) -> Made:
    edges, apart = _edges(call), 1 - call["Mode"]  # whether the edge itself is left out
    if any(max(edge) > size - apart for edge, size in zip(edges, call.value(0).shape, strict=True)):
        raise Unreadable(f"its operator {call.name} mirrors more than there is")

    def mirror(x: Tensor) -> Tensor:
        for axis, (before, after) in enumerate(edges):
            if before or after:
                head = x.narrow(axis, apart, before).flip(axis)
                tail = x.narrow(axis, x.shape[axis] - apart - after, after).flip(axis)
                x = torch.cat([head, x, tail], axis)
        return x

    return Function(mirror)


def _edges(call: Call) -> list[tuple[int, int]]:
    x, sides = call.value(0), call.numbers(1)
    if len(sides) != 2 * x.ndim or min(sides) < 0:
        raise Unreadable(f"its operator {call.name} is given no edges")
    edges = list(zip(sides[::2], sides[1::2], strict=True))
    refuse_large(call.name, *(size + sum(edge) for size, edge in zip(x.shape, edges, strict=True)))
    return edges


class Function(nn.Module):
    """A function of the first value alone; what else an operator takes are its settings."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *_: Tensor) -> Any:
        """Return what the function makes of a value."""
        return self.function(x)


# --- each number apart -------------------------------------------------------------------------------------


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "ELU": nn.ELU,
    "HARD_SWISH": nn.Hardswish,
    "LOGISTIC": nn.Sigmoid,
    "RELU": nn.ReLU,
    "RELU6": nn.ReLU6,
    "RELU_0_TO_1": partial(nn.Hardtanh, 0.0, 1.0),
    "RELU_N1_TO_1": nn.Hardtanh,
    "TANH": nn.Tanh,
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ABS": torch.abs,
    "CEIL": straight(torch.ceil),
    "COS": torch.cos,
    "EXP": torch.exp,
    "FLOOR": straight(torch.floor),
    "LOG": torch.log,
    "NEG": torch.neg,
    "ROUND": straight(torch.round),
    "RSQRT": torch.rsqrt,
    "SIGN": straight(torch.sign),
    "SIN": torch.sin,
    "SQRT": torch.sqrt,
    "SQUARE": torch.square,
}


@_reads(None, *_MODULES)
def _module(call: Call) -> Made:
    return _MODULES[call.node.kind]()


@_reads(None, *_FUNCTIONS)
def _function(call: Call) -> Made:
    return Function(_FUNCTIONS[call.node.kind])


@_reads("LeakyReluOptions", "LEAKY_RELU")
def _leaky_relu(call: Call) -> Made:
    return nn.LeakyReLU(call["Alpha"])


@_reads("GeluOptions", "GELU")
def _gelu(call: Call) -> Made:
    return nn.GELU("tanh" if call["Approximate"] else "none")


@_reads(None, "PRELU")
def _prelu(call: Call) -> Made:
    return lambda x, slope: x.clamp(min=0) + slope * x.clamp(max=0)


@_reads("SoftmaxOptions", "SOFTMAX")
def _softmax(call: Call) -> Made:
    factor = float(call["Beta"])
    return Function(lambda x: F.softmax(x if factor == 1 else x * factor, dim=-1))


@_reads(None, "LOG_SOFTMAX")
def _log_softmax(call: Call) -> Made:
    return nn.LogSoftmax(-1)


@_reads("L2NormOptions", "L2_NORMALIZATION")
def _unit_length(call: Call) -> Made:
    return Function(lambda x: F.normalize(x, dim=-1, eps=1e-6))


@_reads("LocalResponseNormalizationOptions", "LOCAL_RESPONSE_NORMALIZATION")
def _local_response(call: Call) -> Made:
    size = 2 * call["Radius"] + 1
    if not 0 < size < 1 << 10:
        raise Unreadable(f"its operator {call.name} has a window of no size")
    return ChannelsFirst(nn.LocalResponseNorm(size, call["Alpha"] * size, call["Beta"], call["Bias"]))


_ARITHMETIC: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "ADD": (torch.add, "AddOptions"),
    "SUB": (torch.sub, "SubOptions"),
    "MUL": (torch.mul, "MulOptions"),
    "DIV": (torch.div, "DivOptions"),
    "MAXIMUM": (torch.maximum, None),
    "MINIMUM": (torch.minimum, None),
    "POW": (torch.pow, None),
    "SQUARED_DIFFERENCE": (lambda x, y: torch.square(x - y), None),
}


def _arithmetic(call: Call) -> Made:
    x, y = call.value(0), call.value(1)
    if x.is_floating_point() != y.is_floating_point():
        raise Unknown(f"an operator {call.node.kind} of whole numbers and others")
    if call.node.kind in ("DIV", "POW") and not x.is_floating_point():
        raise Unknown(f"an operator {call.node.kind} of whole numbers")
    refuse_large(call.name, *np.broadcast_shapes(tuple(x.shape), tuple(y.shape)))
    return _ARITHMETIC[call.node.kind][0]


for _kind, (_, _options) in _ARITHMETIC.items():
    _reads(_options, _kind)(_arithmetic)


@_reads(None, "ADD_N")
def _sum(call: Call) -> Made:
    if any(call.value(i).shape != call.value(0).shape for i in range(len(call.given))):
        raise Unreadable(f"its operator {call.name} adds values of several shapes")
    return lambda *values: sum(values[1:], start=values[0])


_COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "GREATER_EQUAL": torch.ge,
    "LESS": torch.lt,
    "LESS_EQUAL": torch.le,
    "NOT_EQUAL": torch.ne,
}


@_reads(None, *_COMPARISONS)
def _comparison(call: Call) -> Made:
    refuse_large(call.name, *np.broadcast_shapes(*(tuple(call.value(i).shape) for i in range(2))))
    return _COMPARISONS[call.node.kind]


@_reads(None, "SELECT", "SELECT_V2")
def _select(call: Call) -> Made:
    chosen, x, y = (call.value(i) for i in range(3))
    if chosen.dtype != torch.bool or x.is_floating_point() != y.is_floating_point():
        raise Unknown(f"an operator {call.node.kind} of other values")
    if call.node.kind == "SELECT" and chosen.shape != x.shape:
        raise Unknown("a choice of whole rows")
    refuse_large(call.name, *np.broadcast_shapes(*(tuple(one.shape) for one in (chosen, x, y))))
    return torch.where


@_reads(None, "CAST")
def _cast(call: Call) -> Made:
    if any(one is not None and one.quantization for one in (*call.takes, *call.gives)):
        raise Unknown("a cast of quantised numbers")
    to = call.gives[0].dtype
    if to.kind == "f":
        return Function(lambda x: x.float())
    if to.kind not in "iu":
        raise Unknown(f"a cast to {call.gives[0].kind}")
    return Function(lambda x: x.trunc().long() if x.is_floating_point() else x)


@_reads(None, "QUANTIZE", "DEQUANTIZE")
def _requantise(call: Call) -> Made:
    return Function(lambda x: x)


# --- sums over axes ----------------------------------------------------------------------------------------


def _product(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "MEAN": torch.mean,
    "SUM": torch.sum,
    "REDUCE_MAX": torch.amax,
    "REDUCE_MIN": torch.amin,
    "REDUCE_PROD": _product,
}


@_reads("ReducerOptions", *_REDUCTIONS)
def _reduction(call: Call) -> Made:
    axes = sorted({call.axis(axis) for axis in call.numbers(1)})
    keep, reduce = bool(call["KeepDims"]), _REDUCTIONS[call.node.kind]
    if not axes or (call.node.kind == "MEAN" and not call.value(0).is_floating_point()):
        raise Unknown(f"an operator {call.node.kind} over no axes, or of whole numbers")
    return Function(lambda x: reduce(x, axes, keepdim=keep))


# --- shapes ------------------------------------------------------------------------------------------------


def _reshaped(call: Call, shape: Sequence[int]) -> Made:
    """Return what brings a value to a shape, and several images to as many of it."""
    own = call.value(0)
    refuse_large(call.name, *(one for one in shape if one > 0))
    rows, *rest = own.reshape(tuple(shape)).shape or (0,)
    if own.is_meta and rows and own.ndim and len(own):
        return Function(lambda x: x.reshape(len(x) * rows // len(own), *rest))
    return Function(lambda x: x.reshape(tuple(shape)))


@_reads(None, "RESHAPE")
def _reshape(call: Call) -> Made:
    if len(call.given) > 1 and call.given[1] is not None:
        return _reshaped(call, call.numbers(1))
    return _reshaped(call, call["NewShape"])


@_reads("SqueezeOptions", "SQUEEZE")
def _squeeze(call: Call) -> Made:
    shape = call.value(0).shape
    axes = [call.axis(axis) for axis in call["SqueezeDims"]] or [i for i, n in enumerate(shape) if n == 1]
    if any(shape[axis] != 1 for axis in axes):
        raise Unreadable(f"its operator {call.name} drops an axis of more than one place")
    return Function(lambda x: x.squeeze(tuple(axes)))


@_reads(None, "EXPAND_DIMS")
def _expand(call: Call) -> Made:
    (axis,) = call.numbers(1)
    axis = call.axis(axis, more=1)
    return Function(lambda x: x.unsqueeze(axis))


@_reads(None, "TRANSPOSE")
def _transpose(call: Call) -> Made:
    order = call.numbers(1)
    return Function(lambda x: x.permute(order))


@_reads(None, "REVERSE_V2")
def _reverse(call: Call) -> Made:
    axes = [call.axis(axis) for axis in call.numbers(1)]
    return Function(lambda x: x.flip(axes))


@_reads("SpaceToDepthOptions", "SPACE_TO_DEPTH")
def _space_to_depth(call: Call) -> Made:
    size = call["BlockSize"]
    _, height, width, channels = call.value(0).shape
    if size < 1 or height % size or width % size:
        raise Unreadable(f"its operator {call.name} has blocks that do not fit")
    blocks = height // size, size, width // size, size, channels
    return Function(
        lambda x: (
            x.reshape(len(x), *blocks)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(len(x), blocks[0], blocks[2], size * size * channels)
        )
    )


@_reads("DepthToSpaceOptions", "DEPTH_TO_SPACE")
def _depth_to_space(call: Call) -> Made:
    size = call["BlockSize"]
    _, height, width, channels = call.value(0).shape
    if size < 1 or channels % (size * size):
        raise Unreadable(f"its operator {call.name} has blocks that do not fit")
    blocks = height, width, size, size, channels // (size * size)
    return Function(
        lambda x: (
            x.reshape(len(x), *blocks)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(len(x), height * size, width * size, blocks[4])
        )
    )


@_reads(None, "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND")
def _batches(call: Call) -> Made:
    """Return what makes several images of one, or the reverse: dilated convolutions are between the two."""
    x, (high, wide), sides = call.planes(), call.numbers(1), call.numbers(2)
    if len(sides) != 4 or min(*sides, high - 1, wide - 1) < 0 or call.constant(2).shape != (2, 2):
        raise Unreadable(f"its operator {call.name} has blocks that do not fit")
    top, bottom, left, right = sides
    if call.node.kind == "SPACE_TO_BATCH_ND":
        height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
        refuse_large(call.name, *x.shape[:2], height, width)
        if height % high or width % wide:
            raise Unreadable(f"its operator {call.name} has blocks that do not fit")

        def part(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0, left, right, top, bottom))
            x = x.reshape(len(x), height // high, high, width // wide, wide, -1)
            return x.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)

        return Function(part)
    height, width = x.shape[2] * high, x.shape[3] * wide
    if len(x) % (high * wide) or top + bottom >= height or left + right >= width:
        raise Unreadable(f"its operator {call.name} has blocks that do not fit")

    def join(x: Tensor) -> Tensor:
        x = x.reshape(high, wide, len(x) // (high * wide), height // high, width // wide, -1)
        x = x.permute(2, 3, 0, 4, 1, 5).flatten(1, 2).flatten(2, 3)
        return x[:, top : height - bottom, left : width - right]

    return Function(join)


@_reads(None, "SHAPE")
def _shape(call: Call) -> Made:
    return torch.tensor(call.value(0).shape)


@_reads(None, "FILL")
def _fill(call: Call) -> Made:
    shape = call.numbers(0)
    refuse_large(call.name, *shape)
    return torch.full(shape, call.constant(1).item())


@_reads(None, "BROADCAST_TO")
def _broadcast(call: Call) -> Made:
    shape = call.numbers(1)
    refuse_large(call.name, *shape)
    return Function(lambda x: x.expand(shape))


@_reads(None, "TILE")
def _tile(call: Call) -> Made:
    times = call.numbers(1)
    if len(times) != call.value(0).ndim or min(times, default=0) < 1:
        raise Unreadable(f"its operator {call.name} is given no numbers of times")
    refuse_large(call.name, *call.value(0).shape, *times)
    return Function(lambda x: x.repeat(times))


# --- parts -------------------------------------------------------------------------------------------------


@_reads("ConcatenationOptions", "CONCATENATION")
def _concatenation(call: Call) -> Made:
    axis = call.axis(call["Axis"])
    there = [one for one in call.given if one is not None]
    refuse_large(call.name, sum(one.numel() for one in there))
    if len({one.is_floating_point() for one in there}) > 1:
        raise Unknown("a concatenation of whole numbers and others")

    def join(*values: Tensor) -> Tensor:
        images = max(len(value) for value in values)
        if axis and images > 1:  # a constant is there once, for each image
            values = tuple(
                value.expand(images, *value.shape[1:]) if len(value) == 1 else value for value in values
            )
        return torch.cat(values, axis)

    return join


@_reads("PackOptions", "PACK")
def _pack(call: Call) -> Made:
    axis = call.axis(call["Axis"], more=1)
    refuse_large(call.name, sum(one.numel() for one in call.given if one is not None))
    return lambda *values: torch.stack(values, axis)


@_reads("UnpackOptions", "UNPACK")
def _unpack(call: Call) -> Made:
    axis = call.axis(call["Axis"])
    return Function(lambda x: x.unbind(axis))


@_reads("SplitOptions", "SPLIT")
def _split(call: Call) -> Made:
    (axis,), parts = call.numbers(0), len(call.gives)
    axis, x = call.axis(axis), call.value(1)
    if x.shape[axis] % parts:
        raise Unreadable(f"its operator {call.name} makes parts that are not even")
    return lambda _, x: torch.split(x, x.shape[axis] // parts, axis)


@_reads("SplitVOptions", "SPLIT_V")
def _split_by_sizes(call: Call) -> Made:
    sizes, (axis,) = call.numbers(1), call.numbers(2)
    axis = call.axis(axis)
    if -1 in sizes:
        sizes[sizes.index(-1)] = call.value(0).shape[axis] - sum(sizes) - 1
    return Function(lambda x: torch.split(x, sizes, axis))


@_reads("GatherOptions", "GATHER")
def _gather(call: Call) -> Made:
    if call["BatchDims"]:
        raise Unknown("a choice of other places for each image")
    axis, places = call.axis(call["Axis"]), call.constant(1)
    numbers, size = call.numbers(1), call.value(0).shape[axis]
    if not all(0 <= one < size for one in numbers):
        raise Unreadable(f"its operator {call.name} names places that its values do not have")
    return lambda x, chosen: x.index_select(axis, chosen.flatten()).reshape(
        *x.shape[:axis], *places.shape, *x.shape[axis + 1 :]
    )


@_reads("StridedSliceOptions", "STRIDED_SLICE")
def _strided_slice(call: Call) -> Made:
    if call["EllipsisMask"] or call["NewAxisMask"] or call["Offset"]:
        raise Unknown("a STRIDED_SLICE that adds axes, or leaves some out")
    begins, ends, steps = (call.numbers(place) for place in (1, 2, 3))
    if not len(begins) == len(ends) == len(steps) <= call.value(0).ndim or 0 in steps:
        raise Unreadable(f"its operator {call.name} is given no places")
    parts, dropped = [], []
    for axis, (begin, end, step) in enumerate(zip(begins, ends, steps, strict=True)):
        bit, size = 1 << axis, call.value(0).shape[axis]
        if call["ShrinkAxisMask"] & bit:
            dropped.append(axis)
            begin = size + begin if begin < 0 else begin
            parts.append(range(size)[begin : begin + 1])
        else:
            part = slice(
                None if call["BeginMask"] & bit else begin, None if call["EndMask"] & bit else end, step
            )
            parts.append(range(size)[part])
    return _sliced(call, parts, dropped)


@_reads(None, "SLICE")
def _slice(call: Call) -> Made:
    begins, sizes, shape = call.numbers(1), call.numbers(2), call.value(0).shape
    if not len(begins) == len(sizes) == len(shape) or min(begins) < 0:
        raise Unreadable(f"its operator {call.name} is given no places")
    parts = [
        range(whole)[begin : (whole if size == -1 else begin + size)]
        for whole, begin, size in zip(shape, begins, sizes, strict=True)
    ]
    return _sliced(call, parts, [])


def _sliced(call: Call, parts: Sequence[range], dropped: Sequence[int]) -> Made:
    """Return what takes some places along each axis, and drops axes of one place."""
    shape, steps = call.value(0).shape, []
    if not all(parts):
        raise Unreadable(f"its operator {call.name} takes nothing")
    for axis, part in enumerate(parts):
        if len(part) < shape[axis] or part.step < 0:
            up = part if part.step > 0 else part[::-1]
            steps.append((axis, slice(up.start, up.stop, up.step), part.step < 0))

    def take(x: Tensor) -> Tensor:
        for axis, part, turned in steps:
            x = x[(*[slice(None)] * axis, part)]
            x = x.flip(axis) if turned else x
        return x.squeeze(tuple(dropped)) if dropped else x

    return Function(take)
