"""Cleaned sets are written in the form they came in; what cannot be read is left out on request."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples, Waveform, open_samples
from doorward.data.kept import write_kept
from doorward.data.parquet import write_parquet
from doorward.data.readable import without_unreadable

N = 12
LABELS = np.arange(N) % 3


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8)


def as_parquet(folder: Path) -> Path:
    write_parquet(InMemorySamples(pixels(), LABELS), folder / "data")
    return folder / "data"


def as_parquet_file(folder: Path) -> Path:
    return as_parquet(folder) / "train.parquet"


def as_npz(folder: Path) -> Path:
    x = pixels()
    np.savez(folder / "data.npz", x_train=x, y_train=LABELS, x_test=x[:5], y_test=LABELS[:5])
    return folder / "data.npz"


def as_idx(folder: Path, ending: str = "") -> Path:
    def write(name: str, array: np.ndarray) -> None:
        data = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        data += array.astype(np.uint8).tobytes()
        (folder / (name + ending)).write_bytes(gzip.compress(data) if ending else data)

    write("train-images-idx3-ubyte", pixels())
    write("train-labels-idx1-ubyte", LABELS)
    return folder


def as_packed_idx(folder: Path) -> Path:
    return as_idx(folder, ".gz")


def as_images(folder: Path) -> Path:
    for i, (image, label) in enumerate(zip(pixels(), LABELS, strict=True)):
        (folder / "data" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "data" / f"class {label}" / f"{i:02d}.png")
    return folder / "data"


def as_recordings(folder: Path) -> Path:
    sounds = [Waveform(np.full(100, i / N, dtype=np.float32), 8000) for i in range(N)]
    write_parquet(InMemorySamples(sounds, LABELS, modality="audio"), folder / "data")
    return folder / "data"


def as_csv(folder: Path) -> Path:
    rows = "".join(f'{i},"text, number {i}",{label}\n' for i, label in enumerate(LABELS))
    (folder / "data.csv").write_text("number,text,label\n" + rows, encoding="utf-8")
    return folder / "data.csv"


def as_lines(folder: Path) -> Path:
    rows = "".join(
        f'{{"text": "text {i}", "label": {label}, "more": [{i}]}}\n\n' for i, label in enumerate(LABELS)
    )
    (folder / "data.jsonl").write_text(rows, encoding="utf-8")
    return folder / "data.jsonl"


FORMS: list[Callable[[Path], Path]] = [
    as_parquet,
    as_parquet_file,
    as_npz,
    as_idx,
    as_packed_idx,
    as_images,
    as_recordings,
    as_csv,
    as_lines,
]


def opened(path: Path) -> Samples:
    text = path.suffix in (".csv", ".jsonl")
    return open_samples(path, prefer=("train",), column="text" if text else None)


@pytest.mark.parametrize("make", FORMS)
def test_what_is_kept_is_written_in_the_form_it_came_in(make: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    samples = opened(source)
    rows = np.array([0, 2, 3, 7, 11])
    out = tmp_path / "out"
    column = "text" if source.suffix in (".csv", ".jsonl") else None
    written = write_kept(samples, rows, source, out, column=column)
    assert out in (written, written.parent)
    again = opened(out / source.name if source.suffix in (".npz", ".csv", ".jsonl") else out)
    assert again.ids == tuple(samples.ids[i] for i in rows)
    assert again.labels is not None
    assert samples.labels is not None
    np.testing.assert_array_equal(again.labels, samples.labels[rows])
    names = {file.name for file in out.rglob("*") if file.is_file()}
    assert names <= {file.name for file in (tmp_path / "in").rglob("*")}, "files keep their names"


def test_other_columns_and_splits_stay(tmp_path: Path) -> None:
    source = as_csv(tmp_path)
    write_kept(opened(source), np.array([1, 4]), source, tmp_path / "out")
    assert (tmp_path / "out" / "data.csv").read_text(encoding="utf-8").splitlines() == [
        "number,text,label",
        '1,"text, number 1",1',
        '4,"text, number 4",1',
    ]
    source = as_npz(tmp_path)
    write_kept(opened(source), np.array([1, 4]), source, tmp_path / "arrays")
    with np.load(tmp_path / "arrays" / "data.npz") as archive:
        assert {key: len(archive[key]) for key in archive.files} == {
            "x_train": 2,
            "y_train": 2,
            "x_test": 5,
            "y_test": 5,
        }


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = as_npz(tmp_path)
    with pytest.raises(InputError, match="no empty folder"):
        write_kept(opened(source), np.array([1]), source, tmp_path)
    with pytest.raises(InputError, match="no sample is left"):
        write_kept(opened(source), np.array([], dtype=np.int64), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    folder = as_images(tmp_path)
    broken = folder / "class 1" / "04.png"
    broken.write_bytes(broken.read_bytes()[:40])
    samples = open_samples(folder)
    with pytest.raises(InputError, match=r"04\.png, id [0-9a-f]{16}: this image cannot be decoded"):
        _ = samples.ids
    left = without_unreadable(samples, 1)
    assert len(left) == N - 1
    assert len(set(left.ids)) == N - 1
    assert not any("04.png" in left.where(i) for i in range(len(left)))
    (note,) = samples.provenance.notes
    assert "left out 1 sample that cannot be read, the first: " in note
    assert "04.png" in note
    broken.with_name("01.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"more than 1 samples cannot be read, the first: .*01\.png"):
        without_unreadable(open_samples(folder), 1)


def test_a_set_that_can_be_read_is_the_same_set(tmp_path: Path) -> None:
    samples = open_samples(as_images(tmp_path))
    assert without_unreadable(samples, 3) is samples


def test_a_corrupt_row_of_a_table_is_named(tmp_path: Path) -> None:
    file = as_parquet_file(tmp_path)
    table = pq.read_table(file)
    cells = table.column("image").to_pylist()
    cells[5]["bytes"] = b"no image"
    type_ = table.schema.field("image").type
    import pyarrow as pa

    pq.write_table(table.set_column(0, table.schema.field("image"), pa.array(cells, type_)), file)
    left = without_unreadable(open_samples(file), 1)
    assert len(left) == N - 1
    assert "train.parquet, row 5" in open_samples(file).where(5)
