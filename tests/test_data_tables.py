"""Texts in CSV and JSON lines: against the csv module and json."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, open_samples


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    texts = ['one, "two"', "a\nb", "", "2020-01-01", "1.0", "\N{SNOWMAN}", "NA", "null"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows((text, i % 3) for i, text in enumerate(texts))
    samples = open_samples(path)
    assert samples.modality == "text"
    assert samples.raw(range(8)) == texts
    assert samples.ids == InMemorySamples(texts, modality="text").ids
    assert samples.labels is not None
    assert samples.labels.tolist() == [i % 3 for i in range(8)]
    assert samples.classes == ("0", "1", "2")
    assert samples.provenance.rows == 8


def test_tab_separated_and_byte_order_mark(tmp_path: Path) -> None:
    samples = open_samples(write(tmp_path / "x.tsv", "\ufefflabel\ttext\nyes\ta,b\nno\tc\n"))
    assert samples.raw([0, 1]) == ["a,b", "c"]
    assert samples.classes == ("no", "yes")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]


def test_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 7, "sentence": "a", "label": "pos"},
        {"id": 8, "sentence": "b\n", "label": "neg"},
    ]
    path = write(tmp_path / "x.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    samples = open_samples(path)
    assert samples.raw([1, 0]) == ["b\n", "a"]
    assert samples.classes == ("neg", "pos")
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]
    assert samples.provenance.sha256 is not None


def test_columns_that_hold_numbers_are_no_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "id,score,sentence,target\n1,0.5,a,1\n2,1e3,b,0\n")
    samples = open_samples(path)
    assert samples.raw([0]) == ["a"]
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"column 'id' of .* holds no images, recordings or texts"):
        open_samples(path, column="id")
    with pytest.raises(InputError, match="no column 'text'; its columns are: id, score, sentence, target"):
        open_samples(path, column="text")
    two = write(tmp_path / "y.csv", "title,body\na,b\n")
    with pytest.raises(InputError, match="could be the inputs: title, body"):
        open_samples(two)
    assert open_samples(two, column="body").labels is None


def test_classes_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na,neg\nb,pos\n")
    labels = open_samples(path, classes=["pos", "neg"]).labels
    assert labels is not None
    assert labels.tolist() == [1, 0]
    numbers = open_samples(write(tmp_path / "y.csv", "text,label\na,1\nb,0\n"), classes=["neg", "pos"])
    assert numbers.labels is not None
    assert numbers.labels.tolist() == [1, 0]
    by_name = open_samples(tmp_path / "y.csv", classes=["1", "0"]).labels
    assert by_name is not None
    assert by_name.tolist() == [0, 1], "names go before numbers"


def test_missing_labels(tmp_path: Path) -> None:
    assert open_samples(write(tmp_path / "x.csv", "text,label\na,\nb,\n")).labels is None
    with pytest.raises(InputError, match=r"row 1 of .* has no label while others have one"):
        open_samples(write(tmp_path / "x.csv", "text,label\na,1\nb,\n"))
    with pytest.raises(InputError, match=r"row 1 of .* has no label while others have one"):
        open_samples(write(tmp_path / "x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"text": 1.5}', "no column with images, recordings or texts; its columns are: text"),
        ('{"text": "a"}\n{"text": 5}', "row 1: column 'text' holds 5, no text"),
        ('{"text": "a"}\n{"other": "b"}', "row 1: column 'text' holds None, no text"),
        ('{"text": "a"}\nno json', r"x\.jsonl, line 2, cannot be read as JSON"),
        ('[{"text": "a"}]', "line 1: each line must be one JSON object, got list"),
        ("[" * 100_000, "line 1, cannot be read as JSON"),
        ('{"text": "a", "label": 0.5}', "holds neither integers nor strings"),
        ('{"text": "a", "label": true}', "holds neither integers nor strings"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": "x"}', "mix integers and strings"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0.5}', "label 0.5 in row 1 of .* is float;"),
        ('{"text": "a", "label": 99999999999999999999}', "do not fit 64 bits"),
        ('{"text": "a", "label": [1]}', "holds neither integers nor strings"),
    ],
)
def test_json_lines_that_do_not_fit(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_samples(write(tmp_path / "x.jsonl", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"text,label\n", "has no rows"),
        (b"text,label\na\n", "cannot be read as a UTF-8 table"),
        (b"text,text\na,b\n", "several columns of one name: text, text"),
        (b"text\n\xff\xfe\n", "cannot be read as a UTF-8 table"),
        (b"text,label\na,0.5\n", "holds neither integers nor strings"),
        (b"text,label\na,1\nb,x\n", None),
    ],
)
def test_csv_that_does_not_fit(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    if message is None:  # a label that is no number makes all of them names
        assert open_samples(path).classes == ("1", "x")
        return
    with pytest.raises(InputError, match=message):
        open_samples(path)


def test_tables_have_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text\na\n")
    with pytest.raises(InputError, match="no split 'test'; its splits are: none"):
        open_samples(f"{path}:test")


@given(st.binary(max_size=80), st.sampled_from(["csv", "tsv", "jsonl"]))
def test_fuzzed_tables_raise_input_errors_alone(tmp_path: Path, junk: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b'{"text": "a"}\n' + junk if suffix == "jsonl" else b"text,label\na,1\n" + junk)
    try:
        samples = open_samples(path)
    except InputError as error:
        message = str(error)
    else:
        message = ""
        assert len(samples.ids) == len(samples) > 0
    assert "\n" not in message
