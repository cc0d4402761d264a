"""What a TensorFlow Lite file holds: its operators, their settings, and its values. Nothing in it is run.

A file is a flatbuffer, which the schema of the package `tflite` names the fields of. Offsets in it may point
anywhere: each list is bounded before it is read, and numbers are taken from within the file alone.

Source: TensorFlow, tensorflow/lite/schema/schema.fbs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.models.formats.rebuilt import Unknown, Unreadable, read_bytes, require

AnyArray = npt.NDArray[Any]
#: Entries of a list, descriptions, values that one operator takes or gives, and axes of a value, at most.
MOST_ENTRIES, MOST_DESCRIPTIONS, MOST_TAKEN, MOST_AXES = 20_000, 64, 256, 8
#: Characters of a name that are kept.
LONGEST_NAME = 100
#: Bytes of numbers that all constants may take once they are floats, for each byte of the file, and in any.
MOST_UNPACKED, LEAST = 9, 1 << 24
_TYPES: dict[str, Any] = {
    "FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16,
    "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How whole numbers q stand for real ones: (q - zero) * scale.

    Attributes:
        scale, zero: one for all, or one for each place along the axis.
    """

    scale: npt.NDArray[np.float64]
    zero: npt.NDArray[np.float64]
    axis: int

    def real(self, whole: AnyArray) -> npt.NDArray[np.float32]:
        """Return the real numbers that whole ones stand for.

        Raises:
            Unreadable: if there is not one scale for each place.
        """
        shape = [1] * whole.ndim
        if self.scale.size > 1:
            if not self.axis < whole.ndim or whole.shape[self.axis] != self.scale.size:
                raise Unreadable("the scales of a value are not as many as its channels")
            shape[self.axis] = -1
        scale, zero = (one.reshape(shape) for one in (self.scale, self.zero))
        return np.asarray((whole - zero) * scale, dtype=np.float32)


@dataclass(frozen=True)
class Value:
    """A value of a model: a constant, or what an operator makes.

    Attributes:
        number: its place in the file.
        shape: its sizes, -1 for an axis of any size.
        kind: its type of numbers, such as 'FLOAT32'.
        quantization: None where numbers are what they are.
        data: bytes of a constant; None if it is none.
    """

    number: int
    shape: tuple[int, ...]
    kind: str
    quantization: Quantization | None
    data: npt.NDArray[np.uint8] | None

    @property
    def dtype(self) -> Any:
        """Return its type of numbers.

        Raises:
            Unknown: if none of that type are read.
        """
        if self.kind not in _TYPES:
            raise Unknown(f"numbers of the type {self.kind}")
        return np.dtype(_TYPES[self.kind])

    @property
    def range(self) -> tuple[float, float] | None:
        """Return the least and the largest real number that it can hold, None where there is no bound."""
        if self.quantization is None or self.dtype.kind not in "iu":
            return None
        if self.quantization.scale.size != 1:
            raise Unknown("scales for each channel of a value that is no weight")
        ends = np.array([np.iinfo(self.dtype).min, np.iinfo(self.dtype).max])
        low, high = (ends - self.quantization.zero) * self.quantization.scale
        return float(low), float(high)

    @property
    def step(self) -> float | None:
        """Return how far apart the numbers are that it can hold, None where there is no bound."""
        if self.quantization is None or self.range is None:
            return None
        return float(self.quantization.scale[0])


@dataclass(frozen=True)
class Node:
    """An operator.

    Attributes:
        kind: its name in the schema, such as 'CONV_2D'.
        takes, gives: numbers of values; -1 for one that is left out.
        options: name of the table that holds its settings.
        table: that table.
    """

    kind: str
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    options: str
    table: Any

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return its settings by the schema's names, such as 'StrideW'; lists of numbers as tuples."""
        return _settings(self.table, self.options)


@dataclass(frozen=True)
class TfliteFile:
    """A TensorFlow Lite model that was read.

    Attributes:
        content: the whole file.
        inputs, outputs: numbers of values.
        metadata: the buffer that TFLite Metadata lies in, None where there is none.
    """

    content: bytes
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    metadata: npt.NDArray[np.uint8] | None

    @cached_property
    def constants(self) -> Constants:
        """Return what reads the constants."""
        return Constants(self)

    def value(self, number: int) -> Value:
        """Return a value.

        Raises:
            Unreadable: if there is none of that number.
        """
        if not 0 <= number < len(self.values):
            raise Unreadable("it names a value that it does not have")
        return self.values[number]


class Constants:
    """Read constants as numbers, and keep what they take within a multiple of the file."""

    def __init__(self, file: TfliteFile) -> None:
        self._left = MOST_UNPACKED * max(len(file.content), LEAST)

    def whole(self, value: Value) -> AnyArray:
        """Return a constant as the file has it.

        Raises:
            Unreadable: if it is none, of another size than its shape, or all of them are too large.
        """
        if value.data is None or min(value.shape, default=0) < 0:
            raise Unreadable("an operator takes a weight that the file does not hold")
        self._left -= max(4, value.dtype.itemsize) * math.prod(value.shape)
        if self._left < 0:
            raise Unreadable("its weights unpack to far more than the file holds")
        if value.data.size != value.dtype.itemsize * math.prod(value.shape):
            raise Unreadable("a weight is of another size than its shape")
        held: AnyArray = value.data.view(value.dtype).reshape(value.shape)
        return held

    def real(self, value: Value) -> AnyArray:
        """Return a constant as float32, as bool, or as int64 where whole numbers stand for themselves.

        Raises:
            Unreadable: as `whole` does.
        """
        held = self.whole(value)
        if held.dtype.kind == "f":
            return held.astype(np.float32)
        if held.dtype.kind == "b":
            return held
        return held.astype(np.int64) if value.quantization is None else value.quantization.real(held)


def read_tflite(path: Path) -> TfliteFile:
    """Read a TensorFlow Lite file.

    Raises:
        Unknown: if it has several graphs, or weights that are sparse or lie outside it.
        Unreadable: if it is none; flatbuffers and numpy raise what they like besides.
    """
    require("tflite", "tflite")
    import tflite

    content = read_bytes(path)
    model = tflite.Model.GetRootAs(content, 0)
    graphs = _listed(model, "Subgraphs")
    if len(graphs) != 1:
        raise Unknown(f"{len(graphs)} graphs" if graphs else "no graph")
    buffers = [_data(one) for one in _listed(model, "Buffers")]
    codes = _listed(model, "OperatorCodes")
    return TfliteFile(
        content,
        tuple(_value(i, one, buffers) for i, one in enumerate(_listed(graphs[0], "Tensors"))),
        tuple(_node(one, codes) for one in _listed(graphs[0], "Operators")),
        _numbers(graphs[0].InputsAsNumpy()),
        _numbers(graphs[0].OutputsAsNumpy()),
        _metadata(model, buffers),
    )


def _listed(table: Any, name: str, most: int = MOST_ENTRIES) -> list[Any]:
    """Return the entries of a list in a table."""
    length = getattr(table, f"{name}Length")()
    if length > most:
        raise Unreadable("one of its lists has no end")
    return [getattr(table, name)(i) for i in range(length)]


def _numbers(found: Any, most: int = MOST_TAKEN) -> tuple[int, ...]:
    """Return a list of whole numbers, an empty one where the schema's reader gives 0 for none."""
    if not isinstance(found, np.ndarray):
        return ()
    if found.size > most:
        raise Unreadable("one of its lists has no end")
    return tuple(int(one) for one in found)


def _data(buffer: Any) -> npt.NDArray[np.uint8] | None:
    if buffer.Offset() > 1 or buffer.Size() > 1:
        raise Unknown("weights that lie outside its tables")
    found = buffer.DataAsNumpy()
    return found if isinstance(found, np.ndarray) and found.size else None


def _value(number: int, tensor: Any, buffers: list[Any]) -> Value:
    if tensor.Sparsity() is not None:
        raise Unknown("sparse weights")
    if tensor.IsVariable():
        raise Unknown("a state that it keeps")
    if not 0 <= tensor.Buffer() < len(buffers):
        raise Unreadable("it names a buffer that it does not have")
    shape = _numbers(tensor.ShapeAsNumpy(), MOST_AXES)
    signature = _numbers(tensor.ShapeSignatureAsNumpy(), MOST_AXES) or shape
    if len(signature) != len(shape):
        raise Unreadable("a value has two shapes")
    shape = tuple(-1 if -1 in both else both[0] for both in zip(shape, signature, strict=True))
    kind = _names("TensorType").get(tensor.Type(), str(tensor.Type()))
    return Value(number, shape, kind, _quantization(tensor.Quantization()), buffers[tensor.Buffer()])


def _quantization(table: Any) -> Quantization | None:
    if table is None or not table.ScaleLength():
        return None
    if table.DetailsType():
        raise Unknown("a quantisation of its own")
    scale = table.ScaleAsNumpy().astype(np.float64)
    zero = table.ZeroPointAsNumpy() if table.ZeroPointLength() else np.zeros(1)
    if not np.isfinite(scale).all() or (scale < 0).any() or zero.size not in (1, scale.size):
        raise Unreadable("a quantisation has no sense")
    axis = table.QuantizedDimension()
    return Quantization(scale, np.broadcast_to(zero.astype(np.float64), scale.shape), axis)


def _node(operator: Any, codes: list[Any]) -> Node:
    if not 0 <= operator.OpcodeIndex() < len(codes):
        raise Unreadable("it names an operator that it does not have")
    if operator.IntermediatesLength() or operator.MutatingVariableInputsLength():
        raise Unknown("a state that it keeps")
    code = codes[operator.OpcodeIndex()]
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    kind = _names("BuiltinOperator").get(number, f"number {number}")
    if kind == "CUSTOM":
        name = (code.CustomCode() or b"").decode("utf-8", "replace")[:LONGEST_NAME]
        raise Unknown(f"an operator of somebody's own, {name!r}")
    options = _names("BuiltinOptions").get(operator.BuiltinOptionsType(), "NONE")
    return Node(
        kind,
        _numbers(operator.InputsAsNumpy()),
        _numbers(operator.OutputsAsNumpy()),
        options,
        operator.BuiltinOptions(),
    )


def _settings(table: Any, name: str) -> dict[str, Any]:
    import tflite

    if table is None or name == "NONE":
        return {}
    options = getattr(tflite, name)()
    options.Init(table.Bytes, table.Pos)
    return {
        field.removesuffix("AsNumpy"): _numbers(found, MOST_AXES) if field.endswith("AsNumpy") else found
        for field in _fields(name)
        if (found := getattr(options, field)()) is not None
    }


@cache
def _fields(name: str) -> tuple[str, ...]:
    """Return the readers of a table's fields that take nothing."""
    import tflite

    return tuple(
        field
        for field, reader in vars(getattr(tflite, name)).items()
        if callable(reader)
        and reader.__code__.co_argcount == 1
        and not field.startswith("_")
        and not field.endswith(("Length", "IsNone"))
    )


@cache
def _names(enumeration: str) -> dict[int, str]:
    """Return the names of an enumeration by their numbers."""
    import tflite

    found = vars(getattr(tflite, enumeration)).items()
    return {number: name for name, number in found if isinstance(number, int)}


def _metadata(model: Any, buffers: list[Any]) -> npt.NDArray[np.uint8] | None:
    for entry in _listed(model, "Metadata", MOST_DESCRIPTIONS):
        if entry.Name() == b"TFLITE_METADATA" and 0 <= entry.Buffer() < len(buffers):
            found: npt.NDArray[np.uint8] | None = buffers[entry.Buffer()]
            return found
    return None
