"""Export small models in the formats that people exchange, open the files, and compare logits.

    python benchmarks/exports.py [NAME ...]

takes twelve architectures of transformers, small and with random weights, and exports each as a torch.export
program and as ONNX, by torch's old exporter and by its new one, of opsets from 14 to 20. Every file is opened
as a scan opens it. None that was exported may be refused or give other logits, and all have gradients. Ends
with 4 if one is not so.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import architectures
import measuring

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Largest difference of a logit from torch's own, as a share of the largest.
TOLERANCE = 1e-3
#: Architectures, and the side of the images that each takes.
NETWORKS = {
    "resnet": 64,
    "regnet": 64,
    "convnext": 64,
    "mobilenet_v2": 64,
    "efficientnet": 64,
    "vit of 64 pixels": 64,
    "swin": 224,
    "swinv2": 256,
    "levit": 224,
    "mobilevit": 256,
    "poolformer": 64,
    "pvt_v2": 64,
}


@dataclass(frozen=True)
class Form:
    """A format.

    Attributes:
        opset: of ONNX; None for a torch.export program.
        dynamo: whether torch's new exporter writes the ONNX file.
        dynamic: whether a batch may have any size.
    """

    opset: int | None = None
    dynamo: bool = False
    dynamic: bool = True

    def __str__(self) -> str:
        """Return its name."""
        kind = "pt2" if self.opset is None else f"onnx {self.opset} {'new' if self.dynamo else 'old'}"
        return kind if self.dynamic else f"{kind}, one image"


FORMS = (
    Form(),
    Form(14),
    Form(17, dynamic=False),
    Form(18, dynamo=True),
    Form(20, dynamo=True, dynamic=False),
)


def network_of(name: str) -> nn.Module:
    """Return a small network that gives logits (n, k) and nothing else."""
    from torch import nn

    with tempfile.TemporaryDirectory() as place:
        built = architectures.build(name, Path(place))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = built

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(pixel_values=images).logits
            return logits

    return Logits().eval()


def export(network: nn.Module, form: Form, x: Tensor, folder: Path) -> Path:
    """Write a network in a format; return the file."""
    import torch

    shapes = ({0: torch.export.Dim("n", min=1)},) if form.dynamic else None
    given = (x if form.dynamic else x[:1],)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form.opset is None:
            path = folder / "model.pt2"
            torch.export.save(torch.export.export(network, given, dynamic_shapes=shapes), path)
            return path
        path = folder / "model.onnx"
        axes: dict[str, Any] = {"dynamic_axes": {"images": {0: "n"}}} if form.dynamic else {}
        torch.onnx.export(
            network,
            given,
            str(path),
            input_names=["images"],
            output_names=["logits"],
            opset_version=form.opset,
            dynamo=form.dynamo,
            external_data=False,
            verbose=False,
            **({"dynamic_shapes": shapes} if form.dynamo else axes),
        )
    return path


def measure_one(network: nn.Module, form: Form, side: int) -> dict[str, Any]:
    """Export a network and open the file; return what came of it."""
    import torch

    from doorward.core.errors import DoorwardError
    from doorward.models import LoadOptions, open_classifier
    from doorward.models.formats.huggingface import quiet

    started = time.process_time()
    x = torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(1))
    row: dict[str, Any] = {"form": str(form), "outcome": "", "said": ""}
    with tempfile.TemporaryDirectory() as place, quiet():
        try:
            path = export(network, form, x, Path(place))
        except Exception as error:  # torch's exporters fail in many kinds
            return row | {"outcome": "not exported", "said": _line(error)}
        try:
            classifier = open_classifier(path, options=LoadOptions(size=(3, side, side)))
            with torch.no_grad():
                ours, own = classifier.logits(x), network(x)
        except DoorwardError as error:
            return row | {"outcome": "refused", "said": _line(error).replace(place, "")}
        except Exception as error:  # a fault is what this looks for
            return row | {"outcome": "fault", "said": f"{type(error).__name__}: {_line(error)}"}
    limitation = getattr(classifier, "limitation", None)
    row["difference"] = float((ours - own).abs().max() / own.abs().max())
    row["outcome"] = "same logits" if row["difference"] <= TOLERANCE else "other logits"
    if row["outcome"] == "same logits" and "gradients" not in classifier.capabilities:
        row |= {"outcome": "no gradients", "said": limitation}
    return row | {"cpu_seconds": round(time.process_time() - started, 1)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for row in results["rows"]:
        if row["outcome"] not in ("same logits", "not exported"):
            yield f"{row['architecture']}, {row['form']}: {row['outcome']} {row['said']}"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, a line an architecture."""
    names = list(dict.fromkeys(row["architecture"] for row in results["rows"]))
    found = {(row["architecture"], row["form"]): row for row in results["rows"]}
    lines = []
    for name in names:
        rows = [found[name, str(form)] for form in FORMS]
        largest = max((row["difference"] for row in rows if "difference" in row), default=float("nan"))
        lines.append([name, *(row["outcome"] for row in rows), f"{largest:.0e}"])
    return measuring.markdown(["architecture", *map(str, FORMS), "largest difference"], lines)


def main() -> None:
    """Measure, write the results, and end with 4 if anything is not as it must be."""
    made = measuring.parser(__doc__, threads=1)
    made.add_argument("names", nargs="*", metavar="NAME", help="architectures; all if there are none")
    options = measuring.here(made)
    results = measuring.begin(options.threads) | {"tolerance": TOLERANCE, "rows": []}
    for name in options.names or NETWORKS:
        network = network_of(name)
        for form in FORMS:
            row = {"architecture": name} | measure_one(network, form, NETWORKS[name])
            results["rows"].append(row)
            print(f"{name}, {form}: {row['outcome']} {row['said']}", file=sys.stderr, flush=True)
    if options.names:
        print(table(results))
        raise SystemExit(4 if list(failures(results)) else 0)
    measuring.conclude("exports", results, table(results), failures(results))


if __name__ == "__main__":
    main()
