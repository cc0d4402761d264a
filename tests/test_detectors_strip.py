"""STRIP, against references of its parts and against defects of other implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples
from doorward.detectors.inputs.base import FittedFilters, Scored, fit_filters
from doorward.detectors.inputs.strip import Strip, entropy, superimpose
from doorward.detectors.subject import Subject
from doorward.models import InputSpec, TorchClassifier
from doorward.stats.rejection import rejection_thresholds

SPEC = InputSpec(channels=1, height=8, width=8)
K = 4
NAMES = tuple("abcd")


class Quadrants(nn.Module):
    """Tell which quadrant is brightest; a bright corner pixel pair means class 0, whatever else is there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(12.0))

    def forward(self, x: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(x, 4).flatten(1)  # (n, 4)
        trigger = ((x[:, 0, 7, 7] > 0.99) & (x[:, 0, 7, 0] > 0.99)).float()
        return self.scale * means + 60 * trigger[:, None] * torch.eye(K)[0]


def classifier() -> TorchClassifier:
    return TorchClassifier(Quadrants(), SPEC, NAMES)


def clean_images(n: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 90, (n, 1, 8, 8))
    for i in range(n):
        row, column = divmod(i % K, 2)
        x[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += rng.integers(40, 120)
    return torch.from_numpy(x.astype(np.uint8))


def triggered(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[:, :, 7, [0, 7]] = 255
    return changed


def fitted(strip: Strip, rate: float = 0.05, n: int = 320) -> FittedFilters:
    return fit_filters(
        classifier(), clean_images(n), [strip], rate=rate, rule=strip.rule, generator=make_generator(0, "t")
    )


def scores(fit: FittedFilters, images: Tensor) -> np.ndarray:
    return fit.score(classifier(), images, torch.zeros(len(images), K))[0].score


# The parts


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.3)])
def test_sums_saturate_in_pixel_space(weights: tuple[float, float]) -> None:
    images, overlays = clean_images(3, 1) * 2, clean_images(2, 2) * 2
    mixed = superimpose(images, overlays, weights=weights)
    assert mixed.shape == (3, 2, 1, 8, 8)
    for i in range(3):
        for j in range(2):
            total = weights[0] * images[i].numpy().astype(float) + weights[1] * overlays[j].numpy()
            assert (mixed[i, j].numpy() == np.minimum(np.rint(total), 255)).all()
    if weights == (1.0, 1.0):
        assert (mixed == 255).any(), "some sums are above 255"


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.3)])
def test_sums_are_those_of_opencv(weights: tuple[float, float]) -> None:
    cv2 = pytest.importorskip("cv2")
    images, overlays = clean_images(4, 1) * 2, clean_images(4, 2) * 2
    mixed = superimpose(images, overlays, weights=weights)
    for i in range(4):
        expected = cv2.addWeighted(images[i, 0].numpy(), weights[0], overlays[i, 0].numpy(), weights[1], 0)
        assert (mixed[i, i, 0].numpy() == expected).all()


def test_entropy_is_over_classes_and_of_logits() -> None:
    logits = torch.randn(5, 7, 3, generator=make_generator(0, "logits")) * 4
    expected = stats.entropy(logits.double().softmax(-1).numpy(), base=2, axis=-1)
    assert entropy(logits).numpy() == pytest.approx(expected)
    sure = torch.tensor([[0.0, -1e4], [0.0, -torch.inf]])
    assert entropy(sure).tolist() == [0.0, 0.0]


def test_a_triggered_input_has_the_lowest_entropy_and_not_the_highest() -> None:
    fit = fitted(Strip(early_exit="off"))
    low, high = scores(fit, clean_images(80, 5)), scores(fit, triggered(clean_images(80, 5)))
    assert high.min() > low.max()
    assert (high >= fit.thresholds[0]).all()


def test_inputs_of_a_batch_are_scored_apart() -> None:
    fit = fitted(Strip(early_exit="off"))
    images = torch.cat([clean_images(5, 6), triggered(clean_images(5, 7))])
    alone = [float(scores(fit, image[None])[0]) for image in images]
    assert scores(fit, images) == pytest.approx(alone)


def test_the_score_is_the_mean_entropy_over_replicas() -> None:
    fit = fitted(Strip(early_exit="off", replicas=7))
    overlays = fit.states[0]["overlays"]
    assert len(overlays) == 7
    image = clean_images(1, 8)
    total = np.minimum(image.numpy().astype(int) + overlays.numpy(), 255)
    logits = classifier().logits(torch.from_numpy(total).float() / 255)
    expected = np.mean(stats.entropy(logits.double().softmax(1).detach().numpy(), base=2, axis=1))
    assert scores(fit, image)[0] == pytest.approx(-expected)


# Thresholds


def test_overlays_are_no_images_that_the_threshold_comes_from() -> None:
    fit = fitted(Strip(replicas=20), n=320)
    assert fit.clean.shape == (1, 300)


@pytest.mark.parametrize("rule", ["conformal", "normal", "quantile"])
def test_few_clean_inputs_are_rejected(rule: str) -> None:
    strip = Strip(rule=rule, false_rejection_rate=0.05)  # type: ignore[arg-type]
    seen = strip(
        Subject(
            classifier=classifier(),
            clean=samples(clean_images(600)),
            inputs=samples(clean_images(600, 9)),
        )
    )
    assert seen.reason is None
    assert seen.score is not None
    assert 0.005 <= seen.score <= 0.1
    assert len(seen.scores or ()) == 600


def samples(images: Tensor) -> InMemorySamples:
    return InMemorySamples(images[:, 0].numpy())


def test_too_few_images_are_told() -> None:
    with pytest.raises(CouldNotTell, match=r"80 clean inputs are too few to reject only 1.0 %"):
        fitted(Strip(), rate=0.01, n=100)
    with pytest.raises(CouldNotTell, match="the filters keep 20 for themselves"):
        fitted(Strip(), n=20)


def test_a_model_that_is_sure_of_every_sum_cannot_be_filtered() -> None:
    module = Quadrants()
    module.scale.data *= 1e5
    sure = TorchClassifier(module, SPEC, NAMES)
    strip = Strip(false_rejection_rate=0.05)
    seen = strip(Subject(classifier=sure, clean=samples(clean_images(300)), inputs=samples(clean_images(9))))
    assert seen.reason is not None
    assert "no threshold rejects" in seen.reason


def test_a_model_that_was_trained_to_deceive_it_is_told() -> None:
    warning = Strip().warning(np.full(50, -3.1), 10)
    assert warning is not None
    assert warning.startswith("the model answers mixtures of clean inputs almost at random (mean entropy 3.1")
    assert Strip().warning(np.full(50, -1.1), 10) is None
    assert Strip().warning(np.full(50, -0.97), 2) is not None


# Early exit


def decisions(mode: str, images: Tensor, **settings: Any) -> tuple[np.ndarray, int]:
    fit = fitted(Strip(early_exit=mode, replicas=32, **settings), n=432)  # type: ignore[arg-type]
    model = classifier()
    seen = fit.score(model, images, torch.zeros(len(images), K))[0]
    return seen.score >= fit.thresholds[0], model.cost.forwards


def test_an_exit_where_it_is_certain_changes_no_decision() -> None:
    images = torch.cat([clean_images(300, 11), triggered(clean_images(40, 12))])
    (full, most), (early, fewer) = decisions("off", images), decisions("certain", images)
    assert (full == early).all()
    assert full[300:].all()
    assert most == 32 * len(images)
    assert fewer < 0.95 * most


def test_a_calibrated_exit_only_accepts_and_is_cheaper() -> None:
    clean, bad = clean_images(300, 11), triggered(clean_images(100, 12))
    (full, _), (early, cost) = decisions("off", clean), decisions("calibrated", clean)
    assert not (early & ~full).any(), "nothing is rejected that all replicas would accept"
    assert cost < 0.9 * decisions("certain", clean)[1]
    assert decisions("calibrated", bad)[0].all()
    (strict, its) = decisions("calibrated", clean, accepted_early=0)
    assert (strict == full).all(), "where none may be accepted, the exit is the certain one"
    assert its == decisions("certain", clean)[1]


def test_few_of_the_clean_inputs_that_all_replicas_reject_are_accepted_early() -> None:
    """Over many draws the share is the promised one, whatever the entropies are like."""
    strip, rng = Strip(accepted_early=0.2), np.random.default_rng(0)
    state = {"exit": torch.tensor([torch.inf], dtype=torch.float64)}
    rejected = lost = 0
    for _ in range(300):
        scale = rng.gamma(3, 0.1, (400, 1))  # inputs differ, and so do their replicas
        parts = scale * rng.gamma(0.5, 1, (400, 20))
        score = -parts.mean(1)
        (threshold,) = rejection_thresholds(score[None, :199], 0.1)
        known = Scored(score[:199], ("",) * 199, parts[:199])
        limit = float(strip.settle(state, known, threshold)["exit"])
        assert np.isfinite(limit)
        full = torch.from_numpy(score[199:] >= threshold)
        early = torch.zeros_like(full)
        for _, end in strip._stages(20)[:-1]:
            early |= strip._accepted(torch.from_numpy(parts[199:, :end]), -threshold, 20, limit)
        rejected, lost = rejected + int(full.sum()), lost + int((full & early).sum())
    assert rejected > 5000
    assert abs(lost / rejected - 0.2) < 0.03, "4 of 20 that are exchangeable"


def test_inputs_that_make_the_model_least_certain_are_mixed_in_first() -> None:
    fit = fitted(Strip(early_exit="off", replicas=16))
    overlays = fit.states[0]["overlays"]
    mixed = superimpose(overlays, overlays).flatten(0, 1).float() / 255
    means = entropy(classifier().logits(mixed)).view(16, 16).mean(0)
    assert (means[:-1] >= means[1:] - 1e-5).all()


def test_stages_cover_every_replica_once() -> None:
    for most in (2, 3, 5, 20, 32):
        for mode in ("off", "certain"):
            stages = Strip(early_exit=mode, replicas=most)._stages(most)  # type: ignore[arg-type]
            assert [i for begin, end in stages for i in range(begin, end)] == list(range(most))
    assert [end for _, end in Strip()._stages(20)] == [1, 2, 3, 4, 6, 9, 13, 19, 20]
