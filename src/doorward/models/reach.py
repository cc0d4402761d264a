"""Which parts of the image each value of a network can depend on, as its graph says.

The network runs once for each cell of a grid over the image, on ones where values depend on the cell and
zeros elsewhere: every operator is replaced by one that says which of its results depend on which of its
arguments. Weights of zero carry nothing. What is not known better depends on all that its arguments do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from doorward.core.budget import Deadline
from doorward.models.tape import Ref, Size, Spread, Step, Tape, as_call, materialised

#: Weights below this share of the largest carry nothing.
NEGLIGIBLE = 1e-6
#: Share of a layer's weights that may carry nothing for it to count as one in which all are read.
SPARSE = 1e-3
#: Numbers in a value that are held for one group of cells, at most.
MOST_HELD = 1 << 24
#: Values of so many elements for each image are kept element by element.
KEPT = 8192

#: Operators that move elements and change none.
MOVING = {
    "_reshape_alias", "_reshape_copy", "_unsafe_view", "alias", "as_strided", "cat", "channel_shuffle",
    "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "diagonal", "expand", "expand_copy", "flip",
    "im2col", "lift_fresh", "movedim", "narrow", "permute", "permute_copy", "pixel_shuffle",
    "pixel_unshuffle", "reflection_pad2d", "repeat", "replication_pad2d", "reshape", "roll", "select",
    "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unfold",
    "unsafe_split", "unsqueeze", "view", "view_copy", "_conj", "unflatten", "swapaxes", "concat",
    "index_select", "gather", "index",
}  # fmt: skip
#: Operators whose results each depend on the elements in the same place.
POINTWISE = {
    "_to_copy", "abs", "acos", "add", "asin", "atan", "atan2", "bitwise_and", "bitwise_left_shift",
    "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "ceil", "celu", "clamp", "clamp_max",
    "clamp_min", "copy", "cos", "cosh", "div", "elu", "eq", "erf", "erfc", "exp", "exp2", "expm1",
    "fake_quantize_per_tensor_affine_cachemask", "floor", "floor_divide", "fmod", "frac", "ge", "gelu", "gt",
    "hardsigmoid", "hardswish", "hardtanh", "isfinite", "isinf", "isnan", "le", "leaky_relu", "lerp", "log",
    "log10", "log1p", "log2", "log_sigmoid_forward", "logical_and", "logical_not", "logical_or",
    "logical_xor", "lt", "masked_fill", "maximum", "minimum", "mish", "mul", "nan_to_num", "ne", "neg",
    "pow", "prelu", "_prelu_kernel", "reciprocal", "relu", "relu6", "remainder", "round", "rrelu", "rsqrt",
    "rsub", "selu", "sgn", "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "softshrink", "sqrt",
    "square", "sub", "tan", "tanh", "threshold", "to", "trunc", "where", "xlogy", "addcmul", "addcdiv",
    "native_dropout", "special_expit", "fill", "bitwise_count", "heaviside", "signbit",
}  # fmt: skip
#: Operators that make one element of many along axes, which their argument `dim` names.
REDUCING = {
    "all", "amax", "amin", "any", "argmax", "argmin", "linalg_vector_norm", "logsumexp", "max", "mean",
    "median", "min", "norm", "prod", "std", "sum", "var", "std_mean", "var_mean", "count_nonzero",
    "nansum", "aminmax", "mode",
}  # fmt: skip
#: Operators whose results depend on all elements along an axis.
_ALONG = {
    "_log_softmax", "_softmax", "_safe_softmax", "cumsum", "cumprod", "log_softmax", "softmax", "sort",
    "topk", "cummax", "cummin", "argsort",
}  # fmt: skip
_POOLING = {"avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices"}
_RESIZING = {"upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
             "_upsample_bicubic2d_aa"}  # fmt: skip


class _Everything:
    """Stands for a value of which each element depends on each cell."""


EVERYTHING = _Everything()
_Mark = Any  # a tensor of 0 and 1, or EVERYTHING


@dataclass
class Reach:
    """What the values of a network can depend on.

    Attributes:
        grid: cells down and across.
        cells: (cells,) which a value depends on, by its number.
        elements: (cells, elements) the same for each element of a value that is small enough.
    """

    grid: tuple[int, int]
    cells: dict[int, Tensor] = field(default_factory=dict)
    elements: dict[int, Tensor] = field(default_factory=dict)

    def share(self, number: int, of: int) -> float:
        """Return how many cells a value depends on, as a share of those that another does."""
        own, all_of = self.cells[number], self.cells[of]
        return float(own.sum()) / max(float(all_of.sum()), 1.0)

    def mask(self, number: int, height: int, width: int, element: int | None = None) -> Tensor:
        """Return the pixels (h, w), as 0 and 1, of the cells that a value or an element depends on."""
        cells = self.cells[number]
        if element is not None and number in self.elements:
            cells = self.elements[number][:, element]
        rows, columns = _bounds(height, self.grid[0]), _bounds(width, self.grid[1])
        mask = torch.zeros(height, width)
        for cell in cells.nonzero().flatten().tolist():
            r, c = divmod(cell, self.grid[1])
            mask[rows[r] : rows[r + 1], columns[c] : columns[c + 1]] = 1
        return mask


def _bounds(size: int, parts: int) -> list[int]:
    return [round(i * size / parts) for i in range(parts + 1)]


def cell_pictures(height: int, width: int, grid: tuple[int, int]) -> Tensor:
    """Return pictures (cells, h, w), each with ones in one cell of a grid."""
    rows, columns = _bounds(height, grid[0]), _bounds(width, grid[1])
    pictures = torch.zeros(grid[0] * grid[1], height, width)
    for cell, picture in enumerate(pictures):
        r, c = divmod(cell, grid[1])
        picture[rows[r] : rows[r + 1], columns[c] : columns[c + 1]] = 1
    return pictures


def find_reach(tape: Tape, shape: tuple[int, ...], layout: str, grid: tuple[int, int], deadline: Deadline
               ) -> Reach:  # fmt: skip
    """Return what each value of a network can depend on.

    Args:
        shape: (c, h, w) of the image.
        layout: of what the network takes, NCHW or NHWC.
        deadline: after which the cells that are left count as read by everything.
    """
    c, h, w = shape
    pictures = cell_pictures(h, w, grid)[:, None].expand(-1, c, -1, -1)
    pictures = pictures.permute(0, 2, 3, 1) if layout == "NHWC" else pictures
    reach = Reach(grid)
    largest = max(_per_image(tape.shapes[number]) for number in tape.derived)
    size = tape.images or int(min(max(1, MOST_HELD // largest), 64))
    for chunk in torch.split(pictures, size):
        short = size - len(chunk) if tape.images else 0
        filled = torch.cat([chunk, chunk[-1:].expand(short, *chunk.shape[1:])]) if short else chunk
        if deadline.left() <= 0:
            marks: dict[int, _Mark] = {}
        else:
            with torch.no_grad():
                marks = _marked(tape, filled.contiguous(), len(chunk))
        _collect(tape, reach, marks, len(chunk))
    return reach


def _per_image(shape: tuple[int, ...]) -> int:
    size = 1
    for one in shape[1:]:
        size *= one
    return size


def _collect(tape: Tape, reach: Reach, marks: Mapping[int, _Mark], count: int) -> None:
    for number in tape.derived:
        shape = tape.shapes[number]
        mark = marks.get(number, EVERYTHING)
        per_image = len(shape) > 0 and isinstance(mark, Tensor) and mark.ndim > 0 and len(mark) >= count
        if mark is EVERYTHING or not per_image:
            read = torch.ones(count, dtype=torch.bool)
        else:
            read = (
                mark[:count].reshape(count, -1).amax(1) > 0
                if mark[:count].numel()
                else torch.zeros(count) > 0
            )
        before = reach.cells.get(number)
        reach.cells[number] = read if before is None else torch.cat([before, read])
        if len(shape) < 2 or not 0 < _per_image(shape) <= KEPT:
            continue
        known = isinstance(mark, Tensor) and per_image
        rows = mark[:count].reshape(count, -1) > 0 if known else torch.ones(count, _per_image(shape)) > 0
        earlier = reach.elements.get(number)
        if earlier is None:
            reach.elements[number] = rows
        elif earlier.shape[1] == rows.shape[1]:
            reach.elements[number] = torch.cat([earlier, rows])


def _marked(tape: Tape, x: Tensor, count: int) -> dict[int, _Mark]:
    """Return which elements of each value depend on which cell, for pictures x of one cell each."""
    marks: dict[int, _Mark] = {0: x}
    values: dict[int, Any] = {}
    kept: dict[int, _Mark] = {0: x}
    last = {number: i for i, step in enumerate(tape.steps) for number in step.reads}
    n = len(x)
    for i, step in enumerate(tape.steps):
        if not step.derived:
            # what is made of an image's shape alone reads the image, and none of its values
            blank = {one: torch.zeros(_shape(tape, one, n)) for one in step.reads if one not in values}
            args, kwargs = materialised((step.args, step.kwargs), values | blank, n)
            made = step.call(*args, **kwargs)
            made = made if isinstance(made, tuple | list) else (made,)
            values |= {
                number: value for number, value in zip(step.outputs, made, strict=False) if number is not None
            }
            continue
        shapes = [_shape(tape, number, n) for number in step.outputs]
        made_marks = _mark_step(tape, step, marks, values, shapes, n)
        for number, mark in zip(step.outputs, made_marks, strict=False):
            if number is None:
                continue
            marks[number] = _settled(mark)
            kept[number] = _summary(marks[number], tape.shapes[number], count)
        for number in step.reads:
            if last.get(number) == i:
                marks.pop(number, None)
    return kept


def _settled(mark: _Mark) -> _Mark:
    if mark is EVERYTHING:
        return mark
    settled = (mark != 0).float()
    return EVERYTHING if settled.numel() and bool(settled.all()) else settled


def _summary(mark: _Mark, shape: tuple[int, ...], count: int) -> _Mark:
    """Return what is kept of a mark: all of it where it is small, else which cells are in it at all."""
    if mark is EVERYTHING or _per_image(shape) <= KEPT or not mark.numel() or len(mark) < count:
        return mark
    return mark.reshape(len(mark), -1).amax(1, keepdim=True)


def _shape(tape: Tape, number: int | None, n: int) -> tuple[int, ...]:
    if number is None:
        return ()
    first, images = tape.shapes[number], tape.shapes[0][0]
    return (first[0] // images * n, *first[1:]) if first and first[0] % images == 0 else first


def _mark_step(
    tape: Tape, step: Step, marks: Mapping[int, _Mark], values: Mapping[int, Any], shapes: list[Any], n: int
) -> list[_Mark]:
    """Return the marks of what a step makes."""
    leaves = tree_flatten((step.args, step.kwargs))[0]
    own = [marks.get(one.value) for one in leaves if isinstance(one, Ref) and one.value in tape.derived]
    if any(one is EVERYTHING for one in own):
        cut = step.name in {"slice", "select", "index", "gather", "index_select", "unbind", "split"}
        joined = step.name in {"cat", "stack", "where"} and not all(one is EVERYTHING for one in own)
        if cut or not (joined or _drops(step)):
            return [EVERYTHING] * len(step.outputs)

    def get(one: Any) -> Any:
        if not isinstance(one, Ref):
            return one
        if one.value not in tape.derived:
            return _Constant(values[one.value])
        mark = marks[one.value]
        return torch.ones(_shape(tape, one.value, n)) if mark is EVERYTHING else mark

    args = tree_map(get, _sized(step.args, n), is_leaf=lambda one: isinstance(one, Ref))
    kwargs = tree_map(get, _sized(step.kwargs, n), is_leaf=lambda one: isinstance(one, Ref))
    try:
        made = _apply(step, args, kwargs, shapes)
    except Exception:  # an operator with arguments of another kind: all that it reads may matter
        made = None
    if made is None:
        made = [_mixed(own, shape, n) for shape in shapes]
    return [
        mark if number is None or mark is EVERYTHING or tuple(mark.shape) == shape else EVERYTHING
        for mark, shape, number in zip(made, shapes, step.outputs, strict=False)
    ]


def _drops(step: Step) -> bool:
    """Return whether weights of zero keep some of what a product makes from depending on anything."""
    weights = [one for one in tree_flatten((step.args, step.kwargs))[0] if isinstance(one, Tensor)]
    products = {"addmm", "linear", "mm", "mul"}
    return step.name in products and any(
        one.numel() > 1 and float(_weights(_Constant(one)).mean()) < 0.9 for one in weights if one.ndim
    )


@dataclass
class _Constant:
    """A value that no image has a part in."""

    value: Any


def _sized(value: Any, n: int) -> Any:
    def fill(one: Any) -> Any:
        if isinstance(one, Spread):
            return one.rows(n)
        return one.slope * n + one.offset if isinstance(one, Size) else one

    return tree_map(fill, value, is_leaf=lambda one: isinstance(one, Size | Ref | Spread))


def _mixed(marks: list[_Mark], shape: tuple[int, ...], n: int) -> _Mark:
    """Return the mark of a value that depends, image by image, on all that is marked."""
    if not shape or shape[0] % n:
        return EVERYTHING
    read = torch.zeros(n)
    for mark in marks:
        if not isinstance(mark, Tensor) or not mark.ndim or len(mark) % n:
            return EVERYTHING
        read = torch.maximum(read, mark.reshape(n, -1).amax(1))
    return read.repeat_interleave(shape[0] // n).view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def _is_mark(value: Any) -> bool:
    return isinstance(value, Tensor)


def _weights(value: Any) -> Tensor:
    """Return which weights carry something, as 0 and 1."""
    tensor = value.value if isinstance(value, _Constant) else value
    size: Tensor = tensor.detach().abs().float()
    return (size > NEGLIGIBLE * size.amax()).float() if size.numel() else size


def _apply(step: Step, args: Any, kwargs: Any, shapes: list[Any]) -> list[_Mark] | None:
    """Return the marks of what a step makes, None if its operator is not known."""
    name, shape = step.name, shapes[0]
    # constants of the network's own stand in the arguments as tensors: step.args tells which
    args = _told_apart(step.args, args)
    kwargs = dict(zip(kwargs, _told_apart(tuple(step.kwargs.values()), tuple(kwargs.values())), strict=True))
    first: Any = args[0] if args else None
    if name in MOVING and name not in {"index", "gather", "index_select"}:
        made = as_call(step)(*_bare(args), **_bare(kwargs))
        return list(made) if isinstance(made, tuple | list) else [made]
    if name in {"index", "gather", "index_select"}:
        return _indexed(step, args, shape)
    if name in {"mul", "div"} and len(args) > 1:
        return [_product(args[0], args[1], shape)]
    if name in POINTWISE:
        return [_sum_of([*args, *kwargs.values()], shape)] * len(shapes)
    if name in REDUCING:
        return _reduced(first, args, kwargs, shapes)
    if name in _ALONG:
        axis = kwargs.get("dim", next((one for one in args[1:] if isinstance(one, int)), -1))
        if name == "topk":
            axis = args[2] if len(args) > 2 else -1
        return [first.amax(axis, keepdim=True).expand(each).clone() for each in shapes]
    return _layer(name, step, args, kwargs, shapes)


def _layer(name: str, step: Step, args: Any, kwargs: Any, shapes: list[Any]) -> list[_Mark] | None:
    """Return the marks of what a layer with weights, a norm, a pooling or a matrix product makes."""
    first: Any = args[0] if args else None
    if name == "convolution" and _is_mark(first) and not _is_mark(args[1]):
        return [_convolved(step, first, _weights(args[1]), args[3:], shapes[0])]
    if name in {"addmm", "baddbmm"}:
        return [_matrix(args[1], args[2])]
    if name in {"mm", "bmm", "matmul"}:
        return [_matrix(args[0], args[1])]
    if name == "linear":
        return [_matrix(first, _Constant(_weights(args[1]).T))]
    if name in {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
                "batch_norm"}:  # fmt: skip
        return [first, *[torch.zeros(each) for each in shapes[1:]]]
    if name == "native_layer_norm":
        axes = tuple(range(-len(args[1]), 0))
        spread = first.amax(axes, keepdim=True)
        return [spread.expand(shapes[0]).clone(), *[spread.expand(each).clone() for each in shapes[1:]]]
    if name in _POOLING:
        if name == "max_pool2d_with_indices":
            return [torch.nn.functional.max_pool2d(first, *args[1:])] * 2
        return [as_call(step)(*_bare(args), **kwargs)]
    if name in _RESIZING:
        return [as_call(step)(*_bare(args), **kwargs)]
    return None


def _convolved(step: Step, mark: Tensor, weights: Tensor, rest: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the mark of a convolution; where all channels are read, one stands for all."""
    transposed, groups = rest[3], rest[5]
    if transposed or groups != 1 or not _dense(weights):
        made: Tensor = as_call(step)(mark, weights, None, *rest)
        return made
    one = mark.amax(1, keepdim=True)
    made = as_call(step)(one, torch.ones_like(weights[:1, :1]), None, *rest)
    return made.expand(shape)


def _dense(weights: Tensor) -> bool:
    """Return whether nearly all weights carry something."""
    return weights.numel() > 0 and float(weights.mean()) > 1 - SPARSE


def _told_apart(own: Any, filled: Any) -> Any:
    """Return arguments in which tensors of the network's own are wrapped, so that marks alone are bare."""
    if isinstance(own, tuple | list):
        made = [_told_apart(a, b) for a, b in zip(own, filled, strict=True)]
        return type(own)(made) if isinstance(own, list) else tuple(made)
    return _Constant(filled) if isinstance(own, Tensor | Spread) else filled


def _bare(value: Any) -> Any:
    """Return arguments for a call on marks: constants carry nothing."""

    def one(each: Any) -> Any:
        if isinstance(each, _Constant):
            return torch.zeros_like(each.value, dtype=torch.float32)
        return torch.zeros(each.shape) if isinstance(each, Tensor) and each.dtype == torch.bool else each

    return tree_map(one, value, is_leaf=lambda each: isinstance(each, _Constant))


def _sum_of(values: list[Any], shape: tuple[int, ...]) -> Tensor:
    total = torch.zeros(shape)
    for value in tree_flatten(values, is_leaf=lambda one: isinstance(one, _Constant))[0]:
        if _is_mark(value):
            total = total + value
    return total


def _product(one: Any, other: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the mark of a product, in which a factor of zero carries nothing."""
    if _is_mark(one) and _is_mark(other):
        return _sum_of([one, other], shape)
    mark, constant = (one, other) if _is_mark(one) else (other, one)
    if isinstance(constant, _Constant) and isinstance(constant.value, Tensor):
        carried: Tensor = mark * _weights(constant)
        return carried.expand(shape).clone()
    return _sum_of([mark], shape)


def _indexed(step: Step, args: Any, shape: tuple[int, ...]) -> list[_Mark] | None:
    indices = tree_flatten(args[1:], is_leaf=lambda one: isinstance(one, _Constant))[0]
    if any(_is_mark(one) for one in indices) or not _is_mark(args[0]):
        return None
    plain = tree_map(
        lambda one: one.value if isinstance(one, _Constant) else one,
        args,
        is_leaf=lambda one: isinstance(one, _Constant),
    )
    return [as_call(step)(*plain)]


def _reduced(first: Tensor, args: Any, kwargs: Any, shapes: list[Any]) -> list[_Mark]:
    axes = kwargs.get("dim", next((one for one in args[1:] if isinstance(one, int | list)), None))
    if axes is None or axes == []:
        return [first.amax().expand(each).clone() for each in shapes]
    kept = len(shapes[0]) == first.ndim
    made = first.amax(axes, keepdim=kept)
    return [made] * len(shapes)


def _matrix(one: Any, other: Any) -> Tensor:
    """Return the mark of a matrix product."""
    if _is_mark(one) and _is_mark(other):
        both: Tensor = one.amax(-1, keepdim=True) + other.amax(-2, keepdim=True)
        return both
    if _is_mark(one):
        weights = _weights(other)
        if _dense(weights):
            spread: Tensor = one.amax(-1, keepdim=True).expand(*one.shape[:-1], weights.shape[-1])
            return spread
        read: Tensor = one @ weights
        return read
    carried: Tensor = _weights(one) @ other
    return carried
