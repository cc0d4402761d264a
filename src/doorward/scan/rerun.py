"""Rerun a report by its hashes and seeds, and say what differs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from doorward.core import formatting
from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.core.records import ControlResult, Rate, Report
from doorward.reports import from_json, phrases
from doorward.scan.context import Progress
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest

#: Two runs on the same machine agree to this; other machines may round differently.
TOLERANCE = 1e-3

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What has changed since the report: where files lie now, and which device there is.

    Attributes:
        model, weights, clean, train: places of now, as `ScanRequest` takes them.
        factory: the factory that the report names, said again, since it is code that will be run.
        device: torch device.
    """

    model: str | None = None
    weights: str | None = None
    clean: str | None = None
    train: str | None = None
    factory: str | None = None
    device: str | None = None


def verify(path: Path, *, instead: Overrides | None = None, progress: Progress | None = None) -> list[str]:
    """Return what differs between a report and a new scan with its arguments; nothing if they agree.

    Relative paths are looked for in the folder where the report was asked for, then in the current one.

    Raises:
        InputError: if the report cannot be read, does not say how it was made, or needs what is not there.
    """
    instead = instead or Overrides()
    path = path / "report.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: cannot be read: {why}") from None
    try:
        old = from_json(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not old.request:
        raise InputError(
            f"{path}: the report says nothing of how it was made; only scans of files can be rerun"
        )
    try:
        request = ScanRequest.from_json(old.request)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{path}: the report's request cannot be read: {where}") from None
    if request.factory != instead.factory:
        # the report may come from the model's supplier
        told = f"was made with --factory {request.factory}" if request.factory else "has no --factory"
        raise InputError(f"{path}: the report {told}; that is code to be run, so say the same here")
    check_device(instead.device or request.device)
    try:
        return compare(old, scan(_now(request, instead), progress=progress))
    except InputError as error:
        raise InputError(
            f"the scan cannot be run again: {str(error).rstrip('.')}. "
            "If files have moved, say where they are now: --model, --weights, --clean, --train"
        ) from error


def _now(request: ScanRequest, instead: Overrides) -> ScanRequest:
    """Return the request with places of now."""

    def place(given: str | None, stated: str | None) -> str | None:
        if stated is not None or given is None or request.folder is None:
            return stated or given
        joined = os.path.join(request.folder, given)
        there = os.path.lexists(joined) or os.path.lexists(joined.rpartition(":")[0])
        return joined if there else given

    return replace(
        request,
        model=place(request.model, instead.model) or request.model,
        weights=place(request.weights, instead.weights),
        clean=place(request.clean, instead.clean),
        train=place(request.train, instead.train),
        device=instead.device or request.device,
    )


def compare(old: Report, new: Report) -> list[str]:
    """Return what differs between two reports, in words; times and machines may differ."""
    differences = []

    def same(what: str, a: T, b: T, words: Callable[[T], str] = str) -> None:
        if a != b:
            differences.append(f"{what}: was {words(a)}, is {words(b)}")

    if old.subject and new.subject:
        same("model sha256", old.subject.sha256, new.subject.sha256)
        same("clean accuracy", old.subject.clean_accuracy, new.subject.clean_accuracy, _accuracy)
    for a, b in zip(old.data, new.data, strict=False):
        same(f"{a.role} data sha256", a.sha256, b.sha256)
        same(f"images used of the {a.role} data", a.used, b.used)
    same("verdict", phrases.TITLES[old.verdict].lower(), phrases.TITLES[new.verdict].lower())
    same("targets", old.targets, new.targets, lambda t: formatting.classes_label(t, phrases.class_names(new)))
    same("detectors", [f.detector for f in old.findings], [f.detector for f in new.findings], _names)
    for one, other in zip(old.findings, new.findings, strict=False):
        same(
            f"{one.detector} verdict",
            phrases.TITLES[one.verdict].lower(),
            phrases.TITLES[other.verdict].lower(),
        )
        if (
            one.score is not None
            and other.score is not None
            and abs(one.score - other.score) > TOLERANCE * max(1, abs(one.score))
        ):
            differences.append(f"{one.detector} score: was {one.score:.4f}, is {other.score:.4f}")
    same("positive control", _control(old), _control(new), _names)
    if differences:
        same("versions", _versions(old), _versions(new), _names)
    return differences


def _accuracy(value: Rate | None) -> str:
    return formatting.rate(value) if value else "not measured"


def _control(report: Report) -> list[str]:
    return [f"{one.family} {_fate(one)}" for one in report.positive_control.controls]


def _fate(one: ControlResult) -> str:
    return "found" if one.recovered else "missed" if one.planted else "not planted"


def _names(values: list[str]) -> str:
    return ", ".join(values) or "none"


def _versions(report: Report) -> list[str]:
    packages = {"doorward": report.environment.doorward} | report.environment.packages
    return [f"{name} {version}" for name, version in packages.items()]
