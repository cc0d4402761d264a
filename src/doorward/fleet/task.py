"""Scan one model of a store: fetch it where it is elsewhere, then try it in a process of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from doorward.artifacts.digest import artifact_digest
from doorward.core.errors import InputError
from doorward.core.report_json import from_json, to_json
from doorward.fleet.attempt import BASE, GRACE, Attempt, attempt
from doorward.fleet.keys import key_for
from doorward.fleet.remote import Copy, fetched, is_address
from doorward.fleet.store import FleetStore, Known, Waiting
from doorward.scan.request import ScanRequest

#: Tells whether a model is still to be scanned, now that its digest is known.
Admit = Callable[[Waiting, str, Known | None], bool]


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the scan of one model may take.

    Attributes:
        memory: bytes that its process may take, beyond what it takes anyway.
        disk: bytes that a copy of it may take, where it is fetched.
    """

    memory: int = 4 << 30
    disk: int = 16 << 30


def run(one: Waiting, settings: TaskSettings, admit: Admit) -> Attempt:
    """Scan a model, and remove what was fetched for it."""
    if not is_address(one.path):
        return _try(one, settings, str(one.request["model"]))
    with contextlib.ExitStack() as stack:
        try:
            copy = stack.enter_context(fetched(one.path, settings.disk))
            digest = artifact_digest(copy.path).sha256
        except (InputError, OSError) as error:
            return Attempt(error=f"not fetched: {error}", lost=True)
        if not admit(one, digest, _known(copy, digest)):
            return Attempt(elsewhere=True)
        return _renamed(_try(one, settings, str(copy.path)), copy.path, one.path)


def admit_to(store: FleetStore, one: Waiting, digest: str, known: Known | None) -> bool:
    """Tell a store the digest of what was fetched; return whether it is still to be scanned."""
    return store.admit(one, key_for(digest, ScanRequest.from_json(one.request)), known, digest)


def _known(copy: Copy, digest: str) -> Known | None:
    if copy.stamp is None or copy.beyond_stamp is None:
        return None
    return Known(stamp=copy.stamp, digest=digest, beyond=copy.beyond, beyond_stamp=copy.beyond_stamp)


def _try(one: Waiting, settings: TaskSettings, model: str) -> Attempt:
    request = ScanRequest.from_json(one.request)
    gib = settings.memory / (1 << 30)
    asked = replace(request, model=model, memory=min(request.memory or gib, gib))
    return attempt(asked.to_json(), memory=settings.memory + BASE, seconds=request.time_budget + GRACE)


def _renamed(found: Attempt, copy: Path, url: str) -> Attempt:
    """Return what was found, with the address wherever the path of the copy is named."""
    report, error = found.report, found.error
    if report is not None:
        old, new = (json.dumps(str(name))[1:-1] for name in (copy, url))
        report = from_json(to_json(report).replace(old, new))
    return found.model_copy(update={"report": report, "error": error and error.replace(str(copy), url)})
