"""Activation clustering: within a class, what the model recognises by a trigger lies apart from the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.formatting import percent
from doorward.core.records import Evidence, Measurement, Picture, RecoveredTrigger, Table
from doorward.core.seeds import derive_seed
from doorward.detectors.subject import Subject
from doorward.detectors.training_data import _pattern as patterns
from doorward.detectors.training_data import _persistence as persistent
from doorward.detectors.training_data._exclusion import Reclassified, reclassify
from doorward.detectors.training_data._learned import BATCH, Learned
from doorward.detectors.training_data._pattern import CommonPattern
from doorward.detectors.training_data.base import TrainingDataDetector, rows_by_class
from doorward.methods.registry import register
from doorward.models.encode.dispatch import to_float, to_tensor
from doorward.models.encode.image import picture
from doorward.stats import metrics
from doorward.stats.clustering import Split, split_groups

Rule = Literal["combined", "reclassification", "relative-size", "silhouette"]
Floats = npt.NDArray[np.float64]

#: What a class's score measures, by rule, and from which score on the paper finds it poisoned.
SCORE_NAMES: dict[Rule, str] = {
    "combined": "share that surely leaves the class, beyond what does anyway; twice that if it is persistent",
    "reclassification": "log of how many of the cluster go to the commonest other class, for each that stays",
    "relative-size": "share by which the smaller cluster falls short of half of the class",
    "silhouette": "silhouette coefficient of the two clusters",
}
PUBLISHED: dict[Rule, float] = {
    "combined": 0.5,
    "reclassification": 0.0,
    "relative-size": 0.15,
    "silhouette": 0.10,
}
#: Samples of a cluster below which it is no candidate.
FEWEST_IN_CLUSTER = 5
#: Other samples of a class that are kept out of the training as well, to compare with: at most so many, and
#: at most a third of them.
MOST_COMPARED = 200
#: Kinds of samples of which persistence has been measured on many clean sets, so that it may count twice.
WITNESSED = frozenset({"image"})
#: Classes, among those whose smaller cluster leaves, up to which the larger ones are asked about too: each
#: costs a training, and poison that is most of many classes at once is most of the set.
MOST_SWAPPED = 2
#: How steeply the place between two centres counts: at either centre it is nearly certain.
STEEPNESS = 6.0


@dataclass
class Cluster:
    """One class's suspect cluster.

    Attributes:
        rows: of all clustered samples of the class, in the set.
        split: of these into two, by what the model sees in them.
        margin: (n,) how far on the side of the suspect cluster each sample lies: .5 at its centre, -.5 at the
            other one's. That is the smaller one of the split unless something is known.
        persistent: (n,) the same for the samples in which the model keeps to the class whatever is laid over
            them; None where these are no heap of their own.
        witnessed: whether persistence counts as a second witness; of texts and recordings it says instead
            which classes are asked about.
        told_apart: whether persistence says which of the two clusters of the split is the suspect one.
        keeps: whether the model keeps to the class in many of these whatever is laid over them.
        pattern: what the suspect samples carry in common, if it sends others to the class too.
        verdicts: what a model trained without the suspect samples takes them for.
        usual: share of other samples of the class, kept out of that training as well, that it takes for other
            classes: as many leave a class anyway, the more the weaker the model is.
        sure: (r,) in rising order, to a tenth, how sure it is of samples of all classes that it has not seen
            either and takes for what they are labelled.
    """

    label: int
    rows: npt.NDArray[np.int64]
    split: Split
    margin: Floats
    persistent: Floats | None = None
    witnessed: bool = False
    told_apart: bool = False
    keeps: bool = False
    pattern: CommonPattern | None = None
    verdicts: Reclassified | None = None
    usual: float = 0.0
    sure: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, dtype=np.float32))

    @property
    def groups(self) -> list[npt.NDArray[np.bool_]]:
        """Return the suspect cluster of the split (n,) and, where there is one, the persistent samples."""
        return [one > 0 for one in (self.margin, self.persistent) if one is not None]

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Return which of the rows are suspect, (n,)."""
        first, *rest = self.groups
        return first | rest[0] if rest else first

    @property
    def gain(self) -> float:
        """Return the share of an axis's variance that the split explains: .64 of a bell curve, 1 of points.

        The components have variance one each, so that a split in two can explain one of them at most.
        """
        return self.split.dimensions - self.split.inertia / max(1, len(self.rows))

    def leaving(self) -> float:
        """Return the share of the suspect samples that are taken for other classes."""
        assert self.verdicts is not None
        return float((self.verdicts.taken_for != self.label).mean())

    def suspicion(self) -> float:
        """Return the excess, or twice that where persistence speaks against the samples as well: 0 to 3.

        A pattern that they carry is added by the share of other images that it sends to the class.
        Of texts and recordings, there is no such witness, since no clean sets of them are in the calibration.
        There the excess counts among those that do not leave anyway.
        """
        if not self.witnessed:
            return self.excess() / (1 - self.usual) if self.usual < 1 else 0.0
        persists = self.told_apart or self.persistent is not None
        return self.excess() * (2 if persists else 1) + (self.pattern.worth if self.pattern else 0.0)

    def excess(self) -> float:
        """Return by how much the share that leaves exceeds the usual one: 0 for as many, 1 for all and none.

        What counts is the share that surely leaves, the lower end of its 95 % interval: of a dozen samples,
        eight may leave by chance. It counts in full where the model is as sure of them as of other samples
        that it has not seen: what is unlike all classes leaves too, and is no other class's. Of the suspect
        cluster and the persistent samples the larger excess counts, since either may hold ordinary ones.
        """
        assert self.verdicts is not None
        left, inside = self.verdicts.taken_for != self.label, self.inside
        return max(self._excess(left, own[inside]) for own in self.groups)

    def _excess(self, left: npt.NDArray[np.bool_], own: npt.NDArray[np.bool_]) -> float:
        surely = metrics.rate(int((left & own).sum()), int(own.sum())).low
        return max(0.0, surely - self.usual) * self.likeness(left & own)

    def likeness(self, some: npt.NDArray[np.bool_]) -> float:
        """Return how sure the model is of the classes it takes some for: 1 if as sure as of other samples.

        It is twice the probability that it is surer of one of them than of another unseen sample. A trigger
        costs a little certainty where a model has much of it, so probabilities count to a tenth.
        """
        assert self.verdicts is not None
        if not some.any() or not len(self.sure):
            return 1.0
        own = self.verdicts.elsewhere[some].round(1)
        below = [np.searchsorted(self.sure, own, side) for side in ("left", "right")]  # the same counts half
        return min(1.0, float((below[0] + below[1]).mean()) / len(self.sure))

    def odds(self) -> float:
        """Return the logarithm of l / p of the paper, turned round, half a sample added to both."""
        assert self.verdicts is not None
        counts = np.bincount(self.verdicts.taken_for, minlength=self.label + 1)
        stay = counts[self.label]
        counts[self.label] = 0
        return float(np.log((counts.max() + 0.5) / (stay + 0.5)))

    def source(self) -> int | None:
        """Return the other class that most of the suspect cluster are taken for."""
        if self.verdicts is None:
            return None
        others = self.verdicts.taken_for[self.verdicts.taken_for != self.label]
        return int(np.bincount(others).argmax()) if len(others) else None

    def sources(self) -> dict[int, int]:
        """Return which other class each row of the suspect cluster seems to come from."""
        if self.verdicts is None:
            return {}
        usual = self.source()
        given = dict(zip(self.rows[self.inside].tolist(), self.verdicts.taken_for.tolist(), strict=True))
        named = {row: usual if c == self.label else c for row, c in given.items()}
        return {row: c for row, c in named.items() if c is not None}

    def certainty(self) -> float:
        """Return how sure the model that was trained without them is of the classes it takes them for."""
        assert self.verdicts is not None
        left = self.verdicts.taken_for != self.label
        return float(self.verdicts.elsewhere[left].mean()) if left.any() else 0.0


@register("detector")
class ActivationClustering(TrainingDataDetector):
    """Split each class in two by what the model sees in its samples, and ask whether one half belongs there.

    Use it on a training set that you do not trust, with a model trained on it; no trusted data are
    needed.

    What the model sees are its penultimate activations, reduced by ICA to ten components. Whether the
    smaller of two clusters is poison is asked of a small network that is trained without it: samples that
    belong to another class are taken for that. The settings `rule=reclassification group_by=prediction
    gain=0` are the paper's.

    We depart from the paper in seven ways. Only samples that the model gives their own label are
    clustered, so that wrong labels which it has not learnt do not count. Only classes that split clearly
    are asked about, at once, with one network trained from scratch. What counts is how many more of the
    cluster surely leave the class than of other samples that the network has not seen either, since a
    weak one mistakes many; and they count the less, the less sure it is of what it takes them for.

    Poison may be most of a class, and a cluster may hold a part of it alone. So other samples are laid over
    those of each class: a trigger outlasts them, and what the model sees in ordinary samples does not. The
    cluster in which the model keeps to the class is the suspect one, and so are samples in which it does
    wherever they lie. Where that tells nothing and one class or two leave, their larger clusters are asked
    about too, and the one that the network is surer of is the poison. A sample's score joins where it lies
    between the two centres and what the network takes it for.

    A patch can be read off the data: pixels that hardly vary within a cluster, and that neither the rest of
    the class nor other classes have. Where it sends images of other classes to the class, it is the trigger.
    What carries it is the suspect cluster then, and the share of images on which it works adds to the score.

    To texts, others are joined in front and behind. Of texts and recordings no clean sets are in the
    calibration, and the voices of speakers lie apart as poison does: only classes are asked about in which
    the model keeps to the class, in one of the two clusters or in a heap of samples. Other poison is missed.
    """

    title = "Activation clustering"
    source = "B. Chen et al., SafeAI at AAAI 2019, arXiv 1811.03728"
    limits = (
        "It misses poison whose label is right (clean-label attacks) unless it is a patch in a fixed place, "
        "poison too rare for the model to have learnt it, and triggers made to look like the target class to "
        "the model; a class that holds several unlike kinds can look poisoned to it, and of texts and "
        "recordings it sees only poison that outlasts what is added to a sample."
    )
    order: ClassVar[int] = 60

    dimensions: int = Field(10, ge=1, le=100, description="Independent components of a class's activations")
    rule: Rule = Field(
        "combined",
        description="How a cluster is judged: by the share that leaves it in reclassification (combined), by "
        "the paper's ratio of it, or without any by relative size or silhouette",
    )
    group_by: Literal["agreement", "prediction", "label"] = Field(
        "agreement",
        description="Which samples make a class: those of its label that the model predicts too, all that it "
        "predicts, or all of its label",
    )
    gain: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Share of an axis's variance that a split must explain for a class to be a candidate; a "
        "bell curve gives .64",
    )
    retraining_rows: int = Field(
        6_000, ge=100, description="Samples that a network is trained on for reclassification, at most"
    )
    retraining_seen: int = Field(
        30_000, ge=1_000, description="Samples that go through in that training, about"
    )

    def score_samples(
        self, seen: Learned, subject: Subject, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a score for each class, and for each sample how much it belongs to a suspect cluster."""
        assert subject.classifier is not None
        assert subject.train is not None
        classes = subject.classifier.classes
        grouped = self._grouped(seen)
        rows, few = rows_by_class(grouped, len(classes), max(self.dimensions + 1, 2 * FEWEST_IN_CLUSTER))
        if not rows:
            raise CouldNotTell(
                f"no class has the {max(self.dimensions + 1, 2 * FEWEST_IN_CLUSTER)} samples that "
                f"{self.dimensions} dimensions need"
            )
        splits = split_groups(
            seen.features, list(rows.values()), dimensions=self.dimensions, generator=generator
        )
        clusters = [
            Cluster(c, own, split, split.margin.astype(np.float64))
            for (c, own), split in zip(rows.items(), splits, strict=True)
        ]
        seed = int(torch.randint(1 << 31, (), generator=generator))
        short = None
        if self.rule == "combined":
            try:
                self._lay_over(clusters, subject, seen, deadline, derive_seed(seed, "overlays"))
            except CouldNotTell as error:
                if subject.classifier.spec.modality not in WITNESSED:
                    raise  # which classes to ask about is not known
                short = str(error)
            if subject.classifier.spec.modality == "image":
                self._read_patterns(clusters, subject, seen, deadline, derive_seed(seed, "patterns"))
        asked = self._candidates(clusters)
        if asked:
            self._reclassify(asked, subject, grouped, deadline, seed)
        scores = {one.label: self._score(one) for one in clusters}
        ids = subject.train.ids
        by_persistence = self.rule == "combined" and not clusters[0].witnessed
        told = _summary(asked, scores, classes, by_persistence=by_persistence)
        return self.measurement(
            summary="; ".join(filter(None, (told, short))),
            score=max(scores.values()),
            per_class={c: scores.get(c) for c in range(len(classes))},
            unknown_classes=few,
            score_name=SCORE_NAMES[self.rule],
            published_threshold=PUBLISHED[self.rule],
            scores=dict(zip(ids, self._sample_scores(clusters, scores, len(ids)).tolist(), strict=True)),
            suspects={
                one.label: tuple(ids[i] for i in one.rows[_flaggable(one)])
                for one in (asked if self._asks else clusters)
            },
            sources={ids[row]: c for one in asked for row, c in one.sources().items()},
            evidence=(*_triggers(asked, scores, classes), _table(clusters, scores, classes)),
        )

    def _grouped(self, seen: Learned) -> npt.NDArray[np.int64]:
        """Return the class (n,) that each sample is clustered with; -1 for none."""
        if self.group_by == "label":
            return seen.labels
        if self.group_by == "prediction":
            return seen.predicted
        return np.where(seen.agrees, seen.labels, -1)

    @property
    def _asks(self) -> bool:
        """Return whether the rule asks what a network trained without a cluster takes it for."""
        return self.rule in ("combined", "reclassification")

    def _lay_over(
        self, clusters: list[Cluster], subject: Subject, seen: Learned, deadline: Deadline, seed: int
    ) -> None:
        """Find the samples in which the model keeps to the class when others are laid over them.

        It takes half of the time that is left at most.

        Raises:
            CouldNotTell: if that is too little; what was found until then stays.
        """
        assert subject.classifier is not None
        assert subject.train is not None
        half = Deadline(None if deadline.seconds is None else deadline.left() / 2)
        half.on_progress = deadline.on_progress
        for one in clusters:
            one.witnessed = subject.classifier.spec.modality in WITNESSED
        for one in clusters:
            others = np.flatnonzero(seen.agrees & (seen.labels != one.label))
            if len(others) < persistent.OVERLAYS:
                continue
            rng = np.random.default_rng(derive_seed(seed, str(one.label)))
            laid = persistent.differing(seen.labels, others, rng)
            overlays = to_tensor(subject.train.select(laid), subject.classifier.spec)
            known = (subject.classifier, subject.train, one.label)
            values = np.empty(len(one.rows))
            some = persistent.drawn(one.inside, len(clusters), rng)
            values[some] = persistent.persistence(*known, one.rows[some], overlays, half)
            inside = one.inside[some]
            suspect, other = float(values[some][inside].mean()), float(values[some][~inside].mean())
            kept, heaps = max(suspect, other) >= persistent.KEPT, persistent.cut(values[some])
            apart = persistent.explained(values[some], inside) >= persistent.EXPLAINED
            if apart and (kept or not one.witnessed):
                one.told_apart, one.keeps = True, kept or heaps.persistent
                one.margin = one.margin if suspect > other else -one.margin
            elif heaps.persistent:
                rest = np.setdiff1d(np.arange(len(one.rows)), some)
                values[rest] = persistent.persistence(*known, one.rows[rest], overlays, half)
                heaps = persistent.cut(values)
                one.persistent = heaps.margin(values) if heaps.persistent else None
                one.keeps = heaps.persistent

    def _read_patterns(
        self, clusters: list[Cluster], subject: Subject, seen: Learned, deadline: Deadline, seed: int
    ) -> None:
        """Find patterns that clusters carry and that work; what carries one is then the suspect cluster.

        Raises:
            CouldNotTell: if the deadline is too near; what was found until then stays.
        """
        assert subject.classifier is not None
        assert subject.train is not None
        classifier, train, rng = subject.classifier, subject.train, np.random.default_rng(seed)

        def decoded(rows: npt.NDArray[np.int64]) -> Tensor:
            return to_float(to_tensor(train.select(rows), classifier.spec), classifier.spec)

        drawn = np.sort(rng.permutation(np.flatnonzero(seen.agrees))[: patterns.OTHERS])
        pool, labels = decoded(drawn), torch.from_numpy(seen.labels[drawn])
        for one in clusters:
            margins = [own for own in (one.margin, -one.margin, one.persistent) if own is not None]
            found = patterns.find(
                classifier,
                decoded,
                one.rows,
                margins,
                pool[labels != one.label],
                one.label,
                rng,
                deadline,
            )
            if found is not None:
                one.pattern, one.persistent = found, None
                parts = np.array_split(one.rows, -(-len(one.rows) // BATCH))
                one.margin = torch.cat([found.carried(decoded(rows)) for rows in parts]).numpy() - 0.5

    def _candidates(self, clusters: list[Cluster]) -> list[Cluster]:
        """Return the classes to ask about: those that split clearly; none where the rule does not ask.

        Of texts and recordings, only those in which the model keeps to the class: speakers are groups too.
        """
        if not self._asks:
            return []
        return [
            one
            for one in clusters
            if (
                one.gain >= self.gain
                or one.persistent is not None
                or one.pattern
                or (one.keeps and not one.witnessed)
            )
            and (one.witnessed or one.keeps or self.rule != "combined")
            and FEWEST_IN_CLUSTER <= one.inside.sum() < len(one.rows)
        ]

    def _reclassify(
        self,
        asked: list[Cluster],
        subject: Subject,
        grouped: npt.NDArray[np.int64],
        deadline: Deadline,
        seed: int,
    ) -> None:
        """Ask networks that have not seen the clusters; where the larger one is poison, swap the two."""
        self._ask(asked, subject, grouped, deadline, derive_seed(seed, "smaller"))
        left = [one for one in asked if self.rule == "combined" and one.suspicion() >= PUBLISHED["combined"]]
        if len(left) > MOST_SWAPPED:
            return
        for own in left:
            if own.told_apart or own.persistent is not None or own.pattern:
                continue
            other = Cluster(own.label, own.rows, own.split, -own.margin, witnessed=own.witnessed)
            known = grouped.copy()  # what else is suspect teaches nothing here either
            for one in left:
                if one is not own:
                    known[one.rows[one.inside]] = -1
            self._ask([other], subject, known, deadline, derive_seed(seed, "larger", str(own.label)))
            if other.suspicion() >= PUBLISHED["combined"] and other.certainty() > own.certainty():
                own.margin, own.verdicts = other.margin, other.verdicts
                own.usual, own.sure = other.usual, other.sure

    def _ask(
        self,
        asked: list[Cluster],
        subject: Subject,
        grouped: npt.NDArray[np.int64],
        deadline: Deadline,
        seed: int,
    ) -> None:
        """Fill in what a network that was trained without the suspect clusters takes them for."""
        assert subject.classifier is not None
        assert subject.train is not None
        rng = np.random.default_rng(seed)
        suspect = [one.rows[one.inside] for one in asked]
        others = [rng.permutation(one.rows[~one.inside]) for one in asked]
        compared = [rows[: min(MOST_COMPARED, len(rows) // 3)] for rows in others]
        rest = np.setdiff1d(np.flatnonzero(grouped >= 0), np.concatenate([*suspect, *compared]))
        unseen = rng.permutation(rest)[: min(MOST_COMPARED, len(rest) // 10)]
        excluded = np.concatenate([*suspect, *compared, unseen])
        kept = np.setdiff1d(np.flatnonzero(grouped >= 0), excluded)
        verdicts = reclassify(
            subject.classifier,
            subject.train,
            kept,
            excluded,
            rows=self.retraining_rows,
            seen=self.retraining_seen,
            seed=seed,
            deadline=deadline,
        )
        *parts, others_seen = verdicts.parts([len(rows) for rows in (*suspect, *compared, unseen)])
        right = others_seen.own > others_seen.elsewhere
        sure = np.sort(others_seen.own[right].round(1))
        for one, own, other in zip(asked, parts[: len(asked)], parts[len(asked) :], strict=True):
            one.verdicts, one.sure = own, sure
            one.usual = float((other.taken_for != one.label).mean()) if len(other.own) else 0.0

    def _score(self, one: Cluster) -> float:
        """Return a class's score by the rule."""
        if self.rule == "relative-size":
            return 0.5 - one.split.share
        if self.rule == "silhouette":
            return one.split.silhouette
        if self.rule == "reclassification":
            return one.odds() if one.verdicts else float(-np.log(len(one.rows) + 0.5))
        return one.suspicion() if one.verdicts else 0.0

    def _sample_scores(self, clusters: list[Cluster], scores: dict[int, float], n: int) -> Floats:
        """Return a score in [0, 1] of each sample: its class's, times how much it belongs to the cluster.

        Samples of classes that are not suspect, and those that were not clustered, score near 0.
        """
        found = np.zeros(n)
        for one in clusters:
            weight = scores[one.label] if self.rule == "combined" else _squashed(scores[one.label])
            found[one.rows] = max(min(1.0, weight), 0.01 * one.gain) * belonging(one)
        return found


def belonging(one: Cluster) -> Floats:
    """Return how much each of a class's samples belongs to the suspect cluster, in [0, 1].

    It is where a sample lies between the centres and, in the cluster, how little a network that was trained
    without it finds the given label; the mean of both.
    """
    margin = one.margin if one.persistent is None else np.maximum(one.margin, one.persistent)
    place: Floats = 1 / (1 + np.exp(-STEEPNESS * margin))
    if one.verdicts is None:
        return place
    foreign = np.zeros(len(place))
    foreign[one.inside] = 1 - one.verdicts.own
    return (place + foreign) / 2


def _flaggable(one: Cluster) -> npt.NDArray[np.bool_]:
    """Return which of a class's samples are flagged if it is: those that rather belong to the cluster.

    Where persistence agrees with the cluster, or its samples carry a pattern that works, that is all of it:
    poison that a network has not seen may stay in its class for other reasons.
    """
    return one.inside & (one.told_apart | (one.pattern is not None) | (belonging(one) >= 0.5))


def _squashed(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def _summary(
    asked: list[Cluster], scores: dict[int, float], classes: tuple[str, ...], *, by_persistence: bool
) -> str:
    if not asked and by_persistence:
        return f"In none of {len(scores)} classes does the model keep to the class whatever is added"
    if not asked:
        return f"None of {len(scores)} classes splits into two clusters clearly"
    top = max(asked, key=lambda one: scores[one.label])
    text = (
        f"{int(top.inside.sum()):,} of {len(top.rows):,} samples of class {classes[top.label]!r} lie apart; "
        f"a network trained without them takes {percent(top.leaving())} of them for other classes"
    )
    source = top.source()
    text += f", most for {classes[source]!r}" if source is not None else ""
    if top.pattern is None:
        return text
    pixels = int(top.pattern.trigger.mask.sum())
    return (
        f"{text}; {pixels:,} pixels that they have in common send {percent(top.pattern.success.value)} of "
        "other images to that class"
    )


def _triggers(asked: list[Cluster], scores: dict[int, float], classes: tuple[str, ...]) -> list[Evidence]:
    """Return the patterns that were found, the most suspicious class's first, and draw them on grey."""
    found: list[Evidence] = []
    for one in sorted(asked, key=lambda one: -scores[one.label]):
        if one.pattern is not None:
            name, trigger = classes[one.label], one.pattern.trigger
            title = f"Pattern that samples labelled {name} have in common"
            grey = torch.full_like(trigger.pattern, 0.5)[None]
            alt = (
                f"A pattern, on grey; it sends {percent(one.pattern.success.value)} of other images to {name}"
            )
            found += [
                Picture(title=title, alt=alt, png=picture(trigger.apply(grey)[0]), role="trigger"),
                RecoveredTrigger(title=title, target=one.label, trigger=trigger.to_json()),
            ]
    return found


def _table(clusters: list[Cluster], scores: dict[int, float], classes: tuple[str, ...]) -> Table:
    return Table(
        title="Each class, split in two",
        columns=(
            "class",
            "samples",
            "smaller cluster",
            "split explains",
            "silhouette",
            "leaves",
            "others leave",
            "source",
        ),
        rows=tuple(
            (
                classes[one.label],
                len(one.rows),
                round(one.split.share, 4),
                round(one.gain, 3),
                round(one.split.silhouette, 3),
                round(one.leaving(), 4) if one.verdicts else None,
                round(one.usual, 4) if one.verdicts else None,
                None if (source := one.source()) is None else classes[source],
            )
            for one in sorted(clusters, key=lambda one: -scores[one.label])
        ),
    )
