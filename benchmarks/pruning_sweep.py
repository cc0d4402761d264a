"""Measure how fast the accuracy of every level of pruning is known, next to running the network for each.

    python benchmarks/pruning_sweep.py --threads 1

makes networks of each architecture, which are not trained (that changes no time), and generated images, and
prunes the units of the last convolution one after the other, the most dormant first: once from the cached
activations in front of the layer that reads them (`repairs/_units.py`), and once by running the whole network
with so many units at zero. Times are processor seconds, the least of some runs, since other work on the
machine only adds to them. The network takes as long at every level: it is run at every fourth, where the
curves are compared, and the least time counts for all levels.

Ends with 4 if the two curves differ, or the sweep is not at least 20 times as fast.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

import measuring
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, Samples
from doorward.models import InputSpec, TorchClassifier
from doorward.models.architectures import build
from doorward.repairs._units import find_units, mean_activations, silenced, sweep
from doorward.training import evaluate

#: Networks, with the channels and the side of their images.
NETWORKS = (("small-cnn", 1, 28), ("resnet-8", 3, 32))
CLASSES, IMAGES, LEAST, RUNS, EVERY = 10, 250, 20.0, 3, 4
T = TypeVar("T")


def generated(channels: int, side: int) -> Samples:
    """Return noise images, lighter where the number of the class is high."""
    rng, labels = np.random.default_rng(0), np.arange(IMAGES) % CLASSES
    images = rng.integers(0, 100, (IMAGES, side, side, channels)) + 12 * labels[:, None, None, None]
    return InMemorySamples(images.astype(np.uint8), labels)


def timed(work: Callable[[], T], *, runs: int) -> tuple[T, float]:
    """Return what some work gives, and the least processor seconds of some runs."""
    seconds = []
    for _ in range(runs):
        begun = time.process_time()
        given = work()
        seconds.append(time.process_time() - begun)
    return given, min(seconds)


def measure(architecture: str, channels: int, side: int) -> dict[str, Any]:
    """Return the curve and the seconds of both ways, for one network."""
    spec = InputSpec(channels=channels, height=side, width=side)
    module = build(
        architecture, channels=channels, height=side, width=side, classes=CLASSES, generator=make_generator(1)
    )
    classifier = TorchClassifier(module.eval(), spec, tuple(map(str, range(CLASSES))))
    samples, units = generated(channels, side), find_units(classifier)
    order = mean_activations(classifier, units, samples).argsort(stable=True)

    def at(level: int) -> int:
        with silenced(classifier.module, units, order[:level]):
            return evaluate(classifier, samples, batch_size=IMAGES).successes

    swept, fast = timed(lambda: sweep(classifier, units, order, samples), runs=RUNS)
    run = {level: timed(partial(at, level), runs=1) for level in range(0, len(units), EVERY)}
    slow = len(units) * min(seconds for _, seconds in run.values())
    return {
        "network": architecture,
        "side": side,
        "units": len(units),
        "images": len(samples),
        "levels": len(swept.correct),
        "sweep_seconds": round(fast, 4),
        "network_seconds": round(slow, 3),
        "times": round(slow / fast, 1),
        "same_curve": all(swept.correct[level] == right for level, (right, _) in run.items()),
    }


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for row in results["networks"]:
        if not row["same_curve"]:
            yield f"{row['network']}: the curves differ"
        if row["times"] < LEAST:
            yield f"{row['network']}: {row['times']} times as fast, and at least {LEAST:.0f} are wanted"


def render(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, a line a network."""
    heads = ["network", "units", "images", "every level from cached features (s)"]
    heads += ["the network at every level (s)", "times as fast", "same curve"]
    rows = [
        [
            f"{row['network']}, {row['side']} pixels",
            str(row["units"]),
            str(row["images"]),
            f"{row['sweep_seconds']:.3f}",
            f"{row['network_seconds']:.2f}",
            f"{row['times']:.0f}",
            "yes" if row["same_curve"] else "no",
        ]
        for row in results["networks"]
    ]
    return measuring.markdown(heads, rows)


def main() -> None:
    """Measure, and write what came out."""
    options = measuring.here(measuring.parser(__doc__, threads=1))
    results: dict[str, Any] = measuring.begin(options.threads) | {"networks": []}
    for network in NETWORKS:
        results["networks"].append(measure(*network))
        print(results["networks"][-1], file=sys.stderr, flush=True)
    measuring.conclude("pruning-sweep", results, render(results), failures(results))


if __name__ == "__main__":
    main()
