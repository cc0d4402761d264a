"""Many models: each content once, whatever hangs, crashes or is killed on the way."""

from __future__ import annotations

import csv
import io
import json
import pickle
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("sqlalchemy")

from command_line import call
from doorward.core.errors import InputError
from doorward.core.report_json import from_json
from doorward.fleet.attempt import attempt
from doorward.fleet.engine import FleetSettings, note, work
from doorward.fleet.overview import to_page, write_overview
from doorward.fleet.remote import Folder
from doorward.fleet.sources import Place, find_models
from doorward.fleet.store import LOST, Done, FleetStore, Waiting
from doorward.scan.request import ScanRequest

COMMON = ScanRequest(detectors=("unsafe-code",), time_budget=60.0)
#: A detector that does what a file's name says.
ODD = '''
import os, time
from doorward.detectors.base import Detector

class Odd(Detector):
    """Do what the name of a file says."""
    title = "Odd"
    source = "tests"
    limits = "It finds nothing."
    needs = frozenset({"artifact"})
    level = "artifact"

    def examine(self, subject, *, generator, device, deadline):
        name = subject.artifact.stem
        if "hang" in name:
            time.sleep(3600)
        if "crash" in name:
            os._exit(9)
        if "eat" in name:
            held = bytearray(1 << 40)
        if "once" in name and not os.path.exists(str(subject.artifact) + ".seen"):
            open(str(subject.artifact) + ".seen", "w").close()
            os._exit(9)
        return self.finding(summary="nothing", verdict="nothing_found")
'''


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("true",)


def models(folder: Path, harmless: int, harmful: int = 0) -> Path:
    """Write files of weights, of which some would run code."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(harmless):
        (folder / f"good{i}.pkl").write_bytes(pickle.dumps({"weight": list(range(i + 3))}, protocol=2))
    for i in range(harmful):
        (folder / f"bad{i}.pkl").write_bytes(pickle.dumps([Harmful(), i]))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> FleetStore:
    return FleetStore(f"sqlite:///{tmp_path}/fleet.sqlite")


def waiting(count: int) -> list[Waiting]:
    return [Waiting(key=f"{i:064d}", digest="d", path=f"/m/{i}", request={}) for i in range(count)]


def ended(one: Waiting) -> Done:
    return Done(key=one.key, digest=one.digest, path=one.path, state="done", verdict="nothing_found")


def test_each_content_is_scanned_once_and_found_as_a_scan_alone_finds_it(
    store: FleetStore, tmp_path: Path
) -> None:
    folder = models(tmp_path / "a", 3, 2)
    models(tmp_path / "b" / "deep", 2)  # the same contents at other places
    sources = [str(folder), str(tmp_path / "b")]
    noted = note(find_models(sources, COMMON), store)
    assert (len(noted.paths), noted.new, noted.unreadable) == (7, 5, ())
    told: list[str] = []
    assert work(store, FleetSettings(workers=2), told=lambda now: told.append(now.found.path)) == 5
    assert len(told) == 5
    rows = list(store.rows())
    assert [Path(one.path).name for one in rows if one.verdict == "unsafe"] == ["bad0.pkl", "bad1.pkl"]
    assert Counter(one.verdict for one in rows) == {"unsafe": 2, "could_not_tell": 5}
    for one in rows:
        found = from_json(store.report(one.key) or "")
        assert found.verdict == one.verdict
        assert found.subject is not None
        assert found.subject.sha256 == one.digest
    # nothing is left, and a second run does nothing
    again = note(find_models(sources, COMMON), store)
    assert (again.paths, again.new) == (noted.paths, 0)
    assert work(store, FleetSettings()) == 0
    # another content at a known place is scanned, and so is the same with other settings
    (folder / "good0.pkl").write_bytes(pickle.dumps({"weight": "new"}, protocol=2))
    assert note(find_models(sources, COMMON), store).new == 1
    other = ScanRequest(detectors=("unsafe-code",), time_budget=60.0, seed=1)
    assert note(find_models([str(folder)], other), store).new == 5


@pytest.mark.long
def test_what_hangs_crashes_or_eats_memory_is_told_and_stops_nobody(
    store: FleetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = tmp_path / "odd.py"
    detector.write_text(ODD)
    folder = models(tmp_path / "m", 2)
    for name in ("hang", "crash", "eat", "once"):
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(name))
    monkeypatch.setattr("doorward.fleet.task.GRACE", 0.0)
    common = ScanRequest(detectors=(f"{detector}:Odd",), time_budget=10.0)
    noted = note(find_models([str(folder)], common), store)
    assert noted.new == 6
    assert work(store, FleetSettings(workers=3)) == 6
    found = {Path(one.path).stem: one for one in store.rows()}
    assert {name for name, one in found.items() if one.state == "failed"} == {"hang", "crash", "eat"}
    assert "did not end within 10 s" in (found["hang"].error or "")
    assert "ended with code 9" in (found["crash"].error or "")
    assert "GiB of memory" in (found["eat"].error or "")
    assert found["once"].verdict is not None


def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    detector = tmp_path / "odd.py"
    detector.write_text(ODD.replace("os._exit(9)", "os.kill(os.getpid(), 9)"))
    file = tmp_path / "crash.pkl"
    file.write_bytes(pickle.dumps(1))
    request = ScanRequest(model=str(file), detectors=(f"{detector}:Odd",)).to_json()
    found = attempt(request, memory=8 << 30, seconds=60.0)
    assert found.lost
    assert found.error == "its process was ended by SIGKILL"


def test_drivers_share_a_store_and_nothing_is_scanned_twice(store: FleetStore, tmp_path: Path) -> None:
    assert store.enqueue(waiting(60)) == 60
    assert store.enqueue(waiting(60)) == 0
    taken: list[str] = []
    lock = threading.Lock()

    def drive(owner: str) -> None:
        own = FleetStore(f"sqlite:///{tmp_path}/fleet.sqlite")
        while claimed := own.claim(owner, 3):
            with lock:
                taken.extend(one.key for one in claimed)
            for one in claimed:
                assert own.finish(one, ended(one), "{}")
        own.close()

    drivers = [threading.Thread(target=drive, args=(f"driver {i}",)) for i in range(4)]
    for one in drivers:
        one.start()
    for one in drivers:
        one.join()
    assert Counter(taken) == Counter(one.key for one in waiting(60))
    assert store.counts() == {"nothing_found": 60}
    assert store.left() == 0


def test_what_a_dead_driver_had_comes_back_and_its_late_answer_does_not_count(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fleet.sqlite"
    patient, hasty = FleetStore(url), FleetStore(url, lease=0.0)
    patient.enqueue(waiting(2))
    first = patient.claim("dead", 2)
    assert [one.tries for one in first] == [1, 1]
    assert patient.claim("alive", 2) == []  # it may still live
    second = hasty.claim("alive", 2)
    assert [one.tries for one in second] == [2, 2]
    assert not patient.finish(first[0], ended(first[0]), "{}")
    assert patient.finish(second[0], ended(second[0]), "{}")
    assert not patient.finish(second[0], ended(second[0]), "{}")
    # what is lost as often as it may be has failed
    for tries in range(3, LOST + 1):
        assert [one.tries for one in hasty.claim("other", 2)] == [tries]
    assert hasty.claim("last", 2) == []
    assert patient.counts() == {"nothing_found": 1, "failed": 1}
    assert f"killed {LOST} times" in next(one.error or "" for one in patient.rows() if one.state == "failed")


def test_an_interruption_gives_back_what_is_under_way(store: FleetStore, tmp_path: Path) -> None:
    note(find_models([str(models(tmp_path / "m", 3))], COMMON), store)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(store, FleetSettings(workers=2), told=stop)
    assert store.counts().get("running", 0) == 0
    assert work(store, FleetSettings(workers=2)) == 2


def test_a_store_that_shows_life_keeps_its_models(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fleet.sqlite"
    own, other = FleetStore(url), FleetStore(url, lease=1_000.0)
    own.enqueue(waiting(1))
    (one,) = own.claim("me", 1)
    own.beat("me")
    assert other.claim("other", 1) == []
    own.release("me")
    (again,) = other.claim("other", 1)
    assert (again.key, again.tries) == (one.key, 1)


def test_tables_name_models_and_how_they_are_scanned(tmp_path: Path) -> None:
    models(tmp_path, 2)
    rows = {"path": ["good0.pkl", "good1.pkl"], "seed": [3, None], "mean": ["0.5", None]}
    (tmp_path / "list.csv").write_text(
        'path,seed,mean,labels,size\ngood0.pkl,3,0.5,,\ngood1.pkl,,,"a, b","1,28,28"\n'
    )
    pq.write_table(pa.table(rows), tmp_path / "list.parquet")
    for name in ("list.csv", "list.parquet"):
        first, second = find_models([str(tmp_path / name)], COMMON)
        assert first.path == str((tmp_path / "good0.pkl").resolve())
        assert (first.request.seed, first.request.options.mean) == (3, (0.5,))
        assert (second.request.seed, second.request.options.mean) == (0, None)
        assert second.request.detectors == ("unsafe-code",)
        if name == "list.csv":
            assert second.request.options.labels == ("a", "b")
            assert second.request.options.size == (1, 28, 28)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("where\nx\n", "has no column 'path'"),
        ("", "has no column 'path'"),
        ("path,colour\nx,red\n", "no option 'colour'"),
        ("path,seed\nx,many\n", "row 2: seed"),
        ("path,seed\nx,1,2\n", "row 2: it has more cells than there are columns"),
        ("path\n", "has no rows"),
        ('path\n""\n', "row 2: there is nothing"),
        ('path\n"x', "cannot be read as a table"),
    ],
)
def test_a_table_that_says_something_else_is_told(tmp_path: Path, table: str, words: str) -> None:
    file = tmp_path / "list.csv"
    file.write_text(table)
    with pytest.raises(InputError) as told:
        list(find_models([str(file)], COMMON))
    assert words in str(told.value)


def test_sources_and_stores_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.csv").write_bytes(b"path\n\xfc.onnx\n")
    (tmp_path / "no.parquet").write_bytes(b"no")
    for source, words in (
        (str(tmp_path / "gone"), "does not exist"),
        (str(tmp_path / "empty"), "holds no model"),
        (str(tmp_path / "no.parquet"), "cannot be read as a table, .csv or .parquet"),
        (str(tmp_path / "latin.csv"), "it is not UTF-8"),
        ("nothing://bucket/models", "Protocol not known"),
        ("zip::s3://bucket/models", "addresses within addresses"),
        ("memory://no/such", "memory://no/such: there is nothing"),
    ):
        with pytest.raises(InputError, match=words):
            list(find_models([source], COMMON))
    for url, words in (
        ("nonsense", "not an address"),
        ("postgresql+nodriver://x", "not an address|not installed"),
        (f"sqlite:////{tmp_path}/none/fleet.sqlite", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=words):
            FleetStore(url)
    older = FleetStore(f"sqlite:///{tmp_path}/old.sqlite")
    import sqlalchemy as sql

    with older._engine.begin() as connection:
        connection.execute(sql.text("UPDATE fleet_schema SET version = 0"))
        connection.execute(sql.text("DROP TABLE fleet_objects"))
    with pytest.raises(InputError, match=r"of version 0, .* name another store"):
        FleetStore(f"sqlite:///{tmp_path}/old.sqlite")
    assert "fleet_objects" not in sql.inspect(older._engine).get_table_names()  # nothing was written


def test_a_password_is_not_told(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(InputError) as told:
        FleetStore("postgresql+psycopg://me:secret@127.0.0.1:1/none?connect_timeout=1")
    assert "secret" not in str(told.value)


def test_the_overview_shows_every_model_and_nothing_that_a_path_says_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    verdicts = ["nothing_found", "suspicious", "backdoored", "unsafe", "could_not_tell"]
    rows = [
        Done(
            key=f"{i:064d}",
            digest="d",
            path=f"/models/<b>{i}</b>",
            state="done",
            verdict=verdicts[int(rng.integers(5))],
            p_value=0.5,
            targets=("<i>cat</i>",),
            seconds=1.0,
            finished=1.7e9 + 1e5 * i,
        )
        for i in range(100)
    ]
    page = to_page(rows, frozenset({rows[0].key}))
    assert page.count("<tr class=") == 100
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<script" not in page
    assert page.count("href=") == 1
    # the worst come first
    assert page.index('class="r-unsafe"') < page.index('class="r-nothing_found"')


def test_the_command_scans_shows_and_goes_on(tmp_path: Path) -> None:
    folder, url = models(tmp_path / "m", 1, 1), f"sqlite:///{tmp_path}/fleet.sqlite"
    scan = ("fleet", "scan", folder, "--store", url, "--detector", "unsafe-code")
    done = call(*scan, "--out", tmp_path / "out")
    assert done.code == 1, done.err
    assert "1 unsafe" in done.out
    assert "bad0.pkl" in done.out
    reports = {file.stem for file in (tmp_path / "out/reports").glob("*.json")}
    assert len(reports) == 2
    table = list(csv.DictReader(io.StringIO((tmp_path / "out/models.csv").read_text())))
    assert {Path(row["path"]).name: row["verdict"] for row in table}["bad0.pkl"] == "unsafe"
    assert all(json.loads((tmp_path / f"out/reports/{key}.json").read_text()) for key in reports)
    again = call(*scan, "--new-only")
    assert again.code == 0
    status = call("fleet", "status", "--store", url, "--format", "csv")
    assert status.code == 0
    assert status.out == (tmp_path / "out/models.csv").read_text()
    for words, told in (
        (("fleet", "scan", tmp_path / "gone", "--store", url), "does not exist; give a folder, a table"),
        (("fleet", "scan", tmp_path, "--store", url, "--clean", "./gone"), "gone"),
        (("fleet", "scan", folder, "--store", url, "--detector", "nobody"), "nobody"),
        (("fleet", "status", "--store", f"sqlite:///{tmp_path}/none.sqlite"), "there is no such file"),
    ):
        wrong = call(*words)
        assert wrong.code == 2
        assert told in wrong.err


def test_a_model_that_cannot_be_read_is_left_out_and_told(store: FleetStore, tmp_path: Path) -> None:
    models(tmp_path, 1)
    places = [
        Place(str(tmp_path / "gone.pkl"), COMMON),
        *find_models([str(tmp_path / "good0.pkl")], COMMON),
    ]
    noted = note(places, store)
    assert noted.new == 1
    assert noted.unreadable[0][0].endswith("gone.pkl")


def test_reports_that_are_there_are_left_as_they_are(store: FleetStore, tmp_path: Path) -> None:
    note(find_models([str(models(tmp_path / "m", 1))], COMMON), store)
    work(store, FleetSettings())
    write_overview(store, Folder(str(tmp_path / "out")))
    (page,) = (tmp_path / "out/reports").glob("*.html")
    page.write_text("mine")
    write_overview(store, Folder(str(tmp_path / "out")))
    assert page.read_text() == "mine"
