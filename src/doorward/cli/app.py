"""The `doorward` command: parse, call one library function, print.

Commands import what they need when they run, so that `doorward --help` is quick.
"""

from __future__ import annotations

import sys

import typer

from doorward import __version__
from doorward.cli import demo, list_methods, plant, scan, train, verify
from doorward.errors import DoorwardError, UnsafeArtifact

app = typer.Typer(
    name="doorward",
    help="Find, plant and remove backdoors in machine-learning models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"doorward {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    """Find, plant and remove backdoors in machine-learning models."""


app.command("demo")(demo.demo)
app.command("scan")(scan.scan)
app.command("verify")(verify.verify)
app.command("plant")(plant.plant)
app.command("train")(train.train)
app.command("list")(list_methods.list_methods)


def main() -> None:
    """Run the command line; errors become one line on standard error and an exit code."""
    try:
        app()
    except UnsafeArtifact as error:
        _complain(error)
        sys.exit(1)
    except DoorwardError as error:
        _complain(error)
        sys.exit(2)
    except BrokenPipeError:
        # the reader of our output has left, as in `doorward list detectors | head -1`
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _complain(error: Exception) -> None:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
