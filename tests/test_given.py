"""What Python users have at hand is taken as a model and as data; what is neither gets one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples
from doorward.data.given import as_samples
from doorward.detectors.model.max_margin import MaxMargin
from doorward.guard.guard import Guard
from doorward.models import open_classifier, wrap
from doorward.models.formats.given import as_classifier
from doorward.repair import repair
from doorward.scan.examine import examine
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest

PIXELS = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


class Toolbox:
    """Stands for an estimator of the Adversarial Robustness Toolbox."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        self.model = network()


class Pairs(torch.utils.data.Dataset[Any]):
    classes = ("cat", "dog", "fox")

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(PIXELS[index]).permute(2, 0, 1).float() / 255, int(LABELS[index])


def timm_like() -> nn.Module:
    module: Any = network()
    module.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return module


# Models


@pytest.mark.parametrize(
    "make", [network, Toolbox, lambda: network().forward], ids=["module", "art", "function"]
)
def test_models_of_several_makes_answer_the_same(make: Any) -> None:
    x = torch.rand(4, 3, 8, 8)
    given = as_classifier(make(), size=(3, 8, 8), classes=("a", "b", "c"))
    assert given.classes == ("a", "b", "c")
    assert torch.allclose(given.logits(x), network()(x), atol=1e-5)


def test_what_the_object_states_of_its_input_is_used() -> None:
    x = torch.rand(4, 3, 8, 8)
    assert as_classifier(Toolbox()).spec.shape == (3, 8, 8)
    given = as_classifier(timm_like())
    assert torch.allclose(given.logits(x), network()((x - 0.5) / 0.25), atol=1e-5)
    own = wrap(network(), size=(3, 8, 8))
    assert as_classifier(own) is own


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "got int"),
        (None, "got None"),
        (np.zeros(3), "got numpy.ndarray"),
        (nn.Linear, "got the class Linear: make one of it first"),
        (network(), "give size=(channels, height, width), or images"),
        ("nowhere.onnx", "no such file or directory"),
    ],
    ids=["int", "none", "array", "class", "no size", "no file"],
)
def test_what_is_no_model_gets_one_line(given: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        as_classifier(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value), "no options of the command line"


# Data


def of_the_hub() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "fox"])}
    )
    images = [Image.fromarray(one) for one in PIXELS]
    return datasets.Dataset.from_dict({"image": images, "label": LABELS.tolist()}, features=features)


NAMED, NUMBERED = ("cat", "dog", "fox"), tuple("012")
TENSOR = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
DATA: dict[str, tuple[Any, tuple[str, ...]]] = {
    "arrays": (lambda: (PIXELS, LABELS), NUMBERED),
    "tensors": (
        lambda: (torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)),
        NUMBERED,
    ),
    "floats": (lambda: (PIXELS / 255, LABELS), NUMBERED),
    "torch": (Pairs, NAMED),
    "loader": (lambda: torch.utils.data.DataLoader(Pairs(), batch_size=7, shuffle=True), NAMED),
    "hub": (of_the_hub, NAMED),
    "hub splits": (lambda: {"train": of_the_hub(), "test": of_the_hub()}, NAMED),
    "pairs": (
        lambda: [(Image.fromarray(x), y) for x, y in zip(PIXELS, LABELS, strict=True)],
        NUMBERED,
    ),
    "samples": (lambda: InMemorySamples(PIXELS, LABELS), NUMBERED),
}


@pytest.mark.parametrize("name", DATA)
def test_data_of_several_makes_are_the_same_images(name: str) -> None:
    make, classes = DATA[name]
    samples = as_samples(make())
    assert isinstance(samples, Samples)
    assert samples.classes == classes
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()
    assert np.array_equal(np.stack(samples.raw(range(30))), PIXELS)


def test_data_without_labels_and_texts() -> None:
    assert as_samples(PIXELS).labels is None
    assert len(as_samples([Image.fromarray(one) for one in PIXELS[:4]])) == 4
    assert as_samples(["one", "two"]).modality == "text"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "got int"),
        (None, "got None"),
        ({"a": 1}, "got dict"),
        (b"x", "got bytes"),
        ([], "holds no samples"),
        ([1, 2], "expected images or texts"),
        (PIXELS[0], "expected many images"),
        ((PIXELS, [1, 2]), "one class number for each of 30 images"),
        ((PIXELS, LABELS / 2), "and type float64"),
        (np.random.default_rng(0).normal(size=(4, 8, 8, 3)), "before normalisation"),
        ("nowhere.npz", "there is no file or folder"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_is_no_data_gets_one_line(given: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        as_samples(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# The whole way


def test_a_module_and_arrays_are_examined_and_scanned() -> None:
    detectors = [MaxMargin(starts=2, steps=5)]
    for report in (
        examine(network(), (PIXELS, LABELS), detectors=detectors),
        scan(network(), (PIXELS, LABELS), detectors=["max-margin"]),
    ):
        assert report.subject is not None
        assert report.subject.spec["height"] == 8
        assert report.data[0].rows == 30
        assert [one.detector for one in (*report.findings, *report.not_run)] == ["max-margin"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: scan(network(), PIXELS, detektors=()), "no argument 'detektors'; did you mean 'detectors'?"),
        (lambda: scan("m.onnx", sed=1), "no argument 'sed'; did you mean 'seed'?"),
        (lambda: scan(ScanRequest(model="m.onnx"), PIXELS), "a ScanRequest says all"),
        (lambda: scan(network(), PIXELS, train="t"), "train goes with a model that lies in a file"),
        (lambda: scan(5, PIXELS), "got int"),
        (lambda: repair(network()), "give size=(channels, height, width), or images"),
        (lambda: repair(network(), clean=7), "clean: expected a path"),
        (lambda: repair(network(), clean=PIXELS, metod="x"), "did you mean 'method'?"),
        (lambda: Guard.fit(network(), 7), "clean: expected a path"),
        (lambda: Guard.fit(7, PIXELS), "model: expected a path"),
    ],
    ids=range(10),
)
def test_a_wrong_argument_gets_one_line(call: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_guard_takes_a_module_and_arrays() -> None:
    many = np.random.default_rng(1).integers(0, 255, (200, 8, 8, 3), dtype=np.uint8)
    guard = Guard.fit(network(), many, rate=0.1)
    answers = guard(PIXELS)
    assert answers.accepted.shape == (30,)
    assert np.array_equal(answers.predictions, guard(TENSOR).predictions)


def test_a_repair_takes_a_module_and_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doorward.repair.by_clean_data.choose", lambda names: [])
    right = network()(TENSOR.float() / 255).argmax(1).numpy()
    known = np.where(LABELS == 2, LABELS, right)  # some of each class, and most as the model says
    outcome = repair(network(), clean=(PIXELS, known), method="fine-tuning", settings={"share": 0.01})
    assert outcome.report.model == "<memory>"
    assert outcome.classifier is not None
    assert open_classifier(outcome.save(tmp_path / "mended")).spec.shape == (3, 8, 8)


def test_class_names_of_the_data_serve_a_model_that_has_none() -> None:
    detectors = [MaxMargin(starts=2, steps=5)]
    report = examine(network(), Pairs(), detectors=detectors)
    assert report.subject is not None
    assert report.subject.classes == NAMED
    assert any("states no class names" in one for one in report.warnings)
    own = examine(network(), Pairs(), classes=("fox", "dog", "cat"), detectors=detectors)
    assert own.subject is not None
    assert own.subject.classes == ("fox", "dog", "cat")


def test_scan_and_repair_are_called_by_the_package_whatever_was_imported() -> None:
    code = (
        "import doorward\n"
        "def tried(call):\n"
        "    try: call(5)\n"
        "    except doorward.core.errors.InputError as error: return 'got int' in str(error)\n"
        "first = tried(doorward.scan), tried(doorward.repair)\n"
        "import doorward.scan.pipeline, doorward.repair.pipeline\n"
        "print(first, (tried(doorward.scan), tried(doorward.repair)), doorward.Guard.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "(True, True) (True, True) Guard", done.stderr


def test_a_guard_takes_filters_by_name_and_folders_as_text(tmp_path: Path) -> None:
    clean = np.random.default_rng(1).integers(0, 255, (160, 8, 8, 3), dtype=np.uint8)
    guard = Guard.fit(network(), clean, filters="strip", rate=0.05)
    assert [one.method() for one in guard.fitted.filters] == ["strip"]
    guard.save(str(tmp_path / "guard"))
    assert Guard.load(str(tmp_path / "guard"), guard.classifier).fitted.thresholds == guard.fitted.thresholds
