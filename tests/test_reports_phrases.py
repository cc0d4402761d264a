"""What reports say in words: the ATLAS table, the numbers, the sentences, the exit code."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import fields
from itertools import pairwise

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from doorward.cli.app import app
from doorward.core import formatting
from doorward.core.errors import InputError
from doorward.core.records import SEVERITY, Rate, Report
from doorward.methods import registry
from doorward.models import LoadOptions
from doorward.reports import atlas, exit_codes, next_steps, phrases
from doorward.reports.chart import ALL_BARS, TOP, per_class_chart
from doorward.scan.request import ScanRequest
from report_examples import EXAMPLES, HOSTILE, backdoored, nothing_found, suspicious, unsafe

METHODS = [(kind, name) for kind in registry.ROOMS for name in registry.modules(kind)]


# MITRE ATLAS


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_atlas_id_that_a_method_names_is_in_the_table(kind: registry.MethodKind, name: str) -> None:
    for identifier in registry.get(kind, name).atlas:
        assert atlas.lookup(identifier).id == identifier


def test_a_technique_has_name_tactics_and_address() -> None:
    entry = atlas.lookup("AML.T0018.000")
    assert (entry.name, entry.title) == ("Poison AI Model", "Manipulate AI Model: Poison AI Model")
    assert entry.tactics == ("Persistence", "AI Attack Staging")
    assert entry.url == "https://atlas.mitre.org/techniques/AML.T0018.000"
    assert atlas.lookup("AML.M0008").url == "https://atlas.mitre.org/mitigations/AML.M0008"


def test_the_table_is_whole() -> None:
    for identifier, entry in atlas.ENTRIES.items():
        assert re.fullmatch(r"AML\.(T\d{4}(\.\d{3})?|M\d{4})", identifier)
        assert entry.name
        assert bool(entry.tactics) == identifier.startswith("AML.T")
        assert entry.tactics == atlas.lookup(identifier[:9]).tactics, (
            "a sub-technique has its technique's tactics"
        )
    assert list(atlas.ENTRIES) == sorted(atlas.ENTRIES, key=lambda i: (i[4] == "M", i)), (
        "in order, none twice"
    )


def test_an_unknown_atlas_id_raises() -> None:
    with pytest.raises(InputError, match=r"'AML\.T9999' is no technique"):
        atlas.lookup("AML.T9999")


# Strings and numbers


@given(st.text())
def test_plain_text_holds_nothing_that_acts(text: str) -> None:
    shown = formatting.plain(text)
    acting = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"}.isdisjoint(acting)
    assert formatting.plain(shown) == shown
    assert formatting.plain(text, lines=True).count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["", "Kleid", "Übergröße 5 €", "スニーカー", "👩‍🔬", "ردا", "a\\x1b"])
def test_plain_text_leaves_honest_text_alone(text: str) -> None:
    assert formatting.plain(text) == text


@given(st.integers(1, 100_000), st.data())
def test_percent_is_exact_at_the_ends_alone(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n) | st.sampled_from([0, 1, n - 1, n]))
    text = formatting.percent(k / n)
    assert (text == "0 %") == (k == 0)
    assert (text == "100 %") == (k == n)
    assert "100.0" not in text
    assert not text.startswith("0.0")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (0.00099, "< 0.1 %"),
        (0.001, "0.1 %"),
        (0.972, "97.2 %"),
        (0.99901, "> 99.9 %"),
        (1.0, "100 %"),
    ],
)
def test_percent(value: float, text: str) -> None:
    assert formatting.percent(value) == text


def test_a_rate_carries_its_count_and_interval() -> None:
    rate = Rate(successes=1999, n=2000, value=0.9995, low=0.9972, high=0.99999)
    assert formatting.rate(rate) == "> 99.9 % (1,999 of 2,000; 95 % interval 99.7 % to > 99.9 %)"


def test_a_trigger_counts_as_evidence_only_where_its_detector_raises_the_alarm() -> None:
    # a picture strong enough sends images to any class, so its success alone says nothing
    report = backdoored()
    one = next(c for c in report.confirmations if c.target in report.targets)
    silent = next(f.detector for f in report.findings if not f.flagged)
    before = phrases.facts(report)
    assert any(f.detector == one.detector for f in report.findings if f.flagged)
    assert any(one.detector in fact.detail for fact in before)
    more = report.model_copy(
        update={"confirmations": (*report.confirmations, one.model_copy(update={"detector": silent}))}
    )
    assert phrases.facts(more) == before


@pytest.mark.parametrize(
    ("p", "words"),
    [
        (0.42, "42 in 100"),
        (0.01, "1 in 100"),
        (0.0033, "3 in 1,000"),
        (0.0005, "5 in 10,000"),
        (0.00001, "fewer than 1 in 10,000"),
        (1.0, "100 in 100"),
    ],
)
def test_a_p_value_in_natural_frequencies(p: float, words: str) -> None:
    alarm = backdoored().model_copy(update={"p_value": p, "confirmations": ()})
    _, sure = phrases.facts(alarm)
    start = words if words.startswith("fewer") else f"about {words}"
    assert (sure.label, sure.detail) == (
        "How sure",
        f"{start} clean models would look at least as suspicious",
    )
    (fact,) = phrases.facts(nothing_found().model_copy(update={"p_value": p, "confirmations": ()}))
    assert (fact.label, fact.value.lower()) == ("Compared with clean models", f"{words} look as suspicious")
    assert "not how sure the verdict is" in fact.detail, "p = .79 is not 79 % sure"


def test_several_triggers_for_one_class_are_one_fact() -> None:
    report = backdoored()
    (one,) = report.confirmations
    worse = one.success.model_copy(update={"successes": 200, "value": 0.8, "low": 0.745, "high": 0.848})
    other = one.model_copy(update={"detector": "max-margin", "success": worse})
    both = (other, one, one.model_copy(update={"success": worse}))  # two of one detector
    *_, fact = phrases.facts(report.model_copy(update={"confirmations": both}))
    assert len(phrases.facts(report.model_copy(update={"confirmations": both}))) == 3
    assert (fact.label, fact.value) == ("On unseen images", "97.2 %")
    assert "the trigger that neural-cleanse recovered" in fact.detail
    assert "2 detectors name this class" in fact.detail
    assert fact.detail.endswith("recovered triggers too: max-margin (80.0 %)")


def test_an_uncalibrated_p_value_promises_nothing() -> None:
    report = backdoored().model_copy(update={"calibrated": False})
    sure = {fact.label: fact for fact in phrases.facts(report)}["How sure"]
    assert sure.value == "p = 0.0033, uncalibrated"
    assert "not been measured" in sure.detail
    assert " in 1,000" not in sure.detail


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (10**15, "1000.0 TB")]
)
def test_size(count: int, text: str) -> None:
    assert formatting.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "< 0.1 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (3601, "60 min 1 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert formatting.duration(seconds) == text


def test_many_targets_are_counted() -> None:
    names = tuple("abcdefgh")
    assert formatting.with_noun(tuple(range(7)), names).endswith("4 (e) and 2 more")
    assert formatting.with_noun(tuple(range(8)), names) == "all 8 classes"
    assert formatting.class_label(99, names) == "99"


# The verdict


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_sentence_calls_a_model_clean_or_safe(name: str) -> None:
    report = EXAMPLES[name]()
    said = [phrases.TITLES[report.verdict], phrases.explanation(report), *phrases.caveats(report)]
    said += [step.text for step in next_steps.next_steps(report)]
    text = " ".join(said).lower()
    assert "model is clean" not in text
    assert "no backdoor" not in text
    assert "not mean that the model is safe" in text or "safe." not in text


def test_every_verdict_has_its_words() -> None:
    assert set(phrases.TITLES) == set(SEVERITY)
    for name, make in EXAMPLES.items():
        report = make()
        assert phrases.explanation(report).endswith("."), name
        assert len(next_steps.next_steps(report)) >= 3
        assert phrases.caveats(report)


def first_steps(report: Report) -> str:
    return " ".join(f"{step.text} {step.command}" for step in next_steps.next_steps(report))


def test_next_steps_fit_the_report() -> None:
    assert "Do not deploy" in first_steps(backdoored())
    assert "doorward verify report.json" in first_steps(backdoored())
    assert "Do not load" in first_steps(unsafe())
    assert "--clean" not in first_steps(nothing_found())
    assert "--clean" in first_steps(nothing_found().model_copy(update={"data": ()}))
    assert "--clean" not in first_steps(unsafe())
    assert "did not run" in first_steps(nothing_found())
    assert "did not run" not in first_steps(nothing_found().model_copy(update={"not_run": ()}))
    doubt = EXAMPLES["could_not_tell"]()
    assert "Nothing stated range, mean, std, layout" in first_steps(doubt)
    assert "at least 20 for each class" in first_steps(doubt).lower()
    assert "Nothing stated" not in first_steps(
        nothing_found().model_copy(update={"verdict": "could_not_tell"})
    )


def test_a_path_in_a_command_is_quoted() -> None:
    report = suspicious()
    assert report.subject
    bad = report.model_copy(update={"subject": report.subject.model_copy(update={"path": "a b; rm -r c\n"})})
    commands = [step.command for step in next_steps.next_steps(bad) if step.command]
    assert "doorward scan 'a b; rm -r c\\n' --clean data/fashion:test --seed 1" in commands


def test_a_command_scans_the_model_as_it_was_scanned() -> None:
    problem = ScanRequest(
        model="models/signs.pt2",
        detectors=("neural-cleanse", "max-margin"),
        device="cuda",
        time_budget=60.5,
        images=2000,
        factory="my package:build",
        weights="w.pt",
        label_column="fine",
        options=LoadOptions(
            mean=(0.5, 0.25), labels=("a b", "c"), size=(3, 32, 32), input_range=(0.0, 255.0)
        ),
    )
    report = suspicious().model_copy(update={"request": problem.to_json()})
    more, again, keep = (step.command for step in next_steps.next_steps(report) if step.command)
    stated = (
        "--factory 'my package:build' --weights w.pt --size 3,32,32 --input-range 0,255 --mean 0.5,0.25 "
        "--labels 'a b,c' --label-column fine --detector neural-cleanse --detector max-margin --device cuda "
        "--time-budget 60.5"
    )
    start = f"doorward scan models/signs.pt2 --clean data/fashion:test {stated}"
    assert more == f"{start} --images 8000"
    assert again == f"{start} --images 2000 --seed 1"
    assert keep == "doorward verify report.json --factory 'my package:build'"


def test_commands_know_every_option_and_its_default() -> None:
    known = {name: default for name, (_, default) in phrases.SCAN_OPTIONS.items()}
    request = {field.name: field.default for field in fields(ScanRequest)}
    options = {field.name: field.default for field in fields(LoadOptions)}
    told_otherwise = {"model", "clean", "train", "folder", "options"}
    assert known == {
        name: default for name, default in (request | options).items() if name not in told_otherwise
    }
    flags = {flag for flag, _ in phrases.SCAN_OPTIONS.values()}
    commands = typer.main.get_command(app).commands
    assert flags <= {flag for param in commands["scan"].params for flag in param.opts}
    mending = {flag for flag, _ in phrases.REPAIR_OPTIONS.values()}
    assert mending == flags & {flag for param in commands["repair"].params for flag in param.opts} - {"--set"}


def test_a_class_that_stands_out_by_doubted_scores_is_no_good_sign() -> None:
    report = suspicious()
    told = tuple(
        one.model_copy(update={"doubt": "unknown", "reason": "unknown", "verdict": "could_not_tell"})
        for one in report.findings
    )
    open_question = report.model_copy(update={"verdict": "could_not_tell", "findings": told})
    assert "a class stands out" in next_steps.next_steps(open_question)[0].text


def test_no_command_names_a_model_in_memory() -> None:
    report = suspicious()
    assert report.subject
    subject = report.subject.model_copy(update={"path": "<memory>"})
    there = report.model_copy(update={"subject": subject, "request": {}})
    assert not [step.command for step in next_steps.next_steps(there) if step.command]
    assert next_steps.next_steps(there)[-1].text == "Keep this report."


def test_more_clean_images_are_asked_for_by_what_was_there() -> None:
    report = suspicious()
    data = report.data[0]

    def step(**changes: int) -> str:
        return first_steps(report.model_copy(update={"data": (data.model_copy(update=changes),)}))

    assert (
        "used 2,000 of 10,000. doorward scan models/signs.pt2 --clean data/fashion:test --images 8000"
        in step()
    )
    assert "--images 2100" in step(rows=2100)
    assert "This scan had 2,000. doorward scan models/signs.pt2 --clean DATA" in step(rows=2000)
    assert (
        "used 200 of 10,000. doorward scan models/signs.pt2 --clean data/fashion:test --images 860"
        in step(used=200)
    ), "20 for each of 43 classes"
    assert "At least 20 for each class" in step(used=200, rows=859)
    assert "At least 20 for each class" in first_steps(report.model_copy(update={"data": ()}))


def test_poisoned_samples_are_to_be_removed() -> None:
    finding = suspicious().findings[0].model_copy(update={"kind": "poison", "flagged_ids": ("aa", "bb")})
    report = backdoored().model_copy(update={"findings": (finding,), "subject": None})
    assert "Do not train on this data." in first_steps(report)
    assert "Remove the 2 flagged samples" in first_steps(report)


@pytest.mark.parametrize("verdict", SEVERITY)
@pytest.mark.parametrize("fail_on", ["suspicious", "backdoored", "never"])
def test_exit_codes(verdict: phrases.Verdict, fail_on: str) -> None:
    table = {  # as the design lists them
        "nothing_found": (0, 0, 0),
        "could_not_tell": (3, 3, 0),
        "suspicious": (1, 0, 0),
        "backdoored": (1, 1, 0),
        "unsafe": (1, 1, 0),
    }
    assert (
        exit_codes.exit_code(verdict, fail_on)
        == table[verdict][["suspicious", "backdoored", "never"].index(fail_on)]
    )


# The chart


def test_the_chart_of_ten_classes() -> None:
    finding = backdoored().findings[1]
    chart = per_class_chart(finding, tuple("abcdefghij"))
    assert chart
    assert chart.strip is None
    assert [bar.value for bar in chart.bars[:3]] == ["7.13", "1.30", "0.70"]
    assert [bar.label for bar in chart.bars if bar.target] == ["3 (d)"]
    # by hand: the axis goes from -0.9 to 7.13, zero is at 0.9 / 8.03, the threshold 2 at 2.9 / 8.03
    assert (chart.bars[0].start, chart.bars[0].end) == (11.21, 100.0)
    assert (chart.bars[-1].start, chart.bars[-1].end) == (11.21, 0.0)
    assert chart.threshold == 36.11
    assert [bar.above for bar in chart.bars] == [True] + [False] * 9


def test_the_chart_of_many_classes_shows_the_top_and_all_in_a_strip() -> None:
    finding = EXAMPLES["thousand_classes"]().findings[0]
    chart = per_class_chart(finding, ())
    assert chart
    assert chart.strip
    assert len(chart.bars) == TOP
    assert (len(chart.strip.ticks), chart.scored, chart.unscored) == (900, 900, 100)
    assert [tick.place for tick in chart.strip.ticks if tick.target] == [100.0]
    scores = sorted((s for s in finding.per_class.values() if s is not None), reverse=True)
    assert [float(bar.value) for bar in chart.bars] == pytest.approx(scores[:TOP], abs=0.005)


def test_a_target_among_many_always_has_a_bar() -> None:
    finding = EXAMPLES["thousand_classes"]().findings[0]
    scores = finding.per_class | {417: -9.0}
    chart = per_class_chart(finding.model_copy(update={"per_class": scores}), ())
    assert chart
    assert [bar.label for bar in chart.bars if bar.target] == ["417"]
    assert len(chart.bars) == TOP + 1 <= ALL_BARS


def test_a_class_without_a_score_says_why() -> None:
    finding = EXAMPLES["suspicious"]().findings[0]
    chart = per_class_chart(finding, ())
    assert chart
    assert (chart.bars[-1].label, chart.bars[-1].end) == ("5", None)
    assert chart.bars[-1].value == "no clean image of another class"
    assert (chart.scored, chart.unscored) == (42, 1)


@pytest.mark.parametrize(
    ("per_class", "threshold"),
    [({0: 0.0, 1: 0.0}, None), ({0: 0.0}, 0.0), ({0: -1e-9, 1: 5e8}, 2.0), ({0: 3.0}, None)],
)
def test_degenerate_charts(per_class: dict[int, float], threshold: float | None) -> None:
    finding = backdoored().findings[1].model_copy(update={"per_class": per_class, "threshold": threshold})
    chart = per_class_chart(finding, ())
    assert chart
    places = [place for bar in chart.bars for place in (bar.start, bar.end)]
    assert all(place is not None and 0 <= place <= 100 for place in places)


def test_no_scores_no_chart() -> None:
    finding = backdoored().findings[1].model_copy(update={"per_class": {0: None}})
    assert per_class_chart(finding, ()) is None
    assert per_class_chart(finding.model_copy(update={"per_class": {}}), ()) is None


@given(st.dictionaries(st.integers(0, 99), st.none() | st.floats(-1e12, 1e12), min_size=1, max_size=99))
def test_charts_of_any_scores_are_in_order(per_class: dict[int, float | None]) -> None:
    finding = backdoored().findings[1].model_copy(update={"per_class": per_class, "targets": ()})
    chart = per_class_chart(finding, ())
    if chart is None:
        assert all(score is None for score in per_class.values())
        return
    ends = [bar.end for bar in chart.bars if bar.end is not None]
    assert all(a >= b for a, b in pairwise(ends))
    assert chart.scored + chart.unscored == len(per_class)


def test_hostile_class_names_are_made_plain_in_charts() -> None:
    chart = per_class_chart(EXAMPLES["hostile"]().findings[0], HOSTILE)
    assert chart
    assert not any("\x1b" in bar.label or "\n" in bar.label for bar in chart.bars)
