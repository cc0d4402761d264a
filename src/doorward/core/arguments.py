"""What Python users give as arguments: checked by name, with one clear line where a type is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from doorward.core.errors import InputError


def _number(value: Any, low: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) < math.inf


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and _number(value, low)


#: What arguments take, by their names, and whether a value is that.
_TAKES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": ("a whole number from 0", lambda value: _whole(value, 0)),
    "images": ("a whole number from 4", lambda value: _whole(value, 4)),
    "time_budget": ("seconds, as in 300", lambda value: _number(value, 0)),
    "memory": ("a number", lambda value: _number(value, 0)),
    "device": ("a name, as in 'cpu' or 'cuda'", lambda value: isinstance(value, str)),
    "rate": ("a share between 0 and 1", lambda value: _number(value, 0)),
    "size": (
        "(channels, height, width), as in (3, 224, 224)",
        lambda value: (
            isinstance(value, tuple | list) and len(value) == 3 and all(_whole(n, 1) for n in value)
        ),
    ),
}
_EXAMPLE = {"detectors": "neural-cleanse", "filters": "strip", "method": "fine-pruning"}


def refuse_wrong(call: str, given: dict[str, Any]) -> None:
    """Raise for the first argument of a wrong type; None and names that are not known pass.

    >>> refuse_wrong("scan", {"seed": 3, "time_budget": None})

    Raises:
        InputError: saying what was expected and what came.
    """
    for name, value in given.items():
        if value is not None and name in _TAKES and not _TAKES[name][1](value):
            raise InputError(f"{call}: {name}: expected {_TAKES[name][0]}, got {value!r:.60}")


def several(call: str, name: str, given: Any, kinds: tuple[type, ...] = (str,)) -> tuple[Any, ...]:
    """Return names as a tuple, where one may be given alone.

    >>> several("scan", "detectors", "strip")
    ('strip',)

    Raises:
        InputError: if one is no name, nor of the other kinds.
    """
    if isinstance(given, kinds):
        return (given,)
    them = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(one, kinds) for one in them):
        raise InputError(f"{call}: {name}: expected names, as in ['{_EXAMPLE[name]}'], got {given!r:.60}")
    return them
