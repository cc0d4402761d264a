"""The bank of clean models: how often a clean model scores so high. Pure functions on records.

Outlier rules over the classes of one model are no p-values, since real classes are not exchangeable; clean
models of data sets and architectures that differ are much more so. The bank holds each detector's score on
some hundreds of them (`tools/rebuild_bank.py` writes it), and a score's p-value is its place among those. It
holds as far as a user's model is like one of the bank's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from doorward import registry
from doorward.records import Finding, Record

Floats = npt.NDArray[np.float64]

#: Where the bank lies that comes with the package.
SHIPPED = Path(__file__).parent / "reference" / "null.json"

#: The fused p-values up to which a model is suspicious, and up to which one that is confirmed is backdoored.
SUSPICIOUS, BACKDOORED = 0.02, 0.01

#: Numbers of classes whose scores are alike.
BUCKETS = ((2, 2), (3, 9), (10, 20), (21, 100))

#: Every model of the bank has at least so many.
FEWEST_CONVOLUTIONS = 2
#: Clean models in a bucket below which nothing is said of it.
FEWEST = 10


@dataclass(frozen=True)
class Standard:
    """Hold where scores of models lie, and how far their upper half spreads, for each detector.

    More classes have a larger maximum by chance alone; measured from here, scores of models with few and
    with many classes can be compared.

    Attributes:
        middle, spread: (detectors,).
    """

    middle: Floats
    spread: Floats

    @staticmethod
    def among(scores: Floats) -> Standard:
        """Return the medians of scores (m, detectors), and the mean distance of the upper halves above."""
        middle = np.median(scores, axis=0)
        spread = 2 * np.maximum(scores - middle, 0).mean(axis=0)
        return Standard(middle, np.maximum(spread, 1e-9))

    def of(self, scores: Floats) -> Floats:
        """Return the places of scores (m, detectors)."""
        return (scores - self.middle) / self.spread


class Standing(Record):
    """Hold how one detector's score compares.

    Attributes:
        p_value: of this score alone.
        thresholds: the least score that makes the fused p-value at most `SUSPICIOUS`, and `BACKDOORED`;
            infinite if none does.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    p_value: float
    thresholds: tuple[float, float]


class Comparison(Record):
    """Hold how a model compares: by all its detectors, and by each of those that can be compared."""

    p_value: float
    standings: dict[str, Standing]


class CleanModel(Record):
    """Hold what the detectors said of one clean model.

    Attributes:
        data: its data set.
        shape: of one image: channels, height, width.
        robust: adversarially trained.
        scores: the highest over the classes by detector; None where one could not tell.
    """

    data: str
    architecture: str
    classes: int = Field(ge=2)
    shape: tuple[int, int, int]
    robust: bool = False
    accuracy: float
    scores: dict[str, float | None]


class Bank(Record):
    """Hold scores of clean models, and tell how a score compares.

    Attributes:
        settings: of each detector when the scores were made.
        shares: of the false alarms, by detector; what is fused counts in proportion.
        images: how many were given with every model.
        made_with: versions.
        models: the clean models.
    """

    settings: dict[str, dict[str, Any]]
    shares: dict[str, float] = Field(default_factory=dict)
    images: int = 100
    made_with: dict[str, str]
    models: tuple[CleanModel, ...]

    def without(self, data: str) -> Bank:
        """Return the bank without the models of one data set."""
        models = tuple(m for m in self.models if m.data != data)
        # made anew: a copy would keep what was worked out of all models
        return Bank(**{name: getattr(self, name) for name in type(self).model_fields} | {"models": models})

    def outside(self, classes: int, shape: Sequence[int], convolutions: int | None = None) -> str | None:
        """Say in what a model differs from all that are in the bank; None if it does not.

        Args:
            shape: of one image: channels, height, width.
            convolutions: kernels larger than a pixel, None if that is not known; a transformer has one.
        """
        if convolutions is not None and convolutions < FEWEST_CONVOLUTIONS:
            return "the bank's models are convolutional networks, which this one is not"
        most = max(high for _, high in BUCKETS)
        if classes > most:
            return f"the bank's models have at most {most} classes, this one has {classes}"
        sides = [side for model in self.models for side in model.shape[1:]]
        if not sides or not min(sides) <= min(shape[1:]) <= max(shape[1:]) <= max(sides):
            known = f"of {min(sides)} to {max(sides)} pixels a side" if sides else "none"
            return f"the bank's images are {known}, this model's {shape[2]}x{shape[1]}"
        return None

    def compare(self, scores: Mapping[str, float], classes: int) -> Comparison | None:
        """Compare a model's scores, by detector, with those of clean models; None if none can be compared.

        The model joins the bank, and all are treated alike: each detector's score is measured from what is
        usual for about as many classes and ranked among all; a model's rank is its best one over the
        detectors, each divided by the detector's share of the false alarms, so that detectors which agree
        are not paid for twice (Westfall and Young's min-p, weighted); its p-value is the share of models
        that rank as high. For a clean model that is exchangeable with those of the bank, p <= a comes up in
        at most a share a of cases (full conformal prediction).

        Source: P. H. Westfall, S. S. Young, Resampling-Based Multiple Testing, Wiley 1993; V. Vovk,
        A. Gammerman, G. Shafer, Algorithmic Learning in a Random World, Springer 2005.
        """
        names = [name for name in scores if (name, bucket(classes)) in self._usable]
        if not names:
            return None
        models = [m for m in self.models if all((n, bucket(m.classes)) in self._usable for n in names)]
        models = [m for m in models if all(m.scores.get(n) is not None for n in names)]
        held = np.array([[m.scores[n] for n in names] for m in models], dtype=np.float64)  # (n, detectors)
        of = np.array([bucket(m.classes) for m in models] + [bucket(classes)])  # (n + 1,)
        joined = np.vstack([held, [scores[n] for n in names]])  # (n + 1, detectors), the model is the last
        places = np.empty_like(joined)
        for b in set(of.tolist()):
            places[of == b] = Standard.among(joined[of == b]).of(joined[of == b])
        own = Standard.among(joined[of == of[-1]])
        # how many are as high, itself among them: (n + 1, detectors)
        ranks = np.stack([_ranks(column) for column in places.T], axis=1)
        shares = np.array([self.shares.get(name, 1.0) for name in names])
        best = (ranks / shares).min(axis=1)  # (n + 1,)
        ordered = np.sort(best)

        def threshold(i: int, level: float) -> float:
            too_many = ordered[int(level * len(best) + 1e-9)]  # this one must not rank as high
            enough = int(np.count_nonzero(np.arange(1, len(best) + 1) / shares[i] < too_many))
            if not enough:
                return float("inf")
            beaten = np.sort(places[:-1, i])[-min(enough, len(held))]
            least = float(np.nextafter(own.middle[i] + beaten * own.spread[i], np.inf))
            # rounding must not part the threshold from the rank
            score = scores[names[i]]
            return (
                min(least, score)
                if ranks[-1, i] <= enough
                else max(least, float(np.nextafter(score, np.inf)))
            )

        standings = {
            name: Standing(
                p_value=float(ranks[-1, i]) / len(best),
                thresholds=(threshold(i, SUSPICIOUS), threshold(i, BACKDOORED)),
            )
            for i, name in enumerate(names)
        }
        return Comparison(p_value=float((best <= best[-1]).mean()), standings=standings)

    @cached_property
    def _usable(self) -> frozenset[tuple[str, int]]:
        """Return which detectors have scores enough, in which buckets."""
        counts = Counter(
            (name, bucket(m.classes)) for m in self.models for name, s in m.scores.items() if s is not None
        )
        return frozenset(pair for pair, count in counts.items() if count >= FEWEST)


def _ranks(values: Floats) -> npt.NDArray[np.int64]:
    """Return for each value how many are as high or higher, itself among them."""
    ranks: npt.NDArray[np.int64] = len(values) - np.searchsorted(np.sort(values), values, side="left")
    return ranks


def bucket(classes: int) -> int:
    """Return which bucket a number of classes falls into; the last for more than there are."""
    return next((b for b, (_, high) in enumerate(BUCKETS) if classes <= high), len(BUCKETS) - 1)


@lru_cache
def shipped() -> Bank:
    """Return the bank that comes with the package."""
    return Bank.model_validate_json(SHIPPED.read_text(encoding="utf-8"))


class Judged(Record):
    """Hold findings as the bank judges them, the fused p-value, and which scores it cannot compare."""

    findings: tuple[Finding, ...]
    p_value: float | None = None
    unjudged: tuple[str, ...] = ()


def judge(findings: Sequence[Finding], bank: Bank, *, covered: bool = True) -> Judged:
    """Give findings the p-value, threshold, verdict and targets that the bank gives their scores.

    What has no score to be calibrated stays as it is.

    Args:
        covered: whether the bank has models like this one.
    """
    scores = {
        f.detector: f.score
        for f in findings
        if f.level == "model" and f.kind == "backdoor" and f.reason is None and f.score is not None
    }
    classes = max((len(f.per_class) for f in findings if f.detector in scores), default=0)
    compared = bank.compare(scores, classes)
    standings = compared.standings if compared else {}
    judged = []
    for f in findings:
        if f.detector not in scores:
            judged.append(f)
            continue
        standing = standings.get(f.detector)
        threshold, strict = standing.thresholds if standing else (float("inf"), float("inf"))
        flagged = scores[f.detector] >= threshold
        judged.append(
            f.model_copy(
                update={
                    "p_value": standing.p_value if standing else None,
                    "threshold": threshold if threshold < float("inf") else None,
                    "verdict": "suspicious" if flagged else "nothing_found",
                    "targets": _targets(f, strict) if flagged else (),
                    "calibrated": bool(standing) and covered and f.settings == bank.settings[f.detector],
                    "atlas": registry.get("detector", f.detector).atlas if flagged else (),
                }
            )
        )
    return Judged(
        findings=tuple(judged),
        p_value=compared.p_value if compared else None,
        unjudged=tuple(name for name in scores if name not in standings),
    )


def _targets(finding: Finding, strict: float) -> tuple[int, ...]:
    """Return the class with the highest score, and others that would make a model backdoored alone.

    A second class that is only suspicious is more often one that is easy by nature than a second target.
    """
    scores = {t: s for t, s in finding.per_class.items() if s is not None}
    top = max(scores.values())
    return tuple(sorted(t for t, s in scores.items() if s == top or s >= strict))
