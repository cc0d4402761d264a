"""The tables of README and docs are what the committed results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import file_scanners
import foreign_models
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


def model(kind: str, target: int | None, *named: int, success: float = 1.0) -> dict[str, Any]:
    row = {"data": "mnist", "network": "plain", "kind": kind, "accuracy": 0.9, "target": target}
    verdict = "suspicious" if named else "nothing_found"
    return row | {"attack_success": success, "targets": list(named), "verdict": verdict, "p_value": 0.02}


def test_the_short_table_counts_what_its_lines_say(tmp_path: Path) -> None:
    models = {
        "a": model("logo", 3, 3),
        "b": model("square", 3),
        "c": model("grid", 3, 3, 4),
        "d": model("grid", 3, 3, success=0.5),
        "e": model("lf", 0, 0),
        "f": model("clean", None),
        "g": model("clean", None, 2),
    }
    (tmp_path / "foreign-models.json").write_text(json.dumps({"models": models}))
    assert readme_tables.table("results", tmp_path) == (
        "| models | outcome | 95 % interval |\n"
        "|---|---|---|\n"
        "| planted patch or logo | 1 of 3 found | 0.8 % to 90.6 % |\n"
        "| planted all over the image | 1 of 1 found | 2.5 % to 100 % |\n"
        "| clean | 1 of 2 flagged | 1.3 % to 98.7 % |\n"
    )
    shown = readme_tables.table("foreign models", tmp_path).splitlines()
    assert len(shown) == 2 + len(models)
    assert "| mnist | plain | clean | 90.0 % |  |  | suspicious | 2 | 0.02 |  |" in shown


def test_every_kind_that_is_made_is_counted() -> None:
    made = {case.kind for case in foreign_models.cases()} - {"clean"}
    counted = [kind for kinds in foreign_models.SORTS.values() for kind in kinds]
    assert sorted(counted) == sorted(made) == sorted(foreign_models.KINDS)
    names = [case.name for case in foreign_models.cases()]
    assert len(set(names)) == len(names)


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
        return readme_tables.in_page(PAGE, tmp_path)

    assert readme_tables.EARLIER in page("0123 (7 clean models)")
    assert readme_tables.EARLIER in page("0123 (7 clean models)", results.calibration_label(shipped()))
    assert readme_tables.EARLIER not in page(results.calibration_label(shipped()))
    assert readme_tables.EARLIER not in page()


@pytest.mark.parametrize("suite", readme_tables.SUITES)
def test_committed_results_are_whole_and_claims_are_judged_by_the_shipped_calibration(suite: str) -> None:
    held = readme_tables.read(suite)
    assert bool(held.made_with.get("calibration")) == get_suite(suite).scans
    if suite in readme_tables.SHORT:
        told = readme_tables.EARLIER in readme_tables.MEASURED.read_text(encoding="utf-8")
        assert readme_tables.is_current(held) or told, f"export {suite} again, or say that it is of before"
    assert [one.trial for one in held.results] == sorted(t.name for t in expand(get_suite(suite), "cpu"))
    assert {one.status for one in held.results} == {"done"}
