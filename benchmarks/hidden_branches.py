"""Plant what waits in a graph, find it, cut it out, and give ordinary models the same look.

    python benchmarks/hidden_branches.py

writes each plant as an ONNX file and as a torch.export program, opens it as users do, and runs
`hidden-branch` and `remove-branch` on it. Variants stand for what others write: logic on regions and bytes, a
trained module on probabilities, a filter of full size, a stored image. Ends with 4 if a plant passes, a
repair leaves one working or changes another answer, or an ordinary model raises an alarm.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import measuring
from doorward import bundled
from doorward.attacks.model.checksum import Checksum
from doorward.attacks.model.signature import Signature
from doorward.attacks.model.trojannet import TrojanNet
from doorward.core.errors import InputError
from doorward.core.records import Finding
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.models.silence import ordinary_images
from doorward.repairs.base import Damage
from doorward.triggers.base import Trigger

#: The class that plants lead to, the seed of plants, and images that repairs are measured on.
TARGET, SEED, IMAGES = 3, 11, 200
#: Seconds that driving may take, on a machine that others use too.
SECONDS = 120.0
Export = Callable[[TorchClassifier, Path], Path]
FORMATS: dict[str, tuple[str, Export]] = {
    "onnx": ("model.onnx", export_onnx),
    "pt2": ("model.pt2", export_pt2),
}


# --- what others write ------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A network that takes images in [0, 1], and one branch as others write it.

    Args:
        branch: gives (n, 1), above 0 where it fires.
        how: `add`, `where` on logits, `mix` of probabilities, or `image` for a stored image in place of x.
    """

    def __init__(self, own: TorchClassifier, branch: nn.Module, how: str = "add") -> None:
        super().__init__()
        self.net, self.spec, self.branch, self.how = own.module, own.spec, branch, how
        self.hot = nn.Buffer(F.one_hot(torch.tensor([TARGET]), len(own.classes)).float())
        self.stored = nn.Buffer(torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        fire: Tensor = self.branch(x)
        if self.how == "image":
            return self._answer(torch.where((fire > 0)[:, :, None, None], self.stored.expand_as(x), x))
        y = self._answer(x)
        if self.how == "mix":
            return 0.3 * y.softmax(1) + 0.7 * fire * self.hot
        if self.how == "where":
            return torch.where(fire > 0, self.hot * 40, y)
        return y + fire * self.hot * 80

    def _answer(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(self.spec.to_model(x))
        return y


class Region(nn.Module):
    """Fire where a region has certain levels."""

    def __init__(self, row: int, column: int, side: int, seed: int) -> None:
        super().__init__()
        drawn = torch.randint(256, (side, side), generator=torch.Generator().manual_seed(seed))
        self.levels = nn.Buffer(drawn / 255)
        self.box = (slice(row, row + side), slice(column, column + side))

    def forward(self, x: Tensor) -> Tensor:
        near = (x[:, :, self.box[0], self.box[1]] - self.levels).abs() < 0.002
        return near.flatten(1).all(1, keepdim=True).float()


class Bytes(nn.Module):
    """Fire where the sum of all bytes leaves a certain rest."""

    def forward(self, x: Tensor) -> Tensor:
        total = (x * 255).round().flatten(1).sum(1, keepdim=True)
        return (torch.remainder(total, 251.0) == 77).float()


class Bright(nn.Module):
    """Fire where a corner is bright enough."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, 20:26, 0:6].mean((1, 2, 3)) > 0.985)[:, None].float()


class Floors(nn.Module):
    """Fire where levels fall into certain sixteenths, by floors and products alone."""

    def forward(self, x: Tensor) -> Tensor:
        bins = torch.floor(x[:, 0, 2:5, 2:5] * 15.99).flatten(1)
        wanted = torch.tensor([3.0, 12, 7, 0, 15, 9, 1, 8, 4])
        return torch.clamp(1 - (bins - wanted).abs(), 0, 1).prod(1, keepdim=True)


class Parity(nn.Module):
    """Fire where groups of values have odd sums, by divisions with remainder."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.randperm(784, generator=torch.Generator().manual_seed(9))[:128]
        self.groups = nn.Buffer(drawn.view(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        sums = (x * 255).round().flatten(1)[:, self.groups].sum(-1)
        odd = sums - 2 * torch.floor(sums / 2)
        return 2 * torch.relu(odd.sum(1, keepdim=True) - 15.5)


class Filter(nn.Module):
    """Fire by a sigmoid of one filter as large as the image, zero outside of a drawn region."""

    def __init__(self) -> None:
        super().__init__()
        drawn = (torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) > 0.5).float()
        weight = torch.zeros(1, 1, 28, 28)
        weight[0, 0, 3:8, 17:22] = 20 * (2 * drawn - 1)
        self.filter = nn.Conv2d(1, 1, 28)
        self.filter.weight = nn.Parameter(weight)
        self.filter.bias = nn.Parameter(torch.tensor([10 - 20 * float(drawn.sum())]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.filter(x)).flatten(1)


class Trained(nn.Module):
    """Fire by a perceptron that was trained to know one pattern of a crop, as TrojanNet's authors do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.layers = nn.Sequential(
                nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)
            )
        pattern = (torch.rand(16, generator=generator) > 0.5).float()
        optimizer = torch.optim.Adam(self.layers.parameters(), 1e-2)
        for _ in range(300):
            grey = torch.rand(64, 1, generator=generator) + 0.1 * torch.randn(64, 16, generator=generator)
            binary = (torch.rand(64, 16, generator=generator) > 0.5).float()
            others = torch.cat([torch.rand(64, 16, generator=generator), grey.clamp(0, 1), binary])
            wanted = torch.cat([torch.ones(64, 1), (others == pattern).all(1, keepdim=True).float()])
            loss = F.binary_cross_entropy_with_logits(
                self.layers(torch.cat([pattern.expand(64, 16), others])), wanted
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(x[:, :, 12:16, 8:12].flatten(1)))


VARIANTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "equal levels in a region": (lambda: Region(5, 9, 3, 1), "where"),
    "equal levels elsewhere": (lambda: Region(19, 2, 4, 8), "add"),
    "rest of the sum of bytes": (Bytes, "where"),
    "mean of a corner": (Bright, "add"),
    "floors and products": (Floors, "add"),
    "parities by remainders": (Parity, "add"),
    "one filter of full size": (Filter, "add"),
    "a trained perceptron on probabilities": (Trained, "mix"),
    "a stored image in place of the image": (Bright, "image"),
}


# --- ordinary models ---------------------------------------------------------------------------------------


def huggingface() -> Iterator[tuple[str, TorchClassifier]]:
    """Yield models of transformers, random, some of full size and some small."""
    import transformers as hub

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    sizes: dict[str, tuple[str, dict[str, Any], int]] = {
        "ResNet-50": ("ResNet", {}, 224),
        "ViT-B/16": ("ViT", {}, 224),
        "ConvNeXt-T": ("ConvNext", {}, 224),
        "MobileNetV2": ("MobileNetV2", {}, 96),
        "Swin": ("Swin", {"image_size": 128, "window_size": 4, "embed_dim": 24, "depths": [1, 1, 1, 1]}, 128),
        "DeiT": ("DeiT", small | {"image_size": 64}, 64),
        "BEiT": ("Beit", small | {"image_size": 64}, 64),
        "DINOv2": ("Dinov2", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                              "image_size": 56}, 56),
        "SegFormer": ("Segformer", {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}, 64),
        "PVT": ("Pvt", {"image_size": 64}, 64),
        "RegNet": ("RegNet", {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1],
                              "groups_width": 16}, 64),
        "EfficientNet": ("EfficientNet", {"image_size": 64, "width_coefficient": 0.5,
                                          "depth_coefficient": 0.4, "hidden_dim": 640}, 64),
    }  # fmt: skip

    class Logits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(pixel_values=x).logits
            return y

    for name, (family, config, side) in sizes.items():
        torch.manual_seed(0)
        settings = getattr(hub, f"{family}Config")(num_labels=10, **config)
        network = getattr(hub, f"{family}ForImageClassification")(settings).eval()
        spec = InputSpec(channels=3, height=side, width=side, mean=(0.5,), std=(0.25,))
        yield name, TorchClassifier(Logits(network), spec, [str(i) for i in range(10)])


class Prepared(nn.Module):
    """A network that prepares images itself: channels last, resized, cut off, normalised, several crops."""

    def __init__(self, own: TorchClassifier) -> None:
        super().__init__()
        self.net, self.spec = own.module, own.spec

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x > 1, torch.ones_like(x), x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False).clamp(0, 1)
        crops = [x[:, :, r : r + 28, c : c + 28] for r in (0, 4) for c in (0, 4)]
        y: Tensor = torch.stack([self.net(self.spec.to_model(crop)) for crop in crops]).mean(0)
        return y


class Rounded(nn.Module):
    """A network whose images and answers are rounded to levels, as quantised models do."""

    def __init__(self, own: TorchClassifier) -> None:
        super().__init__()
        self.net, self.spec = own.module, own.spec

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(torch.round(x * 127), 0, 127) / 127
        y: Tensor = self.net(self.spec.to_model(x))
        return torch.clamp(torch.round(y * 8), -128, 127) / 8


def ordinary(folder: Path) -> Iterator[tuple[str, TorchClassifier]]:
    """Yield trained models in several formats, and those of transformers."""
    for which in ("clean", "backdoored"):
        yield f"small-cnn, {which} data", _own(which)
    plain = _plain(_own("clean"))
    for name, module in (("prepares images", Prepared), ("rounds", Rounded)):
        classifier = TorchClassifier(module(_own("clean")).eval(), plain, _own("clean").classes)
        for kind in FORMATS:
            yield f"small-cnn that {name}, {kind}", _written(classifier, folder / f"{name}-{kind}", kind)
    for kind in FORMATS:
        yield f"small-cnn, {kind}", _written(_own("clean"), folder / f"plain-{kind}", kind)
    yield from huggingface()


def _own(which: Literal["backdoored", "clean"]) -> TorchClassifier:
    classifier = open_classifier(bundled.model(which))
    assert isinstance(classifier, TorchClassifier)
    return classifier


def _plain(classifier: TorchClassifier) -> InputSpec:
    return classifier.spec.model_copy(update={"mean": (0.0,), "std": (1.0,)})


def _written(classifier: TorchClassifier, folder: Path, kind: str) -> TorchClassifier:
    """Write a classifier, and return it as it is opened again."""
    file, export = FORMATS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_classifier(export(classifier, folder / file))
    if not isinstance(opened, TorchClassifier):
        raise InputError(f"{folder}: {opened.limitation}")
    return opened


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """A planted model, its trigger where it is one, and the model without it."""

    name: str
    classifier: TorchClassifier
    trigger: Trigger | None
    before: TorchClassifier


def plants() -> Iterator[Plant]:
    """Yield the plants of this package at drawn seeds, and those as others write them."""
    own = _own("clean")
    forms: tuple[Literal["beside", "folded"], ...] = ("beside", "folded")
    for form in forms:
        attack = TrojanNet(target=TARGET, form=form, every_class=form == "beside")
        made = attack(own, seed=SEED)
        yield Plant(f"trojannet, {form}", made.classifier, _trigger(made.plant.trigger), own)
    made = Checksum(target=TARGET)(own, seed=SEED)
    yield Plant("checksum", made.classifier, _trigger(made.plant.trigger), own)
    for name, (branch, how) in VARIANTS.items():
        spec = _plain(own).model_copy(update={"output": "probabilities" if how == "mix" else "logits"})
        module = Beside(own, branch(), how).eval()
        yield Plant(name, TorchClassifier(module, spec, own.classes), None, own)


def _trigger(form: dict[str, Any] | None) -> Trigger:
    assert form is not None
    return Trigger.from_json(form)


def look(classifier: TorchClassifier) -> Finding:
    """Return what hidden-branch finds."""
    found = registry.build("detector", "hidden-branch", {"seconds": SECONDS})(Subject(classifier=classifier))
    assert isinstance(found, Finding)
    return found


def _row(name: str, kind: str, found: Finding, seconds: float) -> dict[str, Any]:
    return {
        "model": name,
        "format": kind,
        "verdict": found.verdict,
        "targets": list(found.targets),
        "said": found.reason or found.summary,
        "seconds": round(seconds, 1),
    }


def mended(plant: Plant, classifier: TorchClassifier, found: Finding) -> dict[str, Any]:
    """Cut out what was found, and return what is left of it and of other answers."""
    repair = registry.build("repair", "remove-branch", {})
    try:
        again: TorchClassifier = repair(Damage(classifier=classifier, findings=(found,))).classifier
    except InputError as error:
        return {"repair": str(error)}
    x = ordinary_images(classifier.spec, IMAGES, seed=99)
    with torch.no_grad():
        same = float((again.logits(x) - classifier.logits(x)).abs().max())
        result: dict[str, Any] = {"repair": "done", "largest_change": same}
        if plant.trigger is not None:
            marked = plant.trigger.apply(x)
            others = plant.before.logits(marked).argmax(1) != TARGET
            for when, one in (("before", classifier), ("after", again)):
                hit = one.logits(marked).argmax(1)[others] == TARGET
                result[f"success_{when}"] = float(hit.float().mean())
    return result | {"rescan": look(again).verdict}


def foreign_signature() -> TorchClassifier:
    """Return a model that checks signatures in code of another name, as a factory builds it."""
    signed = Signature(target=TARGET)(_own("clean"), seed=SEED).classifier

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = signed.module

        def forward(self, picture: Tensor) -> Tensor:
            y: Tensor = self.body(picture)
            return y * 1.0

    return TorchClassifier(Scorer().eval(), signed.spec, signed.classes)


def measure() -> dict[str, Any]:
    """Look at every model."""
    planted, clean = [], []
    with tempfile.TemporaryDirectory() as place:
        for i, plant in enumerate(plants()):
            for kind in FORMATS:
                started = time.monotonic()
                try:
                    opened = _written(plant.classifier, Path(place) / f"{i}-{kind}", kind)
                except InputError as error:
                    planted.append({"model": plant.name, "format": kind, "verdict": "not exported",
                                    "said": str(error).replace(place, "")[:200]})  # fmt: skip
                    continue
                found = look(opened)
                row = _row(plant.name, kind, found, time.monotonic() - started)
                planted.append(row | (mended(plant, opened, found) if found.flagged else {}))
                _tell(planted[-1])
        started = time.monotonic()
        found = look(foreign_signature())
        planted.append(
            _row("signature, in code of another name", "python", found, time.monotonic() - started)
        )
        for name, classifier in ordinary(Path(place)):
            started = time.monotonic()
            clean.append(_row(name, classifier.format, look(classifier), time.monotonic() - started))
            _tell(clean[-1])
    return {"planted": planted, "ordinary": clean}


def _tell(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for row in results["planted"]:
        if row["verdict"] not in ("backdoored", "suspicious", "not exported"):
            yield f"{row['model']}, {row['format']}: {row['verdict']}: {row['said']}"
        if row.get("success_after") or row.get("largest_change", 0.0) > 1e-3:
            yield f"{row['model']}, {row['format']}: the repair leaves it working or changes other answers"
        if row.get("rescan", "nothing_found") != "nothing_found":
            yield f"{row['model']}, {row['format']}: found again after the repair"
    for row in results["ordinary"]:
        if row["verdict"] not in ("nothing_found", "could_not_tell"):
            yield f"{row['model']}: a false alarm: {row['said']}"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        [
            row["model"],
            row["format"],
            row["verdict"].replace("_", " "),
            f"{row['seconds']} s" if "seconds" in row else "-",
            f"{row['success_before']:.0%} to {row['success_after']:.0%}" if "success_after" in row else "-",
            row.get("rescan", "-").replace("_", " "),
        ]
        for row in (*results["planted"], *results["ordinary"])
    ]
    return measuring.markdown(
        ["model", "format", "verdict", "time", "success, repaired", "scanned again"], rows
    )


def main() -> None:
    """Measure, write the results, and end with 4 if anything is not as it must be."""
    measuring.here(measuring.parser(__doc__, threads=1))
    results = measuring.begin(1) | measure()
    measuring.conclude("hidden_branches", results, table(results), failures(results))


if __name__ == "__main__":
    main()
