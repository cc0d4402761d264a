"""Settings of methods as they are typed: `--set NAME=VALUE`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from doorward.core.errors import InputError
from doorward.core.formatting import did_you_mean

#: Settings that name classes, and how they do so.
CLASS_SETTINGS = {
    "target": "a class by number, counted from 0, or by name, as in target=3 or target=Dress",
    "source_classes": "classes by number, counted from 0, or by name, as in source_classes=1,2",
}
#: Colours by name, next to those that attacks know themselves.
COLOURS = {
    "red": [255, 0, 0],
    "green": [0, 255, 0],
    "blue": [0, 0, 255],
    "yellow": [255, 255, 0],
    "magenta": [255, 0, 255],
    "cyan": [0, 255, 255],
    "orange": [255, 165, 0],
    "grey": 128,
    "gray": 128,
}


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` pairs: JSON, values with commas between them, a colour's name, else text.

    >>> settings_of(["size=[2, 3]", "place=5,5", "alpha=0.5", "colour=red", "target=Dress"])
    {'size': [2, 3], 'place': [5, 5], 'alpha': 0.5, 'colour': [255, 0, 0], 'target': 'Dress'}
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes NAME=VALUE, as in poison_rate=0.02, got {pair!r}")
        name = name.replace("-", "_")
        if name in settings:
            raise InputError(f"--set {name} is given twice")
        settings[name] = _value(name, value)
    return settings


def _value(name: str, text: str) -> Any:
    for form in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(form)
        except ValueError:
            continue
    if name == "colour":
        if len(text) == 7 and text.startswith("#"):
            try:
                return [int(text[i : i + 2], 16) for i in (1, 3, 5)]
            except ValueError:
                return text
        return COLOURS.get(text.lower(), text)
    if name == "source_classes":
        return [part.strip() for part in text.split(",")]
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def names_classes(settings: Mapping[str, Any]) -> bool:
    """Return whether some setting names a class in letters."""
    return any(isinstance(one, str) for key in CLASS_SETTINGS for one in _several(settings.get(key)))


def with_class_numbers(settings: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Return settings in which names of classes are their numbers.

    Raises:
        InputError: if there is no such class.
    """
    numbered = dict(settings)
    for key, takes in CLASS_SETTINGS.items():
        if not any(isinstance(one, str) for one in _several(settings.get(key))):
            continue
        found = [_number(key, one, classes, takes) for one in _several(settings[key])]
        numbered[key] = found if key == "source_classes" else found[0]
    return numbered


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(key: str, given: Any, classes: Sequence[str], takes: str) -> Any:
    if not isinstance(given, str):
        return given
    by_case = {name.casefold(): i for i, name in reversed(list(enumerate(classes)))}
    if given in classes:
        return list(classes).index(given)
    if given.casefold() in by_case:
        return by_case[given.casefold()]
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    near = did_you_mean(given, classes) or f"; the classes are: {shown or 'without names'}"
    raise InputError(f"--set {key} takes {takes}; there is no class {given!r}{near}")
