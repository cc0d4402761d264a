"""A suite's results, one record a trial, and their file."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from doorward.bench.fingerprints import with_current_code
from doorward.bench.holdout import family, left_out
from doorward.bench.inspection import Inspection
from doorward.bench.mending import Mending
from doorward.bench.outcome import stored_outcome
from doorward.bench.planting import Planting
from doorward.bench.store import Row, Store
from doorward.bench.suite import LEAST_SUCCESS, Scale, Suite, content_key, expand
from doorward.core.errors import InputError
from doorward.core.records import SEVERITY, Observations, Record, Report, Verdict
from doorward.scan.calibration import CalibrationSet, calibrations, shipped
from doorward.scan.poison import conclude_training_data, of_training_data
from doorward.scan.verdict import conclude


class DetectorOutcome(Record):
    """What one detector said.

    Attributes:
        published_flags: classes that the rule of the method's authors flags, where the score is another.
    """

    verdict: Verdict
    score: float | None
    p_value: float | None
    targets: tuple[int, ...]
    seconds: float
    published_flags: tuple[int, ...] | None = None


class Result(Record):
    """One trial's result, as small as a table needs it.

    Attributes:
        status: "missing" if the trial has not been run.
        data: name of the data set.
        model: start of the model's key; repeated scans share it.
        least_success: attack success from which on a plant counts; fixed before scanning.
        plant: targets of what is planted; None for clean models.
        planting: what that did, in suites that measure it and scan nothing.
        inspection: what was found in the training set, in suites that inspect it.
        mending: what repairs made of the model, in suites that measure that.
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
    least_success: float = LEAST_SUCCESS
    plant: tuple[int, ...] | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    targets: tuple[int, ...] = ()
    p_value: float | None = None
    detectors: dict[str, DetectorOutcome] = Field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    planting: Planting | None = None
    inspection: Inspection | None = None
    mending: Mending | None = None
    error: str | None = None

    @property
    def flagged(self) -> bool:
        """Return whether the verdict is an alarm."""
        return self.verdict is not None and SEVERITY[self.verdict] >= SEVERITY["suspicious"]

    @property
    def exact(self) -> bool:
        """Return whether the verdict is an alarm and names the planted targets, all and no others."""
        return self.flagged and self.plant is not None and set(self.targets) == set(self.plant)

    @property
    def excluded(self) -> bool:
        """Return whether something was to be planted and did not take."""
        return self.plant is not None and (self.attack_success or 0.0) < self.least_success


class Results(Record):
    """A suite's results at one scale; what `bench run` exports.

    Attributes:
        made_with: what the trials ran on, and the calibration set that verdicts are by.
        left_out: data sets of which the calibration set has clean models; those judged no model of the same
            data.
    """

    suite: str
    scale: Scale
    made_with: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    results: tuple[Result, ...]


def collect(suite: Suite, scale: Scale, store: Store, calibration: CalibrationSet | None = None) -> Results:
    """Return a suite's last results from the store; trials that were not run are marked missing.

    Args:
        calibration: by which every verdict is concluded; the shipped one if None.

    Raises:
        InputError: if the store holds what cannot be understood.
    """
    calibration = calibration or shipped_for(suite)
    trials = expand(suite, scale)
    rows = store.latest(trials)
    made: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows.values():
        for name, value in {**row.versions, "code": row.git_revision, "device": row.device}.items():
            made[name].add(str(value))
        made["threads"].add(str(row.threads))
    known = {family(model.data) for model in calibration.models} if suite.scans else set()
    if suite.scans:
        made["calibration"].add(calibration_label(calibration))
    judges = cache(lambda own: left_out(calibration, own))
    return Results(
        suite=suite.name,
        scale=scale,
        made_with={name: tuple(sorted(values)) for name, values in sorted(made.items())},
        left_out=tuple(sorted({family(t.data.name) for t in trials} & known)),
        results=tuple(
            _result(rows[t.name], judges(family(t.data.name)), suite.least_success)
            if t.name in rows
            else Result(
                trial=t.name, group=t.group, status="missing", data=t.data.name, architecture=t.architecture
            )
            for t in sorted(trials, key=lambda t: t.name)
        ),
    )


def shipped_for(suite: Suite) -> CalibrationSet:
    """Return the calibrations of the detectors that a suite names, or of all that examine models."""
    named = suite.scan_settings.detectors
    return calibrations(one.name for one in named) if named else shipped()


def calibration_label(calibration: CalibrationSet) -> str:
    """Name a calibration set by its size and by its content, which verdicts follow from."""
    content = calibration.model_dump(mode="json")
    return f"{content_key(content)[:12]} ({len(calibration.models)} clean models)"


def _result(row: Row, calibration: CalibrationSet, least_success: float) -> Result:
    given = row.given
    base = {
        "trial": row.trial,
        "group": given["group"],
        "status": row.status,
        "data": given["data"]["name"],
        "seed": given["scan_settings"]["seed"],
        "draw": given["scan_settings"]["draw"],
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
        "least_success": least_success,
        "plant": tuple(truth["targets"]) if truth["attack"] else None,
        "seconds": row.seconds,
        "peak_memory": row.peak_memory,
    }
    seen = observations_of(row)
    if seen is None:
        return Result(**base, planting=row.result["planting"], mending=row.result.get("mending"))
    judge = conclude_training_data if of_training_data(seen) else conclude
    report = judge(seen, calibration)
    return Result(
        **base,
        inspection=row.result.get("inspection"),
        **judged(report),
    )


_JUDGEMENT = set(DetectorOutcome.model_fields)


def judged(report: Report) -> dict[str, Any]:
    """Return what a result holds of a report."""
    return {
        "verdict": report.verdict,
        "reason": report.reason,
        "targets": report.targets,
        "p_value": report.p_value,
        "detectors": {
            one.detector: DetectorOutcome(**one.model_dump(include=_JUDGEMENT)) for one in report.findings
        },
    }


def observations_of(row: Row) -> Observations | None:
    """Return what a stored scan saw; None if the trial was not done or scanned nothing.

    Raises:
        InputError: if it cannot be understood.
    """
    if row.status != "done" or row.result is None:
        return None
    seen = stored_outcome(row.trial, row.result).seen
    return None if seen is None else with_current_code(seen, row.resolved)


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
