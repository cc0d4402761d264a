"""What a report says in words. Every sentence and every number of all reporters is made here.

Strings that come from a model, a data set or a path are untrusted: reporters pass them through `plain`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from doorward.core.formatting import (
    class_label,
    classes_label,
    duration,
    joined,
    number,
    p_value,
    percent,
    plain,
    rate,
    sentence,
    size,
    with_noun,
)
from doorward.core.records import (
    SEVERITY,
    Confirmation,
    ControlResult,
    Coverage,
    Finding,
    NotRun,
    Report,
    SubjectRecord,
    Verdict,
)

TITLES: dict[Verdict, str] = {
    "unsafe": "Unsafe to load",
    "backdoored": "Backdoored",
    "suspicious": "Suspicious",
    "could_not_tell": "Could not tell",
    "nothing_found": "Nothing found",
}

#: Share of the flagged samples that seem to come from a class for it to be named.
SOURCE_SHARE = 0.05
#: Flagged samples that the text report lists.
LISTED = 3

_ROLES = {"clean": "Clean", "train": "Training", "inputs": "Input"}


# --- the verdict ---------------------------------------------------------------------------------


def class_names(report: Report) -> tuple[str, ...]:
    """Return the subject's class names, none where there is no model."""
    return report.subject.classes if report.subject else ()


@dataclass(frozen=True)
class Fact:
    """One fact behind the verdict: what it is, its value in short, and that value explained."""

    label: str
    value: str
    detail: str = ""


def explanation(report: Report) -> str:
    """Say in one sentence what the verdict means for this report."""
    towards = with_noun(report.targets, class_names(report)) if report.targets else ""
    if report.verdict == "unsafe":
        return "Loading this file would run code that it brings or names. Doorward did not load it."
    if report.verdict == "backdoored":
        if len(report.targets) == 1:
            return f"A hidden trigger makes this model answer {towards}, whatever else the input shows."
        return (
            f"Hidden triggers steer this model's answers to {towards}." if towards else "There is a backdoor."
        )
    if report.verdict == "suspicious":
        if poisoned := flagged_data(report):
            return _poison(report, poisoned)
        if in_files_alone(report):
            what = f"sends inputs to {towards}" if towards else "changes its answers"
            return (
                f"The files of this model say that something beside the network {what}. What that is for, "
                "they do not say."
            )
        where = f", towards {towards}" if towards else ""
        return f"Something looks like a backdoor{where}, but the evidence is not enough to be sure."
    if report.verdict == "could_not_tell":
        return sentence(f"The scan reached no conclusion: {plain(report.reason or 'no reason was given')}")
    if report.covered.training_data and not report.covered.behaviour:
        nothing = "None of the tests that ran found poison in the training data."
        return f"{nothing} That does not prove that there is none."
    nothing = "None of the tests that ran found a backdoor. That does not prove that there is none."
    return " ".join([nothing, *_controlled(report)])


def flagged_data(report: Report) -> tuple[Finding, ...]:
    """Return the findings that flag training samples."""
    return tuple(f for f in report.findings if f.kind == "poison" and f.flagged)


def _poison(report: Report, found: Iterable[Finding]) -> str:
    """Say how many training samples look poisoned, and what they seem to teach."""
    ids = {one for finding in found for one in finding.flagged_ids}
    classes = class_names(report)
    labels = dict.fromkeys(t for finding in found for t in finding.targets)
    counts = Counter(source for finding in found for source in finding.sources.values())
    sources = [source for source, count in counts.most_common() if count >= SOURCE_SHARE * counts.total()]
    from_where = f" and seem to come from {with_noun(tuple(sorted(sources)), classes)}" if sources else ""
    also = (
        ""
        if all(t in labels for t in report.targets)
        else (f" The model itself looks suspicious too, towards {with_noun(report.targets, classes)}.")
    )
    return (
        f"{len(ids):,} training samples look poisoned: they are labelled {with_noun(tuple(labels), classes)}"
        f"{from_where}. A model that is trained on them may answer to a hidden trigger.{also}"
    )


def in_files_alone(report: Report) -> bool:
    """Return whether all that raises an alarm is written in the model's files."""
    return {finding.level for finding in report.findings if finding.flagged} == {"artifact"}


def _controlled(report: Report) -> list[str]:
    """Say in a sentence which planted triggers were found and which were missed; none where none was."""
    planted: dict[str, bool] = {}
    for one in report.positive_control.controls:
        if one.planted:
            planted[one.family] = planted.get(one.family, True) and one.recovered
    fates = [
        (fate, [plain(name) for name, found in planted.items() if found == (fate == "found")])
        for fate in ("found", "missed")
    ]
    told = [f"{fate} {joined(names)}" for fate, names in fates if names]
    return [f"Of known triggers planted in copies of this model, they {' and '.join(told)}."] if told else []


def covered(what: Coverage) -> str:
    """Say in one line which detectors ran to their end and had a part in the verdict.

    >>> covered(Coverage(files=("unsafe-code",)))
    'files (unsafe-code); behaviour: nothing'
    """
    parts = []
    wings = [("files", what.files), ("behaviour", what.behaviour)]
    wings += [("training data", what.training_data)] if what.training_data else []
    for label, names in wings:
        parts.append(f"{label} ({', '.join(map(plain, names))})" if names else f"{label}: nothing")
    return "; ".join(parts)


def facts(report: Report) -> tuple[Fact, ...]:
    """Return which class, how sure, and how often the recovered trigger works."""
    rows = []
    if report.targets:
        label = "Target class" if len(report.targets) == 1 else "Target classes"
        rows.append(Fact(label, classes_label(report.targets, class_names(report))))
    if report.verdict not in ("unsafe", "could_not_tell"):
        rows.append(_certainty(report))
    if report.looks and report.targets:
        rows.append(_looks(report))
    # without an alarm of the detector such a rate would mislead: a large enough pattern moves any model
    alarmed = {finding.detector for finding in report.findings if finding.flagged}
    works = [one for one in report.confirmations if one.detector in alarmed]
    by_target = {t: [one for one in works if one.target == t] for t in report.targets}
    return (*rows, *(_confirmation(report, found) for found in by_target.values() if found))


def _looks(report: Report) -> Fact:
    """Say what further looks saw, where one was not enough."""
    told = joined([p_value(one.p_value) for one in report.looks if one.p_value is not None])
    detail = f"{len(report.looks)} more, each from other random starts, with images drawn anew: {told}"
    return Fact("In further looks", "It stands out again", detail)


def _certainty(report: Report) -> Fact:
    alarm = report.verdict != "nothing_found"
    sets = bool(report.covered.training_data) and not report.covered.behaviour
    kind = "training sets" if sets else "models"
    label = "How sure" if alarm else f"Compared with clean {kind}"
    if in_files_alone(report):
        p = report.p_value
        seen = "" if p is None else f"how the model behaves raises no alarm ({p_value(p)})"
        return Fact("How sure", "Read, not measured", seen)
    if not report.calibrated:
        value = "Uncalibrated" if report.p_value is None else f"{p_value(report.p_value)}, uncalibrated"
        why = (
            report.uncalibrated or "how often a clean model of this kind looks the same has not been measured"
        )
        return Fact(label, value, why)
    if report.p_value is None:
        return Fact(label, "No p-value")
    share = _share(report.p_value)
    if alarm:
        looks = f"about {share} clean {kind} would look at least as suspicious"
        return Fact(label, p_value(report.p_value), looks.replace("about fewer", "fewer"))
    return Fact(
        label,
        f"{share[:1].upper()}{share[1:]} look as suspicious",
        f"that says how ordinary {'these data look' if sets else 'this model looks'}, not how sure the "
        f"verdict is ({p_value(report.p_value)})",
    )


def _share(p: float) -> str:
    """Write a p-value as a natural frequency.

    >>> _share(0.42), _share(0.0033), _share(0.00001)
    ('42 in 100', '3 in 1,000', 'fewer than 1 in 10,000')
    """
    base = next((b for b in (100, 1_000) if p * b >= 1), 10_000)
    return f"{p * base:.0f} in {base:,}" if p * base >= 1 else f"fewer than 1 in {base:,}"


def _confirmation(report: Report, found: Sequence[Confirmation]) -> Fact:
    """Say how often the best of the triggers works that were recovered for one class."""
    best_of = {one.detector: one for one in sorted(found, key=lambda one: one.success.low)}
    best, *others = sorted(best_of.values(), key=lambda one: -one.success.low)
    success, name = best.success, class_label(best.target, class_names(report))
    detail = (
        f"{success.successes:,} of {success.n:,} images of other classes became class {name} with the "
        f"trigger that {plain(best.detector)} recovered (95 % interval {percent(success.low)} to "
        f"{percent(success.high)})"
    )
    if others:
        rates = joined([f"{plain(one.detector)} ({percent(one.success.value)})" for one in others])
        detail += f". {len(best_of)} detectors name this class; the others recovered triggers too: {rates}"
    label = "On unseen images" if len(report.targets) == 1 else f"On unseen images, class {best.target}"
    return Fact(label, percent(success.value), detail)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings as a reader wants them: alarms first, equal ones in the order they ran."""
    return sorted(findings, key=lambda finding: -SEVERITY[finding.verdict])


def score_line(finding: Finding) -> str | None:
    """Write a finding's score next to its threshold, and its own p-value; None where it has none."""
    if finding.score is None:
        return None
    line = f"{plain(finding.score_name)}: {number(finding.score)}"
    if finding.threshold is not None:
        line += f", threshold {number(finding.threshold)}"
    if finding.p_value is not None:
        line += f", {p_value(finding.p_value)} on its own" + ("" if finding.calibrated else ", uncalibrated")
    return sentence(line)


def result(report: Report, finding: Finding) -> str:
    """Say in one sentence what a detector found, or why it could not tell; each reason is told once."""
    if finding.reason is None:
        return sentence(plain(finding.summary))
    if report.verdict == "could_not_tell" and finding.reason in (report.reason or ""):
        return "It could not tell, for the reason above."
    for earlier in by_severity(report.findings):
        if earlier is finding:
            break
        if earlier.reason == finding.reason:
            return f"It could not tell, for the same reason as {plain(earlier.detector)}."
    return sentence(plain(finding.reason))


def by_reason(left_out: Iterable[NotRun]) -> list[tuple[str, str]]:
    """Return what did not run by why, as names and reason."""
    together: dict[str, list[str]] = {}
    for one in left_out:
        together.setdefault(one.reason, []).append(plain(one.detector))
    return [(", ".join(names), plain(reason)) for reason, names in together.items()]


def finding_lines(report: Report, finding: Finding) -> list[str]:
    """Return what one detector found, and what it cannot see."""
    lines = [result(report, finding)]
    if line := score_line(finding):
        lines.append(line)
    if finding.uncalibrated and not finding.reason:
        lines.append(
            sentence(f"not calibrated, so it has no part in the verdict: {plain(finding.uncalibrated)}")
        )
    if finding.targets:
        lines.append(f"Target: {classes_label(finding.targets, class_names(report))}.")
    if finding.flagged_ids:
        lines.append(f"Flagged samples: {len(finding.flagged_ids):,}.")
        lines += [
            f"{plain(one.id)}  {plain(one.place)}  labelled {class_label(one.label, class_names(report))}"
            for one in finding.flagged_samples[:LISTED]
        ]
        if len(finding.flagged_samples) > LISTED:
            lines.append("All are in flagged.csv, which --out DIR writes.")
    if finding.limits:
        lines.append(f"Limits: {plain(finding.limits)}")
    return lines


#: Options of `doorward scan` and their defaults, by their names in a report's request.
SCAN_OPTIONS: dict[str, tuple[str, Any]] = {
    "factory": ("--factory", None),
    "weights": ("--weights", None),
    "size": ("--size", None),
    "resize": ("--resize", None),
    "input_range": ("--input-range", None),
    "mean": ("--mean", None),
    "std": ("--std", None),
    "layout": ("--layout", None),
    "channel_order": ("--channels", None),
    "output": ("--output", None),
    "labels": ("--labels", None),
    "features": ("--features", None),
    "data_column": ("--data-column", None),
    "label_column": ("--label-column", None),
    "detectors": ("--detector", ()),
    "settings": ("--set", ()),
    "device": ("--device", "cpu"),
    "time_budget": ("--time-budget", 900.0),
    "memory": ("--memory", None),
    "images": ("--images", 300),
    "control": ("--control", False),
    "strict_files": ("--strict-files", False),
    "skip_unreadable": ("--skip-unreadable", 0),
    "keep_model": ("--keep-model", None),
    "seed": ("--seed", 0),
}
#: Those that `doorward repair` has too.
REPAIR_OPTIONS = {
    name: SCAN_OPTIONS[name]
    for name in (
        "factory", "weights", "size", "resize", "input_range", "mean", "std", "layout", "channel_order",
        "output", "labels", "data_column", "label_column", "device", "seed",
    )
}  # fmt: skip


def caveats(report: Report) -> tuple[str, ...]:
    """Return what the verdict does not mean."""
    return {
        "unsafe": (
            "It says nothing about how the model behaves: a file that is not loaded cannot be tested.",
        ),
        "backdoored": (
            "It does not say who planted the backdoor, or that it was on purpose: a model can also learn a "
            "shortcut from its data that works like a trigger.",
            "The recovered trigger need not look like the planted one. It is one that works.",
            "There may be further backdoors that this scan did not find.",
        ),
        "suspicious": (
            "It does not say that harm is meant: what the files state has been read, and nothing else.",
            "There may be backdoors that the files do not tell of and that this scan did not find.",
        )
        if in_files_alone(report)
        else (
            "It is not proof: some clean training sets look like this too, where a group of samples of one "
            "class belongs elsewhere, as with wrong labels.",
            "It does not say who poisoned the data, or that it was on purpose.",
            "There may be poison that was not found. What was flagged need not be all.",
        )
        if flagged_data(report)
        else (
            "It is not proof: some clean models look like this too.",
            "It does not say who planted a backdoor, or that it was on purpose.",
        ),
        "could_not_tell": ("It is neither good news nor bad news. The question is still open.",),
        "nothing_found": (
            f"It does not mean that the {'model' if report.subject else 'data'} is safe. Only the kinds of "
            "backdoor that the detectors that ran look for were looked for.",
            "Backdoors can be planted that no efficient test of a model's answers finds, if standard "
            "cryptography holds (Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv 2204.06974).",
        ),
    }[report.verdict]


# --- the positive control ------------------------------------------------------------------------


CONTROL = "Known triggers were planted in copies of this model, and the copies were scanned in the same way."


def control_rows(report: Report) -> list[tuple[str, str]]:
    """Return what became of each trigger that was planted in a copy of the model, as label and sentence."""
    if report.positive_control.reason:
        return [("Positive control", sentence(f"it was not run: {plain(report.positive_control.reason)}"))]
    return [(plain(one.family), _control(report, one)) for one in report.positive_control.controls]


def _control(report: Report, one: ControlResult) -> str:
    classes = class_names(report)
    towards = f"planted towards class {class_label(one.target, classes)}"
    if not one.planted:
        return f"Not known. It could not be {towards}: {plain(one.reason or '')}."
    if one.attack_success:
        towards += f", moves {percent(one.attack_success.value)} of {one.attack_success.n:,} held-out images"
    if one.recovered:
        return f"Found ({TITLES[one.verdict or 'suspicious'].lower()}). {sentence(towards)}"
    if one.reason:
        return f"Missed: the scan could not tell, since {plain(one.reason)}. {sentence(towards)}"
    if one.targets:
        return f"Missed: the scan named {with_noun(one.targets, classes)} instead. {sentence(towards)}"
    return f"Missed. {sentence(towards)}"


# --- what was tested, and what it cost ------------------------------------------------------------


def tested(report: Report) -> list[tuple[str, str]]:
    """Return what was tested on what, as label and value."""
    rows: list[tuple[str, str]] = [("Covered", covered(report.covered))]
    if subject := report.subject:
        rows.append(("Model", plain(subject.path)))
        kind, built = plain(subject.format), plain(subject.architecture or "")
        facts = [part for part in (kind if kind.lower() not in built.lower() else "", built) if part]
        facts += [f"{len(subject.classes):,} classes"] if subject.classes else []
        facts += [f"{subject.parameters:,} parameters"] if subject.parameters is not None else []
        facts += [size(subject.bytes)] if subject.bytes is not None else []
        rows.append(("Format", ", ".join(facts)))
        rows.append(("SHA-256", plain(subject.sha256) if subject.sha256 else "not known"))
        if subject.spec:
            rows.append(("Input", input_spec(subject)))
        rows.append(
            ("Clean accuracy", rate(subject.clean_accuracy) if subject.clean_accuracy else "not measured")
        )
    for data in report.data:
        labels = "with labels" if data.labelled else "without labels"
        used = f"{data.used:,} of {data.rows:,} samples used, {labels}"
        rows.append((f"{_ROLES[data.role]} data", f"{plain(data.path)}: {used}"))
        rows.append((f"{_ROLES[data.role]} SHA-256", plain(data.sha256) if data.sha256 else "not known"))
    return rows


def input_spec(subject: SubjectRecord) -> str:
    """Describe the input that the model takes; what nothing stated is marked as assumed.

    >>> spec = {"channels": 1, "height": 28, "width": 28, "layout": "NCHW", "mean": [0.5], "resize": None}
    >>> input_spec(SubjectRecord(path="m.onnx", format="ONNX", spec=spec, assumed=("layout",)))
    '28 x 28 pixels, 1 channel, layout NCHW (assumed), mean 0.5'
    """
    spec = {key: value for key, value in subject.spec.items() if key != "assumed"}
    size_keys = {"channels", "height", "width"}
    parts = []
    if size_keys <= set(spec):
        width, height, channels = (spec.pop(key) for key in ("width", "height", "channels"))
        parts.append(f"{width} x {height} pixels, {channels} {'channel' if channels == 1 else 'channels'}")
        parts[0] += " (assumed)" if size_keys & set(subject.assumed) else ""
    parts += [
        f"{key} {_setting(value, key)}" + (" (assumed)" if key in subject.assumed else "")
        for key, value in spec.items()
        if value is not None
    ]
    return plain(", ".join(parts))


def _setting(value: Any, key: str = "") -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_setting(v)}" for k, v in value.items() if v is not None) + ")"
    if isinstance(value, list | tuple):
        return (" to " if key == "range" else "/").join(map(_setting, value))
    return number(value) if isinstance(value, float) else str(value)


def spent(report: Report) -> str:
    """Return what the scan cost, in one line."""
    forwards = sum(finding.cost.forwards for finding in report.findings)
    gradients = sum(finding.cost.gradients for finding in report.findings)
    parts = [duration(report.seconds), f"{forwards:,} images forward", f"{gradients:,} input gradients"]
    if report.environment.peak_memory_bytes is not None:
        parts.append(f"{size(report.environment.peak_memory_bytes)} of memory at most")
    return ", ".join(parts) + f". Doorward {plain(report.environment.doorward)}."
