"""A suite's results as one HTML page that loads nothing and runs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from doorward.bench import summary, tables
from doorward.bench.results import Result
from doorward.bench.summary import GroupRow, Summary
from doorward.core import formatting
from doorward.reports.page import template

#: Bins of the histogram of p-values: alarms are in the first.
BINS = 20


@dataclass(frozen=True)
class Scores:
    """One score of the planted and the clean models of a group, with the drawing of both.

    Attributes:
        name: what is scored.
        auroc: in words.
        curve: the ROC as points of an SVG polyline, in percent; the false positives go to the right.
        clean, planted: places in percent, the most suspicious at the right.
        low, high: the ends of that axis.
        limits: places of p = .05 and .01, where the axis is one of p-values.
    """

    name: str
    auroc: str
    curve: str
    clean: tuple[float, ...]
    planted: tuple[float, ...]
    low: str
    high: str
    limits: tuple[float, ...]


@dataclass(frozen=True)
class Histogram:
    """How many clean models have a p-value in each equal part of [0, 1]; heights in percent."""

    counts: tuple[int, ...]
    heights: tuple[float, ...]
    models: int


def roc(clean: Sequence[float], planted: Sequence[float]) -> list[tuple[float, float]]:
    """Return the (false, true) positive rates at every threshold, from (0, 0) to (1, 1).

    >>> roc([0.1, 0.4], [0.4, 0.8])
    [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    points = [(0.0, 0.0)]
    for threshold in sorted({*clean, *planted}, reverse=True):
        rates = (sum(score >= threshold for score in side) / len(side) for side in (clean, planted))
        points.append((next(rates), next(rates)))
    return points


def scores(row: GroupRow, results: Sequence[Result]) -> list[Scores]:
    """Lay out the report's p-value and every detector's score; those without both sides are left out."""
    counted = [one for one in results if not one.excluded]
    # could-not-tell has p = 1, as in the table
    p_values = [(one, 1.0 if one.p_value is None else one.p_value) for one in counted]
    logs = [(one, -math.log10(max(p, 1e-6))) for one, p in p_values]
    laid = [_scores("The verdict's p-value", tables.area(row.by_score), logs, p_value=True)]
    for name, ranking in row.by_detector.items():
        pairs = [
            (one, score)
            for one in counted
            if name in one.detectors and (score := one.detectors[name].score) is not None
        ]
        laid.append(_scores(f"Score of {name}", tables.area(ranking), pairs))
    return [one for one in laid if one is not None]


def _scores(
    name: str, auroc: str, pairs: Sequence[tuple[Result, float]], *, p_value: bool = False
) -> Scores | None:
    clean = sorted(score for one, score in pairs if one.plant is None)
    planted = sorted(score for one, score in pairs if one.plant is not None)
    if not clean or not planted:
        return None
    marks = [-math.log10(p) for p in (0.05, 0.01)] if p_value else []
    low, high = min([*clean, *planted, *marks]), max([*clean, *planted, *marks])

    def place(score: float) -> float:
        return round(100 * (score - low) / ((high - low) or 1.0), 2)

    def label(score: float) -> str:
        return formatting.p_value(10**-score) if p_value else formatting.number(score)

    return Scores(
        name=name,
        auroc=auroc,
        curve=" ".join(f"{100 * x:.2f},{100 - 100 * y:.2f}" for x, y in roc(clean, planted)),
        clean=tuple(map(place, clean)),
        planted=tuple(map(place, planted)),
        low=label(low),
        high=label(high),
        limits=tuple(map(place, marks)),
    )


def histogram(results: Sequence[Result]) -> Histogram | None:
    """Count the p-values of clean models; None where there are none."""
    values = [one.p_value for one in results if one.plant is None and one.p_value is not None]
    if not values:
        return None
    counts = summary.spread(values, BINS)
    return Histogram(counts, tuple(round(100 * n / max(counts), 2) for n in counts), len(values))


def render(summary: Summary) -> str:
    """Write the page."""
    planted = tables.has_plants(summary)
    header, cells = tables.group_cells(planted, published=tables.has_published_rule(summary))
    rows = [cells(row) for row in summary.groups]
    if summary.plants:
        header, rows = list(tables.PLANT_HEADS), [tables.plant_cells(row) for row in summary.plants]
    if summary.inspections:
        header = list(tables.INSPECTION_HEADS)
        rows = [tables.inspection_cells(row) for row in summary.inspections]
    if summary.mendings:
        header, rows = list(tables.MENDING_HEADS), [tables.mending_cells(row) for row in summary.mendings]
    done = {one.trial: one for one in summary.results if one.status == "done"}
    drawn = [(row, scores(row, [done[name] for name in row.counted])) for row in summary.groups]
    return template("suite.html.j2", ("doorward.bench",)).render(
        summary=summary,
        nothing=tables.unmeasured(summary),
        tables=tables,
        header=header,
        rows=rows,
        drawn=[(row, laid) for row, laid in drawn if laid],
        clean=[
            (name, [tables.clean_cells(row) for row in rows])
            for name, rows in (("classes", summary.buckets), ("data set", summary.data_sets))
        ],
        stable=[tables.stable_cells(row) for row in summary.stability],
        histogram=histogram([done[n] for n in summary.clean]),
        trials=summary.results,
    )
