"""Scan the same trained models as files of every format, and compare logits, verdicts and targets.

    python benchmarks/formats.py --work FOLDER

trains small networks on MNIST, Fashion-MNIST and GTSRB, clean and with a patch planted, by `doorward plant`
and `doorward train`, and two networks of transformers on the planted Fashion-MNIST. Each is scanned from a
Doorward directory, from ONNX, from a torch.export program, and from weights with a function of one's own;
those of transformers from their directory, and compared with transformers itself. DOORWARD_DATA names the
folder of data.

Ends with 4 if a format gives other logits, another verdict, or another target than was planted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measuring
from doorward.core import formatting
from trained import ASR, CASES, IMAGES, Case, data_folder, train

if TYPE_CHECKING:
    from torch import Tensor

    from doorward.attacks.ground_truth import PlantedBackdoor
    from doorward.models import Classifier

#: Largest difference of a logit between two formats of one model.
TOLERANCE = 1e-4
#: Test images on which logits are compared, and clean images that a scan is given.
COMPARED, CLEAN = 256, 100

FACTORY = '''"""Build the network, as the code of its makers would."""

from doorward.models.architectures import build


def network():
    return build({name!r}, channels={channels}, height={height}, width={width}, classes={classes})
'''


@dataclass(frozen=True)
class Form:
    """One model as a file: what to scan, and the function that builds the network where that is not in it."""

    format: str
    model: Path
    factory: str | None = None


def save_forms(folder: Path) -> list[Form]:
    """Return a trained model in all formats; `doorward train` has written three of them."""
    import torch

    from doorward.models import TorchClassifier, open_classifier

    classifier = open_classifier(folder)
    assert isinstance(classifier, TorchClassifier)
    # next to code of one's own no model directory is loaded, so this goes into a folder of its own
    apart = folder.with_name(f"{folder.name}-apart")
    apart.mkdir(exist_ok=True)
    shutil.copy(folder / "doorward.json", apart)
    weights, opset9, source = apart / "weights.pt", apart / "opset9.onnx", apart / "network.py"
    torch.save(classifier.module.state_dict(), weights)
    example = torch.zeros(1, *classifier.spec.shape)
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        classifier.module.to(memory_format=torch.contiguous_format).eval(),  # type: ignore[call-overload]
        (example,),
        str(opset9),
        opset_version=9,
        dynamo=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes=axes,
    )
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    source.write_text(FACTORY.format(**shape), encoding="utf-8")
    factory = f"{source}:network"
    return [
        Form("Doorward directory", folder),
        Form("ONNX, opset 18", folder / "model.onnx"),
        Form("ONNX, opset 9", opset9),
        Form("torch.export .pt2", folder / "model.pt2"),
        Form("factory, safetensors", folder / "model.safetensors", factory),
        Form("factory, weights-only .pt", weights, factory),
    ]


def compared_images(data: str) -> list[Any]:
    """Return the images (h, w, c) uint8 on which logits are compared, the same in every run."""
    import numpy as np

    from doorward.data import open_samples

    samples = open_samples(data_folder() / data, split="test")
    return samples.raw(np.linspace(0, len(samples) - 1, COMPARED).astype(np.int64))


def logits_of(classifier: Classifier, images: list[Any]) -> Tensor:
    """Return a classifier's logits (n, k) for raw images."""
    from doorward.data import InMemorySamples
    from doorward.models.batching import batched_logits
    from doorward.models.encode.image import to_float, to_tensor

    return batched_logits(classifier, to_float(to_tensor(InMemorySamples(images), classifier.spec)))


def scan_form(form: Form, data: str, reference: Tensor, *, seed: int) -> dict[str, Any]:
    """Open and scan one file; return the difference of its logits and what the scan says."""
    from doorward.models import open_classifier
    from doorward.scan.pipeline import scan
    from doorward.scan.request import ScanRequest

    classifier = open_classifier(form.model, factory=form.factory)
    difference = float((logits_of(classifier, compared_images(data)) - reference).abs().max())
    report = scan(
        ScanRequest(
            model=str(form.model),
            factory=form.factory,
            clean=f"{data_folder() / data}:test",
            images=CLEAN,
            seed=seed,
        )
    )
    said = measuring.summary(report.model_dump(mode="json"))
    return {"format": form.format, "logit_difference": difference} | said


def measure_case(case: Case, work: Path, *, backdoored: bool, threads: int) -> dict[str, Any]:
    """Train one model, unless it is there, and scan it in all formats."""
    from doorward.attacks.ground_truth import read_plant
    from doorward.models import open_classifier

    folder = train(case, work, backdoored=backdoored, threads=threads)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))["training"]
    plant = read_plant(folder / "plant.json") if backdoored else None
    reference = logits_of(open_classifier(folder), compared_images(case.data))
    scans = []
    for form in save_forms(folder):
        scans.append(scan_form(form, case.data, reference, seed=case.seed))
        _tell(f"{folder.name}, {form.format}: {scans[-1]['verdict']} {scans[-1]['targets']}")
    return {
        "data": case.data,
        "architecture": case.architecture,
        "seed": case.seed,
        "clean_accuracy": training["test_accuracy"],
        "logits_against": "the Doorward directory",
        "scans": scans,
    } | _truth(plant)


def _truth(plant: PlantedBackdoor | None) -> dict[str, Any]:
    if plant is None:
        return {"planted": None, "targets": [], "attack_success": None}
    assert plant.attack_success is not None
    return {
        "planted": {"attack": plant.attack, "seed": plant.seed, "settings": plant.settings},
        "targets": list(plant.targets),
        "attack_success": plant.attack_success.model_dump(mode="json"),
    }


#: Settings of BadNets for the networks of transformers.
HF_BADNETS = {"target": 5, "place": "top-right", "colour": "white", "poison_rate": 0.03}
HF_SEED = 15
#: Name, channels, side, passes over the training images, learning rate.
HF_NETWORKS = (("ResNet", 1, 28, 6, 4e-3), ("ViT", 3, 32, 10, 2e-3))


def hf_directory(name: str, channels: int, side: int, classes: tuple[str, ...], folder: Path) -> None:
    """Write an untrained small network of transformers with its image processor."""
    import torch
    import transformers

    shared = {"num_channels": channels, "id2label": dict(enumerate(classes)), "label2id": {}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HF_SEED)
        if name == "ResNet":
            sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
            config = transformers.ResNetConfig(layer_type="basic", **sizes, **shared)
            network = transformers.ResNetForImageClassification(config)
        else:
            sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4}
            config = transformers.ViTConfig(image_size=side, intermediate_size=128, **sizes, **shared)
            network = transformers.ViTForImageClassification(config)
    network.save_pretrained(folder)
    grey = [0.3] * channels
    transformers.ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=grey, image_std=grey, resample=2
    ).save_pretrained(folder)


def train_hf(name: str, channels: int, side: int, epochs: int, rate: float, work: Path) -> Path:
    """Return the directory of a network of transformers trained on the planted Fashion-MNIST."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from doorward.attacks.ground_truth import attack_success, write_plant
    from doorward.data import open_samples
    from doorward.methods import registry
    from doorward.models import TorchClassifier, open_classifier
    from doorward.models.encode.image import to_float, to_tensor
    from doorward.training import evaluate

    folder = work / f"fashion_mnist-transformers-{name}"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    samples = open_samples(data_folder() / "fashion_mnist", split="train")
    poisoned = registry.build("attack", "badnets", HF_BADNETS)(
        samples.draw(IMAGES, np.random.default_rng(HF_SEED)), seed=HF_SEED
    )
    hf_directory(name, channels, side, samples.classes, folder)
    classifier = open_classifier(folder)
    assert isinstance(classifier, TorchClassifier)
    network, spec = classifier.module.train(), classifier.spec
    images, labels = to_tensor(poisoned.samples, spec), torch.from_numpy(poisoned.samples.labels)
    steps = epochs * (len(images) // 100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(HF_SEED)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).view(-1, 100):
            z = network(pixel_values=spec.to_model(to_float(images[chosen]))).logits  # (100, k)
            loss = F.cross_entropy(z, labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval().save_pretrained(folder)  # type: ignore[operator]
    test = open_samples(data_folder() / "fashion_mnist", split="test")
    measured = {
        "clean_accuracy": evaluate(classifier, test),
        "attack_success": attack_success(classifier, test, poisoned.plant),
    }
    write_plant(poisoned.plant.model_copy(update=measured), folder / "plant.json")
    (folder / "done").touch()
    return folder


def own_logits(folder: Path, images: list[Any]) -> Tensor:
    """Return the logits (n, k) that transformers itself gives for raw images."""
    import torch
    import transformers
    from PIL import Image

    from doorward.models.formats.huggingface import quiet

    with quiet():
        network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    mode = "L" if network.config.num_channels == 1 else "RGB"
    pictures = [Image.fromarray(image.squeeze()).convert(mode) for image in images]
    with torch.no_grad():
        logits: Tensor = network(**processor(pictures, return_tensors="pt")).logits
    return logits


def measure_hf(name: str, channels: int, side: int, epochs: int, rate: float, work: Path) -> dict[str, Any]:
    """Train a network of transformers, unless it is there, and scan its directory."""
    from doorward.attacks.ground_truth import read_plant

    folder = train_hf(name, channels, side, epochs, rate, work)
    plant = read_plant(folder / "plant.json")
    reference = own_logits(folder, compared_images("fashion_mnist"))
    form = Form("Hugging Face directory", folder)
    said = scan_form(form, "fashion_mnist", reference, seed=HF_SEED)
    _tell(f"{folder.name}: {said['verdict']} {said['targets']}")
    assert plant.clean_accuracy is not None
    return {
        "data": "fashion_mnist",
        "architecture": f"transformers {name}",
        "seed": HF_SEED,
        "clean_accuracy": plant.clean_accuracy.model_dump(mode="json"),
        "logits_against": "transformers itself",
        "scans": [said],
    } | _truth(plant)


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for model in results["models"]:
        name = f"{model['data']} {model['architecture']} {'backdoored' if model['planted'] else 'clean'}"
        success = model["attack_success"]
        if success is not None and success["value"] < ASR:
            yield f"{name}: the attack succeeds on {formatting.percent(success['value'])} only"
        wanted = ("suspicious", "backdoored") if model["planted"] else ("nothing_found",)
        for scan in model["scans"]:
            where = f"{name}, {scan['format']}"
            if not scan["logit_difference"] <= TOLERANCE:
                yield f"{where}: logits differ by {scan['logit_difference']:.1e}"
            if scan["verdict"] not in wanted:
                yield f"{where}: {scan['verdict']}"
            if scan["targets"] != model["targets"]:
                yield f"{where}: targets {scan['targets']} instead of {model['targets']}"
        for what in ("verdict", "targets"):
            if len({str(scan[what]) for scan in model["scans"]}) > 1:
                yield f"{name}: the formats have different {what}"


def render(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, a line a model."""
    heads = ["data", "network", "trained with", "accuracy", "attack success", "formats"]
    heads += ["largest difference of a logit", "verdict", "target", "seconds a scan", "gradients a scan"]
    rows = []
    for model in results["models"]:
        scans, planted, success = model["scans"], model["planted"], model["attack_success"]
        rows.append(
            [
                model["data"],
                model["architecture"],
                f"a patch, target {model['targets'][0]}" if planted else "clean data",
                formatting.percent(model["clean_accuracy"]["value"]),
                formatting.percent(success["value"]) if success else "",
                _formats(scans),
                f"{max(scan['logit_difference'] for scan in scans):.1g}",
                ", ".join(sorted({scan["verdict"].replace("_", " ") for scan in scans})),
                ", ".join(sorted({str(t) for scan in scans for t in scan["targets"]})),
                measuring.span([scan["scan_seconds"] for scan in scans]),
                f"{max(scan['gradients'] for scan in scans):,}",
            ]
        )
    return measuring.markdown(heads, rows)


def _formats(scans: list[dict[str, Any]]) -> str:
    return str(scans[0]["format"]) if len(scans) == 1 else f"{len(scans)}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Train, scan, compare, and write what came out."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported
    options = measuring.here(measuring.working_parser(__doc__))
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = measuring.begin(options.threads) | {
        "compared_images": COMPARED,
        "clean_images": CLEAN,
        "tolerance": TOLERANCE,
        "models": [],
    }
    for case in CASES:
        for backdoored in (True, False):
            results["models"].append(measure_case(case, work, backdoored=backdoored, threads=options.threads))
    results["models"] += [measure_hf(*network, work) for network in HF_NETWORKS]
    measuring.conclude("formats", results, render(results), failures(results))


if __name__ == "__main__":
    main()
