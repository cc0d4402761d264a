"""Runs: nothing is lost, repeated or counted twice, whatever is killed at whatever time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bench_examples import QUICK, calibration_around, clean, planted, suite, trials
from doorward.bench import results, runner
from doorward.bench.cache import ModelCache
from doorward.bench.plan import Planned, Sources, plan
from doorward.bench.runner import Event, RunError, RunSettings, git_revision, run, unmade, unscanned
from doorward.bench.store import Row, Store, StoreError
from doorward.bench.suite import Data, Group, MethodChoice, ScanSettings, Trial, expand
from doorward.core.errors import InputError
from doorward.core.records import Observations
from doorward.scan.verdict import conclude

SOURCES = Sources(None)

pytestmark = pytest.mark.usefixtures("preloaded_workers")


@contextmanager
def bench(folder: Path, *, workers: int = 1) -> Iterator[tuple[Store, RunSettings]]:
    """Open a store and name a cache below a folder."""
    folder.mkdir(exist_ok=True)
    with closing(Store(f"sqlite:///{folder / 'results.sqlite'}")) as store:
        yield store, RunSettings(cache=folder / "cache", workers=workers)


def plans(*groups: Group) -> list[Planned]:
    return [plan(trial, SOURCES) for trial in trials(*groups)]


def go(
    folder: Path,
    todo: list[Planned],
    report_progress: Callable[[Event], None] = lambda _: None,
    workers: int = 1,
) -> None:
    with bench(folder, workers=workers) as (store, settings):
        run(todo, store, settings, report_progress=report_progress)


def rows(folder: Path, todo: list[Planned]) -> dict[str, Row]:
    with bench(folder) as (store, _):
        found = {one.trial.name: store.get(one.key) for one in todo}
    return {name: row for name, row in found.items() if row is not None}


def number_of_rows(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "results.sqlite")) as connection:
        return int(connection.execute("select count(*) from trials").fetchone()[0])


def models(folder: Path) -> dict[str, int]:
    """Return the time of last change of each cached model's weights."""
    return {
        file.parent.name: file.stat().st_mtime_ns
        for file in (folder / "cache").glob("models/*/*/*.safetensors")
    }


def seen_in(row: Row) -> Observations:
    assert row.result is not None
    return Observations.model_validate(row.result["seen"])


def scores(found: dict[str, Row]) -> dict[str, dict[str, float]]:
    """Return the scores that a scan by one detector gave each class, by trial."""
    return {
        name: row.result["seen"]["measurements"][0]["per_class"]
        for name, row in found.items()
        if row.result is not None
    }


ALL = (clean(2), planted(1))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """Run three trials with one worker, and list what was told."""
    folder, events = tmp_path_factory.mktemp("ran"), list[Event]()
    go(folder, plans(*ALL), events.append)
    return folder, events


def test_a_run_stores_every_result(ran: tuple[Path, list[Event]]) -> None:
    folder, events = ran
    found = rows(folder, plans(*ALL))
    assert {name: row.status for name, row in found.items()} == dict.fromkeys(
        ("clean-00", "clean-01", "planted-00"), "done"
    )
    row = found["planted-00"]
    assert (row.suite, row.scale, row.attempts, row.threads, row.device) == ("tiny", "smoke", 1, 1, "cpu")
    assert row.given == trials(planted(1))[0].model_dump(mode="json")
    assert row.resolved["model"]["attack"]["settings"]["alpha"] == 1.0, "defaults are written down"
    assert len(row.resolved["model"]["data"]["train"]) == 64
    assert row.versions["torch"].startswith("2.")
    assert row.git_revision == git_revision()
    assert row.result is not None
    assert row.result["truth"]["targets"] == [3]
    assert row.seconds is not None
    assert 0 < row.seconds < 30
    told = [(e.planned.trial.name, e.status) for e in events]
    assert told == [(name, status) for name in found for status in (None, None, "done")]
    assert all(e.seconds > 0 for e in events if e.status)


def test_results_are_collected_from_the_store(ran: tuple[Path, list[Event]]) -> None:
    stored = rows(ran[0], plans(*ALL))
    calibrated = calibration_around(seen_in(stored["clean-00"]).measurements)
    with bench(ran[0]) as (store, _):
        held = results.collect(suite(*ALL, clean(1, name="more")), "smoke", store, calibrated)
    found = {one.trial: one for one in held.results}
    assert list(found) == ["clean-00", "clean-01", "more-00", "planted-00"]
    assert found["more-00"].status == "missing"
    for one in plans(*ALL):
        result, outcome = found[one.trial.name], stored[one.trial.name].result
        assert outcome is not None
        assert result.model == one.model_key[:12]
        report = conclude(seen_in(stored[one.trial.name]), calibrated)
        assert report.p_value is not None
        assert (result.verdict, result.p_value, result.targets) == (
            report.verdict,
            report.p_value,
            report.targets,
        )
        assert result.detectors["max-margin"].score == outcome["seen"]["measurements"][0]["score"]
        assert result.accuracy == outcome["truth"]["clean_accuracy"]["value"]
        assert (result.classes, result.seconds) == (10, stored[one.trial.name].seconds)
    assert found["planted-00"].plant == (3,)
    assert found["clean-00"].plant is None
    success = stored["planted-00"].result["truth"]["attack_success"]["value"]  # type: ignore[index]
    assert found["planted-00"].attack_success == success
    assert held.made_with["threads"] == ("1",)
    assert held.made_with["calibration"] == (results.calibration_label(calibrated),)


def test_what_has_no_calibration_is_told_as_such(ran: tuple[Path, list[Event]]) -> None:
    """The settings are not those of the shipped calibration, so that nothing can be concluded."""
    folder, events = ran
    with bench(folder) as (store, _):
        held = results.collect(suite(*ALL), "smoke", store)
    for one in held.results:
        assert (one.verdict, one.p_value) == ("could_not_tell", None)
        assert one.reason == (
            "max-margin is not calibrated: clean models were scanned with other settings (starts, steps)"
        )
    assert {e.note for e in events if e.status == "done"} == {"could_not_tell"}


def test_a_second_run_has_nothing_to_do(ran: tuple[Path, list[Event]]) -> None:
    folder, events = ran[0], list[Event]()
    before, made = rows(folder, plans(*ALL)), models(folder)
    go(folder, plans(*ALL), events.append)
    assert events == []
    assert rows(folder, plans(*ALL)) == before
    assert models(folder) == made


def test_another_detector_judges_the_same_models(ran: tuple[Path, list[Event]]) -> None:
    folder, made = ran[0], models(ran[0])
    other = ScanSettings(
        detectors=(MethodChoice(name="max-margin", settings={"starts": 2, "steps": 6}),), images=40
    )
    todo = [plan(trial.model_copy(update={"scan_settings": other}), SOURCES) for trial in trials(*ALL)]
    before = number_of_rows(folder)
    go(folder, todo)
    assert {row.status for row in rows(folder, todo).values()} == {"done"}
    assert all(row.result and row.result["cached"] for row in rows(folder, todo).values())
    assert models(folder) == made, "nothing was trained"
    assert number_of_rows(folder) == before + 3, "earlier results are kept"


def by_a_further_detector(trial: Trial) -> Planned:
    further = MethodChoice(name="neural-cleanse", settings={"steps": 10, "restarts": 0})
    both = QUICK.model_copy(update={"detectors": (*QUICK.detectors, further)})
    return plan(trial.model_copy(update={"scan_settings": both}), SOURCES)


def test_a_further_detector_is_all_that_runs(ran: tuple[Path, list[Event]], tmp_path: Path) -> None:
    shutil.copyfile(ran[0] / "results.sqlite", tmp_path / "results.sqlite")
    shutil.copytree(ran[0] / "cache", tmp_path / "cache")
    (trial,) = trials(clean(1))
    todo = [by_a_further_detector(trial)]
    go(tmp_path, todo)
    (before,), (after,) = (
        [row.result["seen"]["measurements"] for row in rows(tmp_path, plan_).values() if row.result]
        for plan_ in ([plan(trial, SOURCES)], todo)
    )
    margin, inversion = after
    assert inversion["detector"] == "neural-cleanse"
    # to the microsecond: it was not run again
    assert margin["seconds"] == before[0]["seconds"]
    assert margin["score"] == before[0]["score"]


def test_a_stored_scan_that_this_version_does_not_understand_is_named(
    ran: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    shutil.copyfile(ran[0] / "results.sqlite", tmp_path / "results.sqlite")
    with closing(sqlite3.connect(tmp_path / "results.sqlite")) as connection:
        connection.execute("update trials set result = json_set(result, '$.no_such_field', 1)")
        connection.commit()
    (trial,) = trials(clean(1))
    with pytest.raises(InputError, match="holds a result of clean-00 that this version does not understand"):
        go(tmp_path, [by_a_further_detector(trial)])


def test_one_scan_serves_all_suites_that_ask_for_it(ran: tuple[Path, list[Event]], tmp_path: Path) -> None:
    shutil.copyfile(ran[0] / "results.sqlite", tmp_path / "results.sqlite")
    other = suite(clean(2, name="also-clean"), clean(1, name="longer", seeds=2)).model_copy(
        update={"name": "other"}
    )
    todo, events = [plan(trial, SOURCES) for trial in expand(other, "smoke")], list[Event]()
    with bench(tmp_path) as (store, _):
        assert [one.trial.name for one in unscanned(todo, store)] == ["longer-00-seed1-draw0"]
    go(tmp_path, todo, events.append)
    found, theirs = rows(tmp_path, todo), rows(tmp_path, plans(*ALL))
    shared = {"also-clean-00": "clean-00", "also-clean-01": "clean-01", "longer-00-seed0-draw0": "clean-00"}
    assert [(e.planned.trial.name, e.status) for e in events if e.note.startswith("the same scan as")] == [
        (name, "done") for name in ("also-clean-00", "longer-00-seed0-draw0", "also-clean-01")
    ]
    assert [e.planned.trial.name for e in events if e.note == "scanning"] == ["longer-00-seed1-draw0"]
    for name, original in shared.items():
        own = {"key", "suite", "trial", "given", "finished"}
        assert found[name].model_dump(exclude=own) == theirs[original].model_dump(exclude=own)
        assert (found[name].suite, found[name].trial) == ("other", name)
        assert found[name].finished > theirs[original].finished
    assert len(found) == 4
    with bench(tmp_path) as (store, _):
        held = results.collect(other, "smoke", store)
    assert {one.trial for one in held.results if one.status == "done"} == set(found)


def test_trials_that_are_one_scan_are_scanned_once_in_a_run(tmp_path: Path) -> None:
    bad = MethodChoice(name="badnets", settings={"target": 99})
    todo = plans(clean(1), clean(1, name="again"), planted(1, attack=bad), planted(1, name="p", attack=bad))
    events = list[Event]()
    go(tmp_path, todo, events.append)
    assert [e.planned.trial.name for e in events if e.note == "scanning"] == ["clean-00"]
    assert [(e.planned.trial.name, e.status) for e in events if e.status] == [
        ("clean-00", "done"),
        ("again-00", "done"),
        ("planted-00", "failed"),
        ("p-00", "failed"),
    ]
    found = rows(tmp_path, todo)
    assert found["again-00"].result == found["clean-00"].result
    assert found["p-00"].error == found["planted-00"].error


def test_two_workers_say_the_same_as_one(ran: tuple[Path, list[Event]], tmp_path: Path) -> None:
    go(tmp_path, plans(*ALL), workers=2)
    one, two = scores(rows(ran[0], plans(*ALL))), scores(rows(tmp_path, plans(*ALL)))
    assert set(one) == set(two) == {"clean-00", "clean-01", "planted-00"}
    for name in one:
        assert one[name] == pytest.approx(two[name], abs=1e-6)


def test_failures_and_missing_data_are_results_too_and_a_model_is_trained_once(tmp_path: Path) -> None:
    bad = planted(1, name="bad", attack=MethodChoice(name="badnets", settings={"target": 99}))
    missing = clean(1, name="missing", data=Data(name="nowhere"))
    todo = plans(bad, missing, clean(1, seeds=2, draws=2))
    go(tmp_path, todo)
    found = rows(tmp_path, todo)
    repeated = [row for name, row in found.items() if name.startswith("clean-00-seed")]
    assert {name: row.status for name, row in found.items() if row not in repeated} == {
        "bad-00": "failed",
        "missing-00": "skipped",
    }
    assert found["bad-00"].error == "badnets: target 99 is no class; there are 10, from 0 to 9"
    assert found["missing-00"].error == (
        "data set nowhere: no folder of data sets is given; use --data or DOORWARD_DATA"
    )
    assert found["bad-00"].result is None
    assert [row.result["cached"] for row in repeated if row.result] == [False, True, True]
    assert len(models(tmp_path)) == 1


class Killer:
    """Kill the worker with SIGKILL while it scans certain trials, so many times each."""

    def __init__(self, times: dict[str, int]) -> None:
        self.times, self.events = times, list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        name = event.planned.trial.name
        if event.note == "scanning" and self.times.get(name):
            self.times[name] -= 1
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)


#: A scan that lasts long enough to be killed in.
LONG = (MethodChoice(name="max-margin", settings={"starts": 10, "steps": 60}),)


def slow(*groups: Group) -> list[Planned]:
    longer = QUICK.model_copy(update={"detectors": LONG})
    found = suite(*groups).model_copy(update={"scan_settings": longer})
    return [plan(trial, SOURCES) for trial in expand(found, "smoke")]


@pytest.mark.long
def test_a_trial_whose_worker_is_killed_is_run_once_more(tmp_path: Path) -> None:
    todo, killer = (
        slow(clean(2, seeds=2), planted(1)),
        Killer({"clean-00-seed0-draw0": 1, "clean-01-seed0-draw0": 2}),
    )
    go(tmp_path, todo, killer)
    statuses = [(e.planned.trial.name, e.status) for e in killer.events if e.status]
    assert statuses == [
        ("clean-00-seed0-draw0", "died"),
        ("clean-00-seed0-draw0", "done"),
        ("clean-00-seed1-draw0", "done"),
        ("clean-01-seed0-draw0", "died"),
        ("clean-01-seed0-draw0", "failed"),
        ("clean-01-seed1-draw0", "done"),
        ("planted-00", "done"),
    ]
    found = rows(tmp_path, todo)
    assert len(found) == number_of_rows(tmp_path) == 5
    once, twice = found["clean-00-seed0-draw0"], found["clean-01-seed0-draw0"]
    assert once.result is not None
    assert once.result["cached"], "the model that was made before is not made again"
    assert (twice.status, twice.attempts, twice.result) == ("failed", 2, None)
    assert twice.error == "the worker process ended by SIGKILL; was there enough memory?"


RUNNER = """
import multiprocessing, sys
from pathlib import Path
from test_bench_runner import ALL, go, plans, slow
from bench_examples import clean

def tell(event):
    pids = [worker.pid for worker in multiprocessing.active_children()]
    print(event.planned.trial.name, event.status or event.note, *pids, flush=True)

if __name__ == "__main__":
    go(Path(sys.argv[1]), [*plans(clean(1)), *slow(clean(3))[1:]], tell)
"""


@pytest.mark.long
def test_a_killed_run_takes_its_workers_along_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUNNER)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    said = ""
    while not said.startswith("clean-01 scanning"):
        said = process.stdout.readline()
        assert said, "the run ended too early"
    process.kill()
    process.wait()
    process.stdout.close()
    worker = int(said.split()[2])
    for _ in range(200):
        if not alive(worker):
            break
        time.sleep(0.05)
    assert not alive(worker)

    todo = [*plans(clean(1)), *slow(clean(3))[1:]]
    before, made, events = rows(tmp_path, todo), models(tmp_path), list[Event]()
    assert list(before) == ["clean-00"]
    assert len(made) == 2
    go(tmp_path, todo, events.append)
    after = rows(tmp_path, todo)
    assert {row.status for row in after.values()} == {"done"}
    assert after["clean-00"] == before["clean-00"], "what was done is not done again"
    assert [e.planned.trial.name for e in events if e.status] == ["clean-01", "clean-02"]
    assert {key: when for key, when in models(tmp_path).items() if key in made} == made
    assert number_of_rows(tmp_path) == 3


def alive(process: int) -> bool:
    """Return whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_models_can_be_made_before_they_are_judged(tmp_path: Path) -> None:
    todo, events = plans(clean(1, seeds=2), planted(1)), list[Event]()
    with bench(tmp_path) as (store, settings):
        run(todo, store, replace(settings, judge=False), report_progress=events.append)
        assert [(e.planned.trial.name, e.status) for e in events if e.status] == [
            ("clean-00-seed0-draw0", "made"),
            ("planted-00", "made"),
        ]
        assert unmade(todo, ModelCache(settings.cache)) == []
        assert len(models(tmp_path)) == 2
    assert number_of_rows(tmp_path) == 0


def test_workers_that_cannot_begin_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_work", os._exit)  # called with what is no exit code
    with pytest.raises(RunError, match="a worker process ended by exit code 1 before it could begin"):
        go(tmp_path, plans(clean(1)))
    assert number_of_rows(tmp_path) == 0


def test_what_another_run_has_done_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    todo, events = plans(clean(2)), list[Event]()
    theirs = row_of(todo[1])
    with bench(tmp_path) as (store, settings):

        def meanwhile(event: Event) -> None:
            events.append(event)
            if event.status == "done":
                store.put(theirs)

        run(todo, store, settings, report_progress=meanwhile)
        assert [e.planned.trial.name for e in events if e.status] == ["clean-00"]
        assert store.get(todo[1].key) == theirs
    assert number_of_rows(tmp_path) == 2


def test_what_another_run_has_scanned_meanwhile_is_copied(tmp_path: Path) -> None:
    todo, events = plans(clean(2)), list[Event]()
    theirs = row_of(todo[1]).model_copy(update={"key": "theirs", "trial": "theirs"})
    with bench(tmp_path) as (store, settings):

        def meanwhile(event: Event) -> None:
            events.append(event)
            if event.status == "done":
                store.put(theirs)

        run(todo, store, settings, report_progress=meanwhile)
        assert [(e.planned.trial.name, e.note) for e in events if e.status][1:] == [
            ("clean-01", "the same scan as theirs of tiny")
        ]
        copied = store.get(todo[1].key)
    assert copied is not None
    assert copied.resolved == theirs.resolved


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of a few megabytes, or skip."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room on a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for _ in range(10_000):
            try:
                file.write(bytes(4096))
            except OSError:
                return filler
    raise AssertionError("the disk is not small")


def test_a_full_disk_stops_the_run_and_what_is_stored_stays(small_disk: Path, tmp_path: Path) -> None:
    todo = plans(clean(2))
    fillers: list[Path] = []

    def report_progress(event: Event) -> None:
        if event.status == "done" and not fillers:
            fillers.append(fill(small_disk))

    with bench(tmp_path) as (store, _):
        settings = RunSettings(cache=small_disk / "cache")
        with pytest.raises(
            RunError, match=r"no space is left for the cache .*: make room, then run the same"
        ):
            run(todo, store, settings, report_progress=report_progress)
        (first, second) = (store.get(one.key) for one in todo)
        assert first is not None
        assert first.status == "done"
        assert second is None, "a full disk is not the trial's failure"
        assert len(list((small_disk / "cache/making").iterdir())) == 0
        fillers[0].unlink()
        run(todo, store, settings)
        assert store.get(todo[0].key) == first
        again = store.get(todo[1].key)
        assert again is not None
        assert again.status == "done"


def test_a_full_disk_leaves_the_store_as_it_was(small_disk: Path) -> None:
    todo = plans(clean(2))
    with bench(small_disk) as (store, _):
        kept, more = (row_of(one) for one in todo)
        assert store.put(kept)
        filler = fill(small_disk)
        with pytest.raises(
            StoreError, match=r"cannot be written to .*full.*; what it holds is intact: make room"
        ):
            store.put(more)
        assert store.get(kept.key) == kept
        filler.unlink()
        assert store.put(more)
        assert store.get(more.key) == more


def row_of(one: Planned) -> Row:
    return Row(
        key=one.key,
        suite="tiny",
        scale="smoke",
        trial=one.trial.name,
        status="done",
        seed=0,
        given=one.trial.model_dump(mode="json"),
        resolved={**one.resolved, "filler": "x" * 20_000},
        device="cpu",
        threads=1,
    )
