"""A calibration is made from stored scans of clean models; it holds for what they were scanned with."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench_examples import clean, trials, write_detector
from doorward import bundled
from doorward.bench.calibrate import calibration_of, calibration_trials
from doorward.bench.fingerprints import fingerprint
from doorward.bench.outcome import Outcome, Truth
from doorward.bench.plan import Sources, plan
from doorward.bench.store import Row
from doorward.bench.suite import Trial, expand, get_suite
from doorward.core.errors import InputError
from doorward.core.records import Measurement, NotRun, Observations, SubjectRecord
from doorward.data import InMemorySamples
from doorward.methods import registry
from doorward.methods.source import score_code
from doorward.scan.calibration import Calibration, CalibrationSet, ScoredModel, calibrations, shipped
from doorward.scan.environment import environment
from doorward.scan.examine import examine
from doorward.stats.metrics import rate
from doorward.training import TrainingSettings, train_classifier

MODULE = "doorward.detectors.model.max_margin"
SETTINGS = registry.build("detector", "max-margin", {}).settings()


def measured(scores: dict[int, float | None], **changes: object) -> Measurement:
    base = Measurement(
        detector="max-margin",
        level="model",
        kind="backdoor",
        summary="",
        per_class=scores,
        settings=SETTINGS,
        code=score_code(MODULE),
    )
    return base.model_copy(update=changes)


def row(trial: Trial, *measurements: Measurement, **changes: object) -> Row:
    """Return the row of a scan of a clean model of three classes."""
    seen = Observations(
        subject=SubjectRecord(
            path="m", format="memory", spec={"channels": 3, "height": 16, "width": 24, "layout": "NCHW"}
        ),
        measurements=measurements,
        not_run=() if measurements else (NotRun(detector="max-margin", reason="no better than chance"),),
        environment=environment("cpu"),
    )
    truth = Truth(classes=3, clean_accuracy=rate(12, 17))
    outcome = Outcome(truth=truth, seen=seen, cached=True, trained=1.0, seconds=2.0, peak_memory=None)
    base = Row(
        key=trial.name,
        suite=trial.suite,
        scale=trial.scale,
        trial=trial.name,
        status="done",
        seed=trial.seed,
        given=trial.model_dump(mode="json"),
        resolved={"model": {}, "judging": {"detectors": [{"name": "max-margin", "code": "old"}]}},
        versions={"torch": "2"},
        device="cpu",
        threads=1,
        result=outcome.model_dump(mode="json"),
    )
    return base.model_copy(update=changes)


ONE, TWO, THREE = trials(clean(3, architectures=("small-cnn", "vgg")))
FIRST = row(ONE, measured({0: 0.12345, 1: -2.0, 2: None}))


def test_a_calibration_holds_what_was_measured_and_by_what() -> None:
    other = measured({0: 9.0}).model_copy(update={"detector": "neural-cleanse"})
    mute = row(TWO, other, measured({}, reason="no class was reached"))
    found = calibration_of("max-margin", [FIRST, mute], weight=0.5, witness="another")
    assert found.witness == "another"
    assert (found.detector, found.weight, found.images) == ("max-margin", 0.5, 40)
    assert found.settings == registry.build("detector", "max-margin", {}).score_settings()
    assert found.code == score_code(MODULE)
    assert found.made_with == {"torch": "2"}
    first, second = found.models
    assert first.model_dump() == {
        "name": "clean-00",
        "data": "reference:fashion_mnist",
        "architecture": "small-cnn",
        "classes": 3,
        "shape": (3, 16, 24),
        "robust": False,
        "accuracy": 0.706,
        "scores": (0.123, -2.0, None),
    }
    assert (second.name, second.architecture, second.scores) == ("clean-01", "vgg", None)
    assert calibration_of("max-margin", [FIRST]).weight == 1.0


def test_scores_are_in_the_order_of_classes() -> None:
    """JSON has the numbers of classes as strings, of which "10" comes before "2"."""
    scores = {t: float(t) for t in (10, 2, 1, 0, *range(3, 10))}
    found = calibration_of("max-margin", [row(ONE, measured(scores))])
    assert found.models[0].scores == tuple(float(t) for t in range(11))


def test_a_robust_model_is_marked_as_such() -> None:
    (trial,) = trials(clean(1, robust={"eps": 0.1}))
    assert calibration_of("max-margin", [row(trial, measured({0: 1.0}))]).models[0].robust


def test_models_of_which_nothing_is_measured_are_left_out() -> None:
    """A model that is no better than chance is not examined; a trial that failed says nothing either."""
    failed = row(THREE, measured({0: 1.0}), status="failed", result=None, error="killed")
    found = calibration_of("max-margin", [FIRST, row(TWO), failed])
    assert [model.name for model in found.models] == ["clean-00"]
    with pytest.raises(InputError, match="no clean model has been scanned by max-margin"):
        calibration_of("max-margin", [row(TWO), failed])


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (row(TWO, measured({0: 1.0}), versions={"torch": "3"}), "by several versions; .* another --store"),
        (row(TWO, measured({0: 1.0}, code="other")), "by several versions"),
        (
            row(
                TWO.model_copy(update={"scan_settings": TWO.scan_settings.model_copy(update={"images": 41})}),
                measured({0: 1.0}),
            ),
            "by several versions",
        ),
        (
            row(TWO, measured({0: 1.0}, settings=SETTINGS | {"steps": 7})),
            "with other settings than max-margin has by default",
        ),
    ],
    ids=["versions", "code", "images", "settings"],
)
def test_scans_that_do_not_go_together_make_no_calibration(second: Row, why: str) -> None:
    with pytest.raises(InputError, match=why):
        calibration_of("max-margin", [FIRST, second])


def test_scans_by_code_of_the_same_results_go_together() -> None:
    detectors = [{"name": "max-margin", "code": fingerprint("detector max-margin")}]
    earlier = row(TWO, measured({0: 1.0}, code="earlier"), resolved={"judging": {"detectors": detectors}})
    assert calibration_of("max-margin", [FIRST, earlier]).code == score_code(MODULE)


def test_what_is_made_is_read_where_a_scan_looks_for_it(tmp_path: Path) -> None:
    made = calibration_of("max-margin", [FIRST])
    (tmp_path / "max-margin.json").write_text(made.to_text(), encoding="utf-8")
    assert Calibration.read(tmp_path / "max-margin.json") == made
    held = CalibrationSet.of([made])
    assert held.mismatch(measured({0: 1.0})) is None or "too few" in str(held.mismatch(measured({0: 1.0})))


# --- the trials --------------------------------------------------------------------------------------


def test_a_detector_is_calibrated_on_the_models_of_the_suite() -> None:
    ours, theirs = calibration_trials("max-margin", "cpu"), expand(get_suite("calibration"), "cpu")
    assert [t.name for t in ours] == [t.name for t in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [d.name for d in one.scan_settings.detectors or ()] == ["max-margin"]
        same = {"detectors": other.scan_settings.detectors}
        assert one.model_copy(update={"scan_settings": one.scan_settings.model_copy(update=same)}) == other
    assert all(t.attack is None for t in ours)
    assert [t.name for t in calibration_trials("max-margin", "cpu", "textures-*-00")] == ["textures-10-20-00"]


def test_the_scans_of_the_suite_serve_for_one_detector_alone() -> None:
    """Not the same scan, since that is by other detectors as well; but the same models."""
    sources = Sources(None)
    (one, *_), (other, *_) = (
        [plan(t, sources) for t in found]
        for found in (calibration_trials("max-margin", "smoke"), expand(get_suite("calibration"), "smoke"))
    )
    assert one.model_key == other.model_key
    assert one.key != other.key


def test_the_shipped_calibration_is_of_the_models_of_the_suite() -> None:
    drawn = {t.name: t for t in expand(get_suite("calibration"), "cpu")}
    held = shipped()
    assert {m.name for m in held.models} <= set(drawn)
    for model in held.models:
        trial = drawn[model.name]
        assert (model.data, model.architecture) == (trial.data.name, trial.architecture)
        assert model.robust == (trial.robust is not None)
        if trial.data.classes is not None:
            assert model.classes == len(trial.data.classes)
        if trial.data.world is not None:
            assert model.classes == trial.data.world.classes
            assert model.shape[1:] == (trial.data.world.size,) * 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nonsense", "there is no detector named 'nonsense'"),
        ("unsafe-code", "unsafe-code reads files; it measures no model and needs no calibration"),
    ],
)
def test_what_cannot_be_calibrated_is_named(name: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        calibration_trials(name, "smoke")


# --- a detector of somebody else's -------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Return the name of a detector in a file."""
    return write_detector(tmp_path)


def test_a_detector_in_a_file_is_calibrated_by_its_file(numbered: str) -> None:
    (trial, *_) = calibration_trials(numbered, "smoke")
    cls = registry.get("detector", numbered)
    one = plan(trial, Sources(None))
    (detector,) = one.resolved["judging"]["detectors"]
    assert (detector["name"], detector["settings"]) == (cls.method(), {"scale": 1.0})
    seen = measured({0: 1.0}, detector=cls.method(), settings={"scale": 1.0}, code=score_code(cls.__module__))
    found = calibration_of(numbered, [row(trial, seen)])
    assert (found.detector, found.settings) == (cls.method(), {"scale": 1.0})
    file = Path(numbered.rpartition(":")[0])
    place = file.parent / "calibration" / f"{cls.method()}.json"
    place.parent.mkdir()
    place.write_text(found.to_text(), encoding="utf-8")
    assert calibrations([cls.method()]).settings == {cls.method(): {"scale": 1.0}}


def test_a_scan_by_a_detector_in_a_file_is_concluded_by_the_calibration_next_to_it(numbered: str) -> None:
    """A measurement bears the detector's name alone, and not that of its file."""
    some = bundled.fashion_mnist("test").select(range(60))
    classifier = train_classifier("small-cnn", some, seed=0, settings=TrainingSettings(epochs=1)).classifier
    unlabelled = InMemorySamples(some.raw(range(60)), None)
    detector = registry.build("detector", numbered, {})
    seen = examine(classifier, unlabelled, detectors=[detector], images=40)
    assert seen.verdict == "could_not_tell"
    assert "has not been measured" in str(seen.reason)
    file = Path(numbered.rpartition(":")[0])
    place = file.parent / "calibration" / f"{detector.method()}.json"
    place.parent.mkdir()
    made = Calibration(
        detector=detector.method(),
        images=40,
        settings=detector.score_settings(),
        code=score_code(type(detector).__module__),
        models=[
            ScoredModel(
                name=str(i),
                data="a",
                architecture="small-cnn",
                classes=10,
                shape=(1, 28, 28),
                accuracy=0.9,
                scores=(i / 10 + 0.05,) * 10,
            )
            for i in range(200)
        ],
    )
    place.write_text(made.to_text(), encoding="utf-8")
    report = examine(classifier, unlabelled, detectors=[detector], images=40)
    assert (report.verdict, report.findings[0].uncalibrated) == ("nothing_found", None)
    # 110 of the 200 clean models score higher than 9, and the model itself counts as well
    assert report.p_value == 111 / 201
