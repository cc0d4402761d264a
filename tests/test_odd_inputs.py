"""Odd files, as packages, issues and advisories have them: none passes that runs code, none crashes."""

from __future__ import annotations

from pathlib import Path

import pytest

import odd_inputs
from odd_inputs import PASSES, ask

CASES = odd_inputs.cases()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript, which is written here
@pytest.mark.parametrize("name", CASES)
def test_an_odd_input_is_told_in_a_line_or_two(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    answer = ask(case, tmp_path)
    assert answer.code in case.codes, answer.text
    assert "Traceback" not in answer.text
    assert case.said in answer.text
    if answer.code == 2:
        assert answer.text.startswith("error: ")
        assert answer.text.count("\n") == 1


def test_there_are_many_and_what_runs_code_must_not_pass() -> None:
    assert len(CASES) >= 100
    hostile = [case for case in CASES.values() if case.hostile]
    assert len(hostile) >= 60
    assert not [case for case in hostile if PASSES in case.codes]


def test_the_calls_are_those_that_are_named() -> None:
    """As the pickle module itself reads them."""
    import io
    import pickle

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            found.append(f"{module}.{name}")
            return lambda *given: arguments.append(given)

    for name, expected in odd_inputs.CALLS.items():
        found: list[str] = []
        arguments: list[tuple[object, ...]] = []
        Reader(io.BytesIO(odd_inputs.calling(name, expected))).load()
        assert (found, arguments) == ([name], [expected])
