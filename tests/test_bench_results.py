"""Tables: every number is counted by hand here, on results made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from bench_examples import clean, planted, result, suite, trials
from doorward.bench import page, results, summary, tables
from doorward.bench.fingerprints import fingerprint
from doorward.bench.outcome import Outcome, Truth
from doorward.bench.results import Result, Results
from doorward.bench.store import Row, Store
from doorward.bench.suite import Claim, Data, Group, Suite, Trial, World
from doorward.bench.summary import Summary, measure, summarise
from doorward.core.errors import InputError
from doorward.core.records import Observations, SubjectRecord
from doorward.methods.source import score_code
from doorward.scan.environment import environment
from doorward.stats.metrics import rate
from test_scan_calibration import calibration, drawn, measured, model


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
SUITE = suite(clean(4), planted(5), planted(1, name="hard", excluded_from_claims=True), claims=CLAIMS)
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
    Result(trial="planted-06", group="planted", status="missing", data="", architecture="small-cnn"),
    Result(
        trial="planted-07",
        group="planted",
        status="failed",
        data="",
        architecture="small-cnn",
        error="killed",
    ),
)
SUMMARY = summarise(SUITE, RESULTS)


def test_groups_are_counted() -> None:
    row, hard = SUMMARY.groups
    assert (row.group, hard.group) == ("planted", "hard"), "clean models stand beside the planted ones"
    assert row.excluded == {"planted-05": 0.89}
    for counted, successes, n in (
        (row.exact_target, 1, 5),
        (row.flagged, 3, 5),
        (row.false_alarms, 2, 4),
        (row.planted_unknown, 1, 5),
        (row.clean_unknown, 1, 4),
        (hard.exact_target, 1, 1),
        (hard.false_alarms, 2, 4),
    ):
        assert (counted.successes, counted.n) == (successes, n)
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


def test_a_scan_of_a_planted_model_is_stable_if_the_target_is_the_same_too() -> None:
    scans = [
        plant(f"p-0{i}-seed{seed}-draw0", p, targets, success, group="p", model=str(i), seed=seed)
        for i, success, said in (
            (0, 1.0, ((0.001, (3,)), (0.02, (3,)))),
            (1, 1.0, ((0.001, (3,)), (0.001, (3, 4)))),
            (2, 1.0, ((0.001, (3, 4)), (0.001, (4, 3)))),
            (3, 1.0, ((0.001, (3,)), (0.3, ()))),
            (4, 0.5, ((0.001, (3,)), (0.3, ()))),
        )
        for seed, (p, targets) in enumerate(said)
    ]
    assert (measure("stable", scans).successes, measure("stable", scans).n) == (2, 4), "4 did not take"
    whole = planted(5, name="p")
    groups = (whole, planted(5, name="again", first_of="p", seeds=2, excluded_from_claims=True))
    again = [one.model_copy(update={"group": "again"}) for one in scans]
    summary = summarise(suite(clean(1), *groups), held(*again))
    assert [row.group for row in summary.groups] == ["p"], (
        "repeated scans have no line but in their own table"
    )
    (row,) = summary.stability
    assert (row.group, row.scans, row.same.successes, row.same.n) == ("again", 2, 2, 4)
    assert row.changed == {
        "p-01-seed0-draw0": {"suspicious towards 3": 1, "suspicious towards 3 and 4": 1},
        "p-03-seed0-draw0": {"suspicious towards 3": 1, "nothing found": 1},
    }
    said = "p-01: 1 suspicious towards 3, 1 suspicious towards 3 and 4; p-03: 1 suspicious towards 3, "
    assert f"| again | 2 | 2 of 4 (6.8 % to 93.2 %) | {said}1 nothing found |" in tables.to_markdown(summary)
    assert "p-03: 1 suspicious towards 3, 1 nothing found" in page.render(summary)


def test_clean_models_are_counted_by_number_of_classes_and_by_data() -> None:
    counts = {2: 0.01, 3: 0.05, 9: None, 10: 0.5, 20: 0.5, 21: 0.04, 100: 0.5}
    results = [
        result(f"clean-{k}", "clean", p, classes=k, data="mnist" if k > 9 else "gtsrb")
        for k, p in counts.items()
    ]
    excluded_from_claims = result("apart-0", "apart", 0.01)
    groups = (clean(7), clean(1, name="apart", excluded_from_claims=True))
    summary = summarise(suite(*groups), held(*results, excluded_from_claims))
    shown = [
        (row.name, row.models, row.alarms_at_5.successes, row.alarms_at_1.successes, row.unknown.successes)
        for row in summary.buckets
    ]
    assert shown == [
        ("2", 1, 1, 1, 0),
        ("3 to 9", 2, 1, 0, 1),
        ("10 to 20", 2, 0, 0, 0),
        ("21 to 100", 2, 1, 0, 0),
    ]
    assert "apart-0" not in summary.clean
    assert [
        (row.name, row.models, row.alarms_at_5.successes, row.unknown.n) for row in summary.data_sets
    ] == [
        ("gtsrb", 3, 2, 3),
        ("mnist", 4, 1, 4),
    ]
    assert summary.histogram == (3, 0, 0, 0, 3, 0, 0, 0, 0, 0)


def test_p_values_are_spread_over_parts_that_hold_their_upper_ends() -> None:
    values = [i / 20 for i in range(1, 21)]
    assert summary.spread(values, 10) == (2,) * 10
    assert summary.spread([0.0, *values], 20) == (2, *(1,) * 19)
    assert summary.spread([0.1000001], 10) == (0, 1, *(0,) * 8)
    assert summary.spread([], 10) == ()


MARKDOWN = """\
**Tiny.** Small.

13 trials at scale smoke: 11 done, 1 missing, 1 failed.

| claim | source | ours |  |
| --- | --- | --- | --- |
| right target | our bar | 1 of 5 (0.5 % to 71.6 %) | **not reached** |
| clean ones | A paper, 2024 | 3 of 4 (19.4 % to 99.4 %) | **not reached** |
| just a figure | A paper, 2024 | 3 of 5 (14.7 % to 94.7 %) |  |

| group | right target | planted flagged | clean flagged | could not tell | AUROC | one scan |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def test_the_markdown_table_is_as_it_was() -> None:
    text = tables.to_markdown(SUMMARY)
    assert text.startswith(MARKDOWN)
    head, row, hard, _, *notes = text.removeprefix(MARKDOWN[:-1]).split("\n")
    assert head == ""
    assert row.split(" | ")[:5] == [
        "| planted",
        "1 of 5 (0.5 % to 71.6 %)",
        "3 of 5 (14.7 % to 94.7 %)",
        "2 of 4 (6.8 % to 93.2 %)",
        "2 of 9",
    ]
    assert row.endswith(" | 2.0 s (1.0 MB) |")
    assert hard.startswith("| hard | 1 of 1 (2.5 % to 100 %) |")
    assert [note for note in notes if note] == [
        "Counts with 95 % intervals (Clopper and Pearson). Could-not-tell counts as not flagged. "
        "Time and memory are medians.",
        "The clean models of a line are those of the same data. AUROC is that of the p-value.",
        "Left out of the claims, since meant to be harder: hard.",
        "Not counted, since the attack did not take (attack success below 90 %): planted-05 (89.0 %).",
        "Made with torch 2.13.",
    ]


def test_a_suite_says_from_what_success_on_a_plant_counts() -> None:
    found = [
        plant("planted-00", 0.001, (3,), success=0.85, least_success=0.8),
        plant("planted-01", 0.001, (3,), success=0.75, least_success=0.8),
    ]
    assert [one.excluded for one in found] == [False, True]
    text = tables.to_markdown(summarise(suite(clean(1), planted(2)), held(*found)))
    assert "(attack success below 80 %): planted-01 (75.0 %)" in text


def test_alarms_are_held_against_the_bar_for_every_number_of_classes() -> None:
    """Of 29 without an alarm the bound is 1 - .05 ** (1 / 29) = .098, of 28 it is .101."""

    def said(count: int) -> str:
        made = [result(f"clean-{i:02}", "clean", 0.5) for i in range(count)]
        return " ".join(tables.notes(summarise(suite(clean(count)), held(*made))))

    assert "with every number of classes: reached." in said(29)
    assert "with every number of classes: not reached with 10 to 20 classes." in said(28)


def test_clean_suites_have_no_columns_of_planted_models() -> None:
    summary = summarise(suite(clean(1)), held(result("clean-00", "clean", 0.5)))
    text = tables.to_markdown(summary)
    assert "| group | clean flagged | could not tell | one scan |" in text
    line = "1 | 0 of 1 (0 % to 97.5 %) | 95.0 % | 0 of 1 (0 % to 97.5 %) | 0 of 1 (0 % to 97.5 %) |"
    assert f"| 10 to 20 | {line}" in text
    assert f"| fashion_mnist | {line}" in text
    assert "| models | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "P-values of 1 clean models. If well calibrated, about 0.1 lie in each tenth" in text


def test_what_is_special_about_a_group_is_said() -> None:
    groups = (
        clean(1, name="a", about="x | y", class_counts=(3, 9)),
        clean(1, name="b", class_counts=(2,), robust={"eps": 1}),
    )
    text = tables.to_markdown(summarise(suite(*groups), held(result("a-00", "a", 0.5))))
    assert "\n| a (x \\| y, 3 to 9 classes) | 0 of 1 " in text
    assert "\n| b (2 classes, adversarially trained) |" in text


def test_a_suite_without_results_is_shown_as_such() -> None:
    summary = summarise(SUITE, held(*(r.model_copy(update={"status": "missing"}) for r in RESULTS.results)))
    assert summary.trials == {"done": 0, "missing": 13}
    assert "13 trials at scale smoke: 13 missing." in tables.to_markdown(summary)
    for text in (tables.to_markdown(summary), page.render(summary)):
        assert "Nothing has been measured yet" in text
        assert "our bar" not in text
    assert tables.to_csv(summary).count("\n") == 3
    json.loads(tables.to_json(summary))


def test_the_csv_has_one_number_a_cell() -> None:
    first, _ = csv.DictReader(io.StringIO(tables.to_csv(SUMMARY)))
    assert (first["group"], first["exact_target_count"], first["exact_target_n"]) == ("planted", "1", "5")
    assert float(first["exact_target_high"]) == pytest.approx(0.7164, abs=1e-4)
    assert (first["excluded"], first["median_seconds"]) == ("1", "2.0")
    assert None not in first


def test_the_json_comes_back() -> None:
    assert Summary.model_validate_json(tables.to_json(SUMMARY)) == SUMMARY


def test_results_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    path = results.write_results(RESULTS, tmp_path / "new")
    assert path.name == "tiny-smoke.json"
    assert results.read_results(path) == RESULTS
    first = path.read_bytes()
    results.write_results(RESULTS, tmp_path / "new")
    assert path.read_bytes() == first
    assert len(first.splitlines()) == 13 + 2, "a line for each trial"
    precise = held(result("clean-00", "clean", 1 / 3))
    assert results.read_results(results.write_results(precise, tmp_path)).results[0].p_value == 0.333333


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), ("{}", "holds no results"), ("nonsense", "holds no results")]
)
def test_a_bad_results_file_is_named(content: str | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=why):
        results.read_results(file)


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
    bad = result("x", "clean", status="failed", verdict=None, error=name)
    text = page.render(summarise(suite(clean(1)), held(bad)))
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_every_group_of_every_suite_has_a_line_or_stands_beside_one() -> None:
    from doorward.bench.suite import get_suite, suite_names

    for name in suite_names():
        if not get_suite(name).scans:  # each line is one of planted models; their twins need no group
            assert all(g.attack for groups in get_suite(name).scales.values() for g in groups)
            continue
        for groups in get_suite(name).scales.values():
            shown = [g for g in groups if summary._has_row(g, groups)]
            beside = [
                g
                for g in groups
                if g not in shown and any(summary._is_clean_side(g, other) for other in shown)
            ]
            again = [g for g in groups if g.first_of]
            assert all(g.repeated for g in again)
            assert len(shown) + len(beside) + len(again) == len(groups)
            planted_ones: list[Group] = [g for g in shown if g.attack is not None]
            if name not in ("tuning", "attacks", "training-data", "imbalanced-data"):  # planted models alone
                assert all(any(summary._is_clean_side(c, g) for c in groups) for g in planted_ones)


def test_summarise_ignores_groups_that_are_gone() -> None:
    one: Suite = suite(clean(1))
    summary = summarise(one, held(result("old-00", "old", 0.01), result("clean-00", "clean", 0.5)))
    assert summary.groups[0].false_alarms.n == 1
    assert summary.clean == ("clean-00",)


# --- concluding again --------------------------------------------------------------------------------


MARGIN = measured(0.0, name="max-margin")


def scanned(trial: Trial, score: float, code: str | None = None, fingerprint: str | None = None) -> Row:
    """Return a row of a clean model of 12 classes.

    Args:
        code: of the detector that gives the score, when it was scanned.
        fingerprint: of that detector, then.
    """
    spec = {"channels": 1, "height": 28, "width": 28}
    seen = Observations(
        subject=SubjectRecord(path="m", format="memory", classes=tuple("abcdefghijkl"), spec=spec),
        measurements=(measured(score, code=code), MARGIN),
        environment=environment("cpu"),
    )
    truth = Truth(classes=12, clean_accuracy=rate(9, 10))
    outcome = Outcome(truth=truth, seen=seen, cached=True, trained=1.0, seconds=2.0, peak_memory=None)
    return Row(
        key=trial.name,
        suite=trial.suite,
        scale=trial.scale,
        trial=trial.name,
        status="done",
        seed=trial.seed,
        given=trial.model_dump(mode="json"),
        resolved={
            "model": {"of": trial.name},
            "judging": {"detectors": [{"name": "neural-cleanse", "code": fingerprint}]},
        },
        device="cpu",
        threads=1,
        result=outcome.model_dump(mode="json"),
    )


def per_class(score: float) -> dict[str, list[float | None]]:
    """Return what `scanned` holds, by detector and class."""
    return {one.detector: list(one.per_class.values()) for one in (measured(score), MARGIN)}


@contextmanager
def stored(folder: Path, *rows: Row) -> Iterator[Store]:
    with closing(Store(f"sqlite:///{folder / 'results.sqlite'}")) as store:
        for row in rows:
            store.put(row)
        yield store


def test_what_is_shown_is_concluded_by_the_calibration_that_is_given(tmp_path: Path) -> None:
    one = suite(clean(1))
    (trial,) = trials(clean(1))
    low, high = calibration(drawn(400)), calibration([model(12, 100.0 + i) for i in range(200)])
    with stored(tmp_path, scanned(trial, 50.0)) as store:
        (flagged,), (usual,), (unknown,) = (
            results.collect(one, "smoke", store, held_).results for held_ in (low, high, calibration([]))
        )
        made = [results.collect(one, "smoke", store, held_).made_with["calibration"] for held_ in (low, high)]
        with_shipped = results.collect(one, "smoke", store).made_with["calibration"]
    assert (flagged.verdict, flagged.targets) == ("suspicious", (3,))
    assert flagged.p_value is not None
    assert flagged.p_value <= 0.05
    compared = low.compare(per_class(50.0))
    assert compared is not None
    assert flagged.p_value == compared.p_value
    assert (usual.verdict, usual.targets) == ("nothing_found", ())
    assert usual.detectors["neural-cleanse"].verdict == "nothing_found"
    assert usual.detectors["neural-cleanse"].p_value == 1.0
    assert (unknown.verdict, unknown.p_value) == ("could_not_tell", None)
    few = "too few clean models with 12 classes, or about as many, were scanned"
    assert unknown.reason == "; ".join(
        f"{name} is not calibrated: {few}" for name in ("neural-cleanse", "max-margin")
    )
    assert [label.partition(" ")[2] for (label,) in made] == ["(400 clean models)", "(200 clean models)"]
    assert made[0] != made[1]
    assert with_shipped == (results.calibration_label(results.shipped_for(one)),)


def test_a_calibration_is_named_by_its_content() -> None:
    first, second = drawn(9), drawn(9, seed=1)
    label = results.calibration_label(calibration(first))
    assert label.endswith(" (9 clean models)")
    assert results.calibration_label(calibration(list(first))) == label
    assert results.calibration_label(calibration(second)) != label
    assert results.calibration_label(calibration(first, max_margin=0.5)) != label
    plain = calibration(first)
    for other in (
        {"settings": plain.settings | {"max-margin": {"steps": 7}}},
        {"code": {"max-margin": "of another version"}},
    ):
        assert results.calibration_label(plain.model_copy(update=other)) != label


@pytest.mark.parametrize("how", ["same code", "same results", "other results"])
def test_a_change_of_code_that_leaves_results_alone_costs_no_verdict(how: str, tmp_path: Path) -> None:
    """A calibration names the code of today, a stored scan that of the day it was made."""
    (trial,) = trials(clean(1))
    now = score_code("doorward.detectors.model.neural_cleanse")
    calibrated = calibration(drawn(400)).model_copy(update={"code": {"neural-cleanse": now}})
    code = now if how == "same code" else "earlier"
    then = "earlier" if how == "other results" else fingerprint("detector neural-cleanse")
    with stored(tmp_path, scanned(trial, 50.0, code, then)) as store:
        (found,) = results.collect(suite(clean(1)), "smoke", store, calibrated).results
    alarm = how != "other results"
    assert (found.detectors["neural-cleanse"].p_value is not None) == alarm
    assert found.verdict == ("suspicious" if alarm else "nothing_found")


def test_no_model_is_judged_by_clean_models_of_its_own_data(tmp_path: Path) -> None:
    names = ("glyphs-hard", "shapes", "mnist")
    groups = [
        clean(1, name=name, data=Data(name=name, rows=100, world=None if name == "mnist" else World()))
        for name in names
    ]
    kept = {
        "glyphs": [m.model_copy(update={"data": "glyphs"}) for m in drawn(200)],
        "glyphs-hard": [m.model_copy(update={"data": "glyphs-hard"}) for m in drawn(200, seed=1)],
        "shapes": [m.model_copy(update={"data": "shapes"}) for m in drawn(200, seed=2)],
    }
    whole = calibration([m for part in kept.values() for m in part])
    rows = [scanned(trial, 3.0) for trial in trials(*groups)]
    with stored(tmp_path, *rows) as store:
        held_ = results.collect(suite(*groups), "smoke", store, whole)
    expected = {
        "glyphs-hard": calibration(kept["shapes"]),
        "shapes": calibration(kept["glyphs"] + kept["glyphs-hard"]),
        "mnist": whole,
    }
    found = {one.data: one.p_value for one in held_.results}
    for name, rest in expected.items():
        compared = rest.compare(per_class(3.0))
        assert compared is not None
        assert found[name] == compared.p_value
    assert len(set(found.values())) == 3
    assert held_.left_out == ("glyphs", "shapes")
    said = "which are left out of its calibration (glyphs, shapes)."
    assert said in tables.to_markdown(summarise(suite(*groups), held_))


def test_a_stored_scan_that_this_version_does_not_understand_is_named(tmp_path: Path) -> None:
    (trial,) = trials(clean(1))
    row = scanned(trial, 1.0)
    assert row.result is not None
    row.result["seen"]["no_such_field"] = 1
    with (
        stored(tmp_path, row) as store,
        pytest.raises(InputError, match="holds a result of clean-00 that this version does not understand"),
    ):
        results.collect(suite(clean(1)), "smoke", store)


def test_a_published_rule_has_columns_of_its_own() -> None:
    def flags(one: Result, *classes: int) -> Result:
        outcome = one.detectors["max-margin"].model_copy(update={"published_flags": classes})
        return one.model_copy(update={"detectors": {"max-margin": outcome}})

    plants = [
        result(f"planted-0{i}", "planted", 0.01, plant=(3,), attack_success=1.0, targets=(3,))
        for i in range(3)
    ]
    cleans = [result(f"clean-0{i}", "clean", 0.5) for i in range(2)]
    declared = suite(clean(2), planted(3))
    ruled = (
        flags(plants[0], 3),
        flags(plants[1], 3, 5),
        flags(plants[2]),
        flags(cleans[0], 1),
        flags(cleans[1]),
    )
    told = summarise(declared, held(*ruled))
    (row,) = told.groups
    assert (row.published.successes, row.published.n) == (1, 3)
    assert (row.published_alarms.successes, row.published_alarms.n) == (1, 2)
    assert "| published rule: right target | published rule: clean flagged |" in tables.to_markdown(told)
    assert "published rule: clean flagged" in page.render(told)
    assert "published rule" not in tables.to_markdown(summarise(declared, held(*plants, *cleans)))
