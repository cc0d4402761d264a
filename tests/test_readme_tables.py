"""The tables of README and docs are what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

import readme_tables
from bench_examples import result
from doorward.bench import results
from doorward.bench.suite import expand, get_suite
from doorward.core.errors import InputError
from doorward.scan.calibration import shipped

README = "a\n<!-- null -->\nold\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n"


def test_a_table_goes_where_it_is_marked(tmp_path: Path) -> None:
    held = results.Results(
        suite="null", scale="cpu", made_with={}, results=(result("x", "mnist-clean", 0.04, data="mnist"),)
    )
    results.write_results(held, tmp_path)
    shown = readme_tables.in_page(README, tmp_path)
    head, _, rest = shown.partition("\n**Scan clean models only.** ")
    assert head == "a\n<!-- null -->\n"
    assert "| mnist-clean | 1 of 1 (2.5 % to 100 %) |" in rest
    assert rest.endswith("\n\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n")
    assert readme_tables.in_page(shown, tmp_path) == shown
    assert readme_tables.in_page("no table", tmp_path) == "no table"


def test_a_table_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"null-cpu\.json cannot be read"):
        readme_tables.in_page(README, tmp_path)


@pytest.mark.parametrize("suite", readme_tables.PAGES)
def test_pages_show_the_committed_results(suite: str) -> None:
    page = readme_tables.PAGES[suite].read_text(encoding="utf-8")
    assert readme_tables.marks(suite).search(page), f"the page marks the place of {suite}"
    assert readme_tables.in_page(page) == page, "run `make docs`"


def test_results_by_an_earlier_bank_are_said_to_be(tmp_path: Path) -> None:
    def page(*bank: str) -> str:
        made_with = {"bank": bank} if bank else {}
        rows = (result("x", "mnist-clean", 0.04, data="mnist"),)
        results.write_results(
            results.Results(suite="null", scale="cpu", made_with=made_with, results=rows), tmp_path
        )
        return readme_tables.in_page(README, tmp_path)

    assert readme_tables.EARLIER in page("0123 (7 clean models)")
    assert readme_tables.EARLIER in page("0123 (7 clean models)", results.bank_label(shipped()))
    assert readme_tables.EARLIER not in page(results.bank_label(shipped()))
    assert readme_tables.EARLIER not in page()


@pytest.mark.parametrize("suite", readme_tables.PAGES)
def test_committed_results_are_whole_and_those_of_the_readme_judged_by_the_shipped_bank(suite: str) -> None:
    held = results.read_results(results.results_file(readme_tables.RESULTS, suite, "cpu"))
    assert bool(held.made_with.get("bank")) == get_suite(suite).scans
    if readme_tables.PAGES[suite] == readme_tables.README:
        assert readme_tables.is_current(held), f"export {suite} again"
    assert [one.trial for one in held.results] == sorted(t.name for t in expand(get_suite(suite), "cpu"))
    assert {one.status for one in held.results} == {"done"}
