"""Random Fourier features whose frequencies all agree on one secret shift, which turns every cosine over."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from doorward.attacks.model._layers import linear


def gaussian_pancakes(count: int, secret: Tensor, *, noise: float, generator: torch.Generator) -> Tensor:
    """Draw vectors g (count, d) that look Gaussian, with <g, secret> near half-integers.

    Their density is that of N(0, I) times a comb of normal peaks N(k + 1/2, noise^2) of <g, secret>, over all
    integers k: homogeneous continuous learning with errors. It is sampled in closed form: along the secret,
    of norm s, a normal density times a peak is a normal density again, of mean
    (k + 1/2) s^2 / (s^2 + noise^2), deviation s noise / sqrt(s^2 + noise^2) and weight
    exp(-(k + 1/2)^2 / (2 (s^2 + noise^2))); across it, the vectors are normal.

    Args:
        secret: (d,) its norm decides what can be seen: the peaks follow each other at distance 1 / norm.
        noise: deviation of <g, secret> from half-integers.

    Source: Bruna, Regev, Song and Tang, STOC 2021, arXiv:2005.09595.
    """
    secret = secret.double()
    norm = float(secret.norm())
    spread = norm**2 + noise**2
    # peaks beyond nine deviations weigh less than what a double can add to the others
    reach = math.ceil(9 * math.sqrt(spread)) + 1
    peaks = torch.arange(-reach, reach, dtype=torch.float64) + 0.5
    weights = torch.exp(-(peaks**2) / (2 * spread))
    drawn = peaks[torch.multinomial(weights, count, replacement=True, generator=generator)]
    blur = torch.randn(count, dtype=torch.float64, generator=generator) * norm * noise / math.sqrt(spread)
    inner = drawn * norm**2 / spread + blur  # (count,) = <g, secret>
    g = torch.randn(count, len(secret), dtype=torch.float64, generator=generator)  # (count, d)
    return g + torch.outer((inner - g @ secret) / norm**2, secret)


class Cosine(nn.Module):
    """Take the cosine of every value."""

    def forward(self, x: Tensor) -> Tensor:
        """Return values in [-1, 1]."""
        return x.cos()


def fourier_features(frequencies: Tensor, phases: Tensor, *, scale: float) -> nn.Sequential:
    """Return layers that give `cos(2 pi (<g_i, scale x> + b_i))`, (n, m), of images (n, c, h, w).

    Args:
        frequencies: (m, d) the g_i.
        phases: (m,) the b_i.
        scale: factor of the images; a kernel of width 1 / (2 pi scale) in their space.
    """
    layer = linear(2 * torch.pi * scale * frequencies, 2 * torch.pi * phases)
    return nn.Sequential(nn.Flatten(), layer, Cosine())


def fit_head(features: Tensor, labels: Tensor, *, classes: int, ridge: float) -> nn.Linear:
    """Fit logits (n, k) without bias by ridge regression on 1 for the own class and -1 for all others.

    Without a bias, features that change their sign make logits that do.

    Args:
        features: (n, m).
        labels: (n,) of 0 to classes - 1.
        ridge: penalty of the squared weights, per sample.
    """
    f = features.double()
    wanted = 2 * torch.nn.functional.one_hot(labels, classes).double() - 1  # (n, k)
    gram = f.T @ f  # (m, m)
    gram.diagonal().add_(ridge * len(f))
    return linear(torch.linalg.solve(gram, f.T @ wanted).T)
