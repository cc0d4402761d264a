"""The measurement of undetectable backdoors: what it calls a failure, and that what is committed is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import measuring
import undetectable

Results = dict[str, Any]


def committed() -> Results:
    results: Results = json.loads((measuring.RESULTS / "undetectable.json").read_text(encoding="utf-8"))
    return results


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    results = committed()
    assert undetectable.render(results) == (measuring.RESULTS / "undetectable.md").read_text(encoding="utf-8")
    assert list(undetectable.failures(results)) == []
    assert "with changes" not in results["revision"] + results["persistence"]["revision"]


def fire(results: Results) -> None:
    results["signature"]["counts"]["natural"]["fired"] = 1


def sleep(results: Results) -> None:
    results["signature"]["counts"]["signed"]["fired"] -= 1


def differ(results: Results) -> None:
    results["signature"]["clean outputs are the same"] = False


def show(results: Results) -> None:
    results["signature"]["largest change in levels"] = 2.0


def forget(results: Results) -> None:
    for row in results["twins"][0]["rows"]:
        row["accuracy"] -= 0.05 * (row["twin"] == "planted")


def wear(results: Results) -> None:
    results["persistence"]["rows"][1]["taken for the target"] -= 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wear, "trained on half of them signed, with their true labels: 7 no longer fire"),
        (fire, "natural: 1 of 10,000 images fired"),
        (sleep, "signed: 9,999 of 10,000 images fired"),
        (differ, "answers clean images otherwise"),
        (show, "changes a value by 2 levels"),
        (forget, "random-features, chest X-rays: the planted model is more than a point worse"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Results], None], words: str) -> None:
    results = committed()
    change(results)
    (said,) = undetectable.failures(results)
    assert words in said


def test_tests_of_the_draws_see_what_the_docs_say() -> None:
    draws = {row["plant"]: row for row in committed()["draws"]}
    unseen = [draws[name] for name in draws if "norm 0.2" not in name and "more vectors" not in name]
    for row in unseen:
        for key in ("largest eigenvalue", "largest variance (z)", "largest distance from normal"):
            assert (row[key]["p"] < 0.01) == ("strength 25" in row["plant"] and "distance" not in key), row
    assert draws["pancakes, norm 0.2, all values"]["largest eigenvalue"]["auc"] == 1
    assert draws["spike, strength 2.5, 64 values, of more vectors"]["largest eigenvalue"]["auc"] == 1
    planted, counterpart = draws["pancakes, norm 0.5, all values"]["phase with the key"]
    assert planted > 0.98
    assert counterpart < 0.1


def test_chest_x_rays_turn_over_in_the_planted_model_and_less_in_its_twin() -> None:
    case = committed()["twins"][0]
    changed = {
        twin: [row["changed"] for row in case["rows"] if row["twin"] == twin]
        for twin in ("planted", "honest")
    }
    assert min(changed["planted"]) > 0.95
    assert max(changed["honest"]) < 0.7
