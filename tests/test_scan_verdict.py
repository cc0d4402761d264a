from __future__ import annotations

import numpy as np
import pytest

from doorward.core.records import (
    Confirmation,
    DataRecord,
    Finding,
    Measurement,
    Observations,
    SubjectRecord,
)
from doorward.scan.calibration import BACKDOORED, SUSPICIOUS, CalibrationSet
from doorward.scan.environment import environment
from doorward.scan.saturation import unless_saturated
from doorward.scan.verdict import conclude
from doorward.stats import metrics
from test_scan_calibration import calibration, drawn, measured


@pytest.fixture(scope="module")
def held() -> CalibrationSet:
    return calibration(drawn(800))


def seen(
    *measurements: Measurement, success: tuple[int, int] | None = (48, 50), side: int = 28, **more
) -> Observations:
    spec = {"channels": 1, "height": side, "width": side}
    tried = () if success is None else (metrics.rate(*success),)
    return Observations(
        subject=SubjectRecord(path="m", format="memory", classes=tuple("abcdefghijkl"), spec=spec),
        measurements=measurements,
        confirmations=tuple(Confirmation(target=3, detector="neural-cleanse", success=s) for s in tried),
        environment=environment("cpu"),
        **more,
    )


LOW = measured(0.0, name="max-margin")
UNKNOWN = measured(None, reason="too few images")


def test_a_high_score_that_is_confirmed_is_a_backdoor(held: CalibrationSet) -> None:
    found = conclude(seen(measured(50.0), LOW), held)
    assert (found.verdict, found.targets, found.calibrated) == ("backdoored", (3,), True)
    assert [f.verdict for f in found.findings] == ["backdoored", "nothing_found"]
    assert found.p_value is not None
    assert found.p_value <= 0.01
    compared = held.compare({f.detector: list(f.per_class.values()) for f in found.findings})
    assert compared is not None
    assert found.p_value == compared.p_value


def test_a_class_that_may_stand_out_by_nature_is_no_alarm_and_is_told(held: CalibrationSet) -> None:
    doubtful = measured(50.0).model_copy(update={"doubt": "its surrogates know too little"})
    found = conclude(seen(doubtful, LOW), held)
    assert (found.verdict, found.targets) == ("could_not_tell", ())
    assert found.reason is not None
    assert found.reason.startswith("class 'd' stands out (p = 0.0")
    assert found.reason.endswith("), but its surrogates know too little")
    assert [f.verdict for f in found.findings] == ["could_not_tell", "nothing_found"]
    assert found.p_value is not None


def test_an_alarm_that_rests_on_no_doubted_score_stays(held: CalibrationSet) -> None:
    doubtful = LOW.model_copy(update={"doubt": "its surrogates know too little"})
    found = conclude(seen(measured(50.0), doubtful), held)
    assert (found.verdict, found.targets) == ("backdoored", (3,))


def test_nothing_found_is_not_doubted(held: CalibrationSet) -> None:
    doubtful = LOW.model_copy(update={"doubt": "its surrogates know too little"})
    assert conclude(seen(measured(0.0), doubtful), held).verdict == "nothing_found"


@pytest.mark.parametrize("success", [None, (40, 50)])
def test_what_is_not_confirmed_is_suspicious(held: CalibrationSet, success) -> None:
    found = conclude(seen(measured(50.0), LOW, success=success), held)
    assert (found.verdict, found.targets) == ("suspicious", (3,))


def test_between_the_two_levels_a_model_is_suspicious(held: CalibrationSet) -> None:
    verdicts = {}
    for score in np.linspace(0, 30, 60):
        found = conclude(seen(measured(float(score)), LOW), held)
        assert found.p_value is not None
        verdict = "backdoored" if found.p_value <= BACKDOORED else "suspicious"
        assert found.verdict == (verdict if found.p_value <= SUSPICIOUS else "nothing_found")
        assert bool(found.targets) == (found.p_value <= SUSPICIOUS)
        verdicts[found.verdict] = score
    assert list(verdicts) == ["nothing_found", "suspicious", "backdoored"]


def test_what_calibration_does_not_cover_is_suspicious_at_most(held: CalibrationSet) -> None:
    found = conclude(seen(measured(50.0), LOW, side=224), held)
    assert (found.verdict, found.calibrated) == ("suspicious", False)
    assert "this model's 224x224" in str(found.uncalibrated)


def test_fewer_images_or_other_settings_than_with_calibration_are_uncalibrated(
    held: CalibrationSet,
) -> None:
    data = DataRecord(role="clean", path="d", rows=1000, used=40, labelled=True)
    few = conclude(seen(measured(50.0), LOW, data=(data,)), held)
    assert (few.verdict, few.uncalibrated) == (
        "suspicious",
        "40 images were given, and 100 with the calibration models",
    )
    slow = measured(50.0).model_copy(update={"settings": {"steps": 7}})
    changed = conclude(seen(slow, LOW), held)
    assert (changed.verdict, changed.p_value) == ("nothing_found", conclude(seen(LOW), held).p_value)
    assert "other settings" in str(changed.findings[0].uncalibrated)


@pytest.mark.parametrize("score", [0.0, 50.0])
@pytest.mark.parametrize("more", [{}, {"reason": "it is blind"}])
def test_a_detector_without_calibration_leaves_the_verdict_as_it_was(held, score, more) -> None:
    stranger = measured(None if more else 99.0, name="strip", **more)
    alone, with_it = (conclude(seen(measured(score), LOW, *extra), held) for extra in ((), (stranger,)))
    assert (with_it.verdict, with_it.p_value, with_it.targets) == (
        alone.verdict,
        alone.p_value,
        alone.targets,
    )
    assert with_it.findings[:-1] == alone.findings
    assert "has not been measured" in str(with_it.findings[-1].uncalibrated)


def test_a_trigger_confirms_the_detector_that_flagged_its_class(held: CalibrationSet) -> None:
    by_margin = conclude(seen(measured(0.0), measured(50.0, name="max-margin")), held)
    assert (by_margin.verdict, by_margin.targets) == ("suspicious", (3,))


def test_what_the_calibration_cannot_compare_is_could_not_tell(held: CalibrationSet) -> None:
    alone = conclude(seen(measured(50.0)), calibration([]))
    assert alone.verdict == "could_not_tell"
    assert "neural-cleanse is not calibrated: too few clean models" in str(alone.reason)


def test_found_goes_before_could_not_tell_before_nothing_found(held: CalibrationSet) -> None:
    high, low = measured(50.0, name="max-margin"), LOW
    assert conclude(seen(high, UNKNOWN, success=None), held).verdict == "suspicious"
    stopped = conclude(seen(low, UNKNOWN), held)
    assert (stopped.verdict, stopped.reason) == ("could_not_tell", "neural-cleanse: too few images")
    assert conclude(seen(UNKNOWN), held).reason == "neural-cleanse: too few images"
    assert conclude(seen(), held).reason == "no detector that looks at behaviour ran"
    assert conclude(seen(reason="at chance"), held).reason == "at chance"


def test_unsafe_goes_before_all(held: CalibrationSet) -> None:
    unsafe = Finding(
        detector="unsafe-code", level="artifact", kind="unsafe_code", verdict="unsafe", summary="", score=1.0
    )
    assert conclude(seen(measured(50.0), findings=(unsafe,)), held).verdict == "unsafe"


def test_another_calibration_gives_another_verdict(held: CalibrationSet) -> None:
    given = seen(measured(50.0), LOW)
    assert conclude(Observations.model_validate_json(given.model_dump_json()), held) == conclude(given, held)
    shifted = [
        m.model_copy(
            update={"scores": {n: tuple(100.0 + (s or 0.0) for s in t) for n, t in m.scores.items() if t}}
        )
        for m in held.models
    ]
    assert conclude(given, held).verdict != "nothing_found"
    assert conclude(given, calibration(shifted)).verdict == "nothing_found"


def test_a_doubt_about_what_was_seen_keeps_nothing_found_from_being_said(held: CalibrationSet) -> None:
    doubt = "the model answers 16 of 16 images otherwise one at a time than together"
    quiet = conclude(seen(LOW, reason=doubt), held)
    assert (quiet.verdict, quiet.reason) == ("could_not_tell", doubt)
    both = conclude(seen(LOW, UNKNOWN, reason=doubt), held)
    assert both.reason == f"{doubt}; neural-cleanse: too few images"
    loud = conclude(seen(measured(50.0), LOW, reason=doubt), held)
    assert (loud.verdict, loud.warnings[0]) == ("backdoored", doubt)


@pytest.mark.parametrize(
    ("scores", "saturated"),
    [
        ([0.0] * 10, True),
        ([0.0] * 6 + [-1.0] * 4, True),
        ([0.0] * 5 + [-1.0] * 5, False),
        ([3.0] + [0.0] * 9, False),
        ([0.1, 0.1], True),
        ([0.1, -0.1], False),
        ([0.5, None, None], False),
        ([0.002 * i for i in range(10)], False),
    ],
)
def test_scores_that_most_classes_share_say_nothing(scores: list[float | None], saturated: bool) -> None:
    per_class = dict(enumerate(scores))
    found = unless_saturated(measured(0.0).model_copy(update={"per_class": per_class}))
    assert (found.reason is not None) == saturated
    assert (found.score is None) == saturated
    if not saturated:
        assert found.per_class == per_class


def test_scores_that_all_classes_share_are_no_sign_of_innocence(held: CalibrationSet) -> None:
    flat = measured(0.0).model_copy(update={"per_class": dict.fromkeys(range(12), 0.0)})
    report = conclude(seen(unless_saturated(flat)), held)
    assert report.verdict == "could_not_tell"
    assert "most classes reach the same score" in str(report.reason)
