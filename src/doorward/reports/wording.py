"""What a report says in words. Every sentence and every number of all reporters is made here.

Strings that come from a model, a data set or a path are untrusted: reporters pass them through `plain`.
"""

from __future__ import annotations

import math
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from doorward.records import (
    SEVERITY,
    Confirmation,
    ControlResult,
    Finding,
    Power,
    Rate,
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

_ROLES = {"clean": "Clean", "train": "Training", "inputs": "Input"}

#: Images of each class that are enough both to fit a trigger and to confirm it on others.
IMAGES_PER_CLASS = 20


@dataclass(frozen=True)
class Step:
    """Hold one thing to do next, and the command for it where there is one."""

    text: str
    command: str | None = None


# --- strings and numbers -------------------------------------------------------------------------


def plain(text: str, *, lines: bool = False) -> str:
    r"""Make an untrusted string harmless to show: control and invisible characters become escapes.

    Terminal escape sequences and characters that reorder text would let a class name or a path forge
    what a reader sees. Joiners stay, since some scripts need them; newlines and tabs stay with `lines`.

    >>> plain("Dress\x1b[2J")
    'Dress\\x1b[2J'
    """
    kept = "\u200c\u200d" + ("\n\t" if lines else "")
    return "".join(
        char
        if char in kept or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def sentence(text: str) -> str:
    """Make a phrase a sentence.

    >>> sentence("nothing ran"), sentence("Is it right?"), sentence("model.pt: damaged")
    ('Nothing ran.', 'Is it right?', 'model.pt: damaged.')
    """
    text = text.strip()
    word = text.split(maxsplit=1)[0] if text else ""
    if word.rstrip(",;'").isalpha():  # else it is a path or a name, which keeps its case
        text = text[:1].upper() + text[1:]
    return text + ("" if text.endswith((".", "!", "?")) else ".")


def number(value: float) -> str:
    """Write a score: four significant digits.

    >>> number(7.12345), number(-0.000123456), number(4900000.0)
    ('7.123', '-0.0001235', '4.9e+06')
    """
    return f"{value:.4g}"


def percent(value: float) -> str:
    """Write a proportion in percent; 0 % and 100 % only when it is exactly that.

    >>> percent(1), percent(0.9999), percent(0.0004), percent(0.5)
    ('100 %', '> 99.9 %', '< 0.1 %', '50.0 %')
    """
    if value in (0, 1):
        return f"{value * 100:.0f} %"
    if value > 0.999:
        return "> 99.9 %"
    if value < 0.001:
        return "< 0.1 %"
    return f"{value * 100:.1f} %"


def rate(value: Rate) -> str:
    """Write a rate with its count and interval."""
    return (
        f"{percent(value.value)} ({value.successes:,} of {value.n:,}; "
        f"95 % interval {percent(value.low)} to {percent(value.high)})"
    )


def p_value(value: float) -> str:
    """Write a p-value with two significant digits.

    >>> p_value(0.00331), p_value(0.00001), p_value(1.0)
    ('p = 0.0033', 'p < 0.0001', 'p = 1')
    """
    return f"p = {value:.2g}" if value >= 0.0001 else "p < 0.0001"


def duration(seconds: float) -> str:
    """Write a time.

    >>> duration(0.04), duration(12.34), duration(754)
    ('< 0.1 s', '12.3 s', '12 min 34 s')
    """
    if seconds < 0.1:
        return "< 0.1 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def size(count: int) -> str:
    """Write a number of bytes.

    >>> size(512), size(1_500_000)
    ('512 bytes', '1.5 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    exponent = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**exponent:.1f} {('kB', 'MB', 'GB', 'TB')[exponent - 1]}"


def class_label(index: int, classes: tuple[str, ...]) -> str:
    """Name a class by number and, where it has one, name.

    >>> class_label(3, ("T-shirt", "Trouser", "Pullover", "Dress")), class_label(7, ())
    ('3 (Dress)', '7')
    """
    if 0 <= index < len(classes) and classes[index] != str(index):
        return f"{index} ({plain(classes[index])})"
    return str(index)


def classes_label(targets: Iterable[int], classes: tuple[str, ...], *, limit: int = 5) -> str:
    """Name some classes; of many, the first ones and how many more."""
    targets = tuple(targets)
    if not targets:
        return "none"
    if len(targets) > limit and len(targets) == len(classes):
        return f"all {len(classes)} classes"
    names = [class_label(target, classes) for target in targets[:limit]]
    if len(targets) > limit:
        names.append(f"{len(targets) - limit} more")
    return joined(names)


def joined(names: Sequence[str]) -> str:
    """List names in words.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"


def with_noun(targets: tuple[int, ...], classes: tuple[str, ...]) -> str:
    """Name some classes with the word before them.

    >>> with_noun((3,), ()), with_noun((3, 5), ()), with_noun(tuple(range(6)), tuple("abcdef"))
    ('class 3', 'classes 3 and 5', 'all 6 classes')
    """
    label = classes_label(targets, classes)
    if label.startswith("all "):
        return label
    return f"class {label}" if len(targets) == 1 else f"classes {label}"


# --- the verdict ---------------------------------------------------------------------------------


def class_names(report: Report) -> tuple[str, ...]:
    """Return the subject's class names, none where there is no model."""
    return report.subject.classes if report.subject else ()


@dataclass(frozen=True)
class Fact:
    """Hold one fact behind the verdict: what it is, its value in short, and that value explained."""

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
        if _in_files_alone(report):
            what = f"sends inputs to {towards}" if towards else "changes its answers"
            return (
                f"The files of this model say that something beside the network {what}. What that is for, "
                "they do not say."
            )
        where = f", towards {towards}" if towards else ""
        return f"Something looks like a backdoor{where}, but the evidence is not enough to be sure."
    if report.verdict == "could_not_tell":
        return sentence(f"The scan reached no conclusion: {plain(report.reason or 'no reason was given')}")
    nothing = "None of the tests that ran found a backdoor. That does not prove that there is none."
    return " ".join([nothing, *_controlled(report)])


def _in_files_alone(report: Report) -> bool:
    """Tell whether all that raises an alarm is written in the model's files."""
    return {finding.level for finding in report.findings if finding.flagged} == {"artifact"}


def _controlled(report: Report) -> list[str]:
    """Say in a sentence which planted triggers were found and which were missed; none where none was."""
    planted: dict[str, bool] = {}
    for one in report.power.controls:
        if one.planted:
            planted[one.family] = planted.get(one.family, True) and one.recovered
    fates = [
        (fate, [plain(name) for name, found in planted.items() if found == (fate == "found")])
        for fate in ("found", "missed")
    ]
    told = [f"{fate} {joined(names)}" for fate, names in fates if names]
    return [f"Of known triggers planted in copies of this model, they {' and '.join(told)}."] if told else []


def facts(report: Report) -> tuple[Fact, ...]:
    """Say which class, how sure, and how often the recovered trigger works."""
    rows = []
    if report.targets:
        label = "Target class" if len(report.targets) == 1 else "Target classes"
        rows.append(Fact(label, classes_label(report.targets, class_names(report))))
    if report.verdict not in ("unsafe", "could_not_tell"):
        rows.append(_certainty(report))
    # without an alarm of the detector such a rate would mislead: a large enough pattern moves any model
    alarmed = {finding.detector for finding in report.findings if finding.flagged}
    return (
        *rows,
        *(
            _confirmation(report, one)
            for one in report.confirmations
            if one.target in report.targets and one.detector in alarmed
        ),
    )


def _certainty(report: Report) -> Fact:
    if _in_files_alone(report):
        p = report.p_value
        seen = "" if p is None else f"how the model behaves raises no alarm ({p_value(p)})"
        return Fact("How sure", "Read, not measured", seen)
    if not report.calibrated:
        value = "Uncalibrated" if report.p_value is None else f"{p_value(report.p_value)}, uncalibrated"
        why = (
            report.uncalibrated or "how often a clean model of this kind looks the same has not been measured"
        )
        return Fact("How sure", value, why)
    if report.p_value is None:
        return Fact("How sure", "No p-value")
    base = next((b for b in (100, 1_000) if report.p_value * b >= 1), 10_000)
    count = report.p_value * base
    share = f"about {count:.0f}" if count >= 1 else "fewer than 1"
    return Fact(
        "How sure",
        p_value(report.p_value),
        f"{share} in {base:,} clean models would look at least as suspicious",
    )


def _confirmation(report: Report, one: Confirmation) -> Fact:
    success = one.success
    return Fact(
        "On unseen images",
        percent(success.value),
        f"{success.successes:,} of {success.n:,} images of other classes became "
        f"class {class_label(one.target, class_names(report))} with the trigger that {plain(one.detector)} "
        f"recovered (95 % interval {percent(success.low)} to {percent(success.high)})",
    )


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings as a reader wants them: alarms first, equal ones in the order they ran."""
    return sorted(findings, key=lambda finding: -SEVERITY[finding.verdict])


def score_line(finding: Finding) -> str | None:
    """Write a finding's score beside its threshold, and its own p-value; None where it has none."""
    if finding.score is None:
        return None
    line = f"{plain(finding.score_name)}: {number(finding.score)}"
    if finding.threshold is not None:
        line += f", threshold {number(finding.threshold)}"
    if finding.p_value is not None:
        line += f", {p_value(finding.p_value)} on its own" + ("" if finding.calibrated else ", uncalibrated")
    return sentence(line)


def finding_lines(report: Report, finding: Finding) -> list[str]:
    """Say what one detector found, and what it cannot see."""
    lines = [sentence(plain(finding.reason or finding.summary))]
    if line := score_line(finding):
        lines.append(line)
    if finding.targets:
        lines.append(f"Target: {classes_label(finding.targets, class_names(report))}.")
    if finding.flagged_ids:
        lines.append(f"Flagged samples: {len(finding.flagged_ids):,}.")
    if finding.limits:
        lines.append(f"Limits: {plain(finding.limits)}")
    return lines


def next_steps(report: Report) -> tuple[Step, ...]:
    """Say what to do now, the most urgent first."""
    return {
        "unsafe": _after_unsafe,
        "backdoored": _after_backdoored,
        "suspicious": _after_suspicious,
        "could_not_tell": _after_could_not_tell,
        "nothing_found": _after_nothing_found,
    }[report.verdict](report)


def _after_unsafe(report: Report) -> tuple[Step, ...]:
    return (
        Step("Do not load this file, with any tool. Set it aside where nobody opens it by accident."),
        Step("Ask the supplier for the weights alone, as safetensors or ONNX, and scan those."),
        Step("If somebody has loaded it already, treat that machine as one that ran unknown code."),
        Step("Keep this report: it names what would have run."),
    )


def _after_backdoored(report: Report) -> tuple[Step, ...]:
    flagged = {
        sample for finding in report.findings if finding.kind == "poison" for sample in finding.flagged_ids
    }
    steps = [Step("Do not deploy this model." if report.subject else "Do not train on this data.")]
    if flagged:
        steps.append(Step(f"Remove the {len(flagged):,} flagged samples; their ids are in report.json."))
    return (
        *steps,
        Step("Ask the supplier where the model and its training data came from, and show them this report."),
        Step("Retrain from data that you trust, and scan the new model before you use it."),
        _keep(report),
    )


def _after_suspicious(report: Report) -> tuple[Step, ...]:
    if _in_files_alone(report):
        return (
            Step("Do not deploy this model until you know what that is for, and who can make use of it."),
            Step("Ask the supplier for both, and for the network alone; scan that before you use it."),
            _keep(report),
        )
    return (
        Step("Do not deploy this model until you know more."),
        _more_clean_data(report, "More clean images make a second scan surer."),
        _scan_again(report),
        Step("Ask the supplier where the model and its training data came from."),
        _keep(report),
    )


def _after_could_not_tell(report: Report) -> tuple[Step, ...]:
    steps = [Step("Do not take this for a good sign: nothing is known about this model yet.")]
    if _wants_images(report):
        steps.append(_more_clean_data(report, "Give clean images that the model's supplier had no hand in."))
    subject = report.subject
    accuracy = subject.clean_accuracy if subject else None
    if subject and (accuracy is None or accuracy.low <= 1 / max(1, len(subject.classes))):
        assumed = ", ".join(plain(part) for part in subject.assumed)
        doubt = f" Nothing stated {assumed}; these were assumed." if assumed else ""
        steps.append(
            Step(
                f"Check that the images reach the model as it expects them.{doubt} "
                "The options --input-range, --mean, --std, --layout and --labels say how."
            )
        )
    if report.not_run or _at_a_loss(report):
        steps.append(
            Step("See why each detector did not run or could not tell: some need only one more thing.")
        )
    return (*steps, Step("Ask the supplier where the model and its training data came from."))


def _after_nothing_found(report: Report) -> tuple[Step, ...]:
    steps = []
    if _wants_images(report):
        steps.append(_more_clean_data(report, "Give clean images, so that more detectors can tell."))
    steps.append(
        Step("Read what each detector cannot see: a backdoor of such a kind would have been missed.")
    )
    if report.not_run:
        steps.append(Step("See which detectors did not run, and why: some need only one more thing."))
    if report.data and report.power == Power():
        steps.append(
            Step(
                "Let the scan plant known triggers in copies of this model: which of them does it find?",
                _scan_command(report, _data_options(report), control=True),
            )
        )
    return (
        *steps,
        Step("Know where the model comes from: a scan does not replace a supplier that you can trust."),
        _keep(report),
    )


def _keep(report: Report) -> Step:
    if not report.request:
        return Step("Keep this report.")  # made in Python, of a model that is named nowhere
    factory = report.request.get("factory")
    return Step(
        "Keep report.json, which --out DIR writes. Anyone with the same files can run the scan again:",
        "doorward verify report.json" + (f" --factory {_quoted(str(factory))}" if factory else ""),
    )


def _at_a_loss(report: Report) -> bool:
    return any(one.kind == "backdoor" and one.reason for one in report.findings)


def _wants_images(report: Report) -> bool:
    """Tell whether clean images, or more of them, may be what a detector lacked."""
    few = sum(one.used for one in report.data) < IMAGES_PER_CLASS * len(class_names(report))
    return not report.data or (few and _at_a_loss(report))


def _more_clean_data(report: Report, why: str) -> Step:
    used, rows = sum(one.used for one in report.data), sum(one.rows for one in report.data)
    enough = IMAGES_PER_CLASS * len(class_names(report))
    if not used or rows < enough:
        text = f"{why} At least {IMAGES_PER_CLASS} for each class, with labels."
        return Step(text, _scan_command(report, "--clean DATA"))
    if used == rows:
        return Step(f"{why} This scan had {used:,}.", _scan_command(report, "--clean DATA"))
    return Step(
        f"{why} This scan used {used:,} of {rows:,}.",
        _scan_command(report, _data_options(report), images=min(rows, max(4 * used, enough))),
    )


def _scan_again(report: Report) -> Step:
    seed = report.request.get("seed", 0)
    return Step(
        "Scan again with another seed: a real trigger is found again.",
        _scan_command(report, _data_options(report), seed=seed + 1 if isinstance(seed, int) else 1),
    )


def _data_options(report: Report) -> str:
    return " ".join(f"--{one.role} {_quoted(one.path)}" for one in report.data if one.role != "inputs")


#: Options of `doorward scan` and their defaults, by their names in a report's request.
SCAN_OPTIONS: dict[str, tuple[str, Any]] = {
    "factory": ("--factory", None),
    "weights": ("--weights", None),
    "size": ("--size", None),
    "input_range": ("--input-range", None),
    "mean": ("--mean", None),
    "std": ("--std", None),
    "layout": ("--layout", None),
    "output": ("--output", None),
    "labels": ("--labels", None),
    "features": ("--features", None),
    "data_column": ("--data-column", None),
    "label_column": ("--label-column", None),
    "detectors": ("--detector", ()),
    "device": ("--device", "cpu"),
    "time_budget": ("--time-budget", 900.0),
    "images": ("--images", 300),
    "control": ("--control", False),
    "seed": ("--seed", 0),
}


def _scan_command(report: Report, data: str, **changed: int) -> str | None:
    """Return a command that scans the same model as it was scanned; None where a path does not name it."""
    if report.subject is None or report.subject.path == "<memory>":
        return None
    options = report.request.get("options")
    asked = {**report.request, **(options if isinstance(options, dict) else {}), **changed}
    words = ["doorward scan", _quoted(report.subject.path), *([data] if data else [])]
    for name, (flag, default) in SCAN_OPTIONS.items():
        value = asked.get(name, default)
        if not value or value == default:
            continue
        each = value if name == "detectors" and isinstance(value, list | tuple) else [value]
        words += [flag if one is True else f"{flag} {_quoted(_argument(one))}" for one in each]
    return " ".join(words)


def _argument(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_argument, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _quoted(path: str) -> str:
    return shlex.quote(plain(path))


def caveats(report: Report) -> tuple[str, ...]:
    """Say what the verdict does not mean."""
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
        if _in_files_alone(report)
        else (
            "It is not proof: some clean models look like this too.",
            "It does not say who planted a backdoor, or that it was on purpose.",
        ),
        "could_not_tell": ("It is neither good news nor bad news. The question is still open.",),
        "nothing_found": (
            f"It does not mean that the {'model' if report.subject else 'data'} is safe. Only the kinds of "
            "backdoor that the detectors above look for were looked for.",
            "Backdoors can be planted that no efficient test of a model's answers finds, if standard "
            "cryptography holds (Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv 2204.06974).",
        ),
    }[report.verdict]


# --- the positive control ------------------------------------------------------------------------


CONTROL = "Known triggers were planted in copies of this model, and the copies were scanned in the same way."


def control_rows(report: Report) -> list[tuple[str, str]]:
    """Say what became of each trigger that was planted in a copy of the model, as label and sentence."""
    if report.power.reason:
        return [("Positive control", sentence(f"it was not run: {plain(report.power.reason)}"))]
    return [(plain(one.family), _control(report, one)) for one in report.power.controls]


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
    """Say what was tested on what, as label and value."""
    rows: list[tuple[str, str]] = []
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
    """Say what the scan cost, in one line."""
    forwards = sum(finding.cost.forwards for finding in report.findings)
    gradients = sum(finding.cost.gradients for finding in report.findings)
    parts = [duration(report.seconds), f"{forwards:,} images forward", f"{gradients:,} input gradients"]
    if report.environment.peak_memory_bytes is not None:
        parts.append(f"{size(report.environment.peak_memory_bytes)} of memory at most")
    return ", ".join(parts) + f". Doorward {plain(report.environment.doorward)}."


# --- the exit code -------------------------------------------------------------------------------


def exit_code(verdict: Verdict, fail_on: str = "suspicious") -> int:
    """Return a scan's exit code: 1 at or above `fail_on`, 3 for could not tell, else 0.

    Args:
        verdict: the report's verdict.
        fail_on: "suspicious", "backdoored" or "never"; with "never" it is always 0.
    """
    if fail_on == "never":
        return 0
    if verdict == "could_not_tell":
        return 3
    return int(SEVERITY[verdict] >= SEVERITY["backdoored" if fail_on == "backdoored" else "suspicious"])
