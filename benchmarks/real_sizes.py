"""Measure what a scan of a model of real size takes, and whether it keeps its time budget.

    python benchmarks/real_sizes.py --work FOLDER

builds ResNet-50 and ViT-B/16 of transformers from their configurations (224 pixels; weights are random, which
is as good for cost) and 100 generated JPEG files, and scans each model by `doorward scan` in a process of its
own: without clean images, with images of random labels, and with labels that are the model's own answers, so
that it is right and the detectors run. Besides the 1,000 classes of ImageNet there are versions with ten, on
which the detectors work until the time is over.

Ends with 4 if a scan gives neither a verdict nor a reason, takes more than 15 minutes or 8 GB, or overruns
its time budget.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import measuring

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: What a scan may take: seconds and bytes.
MOST_SECONDS, MOST_BYTES = 900.0, 8e9
#: Seconds by which a scan may overrun its budget: one batch, the hashes and the report.
GRACE = 10.0
IMAGES, SIDE = 100, 224
Network = Literal["resnet-50", "vit-b-16"]
Labels = Literal["none", "random", "own answers"]


@dataclass(frozen=True)
class Scan:
    """What to scan: which model of how many classes, with which labels, in how many seconds."""

    network: Network
    classes: int
    labels: Labels
    budget: int


SCANS = tuple(
    Scan(network, classes, labels, budget)
    for classes, kinds in ((1000, get_args(Labels)), (10, ("own answers",)))
    for network in get_args(Network)
    for labels in kinds
    for budget in (60, 900)
)


def pictures(seed: int = 0) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield generated pictures (h, w, 3): colour gradients, a few discs, some noise."""
    import numpy as np

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    for _ in range(IMAGES):
        slopes = rng.uniform(-1, 1, (3, 2))
        image = 0.5 + 0.5 * (slopes[:, 0] * x[..., None] + slopes[:, 1] * y[..., None])  # (h, w, 3)
        for _ in range(4):
            row, column, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.3)
            image[(y - row) ** 2 + (x - column) ** 2 < radius**2] = rng.uniform(0, 1, 3)
        image += rng.normal(0, 0.03, image.shape)
        yield (image.clip(0, 1) * 255).round().astype(np.uint8)


def build(network: str, classes: int, folder: Path) -> None:
    """Write a model with random weights and two folders of images, labelled at random and by the model.

    The last layer is shifted so that the answers spread over the classes.
    """
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    names = {i: f"class {i:04d}" for i in range(classes)}
    torch.manual_seed(0)
    model: Any
    if network == "resnet-50":
        resnet = transformers.ResNetConfig(id2label=names, label2id={})
        model = transformers.ResNetForImageClassification(resnet).eval()
    else:
        vit = transformers.ViTConfig(image_size=SIDE, patch_size=16, id2label=names, label2id={})
        model = transformers.ViTForImageClassification(vit).eval()
    processor = transformers.ViTImageProcessor(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    own = folder / "unsorted"
    own.mkdir(parents=True)
    files = []
    for number, picture in enumerate(pictures()):
        files.append(own / f"{number:03d}.jpg")
        Image.fromarray(picture).save(files[-1], quality=92)
    with torch.no_grad():
        inputs = (processor(Image.open(file), return_tensors="pt") for file in files)
        z = torch.cat([model(**one).logits for one in inputs])  # (n, k)
        layer = model.classifier if isinstance(model.classifier, torch.nn.Linear) else model.classifier[-1]
        layer.bias -= z.mean(0)
        # far apart, as a trained model's are, so that rounding changes no answer
        scale = 5 / (z - z.mean(0)).std()
        layer.weight *= scale
        layer.bias *= scale
    answers = ((z - z.mean(0)) * scale).argmax(1).tolist()
    drawn = np.random.default_rng(1).integers(0, classes, IMAGES).tolist()
    for kind, labels in (("own answers", answers), ("random", drawn)):
        for file, label in zip(files, labels, strict=True):
            place = folder / kind / names[label]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place / file.name)
    shutil.rmtree(own)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def measure(scan: Scan, work: Path, *, threads: int) -> dict[str, Any]:
    """Build the model, unless it is there, and scan it in a process of its own."""
    folder = work / f"{scan.network}-{scan.classes}"
    if not (folder / "model" / "preprocessor_config.json").exists():
        words = [sys.executable, __file__, "build", scan.network, str(scan.classes), str(folder)]
        measuring.must(measuring.run(words, threads=threads), "building")
    arguments = [str(folder / "model"), f"--time-budget={scan.budget}"]
    if scan.labels != "none":
        arguments.append(f"--clean={folder / scan.labels}")
    return asdict(scan) | measuring.scan(arguments, threads=threads, limit=2 * MOST_SECONDS)


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for row in results["scans"]:
        where = f"{row['network']}, {row['classes']} classes, labels {row['labels']}, {row['budget']} s"
        if "verdict" not in row:
            yield f"{where}: no verdict: {row['error']}"
            continue
        if row["verdict"] == "could_not_tell" and not row["reason"]:
            yield f"{where}: could not tell, without a reason"
        if row["seconds"] > MOST_SECONDS:
            yield f"{where}: took {row['seconds']:.0f} s"
        if row["peak_bytes"] > MOST_BYTES:
            yield f"{where}: took {measuring.gigabytes(row['peak_bytes'])}"
        if row["scan_seconds"] > row["budget"] + GRACE:
            yield f"{where}: the scan took {row['scan_seconds']:.0f} s"


def render(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, a line a scan."""
    heads = [
        "model",
        "classes",
        "labels",
        "time budget",
        "wall time",
        "CPU time",
        "peak memory",
        "verdict",
        "reason",
    ]
    rows = [
        [
            row["network"],
            f"{row['classes']:,}",
            row["labels"],
            f"{row['budget']} s",
            f"{row['seconds']:.0f} s",
            f"{row['cpu_seconds']:.0f} s",
            measuring.gigabytes(row["peak_bytes"]),
            row.get("verdict", "failed").replace("_", " "),
            row.get("reason") or "; ".join(_reasons(row)),
        ]
        for row in results["scans"]
    ]
    return measuring.markdown(heads, rows)


def _reasons(row: dict[str, Any]) -> list[str]:
    """Return why some detectors say nothing where others do."""
    return [f"{f['detector']}: {f['reason']}" for f in row.get("findings", ()) if f["reason"]]


def main() -> None:
    """Build, scan, and write what came out."""
    if sys.argv[1:2] == ["build"]:
        network, classes, folder = sys.argv[2:]
        build(network, int(classes), Path(folder))
        return
    parser = measuring.working_parser(__doc__)
    parser.add_argument("--short", action="store_true", help="leave out the scans of ten classes in 900 s")
    options = parser.parse_args()
    scans = [scan for scan in SCANS if not (options.short and (scan.classes, scan.budget) == (10, 900))]
    results = measuring.begin(options.threads) | {
        "images": IMAGES,
        "scans": [],
    }
    for scan in scans:
        results["scans"].append(measure(scan, options.work.resolve(), threads=options.threads))
        print(
            render(results | {"scans": results["scans"][-1:]}).splitlines()[-1], file=sys.stderr, flush=True
        )
    measuring.conclude("real_sizes", results, render(results), failures(results))


if __name__ == "__main__":
    main()
