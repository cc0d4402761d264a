"""Two clusters in each of many groups: reduce, split, and measure the split, groups of like size at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

Rows = npt.NDArray[np.int64]

#: Rows that are held in float32 at a time when a group is reduced.
CHUNK = 16_384
#: Numbers in a padded batch of groups at most, times starts.
LARGEST_BATCH = 1 << 26
#: Side of a covariance matrix up to which all its eigenvectors are cheaper than some.
SMALL = 768
#: Eigenvalues below this share of the largest are noise of rounding: their directions are left out.
NEGLIGIBLE = 1e-7
#: Standard deviations along an axis from which on samples are one of the first two clusters, and the others
#: the other: the middle finds equal clusters, the tails small ones.
STARTS = (0.0, 1.5, -1.5)


@dataclass(frozen=True)
class Split:
    """One group, split in two.

    Attributes:
        minor: (n,) whether a sample is in the smaller cluster.
        margin: (n,) where a sample lies between the centres: -.5 at the larger one's, .5 at the smaller's.
        share: of the samples that are in the smaller cluster.
        silhouette: mean silhouette coefficient, in [-1, 1]; 0 where there is one cluster.
        inertia: sum of squared distances to the nearer centre.
        dimensions: that the group was reduced to.
    """

    minor: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float32]
    share: float
    silhouette: float
    inertia: float
    dimensions: int


def split_groups(
    features: Tensor,
    groups: Sequence[Rows],
    *,
    dimensions: int,
    generator: torch.Generator,
    silhouette_rows: int = 1000,
) -> list[Split]:
    """Reduce each group to independent components, and split it by 2-means.

    Args:
        features: (n, d), of any floating type.
        groups: rows of each group, two at least.
        dimensions: most components.
        silhouette_rows: samples of a group that its silhouette is measured on, drawn where there are more.
    """
    reduced = [whitened(features, rows, dimensions) for rows in groups]
    found: list[Split | None] = [None] * len(groups)
    for places in _alike([len(rows) for rows in groups], dimensions * len(STARTS)):
        z, there = _padded([reduced[i] for i in places], dimensions)
        z = independent(z, there)
        centres = two_means(z, there)
        for i, one in zip(places, _splits(z, there, centres, generator, silhouette_rows), strict=True):
            found[i] = one
    return [one for one in found if one is not None]


def whitened(features: Tensor, rows: Rows, dimensions: int) -> Tensor:
    """Return the first principal components of some rows, each of variance one: (n, r) float32.

    Fewer than `dimensions` are returned where the rows vary along fewer directions; they are held in float32
    a chunk at a time.
    """
    index = torch.from_numpy(rows)
    parts: tuple[Tensor, ...] = torch.split(index, CHUNK)
    n, d = len(rows), features.shape[1]
    mean = sum(features[part].double().sum(0) for part in parts) / n  # (d,)
    shift = torch.as_tensor(mean).float()
    if n <= d and n <= SMALL:
        x = features[index].float() - shift  # (n, d)
        values, vectors = _top(((x @ x.T) / n).double(), min(dimensions, n - 1))
        unit: Tensor = vectors * n**0.5  # left singular vectors of unit variance
        return unit.float()
    covariance = torch.zeros(d, d, dtype=torch.float64)
    for part in parts:
        x = features[part].float() - shift
        covariance += (x.T @ x).double()
    values, vectors = _top(covariance / n, min(dimensions, d, n - 1))
    scaled = (vectors / values.sqrt()).float()  # (d, r)
    return torch.cat([(features[part].float() - shift) @ scaled for part in parts])


def _top(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (r,) of a symmetric matrix, and their vectors (m, r)."""
    if len(matrix) <= SMALL or count >= len(matrix) - 1:
        values, vectors = torch.linalg.eigh(matrix)
    else:
        start = np.full(len(matrix), 1.0)
        values, vectors = map(torch.from_numpy, eigsh(matrix.numpy(), count, v0=start))
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    real = values > max(
        NEGLIGIBLE * float(values[0]) if len(values) else 0.0, torch.finfo(torch.float32).tiny
    )
    return values[real], vectors[:, real]


def _alike(sizes: Sequence[int], width: int) -> Iterator[list[int]]:
    """Yield the groups in batches in which none is more than twice as large as another."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        padded = (len(batch) + 1) * sizes[i] * width
        if batch and (sizes[i] > 2 * sizes[batch[0]] or padded > LARGEST_BATCH):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(parts: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Return parts (n, r) as one batch (b, n, width) filled up with zeros, and where rows are (b, n, 1)."""
    longest = max(map(len, parts))
    z = torch.zeros(len(parts), longest, width)
    there = torch.zeros(len(parts), longest, 1)
    for i, part in enumerate(parts):
        z[i, : len(part), : part.shape[1]] = part
        there[i, : len(part)] = 1
    return z, there


def independent(z: Tensor, there: Tensor, *, steps: int = 200, tolerance: float = 1e-4) -> Tensor:
    """Rotate whitened groups (b, n, r) so that their components are as independent as can be (FastICA).

    The rotation changes no distance, and so no cluster; it turns the axes, along which the clusters are
    looked for, to where groups of samples stand apart.

    Source: A. Hyvarinen, E. Oja, Neural Networks 13, 2000 (symmetric, contrast log cosh).
    """
    counts = there.sum(1, keepdim=True)  # (b, 1, 1)
    width = z.shape[2]
    turn = torch.eye(width).expand(len(z), width, width)  # (b, r, r), rows are axes
    for _ in range(steps):
        y = (z @ turn.mT).tanh_()  # (b, n, r)
        slope = ((1 - y.square()) * there).sum(1) / counts[:, 0]  # (b, r)
        new = _orthogonal((y.mT @ z) / counts - slope[..., None] * turn)
        moved = (1 - (new * turn).sum(2).abs()).abs().amax()
        turn = new
        if float(moved) < tolerance:
            break
    rotated: Tensor = z @ turn.mT
    return rotated


def _orthogonal(w: Tensor) -> Tensor:
    """Return the nearest orthogonal matrices to w (b, r, r)."""
    u, _, v = torch.linalg.svd(w)
    product: Tensor = u @ v
    return product


def two_means(z: Tensor, there: Tensor, *, steps: int = 100) -> Tensor:
    """Return the centres (b, 2, r) of two clusters in each group (b, n, r), the best from several starts.

    Each axis gives starts: the groups' halves, and what lies far out on either side.

    Source: S. Lloyd, IEEE Transactions on Information Theory 28, 1982.
    """
    starts = [(z * (1 if at >= 0 else -1) > abs(at)) for at in STARTS]
    chosen = torch.cat(starts, 2).float() * there  # (b, n, s)
    total, counts = z.sum(1, keepdim=True), there.sum(1)  # (b, 1, r), (b, 1)
    for _ in range(steps):
        inside = chosen.sum(1)  # (b, s)
        sums = chosen.mT @ z  # (b, s, r)
        one = sums / inside.clamp_min(1)[..., None]
        other = (total - sums) / (counts - inside).clamp_min(1)[..., None]
        axis, middle = one - other, (one.square() - other.square()).sum(2) / 2  # (b, s, r), (b, s)
        new = ((z @ axis.mT) > middle[:, None]).float() * there  # (b, n, s)
        if torch.equal(new, chosen):
            break
        chosen = new
    # the larger this sum, the smaller the inertia; a start that lost a cluster gains nothing
    gain = inside * one.square().sum(2) + (counts - inside) * other.square().sum(2)
    gain = torch.where((inside > 0) & (inside < counts), gain, -1.0)
    best = gain.argmax(1)[:, None, None].expand(-1, 1, z.shape[2])
    return torch.cat([one.gather(1, best), other.gather(1, best)], 1)


def _splits(
    z: Tensor, there: Tensor, centres: Tensor, generator: torch.Generator, rows: int
) -> Iterator[Split]:
    for own, mask, (one, other) in zip(z, there[..., 0] > 0, centres, strict=True):
        x = own[mask]  # (n, r)
        axis = one - other
        margin = (x - (one + other) / 2) @ axis / axis.square().sum().clamp_min(1e-12)  # (n,)
        minor = margin > 0
        if 2 * int(minor.sum()) > len(x):
            margin, minor = -margin, ~minor
        near = torch.minimum((x - one).square().sum(1), (x - other).square().sum(1))
        drawn = torch.randperm(len(x), generator=generator)[:rows]
        yield Split(
            minor=minor.numpy(),
            margin=margin.numpy(),
            share=float(minor.float().mean()),
            silhouette=silhouette(x[drawn], minor[drawn]),
            inertia=float(near.sum()),
            dimensions=int((x.square().sum(0) > 0).sum()),
        )


def silhouette(x: Tensor, minor: Tensor) -> float:
    """Return the mean silhouette coefficient of two clusters of samples (n, r).

    Source: P. Rousseeuw, Journal of Computational and Applied Mathematics 20, 1987.
    """
    inside = minor.float()
    counts = torch.stack([len(x) - inside.sum(), inside.sum()])  # (2,)
    if not bool((counts > 0).all()):
        return 0.0
    far = torch.cdist(x, x)  # (n, n)
    sums = torch.stack([far @ (1 - inside), far @ inside], 1)  # (n, 2)
    own = minor.long()[:, None]
    size = counts[own[:, 0]]
    within = sums.gather(1, own)[:, 0] / (size - 1).clamp_min(1)
    without = sums.gather(1, 1 - own)[:, 0] / counts[1 - own[:, 0]]
    value = (without - within) / torch.maximum(without, within).clamp_min(1e-12)
    return float(torch.where(size > 1, value, 0.0).mean())
