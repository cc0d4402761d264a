"""Defaults of options from a file: `doorward.toml`, or `[tool.doorward]` of a `pyproject.toml`.

A table for each command holds options by their names, as in

    [scan]
    time-budget = 300
    detector = ["patch-search", "neural-cleanse"]

Such a file may come with a model that somebody else made. So it cannot name code to be run, nor say when an
alarm counts, and what it sets is told.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from doorward.core.errors import InputError
from doorward.core.files import open_regular
from doorward.core.formatting import did_you_mean

FILE, PROJECT = "doorward.toml", "pyproject.toml"
#: Options that run code, or decide what an alarm means: on the command line alone.
REFUSED = {
    "factory": "it runs code",
    "fail_on": "it decides when the exit code tells of an alarm",
    "skip_unreadable": "it lets a scan pass over samples",
    "force": "it lets results replace what is there",
}


def defaults(command: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the defaults that a folder's file sets, as click's `default_map`, and a line that tells them.

    Args:
        command: the click group of all commands.

    Raises:
        InputError: if the file cannot be read, or sets what there is not.
    """
    file, tables = _read(folder)
    if file is None:
        return {}, ""
    made: dict[str, Any] = {}
    told: list[str] = []
    for name, options in tables.items():
        known = getattr(command, "commands", {})
        if name not in known or not isinstance(options, dict):
            near = did_you_mean(name, known) or f"; its tables are commands: {', '.join(known)}"
            raise InputError(f"{file}: there is no command {name!r}{near}")
        parameters = {one.name: one for one in known[name].params if one.param_type_name == "option"}
        flags = {flag.lstrip("-"): one.name for one in parameters.values() for flag in one.opts}
        made[name] = {}
        for option, value in options.items():
            key = flags.get(option) or (option if option in parameters else None)
            if key is None:
                near = did_you_mean(option, flags) or f"; see doorward {name} --help"
                raise InputError(f"{file}, {name}: there is no option {option!r}{near}")
            _refuse(file, name, option, key, value)
            many = parameters[key].multiple
            made[name][key] = _several(value) if many else _text(file, name, option, value)
            told.append(f"{name} {option} = {value}")
    return made, f"from {file}: {'; '.join(told)}" if told else ""


def _read(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    for file, key in ((folder / FILE, None), (folder / PROJECT, "tool")):
        if not file.is_file():
            continue
        try:
            with open_regular(file) as stream:
                tables = tomllib.load(stream)
        except (OSError, ValueError) as error:
            if key:  # a project's file is none of ours to judge
                continue
            raise InputError(f"{file}: cannot be read as TOML: {error}") from error
        if key:
            tool = tables.get("tool")
            tables = tool.get("doorward", {}) if isinstance(tool, dict) else {}
        if tables:
            return file, tables
    return None, {}


def _refuse(file: Path, command: str, option: str, key: str, value: Any) -> None:
    if key in REFUSED:
        raise InputError(f"{file}, {command}: {option} goes on the command line alone, since {REFUSED[key]}")
    named = [str(one).rpartition(":")[0] for one in _several(value)]
    if key in ("detector", "filters") and any(one.endswith(".py") for one in named):
        raise InputError(f"{file}, {command}: a {option} in a file of Python runs code: command line alone")


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _text(file: Path, command: str, option: str, value: Any) -> Any:
    if isinstance(value, dict):
        raise InputError(f"{file}, {command}: {option} takes a value, got a table")
    return ",".join(map(str, value)) if isinstance(value, list) else value
