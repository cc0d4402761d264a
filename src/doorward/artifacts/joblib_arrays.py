"""The arrays that joblib writes between the instructions of a pickle, and how long they are.

Source: `joblib.numpy_pickle.NumpyArrayWrapper.read_array`, joblib 0.10 to 1.6.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from doorward.artifacts.source import Source
from doorward.core.errors import CouldNotTell

#: The class that stands in the pickle for an array behind it.
WRAPPER = ("joblib.numpy_pickle", "NumpyArrayWrapper")
_CODE = re.compile(r"[<>|=]?([?bhilqBHILQefdgFDG]|[biufcmM]\d+|[USV]\d*|O\d?)")
_LETTERS = {"?": 1, "b": 1, "B": 1, "h": 2, "H": 2, "e": 2, "i": 4, "I": 4, "f": 4, "q": 8, "Q": 8, "d": 8}


@dataclass(eq=False)
class NumberType:
    """A `numpy.dtype` that a pickle makes.

    Attributes:
        code: the first argument of its constructor.
        state: what its `__setstate__` is given, if known.
    """

    code: str
    state: tuple[Any, ...] | None = None

    @property
    def holds_objects(self) -> bool:
        """Return whether its elements are pickled Python objects."""
        return self.code.lstrip("<>|=").startswith("O")

    def size(self) -> int:
        """Return the bytes of one element.

        Raises:
            CouldNotTell: if that is not known for certain.
        """
        state = self.state or (3, "|", None, None, None, -1, -1, 0)
        if not _CODE.fullmatch(self.code) or len(state) < 8 or any(one is not None for one in state[2:5]):
            raise CouldNotTell(f"it holds an array of an unusual number type ({self.code[:20]!r})")
        code = self.code.lstrip("<>|=")
        if code[0] in "USV":
            width = int(code[1:] or 0) * (4 if code[0] == "U" else 1)
            stated = state[5]
            if not isinstance(stated, int) or stated not in (-1, width):
                raise CouldNotTell("it holds an array of texts of unclear length")
            return width
        if state[5] != -1:
            raise CouldNotTell("it holds an array whose number type changes its own length")
        if len(code) == 1 and code not in _LETTERS:
            raise CouldNotTell(f"it holds an array whose number type depends on the machine ({code!r})")
        return _LETTERS.get(code) or int(code[1:])


@dataclass(eq=False)
class ArrayWrapper:
    """A `NumpyArrayWrapper` that a pickle makes, with the state that it is given."""

    state: dict[Any, Any] = field(default_factory=dict)


def skip_array(wrapper: ArrayWrapper, source: Source) -> bool:
    """Go past the array that follows its wrapper; return whether it is a pickle of its own, to be read next.

    Raises:
        CouldNotTell: if the length of the array is not known for certain.
        Broken: if the file ends before the array does.
    """
    number_type, shape = wrapper.state.get("dtype"), wrapper.state.get("shape")
    if not isinstance(number_type, NumberType):
        raise CouldNotTell("it holds an array whose number type is computed while loading")
    if number_type.holds_objects:
        return True
    if not isinstance(shape, tuple) or not all(type(one) is int and one >= 0 for one in shape):
        raise CouldNotTell("it holds an array whose shape is computed while loading")
    length = math.prod(shape) * number_type.size()
    alignment = wrapper.state.get("numpy_array_alignment_bytes")
    if alignment is not None:
        if type(alignment) is not int:
            raise CouldNotTell("it holds an array whose place is computed while loading")
        source.skip(source.take(1)[0])
    source.skip(length)
    return False
