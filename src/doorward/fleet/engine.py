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
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.core.report_json import to_json
from doorward.fleet.attempt import Attempt
from doorward.fleet.keys import key_for, key_of
from doorward.fleet.remote import Listing, further, is_address, list_model
from doorward.fleet.sources import Place
from doorward.fleet.store import LEASE, TRIES, Done, FleetStore, Waiting
from doorward.fleet.task import TaskSettings, admit_to, run

#: Models that are noted in one transaction.
NOTED = 200
#: Seconds after which a driver looks again whether others have left something.
IDLE = 2.0


@dataclass(frozen=True, kw_only=True)
class FleetSettings(TaskSettings):
    """What a driver needs to know.

    Attributes:
        workers: models that are scanned at the same time.
    """

    workers: int = 1


@dataclass(frozen=True)
class Noted:
    """What was noted in a store.

    Attributes:
        paths: of all models that were found.
        new: how many contents were never scanned so, as far as that is known before they are fetched.
        unreadable: paths that cannot be read, and why.
    """

    paths: tuple[str, ...]
    new: int
    unreadable: tuple[tuple[str, str], ...]


def note(
    places: Iterable[Place], store: FleetStore, *, progress: Callable[[str], None] = lambda _: None
) -> Noted:
    """Note models in a store, keyed by content; what was scanned so before is not scanned again.

    The key is made of the digest of all that loading reaches, of how it is scanned, and of the code that
    does. Models that cannot be read are left out and told.
    """
    paths: list[str] = []
    unreadable: list[tuple[str, str]] = []
    new = 0
    left = iter(places)
    while group := list(islice(left, NOTED)):
        wanted = []
        for place in group:
            try:
                wanted.append(_waiting(place, store))
            except (InputError, OSError) as error:
                unreadable.append((place.path, str(error)))
        if wanted:
            new += store.enqueue(wanted)
        paths += [one.path for one in wanted]
        progress(f"noted {len(paths):,} models, {new:,} of them new")
    return Noted(tuple(paths), new, tuple(unreadable))


def _waiting(place: Place, store: FleetStore) -> Waiting:
    if is_address(place.path):
        return _waiting_elsewhere(place, store)
    known = key_of(place)
    return Waiting(key=known.key, digest=known.digest, path=place.path, request=place.request.to_json())


def _waiting_elsewhere(place: Place, store: FleetStore) -> Waiting:
    """Return what is known of a model that is not on this machine: its digest, if it was fetched before."""
    listing = place.listing or list_model(place.path)
    digest = _digest(listing, store)
    content = digest or f"{listing.url} {listing.stamp}"
    key = key_for(content, place.request)
    return Waiting(key=key, digest=digest, path=place.path, request=place.request.to_json())


def _digest(listing: Listing, store: FleetStore) -> str:
    known = store.known(listing.stamp) if listing.stamp else None
    if known is None or (known.beyond and further(listing.url, known.beyond).stamp != known.beyond_stamp):
        return ""
    return known.digest


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


class Runner(Protocol):
    """Whatever scans models, here or elsewhere."""

    def submit(self, one: Waiting, settings: TaskSettings) -> Future[Attempt]:
        """Begin to scan a model."""

    def stop(self) -> None:
        """End what is under way."""

    def close(self) -> None:
        """Wait for what is under way, and let go of all."""


class LocalRunner:
    """Scan models in processes of this machine."""

    def __init__(self, store: FleetStore, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._admit = partial(admit_to, store)

    def submit(self, one: Waiting, settings: TaskSettings) -> Future[Attempt]:
        """Begin to scan a model."""
        return self._pool.submit(run, one, settings, self._admit)

    def stop(self) -> None:
        """End what is under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # else closing waits for them
            process.kill()

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()


def work(
    store: FleetStore,
    settings: FleetSettings,
    *,
    told: Callable[[Progress], None] = lambda _: None,
    runner: Runner | None = None,
) -> int:
    """Scan what waits until nothing does, and return how many models this driver has ended.

    At most as many as there are workers are under way. Several drivers may work on one store. An interruption
    gives back what is under way.

    Args:
        runner: what scans; processes of this machine if None.

    Raises:
        StoreError: if the store can no longer be reached.
        InputError: if the runner cannot scan at all.
    """
    owner = f"{socket.gethostname()[:24]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    begun, done = time.monotonic(), 0
    runner = runner or LocalRunner(store, settings.workers)
    with closing(runner), _beating(store, owner):
        running: dict[Future[Attempt], Waiting] = {}
        try:
            while True:
                room = settings.workers - len(running)
                for one in store.claim(owner, room) if room else ():
                    running[runner.submit(one, settings)] = one
                if not running:
                    if not store.left():
                        return done
                    time.sleep(IDLE)  # others work on what is left; if they die, it comes back
                    continue
                for future in wait(running, timeout=IDLE, return_when=FIRST_COMPLETED).done:
                    one = running.pop(future)
                    ended = _ended(store, one, future.result())
                    if ended is not None:
                        done += 1
                        told(Progress(ended, done, store.left(), time.monotonic() - begun))
        except BaseException:
            runner.stop()
            store.release(owner)
            raise


def _ended(store: FleetStore, one: Waiting, found: Attempt) -> Done | None:
    """Write what came of a model; None if it is tried again, or is the matter of others."""
    if found.elsewhere:
        return None
    if found.lost and one.tries < TRIES:
        store.give_back(one)
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
    return done if store.finish(one, done, None if report is None else to_json(report)) else None


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
