"""A guard's report as text, JSON, CSV, and as a page with the rejected inputs."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from doorward.core.formatting import class_label, number, percent, plain, rate, sentence
from doorward.core.records import Picture
from doorward.core.report_json import dump
from doorward.data import Samples, Waveform
from doorward.guard.records import GuardReport, InputVerdict
from doorward.models.encode.image import encode_png, picture
from doorward.reports.page import Figure, figure, template
from doorward.reports.phrases import Fact
from doorward.scan.exhibits import spectrogram

#: Most rejected inputs in the text, and on the page.
IN_TEXT, IN_SHEET = 20, 500
#: Characters of a rejected text that the page shows.
QUOTED = 600


def to_json(report: GuardReport) -> str:
    """Write a report as JSON."""
    return dump(report.model_dump(mode="json"))


def to_csv(report: GuardReport) -> str:
    """Write one line for each input: id, verdict, prediction, scores, reasons."""
    names = [one.name for one in report.filters]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "accepted", "prediction", "class", *names, "reasons"])
    for one in report.verdicts:
        label = plain(class_name(report, one.prediction))
        label = f"'{label}" if label.startswith(("=", "+", "-", "@")) else label  # no formula in spreadsheets
        scores = [repr(one.scores[name]) for name in names]
        table.writerow(
            [one.id, str(one.accepted).lower(), one.prediction, label, *scores, "; ".join(one.reasons)]
        )
    return text.getvalue()


def to_text(report: GuardReport) -> str:
    """Write what was rejected and why, for people."""
    together = "" if len(report.filters) == 1 else " together"
    lines = [
        f"{plain(report.subject.path)}: rejected {rate(report.rejected)}",
        f"of clean inputs {percent(report.false_rejection_rate)} would be, at most, by all filters{together}"
        if report.rule == "conformal"
        else f"of clean inputs about {percent(report.false_rejection_rate)} would be ({report.rule} rule)",
    ]
    if report.alarm:
        lines.append(f"Alarm: {report.alarm}.")
    if report.reform:
        lines.append(f"The model answers copies squeezed by {report.reform}.")
    lines += [f"Note: {sentence(plain(one))}" for one in report.warnings]
    lines.append("")
    lines += [
        f"{one.name}: rejects from a score of {number(one.threshold)}. {one.limits}" for one in report.filters
    ]
    bad = [one for one in report.verdicts if not one.accepted]
    if bad:
        lines += ["", "Rejected:"]
    for one in bad[:IN_TEXT]:
        label = class_label(one.prediction, report.subject.classes)
        lines.append(f"  {one.id}  class {label}  {'; '.join(one.reasons)}")
    if len(bad) > IN_TEXT:
        lines.append(f"  and {len(bad) - IN_TEXT:,} more; --format csv lists every input")
    return "\n".join(lines) + "\n"


def to_html(report: GuardReport, inputs: Samples) -> str:
    """Write a report with its rejected inputs as one HTML page, which loads nothing and runs no script."""
    bad = [(i, one) for i, one in enumerate(report.verdicts) if not one.accepted]
    raw = inputs.raw([i for i, _ in bad[:IN_SHEET]])
    return template("guard.html.j2", ("doorward.guard",)).render(
        report=report,
        facts=_facts(report),
        shown=[
            _shown(verdict, class_label(verdict.prediction, report.subject.classes), input_)
            for (_, verdict), input_ in zip(bad[:IN_SHEET], raw, strict=True)
        ],
        more=max(0, len(bad) - IN_SHEET),
        by_filter={
            one.name: sum(verdict.scores[one.name] >= one.threshold for verdict in report.verdicts)
            for one in report.filters
        },
        listed=report.verdicts[:IN_SHEET],
        unlisted=max(0, len(report.verdicts) - IN_SHEET),
    )


@dataclass(frozen=True)
class _Shown:
    """A rejected input: a text as it is, others as a picture."""

    verdict: InputVerdict
    label: str
    drawn: Figure | None
    text: str


def _shown(verdict: InputVerdict, label: str, raw: Any) -> _Shown:
    if isinstance(raw, str):
        return _Shown(verdict, label, None, plain(raw[:QUOTED]) + ("..." if len(raw) > QUOTED else ""))
    sound = isinstance(raw, Waveform)
    what = "The spectrogram of the recording" if sound else "The input"
    png = picture(spectrogram(raw)) if sound else encode_png(raw)
    alt = f"{what} with id {verdict.id}, which the model answers with class {label}"
    return _Shown(verdict, label, figure(Picture(title=f"class {label}", alt=alt, png=png)), "")


def _facts(report: GuardReport) -> list[Fact]:
    low, high = percent(report.rejected.low), percent(report.rejected.high)
    expected = percent(report.false_rejection_rate)
    rule = "at most, by all filters together" if report.rule == "conformal" else f"by the {report.rule} rule"
    clean = next((one for one in report.data if one.role == "clean"), None)
    fitted = [Fact("Fitted to", f"{clean.used:,} clean inputs", f"from {plain(clean.path)}")] if clean else []
    return [
        Fact("Rejected", percent(report.rejected.value), f"95 % interval {low} to {high}"),
        Fact("Of clean inputs", expected, f"would be rejected, {rule}"),
        *fitted,
    ]


def class_name(report: GuardReport, index: int) -> str:
    """Return a class's name, or its number where it has none."""
    names = report.subject.classes
    return names[index] if index < len(names) else str(index)
