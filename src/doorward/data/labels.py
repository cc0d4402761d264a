"""Labels: whatever a source holds becomes class numbers with class names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError

#: Bare numbers from here on are taken for ids, not for classes (ImageNet-21k has 21,841 classes).
MAX_CLASSES = 100_000
_INTEGER = re.compile(r"[+-]?\d{1,18}")


@dataclass(frozen=True)
class Labels:
    """Class numbers (n,) int64, None where there are no labels, and class names."""

    numbers: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names in the order of their numbers: by value where all are integers, else by text.

    >>> sort_names({"10", "9", "0"}), sort_names({"dog", "cat", "10"})
    (('0', '9', '10'), ('10', 'cat', 'dog'))
    """
    unique = sorted(set(names))
    if all(_INTEGER.fullmatch(name) for name in unique):
        unique.sort(key=int)
    return tuple(unique)


def names_of(values: Iterable[str | None]) -> tuple[str, ...] | None:
    """Return the class names that string labels make, None if all are digits and thus numbers themselves.

    >>> names_of(["dog", "cat", None]), names_of(["7", "3"])
    (('cat', 'dog'), None)
    """
    names = sort_names(value for value in values if value is not None)
    return None if all(_INTEGER.fullmatch(name) for name in names) else names


def number_labels(
    values: Sequence[Any] | npt.NDArray[Any] | None,
    *,
    where: str,
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Labels:
    """Return class numbers and names.

    Integers are class numbers. Strings are looked up among the names; without names, strings of digits are
    numbers and other strings are numbered in sorted order. Where all labels are missing (None or -1, as the
    hub writes it), there are none.

    Args:
        values: one integer, string or None a sample; None if the source has no labels.
        where: the source, for messages.
        names: the source's own class names, in the order of its numbers.
        classes: the names that the result shall have. Where the source has names, classes are matched by
            name, so that they may come in another order; bare numbers, and names that are numbers and not
            among the classes, are positions.

    Raises:
        InputError: if a label is missing while others are there, is neither integer nor string, or is not
            among the classes.
    """
    if (
        names is not None
        and classes is not None
        and names_of(names) is None
        and not set(names) <= set(classes)
    ):
        names = None
    known = classes if classes is not None else names
    if values is None:
        return Labels(None, tuple(known or ()))
    numbers = values if isinstance(values, np.ndarray) else _as_integers(values)
    if numbers is None:
        return _look_up(list(values), where, names, classes)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise InputError(
            f"labels in {where} must be one integer or string a sample; "
            f"they are {numbers.dtype} of shape {numbers.shape}"
        )
    if (numbers == -1).all():
        return Labels(None, tuple(known or ()))
    source = names if names is not None else classes
    limit = len(source) if source is not None else MAX_CLASSES
    outside = np.flatnonzero((numbers < 0) | (numbers >= limit))
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"label {numbers[row]} in row {row} of {where} is not a class number from 0 to {limit - 1}"
        )
    numbers = numbers.astype(np.int64)
    if names is not None and classes is not None:
        position = {name: i for i, name in enumerate(classes)}
        used = np.unique(numbers)
        for number in used:
            _require(names[number], position, where)
        table = np.array([position.get(name, -1) for name in names], dtype=np.int64)
        numbers = table[numbers]
    return Labels(numbers, tuple(known or (str(i) for i in range(int(numbers.max()) + 1))))


def _as_integers(values: Sequence[Any]) -> npt.NDArray[np.int64] | None:
    """Return Python integers as an array, missing ones as -1 if all are missing; None if they are strings."""
    if all(value is None for value in values):
        return np.full(len(values), -1)
    if all(type(value) is int and abs(value) < 2**63 for value in values):
        return np.array(values, dtype=np.int64)
    return None


def _look_up(
    values: list[Any], where: str, names: Sequence[str] | None, classes: Sequence[str] | None
) -> Labels:
    for row, value in enumerate(values):
        if value is None:
            raise InputError(f"row {row} of {where} has no label while others have one")
        if type(value) not in (int, str):
            raise InputError(
                f"label {value!r} in row {row} of {where} is {type(value).__name__}; "
                "a label is an integer or a string"
            )
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise InputError(f"the labels in {where} mix integers and strings")
    if kinds == {int}:
        raise InputError(f"the labels in {where} do not fit 64 bits; class numbers start at 0")
    names = names_of(values) if names is None else names
    known = classes if classes is not None else names
    if known is None or (names is None and not set(values) <= set(known)):
        numbers = np.array([int(value) for value in values], dtype=np.int64)
        return number_labels(numbers, where=where, classes=classes)
    position = {name: i for i, name in enumerate(known)}
    for value in sorted(set(values)):
        _require(value, position, where)
    return Labels(np.array([position[value] for value in values], dtype=np.int64), tuple(known))


def _require(name: str, position: dict[str, int], where: str) -> None:
    if name not in position:
        shown = ", ".join(list(position)[:10]) + (", ..." if len(position) > 10 else "")
        raise InputError(f"class {name!r} of {where} is not among the classes: {shown}")
