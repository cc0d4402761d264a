"""ONNX operators as torch functions.

`OPERATORS` maps an operator's name (with its domain, unless that is ONNX's own) to a maker. A maker reads
the attributes and the known inputs of one node, once, and returns a function of the other inputs. Names,
attributes and defaults are those of the ONNX operator specification, opset 7 and later:
https://onnx.ai/onnx/operators/.

Where we depart from it: half and bfloat16 numbers are computed in float32, and quantised numbers that
depend on the image are held as whole float numbers, so that a gradient passes. Rounding to quantised
levels passes the gradient straight through inside the range and none outside of it; Round, Floor, Ceil, Sign,
and whole numbers that are made of floats and become floats again, pass it everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from doorward.core.errors import InputError
from doorward.models.straight_through import passed, straight

Function = Callable[..., Any]

#: Number types by their number in ONNX's TensorProto; half types are widened.
TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.int32,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float64,
    12: torch.int64,
    13: torch.int64,
    16: torch.float32,
}
#: Ranges of the quantised types.
_LEVELS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767)}
#: Attribute of our own on quantised operators whose result is left unrounded.
UNQUANTISED = "doorward.unquantised"
#: No single value may have more elements for one image; larger ones exhaust memory.
MOST_ELEMENTS = 2**28


class Unsupported(Exception):  # noqa: N818
    """Tells why a node has no torch form here."""


@dataclass(frozen=True)
class Node:
    """One ONNX node. `name` is as in the file, `layer` the torch layer that stands for it, if any."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int
    name: str = ""
    layer: str | None = None


class Operation:
    """Give a maker what is known of one node: its attributes, its inputs' shapes, and some inputs' values.

    Args:
        node: the node.
        values: every input by name; on the meta device if it depends on the image.
        device: where the function will run.
        usual: the shape that the first input had when the graph was read, where its batch size is fixed.
    """

    def __init__(
        self,
        node: Node,
        values: Mapping[str, Tensor],
        device: torch.device,
        usual: tuple[int, ...] | None = None,
    ) -> None:
        self.node = node
        self.opset = node.opset
        self.device = device
        self.usual = usual
        self.consumed: set[int] = set()
        self.values = values

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default."""
        return self.node.attributes.get(name, default)

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """Return an attribute that must be one of the given words."""
        value: str = self.attribute(name, default)
        if value not in choices:
            raise Unsupported(f"{name}={value!r}")
        return value

    def has(self, index: int) -> bool:
        """Return whether an optional input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] != ""

    def tensor(self, index: int) -> Tensor:
        """Return an input, which may be on the meta device."""
        return self.values[self.node.inputs[index]]

    def shape(self, index: int) -> tuple[int, ...]:
        """Return an input's shape."""
        return tuple(self.tensor(index).shape)

    def is_known(self, index: int) -> bool:
        """Return whether an input is given and does not depend on the image."""
        return self.has(index) and not self.tensor(index).is_meta

    def known(self, index: int) -> Tensor:
        """Return an input that must not depend on the image; the function will not be given it."""
        value = self.tensor(index)
        if value.is_meta:
            raise Unsupported(f"its input {self.node.inputs[index]!r} depends on the image")
        self.consumed.add(index)
        return value.cpu()

    def ints(self, index: int) -> list[int]:
        """Return a known input as a list of whole numbers."""
        return [int(value) for value in self.known(index).reshape(-1).tolist()]

    def number(self, index: int) -> Any:
        """Return a known input with one element as a Python number."""
        return self.known(index).reshape(()).item()

    def axes(self, index: int, since: int) -> list[int] | None:
        """Return the axes, which are an input since some opset and an attribute before it."""
        if self.opset < since:
            axes: list[int] | None = self.attribute("axes")
            return axes
        return self.ints(index) if self.has(index) else None

    def left(self) -> list[str]:
        """Return the names of the inputs that the function takes, "" for one left out before the last."""
        names = [name for i, name in enumerate(self.node.inputs) if i not in self.consumed]
        while names and not names[-1]:
            names.pop()
        return names


Maker = Callable[[Operation], Function]
OPERATORS: dict[str, Maker] = {}


def make_function(op: Operation) -> Function:
    """Return the torch function of one node.

    Raises:
        Unsupported: if there is none; the message names the operator.
    """
    if op.node.operator not in OPERATORS:
        raise Unsupported("not known here")
    return OPERATORS[op.node.operator](op)


def _operator(*names: str) -> Callable[[Maker], Maker]:
    def keep(maker: Maker) -> Maker:
        OPERATORS.update(dict.fromkeys(names, maker))
        return maker

    return keep


def _plain(functions: Mapping[str, Function]) -> None:
    """Add operators without attributes."""

    def maker(function: Function) -> Maker:
        return lambda _: function

    OPERATORS.update({name: maker(function) for name, function in functions.items()})


def bounded(shape: Sequence[int]) -> Sequence[int]:
    """Return the shape.

    Raises:
        InputError: if a value of that shape is larger than any sensible model needs.
    """
    if any(size < 0 for size in shape) or math.prod(shape) > MOST_ELEMENTS:
        raise InputError(f"the model is refused: it makes a value of shape {tuple(shape)}")
    return shape


# --- element by element ------------------------------------------------------------------------------------


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _variadic(function: Function) -> Function:
    return lambda *values: reduce(function, values)


_plain(
    {
        "Abs": torch.abs,
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Add": torch.add,
        "And": torch.logical_and,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseNot": torch.bitwise_not,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "Ceil": straight(torch.ceil),
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Div": _divide,
        "Equal": torch.eq,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": straight(torch.floor),
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "HardSwish": F.hardswish,
        "Identity": lambda x: x,
        "IsNaN": torch.isnan,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Log": torch.log,
        "MatMul": torch.matmul,
        "Max": _variadic(torch.maximum),
        "Mean": lambda *values: reduce(torch.add, values) / len(values),
        "Min": _variadic(torch.minimum),
        "Mish": F.mish,
        "Mul": torch.mul,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Or": torch.logical_or,
        "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x),
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": straight(torch.round),
        "Sigmoid": torch.sigmoid,
        "Sign": straight(torch.sign),
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Sqrt": torch.sqrt,
        "Sub": torch.sub,
        "Sum": _variadic(torch.add),
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "Where": torch.where,
        "Xor": torch.logical_xor,
        "com.microsoft.QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
)


@_operator("Pow")
def _pow(op: Operation) -> Function:
    if op.is_known(1) and op.tensor(1).numel() == 1 and op.tensor(1).ndim == 0:
        exponent = op.number(1)
        return lambda x: x.pow(exponent).to(x.dtype)
    return lambda x, y: x.pow(y).to(x.dtype)


@_operator("Mod")
def _mod(op: Operation) -> Function:
    return torch.fmod if op.attribute("fmod", 0) else torch.remainder


@_operator("BitShift")
def _bit_shift(op: Operation) -> Function:
    left = op.choice("direction", "LEFT", ["LEFT", "RIGHT"]) == "LEFT"
    return torch.bitwise_left_shift if left else torch.bitwise_right_shift


@_operator("IsInf")
def _is_inf(op: Operation) -> Function:
    low, high = bool(op.attribute("detect_negative", 1)), bool(op.attribute("detect_positive", 1))
    return lambda x: torch.isinf(x) & ((x < 0) & low | (x > 0) & high)


@_operator("LeakyRelu")
def _leaky_relu(op: Operation) -> Function:
    alpha = op.attribute("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


@_operator("ThresholdedRelu")
def _thresholded_relu(op: Operation) -> Function:
    alpha = op.attribute("alpha", 1.0)
    return lambda x: F.threshold(x, alpha, 0.0)


@_operator("Elu")
def _elu(op: Operation) -> Function:
    alpha = op.attribute("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


@_operator("Selu")
def _selu(op: Operation) -> Function:
    alpha = op.attribute("alpha", 1.67326319217681884765625)
    gamma = op.attribute("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


@_operator("Celu")
def _celu(op: Operation) -> Function:
    alpha = op.attribute("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


@_operator("Gelu")
def _gelu(op: Operation) -> Function:
    approximate = op.choice("approximate", "none", ["none", "tanh"])
    return lambda x: F.gelu(x, approximate=approximate)


@_operator("com.microsoft.Gelu", "com.microsoft.BiasGelu")
def _exact_gelu(op: Operation) -> Function:
    return lambda x, bias=None: F.gelu(x if bias is None else x + bias)


@_operator("com.microsoft.FastGelu")
def _fast_gelu(op: Operation) -> Function:
    return lambda x, bias=None: F.gelu(x if bias is None else x + bias, approximate="tanh")


@_operator("Swish")
def _swish(op: Operation) -> Function:
    alpha = op.attribute("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


@_operator("HardSigmoid")
def _hard_sigmoid(op: Operation) -> Function:
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0, 1)


@_operator("Shrink")
def _shrink(op: Operation) -> Function:
    bias, threshold = op.attribute("bias", 0.0), op.attribute("lambd", 0.5)

    def shrink(x: Tensor) -> Tensor:
        outside = torch.where(x > threshold, x - bias, torch.zeros_like(x))
        return torch.where(x < -threshold, x + bias, outside)

    return shrink


@_operator("Clip")
def _clip(op: Operation) -> Function:
    if op.opset < 11:
        low, high = op.attribute("min"), op.attribute("max")
        return (lambda x: x.clamp(low, high)) if (low, high) != (None, None) else (lambda x: x)
    if all(op.is_known(i) or not op.has(i) for i in (1, 2)):
        low, high = (op.number(i) if op.has(i) else None for i in (1, 2))
        return (lambda x: x.clamp(low, high)) if (low, high) != (None, None) else (lambda x: x)
    return lambda x, low=None, high=None: x.clamp(low, high)


@_operator("Dropout")
def _dropout(op: Operation) -> Function:
    if op.has(2) and op.number(2):
        raise Unsupported("training_mode is on")
    if op.has(1):
        op.known(1)
    if len(op.node.outputs) == 1:
        return lambda x: x
    return lambda x: (x, torch.ones_like(x, dtype=torch.bool))


@_operator("Cast")
def _cast(op: Operation) -> Function:
    kind = op.attribute("to")
    if kind not in TYPES:
        raise Unsupported(f"number type {kind}")
    return lambda x: x.to(TYPES[kind])


@_operator("CastThrough")
def _cast_through(op: Operation) -> Function:
    """Make the node that reading a graph puts where whole numbers made of floats become floats again."""
    kind = TYPES[op.attribute("to")]
    return lambda x, origin: passed(x.to(kind), origin)


@_operator("CastLike")
def _cast_like(op: Operation) -> Function:
    return lambda x, like: x.to(like.dtype)


# --- softmax and its kin -----------------------------------------------------------------------------------


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


@_operator("Softmax", "LogSoftmax", "Hardmax")
def _softmax(op: Operation) -> Function:
    functions: dict[str, Function] = {
        "Softmax": torch.softmax,
        "LogSoftmax": torch.log_softmax,
        "Hardmax": _hardmax,
    }
    function = functions[op.node.operator]
    if op.opset >= 13:
        axis = op.attribute("axis", -1)
        return lambda x: function(x, axis)
    axis = op.attribute("axis", 1) % max(1, len(op.shape(0)))
    # before opset 13 all axes from `axis` on are one
    return lambda x: function(x.flatten(axis), axis).reshape(x.shape)


# --- convolution and pooling -------------------------------------------------------------------------------


def window(op: Operation, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the pads before and after, with `auto_pad` worked out."""
    axes = len(kernel)
    strides: list[int] = op.attribute("strides", [1] * axes)
    dilations: list[int] = op.attribute("dilations", [1] * axes)
    auto = op.choice("auto_pad", "NOTSET", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
    if auto == "NOTSET":
        pads: list[int] = op.attribute("pads", [0] * 2 * axes)
        return strides, dilations, pads[:axes], pads[axes:]
    if auto == "VALID":
        return strides, dilations, [0] * axes, [0] * axes
    total = [
        max((math.ceil(size / stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        for size, stride, dilation, k in zip(op.shape(0)[2:], strides, dilations, kernel, strict=True)
    ]
    half, rest = [t // 2 for t in total], [t - t // 2 for t in total]
    return (strides, dilations, half, rest) if auto == "SAME_UPPER" else (strides, dilations, rest, half)


def torch_pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return pads in the order of `torch.nn.functional.pad`: last axis first, before and after."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


def _convolution(rank: int) -> Function:
    try:
        return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[rank]
    except KeyError:
        raise Unsupported(f"weights with {rank} axes") from None


@_operator("Conv")
def _conv(op: Operation) -> Function:
    shape = op.shape(1)
    convolution = _convolution(len(shape))
    strides, dilations, before, after = window(op, shape[2:])
    groups = op.attribute("group", 1)
    if before == after:
        return lambda x, w, b=None: convolution(x, w, b, strides, before, dilations, groups)
    pads = torch_pads(before, after)
    return lambda x, w, b=None: convolution(F.pad(x, pads), w, b, strides, 0, dilations, groups)


@_operator("ConvTranspose")
def _conv_transpose(op: Operation) -> Function:
    shape = op.shape(1)
    axes = len(shape) - 2
    transpose = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
    strides: list[int] = op.attribute("strides", [1] * axes)
    dilations: list[int] = op.attribute("dilations", [1] * axes)
    extra: list[int] = op.attribute("output_padding", [0] * axes)
    groups = op.attribute("group", 1)
    auto = op.choice("auto_pad", "NOTSET", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
    sizes = op.shape(0)[2:]
    full = [
        (size - 1) * stride + dilation * (k - 1) + 1 + e
        for size, stride, dilation, k, e in zip(sizes, strides, dilations, shape[2:], extra, strict=True)
    ]
    wanted: list[int] | None = op.attribute("output_shape")
    if wanted is None and auto.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        pads: list[int] = [0] * 2 * axes if auto == "VALID" else op.attribute("pads", [0] * 2 * axes)
        before, after = pads[:axes], pads[axes:]
    else:
        total = [f - w for f, w in zip(full, wanted[-axes:], strict=True)]
        half, rest = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (half, rest) if auto == "SAME_UPPER" else (rest, half)
    crop = [-pad for pad in torch_pads(before, after)]

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = transpose(x, w, b, strides, 0, extra, groups, dilations)
        return F.pad(y, crop) if any(crop) else y

    return run


def _pool_window(op: Operation) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return kernel, strides, dilations and pads; the last pad is what whole windows need.

    With `ceil_mode` the input is padded until the last window fits, unless that would start in the padding.
    """
    kernel: list[int] = op.attribute("kernel_shape")
    strides, dilations, before, after = window(op, kernel)
    after = list(after)
    if op.attribute("ceil_mode", 0):
        for i, size in enumerate(op.shape(0)[2:]):
            reach = dilations[i] * (kernel[i] - 1) + 1
            steps = math.ceil((size + before[i] + after[i] - reach) / strides[i])
            if steps * strides[i] >= size + before[i]:
                steps -= 1
            after[i] = max(steps * strides[i] + reach - size - before[i], after[i])
    return kernel, strides, dilations, before, after


@_operator("MaxPool")
def _max_pool(op: Operation) -> Function:
    if len(op.node.outputs) > 1:
        raise Unsupported("its second output")
    kernel, strides, dilations, before, after = _pool_window(op)
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    if before == after and all(2 * pad <= k for pad, k in zip(before, kernel, strict=True)):
        return lambda x: pool(x, kernel, strides, before, dilations)
    pads = torch_pads(before, after)
    return lambda x: pool(F.pad(x, pads, value=-math.inf), kernel, strides, 0, dilations)


@_operator("AveragePool")
def _average_pool(op: Operation) -> Function:
    kernel, strides, dilations, before, after = _pool_window(op)
    pool: Function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    include = bool(op.attribute("count_include_pad", 0))
    plain = not op.attribute("ceil_mode", 0) and all(dilation == 1 for dilation in dilations)
    if plain and before == after and all(2 * pad <= k for pad, k in zip(before, kernel, strict=True)):
        return lambda x: pool(x, kernel, strides, before, False, include)
    # what a window sums over what it counts; the padding that ceil_mode adds is never counted
    convolution = _convolution(len(kernel) + 2)
    declared = window(op, kernel)[3] if include else [0] * len(kernel)
    counted = torch_pads(before if include else [0] * len(kernel), declared)
    beyond = [0] * len(kernel) if include else before
    rest = torch_pads(beyond, [a - d for a, d in zip(after, declared, strict=True)])
    pads = torch_pads(before, after)

    def run(x: Tensor) -> Tensor:
        ones = x.new_ones((1, 1, *kernel))
        count = F.pad(F.pad(x.new_ones((1, 1, *x.shape[2:])), counted, value=1), rest)
        count = convolution(count, ones, None, strides, 0, dilations)
        planes = F.pad(x, pads).flatten(0, 1)[:, None]  # (n * c, 1, h, w)
        total = convolution(planes, ones, None, strides, 0, dilations) / count
        return total.reshape(x.shape[0], x.shape[1], *total.shape[2:])  # type: ignore[no-any-return]

    return run


@_operator("LpPool")
def _lp_pool(op: Operation) -> Function:
    kernel, strides, dilations, before, after = _pool_window(op)
    p = op.attribute("p", 2)
    convolution, pads = _convolution(len(kernel) + 2), torch_pads(before, after)

    def run(x: Tensor) -> Tensor:
        planes = F.pad(x.abs().pow(p), pads).flatten(0, 1)[:, None]  # (n * c, 1, h, w)
        total = convolution(planes, x.new_ones((1, 1, *kernel)), None, strides, 0, dilations).pow(1 / p)
        return total.reshape(x.shape[0], x.shape[1], *total.shape[2:])  # type: ignore[no-any-return]

    return run


def _over_space(function: Callable[[Tensor], Tensor]) -> Function:
    """Apply a function of (n, c, h * w) that gives (n, c), and keep the axes."""
    return lambda x: function(x.flatten(2)).reshape(*x.shape[:2], *[1] * (x.ndim - 2))


@_operator("GlobalAveragePool")
def _global_average_pool(op: Operation) -> Function:
    return _over_space(lambda x: x.mean(2))


@_operator("GlobalMaxPool")
def _global_max_pool(op: Operation) -> Function:
    return _over_space(lambda x: x.max(2).values)


@_operator("GlobalLpPool")
def _global_lp_pool(op: Operation) -> Function:
    p = op.attribute("p", 2)
    return _over_space(lambda x: x.abs().pow(p).sum(2).pow(1 / p))


# --- normalisation -----------------------------------------------------------------------------------------


@_operator("BatchNormalization")
def _batch_normalization(op: Operation) -> Function:
    if op.attribute("spatial", 1) != 1:
        raise Unsupported("spatial=0")
    epsilon = op.attribute("epsilon", 1e-5)
    if op.attribute("training_mode", 0):
        if not op.is_known(0):
            raise Unsupported("it normalises over the batch at hand (training_mode)")
        # standardised weights are made so
        return lambda x, weight, bias, *_: F.batch_norm(x, None, None, weight, bias, True, eps=epsilon)
    return lambda x, weight, bias, mean, var: F.batch_norm(x, mean, var, weight, bias, eps=epsilon)


@_operator("InstanceNormalization")
def _instance_normalization(op: Operation) -> Function:
    epsilon = op.attribute("epsilon", 1e-5)
    return lambda x, weight, bias: torch.group_norm(x, x.shape[1], weight, bias, epsilon)


@_operator("GroupNormalization")
def _group_normalization(op: Operation) -> Function:
    groups, epsilon = op.attribute("num_groups"), op.attribute("epsilon", 1e-5)
    each = 1 if op.opset >= 21 else op.shape(0)[1] // groups  # before opset 21 one scale for each group

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if each > 1:
            weight, bias = weight.repeat_interleave(each), bias.repeat_interleave(each)
        return torch.group_norm(x, groups, weight, bias, epsilon)

    return run


@_operator("LayerNormalization")
def _layer_normalization(op: Operation) -> Function:
    axis, epsilon = op.attribute("axis", -1), op.attribute("epsilon", 1e-5)
    shape = op.shape(0)[axis:]
    if op.shape(1) == shape and (not op.has(2) or op.shape(2) == shape):
        return lambda x, weight, bias=None: F.layer_norm(x, shape, weight, bias, epsilon)
    return lambda x, weight, bias=0.0: F.layer_norm(x, shape, eps=epsilon) * weight + bias


@_operator("RMSNormalization")
def _rms_normalization(op: Operation) -> Function:
    axis, epsilon = op.attribute("axis", -1), op.attribute("epsilon", 1e-5)
    shape = op.shape(0)[axis:]
    return lambda x, weight: F.rms_norm(x, shape, eps=epsilon) * weight


@_operator("com.microsoft.SkipLayerNormalization")
def _skip_layer_normalization(op: Operation) -> Function:
    epsilon = op.attribute("epsilon", 1e-12)
    outputs = len(op.node.outputs)
    if any(op.node.outputs[1:3]):
        raise Unsupported("its mean and deviation outputs")

    def run(
        x: Tensor, skip: Tensor, weight: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
    ) -> Any:
        total = x + skip if bias is None else x + skip + bias
        y = F.layer_norm(total, total.shape[-1:], weight, shift, epsilon)
        return y if outputs == 1 else (y, None, None, total)[:outputs]

    return run


@_operator("LRN")
def _local_response(op: Operation) -> Function:
    size, alpha = op.attribute("size"), op.attribute("alpha", 1e-4)
    beta, bias = op.attribute("beta", 0.75), op.attribute("bias", 1.0)
    before = (size - 1) // 2

    def run(x: Tensor) -> Tensor:
        squares = x.square().flatten(2).transpose(1, 2)  # (n, h * w, c)
        sums = (
            F.avg_pool1d(F.pad(squares, [before, size - 1 - before]), size, 1)
            .transpose(1, 2)
            .reshape(x.shape)
        )
        y: Tensor = x / (bias + alpha * sums).pow(beta)
        return y

    return run


@_operator("LpNormalization")
def _lp_normalization(op: Operation) -> Function:
    axis, p = op.attribute("axis", -1), op.attribute("p", 2)
    return lambda x: x / x.norm(p, dim=axis, keepdim=True)


# --- products ----------------------------------------------------------------------------------------------


@_operator("Gemm")
def _gemm(op: Operation) -> Function:
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    left, right = bool(op.attribute("transA", 0)), bool(op.attribute("transB", 0))

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        y: Tensor = alpha * (a.T if left else a) @ (b.T if right else b)
        return y if c is None else y + beta * c

    return run


@_operator("Linear")
def _linear(op: Operation) -> Function:
    """Make the node that reading a graph puts in place of Gemm and MatMul with known weights."""
    return F.linear


@_operator("Einsum")
def _einsum(op: Operation) -> Function:
    equation = op.attribute("equation")
    return lambda *values: torch.einsum(equation, *values)


@_operator("Attention")
def _attention(op: Operation) -> Function:
    if any(op.has(i) for i in (4, 5, 6)) or op.attribute("softcap", 0.0) or len(op.node.outputs) > 1:
        raise Unsupported("a key-value cache, a soft cap or a second output")
    causal, scale = bool(op.attribute("is_causal", 0)), op.attribute("scale")
    flat = len(op.shape(0)) == 3
    heads = op.attribute("q_num_heads") if flat else op.shape(0)[1]
    shared = op.attribute("kv_num_heads") if flat else op.shape(1)[1]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if flat:
            q = q.reshape(*q.shape[:2], heads, -1).transpose(1, 2)  # (n, heads, tokens, d)
            k, v = (x.reshape(*x.shape[:2], shared, -1).transpose(1, 2) for x in (k, v))
        if causal:
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            if mask is None:
                mask = allowed
            elif mask.dtype == torch.bool:
                mask = mask & allowed
            else:
                mask = mask.masked_fill(~allowed, -math.inf)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=heads != shared)
        return y.transpose(1, 2).flatten(2) if flat else y  # (n, tokens, heads * d)

    return run


def _activation(op: Operation) -> Function:
    name, parameters = op.attribute("activation", "Identity"), op.attribute("activation_params", [])
    if name not in ("Identity", "Relu", "Tanh", "Sigmoid", "LeakyRelu", "Clip", "HardSigmoid"):
        raise Unsupported(f"activation {name!r}")
    names = {"LeakyRelu": ["alpha"], "Clip": ["min", "max"], "HardSigmoid": ["alpha", "beta"]}.get(name, [])
    node = Node(name, ("x",), ("y",), dict(zip(names, parameters, strict=False)), 10)
    return make_function(Operation(node, {}, op.device))


@_operator("com.microsoft.FusedConv")
def _fused_conv(op: Operation) -> Function:
    conv, activation = _conv(op), _activation(op)
    return lambda x, w, b=None, z=None: activation(conv(x, w, b) if z is None else conv(x, w, b) + z)


@_operator("com.microsoft.FusedGemm")
def _fused_gemm(op: Operation) -> Function:
    gemm, activation = _gemm(op), _activation(op)
    return lambda a, b, c=None: activation(gemm(a, b, c))


@_operator("com.microsoft.FusedMatMul")
def _fused_matmul(op: Operation) -> Function:
    if op.attribute("transBatchA", 0) or op.attribute("transBatchB", 0):
        raise Unsupported("transBatchA or transBatchB")
    alpha, left, right = op.attribute("alpha", 1.0), op.attribute("transA", 0), op.attribute("transB", 0)
    return lambda a, b: alpha * (a.mT if left else a) @ (b.mT if right else b)


# --- reductions --------------------------------------------------------------------------------------------


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


@_operator(*_REDUCTIONS)
def _reduce(op: Operation) -> Function:
    reduction = _REDUCTIONS[op.node.operator]
    axes = op.axes(1, since=13 if op.node.operator == "ReduceSum" else 18)
    keep = bool(op.attribute("keepdims", 1))
    if not axes:
        if op.attribute("noop_with_empty_axes", 0):
            return lambda x: x
        axes = list(range(len(op.shape(0))))
    return lambda x: reduction(x, axes, keep)


@_operator("ArgMax", "ArgMin")
def _arg(op: Operation) -> Function:
    axis, keep = op.attribute("axis", 0), bool(op.attribute("keepdims", 1))
    function: Function = torch.argmax if op.node.operator == "ArgMax" else torch.argmin
    if op.attribute("select_last_index", 0):
        return lambda x: x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
    return lambda x: function(x, axis, keepdim=keep)


@_operator("TopK")
def _top_k(op: Operation) -> Function:
    count = op.ints(1)[0] if op.opset >= 10 else op.attribute("k")
    axis, largest = op.attribute("axis", -1), bool(op.attribute("largest", 1))
    ordered = bool(op.attribute("sorted", 1))
    return lambda x: tuple(x.topk(count, axis, largest, ordered))


@_operator("CumSum")
def _cumulative_sum(op: Operation) -> Function:
    axis, exclusive, backward = op.ints(1)[0], op.attribute("exclusive", 0), op.attribute("reverse", 0)

    def run(x: Tensor) -> Tensor:
        y = x.flip(axis).cumsum(axis, dtype=x.dtype).flip(axis) if backward else x.cumsum(axis, dtype=x.dtype)
        return y - x if exclusive else y

    return run


# --- shapes ------------------------------------------------------------------------------------------------


@_operator("Shape")
def _shape(op: Operation) -> Function:
    start, end = op.attribute("start", 0), op.attribute("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@_operator("Size")
def _size(op: Operation) -> Function:
    return lambda x: torch.tensor(x.numel())


def stretch(actual: Sequence[int], usual: Sequence[int], target: Sequence[int]) -> list[int]:
    """Return the target of a reshape for another batch size than the one it was written for.

    The axis that grew from `usual` to `actual` is found again in the target as the one with the same number
    of elements before it.

    >>> stretch((4, 64, 7, 7), (1, 64, 7, 7), [1, 3136])
    [4, 3136]
    >>> stretch((197, 4, 768), (197, 1, 768), [197, 12, 64])
    [197, 48, 64]
    """
    grown = [axis for axis, (a, u) in enumerate(zip(actual, usual, strict=True)) if a != u]
    if not grown:
        return list(target)
    axis, before = grown[0], math.prod(usual[: grown[0]])
    for place in range(len(target)):
        if math.prod(target[:place]) == before:
            resized = list(target)
            resized[place] = target[place] * actual[axis] // usual[axis]
            return resized
    raise Unsupported(f"a reshape to {list(target)} that other batch sizes do not fit")


@_operator("Reshape")
def _reshape(op: Operation) -> Function:
    target = op.ints(1)
    copied = [] if op.attribute("allowzero", 0) else [axis for axis, size in enumerate(target) if size == 0]
    usual = op.usual
    if usual is not None:
        written = [usual[axis] if axis in copied else size for axis, size in enumerate(target)]
        known = math.prod(size for size in written if size != -1)
        whole = [math.prod(usual) // max(1, known) if size == -1 else size for size in written]
        return lambda x: x.reshape(stretch(x.shape, usual, whole))
    if not copied:
        return lambda x: x.reshape(target)
    return lambda x: x.reshape(
        [x.shape[axis] if axis in copied else size for axis, size in enumerate(target)]
    )


@_operator("Flatten")
def _flatten(op: Operation) -> Function:
    axis = op.attribute("axis", 1)
    axis = axis + len(op.shape(0)) if axis < 0 else axis
    if axis == 1:
        return lambda x: x.flatten(1) if x.ndim > 1 else x[:, None]
    return lambda x: x.reshape(math.prod(x.shape[:axis]), -1)


@_operator("Transpose")
def _transpose(op: Operation) -> Function:
    order = op.attribute("perm")
    return lambda x: x.permute(order if order is not None else list(reversed(range(x.ndim))))


@_operator("Squeeze")
def _squeeze(op: Operation) -> Function:
    axes = op.axes(1, since=13)
    places = tuple(axes) if axes is not None else tuple(i for i, size in enumerate(op.shape(0)) if size == 1)
    return lambda x: x.squeeze(places)


@_operator("Unsqueeze")
def _unsqueeze(op: Operation) -> Function:
    axes = op.axes(1, since=13) or []
    rank = len(op.shape(0)) + len(axes)
    places = sorted(axis % rank for axis in axes)

    def run(x: Tensor) -> Tensor:
        for axis in places:
            x = x.unsqueeze(axis)
        return x

    return run


@_operator("Concat")
def _concat(op: Operation) -> Function:
    axis = op.attribute("axis")
    if op.usual is None or axis == 0:
        return lambda *values: torch.cat(values, axis)

    def run(*values: Tensor) -> Tensor:
        batch = max(value.shape[0] for value in values)
        return torch.cat([v.expand(batch, *v.shape[1:]) if v.shape[0] == 1 else v for v in values], axis)

    return run


@_operator("Split")
def _split(op: Operation) -> Function:
    axis = op.attribute("axis", 0)
    if op.opset >= 13 and op.has(1):
        sizes = op.ints(1)
    elif op.attribute("split"):
        sizes = op.attribute("split")
    else:
        size, parts = op.shape(0)[axis], len(op.node.outputs)
        each = math.ceil(size / parts)
        sizes = [each] * (parts - 1) + [size - each * (parts - 1)]
    return lambda x: x.split(sizes, axis)


@_operator("Slice")
def _slice(op: Operation) -> Function:
    rank = len(op.shape(0))
    if op.opset < 10:
        starts, ends = op.attribute("starts"), op.attribute("ends")
        axes, steps = op.attribute("axes"), None
    else:
        starts, ends = op.ints(1), op.ints(2)
        axes, steps = (op.ints(i) if op.has(i) else None for i in (3, 4))
    axes = [axis % rank for axis in axes] if axes is not None else list(range(len(starts)))
    steps = steps or [1] * len(starts)
    cuts = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cuts[axis] = slice(start, end, step)
    if all(step > 0 for step in steps):
        key = tuple(cuts)
        return lambda x: x[key]

    def run(x: Tensor) -> Tensor:
        for axis, cut in enumerate(cuts):
            places = range(x.shape[axis])[cut]
            if len(places) != x.shape[axis] or places.step != 1:
                x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
        return x

    return run


@_operator("Expand")
def _expand(op: Operation) -> Function:
    shape = op.ints(1)
    return lambda x: x.expand(np.broadcast_shapes(x.shape, shape))


@_operator("Tile")
def _tile(op: Operation) -> Function:
    repeats = op.ints(1)
    return lambda x: x.repeat(repeats)


@_operator("Pad")
def _pad(op: Operation) -> Function:
    mode = op.choice("mode", "constant", ["constant", "reflect", "edge", "wrap"])
    rank, axes, value = len(op.shape(0)), None, 0.0
    if op.opset < 11:
        pads, value = op.attribute("pads"), op.attribute("value", 0.0)
    else:
        pads = op.ints(1)
        value = op.number(2) if op.has(2) else 0.0
        axes = op.ints(3) if op.has(3) else None
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes if axes is not None else range(rank)):
        before[axis], after[axis] = pads[place], pads[place + len(pads) // 2]
    if mode == "constant":
        flat = torch_pads(before, after)
        while flat and flat[-2:] == [0, 0]:
            flat = flat[:-2]
        return lambda x: F.pad(x, flat, value=value)

    def run(x: Tensor) -> Tensor:
        for axis, (b, a) in enumerate(zip(before, after, strict=True)):
            if b or a:
                bounded([x.shape[axis] + max(b, 0) + max(a, 0)])
                places = np.pad(np.arange(x.shape[axis]), (max(b, 0), max(a, 0)), mode=mode)  # type: ignore[call-overload]
                places = places[max(-b, 0) : len(places) - max(-a, 0)]
                x = x.index_select(axis, torch.from_numpy(places.copy()).to(x.device))
        return x

    return run


@_operator("DepthToSpace")
def _depth_to_space(op: Operation) -> Function:
    b = op.attribute("blocksize")
    if op.choice("mode", "DCR", ["DCR", "CRD"]) == "CRD":
        return lambda x: F.pixel_shuffle(x, b)

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)  # (n, c / b², h, b, w, b)
        return y.reshape(n, c // b**2, h * b, w * b)

    return run


@_operator("SpaceToDepth")
def _space_to_depth(op: Operation) -> Function:
    b = op.attribute("blocksize")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)  # (n, b, b, c, h / b, w / b)
        return y.reshape(n, c * b**2, h // b, w // b)

    return run


# --- picking and placing -----------------------------------------------------------------------------------


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Return indices with negative ones counted from the end."""
    return torch.where(indices < 0, indices + size, indices).long()


@_operator("Gather")
def _gather(op: Operation) -> Function:
    axis = op.attribute("axis", 0)
    if op.is_known(1) and op.tensor(1).ndim == 0:
        place = op.number(1)
        return lambda x: x.select(axis, place)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        y = x.index_select(axis, _wrapped(indices, x.shape[axis]).flatten())
        place = axis % x.ndim
        return y.reshape(*x.shape[:place], *indices.shape, *x.shape[place + 1 :])

    return run


@_operator("GatherElements")
def _gather_elements(op: Operation) -> Function:
    axis = op.attribute("axis", 0)
    return lambda x, indices: x.gather(axis, _wrapped(indices, x.shape[axis]))


@_operator("GatherND")
def _gather_nd(op: Operation) -> Function:
    shared = op.attribute("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        batch = indices.shape[:shared]
        flat = x.reshape(-1, *x.shape[shared:])
        places = indices.reshape(len(flat), -1, indices.shape[-1])  # (batch, picks, k)
        rows = torch.arange(len(flat), device=x.device)[:, None].expand(places.shape[:2])
        y = flat[(rows, *places.long().unbind(-1))]
        return y.reshape(*batch, *indices.shape[shared:-1], *y.shape[2:])

    return run


@_operator("ScatterElements", "Scatter")
def _scatter_elements(op: Operation) -> Function:
    axis = op.attribute("axis", 0)
    how = {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[
        op.choice("reduction", "none", ["none", "add", "mul", "max", "min"])
    ]
    if how is None:
        return lambda x, indices, y: x.scatter(axis, _wrapped(indices, x.shape[axis]), y)
    return lambda x, indices, y: x.scatter_reduce(axis, _wrapped(indices, x.shape[axis]), y, how)


@_operator("ScatterND")
def _scatter_nd(op: Operation) -> Function:
    add = op.choice("reduction", "none", ["none", "add"]) == "add"
    return lambda x, indices, y: x.index_put(indices.long().unbind(-1), y, accumulate=add)


@_operator("OneHot")
def _one_hot(op: Operation) -> Function:
    depth, axis = op.ints(1)[0], op.attribute("axis", -1)

    def run(indices: Tensor, values: Tensor) -> Tensor:
        hot = _wrapped(indices, depth)[..., None] == torch.arange(depth, device=indices.device)
        return torch.where(hot, values[1], values[0]).movedim(-1, axis)

    return run


@_operator("Trilu")
def _trilu(op: Operation) -> Function:
    diagonal = op.ints(1)[0] if op.has(1) else 0
    function: Function = torch.triu if op.attribute("upper", 1) else torch.tril
    return lambda x: function(x, diagonal)


@_operator("NonZero")
def _non_zero(op: Operation) -> Function:
    found = op.known(0).nonzero().T
    return lambda: found


@_operator("Constant")
def _constant(op: Operation) -> Function:
    for key, dtype in (
        ("value", None),
        ("value_float", torch.float32),
        ("value_floats", torch.float32),
        ("value_int", torch.int64),
        ("value_ints", torch.int64),
    ):
        value = op.attribute(key)
        if value is not None:
            tensor = torch.as_tensor(value, dtype=dtype)
            return lambda: tensor
    raise Unsupported("a constant that is no tensor of numbers")


@_operator("ConstantOfShape")
def _constant_of_shape(op: Operation) -> Function:
    shape, value = op.ints(0), op.attribute("value", torch.zeros(1))
    return lambda: value.reshape(()).expand(shape)


@_operator("Range")
def _range(op: Operation) -> Function:
    dtype = op.tensor(0).dtype
    start, limit, delta = (op.number(i) for i in range(3))
    count = max(0, math.ceil((limit - start) / delta))
    bounded([count])
    return lambda: (start + torch.arange(count) * delta).to(dtype)


@_operator("EyeLike")
def _eye_like(op: Operation) -> Function:
    diagonal, kind = op.attribute("k", 0), op.attribute("dtype")

    def run(x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        columns = torch.arange(x.shape[1], device=x.device)
        y: Tensor = columns - rows == diagonal
        return y.to(TYPES[kind] if kind else x.dtype)

    return run


# --- resizing ----------------------------------------------------------------------------------------------


def source_places(size: int, count: int, scale: float, transform: str) -> npt.NDArray[np.float32]:
    """Return where each of `count` places lies among `size`, by ONNX's coordinate transformation modes."""
    places = np.arange(count, dtype=np.float32)
    factor = np.float32(scale)
    if transform == "align_corners":
        return places * np.float32((size - 1) / max(count - 1, 1))
    if transform == "asymmetric":
        return places / factor
    if transform == "tf_half_pixel_for_nn":
        return (places + np.float32(0.5)) / factor
    if transform == "pytorch_half_pixel" and count == 1:
        return places
    half = (places + np.float32(0.5)) / factor - np.float32(0.5)
    if transform == "half_pixel_symmetric":
        half += np.float32(size / 2 * (1 - count / (scale * size)))
    return half


def _nearest(places: npt.NDArray[np.float32], size: int, rounding: str) -> npt.NDArray[np.int64]:
    half = np.float32(0.5)
    if rounding in ("round_prefer_floor", "ceil"):
        rounded = np.ceil(places - half if rounding != "ceil" else places)
    else:
        rounded = np.floor(places + half if rounding != "floor" else places)
    return rounded.clip(0, size - 1).astype(np.int64)


def _weights(op: Operation, mode: str, size: int, scale: float, places: npt.NDArray[np.float32]) -> Tensor:
    """Return the matrix (places, size) that interpolates along one axis."""
    shrink = min(1.0, scale) if op.attribute("antialias", 0) else 1.0
    cubic = mode == "cubic"
    a = op.attribute("cubic_coeff_a", -0.75)
    reach = math.ceil((2 if cubic else 1) / shrink) + 1
    centre = np.floor(places).astype(np.int64)[:, None]
    taps = centre + np.arange(-reach, reach + 1)  # (places, taps)
    d = np.abs((taps - places[:, None].astype(np.float64)) * shrink)
    if cubic:
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0))
    else:
        weight = np.maximum(0, 1 - d)
    if op.attribute("exclude_outside", 0):
        weight = np.where((taps >= 0) & (taps < size), weight, 0)
    matrix = np.zeros((len(places), size))
    rows = np.broadcast_to(np.arange(len(places))[:, None], taps.shape)
    np.add.at(matrix, (rows, taps.clip(0, size - 1)), weight)
    return torch.from_numpy((matrix / matrix.sum(1, keepdims=True)).astype(np.float32)).to(op.device)


@_operator("Resize", "Upsample")
def _resize(op: Operation) -> Function:
    shape = op.shape(0)
    axes: list[int] = [axis % len(shape) for axis in op.attribute("axes", range(len(shape)))]
    old = op.node.operator == "Upsample" or op.opset == 10
    if op.node.operator == "Upsample" and op.opset < 9:
        scales: list[float] | None = op.attribute("scales")
        sizes = None
    else:
        place = 1 if old else 2
        given = op.has(place) and op.tensor(place).numel() > 0
        scales = [float(scale) for scale in op.known(place).tolist()] if given else None
        sizes = op.ints(3) if not old and op.has(3) and op.tensor(3).numel() else None
        op.consumed |= {1, 2, 3}
    if op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("keep_aspect_ratio_policy")
    mode = op.choice("mode", "nearest", ["nearest", "linear", "cubic"])
    transform = op.choice(
        "coordinate_transformation_mode",
        "asymmetric" if old else "half_pixel",
        [
            "half_pixel",
            "pytorch_half_pixel",
            "align_corners",
            "asymmetric",
            "half_pixel_symmetric",
            "tf_half_pixel_for_nn",
        ],
    )
    roundings = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
    rounding = op.choice("nearest_mode", "floor" if old else "round_prefer_floor", roundings)
    steps: list[tuple[int, Tensor]] = []
    for place, axis in enumerate(axes):
        size = shape[axis]
        if scales is not None:
            scale = scales[place]
            count = math.floor(size * scale)
        else:
            count = sizes[place]  # type: ignore[index]
            scale = count / size
        if count == size and scale == 1:
            continue
        if axis == 0:
            raise Unsupported("resizing of the batch")
        bounded([size, count])
        places = source_places(size, count, scale, transform)
        if mode == "nearest":
            # opset 10 rounds towards where the enlarged grid begins, and away from it when it shrinks
            way = "ceil" if op.opset == 10 and scale < 1 else rounding
            steps.append((axis, torch.from_numpy(_nearest(places, size, way)).to(op.device)))
        else:
            if not op.attribute("antialias", 0) and mode == "linear":
                places = places.clip(0, size - 1)
            steps.append((axis, _weights(op, mode, size, scale, places)))

    def run(x: Tensor) -> Tensor:
        for axis, step in steps:
            if step.ndim == 1:
                x = x.index_select(axis, step.to(x.device))
            else:
                x = (x.movedim(axis, -1) @ step.to(x).T).movedim(-1, axis)
        return x

    return run


@_operator("GridSample")
def _grid_sample(op: Operation) -> Function:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(word := op.attribute("mode", "bilinear"), word)
    padding, corners = op.attribute("padding_mode", "zeros"), bool(op.attribute("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, mode, padding, corners)


@_operator("AffineGrid")
def _affine_grid(op: Operation) -> Function:
    size, corners = op.ints(1), bool(op.attribute("align_corners", 0))
    return lambda theta: F.affine_grid(theta, [theta.shape[0], *size[1:]], corners)


# --- quantised numbers -------------------------------------------------------------------------------------


def _along(value: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return one value, or one for each place along an axis, in a shape that x takes."""
    if value.numel() == 1:
        return value.reshape(())
    return value.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def quantise(
    x: Tensor, scale: Tensor, zero: Tensor | float, limits: tuple[int, int], axis: int = 1
) -> Tensor:
    """Round to levels, held as float; the gradient passes straight through inside the limits."""
    y = x / _along(scale, x, axis)
    y = y + (y.round() - y).detach()
    zero = _along(zero, x, axis).to(x.dtype) if isinstance(zero, Tensor) else zero
    return (y + zero).clamp(*limits)


def dequantise(q: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1) -> Tensor:
    """Return the numbers that levels stand for."""
    q = q.to(scale.dtype)
    if zero is not None:
        q = q - _along(zero, q, axis).to(scale.dtype)
    return q * _along(scale, q, axis)


def _requantise(op: Operation, index: int) -> Callable[..., Tensor]:
    """Return what quantises a node's result to its output's levels, told by the zero point at an index.

    Where reading a graph has left the final rounding out, the result stays as it is.
    """
    if op.attribute(UNQUANTISED, 0):
        return lambda y, *_: y
    limits = _limits(op, index)
    return lambda y, scale, zero: quantise(y, scale, zero, limits)


def _limits(op: Operation, index: int) -> tuple[int, int]:
    """Return the range of a quantised type, told by the zero point."""
    dtype = op.tensor(index).dtype if op.has(index) else torch.uint8
    if dtype not in _LEVELS:
        raise Unsupported(f"quantisation to {dtype}")
    return _LEVELS[dtype]


@_operator("QuantizeLinear")
def _quantize_linear(op: Operation) -> Function:
    axis, kind = op.attribute("axis", 1), op.attribute("output_dtype", 0)
    if op.attribute("block_size", 0):
        raise Unsupported("block_size")
    limits = _LEVELS[TYPES[kind]] if kind else _limits(op, 2)
    return lambda x, scale, zero=0.0: quantise(x, scale, zero, limits, axis)


@_operator("DequantizeLinear")
def _dequantize_linear(op: Operation) -> Function:
    axis = op.attribute("axis", 1)
    if op.attribute("block_size", 0):
        raise Unsupported("block_size")
    return lambda q, scale, zero=None: dequantise(q, scale, zero, axis)


@_operator("DynamicQuantizeLinear")
def _dynamic_quantize_linear(op: Operation) -> Function:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        high, low = x.detach().amax().clamp_min(0), x.detach().amin().clamp_max(0)
        scale = torch.where(high > low, (high - low) / 255, torch.ones_like(high))
        zero = (-low / scale).round().clamp(0, 255)
        return quantise(x, scale, zero, (0, 255)), scale, zero

    return run


@_operator("MatMulInteger")
def _matmul_integer(op: Operation) -> Function:
    def run(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
        one = torch.ones((), device=a.device)
        return dequantise(a, one, a_zero, -2) @ dequantise(b, one, b_zero, -1)

    return run


@_operator("ConvInteger")
def _conv_integer(op: Operation) -> Function:
    conv = _conv(op)

    def run(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        one = torch.ones((), device=x.device)
        return conv(dequantise(x, one, x_zero), dequantise(w, one, w_zero, 0))  # type: ignore[no-any-return]

    return run


@_operator("QLinearConv")
def _quantised_conv(op: Operation) -> Function:
    weight = Node("Conv", (op.node.inputs[0], op.node.inputs[3]), ("y",), op.node.attributes, op.opset)
    conv, requantise = _conv(Operation(weight, op.values, op.device)), _requantise(op, 7)

    def run(x: Tensor, xs: Tensor, xz: Tensor, w: Tensor, ws: Tensor, wz: Tensor, s: Tensor, z: Tensor, b: Tensor | None = None) -> Tensor:  # fmt: skip  # noqa: E501
        bias = None if b is None else dequantise(b, xs * ws.reshape(-1), None, 0)
        return requantise(conv(dequantise(x, xs, xz), dequantise(w, ws, wz, 0), bias), s, z)

    return run


@_operator("QLinearMatMul")
def _quantised_matmul(op: Operation) -> Function:
    requantise = _requantise(op, 7)

    def run(
        a: Tensor, as_: Tensor, a0: Tensor, b: Tensor, bs: Tensor, b0: Tensor, s: Tensor, z: Tensor
    ) -> Tensor:
        return requantise(dequantise(a, as_, a0, -2) @ dequantise(b, bs, b0, -1), s, z)

    return run


@_operator("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul")
def _quantised_pair(op: Operation) -> Function:
    function: Function = torch.add if op.node.operator.endswith("Add") else torch.mul
    requantise = _requantise(op, 7)

    def run(a: Tensor, as_: Tensor, a0: Tensor, b: Tensor, bs: Tensor, b0: Tensor, s: Tensor, z: Any = 0.0) -> Tensor:  # fmt: skip  # noqa: E501
        return requantise(function(dequantise(a, as_, a0), dequantise(b, bs, b0)), s, z)

    return run


@_operator(
    "com.microsoft.QLinearSigmoid",
    "com.microsoft.QLinearLeakyRelu",
    "com.microsoft.QLinearGlobalAveragePool",
)
def _quantised_alone(op: Operation) -> Function:
    if op.attribute("channels_last", 0):
        raise Unsupported("channels_last")
    plain = Node(
        op.node.operator.partition(".QLinear")[2], op.node.inputs[:1], ("y",), op.node.attributes, 17
    )
    function, limits = make_function(Operation(plain, op.values, op.device)), _limits(op, 4)
    return lambda x, xs, xz, s, z=0.0: quantise(function(dequantise(x, xs, xz)), s, z, limits)


@_operator("com.microsoft.QLinearConcat")
def _quantised_concat(op: Operation) -> Function:
    axis, limits = op.attribute("axis"), _limits(op, 1)

    def run(s: Tensor, z: Tensor, *inputs: Tensor) -> Tensor:
        triples = zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
        parts = [dequantise(x, scale, zero) for x, scale, zero in triples]
        return quantise(torch.cat(parts, axis), s, z, limits)

    return run


@_operator("com.microsoft.QGemm")
def _quantised_gemm(op: Operation) -> Function:
    gemm, alpha = _gemm(op), op.attribute("alpha", 1.0)
    requantise = _requantise(op, 8)
    axis = 0 if op.attribute("transB", 0) else 1

    def run(a: Tensor, as_: Tensor, a0: Tensor, b: Tensor, bs: Tensor, b0: Tensor, c: Tensor | None = None, s: Tensor | None = None, z: Any = 0.0) -> Tensor:  # fmt: skip  # noqa: E501
        bias = None if c is None else dequantise(c, alpha * as_ * bs.reshape(-1), None, -1)
        y: Tensor = gemm(dequantise(a, as_, a0), dequantise(b, bs, b0, axis), bias)
        return y if s is None else requantise(y, s, z)

    return run
