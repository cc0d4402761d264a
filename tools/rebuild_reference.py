"""Make what comes with the package: `python tools/rebuild_reference.py DATA`.

DATA is Fashion-MNIST with both splits: `zalando-datasets/fashion_mnist` on the Hugging Face hub, or a folder
of its parquet files. On one machine with one number of threads the same files come out each time. What the
models reach on the whole test split is in their `config.json` and `plant.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from doorward.attacks.ground_truth import attack_success, write_plant
from doorward.bundled import FOLDER
from doorward.data import Samples, open_samples
from doorward.data.parquet import write_parquet
from doorward.methods.registry import build
from doorward.models.formats.native import save_native
from doorward.training import Trained, default_settings, train_classifier

SEED = 0
#: Images in the package, by split; all classes alike.
SHARES = {"train": 6_000, "test": 1_000}
ARCHITECTURE = "small-cnn"
POISON_RATE = 0.02


def rebuild(data: str, out: Path) -> None:
    """Write the sub-sample and both models below a folder."""
    splits = {split: open_samples(data, split=split) for split in SHARES}
    for split, share in SHARES.items():
        (out / "fashion_mnist" / f"{split}.parquet").unlink(missing_ok=True)
        drawn = splits[split].draw(share, np.random.default_rng(SEED))
        write_parquet(drawn, out / "fashion_mnist", split=split)
    poisoned = build("attack", "badnets", {"poison_rate": POISON_RATE})(splits["train"], seed=SEED)
    fit(splits["train"], splits["test"], out / "models/clean")
    trained = fit(poisoned.samples, splits["test"], out / "models/backdoored")
    measured = {
        "clean_accuracy": trained.record.test_accuracy,
        "attack_success": attack_success(trained.classifier, splits["test"], poisoned.plant),
    }
    write_plant(poisoned.plant.model_copy(update=measured), out / "models/backdoored/plant.json")


def fit(samples: Samples, test: Samples, directory: Path) -> Trained:
    """Train one model on the whole set and write it; in float32, so that processors differ little."""
    settings = default_settings(ARCHITECTURE, images=len(samples), side=28).model_copy(
        update={"epochs": 5, "augment": "shift", "precision": "float32"}
    )
    trained = train_classifier(ARCHITECTURE, samples, seed=SEED, settings=settings, test=test)
    save_native(
        trained.classifier.module,
        architecture=ARCHITECTURE,
        spec=trained.classifier.spec,
        classes=samples.classes,
        directory=directory,
        extra={"seed": SEED, "training": trained.record.model_dump(mode="json", exclude={"seconds"})},
    )
    return trained


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="Fashion-MNIST: a folder, a file, or a name on the hub")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to write, if not into the package")
    arguments = parser.parse_args()
    rebuild(arguments.data, arguments.out)
