"""Measure what activation clustering costs next to the forward pass, in processor seconds and memory.

    python benchmarks/training_data_speed.py --rows 60000 --features 128

sends generated images of 28x28 pixels through a small network, keeps the penultimate activations of all, and
splits each of ten classes in two: components, clusters, relative size, silhouette. The network is not
trained, which changes no time. `--pixels 8 --rows 1000000 --features 512` is the test of memory: images and
their features are made batch by batch, and only the features are kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from doorward.core.budget import Deadline
from doorward.core.seeds import make_generator
from doorward.data.samples import Provenance, Samples
from doorward.detectors.training_data._learned import run
from doorward.models import InputSpec, TorchClassifier
from doorward.models.architectures import build
from doorward.stats.clustering import split_groups

CLASSES = 10
RESULTS = Path(__file__).parent / "results" / "training-data-speed.json"


class Generated(Samples):
    """Noise images, made when they are asked for: light ones where the class is high."""

    def __init__(self, rows: int, side: int) -> None:
        self._rows, self._side = rows, side
        self.modality = "image"
        self.classes = tuple(map(str, range(CLASSES)))
        self.labels = np.arange(rows) % CLASSES
        self.provenance = Provenance("<generated>", None, rows)

    def __len__(self) -> int:
        return self._rows

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Return some images; the same rows give the same images."""
        rows = np.asarray(indices, dtype=np.int64)
        rng = np.random.default_rng(int(rows[0]) if len(rows) else 0)
        x = rng.integers(0, 100, (len(rows), self._side, self._side, 1), dtype=np.uint8)
        return list(x + (12 * (rows % CLASSES)).astype(np.uint8)[:, None, None, None])


class Wide(nn.Module):
    """A network of one hidden layer of so many features."""

    def __init__(self, pixels: int, features: int) -> None:
        super().__init__()
        self.hidden, self.linear = nn.Linear(pixels, features), nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k)."""
        y: Tensor = self.linear(self.hidden(x.flatten(1)).relu())
        return y


def classifier_of(side: int, features: int) -> TorchClassifier:
    """Return an untrained classifier with so many features: our own network where it has them."""
    spec = InputSpec(channels=1, height=side, width=side)
    own = side >= 16 and features == 128
    network = (
        build("small-cnn", channels=1, height=side, width=side, classes=CLASSES)
        if own
        else Wide(side * side, features)
    )
    return TorchClassifier(network.eval(), spec, tuple(map(str, range(CLASSES))))


def measure(rows: int, side: int, features: int) -> dict[str, Any]:
    """Return processor seconds of the forward pass and of everything after it, and the peak memory."""
    samples, classifier = Generated(rows, side), classifier_of(side, features)
    begun = time.process_time()
    seen = run(classifier, samples, Deadline())
    forward = time.process_time() - begun
    groups = [np.flatnonzero(seen.labels == c) for c in range(CLASSES)]
    begun = time.process_time()
    splits = split_groups(seen.features, groups, dimensions=10, generator=make_generator(0, "speed"))
    clustering = time.process_time() - begun
    return {
        "rows": rows,
        "features": int(seen.features.shape[1]),
        "kept as": str(seen.features.dtype).removeprefix("torch."),
        "forward_seconds": round(forward, 2),
        "clustering_seconds": round(clustering, 2),
        "classes_split": len(splits),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure once and add the result to those that are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=28, help="side of the images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = measure(options.rows, options.pixels, options.features)
    held = json.loads(options.results.read_text(encoding="utf-8")) if options.results.is_file() else []
    others = [one for one in held if (one["rows"], one["features"]) != (found["rows"], found["features"])]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps([*others, found], indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
