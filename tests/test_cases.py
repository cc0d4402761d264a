"""Inputs that went wrong for users, and what scans of them say now; the folder is named by DOORWARD_CASES.

One test, or more, for each row of the table in the folder's README. What has no file there is tested where
it belongs, with inputs made for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from doorward.core.records import Finding, Report
from doorward.models import LoadOptions
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest

CASES = Path(os.environ.get("DOORWARD_CASES", "/nonexistent"))
pytestmark = [
    pytest.mark.skipif(not CASES.is_dir(), reason="DOORWARD_CASES names no folder of cases"),
    pytest.mark.trains,
]

#: All that looks at behaviour; the quick one alone where the verdict is not what is tested.
ALL, QUICK = (), ("unsafe-code", "max-margin")
GREY, RGB = ("grey200.npz", 200), ("rgb100.npz", 100)
ALARM = {"backdoored", "suspicious"}


@cache
def scanned(
    name: str,
    data: tuple[str, int] = GREY,
    detectors: tuple[str, ...] = ALL,
    input_range: tuple[float, float] | None = None,
) -> Report:
    return scan(
        ScanRequest(
            model=str(CASES / name),
            clean=str(CASES / data[0]),
            images=data[1],
            detectors=detectors,
            options=LoadOptions(input_range=input_range),
            time_budget=3600,
        )
    )


def finding(report: Report, detector: str) -> Finding:
    (found,) = [one for one in report.findings if one.detector == detector]
    return found


def assert_not_passed(report: Report, *words: str) -> None:
    """Assert that a planted model is found, with its class, or that it could not be told and why."""
    assert report.verdict in ALARM | {"could_not_tell"}
    if report.verdict in ALARM:
        assert report.targets == (3,)
    else:
        assert any(word in str(report.reason) for word in words), report.reason


def test_probabilities_in_8_bits_are_judged_as_those_in_floats() -> None:
    whole, rough = scanned("softmax-in-8-bits/float_bad.onnx"), scanned("softmax-in-8-bits/int8_bad.onnx")
    for report in (whole, rough):
        assert report.subject is not None
        assert report.subject.spec["output"] in ("probabilities", "logits")
        assert_not_passed(report)
    assert (rough.verdict in ALARM, rough.targets) == (whole.verdict in ALARM, whole.targets)


def test_the_clean_twin_in_8_bits_is_not_accused() -> None:
    assert scanned("softmax-in-8-bits/int8_clean.onnx").verdict in ("nothing_found", "could_not_tell")


def test_logits_in_8_bits_that_saturate_are_no_sign_of_innocence() -> None:
    report = scanned("softmax-in-8-bits/int8_logits_bad.onnx")
    assert_not_passed(report, "saturate", "clipped", "bounded")
    assert finding(report, "max-margin").p_value != 1.0


@pytest.mark.parametrize(
    ("clipped", "plain", "data"),
    [
        ("clip8.onnx", "plain.onnx", GREY),
        ("rgb_clip8.onnx", "rgb.onnx", RGB),
    ],
)
def test_a_clip_changes_no_verdict(clipped: str, plain: str, data: tuple[str, int]) -> None:
    one, other = scanned(f"clipped-logits/{clipped}", data), scanned(f"clipped-logits/{plain}", data)
    for report in (one, other):
        assert_not_passed(report, "clipped")
    if one.verdict != "could_not_tell":
        assert (one.verdict, one.targets) == (other.verdict, other.targets)


@pytest.mark.parametrize("name", ["model", "clean"])
def test_an_assumed_range_that_another_beats_is_proposed_and_accuses_nobody(name: str) -> None:
    report = scanned(f"nhwc-minus-one-to-one/{name}.onnx", RGB)
    assert (report.verdict, report.targets) == ("could_not_tell", ())
    assert "scan again with --input-range=-1,1" in str(report.reason)


def test_with_the_proposed_range_the_planted_one_is_found_and_its_twin_is_not() -> None:
    stated = (-1.0, 1.0)
    assert_not_passed(scanned("nhwc-minus-one-to-one/model.onnx", RGB, ALL, stated))
    clean = scanned("nhwc-minus-one-to-one/clean.onnx", RGB, ALL, stated)
    assert clean.verdict in ("nothing_found", "could_not_tell")


@pytest.mark.parametrize(
    ("folder", "told"),
    [("trainer-folder", "training_args.bin"), ("script-in-folder", "convert_to_onnx.py")],
)
def test_what_loading_never_touches_is_told_and_the_model_is_scanned(folder: str, told: str) -> None:
    report = scanned(folder, RGB, QUICK)
    assert report.verdict != "unsafe"
    files = finding(report, "unsafe-code")
    assert files.verdict == "nothing_found"
    assert told in files.summary
    assert finding(report, "max-margin").p_value is not None


@pytest.mark.parametrize(
    ("weights", "factory", "size"), [("w3", "build3", (3, 32, 32)), ("w1", "build", (1, 28, 28))]
)
def test_a_view_after_convolutions_is_scanned(weights: str, factory: str, size: tuple[int, int, int]) -> None:
    folder = "view-after-conv"
    made = f"{CASES / folder / 'net.py'}:{factory}"
    report = scan(
        ScanRequest(
            model=str(CASES / folder / f"{weights}.pt"),
            factory=made,
            detectors=QUICK,
            options=LoadOptions(size=size),
        )
    )
    assert finding(report, "max-margin").reason is None
    assert finding(report, "max-margin").p_value is not None


def test_exported_programs_are_scanned_like_their_onnx_twins(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, CASES / "make_pt2.py"], cwd=tmp_path, check=True, capture_output=True, timeout=600
    )
    for name in ("bn1d", "weightstd"):
        twins = [
            finding(scan(ScanRequest(model=str(tmp_path / f"{name}{kind}"), detectors=QUICK)), "max-margin")
            for kind in (".pt2", ".onnx")
        ]
        assert [one.reason for one in twins] == [None, None]
        for target, score in twins[0].per_class.items():
            assert score == pytest.approx(twins[1].per_class[target], abs=0.05)
