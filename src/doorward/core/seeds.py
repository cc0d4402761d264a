"""Seeds for each purpose, derived from one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *labels: str) -> int:
    """Derive a 63-bit seed for one purpose, so that methods draw independent numbers from one seed."""
    text = "\0".join([str(seed), *labels])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(seed: int, *labels: str) -> torch.Generator:
    """Return a CPU generator for one purpose; draws are made on the CPU so that devices agree."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *labels))
