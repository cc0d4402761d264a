"""From results to tables: what was claimed, what came out, with counts and intervals.

The store holds what the detectors saw. What follows from it is concluded here, by the bank that is shipped
now, so that a new bank, or another rule, needs no scan.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import Field, ValidationError

from doorward.bench.crossfit import family, left_out
from doorward.bench.planting import Planting, kept, pooled
from doorward.bench.store import Row, Store
from doorward.bench.suite import Claim, Group, Measure, Scale, Suite, content_key, expand
from doorward.calibration import BUCKETS, Bank, shipped
from doorward.errors import InputError
from doorward.measures import Ranking, ranking, rate, upper_bound
from doorward.records import SEVERITY, Rate, Record, Report, Verdict
from doorward.reports import wording
from doorward.verdict import conclude

#: A plant counts when its attack success on held-out images is at least this; fixed before scanning.
PLANTED = 0.9
#: Parts of [0, 1] that p-values are counted in.
BINS = 10
#: What the share of clean models with p <= .05 shall surely be below, with every number of classes.
MOST_ALARMS = 0.1


class Judgement(Record):
    """Hold what one detector said."""

    verdict: Verdict
    score: float | None
    p_value: float | None
    targets: tuple[int, ...]
    seconds: float


class Result(Record):
    """Hold one trial's result, as small as a table needs it.

    Attributes:
        status: "missing" if the trial has not been run.
        data: name of the data set.
        model: start of the model's key; repeated scans share it.
        plant: targets of what is planted; None for clean models.
        planting: what that did, in suites that measure it and scan nothing.
        reason: why the scan could not tell.
    """

    trial: str
    group: str
    status: str
    data: str
    seed: int = 0
    draw: int = 0
    model: str | None = None
    architecture: str
    classes: int | None = None
    accuracy: float | None = None
    attack_success: float | None = None
    plant: tuple[int, ...] | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    targets: tuple[int, ...] = ()
    p_value: float | None = None
    detectors: dict[str, Judgement] = Field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    planting: Planting | None = None
    error: str | None = None

    @property
    def flagged(self) -> bool:
        """Tell whether the verdict is an alarm."""
        return self.verdict is not None and SEVERITY[self.verdict] >= SEVERITY["suspicious"]

    @property
    def exact(self) -> bool:
        """Tell whether the verdict is an alarm and names the planted targets, all and no others."""
        return self.flagged and self.plant is not None and set(self.targets) == set(self.plant)

    @property
    def excluded(self) -> bool:
        """Tell whether something was to be planted and did not take."""
        return self.plant is not None and (self.attack_success or 0.0) < PLANTED


class Results(Record):
    """Hold a suite's results at one scale; what `bench run` exports.

    Attributes:
        made_with: what the trials ran on, and the bank that verdicts are by.
        left_out: data sets of which the bank has clean models; those judged no model of the same data.
    """

    suite: str
    scale: Scale
    made_with: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    results: tuple[Result, ...]


class GroupRow(Record):
    """Hold one line of the table: a group of planted models beside the clean ones of the same data.

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
        seconds, peak_memory: medians over the scans.
    """

    group: str
    about: str
    apart: bool
    counted: tuple[str, ...]
    excluded: dict[str, float]
    exact_target: Rate
    flagged: Rate
    false_alarms: Rate
    planted_unknown: Rate
    clean_unknown: Rate
    by_score: Ranking
    by_detector: dict[str, Ranking]
    seconds: float | None
    peak_memory: float | None


class PlantRow(Record):
    """Hold one line of the table of a suite that scans nothing: models with the same attack on the same data.

    Attributes:
        about: what is special, in words.
        accuracy, twin, change: means over the models; of planted ones, of clean twins, and between them.
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


class ClaimRow(Record):
    """Hold a claim and what we measure; `reached` is None where there is nothing to compare."""

    text: str
    source: str
    ours: Rate
    reached: bool | None


class CleanRow(Record):
    """Hold clean models that have something in common: about as many classes, or the data set."""

    name: str
    models: int
    alarms_at_5: Rate
    alarms_at_1: Rate
    unknown: Rate


class StableRow(Record):
    """Hold a group whose models were scanned with several seeds and several draws of images.

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
    """Hold all that is shown of a suite at one scale.

    Attributes:
        left_out: as in `Results`.
        groups, plants: one of them, by whether the suite scans.
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
    stability: tuple[StableRow, ...]
    buckets: tuple[CleanRow, ...]
    data_sets: tuple[CleanRow, ...]
    histogram: tuple[int, ...]
    clean: tuple[str, ...]
    results: tuple[Result, ...]


def collect(suite: Suite, scale: Scale, store: Store, bank: Bank | None = None) -> Results:
    """Return a suite's last results from the store; trials that were not run are marked missing.

    Args:
        bank: of clean models, by which every verdict is concluded anew; the shipped one if None.

    Raises:
        InputError: if the store holds what cannot be understood.
    """
    bank = bank or shipped()
    trials = expand(suite, scale)
    rows = store.latest(trials)
    made: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows.values():
        for name, value in {**row.versions, "code": row.git_revision, "device": row.device}.items():
            made[name].add(str(value))
        made["threads"].add(str(row.threads))
    known = {family(model.data) for model in bank.models} if suite.scans else set()
    if suite.scans:
        made["bank"].add(bank_label(bank))
    judges = cache(lambda own: left_out(bank, own))
    return Results(
        suite=suite.name,
        scale=scale,
        made_with={name: tuple(sorted(values)) for name, values in sorted(made.items())},
        left_out=tuple(sorted({family(t.data.name) for t in trials} & known)),
        results=tuple(
            _result(rows[t.name], judges(family(t.data.name)))
            if t.name in rows
            else Result(
                trial=t.name, group=t.group, status="missing", data=t.data.name, architecture=t.architecture
            )
            for t in sorted(trials, key=lambda t: t.name)
        ),
    )


def bank_label(bank: Bank) -> str:
    """Name a bank by its content and its size."""
    return f"{content_key(bank.model_dump(mode='json'))[:12]} ({len(bank.models)} clean models)"


def _result(row: Row, bank: Bank) -> Result:
    given = row.given
    base = {
        "trial": row.trial,
        "group": given["group"],
        "status": row.status,
        "data": given["data"]["name"],
        "seed": given["judging"]["seed"],
        "draw": given["judging"]["draw"],
        "architecture": given["architecture"],
        "error": row.error,
    }
    if row.result is None:
        return Result(**base)
    truth = row.result["truth"]
    success = truth["attack_success"]
    base |= {
        "model": content_key(row.resolved["model"])[:12],
        "classes": truth["classes"],
        "accuracy": truth["clean_accuracy"]["value"],
        "attack_success": success and success["value"],
        "plant": tuple(truth["targets"]) if truth["attack"] else None,
        "seconds": row.seconds,
        "peak_memory": row.peak_memory,
    }
    if row.result["report"] is None:
        return Result(**base, planting=row.result["planting"])
    try:
        report = conclude(Report.model_validate(row.result["report"]), bank)
    except ValidationError as error:
        raise InputError(
            f"the results store holds a report of {row.trial} that this version does not understand; "
            "run the suite again with another --store"
        ) from error
    return Result(
        **base,
        verdict=report.verdict,
        reason=report.reason,
        targets=report.targets,
        p_value=report.p_value,
        detectors={f.detector: Judgement(**f.model_dump(include=_JUDGEMENT)) for f in report.findings},
    )


_JUDGEMENT = set(Judgement.model_fields)


def results_file(folder: Path, suite: str, scale: Scale) -> Path:
    """Return where a suite's results are exported to."""
    return folder / f"{suite}-{scale}.json"


def write_results(results: Results, folder: Path) -> Path:
    """Write results as SUITE-SCALE.json, sorted; but for times, the same results give the same file.

    Raises:
        InputError: if it cannot be written.
    """
    path = results_file(folder, results.suite, results.scale)
    form = results.model_dump(mode="json", exclude_defaults=True)
    rows = [json.dumps(_rounded(one), sort_keys=True, ensure_ascii=False) for one in form.pop("results")]
    head = json.dumps(form, sort_keys=True, ensure_ascii=False)
    text = head[:-1] + ', "results": [\n' + ",\n".join(rows) + "\n]}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from error
    return path


def _rounded(value: Any) -> Any:
    """Return JSON content with six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote.

    Raises:
        InputError: if the file is missing or holds something else.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise InputError(f"{path} holds no results as `doorward bench run` exports them") from error


# --- counting --------------------------------------------------------------------------------------


def summarise(suite: Suite, held: Results) -> Summary:
    """Count results and set them beside the claims."""
    groups = suite.groups(held.scale)
    by_group: dict[str, list[Result]] = {group.name: [] for group in groups}
    for result in held.results:
        if result.status == "done" and result.group in by_group:
            by_group[result.group].append(result)
    pooled = [one for group in groups if not group.apart for one in by_group[group.name]]
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
            if suite.scans or len(claim.groups) != 1
        ),
        groups=tuple(
            _group_row(group, groups, by_group) for group in groups if suite.scans and _has_row(group, groups)
        ),
        plants=tuple(
            _plant_row(group, by_group[group.name], suite.claims)
            for group in groups
            if any(one.planting is not None for one in by_group[group.name])
        ),
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
}


def measure(name: Measure, results: Sequence[Result]) -> Rate:
    """Count what a claim is about.

    `stable` counts models of which several scans all said the same, `attack_success` triggered images, and
    `accuracy_kept` groups whose planted models are on average at most a point less accurate than their twins.
    """
    if name == "stable":
        repeated = _repeated(results)
        return rate(sum(len(set(map(_said, seen))) == 1 for seen in repeated), len(repeated))
    if name == "attack_success":
        return pooled(one.planting.success for one in results if one.planting) or rate(0, 0)
    if name == "accuracy_kept":
        groups = _plantings(results)
        return rate(sum(map(kept, groups.values())), len(groups))
    among, counted = MEASURES[name]
    return _count([one for one in _once(results) if among(one)], counted)


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
    verdict = wording.TITLES[result.verdict].lower() if result.verdict else ""
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
    """Tell whether a group holds the clean models that a planted group is set beside."""
    return (
        clean.attack is None and planted.attack is not None and clean.data == planted.data and not clean.apart
    )


def _has_row(group: Group, groups: Sequence[Group]) -> bool:
    """Tell whether a group has a line of its own; clean models stand in those of the planted ones.

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
        apart=group.apart,
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
        seconds=median(one.seconds or 0.0 for one in both) if both else None,
        peak_memory=median(memory) if memory else None,
    )


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


# --- writing ---------------------------------------------------------------------------------------


def counts(value: Rate) -> str:
    """Write a rate for a table's cell.

    >>> counts(rate(23, 24)), counts(rate(0, 0))
    ('23 of 24 (78.9 % to 99.9 %)', '')
    """
    if not value.n:
        return ""
    return f"{value.successes} of {value.n} ({wording.percent(value.low)} to {wording.percent(value.high)})"


def area(value: Ranking) -> str:
    """Write an AUROC with its interval."""
    if value.auroc is None or value.low is None or value.high is None:
        return ""
    return f"{value.auroc:.3f} ({value.low:.3f} to {value.high:.3f})"


def mark(claim: ClaimRow) -> str:
    """Say whether a claim is reached."""
    if not claim.ours.n:
        return "not measured"
    return {True: "reached", False: "**not reached**", None: ""}[claim.reached]


def trials_line(summary: Summary) -> str:
    """Say how many trials there are, and what became of them."""
    total = sum(summary.trials.values())
    parts = [f"{count} {status}" for status, count in summary.trials.items() if count]
    return f"{total} trials at scale {summary.scale}: {', '.join(parts)}."


def unmeasured(summary: Summary) -> str:
    """Say that there are no results, and what makes some; empty if there are any."""
    if summary.trials.get("done"):
        return ""
    return (
        f"Nothing has been measured yet: `doorward bench run {summary.suite} --scale {summary.scale}` does "
        "so, and with `--dry-run` says how long it takes."
    )


def made_line(summary: Summary) -> str:
    """Say which versions, bank and machine the results are of."""
    names = ("doorward", "torch", "bank", "device")
    held = [f"{name} {', '.join(summary.made_with[name])}" for name in names if name in summary.made_with]
    return f"Made with {'; '.join(held)}." if held else ""


def notes(summary: Summary) -> list[str]:
    """Say what is counted, and how."""
    if summary.plants:
        return [
            "Accuracies are means over the models, on the whole test split; each planted model has a clean "
            "twin of the same data, seed, architecture and training. Attack success is over the triggered "
            "test images of all models together, with the 95 % interval of that count (Clopper and "
            "Pearson), which does not tell how models differ: for that, see the lowest. Poisoned is the "
            "share of the training set. Planting is the median processor time of poisoning all samples, or "
            "of changing the model."
        ]
    said = [
        "Counts with 95 % intervals (Clopper and Pearson). Could-not-tell counts as not flagged. "
        "Time and memory are medians."
    ]
    if summary.buckets and not has_plants(summary):
        over = [row.name for row in summary.buckets if _bound(row) >= MOST_ALARMS]
        reached = f"not reached with {wording.joined(over)} classes" if over else "reached"
        said.append(
            "At most: the one-sided bound of 95 % for the share of models with p <= .05. Our bar is below "
            f"{wording.percent(MOST_ALARMS)} with every number of classes: {reached}."
        )
    if has_plants(summary):
        said.append("The clean models of a line are those of the same data. AUROC is that of the p-value.")
    if harder := [row.group for row in summary.groups if row.apart]:
        said.append(f"Left out of the claims, since meant to be harder: {', '.join(harder)}.")
    if summary.left_out:
        said.append(
            "No model is compared with clean models of its own data: those are left out of the bank for it "
            f"({', '.join(summary.left_out)})."
        )
    if untaken := {name: value for row in summary.groups for name, value in row.excluded.items()}:
        named = ", ".join(f"{name} ({wording.percent(value)})" for name, value in untaken.items())
        said.append(f"Not counted, since the attack did not take (attack success below 90 %): {named}.")
    return said


def changes(row: StableRow) -> str:
    """Say what the scans said of models of which not all said the same."""
    return "; ".join(
        f"{trial.rpartition('-seed')[0]}: {', '.join(f'{count} {said}' for said, count in seen.items())}"
        for trial, seen in row.changed.items()
    )


def stable_cells(row: StableRow) -> list[str]:
    """Return a table's line of models that are scanned several times."""
    return [row.group, str(row.scans), counts(row.same), changes(row)]


#: Head of the table of plants; the first cell of a line is the attack.
PLANT_HEADS = (
    "attack",
    "data",
    "network",
    "models",
    "poisoned",
    "clean accuracy",
    "clean twins",
    "change in points",
    "attack success",
    "lowest",
    "planting",
    "published, or our bar",
)


def plant_cells(row: PlantRow) -> list[str]:
    """Return a table's line of planted models."""

    def share(value: float | None) -> str:
        return "" if value is None else wording.percent(value)

    robust, success = row.robust_accuracy, row.success
    return [
        f"{row.attack} ({row.about})" if row.about else row.attack,
        row.data,
        row.architecture,
        str(row.models),
        share(row.poison_rate),
        share(row.accuracy) + (f" (under attack {share(robust.value)})" if robust else ""),
        share(row.twin),
        f"{100 * row.change:+.2f}",
        f"{share(success.value)} ({share(success.low)} to {share(success.high)})" if success else "",
        share(row.lowest),
        "" if row.planted is None else f"{row.planted:.1f} s",
        "; ".join(
            f"{claim.text} ({claim.source}){said and f': {said}'}"
            for claim in row.claims
            for said in [mark(claim)]
        ),
    ]


def _bound(row: CleanRow) -> float:
    return upper_bound(row.alarms_at_5.successes, row.alarms_at_5.n)


def clean_cells(row: CleanRow) -> list[str]:
    """Return a table's line of clean models."""
    bound = wording.percent(_bound(row)) if row.alarms_at_5.n else ""
    return [
        row.name,
        str(row.models),
        counts(row.alarms_at_5),
        bound,
        *map(counts, (row.alarms_at_1, row.unknown)),
    ]


def spread_line(summary: Summary) -> str:
    """Say how p-values of clean models should lie."""
    total = sum(summary.histogram)
    return (
        f"P-values of {total} clean models. If well calibrated, about {0.1 * total:.1f} lie in each tenth, "
        f"{0.05 * total:.1f} at .05 or below, {0.01 * total:.1f} at .01."
    )


#: Heads of the tables; the first cell of a line is its name.
CLEAN_HEADS = ("clean models", "p ≤ .05", "at most (95 %)", "p ≤ .01", "could not tell")
STABLE_HEADS = ("group", "scans of each model", "models with one verdict and target", "scans of the others")


def to_markdown(summary: Summary) -> str:
    """Write a summary as Markdown tables."""
    planted = has_plants(summary)
    blocks = [f"**{summary.title}.** {summary.about}", trials_line(summary)]
    if nothing := unmeasured(summary):
        return "\n\n".join([*blocks, nothing]) + "\n"
    if summary.claims:
        lines = [[row.text, row.source, counts(row.ours), mark(row)] for row in summary.claims]
        blocks.append(_table(("claim", "source", "ours", ""), lines, rule="---"))
    if summary.plants:
        blocks.append(_table(PLANT_HEADS, map(plant_cells, summary.plants)))
    else:
        header, cells = group_cells(planted)
        blocks.append(_table(header, [cells(row) for row in summary.groups]))
    if not planted and not summary.plants:
        for name, rows in (("classes", summary.buckets), ("data set", summary.data_sets)):
            if rows:
                blocks.append(_table((name, *CLEAN_HEADS), map(clean_cells, rows)))
        if summary.histogram:
            ends = [f"to {(part + 1) / BINS:.1f}" for part in range(BINS)]
            line = ["models", *map(str, summary.histogram)]
            blocks += [spread_line(summary), _table(["p-value", *ends], [line])]
    if summary.stability:
        blocks.append(_table(STABLE_HEADS, map(stable_cells, summary.stability), rule="---"))
    blocks += [*notes(summary), made_line(summary)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, rule: str = "---:") -> str:
    """Return a Markdown table; `rule` is that of all columns but the first."""
    lines = [heads, ["---", *[rule] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def has_plants(summary: Summary) -> bool:
    """Tell whether any planted model counts."""
    return any(row.flagged.n for row in summary.groups)


def group_cells(planted: bool) -> tuple[list[str], Callable[[GroupRow], list[str]]]:
    """Return the table's header and what makes a line of a group."""
    header = ["group"]
    if planted:
        header += ["right target", "planted flagged"]
    header += ["clean flagged", "could not tell"]
    if planted:
        header += ["AUROC"]
    header += ["one scan"]

    def cells(row: GroupRow) -> list[str]:
        unknown = rate(
            row.planted_unknown.successes + row.clean_unknown.successes,
            row.planted_unknown.n + row.clean_unknown.n,
        )
        made = [f"{row.group} ({row.about})" if row.about else row.group]
        if planted:
            made += [counts(row.exact_target), counts(row.flagged)]
        made += [counts(row.false_alarms), f"{unknown.successes} of {unknown.n}" if unknown.n else ""]
        if planted:
            made += [area(row.by_score)]
        took = "" if row.seconds is None else f"{row.seconds:.1f} s"
        return [*made, took + (f" ({wording.size(round(row.peak_memory))})" if row.peak_memory else "")]

    return header, cells


def to_csv(summary: Summary) -> str:
    """Write the groups as comma-separated values, one number a cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if summary.plants:
        parts = ("successes", "n", "low", "high")
        nested = ("success", "robust_accuracy", "claims")
        fields = [name for name in PlantRow.model_fields if name not in nested]
        writer.writerow(["suite", "scale", *fields, *(f"success_{name}" for name in parts)])
        for plant in summary.plants:
            found = [plant.success and getattr(plant.success, name) for name in parts]
            own = [getattr(plant, name) for name in fields]
            writer.writerow([summary.suite, summary.scale, *own, *found])
        return out.getvalue()
    rates = ("exact_target", "flagged", "false_alarms", "planted_unknown", "clean_unknown")
    header = [
        "suite",
        "scale",
        "group",
        *(f"{name}_{part}" for name in rates for part in ("count", "n", "low", "high")),
    ]
    writer.writerow(
        [*header, "auroc", "auroc_low", "auroc_high", "excluded", "median_seconds", "median_peak_memory"]
    )
    for row in summary.groups:
        values = [getattr(row, name) for name in rates]
        cells = [
            part
            for value in values
            for part in (value.successes, value.n, f"{value.low:.4f}", f"{value.high:.4f}")
        ]
        score = row.by_score
        writer.writerow(
            [
                *(summary.suite, summary.scale, row.group, *cells),
                *(score.auroc, score.low, score.high, len(row.excluded), row.seconds, row.peak_memory),
            ]
        )
    return out.getvalue()


def to_json(summary: Summary) -> str:
    """Write everything as JSON."""
    return summary.model_dump_json(indent=2) + "\n"
