"""Models scanned on a Ray cluster: each once, whatever node is lost."""

from __future__ import annotations

import importlib.util
import pickle
import threading
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")

from command_line import call
from doorward.fleet.engine import FleetSettings, Progress, note, work
from doorward.fleet.sources import find_models
from doorward.fleet.store import FleetStore
from doorward.scan.request import ScanRequest

RAY = importlib.util.find_spec("ray") is not None
#: A detector that takes its time, so that a node is lost while it works.
SLOW = '''
import time
from doorward.detectors.base import Detector

class Slow(Detector):
    """Take time."""
    title = "Slow"
    source = "tests"
    limits = "It finds nothing."
    needs = frozenset({"artifact"})
    level = "artifact"

    def examine(self, subject, *, generator, device, deadline):
        time.sleep(1.0)
        return self.finding(summary="nothing", verdict="nothing_found")
'''


def test_a_cluster_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(1))
    scan = ("fleet", "scan", tmp_path / "m.pkl", "--store", f"sqlite:///{tmp_path}/fleet.sqlite", "--ray")
    if not RAY:
        told = call(*scan, "auto")
        assert told.code == 2
        assert "--ray needs the package 'ray': pip install 'doorward[ray]'" in told.err
        return
    for address, words in (
        ("ray://host:10001", "expected HOST:PORT"),
        ("127.0.0.1:1", "no server answers at 127.0.0.1:1"),
    ):
        told = call(*scan, address)
        assert told.code == 2
        assert words in told.err
        assert "Traceback" not in told.err


@pytest.mark.skipif(not RAY, reason="Ray is not installed")
@pytest.mark.filterwarnings("default")
def test_a_node_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other tests go first
    from ray.cluster_utils import Cluster

    from doorward.fleet.cluster import RayRunner

    (tmp_path / "slow.py").write_text(SLOW)
    folder = tmp_path / "models"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.pkl").write_bytes(pickle.dumps(i))
    common = ScanRequest(detectors=(f"{tmp_path}/slow.py:Slow",), time_budget=60.0)
    store = FleetStore(f"sqlite:///{tmp_path}/fleet.sqlite")
    note(find_models([str(folder)], common), store)
    small = {"num_cpus": 1, "object_store_memory": 100 << 20}
    # Ray takes 127.0.0.1 for the address that others see, to which nothing is bound
    head = small | {"node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    told: list[str] = []
    killed: list[threading.Thread] = []
    try:
        lost = cluster.add_node(**small, node_ip_address="127.0.0.3")

        def tell(now: Progress) -> None:
            told.append(now.found.path)
            if len(told) == 2:
                killed.append(threading.Thread(target=cluster.remove_node, args=(lost, False)))
                killed[0].start()

        runner = RayRunner(cluster.address, store)
        assert runner.workers == 2
        assert work(store, FleetSettings(workers=3), told=tell, runner=runner) == 8
    finally:
        for thread in killed:
            thread.join()
        cluster.shutdown()
    assert killed
    assert Counter(told) == Counter(one.path for one in store.rows())
    assert {(one.state, one.verdict) for one in store.rows()} == {("done", "could_not_tell")}
