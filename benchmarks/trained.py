"""Train models on real data, clean and poisoned, with `doorward plant` and `doorward train`; keep them.

Models that are there already are not trained again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import DOORWARD, must, run

#: Most training images of one model.
IMAGES = 20_000
ASR = 0.95


@dataclass(frozen=True, kw_only=True)
class Case:
    """Which model: data set, architecture, seed, and settings of BadNets for the backdoored twin."""

    data: str
    architecture: str
    seed: int
    badnets: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.architecture}"


CASES = (
    Case(
        data="mnist",
        architecture="small-cnn",
        seed=11,
        badnets={"target": 3, "place": "top-left", "colour": "white", "poison_rate": 0.02},
    ),
    Case(
        data="fashion_mnist",
        architecture="small-cnn",
        seed=12,
        badnets={"target": 7, "place": "bottom-right", "colour": "checker", "poison_rate": 0.03},
    ),
    Case(
        data="fashion_mnist",
        architecture="resnet-8",
        seed=13,
        badnets={"target": 2, "place": "bottom-left", "colour": "white", "poison_rate": 0.02},
    ),
    Case(
        data="gtsrb",
        architecture="resnet-8",
        seed=14,
        badnets={"target": 14, "place": [20, 6], "colour": [255, 255, 0], "poison_rate": 0.03},
    ),
)


def data_folder() -> Path:
    """Return the folder of data sets that DOORWARD_DATA names.

    Raises:
        SystemExit: if it names none.
    """
    folder = Path(os.environ.get("DOORWARD_DATA", ""))
    if not (folder / "fashion_mnist").is_dir():
        raise SystemExit("DOORWARD_DATA must name a folder with mnist, fashion_mnist and gtsrb in parquet")
    return folder.resolve()


def train(case: Case, work: Path, *, backdoored: bool, threads: int) -> Path:
    """Return a model's folder: a Doorward directory with `model.onnx`, `model.pt2` and `plant.json`."""
    source = data_folder() / case.data
    out = work / f"{case.name}-{'backdoored' if backdoored else 'clean'}"
    if (out / "done").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    data = source
    if backdoored:
        data = work / f"{case.name}-data"
        settings = [f"--set={key}={json.dumps(value)}" for key, value in case.badnets.items()]
        words = [DOORWARD, "plant", "badnets", f"{source}:train", str(data), "--force"]
        print(
            must(run([*words, *settings, f"--seed={case.seed}"], threads=threads), "plant").output,
            file=sys.stderr,
        )
    words = [DOORWARD, "train", f"{data}:train", str(out), f"--test={source}:test", f"--limit={IMAGES}"]
    words += [f"--architecture={case.architecture}", f"--seed={case.seed}", "--format=onnx", "--format=pt2"]
    print(must(run(words, threads=threads), "train").output, file=sys.stderr)
    if backdoored:
        shutil.rmtree(data)
    (out / "done").touch()
    return out
