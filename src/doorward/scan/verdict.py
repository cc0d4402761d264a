"""Conclude one verdict from what the detectors saw: a pure function of that and of the calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from doorward.core.formatting import joined
from doorward.core.records import SEVERITY, Coverage, Finding, Observations, Report, Verdict
from doorward.scan.calibration import BACKDOORED, CalibrationSet, JudgedFindings, judge

#: The p-value of one detector alone up to which the report names the class that it points to.
ALONE = 0.02
#: What the lower bound of a trigger's success has to reach for it to be confirmed.
CONFIRMED = 0.75


def conclude(seen: Observations, calibration: CalibrationSet) -> Report:
    """Return the report: every measurement judged by the calibration, and one verdict.

    Found goes before could-not-tell before nothing-found. `suspicious`: the fused p-value is at most .02;
    `backdoored`: at most .01, and the trigger that a detector recovered for a class that it flags works on
    images that were kept back: the lower 95 % bound of its success is at least .75. A model unlike all that
    calibration covers is at most `suspicious`. A detector without calibration has no part in the verdict.
    A reason to doubt what was seen keeps nothing-found from being said, and leaves an alarm as it is. An
    alarm that rests on surrogates which did not learn the model is none, and is told: its class may stand out
    by nature.
    """
    outside = _outside(seen, calibration)
    judged = judge(seen.measurements, calibration, covered=outside is None)
    findings = (*seen.findings, *judged.findings)
    compared = [f for f in judged.findings if f.p_value is not None]
    report = Report(
        **{name: getattr(seen, name) for name in ("subject", "data", "confirmations", "not_run")},
        findings=findings,
        verdict="nothing_found",
        p_value=judged.p_value,
        calibrated=bool(compared) and outside is None,
        uncalibrated=outside if compared else None,
        warnings=seen.warnings,
        covered=_covered(findings),
        seconds=seen.seconds,
        environment=seen.environment,
    )
    if any(f.verdict == "unsafe" for f in findings):
        return report.model_copy(update={"verdict": "unsafe"})
    doubt = next((f.doubt for f in findings if f.flagged and f.doubt), None)
    if doubt and not any(f.flagged for f in seen.findings):
        return doubted(
            report, "; ".join(filter(None, (f"{standing_out(report)}, but {doubt}", seen.reason))), doubt
        )
    if any(f.flagged for f in findings):
        doubts = (seen.reason,) if seen.reason else ()
        return _alarm(report.model_copy(update={"warnings": (*doubts, *seen.warnings)}), judged)
    report = report.model_copy(update={"warnings": (*seen.warnings, *_lonely(report))})
    why = "; ".join(dict.fromkeys(filter(None, (seen.reason, _what_stopped(findings)))))
    if not compared:
        why = why or _nothing_judged(judged.findings)
    return report.model_copy(update={"verdict": "could_not_tell", "reason": why}) if why else report


def doubted(report: Report, reason: str, doubt: str) -> Report:
    """Return a report whose alarm is none after all.

    Args:
        reason: why the scan could not tell.
        doubt: why the detectors could not that raised the alarm.
    """
    told = tuple(
        f.model_copy(update={"verdict": "could_not_tell", "reason": doubt}) if f.flagged else f
        for f in report.findings
    )
    update = {"verdict": "could_not_tell", "reason": reason, "targets": (), "findings": told}
    return report.model_copy(update=update)


def _covered(findings: Iterable[Finding]) -> Coverage:
    """Return which detectors ran to their end and had a part in the verdict."""
    finished = [f for f in findings if f.reason is None]
    return Coverage(
        files=tuple(f.detector for f in finished if f.level == "artifact"),
        behaviour=tuple(f.detector for f in finished if f.p_value is not None),
    )


def _lonely(report: Report) -> list[str]:
    """Return which detectors, each alone, point to a class though all together raise no alarm."""
    return [
        f"{f.detector} alone points to class {report.class_name(_top(f))!r} (p = {f.p_value:.2g}); "
        "the other detectors do not, so that together they raise no alarm"
        for f in report.findings
        if f.p_value is not None and f.p_value <= ALONE
    ]


def standing_out(report: Report) -> str:
    """Return which classes the findings flag, and how rarely clean models have such."""
    targets = dict.fromkeys(t for f in report.findings if f.flagged for t in f.targets)
    named = joined([repr(report.class_name(t)) for t in targets])
    what = f"class {named} stands out" if len(targets) == 1 else f"classes {named} stand out"
    return f"{what} (p = {report.p_value:.2g})"


def _top(finding: Finding) -> int:
    """Return the class that a detector finds most suspicious."""
    known = {t: score for t, score in finding.per_class.items() if score is not None}
    return max(known, key=lambda t: known[t])


def conclude_files(seen: Observations) -> Report:
    """Return the report of a scan that was asked for the files alone."""
    findings = seen.findings
    stopped = _what_stopped(findings)
    verdict = max((f.verdict for f in findings), key=lambda v: SEVERITY[v], default="nothing_found")
    return Report(
        subject=seen.subject,
        findings=findings,
        verdict=verdict,
        reason=stopped if verdict == "could_not_tell" else None,
        covered=_covered(findings),
        seconds=seen.seconds,
        environment=seen.environment,
    )


def _alarm(report: Report, judged: JudgedFindings) -> Report:
    """Return the report with the verdict that flagged findings give, and with the classes they name."""
    guilty = sorted((f for f in report.findings if f.flagged), key=lambda f: f.p_value or 0.0)
    works = {(c.detector, c.target) for c in report.confirmations if c.success.low >= CONFIRMED}
    sure = report.calibrated and judged.p_value is not None and judged.p_value <= BACKDOORED
    proven = {f.detector for f in guilty if sure and any((f.detector, t) in works for t in f.targets)}
    # what was read in the graph, and driven, is proved by that
    proven |= {f.detector for f in guilty if f.verdict == "backdoored"}
    verdict: Verdict = "backdoored" if proven else "suspicious"
    named = tuple(
        f.model_copy(update={"verdict": "backdoored"}) if f.detector in proven else f for f in report.findings
    )
    targets = tuple(dict.fromkeys(t for f in guilty for t in f.targets))
    return report.model_copy(update={"verdict": verdict, "targets": targets, "findings": named})


def _outside(seen: Observations, calibration: CalibrationSet) -> str | None:
    """Return in what the model, or what was given of it, differs from all calibration models."""
    subject = seen.subject
    if subject is None or not {"channels", "height", "width"} <= subject.spec.keys():
        return "nothing is known of the model's images"
    used = min((data.used for data in seen.data), default=calibration.images)
    if used < calibration.images:
        return f"{used} images were given, and {calibration.images} with the calibration models"
    shape = [subject.spec[name] for name in ("channels", "height", "width")]
    return calibration.outside(len(subject.classes), shape, subject.convolutions)


def _what_stopped(findings: Iterable[Finding]) -> str:
    """Return why detectors could not tell, each reason once; empty if all could.

    A file that was not read to its end counts as well: nothing is known of what it would run. What has no
    calibration could not have changed the verdict, so that it stops nothing.
    """
    speakers: dict[str, list[str]] = {}
    for f in findings:
        if f.reason and f.uncalibrated is None:
            speakers.setdefault(f.reason, []).append(f.detector)
    return "; ".join(f"{joined(names)}: {reason}" for reason, names in speakers.items())


def _nothing_judged(findings: Sequence[Finding]) -> str:
    """Return why there is nothing to conclude from."""
    if not findings:
        return "no detector that looks at behaviour ran"
    return "; ".join(f"{f.detector} is not calibrated: {f.uncalibrated}" for f in findings if f.uncalibrated)
