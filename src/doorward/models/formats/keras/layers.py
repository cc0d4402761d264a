"""Layers of Keras as torch modules.

A value with four axes is (n, h, w, c) in Keras and (n, c, h, w) here; every other value is as Keras has it.
Layers are built while a trial runs through the model, so that each knows the size of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doorward.models.formats.keras.reading import Layer, Weights
from doorward.models.formats.rebuilt import (
    Affine,
    Array,
    Does,
    Unknown,
    Unreadable,
    Window,
    average_pooling,
    convolution,
    fill,
    first,
    in_sequence,
    last,
    linear,
    max_pooling,
    misshapen,
    refuse_large,
)

#: Layers that do nothing once a model is trained.
IDLE = frozenset(
    {
        "ActivityRegularization", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise", "Identity",
        "RandomBrightness", "RandomColorJitter", "RandomContrast", "RandomErasing",
        "RandomFlip", "RandomGrayscale", "RandomHue", "RandomRotation", "RandomSaturation",
        "RandomSharpness", "RandomShear", "RandomTranslation", "RandomZoom", "SpatialDropout1D",
        "SpatialDropout2D",
    }
)  # fmt: skip


class ChannelsLast(nn.Module):
    """A module that works along the last axis, where values have four."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module makes of a value."""
        return first(self.inner(last(x)))


class Slope(nn.Module):
    """A slope below zero for each place, as PReLU has it where axes are not shared."""

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Return a value, with what is below zero times its slope."""
        return x.clamp(min=0) + self.alpha * x.clamp(max=0)


# --- activations -------------------------------------------------------------------------------------------


def activation(config: Any, version: tuple[int, ...]) -> nn.Module | None:
    """Return an activation, None for the linear one.

    Args:
        config: its name, or the layer or function that it was written as.
        version: of Keras; `hard_sigmoid` became another function in Keras 3.

    Raises:
        Unknown: if it is none of Keras' own.
    """
    if isinstance(config, dict):
        inner = config.get("config")
        if isinstance(inner, dict):
            return simple(Layer.of(config), version)
        config = inner
    if config in (None, "linear"):
        return None
    if config == "hard_sigmoid" and version < (3,):
        return Does(lambda x: (0.2 * x + 0.5).clamp(0, 1), "hard_sigmoid of Keras 2")
    made = _ACTIVATIONS.get(config) if isinstance(config, str) else None
    if made is None:
        raise Unknown(f"an activation {config!r}")
    return made()


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over Keras' last axis."""
    return F.softmax(x, dim=1 if x.ndim == 4 else -1)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
    "softmax": partial(Does, softmax, "softmax"),
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "hard_swish": nn.Hardswish,
    "hard_silu": nn.Hardswish,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "exponential": partial(Does, torch.exp, "exponential"),
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "log_softmax": partial(Does, lambda x: F.log_softmax(x, dim=1 if x.ndim == 4 else -1), "log_softmax"),
}


def simple(layer: Layer, version: tuple[int, ...]) -> nn.Module | None:
    """Return a layer that is an activation, None for one that does nothing.

    Raises:
        Unknown: if it is none that is read.
    """
    config = layer.config
    match layer.kind:
        case "Activation":
            return activation(config.get("activation"), version)
        case "ReLU":
            return _relu(config)
        case "LeakyReLU":
            return nn.LeakyReLU(float(config.get("negative_slope", config.get("alpha", 0.3))))
        case "ELU":
            return nn.ELU(float(config.get("alpha", 1.0)))
        case "Softmax":
            if config.get("axis", -1) not in (-1, [-1]):
                raise Unknown("a softmax over another axis than the last")
            return Does(softmax, "softmax")
        case "RandomCrop" if version >= (3,):
            return None
        case kind if kind in IDLE:
            return None
        case kind:
            raise Unknown(f"a layer of the kind {kind!r}")


def _relu(config: Mapping[str, Any]) -> nn.Module:
    most = config.get("max_value")
    slope, least = (config.get(key) or 0 for key in ("negative_slope", "threshold"))
    if least:
        raise Unknown("a ReLU with a threshold")
    if most is None:
        return nn.LeakyReLU(float(slope)) if slope else nn.ReLU()
    if slope:
        raise Unknown("a ReLU with both a slope and a largest value")
    return Does(lambda x: x.clamp(0.0, float(most)), f"between 0 and {most:g}")


# --- layers with weights -----------------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int]:
    both = value if isinstance(value, (list, tuple)) else (value, value)
    a, b = (int(one) for one in both)
    return a, b


def _refuse_channels_first(layer: Layer) -> None:
    if layer.config.get("data_format", "channels_last") not in ("channels_last", None):
        raise Unknown("layers that take channels first")


def _convolution(
    layer: Layer, x: Tensor, kernel: Array, bias: Array | None, *, groups: int, strides: Any = None
) -> nn.Module:
    """Return a convolution.

    Args:
        kernel: (out, in / groups, height, width).
        strides: those of the layer if None.
    """
    config = layer.config
    stride = _pair(config.get("strides", 1) if strides is None else strides)
    window = Window(
        (kernel.shape[2], kernel.shape[3]), stride, dilation=_pair(config.get("dilation_rate", 1))
    ).padded_as(layer.name, config.get("padding", "valid"), x)
    return convolution(layer.name, window, kernel, bias, groups)


def _bias(config: Mapping[str, Any]) -> list[str]:
    return ["bias"] if config.get("use_bias", True) else []


def _kernels(layer: Layer, weights: Weights, *names: str) -> tuple[list[Array], Array | None]:
    """Return the kernels of a convolution, each with four axes, and its bias where it has one."""
    found = weights.of(layer, [*names, *_bias(layer.config)])
    kernels = found[: len(names)]
    if any(kernel.ndim != 4 for kernel in kernels):
        raise misshapen(layer.name)
    return kernels, found[len(names)] if len(found) > len(names) else None


def _conv2d(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    (kernel,), bias = _kernels(layer, weights, "kernel")
    return _convolution(
        layer, x, kernel.transpose(3, 2, 0, 1), bias, groups=int(layer.config.get("groups", 1))
    )


def _depthwise(kernel: Array) -> Array:
    """Return a kernel (h, w, channels, each) as (channels x each, 1, h, w)."""
    return kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])


def _depthwise_conv2d(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    try:
        (kernel,), bias = _kernels(layer, weights, "depthwise_kernel")
    except Unreadable:  # its name since Keras 3
        (kernel,), bias = _kernels(layer, weights, "kernel")
    return _convolution(layer, x, _depthwise(kernel), bias, groups=kernel.shape[2])


def _separable_conv2d(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    (deep, point), bias = _kernels(layer, weights, "depthwise_kernel", "pointwise_kernel")
    depthwise = _convolution(layer, x, _depthwise(deep), None, groups=deep.shape[2])
    single = Layer(layer.kind, layer.name, {}, ())
    return nn.Sequential(
        depthwise, _convolution(single, x, point.transpose(3, 2, 0, 1), bias, groups=1, strides=1)
    )


def _dense(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    kernel, *bias = weights.of(layer, ["kernel", *_bias(layer.config)])
    if kernel.ndim != 2:
        raise misshapen(layer.name)
    made = linear(layer.name, kernel.T, bias[0] if bias else None)
    return ChannelsLast(made) if x.ndim == 4 else made


def _along_channels(layer: Layer, x: Tensor) -> None:
    axis = layer.config.get("axis", -1)
    axes = axis if isinstance(axis, list) else [axis]
    if [one % x.ndim for one in axes] != [x.ndim - 1]:
        raise Unknown(f"{layer.kind} over other axes than the last")


def _batch_normalization(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    config = layer.config
    _along_channels(layer, x)
    names = [name for name, key in (("gamma", "scale"), ("beta", "center")) if config.get(key, True)]
    found = dict(
        zip(
            [*names, "moving_mean", "moving_variance"],
            weights.of(layer, [*names, "moving_mean", "moving_variance"]),
            strict=True,
        )
    )
    kinds: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    if x.ndim not in kinds:
        raise Unknown(f"BatchNormalization of values with {x.ndim} axes")
    made = kinds[x.ndim](
        len(found["moving_mean"]), float(config.get("epsilon", 1e-3)), 1 - float(config.get("momentum", 0.99))
    )
    fill(
        layer.name, made, weight=found.get("gamma"), bias=found.get("beta"),
        running_mean=found["moving_mean"], running_var=found["moving_variance"],
    )  # fmt: skip
    return made


def _layer_normalization(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    config = layer.config
    _along_channels(layer, x)
    names = [name for name, key in (("gamma", "scale"), ("beta", "center")) if config.get(key, True)]
    found = dict(zip(names, weights.of(layer, names), strict=True))
    made = nn.LayerNorm(x.shape[1] if x.ndim == 4 else x.shape[-1], float(config.get("epsilon", 1e-3)))
    fill(layer.name, made, weight=found.get("gamma"), bias=found.get("beta"))
    return ChannelsLast(made)


def _prelu(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    (alpha,) = weights.of(layer, ["alpha"])
    return Slope(first(torch.from_numpy(alpha)[None])[0])


def _normalization(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    _along_channels(layer, x)
    given = [layer.config.get(key) for key in ("mean", "variance")]
    mean, variance = (
        weights.of(layer, ["mean", "variance"])
        if None in given
        else [np.asarray(one, dtype=np.float32) for one in given]
    )
    shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
    scale = 1 / torch.from_numpy(np.maximum(np.sqrt(variance), 1e-7)).reshape(shape)
    return Affine(scale, -torch.from_numpy(mean).reshape(shape) * scale)


def _rescaling(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    parts = []
    for name, default in (("scale", 1.0), ("offset", 0.0)):
        value = torch.tensor(layer.config.get(name, default), dtype=torch.float32)
        parts.append(value.reshape(-1, 1, 1) if value.ndim and x.ndim == 4 else value)
    return Affine(*parts)


# --- layers without weights --------------------------------------------------------------------------------


def _pooling(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    config = layer.config
    size = _pair(config.get("pool_size", 2))
    window = Window(size, _pair(config.get("strides") or size)).padded_as(
        layer.name, config.get("padding", "valid"), x
    )
    return max_pooling(window) if layer.kind == "MaxPooling2D" else average_pooling(window, x)


def _global_pooling(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    keep = bool(layer.config.get("keepdims", False))
    if layer.kind == "GlobalMaxPooling2D":
        return Does(lambda x: x.amax((2, 3), keepdim=keep), "largest of each channel")
    return nn.AdaptiveAvgPool2d(1) if keep else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _flatten(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    return Does(lambda x: last(x).flatten(1), "flatten")


def _reshape(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    shape = [int(one) for one in layer.config["target_shape"]]
    return Does(lambda x: first(last(x).reshape(len(x), *shape)), f"reshape to {shape}")


def _permute(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    order = (0, *(int(one) for one in layer.config["dims"]))
    return Does(lambda x: first(last(x).permute(order)), f"permute to {order}")


def _edges(value: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what is added or cut above and below, and left and right."""
    rows, columns = value if isinstance(value, (list, tuple)) else (value, value)
    return _pair(rows), _pair(columns)


def _zero_padding(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    rows, columns = _edges(layer.config.get("padding", 1))
    refuse_large(layer.name, *x.shape[:2], x.shape[2] + sum(rows), x.shape[3] + sum(columns))
    return nn.ZeroPad2d((*columns, *rows))


def _cropping(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    rows, columns = _edges(layer.config.get("cropping", 0))
    return nn.ZeroPad2d((-columns[0], -columns[1], -rows[0], -rows[1]))


def _center_crop(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    spare = [x.shape[2 + axis] - int(layer.config[key]) for axis, key in enumerate(("height", "width"))]
    if min(spare) < 0:
        raise Unknown("a crop that is larger than its image")
    top, left = (one // 2 for one in spare)
    return nn.ZeroPad2d((-left, left - spare[1], -top, top - spare[0]))


def _resized(layer: Layer, x: Tensor, size: tuple[int, int]) -> nn.Module:
    refuse_large(layer.name, *x.shape[:2], *size)
    mode = layer.config.get("interpolation", "bilinear")
    if mode not in ("bilinear", "nearest"):
        raise Unknown(f"resizing by {mode!r}")
    corners = False if mode == "bilinear" else None
    mode = "nearest-exact" if mode == "nearest" else mode  # from the middle of pixels, as Keras does
    return Does(
        lambda x: F.interpolate(x, size, mode=mode, align_corners=corners), f"resize to {size} by {mode}"
    )


def _resizing(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    if any(layer.config.get(key) for key in ("crop_to_aspect_ratio", "pad_to_aspect_ratio", "antialias")):
        raise Unknown("resizing that crops, pads or smooths")
    return _resized(layer, x, (int(layer.config["height"]), int(layer.config["width"])))


def _up_sampling(layer: Layer, weights: Weights, x: Tensor) -> nn.Module:
    factors = _pair(layer.config.get("size", 2))
    own = Layer(layer.kind, layer.name, {"interpolation": "nearest"} | dict(layer.config), ())
    return _resized(own, x, (x.shape[2] * factors[0], x.shape[3] * factors[1]))


# --- layers that join values -------------------------------------------------------------------------------


def _joined(combine: Callable[[Sequence[Tensor]], Tensor], does: str) -> nn.Module:
    """Return a layer that joins values of one shape, or of shapes that spread over each other."""

    def join(*values: Tensor) -> Tensor:
        most = max(value.ndim for value in values)
        whole = [last(value) for value in values]
        # a value with fewer axes has those between its first and its second missing
        spread = [
            one.reshape(len(one), *[1] * (most - one.ndim), *one.shape[1:]) if one.ndim < most else one
            for one in whole
        ]
        return combine([first(one) for one in spread])

    return Does(join, does)


def _reduced(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    def reduce(values: Sequence[Tensor]) -> Tensor:
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result

    return reduce


_JOINS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "Add": _reduced(torch.add),
    "Subtract": _reduced(torch.sub),
    "Multiply": _reduced(torch.mul),
    "Maximum": _reduced(torch.maximum),
    "Minimum": _reduced(torch.minimum),
    "Average": lambda values: _reduced(torch.add)(values) / len(values),
}


def _join(layer: Layer, weights: Weights, *values: Tensor) -> nn.Module:
    if len(values) < 2:  # an operation of the same name, as an HDF5 file has it
        raise Unknown(f"an operation {layer.kind!r}")
    return _joined(_JOINS[layer.kind], layer.kind.lower())


def _concatenate(layer: Layer, weights: Weights, *values: Tensor) -> nn.Module:
    axis = int(layer.config.get("axis", -1))
    dims = values[0].ndim
    held = {0: 0, 1: 2, 2: 3, 3: 1}[axis % 4] if dims == 4 else axis
    refuse_large(layer.name, sum(value.numel() for value in values))
    if held == 0:
        raise Unknown("a concatenation of images with each other")
    return Does(lambda *values: torch.cat(values, held), f"concatenate along {axis}")


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "AveragePooling2D": _pooling,
    "BatchNormalization": _batch_normalization,
    "BatchNormalizationV1": _batch_normalization,
    "BatchNormalizationV2": _batch_normalization,
    "CenterCrop": _center_crop,
    "Concatenate": _concatenate,
    "Conv2D": _conv2d,
    "Cropping2D": _cropping,
    "Dense": _dense,
    "DepthwiseConv2D": _depthwise_conv2d,
    "Flatten": _flatten,
    "GlobalAveragePooling2D": _global_pooling,
    "GlobalMaxPooling2D": _global_pooling,
    "LayerNormalization": _layer_normalization,
    "MaxPooling2D": _pooling,
    "Normalization": _normalization,
    "PReLU": _prelu,
    "Permute": _permute,
    "Rescaling": _rescaling,
    "Reshape": _reshape,
    "Resizing": _resizing,
    "SeparableConv2D": _separable_conv2d,
    "SyncBatchNormalization": _batch_normalization,
    "UpSampling2D": _up_sampling,
    "ZeroPadding2D": _zero_padding,
    **dict.fromkeys(_JOINS, _join),
}


def numbers_of(layer: Layer) -> str:
    """Return the type of numbers that a layer computes with, as 'float32' or 'mixed_float16'."""
    policy: Any = layer.config.get("dtype") or "float32"
    if isinstance(policy, dict):  # a policy without a name is one of quantised numbers
        policy = policy.get("config", {}).get("name") or policy.get("class_name")
    return str(policy)


def refuse_other_numbers(layer: Layer) -> None:
    """Raise where a layer computes with whole numbers, or with quantised ones.

    Raises:
        Unknown: if so.
    """
    numbers = numbers_of(layer)
    if "float" not in numbers or "float8" in numbers or "Policy" in numbers:
        raise Unknown(f"numbers of the type {numbers!r}")


def build(layer: Layer, weights: Weights, version: tuple[int, ...], values: Sequence[Tensor]) -> nn.Module:
    """Return a layer as a torch module, with its weights.

    Args:
        version: of Keras.
        values: what it is given in the trial.

    Raises:
        Unknown: if it is of a kind that is not read, or has a setting that is not.
        Unreadable: if its settings and weights do not fit.
    """
    refuse_other_numbers(layer)
    for name in ("rms_scaling", "invert", "quantization_config"):
        if layer.config.get(name):
            raise Unknown(f"a layer of the kind {layer.kind!r} with {name}")
    if layer.kind not in _BUILDERS:
        return simple(layer, version) or nn.Identity()
    _refuse_channels_first(layer)
    return in_sequence(
        _BUILDERS[layer.kind](layer, weights, *values), activation(layer.config.get("activation"), version)
    )


def constant_operation(kind: str, other: float | None, *, reverse: bool = False) -> nn.Module | None:
    """Return an arithmetic operation that was written into a model, None if it is none that is read.

    Args:
        kind: its name in Keras 3 ('TrueDivide') or in TensorFlow ('math.truediv').
        other: the number that it takes with a value; None if it takes two values.
        reverse: whether the number comes first, as in 1 - x.
    """
    function = _OPERATIONS.get(kind)
    if function is None:
        return None
    if other is None:
        return Does(function, kind)
    if reverse:
        return Does(lambda x: function(torch.full_like(x, other), x), kind)
    return Does(lambda x: function(x, other), kind)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "ops.TrueDivide": torch.true_divide,
    "ops.Subtract": torch.sub,
    "ops.Multiply": torch.mul,
    "ops.Add": torch.add,
    "math.truediv": torch.true_divide,
    "math.subtract": torch.sub,
    "math.multiply": torch.mul,
    "math.add": torch.add,
    "__operators__.add": torch.add,
}
