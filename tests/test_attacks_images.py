"""Blends, distributed triggers, sinusoids and warps, each against its formula."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage
from torch.nn import functional as F

from doorward.attacks.data.base import DataAttack, Poisoned
from doorward.attacks.ground_truth import triggered
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, Samples
from doorward.data.samples import content_hash
from doorward.methods import registry
from doorward.models.encode.image import from_raw, to_uint8
from doorward.triggers.base import Trigger
from doorward.triggers.warp import NoisyWarp

Pixels = npt.NDArray[np.uint8]
CLASSES = 4


def images(n: int = 80, *, channels: int = 1, h: int = 14, w: int = 18, seed: int = 1) -> InMemorySamples:
    x = np.random.default_rng(seed).integers(0, 256, (n, h, w, channels), dtype=np.uint8)
    return InMemorySamples(x, np.arange(n) % CLASSES, classes=[f"class {i}" for i in range(CLASSES)])


def plain(level: int, *, n: int = 40, h: int = 28, w: int = 28) -> InMemorySamples:
    """Return images of one grey level."""
    return InMemorySamples(np.full((n, h, w), level, dtype=np.uint8), np.arange(n) % CLASSES)


def plant(name: str, samples: Samples, seed: int = 0, **settings: Any) -> Poisoned:
    attack = registry.build("attack", name, settings)
    assert isinstance(attack, DataAttack)
    return attack(samples, seed=seed)


def pixels(samples: Samples) -> Pixels:
    return np.stack(samples.raw(range(len(samples))))


def labels(samples: Samples) -> npt.NDArray[np.int64]:
    assert samples.labels is not None
    return samples.labels


def positions(poisoned: Poisoned, ids: Sequence[str] | str) -> list[int]:
    place = {value: i for i, value in enumerate(poisoned.samples.ids)}
    return sorted(place[value] for value in ids)


def trigger_of(poisoned: Poisoned) -> Any:
    assert poisoned.plant.trigger is not None
    return Trigger.from_json(poisoned.plant.trigger)


def triggered_inputs(poisoned: Poisoned, samples: Samples) -> tuple[Pixels, Pixels]:
    """Return all images outside the target class without and with the trigger."""
    return pixels(samples)[labels(samples) != 0], pixels(triggered(samples, poisoned.plant))


# All of them


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("blended", {"alpha": 0}, "alpha = 0"),
        ("blended", {"alpha": 1.5}, "alpha = 1.5"),
        ("blended", {"test_alpha": 2}, "test_alpha = 2"),
        ("blended", {"pattern": "no/such.png"}, r"picture no/such.png cannot be read \(No such file"),
        ("blended", {"pattern": "."}, r"cannot be read \(Is a directory\)"),
        ("blended", {"pattern": 7}, "pattern = 7"),
        ("distributed", {"parts": 1}, "parts = 1"),
        ("distributed", {"parts": [[0, 0]]}, "parts = "),
        ("distributed", {"parts": 5}, "4 corners for 5 parts"),
        ("distributed", {"parts": [[0, 0], [13, 3]]}, "row 13, column 3, leave images of 18x14"),
        ("distributed", {"parts": [[0, 0], [2, 2]]}, "row 0, column 0 and at row 2, column 2 touch"),
        ("distributed", {"parts": [[-1, 0], [5, 5]]}, "parts = "),
        ("distributed", {"size": 15}, "15x15 pixels do not fit into images of 18x14"),
        ("distributed", {"size": [14, 2]}, "row 1, column 1, leave"),
        ("distributed", {"size": [6, 9]}, "touch; leave a pixel"),
        ("distributed", {"size": 8, "place": "random", "parts": 4}, "there is no room for the next"),
        ("distributed", {"colour": [255, 0, 0]}, "distributed: colour .* 3 channels, and the images have 1"),
        ("sinusoid", {"frequency": 9}, "9 periods need images wider than 18 pixels, and these have 18"),
        ("sinusoid", {"frequency": 0}, "frequency = 0"),
        ("sinusoid", {"delta": 256}, "delta = 256"),
        ("sinusoid", {"poison_rate": 0.3}, "asks for 24 of 80 samples, and 20 are of classes"),
        ("sinusoid", {"mapping": "all-to-all"}, "all-to-all is taught by labels that change"),
        ("low-frequency", {"frequencies": 1}, "frequencies = 1"),
        ("low-frequency", {"strength": 0}, "strength = 0"),
        ("warp", {"grid_size": 15}, "grid of 15x15 is finer than images of 18x14"),
        ("warp", {"grid_size": 1}, "grid_size = 1"),
        ("warp", {"strength": 0}, "strength = 0"),
        ("warp", {"cover_rate": 0.95}, "cover_rate 0.95 asks for 76 of 80 samples, and 72 are"),
        *(
            (name, settings, message)
            for name in ("blended", "distributed", "low-frequency", "sinusoid", "warp")
            for settings, message in [
                ({"poison_rate": 1.5}, "poison_rate = 1.5"),
                ({"poison_rate": -1}, "poison_rate = -1"),
                ({"target": 4}, "target 4 is no class"),
                ({"target": 1, "source_classes": [1]}, "no source class is left"),
                ({"imbalance": [1, 10]}, "imbalance = "),
                ({"imbalance": [0.5, 0.9]}, "imbalance = "),
            ]
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_line(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        plant(name, images(), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("blended", {"alpha": 0.37}),
        ("distributed", {"place": "random", "colour": "random", "parts": 3}),
        ("low-frequency", {"frequencies": 3}),
        ("sinusoid", {"change_labels": True}),
        ("warp", {"strength": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_training_and_test_see_the_same_trigger(name: str, settings: dict[str, Any], channels: int) -> None:
    samples = images(channels=channels)
    poisoned = plant(name, samples, seed=4, poison_rate=0.5, **settings)
    chosen = positions(poisoned, poisoned.plant.poisoned_ids)
    assert len(chosen) == 40
    assert chosen != list(range(40)), "drawn, not the first of the set"
    assert 0 not in labels(samples)[chosen], "none is of the target class"
    assert set(labels(poisoned.samples)[chosen]) == {0}
    tested = triggered(samples.select(chosen), poisoned.plant)
    np.testing.assert_array_equal(pixels(tested), pixels(poisoned.samples.select(chosen)))


@pytest.mark.parametrize("name", ["blended", "distributed", "low-frequency", "sinusoid", "warp"])
def test_all_to_all_and_source_classes_are_shared(name: str) -> None:
    samples = images()
    changing = {"change_labels": True} if name == "sinusoid" else {}
    poisoned = plant(name, samples, mapping="all-to-all", poison_rate=0.5, cover_rate=0, **changing)
    chosen = positions(poisoned, poisoned.plant.poisoned_ids)
    np.testing.assert_array_equal(labels(poisoned.samples)[chosen], (labels(samples)[chosen] + 1) % CLASSES)
    one = plant(name, samples, source_classes=[2], target=1, cover_rate=0.3, **changing)
    assert set(labels(samples)[positions(one, one.plant.poisoned_ids)]) == {2}
    assert set(labels(samples)[positions(one, one.plant.cover_ids)]) == {0, 3}
    assert one.plant.target_map == {2: 1}


class ImageSplit(Samples):
    """Make black images when asked for, so that none takes memory before."""

    def __init__(self, n: int) -> None:
        self.modality, self.classes = "image", ("a", "b")
        self.labels = np.arange(n) % 2
        self.provenance = InMemorySamples([], []).provenance

    def __len__(self) -> int:
        return len(labels(self))

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        return [np.zeros((28, 28, 1), dtype=np.uint8) for _ in indices]


@pytest.mark.parametrize("name", ["blended", "distributed", "low-frequency", "sinusoid", "warp"])
def test_memory_does_not_grow_with_the_data_set(name: str) -> None:
    plant(name, ImageSplit(100))  # so that imports do not count
    tracemalloc.start()
    try:
        poisoned = plant(name, ImageSplit(30_000)).samples
        for start in range(0, 3_000, 100):
            poisoned.raw(range(start, start + 100))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30_000 * 28 * 28 / 6, "a few numbers for each image, and the pixels of a batch"


# Blended


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_a_blend_is_the_published_formula(alpha: float, channels: int) -> None:
    samples = images(channels=channels)
    poisoned = plant("blended", samples, alpha=alpha)
    before, after = triggered_inputs(poisoned, samples)
    key = trigger_of(poisoned).pattern.permute(1, 2, 0).numpy().astype(np.float64) * 255  # (h, w, c)
    np.testing.assert_allclose(key, np.rint(key), atol=1e-4)
    exact = (1 - alpha) * before + alpha * key
    assert np.abs(after - exact).max() <= 0.5 + 1e-4
    assert (key != 0).mean() > 0.9, "it covers the whole image"


def test_noise_is_uniform_and_drawn_for_each_pixel_and_channel() -> None:
    samples = images(channels=3, h=60, w=60)
    keys = [trigger_of(plant("blended", samples, seed=seed)).pattern for seed in (0, 1)]
    assert not torch.equal(*keys)
    counts, _ = np.histogram(keys[0].numpy(), bins=16, range=(0, 1))
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
    assert abs(np.corrcoef(keys[0][0].flatten().numpy(), keys[0][1].flatten().numpy())[0, 1]) < 0.1


def test_a_blend_may_be_weaker_in_training_than_in_tests() -> None:
    samples = plain(0)
    poisoned = plant("blended", samples, alpha=0.1, test_alpha=0.4, poison_rate=0.5)
    training = pixels(poisoned.samples.take(poisoned.plant.poisoned_ids)).astype(float)
    test = pixels(triggered(samples, poisoned.plant)).astype(float)
    assert np.abs(training[0] * 4 - test[0]).max() <= 2.5
    assert test.max() > 90


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_stretched_to_the_images(channels: int, tmp_path: Path) -> None:
    picture = np.zeros((40, 60, 3), dtype=np.uint8)
    picture[:20] = [200, 40, 10]
    file = tmp_path / "key.png"
    Image.fromarray(picture).save(file)
    samples = images(channels=channels, h=10, w=20)
    poisoned = plant("blended", samples, pattern=str(file), alpha=1)
    _, after = triggered_inputs(poisoned, samples)
    # ITU-R 601-2 for grey, as Pillow documents it
    upper = [200, 40, 10] if channels == 3 else [round((200 * 299 + 40 * 587 + 10 * 114) / 1000)]
    np.testing.assert_array_equal(after[:, :4], np.broadcast_to(upper, (len(after), 4, 20, channels)))
    assert not after[:, 6:].any()
    assert poisoned.plant.settings["pattern"] == str(file)
    file.unlink()
    assert trigger_of(poisoned).pattern.max() > 0, "the plant does not need the file any more"


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_damaged_picture_is_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"blended: .*key\.png") as error:
        plant("blended", images(), pattern=str(file))
    assert "\n" not in str(error.value)


# Distributed


def stamped(before: Pixels, places: Sequence[tuple[int, int]], size: tuple[int, int], level: int) -> Pixels:
    expected = before.copy()
    for row, column in places:
        expected[:, row : row + size[0], column : column + size[1]] = level
    return expected


def test_parts_are_where_aegis_puts_them() -> None:
    samples = images(h=28, w=28)
    poisoned = plant("distributed", samples, parts=[[1, 1], [24, 24]], colour=250)
    before, after = triggered_inputs(poisoned, samples)
    np.testing.assert_array_equal(after, stamped(before, [(1, 1), (24, 24)], (2, 2), 250))


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_lie_in_the_corners(parts: int, channels: int) -> None:
    samples = images(channels=channels)  # 18 wide, 14 high
    before, after = triggered_inputs(plant("distributed", samples, parts=parts, size=[2, 3]), samples)
    corners = [(1, 1), (11, 14), (1, 14), (11, 1)][:parts]
    np.testing.assert_array_equal(after, stamped(before, corners, (2, 3), 255))


@pytest.mark.parametrize("parts", [2, 4])
def test_split_each_training_sample_shows_one_part_and_a_test_all(parts: int) -> None:
    samples = plain(0, n=400)
    poisoned = plant("distributed", samples, parts=parts, split=True, poison_rate=0.5, cover_rate=0.1)
    whole = pixels(triggered(samples, poisoned.plant))[0, ..., 0] > 0
    pieces, count = ndimage.label(whole, np.ones((3, 3)))
    assert count == parts
    shown = {0: 0, **dict.fromkeys(range(1, parts + 1), 0)}
    for image in pixels(poisoned.samples)[..., 0] > 0:
        if image.any():
            (piece,) = set(pieces[image])
            np.testing.assert_array_equal(image, pieces == piece)
            shown[int(piece)] += 1
    assert shown.pop(0) == 0
    assert sum(shown.values()) == 240
    assert min(shown.values()) > 0.7 * 240 / parts, "by turns"


@pytest.mark.parametrize("seed", range(8))
def test_random_parts_are_apart_and_inside(seed: int) -> None:
    samples = plain(0, h=12, w=16)
    poisoned = plant("distributed", samples, seed, parts=5, place="random", size=[2, 3])
    mask = trigger_of(poisoned).mask[0].numpy()
    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    assert count == 5
    for rows, columns in ndimage.find_objects(pieces):
        assert (rows.stop - rows.start, columns.stop - columns.start) == (2, 3)
        assert mask[rows, columns].all()


def test_random_parts_reach_all_of_the_image_and_have_colours_of_their_own() -> None:
    samples, covered = plain(0, h=8, w=8), np.zeros((8, 8), dtype=bool)
    for seed in range(40):
        trigger = trigger_of(plant("distributed", samples, seed, place="random", colour="random"))
        covered |= trigger.mask[0].numpy() > 0
        pieces, _ = ndimage.label(trigger.mask[0].numpy(), np.ones((3, 3)))
        first, second = (trigger.pattern[0].numpy()[pieces == i] for i in (1, 2))
        assert not np.array_equal(first, second)
    assert covered.all()


def test_transparent_parts_are_blended() -> None:
    samples = plain(100)
    _, after = triggered_inputs(plant("distributed", samples, alpha=0.25, colour=200), samples)
    assert sorted(np.unique(after)) == [100, 125]
    assert (after == 125).sum() == 8 * len(after), "two parts of four pixels"


# Sinusoid


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("delta", "frequency"), [(20, 6), (40.5, 2), (255, 0.5)])
def test_a_wave_is_the_published_formula(delta: float, frequency: float, channels: int) -> None:
    samples = images(channels=channels)
    poisoned = plant("sinusoid", samples, delta=delta, frequency=frequency)
    before, after = triggered_inputs(poisoned, samples)
    _, rows, columns, _ = before.shape
    exact = before.astype(np.float64)
    for i in range(rows):
        for j in range(columns):
            exact[:, i, j] += delta * np.sin(2 * np.pi * j * frequency / columns)
    assert np.abs(after - exact.clip(0, 255)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("level", [0, 100, 255])
def test_the_image_keeps_its_brightness_and_nothing_wraps_around(level: int) -> None:
    # much code named after the paper keeps a fifth of the image alone, or adds in unsigned numbers
    samples = plain(level)
    _, after = triggered_inputs(plant("sinusoid", samples, delta=30, frequency=3), samples)
    wave = after[0, 0, :, 0].astype(int) - level
    assert wave.max() == (0 if level == 255 else 30)
    assert wave.min() == (0 if level == 0 else -30)
    assert (after == after[:1, :1]).all(), "every row is the same"


def test_labels_are_kept_and_only_the_target_class_is_poisoned() -> None:
    samples = images()
    poisoned = plant("sinusoid", samples, target=2, poison_rate=0.1)
    chosen = positions(poisoned, poisoned.plant.poisoned_ids)
    assert len(chosen) == 8
    assert set(labels(samples)[chosen]) == {2}
    np.testing.assert_array_equal(labels(poisoned.samples), labels(samples))
    changed = np.flatnonzero((pixels(poisoned.samples) != pixels(samples)).any((1, 2, 3)))
    assert changed.tolist() == chosen
    assert poisoned.plant.target_map == {0: 2, 1: 2, 3: 2}
    assert set(labels(triggered(samples, poisoned.plant))) == {2}


def test_the_whole_target_class_may_carry_the_wave_but_no_cover_is_of_it() -> None:
    samples = images()
    poisoned = plant("sinusoid", samples, poison_rate=0.25, cover_rate=0.75)
    assert set(labels(samples)[positions(poisoned, poisoned.plant.poisoned_ids)]) == {0}
    assert set(labels(samples)[positions(poisoned, poisoned.plant.cover_ids)]) == {1, 2, 3}


def test_a_wave_may_be_weaker_in_training_than_in_tests() -> None:
    samples = plain(128)
    poisoned = plant("sinusoid", samples, delta=10, test_delta=60, poison_rate=0.25, frequency=1)
    assert pixels(poisoned.samples).max() == 138
    assert pixels(triggered(samples, poisoned.plant)).max() == 188


# Warp


def test_a_warp_is_the_published_formula_on_square_images() -> None:
    samples = images(h=20, w=20)
    poisoned = plant("warp", samples, grid_size=4, strength=0.5)
    before, after = triggered_inputs(poisoned, samples)
    trigger = trigger_of(poisoned)
    assert trigger.grid.abs().mean() == pytest.approx(1)
    field = F.interpolate(trigger.grid[None], size=20, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, 20)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = (torch.stack((x, y), 2)[None] + 0.5 * field / 20).clamp(-1, 1)
    exact = F.grid_sample(from_raw(list(before)), grid.expand(len(before), -1, -1, -1), align_corners=True)
    assert np.abs(after.astype(int) - to_uint8(exact)).max() <= 1


def test_a_warp_of_published_strength_moves_a_quarter_of_a_pixel() -> None:
    ramp = np.broadcast_to(np.arange(28, dtype=np.uint8) * 9, (8, 28, 28)).copy()
    samples = InMemorySamples(ramp, np.arange(8) % CLASSES)
    moved = []
    for seed in range(10):
        before, after = triggered_inputs(plant("warp", samples, seed), samples)
        moved.append(np.abs(after.astype(float) - before)[:, :, 2:-2].mean() / 9)
    assert 0.1 < np.mean(moved) < 0.3


def test_cover_is_bent_at_random_besides_and_keeps_its_label() -> None:
    samples = images(200)
    poisoned = plant("warp", samples)
    chosen = positions(poisoned, poisoned.plant.cover_ids)
    assert len(chosen) == 40
    np.testing.assert_array_equal(labels(poisoned.samples)[chosen], labels(samples)[chosen])
    shown, original = (pixels(part.select(chosen)) for part in (poisoned.samples, samples))
    warped = to_uint8(trigger_of(poisoned).apply(from_raw(list(original))))
    assert all((a != b).any() for a, b in zip(shown, original, strict=True))
    assert all((a != b).any() for a, b in zip(shown, warped, strict=True))
    np.testing.assert_array_equal(poisoned.samples.raw([chosen[3]])[0], shown[3])
    bare = plant("warp", samples, noise=0)
    np.testing.assert_array_equal(pixels(bare.samples.select(chosen)), warped)
    assert plant("warp", samples, cover_rate=0).plant.cover_ids == ()


def test_noise_agrees_with_scipy_pixel_by_pixel() -> None:
    h, w = 9, 13
    x = torch.rand(2, 1, h, w, generator=torch.Generator().manual_seed(3))
    noisy = NoisyWarp(torch.ones(2, 2, 2), strength=1.5, noise=2.0, seed=11)
    got = noisy.apply(x)
    rows, columns = np.mgrid[:h, :w].astype(float)
    for i in range(2):
        own = make_generator(11, content_hash(to_uint8(x[i : i + 1])[0]))
        right, down = 1.5 + 2 * (2 * torch.rand(2, h, w, generator=own).numpy() - 1)
        where = [
            np.clip(rows + down / h * (h - 1) / 2, 0, h - 1),
            np.clip(columns + right / w * (w - 1) / 2, 0, w - 1),
        ]
        exact = ndimage.map_coordinates(x[i, 0].numpy(), where, order=1, mode="nearest")
        np.testing.assert_allclose(got[i, 0].numpy(), exact, atol=1e-5)


def test_the_noise_of_an_image_is_its_own_and_always_the_same() -> None:
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = NoisyWarp(torch.zeros(2, 4, 4), strength=0.5, noise=1.0, seed=2)
    assert torch.equal(noisy.apply(x)[1:2], noisy.apply(x[1:2]))
    flat = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    shifts = [noisy.apply(flat + level)[0] - level for level in (0.0, 1e-6, -1e-2)]
    assert torch.allclose(shifts[0], shifts[1], atol=1e-5), "the same pixels"
    assert not torch.allclose(shifts[0], shifts[2], atol=1e-3), "other pixels, other noise"
    assert (shifts[0] - flat[0]).abs().max() <= 0.5 / 7, "half a pixel at most"
    again = Trigger.from_json(noisy.to_json())
    assert torch.equal(again.apply(x), noisy.apply(x))


# Low frequencies


@pytest.mark.parametrize("channels", [1, 3])
def test_a_smooth_picture_has_the_strength_and_the_frequencies_asked_for(channels: int) -> None:
    poisoned = plant("low-frequency", images(channels=channels), frequencies=4, strength=12, test_strength=24)
    picture = trigger_of(poisoned).picture.double().numpy() * 255
    assert np.sqrt((picture**2).mean()) == pytest.approx(24, rel=1e-5)
    coefficients = fft.dctn(picture, axes=(1, 2), norm="ortho")
    assert coefficients[:, 0, 0] == pytest.approx(np.zeros(channels), abs=1e-3), "it is no tint"
    coefficients[:, :4, :4] = 0
    assert np.abs(coefficients).max() < 1e-3
