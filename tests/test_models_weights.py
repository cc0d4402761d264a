"""Weights as training code saves them: under a key, with a wrapper's name, next to other objects."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from doorward.core.errors import InputError, UnsafeArtifact
from doorward.models.formats.weights import fill, fit, read_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten()))
    made.add_module("head", nn.Sequential(nn.LazyLinear(3)))
    made(torch.rand(2, 3, 6, 6))
    return made.eval()


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def taken(value: Any, path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Save something, and fill another network with the weights in it; return that and what is told."""
    other = network()
    for parameter in other.parameters():
        parameter.data.zero_()
    return other, fill(other, read_weights(saved(path, value)), path)


WEIGHTS = network().state_dict()
DOUBLED = {name: 2 * tensor for name, tensor in WEIGHTS.items()}
X = torch.rand(2, 3, 6, 6)


def renamed(start: str) -> dict[str, Tensor]:
    return {start + name: tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "value",
    [
        WEIGHTS,
        {"net": WEIGHTS, "acc": 91.5, "epoch": 3},
        {"model_state_dict": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.1}},
        {"checkpoint": {"weights": WEIGHTS}, "names": ["ant", "bee"]},
        renamed("module."),
        renamed("model."),
        {"state_dict": renamed("module._orig_mod.")},
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in WEIGHTS.items()},
        {name: tensor for name, tensor in WEIGHTS.items() if not name.endswith("num_batches_tracked")},
        WEIGHTS | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)},
        {
            "state_dict": WEIGHTS,
            "best": np.float64(0.9),
            "where": Path("/a"),
            "args": argparse.Namespace(lr=0.1),
        },
        {"net": WEIGHTS, "history": np.arange(4.0), "when": np.datetime64("2020-01-01")},
    ],
    ids=range(12),
)
def test_weights_are_found_where_training_code_puts_them(value: Any, tmp_path: Path) -> None:
    filled, notes = taken(value, tmp_path / "w.pth")
    assert notes == ()
    with torch.no_grad():
        torch.testing.assert_close(filled(X), network()(X), rtol=1e-2, atol=1e-2)


def test_what_is_not_the_networks_is_told(tmp_path: Path) -> None:
    value = {"state_dict": renamed("model.") | {"criterion.weight": torch.ones(3)}}
    filled, notes = taken(value, tmp_path / "w.ckpt")
    assert notes == ("not loaded from w.ckpt, since they are not the network's: criterion.weight",)
    assert torch.equal(filled(X), network()(X))


def test_of_several_sets_the_likeliest_is_taken_and_the_others_are_told(tmp_path: Path) -> None:
    value = {"state_dict_ema": DOUBLED, "state_dict": WEIGHTS, "other": {"a": torch.ones(1)}}
    filled, notes = taken(value, tmp_path / "w.pth")
    assert torch.equal(filled(X), network()(X))
    assert notes == ("w.pth holds several sets of weights: 'state_dict' was taken, not 'state_dict_ema'",)


def test_weights_without_the_name_of_a_wrapper_fit_a_wrapped_network() -> None:
    own = renamed("module.")
    assert fit(dict(WEIGHTS), own).tensors.keys() == own.keys()
    assert fit({"a": torch.ones(1)}, own).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "it holds a dict of 'epoch', 'lr'"),
        ({}, "it holds a dict that is empty"),
        ([torch.ones(1)], "it holds a list"),
        ({"conv.weight": torch.ones(1)}, "they lack conv.bias, head.0.bias, head.0.weight and 4 more"),
        ({**WEIGHTS, "more": torch.ones(1)}, "they hold unknown more"),
        ({**WEIGHTS, "conv.bias": torch.ones(9)}, r"another shape in conv.bias \(9,\) for \(4,\)"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        taken(value, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not readable as weights: it is a"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (pickle.dumps({"a": np.arange(3)}, 2), "it holds objects other than tensors"),
    ],
)
def test_a_file_of_another_kind_is_told_in_a_line(content: bytes, message: str, tmp_path: Path) -> None:
    from doorward.models.formats.weights import read_examined_weights

    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as told:
        read_examined_weights(path)
    assert "\n" not in str(told.value)
    assert "weights_only" not in str(told.value), "advice that would run what is in the file"


class Called:
    """Says when it is made, filled, or called."""

    made: list[str] = []  # noqa: RUF012 - shared on purpose

    def __init__(self) -> None:
        Called.made.append("made")

    def __setstate__(self, state: object) -> None:
        Called.made.append("filled")

    def __reduce__(self) -> tuple[Any, ...]:
        return Called, (), {"a": 1}


def test_no_code_of_other_objects_runs(tmp_path: Path) -> None:
    """The file names a class here, whose code would be called by an ordinary unpickler."""
    from doorward.models.formats.weights import read_examined_weights

    path = saved(tmp_path / "w.pth", {"state_dict": dict(WEIGHTS), "other": Called()})
    Called.made.clear()
    with pytest.raises(UnsafeArtifact):
        read_weights(path)
    assert read_examined_weights(path).keys() == WEIGHTS.keys()
    assert Called.made == []
    torch.load(path, weights_only=False)
    assert Called.made == ["made", "filled"]


def test_what_is_left_out_stays_unknown_to_torch_afterwards(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": dict(WEIGHTS), "best": np.float64(1)})
    before = set(torch.serialization.get_safe_globals())
    read_weights(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_safetensors_have_wrappers_too(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in renamed("net.").items()}, path)
    filled = network()
    assert fill(filled, read_weights(path), path) == ()
