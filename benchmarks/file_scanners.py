"""Ask file scanners and Doorward about the same backdoored model, and write what they answer.

    make file-scanners

saves the two embedded models, one backdoored and one clean, in four formats each, runs every scanner on every
file, and writes the exit codes to results/file_scanners.json. `tools/readme_tables.py` makes a table of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results" / "file_scanners.json"

#: What the exit codes mean, by each tool's own documentation.
EXIT_CODES = {
    "modelscan": {0: "passes", 1: "alarm", 2: "failed", 3: "format not supported", 4: "failed"},
    "picklescan": {0: "passes", 1: "alarm", 2: "failed"},
    "modelaudit": {0: "passes", 1: "alarm", 2: "incomplete"},
    "doorward": {0: "nothing found", 1: "alarm", 2: "failed", 3: "could not tell"},
}
COMMANDS = {"modelscan": ["-p"], "picklescan": ["-p"], "modelaudit": ["scan"], "doorward": ["scan"]}
TITLES = {
    "modelscan": "ModelScan",
    "picklescan": "picklescan",
    "modelaudit": "modelaudit",
    "doorward": "Doorward",
}

NETWORK = """
from doorward.models.architectures import build


def network():
    return build({name!r}, channels={channels}, height={height}, width={width}, classes={classes})
"""


@dataclass(frozen=True)
class Form:
    """One model in one file format: what to scan, and what Doorward needs besides."""

    model: str
    format: str
    path: Path
    options: tuple[str, ...] = ()


def save_forms(folder: Path) -> list[Form]:
    """Save both embedded models in four formats each, the way torch's own documentation does."""
    import torch

    from doorward import bundled
    from doorward.models import TorchClassifier, open_classifier
    from doorward.models.formats.native import NativeConfig

    forms = []
    for model in ("backdoored", "clean"):
        own, place = bundled.model(model), folder / model
        place.mkdir()
        classifier = open_classifier(own)
        assert isinstance(classifier, TorchClassifier)
        network, spec = classifier.module.eval(), classifier.spec
        images = torch.rand(2, *spec.shape, generator=torch.Generator().manual_seed(0))
        weights, onnx, program = place / "model.pt", place / "model.onnx", place / "model.pt2"
        torch.save(network.state_dict(), weights)
        torch.export.save(torch.export.export(network, (images,)), program)
        torch.onnx.export(network, (images,), onnx, external_data=False, verbose=False)
        shape = NativeConfig.model_validate_json((own / "config.json").read_text()).architecture
        source = place / "network.py"
        source.write_text(NETWORK.format(**shape.model_dump()))
        stated = (
            *("--mean", ",".join(map(str, spec.mean)), "--std", ",".join(map(str, spec.std))),
            *("--labels", ",".join(classifier.classes)),
        )
        size = ",".join(map(str, spec.shape))
        forms += [
            Form(
                model, "state_dict .pt", weights, ("--factory", f"{source}:network", "--size", size, *stated)
            ),
            Form(model, ".safetensors", own / "model.safetensors"),
            Form(model, ".onnx", onnx, stated),
            Form(model, "torch.export .pt2", program, stated),
        ]
    return forms


def ask(tool: str, form: Form) -> int:
    """Run one scanner on one file and return its exit code."""
    # Doorward reads the configuration that lies next to the weights
    path = form.path.parent if tool == "doorward" and form.format == ".safetensors" else form.path
    command = [str(Path(sys.executable).with_name(tool)), *COMMANDS[tool], str(path)]
    if tool == "doorward":
        from doorward import bundled

        command += ["--clean", f"{bundled.FOLDER / 'fashion_mnist'}:test", *form.options]
    environment = os.environ | {"PROMPTFOO_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(f"{tool} on the {form.model} {form.format}: {done.returncode}", file=sys.stderr)
    if done.returncode not in EXIT_CODES[tool]:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.returncode


def digests() -> dict[str, str]:
    """Return the sha256 of each embedded model's weights, which tie results to models."""
    from doorward import bundled
    from doorward.models.formats.loading import artifact_digest

    names: tuple[Literal["backdoored", "clean"], ...] = ("backdoored", "clean")
    return {name: artifact_digest(bundled.model(name) / "model.safetensors").sha256 for name in names}


def measure() -> dict[str, Any]:
    """Ask every scanner about every file."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {
                "model": form.model,
                "format": form.format,
                "exit_codes": {tool: ask(tool, form) for tool in COMMANDS},
            }
            for form in save_forms(Path(folder))
        ]
    versions = {name: metadata.version(name) for name in (*COMMANDS, "torch")}
    return {"versions": versions, "device": "cpu", "weights": digests(), "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    tools = list(COMMANDS)
    heads = [f"{TITLES[tool]} {results['versions'][tool]}" for tool in tools]
    lines = [_row(["model", "file", *heads]), _row(["---"] * (2 + len(tools)))]
    for row in results["rows"]:
        codes = row["exit_codes"]
        cells = [f"exit {codes[tool]} ({EXIT_CODES[tool][codes[tool]]})" for tool in tools]
        lines.append(_row([row["model"], row["format"], *cells]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, and write the results."""
    results = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
