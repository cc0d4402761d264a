"""What users give by mistake, or as other tools write it, is read or named as what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from doorward.core.contents import stand_in
from doorward.core.errors import DoorwardError, InputError
from doorward.data import InMemorySamples, open_samples
from doorward.models import InputSpec, LoadOptions, open_classifier
from doorward.models.encode.image import to_tensor
from doorward.models.formats.factory import open_factory

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 123456\n"
CODE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
"""


@pytest.fixture
def network(tmp_path: Path) -> nn.Module:
    """Return the network that net.py builds."""
    (tmp_path / "net.py").write_text(CODE)
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def opened(folder: Path, file: str) -> Any:
    return open_factory(f"{folder / 'net.py'}:build", folder / file, LoadOptions(size=(3, 8, 8)))


def prefixed(prefix: str) -> Callable[[dict[str, Any]], Any]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model_state_dict": lambda weights: {"model_state_dict": weights, "epoch": 3},
    "net": lambda weights: {"net": weights, "acc": 0.9},
    "state_dict": lambda weights: {
        "state_dict": prefixed("model.")(weights),
        "pytorch-lightning_version": "2",
    },
    "module.": prefixed("module."),
    "_orig_mod.": prefixed("_orig_mod."),
    "module._orig_mod.": prefixed("module._orig_mod."),
    "model.": prefixed("model."),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_read_as_trainers_write_them(name: str, network: nn.Module, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[name](network.state_dict()), tmp_path / "w.pt")
    x = torch.rand(2, 3, 8, 8)
    given = opened(tmp_path, "w.pt").logits(x)
    assert torch.allclose(given, network(x), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_content_decides_how_weights_are_read(
    kind: str, suffix: str, network: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    if kind == "torch":
        with file.open("wb") as stream:
            torch.save(network.state_dict(), stream)
    else:
        safetensors.torch.save_file(network.state_dict(), file)
    assert opened(tmp_path, file.name).classes == ("0", "1", "2")


def written(folder: Path, name: str, weights: dict[str, Any]) -> str:
    """Write one wrong file of weights, and return its name."""
    file = folder / f"{name.replace(' ', '-')}.pt"
    if name == "no tensors":
        torch.save({"weights_of_it": "elsewhere", "epoch": 3}, file)
    elif name == "more than tensors":
        torch.save({"state_dict": weights, "when": np.float64}, file)
    elif name == "cut torch":
        torch.save(weights, file)
        file.write_bytes(file.read_bytes()[:-200])
    elif name == "cut safetensors":
        safetensors.torch.save_file(weights, file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        content = {
            "pointer": POINTER.encode(),
            "page": b"<!DOCTYPE html><html>",
            "empty": b"",
            "text": b"hello",
        }
        file.write_bytes(content[name])
    return file.name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no tensors", "it holds a dict of 'weights_of_it', 'epoch'"),
        ("cut torch", "it is cut off: its archive has no end"),
        ("cut safetensors", "bytes are there. Fetch it again"),
        ("pointer", "it is a pointer of Git LFS"),
        ("page", "it is a web page"),
        ("empty", "it is empty"),
        ("text", "it is neither a file of torch's nor safetensors"),
    ],
)
def test_wrong_weights_are_named_as_what_they_are(
    name: str, said: str, network: nn.Module, tmp_path: Path
) -> None:
    file = written(tmp_path, name, network.state_dict())
    with pytest.raises(DoorwardError) as caught:
        opened(tmp_path, file)
    message = str(caught.value)
    assert said in message
    assert file in message
    assert "weights_only" not in message, "no advice that would run the file's code"


@pytest.mark.parametrize("name", ["m.onnx", "m.safetensors"])
def test_pointers_of_git_lfs_are_named_wherever_a_model_is_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match="git lfs pull"):
            open_classifier(place)
    assert stand_in(tmp_path / "config.json") is None


def test_weights_that_are_named_onnx_are_called_weights(network: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with (tmp_path / "m.onnx").open("wb") as stream:
        torch.save(network.state_dict(), stream)
    with pytest.raises(InputError, match=r"is no ONNX model: it is a file of torch's"):
        open_classifier(tmp_path / "m.onnx")


def pictures(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_folders_of_storage_systems_are_no_classes(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images")
    for name in ("@eaDir", "#recycle", "lost+found"):
        (folder / name).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name / "thumb.png")
    (folder / "cat" / "@eaDir").mkdir()
    samples = open_samples(folder)
    assert (samples.classes, len(samples)) == (("cat", "dog"), 6)


def test_a_folder_of_pictures_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it holds pictures: give it as --clean"):
        open_classifier(pictures(tmp_path / "images"))


def test_a_table_of_names_of_pictures_says_where_it_goes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\ncat/0.png,0\ndog/1.png,1\n")
    with pytest.raises(InputError, match=r"as metadata.csv and the names in a column file_name"):
        open_samples(tmp_path / "t.csv")


def test_an_image_that_does_not_fit_is_named_by_its_file(tmp_path: Path) -> None:
    samples = open_samples(pictures(tmp_path / "images"))
    with pytest.raises(InputError, match=r"cat.0\.png, id [0-9a-f]{16}: the model takes 9x9 images"):
        to_tensor(samples, InputSpec(channels=3, height=9, width=9))


@pytest.mark.parametrize(
    ("channels", "side", "advice"),
    [
        (1, 8, "Only the colours differ: --resize 8"),
        (3, 16, "--resize SIDE"),
        (4, 8, "a model of other channels cannot be given images"),
    ],
)
def test_what_would_make_images_fit_can_work(channels: int, side: int, advice: str) -> None:
    samples = InMemorySamples(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(InputError) as caught:
        to_tensor(samples, InputSpec(channels=channels, height=side, width=side))
    assert advice in str(caught.value)
    assert ("of that size and mode" in str(caught.value)) is False


@pytest.mark.parametrize("form", ["one", "splits"])
def test_what_save_to_disk_wrote_is_read(form: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    images = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(6)]
    one = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    (one if form == "one" else datasets.DatasetDict({"train": one, "test": one})).save_to_disk(tmp_path / "d")
    samples = open_samples(tmp_path / "d")
    assert (len(samples), samples.classes) == (6, ("cat", "dog"))
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1] * 3
    assert samples.raw([2])[0].max() == 40
