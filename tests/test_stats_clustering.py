"""Splitting groups in two, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import roc_auc_score, silhouette_score

from doorward.core.seeds import make_generator
from doorward.stats.clustering import independent, silhouette, split_groups, two_means, whitened

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def blobs(n: int, share: float, *, distance: float, width: int = 40, seed: int = 0) -> tuple[Array, Array]:
    """Return points of two clusters in a skewed space, and which are in the second."""
    rng = np.random.default_rng(seed)
    second = np.arange(n) < round(share * n)
    x = rng.laplace(size=(n, width)) * np.linspace(0.2, 2, width)
    x[second] += distance * rng.normal(size=width)
    return x.astype(np.float32), second


def split(x: Array, dimensions: int = 6, rows: list[Array] | None = None):  # type: ignore[no-untyped-def]
    groups = rows or [np.arange(len(x))]
    return split_groups(
        torch.from_numpy(x), groups, dimensions=dimensions, generator=make_generator(0, "test")
    )


def test_components_are_those_of_a_whitened_pca() -> None:
    x, _ = blobs(300, 0.2, distance=2)
    ours = whitened(torch.from_numpy(x), np.arange(300), 6).numpy()
    theirs = PCA(6, whiten=True, svd_solver="full").fit_transform(x) * np.sqrt(300 / 299)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=2e-3)


@pytest.mark.parametrize("n", [30, 300])
def test_distances_are_those_of_fast_ica(n: int) -> None:
    """Rotation changes none, so that clusters are those of any ICA; fewer rows than columns are no matter."""
    x, _ = blobs(n, 0.2, distance=2, width=50)
    ours = whitened(torch.from_numpy(x), np.arange(n), 5)
    theirs = FastICA(5, whiten="unit-variance", random_state=0, max_iter=1000, tol=0.005).fit_transform(x)
    np.testing.assert_allclose(
        torch.cdist(ours, ours), torch.cdist(*[torch.from_numpy(theirs).float()] * 2), atol=0.02
    )


def test_ica_recovers_independent_sources_as_well_as_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    sources = np.stack([rng.laplace(size=2000), rng.uniform(-1, 1, 2000), rng.exponential(size=2000)], 1)
    x = (sources @ rng.normal(size=(3, 3))).astype(np.float32)
    z = whitened(torch.from_numpy(x), np.arange(2000), 3)[None]
    ours = independent(z, torch.ones(1, 2000, 1))[0].numpy()
    theirs = FastICA(3, random_state=0).fit_transform(x)
    for found in (ours, theirs):
        matched = np.abs(np.corrcoef(found.T, sources.T)[:3, 3:]).max(0)
        assert (matched > 0.95).all()


@pytest.mark.parametrize(("share", "distance"), [(0.5, 1.5), (0.1, 2), (0.02, 3), (0.0, 0)])
def test_two_means_is_as_good_as_scikit_learns(share: float, distance: float) -> None:
    x, _ = blobs(500, share, distance=distance)
    (found,) = split(x)
    z = whitened(torch.from_numpy(x), np.arange(500), 6).numpy()
    theirs = KMeans(2, n_init=10, random_state=0).fit(z)
    assert found.inertia <= theirs.inertia_ * 1.002


def test_a_rare_cluster_is_found_that_random_starts_miss() -> None:
    x, second = blobs(2000, 0.005, distance=9)
    (found,) = split(x, 10)
    assert found.minor[second].all()
    assert found.minor.sum() == second.sum()
    assert found.share == pytest.approx(0.005)
    assert roc_auc_score(second, found.margin) == 1.0


def test_groups_of_any_size_are_split_as_each_alone() -> None:
    parts = [blobs(n, 0.2, distance=3, seed=n) for n in (25, 200, 40, 900)]
    x = np.concatenate([part for part, _ in parts])
    order = np.random.default_rng(0).permutation(len(x))
    of = np.repeat(np.arange(4), [len(part) for part, _ in parts])[order]
    together = split(x[order], rows=[np.flatnonzero(of == i) for i in range(4)])
    for i, one in enumerate(together):
        (alone,) = split(x[order][of == i])
        np.testing.assert_array_equal(one.minor, alone.minor)
        assert one.inertia == pytest.approx(alone.inertia, rel=1e-3)


def test_the_silhouette_is_scikit_learns() -> None:
    x, second = blobs(200, 0.3, distance=1)
    ours = silhouette(torch.from_numpy(x), torch.from_numpy(second))
    assert ours == pytest.approx(silhouette_score(x, second), abs=1e-4)
    single = np.arange(200) == 0
    assert silhouette(torch.from_numpy(x), torch.from_numpy(single)) == pytest.approx(
        silhouette_score(x, single), abs=1e-4
    )


def test_one_cluster_has_no_silhouette() -> None:
    x = torch.randn(20, 3, generator=make_generator(0))
    assert silhouette(x, torch.zeros(20, dtype=torch.bool)) == 0.0


def test_equal_points_are_no_two_clusters() -> None:
    (found,) = split(np.ones((50, 8), dtype=np.float32))
    assert (found.dimensions, found.share, found.silhouette, found.inertia) == (0, 0.0, 0.0, 0.0)
    assert np.isfinite(found.margin).all()


def test_two_points_repeated_are_two_clusters() -> None:
    x = np.zeros((60, 8), dtype=np.float32)
    x[:12] = 1
    (found,) = split(x)
    assert found.dimensions == 1
    np.testing.assert_array_equal(found.minor, np.arange(60) < 12)
    np.testing.assert_allclose(found.margin, np.where(found.minor, 0.5, -0.5), atol=1e-4)
    assert found.inertia == pytest.approx(0, abs=1e-3)


def test_centres_are_means_of_their_clusters() -> None:
    x, _ = blobs(300, 0.3, distance=2, width=4)
    z = whitened(torch.from_numpy(x), np.arange(300), 4)
    one, other = two_means(z[None], torch.ones(1, 300, 1))[0]
    nearer = (z - one).square().sum(1) < (z - other).square().sum(1)
    np.testing.assert_allclose(z[nearer].mean(0), one, atol=1e-4)
    np.testing.assert_allclose(z[~nearer].mean(0), other, atol=1e-4)


def test_half_precision_gives_the_same_clusters() -> None:
    x, second = blobs(400, 0.1, distance=3)
    (found,) = split_groups(
        torch.from_numpy(x).half(), [np.arange(400)], dimensions=6, generator=make_generator(0)
    )
    np.testing.assert_array_equal(found.minor, second)
