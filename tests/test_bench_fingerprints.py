"""A change of code that makes models is owned up to, and one of code that judges them is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench_examples import clean, planted, robust, trials
from doorward.bench import fingerprints
from doorward.bench.fingerprints import Unit, source_hash, unrecorded
from doorward.bench.suite import Data, World
from doorward.core.errors import InputError


def test_revisions_are_recorded() -> None:
    assert unrecorded(fingerprints.current(), fingerprints.recorded()) == [], (
        "raise the revision of what changed, then run python -m doorward.bench.fingerprints"
    )


SOURCE = '''"""What it is."""

import math  # a comment


class A:
    """A class."""

    def area(self, r: float) -> float:
        """Return the area."""
        text = "# no comment"
        return math.pi * r**2 * len(text)
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""What it is."""', '"""Something\nelse."""', True),
        ("  # a comment", "", True),
        ('        """Return the area."""\n', '        """Return it.\n\n        More.\n        """\n', True),
        ("math.pi * r**2 * len(text)", "(\n            math.pi*r**2\n * len(text))", False),
        ("return math.pi", "return  math.pi", True),
        ("r**2", "r**3", False),
        ('"# no comment"', '"# a comment"', False),
        ("class A", "class B", False),
    ],
)
def test_the_hash_of_a_source_is_that_of_its_code(tmp_path: Path, old: str, new: str, same: bool) -> None:
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(SOURCE)
    assert old in SOURCE
    after.write_text(SOURCE.replace(old, new))
    assert (source_hash([before]) == source_hash([after])) == same


def test_the_hash_is_of_all_files_in_their_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a = 1\n")
    two.write_text("b = 2\n")
    assert len({source_hash([one]), source_hash([one, two]), source_hash([two, one])}) == 3


def test_what_is_not_as_recorded_is_found() -> None:
    then = {name: Unit(revision=1, source="x") for name in ("same", "source", "revision", "gone")}
    now = {
        "same": Unit(revision=1, source="x"),
        "source": Unit(revision=1, source="y"),
        "revision": Unit(revision=2, source="x"),
        "new": Unit(revision=1, source="x"),
    }
    assert unrecorded(now, then) == ["gone", "new", "revision", "source"]


def test_a_changed_source_needs_a_new_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "revisions.json"
    units = {"a": Unit(revision=1, source="x"), "b": Unit(revision=1, source="x")}
    monkeypatch.setattr(fingerprints, "current", lambda: units)
    fingerprints.record([], file)
    assert fingerprints.recorded(file) == units
    units["a"] = Unit(revision=1, source="y")
    with pytest.raises(InputError, match="the source of 'a' changed and its revision 1 did not: raise it"):
        fingerprints.record([], file)
    assert fingerprints.recorded(file)["a"].source == "x", "nothing was written"
    with pytest.raises(InputError, match="there is no unit 'c'; there are: a, b"):
        fingerprints.record(["c"], file)
    fingerprints.record(["a"], file)
    assert fingerprints.recorded(file)["a"].source == "y"
    units["b"] = Unit(revision=2, source="z")
    fingerprints.record([], file)
    assert fingerprints.recorded(file)["b"] == Unit(revision=2, source="z")


def test_a_run_asks_only_for_what_makes_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    generated = clean(1, data=Data(name="glyphs", rows=100, world=World()))
    trainers = {"training.loop", "models.architectures"}
    assert fingerprints.units_of(trials(clean())) == trainers
    assert fingerprints.units_of(trials(planted())) == trainers | {"attack badnets"}
    assert fingerprints.units_of(trials(robust())) == trainers | {"training.adversarial"}
    assert fingerprints.units_of(trials(generated)) == trainers | {"bench.synthetic"}
    now = {**fingerprints.recorded(), "bench.synthetic": Unit(revision=1, source="new")}
    monkeypatch.setattr(fingerprints, "current", lambda: now)
    fingerprints.check(trainers)
    with pytest.raises(InputError, match=r"the source of bench\.synthetic is not the one"):
        fingerprints.check({*trainers, "bench.synthetic"})


def test_the_command_records_nothing_new_where_nothing_changed(tmp_path: Path) -> None:
    before = fingerprints.RECORDED.read_bytes()
    command = [sys.executable, "-m", "doorward.bench.fingerprints", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no unit 'nonsense'; there are: attack badnets, ")
    assert fingerprints.RECORDED.read_bytes() == before
    copy = tmp_path / "revisions.json"
    copy.write_bytes(before)
    fingerprints.record([], copy)
    assert json.loads(copy.read_text()) == json.loads(before)


def copy_package(to: Path) -> Path:
    """Copy the sources that the hash of judging code is made from."""
    for file in fingerprints.PACKAGE.rglob("*.py"):
        place = to / file.relative_to(fingerprints.PACKAGE)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    ("file", "seen_by"),
    [
        ("examination.py", {"max-margin", "neural-cleanse"}),
        ("inversion.py", {"max-margin", "neural-cleanse"}),
        ("detectors/base.py", {"max-margin", "neural-cleanse"}),
        ("detectors/model/neural_cleanse.py", {"neural-cleanse"}),
        ("verdict.py", set()),
        ("calibration.py", set()),
        ("models/onnx.py", set()),
        ("bench/show.py", set()),
    ],
)
def test_a_change_of_what_a_scan_sees_is_noticed(
    file: str, seen_by: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashes() -> dict[str, str]:
        fingerprints.judging_code.cache_clear()
        return {name: fingerprints.judging_code(name) for name in ("max-margin", "neural-cleanse")}

    monkeypatch.setattr(fingerprints, "PACKAGE", copy_package(tmp_path))
    before = hashes()
    with (tmp_path / file).open("a") as source:
        source.write("\n\nADDED = 1\n")
    after = hashes()
    assert {name for name in before if before[name] != after[name]} == seen_by
    (tmp_path / "reference").mkdir(exist_ok=True)
    (tmp_path / "reference/null.json").write_text("{}")
    assert hashes() == after, "what the bank makes of it is concluded anew"
    fingerprints.judging_code.cache_clear()


def test_results_of_a_detector_stay_where_a_change_of_its_source_is_owned_up_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "PACKAGE", copy_package(tmp_path))
    monkeypatch.setattr(fingerprints, "JUDGING", tmp_path / "judging.json")
    names = ("max-margin", "neural-cleanse")

    def codes() -> dict[str, str]:
        fingerprints.judging_code.cache_clear()
        return {name: fingerprints.judging_code(name) for name in names}

    fingerprints.record_judging([], fingerprints.JUDGING)
    before = codes()
    with (tmp_path / "inversion.py").open("a") as source:
        source.write("\n\nADDED = 1\n")
    assert all(codes()[name] != before[name] for name in names)
    fingerprints.record_judging(["neural-cleanse"], fingerprints.JUDGING)
    after = codes()
    assert after["neural-cleanse"] == before["neural-cleanse"]
    assert after["max-margin"] != before["max-margin"]
    # what was owned up to stays so, and a further change is one again
    fingerprints.record_judging([], fingerprints.JUDGING)
    assert codes() == after
    with (tmp_path / "inversion.py").open("a") as source:
        source.write("\n\nMORE = 1\n")
    assert codes()["neural-cleanse"] not in (before["neural-cleanse"], after["max-margin"])
    with pytest.raises(InputError, match="there is no detector 'nothing'"):
        fingerprints.record_judging(["nothing"], fingerprints.JUDGING)
    fingerprints.judging_code.cache_clear()


@pytest.mark.parametrize(
    ("file", "of"),
    [
        ("attacks/_surrogate.py", {"attack clean-label", "attack label-flipping"}),
        ("attacks/data/reflection.py", {"attack reflection"}),
        ("training/adversarial.py", {"attack clean-label", "attack label-flipping", "training.adversarial"}),
    ],
)
def test_an_attack_answers_for_what_it_takes_from_others(
    file: str, of: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "PACKAGE", copy_package(tmp_path))
    before = fingerprints.current()
    with (tmp_path / file).open("a") as source:
        source.write("\n\nADDED = 1\n")
    assert {name for name, unit in fingerprints.current().items() if unit != before[name]} == of
