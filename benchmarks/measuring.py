"""What the measurements share: a command in a process of its own, and what a scan's report says of its cost.

Nothing here loads torch: a child process inherits the peak memory of the one that starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "scipy", "transformers", "onnx", "onnxruntime")
DOORWARD = str(Path(sys.executable).with_name("doorward"))


@dataclass(frozen=True)
class Run:
    """How a command ended and what it took.

    Attributes:
        seconds: from start to end.
        cpu_seconds: of all its threads, which other work on the machine changes little.
        peak_bytes: largest resident size.
        load: the machine's load average before and after, over one minute.
    """

    code: int
    output: str
    errors: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    load: tuple[float, float]


def run(command: Sequence[str], *, threads: int, limit: float = 3600.0) -> Run:
    """Run a command and measure it; it is ended after `limit` seconds."""
    # threads that wait sleep, as in the `doorward` command
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | own
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        return Run(
            code=process.returncode,
            output=output.read(),
            errors=errors.read(),
            seconds=round(seconds, 2),
            cpu_seconds=round(used.ru_utime + used.ru_stime, 2),
            peak_bytes=used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            load=(round(load, 2), round(os.getloadavg()[0], 2)),
        )


def must(done: Run, what: str) -> Run:
    """Return the run if the command succeeded.

    Raises:
        SystemExit: with what it wrote, if not.
    """
    if done.code:
        raise SystemExit(f"{what} ended with {done.code}:\n{done.output}\n{done.errors}")
    return done


def scan(arguments: Sequence[str], *, threads: int, limit: float = 3600.0) -> dict[str, Any]:
    """Run `doorward scan`, and return what it took and what its report says."""
    done = run([DOORWARD, "scan", *arguments, "--format", "json"], threads=threads, limit=limit)
    measured: dict[str, Any] = {
        "exit_code": done.code,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_bytes": done.peak_bytes,
        "load": done.load,
    }
    if done.code not in (0, 1, 3):
        return measured | {"error": done.errors.strip()[-500:]}
    return measured | summary(json.loads(done.output))


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a report what the measurements keep."""
    subject = report["subject"] or {}
    return {
        "verdict": report["verdict"],
        "targets": list(report["targets"]),
        "reason": report["reason"],
        "p_value": report["p_value"],
        "clean_accuracy": subject.get("clean_accuracy"),
        "scan_seconds": round(report["seconds"], 2),
        "gradients": sum(f["cost"]["gradients"] for f in report["findings"]),
        "forwards": sum(f["cost"]["forwards"] for f in report["findings"]),
        "findings": [
            {key: f[key] for key in ("detector", "verdict", "score", "reason", "cost")}
            | {"seconds": round(f["seconds"], 2)}
            for f in report["findings"]
        ],
        "not_run": report["not_run"],
    }


def begin(threads: int) -> dict[str, Any]:
    """Return what is written down before a measurement: what is measured, and on what machine."""
    return {
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "device": "cpu",
        "threads": threads,
    }


def revision() -> str:
    """Return the commit that is measured, with a mark if the package differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def parser(doc: str | None, *, threads: int = 2) -> argparse.ArgumentParser:
    """Return a parser of the option that all measurements have.

    Args:
        threads: that are used if none are given.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=threads, help="threads of each process")
    return made


def working_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that measurements have which make models and keep them."""
    made = parser(doc)
    made.add_argument("--work", type=Path, required=True, help="folder to keep models in")
    return made


def here(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options of a measurement that computes in this very process, and give torch its threads."""
    options = made.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    return options


def conclude(name: str, results: Mapping[str, Any], table: str, wrong: Iterable[str]) -> NoReturn:
    """Write results and their table to `results/`, print them, and end with 4 if anything is wrong."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)
    wrong = list(wrong)
    for line in wrong:
        print(f"not as it must be: {line}")
    raise SystemExit(4 if wrong else 0)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def percent(share: float) -> str:
    """Write a share; 0 and 100 % where it is exactly so.

    >>> percent(0.0), percent(0.99996), percent(0.5), percent(1.0)
    ('0 %', '> 99.9 %', '50.0 %', '100 %')
    """
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if share > 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def gigabytes(count: int) -> str:
    """Write a number of bytes.

    >>> gigabytes(1_540_000_000)
    '1.54 GB'
    """
    return f"{count / 1e9:.2f} GB"


def megabytes(count: int) -> str:
    """Write a number of bytes.

    >>> megabytes(4_827_115)
    '4.8 MB'
    """
    return f"{count / 1e6:.1f} MB"


def span(values: Sequence[float]) -> str:
    """Write the least and the largest of some numbers.

    >>> span([3.04, 2.0]), span([2.0, 2.04])
    ('2.0 to 3.0', '2.0')
    """
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"
