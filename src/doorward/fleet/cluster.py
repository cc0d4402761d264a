"""Scan the models of a store on the nodes of a Ray cluster."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from typing import Any

from doorward.core.errors import DoorwardError, InputError
from doorward.fleet.attempt import Attempt
from doorward.fleet.registry import VARIABLES
from doorward.fleet.remote import is_address
from doorward.fleet.servers import check_answers
from doorward.fleet.store import FleetStore, Known, Waiting
from doorward.fleet.task import TaskSettings, admit_to, run

#: Where this Doorward's code is.
ROOT = Path(__file__).parents[1]
#: How often Ray itself repeats a task whose worker or node was lost.
RETRIES = 3


class Gate:
    """Tell tasks which models are still to be scanned, from the driver's node, which has the store."""

    def __init__(self, url: str) -> None:
        self._store = FleetStore(url)

    def admit(self, one: Waiting, digest: str, known: Known | None) -> bool:
        """Return whether a model is still to be scanned."""
        return admit_to(self._store, one, digest, known)


def scan_on_node(one: Waiting, settings: TaskSettings, gate: Any, code: str) -> Attempt:
    """Scan a model, in a task on any node.

    Args:
        gate: the handle of a `Gate`.
        code: what `code_here` returns where the driver runs.

    Raises:
        InputError: if the node has another Doorward, or does not see the model.
    """
    import ray

    node = ray.util.get_node_ip_address()
    if code_here() != code:
        raise InputError(f"--ray: the node {node} has another version of Doorward than this machine")
    if not is_address(one.path) and not Path(one.path).exists():
        raise InputError(f"--ray: the node {node} does not see {one.path}; all nodes need the same folders")
    return run(one, settings, lambda *told: bool(ray.get(gate.admit.remote(*told))))


@cache
def code_here() -> str:
    """Return the hash of this Doorward's code, without importing it: a task's own process does that."""
    code = hashlib.sha256()
    for file in sorted(ROOT.rglob("*.py")):
        code.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return code.hexdigest()


class RayRunner:
    """Run scans as tasks of a Ray cluster of which this machine is a node.

    Args:
        address: HOST:PORT of its head, or auto for the cluster that runs here.
        store: is asked whether what was fetched is still to be scanned.

    Raises:
        ImportError: if Ray is not installed.
        InputError: if there is no cluster, or it has another version.
    """

    def __init__(self, address: str, store: FleetStore) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        host, colon, port = address.rpartition(":")
        if address != "auto":
            if not colon or not port.isdigit() or "/" in host:
                raise InputError(f"--ray {address}: expected HOST:PORT of a cluster's head, or auto")
            check_answers(host, int(port), asked=f"--ray {address}")
        passed = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        try:
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": passed} if passed else None,
            )
        except Exception as error:  # of many kinds
            raise InputError(f"--ray {address}: cannot be used ({_first_line(error)})") from error
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        always = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._ray = ray
        self._gate = ray.remote(Gate).options(scheduling_strategy=here, **always).remote(store.url)
        self._task = ray.remote(scan_on_node)
        self._running: dict[Future[Attempt], Any] = {}

    @property
    def workers(self) -> int:
        """Return how many processors the cluster has."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, one: Waiting, settings: TaskSettings) -> Future[Attempt]:
        """Scan a model on one processor of any node."""
        gpus = int(str(one.request.get("device", "")).startswith("cuda"))
        task = self._task.options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        found: Future[Attempt] = Future()
        reference = task.remote(one, settings, self._gate, code_here())
        self._running[found] = reference
        reference.future().add_done_callback(partial(self._settle, found))
        return found

    def _settle(self, found: Future[Attempt], own: Future[Any]) -> None:
        """Take over what came of a task; one that Ray lost may be tried again."""
        from ray.exceptions import RayError, RayTaskError

        self._running.pop(found, None)
        error = own.exception()
        if error is None:
            found.set_result(own.result())
        elif isinstance(error, RayTaskError):
            cause = error.cause
            if not isinstance(cause, DoorwardError):
                cause = InputError(f"--ray: a node cannot run this Doorward ({_last_line(error)})")
            found.set_exception(cause)
        elif isinstance(error, RayError):
            found.set_result(Attempt(error=f"Ray lost its task: {_first_line(error)}", lost=True))
        else:
            found.set_exception(error)

    def stop(self) -> None:
        """End what is under way."""
        for reference in list(self._running.values()):
            self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
