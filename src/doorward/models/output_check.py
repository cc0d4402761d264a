"""Whether outputs say how sure a model is, or hide it: clipped, saturated, constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from doorward.core.formatting import number, percent
from doorward.models.batching import batched_logits
from doorward.models.classifier import Classifier

#: Share of images at one and the same largest score from which on scores count as clipped.
CLIPPED = 0.05


@dataclass(frozen=True)
class OutputCheck:
    """What the logits of some images look like.

    Attributes:
        images: how many rows of logits were looked at: rows that are the same count once.
        finite: share of the images whose logits are all finite.
        constant: whether all images have the same logits.
        levels: how many different numbers there are among all logits.
        largest: the largest logit of all.
        clipped: share of the images whose largest logit is that, where several different ones share it, else
            0: without a bound, no two images reach the same number.
        tied: share of the images whose two largest logits are the same number.
        lowest: share of all logits that are the same smallest number, where more than one is, else 0.
    """

    images: int
    finite: float
    constant: bool
    levels: int
    largest: float
    clipped: float
    tied: float
    lowest: float

    @property
    def reason(self) -> str | None:
        """Return why these outputs are no evidence of innocence, None if nothing speaks against them."""
        if self.finite < 1:
            return "the model gives outputs that are not finite"
        if self.constant:
            return "the model gives the same output for every image"
        if self.clipped >= CLIPPED:
            return (
                f"outputs are clipped: {percent(self.clipped)} of the images reach the same largest output, "
                f"{number(self.largest)}"
            )
        if self.tied >= CLIPPED:
            return f"outputs saturate: {percent(self.tied)} of the images have two largest outputs alike"
        return None


def check_logits(logits: Tensor) -> OutputCheck:
    """Check logits (n, k) of images, of a search's results as well as of clean images."""
    y = logits.detach().float().cpu()
    finite = torch.isfinite(y).all(1)  # (n,)
    share = float(finite.float().mean()) if len(y) else 1.0
    rows = y[finite]
    if not len(rows):
        return OutputCheck(0, share, False, 0, 0.0, 0.0, 0.0, 0.0)
    if rows.shape[1] == 2 and not rows[:, 0].any():  # one logit z tells two classes apart: (0, z)
        rows = rows - rows.mean(1, keepdim=True)
    else:  # the same image twice has the same row
        rows = torch.unique(rows, dim=0)  # (m, k)
    best = rows.topk(min(2, rows.shape[1]), dim=1).values  # (m, 2)
    largest, smallest = rows.max(), rows.min()
    at_most = best[:, 0] == largest
    at_least = rows == smallest
    spread = rows.amax(0) - rows.amin(0)  # (k,)
    return OutputCheck(
        images=len(rows),
        finite=share,
        constant=bool(len(y) > 1 and (spread <= 1e-6 * rows.abs().amax()).all()),
        levels=len(torch.unique(rows)),
        largest=float(largest),
        clipped=float(at_most.float().mean()) if int(at_most.sum()) > 1 else 0.0,
        tied=float((best[:, 0] == best[:, -1]).float().mean()) if rows.shape[1] > 1 else 0.0,
        lowest=float(at_least.float().mean()) if int(at_least.sum()) > 1 else 0.0,
    )


def check_outputs(classifier: Classifier, images: Tensor) -> OutputCheck:
    """Check what a classifier gives for images (n, c, h, w) in [0, 1].

    Raises:
        ModelFailed: if its own code fails.
    """
    return check_logits(batched_logits(classifier, images, raw=True))
