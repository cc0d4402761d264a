"""A preprocessing that nobody stated is tried against the usual ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doorward.data import InMemorySamples
from doorward.models import InputSpec, TorchClassifier
from doorward.scan.examine import examine
from doorward.scan.preprocessing import BetterFit, better_fit, candidates

SIDE = 12
ASSUMED = ("range", "mean", "std")
COLOURS = {
    "0..1": ("--input-range=0,1", lambda x: x),
    "-1..1": ("--input-range=-1,1", lambda x: (x + 1) / 2),
    "0..255": ("--input-range=0,255", lambda x: x / 255),
    "bgr": ("--input-range=0,1 --channels bgr", lambda x: x.flip(1)),
}


def make_images(n: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return colour images whose class is the place of a bar and its colour, on a background of any grey."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(n) % 4
    x = torch.from_numpy(rng.uniform(0.1, 0.3, (n, 1, 1, 1))).float().repeat(1, 3, SIDE, SIDE)
    x += torch.from_numpy(rng.normal(0, 0.03, (n, 3, SIDE, SIDE))).float()
    for i, label in enumerate(labels.tolist()):
        rows = slice(1, 5) if label % 2 else slice(7, 11)
        x[i, 0 if label < 2 else 2, rows, 2:10] += 0.4
    return x.clamp(0, 1), labels


class Bars(nn.Module):
    """Tell the bars apart, in images that were prepared in one way alone."""

    def __init__(self, prepared: Callable[[Tensor], Tensor], *, norm: bool) -> None:
        super().__init__()
        self.prepared = prepared
        x, _ = make_images(seed=1)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.norm = nn.BatchNorm2d(3, affine=False) if norm else None
        if self.norm is not None:
            self.norm.running_mean, self.norm.running_var = mean.clone(), variance.clone()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepared(x)
        if self.norm is not None:
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            y = self.norm(x)
            deviation = (self.norm.running_var + 1e-5).sqrt().view(1, 3, 1, 1)
            x = y * deviation + self.norm.running_mean.view(1, 3, 1, 1)
        x = (x > 0.42).float()  # bars are lighter than that, and all else is darker
        up, down = x[:, :, 1:5, 2:10].mean((2, 3)), x[:, :, 7:11, 2:10].mean((2, 3))  # (n, 3)
        red, blue = (x[:, c].mean((1, 2)) - x[:, 1].mean((1, 2)) for c in (0, 2))
        higher = up.mean(1) - down.mean(1)
        rows = torch.stack(
            [-higher + red - blue, higher + red - blue, -higher + blue - red, higher + blue - red]
        )
        return 40 * self.scale * rows.T


def classifier(kind: str, *, norm: bool = True, assumed: tuple[str, ...] = ASSUMED) -> TorchClassifier:
    spec = InputSpec(channels=3, height=SIDE, width=SIDE, assumed=assumed)
    return TorchClassifier(Bars(COLOURS[kind][1], norm=norm), spec, tuple("abcd"))


def fit(kind: str, *, labelled: bool, **more) -> BetterFit | None:
    x, labels = make_images()
    return better_fit(classifier(kind, **more), x, labels if labelled else None)


@pytest.mark.parametrize("kind", [kind for kind in COLOURS if kind != "0..1"])
def test_with_labels_the_accuracy_tells(kind: str) -> None:
    found = fit(kind, labelled=True)
    assert found is not None
    assert found.candidate.options == COLOURS[kind][0]
    assert f"scan again with {COLOURS[kind][0]}" in found.reason
    assert "100 % of 100 images" in found.reason


@pytest.mark.parametrize("kind", ["-1..1", "0..255"])
def test_without_labels_the_first_batch_normalisation_tells(kind: str) -> None:
    found = fit(kind, labelled=False)
    assert found is not None
    assert found.candidate.options.startswith(COLOURS[kind][0])
    assert "batch normalisation" in found.why


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_right_one_is_left_in_peace(labelled: bool, norm: bool) -> None:
    assert fit("0..1", labelled=labelled, norm=norm) is None


@pytest.mark.parametrize("assumed", [(), ("layout", "output")])
def test_what_was_stated_is_not_questioned(assumed: tuple[str, ...]) -> None:
    assert fit("-1..1", labelled=True, assumed=assumed) is None


def test_the_assumed_one_comes_first_and_grey_images_have_no_colours() -> None:
    grey = InputSpec(channels=1, height=8, width=8, range=(-1.0, 1.0))
    assert [one.options for one in candidates(grey)] == [
        "--input-range=-1,1",
        "--input-range=0,1",
        "--input-range=0,255",
    ]
    assert len(candidates(InputSpec(channels=3, height=8, width=8))) == 9


def test_a_scan_accuses_no_class_under_a_preprocessing_that_another_beats() -> None:
    x, labels = make_images(120)
    samples = InMemorySamples(
        (x.permute(0, 2, 3, 1) * 255).round().byte().numpy(), labels.numpy(), classes=tuple("abcd")
    )
    report = examine(classifier("-1..1"), samples, detectors=[])
    assert report.verdict == "could_not_tell"
    assert "--input-range=-1,1" in str(report.reason)
    right = examine(classifier("0..1"), samples, detectors=[])
    assert "--input-range" not in str(right.reason)
