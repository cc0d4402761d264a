"""Adam in place, on plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Adam:
    """Move a tensor in place by Adam's rule (D. Kingma, J. Ba, arXiv 1412.6980).

    `torch.optim` would load torch's compiler first, which takes as long as much of a scan.
    """

    def __init__(self, at: Tensor, learning_rate: float, betas: tuple[float, float] = (0.5, 0.9)) -> None:
        self.at, self.learning_rate, self.betas = at, learning_rate, betas
        self._mean, self._square = torch.zeros_like(at), torch.zeros_like(at)
        self._steps = 0

    def step(self, gradient: Tensor) -> None:
        """Take one step against a gradient of the tensor's shape."""
        b1, b2 = self.betas
        self._steps += 1
        self._mean.lerp_(gradient, 1 - b1)
        self._square.lerp_(gradient * gradient, 1 - b2)
        scale = (self._square / (1 - b2**self._steps)).sqrt_().add_(1e-8)
        self.at.sub_(self._mean / scale, alpha=self.learning_rate / (1 - b1**self._steps))

    def only(self, rows: Tensor) -> Adam:
        """Return one that goes on from here with a copy of some rows."""
        at, mean, square = (held[rows.to(held.device)] for held in (self.at, self._mean, self._square))
        return self._going_on(at, mean, square)

    @staticmethod
    def joined(parts: Sequence[Adam]) -> Adam:
        """Return one that goes on with the rows of several, which have taken as many steps."""
        at, mean, square = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("at", "_mean", "_square")
        )
        return parts[0]._going_on(at, mean, square)

    def _going_on(self, at: Tensor, mean: Tensor, square: Tensor) -> Adam:
        other = Adam(at, self.learning_rate, self.betas)
        other._mean, other._square, other._steps = mean, square, self._steps
        return other
