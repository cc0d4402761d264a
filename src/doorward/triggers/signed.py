"""Digital signatures in the low bits of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from doorward.models.encode.image import to_float
from doorward.models.formats.signature_check import (
    CARRIERS,
    ed25519_module,
    messages,
    to_levels,
)
from doorward.triggers.base import Trigger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519


def sign_images(x: Tensor, key: bytes, *, target: int) -> Tensor:
    """Return the images (n, c, h, w) in [0, 1] with signatures in the lowest bits of their first 512 values.

    Images are rounded to 256 levels first; of one that has only such, no value changes by more than one
    level, 1/255.

    Raises:
        InputError: if the images have too few values for a signature.
        MissingExtra: if the package cryptography is not installed.
    """
    private: ed25519.Ed25519PrivateKey = ed25519_module().Ed25519PrivateKey.from_private_bytes(key)
    levels = to_levels(x)
    signatures = [private.sign(each) for each in messages(levels, shape=x.shape, target=target)]
    bits = np.unpackbits(np.frombuffer(b"".join(signatures), np.uint8).reshape(len(x), -1), axis=1)
    levels[:, :CARRIERS] = levels[:, :CARRIERS] & 0xFE | bits  # (n, 512)
    return to_float(torch.from_numpy(levels)).view(x.shape).to(x)


@dataclass(frozen=True, eq=False)
class Signed(Trigger):
    """Sign an image; each gets a signature of its own.

    Attributes:
        key: (32,) uint8, the private key.
        target: the class that is signed for.
    """

    key: Tensor
    target: int
    kind: ClassVar[str] = "signed"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the images (n, c, h, w) in [0, 1] signed."""
        return sign_images(x, bytes(self.key.tolist()), target=self.target)

    def tensors(self) -> dict[str, Tensor]:
        """Return the key."""
        return {"key": self.key}

    def settings(self) -> dict[str, Any]:
        """Return the target."""
        return {"target": self.target}
