"""`doorward plant`: poison a data set on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from doorward.cli.options import status
from doorward.errors import InputError

PLANT = "plant.json"


def plant(
    attack: str = typer.Argument(
        ..., metavar="ATTACK", help="Name of the attack; `doorward list attacks` shows them."
    ),
    source: str = typer.Argument(
        ...,
        metavar="SOURCE",
        help="Labelled training images: a folder, a file or a hub id; SOURCE:SPLIT picks a split.",
    ),
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The folder to write train.parquet and plant.json to."
    ),
    set_: list[str] = typer.Option(
        [], "--set", metavar="K=V", help="A setting of the attack, as in poison_rate=0.02; may be repeated."
    ),
    seed: int = typer.Option(0, min=0, metavar="N", help="Seed of everything random."),
    split: str | None = typer.Option(None, metavar="NAME", help="The split of SOURCE; train if not given."),
    data_column: str | None = typer.Option(
        None, metavar="NAME", help="The column (or .npz key) of the images, where it cannot be told."
    ),
    label_column: str | None = typer.Option(
        None, metavar="NAME", help="The column (or .npz key) of the labels, where it cannot be told."
    ),
    force: bool = typer.Option(
        False, "--force", help="Write to OUT even if it holds something; replace what is ours."
    ),
) -> None:
    """Poison a data set on purpose.

    Some samples get a trigger, and most attacks change their labels too. The truth of the plant (trigger,
    targets, ids of the poisoned samples) goes to plant.json.

    Exit code: 0, or 2 for unreadable input.
    """
    from doorward import registry
    from doorward.attacks.base import DataAttack
    from doorward.data import open_samples
    from doorward.data.parquet import write_parquet
    from doorward.plants import write_plant
    from doorward.reports import wording

    method = registry.build("attack", attack, settings_of(set_))
    assert isinstance(method, DataAttack)
    check_out(out, force=force, inputs=[source])
    samples = open_samples(
        source, column=data_column, label_column=label_column, split=split, prefer=("train",)
    )
    with status() as progress:
        progress("reading")
        poisoned = method(samples, seed=seed)
        truth = poisoned.plant  # reads every sample, so that nothing is written where one is damaged
        progress("writing")
        for old in (out / "train.parquet", *out.glob("plant.*")):
            old.unlink(missing_ok=True)
        file = write_parquet(poisoned.samples, out, split="train")
        write_plant(truth, out / PLANT)
    share = wording.percent(truth.poison_rate or 0.0)
    what = f"{len(truth.poisoned_ids):,} of {len(poisoned.samples):,} samples ({share})"
    carry = f"carry the trigger and a label of {wording.with_noun(truth.targets, samples.classes)}"
    typer.echo(f"planted {attack}: {what} {carry if truth.trigger else 'are poisoned; there is no trigger'}")
    if truth.cover_ids:
        typer.echo(f"{len(truth.cover_ids):,} more are changed too and keep their label")
    typer.echo(f"written: {file} and {out / PLANT}")


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """Read `name=value` pairs; values are JSON where they can be read so, else text.

    >>> settings_of(["size=[2, 3]", "colour=checker", "alpha=0.5"])
    {'size': [2, 3], 'colour': 'checker', 'alpha': 0.5}
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes NAME=VALUE, as in poison_rate=0.02, got {pair!r}")
        if name in settings:
            raise InputError(f"--set {name} is given twice")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def check_out(out: Path, *, force: bool, inputs: list[str]) -> None:
    """Refuse a place for results that is a file, holds something (unless forced), or is what is read.

    Raises:
        InputError: saying which.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a folder is needed")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} is not empty; choose another folder, or give --force")
    for given in inputs:
        for path in (Path(given), Path(given.rpartition(":")[0] or given)):
            if path.exists() and out.resolve() in (path.resolve(), path.resolve().parent):
                raise InputError(f"{out} is where {given} is read from; choose another folder")
