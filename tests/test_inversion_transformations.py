"""Kinds of change: what is searched is what the report's trigger does, and the search is cheap first."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import fft
from torch import nn

from doorward.core.budget import Deadline, TimeGuard
from doorward.inversion.problem import InversionProblem
from doorward.inversion.sources import SourcePools, outside_class
from doorward.inversion.transformations import (
    FAMILIES,
    Bent,
    Dense,
    Family,
    Found,
    JointObjective,
    LowFrequency,
    Search,
)
from doorward.models import TorchClassifier
from doorward.models.logit_scale import LogitScale
from doorward.models.spec import InputSpec
from doorward.triggers.base import Trigger

IMAGE = (3, 10, 14)


class Sides(nn.Module):
    """Four classes by the brightest quarter; how much the left is brighter than the right adds to class 2."""

    def __init__(self, planted: float) -> None:
        super().__init__()
        self.planted = planted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quarters = torch.stack(x.mean(1).chunk(4, dim=1), 1).mean((2, 3))  # (n, 4): bands from top to bottom
        half = x.shape[3] // 2
        side = x[..., :half].mean((1, 2, 3)) - x[..., half:].mean((1, 2, 3))
        return 10 * quarters + self.planted * side[:, None] * torch.eye(4, device=x.device)[2]


def problem(planted: float) -> InversionProblem:
    classifier = TorchClassifier(
        Sides(planted), InputSpec(channels=3, height=12, width=12), [f"band {i}" for i in range(4)]
    )
    generator = torch.Generator().manual_seed(0)
    images = 0.2 * torch.rand(40, 3, 12, 12, generator=generator)
    for i, image in enumerate(images):
        image[:, 3 * (i % 4) : 3 * (i % 4) + 3] += 0.4
    return InversionProblem(classifier, images, SourcePools(outside_class(classifier, images, None)))


def search(asked: InversionProblem) -> Search:
    objective = JointObjective(asked, None, LogitScale(1.0, 40))
    return Search(asked, objective, base=5, guard=TimeGuard(Deadline(), 10_000, work="trying"))


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.name)
def test_the_trigger_does_what_was_searched(kind: type[Family]) -> None:
    family, generator = kind(IMAGE), torch.Generator().manual_seed(1)
    direction = torch.randn(family.shape, generator=generator)
    direction = direction / direction.norm()
    x = torch.rand(2, *IMAGE, generator=generator)
    shown = family.apply(x, direction.expand(2, *family.shape), torch.full((2, 1, 1, 1), family.first))
    trigger = Trigger.from_json(family.trigger(direction, family.first).to_json())
    torch.testing.assert_close(trigger.apply(x), shown, atol=2e-6, rtol=0)
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    assert not torch.equal(shown, x)


def test_smooth_pictures_are_of_the_lowest_frequencies() -> None:
    family = LowFrequency(IMAGE)
    direction = torch.randn(family.shape, generator=torch.Generator().manual_seed(2))
    picture = family.trigger(direction, 1.0).tensors()["picture"].numpy()
    coefficients = fft.dctn(picture, axes=(1, 2), norm="ortho")
    assert coefficients[:, :5, :5] == pytest.approx(direction.numpy(), abs=1e-5)
    coefficients[:, :5, :5] = 0
    assert abs(coefficients).max() < 1e-5


def test_the_cost_of_a_bend_is_in_pixels() -> None:
    family = Bent((1, 9, 9))
    right = torch.zeros(family.shape)
    right[0] = 1.0
    ramp = torch.arange(9.0).expand(1, 1, 9, 9) / 8
    shown = family.apply(ramp, right[None], torch.full((1, 1, 1, 1), 1.0))
    assert shown[0, 0, :, :-1] == pytest.approx(ramp[0, 0, :, 1:].numpy(), abs=1e-5)


@pytest.mark.trains
@pytest.mark.parametrize("kind", [Dense, LowFrequency])
def test_what_was_planted_is_cheapest(kind: type[Family]) -> None:
    targets = torch.arange(4)
    family = kind((3, 12, 12))
    planted = search(problem(60.0))(family, targets, 0, steps=60, batch_size=8)
    without = search(problem(0.0))(family, targets, 0, steps=60, batch_size=8)
    assert planted.cheapest == 2
    assert planted.gap > without.gap + 0.5
    direction, cost = planted.best(1.25)
    asked = problem(60.0)
    shown = family.trigger(direction, cost).apply(asked.images[asked.pools.outside[:, 2]])
    assert (asked.classifier.logits(shown).argmax(1) == 2).float().mean() > 0.8


@pytest.mark.trains
def test_a_class_costs_the_same_alone_and_among_others() -> None:
    asked, family = problem(20.0), Dense((3, 12, 12))
    together = search(asked)(family, torch.arange(4), 0, steps=24, batch_size=8)
    alone = search(asked)(family, torch.tensor([1]), 0, steps=24, batch_size=8)
    assert float(alone.cost) == pytest.approx(float(together.cost[1]), abs=1e-3)


def test_what_was_not_reached_has_no_gap() -> None:
    family, n = Dense((1, 4, 4)), 3
    cost, direction = torch.tensor([1.0, 0.5, 0.9]), torch.zeros(n, 1, 4, 4)
    reached = torch.tensor([True, False, True])
    assert Found(family, torch.arange(n), cost, reached, direction).gap == 0
    reached = torch.tensor([True, True, False])
    found = Found(family, torch.tensor([7, 8, 9]), cost, reached, direction)
    assert (found.cheapest, found.gap) == (8, pytest.approx(0.4))
    assert found.best(2.0)[1] == pytest.approx(2 * math.exp(0.5))
