"""Folders of media files by class."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Waveform, open_samples
from doorward.data.decode import encode_audio


def picture(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 2), level).save(path)
    return path


def levels(samples: object) -> list[int]:
    return [int(image[0, 0, 0]) for image in samples.raw(range(len(samples)))]


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "1.png", 1)
    picture(tmp_path / "cat" / "deep" / "2.PNG", 2)
    picture(tmp_path / "cat" / "0.bmp", 3)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / ".hidden" / "4.png", 4)
    picture(tmp_path / "cat" / "._5.png", 5)
    samples = open_samples(tmp_path)
    assert samples.modality == "image"
    assert samples.classes == ("cat", "dog")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]
    assert levels(samples) == [3, 2, 1]
    assert samples.raw([0])[0].shape == (2, 3, 1)
    same = InMemorySamples(np.stack(samples.raw(range(3))))
    assert samples.ids == same.ids


def test_splits_lie_above_classes_which_have_the_same_numbers_in_all(tmp_path: Path) -> None:
    for i, name in enumerate(
        ["train/a/1.png", "train/b/2.png", "train/c/3.png", "test/a/4.png", "test/c/5.png"]
    ):
        picture(tmp_path / name, i)
    test = open_samples(tmp_path)
    assert (levels(test), test.classes) == ([3, 4], ("a", "b", "c"))
    assert test.labels is not None
    assert test.labels.tolist() == [0, 2]
    train = open_samples(tmp_path, prefer=("train", "test"))
    assert levels(train) == levels(open_samples(f"{tmp_path}:train")) == [0, 1, 2]
    with pytest.raises(InputError, match="no split 'val'; its splits are: test, train"):
        open_samples(tmp_path, split="val")


def test_splits_may_have_any_name_when_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "winter" / "a" / "1.png", 1)
    picture(tmp_path / "summer" / "a" / "2.png", 2)
    winter = open_samples(tmp_path, split="winter")
    assert (levels(winter), winter.classes) == ([1], ("a",))
    assert open_samples(tmp_path).classes == ("summer", "winter"), "else they are classes"


def test_class_numbers_follow_the_value_of_numeric_names(tmp_path: Path) -> None:
    for name in ("10", "9", "0"):
        picture(tmp_path / name / "x.png", int(name))
    samples = open_samples(tmp_path)
    assert samples.classes == ("0", "9", "10")
    assert samples.labels is not None
    assert [samples.classes[i] for i in samples.labels] == [str(level) for level in levels(samples)]


def test_classes_asked_for_are_matched_by_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / name / "x.png", 0)
    samples = open_samples(tmp_path, classes=["dog", "eel", "cat"])
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 0]
    with pytest.raises(InputError, match=r"class 'dog' of .* is not among the classes: cat"):
        open_samples(tmp_path, classes=["cat"])


def test_folders_with_numbers_for_names_are_positions_among_the_classes_asked_for(tmp_path: Path) -> None:
    for name in ("00", "02"):
        picture(tmp_path / name / "x.png", int(name))
    samples = open_samples(tmp_path, classes=["cat", "dog", "owl"])
    assert samples.classes == ("cat", "dog", "owl")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 2]
    with pytest.raises(InputError, match=r"label 2 in row 1 of .* is not a class number from 0 to 1"):
        open_samples(tmp_path, classes=["cat", "dog"])


def test_a_sub_folder_that_may_not_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "cat" / "x.png", 0)
    picture(tmp_path / "dog" / "x.png", 0)
    scandir = os.scandir

    def locked(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        open_samples(tmp_path)


def test_without_sub_folders_there_are_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    samples = open_samples(tmp_path)
    assert (samples.labels, samples.classes, levels(samples)) == (None, (), [0, 1, 2])
    picture(tmp_path / "cat" / "4.png", 4)
    with pytest.raises(InputError, match=r"3 of 4 files lie outside the class folders, first .*0\.png"):
        open_samples(tmp_path)


def test_recordings(tmp_path: Path) -> None:
    for name, level in (("no/1.wav", -0.25), ("yes/2.wav", 0.5)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encode_audio(Waveform(np.full(4, level, np.float32), 8000)))
    samples = open_samples(tmp_path)
    assert (samples.modality, samples.classes) == ("audio", ("no", "yes"))
    sound = samples.raw([1])[0]
    assert (sound.rate, sound.pcm.tolist()) == (8000, [0.5] * 4)
    picture(tmp_path / "yes" / "3.png", 0)
    with pytest.raises(InputError, match="mixes images and recordings"):
        open_samples(tmp_path)


def test_damaged_and_vanished_files_are_named(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a" / "1.png", 0), picture(tmp_path / "a" / "2.png", 0)
    samples = open_samples(tmp_path)
    first.write_bytes(b"junk")
    with pytest.raises(InputError) as caught:
        samples.raw([0, 1])
    assert str(caught.value).startswith(f"{first}, id {hashlib.sha256(b'junk').hexdigest()[:16]}: this image")
    second.unlink()
    with pytest.raises(InputError, match=r"2\.png: this image cannot be decoded"):
        samples.raw([1])


def test_sha256_covers_names_and_contents_of_the_split(tmp_path: Path) -> None:
    files = [picture(tmp_path / "train" / name / "x.png", i) for i, name in enumerate("ab")]
    picture(tmp_path / "test" / "a" / "x.png", 9)
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  train/{f.parent.name}/x.png\n" for f in files]
    provenance = open_samples(f"{tmp_path}:train").provenance
    assert provenance.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert (provenance.path, provenance.rows) == (f"{tmp_path}:train", 2)
