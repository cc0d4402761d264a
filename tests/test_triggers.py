from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from doorward.core.errors import InputError
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from doorward.triggers.warp import Warp


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def warp(strength: float = 2.0, size: int = 4) -> Warp:
    return Warp.draw(size, strength, generator=torch.Generator().manual_seed(1))


def test_a_blend_is_a_pattern_with_the_same_mask_everywhere() -> None:
    x, pattern = noise(2, 3, 4, 5), 1 - noise(3, 4, 5)
    blended = MaskedPattern(torch.full((1, 4, 5), 0.2), pattern).apply(x)
    np.testing.assert_allclose(blended.numpy(), 0.8 * x.numpy() + 0.2 * pattern.numpy(), atol=1e-6)


def test_a_grid_is_scaled_to_a_mean_shift_of_one() -> None:
    grid = warp(size=5).grid
    assert grid.shape == (2, 5, 5)
    assert grid.abs().mean() == pytest.approx(1)
    assert grid.min() < 0 < grid.max()
    assert torch.equal(warp().grid, warp().grid)


def test_a_uniform_shift_of_one_pixel_moves_the_image_by_one_pixel() -> None:
    x = noise(3, 2, 6, 9)
    grid = torch.zeros(2, 4, 4)
    grid[0] = 1  # to the right: a pixel shows its right neighbour
    moved = Warp(grid, strength=2 * 9 / 8).apply(x)  # 8 steps of one pixel over a width of 2
    assert torch.allclose(moved[..., :-1], x[..., 1:], atol=1e-5)
    assert torch.allclose(moved[..., -1], x[..., -1], atol=1e-5)  # nothing lies beyond the edge


def test_a_warp_agrees_with_scipy() -> None:
    h, w, trigger = 11, 8, warp(strength=1.5, size=2)
    x = noise(1, 1, h, w)
    # between two points, a bicubic curve with repeated ends (Keys, a = -.75) has these four weights
    shift = np.zeros((2, h, w))
    for axis in (0, 1):
        corners = np.pad(trigger.grid[axis].numpy().astype(float), 1, mode="edge")  # (4, 4)
        for i in range(h):
            for j in range(w):
                shift[axis, i, j] = keys(i / (h - 1)) @ corners @ keys(j / (w - 1))
    rows, columns = np.mgrid[:h, :w].astype(float)
    rows = np.clip(rows + 1.5 * shift[1] / h * (h - 1) / 2, 0, h - 1)
    columns = np.clip(columns + 1.5 * shift[0] / w * (w - 1) / 2, 0, w - 1)
    expected = ndimage.map_coordinates(
        x[0, 0].numpy().astype(float), [rows, columns], order=1, mode="nearest"
    )
    np.testing.assert_allclose(trigger.apply(x)[0, 0].numpy(), expected, atol=1e-5)


def keys(t: float) -> np.ndarray:
    """Return the weights of the four points around a place t in [0, 1] between the middle two."""
    a = -0.75

    def near(d: float) -> float:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1

    def far(d: float) -> float:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    return np.array([far(1 + t), near(t), near(1 - t), far(2 - t)])


def test_a_warp_stays_in_range_keeps_its_input_and_treats_each_image_alike() -> None:
    x = noise(4, 3, 20, 20).round()
    before = x.clone()
    y = warp(8.0).apply(x)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert 0 <= y.min() < y.max() <= 1
    assert not torch.allclose(y, x, atol=0.1)
    assert torch.allclose(y[2:3], warp(8.0).apply(x[2:3]), atol=1e-6)
    assert torch.allclose(warp(0.0).apply(x), x, atol=1e-5)


@pytest.mark.parametrize(
    "trigger", [MaskedPattern(noise(1, 8, 8), noise(3, 8, 8)), warp(0.5)], ids=lambda one: one.kind
)
def test_triggers_come_back_from_json(trigger: Trigger) -> None:
    x = noise(2, 3, 8, 8)
    again = Trigger.from_json(json.loads(json.dumps(trigger.to_json())))
    assert type(again) is type(trigger)
    assert torch.equal(again.apply(x), trigger.apply(x))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown trigger kind 'x'; known: .*masked-pattern.*warp"):
        Trigger.from_json({"kind": "x"})
