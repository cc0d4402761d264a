"""Scan one model in a process of its own, which may hang, crash or eat memory without harm to others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from doorward.core.records import Record, Report

#: Seconds beyond the time budget of a scan after which its process is killed: loading has no part in it.
GRACE = 120.0
#: Bytes that a process may take before it scans anything.
BASE = 3 << 30
#: Imported once, before the processes part from each other.
PRELOADED = ["doorward.scan.pipeline", "doorward.fleet.attempt"]
_STARTING = threading.Lock()


class Attempt(Record):
    """What came of one process.

    Attributes:
        report: the report, if there is one.
        error: why there is none.
        lost: whether the process died or was killed, or nothing was fetched, so that another try may help.
        elsewhere: whether it is not to be scanned, since its content is known or it belongs to others.
        peak_memory: bytes.
    """

    report: Report | None = None
    error: str | None = None
    lost: bool = False
    elsewhere: bool = False
    seconds: float = 0.0
    peak_memory: int | None = None


def attempt(request: dict[str, Any], *, memory: int, seconds: float) -> Attempt:
    """Scan a model as a `ScanRequest` in JSON says, in a new process.

    Args:
        memory: bytes that the process may take for itself.
        seconds: after which it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_scan, args=(there, request, memory), daemon=True)
    begun = time.monotonic()
    with _without_main():
        process.start()
    there.close()
    found: Attempt | None = None
    hung = False
    try:
        if here.poll(seconds):
            found = here.recv()
        else:
            hung = True
    except EOFError:
        pass
    finally:
        if process.is_alive() and (hung or found is None):
            process.kill()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        here.close()
    took = time.monotonic() - begun
    if found is not None:
        return found.model_copy(update={"seconds": took})
    why = f"it did not end within {seconds:.0f} s" if hung else _ending(process.exitcode)
    return Attempt(error=why, lost=True, seconds=took)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not run the caller's script first, which is not ours and may not end."""
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _ending(code: int | None) -> str:
    """Return what an exit code of a process says."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


def _scan(connection: Connection, request: dict[str, Any], memory: int) -> None:
    """Scan, in the child, and send what was found."""
    import torch

    from doorward.core.errors import DoorwardError
    from doorward.scan.pipeline import scan
    from doorward.scan.request import ScanRequest

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(ValueError, OSError):  # a limit that is lower already stays
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        found = Attempt(report=scan(ScanRequest.from_json(request)))
    except DoorwardError as error:
        found = Attempt(error=str(error))
    except MemoryError:
        found = Attempt(error=_too_large(memory))
    except RuntimeError as error:
        found = Attempt(error=_too_large(memory) if "allocate memory" in str(error) else _fault(error))
    except Exception as error:  # whatever one model does, the fleet goes on
        found = Attempt(error=_fault(error))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send(found.model_copy(update={"peak_memory": used}))
    connection.close()


def _end_with_parent() -> None:
    """End this process when the one that waits for it was killed: nobody wants its answer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _too_large(memory: int) -> str:
    return f"it wants more than {memory / (1 << 30):.1f} GiB of memory"


def _fault(error: Exception) -> str:
    return f"a fault in Doorward: {type(error).__name__}: {error}"[:500]
