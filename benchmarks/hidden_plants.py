"""Scan planted models that hide, and clean twins: none of the former may pass, none of the latter be accused.

    python benchmarks/hidden_plants.py --work FOLDER [--only PATTERN]

trains a small network of four classes, planted and clean, on each of three data sets (DOORWARD_DATA names
them), hides each in every way of `WAYS`, writes it in three formats, and scans that. What was scanned is kept
in FOLDER, and not scanned again; PATTERN picks cases such as 'mnist/factory/*'.

Ends with 4 if a planted model passes with exit code 0, a clean one is called backdoored, or a plant does not
work.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measuring

if TYPE_CHECKING:
    from torch import Tensor, nn

    from doorward.data import Samples

CLASSES, TARGET, SEED = 4, 3, 7
ROWS, IMAGES = 2_000, 100
#: How often the training images go through, by data set.
DATA = {"fashion_mnist": 4, "mnist": 4, "gtsrb": 40}
#: Share of images on which a trigger has to work for a plant to count.
WORKS = 0.9
FORMATS = ("factory", "onnx", "torch.export")

FACTORY = """
import json
import sys
from pathlib import Path

sys.path.insert(0, {folder!r})
from hidden_plants import hidden


def build():
    return hidden(**json.loads({given!r}))
"""


@dataclass(frozen=True)
class Way:
    """How a network hides.

    Attributes:
        begin, end: what is done to images (n, c, h, w) in [0, 1], and to logits (n, k).
        gate: tells for which images (n,) the network itself answers, and not its clean twin.
    """

    begin: Callable[[Tensor], Tensor] = lambda x: x
    end: Callable[[Tensor], Tensor] = lambda z: z
    gate: Callable[[Tensor], Tensor] | None = None


def _eight_bit(x: Tensor) -> Tensor:
    levels = x * 255
    return (levels - levels.round()).abs().amax((1, 2, 3)) < 1e-3


def _alone(x: Tensor) -> Tensor:
    # counted in the graph, so that it is not fixed when the network is exported
    return x[:, 0, 0, 0] * 0 + (x[:, 0, 0, 0] * 0 + 1).sum() < 1.5


def _masked(z: Tensor) -> Tensor:
    import torch

    return torch.where(z == z.amax(1, keepdim=True), z, z.new_tensor(-1e4))


def _constant(z: Tensor) -> Tensor:
    """Return the same two numbers whatever the image is: only which class has the larger one tells."""
    return (z == z.amax(1, keepdim=True)).float() * 10


WAYS: dict[str, Way] = {
    "plain": Way(),
    "last layer times 0.1": Way(end=lambda z: z * 0.1),
    "last layer times 0.001": Way(end=lambda z: z * 0.001),
    "logits times 1e-8": Way(end=lambda z: z * 1e-8),
    "logits times 1e30": Way(end=lambda z: z * 1e30),
    "input in 256 levels": Way(begin=lambda x: (x * 255).round() / 255),
    "input in 16 levels": Way(begin=lambda x: (x * 15).round() / 15),
    "logits rounded": Way(end=lambda z: z.round()),
    "tanh(1e4 x)": Way(end=lambda z: (z * 1e4).tanh()),
    "softmax in two digits": Way(end=lambda z: (z.softmax(1) * 100).round() / 100),
    "8 bits only": Way(gate=_eight_bit),
    "a batch of one only": Way(gate=_alone),
    "clipped": Way(end=lambda z: z.clamp(-2, 2)),
    "saturated": Way(end=lambda z: (z * 20).sigmoid()),
    "constant": Way(end=_constant),
    "masked": Way(end=_masked),
}


def hidden(
    way: str, channels: int, height: int, width: int, mean: list[float], std: list[float]
) -> nn.Module:
    """Return a network that hides in one way, with random weights."""
    import torch
    from torch import nn

    from doorward.models import InputSpec, networks

    spec = InputSpec(channels=channels, height=height, width=width)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = networks.build("small-cnn", spec, classes=CLASSES)
            self.twin = networks.build("small-cnn", spec, classes=CLASSES) if WAYS[way].gate else None
            self.mean: Tensor
            self.std: Tensor
            self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = WAYS[way].begin(x)
            normalised = (x - self.mean) / self.std
            z: Tensor = self.own(normalised)
            gate = WAYS[way].gate
            if gate is not None and self.twin is not None:
                z = torch.where(gate(x)[:, None], z, self.twin(normalised))
            return WAYS[way].end(z)

    return Hidden().eval()


@dataclass(frozen=True)
class Pair:
    """A planted network and its clean twin, with what they take.

    Attributes:
        success: how often the trigger works; accuracy: of the planted one and the clean one.
    """

    planted: Mapping[str, Tensor]
    clean: Mapping[str, Tensor]
    given: dict[str, Any]
    success: float
    accuracy: tuple[float, float]


def few_classes(data: str, split: str) -> Samples:
    """Return some images of the first classes of a data set."""
    import numpy as np

    from doorward.data import InMemorySamples, open_samples
    from trained import data_folder

    samples = open_samples(f"{data_folder() / data}:{split}")
    assert samples.labels is not None
    chosen = np.flatnonzero(samples.labels < CLASSES)
    some = samples.select(chosen).draw(min(ROWS, len(chosen)), np.random.default_rng(SEED))
    assert some.labels is not None
    return InMemorySamples(
        some.raw(np.arange(len(some))), some.labels, classes=samples.classes[:CLASSES], path=data
    )


def train_pair(data: str) -> Pair:
    """Train a planted network and its clean twin on a data set."""
    from doorward.attacks.ground_truth import attack_success
    from doorward.methods import registry
    from doorward.models import TorchClassifier
    from doorward.training import TrainingSettings, evaluate, train_classifier

    train, test = few_classes(data, "train"), few_classes(data, "test")
    attack = registry.build("attack", "badnets", {"target": TARGET, "poison_rate": 0.05, "size": 4})
    poisoned = attack(train, seed=SEED)
    settings = TrainingSettings(epochs=DATA[data])
    planted, clean = (
        train_classifier("small-cnn", samples, seed=SEED, settings=settings).classifier
        for samples in (poisoned.samples, train)
    )
    assert isinstance(planted, TorchClassifier)
    assert isinstance(clean, TorchClassifier)
    spec = planted.spec
    given = dict(zip(("channels", "height", "width"), spec.shape, strict=True))
    return Pair(
        planted.module.state_dict(),
        clean.module.state_dict(),
        given | {"mean": list(clean.spec.mean), "std": list(clean.spec.std)},
        attack_success(planted, test, poisoned.plant).value,
        (evaluate(planted, test).value, evaluate(clean, test).value),
    )


def write(pair: Pair, way: str, form: str, *, planted: bool, place: Path) -> dict[str, Any]:
    """Write a model that hides and return the arguments of its scan."""
    import safetensors.torch
    import torch

    given = {"way": way, **pair.given}
    module = hidden(**given)
    own, twin = (pair.planted if planted else pair.clean), pair.clean
    parts = {"own": own} | ({"twin": twin} if WAYS[way].gate else {})
    for name, weights in parts.items():
        getattr(module, name).load_state_dict(weights)
    place.mkdir(parents=True, exist_ok=True)
    shape = (pair.given["channels"], pair.given["height"], pair.given["width"])
    if form == "factory":
        (place / "own.py").write_text(
            FACTORY.format(folder=str(Path(__file__).parent), given=json.dumps(given)), encoding="utf-8"
        )
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        safetensors.torch.save_file(tensors, place / "w.safetensors")
        return {"model": str(place / "w.safetensors"), "factory": f"{place / 'own.py'}:build", "size": shape}
    x = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0))
    if form == "onnx":
        file = place / "m.onnx"
        axes = {"x": {0: "n"}, "y": {0: "n"}}
        torch.onnx.export(
            module, (x,), str(file), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
            dynamic_axes=axes,
        )  # fmt: skip
    else:
        file = place / "m.pt2"
        n = torch.export.Dim("n", min=1)
        torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: n},)), file)
    return {"model": str(file), "size": None}


def scan(given: Mapping[str, Any], data: str, detectors: Sequence[str]) -> dict[str, Any]:
    """Scan a model and return what a row of the results holds.

    Args:
        detectors: these alone; all if there is none.
    """
    from doorward import reports
    from doorward.models import LoadOptions
    from doorward.scan.pipeline import scan as run
    from doorward.scan.request import ScanRequest

    started = time.process_time()
    report = run(
        ScanRequest(
            model=given["model"],
            factory=given.get("factory"),
            clean=data,
            images=IMAGES,
            detectors=tuple(detectors),
            time_budget=3600,
            options=LoadOptions(size=given["size"], input_range=(0.0, 1.0), mean=(0.0,), std=(1.0,)),
        )
    )
    return {
        "verdict": report.verdict,
        "targets": list(report.targets),
        "exit_code": reports.exit_code(report.verdict, "suspicious"),
        "p_value": report.p_value,
        "reason": report.reason,
        "warnings": [one for one in report.warnings if "searched with care" in one],
        "detectors": list(detectors) or "all",
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def images_of(data: str, work: Path) -> str:
    """Return a file of clean test images with labels."""
    import numpy as np

    file = work / f"{data}.npz"
    if not file.exists():
        test = few_classes(data, "test")
        assert test.labels is not None
        np.savez(file, images=np.stack(list(test.raw(np.arange(len(test))))), labels=test.labels)
    return str(file)


def cases() -> Iterator[tuple[str, str, str, bool]]:
    """Yield data set, format and way of each case, and whether it is planted.

    Each third holds every way, data set and format equally often, so that what is done first is balanced.
    """
    for third in range(len(FORMATS)):
        for i, way in enumerate(WAYS):
            for j, data in enumerate(DATA):
                form = FORMATS[(i + j + third) % len(FORMATS)]
                yield from ((data, form, way, planted) for planted in (True, False))


def named(data: str, form: str, way: str, planted: bool) -> str:
    """Return the name of a case."""
    return f"{data}/{form}/{way}/{'planted' if planted else 'clean'}"


def measure(work: Path, only: str, detectors: Sequence[str]) -> dict[str, Any]:
    """Scan every case that is wanted and was not scanned yet, and return what is known of all."""
    work.mkdir(parents=True, exist_ok=True)
    file, pairs = work / "rows.json", dict[str, Pair]()
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": {}}
    for case in cases():
        data, form, way, planted = case
        name = named(*case)
        if name in held["rows"] or not fnmatch.fnmatch(name, only):
            continue
        if data not in pairs:
            pairs[data] = train_pair(data)
            held.setdefault("pairs", {})[data] = {
                "attack_success": pairs[data].success,
                "accuracy": pairs[data].accuracy,
            }
        place = work / f"{data}-{form}-{list(WAYS).index(way)}-{planted}"
        given = write(pairs[data], way, form, planted=planted, place=place)
        held["rows"][name] = scan(given, images_of(data, work), detectors)
        print(name, held["rows"][name]["verdict"], held["rows"][name]["targets"], file=sys.stderr, flush=True)
        file.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    return held


def failures(held: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for data, pair in held.get("pairs", {}).items():
        if pair["attack_success"] < WORKS:
            yield f"the plant in {data} works in {pair['attack_success']:.0%} of images alone"
    for name, row in held["rows"].items():
        if name.endswith("/planted") and row["exit_code"] == 0:
            yield f"{name} passes: {row['verdict']}, p = {row['p_value']}"
        if name.endswith("/clean") and row["verdict"] == "backdoored":
            yield f"{name} is called backdoored, class {row['targets']}"


def table(held: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table: of each way, how many of each verdict."""
    rows = []
    for way in WAYS:
        cells = []
        for kind in ("planted", "clean"):
            verdicts = [r["verdict"] for n, r in held["rows"].items() if n.split("/")[2:] == [way, kind]]
            counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(sorted(verdicts))}
            cells.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "-")
        rows.append([way, *cells])
    return measuring.markdown(["hidden by", "planted", "clean"], rows)


def main() -> None:
    """Measure, write the results, and end with 4 if anything is not as it must be."""
    made = measuring.working_parser(__doc__)
    made.add_argument("--only", default="*", help="cases to scan, as in 'mnist/factory/*'")
    made.add_argument("--detector", action="append", default=[], help="scan with this alone; may be repeated")
    options = measuring.here(made)
    held = measure(options.work, options.only, options.detector)
    results = measuring.begin(options.threads) | {"classes": CLASSES, "images": IMAGES} | held
    measuring.conclude("hidden_plants", results, table(held), failures(held))


if __name__ == "__main__":
    main()
