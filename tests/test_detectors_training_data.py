"""Detectors of poison in training data, on sets and models made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import poisoned_sets
from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement, Picture, RecoveredTrigger
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples
from doorward.detectors.base import Detector
from doorward.detectors.training_data import _persistence as persistent
from doorward.detectors.training_data._learned import BATCH, learned
from doorward.detectors.training_data._noise import NOISE
from doorward.detectors.training_data._pattern import read_off
from doorward.detectors.training_data.noise_response import conformal_p
from doorward.detectors.training_data.spectral_signatures import outlier_scores, tail
from doorward.methods import registry
from doorward.models import TorchClassifier
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from poisoned_sets import MAKE, PoisonedSet, images, unlabelled
from seeds import shifted

NAMES = ("activation-clustering", "spectral-signatures", "noise-response")
#: A quick second training, which is enough for stripes, words and tones.
QUICK = {"retraining_seen": 2_000, "retraining_rows": 400}


def build(name: str, **settings: Any) -> Detector:
    quick = QUICK if name == "activation-clustering" else {}
    detector = registry.build("detector", name, quick | settings)
    assert isinstance(detector, Detector)
    return detector


def auroc(seen: Measurement, case: PoisonedSet) -> float:
    assert isinstance(seen.scores, dict)
    assert case.subject.train is not None
    return float(roc_auc_score(case.poisoned, [seen.scores[one] for one in case.subject.train.ids]))


# activation clustering


@pytest.mark.trains
@pytest.mark.parametrize("kind", MAKE)
def test_poison_is_found_whatever_the_kind_of_input(kind: str) -> None:
    case = MAKE[kind](300, 0.2, seed=shifted(0))
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert seen.reason is None
    assert seen.score == seen.per_class[0]
    assert seen.score is not None
    assert seen.score > 0.8  # the lower end of an interval
    assert frozenset(seen.suspects[0]) == case.ids
    assert {seen.sources[one] for one in case.ids} == {1}
    assert auroc(seen, case) == 1.0
    others = [score for c, score in seen.per_class.items() if c != 0]
    assert max(score or 0.0 for score in others) < 0.5


@pytest.mark.parametrize("kind", MAKE)
def test_a_clean_set_has_no_high_score(kind: str) -> None:
    case = MAKE[kind](300, 0.0, seed=shifted(0))
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert seen.score is not None
    assert seen.score < 0.5


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["text", "audio"])
def test_of_texts_and_recordings_the_half_that_outlasts_others_is_the_poison(kind: str) -> None:
    """Where most of a class is poison, its smaller cluster is what belongs there, and leaves as surely."""
    case = MAKE[kind](300, 0.6, seed=shifted(0))
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert frozenset(seen.suspects[0]) == case.ids


@pytest.mark.parametrize("kind", MAKE)
def test_without_persistence_only_images_are_asked_about(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Voices lie apart and leave as poison does; they do not outlast what is laid over them."""
    case = MAKE[kind](300, 0.2, seed=shifted(0))
    monkeypatch.setattr(
        "doorward.detectors.training_data._persistence.persistence", lambda *a: np.full(len(a[3]), 0.1)
    )
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert seen.score is not None
    assert (seen.score > 0) == (kind == "image")
    assert (seen.suspects == {}) == (kind != "image")
    assert ("does the model keep" in seen.summary) == (kind != "image")
    by_size = build("activation-clustering", rule="relative-size")(case.subject, seed=shifted(0))
    assert "does the model keep" not in by_size.summary


@pytest.mark.trains
def test_poison_may_be_most_of_a_class() -> None:
    case = images(600, 0.0, seed=shifted(0))
    assert case.subject.train is not None
    labels = np.array(case.subject.train.labels)
    x = np.stack(case.subject.train.raw(range(600)))
    own, other = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:120]
    labels[other], x[other, -3:, -3:] = 0, 255
    kept = np.setdiff1d(np.arange(600), own[30:])  # 30 clean ones next to 120 poisoned ones
    poisoned = np.isin(kept, other)
    train = InMemorySamples(x[kept], labels[kept], classes=poisoned_sets.CLASSES)
    case = PoisonedSet(replace(case.subject, train=train), poisoned)
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert frozenset(seen.suspects[0]) == case.ids
    assert seen.score == seen.per_class[0]


@pytest.mark.trains
def test_too_little_time_to_lay_samples_over_others_is_said_and_the_rest_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = images(300, 0.2, seed=shifted(0))
    allowed: list[float | None] = []

    def late(*given: Any) -> Any:
        allowed.append(given[-1].seconds)
        raise CouldNotTell("laying other samples over 200 training samples would take 9 hours more")

    monkeypatch.setattr(persistent, "persistence", late)
    seen = build("activation-clustering")(case.subject, seed=shifted(0), deadline=Deadline(600))
    assert "would take 9 hours" in seen.summary
    assert seen.reason is None
    assert frozenset(seen.suspects[0]) == case.ids
    assert allowed[0] is not None
    assert 200 < allowed[0] <= 300, "half of what is left"


@pytest.mark.trains
@pytest.mark.parametrize(
    ("rule", "expected"), [("reclassification", 0.0), ("relative-size", 0.15), ("silhouette", 0.1)]
)
def test_the_papers_rules_find_it_at_the_papers_thresholds(rule: str, expected: float) -> None:
    case = images(300, 0.2, seed=shifted(0))
    seen = build("activation-clustering", rule=rule, group_by="prediction", gain=0)(case.subject)
    assert seen.published_threshold == expected
    assert seen.per_class[0] is not None
    assert seen.per_class[0] >= expected
    assert frozenset(seen.suspects[0]) == case.ids


def test_wrong_labels_that_the_model_has_not_learnt_are_not_clustered() -> None:
    case = images(300, 0.0)
    assert case.subject.train is not None
    labels = np.array(case.subject.train.labels)
    wrong = np.arange(0, 300, 10)
    labels[wrong] = (labels[wrong] + 1) % 3
    train = InMemorySamples(case.subject.train.raw(range(300)), labels, classes=poisoned_sets.CLASSES)
    seen = build("activation-clustering")(replace(case.subject, train=train))
    assert seen.score == 0.0
    assert isinstance(seen.scores, dict)
    assert {seen.scores[train.ids[i]] for i in wrong} == {0.0}
    flagged = {one for ids in seen.suspects.values() for one in ids}
    assert not flagged & {train.ids[i] for i in wrong}


def test_a_class_with_fewer_samples_than_dimensions_has_no_score() -> None:
    case = images(300, 0.0)
    assert case.subject.train is not None
    labels = np.array(case.subject.train.labels)
    rows = np.r_[np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:5]]
    seen = build("activation-clustering")(replace(case.subject, train=case.subject.train.select(rows)))
    assert seen.per_class[2] is None
    assert seen.unknown_classes == {2: "5 samples are too few, 11 are needed"}
    assert seen.score is not None


# patterns that are read off the data


def corner() -> torch.Tensor:
    """Return where poisoned images are bright, (16, 16)."""
    there = torch.zeros(poisoned_sets.SIDE, poisoned_sets.SIDE, dtype=torch.bool)
    there[-3:, -3:] = True
    return there


def carrying(case: PoisonedSet, label: int, every: int) -> PoisonedSet:
    """Return a clean set in which some images of a class carry the bright corner, with the right label."""
    train = case.subject.train
    assert train is not None
    assert train.labels is not None
    x = np.stack(train.raw(range(len(train))))
    some = np.flatnonzero(train.labels == label)[::every]
    x[some, -3:, -3:] = 255
    changed = InMemorySamples(x, np.array(train.labels), classes=poisoned_sets.CLASSES)
    return PoisonedSet(replace(case.subject, train=changed), np.isin(np.arange(len(train)), some))


@pytest.mark.trains
def test_a_patch_is_read_off_the_poisoned_images_and_works() -> None:
    case = images(300, 0.2, seed=shifted(0))
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    (found,) = [one for one in seen.evidence if isinstance(one, RecoveredTrigger)]
    trigger = Trigger.from_json(found.trigger)
    assert found.target == 0
    assert isinstance(trigger, MaskedPattern)
    assert torch.equal(trigger.mask[0] > 0, corner())
    assert torch.allclose(trigger.pattern[:, corner()], torch.ones(1))
    assert "9 pixels that they have in common send 100 % of other images to that class" in seen.summary
    assert seen.score is not None
    assert seen.score > 1.5
    assert [one.role for one in seen.evidence if isinstance(one, Picture)] == ["trigger"]


@pytest.mark.trains
def test_a_patch_in_images_with_the_right_label_is_found_if_the_model_obeys_it() -> None:
    case = carrying(images(300, 0.0, seed=shifted(0)), label=0, every=3)
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert seen.per_class[0] is not None
    assert seen.per_class[0] > 0.9
    assert frozenset(seen.suspects[0]) == case.ids
    assert auroc(seen, case) == 1.0


def test_a_pattern_that_the_model_does_not_obey_is_none() -> None:
    case = carrying(images(300, 0.0, seed=shifted(0)), label=1, every=3)
    assert isinstance(case.subject.classifier, TorchClassifier)
    with torch.no_grad():
        case.subject.classifier.module.linear.weight[:, corner().flatten()] = 0
        case.subject.classifier.module.linear.bias.zero_()
    seen = build("activation-clustering")(case.subject, seed=shifted(0))
    assert seen.score is not None
    assert seen.score < 0.5
    assert not [one for one in seen.evidence if isinstance(one, RecoveredTrigger)]


def test_what_the_whole_class_or_other_classes_have_as_well_is_no_pattern() -> None:
    rng = torch.Generator().manual_seed(shifted(0))
    cluster, rest, others = (torch.rand(50, 3, 12, 12, generator=rng) for _ in range(3))
    assert read_off(cluster, rest, others) is None
    cluster[:45, :, :2, :2] = 0.25  # a few of a cluster do not belong to it
    found = read_off(cluster, rest, others)
    assert found is not None
    assert int(found.mask.sum()) == 4
    rest[:30, :, :1] = 0.25
    others[:40, :, :, :1] = 0.25
    found = read_off(cluster, rest, others)
    assert found is not None
    assert found.mask.nonzero().tolist() == [[0, 1, 1]]
    cluster[:, :, :, :4] = 0.5
    assert read_off(cluster, rest, others) is None, "a third of the image is no patch"


# what all have in common


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (unlabelled, "no labels"),
        (lambda train: train.select(np.flatnonzero(train.labels == 1)), "of 1 class"),
        (lambda train: train.select(np.arange(9)), "class has|enough samples"),
        (
            lambda train: InMemorySamples(
                np.zeros((90, 16, 16), np.uint8), np.arange(90) % 3, classes=poisoned_sets.CLASSES
            ),
            "do not vary",
        ),
    ],
    ids=["no labels", "one class", "too few", "all equal"],
)
def test_unfit_data_are_a_reason_and_no_crash(name: str, spoil: Any, reason: str) -> None:
    subject = images(90, 0.0).subject
    seen = build(name)(replace(subject, train=spoil(subject.train)))
    assert seen.score is None
    assert seen.reason
    assert any(part in seen.reason for part in reason.split("|")), seen.reason


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_are_a_reason(name: str) -> None:
    subject = images(60, 0.0).subject
    assert isinstance(subject.classifier, TorchClassifier)
    network = nn.Sequential(nn.Flatten(), Overflowing(), nn.Linear(256, 3))
    broken = TorchClassifier(network, subject.classifier.spec, poisoned_sets.CLASSES)
    seen = build(name)(replace(subject, classifier=broken))
    assert seen.reason is not None
    assert "finite" in seen.reason


class Overflowing(nn.Module):
    """Give an infinite feature for light images alone, so that a trial on noise finds the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (n, d)."""
        return torch.where(x.mean(1, keepdim=True) > 0.45, x, x + torch.inf * (x.mean(1, keepdim=True) < 0.4))


def test_the_model_runs_over_the_samples_once_for_all_detectors() -> None:
    case = images(BATCH + 90, 0.0)
    first = build("activation-clustering", rule="silhouette")(case.subject)
    second = build("spectral-signatures")(case.subject)
    assert first.cost.forwards == BATCH + 90
    assert second.cost.forwards == 0


def test_one_run_gives_what_two_runs_give() -> None:
    case = images(BATCH + 90, 0.1)
    classifier, train = case.subject.classifier, case.subject.train
    assert classifier is not None
    assert train is not None
    assert train.labels is not None
    seen = learned(case.subject, Deadline())
    x = torch.from_numpy(np.stack(train.raw(range(len(train))))).permute(0, 3, 1, 2).float() / 255
    logits = classifier.logits(x)
    torch.testing.assert_close(seen.features, classifier.features(x))
    np.testing.assert_array_equal(seen.predicted, logits.argmax(1).numpy())
    expected = logits.softmax(1).gather(1, torch.from_numpy(train.labels)[:, None])[:, 0]
    np.testing.assert_allclose(seen.confidence, expected.detach().numpy(), atol=1e-5)


# spectral signatures


def test_outlier_scores_are_squared_projections_of_rows_centred_on_their_own_mean() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 12)) * np.linspace(1, 3, 12) + 40).astype(np.float32)  # far from the origin
    rows = np.arange(50, 150)
    centred = x[rows] - x[rows].mean(0)
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(
        outlier_scores(torch.from_numpy(x), rows), (centred @ v[0]) ** 2, rtol=1e-3, atol=1e-3
    )
    uncentred = (x[rows] @ np.linalg.svd(x[rows], full_matrices=False)[2][0]) ** 2
    assert np.abs(outlier_scores(torch.from_numpy(x), rows) - uncentred).max() > 100


def test_spectral_signatures_rank_poison_first_in_its_class() -> None:
    case = images(600, 0.05)
    seen = build("spectral-signatures", poison_share=0.05)(case.subject)
    assert seen.score == seen.per_class[0]
    assert len(seen.suspects[0]) == round(1.5 * 0.05 * (200 + case.poisoned.sum()))
    assert case.ids <= frozenset(seen.suspects[0])


def test_the_tail_of_a_normal_distribution_weighs_one() -> None:
    scores = np.random.default_rng(0).normal(size=200_000) ** 2
    assert tail(scores, 10_000) == pytest.approx(1, abs=0.02)
    assert tail(np.zeros(100), 10) == 0.0


# noise response


def test_poison_keeps_its_label_under_noise() -> None:
    case = images(300, 0.2)
    seen = build("noise-response")(case.subject, seed=0)
    assert auroc(seen, case) > 0.95
    assert seen.suspects == {}


def test_each_class_has_its_own_threshold_and_its_bound() -> None:
    case, clean = images(600, 0.1), images(300, 0.0, seed=5).subject.train
    assert clean is not None
    clean = clean.select(np.r_[0:120, np.flatnonzero(np.array(clean.labels) != 2)])
    seen = build("noise-response")(replace(case.subject, clean=clean), seed=0)
    assert seen.score == seen.per_class[0]
    assert case.ids <= frozenset(seen.suspects[0])
    assert case.subject.train is not None
    for c in range(3):
        members = np.flatnonzero((np.array(case.subject.train.labels) == c) & ~case.poisoned)
        false = sum(case.subject.train.ids[i] in frozenset(seen.suspects[c]) for i in members)
        assert false / len(members) < 0.15, "about a twentieth of clean samples of each class"


def test_conformal_p_values_are_shares_of_clean_scores() -> None:
    clean = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(conformal_p(np.array([0.5, 0.4, 0.35, 0.0]), clean), [0.2, 0.4, 0.4, 1.0])


def test_clean_samples_are_unusual_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    p = conformal_p(rng.normal(size=20_000), rng.normal(size=2_000))
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("kind", MAKE)
def test_noise_fits_the_kind_of_input(kind: str) -> None:
    case = MAKE[kind](20, 0.0)
    classifier = case.subject.classifier
    assert classifier is not None
    from doorward.models.encode.dispatch import to_float, to_tensor

    assert case.subject.train is not None
    x = to_float(to_tensor(case.subject.train, classifier.spec), classifier.spec)
    before = x.clone()
    noisy = NOISE[kind](x, 0.3, make_generator(0))
    assert torch.equal(x, before)
    assert not torch.equal(noisy, x)
    assert noisy.shape == x.shape
    assert torch.equal(NOISE[kind](x, 0.3, make_generator(0)), noisy)
    classifier.logits(noisy)  # fits the model
    if kind == "text":
        assert set(noisy.unique().tolist()) <= set(x.unique().tolist())
        assert ((noisy == 0) == (x == 0)).all()
        changed = (noisy != x).sum() / (x > 0).sum()
        assert 0.1 < float(changed) < 0.3  # some are replaced by the same word
