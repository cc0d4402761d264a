"""`doorward list`: what there is."""

from __future__ import annotations

import shutil
import textwrap
from enum import StrEnum

import typer

#: Longer lines are hard to read.
WIDEST = 100


class Room(StrEnum):
    """Kinds of methods."""

    attacks = "attacks"
    detectors = "detectors"
    repairs = "repairs"


def list_methods(
    kind: Room = typer.Argument(..., metavar="KIND", help="What to list."),
) -> None:
    """List methods: paper, needs, limits."""
    from doorward.methods import registry

    singular = {"attacks": "attack", "detectors": "detector", "repairs": "repair"}[kind.value]
    names = registry.modules(singular)  # type: ignore[arg-type]
    if not names:
        typer.echo(f"there are no {kind.value} yet")
    width = min(shutil.get_terminal_size().columns, WIDEST)
    for name in names:
        method = registry.get(singular, name)  # type: ignore[arg-type]
        typer.echo(f"{name}: {method.title}")
        needs = ", ".join(sorted(getattr(method, "needs", ())))
        for label, text in (("source", method.source), ("needs", needs), ("limits", method.limits)):
            if text:
                typer.echo(
                    textwrap.fill(
                        text,
                        width,
                        initial_indent=f"  {label:<8}",
                        subsequent_indent=" " * 10,
                        break_on_hyphens=False,
                    )
                )
