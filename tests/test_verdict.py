from __future__ import annotations

import pytest

from doorward import measures
from doorward.calibration import Bank
from doorward.examination import environment
from doorward.records import Confirmation, Finding, Report, SubjectRecord
from doorward.verdict import conclude
from test_calibration import bank, drawn, finding


@pytest.fixture(scope="module")
def held() -> Bank:
    return bank(drawn(800))


def report(*findings: Finding, success: tuple[int, int] | None = (48, 50), side: int = 28, **more) -> Report:
    spec = {"channels": 1, "height": side, "width": side}
    tried = () if success is None else (measures.rate(*success),)
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


def test_a_high_score_that_is_confirmed_is_a_backdoor(held: Bank) -> None:
    found = conclude(report(finding(50.0), LOW), held)
    assert (found.verdict, found.targets, found.calibrated) == ("backdoored", (3,), True)
    assert found.p_value is not None
    assert found.p_value <= 0.01
    assert found.p_value == held.fuse({f.detector: f.p_value or 1.0 for f in found.findings})


@pytest.mark.parametrize("success", [None, (40, 50)])
def test_what_is_not_confirmed_is_suspicious(held: Bank, success) -> None:
    found = conclude(report(finding(50.0), LOW, success=success), held)
    assert (found.verdict, found.targets) == ("suspicious", (3,))


def test_between_one_and_five_percent_is_suspicious(held: Bank) -> None:
    strict, loose = (
        held.threshold("neural-cleanse", ("neural-cleanse", "max-margin"), 12, a) for a in (0.01, 0.05)
    )
    found = conclude(report(finding((strict + loose) / 2), LOW), held)
    assert found.verdict == "suspicious"
    assert found.p_value is not None
    assert 0.01 < found.p_value <= 0.05
    below = conclude(report(finding(loose - 1e-6), LOW), held)
    assert (below.verdict, below.targets) == ("nothing_found", ())
    assert below.p_value is not None
    assert below.p_value > 0.05


def test_what_the_bank_does_not_cover_is_suspicious_at_most(held: Bank) -> None:
    found = conclude(report(finding(50.0), LOW, side=224), held)
    assert (found.verdict, found.calibrated) == ("suspicious", False)


def test_found_goes_before_could_not_tell_before_nothing_found(held: Bank) -> None:
    high, low = finding(50.0, name="max-margin"), LOW
    assert conclude(report(high, UNKNOWN, success=None), held).verdict == "suspicious"
    stopped = conclude(report(low, UNKNOWN), held)
    assert (stopped.verdict, stopped.reason) == ("could_not_tell", "neural-cleanse: too few images")
    assert conclude(report(UNKNOWN), held).reason == "neural-cleanse: too few images"
    assert conclude(report(), held).reason == "no detector that looks at behaviour ran"
    assert conclude(report(reason="at chance"), held).reason == "at chance"


def test_unsafe_goes_before_all(held: Bank) -> None:
    unsafe = finding(1.0, name="unsafe-code", threshold=0.5, verdict="unsafe", kind="unsafe_code")
    assert conclude(report(unsafe, finding(50.0)), held).verdict == "unsafe"


def test_concluding_again_changes_nothing_and_another_bank_does(held: Bank) -> None:
    once = conclude(report(finding(50.0), LOW), held)
    assert conclude(once, held) == once
    shifted = [
        m.model_copy(update={"scores": {n: 100.0 + s for n, s in m.scores.items() if s}}) for m in held.models
    ]
    assert once.verdict != "nothing_found"
    assert conclude(once, bank(shifted)).verdict == "nothing_found"
