"""Every torch classifier is written as something that opens again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.architectures import NAMES, build
from doorward.models.formats.saving import is_native, save_classifier, saved_files

SPEC = InputSpec(channels=3, height=16, width=16, mean=(0.4,), std=(0.3,))
CLASSES = tuple("abcd")


def made(name: str) -> TorchClassifier:
    network = build(name, channels=3, height=16, width=16, classes=4)
    return TorchClassifier(network, SPEC, CLASSES, architecture=name)


def opens_as(path: Path, classifier: TorchClassifier) -> bool:
    """Return whether what lies at a path does what a classifier does."""
    again = open_classifier(path)
    assert (again.classes, again.spec) == (classifier.classes, classifier.spec)
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.allclose(again.logits(x), classifier.logits(x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_ours_become_directories(name: str) -> None:
    assert is_native(made(name)) == name


def test_a_directory_of_ours_opens_again(tmp_path: Path) -> None:
    classifier = made("small-cnn")
    path = save_classifier(classifier, tmp_path / "new" / "model")
    assert path == tmp_path / "new" / "model"
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert opens_as(path, classifier)


def wider() -> TorchClassifier:
    classifier = made("small-cnn")
    classifier.module[-1] = nn.Linear(128, 4, bias=False)
    return classifier


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = made("small-cnn").module

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * 2


def test_networks_that_only_look_like_ours_become_programs(tmp_path: Path) -> None:
    inside = TorchClassifier(Inside(), SPEC, CLASSES, architecture="small-cnn")
    for number, classifier in enumerate((wider(), inside)):
        assert is_native(classifier) is None
        path = save_classifier(classifier, tmp_path / str(number))
        assert path.name == "model.pt2"
        assert set(path.parent.iterdir()) <= set(saved_files(path.parent))
        assert opens_as(path, classifier)
    unnamed = TorchClassifier(made("small-cnn").module, SPEC, CLASSES)
    assert is_native(unnamed) is None, "nothing says which architecture it is of"


class Twice(nn.Module):
    """Cannot be exported: it looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(768, 4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.linear(x.flatten(1))
        return z * 2 if float(z[0, 0].detach()) > 0 else z


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    classifier = TorchClassifier(Twice(), SPEC, CLASSES)
    with pytest.raises(InputError, match=r"model\.pt2: this network cannot be exported"):
        save_classifier(classifier, tmp_path)
    (tmp_path / "file").write_text("")
    for each in (wider(), made("small-cnn")):
        with pytest.raises(InputError, match="cannot write the model"):
            save_classifier(each, tmp_path / "file" / "model")
