"""Measure how often STRIP runs a model for each input, by when it exits.

    python benchmarks/strip_forwards.py

On the embedded backdoored model: STRIP is fitted to clean test images, and judges clean training images and
triggered ones at 1 % false rejections. The filter is fitted once; the exits differ alone.

Ends with 4 if a certain exit changes a decision, or a calibrated one runs the model more than five times for
each clean input, rejects more clean inputs, or accepts more than one in 200 triggered ones that are rejected
without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import measuring

CLEAN, TRIGGERED, RATE = 2000, 1000, 0.01
EXITS = ("off", "certain", "calibrated")


def measure() -> dict[str, Any]:
    """Return what each exit costs and decides."""
    from doorward import bundled, open_classifier
    from doorward.attacks.ground_truth import read_plant, triggered
    from doorward.detectors.inputs.strip import Strip
    from doorward.guard.guard import Guard
    from doorward.models.encode.image import to_tensor

    folder = bundled.model("backdoored")
    classifier, known, other = (
        open_classifier(folder),
        bundled.fashion_mnist("test"),
        bundled.fashion_mnist("train"),
    )
    guard = Guard.fit(classifier, known, filters=[Strip()], rate=RATE)
    clean = to_tensor(other.select(range(min(CLEAN, len(other)))), classifier.spec)
    bad = triggered(other, read_plant(folder / "plant.json"))
    bad_ones = to_tensor(bad.select(range(min(TRIGGERED, len(bad)))), classifier.spec)

    def judged(inputs: Any, exit_: Any) -> tuple[float, int]:
        """Return the forwards for each input, less the one that answers it, and how many are rejected."""
        fitted = replace(guard.fitted, filters=(Strip(early_exit=exit_),))
        before = classifier.cost.forwards
        answers = replace(guard, fitted=fitted)(inputs)
        return (classifier.cost.forwards - before) / len(inputs) - 1, int((~answers.accepted).sum())

    exits = {}
    for one in EXITS:
        (forwards, rejected), (its, caught) = judged(clean, one), judged(bad_ones, one)
        exits[one] = {
            "forwards": round(forwards, 2),
            "forwards of triggered": round(its, 2),
            "clean rejected": rejected,
            "triggered rejected": caught,
        }
    counts = {"fitted to": len(known), "clean": len(clean), "triggered": len(bad_ones), "rate": RATE}
    return counts | {"exits": exits}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        [
            name,
            f"{row['forwards']:.1f}",
            f"{row['forwards of triggered']:.1f}",
            measuring.percent(row["clean rejected"] / results["clean"]),
            measuring.percent(row["triggered rejected"] / results["triggered"]),
        ]
        for name, row in results["exits"].items()
    ]
    heads = ["early exit", "forwards for a clean input", "for a triggered one", "clean rejected"]
    return measuring.markdown([*heads, "triggered rejected"], rows)


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Return what is not as it must be."""
    off, certain, calibrated = (results["exits"][name] for name in EXITS)
    if any(certain[what] != off[what] for what in ("clean rejected", "triggered rejected")):
        yield "certain: decides otherwise than all replicas"
    if calibrated["forwards"] > 5:
        yield f"calibrated: {calibrated['forwards']} forwards for a clean input"
    if calibrated["clean rejected"] > off["clean rejected"]:
        yield "calibrated: rejects more clean inputs"
    if calibrated["triggered rejected"] < 0.995 * off["triggered rejected"]:
        yield "calibrated: rejects fewer triggered inputs"


def main() -> None:
    """Measure and write it down."""
    given = measuring.here(measuring.parser(__doc__, threads=1))
    results = measuring.begin(given.threads) | measure()
    measuring.conclude("strip-forwards", results, table(results), failures(results))


if __name__ == "__main__":
    main()
