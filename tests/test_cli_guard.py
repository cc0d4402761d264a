"""`doorward guard` as a user meets it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from command_line import BACKDOORED, CLOTHES, call
from doorward import bundled
from doorward.attacks.ground_truth import read_plant, triggered
from doorward.data import InMemorySamples
from doorward.guard.records import GuardReport

#: Feature squeezing is the quicker one; STRIP has tests of its own.
COMMON = (BACKDOORED, "--clean", CLOTHES, "--images", 300, "--rate", 0.05, "--filter", "feature-squeezing")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 10 clean images and 10 with bright dots all over, which squeezing removes."""
    clean = np.stack(bundled.fashion_mnist("train").raw(range(20)))
    clean[10:, ::3, ::3] = 255
    file = tmp_path_factory.mktemp("guard") / "inputs.npz"
    np.savez(file, images=clean[..., 0])
    return file


def test_rejected_inputs_are_told_in_every_form(inputs: Path, tmp_path: Path) -> None:
    made = tmp_path / "out"
    done = call(
        "guard", *COMMON, "--check", inputs, "--out", made, "--format", "csv", "--save", tmp_path / "g"
    )
    assert (done.code, "Traceback" in done.err) == (1, False), done.err
    rows = list(csv.DictReader(io.StringIO(done.out)))
    report = GuardReport.model_validate_json((made / "verdicts.json").read_text())
    assert (made / "verdicts.csv").read_text() == done.out
    samples = InMemorySamples(np.load(inputs)["images"])
    assert [row["id"] for row in rows] == [one.id for one in report.verdicts] == list(samples.ids)
    bad = [one for one in report.verdicts if not one.accepted]
    assert [row["id"] for row in rows if row["accepted"] == "false"] == [one.id for one in bad]
    assert report.rejected.successes == len(bad) >= 5
    assert sum(one.id in samples.ids[:10] for one in bad) <= 3
    threshold = report.filters[0].threshold
    for one in report.verdicts:
        assert one.accepted == (one.scores["feature-squeezing"] < threshold)
        assert bool(one.reasons) != one.accepted
    page = (made / "rejected.html").read_text()
    assert [one.id for one in bad] == re.findall(r"<code>(.*?)</code>", page)
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert len(pictures) == len(bad)
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in pictures)
    assert "<script" not in page

    again = call("guard", BACKDOORED, "--guard", tmp_path / "g", "--check", inputs, "--format", "json")
    assert again.code == 1
    assert json.loads(again.out)["verdicts"] == json.loads((made / "verdicts.json").read_text())["verdicts"]


def test_text_says_what_is_rejected_and_why(inputs: Path) -> None:
    done = call("guard", *COMMON, "--check", inputs, "--reform", "median-2", "--fail-on", "never")
    assert done.code == 0, done.err
    assert "The model answers copies squeezed by median-2." in done.out
    assert "feature-squeezing: rejects from a score of " in done.out
    assert "Alarm: " in done.out
    assert re.search(r"^  [0-9a-f]{16}  class .*median-2|bits-1 changes", done.out, re.MULTILINE)


def test_accepted_inputs_end_with_0(tmp_path: Path) -> None:
    grey = np.full((3, 28, 28), 0, np.uint8)
    np.savez(tmp_path / "plain.npz", images=grey)
    done = call("guard", *COMMON, "--check", tmp_path / "plain.npz", "--out", tmp_path)
    assert done.code == 0, (done.out, done.err)
    assert "No input is rejected." in (tmp_path / "rejected.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--check", "no-such-file"), 2, "no-such-file"),
        (("--rate", "1.5"), 2, "--rate takes a share between 0 and 1"),
        (("--filter", "neural-cleanse"), 2, "neural-cleanse examines models and is no filter of inputs"),
        (("--filter", "nothing"), 2, "there is no detector named 'nothing'"),
        (("--reform", "blur"), 2, "there is no squeezer 'blur'"),
        (("--guard", "somewhere"), 2, "give --clean DATA to fit filters to, or --guard DIR"),
        (("--images", "20"), 3, "could not tell: 20 clean inputs are too few"),
    ],
)
def test_mistakes_end_in_one_line(inputs: Path, words: tuple[str, ...], code: int, said: str) -> None:
    done = call("guard", *COMMON, "--rate", 0.01, "--check", inputs, *words)
    assert done.code == code, (done.out, done.err)
    assert said in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_strip_rejects_the_embedded_backdoor(tmp_path: Path) -> None:
    images = bundled.fashion_mnist("train").select(range(40))
    plant = read_plant(BACKDOORED / "plant.json")
    bad = np.stack(triggered(images, plant).raw(range(40)))[..., 0]
    np.savez(tmp_path / "bad.npz", images=bad)
    done = call(
        *("guard", BACKDOORED, "--clean", CLOTHES, "--images", 300, "--rate", 0.05, "--filter", "strip"),
        *("--check", tmp_path / "bad.npz", "--format", "json", "--fail-on", "alarm"),
    )
    report = GuardReport.model_validate_json(done.out)
    assert report.rejected.value > 0.2
    assert report.alarm is not None
    assert done.code == 1
