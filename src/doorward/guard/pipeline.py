"""Guard a model from its file: fit filters to clean inputs, or read them, and judge the inputs given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.core.formatting import p_value, percent
from doorward.core.records import DataRecord
from doorward.core.seeds import derive_seed
from doorward.data import Samples, open_samples
from doorward.detectors.inputs.base import InputFilter
from doorward.guard.guard import Answers, Guard
from doorward.guard.records import FilterRecord, GuardReport, InputVerdict
from doorward.methods import registry
from doorward.models import LoadOptions, open_classifier
from doorward.scan.behaviour import subject_record
from doorward.scan.environment import environment
from doorward.stats import metrics
from doorward.stats.rejection import Rule

#: An alarm is raised if so many rejected inputs are this unlikely among clean ones.
ALARM = 0.01


@dataclass(frozen=True, kw_only=True)
class GuardRequest:
    """What is to be guarded, and how.

    Attributes:
        clean: clean inputs to fit the filters to; None if `saved` is given.
        check: inputs to judge; None where they come by requests.
        filters: names of filters; those that `Guard.fit` takes if there are none.
        images: most clean inputs that are used, drawn evenly over the classes.
        saved: a folder that `Guard.save` wrote.
        keep: a folder to save the guard to.
    """

    model: str
    check: str | None = None
    clean: str | None = None
    filters: tuple[str, ...] = ()
    rate: float = 0.01
    rule: Rule = "conformal"
    reform: str | None = None
    images: int = 2000
    seed: int = 0
    device: str = "cpu"
    time_budget: float | None = None
    factory: str | None = None
    weights: str | None = None
    options: LoadOptions | None = None
    data_column: str | None = None
    label_column: str | None = None
    saved: Path | None = None
    keep: Path | None = None


@dataclass(frozen=True)
class Guarded:
    """A guard's report, and the inputs that it is about."""

    report: GuardReport
    inputs: Samples


@dataclass(frozen=True)
class Prepared:
    """A guard that is ready, and what it was fitted to.

    Attributes:
        data: the clean inputs; none where the guard was read from a folder.
    """

    guard: Guard
    data: tuple[DataRecord, ...]


def prepare(
    request: GuardRequest, deadline: Deadline, *, progress: Callable[[str], None] | None = None
) -> Prepared:
    """Load the model, and fit its guard or read it.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        CouldNotTell: if the clean inputs are too few, the model's outputs say nothing, or time runs out.
        UnsafeArtifact: if loading the model would execute code.
    """
    report_progress = progress or (lambda _: None)
    if (request.clean is None) == (request.saved is None):
        raise InputError(
            "a guard is fitted to clean inputs or read from where it was saved; give one of these"
        )
    check_device(request.device)
    chosen = [_filter(name) for name in dict.fromkeys(request.filters)] or None
    report_progress("loading the model")
    classifier = open_classifier(
        request.model,
        options=request.options or LoadOptions(),
        factory=request.factory,
        weights=Path(request.weights) if request.weights else None,
        device=request.device,
    )
    if request.saved is not None:
        return Prepared(Guard.load(request.saved, classifier), ())
    assert request.clean is not None
    report_progress("opening the clean inputs")
    whole = _open(request, request.clean)
    rng = np.random.default_rng(derive_seed(request.seed, "images"))
    clean = whole.draw(min(request.images, len(whole)), rng)
    report_progress(f"fitting filters to {len(clean):,} clean inputs")
    guard = Guard.fit(
        classifier,
        clean,
        filters=chosen,
        rate=request.rate,
        rule=request.rule,
        reform=request.reform,
        seed=request.seed,
        deadline=deadline,
    )
    return Prepared(guard, (_record("clean", whole, len(clean)),))


def guard_inputs(request: GuardRequest, *, progress: Callable[[str], None] | None = None) -> Guarded:
    """Judge inputs, and answer those that are accepted.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        CouldNotTell: if the clean inputs are too few, the model's outputs say nothing, or time runs out.
        UnsafeArtifact: if loading the model would execute code.
    """
    report_progress, deadline = progress or (lambda _: None), Deadline(request.time_budget)
    if request.check is None:
        raise InputError("there are no inputs to judge")
    inputs = _open(request, request.check)
    if not len(inputs):
        raise InputError(f"{request.check} holds no inputs")
    ready = prepare(request, deadline, progress=progress)
    data = (*ready.data, _record("inputs", inputs, len(inputs)))
    if request.keep is not None:
        ready.guard.save(request.keep)
    report_progress(f"judging {len(inputs):,} inputs")
    answers = ready.guard(inputs, deadline=deadline)
    return Guarded(_report(request, ready.guard, inputs, answers, data, deadline), inputs)


def _filter(name: str) -> InputFilter:
    one = registry.build("detector", name, {})
    if not isinstance(one, InputFilter):
        known = ", ".join(filter_names())
        raise InputError(f"{name} examines models and is no filter of inputs; there are: {known}")
    return one


def filter_names() -> list[str]:
    """Return the names of all filters of inputs."""
    return [
        name
        for name in registry.modules("detector")
        if issubclass(registry.get("detector", name), InputFilter)
    ]


def _open(request: GuardRequest, path: str) -> Samples:
    return open_samples(path, column=request.data_column, label_column=request.label_column)


def _record(role: Literal["clean", "inputs"], samples: Samples, used: int) -> DataRecord:
    origin = samples.provenance
    return DataRecord(
        role=role,
        path=origin.path,
        sha256=origin.sha256,
        rows=origin.rows,
        used=used,
        labelled=samples.labels is not None,
    )


def _report(
    request: GuardRequest,
    guard: Guard,
    inputs: Samples,
    answers: Answers,
    data: tuple[DataRecord, ...],
    deadline: Deadline,
) -> GuardReport:
    fitted = guard.fitted
    names = [one.method() for one in fitted.filters]
    verdicts = tuple(
        InputVerdict(
            id=identity,
            prediction=int(answers.predictions[i]),
            accepted=bool(answers.accepted[i]),
            reasons=answers.reasons[i],
            scores=dict(zip(names, answers.scores[:, i].tolist(), strict=True)),
        )
        for i, identity in enumerate(inputs.ids)
    )
    rejected = metrics.rate(int((~answers.accepted).sum()), len(inputs))
    subject = subject_record(guard.classifier).model_copy(update={"path": request.model})
    return GuardReport(
        subject=subject,
        data=data,
        false_rejection_rate=guard.rate,
        rule=guard.rule,
        reform=guard.reform,
        filters=tuple(
            FilterRecord(
                name=one.method(),
                title=one.title,
                settings=one.settings(),
                threshold=float(threshold),
                limits=one.limits,
            )
            for one, threshold in zip(fitted.filters, fitted.thresholds, strict=True)
        ),
        clean=fitted.table() if fitted.clean.shape[1] else None,
        verdicts=verdicts,
        rejected=rejected,
        alarm=drift_alarm(rejected.successes, rejected.n, guard.rate),
        warnings=tuple(
            dict.fromkeys(
                [
                    *fitted.warnings(len(guard.classifier.classes)),
                    *guard.classifier.notes,
                    *inputs.provenance.notes,
                ]
            )
        ),
        seed=request.seed,
        seconds=deadline.spent(),
        environment=environment(request.device),
    )


def drift_alarm(rejected: int, n: int, rate: float, *, level: float = ALARM) -> str | None:
    """Return a sentence if more inputs are rejected than of clean ones would be, else None.

    Args:
        level: the p-value from which on that is said.

    >>> drift_alarm(1, 100, 0.01) is None
    True
    """
    p = stats.binomtest(rejected, n, rate, alternative="greater").pvalue if n else 1.0
    if p > level:
        return None
    return (
        f"{rejected:,} of {n:,} inputs are rejected, where {percent(rate)} of clean ones would be "
        f"({p_value(float(p))}): some are triggered or adversarial, or they differ from the clean inputs"
    )
