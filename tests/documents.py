"""Documents that are tests: a block after `<!-- test -->` runs as written."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from command_line import Outcome
from doorward.core.records import Report
from doorward.reports import from_json

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
        told = f"line {block.line}, {command[-1]!r}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == expected, told
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert not shown or doctest.OutputChecker().check_output(shown, done.stdout, flags), told
        outcomes.append(done)
    return outcomes


@dataclass(frozen=True)
class ReadmeRun:
    """What the README's commands left in a folder, and what each said."""

    folder: Path
    outcomes: dict[str, Outcome]

    def report(self, name: str) -> Report:
        """Return the demo's report on one of its two models, backdoored or clean."""
        place = self.folder / "doorward-demo" / f"report-{name}"
        return from_json((place / "report.json").read_text(encoding="utf-8"))


def run_readme(shared: Path) -> ReadmeRun:
    """Run the README's commands as written; its scans take minutes, so that many tests look at them.

    Args:
        shared: a folder that all test processes share. The first to ask runs, and the others wait for it.
    """
    place, said = shared / "readme", shared / "readme.json"
    with FileLock(f"{place}.lock"):
        if not said.exists():
            place.mkdir()
            blocks = marked_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
            try:
                done = [one for block in blocks for one in run_block(block, place)]
            except AssertionError as error:
                said.write_text(json.dumps({"failed": str(error)}), encoding="utf-8")
                raise
            heard = {one.args[-1]: asdict(Outcome(one.returncode, one.stdout, one.stderr)) for one in done}
            said.write_text(json.dumps(heard), encoding="utf-8")
    heard = json.loads(said.read_text(encoding="utf-8"))
    assert "failed" not in heard, heard["failed"]
    return ReadmeRun(place, {command: Outcome(**outcome) for command, outcome in heard.items()})
