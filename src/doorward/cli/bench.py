"""`doorward bench`: measure what is claimed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli.options import (
    DETECTORS,
    DEVICE,
    IMAGES,
    SCAN_SECONDS,
    SEED,
    check_device,
    check_folder,
    refuse_missing_inputs,
)
from doorward.core import formatting
from doorward.core.errors import InputError

if TYPE_CHECKING:
    from doorward.bench.plan import Planned
    from doorward.bench.runner import Event
    from doorward.bench.store import Row, Store
    from doorward.bench.summary import Summary

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class Scale(StrEnum):
    """How much a suite does."""

    smoke = "smoke"
    cpu = "cpu"
    full = "full"


class TableFormat(StrEnum):
    """How a suite's results are written."""

    markdown = "markdown"
    csv = "csv"
    json = "json"
    html = "html"


def _suites(incomplete: str) -> list[str]:
    """Return the suites whose names begin so, for a shell."""
    from doorward.bench.suite import suite_names

    return [name for name in suite_names() if name.startswith(incomplete)]


SUITE = typer.Argument(
    ...,
    autocompletion=_suites,
    help="Name of the suite; `doorward bench list` shows them. Or a file, as my_suite.py, which is run.",
)
SCALE = typer.Option(Scale.smoke, help="smoke takes two minutes, cpu some hours; full wants a GPU.")
STORE = typer.Option(
    None,
    metavar="URL",
    help="The results store, as in sqlite:///results.sqlite; a file in the cache folder if not given.",
)
CACHE = typer.Option(
    None,
    metavar="DIR",
    envvar="DOORWARD_CACHE",
    help="Where trained models are kept; the user's cache folder if not given.",
)
WORKERS = typer.Option(1, min=1, help="Processes that work at the same time.")
THREADS = typer.Option(1, min=1, help="Threads of each process.")
DATA = typer.Option(
    None,
    metavar="DIR",
    envvar="DOORWARD_DATA",
    help="The folder of data sets; trials without data are skipped.",
)
ONLY = typer.Option(None, metavar="PATTERN", help="Only trials or groups whose name fits, as in 'gtsrb*'.")


@app.callback()
def bench() -> None:
    """Measure detectors on planted and clean models: suites expand to trials, trials to tables."""


@app.command("list")
def list_suites() -> None:
    """List the suites and how many trials they have."""
    from doorward.bench.suite import expand, get_suite, suite_names

    for name in suite_names():
        suite = get_suite(name)
        sizes = ", ".join(f"{scale} {len(expand(suite, scale))}" for scale in suite.scales)
        typer.echo(f"{name:<18} {suite.title} (trials: {sizes})")


@app.command("run")
def run(
    suite: str = SUITE,
    scale: Scale = SCALE,
    workers: int = WORKERS,
    threads: int = THREADS,
    store: str | None = STORE,
    cache: Path | None = CACHE,
    data: Path | None = DATA,
    only: str | None = ONLY,
    device: str = DEVICE,
    export: Path | None = typer.Option(
        None,
        metavar="DIR",
        help="Write all results of the suite at this scale to SUITE-SCALE.json there.",
    ),
    models_only: bool = typer.Option(
        False, help="Make the models that are not cached and scan none; nothing is stored."
    ),
    dry_run: bool = typer.Option(False, help="Say what would be done and about how long it takes."),
) -> None:
    """Run a suite's trials that have no result yet; run it again to go on after whatever ended it.

    Exit code: 0, 2 for bad input, 4 if a trial failed or was skipped or the run had to stop.
    """
    from doorward.bench import results, runner
    from doorward.bench.cache import ModelCache
    from doorward.bench.estimate import TimeLeft, estimate
    from doorward.bench.plan import Sources, plan
    from doorward.bench.store import StoreError
    from doorward.bench.suite import expand, get_suite, matching

    check_device(device)
    found = get_suite(suite)
    trials = matching(expand(found, scale.value), only)
    folder = cache or default_cache()
    sources = Sources(data)
    planned = [plan(trial, sources) for trial in trials]
    opened = open_store(store, folder)
    settings = runner.RunSettings(
        cache=folder, data=data, workers=workers, threads=threads, device=device, judge=not models_only
    )
    todo = runner.pending(planned, opened)
    if dry_run:
        scans = runner.unscanned(todo, opened)
        guess = estimate(scans, ModelCache(folder), workers=workers, threads=threads, device=device)
        shared = (
            f", {len(todo) - len(scans)} of them the same scan as another" if len(scans) < len(todo) else ""
        )
        typer.echo(
            f"{len(planned)} trials, {len(planned) - len(todo)} done already, {len(todo)} to do{shared}"
        )
        typer.echo(f"{guess.models} models, {guess.cached} of them cached")
        missing = sorted({one.missing for one in todo if one.missing})
        for reason in missing:
            typer.echo(f"would be skipped: {reason}")
        total = formatting.duration(guess.training + guess.scanning)
        parts = f"training {formatting.duration(guess.training)}, scans {formatting.duration(guess.scanning)}"
        typer.echo(f"about {total} with {workers} worker(s): {parts}")
        return
    if models_only:
        todo = runner.unmade(todo, ModelCache(folder))
    try:
        with _progress(todo, TimeLeft(todo, workers=workers)) as report_progress:
            runner.run(planned, opened, settings, report_progress=report_progress)
    except (runner.RunError, StoreError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(4) from error
    if models_only:
        left = len(runner.unmade(todo, ModelCache(folder)))
        typer.echo(f"{len(todo) - left} models made, {left} could not be made")
        raise typer.Exit(4 if left else 0)
    if export is not None:
        typer.echo(f"written: {results.write_results(results.collect(found, scale.value, opened), export)}")
    rows = [row for one in planned if (row := opened.get(one.key)) is not None]
    counts = {status: sum(row.status == status for row in rows) for status in ("done", "failed", "skipped")}
    typer.echo(
        ", ".join(f"{count} {status}" for status, count in counts.items()) + f" of {len(planned)} trials"
    )
    _tell_errors(rows)
    raise typer.Exit(0 if counts["done"] == len(planned) else 4)


@app.command("calibrate")
def calibrate(
    detector: str = typer.Argument(
        ..., metavar="DETECTOR", autocompletion=DETECTORS, help="A name, or file.py:Class."
    ),
    scale: Scale = typer.Option(
        Scale.cpu, help="cpu takes some hours; smoke has just enough models, all of ten or twelve classes."
    ),
    workers: int = WORKERS,
    threads: int = THREADS,
    store: str | None = STORE,
    cache: Path | None = CACHE,
    data: Path | None = DATA,
    only: str | None = ONLY,
    weight: float | None = typer.Option(
        None,
        min=0.01,
        metavar="W",
        help="What the detector counts in the sum over detectors; as in the calibration that is there, or 1.",
    ),
    witness: str | None = typer.Option(
        None,
        metavar="NAME",
        help="Judge the detector apart from the sum, together with others of the same witness, so that the "
        "sum does not outvote it; as in the calibration that is there, or in the sum.",
    ),
    quick: bool = typer.Option(
        False,
        "--quick",
        help="Calibrate the quick settings, with which the detector runs where the time of a scan does not "
        "suffice for its defaults.",
    ),
    out: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="The calibration file; where a scan looks for it if not given. Some of the models alone do not "
        "replace a calibration that comes with Doorward.",
    ),
) -> None:
    """Scan clean models with one detector and write its calibration, by which its scores are judged.

    Exit code: 0, 2 for bad input, 4 if models could not be scanned.
    """
    from doorward.bench import runner
    from doorward.bench.calibrate import calibration_of, calibration_trials
    from doorward.bench.estimate import TimeLeft
    from doorward.bench.plan import Sources, plan
    from doorward.bench.store import StoreError
    from doorward.methods import registry
    from doorward.scan.calibration import Calibration, calibration_file, quick_file

    trials = calibration_trials(detector, scale.value, only, quick=quick)
    name = registry.get("detector", detector).method()
    if out is None and name in registry.own_modules("detector") and (only or scale is Scale.smoke):
        raise InputError(
            f"{name} comes with a calibration on many more models than these; name another file with --out"
        )
    there = calibration_file(name)
    earlier = Calibration.read(there) if there.is_file() else None
    if weight is None:
        weight = earlier.weight if earlier else 1.0
    if witness is None and earlier:
        witness = earlier.witness
    folder = cache or default_cache()
    planned = [plan(trial, Sources(data)) for trial in trials]
    opened = open_store(store, folder)
    settings = runner.RunSettings(cache=folder, data=data, workers=workers, threads=threads, device="cpu")
    todo = runner.pending(planned, opened)
    try:
        with _progress(todo, TimeLeft(todo, workers=workers)) as report_progress:
            runner.run(planned, opened, settings, report_progress=report_progress)
    except (runner.RunError, StoreError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(4) from error
    rows = [row for one in planned if (row := opened.get(one.key)) is not None]
    _tell_errors(rows)
    made = calibration_of(detector, rows, weight=weight, witness=witness, quick=quick)
    file = out or (quick_file if quick else calibration_file)(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(made.to_text(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); name another with --out") from error
    typer.echo(f"written: {file} ({len(made.models)} of {len(planned)} clean models)")
    raise typer.Exit(0 if len(made.models) == len(planned) else 4)


@app.command("show")
def show_suite(
    suite: str = SUITE,
    scale: Scale = SCALE,
    store: str | None = STORE,
    cache: Path | None = CACHE,
    results: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="Show the results in this JSON file, as `bench run` exports it; no store is read.",
    ),
    format: TableFormat = typer.Option(TableFormat.markdown, help="How to write it."),
    out: Path | None = typer.Option(None, metavar="FILE", help="Where to; standard output if not given."),
) -> None:
    """Show a suite's results: what was claimed, what came out, with counts and intervals.

    Where there are none yet, it says what measures them. Exit code: 0, or 2 for bad input.
    """
    from doorward.bench import results as records
    from doorward.bench import summary, tables
    from doorward.bench.suite import get_suite

    found = get_suite(suite)
    if results is not None:
        held = records.read_results(results)
        if (held.suite, held.scale) != (found.name, scale.value):
            raise InputError(
                f"{results} holds {held.suite} at scale {held.scale}, not {found.name} at {scale.value}"
            )
    else:
        held = records.collect(found, scale.value, open_store(store, cache or default_cache()))
    summed_up = summary.summarise(found, held)
    text = _written(summed_up, format)
    if format in (TableFormat.csv, TableFormat.json) and (nothing := tables.unmeasured(summed_up)):
        typer.echo(nothing, err=True)  # there is no place for a sentence in these
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror})") from error
    typer.echo(f"written: {out}")


@app.command("models")
def own_models(
    folder: Path = typer.Argument(..., metavar="FOLDER", help="The folder of the models."),
    labels: Path = typer.Option(
        ...,
        metavar="TABLE",
        help="The truth, as .csv or .parquet: columns path (from FOLDER), planted (yes or no) and target "
        "(class numbers, 3 or 3;5); group, to count some apart; further ones are named like the options of "
        "`doorward scan`, as mean or clean.",
    ),
    clean: str | None = typer.Option(
        None, metavar="DATA", help="Clean images for all models for which the table names no others."
    ),
    detector: list[str] = typer.Option(
        [],
        metavar="NAME",
        autocompletion=DETECTORS,
        help="Run this detector, or file.py:Class; may be repeated. All if none is named.",
    ),
    images: int = IMAGES,
    time_budget: float = SCAN_SECONDS,
    seed: int = SEED,
    device: str = DEVICE,
    format: TableFormat = typer.Option(TableFormat.markdown, help="How to write the tables."),
    out: Path | None = typer.Option(
        None,
        metavar="DIR",
        help="Keep every report there: what is there of the same model and scan is not scanned again.",
    ),
) -> None:
    """Scan models of which the truth is known, and count as the suites do what was found of it.

    Exit code: 0, 2 for bad input, 3 if a model could not be scanned.
    """
    from doorward.bench import own_models as own
    from doorward.bench import summary
    from doorward.methods.registry import refuse_unknown
    from doorward.scan.request import ScanRequest

    refuse_unknown("detector", detector)
    refuse_missing_inputs(None, clean)
    common = ScanRequest(
        clean=clean,
        detectors=tuple(detector),
        images=images,
        time_budget=time_budget,
        seed=seed,
        device=check_device(device),
    )
    models = own.read_labels(labels, folder, common)
    for path in own.unlabelled(folder, models):
        typer.echo(f"not in {labels}: {formatting.plain(path)}", err=True)
    if out is not None:
        check_folder(out)
    held = own.measure(models, folder, keep=out, progress=lambda line: typer.echo(line, err=True))
    summed_up = summary.summarise(own.suite_of(models, folder), held)
    text = _written(summed_up, format)
    typer.echo(text, nl=False)
    if format is TableFormat.markdown and (table := own.detectors_table(held)):
        typer.echo("\n" + table, nl=False)
    failed = sum(one.status != "done" for one in held.results)
    raise typer.Exit(3 if failed else 0)


def _written(summed_up: Summary, format: TableFormat) -> str:
    from doorward.bench import page, tables

    write = {
        TableFormat.markdown: tables.to_markdown,
        TableFormat.csv: tables.to_csv,
        TableFormat.json: tables.to_json,
        TableFormat.html: page.render,
    }[format]
    return write(summed_up)


def default_cache() -> Path:
    """Return the user's cache folder for Doorward, as the platform has it."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "doorward"


def open_store(url: str | None, cache: Path) -> Store:
    """Open a results store; a file in the cache folder if no URL is given."""
    from doorward.core.errors import MissingExtra

    try:
        from doorward.bench.store import Store
    except ImportError as error:
        raise MissingExtra("sqlalchemy", "bench", "the results store") from error
    if url is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the cache folder {cache} cannot be made ({error.strerror}); name another with --cache"
            ) from error
        url = f"sqlite:///{cache.resolve() / 'results.sqlite'}"
    return Store(url)


def _tell_errors(rows: Iterable[Row]) -> None:
    """Write on standard error why trials were not done, each reason once."""
    for reason in sorted({row.error for row in rows if row.error}):
        typer.echo(f"not done: {reason}", err=True)


@contextmanager
def _progress(todo: list[Planned], left: object) -> Iterator[Callable[[Event], None]]:
    """Show progress on standard error: a bar on a terminal, else a line for each trial that has ended."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from doorward.bench.estimate import TimeLeft

    assert isinstance(left, TimeLeft)
    console = Console(stderr=True)
    ended = 0

    def line(event: Event) -> str:
        took = f" in {formatting.duration(event.seconds)}" if event.seconds else ""
        return f"{event.planned.trial.name}: {event.status}{took}{', ' + event.note if event.note else ''}"

    def note(event: Event) -> str:
        nonlocal ended
        if event.status not in (None, "died"):
            ended += 1
            left.ended(event.planned, event.seconds)
        seconds = left.seconds()
        return "" if seconds is None else f"about {formatting.duration(seconds)} left"

    if not console.is_terminal:

        def report_progress(event: Event) -> None:
            rest = note(event)
            if event.status is not None:
                tail = f" ({ended} of {len(todo)}{', ' + rest if rest else ''})"
                typer.echo(line(event) + tail, err=True)

        yield report_progress
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=len(todo), left="")

        def show(event: Event) -> None:
            rest = note(event)
            if event.status is None:
                bar.update(task, description=f"{event.planned.trial.name}: {event.note}")
            else:
                bar.console.print(line(event), highlight=False, markup=False)
            bar.update(task, completed=ended, left=rest)

        yield show
