"""The table of wrong and odd uses holds what the code answers now, and no answer is useless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import odd_uses

USES = {one.shown or f"doorward {one.typed}": one for one in odd_uses.USES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("odd")
    odd_uses.prepare(place)
    return place


def test_the_table_is_of_these_uses() -> None:
    written = json.loads(odd_uses.RESULTS.read_text(encoding="utf-8"))
    assert [one["use"] for one in written] == list(USES)
    assert all(one["useful"] for one in written)
    assert len(written) >= 100
    assert odd_uses.page([odd_uses.Answer(**one) for one in written]) == odd_uses.PAGE.read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore")
def test_an_answer_is_useful(name: str, folder: Path) -> None:
    answer = odd_uses.tried(USES[name], folder)
    assert answer.useful, answer.answer


def test_a_useless_answer_is_found(folder: Path) -> None:
    assert not odd_uses.tried(odd_uses.Use("scan nowhere.onnx", "words that it lacks"), folder).useful
    assert not odd_uses.tried(odd_uses.called("1 / 0", ""), folder).useful
