"""What is said of a model on the command line: how it is built, what it takes, and what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from doorward.cli.options import labels, numbers
from doorward.core.errors import InputError

FACTORY = typer.Option(
    None,
    metavar="F",
    help="package.module:function or file.py:function that returns the torch module; modules in the current "
    "folder are found too. This runs your code.",
)
WEIGHTS = typer.Option(
    None, metavar="W", help="With --factory: a .safetensors file, or a .pt file of weights only."
)
INPUT_RANGE = typer.Option(
    None, metavar="LOW,HIGH", help="What [0, 1] images are stretched to before mean and std, as in 0,255."
)
MEAN = typer.Option(None, metavar="M", help="One number, or one per channel with commas.")
STD = typer.Option(None, metavar="S", help="One number, or one per channel with commas.")
LAYOUT = typer.Option(None, metavar="NCHW|NHWC", help="Order of the axes the model takes.")
CHANNELS = typer.Option(None, metavar="rgb|bgr", help="Order of the colours that the model takes.")
SIZE = typer.Option(None, metavar="C,H,W", help="Channels, height and width, where the file does not tell.")
RESIZE = typer.Option(
    None,
    metavar="SIDE|H,W",
    help="What images are resized to first: their shorter side, or height and width. What is then larger "
    "than the model's images is cropped around the centre. Colours become grey, or grey colours, as the "
    "model takes them.",
)
OUTPUT = typer.Option(None, metavar="KIND", help="What the model gives: logits, probabilities or one_logit.")
LABEL_NAMES = typer.Option(
    None, "--labels", metavar="NAMES", help="Class names with commas, or @FILE with one a line."
)
FEATURES = typer.Option(
    None, metavar="NAME", help="The layer whose input are the features, if not the last linear one."
)


def refuse_weights_alone(weights: Path | None, factory: str | None) -> None:
    """Raise where weights are named and nothing says what network they are of.

    Raises:
        InputError: if so.
    """
    if weights is not None and factory is None:
        raise InputError("--weights goes with --factory, the function that builds the network for them")


def stated_options(
    *,
    input_range: str | None,
    mean: str | None,
    std: str | None,
    layout: str | None,
    channels: str | None,
    size: str | None,
    resize: str | None,
    output: str | None,
    label_names: str | None,
    features: str | None = None,
) -> dict[str, Any]:
    """Return what the options above say, by the names of `LoadOptions`. Torch is not loaded for it.

    Raises:
        InputError: naming the option that cannot.
    """
    low_high = numbers(input_range, "--input-range")
    if low_high is not None and len(low_high) != 2:
        raise InputError(f"--input-range takes two numbers, as in 0,255, got {input_range!r}")
    shape = numbers(size, "--size")
    if shape is not None and (len(shape) != 3 or any(v != int(v) or v < 1 for v in shape)):
        raise InputError(f"--size takes channels,height,width, as in 3,224,224, got {size!r}")
    sides = numbers(resize, "--resize")
    if sides is not None and (len(sides) > 2 or any(v != int(v) or v < 1 for v in sides)):
        raise InputError(f"--resize takes one side or height,width, as in 256 or 48,192, got {resize!r}")
    if layout not in (None, "NCHW", "NHWC"):
        raise InputError(f"--layout is NCHW or NHWC, got {layout!r}")
    if channels is not None and channels.lower() not in ("rgb", "bgr"):
        raise InputError(f"--channels is rgb or bgr, got {channels!r}")
    if output not in (None, "logits", "probabilities", "one_logit"):
        raise InputError(f"--output is logits, probabilities or one_logit, got {output!r}")
    means, stds, names = numbers(mean, "--mean"), numbers(std, "--std"), labels(label_names)
    return {
        "input_range": low_high,
        "mean": means,
        "std": stds,
        "layout": layout,
        "output": output,
        "labels": names,
        "features": features,
        "channel_order": channels.upper() if channels else None,
        "size": tuple(int(side) for side in shape) if shape else None,
        "resize": tuple(int(side) for side in sides) if sides else None,
    }
