"""Parquet in the hub's layout: against Pillow, pyarrow and the datasets library."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples, Waveform, open_samples, parquet
from doorward.data.parquet import write_parquet

MEDIA = pa.struct({"bytes": pa.binary(), "path": pa.string()})
LABEL = {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}


def pixels(count: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5, channels), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(out, "PNG")
    return out.getvalue()


def media(images: np.ndarray) -> pa.Array:
    return pa.array([{"bytes": png(image), "path": None} for image in images], MEDIA)


def save(path: Path, features: dict[str, Any] | None, group: int = 1000, **columns: Any) -> Path:
    """Write a parquet file with Hugging Face features, by pyarrow alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            name: column if isinstance(column, pa.Array) else pa.array(column)
            for name, column in columns.items()
        }
    )
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def save_images(path: Path, count: int = 6, seed: int = 0, group: int = 1000, **features: Any) -> np.ndarray:
    images = pixels(count, seed)
    labels = [i % 3 for i in range(count)]
    save(
        path,
        {"image": {"_type": "Image"}, "label": LABEL} | features,
        group,
        image=media(images),
        label=labels,
    )
    return images


def same(samples: Samples, images: np.ndarray) -> None:
    assert len(samples) == len(images)
    np.testing.assert_array_equal(np.stack(samples.raw(range(len(images)))), images)


def test_images_labels_and_names(tmp_path: Path) -> None:
    images = save_images(tmp_path / "train.parquet")
    samples = open_samples(tmp_path)
    same(samples, images)
    assert samples.modality == "image"
    assert samples.classes == ("cat", "dog", "owl")
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    assert samples.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert samples.provenance.path == str(tmp_path)
    assert samples.provenance.rows == 6


def test_any_order_of_rows_is_kept_over_row_groups_and_files(tmp_path: Path) -> None:
    first = save_images(tmp_path / "train-00000-of-00002.parquet", 7, seed=1, group=3)
    second = save_images(tmp_path / "train-00001-of-00002.parquet", 5, seed=2, group=2)
    images = np.concatenate([first, second])
    samples = open_samples(tmp_path)
    same(samples, images)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1]
    for order in ([11, 0, 6, 7, 3], [4, 4, 4], [], np.arange(12)[::-1]):
        got = samples.raw(order)
        assert len(got) == len(order)
        for image, row in zip(got, order, strict=True):
            np.testing.assert_array_equal(image, images[row])
    for outside in ([12], [-1]):
        with pytest.raises(IndexError, match=r"\[0, 12\)"):
            samples.raw(outside)


def test_ids_do_not_depend_on_files_or_row_groups(tmp_path: Path) -> None:
    images = pixels(8)
    features = {"image": {"_type": "Image"}}
    save(tmp_path / "one" / "train.parquet", features, image=media(images))
    save(
        tmp_path / "two" / "data" / "train-00000-of-00002-a1b2c3.parquet",
        features,
        2,
        image=media(images[:3]),
    )
    save(
        tmp_path / "two" / "data" / "train-00001-of-00002-a1b2c3.parquet",
        features,
        2,
        image=media(images[3:]),
    )
    one, two = open_samples(tmp_path / "one"), open_samples(tmp_path / "two")
    assert one.ids == two.ids == InMemorySamples(images).ids
    assert one.labels is None
    assert one.classes == ()


def test_row_groups_are_read_when_needed_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = save_images(tmp_path / "train.parquet", 20, group=5)
    read: list[tuple[str, int | None]] = []
    original = parquet._Shard.read

    def counted(self: Any, column: str, group: int | None = None) -> pa.ChunkedArray:
        read.append((column, group))
        return original(self, column, group)

    monkeypatch.setattr(parquet._Shard, "read", counted)
    samples = open_samples(tmp_path)
    assert read == [("label", None)], "opening reads labels only"
    samples.raw([7, 8, 19, 5])
    assert read[1:] == [("image", 1), ("image", 3)], "a group is read once a call"
    samples.raw([9, 15])
    assert len(read) == 3, "groups in use are kept"
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    samples.raw([0])
    samples.raw([1])
    assert read[3:] == [("image", 0)], "the last one is kept however large it is"
    samples.raw([7])
    assert read[4:] == [("image", 1)], "others are not"
    same(samples, images)


def test_sha256_is_that_of_the_files_read(tmp_path: Path) -> None:
    save_images(tmp_path / "train-00000-of-00002.parquet")
    save_images(tmp_path / "train-00001-of-00002.parquet", seed=1)
    save_images(tmp_path / "test.parquet", seed=2)

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    lines = "".join(f"{digest((tmp_path / name).read_bytes())}  {name}\n" for name in names)
    assert open_samples(tmp_path, split="train").provenance.sha256 == digest(lines.encode())
    expected = digest((tmp_path / "test.parquet").read_bytes())
    assert open_samples(tmp_path).provenance.sha256 == expected
    assert open_samples(tmp_path / "test.parquet").provenance.sha256 == expected


def test_labels_need_no_decoding_and_the_undecodable_is_named(tmp_path: Path) -> None:
    cells = [{"bytes": png(pixels(1)[0]), "path": None}, {"bytes": b"no image", "path": "a.png"}]
    features = {"image": {"_type": "Image"}, "label": LABEL}
    cells = [*cells, {"bytes": cells[0]["bytes"][:60], "path": None}, {"bytes": None, "path": None}, None]
    save(tmp_path / "train.parquet", features, 2, image=pa.array(cells, MEDIA), label=[0, 1, 2, 0, 0])
    samples = open_samples(tmp_path)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 0, 0]
    assert len(samples.raw([0])) == 1
    for row in (1, 2):
        with pytest.raises(InputError) as caught:
            samples.raw([0, row])
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'train.parquet'}, row {row}, id ")
        assert hashlib.sha256(cells[row]["bytes"]).hexdigest()[:16] in message
        assert "\n" not in message
    for row in (3, 4):
        with pytest.raises(InputError, match=f"row {row}: this image cannot be decoded \\(it is empty\\)"):
            samples.raw([row])


@given(st.binary(max_size=60), st.integers(0, 80), st.integers(0, 255))
def test_damaged_images_raise_input_errors_alone(tmp_path: Path, junk: bytes, at: int, level: int) -> None:
    whole = png(pixels(1)[0])
    changed = bytearray(whole)
    changed[at % len(whole)] = level
    cells = [junk, whole[:at], whole[:33] + junk, bytes(changed)]
    path = save(
        tmp_path / "x.parquet",
        {"image": {"_type": "Image"}},
        image=pa.array([{"bytes": c} for c in cells], MEDIA),
    )
    samples = open_samples(path)
    for row in range(4):
        try:
            image = samples.raw([row])[0]
        except InputError:
            continue
        assert image.ndim == 3


def test_splits_are_found_in_all_layouts(tmp_path: Path) -> None:
    layouts = {
        "flat": ["train.parquet", "test.parquet"],
        "shards": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
        "hashed": ["data/train-00000-of-00001-0f1e2d.parquet", "data/test-00000-of-00001-0f1e2d.parquet"],
        "configuration": ["plain/train-00000-of-00001.parquet", "plain/test-00000-of-00001.parquet"],
        "converted": ["default/train/0000.parquet", "default/test/0000.parquet"],
        "folders": ["train/0000.parquet", "test/0000.parquet"],
    }
    for layout, (train, test) in layouts.items():
        in_train = save_images(tmp_path / layout / train, 5, seed=1)
        in_test = save_images(tmp_path / layout / test, 4, seed=2)
        (tmp_path / layout / "README.md").write_text("# Data")
        same(open_samples(tmp_path / layout), in_test)
        same(open_samples(tmp_path / layout, prefer=("train",)), in_train)
        same(open_samples(f"{tmp_path / layout}:train"), in_train)
        same(open_samples(tmp_path / layout, split="test"), in_test)
        with pytest.raises(InputError, match=r"no split 'val'; its splits are: (train, test|test, train)$"):
            open_samples(f"{tmp_path / layout}:val")
        same(open_samples(tmp_path / layout / train), in_train)


def test_files_of_a_split_must_belong_together(tmp_path: Path) -> None:
    save_images(tmp_path / "lacking" / "train-00000-of-00003.parquet")
    save_images(tmp_path / "lacking" / "train-00002-of-00003.parquet")
    with pytest.raises(InputError, match=r"lacks 1 of 3 files, first train-00001-of-00003\.parquet"):
        open_samples(tmp_path / "lacking")
    save_images(tmp_path / "twice" / "train.parquet")
    save_images(tmp_path / "twice" / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match="do not belong together"):
        open_samples(tmp_path / "twice")
    save_images(tmp_path / "several" / "a" / "train.parquet")
    save_images(tmp_path / "several" / "b" / "train.parquet")
    with pytest.raises(InputError, match=r"holds several data sets: a, b; choose one as .*several/a"):
        open_samples(tmp_path / "several")
    save(tmp_path / "mixed" / "train-00000-of-00002.parquet", None, text=["a"], label=[0])
    save(tmp_path / "mixed" / "train-00001-of-00002.parquet", None, text=["a"], label=["b"])
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet: column 'label' is not as in"):
        open_samples(tmp_path / "mixed")


def test_several_splits_without_a_known_name_need_a_choice(tmp_path: Path) -> None:
    save_images(tmp_path / "north.parquet")
    save_images(tmp_path / "south.parquet")
    with pytest.raises(InputError, match=r"several splits: north, south; choose one as .*:north"):
        open_samples(tmp_path)
    assert len(open_samples(f"{tmp_path}:south")) == 6


def test_columns_are_found_by_features_types_and_names(tmp_path: Path) -> None:
    images = pixels(3)
    image, text = {"_type": "Image"}, {"_type": "Value", "dtype": "string"}
    number = {"_type": "Value", "dtype": "int64"}
    path = save(
        tmp_path / "a.parquet",
        {"track": number, "img": image, "note": text, "fine": LABEL},
        track=[5, 6, 7],
        img=media(images),
        note=["x", "y", "z"],
        fine=[2, 1, 0],
    )
    samples = open_samples(path)
    same(samples, images)
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 1, 0]
    texts = open_samples(path, column="note", label_column="track")
    assert texts.raw([2, 0]) == ["z", "x"]
    assert texts.modality == "text"
    assert texts.labels is not None
    assert texts.labels.tolist() == [5, 6, 7]
    assert texts.classes == tuple("01234567")


def test_ambiguous_missing_and_unfit_columns_are_named(tmp_path: Path) -> None:
    one = media(pixels(2))
    image = {"_type": "Image"}
    two = save(tmp_path / "two.parquet", {"left": image, "right": image}, left=one, right=one)
    with pytest.raises(
        InputError, match=r"could be the inputs: left, right; choose one \(column, .* --data-column\)"
    ):
        open_samples(two)
    same(open_samples(two, column="right"), pixels(2))
    with pytest.raises(InputError, match="no column 'img'; its columns are: left, right"):
        open_samples(two, column="img")
    texts = save(tmp_path / "texts.parquet", None, title=["a", "b"], body=["c", "d"], rank=[0.5, 1.0])
    with pytest.raises(InputError, match="could be the inputs: title, body;"):
        open_samples(texts)
    assert open_samples(texts, column="body").raw([1]) == ["d"]
    with pytest.raises(InputError, match=r"column 'rank' of .* holds no images, recordings or texts"):
        open_samples(texts, column="rank")
    with pytest.raises(InputError, match=r"column 'rank' of .* holds neither integers nor strings"):
        open_samples(texts, column="body", label_column="rank")
    none = save(tmp_path / "none.parquet", None, rank=[0.5, 1.0], label=[0, 1])
    with pytest.raises(InputError, match="no column with images, recordings or texts; its columns are: rank"):
        open_samples(none)
    coarse = save(
        tmp_path / "coarse.parquet",
        {"img": image, "fine": LABEL, "coarse": LABEL},
        img=one,
        fine=[0, 1],
        coarse=[1, 1],
    )
    with pytest.raises(InputError, match="several label columns: fine, coarse; choose one"):
        open_samples(coarse)
    labels = open_samples(coarse, label_column="coarse").labels
    assert labels is not None
    assert labels.tolist() == [1, 1]


def test_text_wins_among_columns_of_text(tmp_path: Path) -> None:
    path = save(tmp_path / "t.parquet", None, source=["u", "v"], text=["a", "b"], label=["no", "yes"])
    samples = open_samples(path)
    assert samples.raw([0, 1]) == ["a", "b"]
    assert samples.classes == ("no", "yes")


@pytest.mark.parametrize("labels", [[None, None, None], [-1, -1, -1]])
def test_labels_that_are_all_missing_are_none(tmp_path: Path, labels: list[Any]) -> None:
    path = save(
        tmp_path / "x.parquet", {"label": LABEL}, text=["a", "b", "c"], label=pa.array(labels, pa.int64())
    )
    samples = open_samples(path)
    assert samples.labels is None
    assert samples.classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], "row 1 of .* has no label while others have one"),
        ([0, -1, 1], "label -1 in row 1 of .* is not a class number from 0 to 2"),
        ([0, 1, 3], "label 3 in row 2 of .* is not a class number from 0 to 2"),
        (["cat", "cow", "dog"], "class 'cow' of .* is not among the classes: cat, dog, owl"),
    ],
)
def test_labels_must_be_among_the_classes(tmp_path: Path, labels: list[Any], message: str) -> None:
    path = save(tmp_path / "x.parquet", {"label": LABEL}, text=["a", "b", "c"], label=labels)
    with pytest.raises(InputError, match=message):
        open_samples(path, classes=LABEL["names"])


def test_labels_of_other_types_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.parquet", None, text=["a", "b"], grade=[0.0, 1.0])
    with pytest.raises(InputError, match="neither integers nor strings"):
        open_samples(path, label_column="grade")
    path = save(tmp_path / "y.parquet", None, text=["a", "b"], label=[20240101, 20240102])
    with pytest.raises(InputError, match=r"label 20240101 in row 0 of .* is not a class number"):
        open_samples(path)


def test_string_labels_have_the_same_numbers_in_all_splits(tmp_path: Path) -> None:
    save(tmp_path / "train.parquet", None, text=["a", "b", "c"], label=["dog", "cat", "owl"])
    encoded = pa.array(["owl", "dog"]).dictionary_encode()
    save(tmp_path / "test.parquet", None, text=["d", "e"], label=encoded)
    for split, expected in (("train", [1, 0, 2]), ("test", [2, 1])):
        samples = open_samples(tmp_path, split=split)
        assert samples.classes == ("cat", "dog", "owl")
        assert samples.labels is not None
        assert samples.labels.tolist() == expected


def test_classes_asked_for_are_matched_by_name(tmp_path: Path) -> None:
    save_images(tmp_path / "train.parquet", 3)
    samples = open_samples(tmp_path, classes=["owl", "eel", "dog", "cat"])
    assert samples.classes == ("owl", "eel", "dog", "cat")
    assert samples.labels is not None
    assert samples.labels.tolist() == [3, 2, 0]
    with pytest.raises(InputError, match=r"class 'owl' of .* is not among the classes: cat, dog"):
        open_samples(tmp_path, classes=["cat", "dog"])
    path = save(tmp_path / "bare.parquet", None, text=["a", "b"], label=[1, 0])
    bare = open_samples(path, classes=["no", "yes"])
    assert bare.classes == ("no", "yes")
    assert bare.labels is not None
    assert bare.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"label 1 in row 0 of .* from 0 to 0"):
        open_samples(path, classes=["no"])


def test_cells_may_name_files_in_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    images = pixels(3)
    folder = tmp_path / "set"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "a.png").write_bytes(png(images[0]))
    (folder / "files" / "b.png").write_bytes(png(images[1]))
    (tmp_path / "secret.png").write_bytes(png(images[2]))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = [
        "files/a.png",
        str(folder / "files" / "b.png"),
        "../secret.png",
        "link.png",
        "gone.png",
        "nul\0.png",
    ]
    cells = pa.array([{"bytes": None, "path": name} for name in names], MEDIA)
    save(folder / "train.parquet", {"image": {"_type": "Image"}}, 3, image=cells)
    samples = open_samples(folder)
    np.testing.assert_array_equal(samples.raw([1, 0]), images[[1, 0]])
    for row in (2, 3):
        with pytest.raises(InputError, match=f"row {row}: .* names a file outside the data set's folder"):
            samples.raw([row])
    for row in (4, 5):
        with pytest.raises(InputError, match=f"row {row}: this image cannot be decoded"):
            samples.raw([row])

    save(folder / "train.parquet", {"image": {"_type": "Image"}}, image=cells[:1])
    before = open_samples(folder).provenance.sha256
    table, named = ((folder / name).read_bytes() for name in ("train.parquet", "files/a.png"))
    lines = [
        f"{hashlib.sha256(named).hexdigest()}  files/a.png\n",
        f"{hashlib.sha256(table).hexdigest()}  train.parquet\n",
    ]
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest(), "the files named count as read"


def test_without_features_the_bytes_tell_images_from_recordings(tmp_path: Path) -> None:
    from doorward.data.decode import encode_audio

    images = pixels(2)
    pictures = save(tmp_path / "p.parquet", None, picture=pa.array([None, png(images[1])], pa.binary()))
    samples = open_samples(pictures)
    assert samples.modality == "image"
    np.testing.assert_array_equal(samples.raw([1])[0], images[1])
    wave = encode_audio(Waveform(np.array([0.5, -0.5], np.float32), 8000))
    sounds = open_samples(save(tmp_path / "s.parquet", None, sound=pa.array([{"bytes": wave}], MEDIA)))
    assert sounds.modality == "audio"
    assert sounds.raw([0])[0].pcm.tolist() == [0.5, -0.5]
    types = save(
        tmp_path / "v.parquet", {"clip": {"_type": "Video"}}, clip=pa.array([{"bytes": wave}], MEDIA)
    )
    with pytest.raises(InputError, match="no column with images, recordings or texts"):
        open_samples(types)


def test_empty_and_damaged_files(tmp_path: Path) -> None:
    save(tmp_path / "zero.parquet", None, text=pa.array([], pa.string()), label=pa.array([], pa.int64()))
    with pytest.raises(InputError, match="split 'zero', has no rows"):
        open_samples(tmp_path / "zero.parquet")
    whole = save(tmp_path / "whole.parquet", None, text=["a", "b"], label=[0, 1]).read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.parquet").write_bytes(b"")
    for name, why in (("half", r" cannot be read as parquet \("), ("nothing", ": it is empty")):
        with pytest.raises(InputError, match=rf"{name}\.parquet{why}"):
            open_samples(tmp_path / f"{name}.parquet")
    path = save(tmp_path / "names.parquet", {"label": LABEL | {"names": [1, 2]}}, text=["a"], label=[0])
    with pytest.raises(InputError, match=r"class names .* must be a list of strings"):
        open_samples(path)
    path = save(tmp_path / "type.parquet", {"text": {"_type": ["Value"]}}, text=["a"])
    assert open_samples(path).raw([0]) == ["a"], "a feature for what types tell does not matter"
    path = save(tmp_path / "type.parquet", {"img": {"_type": ["Image"]}}, img=media(pixels(1)))
    with pytest.raises(InputError, match="cannot be read as a table with Hugging Face features"):
        open_samples(path)
    for metadata in (b"{", b"[]", b'{"info": 3}', b'{"info": {"features": 3}}', b"\xff"):
        table = pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, tmp_path / "meta.parquet")
        with pytest.raises(
            InputError, match=r"meta\.parquet cannot be read as a table with Hugging Face features"
        ):
            open_samples(tmp_path / "meta.parquet")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "same.parquet"
    )
    with pytest.raises(InputError, match="several columns of one name"):
        open_samples(tmp_path / "same.parquet")


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    save_images(tmp_path / "train.parquet")
    samples = open_samples(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(InputError, match=r"train\.parquet cannot be read"):
        samples.raw([0])
    with pytest.raises(InputError, match=r"train\.parquet cannot be read"):
        assert samples.provenance.sha256


@given(st.data())
def test_fuzzed_files_raise_input_errors_alone(tmp_path: Path, data: st.DataObject) -> None:
    valid = save(
        tmp_path / "v.parquet",
        {"label": LABEL},
        2,
        text=["a", "b", "c"],
        image=media(pixels(3)),
        label=[0, 1, 2],
    )
    content = bytearray(valid.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "f.parquet"
    path.write_bytes(
        data.draw(st.sampled_from([bytes(content), bytes(content[: len(content) // 2]), b"PAR1PAR1"]))
    )
    try:
        samples = open_samples(path)
        for row in range(min(len(samples), 5)):
            samples.raw([row])
        assert samples.ids
        message = ""
    except InputError as error:
        message = str(error)
    assert "\n" not in message, "one line, whatever the parser says"


SETS: list[tuple[str, Samples]] = [
    ("grey", InMemorySamples(pixels(9), np.arange(9) % 3, classes=["a", "b", "c", "unused"])),
    ("colour", InMemorySamples(pixels(4, channels=3))),
    ("twice", InMemorySamples(pixels(2).repeat(3, axis=0), [0, 0, 1, 1, 0, 1])),
    ("text", InMemorySamples(["", "zwei\n", "\N{SNOWMAN}"], [1, 0, 1], modality="text")),
    (
        "audio",
        InMemorySamples(
            [Waveform(np.array([0.5, 0.1], np.float32), 8000), Waveform(np.zeros((3, 2), np.float32), 44100)],
            [0, 1],
            modality="audio",
        ),
    ),
]


@pytest.mark.parametrize(("name", "samples"), SETS, ids=[name for name, _ in SETS])
def test_what_is_written_is_read_back(tmp_path: Path, name: str, samples: Samples) -> None:
    file = write_parquet(samples, tmp_path / "out" / "set", split="train")
    assert file == tmp_path / "out" / "set" / "train.parquet"
    assert [entry.name for entry in file.parent.iterdir()] == ["train.parquet"], "nothing else is left"
    back = open_samples(tmp_path / "out" / "set")
    assert back.ids == samples.ids
    assert back.modality == samples.modality
    assert (back.labels is None) == (samples.labels is None)
    if samples.labels is not None and back.labels is not None:
        assert back.classes == samples.classes
        assert back.labels.tolist() == samples.labels.tolist()
    if name == "grey":
        same(back, pixels(9))
    if name == "text":
        assert back.raw([0, 1, 2]) == ["", "zwei\n", "\N{SNOWMAN}"]


def test_writing_goes_in_row_groups_and_is_repeatable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, problem = pixels(23), []

    class Watched(InMemorySamples):
        def raw(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
            problem.append(len(indices))
            return super().raw(indices)

    monkeypatch.setattr(parquet, "READ_ROWS", 2)
    monkeypatch.setattr(parquet, "GROUP_ROWS", 5)
    first = write_parquet(Watched(images, np.arange(23) % 2), tmp_path / "a")
    assert max(problem) == 2, "few samples are decoded at a time"
    groups = pq.ParquetFile(first).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [6, 6, 6, 5]
    same(open_samples(first), images)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    by_bytes = pq.ParquetFile(write_parquet(InMemorySamples(images), tmp_path / "b")).metadata
    assert by_bytes.num_row_groups == 12
    monkeypatch.undo()
    again = [write_parquet(InMemorySamples(images), tmp_path / name).read_bytes() for name in "cd"]
    assert again[0] == again[1]


def test_views_are_written_in_their_order(tmp_path: Path) -> None:
    whole = InMemorySamples(pixels(6), [0, 1, 2, 0, 1, 2])
    view = whole.select([4, 0, 5])
    back = open_samples(write_parquet(view, tmp_path, split="test"))
    assert back.ids == view.ids
    assert back.labels is not None
    assert back.labels.tolist() == [1, 0, 2]


def test_splits_are_added_and_never_overwritten(tmp_path: Path) -> None:
    write_parquet(InMemorySamples(pixels(3)), tmp_path, split="train")
    write_parquet(InMemorySamples(pixels(2, 1)), tmp_path, split="test")
    assert [len(open_samples(tmp_path, split=split)) for split in ("train", "test")] == [3, 2]
    before = (tmp_path / "train.parquet").read_bytes()
    with pytest.raises(InputError, match="already has a split 'train'"):
        write_parquet(InMemorySamples(pixels(1)), tmp_path, split="train")
    assert (tmp_path / "train.parquet").read_bytes() == before


def test_nothing_is_written_of_what_cannot_be(tmp_path: Path) -> None:
    save(
        tmp_path / "in.parquet",
        {"image": {"_type": "Image"}},
        image=pa.array([{"bytes": b"no image"}], MEDIA),
    )
    for samples in (open_samples(tmp_path / "in.parquet"), InMemorySamples(pixels(2, channels=4))):
        with pytest.raises(InputError):
            write_parquet(samples, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"text 'a\\ud800' is no valid Unicode"):
        write_parquet(InMemorySamples(["a\ud800"], modality="text"), tmp_path / "out")
    with pytest.raises(InputError, match="no samples to write"):
        write_parquet(InMemorySamples(pixels(2)).select([]), tmp_path / "out")
    with pytest.raises(InputError, match=r"in\.parquet is a file; a folder is needed"):
        write_parquet(InMemorySamples(pixels(1)), tmp_path / "in.parquet")
    with pytest.raises(InputError, match="cannot be written"):
        write_parquet(InMemorySamples(pixels(1)), tmp_path / "in.parquet" / "below")


@pytest.mark.parametrize(("name", "samples"), SETS[:4], ids=[name for name, _ in SETS[:4]])
def test_the_datasets_library_reads_what_is_written(tmp_path: Path, name: str, samples: Samples) -> None:
    datasets = pytest.importorskip("datasets")
    file = write_parquet(samples, tmp_path / "set")
    data = datasets.load_dataset(
        "parquet", data_files={"train": str(file)}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(data) == len(samples)
    for theirs, ours in zip(data[samples.modality], samples.raw(range(len(samples))), strict=True):
        np.testing.assert_array_equal(
            np.asarray(theirs), ours.squeeze() if samples.modality == "image" else ours
        )
    if samples.labels is None:
        assert data.column_names == ["image"]
    else:
        assert data["label"][:] == samples.labels.tolist()
        assert tuple(data.features["label"].names) == samples.classes


def test_what_the_datasets_library_writes_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = pixels(5, channels=3)
    features = datasets.Features({"img": datasets.Image(), "coarse": datasets.ClassLabel(names=["x", "y"])})
    data = datasets.Dataset.from_dict(
        {"img": [{"bytes": png(i), "path": None} for i in images], "coarse": [0, 1, 1, 0, 1]}, features
    )
    data.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"), batch_size=2)
    samples = open_samples(tmp_path)
    same(samples, images)
    assert samples.classes == ("x", "y")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 1, 0, 1]
