"""The bank of clean models: how often a clean model scores so high. Pure functions on records.

Outlier rules over the classes of one model are no p-values, since real classes are not exchangeable; clean
models of data sets and architectures that differ are much more so. The bank holds each detector's score on
some hundreds of them (`doorward bench bank` writes it), and a score's p-value is its place among those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from doorward import registry
from doorward.records import Finding, Record

Floats = npt.NDArray[np.float64]

#: Where the bank lies that comes with the package.
SHIPPED = Path(__file__).parent / "reference" / "null.json"

#: The fused p-value up to which a model is suspicious.
SUSPICIOUS = 0.05

#: Numbers of classes whose scores are alike.
BUCKETS = ((2, 2), (3, 9), (10, 20), (21, 100))


#: Every model of the bank has so many.
FEWEST_CONVOLUTIONS = 2
#: Clean models in a bucket below which nothing is said of it.
FEWEST = 10


class Standard(Record):
    """Hold where the scores of clean models lie, and how far their upper half spreads.

    More classes have a larger maximum by chance alone; measured from here, scores of models with few and
    with many classes can be compared.
    """

    middle: float
    spread: float

    @staticmethod
    def among(scores: Floats) -> Standard:
        """Return the median (m,), and the mean distance of the upper half above it."""
        middle = float(np.median(scores))
        return Standard(middle=middle, spread=max(float(np.maximum(scores - middle, 0).mean() * 2), 1e-9))

    def of(self, score: float) -> float:
        """Return a score's place."""
        return (score - self.middle) / self.spread

    def back(self, place: float) -> float:
        """Return the score at a place."""
        return self.middle + place * self.spread


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
        made_with: versions.
        models: the clean models.
    """

    settings: dict[str, dict[str, Any]]
    made_with: dict[str, str]
    models: tuple[CleanModel, ...]

    def without(self, data: str) -> Bank:
        """Return the bank without the models of one data set."""
        models = tuple(m for m in self.models if m.data != data)
        # made anew: a copy would keep what was worked out of all models
        return Bank(settings=self.settings, made_with=self.made_with, models=models)

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

    def p_value(self, detector: str, score: float, classes: int) -> float | None:
        """Return the share of clean models that score as high, this one counted among them.

        None if the bank knows nothing of the detector for so many classes.
        """
        standard = self._standards.get((detector, bucket(classes)))
        if standard is None:
            return None
        return self._share(detector, standard.of(score))

    def fuse(self, p_values: Mapping[str, float]) -> float:
        """Return one p-value for what several detectors said (Westfall and Young's min-p).

        The smallest p-value is compared with the smallest of each clean model over the same detectors, so
        that detectors which agree are not paid for twice.

        Source: P. H. Westfall, S. S. Young, Resampling-Based Multiple Testing, Wiley 1993.
        """
        smallest = self._smallest(tuple(sorted(p_values)))
        return float(1 + np.count_nonzero(smallest <= min(p_values.values()))) / (len(smallest) + 1)

    def threshold(self, detector: str, among: Sequence[str], classes: int, level: float) -> float:
        """Return the least score with which a detector alone makes the fused p-value at most `level`.

        Infinite if the bank is too small for that level, or knows nothing of the detector.

        Args:
            among: the detectors that are fused.
        """
        standard = self._standards.get((detector, bucket(classes)))
        smallest = np.sort(self._smallest(tuple(sorted(among))))
        allowed = int(level * (len(smallest) + 1) + 1e-9) - 1  # so many clean models may do as well
        if standard is None or allowed < 0:
            return float("inf")
        bound = smallest[allowed]  # the p-value has to lie below that of the first one too many
        held = np.sort(self._known(detector))[::-1]
        # with m clean models as high, the p-value is (1 + m) / (n + 1)
        fitting = np.flatnonzero((1 + np.arange(len(held))) / (len(held) + 1) < bound)
        if not len(fitting):
            return float("inf")
        return float(np.nextafter(standard.back(held[fitting[-1]]), np.inf))

    def _share(self, detector: str, z: float) -> float:
        held = self._known(detector)
        return float(1 + np.count_nonzero(held >= z)) / (len(held) + 1)

    def _known(self, detector: str) -> Floats:
        z = self._places[detector]
        return z[~np.isnan(z)]

    @cached_property
    def _standards(self) -> dict[tuple[str, int], Standard]:
        """Return what is usual, by detector and bucket."""
        found = {}
        for detector in self.settings:
            for b in range(len(BUCKETS)):
                scores = [m.scores.get(detector) for m in self.models if bucket(m.classes) == b]
                known = np.array([s for s in scores if s is not None])
                if len(known) >= FEWEST:
                    found[detector, b] = Standard.among(known)
        return found

    @cached_property
    def _places(self) -> dict[str, Floats]:
        """Return every clean model's standard score (n,), by detector; NaN where there is none."""
        places = {name: np.full(len(self.models), np.nan) for name in self.settings}
        for i, model in enumerate(self.models):
            for name, score in model.scores.items():
                standard = self._standards.get((name, bucket(model.classes)))
                if score is not None and standard is not None:
                    places[name][i] = standard.of(score)
        return places

    def _smallest(self, detectors: tuple[str, ...]) -> Floats:
        """Return the smallest p-value of every clean model, each left out of what it is compared with."""
        ranked = []
        for name in detectors:
            z = self._places[name]
            known = np.sort(z[~np.isnan(z)])
            # as many are as high as itself, itself among them
            as_high = len(known) - np.searchsorted(known, z, side="left")
            ranked.append(np.where(np.isnan(z), 1.0, as_high / max(1, len(known))))
        smallest: Floats = np.min(ranked, axis=0)
        return smallest


def bucket(classes: int) -> int:
    """Return which bucket a number of classes falls into; the last for more than there are."""
    return next((b for b, (_, high) in enumerate(BUCKETS) if classes <= high), len(BUCKETS) - 1)


@lru_cache
def shipped() -> Bank:
    """Return the bank that comes with the package."""
    return Bank.model_validate_json(SHIPPED.read_text(encoding="utf-8"))


def judge(findings: Sequence[Finding], bank: Bank, *, covered: bool = True) -> tuple[Finding, ...]:
    """Return findings with the p-value, threshold, verdict and targets that the bank gives their scores.

    What another bank said of them is forgotten. What has no score to be calibrated is returned as it is.

    Args:
        covered: whether the bank has models like this one.
    """
    findings = [_raw(f) for f in findings]
    among = [f.detector for f in findings if f.detector in bank.settings and f.score is not None]
    judged = []
    for f in findings:
        if f.detector not in among or f.score is None:
            judged.append(f)
            continue
        classes = len(f.per_class)
        p = bank.p_value(f.detector, f.score, classes)
        if p is None:
            judged.append(f)
            continue
        threshold = bank.threshold(f.detector, among, classes, SUSPICIOUS)
        flagged = f.score >= threshold
        judged.append(
            f.model_copy(
                update={
                    "p_value": p,
                    "threshold": threshold if threshold < float("inf") else None,
                    "verdict": "suspicious" if flagged else "nothing_found",
                    "targets": tuple(
                        t for t, s in sorted(f.per_class.items()) if s is not None and s >= threshold
                    ),
                    "calibrated": covered and f.settings == bank.settings[f.detector],
                    "atlas": registry.get("detector", f.detector).atlas if flagged else (),
                }
            )
        )
    return tuple(judged)


def _raw(finding: Finding) -> Finding:
    """Return a finding as it was before a bank judged it."""
    if finding.p_value is None:
        return finding
    judgement = {"p_value": None, "threshold": None, "verdict": "nothing_found", "targets": ()}
    return finding.model_copy(update=judgement | {"calibrated": False, "atlas": ()})
