"""A repair as one HTML page that loads nothing and runs no script: before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from doorward.core import formatting
from doorward.core.records import Evidence, Rate, Table
from doorward.reports.page import galleries, template

if TYPE_CHECKING:
    from doorward.repair.report import RepairReport

#: The column of a repair's table that is drawn as a curve, and the fewest points of one.
DRAWN, POINTS = "accuracy", 3


@dataclass(frozen=True)
class Change:
    """One rate before and after the repair; `places` are their bars' ends in percent."""

    what: str
    before: str
    after: str
    places: tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """What a repair went by, as points of an SVG polyline in percent; the y axis begins at `low`."""

    title: str
    name: str
    along: str
    points: str
    ends: tuple[str, str]
    low: str
    high: str


def to_html(report: RepairReport) -> str:
    """Write what a repair found, did, and found afterwards as one self-contained page."""
    done = [] if report.repair is None else [report.repair, *report.further]
    return template("repair.html.j2", ("doorward.repair",)).render(
        report=report,
        done=done,
        changes=changes(report),
        parts=[(one, curves(one.evidence), galleries(one.evidence)) for one in done],
    )


def changes(report: RepairReport) -> list[Change]:
    """Return all rates that were measured before and after."""
    pairs = [
        (
            f"Trigger for class {one.target} that {one.detector} recovered, success on samples kept back",
            one.before,
            one.after,
        )
        for one in report.triggers
    ]
    return [
        one
        for what, before, after in (
            *pairs,
            (
                "Flagged samples that get the label they were flagged with",
                report.flagged_label_before,
                report.flagged_label_after,
            ),
            (f"Accuracy on {report.measured_on}", report.accuracy_before, report.accuracy_after),
        )
        for one in _change(what, before, after)
    ]


def _change(what: str, before: Rate | None, after: Rate | None) -> list[Change]:
    if before is None or after is None:
        return []
    places = (round(100 * before.value, 2), round(100 * after.value, 2))
    return [Change(what, formatting.rate(before), formatting.rate(after), places)]


def curves(evidence: Sequence[Evidence]) -> list[Curve]:
    """Return the tables that say how accuracy fell along a repair, drawn."""
    return [
        curve for one in evidence if isinstance(one, Table) and (curve := accuracy_curve(one)) is not None
    ]


def accuracy_curve(table: Table) -> Curve | None:
    """Draw a table's accuracy against its first column; None where it has no such columns.

    >>> table = Table(title="t", columns=("pruned", "accuracy"), rows=((0, 0.9), (1, 0.9), (4, 0.45)))
    >>> curve = accuracy_curve(table)
    >>> curve.points, curve.low, curve.high
    ('0.00,0.00 25.00,0.00 100.00,100.00', '45.0 %', '90.0 %')
    """
    if DRAWN not in table.columns:
        return None
    column = table.columns.index(DRAWN)
    points = [
        (float(x), float(y))
        for x, y in ((row[0], row[column]) for row in table.rows)
        if isinstance(x, int | float) and isinstance(y, int | float)
    ]
    if len(points) < POINTS:
        return None
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    line = " ".join(f"{100 * (x - left) / wide:.2f},{100 - 100 * (y - low) / tall:.2f}" for x, y in points)
    ends = (formatting.number(left), formatting.number(right))
    return Curve(
        table.title, DRAWN, table.columns[0], line, ends, formatting.percent(low), formatting.percent(high)
    )
