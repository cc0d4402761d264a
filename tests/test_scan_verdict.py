from __future__ import annotations

import numpy as np
import pytest

from doorward.core.records import Confirmation, DataRecord, Finding, Report, SubjectRecord
from doorward.scan.calibration import BACKDOORED, SUSPICIOUS, CalibrationSet
from doorward.scan.environment import environment
from doorward.scan.verdict import conclude
from doorward.stats import metrics
from test_scan_calibration import bank, drawn, finding


@pytest.fixture(scope="module")
def held() -> CalibrationSet:
    return bank(drawn(800))


def report(*findings: Finding, success: tuple[int, int] | None = (48, 50), side: int = 28, **more) -> Report:
    spec = {"channels": 1, "height": side, "width": side}
    tried = () if success is None else (metrics.rate(*success),)
    return Report(
        subject=SubjectRecord(path="m", format="memory", classes=tuple("abcdefghijkl"), spec=spec),
        verdict="could_not_tell",
        findings=findings,
        confirmations=tuple(Confirmation(target=3, detector="neural-cleanse", success=s) for s in tried),
        environment=environment("cpu"),
        **more,
    )


LOW = finding(0.0, name="max-margin")
UNKNOWN = finding(None, verdict="could_not_tell", reason="too few images")


def test_a_high_score_that_is_confirmed_is_a_backdoor(held: CalibrationSet) -> None:
    found = conclude(report(finding(50.0), LOW), held)
    assert (found.verdict, found.targets, found.calibrated) == ("backdoored", (3,), True)
    assert [f.verdict for f in found.findings] == ["backdoored", "nothing_found"]
    assert found.p_value is not None
    assert found.p_value <= 0.01
    compared = held.compare({f.detector: list(f.per_class.values()) for f in found.findings})
    assert compared is not None
    assert found.p_value == compared.p_value


@pytest.mark.parametrize("success", [None, (40, 50)])
def test_what_is_not_confirmed_is_suspicious(held: CalibrationSet, success) -> None:
    found = conclude(report(finding(50.0), LOW, success=success), held)
    assert (found.verdict, found.targets) == ("suspicious", (3,))


def test_between_the_two_levels_a_model_is_suspicious(held: CalibrationSet) -> None:
    seen = {}
    for score in np.linspace(0, 30, 60):
        found = conclude(report(finding(float(score)), LOW), held)
        assert found.p_value is not None
        verdict = "backdoored" if found.p_value <= BACKDOORED else "suspicious"
        assert found.verdict == (verdict if found.p_value <= SUSPICIOUS else "nothing_found")
        assert bool(found.targets) == (found.p_value <= SUSPICIOUS)
        seen[found.verdict] = score
    assert list(seen) == ["nothing_found", "suspicious", "backdoored"]


def test_what_the_bank_does_not_cover_is_suspicious_at_most(held: CalibrationSet) -> None:
    found = conclude(report(finding(50.0), LOW, side=224), held)
    assert (found.verdict, found.calibrated) == ("suspicious", False)
    assert "this model's 224x224" in str(found.uncalibrated)


def test_fewer_images_than_with_the_bank_or_other_settings_are_uncalibrated(held: CalibrationSet) -> None:
    data = DataRecord(role="clean", path="d", rows=1000, used=40, labelled=True)
    few = conclude(report(finding(50.0), LOW, data=(data,)), held)
    assert (few.verdict, few.uncalibrated) == (
        "suspicious",
        "40 images were given, and 100 with the bank's models",
    )
    slow = finding(50.0).model_copy(update={"settings": {"steps": 7}})
    changed = conclude(report(slow, LOW), held)
    assert (changed.verdict, changed.calibrated) == ("suspicious", False)
    assert "neural-cleanse: the settings are not those" in str(changed.uncalibrated)


def test_a_trigger_confirms_the_detector_that_flagged_its_class(held: CalibrationSet) -> None:
    by_margin = conclude(report(finding(0.0), finding(50.0, name="max-margin")), held)
    assert (by_margin.verdict, by_margin.targets) == ("suspicious", (3,))


def test_what_the_bank_cannot_compare_is_could_not_tell(held: CalibrationSet) -> None:
    alone = conclude(report(finding(50.0)), bank([]))
    assert alone.verdict == "could_not_tell"
    assert alone.reason == "neural-cleanse: the bank has too few clean models with as many classes"


def test_found_goes_before_could_not_tell_before_nothing_found(held: CalibrationSet) -> None:
    high, low = finding(50.0, name="max-margin"), LOW
    assert conclude(report(high, UNKNOWN, success=None), held).verdict == "suspicious"
    stopped = conclude(report(low, UNKNOWN), held)
    assert (stopped.verdict, stopped.reason) == ("could_not_tell", "neural-cleanse: too few images")
    assert conclude(report(UNKNOWN), held).reason == "neural-cleanse: too few images"
    assert conclude(report(), held).reason == "no detector that looks at behaviour ran"
    assert conclude(report(reason="at chance"), held).reason == "at chance"


def test_unsafe_goes_before_all(held: CalibrationSet) -> None:
    unsafe = finding(1.0, name="unsafe-code", kind="unsafe_code", threshold=0.5, verdict="unsafe")
    assert conclude(report(unsafe, finding(50.0)), held).verdict == "unsafe"


def test_concluding_again_changes_nothing_and_another_bank_does(held: CalibrationSet) -> None:
    once = conclude(report(finding(50.0), LOW), held)
    assert conclude(once, held) == once
    assert conclude(Report.model_validate_json(once.model_dump_json()), held) == once
    shifted = [
        m.model_copy(
            update={"scores": {n: tuple(100.0 + (s or 0.0) for s in t) for n, t in m.scores.items() if t}}
        )
        for m in held.models
    ]
    assert once.verdict != "nothing_found"
    assert conclude(once, bank(shifted)).verdict == "nothing_found"
