"""Compare two reports, every field of them, one of which may have been forged."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from doorward.core import formatting
from doorward.core.records import ControlResult, DataRecord, Rate, Report, SubjectRecord
from doorward.reports import phrases

#: Two runs on the same machine agree to this; other machines may round differently.
TOLERANCE = 1e-3
#: What is left out of the comparison, in words.
NOT_COMPARED = "times, costs and memory"
#: Fields of each kind of record that no second run repeats, or that are compared in words of their own.
_SKIPPED: dict[str, frozenset[str]] = {
    "report": frozenset({"seconds", "environment", "request", "verdict", "targets"}),
    "subject": frozenset({"path", "sha256", "clean_accuracy"}),
    "data": frozenset({"path", "sha256"}),
    "findings": frozenset({"seconds", "cost", "verdict", "targets"}),
    "controls": frozenset({"seconds"}),
}
#: Fields whose small values vary as much as large ones; of all others, what counts is their own size.
_SCORES = frozenset({"score", "threshold", "per_class", "scores"})
#: Names of the entries of lists, by which they are matched.
_NAMED = {
    "findings": ("detector",),
    "not_run": ("detector",),
    "confirmations": ("detector", "target"),
    "data": ("role",),
    "controls": ("family",),
}
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
#: Most differences that are told, and most characters of a value.
_MOST, _WIDEST = 100, 80
#: Mean difference of pixels (of 255) and of a trigger's numbers up to which they are the same.
_PIXELS, _NUMBERS = 4.0, 0.02


def compare(old: Report, new: Report) -> list[str]:
    """Return what differs between a report and a second run of its scan, in words; nothing if they agree.

    Every field is compared but for times, costs and the machine. Numbers agree within a tolerance, also
    inside of texts. Whatever the old report holds is made harmless to show.
    """
    lines = [*_main(old, new), *_places(old, new)]
    told = {line.split(":")[0] for line in lines}
    a, b = (report.model_dump(mode="json") for report in (old, new))
    lines += [line for line in _differences(a, b, "", "report") if line.split(":")[0] not in told]
    if lines and _versions(old) != _versions(new):
        lines.append(_line("versions", ", ".join(_versions(old)), ", ".join(_versions(new)), width=1000))
    if len(lines) > _MOST:
        lines = [*lines[:_MOST], f"and in {len(lines) - _MOST} more places"]
    return [formatting.plain(line) for line in lines]


def _line(what: str, was: Any, now: Any, width: int = _WIDEST) -> str:
    return f"{what}: was {_shown(was, width)}, is {_shown(now, width)}"


def _shown(value: Any, width: int = _WIDEST) -> str:
    if value is None or value == "":
        return "nothing"
    text = str(value) if not isinstance(value, float) else f"{value:.4g}"
    return text if len(text) <= width else f"{text[: width - 3]}..."


# --- in words of their own ---


def _main(old: Report, new: Report) -> Iterator[str]:
    """Yield what differs in what matters most: the files, the verdict, the class, the detectors."""
    if old.subject and new.subject:
        if old.subject.sha256 != new.subject.sha256:
            yield _line("model sha256", old.subject.sha256, new.subject.sha256)
        yield from _of("clean accuracy", old.subject.clean_accuracy, new.subject.clean_accuracy)
    for one, other in zip(old.data, new.data, strict=False):
        if one.sha256 != other.sha256:
            yield _line(f"{one.role} data sha256", one.sha256, other.sha256)
    if old.verdict != new.verdict:
        yield _line("verdict", phrases.TITLES[old.verdict].lower(), phrases.TITLES[new.verdict].lower())
    if old.targets != new.targets:
        was, now = (formatting.classes_label(one.targets, phrases.class_names(new)) for one in (old, new))
        yield _line("targets", was, now)
    was, now = (", ".join(f.detector for f in report.findings) or "none" for report in (old, new))
    if was != now:
        yield _line("detectors", was, now, width=400)
    others = {finding.detector: finding for finding in new.findings}
    for finding in old.findings:
        again = others.get(finding.detector)
        if again is None:
            continue
        if finding.verdict != again.verdict:
            was, now = (phrases.TITLES[one.verdict].lower() for one in (finding, again))
            yield _line(f"{finding.detector} verdict", was, now)
        if finding.targets != again.targets:
            yield _line(f"{finding.detector} targets", finding.targets, again.targets)
    was, now = (", ".join(map(_fate, one.positive_control.controls)) or "none" for one in (old, new))
    if was != now:
        yield _line("positive control", was, now, width=400)


def _of(what: str, old: Rate | None, new: Rate | None) -> Iterator[str]:
    if old != new:
        was, now = (formatting.rate(one) if one else "not measured" for one in (old, new))
        yield _line(what, was, now, width=200)


def _fate(one: ControlResult) -> str:
    fate = "found" if one.recovered else "missed" if one.planted else "not planted"
    return f"{one.family} {fate}"


def _places(old: Report, new: Report) -> Iterator[str]:
    """Yield where the old report names other files than its own request, which is what was scanned."""
    pairs: list[tuple[str, SubjectRecord | DataRecord | None, SubjectRecord | DataRecord | None]]
    pairs = [("model", old.subject, new.subject)]
    pairs += [(one.role, one, other) for one, other in zip(old.data, new.data, strict=False)]
    for name, one, other in pairs:
        asked = old.request.get(name)
        if one is None or other is None or other.path != new.request.get(name):
            continue  # where a path is not what was asked for, nothing can be said
        if one.path != asked:
            yield f"{name} path: the report says {_shown(one.path)}, and its scan was of {_shown(asked)}"


def _versions(report: Report) -> list[str]:
    packages = {"doorward": report.environment.doorward} | report.environment.packages
    return [f"{name} {version}" for name, version in packages.items()]


# --- field by field ---


def _differences(old: Any, new: Any, place: str, key: str) -> Iterator[str]:
    """Yield what differs between two values of JSON types; `key` is the innermost field's name.

    A field `settings` or `evidence` may hold any name; none of them is skipped there, since what is skipped
    hangs on the kind of record.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            if name not in _SKIPPED.get(key, ()):
                inner = f"{place} {name}" if place else str(name)
                # class numbers and sample ids say nothing of what their values are
                yield from _differences(old.get(name), new.get(name), inner, key if key in _SCORES else name)
    elif key in _NAMED and isinstance(old, list) and isinstance(new, list):
        yield from _named(old, new, key, place)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield _line(f"number of {place}", len(old), len(new))
        for i, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from _differences(one, other, f"{place} {i + 1}", key)
    elif not _same(old, new, key):
        picture = key in ("png", "tensors")
        yield f"{place}: it is another one" if picture and old and new else _line(place, old, new)


def _named(old: list[Any], new: list[Any], key: str, place: str) -> Iterator[str]:
    """Compare lists whose entries have names, entry by entry."""
    tables = [_by_name(one, _NAMED[key]) for one in (old, new)]
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        one, other = (table.get(name) for table in tables)
        label = f"{name} data" if key == "data" else name
        if one is None or other is None:
            known = ("missing", "there")
            yield _line(f"{place}, {label}", known[one is not None], known[other is not None])
            continue
        prefix = label if key in ("findings", "data") else f"{place} {label}"
        yield from _differences(one, other, prefix, key)


def _by_name(entries: Sequence[Any], fields: Sequence[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for entry in entries:
        name = " ".join(str(entry.get(field)) for field in fields)
        while name in table:
            name += " again"
        table[name] = entry
    return table


def _same(old: Any, new: Any, key: str) -> bool:
    if old == new:
        return True
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (old, new))
    if numbers:
        return _close(old, new, least=1.0 if key in _SCORES else 0.0)
    if isinstance(old, str) and isinstance(new, str):
        if key == "png":
            return _same_picture(old, new)
        if key == "tensors":
            return _same_tensors(old, new)
        return _same_text(old, new)
    return False


def _close(old: float, new: float, *, least: float = 1.0) -> bool:
    """Return whether numbers agree within a tolerance of their own size, or of `least` if that is more."""
    return abs(old - new) <= TOLERANCE * max(least, abs(old), abs(new))


def _same_text(old: str, new: str) -> bool:
    """Return whether texts say the same, with numbers that agree to a tolerance or to their last digit.

    >>> _same_text("71.0 % of 50", "71.1 % of 50"), _same_text("71.0 % of 50", "71.0 % of 60")
    (True, False)
    """
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    if "time budget" in new:  # how long something would take is never the same
        return True
    return all(
        _close(float(a.replace(",", "")), float(b.replace(",", ""))) or _last_digit(a, b)
        for a, b in zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    )


def _last_digit(old: str, new: str) -> bool:
    """Return whether decimals of the same length differ by one in the last place."""
    places = [len(one.partition(".")[2]) for one in (old, new)]
    if places[0] != places[1] or not places[0] or "e" in old + new:
        return False
    return math.isclose(abs(float(old.replace(",", "")) - float(new.replace(",", ""))), 10 ** -places[0])


def _same_picture(old: str, new: str) -> bool:
    try:
        with _opened(old) as one, _opened(new) as other:
            if one.size != other.size or one.mode != other.mode:  # before anything is unpacked
                return False
            a, b = (np.asarray(image, dtype=np.float32) for image in (one, other))
    except (OSError, ValueError, binascii.Error, SyntaxError):
        return False
    return float(np.abs(a - b).mean()) <= _PIXELS


def _opened(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png, validate=True)), formats=["PNG"])


def _same_tensors(old: str, new: str) -> bool:
    from safetensors.numpy import load

    try:
        a, b = (load(base64.b64decode(one, validate=True)) for one in (old, new))
    except Exception:  # safetensors has errors of its own, and a forged text may be anything
        return False
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return False
    gaps = (np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)) for name in a if a[name].size)
    return all(float(gap.mean()) <= _NUMBERS for gap in gaps)
