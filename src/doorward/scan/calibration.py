"""Calibration: how often a clean model scores so high. Pure functions on records.

Outlier rules over the classes of one model are no p-values, since real classes are not exchangeable; clean
models of data sets and architectures that differ are much more so. The calibration set holds each detector's
score on some hundreds of them (`doorward bench calibrate` writes it), and a model's p-value is the share of
them with a class as suspicious. It holds as far as a user's model is like one of the calibration set's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError

from doorward.core.errors import InputError
from doorward.core.records import Finding, Measurement, Record, Verdict
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.methods.source import file_of

Floats = npt.NDArray[np.float64]

#: Where the calibrations lie that come with the package.
SHIPPED = Path(__file__).parent.parent / "bundled" / "calibration"

#: How a file says that it is of a detector's quick settings: `NAME.quick.json`.
QUICK = "quick"

#: The fused p-values up to which a model is suspicious, and up to which one that is confirmed is backdoored.
SUSPICIOUS, BACKDOORED = 0.02, 0.01

#: Numbers of classes by which models are counted; where the calibration set has few, nothing is said.
BUCKETS = ((2, 2), (3, 9), (10, 20), (21, 100))

#: Most classes of models whose scores are measured among each other; those of more are the last group.
ALIKE = (2, 4)

#: Spreads above what is usual from which on no threshold is told: hardly any score lies there.
FARTHEST = 20.0

#: Every model of the calibration set has at least so many.
FEWEST_CONVOLUTIONS = 2
#: Share of the models that another detector was calibrated on from which on both are fused.
SHARED = 0.9
#: Clean models in a bucket below which nothing is said of it.
FEWEST = 10
#: Clean models that witnesses have in common from which on the farthest of them is ranked: as many as it
#: takes for a model to be suspicious at all.
ENOUGH = round(1 / SUSPICIOUS) - 1


@dataclass(frozen=True)
class ScoreScale:
    """Where scores of models lie, and how far their upper half spreads, for each detector.

    With two classes each is the other's only measure, and with three or four there are few others; measured
    from here, scores of models with few and with more classes can be compared.

    Attributes:
        middle, spread: (detectors,).
    """

    middle: Floats
    spread: Floats

    @staticmethod
    def among(scores: Floats) -> ScoreScale:
        """Return the medians of scores (m, detectors), and the mean distance of the upper halves above."""
        middle = np.median(scores, axis=0)
        spread = 2 * np.maximum(scores - middle, 0).mean(axis=0)
        return ScoreScale(middle, np.maximum(spread, 1e-9))

    def of(self, scores: Floats) -> Floats:
        """Return the places of scores (m, detectors): sign(d) log(1 + |d|), d spreads above the middle.

        One detector that goes far beyond what is usual is worth less than two that go half as far.
        """
        far = (scores - self.middle) / self.spread
        return np.sign(far) * np.log1p(np.abs(far))

    def at(self, normalised: Floats) -> Floats:
        """Return the scores at places, of the same shape, which ends in (detectors,): the inverse of `of`."""
        return self.middle + self.spread * np.sign(normalised) * np.expm1(np.abs(normalised))


@dataclass(frozen=True)
class Sum:
    """Take detectors together by the weighted sum of their places.

    Attributes:
        weights: (detectors,).
        floored: what a detector has below the usual does not count, so that none is outvoted by the others.
        origin: what is taken off.
    """

    weights: Floats
    floored: bool = False
    origin: float = 0.0

    def total(self, places: Floats) -> Floats:
        """Return what places (..., detectors) come to: (...)."""
        return self._counted(places) @ self.weights - self.origin

    def comparable(self, places: Floats, starts: npt.NDArray[np.int64]) -> Sum:
        """Return the sum in other units: 0 is the middle of models' highest sums, 1 their upper spread.

        Args:
            places: (classes of all models, detectors).
            starts: (m,) the row where each model begins.
        """
        far = ScoreScale.among(np.maximum.reduceat(self.total(places), starts)[:, None])
        return Sum(self.weights / far.spread, self.floored, float(far.middle[0] / far.spread[0]))

    def needed(self, places: Floats, i: int, least: float) -> float:
        """Return the place of the detector number i from which on places (detectors,) come to `least`."""
        counted = self._counted(places)
        return float(counted[i] + (least - self.total(places)) / self.weights[i])

    def _counted(self, places: Floats) -> Floats:
        return np.maximum(places, 0) if self.floored else places


class DetectorResult(Record):
    """How one detector's scores compare.

    Attributes:
        p_value: of the highest score alone.
        threshold: the least highest score that would be flagged, all else as it is; infinite if none would,
            or only one that is farther from what is usual than scores are.
        flagged: whether it speaks for a class that the detectors together find suspicious.
        targets: that class, and others that would be enough for a backdoor alone; none if not flagged.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    p_value: float
    threshold: float
    flagged: bool
    targets: tuple[int, ...] = ()


class Comparison(Record):
    """How a model compares.

    Attributes:
        p_value: of the witness that goes farthest, corrected for their number.
        standings: of each detector that can be compared.
        margins: of each class, how far it stands above what makes a model suspicious; 1 is what the farther
            half of clean models spreads; minus infinity where there are too few of them for that.
        beyond: how far the one that stands out most lies beyond all clean models, in the same unit.
        fused: those that were calibrated on the same models.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    p_value: float
    standings: dict[str, DetectorResult]
    margins: tuple[float, ...]
    beyond: float
    fused: tuple[str, ...] = ()


class ScoredModel(Record):
    """One detector's scores on one clean model.

    Attributes:
        name: of the model, the same in every detector's calibration.
        data: its data set.
        shape: of one image: channels, height, width.
        robust: adversarially trained.
        scores: of each class, None where the detector could not tell; None if it could not tell of the model.
    """

    name: str
    data: str
    architecture: str
    classes: int = Field(ge=2)
    shape: tuple[int, int, int]
    robust: bool = False
    accuracy: float
    scores: tuple[float | None, ...] | None


class Calibration(Record):
    """One detector's scores on clean models, and what they hold for; a file `calibration/DETECTOR.json`.

    Attributes:
        weight: of the detector in the sum that is fused.
        witness: name of a group of detectors that is judged by itself, so that others do not outvote it; the
            usual ones, which are fused, if None.
        images: how many clean images were given with every model.
        settings: those that affect the score.
        code: hash of the code that makes the score.
        made_with: versions.
    """

    detector: str
    weight: float = Field(1.0, gt=0)
    witness: str | None = None
    images: int = Field(100, ge=0)
    settings: dict[str, Any]
    code: str
    made_with: dict[str, str] = Field(default_factory=dict)
    models: tuple[ScoredModel, ...]

    def to_text(self) -> str:
        """Return the text of a calibration file, with one line for each model."""
        head = json.dumps(self.model_dump(mode="json", exclude={"models"}), indent=2)
        lines = ",\n".join("    " + json.dumps(m.model_dump(mode="json")) for m in self.models)
        return head[:-2] + f',\n  "models": [\n{lines}\n  ]\n}}\n'

    @staticmethod
    def read(file: Path) -> Calibration:
        """Read a calibration file.

        Raises:
            InputError: if it cannot be read or holds something else.
        """
        try:
            return Calibration.model_validate_json(file.read_bytes())
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise InputError(f"{file}: this is no calibration of a detector: {where}") from error


class CleanModel(Record):
    """All detectors' scores on one clean model; attributes as those of `ScoredModel`."""

    name: str
    data: str
    architecture: str
    classes: int = Field(ge=2)
    shape: tuple[int, int, int]
    robust: bool = False
    accuracy: float
    scores: dict[str, tuple[float | None, ...] | None]


class CalibrationSet(Record):
    """The calibrations of several detectors, joined by model.

    Attributes:
        settings, code, weights, witnesses: of each detector; those that have no witness are left out there.
        images: how many were given with every model.
        models: the clean models.
    """

    settings: dict[str, dict[str, Any]]
    code: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, float] = Field(default_factory=dict)
    witnesses: dict[str, str] = Field(default_factory=dict)
    images: int = 100
    models: tuple[CleanModel, ...]

    @staticmethod
    def of(calibrations: Iterable[Calibration]) -> CalibrationSet:
        """Join calibrations; models of the same name are one."""
        joined: dict[str, CleanModel] = {}
        known = sorted(calibrations, key=lambda one: one.detector)
        for one in known:
            for model in one.models:
                own = joined.get(model.name) or CleanModel(**model.model_dump() | {"scores": {}})
                scores = own.scores | {one.detector: model.scores}
                joined[model.name] = own.model_copy(update={"scores": scores})
        return CalibrationSet(
            settings={one.detector: one.settings for one in known},
            code={one.detector: one.code for one in known},
            weights={one.detector: one.weight for one in known},
            witnesses={one.detector: one.witness for one in known if one.witness is not None},
            images=max((one.images for one in known), default=0),
            models=tuple(joined.values()),
        )

    def mismatch(self, seen: Measurement) -> str | None:
        """Say why a measurement cannot be compared with these clean models; None if it can."""
        if seen.detector not in self.settings:
            return "how high it scores clean models has not been measured"
        wanted = self.settings[seen.detector]
        changed = sorted(name for name, value in wanted.items() if seen.settings.get(name) != value)
        if changed:
            return f"clean models were scanned with other settings ({', '.join(changed)})"
        if seen.code is not None and self.code.get(seen.detector, seen.code) != seen.code:
            return "its code has changed since clean models were scanned"
        if seen.per_class and (seen.detector, bucket(len(seen.per_class))) not in self._usable:
            return f"too few clean models with {len(seen.per_class)} classes, or about as many, were scanned"
        return None

    def silent(self, seen: Measurement, classes: int) -> str | None:
        """Say why nothing was to be expected of a detector that could not tell; None where something was.

        Args:
            classes: of the model, as other detectors judged them; 0 if none did.
        """
        if seen.reason is None or not classes or (seen.detector, bucket(classes)) in self._usable:
            return None
        return f"no clean model with {classes} classes, or about as many, has a score"

    def knows(self, detector: Detector, classes: int) -> bool:
        """Return whether a detector with its settings can be compared on models of so many classes."""
        blank = detector.measurement(summary="", per_class=dict.fromkeys(range(classes), 0.0))
        return self.mismatch(blank) is None

    def without(self, data: str) -> CalibrationSet:
        """Return the calibration set without the models of one data set."""
        models = tuple(m for m in self.models if m.data != data)
        # made again: a copy would keep what was worked out of all models
        return CalibrationSet(
            **{name: getattr(self, name) for name in type(self).model_fields} | {"models": models}
        )

    def outside(self, classes: int, shape: Sequence[int], convolutions: int | None = None) -> str | None:
        """Return in what a model differs from all calibration models; None if in nothing.

        Args:
            shape: of one image: channels, height, width.
            convolutions: kernels larger than a pixel, None if that is not known; a transformer has one.
        """
        if convolutions is not None and convolutions < FEWEST_CONVOLUTIONS:
            return "the calibration models are convolutional networks, which this one is not"
        most = max(high for _, high in BUCKETS)
        if classes > most:
            return f"the calibration models have at most {most} classes, this one has {classes}"
        sides = [side for model in self.models for side in model.shape[1:]]
        if not sides or not min(sides) <= min(shape[1:]) <= max(shape[1:]) <= max(sides):
            known = f"of {min(sides)} to {max(sides)} pixels a side" if sides else "none"
            return f"the calibration images are {known}, this model's {shape[2]}x{shape[1]}"
        return None

    def compare(self, scores: Mapping[str, Sequence[float | None]]) -> Comparison | None:
        """Compare a model's scores of each class, by detector, with those of clean models.

        The model joins the calibration set, and all are treated alike: each detector's scores are measured
        from what is usual for the highest ones of models like it (of two classes, of three or four, or of
        more), in logarithms; a class's sum over the detectors, weighted, says how suspicious it is to all of
        them, so that detectors which agree on a class weigh more than one that goes far alone; a model's
        p-value is the share of models that have a class with so high a sum. For a clean model that is
        exchangeable with those of the calibration set, p <= a comes up in at most a share a of cases (full
        conformal prediction).

        Detectors are fused where they were calibrated on the same clean models. One that was calibrated on
        others is judged alone, and raises an alarm at the stricter level only: what it adds to the share of
        clean models that are flagged is at most that level.

        Detectors of a witness are judged by themselves, and look for different kinds: there only what each
        has above the usual is summed. The p-value is then that of the witness which goes farthest beyond what
        is usual for it, among what the farthest witness of each clean model reaches. Where too few clean
        models have the scores of all witnesses, it is the least of theirs, times their number (Bonferroni).

        Returns None if there are too few models that can be compared.

        Source: V. Vovk, A. Gammerman, G. Shafer, Algorithmic Learning in a Random World, Springer 2005; of
        the farthest of several: L. Tippett, The Methods of Statistics, 1931.
        """
        classes = max(map(len, scores.values()), default=0)
        names = [name for name in scores if (name, bucket(classes)) in self._usable]
        if not names:
            return None
        usual = [name for name in names if name not in self.witnesses]
        fused = self._together(usual, classes) if usual else []
        apart = sorted({self.witnesses[name] for name in names if name in self.witnesses})
        groups = [[n for n in names if self.witnesses.get(n) == witness] for witness in apart]
        parts = self._sharing([fused, *groups] if fused else groups)
        found = [self._rank(scores, part, SUSPICIOUS / len(parts), BACKDOORED / len(parts)) for part in parts]
        alone = [self._rank(scores, [[name]], BACKDOORED, BACKDOORED) for name in usual if name not in fused]
        return Comparison(
            p_value=min(1.0, len(parts) * min(one.p_value for one in found)),
            standings={name: s for one in (*found, *alone) for name, s in one.standings.items()},
            margins=tuple(np.max([one.margins for one in (*found, *alone)], axis=0).tolist()),
            beyond=max(one.beyond for one in (*found, *alone)),
            fused=tuple(fused),
        )

    def _together(self, names: Sequence[str], classes: int) -> list[str]:
        """Return the detectors that were calibrated on the same models, as those with most of them were.

        Models with two classes count for models with two classes alone: some detectors do not judge them.
        """
        alike = [m for m in self.models if _alike(m.classes) == _alike(classes)]
        scanned = {n: {m.name for m in alike if m.scores.get(n) is not None} for n in names}
        most = max(scanned.values(), key=len)
        return [name for name in names if len(scanned[name] & most) >= SHARED * len(most)]

    def _sharing(self, groups: Sequence[list[str]]) -> list[list[list[str]]]:
        """Return groups of detectors in parts: in each, enough clean models have the scores of all groups."""
        parts: list[list[list[str]]] = []
        for group in groups:
            part = next((one for one in parts if self._common((*one, group)) >= ENOUGH), None)
            if part is None:
                parts.append([group])
            else:
                part.append(group)
        return parts

    def _common(self, groups: Iterable[Sequence[str]]) -> int:
        """Return how many models all detectors of some groups can be compared on."""
        return len(self._stacked(tuple(chain.from_iterable(groups)))[1])

    def _rank(
        self,
        scores: Mapping[str, Sequence[float | None]],
        groups: Sequence[Sequence[str]],
        level: float,
        strict: float,
    ) -> Comparison:
        """Compare a model's scores by groups of detectors, each of which is fused; the farthest counts.

        Args:
            level, strict: the p-values up to which there is an alarm, and one of a backdoor.
        """
        names = tuple(chain.from_iterable(groups))
        classes = max(len(scores[name]) for name in names)
        stacked, starts, of = self._stacked(names)
        own = np.array([scores[n] for n in names], dtype=np.float64).T  # (k, detectors)
        stack, starts = np.vstack([stacked, own]), np.append(starts, len(stacked))
        group = _alike(classes)
        of = np.append(of, group + 1 if 0 < group < len(ALIKE) and group not in of else group)
        highest = np.fmax.reduceat(stack, starts)  # (n + 1, detectors), the model is the last
        counts = np.diff(np.append(starts, len(stack)))  # classes of each model
        rows = of.repeat(counts)
        usual = {b: ScoreScale.among(highest[of == b]) for b in set(of.tolist())}
        alone, normalised = np.empty_like(highest), np.empty_like(stack)
        for b, scale in usual.items():
            alone[of == b], normalised[rows == b] = scale.of(highest[of == b]), scale.of(stack[rows == b])
        # what a detector cannot tell of a class speaks neither for nor against it
        normalised = np.nan_to_num(normalised)
        p_alone = (alone >= alone[-1]).mean(axis=0)  # (detectors,)
        columns = np.split(np.arange(len(names)), np.cumsum([len(one) for one in groups])[:-1])
        sums = []
        for own_columns in columns:
            weights = np.array([self.weights.get(names[i], 1.0) for i in own_columns])
            places = normalised[:, own_columns]
            together = Sum(weights, floored=names[own_columns[0]] in self.witnesses)
            together = together.comparable(places, starts)
            sums.append((together, together.total(places)))  # of each class of each model
        tops = np.stack([np.maximum.reduceat(total, starts) for _, total in sums])  # (groups, n + 1)
        others = np.sort(tops[:, :-1].max(axis=0))[::-1]
        scale, last = usual[int(of[-1])], starts[-1]
        standings, p_value = dict[str, DetectorResult](), 1.0
        farthest = np.max([total[last:] for _, total in sums], axis=0)  # of each class
        for own_columns, top, (together, total) in zip(columns, tops[:, -1], sums, strict=True):
            p_group = (1 + int((others >= top).sum())) / len(starts)
            model = RankedModel(
                own[:, own_columns],
                normalised[last:, own_columns],
                total[last:],
                together,
                ScoreScale(scale.middle[own_columns], scale.spread[own_columns]),
                others,
                level,
                strict,
            )
            found = {names[i]: model.standing(j, float(p_alone[i])) for j, i in enumerate(own_columns)}
            if p_group <= level and not any(one.flagged for one in found.values()):
                # each has another class on top: the one that speaks most for the common one stands for all
                first = int((model.normalised[model.top] * together.weights).argmax())
                name = names[own_columns[first]]
                found[name] = found[name].model_copy(
                    update={
                        "flagged": True,
                        "threshold": float(highest[-1, own_columns[first]]),
                        "targets": (model.top,),
                    }
                )
            standings |= found
            p_value = min(p_value, p_group)
        margins = tuple((farthest - model.enough(level)).tolist())
        beyond = float(farthest.max() - others[0])
        return Comparison(p_value=p_value, standings=standings, margins=margins, beyond=beyond)

    def _stacked(self, names: tuple[str, ...]) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the scores of models that all these detectors can be compared on, NaN where one cannot tell.

        Returns (classes of all models, detectors), the row where each model begins, and what it is alike to.
        """
        if names not in self._stacks:
            kept = [
                m
                for m in self.models
                if all((n, bucket(m.classes)) in self._usable and m.scores.get(n) is not None for n in names)
            ]
            tables = [np.array([m.scores[n] for n in names], dtype=np.float64).T for m in kept]
            starts = np.cumsum([0, *(len(table) for table in tables)])[:-1]
            of = np.array([_alike(m.classes) for m in kept], dtype=np.int64)
            for group in range(1, len(ALIKE)):
                if (of == group).sum() < FEWEST:  # too few to say what is usual among them
                    of[of == group] = group + 1
            self._stacks[names] = np.vstack([*tables, np.empty((0, len(names)))]), starts, of
        return self._stacks[names]

    @cached_property
    def _stacks(self) -> dict[tuple[str, ...], tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        return {}

    @cached_property
    def _usable(self) -> frozenset[tuple[str, int]]:
        """Return which detectors have scores enough, in which buckets."""
        counts = Counter(
            (name, bucket(m.classes)) for m in self.models for name, s in m.scores.items() if s is not None
        )
        return frozenset(pair for pair, count in counts.items() if count >= FEWEST)


@dataclass(frozen=True)
class RankedModel:
    """A model among those of the calibration set.

    Attributes:
        table: (k, detectors) its scores, NaN where one cannot tell.
        places: (k, detectors) where they lie.
        sums: (k,) of a class over the detectors.
        together: how detectors are taken together.
        scale: what is usual.
        others: (n,) the highest sums of the calibration models, in falling order; of the farthest witness.
        level, strict: the p-values up to which there is an alarm, and one of a backdoor.
    """

    table: Floats
    normalised: Floats
    sums: Floats
    together: Sum
    scale: ScoreScale
    others: Floats
    level: float
    strict: float

    @property
    def top(self) -> int:
        """Return the most suspicious class."""
        return int(self.sums.argmax())

    def enough(self, level: float) -> float:
        """Return the sum above which the p-value is at most `level`; infinite if none is."""
        above = int(level * (len(self.others) + 1) + 1e-9) - 1  # so many may be as high
        if above < 0:
            return float("inf")
        return float(self.others[above]) if above < len(self.others) else float("-inf")

    def standing(self, i: int, p_value: float) -> DetectorResult:
        """Return how the detector number i stands: by the class that it finds most suspicious itself.

        It is flagged if that is the class which is suspicious to all together, or one that would be enough
        for a backdoor, and if the detector has more to say of it than of most clean models.
        """
        own = int(np.nanargmax(self.table[:, i]))
        score, place = float(self.table[own, i]), float(self.normalised[own, i])
        strict = self.enough(self.strict)
        least = self.enough(self.level) if own == self.top else strict
        flagged = place > 0 and bool(self.sums[own] > least)
        needed = max(self.together.needed(self.normalised[own], i, least), 0.0)
        # the other detectors' places do not matter here
        threshold = float(self.scale.at(np.full(self.table.shape[1], min(needed, np.log1p(FARTHEST))))[i])
        if needed > np.log1p(FARTHEST) and not flagged:
            threshold = float("inf")
        # rounding must not part the threshold from what is flagged
        threshold = min(threshold, score) if flagged else max(threshold, float(np.nextafter(score, np.inf)))
        further = np.flatnonzero((self.sums > strict) & (self.normalised[:, i] > 0))
        targets = tuple(sorted({own, *further.tolist()})) if flagged else ()
        return DetectorResult(p_value=p_value, threshold=threshold, flagged=flagged, targets=targets)


def bucket(classes: int) -> int:
    """Return which bucket a number of classes falls into; the last for more than there are."""
    return next((b for b, (_, high) in enumerate(BUCKETS) if classes <= high), len(BUCKETS) - 1)


def _alike(classes: int) -> int:
    """Return which models a model's scores are measured among: of two classes, of three or four, or of more.

    Of two, each is the other's only measure; of three or four, one has so few others that it stands out from
    them by chance. Further buckets would be finer than the calibration set is wide.
    """
    return next((group for group, most in enumerate(ALIKE) if classes <= most), len(ALIKE))


def calibration_file(detector: str) -> Path:
    """Return where a detector's calibration lies: in the package, or next to the file of somebody else's."""
    module = (
        None if detector in registry.own_modules("detector") else registry.module_of("detector", detector)
    )
    file = file_of(module) if module else None
    if file:
        return file.parent / "calibration" / f"{detector}.json"
    wing = registry.own_modules("detector").get(detector, "").split(".")[-2:-1]
    # clean training sets are no clean models, so that they are kept apart
    return (SHIPPED / "training_data" if wing == ["training_data"] else SHIPPED) / f"{detector}.json"


def quick_file(detector: str) -> Path:
    """Return where a detector's calibration at its quick settings lies."""
    return calibration_file(detector).with_name(f"{detector}.{QUICK}.json")


def calibrations(
    detectors: Iterable[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> CalibrationSet:
    """Return the calibrations of some detectors, as far as there are any.

    Args:
        settings: with which each detector runs; of those at quick settings it is the calibration at these.

    Raises:
        InputError: if a file holds something else.
    """
    own = settings or {}
    return _joined(_stamped(_file_for(name, own.get(name, {})) for name in detectors))


def _file_for(detector: str, settings: Mapping[str, Any]) -> Path:
    """Return the file of the calibration that fits a detector's settings, the usual one where none does."""
    quick = quick_file(detector)
    if settings and quick.is_file():
        wanted = _joined(_stamped([quick])).settings[detector]
        if all(settings.get(name) == value for name, value in wanted.items()):
            return quick
    return calibration_file(detector)


def shipped() -> CalibrationSet:
    """Return the calibrations that come with the package."""
    return _joined(_stamped(file for file in SHIPPED.glob("*.json") if not file.stem.endswith(f".{QUICK}")))


def _stamped(files: Iterable[Path]) -> tuple[tuple[Path, int], ...]:
    """Return the files that are there, sorted, with the time of their last change."""
    return tuple((file, file.stat().st_mtime_ns) for file in sorted(set(files)) if file.is_file())


@lru_cache
def _joined(files: tuple[tuple[Path, int], ...]) -> CalibrationSet:
    return CalibrationSet.of(Calibration.read(file) for file, _ in files)


class JudgedFindings(Record):
    """Findings as the calibration judges them, the fused p-value, and how far it goes (see `Comparison`)."""

    model_config = ConfigDict(allow_inf_nan=True)

    findings: tuple[Finding, ...]
    p_value: float | None = None
    margins: tuple[float, ...] = ()
    beyond: float = 0.0


def judge(
    measurements: Sequence[Measurement], calibration: CalibrationSet, *, covered: bool = True
) -> JudgedFindings:
    """Give measurements the p-value, threshold, verdict and targets that follow from their scores.

    What has no score, or none that can be compared, has no part in it.

    Args:
        covered: whether the calibration has models like this one.
    """
    classes = max((len(m.per_class) for m in measurements), default=0)
    reasons = {m.detector: calibration.mismatch(m) or calibration.silent(m, classes) for m in measurements}
    scores = {
        m.detector: [m.per_class[t] for t in sorted(m.per_class)]
        for m in measurements
        if m.reason is None and reasons[m.detector] is None
    }
    compared = calibration.compare(scores)
    standings = compared.standings if compared else {}
    findings = tuple(
        _finding(m, standings.get(m.detector), covered=covered, uncalibrated=reasons[m.detector])
        for m in measurements
    )
    if compared is None:
        return JudgedFindings(findings=findings)
    told = {name: getattr(compared, name) for name in ("p_value", "margins", "beyond")}
    return JudgedFindings(findings=findings, **told)


def _finding(
    seen: Measurement, result: DetectorResult | None, *, covered: bool, uncalibrated: str | None
) -> Finding:
    """Return what follows from a measurement, of which `result` says how it compares."""
    base = {name: getattr(seen, name) for name in Measurement.model_fields}
    if result is None:
        verdict: Verdict = "could_not_tell" if seen.reason else "nothing_found"
        return Finding(**base | {"atlas": (), "verdict": verdict, "uncalibrated": uncalibrated})
    return Finding(
        **base
        | {
            "verdict": "suspicious" if result.flagged else "nothing_found",
            "p_value": result.p_value,
            "threshold": result.threshold if result.threshold < float("inf") else None,
            "targets": result.targets,
            "calibrated": covered,
            "atlas": seen.atlas if result.flagged else (),
        }
    )
