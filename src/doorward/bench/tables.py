"""Summaries as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from doorward.bench.suite import OWN
from doorward.bench.summary import (
    BINS,
    JUDGE,
    MOST_ALARMS,
    ClaimRow,
    CleanRow,
    GroupRow,
    InspectionRow,
    MendingRow,
    PlantRow,
    StableRow,
    Summary,
)
from doorward.core import formatting
from doorward.core.records import Rate
from doorward.stats.metrics import Ranking, rate, upper_bound

# --- writing ---------------------------------------------------------------------------------------


def counts(value: Rate) -> str:
    """Write a rate for a table's cell.

    >>> counts(rate(23, 24)), counts(rate(0, 0))
    ('23 of 24 (78.9 % to 99.9 %)', '')
    """
    if not value.n:
        return ""
    low, high = formatting.percent(value.low), formatting.percent(value.high)
    return f"{value.successes} of {value.n} ({low} to {high})"


def area(value: Ranking) -> str:
    """Write an AUROC with its interval."""
    if value.auroc is None or value.low is None or value.high is None:
        return ""
    return f"{value.auroc:.3f} ({value.low:.3f} to {value.high:.3f})"


def mark(claim: ClaimRow) -> str:
    """Return whether a claim is reached."""
    if not claim.ours.n:
        return "not measured"
    return {True: "reached", False: "**not reached**", None: ""}[claim.reached]


def trials_line(summary: Summary) -> str:
    """Return how many trials there are, and what became of them."""
    total = sum(summary.trials.values())
    parts = [f"{count} {status}" for status, count in summary.trials.items() if count]
    what = "models" if summary.scale == OWN else f"trials at scale {summary.scale}"
    return f"{total} {what}: {', '.join(parts)}."


def unmeasured(summary: Summary) -> str:
    """Say that there are no results, and what makes some; empty if there are any."""
    if summary.trials.get("done"):
        return ""
    if summary.scale == OWN:
        return "No model could be scanned."
    return (
        f"Nothing has been measured yet: `doorward bench run {summary.suite} --scale {summary.scale}` does "
        "so, and with `--dry-run` says how long it takes."
    )


def made_line(summary: Summary) -> str:
    """Return which versions, calibration set and machine the results are of."""
    names = ("doorward", "torch", "calibration", "device")
    held = [f"{name} {', '.join(summary.made_with[name])}" for name in names if name in summary.made_with]
    return f"Made with {'; '.join(held)}." if held else ""


def notes(summary: Summary) -> list[str]:
    """Return what is counted, and how."""
    if summary.plants:
        return [
            "Accuracies are means over the models, on the whole test split; each planted model has a clean "
            "counterpart of the same data, seed, architecture and training. Attack success is over the "
            "triggered test images of all models together, with the 95 % interval of that count (Clopper and "
            "Pearson), which does not tell how models differ: for that, see the lowest. Poisoned is the "
            "share of the training set. Planting is the median processor time of poisoning all samples, or "
            "of changing the model."
        ]
    if summary.inspections:
        return [
            "What is flagged is flagged by activation clustering, which alone gives a verdict. Samples are "
            "counted over all sets of a line; F1 is that of the class for which it is least, and of the "
            "inputs' own clusters the mean, as in the paper. AUROC and TPR rank all samples of a set by one "
            "score; they are medians over the sets, the least in brackets. Wrong labels without a trigger "
            "count as clean."
        ]
    if summary.mendings:
        return mending_notes(summary)
    said = [
        "Counts with 95 % intervals (Clopper and Pearson). Could-not-tell counts as not flagged. "
        "Time and memory are medians."
    ]
    if summary.buckets and not has_plants(summary):
        over = [row.name for row in summary.buckets if _bound(row) >= MOST_ALARMS]
        reached = f"not reached with {formatting.joined(over)} classes" if over else "reached"
        said.append(
            "At most: the one-sided bound of 95 % for the share of models with p <= .05. Our bar is below "
            f"{formatting.percent(MOST_ALARMS)} with every number of classes: {reached}."
        )
    if has_plants(summary):
        said.append("The clean models of a line are those of the same data. AUROC is that of the p-value.")
    if harder := [row.group for row in summary.groups if row.excluded_from_claims]:
        said.append(f"Left out of the claims, since meant to be harder: {', '.join(harder)}.")
    if summary.left_out:
        said.append(
            "No model is compared with clean models of its own data, which are left out of its calibration "
            f"({', '.join(summary.left_out)})."
        )
    if untaken := {name: value for row in summary.groups for name, value in row.excluded.items()}:
        named = ", ".join(f"{name} ({formatting.percent(value)})" for name, value in untaken.items())
        least = f"{100 * max(one.least_success for one in summary.results if one.excluded):.0f} %"
        said.append(f"Not counted, since the attack did not take (attack success below {least}): {named}.")
    return said


def changes(row: StableRow) -> str:
    """Return what the scans said of models of which not all said the same."""
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
    "clean counterpart",
    "change in points",
    "attack success",
    "lowest",
    "planting",
    "published, or our bar",
)


def plant_cells(row: PlantRow) -> list[str]:
    """Return a table's line of planted models."""

    def share(value: float | None) -> str:
        return "" if value is None else formatting.percent(value)

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
        _claimed(row.claims),
    ]


#: Head of the table of inspected training sets; the first cell of a line is what is in them.
INSPECTION_HEADS = (
    "training sets",
    "data",
    "sets",
    "samples",
    "poisoned",
    "attack success",
    "sets flagged",
    "right classes",
    "poison flagged (TPR)",
    "clean flagged (FPR)",
    "F1, least class",
    "raw inputs: F1",
    "AUROC",
    "TPR at 5 % FPR (least)",
    "spectral signatures",
    "noise response",
    "seconds",
    "published, or our bar",
)


def inspection_cells(row: InspectionRow) -> list[str]:
    """Return a table's line of inspected training sets."""

    def share(value: float | None) -> str:
        return "" if value is None else formatting.percent(value)

    own = row.rankings.get(JUDGE)
    others = [row.rankings.get(name) for name in ("spectral-signatures", "noise-response")]
    found, what = row.found, row.attack or "clean"
    return [
        f"{what} ({row.about})" if row.about else what,
        row.data,
        str(row.models),
        f"{row.samples:,.0f}",
        share(row.poisoned / row.samples),
        share(row.learnt),
        f"{row.alarms.successes} of {row.alarms.n}",
        f"{row.exact.successes} of {row.exact.n}" if row.exact.n else "",
        share(found.tpr.value) if found.tpr.n else "",
        share(found.fpr.value) if found.fpr.n else "",
        share(found.f1_least),
        share(row.raw.f1_mean),
        "" if own is None or own.auroc is None else f"{own.auroc:.3f}",
        f"{share(own.tpr_at_5)} ({share(own.least_tpr_at_5)})" if own and own.tpr_at_5 is not None else "",
        *(share(one.tpr_at_5) if one else "" for one in others),
        f"{row.seconds:.1f}",
        _claimed(row.claims),
    ]


#: Head of the table of repaired models; the first cell of a line is the attack.
MENDING_HEADS = (
    "attack",
    "data",
    "network",
    "repair",
    "mended",
    "accuracy before",
    "after",
    "change in points",
    "attack success before",
    "after",
    "right label again",
    "success after further training",
    "nothing found",
    "seconds",
)


def mending_cells(row: MendingRow) -> list[str]:
    """Return a table's line of models that one repair mended."""

    def share(value: Rate | float | None) -> str:
        return "" if value is None else formatting.percent(value.value if isinstance(value, Rate) else value)

    found = row.nothing_found
    return [
        f"{row.attack} ({row.about})" if row.about else row.attack,
        row.data,
        row.architecture,
        row.repair,
        f"{row.mended} of {row.models}",
        share(row.accuracy_before),
        share(row.accuracy),
        "" if row.change is None else f"{100 * row.change:+.2f}",
        share(row.success_before),
        share(row.success),
        share(row.right),
        share(row.returned),
        f"{found.successes} of {found.n}" if found.n else "",
        "" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def mending_notes(summary: Summary) -> list[str]:
    """Return what is counted of repaired models, and which of them were not mended or do not count."""
    said = [
        "Repairs see the model, the clean samples and the findings of one scan. Accuracies are means over "
        "the mended models, on clean test images that no repair has seen; attack success and right labels "
        "are over their triggered images together. Right label again: triggered images that get the label "
        "that they have without the trigger. Success after further training: attack success of the mended "
        "models after two epochs of fine-tuning on other clean samples. Seconds are the median processor "
        "time of a repair; those of auto are with its scans."
    ]
    for row in summary.mendings:
        said += [f"{row.attack} on {row.data}, {row.repair}: {reason}." for reason in row.reasons]
    if untaken := [one.trial for one in summary.results if one.mending is not None and one.excluded]:
        said.append(f"Not counted, since the attack did not take: {', '.join(untaken)}.")
    return said


def _claimed(claims: Sequence[ClaimRow]) -> str:
    """Return a group's claims and whether they are reached."""
    return "; ".join(
        f"{claim.text} ({claim.source}){said and f': {said}'}" for claim in claims for said in [mark(claim)]
    )


def _bound(row: CleanRow) -> float:
    return upper_bound(row.alarms_at_5.successes, row.alarms_at_5.n)


def clean_cells(row: CleanRow) -> list[str]:
    """Return a table's line of clean models."""
    bound = formatting.percent(_bound(row)) if row.alarms_at_5.n else ""
    return [
        row.name,
        str(row.models),
        counts(row.alarms_at_5),
        bound,
        *map(counts, (row.alarms_at_1, row.unknown)),
    ]


def spread_line(summary: Summary) -> str:
    """Return how p-values of clean models should lie."""
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
        blocks.append(table(("claim", "source", "ours", ""), lines, rule="---"))
    if summary.plants:
        blocks.append(table(PLANT_HEADS, map(plant_cells, summary.plants)))
    elif summary.inspections:
        blocks.append(table(INSPECTION_HEADS, map(inspection_cells, summary.inspections)))
    elif summary.mendings:
        blocks.append(table(MENDING_HEADS, map(mending_cells, summary.mendings)))
    else:
        header, cells = group_cells(planted, published=has_published_rule(summary))
        blocks.append(table(header, [cells(row) for row in summary.groups]))
    if not planted and not (summary.plants or summary.inspections or summary.mendings):
        for name, rows in (("classes", summary.buckets), ("data set", summary.data_sets)):
            if rows:
                blocks.append(table((name, *CLEAN_HEADS), map(clean_cells, rows)))
        if summary.histogram:
            ends = [f"to {(part + 1) / BINS:.1f}" for part in range(BINS)]
            line = ["models", *map(str, summary.histogram)]
            blocks += [spread_line(summary), table(["p-value", *ends], [line])]
    if summary.stability:
        blocks.append(table(STABLE_HEADS, map(stable_cells, summary.stability), rule="---"))
    blocks += [*notes(summary), made_line(summary)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, rule: str = "---:") -> str:
    """Return a Markdown table; `rule` is that of all columns but the first."""
    lines = [heads, ["---", *[rule] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def has_plants(summary: Summary) -> bool:
    """Return whether any planted model counts."""
    return any(row.flagged.n for row in summary.groups)


def has_published_rule(summary: Summary) -> bool:
    """Return whether a detector's published rule stands next to its score."""
    return any(row.published.n or row.published_alarms.n for row in summary.groups)


def group_cells(
    planted: bool, *, published: bool = False
) -> tuple[list[str], Callable[[GroupRow], list[str]]]:
    """Return the table's header and what makes a line of a group.

    Args:
        published: whether a method's published rule has columns of its own.
    """
    header = ["group"]
    if planted:
        header += ["right target", "planted flagged"]
    header += ["clean flagged", "could not tell"]
    if planted:
        header += ["AUROC"]
    if published:
        header += ["published rule: right target", "published rule: clean flagged"]
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
        if published:
            made += [counts(row.published), counts(row.published_alarms)]
        took = "" if row.seconds is None else f"{row.seconds:.1f} s"
        return [*made, took + (f" ({formatting.size(round(row.peak_memory))})" if row.peak_memory else "")]

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
    if summary.inspections:
        writer.writerow(["suite", "scale", "group", *INSPECTION_HEADS])
        for one in summary.inspections:
            writer.writerow([summary.suite, summary.scale, one.group, *inspection_cells(one)])
        return out.getvalue()
    if summary.mendings:
        writer.writerow(["suite", "scale", "group", *MENDING_HEADS])
        for mended in summary.mendings:
            writer.writerow([summary.suite, summary.scale, mended.group, *mending_cells(mended)])
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
