"""`doorward verify`: run a report again and compare."""

from __future__ import annotations

from pathlib import Path

import typer

from doorward.cli.options import status


def verify(
    report: Path = typer.Argument(..., help="A report.json that `doorward scan --out` wrote."),
) -> None:
    """Rerun a report by its hashes and seeds.

    Exit code: 0 the same verdict, 1 something differs, 2 the report or its files cannot be read.
    """
    from doorward.verify import verify as run

    with status() as progress:
        differences = run(report, progress=progress)
    if differences:
        for line in differences:
            typer.echo(f"differs: {line}")
        raise typer.Exit(1)
    typer.echo("the same verdict, targets and scores")
