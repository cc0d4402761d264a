"""Run planned trials in processes of our own, so that whatever is killed at any time is made up for.

The runner alone writes results; workers only make models, which the cache takes whole or not at all.
Trials of the same model go to the same worker, one after the other, so that no model is trained twice; those
that scan it in the same way, be it for another suite, are one scan, whose result is copied.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from doorward.bench.cache import ModelCache
from doorward.bench.fingerprints import with_current_code
from doorward.bench.outcome import Outcome, stored_outcome
from doorward.bench.plan import Planned, Sources
from doorward.bench.store import Row, Status, Store, now
from doorward.bench.suite import Trial, parts_of
from doorward.bench.worker import TrialRunner
from doorward.core.devices import keep_freed_memory
from doorward.core.errors import DoorwardError
from doorward.core.records import Observations, Verdict
from doorward.scan.calibration import calibrations
from doorward.scan.environment import environment
from doorward.scan.poison import conclude_training_data, of_training_data
from doorward.scan.verdict import conclude

#: A trial whose process is lost so often has failed.
ATTEMPTS = 2
#: How worker processes start: as fresh interpreters, since a fork would inherit torch's threads and locks.
START_METHOD = "spawn"


class RunError(DoorwardError):
    """Tells that a run had to end before its time; the same command goes on where it ended."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run needs to know of the machine.

    Attributes:
        cache: folder of trained models.
        data: folder of data sets, None if there is none.
        workers: number of processes.
        threads: torch threads of each.
        judge: scan the models; else they are only made, and nothing is stored.
    """

    cache: Path
    data: Path | None = None
    workers: int = 1
    threads: int = 1
    device: str = "cpu"
    judge: bool = True


@dataclass(frozen=True)
class Event:
    """What happens: a trial is begun (no status) or has ended; with "made" where it is not judged.

    Attributes:
        note: what is done now, or why the trial ended as it did.
        seconds: the trial took, if it has ended.
    """

    planned: Planned
    status: Status | Literal["made"] | None
    note: str
    seconds: float = 0.0


def pending(plan: Iterable[Planned], store: Store) -> list[Planned]:
    """Return the trials that are not done."""
    return [one for one in plan if (row := store.get(one.key)) is None or row.status != "done"]


def unscanned(plan: Iterable[Planned], store: Store) -> list[Planned]:
    """Return a trial for each work of which the store has no result, of whatever suite."""
    works: dict[str, Planned] = {}
    for one in plan:
        works.setdefault(one.work, one)
    return [one for one in works.values() if store.done(one.work) is None]


def unmade(plan: Iterable[Planned], cache: ModelCache) -> list[Planned]:
    """Return a trial for each model that can be made and is not cached."""
    models: dict[str, Planned] = {}
    for one in plan:
        if one.missing is None:
            models.setdefault(one.model_key, one)
    return [one for key, one in models.items() if cache.get(key) is None]


def run(
    plan: Sequence[Planned],
    store: Store,
    settings: RunSettings,
    *,
    report_progress: Callable[[Event], None] = lambda _: None,
) -> None:
    """Run what is not done yet and store every result as it comes.

    Raises:
        RunError: if a disk is full, or workers cannot even start.
        StoreError: if the results store cannot be written to.
    """
    todo = pending(plan, store)
    cache = ModelCache(settings.cache)
    cache.sweep()
    if not settings.judge:
        todo = unmade(todo, cache)
    revision = git_revision()
    same_work: dict[str, list[Planned]] = {}
    for one in todo:
        same_work.setdefault(one.work, []).append(one)

    def keep(
        one: Planned, status: Status, *, attempts: int = 1, error: str | None = None, **more: Any
    ) -> None:
        outcome: Outcome | None = more.get("outcome")
        row = Row(
            **_identity(one),
            status=status,
            attempts=attempts,
            resolved=one.resolved,
            versions=_versions(outcome),
            git_revision=revision,
            device=settings.device,
            threads=settings.threads,
            seconds=outcome and outcome.seconds,
            peak_memory=outcome and outcome.peak_memory,
            result=outcome and outcome.model_dump(mode="json"),
            error=error,
        )
        store.put(row)
        seen = outcome and outcome.seen and with_current_code(outcome.seen, one.resolved)
        note = error or (verdict_of(seen) if seen else "")
        report_progress(Event(one, status, note, more.get("seconds", 0.0)))
        if status != "died":
            for other in same_work[one.work]:
                if other.key != one.key:
                    copy(row, other)

    def copy(row: Row, to: Planned) -> None:
        store.put(row.model_copy(update=_identity(to) | {"attempts": 1, "finished": now()}))
        report_progress(Event(to, row.status, f"the same scan as {row.trial} of {row.suite}"))

    def with_seen(one: Planned) -> Planned:
        """Return a trial with what earlier scans of its model hold."""
        rows = {name: store.holding(part) for name, part in parts_of(one.resolved).items()}
        seen = {
            name: stored_outcome(row.trial, row.result)
            for name, row in rows.items()
            if row is not None and row.result is not None
        }
        return replace(one, seen=seen)

    def scanned(one: Planned) -> bool:
        """Return whether a job's trial was scanned meanwhile; if so, copy the result to all alike."""
        row = store.done(one.work)
        if row is None:
            return False
        for same in pending(same_work[one.work], store):
            copy(row, same)
        return True

    for one in todo:
        if one.missing is not None:
            keep(one, "skipped", error=one.missing)
    jobs: dict[str, list[Planned]] = {}
    for one, *_ in same_work.values():
        if one.missing is None and not (settings.judge and scanned(one)):
            jobs.setdefault(one.model_key, []).append(one)
    waiting = deque(jobs.values())
    with _workers(min(settings.workers, len(waiting)), settings) as pool:
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if not worker.job and waiting:
                    job = waiting.popleft()
                    if settings.judge:
                        job = [with_seen(one) for one in job if not scanned(one)]
                    worker.give(job)
            for worker in _ready([worker for worker in pool if worker.job]):
                one, message = worker.job[0], worker.hear()
                if message is None and not worker.begun:
                    raise RunError(f"a worker process ended by {worker.ending()} before it could begin")
                if message is None:  # the process is gone
                    previous = store.get(one.key)
                    attempts = 1 + (
                        previous.attempts if previous and previous.status in ("died", "failed") else 0
                    )
                    why = f"the worker process ended by {worker.ending()}; was there enough memory?"
                    keep(one, "failed" if attempts >= ATTEMPTS else "died", attempts=attempts, error=why)
                    rest = worker.job[1:] if attempts >= ATTEMPTS else worker.job
                    if rest:
                        waiting.appendleft(rest)
                    pool[pool.index(worker)] = worker.successor()
                elif isinstance(message, str):
                    report_progress(Event(one, None, message))
                elif isinstance(message, Stop):
                    raise RunError(message.why)
                elif message.outcome is None and message.error is None:
                    worker.job.pop(0)
                    report_progress(Event(one, "made", "", message.seconds))
                else:
                    worker.job.pop(0)
                    status: Status = "done" if message.outcome else "failed"
                    keep(one, status, error=message.error, outcome=message.outcome, seconds=message.seconds)


def _identity(one: Planned) -> dict[str, Any]:
    """Return what a row says of its trial; the rest is of the work."""
    return {
        "key": one.key,
        "suite": one.trial.suite,
        "scale": one.trial.scale,
        "trial": one.trial.name,
        "seed": one.trial.seed,
        "given": one.trial.model_dump(mode="json"),
    }


@dataclass(frozen=True)
class Ended:
    """How a trial ended: an outcome, or an error in one line; neither if its model was only made."""

    outcome: Outcome | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Stop:
    """The runner that going on is of no use."""

    why: str


@dataclass(eq=False)
class _Worker:
    """The runner's end of a worker; `job` is what it has still to do."""

    settings: RunSettings
    job: list[Planned] = field(default_factory=list)
    begun: bool = False

    def __post_init__(self) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.settings), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, job: list[Planned]) -> None:
        """Hand over trials of one model."""
        self.job = job
        if job:
            try:
                self.connection.send(self.job)
            except OSError:  # it is gone; hearing from it will tell
                return

    def hear(self) -> str | Ended | Stop | None:
        """Return the next message, None if the process is gone."""
        try:
            message: str | Ended | Stop = self.connection.recv()
        except (EOFError, OSError):
            return None
        self.begun = True
        return message

    def ending(self) -> str:
        """Return how the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def successor(self) -> _Worker:
        """Return a new worker in the place of this one."""
        self.connection.close()
        return _Worker(self.settings)

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _workers(count: int, settings: RunSettings) -> Iterator[list[_Worker]]:
    """Keep workers for the time of the block."""
    pool: list[_Worker] = []
    try:
        pool += [_Worker(settings) for _ in range(count)]
        yield pool
    finally:
        for worker in pool:
            worker.end()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait until at least one worker has something to say, or has died, and return those."""
    if not workers:
        return []
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _work(connection: Connection, settings: RunSettings) -> None:
    """Do jobs until there are no more; runs in a process of its own."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to hear
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    bench = TrialRunner(ModelCache(settings.cache), Sources(settings.data), settings.device)
    while True:
        for planned in connection.recv():
            connection.send(_try(bench, planned, connection.send, judge=settings.judge))


def _end_with_parent() -> None:
    """End this process as soon as the runner is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _try(
    bench: TrialRunner, planned: Planned, report_progress: Callable[[str], None], *, judge: bool
) -> Ended | Stop:
    """Make and judge one trial's model; whatever goes wrong is an answer too."""
    started = time.monotonic()
    try:
        report_progress("making the model")
        cached = bench.make(planned)
        outcome = None
        if judge:
            report_progress(_doing(planned.trial))
            outcome = bench.judge(planned, cached=cached)
    except Exception as error:
        if _disk_is_full(error):
            return Stop(
                f"no space is left for the cache {bench.cache.folder}; all results so far are kept: "
                "make room, then run the same command again"
            )
        kind = "" if isinstance(error, DoorwardError) else f"{type(error).__name__}: "
        return Ended(None, " ".join(f"{kind}{error}".split()), time.monotonic() - started)
    return Ended(outcome, None, time.monotonic() - started)


def _doing(trial: Trial) -> str:
    """Return what is done with a trial's model."""
    if trial.repair_settings is not None:
        return "repairing"
    return "scanning" if trial.scan_settings.detectors is not None else "measuring"


def _disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _versions(outcome: Outcome | None) -> dict[str, str]:
    if outcome is None:
        return {}
    made = outcome.seen.environment if outcome.seen else environment("cpu")
    return {"doorward": made.doorward, "python": made.python, **made.packages}


def verdict_of(seen: Observations) -> Verdict:
    """Return the verdict on a model, by all clean models that the detectors are calibrated on."""
    calibration = calibrations(one.detector for one in seen.measurements)
    judge = conclude_training_data if of_training_data(seen) else conclude
    return judge(seen, calibration).verdict


def git_revision() -> str | None:
    """Return the revision that this code is of, `+` if changed since; None outside of a checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
