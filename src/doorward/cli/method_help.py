"""`doorward plant NAME --help` and the like: one method's settings, with examples."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from doorward.methods.registry import MethodKind, modules

if TYPE_CHECKING:
    from doorward.methods.base import Method

#: Where a command names a method: its kind, and the option; the first argument where that is None.
PLACES: dict[str, tuple[MethodKind, str | None]] = {
    "plant": ("attack", None),
    "scan": ("detector", "--detector"),
    "repair": ("repair", "--method"),
}
#: Values as they are typed, by the name of the setting; others are shown with their default.
EXAMPLES = {
    "target": "Dress",
    "place": "5,5",
    "colour": "red",
    "poison_rate": "0.02",
    "source_classes": "Coat,Bag",
    "size": "4",
}
USE = {
    "plant": "doorward plant {name} SOURCE OUT",
    "scan": "doorward scan MODEL --clean DATA --detector {name}",
    "repair": "doorward repair MODEL OUT --clean DATA --method {name}",
}
WIDEST, SHOWN = 100, 4


def asked_for(arguments: Sequence[str]) -> tuple[str, MethodKind, str] | None:
    """Return command, kind and name of the method that help is asked for, None if for none.

    >>> asked_for(["plant", "badnets", "--help"])
    ('plant', 'attack', 'badnets')
    >>> asked_for(["plant", "--help"]) is None
    True
    """
    if not {"-h", "--help"} & set(arguments) or not arguments or arguments[0] not in PLACES:
        return None
    kind, option = PLACES[arguments[0]]
    names = [word for before, word in pairwise(arguments) if before == option]
    if option is None:
        names = [word for word in arguments[1:] if not word.startswith("-")][:1]
    known = modules(kind)
    return next(((arguments[0], kind, name) for name in names if name in known), None)


def method_help(command: str, kind: MethodKind, name: str) -> str:
    """Return what a method does, its settings, and how they are typed."""
    from doorward.methods import registry
    from doorward.methods.describe import settings_of, split_docstring

    cls: type[Method] = registry.get(kind, name)
    width = min(shutil.get_terminal_size().columns, WIDEST)
    text, _ = split_docstring(cls)
    use = USE[command].format(name=name)
    lines = [f"Usage: {use} [--set NAME=VALUE ...]", "", _filled(f"{cls.title}. {cls.source}.", width, 2), ""]
    for paragraph in text.split("\n\n"):
        lines += [_filled(paragraph, width, 2), ""]
    settings = settings_of(cls)
    lines.append("Settings:" if settings else "It has no settings.")
    for one in settings:
        default = "required" if one.default is None else f"default {one.default}"
        lines.append(_filled(f"{one.name}: {one.takes.replace('`', '')}; {default}", width, 2, 6))
        if one.meaning:
            lines.append(_filled(f"{one.meaning}.", width, 6))
    names = {one.name for one in settings}
    shown = [f"--set {name}={value}" for name, value in EXAMPLES.items() if name in names]
    shown = shown or [f"--set {s.name}={s.default}" for s in settings if s.default not in (None, "null")]
    if shown:
        lines += ["", "Example:", f"  {' '.join([use, *shown[:SHOWN]])}"]
    if any(one.name in ("target", "source_classes") for one in settings):
        lines += ["", _filled("Classes are named by number, counted from 0, or by their names.", width)]
    lines += ["", _filled(f"Limits: {cls.limits}", width), "", f"doorward {command} --help has the options."]
    return "\n".join(lines)


def _filled(text: str, width: int, indent: int = 0, further: int | None = None) -> str:
    rest = " " * (indent if further is None else further)
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=" " * indent,
        subsequent_indent=rest,
        break_on_hyphens=False,
    )
