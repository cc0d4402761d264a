"""What the images of a cluster carry in common and others do not, and whether it works as a trigger.

A patch is the same in all poisoned images, where everything around it differs. So it can be read off: pixels
that hardly vary within a cluster, and that neither the rest of the class nor other classes have. Whether the
model answers to it is tried by pasting it on images of other classes. Natural kinds within a class have few
such pixels, and these work on hardly any image.

The robust statistics are the usual ones; reading a trigger off the data is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.records import Rate
from doorward.models import Classifier
from doorward.models.batching import batched_logits
from doorward.stats import metrics
from doorward.triggers.masked import MaskedPattern

#: How far a pixel may lie from the common one, in each channel; in how many images of the cluster it has to
#: lie so near at least, and of others at most.
NEAR, WITHIN, ELSEWHERE = 0.08, 0.8, 0.5
#: Share of all pixels that a pattern may cover. More is a picture, and no patch.
LARGEST = 0.25
#: Images that are looked at: of the cluster, of the rest of the class, and of other classes.
LOOKED_AT, OTHERS = 100, 300
#: Images of each below which nothing is read off.
FEWEST = 5
#: Images of a cluster up to which all of it is looked at, and the deeper half of more.
ENOUGH = 30
#: What the lower bound of its success on other images has to reach for a pattern to be a trigger.
WORKS = 0.75


@dataclass(frozen=True)
class CommonPattern:
    """A pattern that a cluster's images carry.

    Attributes:
        trigger: that puts it on images.
        success: how many images of other classes it sends to the class, of those that do not go there anyway.
    """

    trigger: MaskedPattern
    success: Rate

    @property
    def worth(self) -> float:
        """Return the share of other images that it surely sends to the class: 0 unless that is `WORKS`."""
        return self.success.low if self.success.low >= WORKS else 0.0

    def carried(self, x: Tensor) -> Tensor:
        """Return the share of the pattern's pixels that images (n, c, h, w) have, (n,)."""
        there = self.trigger.mask[0] > 0  # (h, w)
        near = (x - self.trigger.pattern).abs().amax(1) <= NEAR  # (n, h, w)
        return near[:, there].double().mean(1)


def find(
    classifier: Classifier,
    decoded: Callable[[npt.NDArray[np.int64]], Tensor],
    rows: npt.NDArray[np.int64],
    margins: Iterable[npt.NDArray[np.float64]],
    others: Tensor,
    target: int,
    rng: np.random.Generator,
    deadline: Deadline,
) -> CommonPattern | None:
    """Return the pattern that works best of those that clusters of a class carry, None if none works.

    Args:
        decoded: gives the images (m, c, h, w) in [0, 1] of some rows.
        rows: (n,) of the class.
        margins: of each cluster, (n,): how far on its side each of them lies.
        others: (o, c, h, w) of other classes.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    found = []
    for margin in margins:
        inside, rest = np.flatnonzero(margin > 0), np.flatnonzero(margin <= 0)
        # the half that lies deepest in it: at the border, clusters mix; of few, chance would pick pixels
        core = inside[np.argsort(-margin[inside], kind="stable")[: max(len(inside) // 2, ENOUGH)]]
        if min(len(core), len(rest), len(others)) < FEWEST:
            continue
        some, more = (decoded(rows[rng.permutation(own)[:LOOKED_AT]]) for own in (core, rest))
        trigger = read_off(some, more, others)
        if trigger is not None:
            found.append(tried(classifier, trigger, others, target, deadline))
    best = max(found, key=lambda one: one.worth, default=None)
    return best if best is not None and best.worth else None


def read_off(cluster: Tensor, rest: Tensor, others: Tensor) -> MaskedPattern | None:
    """Return what a cluster's images (n, c, h, w) in [0, 1] have in common, None if that is no patch.

    Args:
        rest: (m, c, h, w) of the same class.
        others: (o, c, h, w) of other classes.
    """
    usual = cluster.median(0).values

    def near(x: Tensor) -> Tensor:
        return ((x - usual).abs().amax(1) <= NEAR).double().mean(0)  # (h, w)

    mask = (near(cluster) >= WITHIN) & (near(rest) <= ELSEWHERE) & (near(others) <= ELSEWHERE)
    if not 0 < mask.double().mean() <= LARGEST:
        return None
    return MaskedPattern(mask[None].to(usual), usual)


def tried(
    classifier: Classifier, trigger: MaskedPattern, others: Tensor, target: int, deadline: Deadline
) -> CommonPattern:
    """Return how a pattern works on images of other classes.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    others = others.to(classifier.device)
    before = batched_logits(classifier, others, deadline).argmax(1)
    others = others[before != target]
    after = batched_logits(classifier, trigger.apply(others), deadline).argmax(1)
    return CommonPattern(trigger, metrics.rate(int((after == target).sum()), len(others)))
