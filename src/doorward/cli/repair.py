"""`doorward repair`: mend a model with clean samples, or by what is found in its training data."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli import model_options
from doorward.cli.options import (
    DEVICE,
    FORCE,
    INPUT_COLUMN,
    LABEL_COLUMN,
    REPAIRS,
    SEED,
    check_device,
    check_folder,
    own_code,
    refuse_missing_inputs,
    status,
)
from doorward.cli.settings import settings_of
from doorward.core import formatting
from doorward.core.errors import InputError, TrainingDiverged
from doorward.methods.registry import refuse_unknown

if TYPE_CHECKING:
    from doorward.core.records import Rate
    from doorward.repair import RepairReport


class Printed(StrEnum):
    """What is printed on standard output."""

    text = "text"
    json = "json"


def repair(
    model: str = typer.Argument(..., metavar="MODEL", help="The model to mend, as `doorward scan` takes it."),
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The folder to write the mended model, repair.json and repair.html to."
    ),
    train: str | None = typer.Option(
        None, metavar="DATA", help="The labelled training set that the model was trained on."
    ),
    clean: str | None = typer.Option(
        None,
        metavar="DATA",
        help="Labelled samples that you trust. Without --train, they mend the model, and a quarter is kept "
        "back to measure on.",
    ),
    method: str = typer.Option(
        "auto",
        metavar="auto|NAME",
        autocompletion=REPAIRS,
        help="The repair; auto takes the first that fits and, with --clean, mends again as long as something "
        "is found. `doorward list repairs` shows them.",
    ),
    set_: list[str] = typer.Option(
        [], "--set", metavar="K=V", help="A setting of the repair that --method names; may be repeated."
    ),
    seed: int = SEED,
    device: str = DEVICE,
    factory: str | None = model_options.FACTORY,
    weights: Path | None = model_options.WEIGHTS,
    input_range: str | None = model_options.INPUT_RANGE,
    mean: str | None = model_options.MEAN,
    std: str | None = model_options.STD,
    layout: str | None = model_options.LAYOUT,
    channels: str | None = model_options.CHANNELS,
    size: str | None = model_options.SIZE,
    resize: str | None = model_options.RESIZE,
    output: str | None = model_options.OUTPUT,
    label_names: str | None = model_options.LABEL_NAMES,
    data_column: str | None = INPUT_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    printed: Printed = typer.Option(Printed.text, "--format", help="What to print on standard output."),
    force: bool = FORCE,
) -> None:
    """Mend a model, and scan it again.

    Clean samples, or what is found in its training data, say how. Without either, a trigger that is found in
    the model alone is unlearnt on images made from it. The original stays as it is. OUT gets the model, in
    the format of the original where that can hold it, repair.json and repair.html.

    Exit code: 0 nothing found afterwards, or nothing to mend, 1 something is still found or a recovered
    trigger still works, 2 usage or unreadable input, 3 could not tell, 4 if training failed.
    """
    for name, value in (("MODEL", model), ("--train", train), ("--clean", clean)):
        if value == "":
            raise InputError(f"{name} is empty; it takes a path or a hub id")
    model_options.refuse_weights_alone(weights, factory)
    stated = model_options.stated_options(
        input_range=input_range, mean=mean, std=std, layout=layout, channels=channels, size=size,
        resize=resize, output=output, label_names=label_names,
    )  # fmt: skip
    refuse_missing_inputs(None if factory else model, clean, train)
    if method != "auto":
        refuse_unknown("repair", [method])
    from doorward.models import LoadOptions
    from doorward.repair import RepairRequest
    from doorward.repair import repair as run
    from doorward.repair.writing import check_place

    check_place(out, model)
    check_folder(out, given="OUT")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} is not empty; name another folder, or say --force")
    request = RepairRequest(
        model=model,
        train=train,
        clean=clean,
        method=method,
        settings=settings_of(set_),
        seed=seed,
        device=check_device(device),
        data_column=data_column,
        label_column=label_column,
        options=LoadOptions(**stated),
        factory=factory,
        weights=weights,
    )
    try:
        with own_code(factory), status() as progress:
            outcome = run(request, progress=progress)
    except TrainingDiverged as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(4) from error
    report = outcome.report
    if outcome.classifier is None:
        typer.echo(report.model_dump_json(indent=2) if printed is Printed.json else _nothing(report))
        raise typer.Exit(report.exit_code)
    saved = outcome.save(out)
    if printed is Printed.json:
        typer.echo(report.model_dump_json(indent=2))
        raise typer.Exit(report.exit_code)
    for line in lines(report):
        typer.echo(line)
    typer.echo(f"written: {saved}, {out / 'repair.json'} and {out / 'repair.html'}")
    raise typer.Exit(report.exit_code)


def _nothing(report: RepairReport) -> str:
    if report.without_data:
        told = _words(report.before)
        return (
            f"without data: {told}, and no trigger was recovered, so there is nothing to unlearn and nothing "
            "was written; give labelled samples that you trust with --clean DATA, or the training set with "
            "--train DATA"
        )
    if report.before == "could_not_tell":
        return (
            "could not tell whether there is poison, so nothing was mended: see `doorward scan --train DATA`"
        )
    return "no training sample is flagged, so there is nothing to mend, and nothing was written"


def lines(report: RepairReport) -> list[str]:
    """Return what was done, and what became of the model."""
    assert report.repair is not None
    return [
        *(
            f"{one.repair}: {formatting.plain(one.done)} (in {formatting.duration(one.seconds)})"
            for one in (report.repair, *report.further)
        ),
        *_changes(
            "flagged samples that get the label they were flagged with",
            report.flagged_label_before,
            report.flagged_label_after,
        ),
        *(
            line
            for one in report.triggers
            for line in _changes(
                f"success of the trigger for class {one.target} that {one.detector} recovered",
                one.before,
                one.after,
            )
        ),
        *_left(report),
        *_changes(f"accuracy on {report.measured_on}", report.accuracy_before, report.accuracy_after),
        *_size(report),
        f"before the repair: {_words(report.before)}; after it: {_words(report.after)} "
        f"(in {formatting.duration(report.seconds)})",
    ]


def _left(report: RepairReport) -> list[str]:
    """Say so where a recovered trigger still works, or where none can show what is left of a backdoor."""
    if report.still_works:
        return ["a recovered trigger still works: the backdoor is not gone"]
    if report.unmeasured:
        return ["no trigger is known: how much of a backdoor is left, if there is one, cannot be measured"]
    return []


def _words(verdict: str) -> str:
    return verdict.replace("_", " ")


def _changes(what: str, before: Rate | None, after: Rate | None) -> list[str]:
    if before is None or after is None:
        return []
    return [f"{what}: {formatting.percent(before.value)} before, {formatting.percent(after.value)} now"]


def _size(report: RepairReport) -> list[str]:
    before, after = report.parameters_before, report.parameters_after
    return [] if before is None or after is None else [f"parameters: {before:,} before, {after:,} now"]
