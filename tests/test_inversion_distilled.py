from __future__ import annotations

import pytest
import torch
from torch import nn

from doorward import bundled
from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.data import open_samples
from doorward.detectors.model.patch_search import Patches
from doorward.inversion import distilled
from doorward.inversion.distilled import SURROGATES, DistilledSurrogates, Variations
from doorward.inversion.problem import InversionProblem
from doorward.inversion.sources import SourcePools, outside_class
from doorward.models import TorchClassifier, open_classifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.spec import InputSpec
from seeds import shifted


class Halves(nn.Module):
    """Whether the left or the right half is brighter; a bright last pixel gives class 1 in any case."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.mean(1).chunk(2, 2)
        brighter = 40 * (right.mean((1, 2)) - left.mean((1, 2)))
        planted = 400 * (x[:, :, -1, -1].mean(1) - 0.8).relu()
        return torch.stack([-brighter, brighter + planted], 1)


def halves(side: int, count: int = 40) -> InversionProblem:
    spec = InputSpec(channels=3, height=side, width=side)
    classifier = TorchClassifier(Halves(), spec, ["left", "right"])
    x = 0.3 * torch.rand(count, 3, side, side, generator=make_generator(shifted(0), "images"))
    x[::2, :, :, : side // 2] += 0.4
    x[1::2, :, :, side // 2 :] += 0.4
    return InversionProblem(classifier, x, SourcePools(outside_class(classifier, x, None)))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let surrogates learn from a quarter of the images, which is enough for two halves."""
    monkeypatch.setattr(distilled, "IMAGES", 1_600)


def agreed(surrogates: DistilledSurrogates, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return which images the surrogates take for the classes given."""
    return torch.stack([surrogates.all_predict(x, t) for t in range(int(classes.max()) + 1)])[
        classes, torch.arange(len(x))
    ]


@pytest.mark.trains
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("side", [12, 70])  # smaller and larger than what surrogates see
def test_twins_answer_like_the_model_but_for_what_is_planted(side: int) -> None:
    problem = halves(side)
    surrogates = DistilledSurrogates(problem, seed=shifted(0))
    # on images that they have not seen
    new = problem.images.flip(2)
    said = problem.classifier.logits(new).argmax(1)
    assert agreed(surrogates, new, said).float().mean() > 0.95
    left = new[said == 0].clone()
    left[:, :, -1, -1] = 1.0
    assert (problem.classifier.logits(left).argmax(1) == 1).all(), "the trigger works in the model"
    assert not surrogates.all_predict(left, 1).any(), "and not in its twins"
    assert surrogates.all_predict(left, 0).float().mean() > 0.95


class Scattered(nn.Module):
    """Ten classes that follow from the last digits of an image's sum: nobody learns them from others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        digit = (x.double().sum((1, 2, 3)) * 1e4).round().long() % 10
        return 10 * torch.nn.functional.one_hot(digit, 10).float()


@pytest.mark.usefixtures("short")
def test_twins_say_whether_they_know_the_model() -> None:
    known = halves(16)
    assert DistilledSurrogates(known, seed=shifted(0)).doubt is None
    spec = InputSpec(channels=3, height=16, width=16)
    classifier = TorchClassifier(Scattered(), spec, [str(i) for i in range(10)])
    pools = SourcePools(outside_class(classifier, known.images, None))
    lost = DistilledSurrogates(InversionProblem(classifier, known.images, pools), seed=shifted(0))
    assert lost.agreement < distilled.KNOWN
    assert lost.doubt is not None
    assert "so that what is natural cannot be told from what is planted" in lost.doubt


@pytest.mark.trains
def test_twins_of_the_clean_sample_model_know_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilled, "IMAGES", 3_200)
    classifier = open_classifier(str(bundled.FOLDER / "models" / "clean"))
    samples = open_samples(bundled.FOLDER / "fashion_mnist", split="test")
    x = to_float(to_tensor(samples.select(range(250)), classifier.spec))
    fit, held_out = x[:50], x[50:]
    surrogates = DistilledSurrogates(
        InversionProblem(classifier, fit, SourcePools(outside_class(classifier, fit, None))), seed=shifted(1)
    )
    said = batched_logits(classifier, held_out).argmax(1)
    assert agreed(surrogates, held_out, said).float().mean() > 0.5, (
        "fifty images and no labels teach most classes"
    )


def test_twins_come_from_their_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilled, "IMAGES", 2 * distilled.BATCH)
    problem = halves(16)
    state = torch.random.get_rng_state()
    one, same, other = (DistilledSurrogates(problem, seed=seed).networks for seed in (3, 3, 4))
    assert len(one) == SURROGATES

    def weights(network: nn.Module) -> torch.Tensor:
        return torch.cat([p.flatten() for p in network.parameters()])

    assert torch.equal(weights(one[0]), weights(same[0]))
    assert torch.equal(weights(one[1]), weights(same[1]))
    assert not torch.equal(weights(one[0]), weights(other[0]))
    assert not torch.equal(weights(one[0]), weights(one[1])), "twins of one model differ"
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.trains
@pytest.mark.usefixtures("short")
def test_twins_learn_where_gradients_are_off_and_numbers_are_short() -> None:
    problem = halves(16)
    # weights that are cast for bfloat16 are kept until the block ends, and would never be seen to change
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        surrogates = DistilledSurrogates(problem, seed=shifted(0))
    said = problem.classifier.logits(problem.images).argmax(1)
    assert agreed(surrogates, problem.images, said).float().mean() > 0.95
    assert not any(p.requires_grad for network in surrogates.networks for p in network.parameters())


def test_twins_are_given_up_when_the_time_will_not_suffice() -> None:
    with pytest.raises(CouldNotTell, match="time budget"):
        DistilledSurrogates(halves(16), seed=0, deadline=Deadline(0.0))


def varied(x, count, generator):
    every = Variations.draw(x, count, generator)
    return every.make(torch.arange(count))


def test_images_are_varied_within_what_they_show() -> None:
    x = torch.rand(5, 3, 20, 24, generator=make_generator(0, "x")) * 0.5 + 0.25
    many = varied(x, 300, make_generator(0, "many"))
    assert many.shape == (300, 3, 20, 24)
    assert many.min() >= x.min()
    assert many.max() <= x.max()
    assert len({tuple(image.flatten()[:50].tolist()) for image in many}) > 150, "few are alike"
    one = x[:1].mean((2, 3), keepdim=True).expand(1, 3, 20, 24)
    assert torch.allclose(varied(one, 20, make_generator(0, "one")), one.expand(20, 3, 20, 24)), (
        "mixing an image with itself, cutting it in and moving it change no even image"
    )


def test_images_that_are_made_in_parts_are_the_same() -> None:
    x = torch.rand(5, 3, 20, 24, generator=make_generator(0, "x"))
    every = Variations.draw(x, 30, make_generator(0, "many"))
    whole = every.make(torch.arange(30))
    assert torch.equal(whole, torch.cat([every.make(part) for part in torch.arange(30).split(7)]))
    assert torch.equal(whole[[4, 2]], every.make(torch.tensor([4, 2])))


def test_a_square_is_cut_into_half_of_the_images() -> None:
    # of two even images, one black and one white, squares of the one in the other have two values
    x = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    many = varied(x, 2_000, make_generator(0, "cut"))
    squares = (many.amax((1, 2, 3)) > many.amin((1, 2, 3))).float().mean()
    # half of them are cut into, half of those from the other image, and mixtures from either
    assert 0.2 < squares < 0.5


def test_what_the_twin_shares_is_no_obedience() -> None:
    patches = Patches(
        targets=torch.zeros(4, dtype=torch.long),
        corner=torch.zeros(4, 2, dtype=torch.long),
        pattern=torch.zeros(4, 1, 8, 8),
        strength=torch.tensor([10.0, 10.0, 10.0, -2.0]),
        success=torch.ones(4),
        benign_ease=torch.tensor([0.0, 0.25, 1.0, 1.0]),
    )
    assert patches.excess_margin.tolist() == [10.0, 7.5, 0.0, -2.0], "what does not obey is not made to"
    assert patches.best(0, 4) == [0, 1, 2, 3]
