"""`doorward demo`: plant a backdoor, train, scan; next to it a clean twin."""

from __future__ import annotations

from pathlib import Path

import typer

from doorward.cli.options import status


def demo(
    fast: bool = typer.Option(False, help="Scan the two models that come with the package; train nothing."),
    open_: bool = typer.Option(False, "--open", help="Open the HTML report in a browser."),
    out: Path = typer.Option(Path("doorward-demo"), metavar="DIR", help="Where models and reports go."),
    seed: int = typer.Option(0, min=0, help="Seed of everything random."),
) -> None:
    """Plant a backdoor in a small model, scan it and a clean twin, show both verdicts.

    Exit code: 0 when both verdicts are as expected, else 4.
    """
    from rich.console import Console

    from doorward import reports
    from doorward.demo import clean_images, ready_made, scan_twin, train_twins
    from doorward.reports import wording

    console = Console()
    with status() as progress:
        twins = ready_made(out) if fast else train_twins(out, seed=seed, progress=progress)
    images, right, pages = clean_images(out), True, {}
    for twin in twins:
        facts = [] if twin.clean_accuracy is None else [f"accuracy {wording.rate(twin.clean_accuracy)}"]
        if twin.plant is not None and twin.plant.attack_success is not None:
            facts.append(f"the trigger works on {wording.rate(twin.plant.attack_success)}")
        console.rule(f"[bold]The {twin.name} model[/bold]")
        console.print("; ".join(facts), highlight=False)
        with status() as progress:
            report = scan_twin(twin, images, seed=seed, progress=progress)
        pages[twin.name] = reports.write_reports(report, out / f"report-{twin.name}")["html"]
        reports.render(report, console)
        right &= twin.as_expected(report)
    console.rule(
        "[bold]Both verdicts are right[/bold]" if right else "[bold]A verdict is not as expected[/bold]"
    )
    for name, page in pages.items():
        typer.echo(f"report on the {name} model: {page.resolve()}")
    if open_:
        typer.launch(str(pages["backdoored"]))
    raise typer.Exit(0 if right else 4)
