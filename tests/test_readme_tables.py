"""The README's tables of detection are what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

import readme_tables
from bench_examples import result
from doorward.bench import show
from doorward.calibration import shipped
from doorward.errors import InputError

README = "a\n<!-- null -->\nold\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n"


def test_a_table_goes_where_it_is_marked(tmp_path: Path) -> None:
    held = show.Results(
        suite="null", scale="cpu", made_with={}, results=(result("x", "mnist-clean", 0.04, data="mnist"),)
    )
    show.write_results(held, tmp_path)
    shown = readme_tables.in_readme(README, tmp_path)
    head, _, rest = shown.partition("\n**Scan clean models only.** ")
    assert head == "a\n<!-- null -->\n"
    assert "| mnist-clean | 1 of 1 (2.5 % to 100 %) |" in rest
    assert rest.endswith("\n\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n")
    assert readme_tables.in_readme(shown, tmp_path) == shown
    assert readme_tables.in_readme("no table", tmp_path) == "no table"


def test_a_table_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"null-cpu\.json cannot be read"):
        readme_tables.in_readme(README, tmp_path)


@pytest.mark.parametrize("suite", readme_tables.SUITES)
def test_the_readme_shows_the_committed_results(suite: str) -> None:
    readme = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.marks(suite).search(readme), f"the README marks the place of {suite}"
    assert readme_tables.in_readme(readme) == readme, "run `make docs`"


@pytest.mark.parametrize("suite", readme_tables.SUITES)
def test_committed_results_are_whole_and_judged_by_the_shipped_bank(suite: str) -> None:
    held = show.read_results(show.results_file(readme_tables.RESULTS, suite, "cpu"))
    assert held.made_with["bank"] == (show.bank_label(shipped()),), f"export {suite} again"
    assert {one.status for one in held.results} == {"done"}
