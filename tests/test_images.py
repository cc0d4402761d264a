from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from doorward.core.errors import InputError
from doorward.data import InMemorySamples
from doorward.models.encode.image import from_raw, side_by_side, to_float, to_tensor, to_uint8
from doorward.models.spec import InputSpec, Resize

GREY_RESIZED = """
import warnings
warnings.simplefilter("error")
import numpy as np
from doorward.data import InMemorySamples
from doorward.models.encode.image import to_tensor
from doorward.models.spec import InputSpec, Resize
spec = InputSpec(channels=1, height=28, width=28, resize=Resize(height=28, width=28))
to_tensor(InMemorySamples(np.zeros((2, 28, 28), np.uint8)), spec)
"""


def test_grey_images_through_a_processor_warn_of_nothing() -> None:
    """Torch warns once in a process, so this needs one of its own."""
    done = subprocess.run([sys.executable, "-c", GREY_RESIZED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_processor_may_turn_grey_into_colour() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(1, 6, 8)
    spec = InputSpec(channels=3, height=6, width=8, resize=Resize(height=6, width=8))
    x = to_tensor(InMemorySamples(image), spec)
    assert torch.equal(x, torch.from_numpy(image)[:, None].expand(1, 3, 6, 8))


def test_nothing_is_turned_into_anything_unless_it_is_declared() -> None:
    image = np.zeros((1, 6, 8), dtype=np.uint8)
    with pytest.raises(InputError, match=r"takes 8x6 images with 3 channel.*8x6 with 1"):
        to_tensor(InMemorySamples(image), InputSpec(channels=3, height=6, width=8))


def test_levels_come_back_as_they_were() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    back = to_uint8(to_float(levels))  # (n, h, w, c)
    assert np.array_equal(back, levels.permute(0, 2, 3, 1).numpy())
    assert to_uint8(torch.tensor([[[[-0.5, 1.5]]]])).ravel().tolist() == [0, 255]


def test_raw_images_of_two_sizes_do_not_stack() -> None:
    small, large = np.zeros((2, 3, 1), np.uint8), np.zeros((4, 3, 1), np.uint8)
    assert from_raw([small, small]).shape == (2, 1, 2, 3)
    with pytest.raises(InputError, match=r"3x2 with 1 channel.*3x4 with 1"):
        from_raw([small, large])


def test_side_by_side_by_hand() -> None:
    a, b = torch.zeros(1, 2, 1), torch.full((1, 2, 1), 0.5)
    assert side_by_side([a, b]).tolist() == [[[0.0, 1.0, 0.5], [0.0, 1.0, 0.5]]]
