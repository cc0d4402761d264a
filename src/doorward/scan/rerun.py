"""Rerun a report by its hashes and seeds, and say what differs."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.core.files import open_regular
from doorward.reports import from_json
from doorward.scan.comparison import compare
from doorward.scan.context import Progress
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest

#: Bytes of the largest report that is read.
_LARGEST = 256 << 20


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
        old = from_json(_text(path))
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


def _text(path: Path) -> str:
    """Return the text of a report.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise InputError(f"cannot be read: it has more than {_LARGEST >> 20} MiB")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise InputError("no such file; expected the report.json that a scan wrote") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError("this is no Doorward report; expected the report.json that a scan wrote") from None


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
        model=place(request.model, instead.model),
        weights=place(request.weights, instead.weights),
        clean=place(request.clean, instead.clean),
        train=place(request.train, instead.train),
        device=instead.device or request.device,
        keep_model=None,  # a second run writes nothing
    )
