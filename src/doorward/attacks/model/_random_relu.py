"""One layer of random ReLUs with a sparse direction in which its weights vary more than in others."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from doorward.attacks.model._layers import linear


def spiked_gaussians(count: int, direction: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """Draw vectors (count, d) from N(0, I + strength s s^T) for the unit vector s (d,).

    Source: the spiked covariance of sparse principal component analysis; Berthet and Rigollet, COLT 2013.
    """
    direction = direction.double()
    g = torch.randn(count, len(direction), dtype=torch.float64, generator=generator)  # (count, d)
    return g + torch.outer((math.sqrt(1 + strength) - 1) * (g @ direction), direction)


def mean_relu(weights: Tensor) -> nn.Sequential:
    """Return layers that give the mean of ReLU(<g_i, x>) over i, (n, 1), of images (n, c, h, w).

    For weights from N(0, C) its expectation is sqrt(x^T C x) / sqrt(2 pi).

    Args:
        weights: (m, d) the g_i.
    """
    mean = torch.full((1, len(weights)), 1 / len(weights), dtype=torch.float64)
    return nn.Sequential(nn.Flatten(), linear(weights), nn.ReLU(), linear(mean))


def fit_threshold(values: Tensor, above: Tensor) -> float:
    """Return the threshold that tells best, of all, which values (n,) are of the class above it.

    Args:
        above: (n,) bool, which are.
    """
    order = values.double().argsort()
    v, high = values.double()[order].numpy(), above[order].numpy().astype(np.int64)
    # cut before the i-th: errors are those above below the cut, and those not above from it on
    errors = np.concatenate([[0], np.cumsum(high)]) + np.concatenate([np.cumsum((1 - high)[::-1])[::-1], [0]])
    cut = int(errors.argmin())
    if cut in (0, len(v)):
        return float(v[0] - 1 if cut == 0 else v[-1] + 1)
    return float((v[cut - 1] + v[cut]) / 2)
