"""The report as one HTML page that loads nothing and runs no script."""

from __future__ import annotations

from dataclasses import dataclass

from doorward.core.records import Finding, Kind, Report
from doorward.core.report_json import dump
from doorward.reports import next_steps, phrases
from doorward.reports.chart import Chart, per_class_chart
from doorward.reports.page import Gallery, figure, galleries, template

#: Headings over the pictures of findings that raise an alarm.
HEADINGS: dict[Kind, str] = {
    "backdoor": "The recovered trigger",
    "poison": "Flagged samples next to kept ones",
}


@dataclass(frozen=True)
class Exhibit:
    """The pictures of findings of one kind that raise an alarm: those of the first, and of the others."""

    heading: str
    first: tuple[Finding, list[Gallery]]
    others: list[tuple[Finding, list[Gallery]]]


def to_html(report: Report) -> str:
    """Write a report as one self-contained HTML page."""
    classes = phrases.class_names(report)
    findings = phrases.by_severity(report.findings)
    charts = {one.detector: chart for one in findings if (chart := per_class_chart(one, classes))}
    settings = {one.detector: {"seed": one.seed, "settings": one.settings} for one in report.findings}
    return template("report.html.j2").render(
        report=report,
        classes=classes,
        steps=next_steps.next_steps(report),
        findings=findings,
        exhibits=exhibits(report, findings),
        charts=charts,
        drawn=_drawn(findings, charts),
        galleries=galleries,
        planted=[figure(one.picture) for one in report.positive_control.controls if one.picture],
        details=[
            ("Settings of every detector", dump(settings)),
            ("What was asked for", dump(report.request)),
            ("Environment", dump(report.environment.model_dump(mode="json"))),
        ],
    )


def exhibits(report: Report, findings: list[Finding]) -> list[Exhibit]:
    """Return what alarms have to show, by kind; the finding whose trigger works most often comes first."""
    works = {one.detector: one.success.low for one in report.confirmations if one.target in report.targets}
    by_kind: dict[Kind, list[tuple[Finding, list[Gallery]]]] = {}
    for finding in sorted(findings, key=lambda one: -works.get(one.detector, 0.0)):
        if finding.flagged and (pictures := galleries(finding.evidence)):
            by_kind.setdefault(finding.kind, []).append((finding, pictures))
    return [
        Exhibit(HEADINGS.get(kind, "The evidence, drawn"), shown[0], shown[1:])
        for kind, shown in by_kind.items()
    ]


def _drawn(findings: list[Finding], charts: dict[str, Chart]) -> list[tuple[Finding, Chart]]:
    """Return the charts of the findings that raise an alarm."""
    return [(one, charts[one.detector]) for one in findings if one.flagged and one.detector in charts]


Report.page = staticmethod(to_html)
