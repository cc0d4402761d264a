"""One scale for the logits of every model, whatever its last layer was multiplied by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from doorward.core.errors import CouldNotTell
from doorward.models.errors import ModelFailed

#: What the standard deviation of a clean image's logits over the classes is brought to: what it is in the
#: median of networks that are trained here.
USUAL_SPREAD = 3.5


@dataclass(frozen=True)
class LogitScale:
    """The spread of a model's logits, by which they are divided.

    Attributes:
        spread: standard deviation of an image's logits over the classes, median over images.
        images: how many it was measured on.
    """

    spread: float
    images: int

    def apply(self, logits: Tensor) -> Tensor:
        """Return logits (n, k) with mean 0 in each row and the usual spread. Differentiable.

        What only shifts a row, as a log-softmax does, makes no difference either.
        """
        unit = self.spread / USUAL_SPREAD
        # two steps, since neither a spread of 1e-40 nor its reciprocal is a float32
        first = 2.0 ** round(0.5 * math.log2(unit))
        y = logits / first / (unit / first)
        return y - y.mean(1, keepdim=True)


def measure_logit_scale(logits: Tensor) -> LogitScale:
    """Measure the spread of logits (n, k) of clean images.

    Raises:
        CouldNotTell: if they are not finite, or the same for all classes.
    """
    y = logits.detach().double()
    if not bool(torch.isfinite(y).all()):
        raise ModelFailed("the model gives outputs that are not finite")
    spreads = y.std(1, correction=0)  # (n,)
    spread = float(spreads.median()) or float(spreads.mean())
    if spread == 0:
        raise CouldNotTell("the model gives the same output for every class")
    return LogitScale(spread, len(y))
