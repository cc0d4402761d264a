"""Samples in memory and views: ids, order, labels, provenance."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Provenance, Waveform, content_hash

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 3, 2, 1), dtype=np.uint8)


def test_ids_are_hashes_of_content_and_shape() -> None:
    image = IMAGES[0]
    expected = hashlib.sha256(b"image\0(3, 2, 1)\0" + bytes(image.ravel().tolist())).hexdigest()[:16]
    assert content_hash(image) == expected
    assert content_hash(image.transpose(1, 0, 2).copy().transpose(1, 0, 2)) == expected, (
        "not the memory's order"
    )
    assert content_hash(image.reshape(2, 3, 1)) != expected
    assert content_hash("a") == hashlib.sha256(b"text\0a").hexdigest()[:16]
    sound = Waveform(np.array([0.5, -1], np.float32), 8000)
    raw = b"audio\x008000\0(2,)\0" + bytes.fromhex("0000003f000080bf")
    assert content_hash(sound) == hashlib.sha256(raw).hexdigest()[:16]
    assert content_hash(Waveform(sound.pcm, 16000)) != content_hash(sound)


def test_repeated_content_is_numbered_in_order() -> None:
    samples = InMemorySamples(IMAGES[[0, 1, 0, 0]])
    first, second = content_hash(IMAGES[0]), content_hash(IMAGES[1])
    assert samples.ids == (first, second, f"{first}-1", f"{first}-2")


def test_views_keep_ids_labels_and_content() -> None:
    samples = InMemorySamples(IMAGES, np.arange(8) % 3, classes=["a", "b", "c"])
    view = samples.select([6, 1, 6])
    assert view.ids == tuple(samples.ids[i] for i in (6, 1, 6))
    assert view.labels is not None
    assert view.labels.tolist() == [0, 1, 0]
    assert (view.classes, view.modality, view.provenance) == (samples.classes, "image", samples.provenance)
    np.testing.assert_array_equal(np.stack(view.select([2, 1]).raw([0, 1])), IMAGES[[6, 1]])
    taken = samples.take([samples.ids[5], samples.ids[2]])
    np.testing.assert_array_equal(np.stack(taken.raw([0, 1])), IMAGES[[5, 2]])
    with pytest.raises(InputError, match="1 of 2 ids are not in <memory>, first 'nobody'"):
        samples.take([samples.ids[0], "nobody"])
    for outside in ([8], [-1]):
        with pytest.raises(IndexError, match=r"\[0, 8\)"):
            samples.select(outside)


def test_batches_cover_everything_once_in_order() -> None:
    samples = InMemorySamples(IMAGES, np.arange(8))
    batches = list(samples.batches(3))
    assert [len(batch.ids) for batch in batches] == [3, 3, 2]
    assert sum((batch.ids for batch in batches), ()) == samples.ids
    np.testing.assert_array_equal(np.concatenate([batch.x for batch in batches]), IMAGES)
    assert [label for batch in batches for label in batch.y] == list(range(8))
    assert next(InMemorySamples(IMAGES).batches(8)).y is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 45), st.integers(0, 9))
def test_a_draw_is_even_over_classes(labels: list[int], n: int, seed: int) -> None:
    samples = InMemorySamples([str(i) for i in range(len(labels))], labels, modality="text")
    drawn = samples.draw(n, np.random.default_rng(seed))
    assert len(drawn) == min(n, len(labels))
    assert len(set(drawn.ids)) == len(drawn), "without repetition"
    assert drawn.labels is not None
    for label in set(labels):
        short = (drawn.labels == label).sum()
        for other in set(labels):
            more = (drawn.labels == other).sum()
            assert more <= short + 1 or short == labels.count(label), (
                "a class gets less only when it is used up"
            )
    again = samples.draw(n, np.random.default_rng(seed))
    assert again.ids == drawn.ids


def test_a_draw_numbers_its_own_ids() -> None:
    samples = InMemorySamples(IMAGES[[0, 0, 0, 0]])
    name = content_hash(IMAGES[0])
    assert samples.draw(2, np.random.default_rng(0)).ids == (name, f"{name}-1")


def test_in_memory_samples_check_what_they_get() -> None:
    assert InMemorySamples(IMAGES[..., 0]).raw([0])[0].shape == (3, 2, 1)
    assert InMemorySamples(IMAGES, [0, 2] * 4).classes == ("0", "1", "2")
    with pytest.raises(InputError, match="uint8 in"):
        InMemorySamples(IMAGES / 255)
    with pytest.raises(InputError, match="8 samples need 8 labels"):
        InMemorySamples(IMAGES, [0])
    with pytest.raises(InputError, match="label 3 is not among the 2 classes"):
        InMemorySamples(IMAGES, [0, 3] * 4, classes=["a", "b"])
    with pytest.raises(InputError, match="label -1 is not among the 1 classes"):
        InMemorySamples(IMAGES, [0, -1] * 4)


def test_provenance_hashes_when_asked(tmp_path: Path) -> None:
    one, two = tmp_path / "b", tmp_path / "a"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (two, one)]
    assert Provenance("x", None, 3, files=lambda: {"b": one}).sha256 == hashes[1]
    both = Provenance("x", None, 3, files=lambda: {"b": one, "a": two})
    assert both.sha256 == hashlib.sha256(f"{hashes[0]}  a\n{hashes[1]}  b\n".encode()).hexdigest()
    one.unlink()
    assert both.sha256, "made once"
    with pytest.raises(InputError, match="b cannot be read any more"):
        assert Provenance("x", None, 3, files=lambda: {"b": one}).sha256
    assert Provenance("x", "known", 3).sha256 == "known"
    assert Provenance("x", None, 3).sha256 is None
