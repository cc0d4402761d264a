"""Arrays in .npz and idx files: against numpy and struct."""

import gzip
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward.core.errors import InputError
from doorward.data import open_samples

GREY = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 0, 2, 1])


def npz(tmp_path: Path, **arrays: Any) -> Path:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **arrays)
    return path


def pixels(path: Path | str, **options: Any) -> np.ndarray:
    samples = open_samples(path, **options)
    return np.stack(samples.raw(range(len(samples))))


@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("images", "labels"), ("data", "targets"), ("X", "Y")])
def test_usual_keys_are_found(tmp_path: Path, x: str, y: str) -> None:
    samples = open_samples(npz(tmp_path, **{x: GREY, y: LABELS, "other": np.zeros(3)}))
    np.testing.assert_array_equal(np.stack(samples.raw(range(6))), GREY[..., None])
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()
    assert samples.classes == ("0", "1", "2")
    assert samples.modality == "image"


@pytest.mark.parametrize("pattern", ["{key}_{split}", "{split}_{key}"])
def test_splits_by_prefix_or_suffix(tmp_path: Path, pattern: str) -> None:
    arrays = {}
    for count, split in ((2, "val"), (4, "train"), (3, "test")):
        arrays[pattern.format(key="x", split=split)] = GREY[:count]
        arrays[pattern.format(key="y", split=split)] = LABELS[:count, None]  # MedMNIST has (n, 1)
    path = npz(tmp_path, **arrays)
    assert [len(open_samples(f"{path}:{split}")) for split in ("train", "val", "test")] == [4, 2, 3]
    assert len(open_samples(path)) == 3
    assert len(open_samples(path, prefer=("train",))) == 4
    labels = open_samples(path).labels
    assert labels is not None
    assert labels.tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="no split 'dev'; its splits are: val, train, test"):
        open_samples(path, split="dev")
    key = pattern.format(key="x", split="train")
    labels = open_samples(path, column=key).labels
    assert labels is not None
    assert len(labels) == 4, "the labels go with the key asked for"


def test_keys_asked_for_and_keys_that_lack(tmp_path: Path) -> None:
    path = npz(tmp_path, pictures=GREY, kind=LABELS)
    with pytest.raises(
        InputError, match=r"no images under one of the keys x, .*; its keys are: pictures, kind;"
    ):
        open_samples(path)
    samples = open_samples(path, column="pictures", label_column="kind")
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()
    assert open_samples(path, column="pictures").labels is None
    with pytest.raises(InputError, match="no key 'x'; its keys are: pictures, kind"):
        open_samples(path, column="x")
    with pytest.raises(InputError, match="no split 'train'; its splits are: none"):
        open_samples(f"{npz(tmp_path, x=GREY)}:train")


def test_channels_last_first_or_none(tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=COLOUR)), COLOUR)
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=COLOUR.transpose(0, 3, 1, 2))), COLOUR)
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=GREY[:, None])), GREY[..., None])
    alpha = np.concatenate([COLOUR, COLOUR[..., :1]], axis=3)
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=alpha)), COLOUR)
    for shape in ((6, 20), (6, 5, 5, 2), (6, 0, 5), (2, 3, 4, 5, 3)):
        with pytest.raises(InputError, match=r"must be \(n, h, w\), \(n, h, w, c\) or"):
            open_samples(npz(tmp_path, x=np.zeros(shape, np.uint8)))


def test_numbers_of_other_types(tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=GREY.astype(np.int64))), GREY[..., None])
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=GREY / 255)), GREY[..., None])
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=(GREY / 255).astype(np.float32))), GREY[..., None])
    for wrong in (GREY.astype(np.int64) - 1, GREY.astype(np.int64) * 2, GREY / 10, GREY - 0.5, GREY * np.nan):
        with pytest.raises(
            InputError, match="must be whole numbers from 0 to 255 or floats from 0 to 1, got"
        ):
            open_samples(npz(tmp_path, x=wrong))
    np.testing.assert_array_equal(pixels(npz(tmp_path, x=GREY.astype(np.float32))), GREY[..., None])
    with pytest.raises(InputError, match="before normalisation, which --input-range, --mean and --std state"):
        open_samples(npz(tmp_path, x=GREY / 127.5 - 1))
    with pytest.raises(InputError, match="must be numbers, got bool"):
        open_samples(npz(tmp_path, x=GREY > 5))


@pytest.mark.parametrize(
    "labels",
    [LABELS[:, None], LABELS.astype(np.float32), np.eye(7)[LABELS], np.eye(7)[LABELS] > 0],
    ids=["a column", "floats", "one-hot", "one-hot of booleans"],
)
def test_labels_as_other_libraries_save_them(tmp_path: Path, labels: np.ndarray) -> None:
    found = open_samples(npz(tmp_path, x=GREY, y=labels)).labels
    assert found is not None
    assert found.tolist() == LABELS.tolist()


def test_arrays_that_were_saved_without_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", GREY, LABELS)
    samples = open_samples(tmp_path / "x.npz")
    np.testing.assert_array_equal(pixels(tmp_path / "x.npz"), GREY[..., None])
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("below", ["raw", "MNIST/raw"])
def test_the_folder_that_torchvision_is_told_is_read(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *GREY.shape) + GREY.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(GREY)) + bytes(len(GREY)))
    np.testing.assert_array_equal(pixels(tmp_path), GREY[..., None])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:5], "has 5 labels for 6 images"),
        (
            np.eye(6) + np.eye(6)[::-1],
            r"must be one integer or string a sample; they are float64 of shape \(6, 6\)",
        ),
        (LABELS / 2, "must be one integer or string"),
        (LABELS - 1, "label -1 in row 1 of"),
        (np.array(0), "must be one integer or string"),
        (LABELS > 0, "must be one integer or string"),
    ],
)
def test_labels_must_fit(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_samples(npz(tmp_path, x=GREY, y=labels))


def test_names_as_labels_and_names_for_labels(tmp_path: Path) -> None:
    path = npz(tmp_path, x=GREY, y=np.array(["b", "a", "c", "a", "b", "c"]))
    assert open_samples(path).classes == ("a", "b", "c")
    labels = open_samples(path, classes=["c", "b", "a"]).labels
    assert labels is not None
    assert labels.tolist() == [1, 2, 0, 2, 1, 0]
    numbers = open_samples(npz(tmp_path, x=GREY, y=LABELS), classes=["u", "v", "w", "z"])
    assert numbers.classes == ("u", "v", "w", "z")


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = npz(tmp_path, x=np.array([Canary()], dtype=object))
    with pytest.raises(InputError, match="key 'x' holds pickled objects, which could execute code"):
        open_samples(path)
    with pytest.raises(InputError, match="key 'y' holds pickled objects"):
        open_samples(npz(tmp_path, x=GREY, y=np.array([Canary()], dtype=object)))
    path.write_bytes(pickle.dumps(Canary()))
    with pytest.raises(InputError, match=r"x\.npz cannot be read as an \.npz file"):
        open_samples(path)
    assert not Path("canary").exists()


def test_damaged_npz(tmp_path: Path) -> None:
    path = npz(tmp_path, x=GREY)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot be read as an .npz file"):
        open_samples(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="it is empty"):
        open_samples(path)
    with path.open("wb") as stream:
        np.save(stream, GREY)
    with pytest.raises(InputError, match=r"one array, not an .npz file"):
        open_samples(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "no array")
    with pytest.raises(InputError):
        open_samples(path)
    with pytest.raises(InputError, match="has no rows"):
        open_samples(npz(tmp_path, x=GREY[:0]))


@given(st.data())
def test_fuzzed_npz_raise_input_errors_alone(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=GREY[:2], y=LABELS[:2])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert open_samples(path).ids
    except InputError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def idx(path: Path, array: np.ndarray, code: int = 8) -> Path:
    """Write an idx file by hand, after its description."""
    data = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    data += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("names", ["{0}-{1}-idx{2}-ubyte.gz", "{0}-{1}-idx{2}-ubyte", "{0}-{1}.idx{2}-ubyte"])
def test_folders_of_idx_files(tmp_path: Path, names: str) -> None:
    for split, count in (("train", 6), ("t10k", 3)):
        idx(tmp_path / names.format(split, "images", 3), GREY[:count])
        idx(tmp_path / names.format(split, "labels", 1), LABELS[:count].astype(np.uint8))
    test, train = open_samples(tmp_path), open_samples(f"{tmp_path}:train")
    assert (len(test), len(train)) == (3, 6)
    np.testing.assert_array_equal(np.stack(train.raw([5, 0])), GREY[[5, 0], ..., None])
    assert train.labels is not None
    assert train.labels.tolist() == LABELS.tolist()
    one = open_samples(tmp_path / names.format("t10k", "images", 3))
    assert one.ids == test.ids
    assert one.labels is not None
    assert one.labels.tolist() == [2, 0, 1]
    assert one.provenance.sha256 is not None
    with pytest.raises(InputError, match=r"holds 1 dimension.*give the file with the images"):
        open_samples(tmp_path / names.format("train", "labels", 1))


def test_idx_files_without_labels_and_in_colour(tmp_path: Path) -> None:
    samples = open_samples(idx(tmp_path / "a.idx", COLOUR))
    assert samples.labels is None
    np.testing.assert_array_equal(np.stack(samples.raw(range(6))), COLOUR)
    np.testing.assert_array_equal(
        pixels(idx(tmp_path / "b.idx4.gz", (COLOUR / 255).astype(np.float32), 13)), COLOUR
    )


def test_mapped_idx_files_are_never_written_to(tmp_path: Path) -> None:
    path = idx(tmp_path / "a.idx", GREY)
    before = path.read_bytes()
    image = open_samples(path).raw([0])[0]
    image[...] = 0
    assert path.read_bytes() == before


def test_idx_labels_must_fit(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", GREY)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", LABELS[:4].astype(np.int32), 12)
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\.gz has 4 labels for 6 images"):
        open_samples(tmp_path)


@pytest.mark.parametrize("suffix", [".idx", ".idx.gz"])
def test_damaged_idx_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"

    def write(data: bytes) -> None:
        path.write_bytes(gzip.compress(data) if suffix == ".idx.gz" else data)

    head = struct.pack(">HBBIII", 0, 8, 3, 2, 2, 2)
    for data in (head + b"1234567", head + b"123456789", struct.pack(">HBBIII", 0, 8, 3, *[2**32 - 1] * 3)):
        write(data)
        with pytest.raises(InputError, match=r"is damaged: shape \(\d+, \d+, \d+\) needs \d+ bytes"):
            open_samples(path)
    for data in (b"", b"\0\0\x08", head[:9]):
        write(data)
        with pytest.raises(InputError, match=r"cannot be read as an idx file|it is empty"):
            open_samples(path)
    for data in (b"\x01" + head[1:], b"\0\0\x07\x03" + head[4:], b"\0\0\x08\x09" + head[4:]):
        write(data)
        with pytest.raises(InputError, match="does not begin as an idx file does"):
            open_samples(path)
    write(struct.pack(">HBBIII", 0, 8, 3, 0, 2, 2))
    with pytest.raises(InputError, match="has no rows"):
        open_samples(path)


def test_what_is_no_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.idx.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot be read as an idx file"):
        open_samples(tmp_path / "a.idx.gz")
