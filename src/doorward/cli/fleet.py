"""`doorward fleet`: scan many models, each once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli.options import (
    DETECTORS,
    DEVICE,
    SCAN_SECONDS,
    SEED,
    FailOn,
    check_device,
    check_folder,
    refuse_missing_inputs,
)
from doorward.core.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from doorward.fleet.cluster import RayRunner
    from doorward.fleet.remote import Folder
    from doorward.fleet.store import FleetStore

app = typer.Typer(help="Scan many models, each once.", no_args_is_help=True, rich_markup_mode=None)

STORE = typer.Option(
    "sqlite:///fleet.sqlite",
    metavar="URL",
    help="Where what was found is kept, as SQLAlchemy takes it: sqlite:///fleet.sqlite, "
    "postgresql+psycopg://USER@HOST/NAME.",
)
OUT = typer.Option(
    None,
    metavar="DIR",
    help="Write an overview, index.html, models.csv and all reports to this folder or address.",
)


class TableFormat(StrEnum):
    """How the table of all models is written."""

    text = "text"
    csv = "csv"


@app.command("scan")
def scan(
    sources: list[str] = typer.Argument(
        ...,
        metavar="SOURCE...",
        help="Models: folders, files, or tables (.csv, .parquet) with a column `path`, in which further "
        "columns are named like the options of `doorward scan`; each as a path, or as an address such as "
        "s3://BUCKET/FOLDER or, in an MLflow registry, models:/NAME.",
    ),
    store: str = STORE,
    clean: str | None = typer.Option(
        None, metavar="DATA", help="Clean images for all models for which a table names no others."
    ),
    detector: list[str] = typer.Option(
        [],
        "--detector",
        metavar="NAME",
        autocompletion=DETECTORS,
        help="Run this detector; may be repeated. All if none is named.",
    ),
    workers: int | None = typer.Option(
        None,
        min=1,
        metavar="N",
        help="Models that are scanned at the same time: 1, or with --ray one for each processor.",
    ),
    ray: str | None = typer.Option(
        None, metavar="ADDRESS", help="Scan on a Ray cluster: HOST:PORT of its head, or auto."
    ),
    memory: float = typer.Option(
        4.0, min=0.25, metavar="G", help="GiB that each scan may take beyond its model."
    ),
    disk: float = typer.Option(
        16.0, min=0.001, metavar="G", help="GiB on disk that each model from an address may take."
    ),
    time_budget: float = SCAN_SECONDS,
    seed: int = SEED,
    device: str = DEVICE,
    out: str | None = OUT,
    new_only: bool = typer.Option(
        False, "--new-only", help="The exit code is by the models alone that were never scanned so before."
    ),
    tags: bool = typer.Option(
        True, "--tags/--no-tags", help="Write the verdicts to the versions in an MLflow registry, as tags."
    ),
    fail_on: FailOn = typer.Option(
        FailOn.suspicious,
        metavar="suspicious|backdoored|never",
        help="From which verdict on the exit code is 1.",
    ),
) -> None:
    """Scan many models, each content once, and go on where an earlier run was stopped.

    Every model is scanned in a process of its own. One that hangs, crashes or eats memory is tried twice,
    told as failed, and stops no other.

    Exit code: 0 nothing found, 1 found or unsafe, 2 usage or unreadable input, 3 some could not tell or
    failed, 4 a fault in Doorward.
    """
    from doorward.core.formatting import duration, plain
    from doorward.methods import registry
    from doorward.scan.request import ScanRequest

    for name in detector:
        registry.get("detector", name)  # tells which there are, before any work
    refuse_missing_inputs(None, clean)
    folder = _folder(out)
    kept = _open(store)
    from doorward.fleet.engine import FleetSettings, Progress, note, work
    from doorward.fleet.overview import standing, to_text, write_overview
    from doorward.fleet.sources import find_models
    from doorward.fleet.store import path_text
    from doorward.fleet.tags import write_tags

    common = ScanRequest(
        clean=clean,
        detectors=tuple(detector),
        time_budget=time_budget,
        seed=seed,
        device=check_device(device),
    )

    def report_progress(now: Progress) -> None:
        rest = f", {now.left:,} left, about {duration(now.seconds_left)}" if now.left else ""
        typer.echo(f"{plain(now.found.path)}: {standing(now.found).replace('_', ' ')}{rest}", err=True)

    before = {one.key for one in kept.rows() if one.state in ("done", "failed")}
    noted = note(find_models(sources, common), kept, progress=lambda text: typer.echo(text, err=True))
    for path, why in noted.unreadable:
        typer.echo(f"not read: {plain(path)}: {plain(why)}", err=True)
    runner = None if ray is None else _cluster(ray, kept)
    settings = FleetSettings(
        workers=workers or (1 if runner is None else runner.workers),
        memory=int(memory * (1 << 30)),
        disk=int(disk * (1 << 30)),
    )
    try:
        work(kept, settings, told=report_progress, runner=runner)
    finally:
        if folder is not None:
            write_overview(kept, folder)
            typer.echo(f"written: {out} (index.html, models.csv, reports/)", err=True)
    paths = set(map(path_text, noted.paths))
    own = [one for one in kept.rows() if one.path in paths]
    counts: dict[str, int] = {}
    for one in own:
        counts[standing(one)] = counts.get(standing(one), 0) + 1
    typer.echo(to_text(own, counts), nl=False)
    untagged = write_tags(own, out) if tags else []
    for path, why in untagged:
        typer.echo(f"not tagged: {plain(path)}: {plain(why)}", err=True)
    judged = [standing(one) for one in own if not (new_only and one.key in before)]
    kept.close()
    raise typer.Exit(_exit_code(judged, bool(noted.unreadable or untagged), fail_on))


def _exit_code(found: list[str], unreadable: bool, fail_on: FailOn) -> int:
    """Return the code of the worst that was found."""
    from doorward.reports import exit_code

    codes = {3 if one == "failed" else exit_code(one, fail_on.value) for one in found}  # type: ignore[arg-type]
    codes |= {2} if unreadable else set()
    return next((code for code in (1, 2, 3) if code in codes), 0)


@app.command("status")
def status(
    store: str = STORE,
    format: TableFormat = typer.Option(
        TableFormat.text, metavar="text|csv", help="What to print on standard output."
    ),
    out: str | None = OUT,
) -> None:
    """Say what became of the models in a store."""
    folder = _folder(out)
    kept = _open(store, there=True)
    from doorward.fleet.overview import to_csv, to_text, write_overview

    rows = list(kept.rows())
    typer.echo(to_csv(rows) if format is TableFormat.csv else to_text(rows, kept.counts()), nl=False)
    if folder is not None:
        write_overview(kept, folder)
        typer.echo(f"written: {out} (index.html, models.csv, reports/)", err=True)
    kept.close()


def _cluster(address: str, store: FleetStore) -> RayRunner:
    """Join a Ray cluster."""
    from doorward.fleet.cluster import RayRunner

    try:
        return RayRunner(address, store)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "ray", "ray", "--ray") from None


def _folder(out: str | None) -> Folder | None:
    """Return the folder for results, before work is spent on them."""
    from doorward.fleet.remote import Folder, is_address

    if out is not None and not is_address(out):
        check_folder(Path(out))
    return None if out is None else Folder(out)


def _open(url: str, *, there: bool = False) -> FleetStore:
    """Open a store.

    Args:
        there: refuse a file that is not there yet.
    """
    try:
        from doorward.fleet.store import FleetStore
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "sqlalchemy", "fleet", "`doorward fleet`") from None
    if there and url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        raise InputError(f"--store {url}: there is no such file")
    return FleetStore(url)
