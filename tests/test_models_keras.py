"""Keras files: what they answer here is what Keras answers; what is not read is told; nothing hostile is run.

The files in `keras_models` were written by TensorFlow 2.15 (those with a 2) and Keras 3.15 (3), with random
weights; `answers.json` has what they answer there for the images of `images_for`.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from command_line import call
from doorward.core.errors import DoorwardError, InputError, UnsafeArtifact
from doorward.models import TorchClassifier
from doorward.models.errors import NotExamined
from doorward.models.formats.loading import LoadOptions, open_classifier

pytest.importorskip("pyfive")

FOLDER = Path(__file__).parent / "keras_models"
ANSWERS: dict[str, list[list[float]]] = json.loads((FOLDER / "answers.json").read_text(encoding="utf-8"))
BYTES = LoadOptions(input_range=(0.0, 255.0), mean=(0.0,), std=(1.0,))


def opened(path: Path) -> TorchClassifier:
    classifier = open_classifier(path, options=BYTES)
    assert isinstance(classifier, TorchClassifier)
    return classifier


def images_for(classifier: TorchClassifier) -> torch.Tensor:
    """Return images (3, c, h, w) in [0, 1]; Keras was given them in 0..255, channels last."""
    c, h, w = classifier.spec.shape
    images = np.random.default_rng(0).uniform(0, 255, (3, h, w, c)).astype(np.float32)
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("name", ANSWERS)
def test_a_model_answers_as_in_keras(name: str) -> None:
    classifier = opened(FOLDER / name)
    expected = torch.tensor(ANSWERS[name])
    with torch.no_grad():
        own = classifier.raw_logits(images_for(classifier))
    if name.startswith("sequence"):  # ends in a softmax, from before which scores are taken
        own = own.softmax(1)
    assert torch.allclose(own, expected, atol=1e-4 * float(expected.abs().max()))
    assert classifier.spec.layout == "NHWC"
    assert {"gradients", "weights"} <= classifier.capabilities


def test_its_layers_are_layers_of_torch() -> None:
    kinds = {type(one) for one in opened(FOLDER / "graph-2.h5").module.modules()}
    assert {nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.Linear, nn.LayerNorm} <= kinds


def changed(name: str, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a copy of an archive whose configuration is changed."""
    with zipfile.ZipFile(FOLDER / name) as source, zipfile.ZipFile(place, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            target.writestr(info.filename, content)
    return place


def layer_of(config: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in config["config"]["layers"] if one["class_name"] == kind)
    return found


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an unknown layer": (
        lambda c: layer_of(c, "Dense").update(class_name="MultiHeadAttention"),
        "with a layer of the kind 'MultiHeadAttention', which is not read; convert it to ONNX",
    ),
    "an unknown activation": (
        lambda c: layer_of(c, "Dense")["config"].update(activation="os.system"),
        "with an activation 'os.system'",
    ),
    "other weights": (
        lambda c: layer_of(c, "Conv2D")["config"].update(use_bias=False, groups=2),
        "cannot be read",
    ),
    "channels first": (
        lambda c: layer_of(c, "Conv2D")["config"].update(data_format="channels_first"),
        "with layers that take channels first",
    ),
    "a setting that changes what a layer does": (
        lambda c: layer_of(c, "Rescaling")["config"].update(quantization_config={"mode": "int8"}),
        "with a layer of the kind 'Rescaling' with quantization_config",
    ),
    "whole numbers": (
        lambda c: layer_of(c, "Rescaling")["config"].update(dtype="int32"),
        "with numbers of the type 'int32'",
    ),
    "images of whole numbers": (
        lambda c: c["config"]["layers"][0]["config"].update(dtype="uint8"),
        "with numbers of the type 'uint8'",
    ),
    "two layers of one name": (
        lambda c: [one["config"].update(name="dense") for one in c["config"]["layers"][-2:]],
        "two of its layers have one name",
    ),
    "a layer of somebody's own": (
        lambda c: layer_of(c, "Dense").update(registered_name="mine>Dense"),
        "it has a layer of somebody's own, mine>Dense",
    ),
    "texts": (
        lambda c: c["config"]["layers"][0]["config"].update(batch_shape=[None, 12]),
        "with an input of the size (any, 12), and images have",
    ),
    "no layers": (lambda c: c["config"].update(layers=[]), "its model 'sequential' has no layers"),
    "layers that are no objects": (lambda c: c["config"].update(layers=[3]), "is no object"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_not_read_is_told(case: str, tmp_path: Path) -> None:
    change, words = CHANGES[case]
    file = changed("sequence-3.keras", tmp_path / "m.keras", change)
    with pytest.raises(NotExamined) as told:
        open_classifier(file, options=BYTES)
    assert words in str(told.value)
    assert str(told.value).startswith(f"{file}: only its files were examined, since it is a Keras model")


def test_a_graph_that_feeds_itself_is_refused(tmp_path: Path) -> None:
    def loop(config: dict[str, Any]) -> None:
        add = layer_of(config, "Add")
        text = json.dumps(add["inbound_nodes"])
        name = add["inbound_nodes"][0]["args"][0][0]["config"]["keras_history"][0]
        add["inbound_nodes"] = json.loads(text.replace(f'"{name}"', f'"{add["name"]}"'))

    with pytest.raises(NotExamined, match="is given what no layer before it makes"):
        open_classifier(changed("graph-3.keras", tmp_path / "m.keras", loop), options=BYTES)


def test_the_order_of_a_number_and_a_value_counts(tmp_path: Path) -> None:
    def turn(config: dict[str, Any]) -> None:
        layer_of(config, "Subtract")["inbound_nodes"][0]["args"].reverse()

    def subtraction(path: Path) -> torch.Tensor:
        (layer,) = (m for m in opened(path).module.modules() if getattr(m, "does", "") == "ops.Subtract")
        difference: torch.Tensor = layer(torch.tensor([3.0]))
        return difference

    assert float(subtraction(FOLDER / "graph-3.keras")) == 2.0
    assert float(subtraction(changed("graph-3.keras", tmp_path / "m.keras", turn))) == -2.0


def test_layers_in_another_order_would_get_the_weights_of_others_and_are_refused(tmp_path: Path) -> None:
    def swap(config: dict[str, Any]) -> None:
        layers = config["config"]["layers"]
        first, second = [i for i, one in enumerate(layers) if one["class_name"] == "Conv2D"][:2]
        layers[first], layers[second] = layers[second], layers[first]

    with pytest.raises(NotExamined, match="not in the order in which Keras numbers their weights"):
        open_classifier(changed("graph-3.keras", tmp_path / "m.keras", swap), options=BYTES)


def test_weights_that_lie_in_another_file_are_refused(tmp_path: Path) -> None:
    """Give a dataset the address by which HDF5 says that its numbers are elsewhere."""
    content = (FOLDER / "sequence-3.h5").read_bytes()
    import pyfive

    with pyfive.File(io.BytesIO(content)) as held:
        at = int(held["model_weights/conv2d/sequential/conv2d/kernel"].id.data_offset)
    file = tmp_path / "m.h5"
    assert content.count(at.to_bytes(8, "little")) == 1
    file.write_bytes(content.replace(at.to_bytes(8, "little"), b"\xff" * 8))
    with pytest.raises(NotExamined, match="it has weights that lie in another file"):
        open_classifier(file, options=BYTES)


@pytest.mark.parametrize("name", ["config.json", "metadata.json", "model.weights.h5"])
def test_an_archive_that_unpacks_to_far_more_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "m.keras"
    with (
        zipfile.ZipFile(FOLDER / "sequence-3.keras") as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in source.infolist():
            more = bytes(100 << 20) if info.filename == name else b""
            target.writestr(info.filename, source.read(info) + more)
    with pytest.raises(NotExamined, match=f"its {name} is too large"):
        open_classifier(file, options=BYTES)


def test_models_that_call_each_other_without_end_are_refused(tmp_path: Path) -> None:
    def nest(config: dict[str, Any]) -> None:
        inner = json.dumps(config)
        for _ in range(9):
            inner = json.dumps({"class_name": "Sequential", "config": {"layers": [json.loads(inner)] * 2}})
        config.update(json.loads(inner))

    with pytest.raises(NotExamined, match="nested too deeply"):
        open_classifier(changed("sequence-3.keras", tmp_path / "m.keras", nest), options=BYTES)


def test_values_without_bound_are_refused(tmp_path: Path) -> None:
    def grow(config: dict[str, Any]) -> None:
        layer_of(config, "MaxPooling2D").update(
            class_name="UpSampling2D", config={"size": 1_000_000, "name": "max_pooling2d"}
        )

    with pytest.raises(NotExamined, match="makes values that are too large"):
        open_classifier(changed("sequence-3.keras", tmp_path / "m.keras", grow), options=BYTES)


@pytest.mark.parametrize("given", [{"sorted": "up"}, {"a": 1.0, "b": 2.0}])
def test_a_call_with_more_than_is_known_is_told(given: dict[str, Any], tmp_path: Path) -> None:
    def more(config: dict[str, Any]) -> None:
        layer_of(config, "Subtract")["inbound_nodes"][0]["kwargs"] = given

    with pytest.raises(NotExamined, match=r"a Keras model with a call (with|of)"):
        open_classifier(changed("graph-3.keras", tmp_path / "m.keras", more), options=BYTES)


@pytest.mark.parametrize("name", ["sequence-3.h5", "sequence-3.keras"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_half_a_file_is_told_and_not_a_crash(name: str, share: float, tmp_path: Path) -> None:
    content = (FOLDER / name).read_bytes()
    file = tmp_path / name
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((NotExamined, InputError)):
        open_classifier(file, options=BYTES)


def test_damage_anywhere_is_told_and_not_a_crash(tmp_path: Path) -> None:
    content = (FOLDER / "sequence-2.h5").read_bytes()
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(20):
        damaged = bytearray(content)
        for at in rng.integers(0, 4096, 40):
            damaged[at] ^= int(rng.integers(1, 256))
        file = tmp_path / "m.h5"
        file.write_bytes(damaged)
        try:
            open_classifier(file, options=BYTES)
        except DoorwardError as error:  # any other error is a crash
            told += str(file) in str(error)
    assert told > 10, "damage in the first bytes of a file is noticed, and the file named"


def test_weights_that_unpack_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doorward.models.formats.keras.reading.MOST_UNPACKED", 0)
    with pytest.raises(NotExamined, match="unpack to far more than the file holds"):
        open_classifier(FOLDER / "sequence-3.h5", options=BYTES)


def test_a_layer_with_code_is_not_opened(tmp_path: Path) -> None:
    def code(config: dict[str, Any]) -> None:
        layer_of(config, "Dense").update(class_name="Lambda")

    file = changed("sequence-3.keras", tmp_path / "m.keras", code)
    with pytest.raises(UnsafeArtifact, match=r"would execute code: Lambda in m\.keras:config\.json"):
        open_classifier(file, options=BYTES)


def test_without_its_reader_a_keras_file_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    with pytest.raises(NotExamined, match=r"pip install 'doorward\[keras\]'"):
        open_classifier(FOLDER / "sequence-3.h5", options=BYTES)


def test_weights_alone_say_what_to_save(tmp_path: Path) -> None:
    with zipfile.ZipFile(FOLDER / "sequence-3.keras") as archive:
        (tmp_path / "w.h5").write_bytes(io.BytesIO(archive.read("model.weights.h5")).getvalue())
    with pytest.raises(NotExamined, match="holds weights alone; save the whole model"):
        open_classifier(tmp_path / "w.h5", options=BYTES)


def test_a_scan_judges_its_behaviour(tmp_path: Path) -> None:
    file = shutil.copy(FOLDER / "sequence-3.keras", tmp_path / "m.keras")
    outcome = call(
        "scan", str(file), "--detector", "max-margin", "--input-range", "0,255", "--format", "json"
    )
    report = json.loads(outcome.out)
    assert report["subject"]["format"] == "keras"
    assert report["covered"]["behaviour"] == ["max-margin"]
