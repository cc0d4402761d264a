"""Models that went wrong for users, as far as opening them goes; the folder is named by DOORWARD_CASES."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from doorward.core.seeds import make_generator
from doorward.data import open_samples
from doorward.models import Classifier, LoadOptions, open_classifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.output_check import check_outputs
from doorward.models.preparation import prepared

CASES = Path(os.environ.get("DOORWARD_CASES", "/nonexistent"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="DOORWARD_CASES names no folder of cases")


def images(classifier: Classifier) -> Tensor:
    name = "grey200.npz" if classifier.spec.channels == 1 else "rgb100.npz"
    return to_float(to_tensor(open_samples(CASES / name), classifier.spec))


def margins(classifier: Classifier) -> Tensor:
    y = classifier.logits(images(classifier)).detach()
    return y - y.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("clipped-logits/clip8.onnx", "clipped-logits/plain.onnx", 1e-4),
        ("clipped-logits/rgb_clip8.onnx", "clipped-logits/rgb.onnx", 1e-4),
        ("softmax-in-8-bits/float_bad.onnx", "clipped-logits/plain.onnx", 1e-4),
        ("softmax-in-8-bits/int8_bad.onnx", "softmax-in-8-bits/float_bad.onnx", 0.1),
        ("softmax-in-8-bits/int8_logits_bad.onnx", "softmax-in-8-bits/float_bad.onnx", 0.1),
    ],
)
def test_twins_have_the_same_margins(one: str, other: str, apart: float) -> None:
    """With a clip, a softmax or 8 bits at the end, and without."""
    first, second = (open_classifier(CASES / name) for name in (one, other))
    a, b = margins(first), margins(second)
    assert float((a - b).abs().max() / b.abs().max()) < apart
    assert check_outputs(first, images(first)).reason is None
    with prepared(first, images(first)) as preparation:
        assert preparation.reason is None


@pytest.mark.parametrize(
    ("weights", "factory", "size"), [("w3", "build3", (3, 32, 32)), ("w1", "build", (1, 28, 28))]
)
def test_view_after_convolutions(weights: str, factory: str, size: tuple[int, int, int]) -> None:
    folder = CASES / "view-after-conv"
    classifier = open_classifier(
        folder / f"{weights}.pt", factory=f"{folder / 'net.py'}:{factory}", options=LoadOptions(size=size)
    )
    x = torch.rand((400, *size), generator=make_generator(0))
    with classifier.fast_inference(x[:16]), torch.no_grad():
        assert classifier.logits(x).shape == (400, 10)


def test_exported_programs_are_read_as_their_onnx_twins(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, CASES / "make_pt2.py"], cwd=tmp_path, check=True, capture_output=True, timeout=300
    )
    x = torch.rand((5, 3, 32, 32), generator=make_generator(0))
    for name in ("bn1d", "weightstd"):
        twins = [open_classifier(tmp_path / f"{name}{suffix}").logits(x) for suffix in (".pt2", ".onnx")]
        torch.testing.assert_close(*twins, rtol=1e-4, atol=1e-4)
