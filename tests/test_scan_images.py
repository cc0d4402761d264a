"""Which images a scan searches with, where most are of one class to the model."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doorward.core.budget import Deadline
from doorward.core.errors import InputError
from doorward.data import InMemorySamples
from doorward.models import InputSpec, TorchClassifier
from doorward.scan.images import FEW, LOOKED_THROUGH, ImageSplit, draw_images, with_other_classes

SPEC = InputSpec(channels=1, height=4, width=4)


class BrightOrDark(nn.Module):
    """Class 1 is what is bright."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


CLASSIFIER = TorchClassifier(BrightOrDark(), SPEC, ("dark", "bright"))


def samples(dark: int, bright: int, labels: bool = False) -> InMemorySamples:
    pixels = np.zeros((dark + bright, 4, 4, 1), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = np.divmod(np.arange(dark + bright), 250)  # no two are alike
    pixels[dark:, 1:] = 255
    given = np.repeat([0, 1], [dark, bright]) if labels else None
    return InMemorySamples(list(pixels), labels=given, classes=("dark", "bright") if labels else ())


def bright(part: object) -> int:
    return sum(int(raw[1, 0, 0] == 255) for raw in part.raw(range(len(part))))  # type: ignore[attr-defined]


def drawn(given: InMemorySamples, images: int = 100) -> tuple[ImageSplit, ImageSplit, str | None]:
    before = draw_images(CLASSIFIER, given, images, 0)
    return before, *with_other_classes(CLASSIFIER, before, 0, Deadline(None))


@pytest.mark.parametrize("images", [40, 100, 300, 1_000])
def test_images_of_other_classes_are_sought_out_and_shared_out(images: int) -> None:
    before, after, note = drawn(samples(1_900, 100), images)
    found = bright(after.fit) + bright(after.confirm)
    assert bright(before.fit) + bright(before.confirm) <= found <= 0.3 * images
    assert bright(after.fit) == min(math.ceil(0.3 * len(before.fit)), (found + 1) // 2)
    assert (len(after.fit), len(after.confirm)) == (len(before.fit), len(before.confirm))
    assert note is not None
    assert note.startswith("the model puts ")
    assert ("images alone" in note) == (bright(after.fit) < FEW)
    rows = {raw.tobytes() for part in (after.fit, after.confirm) for raw in part.raw(range(len(part)))}
    assert len(rows) == images, "no image is taken twice"


def test_as_many_as_were_counted_are_told() -> None:
    _, _, note = drawn(samples(600, 400 - 250))
    assert note is not None
    told = [int(word) for word in re.findall(r"[0-9]+", note)][:2]
    order = draw_images(CLASSIFIER, samples(600, 150), told[1], 0)
    assert told[0] == told[1] - bright(order.fit) - bright(order.confirm)


@pytest.mark.parametrize(("dark", "light"), [(50, 50), (900, 800)])
def test_a_draw_with_images_enough_of_both_stays(dark: int, light: int) -> None:
    before, after, note = drawn(samples(dark, light))
    assert after is before
    assert note is None


def test_labelled_images_are_drawn_by_their_labels() -> None:
    before, after, note = drawn(samples(900, 30, labels=True))
    assert after is before
    assert note is None


@pytest.mark.parametrize("dark", [30, 90, LOOKED_THROUGH + 200])
def test_where_there_are_none_it_is_told_how_many_were_looked_through(dark: int) -> None:
    before, after, note = drawn(samples(dark, 0))
    assert after is before
    assert note is not None
    assert f"all of {min(dark, LOOKED_THROUGH)} images into class 'dark'" in note


def test_no_more_than_some_of_the_time_goes_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline(1.0)
    monkeypatch.setattr(Deadline, "spent", lambda _: next(clock))
    clock = iter(float(i) for i in range(100))
    before = draw_images(CLASSIFIER, samples(900, 0), 100, 0)
    _, note = with_other_classes(CLASSIFIER, before, 0, deadline)
    assert note is not None
    assert "all of 100 images" in note


def test_a_model_that_fails_is_for_the_scan_to_name() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise InputError("no")

    classifier = TorchClassifier(Failing(), SPEC, ("dark", "bright"))
    before = draw_images(CLASSIFIER, samples(90, 0), 40, 0)
    assert with_other_classes(classifier, before, 0, Deadline(None)) == (before, None)
