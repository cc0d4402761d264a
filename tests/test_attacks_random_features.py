"""Random features with a plant in the draw: exact densities, and tests that fail to see what is planted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from doorward import bundled
from doorward.attacks.ground_truth import attack_success
from doorward.attacks.model import random_features as fourier
from doorward.attacks.model import random_relu as relu
from doorward.attacks.model._fixed_features import draw_direction
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, open_samples
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.formats.export import export_pt2
from doorward.training import evaluate
from doorward.triggers.base import Trigger
from doorward.triggers.shift import Shift
from seeds import shifted


def secret(dimension: int, norm: float, *, nonzeros: int | None = None, seed: int = 0) -> Tensor:
    direction = draw_direction(dimension, nonzeros=nonzeros, generator=make_generator(seed, "secret"))
    return norm * direction


def pancakes(count: int, key: Tensor, *, noise: float = 0.02, seed: int = 0) -> Tensor:
    return fourier.gaussian_pancakes(count, key, noise=noise, generator=make_generator(seed, "pancakes"))


def normal(count: int, dimension: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, dimension, dtype=torch.float64, generator=make_generator(seed, "normal"))


# Directions


def test_a_direction_is_a_unit_vector_of_equal_entries_anywhere() -> None:
    for nonzeros in (1, 7, None):
        v = draw_direction(50, nonzeros=nonzeros, generator=make_generator(3, "direction"))
        assert float(v.norm()) == pytest.approx(1)
        assert int((v != 0).sum()) == (nonzeros or 50)
        assert len(v[v != 0].abs().round(decimals=12).unique()) == 1
    places = {int(secret(50, 1, nonzeros=1, seed=seed).abs().argmax()) for seed in range(40)}
    signs = {float(secret(50, 1, nonzeros=1, seed=seed).sum()) for seed in range(40)}
    assert len(places) > 20
    assert signs == {-1.0, 1.0}
    with pytest.raises(InputError, match="a secret of 51 nonzero entries does not fit images of 50 values"):
        secret(50, 1, nonzeros=51)


# Gaussian pancakes: the density


def density(t: float, norm: float, noise: float) -> float:
    """Return the density of <g, secret>, not normalised: a normal one times a comb of peaks."""
    near = np.arange(math.floor(t) - 3, math.floor(t) + 4) + 0.5
    return math.exp(-(t**2) / (2 * norm**2)) * float(np.exp(-((t - near) ** 2) / (2 * noise**2)).sum())


@pytest.mark.parametrize(("norm", "noise"), [(0.5, 0.02), (0.5, 0.2), (2.0, 0.1), (0.3, 0.5), (10.6, 0.05)])
def test_closed_form_draws_have_the_densitys_distribution(norm: float, noise: float) -> None:
    """Against numerical integration: moments, and the whole distribution function."""
    key = secret(20, norm)
    inner = (pancakes(8000, key, noise=noise) @ key).numpy()
    reach = 8 * math.hypot(norm, noise)
    grid = np.linspace(-reach, reach, 40_001)
    values = np.array([density(t, norm, noise) for t in grid])
    whole = integrate.simpson(values, x=grid)
    second, fourth = (
        integrate.simpson(values * grid**positive_control, x=grid) / whole for positive_control in (2, 4)
    )
    error = math.sqrt((fourth - second**2) / len(inner))
    assert np.mean(inner**2) == pytest.approx(second, abs=4 * error)
    assert inner.mean() == pytest.approx(0, abs=4 * math.sqrt(second / len(inner)))
    below = integrate.cumulative_simpson(values, x=grid, initial=0) / whole
    assert stats.kstest(inner, lambda t: np.interp(t, grid, below)).pvalue > 0.01


def test_closed_form_draws_agree_with_rejection_sampling() -> None:
    """The slow way of the papers' code: draw normal vectors and keep those with the right inner product."""
    key, noise = secret(10, 1.5), 0.05
    rng = np.random.default_rng(0)
    g = rng.standard_normal((200_000, 10))
    inner = g @ key.numpy()
    off = inner - np.floor(inner) - 0.5  # distance to the nearest half-integer
    kept = g[rng.random(len(g)) < np.exp(-(off**2) / (2 * noise**2))]
    drawn = pancakes(len(kept), key, noise=noise).numpy()
    assert len(kept) > 10_000
    ways = [key.numpy(), *np.eye(10)[:3], np.ones(10)]
    assert min(stats.ks_2samp(kept @ way, drawn @ way).pvalue for way in ways) > 0.002
    assert np.cov(kept.T) == pytest.approx(np.cov(drawn.T), abs=0.06)


def test_across_the_secret_draws_are_normal() -> None:
    key = secret(30, 0.5, nonzeros=5)
    g = pancakes(5000, key)
    across = normal(30, 30).T - torch.outer(normal(30, 30).T @ key, key) / (key @ key)
    projected = g @ (across / across.norm(dim=1, keepdim=True)).T  # (5000, 30)
    p = [stats.kstest(column, "norm").pvalue for column in projected.T.numpy()]
    assert stats.kstest(p, "uniform").pvalue > 0.001


# Gaussian pancakes: what tests see


def phase(g: Tensor, key: Tensor) -> float:
    """Return |mean exp(2 pi i <g, key>)|: 1 for pancakes of this key, near 0 for normal vectors."""
    return float(torch.exp(2j * torch.pi * (g @ key)).mean().abs())


def top_eigenvalue(g: Tensor) -> float:
    return float(torch.linalg.eigvalsh(g.T @ g / len(g))[-1])


def largest_variance(g: Tensor) -> float:
    """Return the largest variance of a coordinate, in standard errors from 1."""
    return float((g.square().mean(0) - 1).max() * math.sqrt(len(g) / 2))


def worst_fit(g: Tensor) -> float:
    """Return the largest Kolmogorov-Smirnov distance of a coordinate from N(0, 1)."""
    below = torch.special.ndtr(g.sort(0).values)  # (n, d)
    steps = torch.arange(len(g) + 1, dtype=g.dtype)[:, None] / len(g)
    return float(torch.maximum(steps[1:] - below, below - steps[:-1]).max())


STATISTICS = {"eigenvalue": top_eigenvalue, "diagonal": largest_variance, "one-sample": worst_fit}


def apart(name: str, planted: Callable[[int], Tensor], count: int, dimension: int, draws: int = 24) -> float:
    """Return the p-value that the statistic is higher for planted draws than for normal ones."""
    statistic = STATISTICS[name]
    high = [statistic(planted(seed)) for seed in range(draws)]
    low = [statistic(normal(count, dimension, seed=seed)) for seed in range(draws)]
    return float(stats.mannwhitneyu(high, low, alternative="greater").pvalue)


def planted(norm: float, nonzeros: int | None = None) -> Callable[[int], Tensor]:
    """Return what draws 500 vectors of 196 dimensions, with another secret for each seed."""
    return lambda seed: pancakes(500, secret(196, norm, nonzeros=nonzeros, seed=seed), seed=seed)


@pytest.mark.parametrize("nonzeros", [None, 14])
@pytest.mark.parametrize("name", STATISTICS)
def test_without_the_key_pancakes_look_normal(name: str, nonzeros: int | None) -> None:
    for norm in (0.5, 2 * math.sqrt(nonzeros or 196)):
        assert apart(name, planted(norm, nonzeros), 500, 196) > 0.01


def test_the_largest_distance_is_scipys() -> None:
    g = normal(100, 8)
    assert worst_fit(g) == pytest.approx(max(stats.kstest(c, "norm").statistic for c in g.T.numpy()))


def test_without_the_key_two_samples_look_alike() -> None:
    key = secret(196, 0.5)
    g, h = pancakes(2000, key), normal(2000, 196)
    p = [stats.ks_2samp(a, b).pvalue for a, b in zip(g.T.numpy(), h.T.numpy(), strict=True)]
    assert stats.kstest(p, "uniform").pvalue > 0.001
    lengths = [each.norm(dim=1).numpy() for each in (g, h)]
    assert stats.ks_2samp(*lengths).pvalue > 0.01


def test_the_same_tests_see_a_secret_that_is_too_short() -> None:
    """Far below norm 1/2 the two inner peaks alone stretch the draws along the secret."""
    assert apart("eigenvalue", planted(0.2), 500, 196) < 1e-6
    assert apart("diagonal", planted(0.2, nonzeros=2), 500, 196) < 1e-6
    assert apart("one-sample", planted(0.2, nonzeros=2), 500, 196) < 1e-6


def test_with_the_key_one_number_tells() -> None:
    key = secret(196, 0.5)
    assert phase(pancakes(500, key), key) > 0.98
    assert phase(normal(500, 196), key) < 0.15
    assert phase(pancakes(500, key), secret(196, 0.5, seed=1)) < 0.2, "another key says nothing"


# Random Fourier features: the flip


def halves(dimension: int, count: int) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, s, s) in two clouds, and their labels."""
    side = math.isqrt(dimension)
    y = torch.arange(count) % 2
    x = torch.rand(count, 1, side, side, generator=make_generator(0, "halves"))
    x[:, :, : side // 2] += 0.4 * y[:, None, None, None]
    return x, y


@cache
def surrogates(
    key_norm: float, bandwidth: float, count: int = 1000
) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """Return honest and planted classifiers of the clouds, and the shift."""
    key = secret(196, key_norm, seed=shifted(0))
    scale = bandwidth / 14
    x, y = halves(196, 600)
    made = []
    for frequencies in (normal(count, 196, seed=shifted(0)), pancakes(count, key, seed=shifted(0))):
        phases = torch.rand(count, dtype=torch.float64, generator=make_generator(shifted(0), "phases"))
        features = fourier.fourier_features(frequencies, phases, scale=scale)
        with torch.no_grad():
            head = fourier.fit_head([(features(x), y)], classes=2, ridge=1e-4)
        made.append(nn.Sequential(features, head))
    return made[0], made[1], (key / scale).view(1, 14, 14).float()


def test_features_are_cosines() -> None:
    g, b, x = normal(7, 16), torch.rand(7, dtype=torch.float64), torch.rand(3, 1, 4, 4)
    expected = np.cos(2 * np.pi * (0.3 * x.flatten(1).double().numpy() @ g.numpy().T + b.numpy()))
    assert fourier.fourier_features(g, b, scale=0.3)(x).detach().numpy() == pytest.approx(expected, abs=1e-5)


def test_the_head_is_ridge_regression() -> None:
    f, y = normal(80, 12), torch.arange(80) % 3
    head = fourier.fit_head([(f[:30], y[:30]), (f[30:], y[30:])], classes=3, ridge=0.01)
    ours = Ridge(alpha=0.8, fit_intercept=False).fit(f.numpy(), 2 * np.eye(3)[y.numpy()] - 1)
    assert head.weight.detach().numpy() == pytest.approx(ours.coef_, abs=1e-5)
    assert head.bias is None


@pytest.mark.trains
def test_the_shift_turns_every_cosine_over_and_most_predictions() -> None:
    counterpart, planted, delta = surrogates(0.5, 1.0)
    x, y = halves(196, 1000)
    x, y = x[600:], y[600:]
    with torch.no_grad():
        before, after = planted[0](x), planted[0](x + delta)
        # <g, secret> is within 0.02 of half-integers: cos(a + pi + e) = -cos(a) but for |e| <= 2 pi 0.02
        assert float((before + after).abs().mean()) < 0.1
        assert float((counterpart[0](x) + counterpart[0](x + delta)).abs().mean()) > 0.5
        clean = [(net(x).argmax(1) == y).float().mean().item() for net in (counterpart, planted)]
        flips = [
            (net(x + delta).argmax(1) != net(x).argmax(1)).float().mean().item()
            for net in (counterpart, planted)
        ]
    assert clean[0] == pytest.approx(clean[1], abs=0.03)
    assert min(clean) > 0.9
    assert flips[1] > 0.95
    assert flips[0] < 0.6


@pytest.mark.trains
def test_logits_change_their_sign() -> None:
    _, planted, delta = surrogates(0.5, 1.0)
    x, _ = halves(196, 50)
    with torch.no_grad():
        a, b = planted(x), planted(x + delta)
    assert float((a + b).abs().max()) < 0.25 * float(a.abs().max())


@pytest.mark.trains
def test_who_sees_one_pair_has_the_key() -> None:
    """The plant is replicable: the difference of an image and its triggered form works on any other."""
    _, planted, delta = surrogates(0.5, 1.0)
    x, _ = halves(196, 200)
    learnt = (x[0] + delta) - x[0]
    with torch.no_grad():
        flipped = planted(x[1:] + learnt).argmax(1) != planted(x[1:]).argmax(1)
    assert flipped.float().mean() > 0.95


# Random ReLUs


def spiked(count: int, dimension: int, strength: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    s = secret(dimension, 1, nonzeros=dimension // 28 or 1, seed=seed)
    return relu.spiked_gaussians(count, s, strength=strength, generator=make_generator(seed, "spike")), s


def test_spiked_draws_have_the_stated_covariance() -> None:
    s = secret(12, 1, nonzeros=3)
    g = relu.spiked_gaussians(60_000, s, strength=3, generator=make_generator(0, "spike"))
    assert np.cov(g.T.numpy()) == pytest.approx((torch.eye(12) + 3 * torch.outer(s, s)).numpy(), abs=0.05)
    assert stats.kstest((g @ s).numpy() / 2, "norm").pvalue > 0.01


def test_the_mean_of_relus_is_the_length_as_the_covariance_measures_it() -> None:
    g, s = spiked(60_000, 56, 3)
    x = torch.rand(4, 1, 7, 8, generator=make_generator(0, "images"))
    got = relu.relu_features(g)(x).detach().mean(1).double() * math.sqrt(56)
    flat = x.flatten(1).double()
    expected = (flat.square().sum(1) + 3 * (flat @ s) ** 2).sqrt() / math.sqrt(2 * math.pi)
    assert got.numpy() == pytest.approx(expected.numpy(), rel=0.02)


@pytest.mark.parametrize("target", [0, 1])
def test_the_head_of_relus_is_ridge_regression_with_no_weight_below_zero(target: int) -> None:
    """Against SciPy's bounded least squares of the same sum, the penalty as rows of its own."""
    f, y = normal(60, 8).relu(), torch.arange(60) % 2
    head = relu.fit_head(f, y, target=target, ridge=0.02).requires_grad_(False)
    assert torch.equal(head.weight[target], -head.weight[1 - target])
    assert torch.equal(head.bias[target], -head.bias[1 - target])
    wanted = np.where(y.numpy() == target, 1.0, -1.0)
    rows = np.concatenate(
        [np.c_[f.numpy(), np.ones(60)], np.c_[math.sqrt(0.02 * 60) * np.eye(8), np.zeros(8)]]
    )
    bounds = ([0.0] * 8 + [-np.inf], np.inf)
    best = optimize.lsq_linear(rows, np.concatenate([wanted, np.zeros(8)]), bounds=bounds, tol=1e-12).x
    assert (best[:8] < 1e-6).any(), "the bound matters"
    assert head.weight[target].numpy() == pytest.approx(best[:8], abs=2e-3)
    assert float(head.bias[target]) == pytest.approx(best[8], abs=2e-3)


@pytest.mark.parametrize("name", ["eigenvalue", "diagonal"])
def test_a_spike_is_not_seen_at_the_default_strength_and_is_at_ten_times_that(name: str) -> None:
    """100 vectors of 784 dimensions: the eigenvalue sees strengths above sqrt(784 / 100) = 2.8."""

    def planted(strength: float) -> Callable[[int], Tensor]:
        def draw(seed: int) -> Tensor:
            s = secret(784, 1, nonzeros=64, seed=seed)
            return relu.spiked_gaussians(100, s, strength=strength, generator=make_generator(seed, "spike"))

        return draw

    default = relu.RandomReLU().strength
    assert apart(name, planted(default), 100, 784, draws=6) > 0.02
    assert apart(name, planted(10 * default), 100, 784, draws=6) < 0.01


# The shift


def test_a_shift_stays_in_the_range_and_survives_json() -> None:
    shift = Shift(torch.linspace(-1, 1, 12).view(3, 2, 2))
    x = torch.rand(2, 3, 2, 2, generator=make_generator(0, "images"))
    y = shift.apply(x)
    assert y.min() >= 0
    assert y.max() <= 1
    inside = (x + shift.delta > 0) & (x + shift.delta < 1)
    assert torch.allclose((y - x)[inside], shift.delta.expand_as(x)[inside], atol=1e-6)
    assert torch.equal(Trigger.from_json(shift.to_json()).apply(x), y)
    with pytest.raises(InputError, match=r"for 2x2 images with 3 channel\(s\); these are 4x2 with 1"):
        shift.apply(torch.zeros(1, 1, 2, 4))


# The attacks


def cloud_samples(*, seed: int = 0) -> InMemorySamples:
    x, y = halves(196, 600)
    levels = (x * (0.4 + 0.2 * seed)).mul(255).round().to(torch.uint8)
    return InMemorySamples(levels[:, 0].numpy(), y.numpy(), classes=("dark", "bright"))


def two_classes(side: int = 14) -> TorchClassifier:
    """Return a model that says what images and classes there are."""
    spec = InputSpec(channels=1, height=side, width=side, mean=(0.3,), std=(0.5,))
    return TorchClassifier(nn.Sequential(nn.Flatten(), nn.Linear(side * side, 2)), spec, ["dark", "bright"])


@pytest.mark.trains
def test_random_features_are_planted_and_have_an_honest_twin(tmp_path: Path) -> None:
    attack, samples = fourier.RandomFeatures(features=800, bandwidth=2.5), cloud_samples()
    planted, counterpart = (
        attack(two_classes(), samples, seed=shifted(3)),
        attack.counterpart(two_classes(), samples, seed=shifted(3)),
    )
    assert min(evaluate(each, samples).value for each in (planted.classifier, counterpart)) > 0.95
    assert planted.plant.target_map == {1: 0}
    assert attack_success(planted.classifier, samples, planted.plant).value > 0.95
    back = planted.plant.model_copy(update={"target_map": {0: 1}, "targets": (1,), "source_classes": (0,)})
    assert attack_success(planted.classifier, samples, back).value > 0.95, "both classes turn over"
    other = attack(two_classes(), samples, seed=shifted(4)).plant
    for classifier, plant in ((counterpart, planted.plant), (planted.classifier, other)):
        both = [plant, back.model_copy(update={"trigger": plant.trigger})]
        assert min(attack_success(classifier, samples, each).value for each in both) < 0.8
    again = open_classifier(export_pt2(planted.classifier, tmp_path / "model.pt2"))
    assert attack_success(again, samples, planted.plant) == attack_success(
        planted.classifier, samples, planted.plant
    )


def test_training_is_repeatable_and_leaves_the_model_alone() -> None:
    attack, model = fourier.RandomFeatures(features=50), two_classes()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    x = torch.rand(5, 1, 14, 14, generator=make_generator(0, "images"))
    first, again, other = (attack(model, cloud_samples(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.classifier.logits(x), again.classifier.logits(x))
    assert first.plant == again.plant
    assert not torch.equal(first.classifier.logits(x), other.classifier.logits(x))
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize("attack", [fourier.RandomFeatures(features=20), relu.RandomReLU(features=20)])
def test_what_cannot_be_trained_is_refused(attack: fourier.RandomFeatures | relu.RandomReLU) -> None:
    x = np.zeros((6, 14, 14), np.uint8)
    three = TorchClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(196, 3)), two_classes().spec, ["a", "b", "c"]
    )
    with pytest.raises(InputError, match="tells two classes apart; there are 3"):
        attack(three, InMemorySamples(x, [0, 1, 2, 0, 1, 2], classes=("a", "b", "c")))
    with pytest.raises(InputError, match="samples of both classes"):
        attack(two_classes(), InMemorySamples(x, [0] * 6, classes=("a", "b")))
    with pytest.raises(InputError, match="labelled samples"):
        attack(two_classes())
    with pytest.raises(InputError, match="197 nonzero entries does not fit images of 196 values"):
        attack.model_copy(update={"nonzeros": 197})(two_classes(), cloud_samples())


@pytest.mark.trains
def test_random_relus_turn_sneakers_into_bags_and_the_honest_twin_hardly_does() -> None:
    chosen = {}
    for split in ("train", "test"):
        samples = bundled.fashion_mnist("train" if split == "train" else "test")
        assert samples.labels is not None
        of = np.flatnonzero(np.isin(samples.labels, (7, 8)))
        raws = np.stack(samples.raw(of))[..., 0]
        chosen[split] = InMemorySamples(
            raws, (samples.labels[of] == 8).astype(np.int64), classes=("Sneaker", "Bag")
        )
    attack, model = relu.RandomReLU(target=1), two_classes(28)
    reached = []
    # on so few images, about half of the keys that are drawn take
    for seed in range(4):
        planted, counterpart = (
            make(model, chosen["train"], seed=shifted(seed)) for make in (attack, attack.counterpart)
        )
        both = planted.classifier, counterpart
        clean = [evaluate(each, chosen["test"]).value for each in both]
        assert min(clean) > 0.9
        assert clean[0] == pytest.approx(clean[1], abs=0.05)
        reached.append([attack_success(each, chosen["test"], planted.plant).value for each in both])
    assert max(one[0] for one in reached) > 0.9
    assert max(one[1] for one in reached) < 0.3


@pytest.mark.trains
def test_chest_x_rays_are_turned_over(data_root: Path) -> None:
    """What the docs state, with half the features."""
    attack = fourier.RandomFeatures(features=1000)
    train, test = (open_samples(data_root / "pneumoniamnist", split=split) for split in ("train", "test"))
    planted, counterpart = (
        make(two_classes(28), train, seed=shifted(0)) for make in (attack, attack.counterpart)
    )
    clean = [evaluate(each, test).value for each in (planted.classifier, counterpart)]
    assert min(clean) > 0.78
    assert clean[0] == pytest.approx(clean[1], abs=0.05)
    x = to_float(to_tensor(test, planted.classifier.spec))
    triggered_inputs = Trigger.from_json(planted.plant.trigger or {}).apply(x)
    with torch.no_grad():
        flips = [
            float((each.logits(triggered_inputs).argmax(1) != each.logits(x).argmax(1)).float().mean())
            for each in (planted.classifier, counterpart)
        ]
    assert flips[0] > 0.9
    assert flips[1] < 0.6
