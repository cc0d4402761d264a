"""`doorward demo`: plant a backdoor, train, scan, and do the same without the backdoor."""

from __future__ import annotations

from pathlib import Path

import typer

from doorward.cli.options import check_folder, show, status
from doorward.core import formatting


def demo(
    fast: bool = typer.Option(
        False, "--fast", help="Scan the two models that come with the package; train nothing."
    ),
    open_: bool = typer.Option(False, "--open", help="Open the HTML report in a browser."),
    out: Path = typer.Option(Path("doorward-demo"), metavar="DIR", help="Where models and reports go."),
    seed: int = typer.Option(0, min=0, metavar="N", help="Seed of everything random."),
) -> None:
    """Scan a backdoored model and a clean one.

    A backdoor is planted in a small set of pictures of clothes; a model is trained on them, and a clean
    counterpart without. Both are scanned as files, and what the scan says is compared with the truth.

    Exit code: 0 when both verdicts are as expected, 2 if DIR cannot be written, 4 otherwise.
    """
    check_folder(out)
    from doorward import reports
    from doorward.bench.demo import clean_images, ready_made, scan_twin, train_twins

    with status() as progress:
        surrogates = ready_made(out) if fast else train_twins(out, seed=seed, progress=progress)
    images, right, pages = clean_images(out), True, {}
    for twin in surrogates:
        typer.echo(f"=== The {twin.name} model ===\n")
        facts = [] if twin.clean_accuracy is None else [f"accuracy {formatting.rate(twin.clean_accuracy)}"]
        if twin.plant is not None and twin.plant.attack_success is not None:
            facts.append(f"the trigger works on {formatting.rate(twin.plant.attack_success)}")
        if facts:
            typer.echo("The truth: " + "; ".join(facts) + "\n")
        with status() as progress:
            report = scan_twin(twin, images, seed=seed, progress=progress)
        pages[twin.name] = reports.write_reports(report, out / f"report-{twin.name}")["html"]
        show(report)
        typer.echo()
        right &= twin.as_expected(report)
    typer.echo(f"=== {'Both verdicts are right' if right else 'A verdict is not as expected'} ===\n")
    for name, page in pages.items():
        typer.echo(f"report on the {name} model: {page.resolve()}")
    if open_:
        typer.launch(pages["backdoored"].resolve().as_uri())
    raise typer.Exit(0 if right else 4)
