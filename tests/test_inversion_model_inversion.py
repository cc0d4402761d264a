"""Images made from a model alone: of every class, smooth, in range, with batch norm as a prior, in time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.inversion.model_inversion import BatchNormPrior, invert_classes, smooth_noise, total_variation
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from seeds import shifted

SIDE, CLASSES = 14, 5
SPEC = InputSpec(channels=1, height=SIDE, width=SIDE)
NAMES = [str(i) for i in range(CLASSES)]


class Bands(nn.Module):
    """Tells by which of five bands is brightest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 8 * torch.stack([band.mean((1, 2)) for band in x[:, 0].tensor_split(CLASSES, 1)], 1)


class Normed(nn.Module):
    """The same, of which an unused batch norm has learnt that images are dark."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bands = nn.BatchNorm2d(1), Bands()
        self.norm.running_mean.fill_(0.1)
        self.norm.running_var.fill_(0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bands(x) + 0 * self.norm(x).mean((1, 2, 3))[:, None]


def classifier(module: nn.Module) -> TorchClassifier:
    return TorchClassifier(module.eval(), SPEC, NAMES)


def test_every_class_gets_images_that_the_model_is_sure_of() -> None:
    made = invert_classes(
        classifier(Bands()), per_class=6, steps=80, generator=make_generator(shifted(0), "images")
    )
    assert made.images.shape == (6 * CLASSES, *SPEC.shape)
    assert made.labels.bincount().tolist() == [6] * CLASSES
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    seen = classifier(Bands()).logits(made.images)
    assert (seen.argmax(1) == made.labels).all()
    own = seen.softmax(1).gather(1, made.labels[:, None]).squeeze(1)
    torch.testing.assert_close(made.probability, own)
    assert made.confident == pytest.approx(float((own >= 0.9).float().mean()))
    assert made.confident > 0.8
    for label in range(CLASSES):
        bright = [b.mean() for b in made.images[made.labels == label, 0].tensor_split(CLASSES, 1)]
        assert int(torch.stack(bright).argmax()) == label, "an image shows what its class is about"


def test_images_are_no_noise_and_differ() -> None:
    generator = make_generator(shifted(0), "images")
    made = invert_classes(classifier(Bands()), per_class=4, steps=60, generator=generator)
    assert total_variation(made.images) < 0.5 * total_variation(torch.rand(20, *SPEC.shape))
    same = made.images[made.labels == 1]
    assert (same[0] - same[1]).abs().mean() > 0.02


def test_batch_norm_is_a_prior() -> None:
    asked = classifier(Normed())

    def brightness(statistics: float) -> float:
        made = invert_classes(
            asked, per_class=6, statistics=statistics, generator=make_generator(shifted(0), "images")
        )
        return float(made.images.mean())

    assert abs(brightness(1.0) - 0.1) < 0.5 * abs(brightness(0.0) - 0.1)


def test_the_distance_is_zero_where_statistics_are_those_learnt() -> None:
    module = Normed()
    prior = BatchNormPrior(classifier(module))
    x = torch.rand(64, *SPEC.shape, generator=make_generator(1))
    like_learnt = (x - x.mean()) / x.std(correction=0) * 0.02**0.5 + 0.1
    with prior.watch():
        module(like_learnt)
    assert float(prior.distance()) == pytest.approx(0, abs=1e-3)
    with prior.watch():
        module(like_learnt + 0.5)
    assert float(prior.distance()) == pytest.approx(0.25 / 0.02, rel=0.01)
    assert not module.norm._forward_pre_hooks, "nothing stays in the model"
    assert BatchNormPrior(classifier(Bands())).layers == []


def test_a_deadline_is_kept() -> None:
    with pytest.raises(CouldNotTell, match="time budget"):
        invert_classes(
            classifier(Bands()), per_class=2, generator=make_generator(0), deadline=Deadline(seconds=0)
        )


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 20, 12)])
def test_noise_fits_any_size(shape: tuple[int, int, int]) -> None:
    noise = smooth_noise(3, shape, make_generator(0))
    assert noise.shape == (3, *shape)
    assert 0 <= noise.min() <= noise.max() <= 1
