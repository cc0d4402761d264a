"""The training loop: what it computes by hand, what it draws, what it leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from doorward import bundled
from doorward.core.errors import InputError, TrainingDiverged
from doorward.data import InMemorySamples
from doorward.models import InputSpec, TorchClassifier
from doorward.stats.metrics import rate
from doorward.training import (
    AUGMENTATIONS,
    TrainingProgress,
    TrainingRecord,
    TrainingSettings,
    default_settings,
    evaluate,
    measure_spec,
    predict,
    train,
    train_classifier,
)
from doorward.training.loop import LogitsOf
from seeds import shifted

SPEC = InputSpec(channels=1, height=16, width=16)
PLAIN = TrainingSettings(epochs=1, precision="float32", schedule="constant", weight_decay=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def halves(n: int = 200, seed: int = 0) -> InMemorySamples:
    """Return noise that is brighter on the left (class 0) or on the right (class 1)."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 100, (n, 16, 16), dtype=np.uint8)
    y = np.arange(n) % 2
    for image, label in zip(x, y, strict=True):
        image[:, 8 * label : 8 * label + 8] += 60
    return InMemorySamples(x, y)


def linear(seed: int = 0, classes: int = 2) -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, classes))
    nn.init.normal_(module[1].weight, std=0.01, generator=seeded(seed))  # type: ignore[arg-type]
    nn.init.zeros_(module[1].bias)  # type: ignore[arg-type]
    return module


def numbered(n: int, *, labels: npt.NDArray[np.int64] | None = None) -> InMemorySamples:
    """Return images whose first two pixels tell their position."""
    x = np.zeros((n, 16, 16), dtype=np.uint8)
    x[:, 0, 0], x[:, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    return InMemorySamples(x, np.arange(n) % 2 if labels is None else labels)


# What a step computes


def batch_gradient(samples: InMemorySamples, module: nn.Module) -> npt.NDArray[np.float64]:
    """Return the gradient (2, 256) of the mean cross-entropy by the textbook's formula, in numpy."""
    x = np.stack(samples.raw(range(len(samples)))).reshape(len(samples), -1) / 255.0  # (n, 256)
    weight = module[1].weight.detach().double().numpy()  # type: ignore[index]
    z = x @ weight.T
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert samples.labels is not None
    gradient = (p - np.eye(2)[samples.labels]).T @ x / len(x)
    assert isinstance(gradient, np.ndarray)
    return gradient


def one_step(settings: TrainingSettings) -> tuple[npt.NDArray[np.float64], ...]:
    """Return weights before and after one step on all samples, and the gradient that numpy finds."""
    samples, module = halves(50), linear()
    before = module[1].weight.detach().double().numpy().copy()  # type: ignore[index]
    gradient = batch_gradient(samples, module)
    record = train(module, samples, spec=SPEC, settings=settings, generator=seeded())
    assert record.steps == 1
    return before, module[1].weight.detach().double().numpy(), gradient  # type: ignore[index]


def test_a_step_of_sgd_is_the_gradient_by_hand() -> None:
    settings = PLAIN.model_copy(
        update={"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.1, "batch_size": 50}
    )
    before, after, gradient = one_step(settings.model_copy(update={"momentum": 0.0}))
    np.testing.assert_allclose(after, before - 0.5 * (gradient + 0.1 * before), atol=1e-6)
    before, after, gradient = one_step(settings)  # Nesterov's first step: 1 + momentum times the gradient
    np.testing.assert_allclose(after, before - 0.5 * 1.9 * (gradient + 0.1 * before), atol=1e-6)


def test_a_first_step_of_adamw_is_the_sign_of_the_gradient() -> None:
    settings = PLAIN.model_copy(update={"learning_rate": 0.01, "weight_decay": 0.5, "batch_size": 50})
    before, after, gradient = one_step(settings)
    clear = np.abs(gradient) > 1e-5
    assert clear.mean() > 0.9
    expected = before * (1 - 0.01 * 0.5) - 0.01 * np.sign(gradient)
    np.testing.assert_allclose(after[clear], expected[clear], atol=1e-4)


def test_each_step_has_the_rate_of_its_place_in_the_schedule() -> None:
    def trained(epochs: int) -> Tensor:
        settings = PLAIN.model_copy(update={"schedule": "cosine", "epochs": epochs, "batch_size": 200})
        train(module := linear(), halves(200), spec=SPEC, settings=settings, generator=seeded())
        weight = module[1].weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    # the first of one and of two steps has the full rate, the last of two none at all
    assert torch.allclose(trained(1), trained(2), atol=1e-6)
    assert not torch.allclose(trained(2), trained(3), atol=1e-4)


def test_schedules_are_those_of_torch() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    settings = TrainingSettings(learning_rate=2.0, schedule="cosine")
    for step in range(11):
        assert settings.rate_at(step / 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    one_cycle = TrainingSettings(learning_rate=2.0)
    rates = [one_cycle.rate_at(t / 100) for t in range(101)]
    assert rates[0] == pytest.approx(0.08)
    assert np.argmax(rates) == 25
    assert rates[25] == 2.0
    assert rates[100] == pytest.approx(0)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert TrainingSettings(learning_rate=2.0, schedule="constant").rate_at(0.7) == 2.0


def test_label_smoothing_lowers_confidence() -> None:
    def confidence(smoothing: float) -> float:
        module, samples = linear(), halves()
        settings = PLAIN.model_copy(
            update={"epochs": 20, "learning_rate": 0.05, "label_smoothing": smoothing}
        )
        train(module, samples, spec=SPEC, settings=settings, generator=seeded())
        x = torch.from_numpy(np.stack(samples.raw(range(200)))).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            return module(x).softmax(1).max(1).values.mean().item()

    assert confidence(0.0) > 0.99
    assert confidence(0.4) < 0.9  # the optimum is 0.8


# What goes through


def test_it_learns_and_reports_what_it_did() -> None:
    seen: list[TrainingProgress] = []
    record = train(
        module := linear(),
        halves(200),
        spec=measure_spec(halves(200)),
        settings=TrainingSettings(epochs=3, batch_size=25, learning_rate=0.02),
        generator=seeded(),
        test=halves(101, seed=1),
        progress=seen.append,
    )
    assert record.test_accuracy == rate(101, 101)
    assert record.steps == 24
    assert record.images == 200
    assert [one.step for one in seen] == list(range(1, 25))
    assert {one.steps for one in seen} == {24}
    assert seen[0].loss is None
    assert seen[-1].loss == record.epochs[1].loss
    assert record.epochs[0].loss > record.epochs[2].loss
    assert record.epochs[2].accuracy == 1
    assert TrainingRecord.model_validate_json(record.model_dump_json()) == record
    assert not module.training


def passes(samples: InMemorySamples, *, limit: int, batch_size: int = 32) -> list[list[tuple[int, int]]]:
    """Return (position, label) of each batch as it went through, over two epochs."""
    batches: list[list[tuple[int, int]]] = []

    def note(_: LogitsOf, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        pixels = x[:, 0, 0, :2].mul(255).round().long()
        batches.append(list(zip((pixels[:, 0] + 256 * pixels[:, 1]).tolist(), y.tolist(), strict=True)))
        return x

    settings = PLAIN.model_copy(update={"epochs": 2, "batch_size": batch_size})
    train(
        linear(classes=len(samples.classes)),
        samples,
        spec=SPEC,
        settings=settings,
        generator=seeded(),
        on_batch=note,
        memory_limit=limit,
    )
    return batches


@pytest.mark.parametrize("limit", [2**30, 100 * 256, 1], ids=["in memory", "streamed", "one at a time"])
def test_each_epoch_sees_each_image_once_with_its_label_in_a_new_order(limit: int) -> None:
    samples = numbered(333)
    batches = passes(samples, limit=limit)
    half = len(batches) // 2
    epochs = [[pair for batch in part for pair in batch] for part in (batches[:half], batches[half:])]
    assert samples.labels is not None
    for epoch in epochs:
        assert Counter(epoch) == Counter(enumerate(samples.labels.tolist()))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_images_are_augmented_anew_each_time() -> None:
    caught: list[Tensor] = []

    def note(_: LogitsOf, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        caught.append(x[:, 0].argmax(2)[:, 0])  # the bright column of each image
        return x

    x = np.zeros((64, 16, 16), dtype=np.uint8)
    x[:, :, 8] = 255
    settings = PLAIN.model_copy(update={"augment": "shift", "epochs": 2, "batch_size": 64})
    samples = InMemorySamples(x, np.arange(64) % 2)
    train(linear(), samples, spec=SPEC, settings=settings, generator=seeded(), on_batch=note)
    assert set(caught[0].tolist()) == {7, 8, 9}
    assert not torch.equal(caught[0], caught[1])


def test_streamed_batches_mix_what_lies_far_apart() -> None:
    labels = np.repeat(np.arange(4), 500)  # sorted by class, as several sources are
    batches = passes(numbered(2000, labels=labels), limit=500 * 256, batch_size=50)
    assert all(len({label for _, label in batch}) >= 3 for batch in batches)


@pytest.mark.parametrize("n", [1, 31, 33, 47, 49, 333])
def test_no_batch_is_tiny(n: int) -> None:
    sizes = [len(batch) for batch in passes(numbered(n, labels=np.zeros(n, dtype=np.int64)), limit=2**30)]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 48


def test_the_batch_hook_changes_what_is_trained_on() -> None:
    record = train(
        linear(),
        halves(200),
        spec=SPEC,
        settings=PLAIN.model_copy(update={"epochs": 3}),
        generator=seeded(),
        on_batch=lambda logits_of, x, y, *, generator: torch.zeros_like(x),
        test=halves(100, seed=1),
    )
    assert record.test_accuracy is not None
    assert record.epochs[-1].loss > 0.6  # nothing to learn from: about log 2


def test_images_reach_the_module_normalised_as_the_spec_says() -> None:
    spec = SPEC.model_copy(update={"mean": (0.25,), "std": (0.5,)})
    caught: list[Tensor] = []
    module = linear()
    module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    samples = InMemorySamples(np.full((4, 16, 16), 51, dtype=np.uint8), [0, 1, 0, 1])
    train(module, samples, spec=spec, settings=PLAIN, generator=seeded())
    assert torch.allclose(caught[0], torch.full((4, 1, 16, 16), (0.2 - 0.25) / 0.5))


# What it draws and what it leaves alone


def convolutional(dropout: float = 0.0) -> nn.Module:
    from doorward.models.architectures import build

    return nn.Sequential(
        build("resnet-8", channels=1, height=16, width=16, classes=2), nn.Dropout(dropout), nn.Linear(2, 2)
    )


@pytest.mark.parametrize("augment", ["none", "shift-flip"])
def test_one_generator_state_gives_one_model(
    augment: str, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    start = convolutional(0.3)

    def weights(seed: int, dropout: float = 0.3) -> dict[str, Tensor]:
        module = deepcopy(start)
        module[1].p = dropout  # type: ignore[index]
        settings = TrainingSettings(epochs=1, batch_size=20, augment=augment)  # type: ignore[arg-type]
        train(module, halves(60), spec=SPEC, settings=settings, generator=seeded(seed))
        assert not any(part.training for part in module.modules())
        assert all(p.is_contiguous() and p.dtype == torch.float32 for p in module.parameters())
        return module.state_dict()

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    with untouched():
        first = weights(0)
    torch.rand(7)  # what the host draws does not matter
    assert same(first, weights(0))
    assert not same(first, weights(1))
    assert not same(first, weights(0, dropout=0.0)), "dropout drops nothing"


def test_bfloat16_is_used_when_asked_for_and_weights_stay_float32() -> None:
    record = train(
        module := convolutional(),
        halves(60),
        spec=SPEC,
        settings=TrainingSettings(epochs=1, precision="bfloat16"),
        generator=seeded(),
    )
    assert record.precision == "bfloat16"
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    caught: list[torch.dtype] = []
    handle = module[0].conv.register_forward_hook(lambda *a: caught.append(a[2].dtype))  # type: ignore
    for precision in ("bfloat16", "float32"):
        settings = TrainingSettings(epochs=1, precision=precision)  # type: ignore[arg-type]
        train(module, halves(20), spec=SPEC, settings=settings, generator=seeded())
    handle.remove()
    assert caught == [torch.bfloat16, torch.float32]


# Augmentation


def test_shift_moves_within_a_sixteenth_and_repeats_the_edges() -> None:
    x = torch.randint(256, (400, 3, 32, 16), generator=seeded(), dtype=torch.uint8)
    moved = AUGMENTATIONS["shift"](x, generator=seeded(1))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (1, 1)), mode="edge")
    found = Counter()
    for before, after in zip(padded, moved.numpy(), strict=True):
        fits = [
            (dy, dx)
            for dy in range(5)
            for dx in range(3)
            if np.array_equal(before[:, dy : dy + 32, dx : dx + 16], after)
        ]
        assert len(fits) == 1
        found.update(fits)
    assert len(found) == 15, "every offset occurs"


def test_flip_mirrors_about_half() -> None:
    x = torch.randint(256, (400, 1, 32, 32), generator=seeded(), dtype=torch.uint8)
    shifted = AUGMENTATIONS["shift"](x, generator=seeded(1))
    both = AUGMENTATIONS["shift-flip"](x, generator=seeded(1))
    same = (both == shifted).flatten(1).all(1)
    mirrored = (both == shifted.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250
    assert torch.equal(AUGMENTATIONS["none"](x, generator=seeded()), x)


# Prediction


class ByBrightness(nn.Module):
    """Dark (0) from bright (1)."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3))
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)


def test_predictions_come_in_order_whatever_the_batch() -> None:
    levels = np.random.default_rng(0).integers(0, 256, 53)
    x = np.broadcast_to(levels[:, None, None], (53, 16, 16)).astype(np.uint8)
    classifier = TorchClassifier(ByBrightness(), SPEC, ["dark", "bright"])
    samples = InMemorySamples(x, np.ones(53), classes=["dark", "bright"])
    for batch_size in (1, 10, 53, 100):
        np.testing.assert_array_equal(predict(classifier, samples, batch_size=batch_size), levels > 127)
    assert evaluate(classifier, samples) == rate(int((levels > 127).sum()), 53)
    assert evaluate(classifier, samples.select([])) == rate(0, 0)
    with pytest.raises(InputError, match="labels are needed"):
        evaluate(classifier, InMemorySamples(x))


# What it refuses


def test_missing_labels_are_said() -> None:
    with pytest.raises(InputError, match="labels are needed"):
        train(
            linear(),
            InMemorySamples(np.zeros((3, 16, 16), dtype=np.uint8)),
            spec=SPEC,
            settings=PLAIN,
            generator=seeded(),
        )


def test_more_classes_than_outputs_are_said() -> None:
    with pytest.raises(InputError, match="2 outputs for 5 classes"):
        train(
            linear(),
            numbered(5, labels=np.arange(5)),
            spec=SPEC,
            settings=PLAIN,
            generator=seeded(),
        )


def test_divergence_is_said() -> None:
    settings = PLAIN.model_copy(update={"optimizer": "sgd", "learning_rate": 3e38, "epochs": 3})
    with pytest.raises(TrainingDiverged, match="learning rate below"):
        train(linear(), halves(), spec=SPEC, settings=settings, generator=seeded())


# Spec and defaults


def test_the_spec_is_measured_per_channel() -> None:
    x = np.random.default_rng(0).integers(0, 200, (300, 20, 17, 3), dtype=np.uint8)
    x[..., 1] //= 2
    spec = measure_spec(InMemorySamples(x))
    assert (spec.channels, spec.height, spec.width) == (3, 20, 17)
    np.testing.assert_allclose(spec.mean, (x / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(spec.std, (x / 255).std((0, 1, 2)), atol=1e-4)
    part = measure_spec(InMemorySamples(x), limit=10)
    assert part.mean != spec.mean
    np.testing.assert_allclose(part.mean, spec.mean, atol=0.02)


def test_equal_pixels_do_not_divide_by_zero() -> None:
    spec = measure_spec(InMemorySamples(np.zeros((3, 16, 16), dtype=np.uint8)))
    assert spec.std[0] > 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (InMemorySamples(np.zeros((0, 16, 16), dtype=np.uint8)), "training needs samples; .* holds none"),
        (InMemorySamples([], [], modality="text"), "training needs samples; .* holds none"),
        (InMemorySamples([np.zeros((h, 16, 1), dtype=np.uint8) for h in (16, 20)]), "16x20"),
    ],
    ids=["none", "text", "sizes"],
)
def test_what_cannot_be_trained_on_is_said(samples: InMemorySamples, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_spec(samples)


def test_defaults_follow_the_data() -> None:
    many = default_settings("small-cnn", images=60_000, side=28)
    few = default_settings("resnet-8", images=300, side=100)
    assert (many.epochs, many.batch_size, many.augment) == (3, 128, "none")
    assert (few.epochs, few.batch_size, few.augment) == (40, 16, "shift")
    assert few.learning_rate > many.learning_rate


@pytest.mark.trains
def test_a_classifier_of_clothes_is_trained_in_seconds() -> None:
    train_set, test_set = bundled.fashion_mnist("train"), bundled.fashion_mnist("test")
    settings = default_settings("small-cnn", images=6000, side=28).model_copy(update={"epochs": 3})
    trained = train_classifier(
        "small-cnn", train_set.select(range(3000)), seed=shifted(0), settings=settings, test=test_set
    )
    accuracy = evaluate(trained.classifier, test_set)
    assert accuracy == trained.record.test_accuracy
    assert accuracy.low > 0.75
    assert trained.classifier.classes == train_set.classes
    assert "features" in trained.classifier.capabilities
