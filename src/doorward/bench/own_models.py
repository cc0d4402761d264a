"""The bench on models that are there already, of which somebody knows whether they were planted.

They are scanned as `doorward scan` scans them, and counted as those of a suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doorward.bench import tables
from doorward.bench.results import Result, Results, calibration_label, judged
from doorward.bench.suite import OWN, Data, Group, MethodChoice, Suite
from doorward.core import formatting
from doorward.core.errors import DoorwardError, InputError
from doorward.core.records import Report
from doorward.core.report_json import from_json, to_json
from doorward.fleet.keys import key_of
from doorward.fleet.sources import Place, find_models, place_of, rows
from doorward.scan.calibration import calibrations
from doorward.scan.pipeline import scan_in_full
from doorward.scan.request import ScanRequest
from doorward.stats.metrics import ranking, rate

#: What a table says of the truth; its other columns are options of a scan.
PLANTED, TARGET, GROUP = "planted", "target", "group"
#: Head of the table of detectors.
HEADS = ("detector", "models", "planted flagged", "clean flagged", "AUROC of its score")
_YES, _NO = ("yes", "true", "1", "planted", "poisoned"), ("no", "false", "0", "clean")


@dataclass(frozen=True)
class LabelledModel:
    """A model of which the truth is known.

    Attributes:
        name: its path as the table has it.
        targets: the classes that its trigger leads to; None if it is clean.
        group: those of one group are counted together.
        place: where it is, and how it is scanned.
    """

    name: str
    targets: tuple[int, ...] | None
    group: str
    place: Place


def read_labels(file: Path, folder: Path, common: ScanRequest) -> list[LabelledModel]:
    """Read the truth about the models of a folder.

    Args:
        file: a table, .csv or .parquet, with the columns path, planted and target.
        common: how all are scanned, where a row says nothing else.

    Raises:
        InputError: if the table or a row cannot be understood, or a model is not there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; the models of the table are looked for in one")
    if not file.is_file():
        raise InputError(
            f"--labels {file}: there is no such file; it is a table of what is known of the models"
        )
    models: list[LabelledModel] = []
    for number, row in enumerate(rows(str(file)), start=2):
        where = f"{file}, row {number}"
        planted = _planted(where, row.pop(PLANTED, None))
        targets = _targets(where, row.pop(TARGET, None))
        if planted and not targets:
            raise InputError(f"{where}: a planted model needs its target, a class number as in 3, or 3;5")
        if not planted and targets:
            raise InputError(f"{where}: a clean model has no target; is it planted?")
        group = str(row.pop(GROUP, "planted" if planted else "clean"))
        place = place_of(str(file), number, row, common, folder=str(folder))
        if not Path(place.path).exists():
            raise InputError(f"{where}: {place.path} is not there; paths count from {folder}")
        name = str(row["path"])
        if any(one.name == name for one in models):
            raise InputError(f"{where}: {name} is named twice")
        models.append(LabelledModel(name, targets if planted else None, group, place))
    if not models:
        raise InputError(f"{file} has no rows")
    for group in {one.group for one in models}:
        if len({one.targets is None for one in models if one.group == group}) > 1:
            raise InputError(f"{file}: group {group!r} has clean and planted models; a group has one kind")
    return models


def _planted(where: str, value: Any) -> bool:
    text = str(int(value) if isinstance(value, float) and value in (0, 1) else value).strip().lower()
    if text not in (*_YES, *_NO):
        raise InputError(f"{where}: the column {PLANTED!r} takes yes or no, got {value!r}")
    return text in _YES


def _targets(where: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, float) and value.is_integer():  # a column with blanks
        value = int(value)
    parts = value if isinstance(value, list) else str(value).replace(",", ";").split(";")
    try:
        found = tuple(int(part) for part in parts)
    except ValueError:
        found = (-1,)
    if min(found, default=0) < 0:
        raise InputError(f"{where}: the column {TARGET!r} takes class numbers, as in 3 or 3;5, got {value!r}")
    return found


def unlabelled(folder: Path, models: Iterable[LabelledModel]) -> list[str]:
    """Return the models in a folder that no row names."""
    known = {one.place.path for one in models}
    try:
        there = [one.path for one in find_models([str(folder)], ScanRequest())]
    except InputError:  # none of a usual ending
        return []
    return [path for path in there if path not in known]


def measure(
    models: Sequence[LabelledModel],
    folder: Path,
    *,
    keep: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Results:
    """Scan all models and return what was found of the truth.

    Args:
        keep: where every report is written; those of the same model and scan are taken from there.
        progress: is called with a line as each model is begun and has ended.

    Raises:
        InputError: if `keep` cannot be written.
    """
    results, made = [], dict[str, set[str]]()
    for number, one in enumerate(models, start=1):
        shown = f"{formatting.plain(one.name)} ({number} of {len(models)})"
        progress(f"{shown}: scanning")
        try:
            file = None if keep is None else keep / f"{_key(one)}.json"
            report = _earlier(file) or scan_in_full(one.place.request).report
            _check_targets(one, report)
        except DoorwardError as error:
            progress(f"{shown}: not scanned: {error}")
            results.append(_known(one, folder).model_copy(update={"error": str(error)}))
            continue
        if file is not None and not file.is_file():
            _write(report, file)
        progress(f"{shown}: {report.verdict.replace('_', ' ')} in {formatting.duration(report.seconds)}")
        results.append(_known(one, folder).model_copy(update=_found(report)))
        for name, value in _made_with(report).items():
            made.setdefault(name, set()).add(value)
    return Results(
        suite=_set(folder),
        scale=OWN,
        made_with={name: tuple(sorted(values)) for name, values in sorted(made.items())},
        results=tuple(results),
    )


def _check_targets(one: LabelledModel, report: Report) -> None:
    """Raise unless a model has the classes that its trigger is said to lead to.

    Raises:
        InputError: if not.
    """
    count = len(report.subject.classes) if report.subject else 0
    if one.targets and count and max(one.targets) >= count:
        raise InputError(f"its target is {max(one.targets)}, and its classes are 0 to {count - 1}")


def _known(one: LabelledModel, folder: Path) -> Result:
    """Return the result of a model that was not scanned."""
    return Result(
        trial=one.name,
        group=one.group,
        status="failed",
        data=_set(folder),
        model=one.name,
        architecture="",
        plant=one.targets,
        least_success=0.0,  # nothing says how often its trigger works
    )


def _found(report: Report) -> dict[str, Any]:
    """Return what a report adds to a result."""
    found = {
        "status": "done",
        "seconds": report.seconds,
        "peak_memory": report.environment.peak_memory_bytes,
        **judged(report),
    }
    if (subject := report.subject) is None:
        return found
    return found | {
        "architecture": subject.architecture or "",
        "classes": len(subject.classes) or None,
        "accuracy": subject.clean_accuracy and subject.clean_accuracy.value,
    }


def _set(folder: Path) -> str:
    return formatting.plain(folder.resolve().name) or "models"


def _key(one: LabelledModel) -> str:
    try:
        return key_of(one.place).key[:24]
    except OSError as error:
        raise InputError(f"{one.place.path}: cannot be read: {error.strerror}") from error


def _earlier(file: Path | None) -> Report | None:
    """Return the report that an earlier run kept of the same scan, None where there is none."""
    return from_json(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None


def _write(report: Report, file: Path) -> None:
    half = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(to_json(report), encoding="utf-8")
        half.replace(file)
    except OSError as error:
        raise InputError(f"--out {file.parent}: cannot be written: {error.strerror}") from error


def _made_with(report: Report) -> dict[str, str]:
    made = report.environment
    detectors = [one.detector for one in report.findings]
    return {
        "doorward": made.doorward,
        "torch": made.packages.get("torch", ""),
        "device": made.device,
        "calibration": calibration_label(calibrations(detectors)),
    }


def suite_of(models: Sequence[LabelledModel], folder: Path) -> Suite:
    """Return the suite whose groups are those of some models, so that they are counted as its trials."""
    data = Data(name=_set(folder))
    counts: dict[str, int] = {}
    planted = {one.group: one.targets is not None for one in models}
    for one in models:
        counts[one.group] = counts.get(one.group, 0) + 1
    groups = tuple(
        Group(
            name=name,
            data=data,
            models=count,
            attack=MethodChoice(name="unknown") if planted[name] else None,
        )
        for name, count in counts.items()
    )
    return Suite(
        name=_set(folder),
        title=_set(folder),
        about="Models of your own, scanned as `doorward scan` scans them, next to what is known of them.",
        least_success=0.0,
        scales={OWN: groups},
    )


def detectors_table(held: Results) -> str:
    """Return what each detector alone makes of the models, as a Markdown table; empty if none is scanned."""
    done = [one for one in held.results if one.status == "done"]
    lines = []
    for name in sorted({name for one in done for name in one.detectors}):
        own = [(one.detectors[name], one.plant) for one in done if name in one.detectors]
        scored = [(found.score, plant is not None) for found, plant in own if found.score is not None]
        alarms = [
            rate(sum(found.verdict in ("suspicious", "backdoored") for found in among), len(among))
            for among in (
                [found for found, plant in own if plant is not None],
                [found for found, plant in own if plant is None],
            )
        ]
        area = ranking([score for score, _ in scored], [planted for _, planted in scored])
        lines.append([name, str(len(own)), *map(tables.counts, alarms), tables.area(area)])
    return tables.table(HEADS, lines) + "\n" if lines else ""
