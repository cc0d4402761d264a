"""Folders of media files by class."""

import errno
import hashlib
import json
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
    assert samples.classes == ("cat", "dog", "empty")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]
    assert levels(samples) == [3, 2, 1]
    assert samples.raw([0])[0].shape == (2, 3, 1)
    same = InMemorySamples(np.stack(samples.raw(range(3))))
    assert samples.ids == same.ids


def test_a_class_without_images_keeps_its_number_and_is_told(tmp_path: Path) -> None:
    """Else all later classes would be taken for the ones before them."""
    for name in ("ant", "cat", "dog"):
        picture(tmp_path / name / "x.png", 1)
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / ".DS_Store").touch()
    (tmp_path / "bee" / "Thumbs.db").touch()
    (tmp_path / "cow" / "raw").mkdir(parents=True)
    (tmp_path / "cow" / "raw" / "1.heic").touch()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "x.xml").touch()
    (tmp_path / "val").mkdir()
    samples = open_samples(tmp_path)
    assert samples.classes == ("ant", "bee", "cat", "cow", "dog")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 2, 4]
    first, second = samples.provenance.notes
    assert "no images in the class folders 'bee', 'cow' (files of other kinds, first cow/1.heic)" in first
    assert "not taken for classes: 'annotations', 'val'" in second
    assert open_samples(tmp_path, classes=["dog", "cat", "ant"]).labels.tolist() == [2, 1, 0]  # type: ignore[union-attr]


def test_a_class_is_empty_only_if_it_is_in_every_split(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/b"):
        picture(tmp_path / name / "x.png", 1)
    (tmp_path / "test" / "a").mkdir()
    (tmp_path / "test" / "c").mkdir()
    (tmp_path / "val").mkdir()
    samples = open_samples(tmp_path)
    assert samples.classes == ("a", "b", "c")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1]
    (note,) = samples.provenance.notes
    assert "class folder 'c': " in note


def test_images_without_classes_have_none_whatever_lies_beside(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", 1)
    (tmp_path / "cat").mkdir()
    samples = open_samples(tmp_path)
    assert (samples.labels, samples.classes, samples.provenance.notes) == (None, (), ())


def test_linked_class_folders_are_followed_and_told(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / "elsewhere" / name / "x.png", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    picture(folder / "ant" / "x.png", 2)
    for name in ("cat", "dog"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    samples = open_samples(folder)
    assert samples.classes == ("ant", "cat", "dog")
    assert levels(samples) == [2, 1, 1]
    assert samples.provenance.sha256 is not None
    (note,) = samples.provenance.notes
    assert "2 folders were followed as symbolic links" in note
    only = tmp_path / "links"
    only.mkdir()
    (only / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    assert len(open_samples(only)) == 1


def test_links_that_lead_nowhere_or_in_circles_are_left_out_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    picture(folder / "cat" / "x.png", 1)
    picture(tmp_path / "other" / "dog" / "x.png", 1)
    (folder / "cat" / "up").symlink_to(tmp_path)
    (folder / "cat" / "self").symlink_to(folder)
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    (folder / "dog").symlink_to(tmp_path / "other" / "dog")
    (tmp_path / "other" / "dog" / "round").symlink_to(tmp_path / "other")
    os.mkfifo(folder / "cat" / "pipe.png")
    samples = open_samples(folder)
    assert len(samples) == 2
    assert samples.classes == ("cat", "dog")
    followed, dropped = samples.provenance.notes
    assert "1 folder was followed" in followed
    assert "5 entries were left out" in dropped


def table(folder: Path, rows: list[dict[str, object]], form: str = "csv") -> Path:
    names = list(rows[0])
    if form == "csv":
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path = folder / f"metadata.{form}"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("names", [("dog", "cat", "dog"), (2, 0, 2)])
def test_labels_of_a_table_beside_the_images_are_read_and_told(
    tmp_path: Path, form: str, names: tuple[object, ...]
) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    rows = [{"file_name": f"{i}.png", "label": name} for i, name in enumerate(names)]
    written = table(tmp_path, [*rows, {"file_name": "gone.png", "label": names[0]}], form)
    samples = open_samples(tmp_path)
    assert samples.labels is not None
    if isinstance(names[0], str):
        assert samples.classes == ("cat", "dog")
        assert samples.labels.tolist() == [1, 0, 1]
    else:
        assert samples.labels.tolist() == [2, 0, 2]
    notes = " | ".join(samples.provenance.notes)
    assert f"labels are read from metadata.{form}, column 'label'" in notes
    assert "names 1 files that are not there, first gone.png" in notes
    before = samples.provenance.sha256
    written.write_text(written.read_text() + "\n")
    assert open_samples(tmp_path).provenance.sha256 != before, "the table is part of the data"
    picture(tmp_path / "3.png", 3)
    with pytest.raises(InputError, match="1 of 4 images are not named in metadata"):
        open_samples(tmp_path)


def test_a_table_goes_before_the_names_of_folders(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("test", "a")):
        picture(tmp_path / split / name / "x.png", 1)
    table(
        tmp_path / "train",
        [
            {"file_name": f"{name}/x.png", "note": "n", "kind": kind}
            for name, kind in (("a", "z"), ("b", "y"))
        ],
    )
    table(tmp_path / "test", [{"file_name": "a/x.png", "note": "n", "kind": "z"}])
    plain = open_samples(tmp_path)
    assert plain.classes == ("a", "b")
    assert "--label-column takes one of its columns: note, kind" in plain.provenance.notes[0]
    named = open_samples(tmp_path, label_column="kind")
    assert named.classes == ("y", "z"), "over both splits"
    assert named.labels is not None
    assert named.labels.tolist() == [1]
    assert "labels are the table's, not the names of folders" in named.provenance.notes[-1]
    with pytest.raises(InputError, match="has no column 'colour'; its columns are: file_name, note, kind"):
        open_samples(tmp_path, label_column="colour")


@pytest.mark.parametrize("column", ["file_name", "image", "path"])
def test_a_labels_csv_says_what_images_in_one_folder_are(tmp_path: Path, column: str) -> None:
    for i in range(4):
        picture(tmp_path / "imgs" / f"{i}.png", i)
    rows = "".join(f"imgs/{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(4))
    (tmp_path / "labels.csv").write_text(f"{column},label\n{rows}")
    samples = open_samples(tmp_path)
    assert samples.classes == ("cat", "dog")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0, 1, 0]


def test_a_table_of_something_else_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png", 1)
    table(tmp_path, [{"name": "1.png", "label": "dog"}])
    samples = open_samples(tmp_path)
    assert samples.classes == ("cat",)
    assert "metadata.csv was not used: it has no column 'file_name'" in samples.provenance.notes[0]


def deep(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values], np.uint16)).save(path)


@pytest.mark.parametrize(
    ("largest", "depth"),
    [(255, 8), (1023, 10), (4095, 12), (4000, 12), (16383, 14), (65535, 16), (20000, 16)],
)
def test_the_depth_of_images_with_16_bits_is_read_from_all(tmp_path: Path, largest: int, depth: int) -> None:
    """Cameras use 10, 12 or 14 bits of 16; taken for 16, such images are nearly black."""
    deep(tmp_path / "1.png", [0, 100, 200])
    deep(tmp_path / "2.png", [0, largest // 2, largest])
    samples = open_samples(tmp_path)
    first, second = samples.raw([0])[0], samples.raw([1])[0]
    assert first.squeeze().tolist() == [0, 100 >> (depth - 8), 200 >> (depth - 8)]
    assert second.squeeze().tolist() == [0, largest // 2 >> (depth - 8), largest >> (depth - 8)]
    notes = samples.provenance.notes
    assert len(notes) == (depth < 16)
    assert all(
        f"no value above {largest:,}: they are taken for images of {depth} bits" in note for note in notes
    )


def test_nearly_black_images_are_told(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / f"{i:02}.png", 1)
    samples = open_samples(tmp_path)
    samples.raw(range(20))
    (note,) = samples.provenance.notes
    assert "nearly black, with no value above 15 of 255" in note
    picture(tmp_path / "20.png", 16)
    brighter = open_samples(tmp_path)
    brighter.raw(range(21))
    assert brighter.provenance.notes == ()
    np.savez(tmp_path / "x.npz", x=np.ones((20, 4, 4), np.uint8))
    assert "nearly black" in open_samples(tmp_path / "x.npz").provenance.notes[0]
    np.savez(tmp_path / "y.npz", x=np.full((20, 4, 4), 0.05))
    assert "nearly black" in open_samples(tmp_path / "y.npz").provenance.notes[0]
    np.savez(tmp_path / "z.npz", x=np.arange(320, dtype=np.uint8).reshape(20, 4, 4))
    assert open_samples(tmp_path / "z.npz").provenance.notes == ()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file's name counts by its bytes; a class's stands in reports, which hold text alone."""
    odd = os.fsdecode(b"caf\xe9")
    picture(tmp_path / "cat" / f"{odd}.png", 1)
    picture(tmp_path / "cat" / "x.png", 1)
    samples = open_samples(tmp_path)
    assert len(samples) == 2
    assert len(str(samples.provenance.sha256)) == 64
    picture(tmp_path / odd / "x.png", 1)
    with pytest.raises(InputError, match=r"caf\\xe9: the name is not UTF-8; rename it"):
        open_samples(tmp_path)
    with pytest.raises(InputError, match=r"caf\\xe9: the name is not UTF-8; rename it"):
        open_samples(tmp_path / odd)


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
