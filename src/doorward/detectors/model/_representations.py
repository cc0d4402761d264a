"""AEGIS as published: in how many clusters a model represents a class, laid out in the plane.

Source: E. Soremekun, S. Udeshi and S. Chattopadhyay, Computers & Security 2023, arXiv 2003.00865.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.records import Picture
from doorward.inversion.common_pixels import rightly_classified
from doorward.inversion.problem import InversionProblem
from doorward.inversion.translation import translate
from doorward.models.encode.image import picture

Points = npt.NDArray[np.float64]

#: Steps of the translation, and their length as a share of that of a white image: those of the
#: authors for 28x28 pixels of clothes.
STEPS, LENGTH = 75, 1.5 / 28
#: Images of a class below which its clusters are not counted.
FEWEST = 3
#: Dimensions that features are reduced to before they are laid out in the plane, as the authors' code does.
DIMENSIONS = 150
#: Neighbours that t-SNE takes into account, of many images.
PERPLEXITY = 30.0
#: Quantiles of the distances between points that bandwidths of mean shift are estimated by. The paper
#: speaks of such a search; the authors' code has one number for each data set.
QUANTILES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
#: Number of clusters above which the authors find a class poisoned: real images, and translated ones.
USUAL = 2
#: Side of the picture in pixels, of a point in it, and the colours of real and of translated images.
SIDE, POINT = 240, 4
COLOURS = ((0.12, 0.35, 0.75), (0.85, 0.25, 0.1))


@dataclass(frozen=True)
class Representations:
    """The clusters that real images of a class and images translated to it lie in.

    Attributes:
        counts: (s, q) number of clusters, by seed of t-SNE and by quantile.
        points: (n, 2) in the plane of the first seed.
        translated: (n,) whether a point is a translated image.
    """

    counts: npt.NDArray[np.int64]
    points: Points
    translated: npt.NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Return the share of seeds and quantiles by which the class would be found poisoned."""
        return float((self.counts > USUAL).mean())


def class_features(problem: InversionProblem, deadline: Deadline) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, for each class with enough images, the features of its own and of those translated to it.

    We depart from the authors: images of the class itself are not translated, and features are the input of
    the last layer.

    Raises:
        CouldNotTell: if the model has no features that can be reached, or the deadline is too near.
    """
    pools, device = problem.pools, problem.images.device
    own = rightly_classified(pools)[:, None] & ~pools.outside  # (n, k)
    targets = [t for t in range(len(problem.classes)) if int(own[:, t].sum()) >= FEWEST]
    images = int(pools.count[targets].sum()) * (STEPS + 1)
    guard = TimeGuard(deadline, images, work=f"translating images to {len(targets):,} classes")
    found = {}
    for t in targets:
        x = problem.images[pools.outside[:, t].to(device)]
        wanted = torch.full((len(x),), t, device=device)
        length = LENGTH * math.sqrt(math.prod(x.shape[1:]))
        (moved,) = translate(problem.classifier, x, wanted, length=length, snapshots=(STEPS,), guard=guard)
        real = problem.images[own[:, t].to(device)]
        with torch.no_grad():
            near, far = (
                torch.cat([problem.classifier.features(part).cpu() for part in torch.split(y, problem.chunk)])
                for y in (real, moved)
            )
        found[t] = near, far
        guard.advance(len(x))
    return found


def representations(real: Tensor, translated: Tensor, *, seeds: list[int]) -> Representations:
    """Lay the features of a class's real and translated images out in the plane, and count the clusters.

    Args:
        real, translated: (n, d) and (m, d); four of both together at least.
    """
    features = torch.cat([real, translated]).double().cpu().numpy()
    reduced = _reduced(features)
    planes = [_plane(reduced, seed) for seed in seeds]
    return Representations(
        counts=np.array([[_clusters(points, q) for q in QUANTILES] for points in planes]),
        points=planes[0],
        translated=np.arange(len(features)) >= len(real),
    )


def _reduced(features: Points) -> Points:
    """Return features (n, d) in their principal components."""
    from sklearn.decomposition import PCA

    dimensions = min(DIMENSIONS, *features.shape)
    return np.asarray(PCA(dimensions, svd_solver="full").fit_transform(features))


def _plane(features: Points, seed: int) -> Points:
    """Return features (n, d) in the plane: (n, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="random", random_state=seed)
    return np.asarray(plane.fit_transform(features.astype(np.float32)), dtype=np.float64)


def _clusters(points: Points, quantile: float) -> int:
    """Return how many clusters of points (n, 2) mean shift finds."""
    from sklearn.cluster import MeanShift, estimate_bandwidth

    bandwidth = float(estimate_bandwidth(points, quantile=quantile))
    if not math.isfinite(bandwidth) or bandwidth <= 0:
        return 1
    with warnings.catch_warnings():  # it tells when no two points share a bin, which does no harm
        warnings.simplefilter("ignore")
        return len(MeanShift(bandwidth=bandwidth, bin_seeding=True).fit(points).cluster_centers_)


def scatter(found: Representations, name: str) -> Picture:
    """Draw the points of a class: real images blue, translated ones red."""
    low, high = found.points.min(0), found.points.max(0)
    at = (found.points - low) / np.maximum(high - low, 1e-12) * (SIDE - POINT)
    canvas = torch.ones(3, SIDE, SIDE)
    for (across, up), kind in zip(at.round().astype(int).tolist(), found.translated.tolist(), strict=True):
        down = SIDE - POINT - up
        colour = torch.tensor(COLOURS[kind])[:, None, None]
        canvas[:, down : down + POINT, across : across + POINT] = colour
    return Picture(
        title=f"Images of class {name!r} (blue) and images translated to it (red), laid out by t-SNE",
        alt=f"A scatter of real images of class {name} in blue and translated ones in red",
        png=picture(canvas),
    )
