"""The report for a terminal or a text file: the verdict first, then why, then what to do."""

from __future__ import annotations

import io

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from doorward.core.formatting import plain, sentence
from doorward.core.records import Finding, Report, Verdict
from doorward.reports import next_steps, phrases

_STYLES: dict[Verdict, str] = {
    "unsafe": "bold red",
    "backdoored": "bold red",
    "suspicious": "bold yellow",
    "could_not_tell": "bold magenta",
    "nothing_found": "bold cyan",  # not green: it does not mean safe
}
#: Below this width, labels stand above their values.
NARROW = 64
#: Of a longer text among the evidence, only these lines are shown.
SHOWN_LINES = 12


def to_text(report: Report, *, width: int = 100) -> str:
    """Write a report as text without colour."""
    stream = io.StringIO()
    render(
        report, Console(file=stream, width=width, color_system=None, force_terminal=False, highlight=False)
    )
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def render(report: Report, console: Console) -> None:
    """Print a report; colours appear where the console is a terminal that has them."""
    narrow = console.width < NARROW
    _verdict(report, console, narrow)
    if report.findings:
        _heading("Detectors", console)
        for finding in phrases.by_severity(report.findings):
            _finding(report, finding, console)
    if report.not_run:
        _heading("Did not run", console)
        _pairs(phrases.by_reason(report.not_run), console, narrow)
    _heading("What was tested", console)
    _pairs(phrases.tested(report), console, narrow)
    if rows := phrases.control_rows(report):
        _heading("What this scan would have found", console)
        if report.positive_control.controls:
            _indented(phrases.CONTROL, console)
        _pairs(rows, console, narrow)
        if report.positive_control.limits:
            _indented(f"Limits: {plain(report.positive_control.limits)}", console)
    _heading("What to do next", console)
    for i, step in enumerate(next_steps.next_steps(report), 1):
        _pairs([(f"{i}.", step.text)], console, narrow=False)
        if step.command:
            # in one line whatever the width, so that it can be copied
            console.print(
                Text(f"      {step.command}", style="cyan"), no_wrap=True, overflow="ignore", crop=False
            )
    _heading("What this verdict does not mean", console)
    for caveat in phrases.caveats(report):
        _indented(caveat, console)
    console.print()
    console.print(Text(phrases.spent(report), style="dim"))


def _verdict(report: Report, console: Console, narrow: bool) -> None:
    title = Text(phrases.TITLES[report.verdict].upper(), style=_STYLES[report.verdict])
    if report.subject:
        title.append(f"  {plain(report.subject.path)}", style="default not bold")
    console.print(title)
    console.print(Text(phrases.explanation(report)))
    for warning in report.warnings:
        console.print(Text(f"Note: {sentence(plain(warning))}", style="yellow"))
    if facts := phrases.facts(report):
        console.print()
        pairs = [
            (fact.label, f"{fact.value}: {fact.detail}" if fact.detail else fact.value) for fact in facts
        ]
        _pairs(pairs, console, narrow)


def _finding(report: Report, finding: Finding, console: Console) -> None:
    head = Text(plain(finding.detector), style="bold")
    head.append(": ", style="not bold")
    head.append(phrases.TITLES[finding.verdict].lower(), style=_STYLES[finding.verdict])
    console.print(Padding(head, (0, 0, 0, 2)))
    for line in phrases.finding_lines(report, finding):
        _indented(line, console, 4)
    for evidence in finding.evidence:
        if evidence.type == "text":
            _indented(f"{plain(evidence.title)}:", console, 4)
            lines = plain(evidence.text, lines=True).splitlines()
            _indented("\n".join(lines[:SHOWN_LINES]), console, 6)
            if len(lines) > SHOWN_LINES:
                _indented(f"({len(lines) - SHOWN_LINES} more lines in report.json)", console, 6)


def _heading(title: str, console: Console) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _indented(text: str, console: Console, spaces: int = 2) -> None:
    console.print(Padding(Text(text), (0, 0, 0, spaces)))


def _pairs(pairs: list[tuple[str, str]], console: Console, narrow: bool) -> None:
    if narrow:
        for label, value in pairs:
            console.print(Padding(Text(label, style="dim"), (0, 0, 0, 2)))
            _indented(value, console, 4)
        return
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(max_width=30, overflow="fold", style="dim")
    grid.add_column()
    for label, value in pairs:
        grid.add_row(Text(label), Text(value, overflow="fold"))
    console.print(Padding(grid, (0, 0, 0, 2)))
