"""Directories of timm: timm builds the network, the configuration states the images."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models import LoadOptions, open_classifier
from doorward.models.encode.image import fit_image
from doorward.models.formats.timm_directory import describe

PRETRAINED = {
    "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 0.25], "input_size": [3, 24, 24], "crop_pct": 0.75,
    "interpolation": "bicubic",
}  # fmt: skip


class Small(nn.Module):
    """Stands for a network that timm builds."""

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).relu().mean((2, 3)))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a small module in timm's place; return what it is asked for."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, *, pretrained: bool, num_classes: int, **given: Any) -> nn.Module:
        calls.append({"name": name, "pretrained": pretrained, "num_classes": num_classes} | given)
        if name != "small_net.tiny":
            raise RuntimeError(f"Unknown model ({name})")
        return Small(num_classes, **given)

    timm = ModuleType("timm")
    timm.__spec__ = ModuleSpec("timm", None)
    timm.__dict__.update(create_model=create_model, __version__="1")
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


def saved(path: Path, *, prefix: str = "", **changes: Any) -> Small:
    """Write a directory as timm does; return the network."""
    torch.manual_seed(0)
    network = Small(3, **changes.get("model_args", {}))
    tensors = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    config = {"architecture": "small_net.tiny", "num_classes": 3, "pretrained_cfg": PRETRAINED} | changes
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "timm_model."])
def test_timm_builds_the_network_and_the_configuration_states_the_images(
    prefix: str, tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    network = saved(tmp_path, prefix=prefix, label_names=["ant", "bee", "cat"], model_args={"width": 6})
    classifier = open_classifier(tmp_path)
    assert built == [{"name": "small_net.tiny", "pretrained": False, "num_classes": 3, "width": 6}]
    assert classifier.classes == ("ant", "bee", "cat")
    assert classifier.spec.assumed == ()
    x = torch.rand(4, 3, 24, 24)
    mean, std = (torch.tensor(PRETRAINED[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(x), network((x - mean) / std))
    resize = classifier.spec.resize
    assert resize is not None
    assert (resize.height, resize.shortest_edge, resize.crop, resize.resample) == (32, True, (24, 24), 3)
    assert fit_image(np.zeros((50, 90, 3), np.uint8), classifier.spec).shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"crop_pct": 1.0}, (24, 24, True)),
        ({"crop_mode": "squash"}, (32, 32, False)),
        ({"input_size": [3, 24, 30]}, (32, 40, False)),
        ({"crop_mode": "border"}, None),
        ({"interpolation": "random"}, None),
        ({"crop_pct": "all"}, None),
    ],
)
def test_resizing_is_that_of_timm_or_none(
    change: dict[str, Any], expected: tuple[int, int, bool] | None
) -> None:
    fields = describe(PRETRAINED | change)
    resize = fields.get("resize")
    found = None if resize is None else (resize["height"], resize["width"], resize["shortest_edge"])
    assert found == expected
    assert fields["height"] == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf_hub:somebody/net"}, "expected the name of a network of timm"),
        ({"architecture": "/etc/passwd"}, "expected the name of a network of timm"),
        ({"architecture": 3}, "expected the name of a network of timm"),
        ({"architecture": "unknown_net"}, "timm 1 cannot build it: Unknown model"),
        ({"model_args": {"checkpoint_path": "a.pth"}}, "checkpoint_path in model_args names another file"),
        ({"model_args": ["depth"]}, "expected the name of a network of timm"),
        ({"num_classes": 5}, "the weights do not fit the network"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "state the size"),
    ],
)
def test_what_timm_cannot_build_is_refused_in_a_line(
    changes: dict[str, Any], message: str, tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=message) as told:
        open_classifier(tmp_path)
    assert "\n" not in str(told.value)


def test_weights_may_be_missing(tmp_path: Path, built: list[dict[str, Any]]) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights: expected one of"):
        open_classifier(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_network_of_timm_itself(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=4).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 4, "pretrained_cfg": PRETRAINED}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    classifier = open_classifier(tmp_path, options=LoadOptions(labels=("a", "b", "c", "d")))
    mean, std = (torch.tensor(PRETRAINED[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(x), network((x - mean) / std), rtol=1e-4, atol=1e-5)
