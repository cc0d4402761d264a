"""`doorward list`: what there is."""

from __future__ import annotations

from enum import StrEnum

import typer


class Room(StrEnum):
    """Kinds of methods."""

    attacks = "attacks"
    detectors = "detectors"
    repairs = "repairs"


def list_methods(kind: Room = typer.Argument(..., help="What to list.")) -> None:
    """List methods with paper, needs and limits."""
    from rich.console import Console
    from rich.table import Table

    from doorward import registry

    singular = {"attacks": "attack", "detectors": "detector", "repairs": "repair"}[kind.value]
    names = registry.modules(singular)  # type: ignore[arg-type]
    if not names:
        typer.echo(f"there are no {kind.value} yet")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "needs", "source", "limits"):
        table.add_column(column, overflow="fold")
    for name in names:
        method = registry.get(singular, name)  # type: ignore[arg-type]
        needs = ", ".join(sorted(getattr(method, "needs", ()))) or "-"
        table.add_row(name, needs, method.source, method.limits)
    Console().print(table)
