"""Models that are read as data, and rebuilt of torch layers: what the readers of Keras and TFLite share.

A value with four axes is (n, h, w, c) in TensorFlow, and (n, c, h, w) where torch convolves.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.core.files import open_regular
from doorward.models.classifier import Classifier
from doorward.models.errors import NotExamined
from doorward.models.formats.companions import read_companions, without_facts
from doorward.models.formats.input_options import LoadOptions, first_line, read_sidecar, resolve_spec
from doorward.models.formats.other_formats import OtherFormat
from doorward.models.formats.wrapping import finish, name_classes
from doorward.models.spec import InputSpec, Layout

Array = npt.NDArray[np.float32]
#: Rows or columns added before a value, and after it.
Edges = tuple[int, int]
#: Bytes of a file beyond which a model is refused, and numbers in one value.
MOST_BYTES, MOST_ELEMENTS = 1 << 32, 1 << 28


class Unknown(Exception):  # noqa: N818 - told as NotExamined
    """Tells of a layer, or a setting of one, that is not read."""


class NoImages(Exception):  # noqa: N818 - told as NotExamined
    """Names the input of a model that takes something else than images."""


class Unreadable(Exception):  # noqa: N818 - told as NotExamined
    """Tells why a file cannot be read."""


# --- files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A network.

    Attributes:
        batch: how many images it takes at a time (None: any number).
        notes: what a report has to tell.
    """

    module: nn.Module
    batch: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a file says of its model.

    Attributes:
        facts: fields of an input spec that the file fixes.
        build: makes the network for images as the spec has them.
        architecture: its name, None if it has none.
        stated: fields of an input spec that the file suggests.
        labels: class names, None if it has none.
    """

    facts: Mapping[str, Any]
    build: Callable[[InputSpec], Built]
    architecture: str | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None


def open_rebuilt(
    path: Path, options: LoadOptions, kind: OtherFormat, name: str, describe: Callable[[Path], Description]
) -> Classifier:
    """Open a file that is read as data.

    Args:
        kind: the format, and what a file of it can be converted to.
        name: the format's name in reports.
        describe: reads the file.

    Raises:
        NotExamined: if it cannot be read, or holds a layer or an input that is not read.
        InputError: if what was stated does not fit it.
    """
    sidecar, companions = read_sidecar(path), read_companions(path)
    try:
        read = describe(path)
        stated = [options.statement(), sidecar.input, without_facts(companions.input, read.facts)]
        normalised = any(name in one for one in stated for name in ("range", "mean", "std"))
        spec = resolve_spec(path, read.facts, *stated, {} if normalised else read.stated)
        built = read.build(spec)
    except (InputError, OSError):
        raise
    except NoImages as error:
        raise NotExamined(
            f"{path}: only its files were examined, since it is {kind.kind} with {error}, and images have a "
            "height, a width and channels"
        ) from error
    except Unknown as error:
        raise NotExamined(kind.described(path, f" with {error}, which is not read")) from error
    except Unreadable as error:
        raise NotExamined(kind.described(path, f" that cannot be read: {error}")) from error
    except Exception as error:  # whatever a damaged file raises in a reader of others, or its settings here
        damaged = (
            f" that cannot be read, and may be cut or damaged ({first_line(error)}): fetch it again first"
        )
        raise NotExamined(kind.described(path, damaged)) from error
    labels = options.labels or sidecar.classes or companions.classes
    classifier = finish(
        path, built.module, spec, labels, features=options.features, format=name,
        architecture=read.architecture, batch=built.batch,
    )  # fmt: skip
    if labels is None:
        name_classes(classifier, read.labels)
    classifier.notes = (*companions.notes, *built.notes, *classifier.notes)
    return classifier


def require(package: str, extra: str) -> None:
    """Raise where a package is not installed.

    Raises:
        Unreadable: naming the extra that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise Unreadable(f"that needs the package {package!r}: pip install 'doorward[{extra}]'")


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        Unreadable: if that is too much.
    """
    with open_regular(path) as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Unreadable("it is too large")
    return content


def image_facts(shape: Sequence[int | None] | None, layout: Layout = "NHWC") -> dict[str, Any]:
    """Return what an input of this shape says of its images; None stands for any size.

    Raises:
        NoImages: if it is none of images.
    """
    if shape is None or len(shape) != 4:
        told = "no stated size" if shape is None else f"the size ({', '.join(map(_size, shape))})"
        raise NoImages(f"an input of {told}")
    axes = ("height", "width", "channels") if layout == "NHWC" else ("channels", "height", "width")
    facts = {"layout": layout, **dict(zip(axes, shape[1:], strict=True))}
    return {name: value for name, value in facts.items() if value is not None}


def _size(one: int | None) -> str:
    return "any" if one is None else str(one)


# --- modules -----------------------------------------------------------------------------------------------


def last(x: Tensor) -> Tensor:
    """Return a value as TensorFlow has it, with channels last."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def first(x: Tensor) -> Tensor:
    """Return a value of TensorFlow with channels first."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


class Does(nn.Module):
    """A function as a module.

    Args:
        function: takes values, and gives one or several.
        does: what it is called when the network is shown.
        constants: further values that it takes, by their position.
    """

    def __init__(
        self, function: Callable[..., Any], does: str, constants: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.function, self.does = function, does
        self._places = sorted(constants or {})
        for place in self._places:
            self.register_buffer(f"constant_{place}", (constants or {})[place])

    def forward(self, *values: Tensor) -> Any:
        """Return what the function makes of values."""
        given = list(values)
        for place in self._places:
            given.insert(place, getattr(self, f"constant_{place}"))
        return self.function(*given)

    def extra_repr(self) -> str:
        """Return what it does."""
        return self.does


class Affine(nn.Module):
    """Values times one number, plus another; each is one for all, or one for each channel."""

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Return scaled and shifted values."""
        return x * self.scale + self.offset


class LayerGraph(nn.Module):
    """Layers that are called one after the other, in an order that serves each with its values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self._steps: list[tuple[str, tuple[Hashable, ...], tuple[Hashable, ...]]] = []
        self._inputs: tuple[Hashable, ...] = ()
        self._outputs: tuple[Hashable, ...] = ()
        self._dead: list[tuple[Hashable, ...]] = []

    def call(self, layer: str, takes: Sequence[Hashable], gives: Sequence[Hashable]) -> None:
        """Add a call of a layer, with the names of what it takes and gives."""
        self._steps.append((layer, tuple(takes), tuple(gives)))

    def settle(self, inputs: Sequence[Hashable], outputs: Sequence[Hashable]) -> None:
        """Say what goes in and what comes out, once all calls are there."""
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._dead = last_uses([takes for _, takes, _ in self._steps], outputs)

    def forward(self, *values: Tensor) -> Any:
        """Return the output, or a tuple of several."""
        held = dict(zip(self._inputs, values, strict=True))
        for (layer, takes, gives), dead in zip(self._steps, self._dead, strict=True):
            made = self.layers[layer](*(held[key] for key in takes))
            for key in dead:
                del held[key]
            held |= zip(gives, made if isinstance(made, tuple) else (made,), strict=True)
        made = tuple(held[key] for key in self._outputs)
        return made[0] if len(made) == 1 else made


def last_uses(takes: Sequence[Sequence[Hashable]], kept: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    """Return for each step the values that no later one takes.

    >>> last_uses([("a",), ("a", "b")], ["b"])
    [(), ('a',)]
    """
    seen, dead = set(kept), []
    for taken in reversed(takes):
        dead.append(tuple(key for key in dict.fromkeys(taken) if key not in seen))
        seen |= set(taken)
    return dead[::-1]


def refuse_large(name: str, *shape: int) -> None:
    """Raise where a value would be too large.

    Args:
        name: of the layer that makes it.

    Raises:
        Unreadable: if so.
    """
    if math.prod(shape) > MOST_ELEMENTS:
        raise Unreadable(f"its layer {name!r} makes values that are too large")


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> Edges:
    """Return how many rows or columns TensorFlow adds before and after for 'same'.

    >>> same_padding(32, 3, 1), same_padding(32, 3, 2)
    ((1, 1), (0, 1))
    """
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class Window:
    """What a kernel slides over.

    Attributes:
        size: (height, width) of the kernel.
        stride, dilation: of rows and of columns.
        rows, columns: what is added above and below, and left and right.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    rows: Edges = (0, 0)
    columns: Edges = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def padded_as(self, name: str, padding: str, x: Tensor) -> Window:
        """Return the window with the padding that a value (n, c, h, w) gets.

        Raises:
            Unknown: if that is neither 'same' nor 'valid'.
            Unreadable: if the value would be too large.
        """
        if min(*self.size, *self.stride, *self.dilation) < 1:
            raise Unreadable(f"its layer {name!r} has a window or a step of no size")
        if padding == "valid":
            return self
        if padding != "same":
            raise Unknown(f"padding {padding!r}")
        rows, columns = (
            same_padding(x.shape[2 + axis], self.size[axis], self.stride[axis], self.dilation[axis])
            for axis in range(2)
        )
        refuse_large(name, *x.shape[:2], x.shape[2] + sum(rows), x.shape[3] + sum(columns))
        return Window(self.size, self.stride, rows, columns, self.dilation)

    @property
    def even(self) -> bool:
        """Return whether as much is added before as after."""
        return self.rows[0] == self.rows[1] and self.columns[0] == self.columns[1]

    @property
    def edge(self) -> tuple[int, int] | int:
        """Return the padding that a layer of torch can do itself."""
        return (self.rows[0], self.columns[0]) if self.even else 0

    def after_padding(self, module: nn.Module, fill: float = 0.0) -> nn.Module:
        """Return the module behind the padding that it cannot do itself."""
        if self.even:
            return module
        return nn.Sequential(nn.ConstantPad2d((*self.columns, *self.rows), fill), module)


def convolution(name: str, window: Window, kernel: Array, bias: Array | None, groups: int) -> nn.Module:
    """Return a convolution of values (n, c, h, w).

    Args:
        kernel: (out, in / groups, height, width).

    Raises:
        Unreadable: if the weights do not fit.
    """
    made = nn.Conv2d(
        kernel.shape[1] * groups, len(kernel), window.size, window.stride, window.edge, window.dilation,
        groups, bias=bias is not None,
    )  # fmt: skip
    fill(name, made, weight=kernel, bias=bias)
    return window.after_padding(made)


def linear(name: str, kernel: Array, bias: Array | None) -> nn.Linear:
    """Return a linear layer.

    Args:
        kernel: (out, in).

    Raises:
        Unreadable: if the weights do not fit.
    """
    made = nn.Linear(kernel.shape[1], kernel.shape[0], bias=bias is not None)
    fill(name, made, weight=kernel, bias=bias)
    return made


def fill(layer: str, module: nn.Module, **weights: Array | None) -> None:
    """Put weights into a module.

    Raises:
        Unreadable: if they are of another shape.
    """
    with torch.no_grad():
        for name, values in weights.items():
            if values is None:
                continue
            own = getattr(module, name)
            if own.shape != values.shape:
                raise misshapen(layer)
            own.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def misshapen(layer: str) -> Unreadable:
    """Return what tells of weights that do not fit their layer."""
    return Unreadable(f"weights of its layer {layer!r} are of another shape than its settings")


def max_pooling(window: Window) -> nn.Module:
    """Return a module that takes the largest of each window of values (n, c, h, w)."""
    return window.after_padding(nn.MaxPool2d(window.size, window.stride, window.edge), -math.inf)


def average_pooling(window: Window, x: Tensor) -> nn.Module:
    """Return a module that takes the mean of each window, without what padding added.

    Args:
        x: a value (n, c, h, w) that it is given.
    """
    if window.even:
        return nn.AvgPool2d(window.size, window.stride, window.edge, count_include_pad=False)
    ones = F.pad(torch.ones((1, 1, *x.shape[2:])), (*window.columns, *window.rows))
    share = F.avg_pool2d(ones, window.size, window.stride)
    pooled = window.after_padding(nn.AvgPool2d(window.size, window.stride))
    return nn.Sequential(pooled, Affine(1 / share, torch.tensor(0.0)))


def in_sequence(*modules: nn.Module | None) -> nn.Module:
    """Return modules one after the other, without the absent ones."""
    there = [one for one in modules if one is not None]
    return there[0] if len(there) == 1 else nn.Sequential(*there)


def unused_name(name: str, taken: nn.Module) -> str:
    """Return a name that a module can have among others."""
    plain = name.replace(".", "_").replace("/", "_") or "layer"
    while plain in taken._modules or hasattr(taken, plain):
        plain += "_"
    return plain
