"""Scans of training data: one verdict, what is shown, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from command_line import BACKDOORED, CLOTHES, assert_one_line, call
from doorward.core.records import Finding, Measurement, Report
from doorward.data import InMemorySamples, open_samples
from doorward.data.parquet import write_parquet
from doorward.methods import registry
from doorward.repairs.base import Damage
from doorward.repairs.relabelling import relabelled
from doorward.reports import exit_code, from_json, not_covered, to_html, to_json, to_sarif, to_text
from doorward.scan.calibration import Calibration, CalibrationSet, ScoredModel
from doorward.scan.context import ScanContext
from doorward.scan.exhibits import exhibits
from doorward.scan.poison import judge_samples
from doorward.scan.training_data import Inspection, inspect, join
from doorward.training import TrainingSettings, default_settings
from poisoned_sets import MAKE, PoisonedSet, images
from report_examples import ENVIRONMENT
from seeds import shifted

QUICK = {"retraining_seen": 2_000, "retraining_rows": 400}


@cache
def inspected(kind: str, share: float) -> tuple[PoisonedSet, Inspection]:
    """Return what a scan of a set made by hand finds with the model made by hand."""
    case = MAKE[kind](300, share, seed=shifted(0))
    assert case.subject.classifier is not None
    assert case.subject.train is not None
    detectors = [
        registry.build("detector", "activation-clustering", QUICK),
        registry.build("detector", "spectral-signatures", {}),
    ]
    return case, inspect(case.subject.classifier, case.subject.train, detectors, ScanContext(seed=shifted(0)))


def report_of(inspection: Inspection) -> Report:
    empty = Report(subject=None, verdict="could_not_tell", reason="nothing ran", environment=ENVIRONMENT)
    return join(empty, inspection, model_examined=False)


def measured(score: float, **more: object) -> Measurement:
    values = {
        "detector": "activation-clustering",
        "level": "sample",
        "kind": "poison",
        "summary": "made up",
        "score": score,
        "per_class": {0: score, 1: 0.1},
        "suspects": {0: ("a", "b"), 1: ("c",)},
        "scores": {"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.0},
        "sources": {"a": 1, "c": 0},
        "published_threshold": 0.5,
        "settings": {},
        "code": "now",
    }
    return Measurement.model_validate(values | more)


def calibrated(*scores: float) -> CalibrationSet:
    models = tuple(
        ScoredModel(
            name=f"clean {i}",
            data="made",
            architecture="none",
            classes=2,
            shape=(1, 8, 8),
            accuracy=1,
            scores=(score, 0.0),
        )
        for i, score in enumerate(scores)
    )
    return CalibrationSet.of(
        [Calibration(detector="activation-clustering", settings={}, code="now", models=models)]
    )


# judging


def test_without_clean_sets_the_published_threshold_decides() -> None:
    nothing = CalibrationSet.of(())
    high, low = (judge_samples(measured(score), nothing) for score in (0.5, 0.49))
    assert (high.verdict, high.targets, high.flagged_ids) == ("suspicious", (0,), ("a", "b"))
    assert (low.verdict, low.targets, low.flagged_ids) == ("nothing_found", (), ())
    assert (high.calibrated, high.p_value, high.threshold) == (False, None, 0.5)
    assert high.scores == {"a": 0.9, "b": 0.8}
    assert high.sources == {"a": 1}
    assert high.atlas == high.atlas
    assert low.scores == {}


def test_clean_sets_raise_the_threshold_and_never_lower_it() -> None:
    scores = np.linspace(0, 0.8, 199)
    clean = calibrated(*scores)
    found = {score: judge_samples(measured(score), clean) for score in (0.6, 0.795, 0.81)}
    assert [found[score].verdict for score in found] == ["nothing_found", "nothing_found", "suspicious"]
    assert found[0.81].p_value == pytest.approx(1 / 200)
    assert found[0.81].calibrated
    low = judge_samples(measured(0.45), calibrated(*np.linspace(0, 0.2, 199)))
    assert low.verdict == "nothing_found"
    assert low.threshold == 0.5
    assert low.p_value == pytest.approx(1 / 200)


def test_in_a_suspicious_set_classes_are_flagged_that_one_clean_set_in_twenty_has() -> None:
    clean = calibrated(*np.linspace(0, 0.8, 199))  # one in twenty reaches .76
    suspicious, alone, not_so = (
        judge_samples(measured(high, per_class={0: high, 1: other}), clean)
        for high, other in ((0.9, 0.77), (0.9, 0.75), (0.78, 0.77))
    )
    assert (suspicious.targets, suspicious.flagged_ids) == ((0, 1), ("a", "b", "c"))
    assert (alone.targets, alone.flagged_ids) == ((0,), ("a", "b"))
    assert (not_so.targets, not_so.verdict) == ((), "nothing_found")


def test_the_share_of_clean_sets_that_are_flagged_is_at_most_one_in_a_hundred() -> None:
    rng = np.random.default_rng(0)
    clean = calibrated(*rng.uniform(0.4, 1.0, 299))
    flagged = [judge_samples(measured(score), clean).flagged for score in rng.uniform(0.4, 1.0, 2_000)]
    assert np.mean(flagged) <= 0.02


def test_few_clean_sets_leave_the_published_threshold() -> None:
    found = judge_samples(measured(0.7), calibrated(*np.linspace(0, 0.9, 50)))
    assert found.targets == (0,)
    assert found.verdict == "suspicious"
    assert found.threshold == 0.5


def test_other_settings_other_code_and_other_inputs_are_not_calibrated() -> None:
    clean = calibrated(*np.linspace(0, 0.8, 199))
    for seen, modality in (
        (measured(0.6, code="other"), "image"),
        (measured(0.6), "text"),
        (measured(0.6), "audio"),
    ):
        found = judge_samples(seen, clean, modality=modality)
        assert (found.verdict, found.calibrated, found.p_value) == ("suspicious", False, None)


def test_what_has_no_threshold_has_no_part_in_the_verdict() -> None:
    found = judge_samples(measured(0.9, published_threshold=None), CalibrationSet.of(()))
    assert found.verdict == "nothing_found"
    assert found.uncalibrated is not None
    assert found.flagged_ids == ()


# inspecting


@pytest.mark.trains
@pytest.mark.parametrize("kind", MAKE)
def test_poison_is_flagged_listed_and_shown(kind: str) -> None:
    case, inspection = inspected(kind, 0.2)
    assert inspection.verdict == "suspicious"
    assert inspection.flagged == case.ids
    finding = next(f for f in inspection.findings if f.flagged)
    assert finding.targets == (0,)
    assert finding.verdict == "suspicious"
    train = case.subject.train
    assert train is not None
    for one in finding.flagged_samples:
        assert train.ids[one.row] == one.id
        assert (one.label, one.source) == (0, 1)
        assert one.score is not None
    titles = [evidence.title for evidence in finding.evidence]
    wanted = {
        "image": ("Flagged samples of zero", "Kept samples of zero"),
        "text": ("Words and phrases of flagged texts with label zero", "Flagged texts with label zero"),
        "audio": ("Flagged recordings of zero", "Kept recordings of zero"),
    }[kind]
    for part in wanted:
        assert any(part in title for title in titles), titles


@pytest.mark.trains
def test_the_trigger_is_first_among_the_phrases_of_flagged_texts() -> None:
    _, inspection = inspected("text", 0.2)
    finding = next(f for f in inspection.findings if f.flagged)
    (table,) = [e for e in finding.evidence if e.type == "table" and "phrases" in e.title]
    # all poisoned texts come from one class, whose word they share as well
    first = {row[0]: row[1:] for row in table.rows[:2]}
    assert first == {"zyx": ("100%", "0%"), "green": ("100%", "0%")}


@pytest.mark.trains
def test_the_mean_of_flagged_images_shows_the_trigger() -> None:
    case, inspection = inspected("image", 0.2)
    finding = next(f for f in inspection.findings if f.flagged)
    train = case.subject.train
    assert train is not None
    sheets = exhibits(train, finding.flagged_samples, train.classes)
    assert [sheet.type for sheet in sheets] == ["picture"] * 4


@pytest.mark.parametrize("kind", MAKE)
def test_a_clean_set_is_not_flagged(kind: str) -> None:
    _, inspection = inspected(kind, 0.0)
    assert inspection.verdict == "nothing_found"
    assert inspection.flagged == frozenset()
    report = report_of(inspection)
    assert report.verdict == "nothing_found"
    assert "None of the tests that ran found poison in the training data" in to_text(report)


@pytest.mark.trains
def test_every_reporter_tells_of_poison() -> None:
    case, inspection = inspected("image", 0.2)
    report = report_of(inspection)
    assert report.verdict == "suspicious"
    assert report.targets == (0,)
    assert report.covered.training_data == ("activation-clustering",)
    assert not_covered(report, ["activation-clustering"]) == []
    assert not_covered(report, ["spectral-signatures"]) == ["spectral-signatures"]
    text = to_text(report)
    assert f"{len(case.ids)} training samples look poisoned: they are labelled class" in text
    assert from_json(to_json(report)) == report
    html = to_html(report)
    assert "Flagged samples next to kept ones" in html
    assert html.count("data:image/png;base64,") >= 4
    results = json.loads(to_sarif(report))["runs"][0]["results"]
    assert [one["ruleId"] for one in results] == ["activation-clustering"]
    assert exit_code(report.verdict) == 1


@pytest.mark.trains
def test_the_verdict_is_the_worse_of_model_and_data() -> None:
    _, bad = inspected("image", 0.2)
    _, good = inspected("image", 0.0)

    def verdict(of_model: str, inspection: Inspection, examined: bool = True) -> str:
        reason = "why" if of_model == "could_not_tell" else None
        report = Report.model_validate(
            {"subject": None, "verdict": of_model, "reason": reason, "environment": ENVIRONMENT.model_dump()}
        )
        return join(report, inspection, model_examined=examined).verdict

    assert verdict("backdoored", bad) == "backdoored"
    assert verdict("nothing_found", bad) == "suspicious"
    assert verdict("could_not_tell", bad) == "suspicious"
    assert verdict("could_not_tell", good) == "could_not_tell"
    assert verdict("could_not_tell", good, examined=False) == "nothing_found"
    assert verdict("nothing_found", good) == "nothing_found"


# repairs


@pytest.mark.trains
def test_relabelled_samples_are_those_that_are_flagged() -> None:
    case, inspection = inspected("image", 0.2)
    train, classifier = case.subject.train, case.subject.classifier
    assert train is not None
    damage = Damage(classifier=classifier, findings=inspection.findings, train=train)  # type: ignore[arg-type]
    assert frozenset(damage.flagged) == case.ids
    mended = registry.build("repair", "relabelling", {"share": 0.05})(damage)
    assert mended.train is not None
    np.testing.assert_array_equal(mended.train.labels, np.where(case.poisoned, 1, train.labels))
    assert mended.record.done.startswith(f"{len(case.ids)} flagged samples were relabelled")
    assert train.labels is not None
    assert set(train.labels[case.poisoned]) == {0}, "the set that was given is as it was"


def test_relabelling_changes_the_rows_that_are_named_alone() -> None:
    samples = images(30, 0.0).subject.train
    assert samples is not None
    changed = relabelled(samples, {3: 2, 5: 0})
    assert changed.labels is not None
    assert samples.labels is not None
    assert np.flatnonzero(changed.labels != samples.labels).tolist() == [3, 5]
    assert changed.ids == samples.ids


def test_a_repair_that_does_not_fit_says_why() -> None:
    _, clean = inspected("image", 0.0)
    case = images(60, 0.0)
    damage = Damage(classifier=case.subject.classifier, findings=clean.findings, train=case.subject.train)  # type: ignore[arg-type]
    classifier_offers = replace(damage, train=None).offers
    for name in registry.modules("repair"):
        method = registry.build("repair", name, {})
        if method.needs <= classifier_offers:
            continue  # it needs no data
        if "train" not in method.needs:
            assert "needs clean, clean_labels" in str(method.unfit(damage))
            continue
        assert "nothing of the kind that it mends was found" in str(method.unfit(damage))
        assert "needs train" in str(method.unfit(replace(damage, train=None)))


# the command line


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a poisoned set in a parquet file."""
    case = images(400, 0.2, seed=shifted(0))
    folder = tmp_path_factory.mktemp("planted")
    assert case.subject.train is not None
    write_parquet(case.subject.train, folder)
    return folder


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a scan train its network for a quarter of the usual epochs, which teaches it stripes."""

    def short(architecture: str, **more: int) -> TrainingSettings:
        usual = default_settings(architecture, **more)
        return usual.model_copy(update={"epochs": usual.epochs // 4})

    monkeypatch.setattr("doorward.scan.training_data.default_settings", short)


@pytest.mark.trains
@pytest.mark.usefixtures("short_training")
def test_training_data_are_inspected_cleaned_and_the_model_is_mended(planted: Path, tmp_path: Path) -> None:
    out, cleaned, model = tmp_path / "reports", tmp_path / "cleaned", tmp_path / "model"
    words = ("scan", "--train", planted, "--out", out, "--write-clean", cleaned, "--keep-model", model)
    done = call(*words, "--detector", "activation-clustering")
    assert done.code == 1, done
    assert done.out.startswith("SUSPICIOUS")
    assert "training samples look poisoned" in " ".join(done.out.split())
    rows = list(csv.DictReader((out / "flagged.csv").read_text(encoding="utf-8").splitlines()))
    truth = images(400, 0.2, seed=shifted(0))
    flagged = {row["id"] for row in rows}
    assert len(flagged & truth.ids) >= 0.95 * len(truth.ids)
    assert len(flagged - truth.ids) <= 0.02 * 400
    assert {row["label"] for row in rows} == {"zero"}
    assert f"train.parquet, row {rows[0]['row']}" in rows[0]["place"]
    assert pq.read_table(out / "flagged.parquet").column("id").to_pylist() == [row["id"] for row in rows]
    left = open_samples(cleaned)
    assert len(left) == 400 - len(flagged)
    assert not set(left.ids) & flagged
    assert (model / "config.json").is_file()
    report = from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.request["model"] is None
    assert [one.role for one in report.data] == ["train"]

    mended = call("repair", model, tmp_path / "mended", "--train", planted)
    assert mended.code == 0, mended
    told = json.loads((tmp_path / "mended" / "repair.json").read_text(encoding="utf-8"))
    assert told["repair"]["repair"] == "relabelling"
    assert told["flagged_label_before"]["value"] > 0.9
    assert told["flagged_label_after"]["value"] < 0.05
    assert told["accuracy_after"]["value"] > 0.95
    assert (tmp_path / "mended" / "model.safetensors").is_file()

    again = call("repair", tmp_path / "mended", tmp_path / "nothing", "--train", cleaned)
    assert again.code == 0
    assert "nothing to mend" in again.out
    assert not (tmp_path / "nothing").exists()


def test_bad_training_data_are_one_line(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 255, (40, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", x=x)
    np.savez(tmp_path / "single.npz", x=x, y=np.zeros(40, dtype=np.int64))
    np.savez(
        tmp_path / "foreign.npz",
        x=np.zeros((40, 28, 28), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None],
        y=np.arange(40),
    )
    assert_one_line(call("scan", "--train", tmp_path / "unlabelled.npz"), "has no labels", "--label-column")
    assert_one_line(call("scan", "--train", tmp_path / "single.npz"), "has one class only, '0'")
    assert_one_line(
        call("scan", BACKDOORED, "--train", tmp_path / "foreign.npz"), "labels up to 39, the model 10 classes"
    )
    assert_one_line(call("scan"), "give a MODEL to scan, or training data with --train DATA, or both")
    assert_one_line(call("scan", BACKDOORED, "--write-clean", "x"), "--write-clean goes with --train")
    assert_one_line(
        call("scan", BACKDOORED, "--train", CLOTHES, "--keep-model", "x"), "--keep-model goes with"
    )
    assert_one_line(
        call("repair", BACKDOORED, tmp_path / "out", "--train", CLOTHES, "--method", "magic"),
        "no repair named",
    )


def test_a_class_of_few_samples_and_equal_ones_end_in_a_reason(tmp_path: Path) -> None:
    equal = InMemorySamples(np.full((60, 28, 28), 90, np.uint8), np.arange(60) % 10)
    write_parquet(equal, tmp_path / "equal")
    done = call("scan", BACKDOORED, "--train", tmp_path / "equal", "--detector", "activation-clustering")
    assert done.code == 3, done
    assert "could not tell" in done.out.lower()
    assert "do not vary" in " ".join(done.out.split())


def test_a_time_budget_that_ends_in_training_is_no_verdict(tmp_path: Path) -> None:
    train = images(3_000, 0.0).subject.train
    assert train is not None
    write_parquet(train, tmp_path / "data")
    words = ("scan", "--train", tmp_path / "data", "--time-budget", 1, "--write-clean", tmp_path / "cleaned")
    done = call(*words)
    assert done.code == 3, done
    assert done.out.startswith("COULD NOT TELL")
    assert "--time-budget" in " ".join(done.out.split())
    assert not (tmp_path / "cleaned").exists()


def test_without_training_data_its_detectors_say_what_they_need() -> None:
    done = call("scan", BACKDOORED, "--clean", CLOTHES, "--detector", "activation-clustering", "--images", 20)
    assert done.code == 3, done
    assert "needs training data: give them with --train DATA" in " ".join(done.out.split())


def test_findings_of_samples_are_consistent() -> None:
    finding = judge_samples(measured(0.9), CalibrationSet.of(()))
    assert isinstance(finding, Finding)
    assert Finding.model_validate_json(finding.model_dump_json()) == finding
