"""The real data sets: against their manifest, Pillow and the datasets library."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from doorward.data import open_samples
from doorward.data.parquet import write_parquet

SETS = [
    ("mnist", 10, "image", (28, 28, 1)),
    ("fashion_mnist", 10, "image", (28, 28, 1)),
    ("cifar10", 10, "image", (32, 32, 3)),
    ("gtsrb", 43, "image", (32, 32, 3)),
    ("orl_faces", 40, "image", (112, 92, 1)),
    ("pneumoniamnist", 2, "image", (28, 28, 1)),
    ("free_spoken_digit", 10, "audio", None),
    ("movie_snippets", 2, "text", None),
]


@pytest.mark.parametrize(("name", "classes", "modality", "shape"), SETS, ids=[row[0] for row in SETS])
def test_all_sets_open_as_their_manifest_says(
    data_root: Path, name: str, classes: int, modality: str, shape: tuple[int, ...] | None
) -> None:
    manifest = json.loads((data_root / "manifest.json").read_text())
    entry = next(entry for entry in manifest["datasets"] if entry["name"] == name)
    for file in entry["files"]:
        samples = open_samples(data_root / name, split=file["split"])
        assert len(samples) == file["rows"] == samples.provenance.rows
        assert samples.provenance.sha256 == file["sha256"]
        assert samples.modality == modality
        assert len(samples.classes) == classes == entry["classes"]
        table = pq.read_table(data_root / file["path"], columns=["label"])
        assert samples.labels is not None
        np.testing.assert_array_equal(samples.labels, table["label"].to_numpy())
        for raw in samples.raw([len(samples) - 1, 0]):
            assert shape is None or (raw.shape == shape and raw.dtype == np.uint8)


@pytest.mark.parametrize(("name", "column"), [("mnist", "image"), ("cifar10", "img")])
def test_pixels_are_those_of_pillow(data_root: Path, name: str, column: str) -> None:
    samples = open_samples(data_root / name, split="test")
    rows = np.random.default_rng(0).integers(0, len(samples), 200)
    cells = pq.read_table(data_root / name / "test.parquet", columns=[column])[column]
    for row, image in zip(rows, samples.raw(rows), strict=True):
        theirs = np.asarray(Image.open(io.BytesIO(cells[int(row)]["bytes"].as_py())))
        np.testing.assert_array_equal(image.squeeze(), theirs)


def test_published_statistics_of_mnist(data_root: Path) -> None:
    samples = open_samples(data_root / "mnist", split="train")
    counts = np.bincount(np.concatenate(samples.raw(range(len(samples))), axis=None), minlength=256)
    assert counts.sum() == 60_000 * 28 * 28
    levels = np.arange(256) / 255
    mean = float(np.average(levels, weights=counts))
    assert round(mean, 4) == 0.1307
    assert round(float(np.average((levels - mean) ** 2, weights=counts)) ** 0.5, 4) == 0.3081


def test_the_datasets_library_reads_the_same(data_root: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    samples = open_samples(data_root / "orl_faces")
    data: Any = datasets.load_dataset(
        "parquet",
        data_files=str(data_root / "orl_faces" / "test.parquet"),
        split="train",
        cache_dir=str(tmp_path),
    )
    assert tuple(data.features["label"].names) == samples.classes
    for row, image in zip(data, samples.raw(range(len(samples))), strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), image.squeeze())


@pytest.mark.parametrize("name", ["gtsrb", "free_spoken_digit", "movie_snippets"])
def test_real_data_is_written_and_read_back(data_root: Path, tmp_path: Path, name: str) -> None:
    samples = open_samples(data_root / name, split="test")
    back = open_samples(write_parquet(samples, tmp_path, split="test"))
    assert back.ids == samples.ids
    assert back.classes == samples.classes
    np.testing.assert_array_equal(back.labels, samples.labels)
