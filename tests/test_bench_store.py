"""The results store: what is done is never replaced, and the last result of a trial is what counts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench_examples import clean, trials
from doorward.bench.store import Row, Store, StoreError
from doorward.bench.suite import MethodChoice, Trial, parts_of, work_of
from doorward.core.errors import InputError

ONE, TWO = trials(clean())


def row(trial: Trial, key: str, **changes: object) -> Row:
    base = Row(
        key=key,
        suite=trial.suite,
        scale=trial.scale,
        trial=trial.name,
        status="done",
        seed=trial.seed,
        given=trial.model_dump(mode="json"),
        resolved={"model": {"seed": 1}},
        versions={"torch": "2"},
        git_revision="abc+",
        device="cpu",
        threads=1,
        seconds=1.25,
        peak_memory=5_000_000_000,
        result={"x": [1.5, None, "é"]},
    )
    return base.model_copy(update=changes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(f"sqlite:///{tmp_path / 'results.sqlite'}")) as opened:
        yield opened


def test_a_row_comes_back_as_it_was(store: Store) -> None:
    kept = row(ONE, "a")
    assert store.put(kept)
    assert store.get("a") == kept
    assert store.get("b") is None
    with closing(Store(store.url)) as other:
        assert other.get("a") == kept


def test_what_is_done_is_never_replaced(store: Store) -> None:
    assert store.put(row(ONE, "a", status="died", attempts=1, error="killed"))
    assert store.put(row(ONE, "a", attempts=2))
    assert not store.put(row(ONE, "a", status="failed"))
    assert not store.put(row(ONE, "a", seconds=9.0))
    found = store.get("a")
    assert found is not None
    assert (found.status, found.attempts, found.seconds) == ("done", 2, 1.25)


def test_work_is_found_whatever_the_trial(store: Store) -> None:
    resolved = {"model": {"seed": 1, "rate": 0.1}, "judging": {"images": 40}}
    other = {**resolved, "judging": {"images": 41}}
    store.put(row(ONE, "failed", status="failed", resolved=resolved, finished="2026-01-01"))
    store.put(row(ONE, "second", resolved=resolved, finished="2026-01-03"))
    store.put(row(TWO, "first", resolved=resolved, finished="2026-01-02"))
    store.put(row(TWO, "other", resolved=other))
    first = store.done(work_of(resolved, ""))
    assert first == row(TWO, "first", resolved=resolved, finished="2026-01-02")
    assert store.done("nothing") is None
    for row_ in ({"model": {}}, {}):
        assert work_of(row_, "its key") == "its key"


def test_what_a_detector_sees_is_found_whatever_others_are_asked(store: Store) -> None:
    def judged(*names: str, images: int = 40) -> dict[str, Any]:
        detectors = [{"name": name, "code": f"code of {name}"} for name in names]
        return {"model": {"seed": 1}, "judging": {"images": images, "detectors": detectors}}

    both, one = judged("a", "b"), judged("b")
    assert parts_of(both)["b"] == parts_of(one)["b"]
    assert parts_of(both)["b"] not in parts_of(judged("b", images=41)).values()
    assert parts_of({**both, "model": {"seed": 2}})["b"] != parts_of(both)["b"]
    assert parts_of({}) == parts_of({"model": {}, "judging": {"planting": 1}}) == {}

    def seen(*names: str) -> dict[str, Any]:
        return {"seen": {"measurements": [{"detector": name} for name in names]}}

    store.put(row(ONE, "failed", status="failed", resolved=both, result=None, finished="2026-01-01"))
    store.put(row(ONE, "mute", resolved=both, result=seen("b"), finished="2026-01-02"))
    assert store.holding(parts_of(both)["a"]) is None, "a detector that did not answer is asked again"
    first = row(ONE, "both", resolved=both, result=seen("a", "b"), finished="2026-01-04")
    store.put(first)
    assert store.holding(parts_of(both)["a"]) == first
    alone = row(TWO, "one", resolved=one, result=seen("b"), finished="2026-01-01")
    store.put(alone)
    assert store.holding(parts_of(both)["b"]) == alone
    assert store.holding("nothing") is None


def test_what_others_left_in_the_store_loses_no_result(store: Store) -> None:
    """Somebody may delete rows by hand; the same key can then be written again."""
    judged = {"model": {"seed": 1}, "judging": {"detectors": [{"name": "a", "code": "c"}]}}
    kept = row(ONE, "a", resolved=judged, result={"seen": {"measurements": [{"detector": "a"}]}})
    assert store.put(kept)
    with closing(sqlite3.connect(store.url.removeprefix("sqlite:///"))) as by_hand, by_hand:
        by_hand.execute("DELETE FROM trials")
    assert store.put(kept)
    assert store.get("a") == kept


def test_a_store_that_refuses_a_result_says_so(store: Store) -> None:
    with closing(sqlite3.connect(store.url.removeprefix("sqlite:///"))) as by_hand, by_hand:
        by_hand.execute("CREATE TRIGGER full BEFORE INSERT ON trials BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(StoreError, match="refuses a result"):
        store.put(row(ONE, "a"))


def test_a_store_of_an_earlier_make_is_read_and_its_work_is_named(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "results.sqlite"
    resolved = {"model": {"rate": 0.1, "é": [1, None]}, "judging": {"images": 40}}
    kept = row(ONE, "a", resolved=resolved)
    store.put(kept)
    store.put(row(ONE, "skipped", status="skipped", resolved={}, result=None))
    store.close()
    with closing(sqlite3.connect(file)) as old:
        old.execute("drop index ix_trials_work")
        old.execute("alter table trials drop column work")
        before = old.execute("select * from trials").fetchall()
    with closing(Store(store.url)) as opened:
        assert opened.get("a") == kept
        assert opened.done(work_of(resolved, "")) == kept
        assert list(opened.latest([ONE])) == [ONE.name]
    with closing(sqlite3.connect(file)) as now:
        now.row_factory = sqlite3.Row
        rows = [dict(found) for found in now.execute("select * from trials")]
        assert [found.pop("work") for found in rows] == [work_of(resolved, ""), "skipped"]
        assert [tuple(found.values()) for found in rows] == before
        indexes = {found[0] for found in now.execute("select name from sqlite_master where type = 'index'")}
        assert "ix_trials_work" in indexes
        # what the earlier make goes on to write is named when the store is opened next
        now.execute("update trials set work = null")
        now.commit()
    with closing(Store(store.url)) as opened:
        assert opened.done(work_of(resolved, "")) == kept


def test_the_last_result_counts(store: Store) -> None:
    store.put(row(ONE, "new", finished="2026-01-02T00:00:00+00:00"))
    store.put(row(ONE, "old", finished="2026-01-01T00:00:00+00:00"))
    store.put(row(TWO, "two"))
    assert {name: found.key for name, found in store.latest([ONE, TWO]).items()} == {
        ONE.name: "new",
        TWO.name: "two",
    }
    assert list(store.latest([TWO])) == [TWO.name]


def test_settings_that_json_holds_in_another_form_are_the_same(store: Store) -> None:
    attack = MethodChoice(name="badnets", settings={"source_classes": (1, 5)})
    trial = ONE.model_copy(update={"attack": attack})
    store.put(row(trial, "pair"))
    assert list(store.latest([trial])) == [trial.name]
    assert store.latest([ONE]) == {}


def test_results_of_an_earlier_make_of_the_suite_do_not_count(store: Store) -> None:
    (changed, _) = trials(clean(training={"epochs": 1}))
    assert changed.name == ONE.name
    store.put(row(changed, "other"))
    store.put(row(ONE.model_copy(update={"scale": "cpu"}), "scale"))
    assert store.latest([ONE]) == {}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nonsense", "Could not parse SQLAlchemy URL"),
        ("sqlite:////no/such/folder/x.sqlite", "unable to open database file"),
        ("nodialect://x", "Can't load plugin"),
    ],
)
def test_a_store_that_cannot_be_opened_is_named(url: str, why: str) -> None:
    with pytest.raises(InputError, match=f"--store {url}: cannot be opened as a results store .*{why}"):
        Store(url)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.sqlite"
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(InputError, match="file is not a database"):
        Store(f"sqlite:///{file}")


def test_the_table_can_be_read_by_others(store: Store, tmp_path: Path) -> None:
    store.put(row(ONE, "a"))
    connection = sqlite3.connect(tmp_path / "results.sqlite")
    found = connection.execute("select suite, trial, seed, threads, peak_memory from trials").fetchall()
    connection.close()
    assert found == [("tiny", "clean-00", 0, 1, 5_000_000_000)]
