"""Find methods by name: the file is the name, and one decorator registers the class inside it.

Names are listed from the files of the package and from the entry points of installed packages, so that
listing imports none of them. Packages of others bring detectors by the entry point group
`doorward.detectors`, and a single file is named as `file.py:Class`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, TypeVar

from doorward.core.errors import InputError
from doorward.core.formatting import did_you_mean

MethodKind = Literal["attack", "detector", "repair"]
ROOMS: dict[MethodKind, str] = {"attack": "attacks", "detector": "detectors", "repair": "repairs"}
#: Where files of methods lie below their room: attacks and detectors in wings, repairs in the room itself.
_FILES: dict[MethodKind, str] = {"attack": "*/*.py", "detector": "*/*.py", "repair": "*.py"}
#: The entry point group by which a package of somebody else's brings methods of a kind.
GROUPS: dict[MethodKind, str] = {kind: f"doorward.{room}" for kind, room in ROOMS.items()}

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
    """Return each method's name and module, sorted by name, importing nothing.

    A method of the package itself goes before one of the same name from elsewhere.
    """
    elsewhere = {name: point.module for name, point in _elsewhere(kind).items()}
    return dict(sorted({**elsewhere, **own_modules(kind)}.items()))


@cache
def own_modules(kind: MethodKind) -> dict[str, str]:
    """Return name and module of the methods that come with the package, sorted by name."""
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

    Args:
        name: a name that `modules` lists, or `file.py:Class`, which runs the file; after that, the name of
            the file is enough.

    Raises:
        InputError: if there is none; the message lists those that exist.
    """
    if name.rpartition(":")[0].endswith(".py"):
        return _from_file(kind, name)
    own = own_modules(kind)
    if name in own:
        import_module(own[name])
        return _registered[kind, name]
    point = _elsewhere(kind).get(name)
    if point is None and (kind, name) in _registered:  # of a file that this process has run
        return _registered[kind, name]
    if point is None:
        raise unknown(kind, name)
    try:
        cls = point.load()
    except Exception as error:  # the code of others may raise anything
        raise InputError(f"the {kind} {name!r} of {_package(point)} cannot be loaded: {error}") from error
    return _checked(kind, cls, name, f"the entry point of {_package(point)}")


def unknown(kind: MethodKind, name: str) -> InputError:
    """Return the error for a name that no method of a kind has."""
    known = modules(kind)
    elsewhere = next((other for other in ROOMS if other != kind and name in modules(other)), None)
    what = f" ({name} is {'an' if elsewhere == 'attack' else 'a'} {elsewhere})" if elsewhere else ""
    near = did_you_mean(name, known)
    if "," in name and set(parts := name.replace(" ", "").split(",")) <= set(known):
        near = f"; name each by itself: {' and '.join(parts)}"
    return InputError(f"there is no {kind} named {name!r}{what}{near or '; there are: ' + ', '.join(known)}")


def refuse_unknown(kind: MethodKind, names: Iterable[str]) -> None:
    """Raise for a name that no method of a kind has, importing none.

    Raises:
        InputError: if there is one.
    """
    for name in names:
        in_file = name.rpartition(":")[0].endswith(".py")
        if not in_file and name not in modules(kind) and (kind, name) not in _registered:
            raise unknown(kind, name)


def module_of(kind: MethodKind, name: str) -> str | None:
    """Return the module of a method, also of one that was loaded from a file; None if none is known."""
    loaded = _registered.get((kind, name))
    return modules(kind).get(name) or (loaded.__module__ if loaded else None)


def build(kind: MethodKind, name: str, settings: dict[str, Any]) -> Any:
    """Rebuild a method from its name and settings (as a record or the command line gives them).

    Raises:
        InputError: if a setting is unknown or out of range; the message names it and what would fit.
    """
    from pydantic import ValidationError

    cls = get(kind, name)
    strange = sorted(set(settings) - set(cls.model_fields))
    if strange:
        fields = ", ".join(cls.model_fields) or "none"
        near = did_you_mean(strange[0], cls.model_fields)
        raise InputError(f"{name} has no setting {strange[0]!r}{near or f'; its settings are: {fields}'}")
    try:
        return cls(**settings)
    except ValidationError as error:
        first, *more = error.errors()
        field = first["loc"][0] if first["loc"] else "settings"
        # a setting of several types has one message for each
        why = dict.fromkeys(e["msg"] for e in (first, *more) if e["loc"][:1] == first["loc"][:1])
        raise InputError(f"{name}: {field} = {settings.get(str(field))!r}: {', or: '.join(why)}") from error


def _elsewhere(kind: MethodKind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUPS[kind])}


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _from_file(kind: MethodKind, name: str) -> type[Any]:
    """Return a class of a file that is run for it, once a process.

    Raises:
        InputError: if the file cannot be run, or has no such class.
    """
    path, _, wanted = name.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"{path} is no file; a {kind} in a file is named as file.py:Class")
    module = sys.modules.get(file.stem)
    if module is None or Path(getattr(module, "__file__", None) or "").resolve() != file:
        if module is not None or file.stem in sys.stdlib_module_names:
            raise InputError(f"{path}: a module named {file.stem!r} exists already; rename the file")
        spec = spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[file.stem] = module  # the class names its module, and settings are resolved there
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's own code may raise anything
            del sys.modules[file.stem]
            raise InputError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    cls = getattr(module, wanted, None)
    if cls is None:
        raise InputError(f"{path} has no class {wanted!r}")
    found = _checked(kind, cls, None, name)
    # what it measures bears the name of the file, by which the class is looked for later
    _registered[kind, method_name(found.__module__)] = found
    return found


def _checked(kind: MethodKind, cls: Any, name: str | None, where: str) -> type[Any]:
    """Return a class of somebody else's if it is a method of the kind, under its own name.

    Raises:
        InputError: if not.
    """
    base = getattr(import_module(f"doorward.{ROOMS[kind]}.base"), kind.title())
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InputError(f"{where}: {cls!r} is no subclass of {base.__module__}.{base.__name__}")
    own = method_name(cls.__module__)
    if name is not None and own != name:
        raise InputError(
            f"{where} is named {name!r}, but a method is named after its file: {own!r} for {cls.__module__}"
        )
    if own in own_modules(kind):
        raise InputError(f"{where}: Doorward has a {kind} named {own!r} itself; rename the file")
    found: type[Any] = cls
    return found
