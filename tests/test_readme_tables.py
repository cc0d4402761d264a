"""The tables of README and docs are what the committed results say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import file_scanners
import readme_tables
from bench_examples import result
from doorward.bench import results
from doorward.bench.suite import Scale, expand, get_suite
from doorward.core.errors import InputError
from doorward.scan.calibration import shipped

PAGE = "a\n<!-- null -->\nold\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n"


def write(
    folder: Path, suite: str, *rows: results.Result, scale: Scale = "cpu", **made: tuple[str, ...]
) -> None:
    held = results.Results(suite=suite, scale=scale, made_with=made, results=rows)
    results.write_results(held, folder)


def test_a_table_goes_where_it_is_marked(tmp_path: Path) -> None:
    write(tmp_path, "null", result("x", "mnist-clean", 0.04, data="mnist"))
    shown = readme_tables.in_page(PAGE, tmp_path)
    head, _, rest = shown.partition("\n**Scan clean models only.** ")
    assert head == "a\n<!-- null -->\n"
    assert "| mnist-clean | 1 of 1 (2.5 % to 100 %) |" in rest
    assert rest.endswith("\n\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n")
    assert readme_tables.in_page(shown, tmp_path) == shown
    assert readme_tables.in_page("no table", tmp_path) == "no table"


def test_the_table_of_file_scanners_goes_where_it_is_marked(tmp_path: Path) -> None:
    shutil.copy(file_scanners.RESULTS, tmp_path)
    page = PAGE.replace("null", "file scanners")
    shown = readme_tables.in_page(page, tmp_path)
    assert shown.startswith("a\n<!-- file scanners -->\n\n| model | file | ModelScan ")
    assert shown.endswith(" |\n\n<!-- end -->\nb\n<!-- other -->\nkept\n<!-- end -->\n")
    assert readme_tables.in_page(shown, tmp_path) == shown


def test_the_short_table_counts_what_its_lines_say(tmp_path: Path) -> None:
    planted = {"plant": (3,), "attack_success": 1.0, "targets": (3,)}
    write(
        tmp_path,
        "scan-population",
        result("m-0", "mnist-badnets", 0.001, data="mnist", **planted),
        result("m-1", "mnist-badnets", 0.3, data="mnist", **planted),
        result("m-2", "mnist-badnets", 0.001, data="mnist", **planted | {"attack_success": 0.5}),
        result("a-0", "mnist-all-to-all", 0.4, data="mnist", **planted),
        result("c-0", "mnist-clean", 0.5, data="mnist"),
        result("c-1", "gtsrb-clean", 0.02, data="gtsrb"),
    )
    write(
        tmp_path,
        "null",
        result("n-0", "mnist-clean", 0.05, data="mnist"),
        result("n-1", "gtsrb-clean-further", 0.06, data="gtsrb"),
        result("n-2", "mnist-repeated", 0.01, data="mnist"),
    )
    counts = {
        line.about: line.count(readme_tables.read(line.suite, tmp_path)) for line in readme_tables.LINES
    }
    assert {about: (one.successes, one.n) for about, one in counts.items()} == {
        "planted patch, clothes": (0, 0),
        "planted patch, digits": (1, 2),
        "planted patch, traffic signs": (0, 0),
        "source-specific or all-to-all patch": (0, 1),
        "clean, same data": (1, 2),
        "clean, 2 to 43 classes": (1, 2),
    }
    assert "| planted patch, digits | 1 of 2 found | 1.3 % to 98.7 % |\n" in readme_tables.table(
        "results", tmp_path
    )


def test_the_short_table_names_groups_that_there_are() -> None:
    for line in readme_tables.LINES:
        assert set(line.groups) <= {group.name for group in get_suite(line.suite).groups("cpu")}


@pytest.mark.parametrize("name", readme_tables.PAGES)
def test_a_table_without_results_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.json cannot be read"):
        readme_tables.table(name, tmp_path)


@pytest.mark.parametrize("name", readme_tables.PAGES)
def test_pages_show_the_committed_results(name: str) -> None:
    page = readme_tables.PAGES[name].read_text(encoding="utf-8")
    assert readme_tables.marks(name).search(page), f"the page marks the place of {name}"
    assert readme_tables.in_page(page) == page, "run `make docs`"


def test_results_by_an_earlier_calibration_set_are_said_to_be(tmp_path: Path) -> None:
    def page(*label: str) -> str:
        row = result("x", "mnist-clean", 0.04, data="mnist")
        write(tmp_path, "null", row, **({"calibration": label} if label else {}))
        write(tmp_path, "scan-population", row)
        short = readme_tables.table("results", tmp_path)
        long = readme_tables.in_page(PAGE, tmp_path)
        assert (readme_tables.EARLIER in short) == (readme_tables.EARLIER in long)
        return long

    assert readme_tables.EARLIER in page("0123 (7 clean models)")
    assert readme_tables.EARLIER in page("0123 (7 clean models)", results.calibration_label(shipped()))
    assert readme_tables.EARLIER not in page(results.calibration_label(shipped()))
    assert readme_tables.EARLIER not in page()


@pytest.mark.parametrize("suite", readme_tables.SUITES)
def test_committed_results_are_whole_and_claims_are_judged_by_the_shipped_calibration(suite: str) -> None:
    held = readme_tables.read(suite)
    assert bool(held.made_with.get("calibration")) == get_suite(suite).scans
    if suite in readme_tables.SHORT:
        readme = (readme_tables.ROOT / "README.md").read_text(encoding="utf-8")
        told = readme_tables.EARLIER in readme
        assert readme_tables.is_current(held) or told, f"export {suite} again, or say that it is of before"
    assert [one.trial for one in held.results] == sorted(t.name for t in expand(get_suite(suite), "cpu"))
    assert {one.status for one in held.results} == {"done"}
