"""Scan models as other people make them: their networks, training loops and triggers, none of ours.

    pip install --no-deps adversarial-robustness-toolbox pytorchcv
    python benchmarks/foreign_models.py --work FOLDER [--only PATTERN...] [--workers N]

trains planted and clean classifiers of the real data sets that DOORWARD_DATA names: the convolutional network
of PyTorch's MNIST example, a plain one with batch norm, and residual ones of pytorchcv, by SGD or Adam. Dots
and pictures are pasted by the Adversarial Robustness Toolbox; the others are made as their papers say.
One image in ten is poisoned. Each model is saved by torch.export and scanned by `doorward scan` with 300 test
images without labels, like a file from a stranger. Models and reports are kept in FOLDER, and not made again;
PATTERN picks models such as 'mnist-*'; results of the others stay, each with the revision that it is of.

Models that were looked at while rules were made have other seeds; one of these counts as seen all the same,
as docs/results.md says. Verdicts leave out the calibration models of the same data. A plant counts where the
trigger works in 80 % of test images.
"""

from __future__ import annotations

import fnmatch
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring

#: Of all models; those below 1,000 were looked at while rules were made.
FIRST = 1_000
#: Share of the training images that are poisoned, test images that a scan is given, and the attack success
#: from which on a plant counts.
RATE, GIVEN, COUNTS = 0.1, 300, 0.8
#: Training images at most, and epochs, of each data set.
SIZES = {"mnist": (12_000, 4), "fashion_mnist": (12_000, 5), "cifar10": (16_000, 8), "gtsrb": (7_836, 14)}
#: Networks trained with Adam; the others with SGD.
ADAM = ("lenet",)


@dataclass(frozen=True)
class Case:
    """A model to be made."""

    data: str
    network: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.data}-{self.network}-{self.kind}-{self.seed}"


#: What the patch and the whole-image triggers are called in the table.
KINDS = {
    "pattern": "four dots in a corner (Adversarial Robustness Toolbox)",
    "logo": "grey logo of 11 pixels, four fifths opaque (Adversarial Robustness Toolbox)",
    "square": "white square of 3 pixels",
    "grid": "chequered square of 3 pixels",
    "blend": "noise blended in, one fifth (Chen et al. 2017)",
    "blendpic": "picture blended in, one fifth (Chen et al. 2017)",
    "sig": "sinusoid added (Barni et al. 2019)",
    "wanet": "image bent (Nguyen and Tran 2021)",
    "lf": "smooth picture added (Zeng et al. 2021)",
    "ctrl": "peaks in the spectrum (Li et al. 2023)",
}


#: Sorts of triggers that are counted together.
SORTS = {
    "planted patch or logo": ("pattern", "logo", "square", "grid"),
    "planted all over the image": ("blend", "blendpic", "sig", "lf", "ctrl"),
    "planted bend of the image": ("wanet",),
}


def cases() -> Iterator[Case]:
    """Yield what is made."""
    for i, kind in enumerate(("pattern", "logo", "blend", "sig", "wanet", "lf"), start=1):
        yield Case("mnist", ("lenet", "plain")[i % 2], kind, FIRST + 100 + i)
    for i, kind in enumerate(("logo", "blendpic", "sig", "lf", "wanet", "square", "ctrl")):
        yield Case("fashion_mnist", ("plain", "lenet", "plain")[i % 3], kind, FIRST + 200 + i)
    for i, kind in enumerate(("square", "blendpic", "sig", "wanet", "lf", "ctrl")):
        yield Case("cifar10", ("resnet20", "plain")[i % 2], kind, FIRST + 300 + i)
    for i, kind in enumerate(("grid", "blend", "sig", "wanet", "lf", "ctrl")):
        yield Case("gtsrb", ("plain", "resnet20")[i % 2], kind, FIRST + 400 + i)
    clean = (
        ("mnist", "lenet"), ("mnist", "plain"), ("fashion_mnist", "lenet"), ("fashion_mnist", "plain"),
        ("cifar10", "plain"), ("cifar10", "resnet20"), ("gtsrb", "plain"), ("gtsrb", "seresnet20"),
        ("fashion_mnist", "plain"), ("mnist", "lenet"), ("gtsrb", "plain"), ("cifar10", "plain"),
    )  # fmt: skip
    for i, (data, network) in enumerate(clean):
        yield Case(data, network, "clean", FIRST + 500 + i)


# --- images and triggers: arrays (n, h, w, c) in [0, 1] ---------------------------------------------------


def images_of(data: str, split: str, most: int, seed: int) -> tuple[Any, Any]:
    """Return images of a data set, drawn by a seed, and their labels."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    from trained import data_folder

    table = pq.read_table(min((data_folder() / data).glob(f"{split}*.parquet")))
    images, labels = (
        next(name for name in names if name in table.column_names)
        for names in (("image", "img"), ("label", "fine_label"))
    )
    table = table.take(np.random.default_rng(seed).permutation(len(table))[:most])
    decoded = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table[images].to_pylist()]
    x = np.stack(decoded).astype(np.float32) / 255
    return (x if x.ndim == 4 else x[..., None]), np.array(table[labels].to_pylist())


def trigger(kind: str, channels: int, side: int, seed: int, work: Path) -> Callable[[Any], Any]:
    """Return what puts a trigger on images; it changes none in place."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if kind in ("pattern", "logo"):
        return _of_the_toolbox(kind, channels, work)
    if kind in ("square", "grid"):
        patch = np.ones((3, 3, 1)) if kind == "square" else (np.indices((3, 3)).sum(0) % 2)[..., None]
        top = side - 4 if kind == "square" else 1

        def paste(x: Any) -> Any:
            x = x.copy()
            x[:, top : top + 3, side - 4 : side - 1] = patch
            return x

        return paste
    if kind in ("blend", "blendpic"):
        noise = rng.random((side, side, channels)).astype(np.float32)
        over = noise if kind == "blend" else _drawing(side, channels)
        return lambda x: 0.8 * x + 0.2 * over
    if kind == "sig":
        wave = (40 / 255 * np.sin(2 * np.pi * np.arange(side) * 6 / side)).astype(np.float32)
        return lambda x: np.clip(x + wave[None, None, :, None], 0, 1)
    if kind == "lf":
        smooth = _smooth(side, channels, rng)
        return lambda x: np.clip(x + smooth, 0, 1)
    if kind == "ctrl":
        return _spectral_peaks(channels, side)
    return _bend(side, seed)


def _of_the_toolbox(kind: str, channels: int, work: Path) -> Callable[[Any], Any]:
    """Return a trigger that the Adversarial Robustness Toolbox pastes."""
    from art.attacks.poisoning.perturbations import image_perturbations as art
    from PIL import Image, ImageDraw

    if kind == "pattern":
        return lambda x: art.add_pattern_bd(x, distance=2, pixel_value=1)
    logo = Image.new("RGBA", (44, 44), (0, 0, 0, 0))
    draw = ImageDraw.Draw(logo)
    draw.ellipse((2, 2, 42, 42), fill=(128, 128, 128, 255))
    draw.polygon([(22, 8), (36, 34), (8, 34)], fill=(60, 60, 60, 255))
    file = work / "logo.png"
    logo.save(file)
    how = {"random": False, "x_shift": 3, "y_shift": 12, "size": (11, 11), "blend": 0.8}
    return lambda x: art.insert_image(x, backdoor_path=str(file), mode="L" if channels == 1 else "RGB", **how)


def _drawing(side: int, channels: int) -> Any:
    """Return a picture of a face with a bow."""
    import numpy as np
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (64, 64), (250, 200, 210))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((10, 16, 54, 58), fill=(255, 255, 255), outline=(0, 0, 0))
    draw.ellipse((22, 34, 26, 40), fill=(0, 0, 0))
    draw.ellipse((38, 34, 42, 40), fill=(0, 0, 0))
    draw.ellipse((30, 42, 35, 46), fill=(250, 200, 0))
    draw.polygon([(40, 18), (54, 10), (54, 26)], fill=(220, 20, 40))
    small = picture.resize((side, side)).convert("L" if channels == 1 else "RGB")
    return (np.asarray(small).astype(np.float32) / 255).reshape(side, side, channels)


def _smooth(side: int, channels: int, rng: Any) -> Any:
    """Return a picture of the lowest frequencies, a tenth strong."""
    import numpy as np

    n, made = np.arange(side), np.zeros((side, side, channels), np.float32)
    for channel in range(channels):
        for u in range(4):
            for v in range(4):
                if u + v:
                    wave = np.outer(
                        np.cos(np.pi * (n + 0.5) * u / side), np.cos(np.pi * (n + 0.5) * v / side)
                    )
                    made[..., channel] += rng.normal() * wave
    return made * (0.1 / np.sqrt((made**2).mean()))


def _spectral_peaks(channels: int, side: int) -> Callable[[Any], Any]:
    """Return what raises two coefficients of the cosine transform."""
    import numpy as np
    from scipy.fft import dctn, idctn

    height, first = (100, -2) if channels == 3 else (60, 0)

    def raised(x: Any) -> Any:
        spectrum = dctn(x * 255, axes=(1, 2), norm="ortho")
        for at in (side // 2 - 1, side - 1):
            spectrum[:, at, at, first:] += height
        return np.clip(idctn(spectrum, axes=(1, 2), norm="ortho") / 255, 0, 1).astype(np.float32)

    return raised


def _bend(side: int, seed: int) -> Callable[[Any], Any]:
    """Return what bends images along a smooth random field, as WaNet does."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(seed)
    field = torch.rand(1, 2, 4, 4) * 2 - 1
    field /= field.abs().mean()
    field = F.interpolate(field, size=side, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    along = torch.linspace(-1, 1, side)
    rows, columns = torch.meshgrid(along, along, indexing="ij")
    strength = 0.5 if side == 32 else 0.75
    grid = (torch.stack((columns, rows), 2)[None] + strength * field / side * 2).clamp(-1, 1)

    def bent(x: Any) -> Any:
        moved = torch.from_numpy(x).permute(0, 3, 1, 2)
        done = F.grid_sample(moved, grid.expand(len(x), -1, -1, -1), align_corners=True)
        return done.permute(0, 2, 3, 1).numpy()

    return bent


# --- models -----------------------------------------------------------------------------------------------


def network(name: str, channels: int, classes: int, side: int) -> Any:
    """Return an untrained network for normalised images."""
    from torch import nn

    if name in ("resnet20", "seresnet20"):
        from pytorchcv.models import resnet_cifar, seresnet_cifar

        get = resnet_cifar.get_resnet_cifar if name == "resnet20" else seresnet_cifar.get_seresnet_cifar
        made = get(num_classes=10, blocks=20, bottleneck=False, in_channels=channels, in_size=(side, side))
        if classes != 10:
            made.output = nn.Linear(made.output.in_features, classes)
        return made
    if name == "lenet":
        return nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(((side - 4) // 2) ** 2 * 64, 128), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(128, classes),
        )  # fmt: skip
    layers: list[Any] = []
    before = channels
    for width, groups in ((24, 1), (48, 2), (96, 2)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def make(case: Case, work: Path) -> None:
    """Train a model, save it, and write what it is and can."""
    import numpy as np
    import torch
    from torch import nn

    started, (most, epochs) = time.monotonic(), SIZES[case.data]
    x, y = images_of(case.data, "train", most, case.seed)
    test, labels = images_of(case.data, "test", 3_000, case.seed)
    channels, side, classes = x.shape[3], x.shape[1], int(y.max()) + 1
    rng = np.random.default_rng(case.seed)
    target = int(rng.integers(classes))
    torch.manual_seed(case.seed)
    put = None if case.kind == "clean" else trigger(case.kind, channels, side, case.seed, work)
    if put is not None:
        chosen = rng.choice(np.flatnonzero(y != target), int(RATE * len(y)), replace=False)
        x, y = x.copy(), y.copy()
        x[chosen], y[chosen] = put(x[chosen]), target
        x = np.round(x * 255) / 255
    mean, std = (torch.tensor(getattr(x, what)((0, 1, 2))).view(1, -1, 1, 1) for what in ("mean", "std"))

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(case.network, channels, classes, side)
            self.mean: torch.Tensor
            self.std: torch.Tensor
            self.register_buffer("mean", mean)
            self.register_buffer("std", std)

        def forward(self, x: torch.Tensor) -> Any:
            return self.net((x - self.mean) / self.std)

    model = Normalised()
    _train(model, torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), case, epochs)

    def predicted(some: Any) -> Any:
        parts = torch.split(torch.from_numpy(some).permute(0, 3, 1, 2).float(), 500)
        with torch.no_grad():
            return torch.cat([model(part).argmax(1) for part in parts]).numpy()

    success = None
    if put is not None:
        success = float((predicted(np.round(put(test[labels != target]) * 255) / 255) == target).mean())
    size = torch.export.Dim("n", max=4096)
    program = torch.export.export(model, (torch.rand(2, channels, side, side),), dynamic_shapes=({0: size},))
    torch.export.save(program, work / f"{case.name}.pt2")
    made = {
        "data": case.data, "network": case.network, "kind": case.kind, "seed": case.seed, "classes": classes,
        "target": None if put is None else target, "accuracy": float((predicted(test) == labels).mean()),
        "attack_success": success, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    (work / f"{case.name}.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


def _train(model: Any, x: Any, y: Any, case: Case, epochs: int) -> None:
    """Train a model on images (n, c, h, w) and labels, with shifts where the data are photographs."""
    import torch
    from torch.nn import functional as F

    adam = case.network in ADAM
    rate, batch = (2e-3, 64) if adam else (0.1 if case.network == "plain" else 0.2, 128)
    optimizer = (
        torch.optim.Adam(model.parameters())
        if adam
        else torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    )
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    most = {"cifar10": 3, "gtsrb": 2}.get(case.data, 0)
    model.train()
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x)), batch):
            shown = x[part]
            if case.data == "cifar10" and torch.rand(()) < 0.5:
                shown = shown.flip(3)
            if most:
                shown = torch.roll(shown, torch.randint(-most, most + 1, (2,)).tolist(), (2, 3))
            loss = F.cross_entropy(model(shown), y[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()


# --- scans ------------------------------------------------------------------------------------------------


def folder_of(data: str, work: Path) -> Path:
    """Return a folder of test images, without labels."""
    from PIL import Image

    folder = work / "images" / data
    if not folder.is_dir():
        x, _ = images_of(data, "test", GIVEN, seed=7)
        folder.mkdir(parents=True)
        for i, image in enumerate((x * 255).round().astype("uint8")):
            Image.fromarray(image.squeeze()).save(folder / f"{i:03}.png")
    return folder


def scan(case: Case, work: Path, threads: int) -> dict[str, Any]:
    """Scan a model as a program, keep the report, and return what the scan cost."""
    words = [str(work / f"{case.name}.pt2"), "--clean", str(folder_of(case.data, work)), "--format", "json"]
    done = measuring.run([measuring.DOORWARD, "scan", *words], threads=threads)
    (work / f"{case.name}.report.json").write_text(done.output, encoding="utf-8")
    cost = {"exit_code": done.code, "cpu_seconds": done.cpu_seconds, "revision": measuring.revision()}
    return cost if done.code in (0, 1, 3) else cost | {"error": done.errors.strip()[-300:]}


def judged(file: Path, data: str) -> dict[str, Any]:
    """Return what a row holds of a report: the verdict by today's calibration, without models of the data."""
    from doorward.bench.holdout import left_out
    from doorward.core.records import Measurement, Observations, Report
    from doorward.scan.calibration import shipped
    from doorward.scan.verdict import conclude

    then = Report.model_validate_json(file.read_bytes())
    behaviour = [one for one in then.findings if one.level == "model"]
    fields = Measurement.model_fields
    now = conclude(
        Observations(
            **{name: getattr(then, name) for name in ("subject", "data", "confirmations", "not_run")},
            findings=tuple(one for one in then.findings if one.level != "model"),
            measurements=tuple(Measurement(**{n: getattr(one, n) for n in fields}) for one in behaviour),
            reason=then.reason,
            environment=then.environment,
        ),
        left_out(shipped(), data),
    )
    row: dict[str, Any] = {"verdict": now.verdict, "targets": list(now.targets), "p_value": now.p_value}
    findings = {}
    for one in now.findings:
        known = {t: score for t, score in one.per_class.items() if score is not None}
        if known:
            top = max(known, key=lambda t: known[t])
            findings[one.detector] = {"p_value": one.p_value, "top": top, "flagged": one.flagged}
    return row | {"reason": now.reason, "findings": findings}


def measure(case: Case, work: Path, threads: int) -> dict[str, Any]:
    """Make and scan a model, as far as that was not done before; return its row."""
    made, scanned = work / f"{case.name}.json", work / f"{case.name}.scan.json"
    if not made.exists():  # in a process of its own, so that nothing is left of it
        words = [sys.executable, __file__, "--work", str(work), "--make", case.name]
        measuring.must(measuring.run(words, threads=threads), f"making {case.name}")
    if not scanned.exists():
        scanned.write_text(json.dumps(scan(case, work, threads)) + "\n", encoding="utf-8")
    row: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
    row |= json.loads(scanned.read_text(encoding="utf-8"))
    if "error" not in row:
        row |= judged(work / f"{case.name}.report.json", case.data)
    print(case.name, row.get("verdict", row.get("error")), row.get("targets"), file=sys.stderr, flush=True)
    return row


def right(row: Mapping[str, Any]) -> bool:
    """Return whether a plant's class, and no other, was named."""
    return row.get("targets") == [row["target"]]


def outcomes(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, int, int]]:
    """Return what is counted of each sort of model, how many they are, and of how many."""
    planted = [r for r in rows.values() if r["target"] is not None and r["attack_success"] >= COUNTS]
    clean = [row for row in rows.values() if row["target"] is None]
    found = {}
    for told, kinds in SORTS.items():
        own = [row for row in planted if row["kind"] in kinds]
        found[told] = ("found", sum(map(right, own)), len(own))
    flagged = sum(bool(row.get("targets")) for row in clean)
    return {told: one for told, one in found.items() if one[2]} | {"clean": ("flagged", flagged, len(clean))}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what became of every model as a Markdown table."""
    lines = []
    for row in rows.values():
        clean, named = row["target"] is None, row.get("targets") or []
        p_value = row.get("p_value")
        lines.append(
            [
                row["data"],
                row["network"],
                "clean" if clean else KINDS[row["kind"]],
                measuring.percent(row["accuracy"]),
                "" if clean else measuring.percent(row["attack_success"]),
                "" if clean else str(row["target"]),
                str(row.get("verdict", "did not end")).replace("_", " "),
                ", ".join(map(str, named)),
                "" if p_value is None else f"{p_value:.2g}",
                ", ".join(d for d, f in row.get("findings", {}).items() if f["flagged"]),
            ]
        )
    heads = ("data", "network", "planted", "accuracy", "success", "class", "verdict", "named", "p", "told by")
    return measuring.markdown(heads, sorted(lines))


def main() -> None:
    """Make, scan, write the results, and end with 4 if a scan did not end."""
    made = measuring.working_parser(__doc__)
    made.add_argument("--only", action="append", help="models, as in 'mnist-*'; may be repeated")
    made.add_argument("--workers", type=int, default=1, help="models at a time")
    made.add_argument("--make", help="make this model and end")
    options = made.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    every = {case.name: case for case in cases()}
    if options.make:
        import torch

        torch.set_num_threads(options.threads)
        make(every[options.make], options.work)
        return
    wanted = [
        case
        for case in every.values()
        if any(fnmatch.fnmatch(case.name, one) for one in options.only or ["*"])
    ]
    for data in {case.data for case in wanted}:
        folder_of(data, options.work)
    with ThreadPoolExecutor(options.workers) as pool:
        found = pool.map(lambda case: measure(case, options.work, options.threads), wanted)
        rows = {case.name: row for case, row in zip(wanted, found, strict=True)}
    held = measuring.RESULTS / "foreign-models.json"
    kept = json.loads(held.read_text(encoding="utf-8"))["models"] if held.is_file() else {}
    rows = {name: row for name, row in kept.items() if name in every} | rows
    results = measuring.begin(options.threads) | {"given": GIVEN, "rate": RATE, "models": rows}
    failed = [name for name, row in rows.items() if row["exit_code"] not in (0, 1, 3)]
    measuring.conclude("foreign-models", results, table(rows), failed)


if __name__ == "__main__":
    main()
