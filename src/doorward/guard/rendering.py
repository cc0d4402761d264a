"""A guard's report as text, JSON, CSV, and as a contact sheet of the rejected inputs."""

from __future__ import annotations

import csv
import io
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from doorward.core.formatting import class_label, number, percent, plain, rate, sentence
from doorward.core.report_json import dump
from doorward.data import Samples
from doorward.guard.records import GuardReport
from doorward.models.encode.image import encode_png

#: Most rejected inputs in the text, and in the contact sheet.
IN_TEXT, IN_SHEET = 20, 500


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


def contact_sheet(report: GuardReport, inputs: Samples) -> str:
    """Write the rejected inputs as one HTML page of pictures, which loads nothing and runs no script."""
    bad = [(i, one) for i, one in enumerate(report.verdicts) if not one.accepted]
    shown = [
        (one, plain(class_label(one.prediction, report.subject.classes)), encode_png(raw))
        for (_, one), raw in zip(bad[:IN_SHEET], inputs.raw([i for i, _ in bad[:IN_SHEET]]), strict=True)
    ]
    return _template().render(
        path=plain(report.subject.path),
        rejected=rate(report.rejected),
        expected=percent(report.false_rejection_rate),
        alarm=report.alarm,
        shown=shown,
        more=len(bad) - len(shown),
    )


def class_name(report: GuardReport, index: int) -> str:
    """Return a class's name, or its number where it has none."""
    names = report.subject.classes
    return names[index] if index < len(names) else str(index)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("doorward.guard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("contact_sheet.html.j2")
