"""`doorward bench` from the shell: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench_examples import clean, planted, result, suite, write_detector
from doorward.bench import calibrate, plan, results
from doorward.bench import suite as suites
from doorward.bench.suite import Claim, Data, Suite
from doorward.cli import bench
from doorward.core.errors import InputError
from doorward.methods import registry
from doorward.scan.calibration import Calibration, calibration_file

CLAIM = Claim(text="all is well", source="our bar", measure="clean_wrong", at_most=1)
pytestmark = pytest.mark.usefixtures("preloaded_workers")

TINY = suite(clean(1), planted(1), claims=(CLAIM,))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one small suite besides those of the package."""
    inner = suites.get_suite
    monkeypatch.setattr(suites, "get_suite", lambda name: TINY if name == "tiny" else inner(name))


def doorward(*words: object) -> Result:
    return CliRunner().invoke(bench.app, [str(word) for word in words])


def raise_from(done: Result) -> None:
    """Raise what a command raised, which `doorward` turns into one line."""
    assert done.exception is not None
    raise done.exception


def test_suites_are_listed_with_their_trials() -> None:
    done = doorward("list")
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert set(lines) == set(suites.suite_names())
    assert f"cpu {len(suites.expand(suites.get_suite('calibration'), 'cpu'))}" in lines["calibration"]


@pytest.mark.long
def test_a_run_from_estimate_to_page(tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "cache")
    dry = doorward("run", "tiny", *cache, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.startswith("2 trials, 0 done already, 2 to do\n2 models, 0 of them cached\nabout ")
    assert "with 1 worker(s): training " in dry.stdout

    first = doorward("run", "tiny", *cache, "--only", "clean*", "--export", tmp_path)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"written: {tmp_path}/tiny-smoke.json\n1 done, 0 failed, 0 skipped of 1 trials\n"
    assert first.stderr.startswith("clean-00: done in ")
    assert first.stderr.endswith(" (1 of 1)\n")
    half = doorward("show", "tiny", *cache)
    assert "2 trials at scale smoke: 1 done, 1 missing." in half.stdout

    second = doorward("run", "tiny", *cache, "--export", tmp_path)
    assert second.exit_code == 0, second.output
    assert "2 done, 0 failed, 0 skipped of 2 trials" in second.stdout
    assert "clean-00" not in second.stderr, "it was done already"
    dry = doorward("run", "tiny", *cache, "--dry-run")
    assert dry.stdout.startswith("2 trials, 2 done already, 0 to do\n")

    exported = tmp_path / "tiny-smoke.json"
    from_store = doorward("show", "tiny", *cache).stdout
    assert "| all is well | our bar | " in from_store
    assert "| reached |" in from_store
    assert doorward("show", "tiny", "--results", exported).stdout == from_store
    for form, start in (("csv", "suite,scale,group"), ("json", "{"), ("html", "<!DOCTYPE html>")):
        out = tmp_path / f"table.{form}"
        shown = doorward("show", "tiny", *cache, "--format", form, "--out", out)
        assert (shown.exit_code, shown.stdout) == (0, f"written: {out}\n")
        assert out.read_text().lstrip().startswith(start)
    rows = json.loads(exported.read_text())["results"]
    assert [row["trial"] for row in rows] == ["clean-00", "planted-00"]
    assert rows[1]["plant"] == [3]
    assert "per_class" not in exported.read_text()


@pytest.mark.parametrize("name", ["tiny", "attacks", "null"])
@pytest.mark.parametrize("form", ["markdown", "html", "csv", "json"])
def test_where_nothing_is_measured_it_says_what_measures_it(tmp_path: Path, name: str, form: str) -> None:
    shown = doorward("show", name, "--cache", tmp_path, "--format", form)
    assert shown.exit_code == 0, shown.output
    command = f"doorward bench run {name} --scale smoke"
    if form in ("csv", "json"):
        assert shown.stderr.startswith(f"Nothing has been measured yet: `{command}`")
        assert command not in shown.stdout
    else:
        assert shown.stderr == ""
        assert f"Nothing has been measured yet: {command}" in shown.stdout.replace("`", "")
        assert shown.stdout.count("<table") == (form == "html"), "that of the trials alone"
        assert "| --- |" not in shown.stdout


def test_a_dry_run_counts_scans_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice: Suite = suite(clean(2), clean(1, name="again", seeds=2))
    monkeypatch.setattr(suites, "get_suite", lambda name: twice)
    dry = doorward("run", "tiny", "--cache", tmp_path, "--dry-run")
    assert dry.stdout.startswith(
        "4 trials, 0 done already, 4 to do, 1 of them the same scan as another\n2 models, "
    )


def test_what_is_skipped_makes_a_run_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere: Suite = suite(clean(1, data=Data(name="nowhere")))
    monkeypatch.setattr(suites, "get_suite", lambda name: nowhere)
    words = ("run", "tiny", "--cache", tmp_path / "cache", "--data", tmp_path)
    dry = doorward(*words, "--dry-run")
    assert f"would be skipped: data set nowhere is not in {tmp_path}" in dry.stdout
    done = doorward(*words)
    assert done.exit_code == 4
    assert "0 done, 0 failed, 1 skipped of 1 trials" in done.stdout
    assert f"not done: data set nowhere is not in {tmp_path}" in done.stderr


def test_a_run_that_must_stop_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from doorward.bench import runner

    def stop(*_: object, **__: object) -> None:
        raise runner.RunError("no space is left")

    monkeypatch.setattr(runner, "run", stop)
    done = doorward("run", "tiny", "--cache", tmp_path)
    assert (done.exit_code, done.stderr) == (4, "error: no space is left\n")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("run", "nonsense"), "there is no suite named 'nonsense'"),
        (("run", "tiny", "--scale", "cpu"), "suite tiny has no scale 'cpu'"),
        (("run", "tiny", "--only", "x*"), r"no trial matches 'x\*'; groups are: clean, planted"),
        (("run", "tiny", "--device", "abacus"), "abacus"),
        (("run", "tiny", "--store", "nonsense"), "--store nonsense: cannot be opened"),
        (("show", "tiny", "--results", "/no/such.json"), "/no/such.json cannot be read"),
        (("show", "tiny", "--out", "/no/such/folder/x"), "/no/such/folder/x cannot be written"),
    ],
)
def test_bad_input_is_named(words: tuple[str, ...], why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        raise_from(doorward(*words, "--cache", tmp_path / "cache"))


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doorward("show", "tiny", "--cache", tmp_path / "file")
    assert str(done.exception) == (
        f"the cache folder {tmp_path}/file cannot be made (File exists); name another with --cache"
    )


def test_results_of_another_suite_are_refused(tmp_path: Path) -> None:
    held = results.Results(suite="other", scale="cpu", made_with={}, results=(result("a", "b", 0.5),))
    path = results.write_results(held, tmp_path)
    done = doorward("show", "tiny", "--results", path)
    assert str(done.exception) == f"{path} holds other at scale cpu, not tiny at smoke"


def test_models_of_changed_code_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("run", "tiny", "--cache", tmp_path, "--only", "clean*", "--models-only")
    first, second = doorward(*words), doorward(*words)
    assert first.stdout == "1 models made, 0 could not be made\n", first.output
    assert second.stdout == "0 models made, 0 could not be made\n", second.output
    monkeypatch.setattr(plan, "fingerprint", lambda unit: f"other {unit}")
    third = doorward(*words)
    assert third.stdout == "1 models made, 0 could not be made\n", third.output


# --- calibrate ---------------------------------------------------------------------------------------

CLEAN = suite(clean(2), clean(1, name="missing", data=Data(name="nowhere")))


@pytest.fixture
def clean_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have detectors be calibrated on two small models, and on one whose data are missing."""
    monkeypatch.setattr(calibrate, "get_suite", lambda _: CLEAN)


@pytest.mark.usefixtures("clean_models")
def test_a_detector_is_calibrated(tmp_path: Path) -> None:
    detector = write_detector(tmp_path)
    method = registry.get("detector", detector).method()
    file = tmp_path / "calibration" / f"{method}.json"
    words = ("calibrate", detector, "--scale", "smoke", "--cache", tmp_path / "cache", "--data", tmp_path)
    some = doorward(*words, "--weight", "0.5", "--witness", "own")
    assert some.exit_code == 4, some.output
    assert some.stdout == f"written: {file} (2 of 3 clean models)\n"
    assert "clean-00: done in " in some.stderr
    assert some.stderr.endswith(f"\nnot done: data set nowhere is not in {tmp_path}\n")
    held = Calibration.read(file)
    assert (held.detector, held.weight, held.witness, held.images) == (method, 0.5, "own", 40)
    assert [(m.name, m.classes) for m in held.models] == [("clean-00", 10), ("clean-01", 10)]
    assert held.models[0].scores == tuple(float(t) for t in range(10))
    assert held.models[0].accuracy > 0.2

    # the scans are stored; weight and witness stay until they are named
    again = doorward(*words, "--only", "clean*")
    assert (again.exit_code, again.stdout) == (0, f"written: {file} (2 of 2 clean models)\n")
    assert again.stderr == ""
    assert Calibration.read(file) == held
    other = doorward(*words, "--only", "clean*", "--out", tmp_path / "other.json", "--weight", "2")
    assert other.stdout == f"written: {tmp_path}/other.json (2 of 2 clean models)\n"
    assert Calibration.read(tmp_path / "other.json").weight == 2
    assert Calibration.read(file) == held
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\); name another with --out"):
        raise_from(doorward(*words, "--only", "clean*", "--out", tmp_path))


@pytest.mark.usefixtures("clean_models")
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nonsense",), "there is no detector named 'nonsense'"),
        (("unsafe-code",), "unsafe-code reads files"),
        (
            ("max-margin", "--only", "missing*", "--out", "x.json"),
            "no clean model has been scanned by max-margin",
        ),
        (("max-margin",), "max-margin comes with a calibration .* name another file with --out"),
        (("max-margin", "--only", "clean*"), "comes with a calibration on many more models"),
        (("max-margin", "--scale", "full"), "suite tiny has no scale 'full'"),
        (("/no/such.py:Detector",), "/no/such.py is no file"),
    ],
)
def test_what_cannot_be_calibrated_is_named(words: tuple[str, ...], why: str, tmp_path: Path) -> None:
    shipped = calibration_file("max-margin").read_bytes()
    scale = () if "--scale" in words else ("--scale", "smoke")
    with pytest.raises(InputError, match=why):
        raise_from(doorward("calibrate", *words, *scale, "--cache", tmp_path))
    assert calibration_file("max-margin").read_bytes() == shipped


def test_the_cache_is_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bench.default_cache() == tmp_path / "doorward"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert bench.default_cache() == tmp_path / "home/.cache/doorward"
