"""What the reader of a report should do now, with commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from doorward.core.formatting import plain
from doorward.core.records import (
    PositiveControl,
    Report,
)
from doorward.reports.phrases import REPAIR_OPTIONS, SCAN_OPTIONS, class_names, flagged_data, in_files_alone

#: Images of each class that are enough both to fit a trigger and to confirm it on others.
IMAGES_PER_CLASS = 20


@dataclass(frozen=True)
class Step:
    """One thing to do next, and the command for it where there is one."""

    text: str
    command: str | None = None


def next_steps(report: Report) -> tuple[Step, ...]:
    """Return what to do now, the most urgent first."""
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
        *_mend(report),
        _keep(report),
    )


def _mend(report: Report) -> tuple[Step, ...]:
    """Return how the model is mended, where a path names it."""
    command = _command("repair", report, f"MENDED {_data_options(report)}".strip(), REPAIR_OPTIONS)
    text = "Where neither can be had, mend it; the repair says whether the trigger still works:"
    return () if command is None else (Step(text, command),)


def _after_suspicious(report: Report) -> tuple[Step, ...]:
    if flagged_data(report):
        return _after_poison(report)
    if in_files_alone(report):
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


def _after_poison(report: Report) -> tuple[Step, ...]:
    """Return what to do with training samples that are flagged: look, clean, mend."""
    flagged = {one for finding in flagged_data(report) for one in finding.flagged_ids}
    data = _quoted(str(report.request.get("train") or "DATA"))
    trained_here = report.request.get("model", "") is None
    steps = [
        Step(
            f"Look at the {len(flagged):,} flagged samples: what do they share that the kept ones lack? "
            "flagged.csv, which --out DIR writes, lists them."
        ),
        Step("Do not train on these data, nor deploy a model that was trained on them, until you know more."),
        Step(
            "Write the training set without the flagged samples:",
            f"doorward scan --train {data} --write-clean CLEANED"
            if trained_here
            else _scan_command(report, f"{_data_options(report)} --write-clean CLEANED"),
        ),
    ]
    if not trained_here and report.subject is not None:
        steps.append(
            Step(
                "Mend the model: flagged samples get the label that they seem to have had, and it trains on:",
                _command("repair", report, f"MENDED --train {data}", REPAIR_OPTIONS),
            )
        )
    return (*steps, Step("Ask where the flagged samples came from."), _keep(report))


def _after_could_not_tell(report: Report) -> tuple[Step, ...]:
    if report.request.get("model", "") is None:
        return (
            Step("Do not take this for a good sign: nothing is known about these data yet."),
            Step(
                "See why each detector could not tell: some need only more time, as --time-budget gives it."
            ),
            Step("Ask where the data came from."),
        )
    known = "nothing is known about this model yet"
    if any(finding.doubt and finding.reason for finding in report.findings):
        known = "a class stands out, and it is not known yet whether by nature"
    steps = [Step(f"Do not take this for a good sign: {known}.")]
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
    if report.data and report.positive_control == PositiveControl():
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
    """Return whether clean images, or more of them, may be what a detector lacked."""
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


def _scan_command(report: Report, data: str, **changed: int) -> str | None:
    """Return a command that scans the same model as it was scanned; None where a path does not name it."""
    return _command("scan", report, data, SCAN_OPTIONS, **changed)


def _command(
    verb: str, report: Report, data: str, options: Mapping[str, tuple[str, Any]], **changed: int
) -> str | None:
    """Return a command on the model as it was scanned; None where a path does not name it.

    Args:
        options: the command's options, and their defaults, by their names in a request.
    """
    if report.subject is None or report.subject.path == "<memory>":
        return None
    if report.request.get("model", "") is None:  # trained by the scan itself
        return None
    stated = report.request.get("options")
    problem = {**report.request, **(stated if isinstance(stated, dict) else {}), **changed}
    words = [f"doorward {verb}", _quoted(report.subject.path), *([data] if data else [])]
    for name, (flag, default) in options.items():
        value = problem.get(name, default)
        if not value or value == default:
            continue
        each = value if name in ("detectors", "settings") and isinstance(value, list | tuple) else [value]
        words += [flag if one is True else f"{flag} {_quoted(_argument(one))}" for one in each]
    return " ".join(words)


def _argument(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_argument, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _quoted(path: str) -> str:
    return shlex.quote(plain(path))
