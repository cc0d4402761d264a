"""Recovered triggers are tried as users would send them: rounded to 8 bits, and one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from doorward.core.records import Measurement, Picture, RecoveredTrigger
from doorward.data import InMemorySamples
from doorward.models import Classifier, wrap
from doorward.models.classifier import to_levels
from doorward.scan.confirmation import ALONE, PICTURES, _ground, confirm, illustrate
from doorward.scan.images import ImageSplit
from doorward.triggers.masked import MaskedPattern
from doorward.triggers.warp import Warp
from report_examples import nothing_found, suspicious

SIZE, CLASSES, TARGET = (1, 8, 8), 4, 3


def evidence(n: int = 3 * ALONE) -> ImageSplit:
    pixels = np.random.default_rng(0).integers(0, 200, (n, 8, 8, 1), dtype=np.uint8)
    samples = InMemorySamples(list(pixels), np.zeros(n, np.int64), classes=tuple("abcd"))
    return ImageSplit(samples, samples.select(np.arange(1)), samples)


def recovered(value: float) -> Measurement:
    """Return a measurement with a trigger: one corner of a brightness."""
    mask = torch.zeros(1, 8, 8)
    mask[:, :2, :2] = 1
    trigger = MaskedPattern(mask=mask, pattern=torch.full(SIZE, value))
    item = RecoveredTrigger(title="Recovered trigger", target=TARGET, trigger=trigger.to_json())
    return Measurement(
        detector="patch-search", level="model", kind="backdoor", summary="It is.", evidence=(item,)
    )


def answering(triggered: Callable[[Tensor], Tensor], plain: int = 0) -> Classifier:
    """Return a classifier that answers the target where a function of the images (n, 1, 8, 8) says so."""

    def logits(x: Tensor) -> Tensor:
        y = torch.zeros(len(x), CLASSES) + 0 * x.sum()
        y[:, plain] = 1.0
        y[:, TARGET] += 2.0 * triggered(x)
        return y

    return wrap(logits, size=SIZE)


def bright(x: Tensor) -> Tensor:
    return x[:, 0, :2, :2].amin((1, 2)) > 0.9


def exact(x: Tensor) -> Tensor:
    return bright(x) & torch.isclose(x, to_levels(x), atol=1e-6, rtol=0).flatten(1).all(1)


def alone(x: Tensor) -> Tensor:
    return bright(x) & (len(x) == 1)


def together(x: Tensor) -> Tensor:
    return bright(x) & (len(x) > 1)


@pytest.mark.parametrize(
    ("gate", "success"),
    [(bright, 1.0), (exact, 1.0), (alone, 1.0), (together, 0.0)],
    ids=["bright", "exact", "alone", "together"],
)
def test_what_counts_is_what_users_see(gate: Callable[[Tensor], Tensor], success: float) -> None:
    (tried,) = confirm([recovered(1 - 0.4 / 255)], answering(gate), evidence())
    assert tried.confirmation.success.n == 3 * ALONE
    assert tried.confirmation.success.value == success
    assert torch.equal(tried.triggered, to_levels(tried.triggered))


def test_a_model_that_takes_no_single_image_is_tried_with_several() -> None:
    def fussy(x: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("give me more")
        return bright(x)

    (tried,) = confirm([recovered(1.0)], answering(fussy), evidence())
    assert tried.confirmation.success.value == 1.0


def test_a_trigger_that_rounding_takes_away_is_none() -> None:
    """It would be found in floats, and nobody could send it."""

    def between(x: Tensor) -> Tensor:
        return (x[:, 0, 0, 0] * 255 - 254.7).abs() < 0.1

    (tried,) = confirm([recovered(254.7 / 255)], answering(between), evidence())
    assert tried.confirmation.success.value == 0.0


@pytest.mark.parametrize("flagged", [True, False])
def test_pictures_say_what_the_model_answers(flagged: bool) -> None:
    classifier = answering(bright)
    tried = confirm([recovered(1.0)], classifier, evidence())
    report = (suspicious if flagged else nothing_found)()
    finding = report.findings[-1].model_copy(update={"detector": "patch-search", "targets": ()})
    drawn = illustrate(report.model_copy(update={"findings": (finding,)}), classifier, tried)
    alone, *examples = [one for one in drawn.findings[0].evidence if isinstance(one, Picture)][: PICTURES + 1]
    assert (alone.role, {one.role for one in examples}) == ("trigger", {"example"})
    assert {one.title for one in examples} == {"0 \N{RIGHTWARDS ARROW} 3"}
    assert len(examples) == PICTURES
    assert ("trigger" in alone.title) == flagged, "without an alarm it is not called a trigger"


def test_a_trigger_that_only_moves_pixels_is_drawn_on_a_grid() -> None:
    (tried,) = confirm([recovered(1.0)], answering(bright), evidence())
    assert _ground(tried).unique().tolist() == [0.5]
    moved = replace(tried, trigger=Warp(torch.zeros(2, 4, 4), 0.5))
    assert len(_ground(moved).unique()) == 2
