"""Model files of other libraries: what they are, and what those that are not read can be converted to."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from doorward.artifacts.files import is_torchscript
from doorward.core.files import open_regular

_TF2ONNX = "convert it to ONNX: python -m tf2onnx.convert --{option} {name} --output model.onnx"
_NO_PICTURES = "it holds no image classifier that could be examined"
_SKLEARN = (
    "a model of scikit-learn takes rows of numbers: only its file is examined; "
    "with skl2onnx it becomes ONNX, without pickles"
)
_WEIGHTS = (
    "give the function that builds its network with --factory package.module:function, "
    "or export it where it was made: torch.onnx.export(model, images, 'model.onnx')"
)
_TORCHSCRIPT = (
    "export the network that it was made of with torch.onnx.export, or load it where nothing can be harmed, "
    "torch.jit.load({name!r}), and export that"
)


@dataclass(frozen=True)
class OtherFormat:
    """A format that is not examined.

    Attributes:
        kind: what it is, with its article.
        advice: what would let its behaviour be examined, or why nothing would; `{name}` is the file's name.
    """

    kind: str
    advice: str

    def described(self, path: Path, why: str = "") -> str:
        """Return why a file's behaviour is not examined, in one line; `why` follows what it is."""
        advice = self.advice.format(name=path.name)
        return f"{path}: only its files were examined, since it is {self.kind}{why}; {advice}"


KERAS = OtherFormat("a Keras model", _TF2ONNX.format(option="keras", name="{name}"))
TFLITE = OtherFormat("a TensorFlow Lite model", _TF2ONNX.format(option="tflite", name="{name}"))
_SAVED_MODEL = OtherFormat("a TensorFlow SavedModel", _TF2ONNX.format(option="saved-model", name="{name}"))
_FROZEN = OtherFormat(
    "a TensorFlow graph",
    "convert it to ONNX: python -m tf2onnx.convert --graphdef {name} --output model.onnx --inputs NAME:0 "
    "--outputs NAME:0",
)
_GGUF = OtherFormat("a GGUF file of a language model", _NO_PICTURES)
_SCRIPT = OtherFormat("a TorchScript program", _TORCHSCRIPT)
_PADDLE = OtherFormat(
    "a Paddle model", "convert it to ONNX: paddle2onnx --model_dir . --save_file model.onnx"
)
_ARRAYS = OtherFormat(
    "a file of numpy arrays", "write the weights as .safetensors and give them with --factory"
)

_OPENVINO = OtherFormat("an OpenVINO model", "give the .onnx file that it was made of")
_CORE_ML = OtherFormat("a Core ML model", "convert what it was made of to ONNX")
_TFJS = OtherFormat(
    "a TensorFlow.js model",
    "convert it to ONNX: python -m tf2onnx.convert --tfjs {name} --output model.onnx",
)
_CHECKPOINT = OtherFormat(
    "a checkpoint of TensorFlow",
    "convert it to ONNX: python -m tf2onnx.convert --checkpoint NAME.meta --output model.onnx "
    "--inputs NAME:0 --outputs NAME:0",
)
_SOURCE = "convert what it was made of to ONNX"

_SUFFIXES: dict[str, OtherFormat] = {
    ".h5": KERAS,
    ".hdf5": KERAS,
    ".keras": KERAS,
    ".tflite": TFLITE,
    ".lite": TFLITE,
    ".pb": _FROZEN,
    ".gguf": _GGUF,
    ".ggml": _GGUF,
    ".joblib": OtherFormat("a joblib file", _SKLEARN),
    ".pickle": OtherFormat("a pickle", _SKLEARN),
    ".dill": OtherFormat("a pickle", _SKLEARN),
    ".jit": _SCRIPT,
    ".ts": _SCRIPT,
    ".torchscript": _SCRIPT,
    ".ptl": _SCRIPT,
    ".pdmodel": _PADDLE,
    ".pdiparams": _PADDLE,
    ".caffemodel": OtherFormat("a Caffe model", "convert it to ONNX"),
    ".prototxt": OtherFormat("a Caffe model's description", _SOURCE),
    ".mlmodel": _CORE_ML,
    ".mnn": OtherFormat("an MNN model", _SOURCE),
    ".rknn": OtherFormat("an RKNN model", _SOURCE),
    ".hef": OtherFormat("a Hailo model", _SOURCE),
    ".kmodel": OtherFormat("a Kendryte model", _SOURCE),
    ".params": OtherFormat("a file of MXNet's weights", "convert the model to ONNX with MXNet"),
    ".weights": OtherFormat("a file of Darknet's weights", "convert the model to ONNX"),
    ".index": _CHECKPOINT,
    ".meta": _CHECKPOINT,
    ".ort": OtherFormat("an ONNX Runtime model", "give the .onnx file that it was made of"),
    ".engine": OtherFormat("a TensorRT engine", "give the .onnx file that it was made of"),
    ".plan": OtherFormat("a TensorRT engine", "give the .onnx file that it was made of"),
    ".trt": OtherFormat("a TensorRT engine", "give the .onnx file that it was made of"),
    ".npz": _ARRAYS,
    ".npy": _ARRAYS,
    ".msgpack": OtherFormat("a file of Flax's weights", "convert the model with transformers, or export it"),
}
_HEADS: dict[bytes, OtherFormat] = {b"\x89HDF\r\n\x1a\n": KERAS, b"GGUF": _GGUF}
#: Files by which a folder is known that has none of transformers.
_MEMBERS: dict[str, OtherFormat] = {
    "*.pdmodel": _PADDLE,
    "model.weights.h5": KERAS,
    "*.ckpt*.index": _CHECKPOINT,
}
_OF_TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Bytes of a text that are looked at, and words in them that TensorFlow.js writes.
_HEAD, _TFJS_WORDS = 1 << 12, (b'"modelTopology"', b'"layers-model"', b'"graph-model"')
#: Bytes with which files of torch begin that were saved before 1.6: a pickle of torch's magic number.
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
#: Suffixes of weights for which torch may have written a program or a whole module.
_TORCH = OtherFormat("a file of weights alone, or of a pickled module", _WEIGHTS)


def other_format(path: Path) -> OtherFormat | None:
    """Return what a file or folder is whose behaviour is not examined, None if it is nothing known."""
    if path.is_dir():
        return _of_folder(path)
    return _by_content(path) or _SUFFIXES.get(path.suffix.lower()) or _by_text(path)


def rebuilt_format(path: Path) -> Literal["keras", "tflite"] | None:
    """Return which format a file is of, by its content, that is read as data and rebuilt of torch layers."""
    kind = _by_content(path)
    return "keras" if kind is KERAS else "tflite" if kind is TFLITE else None


def _of_folder(folder: Path) -> OtherFormat | None:
    if any((folder / f"saved_model.{end}").is_file() for end in ("pb", "pbtxt")):
        return _SAVED_MODEL
    if any((folder / name).is_file() for name in _OF_TRANSFORMERS):
        return None
    if folder.suffix.lower() == ".mlpackage":
        return _CORE_ML
    for pattern, kind in _MEMBERS.items():
        if any(folder.glob(pattern)):
            return kind
    if any(file.with_suffix(".bin").is_file() for file in folder.glob("*.xml")):
        return _OPENVINO
    return _by_text(folder / "model.json")


def _by_text(path: Path) -> OtherFormat | None:
    """Return what a file of text is by the words that it begins with."""
    suffix = path.suffix.lower()
    if suffix not in (".json", ".xml") or not path.is_file():
        return None
    try:
        with open_regular(path) as stream:
            head = stream.read(_HEAD)
    except OSError:
        return None
    if suffix == ".xml":
        return _OPENVINO if b"<net" in head else None
    return _TFJS if any(word in head for word in _TFJS_WORDS) else None


def torch_format(path: Path) -> OtherFormat | None:
    """Return what a file named as torch's is: a TorchScript program, or weights; None if it is neither."""
    return _by_content(path) or (_TORCH if _holds_weights(path) else None)


def _holds_weights(path: Path) -> bool:
    """Return whether a file begins as torch's do (a zip archive, a pickle), or as safetensors."""
    try:
        with open_regular(path) as stream:
            head = stream.read(9)
            size = stream.seek(0, 2)
    except OSError:
        return False
    length = int.from_bytes(head[:8], "little")
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")) or (
        head[8:] == b"{" and 0 < length <= size - 8
    )


def _by_content(path: Path) -> OtherFormat | None:
    try:
        with open_regular(path) as stream:
            head = stream.read(16)
            if head[4:8] == b"TFL3":
                return TFLITE
            if head.startswith(_OLD_TORCH):
                return _TORCH
            if head.startswith(b"PK\x03\x04"):
                return _of_archive([info.filename for info in zipfile.ZipFile(stream).infolist()])
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    return next((kind for start, kind in _HEADS.items() if head.startswith(start)), None)


def _of_archive(names: list[str]) -> OtherFormat | None:
    if is_torchscript(names):
        return _SCRIPT
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return _TORCH
    return KERAS if {"config.json", "metadata.json"} <= set(names) else None
