"""Uniform blends: how much of one colour, all over the image and without shape, sends images to a class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from doorward.core.budget import Deadline, TimeGuard
from doorward.inversion.problem import InversionProblem

#: Opacities that are tried, each about two fifths above the one before.
OPACITIES = torch.from_numpy(np.geomspace(0.01, 0.9, 14)).float()
#: Sources of a class on which they are tried, and how many classes there may be for so many.
SOURCES, CLASSES = 16, 20
#: Share of them that must go to the class; of so few it asks for as many as the .93 of masks and pictures.
SUCCESS = 0.9


def colours(masks: Tensor, patterns: Tensor) -> Tensor:
    """Return the mean colours of patterns (m, c, h, w) where masks (m, 1, h, w) show them: (m, c)."""
    shown = masks.sum((2, 3)).clamp_min(1e-9)  # (m, 1)
    return (masks * patterns).sum((2, 3)) / shown


def uniform_opacity(problem: InversionProblem, colour: Tensor, deadline: Deadline | None = None) -> Tensor:
    """Return the least opacity of a uniform blend that sends images to each class: (k,), 1 if none does.

    Opacities from .01 to .9 are tried on 16 sources of each class, or on 8 where there are many classes; at
    least nine in ten must go to it. The method is ours.

    Some models put whatever is not as dark as what they know into one class: any faint addition sends images
    there, uniform or not. So what a mask or a picture is worth as evidence is how much less of it suffices
    than of its own mean colour. This assumes that a trigger has a shape, or a texture, without which it does
    nothing: a planted tint is missed.

    Args:
        colour: (k, c) of the picture for each class, in [0, 1].

    Returns:
        float32 on the device of the images.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    k, device = len(colour), problem.images.device
    opacities = OPACITIES.to(device)
    count = SOURCES if k <= CLASSES else SOURCES // 2
    guard = TimeGuard(deadline or Deadline(), k, work=f"trying uniform blends for {k:,} classes")
    least = []
    for target in range(k):
        sources = problem.pools.order[target, : min(count, int(problem.pools.count[target]))]
        x = problem.images[sources.to(device)]  # (n, c, h, w)
        uniform = colour[target].to(device)[:, None, None].expand_as(x[0])
        shown = torch.lerp(x, uniform, opacities[:, None, None, None, None])  # (opacities, n, c, h, w)
        with torch.no_grad():
            parts = torch.split(shown.flatten(0, 1), problem.chunk)
            logits = torch.cat([problem.classifier.logits(part) for part in parts])
        there = (logits.argmax(1) == target).float().view(len(opacities), len(x)).mean(1) >= SUCCESS
        least.append(opacities[there][:1] if bool(there.any()) else opacities.new_ones(1))
        guard.advance(1)
    return torch.cat(least)
