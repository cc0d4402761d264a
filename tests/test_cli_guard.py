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

from command_line import BACKDOORED, CLOTHES, assert_one_line, call
from doorward import bundled
from doorward.attacks.ground_truth import read_plant, triggered
from doorward.data import InMemorySamples
from doorward.guard.records import GuardReport

FITTED = (BACKDOORED, "--clean", CLOTHES, "--images", 300, "--rate", 0.05)
STRIP = (*FITTED, "--filter", "strip")
SQUEEZING = (*FITTED, "--filter", "feature-squeezing")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 10 clean images and 20 with the trigger of the embedded model."""
    clean = bundled.fashion_mnist("train").select(range(60))
    bad = triggered(clean, read_plant(BACKDOORED / "plant.json"))
    images = np.stack([*clean.raw(range(10)), *bad.raw(range(len(bad)))[-20:]])
    file = tmp_path_factory.mktemp("guard") / "inputs.npz"
    np.savez(file, images=images[..., 0])
    return file


def test_rejected_inputs_are_told_in_every_form(inputs: Path, tmp_path: Path) -> None:
    made = tmp_path / "out"
    done = call(
        "guard", *STRIP, "--check", inputs, "--out", made, "--format", "csv", "--save", tmp_path / "g"
    )
    assert (done.code, "Traceback" in done.err) == (1, False), done.err
    rows = list(csv.DictReader(io.StringIO(done.out)))
    report = GuardReport.model_validate_json((made / "verdicts.json").read_text())
    assert (made / "verdicts.csv").read_text() == done.out
    samples = InMemorySamples(np.load(inputs)["images"])
    assert [row["id"] for row in rows] == [one.id for one in report.verdicts] == list(samples.ids)
    bad = [one for one in report.verdicts if not one.accepted]
    assert [row["id"] for row in rows if row["accepted"] == "false"] == [one.id for one in bad]
    assert report.rejected.successes == len(bad) >= 15
    assert sum(one.id in samples.ids[:10] for one in bad) <= 3
    threshold = report.filters[0].threshold
    for one in report.verdicts:
        assert one.accepted == (one.scores["strip"] < threshold)
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


def test_what_is_said_of_the_images_is_heard(inputs: Path) -> None:
    plain = call("guard", *STRIP, "--check", inputs, "--format", "json")
    said = call("guard", *STRIP, "--check", inputs, "--format", "json", "--input-range", "0,255")
    first, second = ([one["scores"] for one in json.loads(done.out)["verdicts"]] for done in (plain, said))
    assert first != second
    assert_one_line(call("guard", *STRIP, "--check", inputs, "--input-range", "5"), "takes two numbers")


def test_text_says_what_is_rejected_and_why(inputs: Path) -> None:
    done = call("guard", *STRIP, "--check", inputs, "--reform", "median-2", "--fail-on", "never")
    assert done.code == 0, done.err
    assert "The model answers copies squeezed by median-2." in done.out
    assert "strip: rejects from a score of -0." in done.out
    assert re.search(
        r"^Alarm: \d+ of 30 inputs are rejected, where 5.0 % of clean ones", done.out, re.MULTILINE
    )
    assert re.search(r"^  [0-9a-f]{16}  class .*  strip: the mean entropy of 20 ", done.out, re.MULTILINE)


def test_accepted_inputs_end_with_0(tmp_path: Path) -> None:
    grey = np.full((3, 28, 28), 0, np.uint8)
    np.savez(tmp_path / "plain.npz", images=grey)
    done = call("guard", *SQUEEZING, "--check", tmp_path / "plain.npz", "--out", tmp_path)
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
    done = call("guard", *SQUEEZING, "--rate", 0.01, "--check", inputs, *words)
    assert done.code == code, (done.out, done.err)
    assert said in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
