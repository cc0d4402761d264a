"""The GitHub Action in `action.yml`: its scripts run as a runner runs them."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
INSTALL, SCAN = ACTION["runs"]["steps"]
#: How a runner starts `shell: bash`.
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail")


@dataclass(frozen=True)
class Step:
    """What a step left behind."""

    code: int
    said: str
    outputs: dict[str, str]
    summary: str


class RunsCode:
    """An object whose pickle would run a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("true",)


def run(step: dict[str, Any], folder: Path, **inputs: str) -> Step:
    """Run a step's script in a folder with the action's inputs, the defaults where none is given."""
    values = {name: str(given["default"]) for name, given in ACTION["inputs"].items()}
    values |= {name.replace("_", "-"): value for name, value in inputs.items()}
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    context = {f"inputs.{name}": value for name, value in values.items()}
    context |= {"github.action_path": str(ROOT)}
    stated = {
        name: re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda found: context[found[1]], text)
        for name, text in step["env"].items()
    }
    script = folder / "step.sh"
    script.write_text(step["run"])
    done = subprocess.run(
        [*BASH, script],
        cwd=folder,
        env=os.environ | stated | {n: str(f) for n, f in files.items()} | {"RUNNER_TEMP": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return Step(done.returncode, done.stdout + done.stderr, outputs, files["GITHUB_STEP_SUMMARY"].read_text())


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """Return a runner's folder, in which the first step's environment is this test's own."""
    programs = tmp_path / "doorward" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("doorward", " -m doorward")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        program.chmod(0o755)
    return tmp_path


def test_a_file_that_runs_code_fails_the_step(runner: Path) -> None:
    (runner / "my models").mkdir()
    (runner / "my models" / "weights.pt").write_bytes(pickle.dumps(RunsCode()))
    done = run(SCAN, runner, model="my models", files_only="true", out="re ports")
    assert done.code == 1, done.said
    expected = {"exit-code": "1", "verdict": "unsafe", "sarif": "re ports/report.sarif"}
    assert done.outputs == expected
    sarif = json.loads((runner / "re ports" / "report.sarif").read_text(encoding="utf-8"))
    assert sarif["runs"][0]["results"][0]["ruleId"] == "unsafe-code"
    lines = done.summary.splitlines()
    assert lines[:2] == ["### Doorward", ""]
    assert all(line.startswith("    ") for line in lines[2:])


def test_a_file_that_runs_none_passes(runner: Path) -> None:
    (runner / "weights.pt").write_bytes(pickle.dumps({"a": 1}))
    done = run(SCAN, runner, model="weights.pt", files_only="true")
    assert (done.code, done.outputs["verdict"]) == (0, "nothing_found"), done.said


def test_the_step_passes_where_nothing_shall_fail(runner: Path) -> None:
    (runner / "weights.pt").write_bytes(pickle.dumps(RunsCode()))
    done = run(SCAN, runner, model="weights.pt", files_only="true", fail_on="never")
    assert (done.code, done.outputs["verdict"]) == (0, "unsafe"), done.said


def test_more_words_reach_the_scan(runner: Path) -> None:
    (runner / "weights.pt").write_bytes(pickle.dumps({"a": 1}))
    done = run(SCAN, runner, model="weights.pt", files_only="true", args=" --format\n json  --strict-files ")
    assert (done.code, '"schema_version"' in done.said) == (0, True), done.said


def test_what_an_earlier_run_wrote_is_no_output(runner: Path) -> None:
    (runner / "doorward-report").mkdir()
    (runner / "doorward-report" / "report.json").write_text('{"verdict": "nothing_found"}')
    done = run(SCAN, runner, model="not-there.onnx")
    assert (done.code, done.outputs) == (2, {"exit-code": "2"}), done.said
    assert "not-there.onnx" in done.said


def test_no_input_is_written_into_a_script() -> None:
    """A value in a script would be run; in the environment it is text."""
    assert all("${{" not in step["run"] for step in ACTION["runs"]["steps"])
    used = {name for step in ACTION["runs"]["steps"] for name in re.findall(r"inputs\.([\w-]+)", str(step))}
    assert used == set(ACTION["inputs"])


def test_a_value_is_text_to_the_shell(runner: Path) -> None:
    done = run(SCAN, runner, model="$(touch broken)", out="`touch broken`", args="; touch broken")
    assert done.code == 2
    assert not (runner / "broken").exists()


def test_the_first_step_installs_this_repository_with_extras(tmp_path: Path) -> None:
    said = tmp_path / "said"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{said}"\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    python.chmod(0o755)
    done = run(INSTALL, tmp_path, python=str(python), extras="onnx", torch_index="INDEX")
    assert done.code == 0, done.said
    words = said.read_text().splitlines()
    assert words[:3] == ["-m", "venv", str(tmp_path / "doorward")]
    assert words[-3:] == ["--extra-index-url", "INDEX", f"{ROOT}[onnx]"]
    assert Path(words[words.index("--constraint") + 1]).is_file()


def test_the_example_workflows_give_inputs_that_there_are() -> None:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    workflows = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    steps = [
        step
        for one in workflows
        for job in one.get("jobs", {}).values()
        for step in job["steps"]
        if "doorward" in step.get("uses", "")
    ]
    assert steps
    for step in steps:
        assert set(step["with"]) <= set(ACTION["inputs"])
