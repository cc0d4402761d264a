"""`doorward scan`, `verify` and `list` as a user meets them: exit codes, outputs, paths, interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import typer

from command_line import (
    BACKDOORED,
    CLEAN,
    CLOTHES,
    PATCHES,
    PROGRAM,
    QUICK,
    Outcome,
    call,
    environment,
    program,
)
from documents import run_readme
from doorward import __version__, bundled
from doorward.cli.app import app
from doorward.cli.options import own_code
from doorward.core.records import SEVERITY, Report
from doorward.models.classifier import TorchClassifier
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.models.formats.wrapping import wrap
from doorward.models.spec import InputSpec
from doorward.reports import from_json, schema_text
from doorward.scan.pipeline import Scanned

SCHEMAS = Path(__file__).parent / "schemas"
NAMES = ("report.html", "report.json", "report.sarif", "report.txt")


@pytest.fixture(scope="session")
def found(shared_folder: Path) -> tuple[Path, Outcome]:
    """Return where the reports of the README's scan of a planted model are, and what it printed."""
    run = run_readme(shared_folder)
    (outcome,) = [outcome for command, outcome in run.outcomes.items() if command.endswith(" my-report")]
    return run.folder / "my-report", outcome


@pytest.fixture(scope="session")
def doubted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Scan the planted model with fewer images than calibration had; return the lines printed."""
    words = ("scan", BACKDOORED, "--clean", CLOTHES, *PATCHES, "--images", 60)
    return call(*words, folder=tmp_path_factory.mktemp("doubted")).out.splitlines()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a quick scan's reports, made with relative paths, and what it read."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(CLEAN, folder / "model")
    shutil.copytree(bundled.FOLDER / "fashion_mnist", folder / "clothes")
    outcome = call("scan", "model", "--clean", "clothes:test", *QUICK, "--out", "reports", folder=folder)
    assert outcome.code == 0, outcome
    return folder


# Exit codes


def test_a_planted_model_is_found_and_ends_with_1(found: tuple[Path, Outcome]) -> None:
    reports, outcome = found
    assert outcome.code == 1, outcome.err
    assert outcome.out.split()[0] == "BACKDOORED"
    assert "0 (T - shirt / top)" in outcome.out
    report = from_json((reports / "report.json").read_text(encoding="utf-8"))
    assert report.targets == (0,)


def test_a_clean_twin_ends_with_0() -> None:
    outcome = call("scan", CLEAN, *QUICK)
    assert outcome.code == 0
    assert outcome.out.startswith("NOTHING FOUND")
    assert outcome.err == ""


@pytest.mark.parametrize("verdict", SEVERITY)
@pytest.mark.parametrize("fail_on", [None, "suspicious", "backdoored", "never"])
def test_the_exit_code_is_the_verdicts(
    verdict: Any, fail_on: str | None, found: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = from_json((found[0] / "report.json").read_text(encoding="utf-8"))
    report = report.model_copy(update={"verdict": verdict})
    monkeypatch.setattr("doorward.scan.pipeline.scan_in_full", lambda *_, **__: Scanned(report))
    words = ("--fail-on", fail_on) if fail_on else ()
    expected = {"unsafe": 1, "backdoored": 1, "suspicious": 1, "could_not_tell": 3, "nothing_found": 0}[
        verdict
    ]
    if fail_on == "never" or (fail_on == "backdoored" and verdict == "suspicious"):
        expected = 0
    assert call("scan", BACKDOORED, *words).code == expected


def twin_with(value: float, folder: Path) -> Path:
    """Copy the clean twin, all its weights of one value."""
    shutil.copytree(CLEAN, folder / "model")
    weights = folder / "model/model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(
        {n: torch.full_like(t, value) if t.is_floating_point() else t for n, t in tensors.items()}, weights
    )
    return folder / "model"


def of_one_class(folder: Path) -> Path:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
    spec = InputSpec(channels=1, height=8, width=8, output="logits")
    return export_pt2(TorchClassifier(module, spec, ["coat"]), folder / "model/m.pt2")


class Constant(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.5, 1.0, 0.25, 0.0]) + 0 * x.mean((1, 2, 3))[:, None]


def constant_as(export: Callable[..., Path], name: str) -> Callable[[Path], Path]:
    return lambda folder: export(wrap(Constant(), size=(1, 8, 8)), folder / "model" / name)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: twin_with(0.0, folder), "the same output for every image"),
        (lambda folder: twin_with(float("nan"), folder), "outputs that are not finite"),
        (of_one_class, "the model has 1 class; a backdoor needs at least two"),
        (constant_as(export_onnx, "m.onnx"), "the same output for every image"),
        (constant_as(export_pt2, "m.pt2"), "the same output for every image"),
    ],
    ids=["constant", "NaN", "one class", "constant ONNX", "constant program"],
)
def test_a_model_that_cannot_be_judged_ends_with_3(
    make: Callable[[Path], Path], why: str, tmp_path: Path
) -> None:
    outcome = call("scan", make(tmp_path), "--format", "json", folder=tmp_path)
    assert outcome.code == 3, outcome
    report = from_json(outcome.out)
    assert report.verdict == "could_not_tell"
    assert why in str(report.reason)
    assert {one.detector for one in report.not_run} == {
        "max-margin",
        "neural-cleanse",
        "patch-search",
        "blend-search",
        "trigger-families",
        "aegis",
        "deepinspect",
        "first-layer",
        "hidden-branch",
    }


def test_images_of_one_class_alone_end_with_3(tmp_path: Path) -> None:
    samples = bundled.fashion_mnist("test")
    assert samples.labels is not None
    chosen = np.flatnonzero(samples.labels == 3)[:40]
    np.savez(tmp_path / "dresses.npz", x=np.stack(samples.raw(chosen)), y=np.full(40, 3))
    outcome = call("scan", CLEAN, "--clean", "dresses.npz", folder=tmp_path)
    assert outcome.code == 3
    assert "all 40 images are of one class, 'Dress'; give images of several" in " ".join(outcome.out.split())


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def unsafe(tmp_path: Path) -> Path:
    """Return a pickle that would touch `canary` next to it."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3), "extra": Payload(tmp_path / "canary")}, path)
    return path


@pytest.mark.parametrize(
    ("run", "words"), [(program, ()), (call, ("--factory", "no_such_module:build"))], ids=["alone", "factory"]
)
def test_an_unsafe_file_ends_with_1_and_never_runs(
    run: Callable[..., Outcome], words: tuple[str, ...], unsafe: Path
) -> None:
    outcome = run("scan", unsafe, *words, folder=unsafe.parent)
    assert outcome.code == 1
    assert outcome.out.split()[:3] == ["UNSAFE", "TO", "LOAD"]
    assert f"{os.system.__module__}.system" in outcome.out
    assert outcome.err == ""
    assert not (unsafe.parent / "canary").exists()


def test_custom_code_of_a_directory_never_runs(tmp_path: Path) -> None:
    config = {"architectures": ["Net"], "auto_map": {"AutoModelForImageClassification": "modeling.Net"}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/modeling.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    outcome = call("scan", "model", folder=tmp_path)
    assert outcome.code == 1
    assert "modeling" in outcome.out
    assert not (tmp_path / "canary").exists()


# What is printed and written


def test_reports_are_written_and_named_on_standard_error(found: tuple[Path, Outcome]) -> None:
    reports, outcome = found
    assert sorted(path.name for path in reports.iterdir()) == sorted(NAMES)
    assert outcome.err == f"written: my-report ({', '.join(NAMES)})\n"
    page = (reports / "report.html").read_text(encoding="utf-8")
    assert "Backdoored" in page
    assert page.count("data:image/png") >= 3
    assert (reports / "report.txt").read_text(encoding="utf-8").split()[0] == "BACKDOORED"


def test_text_fits_the_width_and_ends_lines_where_they_end(doubted: list[str]) -> None:
    lines = doubted
    commands = [line for line in lines if line.startswith("      doorward ")]
    assert len(commands) == 3
    assert max(len(line) for line in lines if line not in commands) <= 80
    assert [line for line in lines if line != line.rstrip()] == []


def test_fewer_images_than_usual_leave_a_doubt(doubted: list[str]) -> None:
    assert doubted[0].split()[0] == "SUSPICIOUS"
    assert "60 images were given, and 100 with the calibration models" in " ".join(" ".join(doubted).split())


def test_the_advice_can_be_followed(doubted: list[str]) -> None:
    """The advised commands name the model and data as they were given, and options that exist."""
    more, again, check = (line.split() for line in doubted if line.startswith("      doorward "))
    scanned = ["doorward", "scan", str(BACKDOORED), "--clean", CLOTHES]
    assert more == [*scanned, *PATCHES, "--images", "240"]
    assert again == [*scanned, *PATCHES, "--images", "60", "--seed", "1"]
    assert check == ["doorward", "verify", "report.json"]


def test_json_is_the_report_alone(tmp_path: Path) -> None:
    outcome = call("scan", CLEAN, *QUICK, "--format", "json", "--out", tmp_path / "reports")
    assert outcome.code == 0
    assert outcome.out == (tmp_path / "reports/report.json").read_text(encoding="utf-8")
    jsonschema.validate(json.loads(outcome.out), json.loads(schema_text()))
    request = Report.model_validate_json(outcome.out).request
    assert request["folder"] == str(Path.cwd())


def test_sarif_is_valid_and_alone() -> None:
    outcome = call("scan", CLEAN, *QUICK, "--format", "sarif")
    assert (outcome.code, outcome.err) == (0, "")
    (schema,) = SCHEMAS.glob("sarif*.json")
    jsonschema.validate(json.loads(outcome.out), json.loads(schema.read_text(encoding="utf-8")))


def test_names_that_the_terminal_lacks_end_no_scan(unsafe: Path) -> None:
    path = unsafe.rename(unsafe.with_name("模型.pt"))
    outcome = call("scan", path.name, folder=path.parent, encoding="cp1252")
    assert outcome.code == 1
    assert r"\u6a21\u578b.pt" in outcome.out
    outcome = call("scan", path.name, "--format", "json", folder=path.parent, encoding="cp1252")
    assert json.loads(outcome.out)["subject"]["path"] == path.name


# Paths and columns


@pytest.mark.parametrize("given", ["sp ace/m:1 ünï", "./sp ace/m:1 ünï/", "sp ace/../sp ace/m:1 ünï"])
def test_a_path_is_taken_as_it_is(given: str, tmp_path: Path) -> None:
    shutil.copytree(CLEAN, tmp_path / "sp ace/m:1 ünï")
    shutil.copytree(bundled.FOLDER / "fashion_mnist", tmp_path / "da:ta")
    words = ("--clean", "da:ta:test", "--images", 20, *QUICK, "--format", "json")
    outcome = call("scan", given, *words, folder=tmp_path)
    assert outcome.code == 0, outcome
    report = from_json(outcome.out)
    assert report.subject
    assert report.subject.path == given
    assert report.data[0].path == "da:ta:test"


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    images = pq.read_table(bundled.FOLDER / "fashion_mnist/test.parquet").slice(0, 60)
    coarse = pa.array([0] * 60)
    pq.write_table(
        pa.table(
            {"front": images["image"], "back": images["image"], "fine": images["label"], "label": coarse}
        ),
        tmp_path / "two.parquet",
    )
    words = ("scan", CLEAN, "--clean", "two.parquet", *QUICK, "--format", "json")
    assert "choose one (column, on the command line --data-column)" in call(*words, folder=tmp_path).err
    outcome = call(*words, "--data-column", "front", "--label-column", "fine", folder=tmp_path)
    assert outcome.code == 0, outcome
    report = from_json(outcome.out)
    assert report.subject
    assert report.subject.clean_accuracy
    assert report.subject.clean_accuracy.value > 0.7
    assert (report.request["data_column"], report.request["label_column"]) == ("front", "fine")


OWN = """
import pathlib, time
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def stop():
    raise SystemExit(0)

def wait():
    pathlib.Path("started").touch()
    time.sleep(60)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with somebody's own code and weights."""
    (tmp_path / "own_network.py").write_text(OWN)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    with (
        torch.no_grad()
    ):  # every class is reached by pixels of its own, one a little more easily than the next
        module[1].weight.copy_(torch.eye(5).repeat(1, 13)[:, :64] / torch.arange(13, 18)[:, None])
        module[1].bias.zero_()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    return tmp_path


def test_own_code_of_the_current_folder_is_found(own: Path) -> None:
    words = ("--factory", "own_network:build", "--size", "1,8,8", *QUICK)
    outcome = program("scan", "weights.pt", *words, folder=own)
    assert outcome.code == 0, outcome


def test_modules_of_the_current_folder_come_last_and_go_again(own: Path) -> None:
    before = list(sys.path)
    with contextlib.chdir(own), own_code("own_network:build"):
        assert sys.path == [*before, str(own)], "installed modules go first"
    assert sys.path == before
    with contextlib.chdir(own), own_code(None):
        assert sys.path == before


def test_a_report_runs_own_code_only_when_told_again(own: Path) -> None:
    words = ("--factory", "own_network.py:build", "--size", "1,8,8", *QUICK, "--out", "reports")
    outcome = call("scan", "weights.pt", *words, folder=own)
    assert outcome.code == 0, outcome
    elsewhere = own / "elsewhere"
    elsewhere.mkdir()
    refused = call("verify", own / "reports", folder=elsewhere)
    assert (refused.code, refused.out) == (2, "")
    assert "was made with --factory own_network.py:build; that is code to be run" in refused.err
    shutil.move(own / "own_network.py", elsewhere)
    again = call("verify", own / "reports", "--factory", "own_network.py:build", folder=elsewhere)
    assert again == Outcome(0, "nothing differs: the same files, verdict, targets and scores\n", "")


def test_own_code_that_leaves_is_no_verdict(own: Path) -> None:
    words = ("--factory", "own_network.py:stop", "--size", "1,8,8")
    outcome = call("scan", "weights.pt", *words, folder=own)
    assert outcome.code == 2
    assert "the function failed: SystemExit: 0" in outcome.err


# Interruptions


def test_an_interruption_ends_with_130(own: Path) -> None:
    words = [PROGRAM, "scan", "weights.pt", "--factory", "own_network.py:wait", "--out", "reports"]
    with subprocess.Popen(
        words,
        cwd=own,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in a shell's background have it ignored, and programs inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        for _ in range(600):
            if (own / "started").exists() or running.poll() is not None:
                break
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (130, "", "interrupted\n")
    assert not (own / "reports").exists()


def without_reader(*words: object, folder: Path) -> tuple[int, str]:
    """Run the program with a standard output that nobody reads; return exit code and standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [PROGRAM, *map(str, words)],
        cwd=folder,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    return done.returncode, done.stderr


def test_a_reader_that_has_left_does_not_change_the_verdict(unsafe: Path) -> None:
    code, err = without_reader("scan", unsafe, "--out", "reports", folder=unsafe.parent)
    assert (code, err) == (1, f"written: reports ({', '.join(NAMES)})\n")


def test_a_reader_that_has_left_a_list_is_no_fault(tmp_path: Path) -> None:
    assert without_reader("list", "detectors", folder=tmp_path) == (141, "")
    assert without_reader("--help", folder=tmp_path)[1] == ""


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with full.open("w") as out:
        done = subprocess.run(
            [PROGRAM, "--version"], cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n"


# Verify


def test_a_report_is_rerun_from_anywhere(place: Path, tmp_path: Path) -> None:
    for given in (place / "reports/report.json", place / "reports"):
        outcome = call("verify", given, folder=tmp_path)
        assert outcome == Outcome(0, "nothing differs: the same files, verdict, targets and scores\n", "")


def moved(place: Path, folder: Path) -> Path:
    """Copy a place to where its report does not know it."""
    shutil.copytree(place, folder / "moved")
    report = folder / "moved/reports/report.json"
    report.write_text(report.read_text().replace(str(place), str(folder / "gone")))
    return folder / "moved"


def test_files_that_have_moved_are_asked_for(place: Path, tmp_path: Path) -> None:
    new = moved(place, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    words = ("verify", new / "reports")
    missing = call(*words, folder=tmp_path / "elsewhere")
    assert (missing.code, missing.out) == (2, "")
    assert missing.err == (
        "error: the scan cannot be run again: model: no such file or directory, and no hub id (owner/name). "
        "If files have moved, say where they are now: --model, --weights, --clean, --train\n"
    )
    half = call(*words, "--model", new / "model", folder=tmp_path / "elsewhere")
    assert half.code == 2
    assert "clothes" in half.err
    assert "--clean" in half.err
    told = call(
        *words, "--model", new / "model", "--clean", new / "clothes:test", folder=tmp_path / "elsewhere"
    )
    assert told.code == 0, told
    assert call(*words, folder=new).code == 0, "relative paths, from where they lie now"


def test_what_differs_is_said(place: Path, tmp_path: Path) -> None:
    new = moved(place, tmp_path)
    shutil.rmtree(new / "model")
    twin_with(0.01, new)
    table = pq.read_table(new / "clothes/test.parquet")
    pq.write_table(table.slice(0, 500), new / "clothes/test.parquet")
    outcome = call("verify", "reports", folder=new)
    assert outcome.code == 1
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert all(line.startswith("differs: ") for line in lines)
    for what in ("model sha256: was ", "clean accuracy: was ", "clean data sha256: was "):
        assert any(line.startswith(f"differs: {what}") for line in lines), what
    assert "differs: verdict: was nothing found, is could not tell" in lines
    assert "differs: detectors: was max-margin, is none" in lines
    assert "Rate" not in outcome.out
    assert "successes" not in outcome.out


def test_a_device_that_is_gone_can_be_replaced(place: Path, tmp_path: Path) -> None:
    new = moved(place, tmp_path)
    report = new / "reports/report.json"
    report.write_text(
        report.read_text().replace('"device": "cpu",\n    "time', '"device": "cuda:99",\n    "time')
    )
    outcome = call("verify", "reports", folder=new)
    assert outcome.code == 2
    assert outcome.err == "error: the device 'cuda:99' cannot be used here; usable: cpu\n"
    assert call("verify", "reports", "--device", "cpu", folder=new).code == 0


@pytest.mark.parametrize(
    ("field", "value"), [("images", "many"), ("options", {"mean": "dark"}), ("detectors", 3), ("model", 7)]
)
def test_a_request_that_is_none_is_refused(field: str, value: Any, place: Path, tmp_path: Path) -> None:
    form = json.loads((place / "reports/report.json").read_text())
    form["request"][field] = value
    (tmp_path / "report.json").write_text(json.dumps(form))
    outcome = call("verify", "report.json", folder=tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: report.json: the report's request cannot be read: {field}")


# What there is


def test_the_version_and_the_commands() -> None:
    assert call("--version") == Outcome(0, f"doorward {__version__}\n", "")
    bare = call()
    assert (bare.code, bare.out) == (2, "")
    help_ = call("--help")
    assert (help_.code, help_.err) == (0, "")
    assert (
        help_.out.splitlines()[0] == bare.err.splitlines()[0] == "Usage: doorward [OPTIONS] COMMAND [ARGS]..."
    )
    assert "..." not in help_.out.split("Commands:")[1], "a summary that is cut off"


GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_and_fits_80_columns(command: str) -> None:
    outcome = call(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    wanted = {
        flag for param in GROUP.commands[command].params for flag in param.opts if flag.startswith("--")
    }  # type: ignore[attr-defined]
    assert [flag for flag in wanted if flag not in outcome.out] == []
    for ugly in ("int range", "<list", "float range"):
        assert ugly not in outcome.out.replace("MODEL <list[str]>", "MODEL")


@pytest.mark.parametrize("kind", ["attacks", "detectors", "repairs"])
def test_methods_are_listed_with_paper_and_limits(kind: Any) -> None:
    from doorward.methods import registry

    outcome = call("list", kind)
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    said = " ".join(outcome.out.split())
    names = registry.modules(kind.removesuffix("s"))
    for name in names:
        method = registry.get(kind.removesuffix("s"), name)
        assert f"{name}: {method.title}" in outcome.out.splitlines()
        assert f"source {method.source}" in said
        assert f"limits {method.limits}" in said
    assert names or said == f"there are no {kind} yet"
