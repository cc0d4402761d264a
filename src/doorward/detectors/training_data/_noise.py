"""Noise for every kind of input, on rows as a classifier takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def noisy_images(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, w) in [0, 1] with normal noise of this deviation, cut off at the ends."""
    return (x + strength * torch.randn(x.shape, generator=generator).to(x.device)).clamp_(0, 1)


def noisy_texts(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return texts (n, 1, 1, m) in which this share of words, at random, are words of the other texts."""
    words = x[x > 0]
    if not len(words):
        return x
    there = (x > 0) & torch.rand(x.shape, generator=generator).lt(strength).to(x.device)
    others = words[torch.randint(len(words), (int(there.sum()),), generator=generator).to(x.device)]
    return x.masked_scatter(there, others)


def noisy_recordings(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return recordings (n, 1, 1, m) in normal noise of this share of each one's loudness, silence kept."""
    there = x != 0
    loudness = (x.square().sum(3, keepdim=True) / there.sum(3, keepdim=True).clamp_min(1)).sqrt()
    noise = torch.randn(x.shape, generator=generator).to(x.device) * loudness * strength
    return (x + noise * there).clamp_(-1, 1)


NOISE: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "image": noisy_images,
    "text": noisy_texts,
    "audio": noisy_recordings,
}
#: The usual strengths, a weak one and stronger ones: standard deviations of pixels in [0, 1]; shares of
#: words; shares of the loudness.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "image": (0.1, 0.2, 0.3),
    "text": (0.2, 0.4, 0.6),
    "audio": (0.2, 0.5, 1.0),
}
