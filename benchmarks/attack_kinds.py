"""Compare three kinds of attack on one kind of model: availability poisoning, evasion, and backdoors.

    python benchmarks/attack_kinds.py

Small networks are trained on part of Fashion-MNIST, clean and poisoned; the seven evasion attacks of the
Adversarial Robustness Toolbox are run on the clean one, and what changes a trained model is planted in it.
For each is measured when it happens, what it costs once and for each input, accuracy on clean images in all
and by class, how often it succeeds, how often the change of one image does so when it is added to others as
it is, and how large it is. DOORWARD_DATA names the folder of data.

An attack succeeds on an image when the model's answer is another than without it (evasion), or the target
(backdoors, on images of other classes). Sizes are means over the images on which it succeeds. Seconds are of
the processor, on one thread. Ends with 4 if a signature is larger than 1/255 anywhere, an attack that was
planted by changing the model does not always succeed, or clean images are answered otherwise by it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import metadata
from statistics import mean
from typing import TYPE_CHECKING, Any

import measuring
from trained import data_folder

if TYPE_CHECKING:
    from torch import Tensor

    from doorward.attacks.ground_truth import PlantedBackdoor
    from doorward.data import Samples
    from doorward.models import Classifier

DATA, ARCHITECTURE, ROWS, EPOCHS, SEEDS = "fashion_mnist", "small-cnn", 6_000, 5, (0, 1)
#: Test images that accuracy is measured on, that changes of others are tried on, and changes that are tried.
TESTED, OTHERS, CHANGES = 2000, 200, 10
TARGET = 3
#: Attacks on the training data: name, attack and settings.
POISONS: dict[str, tuple[str, dict[str, Any]]] = {
    "label-flipping, 40 % of all labels": ("label-flipping", {"poison_rate": 0.4}),
    "label-flipping, 90 % of one class": (
        "label-flipping",
        {"poison_rate": 0.09, "source_classes": (6,), "target": 0},
    ),
    "badnets": ("badnets", {"poison_rate": 0.05, "target": TARGET}),
    "blended": ("blended", {"poison_rate": 0.05, "target": TARGET}),
}
TITLES = {
    "fgsm": "FGSM",
    "bim": "BIM",
    "deepfool": "DeepFool",
    "cw2": "CW2",
    "cwinf": "CWinf",
    "cw0": "CW0",
    "jsma": "JSMA",
}
IMPLANTS = ("trojannet", "signature")
#: Evasion attacks: how many images, and settings.
EVASIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "fgsm": (200, {"eps": 8 / 255}),
    "bim": (200, {"eps": 8 / 255, "eps_step": 2 / 255, "max_iter": 10}),
    "deepfool": (30, {"epsilon": 0.02}),
    "cw2": (15, {"max_iter": 20, "binary_search_steps": 6, "initial_const": 1.0, "learning_rate": 0.1}),
    "cwinf": (8, {"max_iter": 60, "initial_const": 0.1, "const_factor": 10.0, "learning_rate": 0.01}),
    "cw0": (
        3,
        {
            "max_iter": 4,
            "binary_search_steps": 1,
            "initial_const": 100.0,
            "max_doubling": 2,
            "max_halving": 3,
            "warm_start": False,
        },
    ),
    "jsma": (30, {"theta": 1.0, "gamma": 0.15}),
}
#: Where each attack of these kinds comes in.
PHASES = {"availability": "training", "evasion": "test", "backdoor": "training"}


def by_class(classifier: Classifier, test: Samples) -> dict[str, Any]:
    """Return accuracy on clean images, in all and for each class."""
    import numpy as np

    from doorward.training import predict

    assert test.labels is not None
    right = predict(classifier, test) == test.labels
    classes = [float(right[test.labels == label].mean()) for label in range(len(test.classes))]
    return {"clean accuracy": float(np.mean(right)), "accuracy by class": classes}


def sizes(change: Tensor) -> dict[str, Any]:
    """Return mean, least and most L2 and largest change of any value, of changes (n, c, h, w)."""
    d = change.flatten(1)
    two, most = d.norm(dim=1), d.abs().amax(1)
    values = (d.abs() > 1e-3).sum(1).float()
    return {
        "L2": float(two.mean()),
        "Linf": float(most.mean()),
        "values changed": float(values.mean()),
        "least L2": float(two.min()),
        "most L2": float(two.max()),
        "least Linf": float(most.min()),
        "most Linf": float(most.max()),
    }


def answers(classifier: Classifier, x: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([classifier.logits(part).argmax(1) for part in torch.split(x, 500)])


def on_others(classifier: Classifier, changes: Tensor, x: Tensor, target: int | None) -> float:
    """Return how often one image's change, added to others, turns them: into the target, or into anything."""
    before = answers(classifier, x)
    keep = before != target if target is not None else before >= 0
    rates = []
    for change in changes[:CHANGES]:
        after = answers(classifier, (x + change).clamp(0, 1))
        hit = after == target if target is not None else after != before
        rates.append(float(hit[keep].float().mean()))
    return mean(rates)


def measure_trigger(
    classifier: Classifier, plant: PlantedBackdoor, test: Samples, x: Tensor
) -> dict[str, Any]:
    """Measure a backdoor: what its trigger costs, how often it succeeds, how large it is."""
    from doorward.attacks.ground_truth import attack_success
    from doorward.triggers.base import Trigger

    trigger = Trigger.from_json(plant.trigger or {})
    started = time.process_time()
    woken = trigger.apply(x)
    spent = time.process_time() - started
    success = answers(classifier, woken) == TARGET
    success &= answers(classifier, x) != TARGET
    return {
        "milliseconds per input": 1000 * spent / len(x),
        "success": attack_success(classifier, test, plant).value,
        "success of one change on others": on_others(classifier, (woken - x)[success], x, TARGET),
        **(sizes((woken - x)[success]) if success.any() else {}),
    }


def measure(seed: int) -> list[dict[str, Any]]:
    """Measure every attack for one seed; evasion for the first alone."""
    import numpy as np

    from doorward.bench.evasion import evade
    from doorward.data import open_samples
    from doorward.methods import registry
    from doorward.models.encode.image import from_raw
    from doorward.training import default_settings, train_classifier

    rng = np.random.default_rng(seed)
    train = open_samples(data_folder() / DATA, split="train").draw(ROWS, rng)
    test = open_samples(data_folder() / DATA, split="test").draw(TESTED, rng)
    settings = default_settings(ARCHITECTURE, images=ROWS, side=28).model_copy(update={"epochs": EPOCHS})
    x = from_raw(test.raw(range(OTHERS)))

    def learnt(samples: Samples) -> Classifier:
        return train_classifier(ARCHITECTURE, samples, seed=seed, settings=settings).classifier

    clean = learnt(train)
    rows: list[dict[str, Any]] = [{"attack": "none", "kind": "none", "phase": "", **by_class(clean, test)}]
    for name, (attack, given) in POISONS.items():
        started = time.process_time()
        poisoned = registry.build("attack", attack, given)(train, seed=seed)
        plant, spent = poisoned.plant, time.process_time() - started
        victim = learnt(poisoned.samples)
        kind = "backdoor" if plant.trigger else "availability"
        row = {"attack": name, "kind": kind, "phase": PHASES[kind], "seconds once": spent}
        row |= {"poisoned": plant.poison_rate} | by_class(victim, test)
        rows.append(row | (measure_trigger(victim, plant, test, x) if plant.trigger else {}))
    for name in IMPLANTS:
        started = time.process_time()
        planted = registry.build("attack", name, {"target": TARGET})(clean, seed=seed)
        row = {"attack": name, "kind": "backdoor", "phase": "after training"}
        row |= {"seconds once": time.process_time() - started} | by_class(planted.classifier, test)
        rows.append(row | measure_trigger(planted.classifier, planted.plant, test, x))
    for name, (count, given) in EVASIONS.items() if seed == SEEDS[0] else ():
        started = time.process_time()
        made = evade(clean, x[:count], name, settings=given, seed=seed).images
        spent = time.process_time() - started
        success = answers(clean, made) != answers(clean, x[:count])
        change = (made - x[:count])[success]
        row = {"attack": name, "kind": "evasion", "phase": PHASES["evasion"], "settings": given}
        row |= {"images": count, "milliseconds per input": 1000 * spent / count} | by_class(clean, test)
        row |= {"success": float(success.float().mean())}
        row |= {"success of one change on others": on_others(clean, change, x, None)} if len(change) else {}
        rows.append(row | (sizes(change) if len(change) else {}))
    return [{"seed": seed} | row for row in rows]


def averaged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each attack, with means (and extremes) over the seeds."""
    rows = []
    for name in dict.fromkeys(row["attack"] for row in results["rows"]):
        mine = [row for row in results["rows"] if row["attack"] == name]
        row = dict(mine[0])
        for key, value in mine[0].items():
            if isinstance(value, float):
                pick = min if key.startswith("least") else max if key.startswith("most") else mean
                row[key] = pick(each[key] for each in mine)
        row["accuracy by class"] = [
            mean(values) for values in zip(*(each["accuracy by class"] for each in mine), strict=True)
        ]
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> str:
    """Return the table that is committed, and stands in the docs."""

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return form.format(row[key]) if key in row else ""

    rows = []
    for row in averaged(results):
        accuracies = row["accuracy by class"]
        worst = min(range(len(accuracies)), key=accuracies.__getitem__)
        rows.append(
            [
                TITLES.get(row["attack"], row["attack"]),
                row["kind"].replace("none", ""),
                row["phase"],
                cell(row, "seconds once", "{:.2f} s"),
                cell(row, "milliseconds per input", "{:.2f} ms").replace("0.00", "< 0.01"),
                measuring.percent(row["clean accuracy"]),
                f"{measuring.percent(accuracies[worst])} (class {worst})",
                measuring.percent(row["success"]) if "success" in row else "",
                measuring.percent(row["success of one change on others"])
                if "success of one change on others" in row
                else "",
                cell(row, "L2", "{:.3f}"),
                cell(row, "Linf", "{:.4f}"),
                cell(row, "values changed", "{:.0f}"),
            ]
        )
    heads = ["attack", "kind", "acts in", "cost once", "cost per input", "clean accuracy"]
    heads += ["lowest of a class", "success", "one change on others", "L2", "Linf", "values changed"]
    return measuring.markdown(heads, rows)


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Return what is not as it must be."""
    clean = {row["seed"]: row["clean accuracy"] for row in results["rows"] if row["attack"] == "none"}
    for row in results["rows"]:
        if row["attack"] in IMPLANTS and row["success"] < 1:
            yield f"{row['attack']}, seed {row['seed']}: {row['success']:.1%} success"
        if row["attack"] in IMPLANTS and row["clean accuracy"] != clean[row["seed"]]:
            yield f"{row['attack']}, seed {row['seed']}: clean images are answered otherwise"
        if row["attack"] == "signature" and row["most Linf"] > 1 / 255 + 1e-6:
            yield f"signature, seed {row['seed']}: a value changes by {row['most Linf']:.4f}"


def main() -> None:
    """Measure everything and write it down."""
    options = measuring.here(measuring.parser(__doc__, threads=1))
    results = measuring.begin(options.threads)
    results["packages"]["adversarial-robustness-toolbox"] = metadata.version("adversarial-robustness-toolbox")
    results |= {"data": DATA, "architecture": ARCHITECTURE, "training images": ROWS, "tests": TESTED}
    results |= {"poisons": POISONS, "target": TARGET}
    results["rows"] = [row for seed in SEEDS for row in measure(seed)]
    measuring.conclude("attack-kinds", results, table(results), failures(results))


if __name__ == "__main__":
    main()
