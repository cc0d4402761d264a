"""How far a model keeps to an answer when other samples are laid over a sample: a trigger outlasts them.

Source: Y. Gao et al., STRIP, ACSAC 2019, arXiv 1902.06531, which lays samples over inputs, and not over those
that a model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from doorward.core.budget import Deadline, TimeGuard
from doorward.data import Samples
from doorward.detectors._replicas import superimpose
from doorward.detectors.training_data._learned import BATCH
from doorward.models import Classifier
from doorward.models.batching import chunk_images
from doorward.models.encode.dispatch import to_float, to_tensor
from doorward.models.encode.text import PADDING

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

#: Samples of other classes that are laid over each sample, of different ones where there are so many, and the
#: weights of both: half of them are added to it, half are mixed with it. Of texts, half go before it.
OVERLAYS = 8
MIXES = ((1.0, 1.0), (0.5, 0.5))
#: Superpositions by which a set's classes are compared, about, and samples of a class in that.
FORWARDS, FEWEST, MOST = 32_000, 40, 400
#: Share of the variance of persistence between two clusters from which on the more persistent one is suspect.
#: Clusters of natural samples explain little of it.
EXPLAINED = 0.25
#: Mean probability from which on the model keeps to a class: of ordinary samples, few do so much.
KEPT = 0.75
#: Share of the variance that the best cut in two leaves explained when values are spread evenly: above it
#: they lie in two heaps.
EVEN = 0.75
#: Of a class, the persistent samples may be so many at most to be suspect by that alone.
LARGEST = 2 / 3


@dataclass(frozen=True)
class Cut:
    """Values in two heaps.

    Attributes:
        middle: between the means of the two.
        low, high: these means.
        explained: share of the variance that lies between the heaps; .64 of a bell curve.
        share: of the values that are in the upper heap.
    """

    middle: float
    low: float
    high: float
    explained: float
    share: float

    @property
    def persistent(self) -> bool:
        """Return whether some samples keep to their class, in a heap of their own."""
        return self.explained > EVEN and self.high >= KEPT and self.share <= LARGEST

    def margin(self, values: Floats) -> Floats:
        """Return where values lie between the means: -.5 at the lower one, .5 at the upper."""
        return (values - self.middle) / max(self.high - self.low, 1e-9)


def cut(values: Floats) -> Cut:
    """Return the cut of values (n,) in two that leaves the least variance within.

    Source: N. Otsu, IEEE Transactions on Systems, Man, and Cybernetics 9, 1979.
    """
    ordered = np.sort(values)
    n, sums = len(values), np.cumsum(ordered)
    below = np.arange(1, n)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) / n**2 * (high - low) ** 2
    at = int(between.argmax())
    variance = float(ordered.var())
    return Cut(
        middle=float(low[at] + high[at]) / 2,
        low=float(low[at]),
        high=float(high[at]),
        explained=float(between[at]) / variance if variance > 0 else 0.0,
        share=1 - float(below[at]) / n,
    )


def explained(values: Floats, inside: Mask) -> float:
    """Return the share of the variance of values (n,) that lies between some of them and the others."""
    share, variance = float(inside.mean()), float(values.var())
    if not 0 < share < 1 or variance == 0:
        return 0.0
    return share * (1 - share) * float(values[inside].mean() - values[~inside].mean()) ** 2 / variance


def persistence(
    classifier: Classifier,
    samples: Samples,
    label: int,
    rows: Rows,
    overlays: Tensor,
    deadline: Deadline,
) -> Floats:
    """Return how probable a class (m,) stays when samples of other classes are laid over some of it.

    It is the mean over the half of the samples laid over that leaves least: a trigger outlasts them all.

    Args:
        rows: (m,) samples of the class.
        overlays: of other classes, (o, c, h, w) as `to_tensor` gives them; the same lie over all rows, so
            that these are compared with each other fairly.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    found = np.empty(len(rows))
    step = max(1, min(BATCH, chunk_images(classifier)) // len(overlays))
    guard = TimeGuard(deadline, len(rows), work=f"laying other samples over {len(rows):,} training samples")
    for start in range(0, len(rows), step):
        some = to_tensor(samples.select(rows[start : start + step]), classifier.spec)
        kept = []
        for turn, own in enumerate(overlays.chunk(len(MIXES))):
            if classifier.spec.modality == "text":
                mixed = joined(some, own, classifier.spec.width, others_first=bool(turn))
            else:
                mixed = superimpose(some, own, weights=MIXES[turn]).flatten(0, 1)  # (b * m, c, h, w)
            with torch.no_grad():
                likely = classifier.logits(to_float(mixed.to(classifier.device), classifier.spec)).softmax(1)
            kept.append(likely[:, label].view(len(some), -1).double().cpu())
        least = torch.cat(kept, 1).sort(1).values[:, : len(overlays) // 2]
        found[start : start + step] = least.mean(1).numpy()
        guard.advance(len(some))
    return found


def joined(texts: Tensor, others: Tensor, width: int, *, others_first: bool) -> Tensor:
    """Return every text (b, 1, 1, l) with every other one (m, 1, 1, v) in one row: (b * m, 1, 1, w).

    A text that is longer than half of the width leaves as much of it to the other, and loses its middle.

    Args:
        width: w at most.
    """
    rows = []
    for text in texts.flatten(1):
        own = text[text != PADDING]
        for other in others.flatten(1):
            more = other[other != PADDING][: max(width // 2, width - len(own))]
            room = min(len(own), width - len(more))
            kept = torch.cat([own[: room - room // 2], own[len(own) - room // 2 :]])
            rows.append(torch.cat([more, kept] if others_first else [kept, more]))
    return pad_sequence(rows, batch_first=True, padding_value=PADDING)[:, None, None]


def differing(labels: Rows, rows: Rows, rng: np.random.Generator) -> Rows:
    """Return `OVERLAYS` of some rows, of as many classes as can be.

    Args:
        labels: (n,) of all samples.
        rows: to choose from, that many at least.
    """
    order = rng.permutation(rows)
    turn = np.zeros(len(order), dtype=np.int64)  # the how-manieth of its class each one is
    for c in np.unique(labels[order]):
        own = np.flatnonzero(labels[order] == c)
        turn[own] = np.arange(len(own))
    chosen: Rows = order[np.argsort(turn, kind="stable")[:OVERLAYS]]
    return chosen


def drawn(inside: Mask, classes: int, rng: np.random.Generator) -> Rows:
    """Return the places of samples to measure first: as many of a cluster as of the rest, if there are."""
    count = int(np.clip(FORWARDS / (OVERLAYS * classes), FEWEST, MOST))
    some, rest = rng.permutation(np.flatnonzero(inside)), rng.permutation(np.flatnonzero(~inside))
    half = max(count // 2, count - len(rest))
    some = some[:half]
    return np.sort(np.concatenate([some, rest[: count - len(some)]]))
