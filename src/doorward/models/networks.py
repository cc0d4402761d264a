"""Networks to train, by name, for every kind of input."""

from __future__ import annotations

import torch
from torch import nn

from doorward.core.errors import InputError
from doorward.models import architectures, sequences
from doorward.models.spec import InputSpec

#: The kind of input that each network takes, by its name.
NAMES: dict[str, str] = dict.fromkeys(architectures.NAMES, "image") | {
    name: spec.modality for name, spec in sequences.NAMES.items()
}


def check(name: str, modality: str) -> None:
    """Raise unless there is a network of that name for that kind of input.

    Raises:
        InputError: naming those that there are.
    """
    fitting = ", ".join(own for own, kind in NAMES.items() if kind == modality)
    if name not in NAMES:
        raise InputError(f"there is no architecture named {name!r}; there are: {', '.join(NAMES)}")
    if NAMES[name] != modality:
        raise InputError(f"{name} works on {NAMES[name]} data, not {modality}; of that, there are: {fitting}")


def usual(spec: InputSpec) -> str:
    """Return the network to train where none is named."""
    if spec.modality == "image":
        return "small-cnn" if min(spec.height, spec.width) < 32 else "resnet-8"
    return next(name for name, kind in NAMES.items() if kind == spec.modality)


def build(name: str, spec: InputSpec, *, classes: int, generator: torch.Generator | None = None) -> nn.Module:
    """Return a network with random weights, in training mode.

    Args:
        generator: source of the weights; seed 0 if None. The global generator is left alone.

    Raises:
        InputError: if the name is unknown, or the network does not take such inputs.
    """
    check(name, spec.modality)
    if name in sequences.NAMES:
        return sequences.build(name, spec, classes=classes, generator=generator)
    return architectures.build(
        name,
        channels=spec.channels,
        height=spec.height,
        width=spec.width,
        classes=classes,
        generator=generator,
    )
