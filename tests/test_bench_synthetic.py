"""Generated data sets: repeatable, learnable, uneven; their drawing against SciPy."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.linear_model import RidgeClassifier

from doorward.bench import synthetic
from doorward.bench.synthetic import DIFFICULTIES, FAMILIES, names, open_synthetic
from doorward.core.errors import InputError
from seeds import shifted


def pixels(samples) -> np.ndarray:
    return np.stack(samples.raw(np.arange(len(samples))))


def sha256(
    name: str = "signs",
    split: str = "train",
    rows: int = 300,
    seed: int = 5,
    classes: int = 6,
    size: int = 32,
):
    return open_synthetic(
        name, split=split, rows=rows, seed=seed, classes=classes, size=size
    ).provenance.sha256


def test_names_are_families_and_difficulties() -> None:
    assert set(FAMILIES) == {"glyphs", "signs", "textures", "shapes", "objects"}
    assert len(names()) == len(FAMILIES) * len(DIFFICULTIES)
    assert {"glyphs", "glyphs-easy", "glyphs-hard"} <= set(names())


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_what_was_asked_for(family: str) -> None:
    kind = FAMILIES[family]
    samples = open_synthetic(family, split="train", rows=500, seed=1, classes=12, size=28)
    x = pixels(samples)
    assert x.shape == (500, 28, 28, kind.channels)
    assert x.dtype == np.uint8
    assert len(samples.classes) == len(set(samples.classes)) == 12
    assert set(samples.labels.tolist()) == set(range(12))
    spread = x.reshape(500, -1).std(1)
    assert np.median(spread) > 15, "the images show something"
    assert len(set(samples.ids)) == 500
    assert all("-" not in one for one in samples.ids), "no image comes twice"


def test_the_same_arguments_give_the_same_pixels(untouched) -> None:
    with untouched():
        first = sha256()
    assert sha256() == first
    others = [
        sha256(name="signs-hard"), sha256(split="test"), sha256(rows=301), sha256(seed=6), sha256(classes=7),
        sha256(size=28),
    ]  # fmt: skip
    assert len({first, *others}) == 7, "every argument counts"


def test_another_process_with_more_threads_draws_the_same() -> None:
    script = (
        "from doorward.bench.synthetic import FAMILIES, open_synthetic\n"
        "for name in FAMILIES:\n"
        "    samples = open_synthetic(name, split='test', rows=300, seed=2, classes=5, size=32)\n"
        "    print(name, samples.provenance.sha256)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    here = {name: sha256(name, split="test", rows=300, seed=2, classes=5) for name in FAMILIES}
    assert dict(line.split() for line in done.stdout.splitlines()) == here


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_test_share_classes_and_no_image(family: str) -> None:
    train, test = (
        open_synthetic(family, split=split, rows=400, seed=3, classes=8, size=28)
        for split in ("train", "test")
    )
    assert train.classes == test.classes
    assert np.bincount(train.labels).tolist() == np.bincount(test.labels).tolist()
    assert not set(train.ids) & set(test.ids)
    assert train.labels.tolist() != test.labels.tolist(), "in another order"


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_make_other_worlds(family: str) -> None:
    worlds = [
        open_synthetic(family, split="train", rows=10, seed=s, classes=10, size=28).classes for s in range(4)
    ]
    assert len(set(worlds)) == 4


@pytest.mark.trains
@pytest.mark.parametrize("family", FAMILIES)
def test_the_classes_can_be_learned_and_difficulty_tells(family: str) -> None:
    """A linear model is far above chance on fresh images, and worse where it says hard."""
    reached = []
    for name in (f"{family}-easy", f"{family}-hard"):
        train, test = (
            open_synthetic(name, split=split, rows=rows, seed=shifted(4), classes=5, size=28)
            for split, rows in (("train", 1000), ("test", 500))
        )
        # colours and their smoothed squares, so that textures have something linear too
        x, y = (np.concatenate([features(s), features(s) ** 2], axis=1) for s in (train, test))
        model = RidgeClassifier(alpha=300).fit(x, train.labels)
        reached.append(model.score(y, test.labels))
    assert reached[0] > 0.55
    assert reached[0] > reached[1] + 0.03


def features(samples) -> np.ndarray:
    x = pixels(samples) / 255
    small = x.reshape(len(x), 14, 2, 14, 2, -1).mean((2, 4)).reshape(len(x), -1)
    bumps = np.abs(np.diff(x, axis=1)).mean((1, 2)), np.abs(np.diff(x, axis=2)).mean((1, 2))
    return np.concatenate([small - 0.5, 10 * bumps[0], 10 * bumps[1]], axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_unequal(family: str) -> None:
    """Real classes are not exchangeable: sizes differ, and some classes are much nearer than others."""
    samples = open_synthetic(f"{family}-easy", split="train", rows=1500, seed=1, classes=12, size=28)
    counts = np.bincount(samples.labels)
    assert counts.max() / counts.min() > 1.3
    x = features(samples)
    means = np.stack([x[samples.labels == k].mean(0) for k in range(12)])
    between = np.linalg.norm(means[:, None] - means[None], axis=2)[np.triu_indices(12, 1)]
    assert between.min() < 0.5 * np.median(between)
    assert between.max() > 1.15 * np.median(between)


@given(st.integers(0, 1000), st.integers(2, 30), st.integers(30, 400))
def test_shares_add_up_and_leave_nobody_out(seed: int, classes: int, rows: int) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(classes))
    labels = synthetic._shares(weights, rows)
    counts = np.bincount(labels, minlength=classes)
    assert len(labels) == rows
    assert counts.min() >= 1
    np.testing.assert_allclose(counts, 1 + weights * (rows - classes), atol=1)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_picks_come_in_runs_and_never_twice(seed: int, count: int) -> None:
    groups = ["abcdefgh", "ABCDEFGH", "12345678"]
    picked = synthetic._pick(np.random.default_rng(seed), groups, count)
    assert len(picked) == len(set(picked)) == count
    assert picked == synthetic._pick(np.random.default_rng(seed), groups, count)


def test_every_glyph_has_fonts_and_a_shape_of_its_own() -> None:
    glyphs = "".join(synthetic.Glyphs.GROUPS)
    assert len(glyphs) == len(set(glyphs)) >= synthetic.Glyphs.limit
    shapes = [synthetic._text(c, "DejaVuSans") > 0 for c in glyphs]
    for c, shape in zip(glyphs, shapes, strict=True):
        assert shape.sum() > 100, f"{c!r} is drawn"
        assert sum(c in synthetic._characters(font) for font in synthetic._FONTS) >= 3
    flat = np.stack([shape.ravel() for shape in shapes]).astype(float)
    overlap = flat @ flat.T / np.sqrt(np.outer(flat.sum(1), flat.sum(1)))
    np.fill_diagonal(overlap, 0)
    assert overlap.max() < 0.985, "no two are drawn alike"


def test_pictograms_exist_in_the_fonts() -> None:
    for text in synthetic.Signs.PICTOGRAMS:
        for font in synthetic._PLAIN_FONTS:
            assert set(text) <= synthetic._characters(font), (text, font)


def test_distances_are_signed_and_in_half_sides() -> None:
    canvas = synthetic._canvas()
    canvas.paste(255, (16, 0, 48, 64))  # a band of half the width
    distance = synthetic._distance(canvas)
    # pixels count from their centres to the nearest pixel beyond the edge
    np.testing.assert_allclose(distance[20, 14:18], np.array([-2, -1, 1, 2]) / 32)
    assert distance.max() == pytest.approx(0.5)


def test_looking_straight_gives_the_drawing_and_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(3, 64, 64)).astype(np.float32)
    straight = synthetic._places(rng, 2, 64, scale=(1, 1), turn=0, shift=0, warp=0)
    np.testing.assert_allclose(synthetic._look(bank, np.array([2, 0]), straight), bank[[2, 0]], atol=2e-2)
    at = rng.uniform(-0.9, 0.9, (2, 2, 28, 28)).astype(np.float32)
    found = synthetic._look(bank, np.array([1, 2]), at)
    for i, which in enumerate((1, 2)):
        x, y = (at[:, i] + 1) * 32 - 0.5
        expected = ndimage.map_coordinates(bank[which], [y, x], order=1)
        np.testing.assert_allclose(found[i], expected, atol=1e-4)


def test_what_lies_outside_of_a_drawing_is_farther_away() -> None:
    bank = np.full((1, 64, 64), -0.1, dtype=np.float32)
    at = np.array([[[[1.5]]], [[[-1.25]]]], dtype=np.float32)
    assert synthetic._look(bank, np.array([0]), at).item() == pytest.approx(-0.1 - 0.5 - 0.25)


def test_blur_agrees_with_scipy_away_from_the_border() -> None:
    x = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
    sigma = np.array([0.8, 1.5], dtype=np.float32)
    found = synthetic._blur(x, sigma[:, None, None])
    for i in range(2):
        expected = ndimage.gaussian_filter(x[i].astype(float), sigma[i], axes=(0, 1), truncate=8)
        np.testing.assert_allclose(found[i, 12:20, 12:20], expected[12:20, 12:20], atol=2e-3)
    flat = np.full((1, 20, 20, 1), 0.7, dtype=np.float32)
    np.testing.assert_allclose(synthetic._blur(flat, sigma[:1, None, None]), flat, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "glyph"}, "no generated data set 'glyph'; there are: glyphs, "),
        ({"name": "glyphs-normal"}, "no generated data set"),
        ({"name": "textures", "classes": 31}, "textures has 2 to 30 classes"),
        ({"classes": 1}, "got 1 classes"),
        ({"rows": 5}, "at least as many rows"),
        ({"size": 8}, "8 pixels"),
    ],
)
def test_what_cannot_be_made_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sha256(**changes)
