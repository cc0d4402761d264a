"""Conclude one verdict from what the detectors saw. Pure: the same report and bank give the same verdict."""

from __future__ import annotations

from collections.abc import Sequence

from doorward.calibration import Bank, judge, shipped
from doorward.records import SEVERITY, Finding, Report, Verdict

#: Below `SUSPICIOUS` a verdict; with this success on images kept back, at least.
BACKDOORED, CONFIRMED = 0.01, 0.75


def conclude(report: Report, bank: Bank | None = None) -> Report:
    """Return the report with every finding judged by the bank, and with its verdict.

    Found goes before could-not-tell before nothing-found. `suspicious`: the fused p-value is at most .05;
    `backdoored`: at most .01, and a recovered trigger works on images that were kept back: the lower 95 %
    bound of its success is at least .75. What the bank does not cover is at most `suspicious`.

    Args:
        report: raw or concluded before, which makes no difference.
        bank: of clean models; the one that comes with the package if None.
    """
    bank, given = bank or shipped(), report.reason
    outside = _outside(report, bank)
    findings = judge(report.findings, bank, covered=outside is None)
    empty = {"reason": None, "targets": (), "p_value": None, "calibrated": False}
    report = report.model_copy(update=empty | {"findings": findings})
    if any(f.verdict == "unsafe" for f in findings):
        return report.model_copy(update={"verdict": "unsafe"})
    p_values = {f.detector: f.p_value for f in findings if f.kind == "backdoor" and f.p_value is not None}
    others = [f for f in findings if f.flagged and f.detector not in p_values]
    stopped = _what_stopped(findings)
    if not p_values and not others:
        why = stopped or given or "no detector that looks at behaviour ran"
        return report.model_copy(update={"verdict": "could_not_tell", "reason": why})
    p = bank.fuse(p_values) if p_values else None
    calibrated = bool(p_values) and all(f.calibrated for f in findings if f.detector in p_values)
    report = report.model_copy(update={"p_value": p, "calibrated": calibrated})
    guilty = sorted((f for f in findings if f.flagged), key=lambda f: p_values.get(f.detector, 0.0))
    if not guilty:
        if stopped:
            return report.model_copy(update={"verdict": "could_not_tell", "reason": stopped})
        return report.model_copy(update={"verdict": "nothing_found"})
    targets = tuple(dict.fromkeys(t for f in guilty for t in f.targets))
    verdict: Verdict = max((f.verdict for f in others), key=SEVERITY.__getitem__, default="suspicious")
    confirmed = any(c.target in targets and c.success.low >= CONFIRMED for c in report.confirmations)
    if calibrated and confirmed and p is not None and p <= BACKDOORED:
        verdict = "backdoored"
    return report.model_copy(update={"verdict": verdict, "targets": targets})


def _outside(report: Report, bank: Bank) -> str | None:
    subject = report.subject
    if subject is None or not {"channels", "height", "width"} <= subject.spec.keys():
        return "nothing is known of the model's images"
    shape = [subject.spec[name] for name in ("channels", "height", "width")]
    return bank.outside(len(subject.classes), shape, subject.convolutions)


def _what_stopped(findings: Sequence[Finding]) -> str:
    """Say why detectors of backdoors could not tell, each reason once; empty if all could."""
    speakers: dict[str, list[str]] = {}
    for f in findings:
        if f.kind == "backdoor" and f.reason:
            speakers.setdefault(f.reason, []).append(f.detector)
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in speakers.items())
