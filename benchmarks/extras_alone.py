"""Install the wheel with each extra alone into an empty environment, and use what the extra is for.

    python -m pip install build uv
    python benchmarks/extras_alone.py [--only EXTRA]

builds sdist and wheel by `python -m build`, makes an environment for each extra by uv, whose cache links
files instead of copying them, and runs a command there that needs the extra. It writes
benchmarks/results/extras-alone.json, and ends with 4 if a command does not end as it should. The variable
UV_EXTRA_INDEX_URL names an extra package index to take torch from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

import measuring

RESULTS = measuring.RESULTS / "extras-alone.json"
MODEL = "$(python -c 'from doorward import bundled; print(bundled.model(\"clean\"))')"
IMAGES = "$(python -c 'from doorward import bundled; print(bundled.FOLDER / \"fashion_mnist\")'):test"
#: What each extra is for, as a command that ends with 0 where the extra suffices. The name "" is no extra.
USES = {
    "": f"doorward -V && doorward list detectors && doorward scan --files-only {MODEL} && "
    f"doorward scan {MODEL} --clean {IMAGES} --images 40 --detector max-margin && "
    f"doorward plant badnets {IMAGES} poisoned --set target=3",
    "hf": "python -c 'import transformers, datasets, doorward.models.formats.huggingface'",
    "keras": "python -c 'import pyfive, doorward.models.formats.keras.loader'",
    "tflite": "python -c 'import tflite, flatbuffers, doorward.models.formats.tflite.loader'",
    "onnx": "python -c 'import onnx, onnxruntime, onnxscript, doorward.models.formats.onnx.loader'",
    "audio": "python -c 'import soundfile, doorward.data'",
    "serve": "python -c 'import doorward.guard.serving.app'",
    "bench": "doorward bench list && doorward bench run null --cache cache --dry-run",
    "fleet": f"mkdir models && cp -r {MODEL} models/ && doorward fleet scan models --detector unsafe-code || "
    "test $? = 3",
    "s3": "python -c 'import s3fs, doorward'",
    "postgres": "python -c 'import psycopg, doorward'",
    "signature": "python -c 'import cryptography, doorward.models.formats.signature_check'",
    "bom": f"doorward scan {MODEL} --detector unsafe-code --format cyclonedx > bom.json || test $? = 3; "
    "python -c 'import json; assert json.load(open(\"bom.json\"))[\"bomFormat\"] == \"CycloneDX\"'",
    "sign": "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
    "openssl ec -in key.pem -pubout -out key.pub && "
    f"(doorward scan {MODEL} --detector unsafe-code --out out --sign-key key.pem || test $? = 3) && "
    "doorward verify out --key key.pub --no-scan",
    "evasion": "python -c 'import art, doorward.bench.evasion._toolbox'",
}  # fmt: skip


def ran(command: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """Run a command, and return its exit code and the last lines of what it says."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])


def tried(extra: str, wheel: Path, folder: Path) -> dict[str, Any]:
    """Install the wheel with an extra, and run the extra's use."""
    place = folder / (extra or "none")
    place.mkdir()
    named = f"{wheel}[{extra}]" if extra else str(wheel)
    constraints = str(measuring.ROOT / "constraints.txt")
    uv = [sys.executable, "-m", "uv"]
    home = place / "home"
    made, said = ran([*uv, "venv", "--quiet", "--python", sys.executable, str(home)], place)
    if not made:
        made, said = ran(
            [*uv, "pip", "install", "--quiet", "--index-strategy", "unsafe-best-match", "--constraint",
             constraints, "--python", str(home / "bin/python"), named],
            place,
        )  # fmt: skip
    code = 0
    if not made:
        path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        code, said = ran(["bash", "-c", USES[extra]], place, PATH=path, PYTHONPATH="", OMP_NUM_THREADS="1")
    return {"extra": extra, "installed": not made, "exit_code": code, "said": said if made or code else ""}


def main(
    only: Annotated[str | None, typer.Option(help="One extra; nothing is written.")] = None,
) -> None:
    """Try all extras but those that name others or a cluster's or registry's own installation."""
    project = tomllib.loads((measuring.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"all", "ray", "mlflow"}
    assert extras | {""} == set(USES), "each extra has a use"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(measuring.ROOT)]
        code, said = ran(build, folder)
        assert code == 0, said
        (wheel,) = (folder / "dist").glob("*.whl")
        rows = []
        for extra in USES if only is None else [only]:
            rows.append(tried(extra, wheel, folder))
            print(rows[-1], file=sys.stderr)
    if only is None:
        written = {"extras": rows, "made": measuring.begin(threads=1)}
        RESULTS.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(row["installed"] and not row["exit_code"] for row in rows) else 4)


if __name__ == "__main__":
    typer.run(main)
