"""The geometry of the per-class chart: who gets a bar, how long it is, where the threshold falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from doorward.core.formatting import class_label, number
from doorward.core.records import Finding

#: Up to this many classes, each has its bar; of more, the highest `TOP` have, and a strip shows all.
#: Without an alarm `TOP` are enough.
ALL_BARS = 50
TOP = 20


@dataclass(frozen=True)
class Bar:
    """One class. The bar goes from `start` to `end`, in percent; there is no `end` without a score."""

    label: str
    value: str
    start: float
    end: float | None
    target: bool
    above: bool


@dataclass(frozen=True)
class Tick:
    """One class's place in the strip, in percent."""

    place: float
    target: bool


@dataclass(frozen=True)
class Strip:
    """The strip that shows every class as a tick, on an axis of its own from `low` to `high`."""

    ticks: tuple[Tick, ...]
    threshold: float | None
    low: str
    high: str


@dataclass(frozen=True)
class Chart:
    """The drawing of one finding's scores by class.

    Attributes:
        score_name: what is measured.
        bars: the classes shown, highest score first, those without a score last.
        threshold: its place in percent, or None.
        scored, unscored: how many classes have a score, and how many could not be told.
        strip: all classes on one line, where not every class has a bar.
    """

    score_name: str
    bars: tuple[Bar, ...]
    threshold: float | None
    threshold_label: str
    scored: int
    unscored: int
    strip: Strip | None


def per_class_chart(finding: Finding, classes: tuple[str, ...]) -> Chart | None:
    """Lay out a finding's scores by class; None where no class has a score."""
    scores = {c: score for c, score in finding.per_class.items() if score is not None}
    if not scores:
        return None
    unknown = sorted({*finding.per_class, *finding.unknown_classes} - set(scores))
    order = sorted(scores, key=lambda c: (-scores[c], c))
    many = len(scores) + len(unknown) > (ALL_BARS if finding.flagged else TOP)
    limit = [] if finding.threshold is None else [finding.threshold]
    write = _writer([*scores.values(), *limit])
    strip = None
    if many:
        edges = [*scores.values(), *limit]
        place = _axis(edges)
        strip = Strip(
            ticks=tuple(Tick(place(scores[c]), c in finding.targets) for c in sorted(scores)),
            threshold=place(limit[0]) if limit else None,
            low=write(min(edges)),
            high=write(max(edges)),
        )
        order = [*order[:TOP], *(c for c in order[TOP:] if c in finding.targets)][:ALL_BARS]
    place = _axis([0.0, *(scores[c] for c in order), *limit])
    bars = [
        Bar(
            label=class_label(c, classes),
            value=write(scores[c]),
            start=place(0.0),
            end=place(scores[c]),
            target=c in finding.targets,
            above=bool(limit) and scores[c] >= limit[0],
        )
        for c in order
    ]
    bars += [
        Bar(
            label=class_label(c, classes),
            value=finding.unknown_classes.get(c, "no reason was given"),
            start=place(0.0),
            end=None,
            target=c in finding.targets,
            above=False,
        )
        for c in unknown
        if not many
    ]
    return Chart(
        score_name=finding.score_name,
        bars=tuple(bars),
        threshold=place(limit[0]) if limit else None,
        threshold_label=write(limit[0]) if limit else "",
        scored=len(scores),
        unscored=len(unknown),
        strip=strip,
    )


def _axis(values: Sequence[float]) -> Callable[[float], float]:
    """Return the map from a score to its place, in percent, on an axis that just holds the values."""
    low, high = min(values), max(values)
    return lambda score: round(100 * (score - low) / ((high - low) or 1.0), 2)


def _writer(values: Sequence[float]) -> Callable[[float], str]:
    """Return a writer of numbers that gives all of one chart equally many decimals."""
    largest = max(map(abs, values))
    if not 0.001 <= largest < 1e6:
        return number
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return lambda value: f"{value:,.{decimals}f}"
