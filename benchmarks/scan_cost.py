"""Measure what a scan of a small model takes: wall and CPU time, peak memory, gradients.

    python benchmarks/scan_cost.py --work FOLDER

scans the two models that come with the package (10 classes, 28x28), and ResNet-8 and ResNet-14 trained on
GTSRB (43 classes, 32x32; DOORWARD_DATA names the data), each twice by `doorward scan` in its own process.

Ends with 4 if a scan takes more time or memory than it may, or if two scans of one model differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
from trained import Case, data_folder, train

REPEATS = 2
PACKAGE = measuring.ROOT / "src" / "doorward" / "bundled"
SIGNS = (
    Case(data="gtsrb", architecture="resnet-8", seed=14),
    Case(data="gtsrb", architecture="resnet-14", seed=14),
)


@dataclass(frozen=True)
class Subject:
    """One model to scan, and what that may take: seconds, and bytes where there is a limit."""

    name: str
    model: Path
    clean: str
    most_seconds: float
    most_bytes: float | None = None


def subjects(work: Path, *, threads: int) -> Iterator[Subject]:
    """Yield the models, trained if they are not there."""
    for name in ("backdoored", "clean"):
        clean = f"{PACKAGE / 'fashion_mnist'}:test"
        yield Subject(f"small-cnn, {name}", PACKAGE / "models" / name, clean, 20.0, 1.5e9)
    for case in SIGNS:
        model = train(case, work, backdoored=False, threads=threads)
        yield Subject(f"{case.architecture}, GTSRB", model, f"{data_folder() / case.data}:test", 90.0)


def measure(subject: Subject, *, threads: int) -> dict[str, Any]:
    """Scan a model some times."""
    runs = [
        measuring.scan([str(subject.model), f"--clean={subject.clean}"], threads=threads)
        for _ in range(REPEATS)
    ]
    return {
        "model": subject.name,
        "most_seconds": subject.most_seconds,
        "most_bytes": subject.most_bytes,
        "runs": runs,
    }


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for row in results["models"]:
        said = []
        for run in row["runs"]:
            if "verdict" not in run:
                yield f"{row['model']}: no verdict: {run['error']}"
                continue
            said.append((run["verdict"], run["targets"], [f["score"] for f in run["findings"]]))
            if run["seconds"] > row["most_seconds"]:
                yield f"{row['model']}: took {run['seconds']:.0f} s, at a load of {run['load'][0]:.1f}"
            if row["most_bytes"] is not None and run["peak_bytes"] > row["most_bytes"]:
                yield f"{row['model']}: took {measuring.gigabytes(run['peak_bytes'])}"
        if any(one != said[0] for one in said):
            yield f"{row['model']}: two scans differ: {said}"


def render(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, a line a model."""
    heads = ["model", "verdict", "wall time (s)", "may take (s)", "CPU time (s)", "peak memory"]
    heads += ["input gradients", "forwards", "load average before"]
    rows = []
    for row in results["models"]:
        runs = row["runs"]
        rows.append(
            [
                row["model"],
                ", ".join(sorted({run.get("verdict", "failed").replace("_", " ") for run in runs})),
                measuring.span([run["seconds"] for run in runs]),
                f"{row['most_seconds']:.0f}",
                measuring.span([run["cpu_seconds"] for run in runs]),
                measuring.gigabytes(max(run["peak_bytes"] for run in runs)),
                f"{max(run.get('gradients', 0) for run in runs):,}",
                f"{max(run.get('forwards', 0) for run in runs):,}",
                measuring.span([run["load"][0] for run in runs]),
            ]
        )
    return measuring.markdown(heads, rows)


def main() -> None:
    """Scan, and write what came out."""
    options = measuring.working_parser(__doc__).parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = measuring.begin(options.threads) | {
        "models": [],
    }
    for subject in subjects(work, threads=options.threads):
        results["models"].append(measure(subject, threads=options.threads))
        print(
            render(results | {"models": results["models"][-1:]}).splitlines()[-1], file=sys.stderr, flush=True
        )
    measuring.conclude("scan_cost", results, render(results), failures(results))


if __name__ == "__main__":
    main()
