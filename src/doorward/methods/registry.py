"""Find methods by name: the file is the name, and one decorator registers the class inside it.

Names are listed from the files of the package, so that listing imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from doorward.core.errors import InputError

MethodKind = Literal["attack", "detector", "repair"]
ROOMS: dict[MethodKind, str] = {"attack": "attacks", "detector": "detectors", "repair": "repairs"}
#: Where files of methods lie below their room: attacks and detectors in wings, repairs in the room itself.
_FILES: dict[MethodKind, str] = {"attack": "*/*.py", "detector": "*/*.py", "repair": "*.py"}

_registered: dict[tuple[MethodKind, str], type[Any]] = {}
T = TypeVar("T")


def method_name(module: str) -> str:
    """Return the method name that belongs to a module.

    >>> method_name("doorward.detectors.model.neural_cleanse")
    'neural-cleanse'
    """
    return module.rsplit(".", 1)[-1].replace("_", "-")


def register(kind: MethodKind) -> Callable[[type[T]], type[T]]:
    """Register the decorated class as the method that its file is named after."""

    def keep(cls: type[T]) -> type[T]:
        _registered[kind, method_name(cls.__module__)] = cls
        return cls

    return keep


def modules(kind: MethodKind) -> dict[str, str]:
    """Return each method's name and module, sorted by name, importing nothing."""
    room = Path(__file__).parent.parent / ROOMS[kind]
    found = {}
    for file in sorted(room.glob(_FILES[kind])):
        if file.stem.startswith("_") or file.stem == "base":
            continue
        inner = ".".join(file.relative_to(room).with_suffix("").parts)
        found[method_name(inner)] = f"doorward.{ROOMS[kind]}.{inner}"
    return dict(sorted(found.items()))


def get(kind: MethodKind, name: str) -> type[Any]:
    """Return the method class of that name.

    Raises:
        InputError: if there is none; the message lists those that exist.
    """
    known = modules(kind)
    if name not in known:
        raise InputError(f"there is no {kind} named {name!r}; there are: {', '.join(known)}")
    import_module(known[name])
    return _registered[kind, name]


def build(kind: MethodKind, name: str, settings: dict[str, Any]) -> Any:
    """Rebuild a method from its name and settings (as a record or the command line gives them).

    Raises:
        InputError: if a setting is unknown or out of range; the message names it and what would fit.
    """
    from pydantic import ValidationError

    cls = get(kind, name)
    unknown = sorted(set(settings) - set(cls.model_fields))
    if unknown:
        fields = ", ".join(cls.model_fields) or "none"
        raise InputError(f"{name} has no setting {unknown[0]!r}; its settings are: {fields}")
    try:
        return cls(**settings)
    except ValidationError as error:
        first, *more = error.errors()
        field = first["loc"][0] if first["loc"] else "settings"
        # a setting of several types has one message for each
        why = dict.fromkeys(e["msg"] for e in (first, *more) if e["loc"][:1] == first["loc"][:1])
        raise InputError(f"{name}: {field} = {settings.get(str(field))!r}: {', or: '.join(why)}") from error
