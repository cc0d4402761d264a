"""Documents that are tests: a block after `<!-- test -->` runs as written."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from filelock import FileLock

from command_line import Outcome, call
from doorward.bench import demo
from doorward.core.records import Report
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.reports import from_json
from doorward.scan.request import ScanRequest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Block:
    """One marked code block: its language, its text, and the exit code its last command shall have."""

    language: str
    code: str
    exit_code: int
    line: int


MARKED = re.compile(
    r"^<!-- test(?:: exit (?P<exit>\d+))? -->\n+```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def marked_blocks(text: str) -> list[Block]:
    """Return the blocks of a Markdown text that are to be run."""
    blocks = [
        Block(m["language"], m["code"], int(m["exit"] or 0), text.count("\n", 0, m.start("code")) + 1)
        for m in MARKED.finditer(text)
    ]
    assert len(blocks) == text.count("<!-- test"), "a mark stands right above a console or python block"
    return blocks


def shell_steps(code: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the output that is shown for it."""
    steps: list[tuple[str, str]] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], ""))
        elif steps and steps[-1][0].endswith("\\"):
            steps[-1] = (f"{steps[-1][0]}\n{line}", "")
        elif steps:
            steps[-1] = (steps[-1][0], f"{steps[-1][1]}{line}\n")
    return steps


def run_block(block: Block, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run one block in a folder as a user would, compare exit code and shown output; return what it said.

    In shown output `...` stands for anything, and runs of blanks are alike.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
    }
    if block.language == "python":
        steps = [([sys.executable, "-c", block.code], "")]
    else:
        assert block.language == "console", f"line {block.line}: only console and python blocks can be run"
        steps = [(["bash", "-c", command], shown) for command, shown in shell_steps(block.code)]
    assert steps, f"line {block.line}: a console block shows its commands after '$ '"
    outcomes = []
    for number, (command, shown) in enumerate(steps, start=1):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        expected = block.exit_code if number == len(steps) else 0
        check_outcome(
            f"line {block.line}, {command[-1]!r}",
            Outcome(done.returncode, done.stdout, done.stderr),
            expected,
            shown,
        )
        outcomes.append(done)
    return outcomes


def check_outcome(what: str, done: Outcome, exit_code: int, shown: str) -> None:
    """Assert that a command ended with an exit code, and printed what is shown for it, if anything is."""
    told = f"{what}: exit {done.code}\n{done.out}\n{done.err}"
    assert done.code == exit_code, told
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert not shown or doctest.OutputChecker().check_output(shown, done.out, flags), told


@dataclass(frozen=True)
class ReadmeRun:
    """What the README's commands left in a folder, and what each said."""

    folder: Path
    outcomes: dict[str, Outcome]

    def report(self, name: str) -> Report:
        """Return the demo's report on one of its two models, backdoored or clean."""
        place = self.folder / "doorward-demo" / f"report-{name}"
        return from_json((place / "report.json").read_text(encoding="utf-8"))


#: The detector that scans the mended model of the README's demo here: the quickest of those that recover its
#: trigger. `.ci/run` runs the demo as users do, with all of them.
RESCANS = "neural-cleanse"


def run_readme(shared: Path) -> ReadmeRun:
    """Run the README's commands, whose scans take minutes, so that many tests look at what they leave.

    The demo scans the same model by the same request as the command that follows it. So the demo runs in
    this process, and where it comes to that scan, the other command runs as written and its report is taken.

    Args:
        shared: a folder that all test processes share. The first to ask runs, and the others wait for it.
    """
    place, said = shared / "readme", shared / "readme.json"
    with FileLock(f"{place}.lock"):
        if not said.exists():
            place.mkdir()
            try:
                heard = _run_demo_and_scan(place)
            except AssertionError as error:
                said.write_text(json.dumps({"failed": str(error)}), encoding="utf-8")
                raise
            told = {command: asdict(outcome) for command, outcome in heard.items()}
            said.write_text(json.dumps(told), encoding="utf-8")
    heard = json.loads(said.read_text(encoding="utf-8"))
    assert "failed" not in heard, heard["failed"]
    return ReadmeRun(place, {command: Outcome(**outcome) for command, outcome in heard.items()})


def _run_demo_and_scan(place: Path) -> dict[str, Outcome]:
    """Return what the README's commands said, by command: the demo, and what follows it."""
    first, *others = marked_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    ((command, shown),) = shell_steps(first.code)
    program, *words = shlex.split(command)
    assert (program, words[0]) == ("doorward", "demo"), "the README begins with its demo"
    done: list[subprocess.CompletedProcess[str]] = []
    scan_in_full = demo.scan

    def scan(request: ScanRequest, **more: Any) -> Report:
        if request.model != "doorward-demo/backdoored":
            return scan_in_full(request, **more)
        done.extend(one for block in others for one in run_block(block, place))
        report = from_json((place / "my-report" / "report.json").read_text(encoding="utf-8"))
        assert replace(ScanRequest.from_json(report.request), folder=None) == request, "it is the same scan"
        return report

    def rescanning(_: Report) -> tuple[Detector, ...]:
        return (registry.build("detector", RESCANS, {}),)

    with mock.patch.object(demo, "scan", scan), mock.patch.object(demo, "_alarming", rescanning):
        outcome = call(*words, folder=place)
    check_outcome(f"line {first.line}, {command!r}", outcome, first.exit_code, shown)
    assert done, "the demo has scanned its backdoored model"
    said = {one.args[-1]: Outcome(one.returncode, one.stdout, one.stderr) for one in done}
    return {command: outcome} | said
