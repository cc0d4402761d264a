"""What commands share: parsing of option values, progress, exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from doorward.errors import InputError

if TYPE_CHECKING:
    from doorward.scan import Progress


class Format(StrEnum):
    """What is printed on standard output."""

    text = "text"
    json = "json"
    sarif = "sarif"


class FailOn(StrEnum):
    """From which verdict on the exit code is 1."""

    suspicious = "suspicious"
    backdoored = "backdoored"
    never = "never"


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Read numbers separated by commas.

    >>> numbers("0.5, 0.25", "--mean")
    (0.5, 0.25)
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} takes numbers separated by commas, got {text!r}") from None


def labels(text: str | None) -> tuple[str, ...] | None:
    """Read class names: separated by commas, or one a line in a file named by `@FILE`."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                return tuple(line.strip() for line in file if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--labels {text}: cannot read the file: {error}") from None
    return tuple(part.strip() for part in text.split(","))


def check_device(name: str) -> str:
    """Return the device if torch can use it.

    Raises:
        InputError: if not; the message names those that it can use.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        usable = ["cpu"]
        if torch.cuda.is_available():
            usable += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            usable.append("mps")
        raise InputError(f"--device {name} cannot be used here; usable: {', '.join(usable)}") from None
    return name


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
