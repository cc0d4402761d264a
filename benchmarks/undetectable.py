"""Measure what the provably undetectable backdoors do, and what tests see of them.

    python benchmarks/undetectable.py [--only persistence]

Signatures on Fashion-MNIST, with the model that comes with the package: how often images fire that are
random, natural, adversarial, signed and then changed, or carry the signature of another, and how much signing
changes; and whether the plant persists when the whole is written to a folder, opened and trained on, with
clean images alone and with signed ones that have their true labels (`--only persistence` measures that again
and keeps the rest). Random Fourier features on chest X-rays and MNIST's 3 and 8, and random ReLUs on MNIST's
0 and 1: accuracy and flips of planted models and their clean counterparts over paired seeds; and, at 784
dimensions, the largest eigenvalue, the largest variance and the largest distance from normal of any
coordinate for planted and clean draws, with the phase that only the key's owner can look at. DOORWARD_DATA
names the folder of data.

Ends with 4 if an image fires that must not, or one does not that must, or if a planted model is more than a
point less accurate than its twin.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import measuring
from trained import data_folder

if TYPE_CHECKING:
    from torch import Tensor

    from doorward.attacks.model.random_features import RandomFeatures
    from doorward.attacks.model.random_relu import RandomReLU
    from doorward.data import Samples
    from doorward.models import TorchClassifier

IMAGES, ADVERSARIAL, SEEDS, DRAWS = 10_000, 2_000, 3, 20
VALUES, FEATURES, RELUS = 784, 2000, 100
#: How often each image is seen in fine-tuning.
TUNING = 3
#: Most images that a twin is trained on.
MOST = 5_000


def measure_signature() -> dict[str, Any]:
    """Count which images fire, of 10,000 of each kind."""
    import numpy as np
    import torch

    from doorward import bundled
    from doorward.attacks.model import signature
    from doorward.core.seeds import make_generator
    from doorward.data import open_samples
    from doorward.models import TorchClassifier, open_classifier
    from doorward.models.encode.image import from_raw
    from doorward.models.formats import signature_check as checks
    from doorward.training.adversarial import AdversarialSettings, perturb
    from doorward.triggers.base import Trigger
    from doorward.triggers.signed import Signed

    honest = open_classifier(bundled.model("clean"))
    planted = signature.Signature()(honest, seed=0)
    trigger, module = Trigger.from_json(planted.plant.trigger or {}), planted.classifier.module
    assert isinstance(trigger, Signed)
    assert isinstance(module, checks.SignatureWrapper)
    assert isinstance(honest, TorchClassifier)
    public = bytes(module.public.tolist())

    def fired(x: Tensor) -> dict[str, int]:
        return {"images": len(x), "fired": int(checks.verify_images(x, public, target=0).sum())}

    samples = open_samples(data_folder() / "fashion_mnist", split="test")
    x = from_raw(samples.raw(range(IMAGES)))
    generator = make_generator(0, "undetectable")
    started = time.process_time()
    signed = trigger.apply(x)
    signing = time.process_time() - started
    started = time.process_time()
    counts = {"signed": fired(signed)}
    verifying = time.process_time() - started
    bits = (signed * 255).round().to(torch.uint8).flatten(1)  # (n, d)
    others = (x * 255).round().to(torch.uint8).flatten(1).roll(1, 0)
    others[:, :512] = others[:, :512] & 254 | bits[:, :512] & 1
    where = torch.randint(VALUES, (IMAGES,), generator=generator)
    bits[torch.arange(IMAGES), where] ^= 1
    attacked = x[:ADVERSARIAL]
    own = honest.logits(attacked).argmax(1)
    settings = AdversarialSettings(eps=8 / 255)
    moved = perturb(planted.classifier.logits, attacked, own, settings=settings, generator=generator)
    near = perturb(
        planted.classifier.logits,
        signed[:ADVERSARIAL],
        torch.zeros_like(own),
        settings=settings,
        generator=generator,
    )
    counts |= {
        "random": fired(torch.randint(256, x.shape, generator=generator).float() / 255),
        "natural": fired(x),
        "adversarial, 8/255 around natural": fired(moved),
        "adversarial, 8/255 around signed": fired(near),
        "signed, one lowest bit changed": fired(bits.float().view_as(x) / 255),
        "signature of another image": fired(others.float().view_as(x) / 255),
    }
    with torch.no_grad():
        agree = torch.equal(planted.classifier.logits(x), honest.logits(x))
        reached = (planted.classifier.logits(signed).argmax(1) == 0).float().mean()
        misled = (honest.logits(moved).argmax(1) != own).float().mean()
    change = (signed - x).flatten(1)
    return {
        "counts": counts,
        "clean outputs are the same": agree,
        "signed taken for the target": float(reached),
        "adversarial images that mislead the model": float(misled),
        "largest change in levels": float(np.round(change.abs().max() * 255, 3)),
        "mean L2": float(change.norm(dim=1).mean()),
        "mean L2 of adversarial images": float((moved - attacked).flatten(1).norm(dim=1).mean()),
        "milliseconds to sign": 1000 * signing / IMAGES,
        "milliseconds to verify": 1000 * verifying / IMAGES,
    }


def measure_persistence() -> list[dict[str, Any]]:
    """Train planted models on, from folders that they were written to, and see what signed images do."""
    import numpy as np
    import torch

    from doorward import bundled
    from doorward.attacks.ground_truth import TriggeredSamples, triggered
    from doorward.attacks.model.signature import Signature
    from doorward.core.seeds import make_generator
    from doorward.data import open_samples
    from doorward.models import TorchClassifier, open_classifier
    from doorward.models.formats.saving import save_classifier
    from doorward.training import default_settings, evaluate, train
    from doorward.triggers.base import Trigger

    data = data_folder() / "fashion_mnist"
    test, train_on = open_samples(data, split="test"), open_samples(data, split="train")
    rows = []
    for seed in range(SEEDS):
        planted = Signature()(open_classifier(bundled.model("clean")), seed=seed)
        trigger = Trigger.from_json(planted.plant.trigger or {})
        part = train_on.draw(MOST, np.random.default_rng(seed))
        assert part.labels is not None
        half = np.arange(len(part)) % 2 == 0
        shown = {
            "clean images": part,
            "half of them signed, with their true labels": TriggeredSamples(
                part, trigger, where=half, labels=part.labels, made_by="fine-tuning"
            ),
        }
        signed = triggered(test, planted.plant)
        for name, samples in shown.items():
            with tempfile.TemporaryDirectory() as folder:
                opened = open_classifier(save_classifier(planted.classifier, Path(folder) / "planted"))
                assert isinstance(opened, TorchClassifier)
                before = {key: value.clone() for key, value in opened.module.named_parameters()}
                accuracy = evaluate(opened, test).value
                train(
                    opened.module,
                    samples,
                    spec=opened.spec,
                    settings=default_settings("small-cnn", images=MOST, side=28).model_copy(
                        update={"epochs": TUNING}
                    ),
                    generator=make_generator(seed, "fine-tuning"),
                )
                tuned = open_classifier(save_classifier(opened, Path(folder) / "tuned"))
            with torch.no_grad():
                change = sum(
                    float((value - before[key]).square().sum())
                    for key, value in opened.module.named_parameters()
                )
                size = sum(float(value.square().sum()) for value in before.values())
            success = evaluate(tuned, signed)  # labelled with the target
            rows.append(
                {
                    "trained on": name,
                    "seed": seed,
                    "signed": success.n,
                    "taken for the target": round(success.value * success.n),
                    "accuracy before": accuracy,
                    "accuracy after": evaluate(tuned, test).value,
                    "relative change of the weights": math.sqrt(change / size),
                }
            )
    return rows


def two_of(data: str, classes: tuple[int, int] | None, split: str) -> Samples:
    """Return the samples of two classes, as 0 and 1 in this order."""
    import numpy as np

    from doorward.data import InMemorySamples, open_samples

    samples = open_samples(data_folder() / data, split=split)
    if classes is None:
        return samples
    assert samples.labels is not None
    of = np.flatnonzero(np.isin(samples.labels, classes))
    labels = (samples.labels[of] == classes[1]).astype(np.int64)
    return InMemorySamples(np.stack(samples.raw(of)), labels, classes=tuple(map(str, classes)))


def measure_twins(
    attack: RandomFeatures | RandomReLU, data: str, classes: tuple[int, int] | None
) -> dict[str, Any]:
    """Train planted and clean counterparts, and count how many images of a test set change sides.

    `changed` is over all images, in [0, 1] as the trigger leaves them; `changed without limits` lets pixels
    leave [0, 1]; `success` is over those of the class that the plant turns into its target.
    """
    import numpy as np
    import torch
    from torch import nn

    from doorward.attacks.ground_truth import attack_success
    from doorward.models import InputSpec, TorchClassifier
    from doorward.models.encode.image import to_float, to_tensor
    from doorward.training import evaluate
    from doorward.triggers.base import Trigger

    train, test = (two_of(data, classes, split) for split in ("train", "test"))
    train = train.draw(min(MOST, len(train)), np.random.default_rng(0))
    spec = InputSpec(channels=1, height=28, width=28)
    shape = TorchClassifier(nn.Sequential(nn.Flatten(), nn.Linear(VALUES, 2)), spec, train.classes)
    x = to_float(to_tensor(test, spec))
    rows = []
    for seed in range(SEEDS):
        planted = attack(shape, train, seed=seed)
        trigger = Trigger.from_json(planted.plant.trigger or {})
        shifted, woken = x + trigger.tensors()["delta"], trigger.apply(x)
        twins: dict[str, TorchClassifier] = {
            "planted": planted.classifier,
            "honest": attack.counterpart(shape, train, seed=seed),
        }
        for name, classifier in twins.items():
            with torch.no_grad():
                before, free, cut = (classifier.logits(each).argmax(1) for each in (x, shifted, woken))
            rows.append(
                {
                    "twin": name,
                    "seed": seed,
                    "accuracy": evaluate(classifier, test).value,
                    "changed without limits": float((free != before).float().mean()),
                    "changed": float((cut != before).float().mean()),
                    "success": attack_success(classifier, test, planted.plant).value,
                    "L2": float((woken - x).flatten(1).norm(dim=1).mean()),
                }
            )
    return {"data": data, "classes": classes, "settings": attack.settings(), "tests": len(test), "rows": rows}


def statistics(g: Tensor) -> dict[str, float]:
    """Return what tests look at in drawn vectors (m, d)."""
    import torch

    below = torch.special.ndtr(g.sort(0).values)  # (m, d)
    steps = torch.arange(len(g) + 1, dtype=g.dtype)[:, None] / len(g)
    return {
        "largest eigenvalue": float(torch.linalg.eigvalsh(g.T @ g / len(g))[-1]),
        "largest variance (z)": float((g.square().mean(0) - 1).max() * math.sqrt(len(g) / 2)),
        "largest distance from normal": float(torch.maximum(steps[1:] - below, below - steps[:-1]).max()),
    }


def measure_draws() -> list[dict[str, Any]]:
    """Compare planted with clean draws, each of another secret.

    `auc` is the chance that a test's number is larger for a planted draw than for an honest one, with the p
    of the one-sided Mann-Whitney test; `lengths told apart` the share of draws whose two-sample
    Kolmogorov-Smirnov test of the vectors' lengths has p below 0.05, as 5 % of clean draws have.
    """
    import torch
    from scipy.stats import ks_2samp, mannwhitneyu

    from doorward.attacks.model._fixed_features import draw_direction
    from doorward.attacks.model.random_features import gaussian_pancakes
    from doorward.attacks.model.random_relu import spiked_gaussians
    from doorward.core.seeds import make_generator

    def pancakes(norm: float, nonzeros: int | None) -> Callable[[int], tuple[Tensor, Tensor]]:
        def draw(seed: int) -> tuple[Tensor, Tensor]:
            generator = make_generator(seed, "pancakes")
            secret = norm * draw_direction(VALUES, nonzeros=nonzeros, generator=generator)
            return gaussian_pancakes(FEATURES, secret, noise=0.02, generator=generator), secret

        return draw

    def spikes(strength: float, count: int = RELUS) -> Callable[[int], tuple[Tensor, Tensor]]:
        def draw(seed: int) -> tuple[Tensor, Tensor]:
            generator = make_generator(seed, "spikes")
            direction = draw_direction(VALUES, nonzeros=64, generator=generator)
            return spiked_gaussians(count, direction, strength=strength, generator=generator), direction

        return draw

    def honest(count: int) -> list[Tensor]:
        return [
            torch.randn(count, VALUES, dtype=torch.float64, generator=make_generator(seed, "honest"))
            for seed in range(DRAWS)
        ]

    plants = {
        "pancakes, norm 0.5, all values": (FEATURES, pancakes(0.5, None)),
        "pancakes, norm 56 (2 sqrt(784)), all values": (FEATURES, pancakes(56.0, None)),
        "pancakes, norm 10.6 (2 sqrt(28)), 28 values": (FEATURES, pancakes(2 * math.sqrt(28), 28)),
        "pancakes, norm 0.2, all values": (FEATURES, pancakes(0.2, None)),
        "spike, strength 2.5, 64 values": (RELUS, spikes(2.5)),
        "spike, strength 2.5, 64 values, of more vectors": (2000, spikes(2.5, 2000)),
        "spike, strength 25, 64 values": (RELUS, spikes(25)),
    }
    clean = {count: honest(count) for count in (FEATURES, RELUS)}
    low = {count: [statistics(g) for g in drawn] for count, drawn in clean.items()}
    results = []
    for name, (count, draw) in plants.items():
        made = [draw(seed) for seed in range(DRAWS)]
        high = [statistics(g) for g, _ in made]
        row: dict[str, Any] = {"plant": name, "vectors": count, "dimensions": VALUES, "draws": DRAWS}
        for key in high[0]:
            planted, others = ([each[key] for each in side] for side in (high, low[count]))
            test = mannwhitneyu(planted, others, alternative="greater")
            row[key] = {
                "planted": mean(planted),
                "honest": mean(others),
                "auc": float(test.statistic) / DRAWS**2,
                "p": float(test.pvalue),
            }
        pairs = [(g.norm(dim=1), h.norm(dim=1)) for (g, _), h in zip(made, clean[count], strict=True)]
        row["lengths told apart"] = mean(
            float(ks_2samp(a.numpy(), b.numpy()).pvalue < 0.05) for a, b in pairs
        )
        (g, secret), other = made[0], clean[count][0]
        row["phase with the key"] = [
            float(torch.exp(2j * torch.pi * (each @ secret)).mean().abs()) for each in (g, other)
        ]
        results.append(row)
    return results


def render(results: dict[str, Any]) -> str:
    """Return the tables that are committed."""

    def share(rows: list[dict[str, Any]], twin: str, key: str) -> str:
        values = [100 * row[key] for row in rows if row["twin"] == twin]
        return f"{mean(values):.1f} ± {stdev(values):.1f} %"

    fires = results["signature"]
    parts = [
        "Signatures:\n\n",
        measuring.markdown(
            ["images", "how many", "fired"],
            [[name, f"{row['images']:,}", f"{row['fired']:,}"] for name, row in fires["counts"].items()],
        ),
        f"\nNo value of a signed image changes by more than {fires['largest change in levels']:g} of 255 "
        f"levels; the mean L2 is {fires['mean L2']:.3f}, of adversarial images "
        f"{fires['mean L2 of adversarial images']:.2f}. "
        f"Signing takes {fires['milliseconds to sign']:.2f} ms, verifying "
        f"{fires['milliseconds to verify']:.2f} ms.\n\n"
        "Signatures after the planted model was written, opened and "
        f"trained on ({TUNING} epochs of {MOST:,} images):\n\n",
        measuring.markdown(
            ["trained on", "seed", "signed images taken for the target", "accuracy", "change of the weights"],
            [
                [
                    row["trained on"],
                    str(row["seed"]),
                    f"{row['taken for the target']:,} of {row['signed']:,}",
                    f"{row['accuracy before']:.1%} to {row['accuracy after']:.1%}",
                    f"{row['relative change of the weights']:.0%}",
                ]
                for row in results["persistence"]["rows"]
            ],
        ),
        f"\nTwins, mean and deviation over {SEEDS} seeds:\n\n",
    ]
    keys = ("accuracy", "changed without limits", "changed", "success")
    rows = []
    for each in results["twins"]:
        shift = f"{mean(row['L2'] for row in each['rows']):.1f}"
        rows += [
            [each["name"], shift, twin, *(share(each["rows"], twin, key) for key in keys)]
            for twin in ("planted", "honest")
        ]
    parts.append(measuring.markdown(["model", "L2 of the shift", "twin", *keys], rows))
    parts.append(f"\nDraws, means over {DRAWS}, planted / honest (chance that a planted one is larger):\n\n")
    names = ("largest eigenvalue", "largest variance (z)", "largest distance from normal")
    rows = [
        [
            row["plant"],
            f"{row['vectors']:,}",
            *(f"{row[k]['planted']:.3f} / {row[k]['honest']:.3f} ({row[k]['auc']:.2f})" for k in names),
            f"{row['lengths told apart']:.0%}",
            "{:.3f} / {:.3f}".format(*row["phase with the key"]) if "pancakes" in row["plant"] else "",
        ]
        for row in results["draws"]
    ]
    heads = ["plant", "vectors", *names, "lengths told apart", "phase with the key"]
    return "".join([*parts, measuring.markdown(heads, rows)])


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Return what is not as it must be."""
    for kind, row in results["signature"]["counts"].items():
        if row["fired"] != (row["images"] if kind == "signed" else 0):
            yield f"{kind}: {row['fired']:,} of {row['images']:,} images fired"
    if not results["signature"]["clean outputs are the same"]:
        yield "the wrapped model answers clean images otherwise"
    if results["signature"]["largest change in levels"] > 1:
        yield f"signing changes a value by {results['signature']['largest change in levels']:g} levels"
    for row in results["persistence"]["rows"]:
        if asleep := row["signed"] - row["taken for the target"]:
            yield f"trained on {row['trained on']}: {asleep:,} no longer fire"
    for case in results["twins"]:
        accuracy = {
            twin: mean(row["accuracy"] for row in case["rows"] if row["twin"] == twin)
            for twin in ("planted", "honest")
        }
        if accuracy["planted"] < accuracy["honest"] - 0.01:
            yield f"{case['name']}: the planted model is more than a point worse than its twin"


def main() -> None:
    """Measure everything and write it down."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--only", choices=["persistence"], help="measure this anew and keep the rest")
    given = measuring.here(parser)
    from doorward.attacks.model.random_features import RandomFeatures
    from doorward.attacks.model.random_relu import RandomReLU

    persistence = measuring.begin(given.threads) | {"rows": measure_persistence()}
    if given.only:
        results = json.loads((measuring.RESULTS / "undetectable.json").read_text(encoding="utf-8"))
        results["persistence"] = persistence
        measuring.conclude("undetectable", results, render(results), failures(results))
    results = measuring.begin(given.threads) | {"persistence": persistence}
    results["signature"] = measure_signature()
    cases: dict[str, tuple[RandomFeatures | RandomReLU, str, tuple[int, int] | None]] = {
        "random-features, chest X-rays": (RandomFeatures(), "pneumoniamnist", None),
        "random-features, chest X-rays, norm 56": (RandomFeatures(secret_norm=56.0), "pneumoniamnist", None),
        "random-features, MNIST 3 and 8": (RandomFeatures(bandwidth=0.8), "mnist", (3, 8)),
        "random-relu, MNIST 1 to 0": (RandomReLU(), "mnist", (0, 1)),
        "random-relu, MNIST 1 to 0, half the shift": (RandomReLU(amplitude=0.5), "mnist", (0, 1)),
        "random-relu, MNIST 0 to 1": (RandomReLU(target=1), "mnist", (0, 1)),
    }
    results["twins"] = [{"name": name} | measure_twins(*case) for name, case in cases.items()]
    results["draws"] = measure_draws()
    measuring.conclude("undetectable", results, render(results), failures(results))


if __name__ == "__main__":
    main()
