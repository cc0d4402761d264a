"""From results to tables: what was claimed, what came out, with counts and intervals.

The store holds what the detectors saw. What follows from it is concluded here, by the calibration set that is
shipped now, so that a new calibration set, or another rule, needs no scan.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from statistics import fmean, median
from typing import TypeAlias

from doorward.bench.inspection import FlaggedCounts, Inspection, flagged_counts
from doorward.bench.mending import AUTO, Behaviour, MendedModel, Mending
from doorward.bench.planting import KEPT, Planting, kept, pooled
from doorward.bench.results import Result, Results
from doorward.bench.suite import Claim, Group, Measure, Scale, Suite
from doorward.core.records import Rate, Record
from doorward.reports import phrases
from doorward.scan.calibration import BUCKETS
from doorward.stats.metrics import Ranking, ranking, rate

#: The detector whose flagged samples are counted: it gives the verdict on training data.
JUDGE = "activation-clustering"
#: Accuracy and F1 from which on a class's samples are told apart.
RIGHT = 0.99
#: Attack success that a repair may leave in any group.
MOST_SUCCESS = 0.2
#: Parts of [0, 1] that p-values are counted in.
BINS = 10
#: What the share of clean models with p <= .05 shall surely be below, with every number of classes.
MOST_ALARMS = 0.1


class GroupRow(Record):
    """One line of the table: a group of planted models next to the clean ones of the same data.

    Attributes:
        about: what is special, in words.
        apart: the claims that name no group leave it out.
        counted: names of the trials that the numbers are made of, planted and clean.
        excluded: names of the plants that do not count, with their attack success.
        exact_target, flagged: of the planted that count; could-not-tell counts against both.
        false_alarms: flagged clean models.
        planted_unknown, clean_unknown: those of which the scan could not tell.
        by_score: how well the report's p-value tells the two apart; could-not-tell has p = 1.
        by_detector: the same for each detector's raw score.
        published, published_alarms: planted models of which a method's published rule flags the targets and
            nothing else, and clean models of which it flags a class; of none where no detector has one.
        seconds, peak_memory: medians over the scans.
    """

    group: str
    about: str
    excluded_from_claims: bool
    counted: tuple[str, ...]
    excluded: dict[str, float]
    exact_target: Rate
    flagged: Rate
    false_alarms: Rate
    planted_unknown: Rate
    clean_unknown: Rate
    by_score: Ranking
    by_detector: dict[str, Ranking]
    published: Rate
    published_alarms: Rate
    seconds: float | None
    peak_memory: float | None


class PlantRow(Record):
    """One line of the table of a suite that scans nothing: models with the same attack on the same data.

    Attributes:
        about: what is special, in words.
        accuracy, twin, change: means over the models; of planted ones, of counterparts, and between them.
        poison_rate: mean; None where models themselves are changed.
        success: over the images of all models; None without a trigger.
        lowest: success of the model that it is lowest for.
        robust_accuracy: over the images of all models; of adversarially trained ones.
        planted, trained: median processor seconds of planting, and seconds of training.
        claims: those about this group alone.
    """

    group: str
    attack: str
    about: str
    data: str
    architecture: str
    models: int
    poison_rate: float | None
    accuracy: float
    twin: float
    change: float
    success: Rate | None
    lowest: float | None
    robust_accuracy: Rate | None
    planted: float | None
    trained: float
    claims: tuple[ClaimRow, ...]


class InspectionRow(Record):
    """One line of the table of a suite that inspects training data.

    Attributes:
        models: training sets, each with the model that was trained on it.
        samples, poisoned: of a set, means.
        learnt: attack success of the models, the mean; None without a trigger.
        alarms: sets that are flagged.
        exact: of those with a backdoor, sets of which the flagged classes are its targets.
        found: what the detector that gives the verdict flags, of classes that it flags.
        rankings: for each detector, the median AUROC, and the median and least TPR at an FPR of 5 %.
        raw: what the smaller cluster of the inputs themselves flags.
        seconds: median.
        claims: those about this group alone.
    """

    group: str
    about: str
    attack: str | None
    data: str
    models: int
    samples: float
    poisoned: float
    learnt: float | None
    alarms: Rate
    exact: Rate
    found: FlaggedCounts
    rankings: dict[str, SampleRanking]
    raw: FlaggedCounts
    seconds: float
    claims: tuple[ClaimRow, ...]


class MendingRow(Record):
    """One line of the table of a suite that repairs models: one repair of models with the same attack.

    Attributes:
        models: how many, and how many of them the repair acted on.
        repair: its name.
        accuracy_before, accuracy, change: means over the models that were mended.
        success_before, success, right, returned: over the triggered images of these models together: attack
            success before and after; how many got their right label again; attack success after fine-tuning
            on other clean samples.
        nothing_found: mended models in which a scan finds nothing; of none where the repair scans none.
        seconds: median processor time.
        reasons: why the repair did not act on others.
    """

    group: str
    attack: str
    about: str
    data: str
    architecture: str
    repair: str
    models: int
    mended: int
    accuracy_before: float | None
    accuracy: float | None
    change: float | None
    success_before: Rate | None
    success: Rate | None
    right: Rate | None
    returned: Rate | None
    nothing_found: Rate
    seconds: float | None
    reasons: tuple[str, ...]


class SampleRanking(Record):
    """How a detector's scores rank samples, over several training sets."""

    auroc: float | None
    tpr_at_5: float | None
    least_tpr_at_5: float | None


class ClaimRow(Record):
    """A claim and what we measure; `reached` is None where there is nothing to compare."""

    text: str
    source: str
    ours: Rate
    reached: bool | None


class CleanRow(Record):
    """Clean models that have something in common: about as many classes, or the data set."""

    name: str
    models: int
    alarms_at_5: Rate
    alarms_at_1: Rate
    unknown: Rate


class StableRow(Record):
    """A group whose models were scanned with several seeds and several draws of images.

    Attributes:
        scans: of each model.
        same: models of which every scan said the same.
        changed: of the others, by the name of the first trial: how many scans said what.
    """

    group: str
    scans: int
    same: Rate
    changed: dict[str, dict[str, int]]


class Summary(Record):
    """All that is shown of a suite at one scale.

    Attributes:
        left_out: as in `Results`.
        groups, plants, inspections, mendings: one of them, by what the suite does.
        clean: names of the trials of clean models that buckets, data sets and histogram are made of.
        histogram: how many of their p-values lie in each tenth of [0, 1]; empty if there are none.
    """

    suite: str
    title: str
    about: str
    scale: Scale
    made_with: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    trials: dict[str, int]
    claims: tuple[ClaimRow, ...]
    groups: tuple[GroupRow, ...]
    plants: tuple[PlantRow, ...] = ()
    inspections: tuple[InspectionRow, ...] = ()
    mendings: tuple[MendingRow, ...] = ()
    stability: tuple[StableRow, ...]
    buckets: tuple[CleanRow, ...]
    data_sets: tuple[CleanRow, ...]
    histogram: tuple[int, ...]
    clean: tuple[str, ...]
    results: tuple[Result, ...]


# --- counting --------------------------------------------------------------------------------------


def summarise(suite: Suite, held: Results) -> Summary:
    """Count results and set them next to the claims."""
    groups = suite.groups(held.scale)
    by_group: dict[str, list[Result]] = {group.name: [] for group in groups}
    for result in held.results:
        if result.status == "done" and result.group in by_group:
            by_group[result.group].append(result)
    pooled = [one for group in groups if not group.excluded_from_claims for one in by_group[group.name]]
    clean = [one for one in _once(pooled) if one.plant is None]
    return Summary(
        suite=suite.name,
        title=suite.title,
        about=suite.about,
        scale=held.scale,
        made_with=held.made_with,
        left_out=held.left_out,
        trials={
            status: sum(one.status == status for one in held.results)
            for status in dict.fromkeys(["done", *(one.status for one in held.results)])
        },
        claims=tuple(
            _claim(claim, [r for g in claim.groups for r in by_group.get(g, [])] if claim.groups else pooled)
            for claim in suite.claims
            if (suite.scans and not any(map(_inspected, by_group.values()))) or len(claim.groups) != 1
        ),
        groups=tuple(
            _group_row(group, groups, by_group)
            for group in groups
            if suite.scans and not _inspected(by_group[group.name]) and _has_row(group, groups)
        ),
        plants=tuple(
            _plant_row(group, by_group[group.name], suite.claims)
            for group in groups
            if any(one.planting is not None for one in by_group[group.name])
        ),
        inspections=tuple(
            _inspection_row(group, by_group[group.name], suite.claims)
            for group in groups
            if _inspected(by_group[group.name])
        ),
        mendings=tuple(row for group in groups for row in _mending_rows(group, by_group[group.name])),
        stability=tuple(_stable_row(group, by_group[group.name]) for group in groups if group.repeated),
        buckets=tuple(
            _clean_row(str(low) if low == high else f"{low} to {high}", inside)
            for low, high in BUCKETS
            if (inside := [one for one in clean if one.classes is not None and low <= one.classes <= high])
        ),
        data_sets=tuple(
            _clean_row(name, [one for one in clean if one.data == name])
            for name in sorted({one.data for one in clean})
        ),
        histogram=spread([one.p_value for one in clean if one.p_value is not None], BINS),
        clean=tuple(one.trial for one in clean),
        results=held.results,
    )


def _once(results: Iterable[Result]) -> list[Result]:
    """Return one scan of each model: the one with the first seed and the first draw of images."""
    return [one for one in results if one.seed == 0 and one.draw == 0]


def _count(results: Sequence[Result], condition: Callable[[Result], bool]) -> Rate:
    return rate(sum(map(condition, results)), len(results))


def _unknown(result: Result) -> bool:
    return result.verdict == "could_not_tell"


MEASURES: dict[Measure, tuple[Callable[[Result], bool], Callable[[Result], bool]]] = {
    # of whom, and what is counted
    "exact_target": (lambda r: r.plant is not None and not r.excluded, lambda r: r.exact),
    "flagged": (lambda r: r.plant is not None and not r.excluded, lambda r: r.flagged),
    "clean_wrong": (lambda r: r.plant is None, lambda r: r.flagged or _unknown(r)),
    "alarm_at_5": (lambda r: r.plant is None and r.p_value is not None, lambda r: (r.p_value or 0) <= 0.05),
    "alarm_at_1": (lambda r: r.plant is None and r.p_value is not None, lambda r: (r.p_value or 0) <= 0.01),
    "could_not_tell": (lambda r: r.plant is None, _unknown),
    "alarm_on_clean": (lambda r: r.inspection is not None and not r.inspection.poisoned, lambda r: r.flagged),
}


def _samples_found(results: Sequence[Result], ranked: str | None = None) -> Rate:
    """Count poisoned samples that are flagged; or that a detector ranks above 95 % of clean ones."""
    found = _inspected(results)
    if ranked is not None:
        rates = [one.detectors[ranked].ranking.tpr_at_5 for one in found if ranked in one.detectors]
        return pooled(one for one in rates if one is not None and one.n) or rate(0, 0)
    return flagged_counts(
        (one.inspection.detectors[JUDGE].classes, one.targets)
        for one in results
        if one.inspection is not None and JUDGE in one.inspection.detectors
    ).tpr


def measure(name: Measure, results: Sequence[Result]) -> Rate:
    """Count what a claim is about.

    `stable` counts models of which several scans all said the same, `attack_success` triggered images, and
    `accuracy_kept` groups whose planted models are on average at most a point less accurate than their
    counterparts. Of training data, `samples_found` counts poisoned samples that are flagged,
    `samples_ranked` those that rank above 95 % of the clean ones, and `classes_right` classes with poison
    whose samples are told apart with accuracy and F1 of at least 99 %.

    Of models that `auto` has mended, `success_repaired` counts triggered images, `success_returned` the same
    after further fine-tuning, `groups_repaired` groups in which the trigger works at most on a fifth of them,
    `accuracy_repaired` groups that lose at most a point on average, and `nothing_found_repaired` those in
    which a scan finds nothing.
    """
    if name == "stable":
        repeated = _repeated(results)
        return rate(sum(len(set(map(_said, seen))) == 1 for seen in repeated), len(repeated))
    if name == "attack_success":
        return pooled(one.planting.success for one in results if one.planting) or rate(0, 0)
    if name == "accuracy_kept":
        groups = _plantings(results)
        return rate(sum(map(kept, groups.values())), len(groups))
    if name in OF_REPAIRS:
        return OF_REPAIRS[name](_mended(results, AUTO))
    if name == "samples_found":
        return _samples_found(results)
    if name == "samples_ranked":
        return _samples_found(results, JUDGE)
    if name == "classes_right":
        return _classes_right(results)
    among, counted = MEASURES[name]
    return _count([one for one in _once(results) if among(one)], counted)


def _classes_right(results: Sequence[Result]) -> Rate:
    """Count classes with poison of which accuracy and F1 are at least 99 %."""
    right = total = 0
    for one in results:
        if one.inspection is None or JUDGE not in one.inspection.detectors:
            continue
        for c, counts in one.inspection.detectors[JUDGE].classes.items():
            if counts.poisoned:
                total += 1
                right += c in one.targets and (counts.f1 or 0.0) >= RIGHT and counts.accuracy >= RIGHT
    return rate(right, total)


#: Mended models by group, each with what the model did before.
_Mended: TypeAlias = dict[str, list[tuple[Behaviour, MendedModel]]]


def _mended(results: Iterable[Result], repair: str) -> _Mended:
    """Return the models that a repair mended, by group; plants that did not take are left out."""
    by_group: _Mended = defaultdict(list)
    for one in results:
        if one.mending is None or one.excluded:
            continue
        found = one.mending.repairs.get(repair)
        if found is not None and found.after is not None:
            by_group[one.group].append((one.mending.before, found))
    return by_group


def _successes(pairs: Iterable[tuple[Behaviour, MendedModel]], *, later: bool = False) -> Rate:
    """Count triggered images that still reach the target."""
    found = [one.later if later else one.after for _, one in pairs]
    return pooled(one.success for one in found if one is not None) or rate(0, 0)


def _lost(pairs: Sequence[tuple[Behaviour, MendedModel]]) -> float:
    """Return how much accuracy repairs cost on average."""
    return fmean(before.accuracy.value - one.after.accuracy.value for before, one in pairs if one.after)


def _groups_repaired(groups: _Mended) -> Rate:
    low = [_successes(pairs).value <= MOST_SUCCESS for pairs in groups.values()]
    return rate(sum(low), len(low))


def _accuracy_repaired(groups: _Mended) -> Rate:
    kept_by = [_lost(pairs) <= KEPT + 1e-9 for pairs in groups.values()]
    return rate(sum(kept_by), len(kept_by))


def _nothing_found(pairs: Iterable[tuple[Behaviour, MendedModel]]) -> Rate:
    told = [one.verdict for _, one in pairs if one.verdict is not None]
    return rate(sum(verdict == "nothing_found" for verdict in told), len(told))


#: What claims count of the models that `auto` has mended.
OF_REPAIRS: dict[Measure, Callable[[_Mended], Rate]] = {
    "success_repaired": lambda groups: _successes(chain.from_iterable(groups.values())),
    "success_returned": lambda groups: _successes(chain.from_iterable(groups.values()), later=True),
    "groups_repaired": _groups_repaired,
    "accuracy_repaired": _accuracy_repaired,
    "nothing_found_repaired": lambda groups: _nothing_found(chain.from_iterable(groups.values())),
}


def _plantings(results: Iterable[Result]) -> dict[str, list[Planting]]:
    """Return what planting did, by group."""
    by_group: defaultdict[str, list[Planting]] = defaultdict(list)
    for one in results:
        if one.planting is not None:
            by_group[one.group].append(one.planting)
    return by_group


def _repeated(results: Iterable[Result]) -> list[list[Result]]:
    """Return the scans of each model that was scanned more than once, plants that did not take left out."""
    by_model: defaultdict[str | None, list[Result]] = defaultdict(list)
    for one in results:
        if not one.excluded:
            by_model[one.model].append(one)
    return [seen for seen in by_model.values() if len(seen) > 1]


def _said(result: Result) -> str:
    """Return verdict and targets in words."""
    verdict = phrases.TITLES[result.verdict].lower() if result.verdict else ""
    return verdict + (f" towards {' and '.join(map(str, sorted(result.targets)))}" if result.targets else "")


def spread(values: Sequence[float], bins: int) -> tuple[int, ...]:
    """Count how many values lie in each of so many equal parts of [0, 1]; an upper end belongs to its part.

    >>> spread([0.05, 0.1, 0.11, 1.0], 10)
    (2, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    """
    # a p-value of just .05 is an alarm, and so belongs to the first of twenty
    found = Counter(max(0, math.ceil(value * bins - 1e-9) - 1) for value in values)
    return tuple(found[part] for part in range(bins)) if values else ()


def _claim(claim: Claim, results: Sequence[Result]) -> ClaimRow:
    ours = measure(claim.measure, results)
    reached = None
    if ours.n and (claim.at_least is not None or claim.at_most is not None):
        reached = (claim.at_least is None or ours.value >= claim.at_least) and (
            claim.at_most is None or ours.value <= claim.at_most
        )
    return ClaimRow(text=claim.text, source=claim.source, ours=ours, reached=reached)


def _is_clean_side(clean: Group, planted: Group) -> bool:
    """Return whether a group holds the clean models that a planted group is set next to."""
    return (
        clean.attack is None
        and planted.attack is not None
        and clean.data == planted.data
        and not clean.excluded_from_claims
    )


def _has_row(group: Group, groups: Sequence[Group]) -> bool:
    """Return whether a group has a line of its own; clean models stand in those of the planted ones.

    Those that are the first models of another group have a line in the table of stability.
    """
    if group.first_of is not None:
        return False
    return group.attack is not None or not any(_is_clean_side(group, other) for other in groups)


def _group_row(group: Group, groups: Sequence[Group], by_group: dict[str, list[Result]]) -> GroupRow:
    own = _once(by_group[group.name])
    planted = [one for one in own if one.plant is not None]
    counted = [one for one in planted if not one.excluded]
    side = [one for other in groups if _is_clean_side(other, group) for one in _once(by_group[other.name])]
    clean = side if group.attack is not None else own
    both = [*counted, *clean]
    memory = [one.peak_memory for one in both if one.peak_memory is not None]
    names = sorted({name for one in both for name in one.detectors})
    return GroupRow(
        group=group.name,
        about=_about(group),
        excluded_from_claims=group.excluded_from_claims,
        counted=tuple(one.trial for one in both),
        excluded={one.trial: one.attack_success or 0.0 for one in planted if one.excluded},
        exact_target=_count(counted, lambda one: one.exact),
        flagged=_count(counted, lambda one: one.flagged),
        false_alarms=_count(clean, lambda one: one.flagged),
        planted_unknown=_count(counted, _unknown),
        clean_unknown=_count(clean, _unknown),
        by_score=_ranking(
            [(1.0 if one.p_value is None else one.p_value, one.plant is not None) for one in both], -1
        ),
        by_detector={
            name: _ranking(
                [
                    (score, one.plant is not None)
                    for one in both
                    if name in one.detectors and (score := one.detectors[name].score) is not None
                ]
            )
            for name in names
        },
        published=_count(*_by_published_rule(counted, lambda one, flags: flags == set(one.plant or ()))),
        published_alarms=_count(*_by_published_rule(clean, lambda _, flags: bool(flags))),
        seconds=median(one.seconds or 0.0 for one in both) if both else None,
        peak_memory=median(memory) if memory else None,
    )


def _by_published_rule(
    results: Sequence[Result], condition: Callable[[Result, set[int]], bool]
) -> tuple[list[Result], Callable[[Result], bool]]:
    """Return the results of a detector that has a published rule, and what tells whether that flags so."""

    def flags(one: Result) -> set[int] | None:
        known = [d.published_flags for d in one.detectors.values() if d.published_flags is not None]
        return set().union(*known) if known else None

    def holds(one: Result) -> bool:
        flagged = flags(one)
        return flagged is not None and condition(one, flagged)

    return [one for one in results if flags(one) is not None], holds


def _plant_row(group: Group, results: Sequence[Result], claims: Sequence[Claim]) -> PlantRow:
    """Return the line of a group of which at least one model is measured."""
    (found,) = _plantings(results).values()
    rates = [one.poison_rate for one in found if one.poison_rate is not None]
    seconds = [one.planted for one in found if one.planted is not None]
    assert group.attack is not None, "plantings are of attacks"
    return PlantRow(
        group=group.name,
        attack=group.attack.name,
        about=_about(group),
        data=group.data.name.removeprefix("reference:"),
        architecture=", ".join(group.architectures),
        models=len(found),
        poison_rate=fmean(rates) if rates else None,
        accuracy=fmean(one.accuracy.value for one in found),
        twin=fmean(one.twin.value for one in found),
        change=fmean(one.change for one in found),
        success=pooled(one.success for one in found),
        lowest=min((one.success.value for one in found if one.success), default=None),
        robust_accuracy=pooled(one.robust_accuracy for one in found),
        planted=median(seconds) if seconds else None,
        trained=median(one.trained for one in found),
        claims=tuple(_claim(claim, results) for claim in claims if claim.groups == (group.name,)),
    )


def _mending_rows(group: Group, results: Sequence[Result]) -> list[MendingRow]:
    """Return a line for each repair of a group's models; none where nothing is repaired."""
    measured = [one.mending for one in results if one.mending is not None and not one.excluded]
    asked = group.repair_settings.methods if group.repair_settings else ()
    return [_mending_row(group, name, measured) for name in asked if measured]


def _mending_row(group: Group, name: str, measured: Sequence[Mending]) -> MendingRow:
    both = [(one.before, one.repairs[name]) for one in measured if name in one.repairs]
    pairs = [(before, one) for before, one in both if one.after is not None]
    afters = [one.after for _, one in pairs if one.after is not None]
    assert group.attack is not None, "planted models are repaired"
    return MendingRow(
        group=group.name,
        attack=group.attack.name,
        about=_about(group),
        data=group.data.name.removeprefix("reference:"),
        architecture=", ".join(group.architectures),
        repair=name,
        models=len(both),
        mended=len(pairs),
        accuracy_before=fmean(before.accuracy.value for before, _ in pairs) if pairs else None,
        accuracy=fmean(one.accuracy.value for one in afters) if pairs else None,
        change=-_lost(pairs) if pairs else None,
        success_before=pooled(before.success for before, _ in pairs),
        success=_successes(pairs) if pairs else None,
        right=pooled(one.right for one in afters),
        returned=_successes(pairs, later=True) if pairs else None,
        nothing_found=_nothing_found(pairs),
        seconds=median(one.seconds for _, one in pairs) if pairs else None,
        reasons=tuple(dict.fromkeys(one.reason for _, one in both if one.reason is not None)),
    )


def _inspected(results: Sequence[Result]) -> list[Inspection]:
    """Return what was found in the training sets of some results."""
    return [one.inspection for one in results if one.inspection is not None]


def _inspection_row(group: Group, results: Sequence[Result], claims: Sequence[Claim]) -> InspectionRow:
    """Return the line of a group of which at least one training set is inspected."""
    found = _inspected(results)
    backdoored = [one for one in results if one.plant and one.inspection]
    learnt = [one.attack_success for one in results if one.attack_success is not None]
    names = sorted({name for one in found for name in one.detectors})
    return InspectionRow(
        group=group.name,
        about=_about(group),
        attack=group.attack.name if group.attack else None,
        data=group.data.name.removeprefix("reference:"),
        models=len(found),
        samples=fmean(one.samples for one in found),
        poisoned=fmean(one.poisoned for one in found),
        learnt=fmean(learnt) if learnt else None,
        alarms=_count(results, lambda one: one.flagged),
        exact=_count(backdoored, lambda one: one.exact),
        found=flagged_counts(
            (one.inspection.detectors[JUDGE].classes, one.targets)
            for one in results
            if one.inspection is not None and JUDGE in one.inspection.detectors
        ),
        rankings={
            name: _sample_ranking([one.detectors[name].ranking for one in found if name in one.detectors])
            for name in names
        },
        raw=flagged_counts((one.raw, None) for one in found),
        seconds=median(one.seconds or 0.0 for one in results if one.inspection),
        claims=tuple(_claim(claim, results) for claim in claims if claim.groups == (group.name,)),
    )


def _sample_ranking(rankings: Sequence[Ranking]) -> SampleRanking:
    areas = [one.auroc for one in rankings if one.auroc is not None]
    at_5 = [one.tpr_at_5.value for one in rankings if one.tpr_at_5 is not None and one.positives]
    return SampleRanking(
        auroc=median(areas) if areas else None,
        tpr_at_5=median(at_5) if at_5 else None,
        least_tpr_at_5=min(at_5, default=None),
    )


def _about(group: Group) -> str:
    """Say in words what is special about a group's models."""
    said = [group.about] if group.about else []
    if group.class_counts:
        low, high = min(group.class_counts), max(group.class_counts)
        said.append(f"{low} classes" if low == high else f"{low} to {high} classes")
    if group.robust is not None:
        said.append("adversarially trained")
    return ", ".join(said)


def _ranking(pairs: Sequence[tuple[float, bool]], sign: int = 1) -> Ranking:
    return ranking([sign * score for score, _ in pairs], [planted for _, planted in pairs])


def _clean_row(name: str, clean: Sequence[Result]) -> CleanRow:
    return CleanRow(
        name=name,
        models=len(clean),
        alarms_at_5=measure("alarm_at_5", clean),
        alarms_at_1=measure("alarm_at_1", clean),
        unknown=measure("could_not_tell", clean),
    )


def _stable_row(group: Group, results: Sequence[Result]) -> StableRow:
    changed = [seen for seen in _repeated(results) if len(set(map(_said, seen))) > 1]
    return StableRow(
        group=group.name,
        scans=group.seeds + group.draws - 1,
        same=measure("stable", results),
        changed={seen[0].trial: dict(Counter(map(_said, seen)).most_common()) for seen in changed},
    )
