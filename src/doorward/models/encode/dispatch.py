"""Whatever the kind of input: samples become what classifiers take.

Each kind has a module of its own in this package. It gives `to_tensor`, which decodes samples into a compact
tensor (n, c, h, w), and `to_float`, which turns such a tensor into what classifiers take.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from doorward.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from doorward.data import Samples
    from doorward.models.spec import InputSpec

#: What many inputs of a kind are called, for messages.
NOUNS = {"image": "images", "text": "texts", "audio": "recordings"}


class _Room(Protocol):
    DTYPE: torch.dtype

    def to_tensor(self, samples: Samples, spec: Any) -> Tensor: ...

    def to_float(self, x: Tensor) -> Tensor: ...


def to_tensor(samples: Samples, spec: InputSpec) -> Tensor:
    """Decode all samples into one compact tensor (n, c, h, w) that fits the spec.

    Raises:
        InputError: if they are of another kind than the spec's, or one does not fit.
    """
    if samples.modality != spec.modality:
        raise InputError(
            f"the model takes {NOUNS[spec.modality]}, and {samples.provenance.path} holds "
            f"{NOUNS[samples.modality]}"
        )
    return _room(spec).to_tensor(samples, spec)


def to_float(x: Tensor, spec: InputSpec) -> Tensor:
    """Turn what `to_tensor` gave into what a classifier takes."""
    return _room(spec).to_float(x)


def blank(spec: InputSpec, n: int = 1) -> Tensor:
    """Return n inputs without content, as compact as what `to_tensor` gives: black, without words, silent."""
    import torch

    return torch.zeros(n, *spec.shape, dtype=_room(spec).DTYPE)


def _room(spec: InputSpec) -> _Room:
    return cast(_Room, import_module(f"doorward.models.encode.{spec.modality}"))
