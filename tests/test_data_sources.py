"""Opening by path: what is chosen, which split, the hub, and every way of not being there."""

import errno
import gzip
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from doorward.core.errors import InputError, MissingExtra
from doorward.data import InMemorySamples, Samples, open_samples
from doorward.data.parquet import write_parquet

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 1), dtype=np.uint8)


def dataset(folder: Path) -> Path:
    for split, count in (("train", 4), ("test", 3), ("validation", 2)):
        write_parquet(InMemorySamples(IMAGES[:count], np.arange(count) % 2), folder, split=split)
    return folder


def test_the_split_preferred_is_taken(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set")
    assert len(open_samples(folder)) == 3
    assert len(open_samples(folder, prefer=("train", "test"))) == 4
    (folder / "test.parquet").unlink()
    assert len(open_samples(folder)) == 2


def test_splits_in_the_path_and_in_the_option(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set")
    assert len(open_samples(f"{folder}:train")) == 4
    assert len(open_samples(f"{folder}:train", split="train")) == 4
    assert open_samples(f"{folder}:train").provenance.path == f"{folder}:train"
    with pytest.raises(InputError, match=r"asks for split 'train', the option for 'test'"):
        open_samples(f"{folder}:train", split="test")
    with pytest.raises(InputError, match=r"there is no file or folder '.*gone'"):
        open_samples(f"{tmp_path / 'gone'}:train")


def test_a_path_may_hold_a_colon(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "a:test")
    assert len(open_samples(folder, split="train")) == 4
    assert len(open_samples(f"{folder}:validation")) == 2


@pytest.mark.parametrize("path", ["C:data", "C:\\data\\x", "c:/data", "/a:b/c", ":test", "x:", "x:a b"])
def test_a_drive_letter_is_no_path_and_not_all_after_a_colon_is_a_split(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no file has a name like it
    with pytest.raises(InputError) as caught:
        open_samples(path)
    assert str(caught.value) == f"there is no file or folder {path!r}"


def test_the_split_after_a_drive_letter_is_found() -> None:
    with pytest.raises(InputError) as caught:
        open_samples("C:\\data:test")
    assert str(caught.value) == "there is no file or folder 'C:\\\\data'"


def test_folders_without_data_and_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="without parquet files, idx files, images or recordings: it is empty"
    ):
        open_samples(tmp_path)
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=r"it holds a\.csv\. Of other data, give the file itself"):
        open_samples(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"x\.safetensors is no file that can be read as data; expected \.parquet, "
    ):
        open_samples(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("x.npy", r"numpy\.savez\('clean\.npz', x=images, y=labels\)"),
        ("test.pt", r"x=x\.numpy\(\)"),
        ("data.pkl", "a pickle is not opened, since that may run code"),
        ("images.zip", "unpack it, and give the folder"),
        ("images.tar.gz", "unpack it, and give the folder"),
        ("digits.mat", "write clean.npz"),
    ],
)
def test_what_to_do_with_data_of_another_kind_is_said(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"a")
    with pytest.raises(InputError, match=hint) as told:
        open_samples(tmp_path / name)
    assert "\n" not in str(told.value)


def test_the_batches_of_cifar_are_not_unpickled(tmp_path: Path) -> None:
    for name in ("batches.meta", "data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InputError, match="holds the batches of CIFAR as pickles, which are not opened"):
        open_samples(tmp_path)


def test_what_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(self: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(InputError) as caught:
        open_samples(tmp_path)
    assert str(caught.value) == f"{tmp_path} cannot be read (Permission denied)"


@pytest.mark.parametrize(
    "path", ["gone.parquet", "a/gone", "./gone", "/gone", "x/gone.csv", "a/b/c", "", "n\0", "x" * 999]
)
def test_missing_paths_are_told_without_asking_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # asking would raise MissingExtra
    with pytest.raises(InputError) as caught:
        open_samples(path)
    assert not isinstance(caught.value, MissingExtra)
    assert "\n" not in str(caught.value)


def test_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"there is no file or folder 'owner/name'; .*doorward\[hf\]"):
        open_samples("owner/name")


def test_the_hub_offline_is_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError) as caught:
        open_samples("owner/name:test")
    message = str(caught.value)
    assert message.startswith(
        "there is no file or folder 'owner/name', and the Hugging Face hub gives no data set"
    )
    assert "HF_HUB_OFFLINE=1" in message
    assert "\n" not in message


def test_the_hub_out_of_reach_is_told_before_any_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    def unreachable(self: object, name: str, **options: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("retries for half a minute"))
    with pytest.raises(
        InputError, match=r"no data set of that name \(Name or service not known\); offline, HF_HUB"
    ):
        open_samples("name")


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.squeeze(2)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the hub; return the names asked for."""
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": png(image), "path": None} for image in IMAGES]
    images[3] = {"bytes": None, "path": "/etc/hostname"}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    sets = {
        "owner/pictures": datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"img": images, "label": [0, 1, 1, 0]}, features),
            test=datasets.Dataset.from_dict({"img": images[:2], "label": [1, 0]}, features),
        ),
        "words": datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["dog", "cat"]}),
            test=datasets.Dataset.from_dict({"text": ["c"], "label": ["dog"]}),
        ),
        "nothing": datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": []})),
    }
    problem = []

    def load_dataset(name: str, *, trust_remote_code: bool) -> Any:
        assert trust_remote_code is False
        problem.append(name)
        return sets[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return problem


def test_images_of_the_hub(hub: list[str]) -> None:
    samples = open_samples("owner/pictures")
    assert hub == ["owner/pictures"]
    np.testing.assert_array_equal(np.stack(samples.raw([1, 0, 1])), IMAGES[[1, 0, 1]])
    assert samples.ids == InMemorySamples(IMAGES[:2]).ids
    assert samples.classes == ("no", "yes")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]
    assert samples.provenance.path == "owner/pictures"
    assert samples.provenance.sha256 is None, "this one lies in memory"
    train = open_samples("owner/pictures:train")
    assert len(train) == 4
    with pytest.raises(InputError, match=r"row 3: .* names a file outside the data set's folder"):
        train.raw([3])
    with pytest.raises(InputError, match="no split 'val'; its splits are: train, test"):
        open_samples("owner/pictures", split="val")


def test_texts_of_the_hub(hub: list[str]) -> None:
    samples = open_samples("words")
    assert samples.raw([0]) == ["c"]
    assert samples.classes == ("cat", "dog")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1]
    with pytest.raises(InputError, match="has no rows"):
        open_samples("nothing")


def test_a_local_path_goes_before_the_hub(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "owner" / "pictures")
    assert len(open_samples("owner/pictures")) == 3
    with pytest.raises(InputError, match="there is no file or folder 'owner/picture'"):
        open_samples("owner/picture")
    assert hub == []


NAMES = ["x.parquet", "x.npz", "x.idx.gz", "x.idx", "train-images-idx3-ubyte", "x.csv", "x.jsonl"]


@given(st.sampled_from(NAMES), st.binary(max_size=200))
def test_random_bytes_raise_input_errors_alone(tmp_path: Path, name: str, junk: bytes) -> None:
    path = tmp_path / name
    heads = {"x.parquet": b"PAR1", "x.npz": b"PK\x03\x04", "x.idx": b"\0\0\x08\x03", "x.idx.gz": b""}
    for content in (junk, heads.get(name, b"") + junk, gzip.compress(junk) if name.endswith(".gz") else junk):
        path.write_bytes(content)
        message, samples = "", None
        try:
            samples = open_samples(path)
        except InputError as error:
            message = str(error)
        assert isinstance(samples, Samples) or str(path) in message
        assert "\n" not in message


def test_opening_imports_no_torch_and_no_datasets() -> None:
    import subprocess

    code = (
        "import sys, doorward.data.sources as s\n"
        "assert 'pyarrow' not in sys.modules\n"
        "try: s.open_samples('/gone.parquet')\n"
        "except s.InputError: pass\n"
        "import doorward.data.parquet, doorward.data.arrays, doorward.data.tables, doorward.data.hub\n"
        "assert not {'torch', 'datasets', 'soundfile'} & set(sys.modules), 'too much is imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
