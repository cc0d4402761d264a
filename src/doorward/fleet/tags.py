"""Tags of the versions in an MLflow registry, which say what was found in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from doorward.fleet.overview import standing, worst_first
from doorward.fleet.registry import SCHEME, connect, parts, told
from doorward.fleet.store import Done

_TAG = "doorward."


def tags(rows: Iterable[Done], out: str | None = None) -> dict[tuple[str, str], dict[str, str]]:
    """Return the tags of each version, by its name and number: those of its worst file.

    Args:
        rows: all that was scanned; what is in no registry, or has not ended, is left out.
        out: where reports were written.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in worst_first(rows):
        name, version, _ = parts(one.path.removeprefix(SCHEME))
        if one.path.startswith(SCHEME) and one.state in ("done", "failed"):
            found.setdefault((name, version), _tags(one, out))
    return found


def _tags(one: Done, out: str | None) -> dict[str, str]:
    report = None if one.state == "failed" else one.key if out is None else f"{out}/reports/{one.key}.html"
    said = {
        "verdict": standing(one),
        "p_value": None if one.p_value is None else f"{one.p_value:.4g}",
        "targets": ", ".join(one.targets) or None,
        "sha256": one.digest or None,
        "report": report,
        "error": one.error,
    }
    return {_TAG + name: value for name, value in said.items() if value is not None}


def write_tags(rows: Iterable[Done], out: str | None = None) -> list[tuple[str, str]]:
    """Write the tags that differ from those that are there.

    Return the versions whose tags cannot be written, and why.

    Raises:
        InputError: if the registry does not answer.
    """
    wanted = tags(rows, out)
    failed: list[tuple[str, str]] = []
    client = connect() if wanted else None
    for (name, version), new in wanted.items():
        try:
            with told():
                _write(client, name, version, new)
        except OSError as error:
            failed.append((f"{SCHEME}{name}/{version}", str(error).strip().splitlines()[0][:300]))
    return failed


def _write(client: Any, name: str, version: str, new: dict[str, str]) -> None:
    old = client.get_model_version(name, version).tags
    for tag, value in new.items():
        if old.get(tag) != value:
            client.set_model_version_tag(name, version, tag, value)
    for tag in old:
        if tag.startswith(_TAG) and tag not in new:
            client.delete_model_version_tag(name, version, tag)
