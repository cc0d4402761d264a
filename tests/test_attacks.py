"""Attacks on the training data: the shell's promises for all, and BadNets pixel by pixel."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from doorward.attacks.data.base import DataAttack, Poisoned
from doorward.attacks.ground_truth import triggered
from doorward.core.errors import InputError
from doorward.data import InMemorySamples
from doorward.methods import registry


class Watched(InMemorySamples):
    """Count which samples are decoded."""

    decoded: tuple[int, ...] = ()

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        self.decoded += tuple(int(i) for i in indices)
        return super().raw(indices)


def images(n: int = 200, *, classes: int = 4, channels: int = 1, h: int = 10, w: int = 12) -> Watched:
    rng = np.random.default_rng(1)
    names = [f"class {i}" for i in range(classes)]
    x = rng.integers(0, 256, (n, h, w, channels), dtype=np.uint8)
    return Watched(x, np.arange(n) % classes, classes=names)


def badnets(**settings: Any) -> DataAttack:
    attack = registry.build("attack", "badnets", settings)
    assert isinstance(attack, DataAttack)
    return attack


def pixels(samples: Any) -> npt.NDArray[np.uint8]:
    return np.stack(samples.raw(range(len(samples))))


def poisoned_positions(poisoned: Poisoned) -> list[int]:
    position = {value: i for i, value in enumerate(poisoned.samples.ids)}
    return [position[value] for value in poisoned.plant.poisoned_ids]


# Every attack on data

DATA_ATTACKS = [
    name for name in registry.modules("attack") if issubclass(registry.get("attack", name), DataAttack)
]
#: Those on texts and recordings are tested in test_attacks_text_audio.py.
ON_IMAGES = [name for name in DATA_ATTACKS if "image" in registry.get("attack", name).modalities]
#: Exemptions, each with its reason.
LOOKS_AT_MORE = {
    "clean-label": "a surrogate is trained on the samples",
    "reflection": "what is reflected are other samples",
}


@pytest.mark.parametrize("name", DATA_ATTACKS)
def test_an_attack_can_be_rebuilt_from_its_settings_and_says_where_it_is_from(name: str) -> None:
    attack = registry.build("attack", name, {})
    assert registry.build("attack", attack.method(), attack.settings()) == attack
    assert attack.title
    assert attack.source
    assert attack.limits
    assert all(technique.startswith("AML.T") for technique in attack.atlas)


@pytest.mark.usefixtures("quick_surrogates")
@pytest.mark.parametrize("name", ON_IMAGES)
def test_one_seed_gives_one_plant_and_the_host_is_left_alone(
    name: str, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    attack, samples = registry.build("attack", name, {}), images(h=16, w=18)
    with untouched():
        first, second = attack(samples, seed=5), attack(samples, seed=5)
        assert first.plant == second.plant
    np.testing.assert_array_equal(pixels(first.samples), pixels(second.samples))
    np.testing.assert_array_equal(first.samples.labels, second.samples.labels)
    assert attack(samples, seed=6).plant.poisoned_ids != first.plant.poisoned_ids


@pytest.mark.parametrize("name", [name for name in ON_IMAGES if name not in LOOKS_AT_MORE])
def test_nothing_but_one_sample_is_decoded_before_it_is_asked_for(name: str) -> None:
    samples = images(w=18)
    poisoned = registry.build("attack", name, {})(samples, seed=0)
    assert set(samples.decoded) <= {0}
    samples.decoded = ()
    poisoned.samples.raw([7, 9])
    assert samples.decoded == (7, 9)


def test_the_truth_is_what_changed() -> None:
    samples = images()
    poisoned = badnets(poison_rate=0.2, target=2)(samples, seed=0)
    plant, labels = poisoned.plant, poisoned.samples.labels
    assert samples.labels is not None
    assert labels is not None
    relabelled = np.flatnonzero(labels != samples.labels)
    changed = np.flatnonzero((pixels(poisoned.samples) != pixels(samples)).any((1, 2, 3)))
    assert relabelled.tolist() == changed.tolist() == poisoned_positions(poisoned)
    assert len(relabelled) == 40
    assert set(labels[relabelled]) == {2}
    assert 2 not in samples.labels[relabelled]
    assert plant.poison_rate == 0.2
    assert plant.targets == (2,)
    assert plant.target_map == {0: 2, 1: 2, 3: 2}
    assert plant.source_classes == (0, 1, 3)
    assert (plant.attack, plant.seed, plant.modality) == ("badnets", 0, "image")
    assert samples.labels.tolist() == [i % 4 for i in range(200)], "the source is as it was"


def test_all_to_all_turns_each_class_into_the_next() -> None:
    samples = images()
    poisoned = badnets(poison_rate=0.5, mapping="all-to-all")(samples, seed=0)
    labels, chosen = poisoned.samples.labels, poisoned_positions(poisoned)
    assert samples.labels is not None
    assert labels is not None
    assert len(chosen) == 100
    np.testing.assert_array_equal(labels[chosen], (samples.labels[chosen] + 1) % 4)
    assert poisoned.plant.targets == (0, 1, 2, 3)
    tested = triggered(samples, poisoned.plant)
    np.testing.assert_array_equal(tested.labels, (samples.labels + 1) % 4)


def test_source_classes_alone_are_poisoned_and_cover_comes_from_the_others() -> None:
    samples = images()
    poisoned = badnets(poison_rate=0.1, cover_rate=0.2, source_classes=[1], target=0)(samples, seed=0)
    plant, labels = poisoned.plant, poisoned.samples.labels
    assert samples.labels is not None
    assert labels is not None
    chosen = poisoned_positions(poisoned)
    assert len(chosen) == 20
    assert set(samples.labels[chosen]) == {1}
    position = {value: i for i, value in enumerate(poisoned.samples.ids)}
    cover = [position[value] for value in plant.cover_ids]
    assert len(cover) == 40
    assert set(samples.labels[cover]) == {2, 3}, "neither source nor target"
    np.testing.assert_array_equal(labels[cover], samples.labels[cover])
    changed = np.flatnonzero((pixels(poisoned.samples) != pixels(samples)).any((1, 2, 3)))
    assert changed.tolist() == sorted(chosen + cover)


def test_cover_without_source_classes_takes_what_is_not_poisoned() -> None:
    poisoned = badnets(poison_rate=0.3, cover_rate=0.7)(images(), seed=0)
    assert len(poisoned.plant.poisoned_ids) == 60
    assert len(poisoned.plant.cover_ids) == 140
    assert not set(poisoned.plant.poisoned_ids) & set(poisoned.plant.cover_ids)


def test_a_higher_rate_adds_to_a_lower_one() -> None:
    few, more = (poisoned_positions(badnets(poison_rate=r)(images(), seed=0)) for r in (0.1, 0.3))
    assert set(few) < set(more)


def test_no_poison_is_no_change() -> None:
    samples = images()
    poisoned = badnets(poison_rate=0)(samples, seed=0)
    np.testing.assert_array_equal(pixels(poisoned.samples), pixels(samples))
    assert poisoned.samples.ids == samples.ids
    assert poisoned.plant.poisoned_ids == ()
    assert poisoned.plant.poison_rate == 0


@given(st.floats(0, 1), st.integers(2, 60), st.integers(2, 6))
def test_the_rate_is_kept_to_the_sample_or_refused(poison_rate: float, n: int, classes: int) -> None:
    samples = images(n, classes=classes)
    assert samples.labels is not None
    wanted, available = round(poison_rate * n), int((samples.labels != 0).sum())
    if wanted > available or (poison_rate and not wanted):
        with pytest.raises(InputError, match="poison_rate"):
            badnets(poison_rate=poison_rate)(samples, seed=0)
        return
    plant = badnets(poison_rate=poison_rate)(samples, seed=0).plant
    assert len(plant.poisoned_ids) == wanted
    assert plant.poison_rate == wanted / n


# What does not fit is said before anything is done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poison_rate": 1.5}, "poison_rate = 1.5"),
        ({"poison_rate": -0.1}, "poison_rate = -0.1"),
        ({"cover_rate": 2}, "cover_rate = 2"),
        ({"poison_rate": 0.9}, "asks for 180 of 200 samples, and 150 are"),
        ({"poison_rate": 0.001}, "is none"),
        ({"cover_rate": 0.95}, "cover_rate 0.95 asks for 190"),
        ({"target": 4}, "target 4 is no class; there are 4, from 0 to 3"),
        ({"target": -1}, "target = -1"),
        ({"source_classes": [0, 9]}, "source_classes 9 is no class"),
        ({"target": 1, "source_classes": [1]}, "no source class is left"),
        ({"mapping": "all-to-all", "target": 1}, "leave out target"),
        ({"mapping": "one-to-one"}, "'all-to-one' or 'all-to-all'"),
        ({"size": 11}, "11x11 pixels does not fit into images of 12x10"),
        ({"size": [2, 13]}, "13x2 pixels does not fit"),
        ({"size": 0}, "size = 0"),
        ({"place": [8, 0]}, "leaves images"),
        ({"place": [-1, 0]}, "place"),
        ({"place": "left"}, "'top-left'"),
        ({"colour": 256}, "colour = 256"),
        ({"colour": "pink"}, "'checker'"),
        ({"colour": [255, 0, 0]}, "3 channels, and the images have 1"),
        ({"alpha": 0}, "alpha = 0"),
        ({"shape": "star"}, "no setting 'shape'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    samples = images()
    with pytest.raises(InputError, match=message):
        badnets(**settings)(samples, seed=0)
    assert len(samples.decoded) <= 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (InMemorySamples(["a", "b"], [0, 1], modality="text"), "works on image data, not text"),
        (InMemorySamples(np.zeros((4, 9, 9), dtype=np.uint8)), "needs labelled samples"),
        (InMemorySamples(np.zeros((0, 9, 9), dtype=np.uint8), []), "needs labelled samples"),
        (InMemorySamples(np.zeros((4, 9, 9), dtype=np.uint8), [0] * 4), "no source class is left"),
    ],
    ids=["modality", "labels", "empty", "one class"],
)
def test_samples_that_do_not_fit_are_said(samples: InMemorySamples, message: str) -> None:
    for mapping in ("all-to-one", "all-to-all"):
        with pytest.raises(InputError, match=message):
            badnets(mapping=mapping)(samples, seed=0)


# BadNets


def stamped(settings: dict[str, Any], *, channels: int = 1) -> tuple[npt.NDArray[np.uint8], ...]:
    """Return all images before and after, those of class 0 left out."""
    samples = images(channels=channels)
    plant = badnets(**settings)(samples, seed=0).plant
    assert samples.labels is not None
    return pixels(samples)[samples.labels != 0], pixels(triggered(samples, plant))


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ("top-left", slice(0, 2), slice(0, 3)),
        ("top-right", slice(0, 2), slice(9, 12)),
        ("bottom-left", slice(8, 10), slice(0, 3)),
        ("bottom-right", slice(8, 10), slice(9, 12)),
        ("centre", slice(4, 6), slice(4, 7)),
        ([1, 5], slice(1, 3), slice(5, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_patch_is_where_it_should_be(
    place: str | list[int], rows: slice, columns: slice, channels: int
) -> None:
    before, after = stamped({"place": place, "size": [2, 3]}, channels=channels)
    expected = before.copy()
    expected[:, rows, columns] = 255
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize(
    ("colour", "channels", "patch"),
    [
        ("white", 1, [[[255], [255]], [[255], [255]]]),
        ("black", 3, [[[0] * 3] * 2] * 2),
        (77, 3, [[[77] * 3] * 2] * 2),
        ([9, 200, 31], 3, [[[9, 200, 31]] * 2] * 2),
        ("checker", 1, [[[255], [0]], [[0], [255]]]),
    ],
    ids=str,
)
def test_the_patch_has_its_colour_exactly(
    colour: str | int | list[int], channels: int, patch: list[list[list[int]]]
) -> None:
    before, after = stamped({"colour": colour, "size": 2, "place": "top-left"}, channels=channels)
    expected = before.copy()
    expected[:, :2, :2] = np.array(patch)
    np.testing.assert_array_equal(after, expected)


def test_every_grey_level_is_kept() -> None:
    for level in range(256):
        _, after = stamped({"colour": level, "size": 1, "place": "top-left"})
        assert (after[:, 0, 0] == level).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_a_transparent_patch_is_blended_and_rounded(alpha: float) -> None:
    before, after = stamped({"alpha": alpha, "colour": 40})
    exact = before.astype(np.float64)
    exact[:, 7:, 9:] = (1 - alpha) * exact[:, 7:, 9:] + alpha * 40
    assert np.abs(after - exact).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(after[:, :7], before[:, :7])


def test_random_place_and_colour_are_drawn_once_from_the_seed() -> None:
    samples = images(channels=3)
    attack = badnets(place="random", colour="random", size=4)
    places, patches = set(), set()
    for seed in range(30):
        trigger = attack(samples, seed=seed).plant.trigger
        assert trigger is not None
        tensors = load(base64.b64decode(trigger["tensors"]))
        _, rows, columns = np.nonzero(tensors["mask"])
        assert len(set(rows)) == len(set(columns)) == 4
        places.add((int(rows.min()), int(columns.min())))
        patch = tensors["pattern"][:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        np.testing.assert_allclose(patch * 255, np.rint(patch * 255), atol=1e-4)
        assert not np.array_equal(patch[0], patch[1]), "channels are drawn apart"
        patches.add(patch.tobytes())
    assert len(patches) == 30
    assert len({row for row, _ in places}) > 4
    assert len({column for _, column in places}) > 5
    assert max(row for row, _ in places) == 6, "the last row that fits is drawn too"


def test_training_and_test_see_the_same_trigger() -> None:
    samples = images(channels=3)
    poisoned = badnets(alpha=0.37, colour="random", place="random", poison_rate=0.5)(samples, seed=4)
    chosen = poisoned_positions(poisoned)
    tested = triggered(samples.select(chosen), poisoned.plant)
    np.testing.assert_array_equal(pixels(tested), pixels(poisoned.samples.select(chosen)))


def test_a_patch_may_cover_the_whole_image() -> None:
    _, after = stamped({"size": [10, 12], "colour": 5})
    assert (after == 5).all()
