"""Scan what waits in a store until nothing is left."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.core.report_json import to_json
from doorward.fleet.attempt import BASE, GRACE, Attempt, attempt
from doorward.fleet.keys import key_of
from doorward.fleet.sources import Place
from doorward.fleet.store import LEASE, TRIES, Done, FleetStore, Waiting
from doorward.scan.request import ScanRequest

#: Models that are noted in one transaction.
NOTED = 200
#: Seconds after which a driver looks again whether others have left something.
IDLE = 2.0


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """What a driver needs to know.

    Attributes:
        workers: models that are scanned at the same time.
        memory: bytes that the process of each may take, beyond what it takes anyway.
    """

    workers: int = 1
    memory: int = 4 << 30


@dataclass(frozen=True)
class Noted:
    """What was noted in a store.

    Attributes:
        keys: of all places that were found.
        new: how many contents were never scanned so.
        unreadable: paths that cannot be read, and why.
    """

    keys: tuple[str, ...]
    new: int
    unreadable: tuple[tuple[str, str], ...]


def note(
    places: Iterable[Place], store: FleetStore, *, progress: Callable[[str], None] = lambda _: None
) -> Noted:
    """Note models in a store, keyed by content; what was scanned so before is not scanned again.

    The key is made of the digest of all that loading reaches, of how it is scanned, and of the code that
    does. Models that cannot be read are left out and told.
    """
    keys: list[str] = []
    unreadable: list[tuple[str, str]] = []
    new = 0
    left = iter(places)
    while group := list(islice(left, NOTED)):
        wanted = []
        for place in group:
            try:
                wanted.append(_waiting(place))
            except (InputError, OSError) as error:
                unreadable.append((place.path, str(error)))
        if wanted:
            new += store.enqueue(wanted)
        keys += [one.key for one in wanted]
        progress(f"noted {len(keys):,} models, {new:,} of them new")
    return Noted(tuple(keys), new, tuple(unreadable))


def _waiting(place: Place) -> Waiting:
    known = key_of(place)
    return Waiting(key=known.key, digest=known.digest, path=place.path, request=place.request.to_json())


@dataclass(frozen=True)
class Progress:
    """How far a driver is.

    Attributes:
        found: what has just ended.
        done: how many this driver has ended.
        left: how many wait or are worked on.
        seconds: since it began.
    """

    found: Done
    done: int
    left: int
    seconds: float

    @property
    def seconds_left(self) -> float:
        """Return how long the rest takes at this pace."""
        return self.left * self.seconds / max(1, self.done)


def work(
    store: FleetStore, settings: FleetSettings, *, told: Callable[[Progress], None] = lambda _: None
) -> int:
    """Scan what waits until nothing does, and return how many models this driver has ended.

    At most as many as there are workers are under way. Several drivers may work on one store. An interruption
    gives back what is under way.

    Raises:
        StoreError: if the store can no longer be reached.
    """
    owner = f"{socket.gethostname()[:24]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    begun, done = time.monotonic(), 0
    with ThreadPoolExecutor(settings.workers) as pool, _beating(store, owner):
        running: dict[Future[Attempt], Waiting] = {}
        try:
            while True:
                room = settings.workers - len(running)
                for one in store.claim(owner, room) if room else ():
                    own = pool.submit(attempt, _asked(one, settings), **_limits(one, settings))
                    running[own] = one
                if not running:
                    if not store.left():
                        return done
                    time.sleep(IDLE)  # others work on what is left; if they die, it comes back
                    continue
                for future in wait(running, timeout=IDLE, return_when=FIRST_COMPLETED).done:
                    one = running.pop(future)
                    ended = _ended(store, owner, one, future.result())
                    if ended is not None:
                        done += 1
                        told(Progress(ended, done, store.left(), time.monotonic() - begun))
        except BaseException:
            for future in running:
                future.cancel()
            for process in multiprocessing.active_children():  # else leaving the pool waits for them
                process.kill()
            store.release(owner)
            raise


def _ended(store: FleetStore, owner: str, one: Waiting, found: Attempt) -> Done | None:
    """Write what came of a model; None if it is tried again, or belongs to another driver by now."""
    if found.lost and one.tries < TRIES:
        store.give_back(owner, one.key)
        return None
    report = found.report
    done = Done(
        key=one.key,
        digest=one.digest,
        path=one.path,
        state="failed" if report is None else "done",
        seconds=found.seconds,
        peak_memory=found.peak_memory,
        error=found.error,
        **({} if report is None else _said(report)),
    )
    return done if store.finish(owner, done, None if report is None else to_json(report)) else None


def _said(report: Report) -> dict[str, Any]:
    return {
        "verdict": report.verdict,
        "p_value": report.p_value,
        "targets": tuple(report.class_name(target) for target in report.targets),
    }


@contextmanager
def _beating(store: FleetStore, owner: str) -> Iterator[None]:
    """Show signs of life inside the block."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(LEASE / 4):
            try:
                store.beat(owner)
            except Exception:  # the driver itself meets the same and ends, or the store is back by then
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _limits(one: Waiting, settings: FleetSettings) -> dict[str, Any]:
    return {"memory": settings.memory + BASE, "seconds": float(one.request["time_budget"]) + GRACE}


def _asked(one: Waiting, settings: FleetSettings) -> dict[str, Any]:
    """Return the request with the memory that the process has."""
    request = ScanRequest.from_json(one.request)
    gib = settings.memory / (1 << 30)
    return replace(request, memory=min(request.memory or gib, gib)).to_json()
