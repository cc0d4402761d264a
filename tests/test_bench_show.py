"""Tables: every number is counted by hand here, on results made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from bench_examples import clean, planted, result, suite
from doorward.bench import page, show
from doorward.bench.show import Result, Results, Summary, measure, summarise
from doorward.bench.suite import Claim, Group, Suite
from doorward.errors import InputError


def held(*results: Result) -> Results:
    return Results(suite="tiny", scale="smoke", made_with={"torch": ("2.13",)}, results=results)


def plant(
    name: str, p: float | None, found: tuple[int, ...] = (), success: float = 1.0, **more: object
) -> Result:
    group = str(more.pop("group", "planted"))
    return result(name, group, p, plant=(3,), attack_success=success, targets=found, **more)


CLAIMS = (
    Claim(text="right target", source="our bar", measure="exact_target", at_least=0.5),
    Claim(text="clean ones", source="A paper, 2024", measure="clean_wrong", at_most=0.2),
    Claim(text="just a figure", source="A paper, 2024", measure="flagged"),
)
SUITE = suite(clean(4), planted(5), planted(1, name="hard", apart=True), claims=CLAIMS)
RESULTS = held(
    result("clean-00", "clean", 0.04),
    result("clean-01", "clean", 0.6),
    result("clean-02", "clean", None),
    result("clean-03", "clean", 0.008, seconds=10.0, peak_memory=9_000_000),
    plant("planted-00", 0.001, (3,)),
    plant("planted-01", 0.02, (3, 5)),
    plant("planted-02", 0.03, (4,)),
    plant("planted-03", 0.5),
    plant("planted-04", None),
    plant("planted-05", 0.001, (3,), success=0.89),
    plant("hard-00", 0.001, (3,), group="hard"),
    Result(trial="planted-06", group="planted", status="missing", architecture="small-cnn"),
    Result(trial="planted-07", group="planted", status="failed", architecture="small-cnn", error="killed"),
)
SUMMARY = summarise(SUITE, RESULTS)


def test_groups_are_counted() -> None:
    row, hard = SUMMARY.groups
    assert (row.group, hard.group) == ("planted", "hard"), "clean models stand beside the planted ones"
    assert row.excluded == {"planted-05": 0.89}
    for rate, successes, n in (
        (row.exact_target, 1, 5),
        (row.flagged, 3, 5),
        (row.false_alarms, 2, 4),
        (row.planted_unknown, 1, 5),
        (row.clean_unknown, 1, 4),
        (hard.exact_target, 1, 1),
        (hard.false_alarms, 2, 4),
    ):
        assert (rate.successes, rate.n) == (successes, n)
    assert row.seconds == 2.0
    assert row.peak_memory == 1_000_000


def test_rankings_are_those_of_scikit_learn() -> None:
    (row, _) = SUMMARY.groups
    p = [0.04, 0.6, 1, 0.008, 0.001, 0.02, 0.03, 0.5, 1]
    planted_ones = [False] * 4 + [True] * 5
    assert row.by_score.auroc == pytest.approx(roc_auc_score(planted_ones, [-value for value in p]))
    scored = [(1 - value, is_planted) for value, is_planted in zip(p, planted_ones, strict=True) if value < 1]
    expected = roc_auc_score([y for _, y in scored], [s for s, _ in scored])
    assert row.by_detector["max-margin"].auroc == pytest.approx(expected)


def test_claims_are_pooled_and_judged() -> None:
    right, wrong, figure = SUMMARY.claims
    assert (right.ours.successes, right.ours.n, right.reached) == (1, 5, False)
    assert (wrong.ours.successes, wrong.ours.n, wrong.reached) == (3, 4, False), (
        "could-not-tell counts against"
    )
    assert (figure.ours.successes, figure.ours.n, figure.reached) == (3, 5, None)


@pytest.mark.parametrize(
    ("at_least", "at_most", "reached"),
    [(0.2, None, True), (0.21, None, False), (None, 0.2, True), (None, 0.19, False), (None, None, None)],
)
def test_a_bar_is_reached_where_it_is_met(
    at_least: float | None, at_most: float | None, reached: bool | None
) -> None:
    claim = Claim(text="x", source="y", measure="exact_target", at_least=at_least, at_most=at_most)
    (row,) = summarise(SUITE.model_copy(update={"claims": (claim,)}), RESULTS).claims
    assert row.ours.value == 0.2
    assert row.reached is reached


def test_a_claim_can_name_its_groups() -> None:
    claim = Claim(text="x", source="y", measure="exact_target", groups=("hard",))
    (row,) = summarise(SUITE.model_copy(update={"claims": (claim,)}), RESULTS).claims
    assert (row.ours.successes, row.ours.n) == (1, 1)


def test_alarms_are_counted_by_p_value() -> None:
    results = [result(str(i), "clean", p) for i, p in enumerate((0.01, 0.0101, 0.05, 0.0501, 1.0, None))]
    assert [measure("alarm_at_5", results).successes, measure("alarm_at_5", results).n] == [3, 5]
    assert [measure("alarm_at_1", results).successes, measure("alarm_at_1", results).n] == [1, 5]
    assert [measure("could_not_tell", results).successes, measure("could_not_tell", results).n] == [1, 6]


def test_one_scan_of_each_model_counts_and_all_tell_whether_it_is_stable() -> None:
    results = [
        result("a-0", "clean", 0.5, model="a"),
        result("a-1", "clean", 0.01, model="a", seed=1),
        result("a-2", "clean", 0.5, model="a", draw=1),
        result("b-0", "clean", 0.5, model="b"),
        result("b-1", "clean", 0.9, model="b", seed=1),
        result("c", "clean", 0.5, model="c"),
    ]
    assert (measure("stable", results).successes, measure("stable", results).n) == (1, 2)
    assert measure("alarm_at_5", results).n == 3
    assert measure("alarm_at_5", results).successes == 0


def test_clean_models_are_counted_by_number_of_classes() -> None:
    counts = {2: 0.01, 3: 0.05, 9: None, 10: 0.5, 20: 0.5, 21: 0.04, 100: 0.5}
    results = [result(f"clean-{k}", "clean", p, classes=k) for k, p in counts.items()]
    apart = result("apart-0", "apart", 0.01)
    groups = (clean(7), clean(1, name="apart", apart=True))
    summary = summarise(suite(*groups), held(*results, apart))
    shown = [
        (row.classes, row.models, row.alarms_at_5.successes, row.alarms_at_1.successes, row.unknown.successes)
        for row in summary.buckets
    ]
    assert shown == [
        ("2", 1, 1, 1, 0),
        ("3 to 9", 2, 1, 0, 1),
        ("10 to 20", 2, 0, 0, 0),
        ("21 to 100", 2, 1, 0, 0),
    ]
    assert "apart-0" not in summary.clean


MARKDOWN = """\
**Tiny.** Small.

13 trials at scale smoke: 11 done, 1 missing, 1 failed.

| claim | source | ours (95 % interval) | |
|---|---|---|---|
| right target | our bar | 1 of 5 (0.5 % to 71.6 %) | **not reached** |
| clean ones | A paper, 2024 | 3 of 4 (19.4 % to 99.4 %) | **not reached** |
| just a figure | A paper, 2024 | 3 of 5 (14.7 % to 94.7 %) |  |

| group | right target | planted flagged | clean flagged | could not tell | AUROC | seconds | memory |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def test_the_markdown_table_is_as_it_was() -> None:
    text = show.to_markdown(SUMMARY)
    assert text.startswith(MARKDOWN)
    head, row, hard, _, note = text.removeprefix(MARKDOWN[:-1]).split("\n")[:5]
    assert head == ""
    assert row.split(" | ")[:5] == [
        "| planted",
        "1 of 5 (0.5 % to 71.6 %)",
        "3 of 5 (14.7 % to 94.7 %)",
        "2 of 4 (6.8 % to 93.2 %)",
        "2 of 9",
    ]
    assert row.endswith(" | 2.0 | 1.0 MB |")
    assert hard.startswith("| hard | 1 of 1 (2.5 % to 100 %) |")
    assert note == (
        "Not counted, since the attack did not take (attack success below 90 %): planted-05 (89.0 %)."
    )


def test_clean_suites_have_no_columns_of_planted_models() -> None:
    summary = summarise(suite(clean(1)), held(result("clean-00", "clean", 0.5)))
    text = show.to_markdown(summary)
    assert "| group | clean flagged | could not tell | seconds | memory |" in text
    assert (
        "| 10 to 20 | 1 | 0 of 1 (0 % to 97.5 %) | 0 of 1 (0 % to 97.5 %) | 0 of 1 (0 % to 97.5 %) |" in text
    )


def test_a_suite_without_results_is_shown_as_such() -> None:
    summary = summarise(SUITE, held(*(r.model_copy(update={"status": "missing"}) for r in RESULTS.results)))
    assert summary.trials == {"done": 0, "missing": 13}
    assert "13 trials at scale smoke: 13 missing." in show.to_markdown(summary)
    assert "| right target | our bar |  | not measured |" in show.to_markdown(summary)
    assert "not measured" in page.render(summary)
    assert show.to_csv(summary).count("\n") == 3
    json.loads(show.to_json(summary))


def test_the_csv_has_one_number_a_cell() -> None:
    first, _ = csv.DictReader(io.StringIO(show.to_csv(SUMMARY)))
    assert (first["group"], first["exact_target_count"], first["exact_target_n"]) == ("planted", "1", "5")
    assert float(first["exact_target_high"]) == pytest.approx(0.7164, abs=1e-4)
    assert (first["excluded"], first["median_seconds"]) == ("1", "2.0")
    assert None not in first


def test_the_json_comes_back() -> None:
    assert Summary.model_validate_json(show.to_json(SUMMARY)) == SUMMARY


def test_results_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    path = show.write_results(RESULTS, tmp_path / "new")
    assert path.name == "tiny-smoke.json"
    assert show.read_results(path) == RESULTS
    first = path.read_bytes()
    show.write_results(RESULTS, tmp_path / "new")
    assert path.read_bytes() == first
    assert len(first.splitlines()) == 13 + 2, "a line for each trial"
    precise = held(result("clean-00", "clean", 1 / 3))
    assert show.read_results(show.write_results(precise, tmp_path)).results[0].p_value == 0.333333


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), ("{}", "holds no results"), ("nonsense", "holds no results")]
)
def test_a_bad_results_file_is_named(content: str | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=why):
        show.read_results(file)


def test_the_roc_is_that_of_scikit_learn() -> None:
    clean_scores, planted_scores = [0.1, 0.4, 0.4, 0.2], [0.4, 0.8, 0.35, 0.9, 0.9]
    labels = [0] * 4 + [1] * 5
    fpr, tpr, _ = roc_curve(labels, clean_scores + planted_scores, drop_intermediate=False)
    found = page.roc(clean_scores, planted_scores)
    assert [x for x, _ in found] == pytest.approx(fpr)
    assert [y for _, y in found] == pytest.approx(tpr)


def test_scores_are_laid_out() -> None:
    (row, _) = SUMMARY.groups
    done = {one.trial: one for one in RESULTS.results}
    verdict, detector = page.scores(row, [done[name] for name in row.counted])
    assert (verdict.low, verdict.high) == ("p = 1", "p = 0.001")
    assert verdict.planted == pytest.approx(
        (0, *(100 * math.log10(p) / -3 for p in (0.5, 0.03, 0.02, 0.001))), abs=0.01
    )
    assert verdict.limits == pytest.approx([100 * math.log10(p) / -3 for p in (0.05, 0.01)], abs=0.01)
    assert verdict.curve.startswith("0.00,100.00 ")
    assert verdict.curve.endswith(" 100.00,0.00")
    assert detector.name == "Score of max-margin"
    assert len(detector.clean) == 3
    assert min(detector.clean + detector.planted) == 0
    assert max(detector.clean + detector.planted) == 100


def test_the_histogram_counts_alarms_in_its_first_bin() -> None:
    values = [0.004, 0.05, 0.051, 0.1, 0.5, 1.0]
    found = page.histogram([result(str(i), "clean", p) for i, p in enumerate(values)])
    assert found is not None
    assert found.models == sum(found.counts) == 6
    assert (found.counts[0], found.counts[1], found.counts[9], found.counts[19]) == (2, 2, 1, 1)
    assert found.heights[0] == 100
    assert found.heights[9] == 50
    assert page.histogram([result("0", "clean", None)]) is None


class Page(HTMLParser):
    """Collect tags, and whether all that is opened is closed."""

    VOID = frozenset({"meta", "link", "line", "path", "polyline", "rect", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = page.render(SUMMARY)
    found = Page(text)
    assert found.open == []
    names = [tag for tag, _ in found.tags]
    assert "script" not in names
    assert not re.search(r"https?://", text)
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    assert names.count("polyline") == 4, "verdict and detector of two groups"
    ticks = [a["class"] for tag, a in found.tags if tag == "line" and str(a.get("class")).startswith("tick")]
    assert ticks.count("tick planted") == 5 + 4 + 1 + 1
    assert "planted-07" in text
    assert "killed" in text


def test_strings_on_the_page_are_harmless() -> None:
    name = "<script>alert(1)</script>\x1b[2J\u202e"
    bad = Result(trial="x", group="clean", status="failed", architecture="small-cnn", error=name)
    text = page.render(summarise(suite(clean(1)), held(bad)))
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_every_group_of_every_suite_has_a_line_or_stands_beside_one() -> None:
    from doorward.bench.suite import get_suite, suite_names

    for name in suite_names():
        for groups in get_suite(name).scales.values():
            shown = [g for g in groups if show._has_row(g, groups)]
            beside = [
                g for g in groups if g not in shown and any(show._is_clean_side(g, other) for other in shown)
            ]
            assert len(shown) + len(beside) == len(groups)
            planted_ones: list[Group] = [g for g in shown if g.attack is not None]
            assert all(any(show._is_clean_side(c, g) for c in groups) for g in planted_ones)


def test_summarise_ignores_groups_that_are_gone() -> None:
    one: Suite = suite(clean(1))
    summary = summarise(one, held(result("old-00", "old", 0.01), result("clean-00", "clean", 0.5)))
    assert summary.groups[0].false_alarms.n == 1
    assert summary.clean == ("clean-00",)
