"""What is wrong is said in one line, with exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from command_line import (
    BACKDOORED,
    CLEAN,
    CLOTHES,
    QUICK,
    assert_one_line,
    call,
    environment,
    nothing_written,
    program,
)

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
LABELS = np.arange(20) % 10


def damaged(folder: Path, size: int) -> str:
    """Copy a model, its weights cut off."""
    shutil.copytree(CLEAN, folder / "model")
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    return "model"


def weights_alone(folder: Path) -> str:
    (folder / "model").mkdir()
    shutil.copy(CLEAN / "model.safetensors", folder / "model")
    return "model"


def file(name: str, data: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return name

    return write


def empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir()
    return "empty"


def directory(name: str, config: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        return name

    return write


NOISE = rng.bytes(4000)
MODELS: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "missing": (lambda _: "nowhere.onnx", ("nowhere.onnx", "no such file or directory")),
    "missing in a folder": (lambda _: "./no/model", ("./no/model", "no such file or directory")),
    "empty name": (lambda _: "", ("MODEL is empty",)),
    "empty folder": (empty_folder, ("empty", "config.json", "no model file")),
    "no config": (weights_alone, ("config.json", "model.safetensors", "--factory")),
    "cut weights": (lambda p: damaged(p, 100_000), ("model.safetensors", "it is cut off")),
    "cut header": (lambda p: damaged(p, 20), ("model.safetensors", "it is cut off")),
    "no weights": (lambda p: damaged(p, 0), ("model.safetensors", "it is empty")),
    "noise as .onnx": (file("noise.onnx", NOISE), ("noise.onnx is no ONNX model",)),
    "nothing as .onnx": (file("nothing.onnx", b""), ("nothing.onnx: it is empty",)),
    "noise as .pt2": (file("noise.pt2", NOISE), ("noise.pt2 is not a readable torch.export program",)),
    "nothing as .pt2": (file("nothing.pt2", b""), ("nothing.pt2: it is empty",)),
    "noise as .safetensors": (file("noise.safetensors", NOISE), ("--factory",)),
    "text": (file("notes.txt", b"hello"), ("notes.txt: a model is a directory, an .onnx or a .pt2 file",)),
    "config of nothing": (directory("odd", "{}"), ("odd", "architecture")),
    "broken config": (directory("odd", "{"), ("config.json is not readable as JSON",)),
    "weights of a directory": (
        lambda _: str(CLEAN / "model.safetensors"),
        (f"holds the weights of the model directory {CLEAN}: give the directory",),
    ),
    "configuration of a directory": (lambda _: str(CLEAN / "config.json"), ("a model is a directory",)),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    write, parts = MODELS[case]
    model = write(tmp_path)
    with nothing_written(tmp_path):
        assert_one_line(call("scan", model, "--out", "reports", folder=tmp_path), *parts)


def npz(x: np.ndarray, y: np.ndarray | None = None) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        np.savez(folder / "data.npz", **({"x": x} if y is None else {"x": x, "y": y}))
        return "data.npz"

    return write


def pictures(folder: Path) -> str:
    """Write six pictures by class, one of them broken."""
    for name in ("coat", "shirt"):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(IMAGES[i]).save(folder / "pictures" / name / f"{i}.png")
    (folder / "pictures/coat/1.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    return "pictures"


def one_of_another_size(folder: Path) -> str:
    for i, side in enumerate((28, 28, 14)):
        (folder / "pictures/coat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[i, :side, :side]).save(folder / f"pictures/coat/{i}.png")
    return "pictures"


def text(folder: Path) -> str:
    (folder / "data.csv").write_text("text,label\nhello there,0\ngood bye,1\n")
    return "data.csv"


DATA: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "missing": (lambda _: "nowhere.npz", ("no file or folder 'nowhere.npz'",)),
    "empty name": (lambda _: "", ("--clean is empty",)),
    "empty folder": (empty_folder, ("empty",)),
    "other channels": (
        npz(np.stack([IMAGES] * 3, axis=-1), LABELS),
        ("data.npz, row ", "takes 28x28 images with 1 channel(s)", "is 28x28 with 3"),
    ),
    "other size": (
        npz(IMAGES[:, ::2, ::2], LABELS),
        ("data.npz, row ", "takes 28x28 images with 1 channel(s)", "is 14x14 with 1"),
    ),
    "one of another size": (one_of_another_size, ("coat/2.png, id ", "is 14x14 with 1")),
    "labels beyond": (npz(IMAGES, LABELS + 2), ("labels up to 11, the model 10 classes (0 to 9)",)),
    "negative labels": (npz(IMAGES, LABELS - 1), ("data.npz", "-1")),
    "labels of another length": (npz(IMAGES, LABELS[:7]), ("data.npz", "20", "7")),
    "no picture": (pictures, ("coat/1.png, id ", "cannot be decoded")),
    "no rows": (npz(IMAGES[:0], LABELS[:0]), ("data.npz", "has no rows")),
    "text": (text, ("the model takes images, data.csv holds text",)),
    "no such split": (lambda _: CLOTHES.replace(":test", ":nope"), ("has no split 'nope'", "test, train")),
    "noise": (file("noise.parquet", NOISE), ("noise.parquet",)),
    "a model": (lambda _: str(CLEAN / "config.json"), ("config.json",)),
}


@pytest.mark.parametrize("role", ["--clean", "--train"])
@pytest.mark.parametrize("case", DATA)
def test_data_that_do_not_fit(case: str, role: str, tmp_path: Path) -> None:
    write, parts = DATA[case]
    data = write(tmp_path)
    with nothing_written(tmp_path):
        outcome = call("scan", CLEAN, role, data, "--out", "reports", *QUICK, folder=tmp_path)
        assert_one_line(outcome, *(part.replace("--clean", role) for part in parts))


OPTIONS: dict[str, tuple[str, ...]] = {
    "--detector nope": ("no detector named 'nope'", "max-margin, neural-cleanse"),
    "--nonsense": ("--nonsense", "doorward scan --help"),
    "surplus": ("one MODEL at a time, got 2", "--files-only"),
    "--format xml": ("'--format'", "'xml'", "'sarif'"),
    "--fail-on always": ("'--fail-on'", "'always'", "'never'"),
    "--seed -1": ("'--seed'", "0"),
    "--seed one": ("'--seed'", "integer"),
    "--images nan": ("'--images'", "integer"),
    "--images 3": ("'--images'", "4"),
    "--time-budget nan": ("'--time-budget'", "1"),
    "--time-budget inf": ("--time-budget", "inf"),
    "--time-budget -5": ("'--time-budget'", "1"),
    "--device cuda:99": ("'cuda:99' cannot be used here; usable: cpu",),
    "--device meta": ("'meta' cannot be used here; usable: cpu",),
    "--device abacus": ("'abacus' cannot be used here; usable: cpu",),
    "--mean garbage": ("--mean takes numbers separated by commas, got 'garbage'",),
    "--mean nan": ("--mean takes numbers", "'nan'"),
    "--mean 0.5,inf": ("--mean takes numbers", "'0.5,inf'"),
    "--mean 0.5,0.5": ("mean takes one value, or one for each channel, got 2",),
    "--std nan": ("--std takes numbers",),
    "--std 0": ("std must be positive",),
    "--input-range 1": ("--input-range takes two numbers",),
    "--input-range 0,nan": ("--input-range takes numbers",),
    "--input-range 1,0": ("low < high",),
    "--layout HWC": ("--layout is NCHW or NHWC, got 'HWC'",),
    "--output softmax": ("--output is logits, probabilities or one_logit, got 'softmax'",),
    "--output one_logit": ("'one_logit' is one output for each image; this model gives 10",),
    "--size 28": ("--size takes channels,height,width",),
    "--size 1,28,nan": ("--size takes numbers",),
    "--size 1,28,2.5": ("--size takes channels,height,width",),
    "--size 3,32,32": ("channels is 1 by the file itself, 3 was stated",),
    "--labels coat,shirt": ("2 labels for a model that tells 10 classes apart",),
    "--labels coat": ("1 label for a model",),
    "--labels coat,,shirt": ("--labels takes class names", "'coat,,shirt'"),
    "--labels @nowhere.txt": ("--labels @nowhere.txt", "No such file"),
    f"--labels @{os.devnull}": ("--labels takes class names",),
    "--features nope": ("--features nope: no such layer",),
    "--weights w.pt": ("--weights goes with --factory",),
    "--factory own": ("expected package.module:function or file.py:function",),
    "--factory no_such_module:build": ("no_such_module",),
    f"--clean {CLOTHES} --data-column nope": ("has no column 'nope'", "image, label"),
    f"--clean {CLOTHES} --label-column nope": ("has no column 'nope'", "image, label"),
    f"--clean {CLOTHES} --label-column image": ("column 'image'", "no labels"),
    "--out": ("'--out' requires an argument",),
}


@pytest.mark.parametrize("words", OPTIONS)
def test_options_that_mean_nothing(words: str, tmp_path: Path) -> None:
    out = () if words.endswith("--out") else ("--out", "reports")
    with nothing_written(tmp_path):
        assert_one_line(
            call("scan", CLEAN, *QUICK, *out, *words.split(" "), folder=tmp_path), *OPTIONS[words]
        )


@given(
    option=st.sampled_from(["--mean", "--std", "--size", "--input-range", "--labels", "--layout", "--seed"]),
    value=st.one_of(st.text(max_size=12), st.floats().map(str), st.lists(st.floats()).map(str)),
)
@example(option="--mean", value="\x1b[2J")
@example(option="--size", value="1e400,1,1")
def test_no_value_of_an_option_is_a_traceback(option: str, value: str, tmp_path: Path) -> None:
    assert_one_line(call("scan", "nowhere", f"{option}={value}", folder=tmp_path))


USAGE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("scan",): ("give a MODEL to scan, or training data with --train DATA", "doorward scan --help"),
    ("repair", str(CLEAN), "y", "--train", "nowhere.npz"): ("nowhere.npz",),
    ("scan", "--train", "nowhere.npz"): ("nowhere.npz",),
    ("scan", "--train", ""): ("--train is empty",),
    ("scna",): ("No such command 'scna'", "doorward --help"),
    ("--nonsense",): ("--nonsense", "doorward --help"),
    ("list",): ("Missing argument 'KIND'", "attacks, detectors, repairs"),
    ("list", "models"): ("'models'", "'attacks', 'detectors', 'repairs'"),
    ("verify",): ("Missing argument 'REPORT'",),
    ("verify", "nowhere.json"): ("nowhere.json: no such file; expected the report.json that a scan wrote",),
    ("verify", "noise.json"): ("noise.json",),
    ("verify", "other.json"): ("other.json: this is no Doorward report",),
    ("verify", "."): ("report.json: no such file",),
    ("plant", "nope", "x", "y"): ("no attack named 'nope'",),
    ("plant", "badnets", "nowhere.npz", "y"): ("nowhere.npz",),
    ("plant", "badnets", CLOTHES, "y", "--set", "target=Dres"): (
        "--set target takes a class by number, counted from 0, or by name",
        "there is no class 'Dres'; did you mean 'Dress'?",
    ),
    ("plant", "badnets", CLOTHES, "y", "--set", "source_classes=Bags"): (
        "source_classes=1,2; there is no class 'Bags'; did you mean 'Bag'?",
    ),
    ("plant", "badnets", CLOTHES, "noise.json/y"): ("OUT noise.json/y: noise.json is no folder",),
    ("train", CLOTHES, "noise.json/y"): ("OUT noise.json/y: noise.json is no folder",),
    ("train", "nowhere.npz", "y"): ("nowhere.npz",),
    ("train", CLOTHES, "y", "--robust", "--eps", "-1"): ("'--eps'", "0"),
    ("train", CLOTHES, "y", "--robust", "--eps", "nan"): ("'--eps'",),
    ("train", CLOTHES, "y", "--robust", "--eps", "big"): ("'--eps'", "number"),
    ("train", CLOTHES, "y", "--robust", "--eps", "8"): ("--eps: pixel values are in [0, 1]",),
    ("train", CLOTHES, "y", "--robust", "--steps", "0"): ("'--steps'", "1"),
    ("train", CLOTHES, "y", "--robust", "--norm", "l1"): ("'l1'", "'linf', 'l2'"),
}


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_what_cannot_be_meant(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "noise.json").write_bytes(NOISE)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with nothing_written(tmp_path):
        assert_one_line(call(*words, folder=tmp_path), *USAGE[words])


@pytest.mark.parametrize("command", [("scan", BACKDOORED), ("demo", "--fast")], ids=lambda words: words[0])
def test_a_place_for_reports_that_is_none_is_refused_before_the_work(
    command: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with nothing_written(tmp_path):
        for out in ("file", "file/below", "nowhere"):
            assert_one_line(call(*command, "--out", out, folder=tmp_path), f"--out {out}", "no folder")


def test_a_place_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).resolve() != tmp_path)  # root may write
    with nothing_written(tmp_path):
        for words in (("scan", BACKDOORED, "--out", "reports/new"), ("demo", "--fast")):
            outcome = call(*words, folder=tmp_path)
            assert_one_line(outcome, f"the folder {tmp_path} may not be written to")


def test_a_place_that_holds_nothing_of_ours_is_refused_before_the_work(tmp_path: Path) -> None:
    """Asking for permission does not tell: root may write to /proc, and cannot."""
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc")
    with nothing_written(tmp_path):
        assert_one_line(call("scan", CLEAN, "--out", "/proc/doorward", folder=tmp_path), "/proc/doorward")
        too_long = "reports/" + "long" * 100
        assert_one_line(
            call("scan", CLEAN, "--out", too_long, folder=tmp_path), "nothing can be written there"
        )


@pytest.mark.parametrize("text", ["page", "report"])
def test_a_place_that_fails_in_the_end_costs_no_verdict_and_leaves_the_earlier_reports(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four are replaced, or none: the disk is full with the second, or before the first is in place."""
    earlier = {f"report.{kind}": f"earlier {kind}" for kind in ("json", "html", "sarif", "txt")}
    for name, content in earlier.items():
        (tmp_path / name).write_text(content)
    plain = Path.write_text

    def full(path: Path, *rest: Any, **more: Any) -> int:
        if ".report.html" in path.name:
            raise OSError(28, "No space left on device")
        return plain(path, *rest, **more)

    def stuck(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if text == "page":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr("doorward.reports.files.os.replace", stuck)
    outcome = call("scan", CLEAN, "--detector", "unsafe-code", "--out", tmp_path, folder=tmp_path)
    assert outcome.code == 2
    assert outcome.out.startswith("COULD NOT TELL")
    assert outcome.err.startswith("error: the reports need a folder to write to; ")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == earlier


def test_a_folder_in_a_report_s_place_costs_no_report(tmp_path: Path) -> None:
    (tmp_path / "reports" / "report.sarif").mkdir(parents=True)
    (tmp_path / "reports" / "report.json").write_text("earlier")
    outcome = call("scan", CLEAN, "--detector", "unsafe-code", "--out", "reports", folder=tmp_path)
    assert (outcome.code, "report.sarif is a folder" in outcome.err) == (2, True)
    assert (tmp_path / "reports" / "report.json").read_text() == "earlier"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scan", CLEAN, "--out", ""), "an empty value after --out"),
        (("scan", CLEAN, "--out="), "--out is empty"),
        (("scan", "--files-only", ""), "an empty value after --files-only"),
        (("plant", "badnets", CLOTHES, ""), "an empty value among the arguments"),
        (("train", CLOTHES, ""), "an empty value among the arguments"),
        (("bench", "show", "null", "--out", ""), "an empty value after --out"),
        (("verify", ""), "an empty value among the arguments"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(
    words: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    with nothing_written(tmp_path):
        assert_one_line(call(*words, folder=tmp_path), said)


CLOSED = """
import os, sys
os.close(int(sys.argv[1]))
os.execv(sys.executable, [sys.executable, "-c", "from doorward.cli.app import main; main()", *sys.argv[2:]])
"""


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream_does_not_change_the_verdict(stream: int, tmp_path: Path) -> None:
    words = ["scan", str(CLEAN), "--detector", "unsafe-code", "--out", "reports"]
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, str(stream), *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert json.loads((tmp_path / "reports" / "report.json").read_text())["verdict"] == "could_not_tell"
    kept = done.stderr if stream == 1 else done.stdout
    assert kept.startswith("written: reports" if stream == 1 else "COULD NOT TELL")


def test_a_current_folder_whose_name_is_no_text_ends_no_scan(tmp_path: Path) -> None:
    here = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    here.mkdir()
    outcome = call("scan", CLEAN, "--detector", "unsafe-code", "--format", "json", folder=here)
    assert outcome.code == 3
    assert json.loads(outcome.out)["request"]["folder"] is None


def test_a_fault_of_ours_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("doorward.scan.pipeline.scan_in_full", fault)
    monkeypatch.delenv("DOORWARD_TRACEBACK", raising=False)
    outcome = call("scan", CLEAN, folder=tmp_path)
    assert (outcome.code, outcome.out) == (4, "")
    assert outcome.err == (
        "error: this should not happen: ZeroDivisionError: division by zero "
        "(DOORWARD_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("DOORWARD_TRACEBACK", "1")
    assert "Traceback" in call("scan", CLEAN, folder=tmp_path).err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("scan", "nowhere.onnx"), ("nowhere.onnx",)),
        (("scan", CLEAN, "--device", "cuda:99"), ("cuda:99",)),
        (("scan", CLEAN, "--format", "xml"), ("xml",)),
    ],
)
def test_the_program_itself_says_it_in_one_line(
    words: tuple[object, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    assert_one_line(program(*words, folder=tmp_path), *parts)


def test_a_name_that_is_no_text_is_shown_in_escapes(tmp_path: Path) -> None:
    outcome = program("scan", os.fsdecode(b"bad\xff\x1b[2J.onnx"), folder=tmp_path)
    assert_one_line(outcome, r"bad\xff\x1b[2J.onnx", "the name is not UTF-8")
