"""Feature squeezing, with every squeezer against SciPy and OpenCV, pixel by pixel."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples
from doorward.detectors.inputs._squeezers import (
    median_filter,
    non_local_means,
    parsed,
    reduce_bits,
    squeeze,
)
from doorward.detectors.inputs.base import fit_filters
from doorward.detectors.inputs.feature_squeezing import FeatureSqueezing
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier

SPEC = InputSpec(channels=1, height=8, width=8)


def images(*shape: int, seed: int = 0, smooth: bool = False) -> Tensor:
    x = np.random.default_rng(seed).integers(0, 256, shape).astype(float)
    if smooth:
        x = ndimage.gaussian_filter(x, (0, 0, 2, 2)) * 2 - 128 + x / 12
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))


# Squeezers


@pytest.mark.parametrize("bits", range(1, 8))
def test_bit_depth_is_as_published(bits: int) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    most = 2**bits - 1
    expected = np.rint(every.numpy() / 255 * most) / most
    assert reduce_bits(every, bits).numpy() == pytest.approx(expected, abs=1e-6)
    assert len(reduce_bits(every, bits).unique()) == 2**bits


@pytest.mark.parametrize("shape", [(3, 1, 9, 7), (2, 3, 8, 8), (1, 3, 1, 5), (1, 1, 2, 1)])
@pytest.mark.parametrize("size", [2, 3])
def test_medians_are_those_of_scipy(size: int, shape: tuple[int, ...]) -> None:
    x = images(*shape, seed=size)
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    assert (median_filter(x, size).numpy() == expected).all()


def mirrored(i: int, length: int) -> int:
    while not 0 <= i < length:
        i = -i if i < 0 else 2 * (length - 1) - i
    return i


def loops_of_non_local_means(x: np.ndarray, search: int, patch: int, strength: float) -> np.ndarray:
    """Compute non-local means of one image (c, h, w) by the definition, in floats."""
    channels, height, width = x.shape
    v = x.astype(float)
    out = np.zeros_like(v)
    reach, half = search // 2, patch // 2

    def patch_at(y: int, z: int) -> np.ndarray:
        rows = [mirrored(y + i, height) for i in range(-half, half + 1)]
        columns = [mirrored(z + j, width) for j in range(-half, half + 1)]
        return v[:, rows][:, :, columns]

    for y in range(height):
        for z in range(width):
            norm, total = 0.0, np.zeros(channels)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    other = patch_at(y + dy, z + dx)
                    distance = ((patch_at(y, z) - other) ** 2).sum() / patch**2
                    weight = math.exp(-distance / (strength**2 * channels))
                    norm += weight
                    total += weight * other[:, half, half]
            out[:, y, z] = total / norm
    return out


def test_non_local_means_are_as_defined() -> None:
    x = images(2, 1, 7, 6, seed=4, smooth=True)
    made = non_local_means(x, search=5, patch=3, strength=20)
    assert (made != x).float().mean() > 0.5
    for i in range(2):
        # the integers of the fast form round distances and drop weights below .001
        assert np.abs(made[i].numpy() - loops_of_non_local_means(x[i].numpy(), 5, 3, 20)).max() <= 2


@pytest.mark.parametrize(
    ("search", "patch", "strength", "digest"),
    [(13, 3, 4, "534fca3c24212c11"), (11, 3, 8, "427f3fc23be12fa8")],
)
def test_non_local_means_give_the_pixels_of_opencv_5(
    search: int, patch: int, strength: int, digest: str
) -> None:
    """The digests are of what `cv2.fastNlMeansDenoising(x, None, strength, patch, search)` gave."""
    y, z = np.mgrid[:16, :20]
    noise = np.random.default_rng(5).integers(0, 14, (1, 16, 20))
    x = torch.from_numpy(((y // 4 * 30 + z // 5 * 25)[None] + noise).astype(np.uint8))[None]
    made = non_local_means(x, search=search, patch=patch, strength=strength)
    assert (made != x).float().mean() > 0.7
    assert hashlib.sha256(made.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("search", "patch", "strength"), [(11, 3, 2), (11, 3, 4), (13, 3, 4), (13, 3, 30)])
def test_non_local_means_are_those_of_opencv(search: int, patch: int, strength: int) -> None:
    cv2 = pytest.importorskip("cv2")
    grey, colour = images(3, 1, 28, 28, seed=1, smooth=True), images(3, 3, 32, 32, seed=2, smooth=True)
    made = non_local_means(grey, search=search, patch=patch, strength=strength)
    for i in range(3):
        expected = cv2.fastNlMeansDenoising(grey[i, 0].numpy(), None, strength, patch, search)
        assert (made[i, 0].numpy() == expected).all()
    squeezed = squeeze(colour, f"nlm-{search}-{patch}-{strength}") * 255
    for i in range(3):
        picture = np.ascontiguousarray(colour[i].permute(1, 2, 0).numpy())
        expected = cv2.fastNlMeansDenoisingColored(picture, None, strength, strength, patch, search)
        difference = np.abs(squeezed[i].permute(1, 2, 0).numpy() - expected)
        assert difference.mean() < 1
        assert difference.max() <= 12


def test_a_batch_is_squeezed_image_by_image() -> None:
    x = images(3, 3, 8, 8)
    for name in ("bits-3", "median-2", "median-3", "nlm-5-3-4"):
        alone = torch.cat([squeeze(one[None], name) for one in x])
        assert torch.equal(squeeze(x, name), alone)


@pytest.mark.parametrize("name", ["bits-0", "bits-8", "median-4", "nlm-12-3-2", "nlm-13-3-0", "", "blur"])
def test_unknown_squeezers_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="there is no squeezer"):
        parsed(name)
    with pytest.raises(InputError, match=r"feature-squeezing: squeezers = .*there is no squeezer"):
        registry.build("detector", "feature-squeezing", {"squeezers": [name]})


# The filter


class Detail(nn.Module):
    """Tell bright images from dark ones, and be turned round by one lit pixel in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) - 0.5
        spike = x[:, 0, 4, 4] - x[:, 0, 3, 3]
        z = self.scale * bright * torch.where(spike > 0.6, -1.0, 1.0)
        return torch.stack([-z, z], dim=1)


def smooth(n: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    level = rng.uniform(20, 180, n)[:, None, None, None]
    return torch.from_numpy((level + rng.uniform(0, 40, (n, 1, 8, 8))).astype(np.uint8))


def spiked(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 4, 4] = 255
    return y


def test_the_score_is_the_largest_l1_distance_and_names_its_squeezer() -> None:
    model = TorchClassifier(Detail(), SPEC, ("dark", "bright"))
    x = torch.cat([smooth(6), spiked(smooth(6, 1) // 3)])
    own = model.logits(x / 255).detach()
    before = model.cost.forwards
    squeezing = FeatureSqueezing(squeezers=("bits-4", "median-3", "median-2"))
    seen = squeezing.score(model, x, own, state={})
    assert model.cost.forwards - before == 3 * len(x), "one forward for each squeezed copy"
    copies = [squeeze(x, name) for name in ("bits-4", "median-3", "median-2")]
    expected = torch.stack(
        [(model.logits(copy).softmax(1) - own.softmax(1)).abs().sum(1) for copy in copies], dim=1
    ).detach()
    assert seen.score == pytest.approx(expected.max(1).values.numpy(), abs=1e-5)
    for told, which in zip(seen.told, expected.argmax(1).tolist(), strict=True):
        assert told.startswith(("bits-4", "median-3", "median-2")[which])


def test_spikes_are_rejected_and_clean_images_rarely() -> None:
    model = TorchClassifier(Detail(), SPEC, ("dark", "bright"))
    bad = spiked(smooth(50, 3) // 3)
    for inputs, low, high in ((smooth(400, 2), 0.0, 0.1), (bad, 0.9, 1.0)):
        seen = FeatureSqueezing(squeezers=("median-2", "median-3"))(
            Subject(
                classifier=model,
                clean=InMemorySamples(smooth(400)[:, 0].numpy()),
                inputs=InMemorySamples(inputs[:, 0].numpy()),
            )
        )
        assert seen.reason is None
        assert seen.score is not None
        assert low <= seen.score <= high


def test_the_published_sets_go_by_the_channels() -> None:
    assert FeatureSqueezing().chosen(1) == ("bits-1", "median-2")
    assert FeatureSqueezing().chosen(3) == ("bits-5", "median-2", "nlm-13-3-2")


def test_no_images_have_no_scores() -> None:
    model = TorchClassifier(Detail(), SPEC, ("dark", "bright"))
    fit = fit_filters(
        model,
        smooth(100),
        [FeatureSqueezing()],
        rate=0.05,
        rule="quantile",
        generator=make_generator(0, "t"),
    )
    assert fit.score(model, smooth(0), torch.zeros(0, 2))[0].told == ()
