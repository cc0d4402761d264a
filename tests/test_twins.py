from __future__ import annotations

import pytest
import torch
from torch import nn

from doorward import reference
from doorward.data import open_samples
from doorward.detectors.model._twin import Twin, varied
from doorward.detectors.model._with_images import Asked
from doorward.detectors.model.patch_search import Patches
from doorward.errors import CouldNotTell
from doorward.inversion import SourcePools, batched_logits, outside_class
from doorward.methods import Deadline, make_generator
from doorward.modalities.image import to_float, to_tensor
from doorward.models import TorchClassifier, open_classifier
from doorward.models.spec import InputSpec


class Halves(nn.Module):
    """Tell whether the left or the right half is brighter; a bright last pixel gives class 1 in any case."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.mean(1).chunk(2, 2)
        brighter = 40 * (right.mean((1, 2)) - left.mean((1, 2)))
        planted = 400 * (x[:, :, -1, -1].mean(1) - 0.8).relu()
        return torch.stack([-brighter, brighter + planted], 1)


def halves(side: int, count: int = 40) -> Asked:
    spec = InputSpec(channels=3, height=side, width=side)
    classifier = TorchClassifier(Halves(), spec, ["left", "right"])
    x = 0.3 * torch.rand(count, 3, side, side, generator=make_generator(0, "images"))
    x[::2, :, :, : side // 2] += 0.4
    x[1::2, :, :, side // 2 :] += 0.4
    return Asked(classifier, x, SourcePools(outside_class(classifier, x, None)))


@pytest.mark.parametrize("side", [12, 28, 70])
def test_a_twin_answers_like_the_model_but_for_what_is_planted(side: int) -> None:
    asked = halves(side)
    twin = Twin(asked, seed=0)
    # on images that it has not seen
    new = asked.images.flip(2)
    said = asked.classifier.logits(new).argmax(1)
    assert (twin.logits(new).argmax(1) == said).float().mean() > 0.95
    left = new[said == 0].clone()
    left[:, :, -1, -1] = 1.0
    assert (asked.classifier.logits(left).argmax(1) == 1).all(), "the trigger works in the model"
    assert (twin.logits(left).argmax(1) == 0).all(), "and not in its twin"


def test_a_twin_of_the_clean_sample_model_knows_what_it_knows() -> None:
    classifier = open_classifier(str(reference.FOLDER / "models" / "clean"))
    samples = open_samples(reference.FOLDER / "fashion_mnist", split="test")
    x = to_float(to_tensor(samples.select(range(250)), classifier.spec))
    fit, held_out = x[:50], x[50:]
    twin = Twin(Asked(classifier, fit, SourcePools(outside_class(classifier, fit, None))), seed=1)
    agreed = twin.logits(held_out).argmax(1) == batched_logits(classifier, held_out).argmax(1)
    assert agreed.float().mean() > 0.6, "fifty images and no labels teach most of ten classes"


def test_a_twin_comes_from_its_seed_alone() -> None:
    asked = halves(16)
    state = torch.random.get_rng_state()
    one, same, other = (Twin(asked, seed=seed).logits(asked.images) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_a_twin_learns_inside_and_outside_of_a_quick_block() -> None:
    asked = halves(16)
    alone = Twin(asked, seed=0).logits(asked.images).argmax(1)
    with torch.no_grad():
        twin = Twin(asked, seed=0)
    assert torch.equal(twin.logits(asked.images).argmax(1), alone)
    assert not twin.logits(asked.images).requires_grad


def test_a_twin_gives_up_when_the_time_will_not_suffice() -> None:
    with pytest.raises(CouldNotTell, match="time budget"):
        Twin(halves(16), seed=0, deadline=Deadline(0.0))


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
        natural=torch.tensor([0.0, 0.25, 1.0, 1.0]),
    )
    assert patches.obedience.tolist() == [10.0, 7.5, 0.0, -2.0], "what does not obey is not made to"
    assert patches.best(0, 4) == [0, 1, 2, 3]
