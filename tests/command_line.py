"""Call the command line as a user does: in this process where speed matters, else as a program."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from doorward import bundled
from doorward.cli.app import main

#: The program that pip installs.
PROGRAM = Path(sys.executable).with_name("doorward")
BACKDOORED, CLEAN = bundled.model("backdoored"), bundled.model("clean")
CLOTHES = f"{bundled.FOLDER / 'fashion_mnist'}:test"
#: What makes a scan quick where its verdict does not matter.
QUICK = ("--detector", "max-margin")
#: One that finds small patches with confidence.
PATCHES = ("--detector", "neural-cleanse")


@dataclass(frozen=True)
class Outcome:
    """What a call left behind: the exit code and both outputs."""

    code: int
    out: str
    err: str


def call(*words: object, folder: Path | None = None, encoding: str = "utf-8") -> Outcome:
    """Run `doorward WORDS...` in this process, standing in a folder, with outputs that are no terminals."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    code = 0
    with (
        contextlib.chdir(folder or Path.cwd()),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        mock.patch.object(sys, "argv", ["doorward", *map(str, words)]),
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return Outcome(code, out, err)


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a program that computes on one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | changes


def program(*words: object, folder: Path, env: Mapping[str, str] | None = None) -> Outcome:
    """Run the installed program in a folder."""
    done = subprocess.run(
        [PROGRAM, *map(str, words)],
        cwd=folder,
        env=env or environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def content(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its content, and every folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Assert that the block leaves a folder as it was."""
    before = content(folder)
    yield
    assert content(folder) == before


def assert_one_line(outcome: Outcome, *parts: str) -> None:
    """Assert that a call failed as bad input does: exit code 2, and one line on standard error alone."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.endswith("\n")
    for part in parts:
        assert part in outcome.err
