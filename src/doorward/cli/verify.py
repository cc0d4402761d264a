"""`doorward verify`: run a report again and compare."""

from __future__ import annotations

from pathlib import Path

import typer

from doorward.cli.options import own_code, status
from doorward.core.errors import InputError


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
    key: Path | None = typer.Option(
        None,
        metavar="KEY",
        help="Check first that the report was signed with this public key's private one, as `doorward scan "
        "--sign-key` does, and is unchanged.",
    ),
    no_scan: bool = typer.Option(
        False,
        "--no-scan",
        help="With --key: check the signature and, with --model, that the model's files are those of the "
        "report. Nothing is scanned.",
    ),
) -> None:
    """Run a report's scan again and say what differs.

    With --key the report's signature is checked first.

    Relative paths in the report are looked for in the folder where the scan was run, then in this one.

    Exit code: 0 nothing differs, 1 something does, 2 the report or its files cannot be read, 4 a fault in
    Doorward.
    """
    if no_scan and key is None:
        raise InputError("--no-scan goes with --key, the public key to check the report's signature by")
    if key is not None:
        _check_signature(report, key)
    if no_scan:
        _check_files(report, model)
        return
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


def _check_signature(report: Path, key: Path) -> None:
    """End with exit code 1 unless a report is as the key's owner signed it."""
    from doorward.reports.signing import unlike_signed

    if why := unlike_signed(_file(report), key):
        typer.echo(f"differs: {why}")
        raise typer.Exit(1)
    typer.echo("signed: the report is as the owner of the key signed it")


def _check_files(report: Path, model: str | None) -> None:
    """End with exit code 1 unless a model's files are those that a report is about."""
    if model is None:
        return
    from doorward.artifacts.digest import artifact_digest
    from doorward.core.files import open_regular
    from doorward.core.formatting import plain
    from doorward.reports import from_json

    with open_regular(_file(report)) as stream:
        subject = from_json(stream.read().decode("utf-8", "replace")).subject
    if subject is None or subject.sha256 is None:
        raise InputError(f"{report}: the report holds no digest of a model")
    if not Path(model).exists():
        raise InputError(f"--model {model}: there is nothing there")
    if (found := artifact_digest(Path(model)).sha256) != subject.sha256:
        typer.echo(f"differs: the model's SHA-256 is {found}, and was {plain(subject.sha256)}")
        raise typer.Exit(1)
    typer.echo("the model's files are those that were scanned")


def _file(report: Path) -> Path:
    return report / "report.json" if report.is_dir() else report
