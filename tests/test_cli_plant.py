"""`doorward plant`: what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from doorward.cli import plant as command
from doorward.data import open_samples
from doorward.errors import InputError
from doorward.plants import read_plant


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
