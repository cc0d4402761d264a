"""What commands share: options, parsing of their values, progress, printing a report."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from doorward.core.devices import check_device as check_device
from doorward.core.errors import InputError
from doorward.methods.registry import MethodKind, modules

if TYPE_CHECKING:
    from doorward.core.records import Report
    from doorward.scan.context import Progress


class Format(StrEnum):
    """What is printed on standard output."""

    text = "text"
    json = "json"
    sarif = "sarif"
    cyclonedx = "cyclonedx"


class FailOn(StrEnum):
    """From which verdict on the exit code is 1."""

    suspicious = "suspicious"
    backdoored = "backdoored"
    never = "never"


def known(kind: MethodKind, room: str = "") -> Callable[[str], list[str]]:
    """Return what completes the name of an attack, a detector or a repair in a shell.

    >>> known("detector")("patch"), known("detector", "inputs")("")
    (['patch-search'], ['feature-squeezing', 'strip'])

    Args:
        room: the package that the method is of; any if empty.
    """

    def names(incomplete: str) -> list[str]:
        return [
            name
            for name, module in modules(kind).items()
            if name.startswith(incomplete) and (not room or module.split(".")[-2] == room)
        ]

    return names


SEED = typer.Option(0, min=0, metavar="N", help="Seed of everything random.")
DEVICE = typer.Option("cpu", metavar="D", help="cpu, cuda, cuda:1, mps.")
IMAGES = typer.Option(300, min=4, metavar="N", help="Most images to use.")
SCAN_SECONDS = typer.Option(900, min=1, metavar="S", help="Seconds for each scan.")
FORCE = typer.Option(False, "--force", help="Write to OUT even if it holds something.")


def _column(what: str) -> Any:
    return typer.Option(
        None, metavar="NAME", help=f"The column (or .npz key) of the {what}, where it cannot be told."
    )


ATTACKS, DETECTORS, REPAIRS = known("attack"), known("detector"), known("repair")
FILTERS = known("detector", "inputs")
INPUT_COLUMN, IMAGE_COLUMN, LABEL_COLUMN = map(_column, ("inputs", "images", "labels"))


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Read numbers separated by commas.

    >>> numbers("0.5, 0.25", "--mean")
    (0.5, 0.25)
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"{option} takes numbers separated by commas, got {text!r}")
    return values


def labels(text: str | None) -> tuple[str, ...] | None:
    """Read class names: separated by commas, or one a line in a file named by `@FILE`."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"--labels {text}: cannot read the file: {why}") from None
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [part.strip() for part in text.split(",")]
    if not names or not all(names):
        raise InputError(f"--labels takes class names with commas, or @FILE with one a line, got {text!r}")
    return tuple(names)


def check_folder(out: Path, *, given: str = "--out") -> Path:
    """Return a folder for results if it can be made and written, before work is spent on them.

    Args:
        given: the option or argument that names it, for the message.

    Raises:
        InputError: if not.
    """
    there = out
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{given} {out}: {there} is no folder; results need one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{given} {out}: the folder {there.resolve()} may not be written to")
    missing = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        # what may be written to can be full, or hold nothing of ours, as /proc does
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"doorward")
    except OSError as error:
        raise InputError(f"{given} {out}: nothing can be written there: {error.strerror}") from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
    return out


def refuse_missing_inputs(model: str | None, *data: str | None) -> None:
    """Refuse paths at which nothing lies, before anything slow is loaded.

    Raises:
        InputError: for the first.
    """
    from doorward.core.paths import model_exists
    from doorward.data.sources import refuse_missing

    if model is not None:
        model_exists(model)
    for path in data:
        if path is not None:
            refuse_missing(path)


def current_folder() -> str | None:
    """Return the current folder, None where its name is no text, which no report can hold, or it is gone."""
    try:
        here = os.getcwd()
        here.encode()
    except (OSError, UnicodeEncodeError):
        return None
    return here


@contextmanager
def own_code(factory: str | None) -> Iterator[None]:
    """Let `--factory` find modules in the current folder, after all that is installed."""
    here = os.getcwd() if factory else None
    if here is None or here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def written(report: Report, format: Format, fail_on: FailOn) -> str | None:
    """Return a report in a format for programs, None for readers' text."""
    from doorward import reports

    if format is Format.json:
        return reports.to_json(report)
    if format is Format.sarif:
        return reports.to_sarif(report, fail_on=fail_on.value)
    return reports.to_cyclonedx(report) if format is Format.cyclonedx else None


def check_format(format: Format) -> None:
    """Refuse a format whose package is missing, before any work.

    Raises:
        MissingExtra: if it is.
    """
    if format is Format.cyclonedx:
        from doorward.reports.bom import check_installed

        check_installed()


def show(report: Report) -> None:
    """Print a report: with colours on a terminal, else as the text file has it, in the width at hand."""
    from rich.console import Console

    from doorward import reports

    console = Console()
    if console.is_terminal:
        reports.render(report, console)
    else:
        typer.echo(reports.to_text(report, width=console.width), nl=False)


@contextmanager
def status() -> Iterator[Progress]:
    """Show what is being done on standard error; silent when that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as spinner:
        yield lambda text: spinner.update(text)
