"""`doorward verify`: run a report again and compare."""

from __future__ import annotations

from pathlib import Path

import typer

from doorward.cli.options import own_code, status


def verify(
    report: Path = typer.Argument(
        ..., metavar="REPORT", help="A report.json, or the folder that `doorward scan --out` wrote it to."
    ),
    model: str | None = typer.Option(None, metavar="MODEL", help="Where the model is now, if it has moved."),
    clean: str | None = typer.Option(
        None, metavar="DATA", help="Where the clean images are now, if they have moved."
    ),
    train: str | None = typer.Option(
        None, metavar="DATA", help="Where the training set is now, if it has moved."
    ),
    factory: str | None = typer.Option(
        None, metavar="F", help="The report's --factory, said again, since this runs that code."
    ),
    weights: str | None = typer.Option(
        None, metavar="W", help="With --factory: where the weights are now, if they have moved."
    ),
    device: str | None = typer.Option(
        None, metavar="D", help="cpu, cuda, cuda:1, mps; the report's if not given."
    ),
) -> None:
    """Run a report's scan again and say what differs.

    Relative paths in the report are looked for in the folder where the scan was run, then in this one.

    Exit code: 0 nothing differs, 1 something does, 2 the report or its files cannot be read, 4 a fault in
    Doorward.
    """
    from doorward.scan.rerun import Overrides
    from doorward.scan.rerun import verify as run

    instead = Overrides(
        model=model, weights=weights, clean=clean, train=train, factory=factory, device=device
    )
    with own_code(factory), status() as progress:
        differences = run(report, instead=instead, progress=progress)
    for line in differences:
        typer.echo(f"differs: {line}")
    if differences:
        raise typer.Exit(1)
    typer.echo("nothing differs: the same files, verdict, targets and scores")
