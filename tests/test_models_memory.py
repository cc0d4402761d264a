from __future__ import annotations

import pytest
import torch
from torch import nn

from doorward.core.seeds import make_generator
from doorward.models import InputSpec, TorchClassifier
from doorward.models.batching import CHUNK_ELEMENTS, chunk_images
from doorward.models.formats.wrapping import FunctionClassifier
from doorward.models.memory import PeakMeter, measure_peak

SIDE = 16


def classifier(seed: int = 0) -> TorchClassifier:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)
    )
    return TorchClassifier(module, InputSpec(channels=3, height=SIDE, width=SIDE), "abcd")


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=make_generator(0, "images"))


def test_the_meter_counts_what_lives_at_once() -> None:
    with PeakMeter() as meter:
        a = torch.ones(1000)
        b = a + 1
        c = b.view(10, 100)  # the same memory
        del a
        d = c * 2
    assert meter.peak == 2 * 4000, "two of the three tensors live at a time"
    assert float(d.sum()) == 4000


def test_memory_grows_with_images_and_gradients() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return ((x * 2).exp() * 3).exp().flatten(1)

    size = 4 * 3 * SIDE * SIDE
    one, two = (measure_peak(run, images(n), gradients=False) for n in (1, 2))
    assert (one, two) == (3 * size, 6 * size), "a copy of the input, a value and the next"
    kept = measure_peak(run, images(1), gradients=True)
    assert kept is not None
    assert kept > one, "what the way back needs stays"


def test_code_that_fails_is_not_measured() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        raise SystemExit

    assert measure_peak(run, images(1), gradients=False) is None


def test_an_image_is_as_large_as_what_the_model_makes_of_it() -> None:
    own = classifier()
    own.memory = 1 << 30
    assert own.most_at_once is not None
    # 32 channels before and after the rectifier, and their gradients by turns
    least = 2 * 4 * 32 * SIDE * SIDE
    assert least <= own._bytes_per_image <= 4 * least


@pytest.mark.parametrize("most", [1, 3, 5])
def test_logits_and_gradients_in_parts_are_those_of_the_whole(most: int) -> None:
    own, x = classifier(), images(8)
    weights = torch.rand(8, 4, generator=make_generator(0, "weights"))

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        at = x.clone().requires_grad_()
        y = own.logits(at)
        return y.detach(), torch.autograd.grad((y * weights).sum(), at)[0]

    logits, gradient = outcome()
    seen: list[int] = []
    own.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    own.memory = 1 << 30
    assert own.most_at_once is not None
    own.memory = int(2.001 * most * own._bytes_per_image)
    assert own.most_at_once == most
    seen.clear()
    parts = outcome()
    assert max(seen) == most, "no part is larger than what fits"
    torch.testing.assert_close(parts[0], logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[1], gradient, rtol=1e-4, atol=1e-6)
    before = own.cost
    own.logits(x)
    assert own.cost.forwards == before.forwards + 8, "an image counts once"


def test_parts_leave_the_fast_path_as_it_is() -> None:
    own, x = classifier(), images(8)
    own.memory = 1 << 30
    assert own.most_at_once is not None
    own.memory = int(2.001 * 3 * own._bytes_per_image)
    with own.fast_inference(x):
        before = (list(own._slow_down), own._layout, own._without_autocast)
        assert own._layout == torch.channels_last
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(own.logits(at).sum(), at)
        assert (own._slow_down, own._layout, own._without_autocast) == before
    assert bool(gradient.abs().sum() > 0)


def test_the_usual_chunk_stays_where_it_fits() -> None:
    own, usual = classifier(), CHUNK_ELEMENTS // (3 * SIDE * SIDE)
    assert chunk_images(own) == usual
    own.memory = 4 << 30
    assert chunk_images(own) == usual
    own.memory = 20 * own._bytes_per_image
    assert chunk_images(own) == 10


def test_what_no_torch_runs_is_taken_for_large() -> None:
    own = FunctionClassifier(
        lambda x: x.mean((2, 3)), InputSpec(channels=3, height=SIDE, width=SIDE), ["a", "b", "c"]
    )
    own.memory = 1 << 30
    assert own.most_at_once is not None
    assert own._bytes_per_image > 100 * 4 * 3 * SIDE * SIDE
