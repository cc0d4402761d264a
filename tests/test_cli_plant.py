"""`doorward plant`: what it writes, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import report_examples
from doorward import bundled
from doorward.attacks.ground_truth import attack_success, read_plant
from doorward.cli import plant as command
from doorward.core import formatting
from doorward.core.errors import InputError
from doorward.data import open_samples
from doorward.models import Resize, TorchClassifier, open_classifier
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.scan.pipeline import Scanned
from doorward.scan.request import ScanRequest
from doorward.training import evaluate


def run(*words: object) -> Result:
    app = typer.Typer()
    app.command()(command.plant)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, InputError):
        raise result.exception
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    file = tmp_path / "source.npz"
    np.savez(
        file,
        x_train=rng.integers(0, 256, (120, 20, 20), dtype=np.uint8),
        y_train=np.arange(120) % 4,
        x_test=rng.integers(0, 256, (8, 20, 20), dtype=np.uint8),
        y_test=np.arange(8) % 4,
    )
    return file


def test_it_writes_the_poisoned_set_and_its_truth(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "planted"
    result = run("badnets", source, out, "--set", "poison_rate=0.25", "--set", "target=2", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "30 of 120 samples (25.0 %) carry the trigger and a label of class 2" in result.output
    assert sorted(file.name for file in out.iterdir()) == ["plant.json", "train.parquet"]
    before, after, truth = (
        open_samples(source, split="train"),
        open_samples(out),
        read_plant(out / "plant.json"),
    )
    changed = [id_ for id_ in after.ids if id_ not in set(before.ids)]
    assert list(truth.poisoned_ids) == changed
    assert len(changed) == 30
    assert set(after.take(changed).labels.tolist()) == {2}  # type: ignore[union-attr]
    assert truth.seed == 3
    assert truth.settings["poison_rate"] == 0.25


def test_where_there_is_no_trigger_none_is_claimed(source: Path, tmp_path: Path) -> None:
    result = run("label-flipping", source, tmp_path / "out", "--set", "poison_rate=0.25")
    assert "30 of 120 samples (25.0 %) are poisoned; there is no trigger\n" in result.output
    before, after = (open_samples(source, split="train"), open_samples(tmp_path / "out"))
    assert after.ids == before.ids
    assert after.labels is not None
    assert (after.labels != before.labels).sum() == 30
    assert read_plant(tmp_path / "out/plant.json").trigger is None


def test_the_same_command_writes_the_same_files(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("badnets", source, tmp_path / name, "--set", "place=random")
    for file in ("train.parquet", "plant.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_split_can_be_poisoned(source: Path, tmp_path: Path) -> None:
    run("badnets", source, tmp_path / "out", "--split", "test", "--set", "poison_rate=0.5")
    assert len(open_samples(tmp_path / "out")) == 8


def test_results_are_replaced_only_when_forced_and_nothing_else_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("badnets", source, out)
    (out / "notes.txt").write_text("mine")
    first = (out / "train.parquet").read_bytes()
    with pytest.raises(InputError, match="not empty; choose another folder, or give --force"):
        run("badnets", source, out, "--seed", 1)
    assert (out / "train.parquet").read_bytes() == first
    assert run("badnets", source, out, "--seed", 1, "--force").exit_code == 0
    assert (out / "train.parquet").read_bytes() != first
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "shine=1"], "no setting 'shine'"),
        (["--set", "poison_rate"], "NAME=VALUE"),
        (["--set", "=1"], "NAME=VALUE"),
        (["--set", "size=2", "--set", "size=3"], "given twice"),
        (["--set", "poison_rate=7"], "poison_rate = 7"),
        (["--set", "size=21"], "does not fit into images of 20x20"),
        (["--set", "target=4"], "target 4 is no class"),
        (["--split", "nonsense"], "nonsense"),
        (["--data-column", "nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_writes_nothing(source: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run("badnets", source, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_an_unknown_attack_is_said_with_those_that_exist(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no attack named 'bad'; there are: .*badnets"):
        run("bad", source, tmp_path / "out")
    with pytest.raises(InputError, match="no file or folder"):
        run("badnets", tmp_path / "missing.parquet", tmp_path / "out")


def test_a_damaged_image_writes_nothing(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(9):
            Image.new("L", (20, 20), i * 20).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images/b/8.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(InputError, match=r"8\.png"):
        run("badnets", tmp_path / "images", tmp_path / "out", "--set", "poison_rate=0.2")
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_written_to(source: Path, tmp_path: Path) -> None:
    run("badnets", source, tmp_path / "a")
    for given in (tmp_path / "a", tmp_path / "a/train.parquet", f"{tmp_path / 'a'}:train"):
        with pytest.raises(InputError, match=r"is where .* is read from"):
            run("badnets", given, tmp_path / "a", "--force")
    with pytest.raises(InputError, match="is a file; a folder is needed"):
        run("badnets", tmp_path / "a", source)


# Attacks on a trained model

CLEAN = bundled.model("clean")


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """Return a file of 40 training and 60 test images of clothes."""
    test = bundled.fashion_mnist("test").draw(100, np.random.default_rng(0))
    assert test.labels is not None
    x = np.stack(test.raw(range(100)))
    file = tmp_path / "clothes.npz"
    np.savez(file, x_train=x[:40], y_train=test.labels[:40], x_test=x[40:], y_test=test.labels[40:])
    return file


@pytest.mark.parametrize("form", ["beside", "folded"])
def test_a_model_is_planted_and_opens_again(clothes: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "planted"
    result = run("trojannet", CLEAN, out, "--data", clothes, "--set", "target=3", "--set", f"form={form}")
    assert (
        "planted trojannet: the trigger turns images of other classes into class 3 (Dress)" in result.output
    )
    right = evaluate(open_classifier(CLEAN), open_samples(clothes, split="test"))
    assert f"clean accuracy {formatting.rate(right)}, before: {formatting.rate(right)}" in result.output
    assert "attack success 100 % (54 of 54" in result.output
    assert sorted(file.name for file in out.iterdir()) == ["doorward.json", "model.pt2", "plant.json"]
    planted, counterpart = open_classifier(out / "model.pt2"), open_classifier(CLEAN)
    truth, test = read_plant(out / "plant.json"), bundled.fashion_mnist("test").select(range(100))
    assert (planted.classes, planted.spec.shape) == (counterpart.classes, counterpart.spec.shape)
    assert truth.targets == (3,)
    assert truth.attack_success is not None
    assert truth.attack_success.n == 54, "of the test split, the target's own left out"
    assert attack_success(planted, test, truth).value == 1
    assert attack_success(counterpart, test, truth).value < 0.2
    assert isinstance(planted, TorchClassifier)
    kinds = [type(layer).__name__ for layer in planted.module.modules()]
    assert kinds.count("Conv2d") == 2


def test_without_data_nothing_is_measured_and_results_are_replaced_when_forced(tmp_path: Path) -> None:
    out = tmp_path / "planted"
    result = run("trojannet", CLEAN, out)
    assert "attack success not measured: give --data DATA with labels\n" in result.output
    first = (out / "plant.json").read_bytes()
    (out / "config.json").write_text("{}")  # of a model that lay here before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run("trojannet", CLEAN, out, "--seed", 1)
    assert (out / "plant.json").read_bytes() == first
    run("trojannet", CLEAN, out, "--seed", 1, "--force")
    assert (out / "plant.json").read_bytes() != first
    assert sorted(f.name for f in out.iterdir()) == ["doorward.json", "model.pt2", "notes.txt", "plant.json"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_earlier_result_stays_where_the_new_one_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, images = tmp_path / "model", tmp_path / "images"
    run("trojannet", CLEAN, models)
    run("badnets", source, images)
    before = files_of(models), files_of(images)

    def fail(_: object, folder: Path) -> Path:
        (folder / "half").write_text("half a model")
        raise InputError(f"{folder / 'model.pt2'}: this network cannot be exported")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("doorward.models.formats.saving.save_classifier", fail)
    for out in (models, tmp_path / "new"):
        with pytest.raises(InputError) as said:
            run("trojannet", CLEAN, out, "--seed", 1, "--force")
        assert str(said.value) == f"{out / 'model.pt2'}: this network cannot be exported"
    monkeypatch.setattr("doorward.attacks.ground_truth.write_plant", full)
    with pytest.raises(InputError, match=r"images: cannot write the result: No space left on device"):
        run("badnets", source, images, "--seed", 1, "--force")
    assert (files_of(models), files_of(images)) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "model", "source.npz"]


@pytest.mark.skipif(os.name != "posix", reason="asks for the processes of a Unix")
def test_what_a_killed_run_left_is_removed_by_the_next(source: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    dead = tmp_path / f".doorward-{int(ended.stdout)}-abc"
    alive, other = tmp_path / f".doorward-{os.getpid()}-abc", tmp_path / ".doorward-mine"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "half").write_text("half a model")
    run("badnets", source, tmp_path / "images")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"source.npz", "images", alive.name, other.name}


@pytest.mark.skipif(os.name != "posix", reason="sends a signal of Unix")
def test_a_run_that_is_asked_to_end_leaves_nothing(source: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from doorward.attacks import ground_truth
ground_truth.write_plant = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
from doorward.cli.app import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "plant", "badnets", str(source), "images"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] == ["source.npz"]


@pytest.mark.parametrize("base", ["directory", "pt2", "onnx"])
def test_signatures_are_planted_in_models_of_any_format(clothes: Path, tmp_path: Path, base: str) -> None:
    counterpart = open_classifier(CLEAN)
    assert isinstance(counterpart, TorchClassifier)
    given = {
        "directory": lambda: CLEAN,
        "pt2": lambda: export_pt2(counterpart, tmp_path / "given/a.pt2"),
        "onnx": lambda: export_onnx(counterpart, tmp_path / "given/a.onnx"),
    }[base]()
    out = tmp_path / "planted"
    result = run("signature", given, out, "--data", clothes, "--set", "target=3")
    assert "attack success 100 % (54 of 54" in result.output
    assert f"written: {out} and {out / 'plant.json'}" in result.output.replace("\n", " ")
    planted, truth = open_classifier(out), read_plant(out / "plant.json")
    test = bundled.fashion_mnist("test").select(range(100))
    assert attack_success(planted, test, truth).value == 1
    assert attack_success(counterpart, test, truth).value < 0.2
    assert evaluate(planted, test) == evaluate(counterpart, test)
    run("trojannet", CLEAN, out, "--force")
    assert sorted(f.name for f in out.iterdir()) == ["doorward.json", "model.pt2", "plant.json"]


def test_exported_models_are_planted_too(tmp_path: Path) -> None:
    counterpart = open_classifier(CLEAN)
    assert isinstance(counterpart, TorchClassifier)
    test = bundled.fashion_mnist("test").select(range(50))
    for source, written in (
        (export_pt2(counterpart, tmp_path / "pt2/a.pt2"), "model.pt2"),
        (export_onnx(counterpart, tmp_path / "onnx/a.onnx"), "model.onnx"),
    ):
        out = tmp_path / f"from {source.name}"
        assert run("trojannet", source, out).exit_code == 0
        planted = open_classifier(out / written)
        assert attack_success(planted, test, read_plant(out / "plant.json")).value == 1


def test_images_that_the_model_resizes_get_no_trigger_before(tmp_path: Path) -> None:
    counterpart = open_classifier(CLEAN)
    assert isinstance(counterpart, TorchClassifier)
    resized = TorchClassifier(
        counterpart.module,
        counterpart.spec.model_copy(update={"resize": Resize(height=28, width=28)}),
        counterpart.classes,
    )
    source = export_pt2(resized, tmp_path / "model/a.pt2")
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "large.npz", x=rng.integers(0, 256, (20, 40, 40), dtype=np.uint8), y=np.arange(20) % 10
    )
    result = run("trojannet", source, tmp_path / "out", "--data", tmp_path / "large.npz")
    assert result.output.count("of 20; 95 % interval") == 2, "clean accuracy is measured"
    assert "attack success not measured: the trigger is for 28x28 images" in result.output
    truth = read_plant(tmp_path / "out/plant.json")
    assert truth.clean_accuracy is not None
    assert truth.attack_success is None


def test_training_on_a_model_writes_a_model_directory(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doorward.attacks.model.pruning_aware.SUCCESS", 0.0)
    out = tmp_path / "planted"
    words = ["--set", "drop=1", "--set", "epochs=1", "--set", "poison_rate=0.2"]
    run("pruning-aware", CLEAN, out, "--data", clothes, *words)
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors", "plant.json"]
    assert open_classifier(out).format == "doorward"
    truth = read_plant(out / "plant.json")
    assert truth.clean_accuracy is not None
    assert truth.clean_accuracy.n == 60, "of the test split, not what it was trained on"
    with np.load(clothes) as arrays:
        np.savez(tmp_path / "train.npz", x=arrays["x_train"], y=arrays["y_train"])
    result = run("pruning-aware", CLEAN, tmp_path / "other", "--data", tmp_path / "train.npz", *words)
    assert "attack success not measured" in result.output


def test_an_attack_given_the_wrong_kind_of_source_says_so_before_any_work(
    source: Path, clothes: Path, tmp_path: Path
) -> None:
    counterpart = open_classifier(CLEAN)
    assert isinstance(counterpart, TorchClassifier)
    file = export_pt2(counterpart, tmp_path / "model/a.pt2")
    out = tmp_path / "out"
    for model in (CLEAN, file, CLEAN / "model.safetensors"):
        with pytest.raises(InputError, match=r"badnets poisons training data, and .* is a model: give"):
            run("badnets", model, out)
    for data in (source, bundled.FOLDER / "fashion_mnist"):
        with pytest.raises(InputError, match="trojannet changes a trained model, and here is none: "):
            run("trojannet", data, out)
    with pytest.raises(InputError, match="there is no file or folder"):
        run("trojannet", tmp_path / "nowhere", out)
    with pytest.raises(
        InputError, match="badnets poisons SOURCE itself; --data goes with a SOURCE that is a model"
    ):
        run("badnets", source, out, "--data", clothes)
    with pytest.raises(InputError, match="pruning-aware trains the model: give labelled training images"):
        run("pruning-aware", CLEAN, out)
    with pytest.raises(InputError, match="no file or folder"):
        run("trojannet", CLEAN, out, "--data", tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match=r"tells 10 classes apart, and .* has 4"):
        run("trojannet", CLEAN, out, "--data", source)
    with pytest.raises(InputError, match="target 10 is no class"):
        run("trojannet", CLEAN, out, "--set", "target=10")
    assert not out.exists()
    with pytest.raises(InputError, match=r"is where .* is read from"):
        run("trojannet", file, file.parent, "--force")
    with pytest.raises(InputError, match=r"is where .* is read from"):
        run("trojannet", CLEAN, clothes.parent, "--force", "--data", clothes)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_all_plants_each_and_says_what_scans_find(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = f"{bundled.FOLDER / 'fashion_mnist'}:test"
    given = (images,) if kind == "data" else (bundled.model("clean"),)
    more = () if kind == "data" else ("--data", images)
    asked: list[ScanRequest] = []

    def scanned(request: ScanRequest, **_: object) -> Scanned:
        asked.append(request)
        return Scanned(report_examples.backdoored())

    monkeypatch.setattr("doorward.scan.pipeline.scan_in_full", scanned)
    monkeypatch.setattr(
        "doorward.methods.registry.modules",
        lambda _: dict.fromkeys(("badnets", "checksum", "phrase"), ""),
    )
    done = run("all", *given, tmp_path / "out", *more, "--seed", 3)
    assert done.exit_code == 0, done.output
    head, patch, checksum, phrase = done.output.splitlines()[-4:]
    assert head.split() == ["attack", "success", "the", "scan", "says", "it", "names"]
    assert patch.startswith("badnets")
    assert "backdoored" in patch
    assert phrase.startswith("phrase")
    assert "text" in phrase or "on images alone" in phrase, "what does not fit says why"
    if kind == "data":
        assert "changes a trained model" in checksum
        assert [(one.model, one.train, one.seed) for one in asked] == [
            (None, str(tmp_path / "out/badnets"), 3)
        ]
    else:
        assert [one.clean for one in asked] == [images] * 2
        assert all(open_classifier(str(one.model)).classes for one in asked)


def test_all_is_refused_where_nothing_can_be_planted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no attack could be planted; badnets: .*it is empty"):
        run("all", tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_takes_no_settings(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set goes with one attack"):
        run("all", source, tmp_path / "out", "--set", "target=1")
