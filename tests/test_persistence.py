"""Samples in which a model keeps to their class whatever is laid over them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.detectors.training_data._persistence import (
    FEWEST,
    MOST,
    OVERLAYS,
    cut,
    differing,
    drawn,
    explained,
    joined,
    persistence,
)
from doorward.models.encode.dispatch import to_tensor
from poisoned_sets import PoisonedSet, images, texts


def test_two_heaps_are_cut_between_them() -> None:
    found = cut(np.array([0.9, 0.1, 0.2, 0.9, 0.1, 0.2]))
    assert (found.low, found.high) == pytest.approx((0.15, 0.9))
    assert found.share == pytest.approx(1 / 3)
    assert found.explained > 0.95
    assert found.persistent
    assert found.margin(np.array([0.15, 0.9])) == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.linspace(0, 1, 101), "spread evenly: three quarters lie between the halves"),
        (np.repeat([0.1, 0.6], 50), "the upper heap does not keep to the class"),
        (np.repeat([0.1, 0.9], [20, 80]), "the upper heap is most of the class"),
        (np.full(10, 0.9), "all are the same"),
    ],
)
def test_no_heap_of_persistent_samples(values: np.ndarray, why: str) -> None:
    assert not cut(values).persistent, why


def test_an_even_spread_leaves_three_quarters_between_its_halves() -> None:
    assert cut(np.linspace(0, 1, 1001)).explained == pytest.approx(0.75, abs=1e-3)


def test_what_two_clusters_explain() -> None:
    values = np.array([0.0, 0.0, 1.0, 1.0])
    assert explained(values, values > 0.5) == pytest.approx(1)
    assert explained(values, np.array([True, False, True, False])) == 0
    assert explained(values, np.ones(4, dtype=bool)) == 0
    assert explained(np.ones(4), values > 0.5) == 0


def test_what_is_laid_over_comes_from_as_many_classes_as_can_be() -> None:
    labels = np.repeat(np.arange(4), [50, 3, 3, 50])
    rows = np.flatnonzero(labels != 0)
    chosen = differing(labels, rows, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == OVERLAYS
    assert sorted(np.bincount(labels[chosen], minlength=4).tolist()) == [0, 2, 3, 3]


@pytest.mark.parametrize(
    ("n", "small", "classes"), [(900, 30, 10), (900, 400, 10), (30, 5, 3), (900, 30, 500)]
)
def test_as_many_of_a_cluster_as_of_the_rest_are_measured(n: int, small: int, classes: int) -> None:
    inside = np.arange(n) < small
    places = drawn(inside, classes, np.random.default_rng(0))
    assert len(set(places.tolist())) == len(places) == min(n, max(FEWEST, min(MOST, 32_000 // (8 * classes))))
    wanted = min(small, len(places) // 2)
    assert inside[places].sum() >= wanted


@pytest.mark.parametrize("made", [images, texts])
def test_a_trigger_outlasts_what_is_laid_over_it(made: Callable[[int, float], PoisonedSet]) -> None:
    case = made(300, 0.4)
    train, classifier = case.subject.train, case.subject.classifier
    assert train is not None
    assert classifier is not None
    labels = train.labels
    assert labels is not None
    rows = np.flatnonzero(labels == 0)
    laid = differing(labels, np.flatnonzero(labels != 0), np.random.default_rng(0))
    overlays = to_tensor(train.select(laid), classifier.spec)
    found = persistence(classifier, train, 0, rows, overlays, Deadline())
    assert roc_auc_score(case.poisoned[rows], found) == 1.0
    assert found[case.poisoned[rows]].min() > 0.75
    assert ((found >= 0) & (found <= 1)).all()
    again = persistence(classifier, train, 0, rows[:10], overlays, Deadline())
    assert again == pytest.approx(found[:10], abs=1e-6), "others next to them change nothing"


def test_texts_are_joined_whole_where_there_is_room() -> None:
    text, other = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[7, 8, 0], [9, 0, 0]])
    rows = [one[:, None, None] for one in (text, other)]
    after = joined(*rows, 8, others_first=False)
    assert after.shape == (2, 1, 1, 5)
    assert after.flatten(1).tolist() == [[1, 2, 3, 7, 8], [1, 2, 3, 9, 0]]
    assert joined(*rows, 8, others_first=True).flatten(1).tolist() == [[7, 8, 1, 2, 3], [9, 1, 2, 3, 0]]


def test_a_long_text_keeps_its_ends_and_leaves_half_of_the_row() -> None:
    text, other = torch.arange(1, 11)[None, None, None], torch.arange(21, 40)[None, None, None]
    assert joined(text, other, 8, others_first=False).flatten().tolist() == [1, 2, 9, 10, 21, 22, 23, 24]
    short = joined(text, other[..., :1], 8, others_first=True)
    assert short.flatten().tolist() == [21, 1, 2, 3, 4, 8, 9, 10]


def test_a_deadline_is_kept() -> None:
    case = images(60, 0.4)
    train, classifier = case.subject.train, case.subject.classifier
    assert train is not None
    assert classifier is not None
    overlays = to_tensor(train.select(np.arange(OVERLAYS)), classifier.spec)
    with pytest.raises(CouldNotTell, match="laying other samples over"):
        persistence(classifier, train, 0, np.arange(60), overlays, Deadline(0.0))
