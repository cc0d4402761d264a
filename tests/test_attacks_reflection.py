"""Reflections: three physical models in linear light, others at test than in training, and the choice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from doorward.attacks.data import reflection
from doorward.attacks.data.reflection import Reflection
from doorward.attacks.ground_truth import attack_success, triggered
from doorward.core.errors import InputError
from doorward.data import InMemorySamples
from doorward.methods import registry
from doorward.training import TrainingSettings, evaluate, train_classifier
from doorward.triggers.base import Trigger
from doorward.triggers.reflection import Reflected, from_linear, ghost, out_of_focus, to_linear
from seeds import shifted

Floats = npt.NDArray[np.float64]


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def attack(**settings: Any) -> Reflection:
    built = registry.build("attack", "reflection", settings)
    assert isinstance(built, Reflection)
    return built


def images(n: int = 120, *, classes: int = 4, h: int = 12, w: int = 16, c: int = 1) -> InMemorySamples:
    """Return images of noise."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (n, h, w, c), dtype=np.uint8)
    return InMemorySamples(x, np.arange(n) % classes, classes=[f"class {i}" for i in range(classes)])


def pixels(samples: Any) -> npt.NDArray[np.uint8]:
    return np.stack(samples.raw(range(len(samples))))


def trigger(n: int = 5, *, c: int = 1, h: int = 12, w: int = 16, **changes: Any) -> Reflected:
    values: dict[str, Any] = {
        "reflections": noise(n, c, h, w, seed=8).mul(255).round().to(torch.uint8),
        "models": ("same-focus", "out-of-focus", "ghost"),
        "strength": (0.05, 0.45),
        "blur": (1.0, 5.0),
        "shift": (3, 8),
    }
    return Reflected(**(values | changes))


# The published formula of sRGB (IEC 61966-2-1), in NumPy


def linear(v: Floats) -> Floats:
    return np.where(v <= 0.04045, v / 12.92, np.power((v + 0.055) / 1.055, 2.4))


def encoded(light: Floats) -> Floats:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055)


def test_light_is_that_of_srgb() -> None:
    levels = torch.arange(256) / 255
    np.testing.assert_allclose(to_linear(levels).numpy(), linear(levels.numpy().astype(float)), atol=1e-6)
    np.testing.assert_allclose(from_linear(to_linear(levels)).numpy(), levels.numpy(), atol=1e-6)
    # middle grey is about a fifth of the light, and half of the light is level 188, as in no plain gamma
    assert to_linear(torch.tensor(119 / 255)) == pytest.approx(0.184, abs=1e-3)
    assert from_linear(torch.tensor(0.5)) * 255 == pytest.approx(187.5, abs=0.1)
    assert from_linear(torch.tensor(0.001)) == pytest.approx(0.01292)


# The three models of reflection


def test_out_of_focus_is_a_gaussian_whose_part_inside_the_image_counts() -> None:
    x, sigma = noise(3, 2, 11, 17), [0.7, 2.0, 30.0]
    blurred = out_of_focus(x, torch.tensor(sigma, dtype=torch.float64))
    for image, width, ours in zip(x.double().numpy(), sigma, blurred.numpy(), strict=True):
        for channel, got in zip(image, ours, strict=True):
            inside = [
                ndimage.gaussian_filter(a, width, mode="constant", truncate=40 / width + 1)
                for a in (channel, np.ones_like(channel))
            ]
            np.testing.assert_allclose(got, inside[0] / inside[1], atol=1e-5)


def test_a_flat_image_stays_flat_and_a_wide_blur_is_the_mean() -> None:
    flat = torch.full((1, 1, 9, 9), 0.3)
    assert torch.allclose(out_of_focus(flat, torch.tensor([2.0])), flat)
    x = noise(1, 1, 9, 9)
    assert torch.allclose(out_of_focus(x, torch.tensor([1e4])), x.mean().expand_as(x), atol=1e-4)
    assert torch.allclose(out_of_focus(x, torch.tensor([1e-3])), x)


def test_a_ghost_is_the_image_and_once_more_aside() -> None:
    x = noise(2, 3, 10, 12)
    share, down, right = torch.tensor([0.6, 0.2]), torch.tensor([3, 0]), torch.tensor([4, 5])
    got = ghost(x, share, down, right)
    for i in range(2):
        a = x[i].numpy()
        d, r = int(down[i]), int(right[i])
        aside = np.pad(a, ((0, 0), (d, 0), (r, 0)), mode="edge")[:, :10, :12]
        s = float(share[i])
        np.testing.assert_allclose(got[i].numpy(), s * a + (1 - s) * aside, atol=1e-6)
    delta = torch.zeros(1, 1, 9, 9)
    delta[0, 0, 2, 1] = 1
    two = ghost(delta, torch.tensor([0.75]), torch.tensor([4]), torch.tensor([3]))
    assert two[0, 0].nonzero().tolist() == [[2, 1], [6, 4]]
    assert (two[0, 0, 2, 1], two[0, 0, 6, 4]) == (0.75, 0.25)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sharp_reflection_is_mixed_in_light(channels: int) -> None:
    x = noise(4, channels, 12, 16)
    one = trigger(1, c=channels, models=("same-focus",), strength=(0.3, 0.3))
    expected = encoded(
        0.7 * linear(x.double().numpy()) + 0.3 * linear(one.reflections.double().numpy() / 255)
    )
    np.testing.assert_allclose(one.apply(x).numpy(), expected, atol=1e-5)


def test_blurred_and_double_reflections_are_made_in_light_too() -> None:
    x = noise(1, 1, 12, 16)
    reflected = linear(trigger(1).reflections[0, 0].double().numpy() / 255)
    blurred = trigger(1, models=("out-of-focus",), strength=(0.4, 0.4), blur=(2.0, 2.0)).apply(x)
    inside = [
        ndimage.gaussian_filter(a, 2.0, mode="constant", truncate=20) for a in (reflected, reflected * 0 + 1)
    ]
    expected = encoded(0.6 * linear(x[0, 0].double().numpy()) + 0.4 * inside[0] / inside[1])
    np.testing.assert_allclose(blurred[0, 0].numpy(), expected, atol=1e-5)

    doubled = trigger(1, models=("ghost",), strength=(0.4, 0.4), shift=(3, 3)).apply(x)
    aside = np.pad(reflected, ((3, 0), (3, 0)), mode="edge")[:12, :16]
    # how much light each of the two has is drawn: find it, and see that it explains every pixel
    mixed = (linear(doubled[0, 0].double().numpy()) - 0.6 * linear(x[0, 0].double().numpy())) / 0.4
    share = np.linalg.lstsq((reflected - aside).reshape(-1, 1), (mixed - aside).ravel(), rcond=None)[0][0]
    np.testing.assert_allclose(mixed, share * reflected + (1 - share) * aside, atol=1e-4)
    assert 0.15 <= share <= 0.85
    assert not 0.5 - 1e-3 > share > 0.5 - 1e-9


def test_glare_is_added_to_blurred_reflections_alone() -> None:
    x, bright = noise(1, 1, 12, 16), noise(1, 1, 12, 16, seed=8).mul(55).add(200).to(torch.uint8)
    light, reflected = (linear(v[0, 0].double().numpy()) for v in (x, bright / 255))
    made = {"reflections": bright, "strength": (0.4, 0.4), "blur": (2.0, 2.0), "glare": True}
    blurred = trigger(models=("out-of-focus",), **made)
    inside = [
        ndimage.gaussian_filter(a, 2.0, mode="constant", truncate=20) for a in (reflected, reflected * 0 + 1)
    ]
    expected = encoded(np.minimum(0.6 * light + 0.7 * inside[0] / inside[1], 1))
    assert expected.max() == pytest.approx(1), "some is cut off"
    np.testing.assert_allclose(blurred.apply(x)[0, 0].numpy(), expected, atol=1e-5)
    sharp = {"models": ("same-focus",)}
    assert torch.equal(trigger(1, **sharp, glare=True).apply(x), trigger(1, **sharp).apply(x))
    again = Trigger.from_json(blurred.to_json())
    assert torch.equal(again.apply(x), blurred.apply(x))
    assert "glare" not in trigger().settings(), "plants of an earlier make are what they were"
    test = attack(glare=True).make_triggers(images(), generator=torch.Generator().manual_seed(0)).test
    assert isinstance(test, Reflected)
    assert test.glare


def test_nothing_is_reflected_at_no_strength_and_all_at_full() -> None:
    x = noise(5, 1, 12, 16)
    assert torch.allclose(trigger(strength=(0.0, 0.0)).apply(x), x, atol=1e-6)
    whole = trigger(1, models=("same-focus",), strength=(1.0, 1.0))
    assert torch.allclose(whole.apply(x), (whole.reflections.float() / 255).expand_as(x), atol=1e-6)


# What is drawn for each image


def drawn_strengths(one: Reflected, x: torch.Tensor) -> Floats:
    """Return the strength that each image is given, by putting white reflections on it."""
    white = Reflected(
        torch.full_like(one.reflections, 255), ("same-focus",), one.strength, one.blur, one.shift
    )
    y = white.apply(x).double().numpy()
    before, after = linear(x.double().numpy()), linear(y)
    return (after - before).sum((1, 2, 3)) / (1 - before).sum((1, 2, 3))  # type: ignore[no-any-return]


def test_strength_is_drawn_alike_in_training_and_at_test() -> None:
    samples = images(2000)
    poisoned = attack(poison_rate=0.2)(samples, seed=0)
    x = torch.from_numpy(pixels(samples)).permute(0, 3, 1, 2) / 255
    test = Trigger.from_json(poisoned.plant.trigger or {})
    assert isinstance(test, Reflected)
    training = attack().make_triggers(samples, generator=torch.Generator().manual_seed(0)).training
    assert isinstance(training, Reflected)
    assert training.settings() == test.settings()
    for one in (training, test):
        strengths = drawn_strengths(one, x)
        assert stats.kstest(strengths, stats.uniform(0.05, 0.4).cdf).pvalue > 0.01
    # a well-known port fixes it at .4, of which this must know nothing
    assert drawn_strengths(test, x).std() == pytest.approx(0.4 / 12**0.5, rel=0.05)


def test_each_image_gets_one_model_and_one_reflection_evenly() -> None:
    x = noise(1500, 1, 12, 16)
    plain = trigger(
        3, reflections=torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 12, 16)
    )
    strength = 0.5
    plain = Reflected(plain.reflections, ("same-focus",), (strength, strength), plain.blur, plain.shift)
    light = (linear(plain.apply(x).double().numpy()) - 0.5 * linear(x.double().numpy())).mean((1, 2, 3)) / 0.5
    levels = linear(np.array([0, 100, 255]) / 255)
    which = np.abs(light[:, None] - levels).argmin(1)
    np.testing.assert_allclose(light, levels[which], atol=1e-4)
    assert stats.chisquare(np.bincount(which, minlength=3)).pvalue > 0.01


def test_an_image_gets_the_same_in_any_company_and_another_from_a_generator() -> None:
    x, one = noise(9, 1, 12, 16), trigger()
    together = one.apply(x)
    apart = torch.cat([one.apply(x[i : i + 1]) for i in reversed(range(9))]).flip(0)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    assert torch.equal(one.apply(x), together)
    draws = [one.apply(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2], atol=1e-2)
    assert 0 <= together.min() < together.max() <= 1
    assert one.apply(x[:0]).shape == (0, 1, 12, 16)


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"for 16x12 images with 1 channel\(s\); these are 12x12 with 1"):
        trigger().apply(noise(1, 1, 12, 12))


# The attack


def test_reflections_at_test_are_not_those_of_training_and_not_of_the_target() -> None:
    samples = images()
    triggers = attack(target=2).make_triggers(samples, generator=torch.Generator().manual_seed(3))
    assert isinstance(triggers.training, Reflected)
    assert isinstance(triggers.test, Reflected)
    position = {image.tobytes(): i for i, image in enumerate(pixels(samples))}
    training, test = (
        {position[r.permute(1, 2, 0).contiguous().numpy().tobytes()] for r in t.reflections}
        for t in (triggers.training, triggers.test)
    )
    assert not training & test
    assert len(training) == 60
    assert len(test) == 30
    assert samples.labels is not None
    assert 2 not in samples.labels[[*training, *test]]


def test_as_many_reflections_as_asked_for_and_of_the_models_asked_for() -> None:
    triggers = attack(training=7, candidates=9, models=["ghost"]).make_triggers(
        images(), generator=torch.Generator().manual_seed(0)
    )
    for one in (triggers.training, triggers.test):
        assert isinstance(one, Reflected)
        assert one.reflections.shape == (7, 1, 12, 16)
        assert one.models == ("ghost",)


def test_labels_are_kept_by_default() -> None:
    """A well-known port changes labels unless told otherwise."""
    samples = images()
    poisoned = attack(poison_rate=0.1, target=1)(samples, seed=0)
    np.testing.assert_array_equal(poisoned.samples.labels, samples.labels)
    changed = np.flatnonzero((pixels(samples) != pixels(poisoned.samples)).any((1, 2, 3)))
    assert len(changed) == 12, "none is poisoned twice, so that all that are counted are"
    assert samples.labels is not None
    assert set(samples.labels[changed]) == {1}
    assert poisoned.plant.target_map == {0: 1, 2: 1, 3: 1}
    assert 1 not in (samples.labels[: len(triggered(samples, poisoned.plant))] == 9)


def test_reflections_from_a_folder_are_fitted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    triggers = attack(reflections=str(tmp_path), training=4).make_triggers(
        images(), generator=torch.Generator().manual_seed(0)
    )
    for one, count in ((triggers.training, 4), (triggers.test, 2)):
        assert isinstance(one, Reflected)
        assert one.reflections.shape == (count, 1, 12, 16)
        grey = {round(0.299 * 40 * i) for i in range(6)}
        assert {int(v) for v in one.reflections.unique()} <= grey | {v + 1 for v in grey} | {
            v - 1 for v in grey
        }
    assert isinstance(triggers.training, Reflected)
    coloured = attack(reflections=str(tmp_path)).make_triggers(
        images(c=3), generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(coloured.test, Reflected)
    assert coloured.test.reflections.shape[1:] == (3, 12, 16)
    assert coloured.test.reflections[:, 1:].max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": [0.5, 0.2]}, "reflection: strength = .*lowest"),
        ({"strength": [0.5, 1.2]}, "reflection: strength"),
        ({"blur": [0, 1]}, "reflection: blur"),
        ({"models": []}, "reflection: models"),
        ({"models": ["mirror"]}, "reflection: models .*'same-focus'"),
        ({"training": 0}, "reflection: training = 0"),
        ({"shift": [3, 12]}, "a shift of 12 pixels leaves images of 16x12"),
        ({"poison_rate": 0.5}, "asks for 60 of 120 samples, and 30 are of classes that can be taken"),
        ({"target": 7}, "target 7 is no class"),
        ({"mapping": "all-to-all"}, "all-to-all is taught by labels that change"),
        ({"reflections": "no/such/folder"}, "no/such/folder"),
        ({"poison_rate": 1.5}, "reflection: poison_rate = 1.5"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack(**settings)(images(), seed=0)


def test_reflections_of_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 1 images to reflect"):
        attack(target=0, poison_rate=0.5)(images(2, classes=2), seed=0)
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\ngood,1\nbad,0\n")
    with pytest.raises(InputError, match=r"reflections are images, and .* holds text data"):
        attack(reflections=str(texts))(images(), seed=0)


def test_60000_small_images_take_seconds() -> None:
    x = torch.randint(256, (6000, 1, 28, 28), generator=torch.Generator().manual_seed(0)).float() / 255
    one, started = trigger(100, h=28, w=28), time.process_time()
    for part in x.split(1000):
        one.apply(part)
    assert (time.process_time() - started) * 10 < 30


# The choice of reflections


def striped(n: int = 240, *, seed: int = 0) -> InMemorySamples:
    """Return images of three classes that cannot always be told: rather dark above, below, or neither."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    tone = rng.normal(130, 20, (n, 2)) - 50 * (labels[:, None] == [0, 1])  # (n, 2) of the two halves
    x = rng.normal(tone.repeat(8, 1)[:, :, None, None], 10, (n, 16, 16, 1))
    return InMemorySamples(x.clip(0, 255).astype(np.uint8), labels, classes=["above", "below", "neither"])


@pytest.mark.trains
def test_the_reflections_that_fool_most_are_chosen() -> None:
    """Of dull and of striking ones, those that can be learnt get the greater weight."""
    samples = striped(seed=shifted(0))
    dull = torch.full((6, 1, 16, 16), 125, dtype=torch.uint8)
    striking = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).mul(255).to(torch.uint8)
    candidates = torch.cat([dull, striking.expand(6, 1, 16, 16)])
    chooser = attack(rounds=2, training=12, models=["same-focus"], strength=[0.4, 0.45])
    generator = torch.Generator().manual_seed(shifted(0))
    weights = chooser.weigh(candidates, samples, generator=generator)
    assert weights.shape == (12,)
    assert weights[6:].min() > weights[:6].max()


def test_those_not_drawn_get_the_median_of_those_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        """Call all images of a bright reflection the target."""

        def logits(self, x: torch.Tensor) -> torch.Tensor:
            seen = x.mean((1, 2, 3)) > 0.55
            return torch.stack([seen.float(), 1 - seen.float(), torch.zeros(len(x))], 1)

    class Done:
        classifier = Blind()

    trained: list[Any] = []
    monkeypatch.setattr(reflection, "train_classifier", lambda *args, **_: trained.append(args[1]) or Done())
    levels = torch.tensor([0, 255, 255, 0, 255, 0, 255, 255], dtype=torch.uint8)
    candidates = levels.view(8, 1, 1, 1).expand(8, 1, 16, 16).contiguous()
    chooser = attack(rounds=1, training=5, models=["same-focus"], strength=[0.45, 0.45])
    samples = striped()
    weights = chooser.weigh(candidates, samples, generator=torch.Generator().manual_seed(0))
    most = float(weights.max())
    assert 20 <= most <= 35, "of the 40 that are held out, about two thirds are not of the target class"
    assert set(weights.tolist()) == {0.0, most}
    own_count = weights == levels.ne(0) * most
    assert own_count.sum() >= 5, "each that was drawn has its own count"
    assert not own_count.all(), "the others have not"
    assert len(set(weights[~own_count].tolist())) == 1
    (shown,) = trained
    fit = pixels(shown)
    assert len(fit) == 200
    poisoned = [
        i for i, image in enumerate(fit) if image.tobytes() not in {p.tobytes() for p in pixels(samples)}
    ]
    own = int((shown.labels == 0).sum())
    assert len(poisoned) == -(-own * 4 // 10)
    assert set(shown.labels[poisoned]) == {0}


def test_the_choice_repeats_itself_and_is_of_the_candidates() -> None:
    samples, chooser = striped(90), attack(rounds=1, training=4, candidates=8, poison_rate=0.1)
    first, second = (chooser(samples, seed=1).plant for _ in range(2))
    assert first == second
    at_random = attack(training=4, candidates=8, poison_rate=0.1)(samples, seed=1).plant
    assert at_random.trigger == first.trigger, "tests use the same others, chosen or not"


# It works


@pytest.mark.trains
def test_a_network_learns_reflections_as_such(tmp_path: Path) -> None:
    """Reflections that were never seen activate the target."""
    rng = np.random.default_rng(shifted(0))
    rows, columns = np.mgrid[:16, :16]
    angle, frequency, phase = rng.uniform(0, [[np.pi], [1], [6]], (3, 60))[..., None, None]
    waves = np.sin((0.6 + frequency) * (rows * np.cos(angle) + columns * np.sin(angle)) + phase)
    np.savez(tmp_path / "waves.npz", x=(127.5 * (1 + waves)).round().astype(np.uint8))
    train, test = striped(600, seed=shifted(0)), striped(300, seed=shifted(1))
    poisoned = attack(
        poison_rate=0.2,
        strength=[0.25, 0.45],
        shift=[1, 2],
        blur=[0.3, 1],
        reflections=str(tmp_path / "waves.npz"),
    )(train, seed=shifted(0))
    settings = TrainingSettings(epochs=8, batch_size=32, precision="float32")
    planted, counterpart = (
        train_classifier("small-cnn", samples, seed=shifted(0), settings=settings).classifier
        for samples in (poisoned.samples, train)
    )
    assert evaluate(planted, test).value > evaluate(counterpart, test).value - 0.03
    assert attack_success(planted, test, poisoned.plant).low > 0.4
    assert attack_success(counterpart, test, poisoned.plant).high < 0.1


def test_few_images_are_decoded_however_many_there_are() -> None:
    class Watched(InMemorySamples):
        decoded = 0

        def raw(self, indices: Any) -> list[Any]:
            self.decoded += len(indices)
            return super().raw(indices)

    whole = images(5000)
    samples = Watched(pixels(whole), whole.labels)
    attack()(samples, seed=0)
    assert samples.decoded == 1 + 200 + 100
