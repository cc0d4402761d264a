"""The `doorward` command: parse, call one library function, print.

Commands import what they need when they run, so that `doorward --help` is quick.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from doorward._version import __version__
from doorward.cli import (
    bench,
    configuration,
    demo,
    fleet,
    guard,
    list_methods,
    method_help,
    plant,
    repair,
    scan,
    train,
    verify,
)
from doorward.core.devices import keep_freed_memory
from doorward.core.errors import DoorwardError, InputError, UnsafeArtifact
from doorward.core.paths import refuse_unreadable_name

app = typer.Typer(
    name="doorward",
    help="Find, plant and remove backdoors in machine-learning models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Typer's own class or click's, by its version.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
#: Environment variable by which a shell asks what may follow; the scripts of `--show-completion` set it.
COMPLETE = "_DOORWARD_COMPLETE"
#: Environment variable that asks for the traceback of a fault.
TRACEBACK = "DOORWARD_TRACEBACK"


def _version(value: bool) -> None:
    if value:
        print(f"doorward {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", "-V", help="Show the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    """Find, plant and remove backdoors in machine-learning models."""


app.command("demo")(demo.demo)
app.command("scan")(scan.scan)
app.command("verify")(verify.verify)
app.command("repair")(repair.repair)
app.command("guard")(guard.guard)
app.command("plant")(plant.plant)
app.command("train")(train.train)
app.command("list")(list_methods.list_methods)
app.add_typer(fleet.app, name="fleet", short_help="Scan many models, each once.")
app.add_typer(bench.app, name="bench", short_help="Measure detectors, suite by suite.")


def main() -> None:
    """Run the command line; errors become one line on standard error and an exit code."""
    # Torch reads this when it is imported. Threads that wait busily take the processor from those that work
    # wherever other programs run too: on a loaded machine scans were up to twenty times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class name that the terminal lacks ends no scan
            stream.reconfigure(errors="backslashreplace")
    if COMPLETE in os.environ:
        typer.main.get_command(app).main([], "doorward")
    with _ended_in_order():
        code = _run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            code = code or _complain(f"standard output: {error.strerror}", 2)
        # else Python would complain of it at its end, and change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _open_closed_streams() -> None:
    """Give standard output and standard error a place where the caller has closed them, as `>&-` does.

    Python then has none, and a file that is opened later would take their number and their text.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run


class _Terminated(KeyboardInterrupt):
    """The request to end, as `kill` sends it."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let a request to end act as an interruption does, so that what is half written is removed."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse values that are empty, as of a variable that a script forgot to set: paths take them for `.`.

    Raises:
        InputError: naming the option.
    """
    for before, given in pairwise(["", *arguments]):
        name, _, value = given.partition("=")
        if name.startswith("--") and given.endswith("=") and not value:
            raise InputError(f"{name} is empty; it takes a value")
        if given or (arguments[0] == "scan" and before in ("", "scan", "--clean", "--train")):
            continue  # the command says more of these
        after = f"after {before}" if before.startswith("--") else "among the arguments"
        raise InputError(f"there is an empty value {after}; give a name or a path")


def _run(arguments: list[str]) -> int:
    try:
        _refuse_empty(arguments)
        for one in arguments:
            refuse_unreadable_name(one)
        if asked := method_help.asked_for(arguments):
            print(method_help.method_help(*asked))
            return 0
        # not `app()`: that ends with 1 on a broken pipe and on faults, which here means "found"
        command = typer.main.get_command(app)
        stated = _defaults(command)
        with command.make_context("doorward", list(arguments), default_map=stated) as context:
            context.command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except UnsafeArtifact as error:
        return _complain(str(error), 1)
    except DoorwardError as error:
        return _complain(str(error), 2)
    except USAGE_ERROR as error:
        return _complain_of_usage(error)
    except (KeyboardInterrupt, typer.Abort) as end:
        print("interrupted", file=sys.stderr)
        return 143 if isinstance(end, _Terminated) else 130  # as a shell says it
    except BrokenPipeError:
        return 141  # what the shell says of a program whose reader has left, as in `doorward list | head`
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(where + (error.strerror or str(error)), 2)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and arguments[0].endswith("-completion"):
            return int(error.code or 0)  # so these options end
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        where = "" if os.environ.get(TRACEBACK) else f" ({TRACEBACK}=1 shows where)"
        return _complain(f"this should not happen: {type(error).__name__}: {error}{where}", 4)
    return 0


def _defaults(command: Any) -> dict[str, Any]:
    """Return what a file in the current folder sets, and tell it on standard error."""
    try:
        here = Path.cwd()
    except OSError:  # the folder is gone
        return {}
    stated, told = configuration.defaults(command, here)
    if told:
        from doorward.core.formatting import plain

        print(plain(told), file=sys.stderr)
    return stated


def _complain_of_usage(error: Any) -> int:
    message = str(error.format_message())
    if message.startswith("Usage:"):  # no more was typed than the name of a group of commands
        print(message, file=sys.stderr)
        return 2
    message = message.replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "doorward"
    return _complain(f"{message}; see {command} --help", 2)


def _complain(message: str, code: int) -> int:
    from doorward.core.formatting import plain

    print("error: " + plain(" ".join(message.split())), file=sys.stderr)
    return code
