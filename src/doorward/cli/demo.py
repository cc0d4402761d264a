"""`doorward demo`: plant a backdoor, train, scan, do the same without the backdoor, and mend the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli.options import SEED, check_folder, show, status
from doorward.cli.repair import lines
from doorward.core import formatting

if TYPE_CHECKING:
    from doorward.bench.demo import Twin
    from doorward.core.records import Report


def demo(
    fast: bool = typer.Option(
        False, "--fast", help="Scan the two models that come with the package; train nothing."
    ),
    open_: bool = typer.Option(False, "--open", help="Open the HTML report in a browser."),
    out: Path = typer.Option(Path("doorward-demo"), metavar="DIR", help="Where models and reports go."),
    seed: int = SEED,
) -> None:
    """Scan a backdoored model and a clean one, and mend the first.

    A backdoor is planted in a small set of pictures of clothes; a model is trained on them, and a clean
    counterpart without. Both are scanned as files, and what the scan says is compared with the truth. Then
    the backdoored model is mended with clean pictures, and scanned again by the detectors that found the
    backdoor.

    Exit code: 0 when all verdicts are as expected and the planted trigger no longer works, 2 if DIR cannot
    be written, 4 otherwise.
    """
    check_folder(out)
    from doorward import reports
    from doorward.bench.demo import clean_images, ready_made, scan_twin, train_twins

    with status() as progress:
        surrogates = ready_made(out) if fast else train_twins(out, seed=seed, progress=progress)
    images, right, pages = clean_images(out), True, {}
    found: dict[str, tuple[Twin, Report]] = {}
    for twin in surrogates:
        typer.echo(f"=== The {twin.name} model ===\n")
        facts = [] if twin.clean_accuracy is None else [f"accuracy {formatting.rate(twin.clean_accuracy)}"]
        if twin.plant is not None and twin.plant.attack_success is not None:
            facts.append(f"the trigger works on {formatting.rate(twin.plant.attack_success)}")
        if facts:
            typer.echo("The truth: " + "; ".join(facts) + "\n")
        with status() as progress:
            report = scan_twin(twin, images, seed=seed, progress=progress)
        found[twin.name] = twin, report
        pages[twin.name] = reports.write_reports(report, out / f"report-{twin.name}")["html"]
        show(report)
        typer.echo()
        right &= twin.as_expected(report)
    typer.echo(f"=== {'Both verdicts are right' if right else 'A verdict is not as expected'} ===\n")
    if right:
        right = _mended(*found["backdoored"], images, out / "mended", seed)
    for name, page in pages.items():
        typer.echo(f"report on the {name} model: {page.resolve()}")
    if open_:
        typer.launch(pages["backdoored"].resolve().as_uri())
    raise typer.Exit(0 if right else 4)


def _mended(twin: Twin, report: Report, images: Path, out: Path, seed: int) -> bool:
    """Mend the backdoored model, say what came of it, and return whether the backdoor is gone."""
    from doorward.bench.demo import mend_twin

    with status() as progress:
        mended = mend_twin(twin, report, images, out, seed=seed, progress=progress)
    typer.echo("=== The backdoored model, mended ===\n")
    for line in lines(mended.report):
        typer.echo(line)
    typer.echo(f"The truth: the planted trigger works on {formatting.rate(mended.success)}\n")
    typer.echo(f"=== {'The backdoor is gone' if mended.as_expected else 'Something is left of it'} ===\n")
    typer.echo(f"mended model: {mended.path.resolve()}")
    return mended.as_expected
