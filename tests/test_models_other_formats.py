"""Model files whose behaviour is not examined: the files are, the reason is told, and what would help."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from command_line import call
from doorward.artifacts import examine
from doorward.core.errors import InputError
from doorward.models import open_classifier
from doorward.models.errors import NotExamined

onnx = pytest.importorskip("onnx")


def archive(*members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in members:
            made.writestr(name, "{}" if name.endswith(".json") else b"")
    return buffer.getvalue()


def of_texts(path: Path) -> None:
    """Write an ONNX model that takes rows of token numbers."""
    helper = onnx.helper
    x = helper.make_tensor_value_info("tokens", onnx.TensorProto.INT64, ["n", 12])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 12])
    node = helper.make_node("Cast", ["tokens"], ["y"], to=onnx.TensorProto.FLOAT)
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def of_sounds(path: Path) -> None:
    """Write an ONNX model that takes a sound and a state."""
    helper = onnx.helper
    given = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 512]) for name in ("sound", "state")
    ]
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 512])
    graph = helper.make_graph([helper.make_node("Add", ["sound", "state"], ["y"])], "g", given, [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def of_maps(path: Path) -> None:
    """Write an ONNX model that gives a map of scores for an image."""
    helper = onnx.helper
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have programs made in another way
        torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())).save(str(path))


def weights(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)


def old_weights(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=False)


FILES = {
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), ("a Keras model", "tf2onnx.convert --keras keras.h5")),
    "new.keras": (archive("config.json", "metadata.json"), ("a Keras model", "tf2onnx")),
    "small.tflite": (b"\x20\0\0\0TFL3" + bytes(64), ("TensorFlow Lite", "--tflite small.tflite")),
    "unnamed.model": (b"\x20\0\0\0TFL3" + bytes(64), ("TensorFlow Lite", "--tflite unnamed.model")),
    "frozen.pb": (b"\x0a\x10" + bytes(64), ("a TensorFlow graph", "--graphdef frozen.pb")),
    "chat.gguf": (b"GGUF\x03\0\0\0" + bytes(64), ("a GGUF file", "no image classifier")),
    "arrays.npy": (None, ("a file of numpy arrays", "--factory")),
    "forest.joblib": (None, ("a joblib file", "skl2onnx")),
    "texts.onnx": (of_texts, ("only its file was examined", "'tokens' of this ONNX model is (any, 12)")),
    "sounds.onnx": (of_sounds, ("only its file was examined", "this ONNX model has 2: sound, state")),
    "maps.onnx": (of_maps, ("only its file was examined", "an output of shape (n, classes)")),
    "net.jit": (script, ("a TorchScript program", "torch.onnx.export")),
    "net.pt": (script, ("a TorchScript program", "torch.jit.load('net.pt')")),
    "weights.pth": (weights, ("weights alone", "--factory package.module:function")),
    "best.pth.tar": (weights, ("weights alone", "--factory package.module:function")),
    "model_best": (weights, ("weights alone", "--factory package.module:function")),
    "old.t7": (old_weights, ("weights alone", "--factory package.module:function")),
    "model.json": (b'{"format": "layers-model", "modelTopology": {}}', ("a TensorFlow.js model", "--tfjs")),
    "net.xml": (b'<?xml version="1.0"?><net name="a"/>', ("an OpenVINO model", "give the .onnx file")),
    "yolo.weights": (bytes(64), ("Darknet's weights", "ONNX")),
    "net.mnn": (bytes(64), ("an MNN model", "ONNX")),
}


def write(name: str, folder: Path) -> Path:
    content, path = FILES[name][0], folder / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    elif name.endswith(".npy"):
        np.save(path, np.arange(6.0))
    else:
        joblib = pytest.importorskip("joblib")
        joblib.dump({"trees": [1, 2]}, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_examined_says_why_and_what_would_help(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotExamined) as told:
        open_classifier(write(name, tmp_path))
    for words in FILES[name][1]:
        assert words in str(told.value)


def test_a_saved_model_is_known_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01" + bytes(64))
    with pytest.raises(NotExamined, match=r"SavedModel; convert it .*--saved-model"):
        open_classifier(tmp_path)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("model.json", "group1-shard1of1.bin"), "a TensorFlow.js model"),
        (("m.xml", "m.bin"), "an OpenVINO model"),
        (("inference.pdmodel", "inference.pdiparams"), "a Paddle model"),
        (("config.json", "model.weights.h5"), "a Keras model"),
        (("checkpoint", "model.ckpt-1.index", "model.ckpt-1.meta"), "a checkpoint of TensorFlow"),
        (("a.mlpackage/Manifest.json",), "a Core ML model"),
    ],
)
def test_folders_of_other_libraries_are_known_by_their_files(
    files: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a.mlpackage" if "/" in files[0] else tmp_path
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"modelTopology": {}, "class_name": "Sequential"}', encoding="utf-8")
    with pytest.raises(NotExamined, match=f"only its files were examined, since it is {kind}"):
        open_classifier(folder)


def test_an_export_next_to_weights_of_transformers_changes_nothing(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "openvino_model.xml", "openvino_model.bin"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="a configuration that names no architecture"):
        open_classifier(tmp_path)


def test_a_folder_of_timm_says_how_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *given: None)
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 96, 96]}
    config = {"architecture": "resnet10t", "num_classes": 7, "pretrained_cfg": own}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(NotExamined) as told:
        open_classifier(tmp_path)
    assert "timm.create_model('resnet10t', num_classes=7)" in str(told.value)
    assert str(told.value).endswith("--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --size 3,96,96")


@pytest.mark.parametrize("name", ["keras.h5", "texts.onnx", "net.pt", "small.tflite", "weights.pth"])
def test_a_scan_reports_on_the_files_and_ends_with_three(name: str, tmp_path: Path) -> None:
    outcome = call("scan", str(write(name, tmp_path)), "--format", "json")
    assert outcome.code == 3
    report = json.loads(outcome.out)
    assert report["verdict"] == "could_not_tell"
    assert report["findings"][0]["detector"] == "unsafe-code"
    assert FILES[name][1][0] in report["reason"]
    assert {one["reason"] for one in report["not_run"]} == {"its behaviour is not examined"}
    assert report["subject"]["sha256"]


def test_torchscript_is_no_alarm_and_no_all_clear(tmp_path: Path) -> None:
    found = examine(write("net.pt", tmp_path))
    assert found.references == []
    assert [doubt.why for doubt in found.doubts] == [
        "is a TorchScript program, which runs when loaded and is not looked into"
    ]


def test_names_of_torchscript_are_no_excuse_elsewhere(tmp_path: Path) -> None:
    """In an archive without a program, a global of that name comes from a module of Python's."""
    pickled = b"\x80\x02c__torch__.net\nNet\n)R."
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/data.pkl", pickled)
        made.writestr("model/version", b"3\n")
    assert [one.name for one in examine(path).references] == ["__torch__.net.Net"]
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
        made.writestr("model/constants.pkl", b"\x80\x02).")
        made.writestr("model/code/__torch__.py", "")
    assert "os.system" in [one.name for one in examine(path).references]
