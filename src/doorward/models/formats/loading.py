"""One way in for every kind of model: a path or a hub id becomes a classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from doorward.artifacts import Examination
from doorward.artifacts.digest import artifact_digest
from doorward.artifacts.findings import examine_for_loading, refuse_code
from doorward.core.contents import stand_in
from doorward.core.errors import InputError
from doorward.core.paths import model_exists
from doorward.models.classifier import Classifier, TorchClassifier
from doorward.models.errors import NotExamined
from doorward.models.formats.companions import read_companions, without_facts
from doorward.models.formats.input_options import (
    LoadOptions,
    read_json,
    read_sidecar,
    resolve_spec,
)
from doorward.models.formats.other_formats import other_format, rebuilt_format, torch_format
from doorward.models.formats.wrapping import name_classes, wrap
from doorward.models.spec import DTYPES

__all__ = ["Format", "LoadOptions", "artifact_digest", "detect_format", "locate", "open_classifier", "wrap"]

Format = Literal["doorward", "huggingface", "keras", "onnx", "tflite", "torch.export", "weights"]
_ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".tar", ".xz", ".bz2", ".7z", ".rar", ".zst"})
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
#: Formats by the endings of files.
SUFFIXES: dict[str, Format] = {
    ".onnx": "onnx",
    ".pt2": "torch.export",
    ".safetensors": "weights",
    ".pt": "weights",
    ".pth": "weights",
    ".bin": "weights",
    ".ckpt": "weights",
    ".pkl": "weights",
}


def open_classifier(
    path: str | Path,
    *,
    options: LoadOptions | None = None,
    factory: str | None = None,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
    examination: Examination | None = None,
) -> Classifier:
    """Open a model to be examined. Nothing that the files hold is executed.

    Args:
        path: a Hugging Face directory or hub id, an .onnx or .pt2 file, a Doorward directory; with
            `factory`, the weights.
        options: what the user states of the model.
        factory: "package.module:function" or "file.py:function" that builds the module: the user's own code.
        weights: the weights of a module that `factory` builds, if `path` does not name them.
        device: where the model shall run.
        examination: what `doorward.artifacts.examine` found in the files, or in the weights with `factory`;
            they are not read for code again then.

    Raises:
        NotExamined: if there is a model of a kind that only the files are examined of.
        InputError: if there is no model, or none that can be read.
        UnsafeArtifact: if loading it would execute code.
    """
    options = options or LoadOptions()
    try:
        if factory is not None:
            from doorward.models.formats.factory import open_factory

            own = open_factory(factory, weights or Path(path), options, examination=examination)
            return _placed(own, device)
        local = locate(str(path))
        examination = examine_for_loading(local, examination)
        kind = detect_format(local)
        advice = "; save its state_dict and use --factory, or export it" if kind == "weights" else ""
        refuse_code(local, f"not loaded, because loading it would execute code{advice}", examination)
        return _placed(_OPENERS[kind](local, options), device)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (RecursionError, MemoryError) as error:
        raise InputError(f"{path}: the model is too large or too deeply nested to be opened") from error


def _placed(classifier: Classifier, device: str | torch.device) -> Classifier:
    """Return a classifier on its device, with weights laid out so that it is fast there."""
    if isinstance(classifier, TorchClassifier):
        classifier.lay_out_for_speed()
    return classifier.to(device)


def locate(path: str) -> Path:
    """Return where a model lies on this machine, fetching it if it is a hub id.

    Raises:
        InputError: if there is nothing at the path, or the hub does not give it.
    """
    local = Path(path)
    if model_exists(path):
        _refuse_stand_in(local)
        return local
    from doorward.models.formats.huggingface import fetch

    return fetch(path)


def _refuse_stand_in(path: Path) -> None:
    """Raise where a model's file was never fetched.

    Raises:
        InputError: naming it.
    """
    files = [path]
    if (path / "config.json").is_file():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
    for file in files:
        if file.is_file() and (why := stand_in(file)):
            raise InputError(f"{file}: {why}")


def detect_format(path: Path) -> Format:
    """Return what kind of model lies at a path, by its suffix or its config.json.

    Raises:
        NotExamined: if it is of a known kind that is not read; the message says what it can be converted to.
        InputError: if it is of none; the message says what can be read.
    """
    suffix = path.suffix.lower()
    if path.is_file() and (rebuilt := rebuilt_format(path)):
        return rebuilt
    other = None if path.is_file() and suffix in SUFFIXES else other_format(path)
    if other is not None:
        raise NotExamined(other.described(path))
    if path.is_file():
        if suffix in SUFFIXES:
            return SUFFIXES[suffix]
        what = "a model is a directory, an .onnx or a .pt2 file, or weights with --factory"
        if suffix in _ARCHIVES:
            what = "it is an archive: unpack it, and give the model in it"
        raise InputError(f"{path}: {what}")
    config = path / "config.json"
    if not config.is_file():
        inside = sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        what = "it holds no model file"
        if (path / "adapter_config.json").is_file():
            what = "it holds an adapter: merge it into its model (merge_and_unload), save that, and give it"
        within = [file.parent for file in path.glob("*/config.json")]
        if within:  # as a trainer leaves its checkpoints
            newest = max(within, key=lambda folder: (folder.stat().st_mtime, folder.name))
            what = f"a folder in it has one: give {newest}"
        if any(file.suffix.lower() in _PICTURES for file in path.glob("*/*")):
            what = "it holds pictures: give it as --clean, and the model first"
        if inside:
            alone = SUFFIXES[Path(inside[0]).suffix.lower()] == "weights"
            what = f"it holds {', '.join(inside[:3])}: give that file{' with --factory' if alone else ''}"
        raise InputError(f"{path}: a model directory has a config.json, this has none; {what}")
    return "doorward" if read_json(config).get("format") == "doorward" else "huggingface"


def _open_doorward(path: Path, options: LoadOptions) -> Classifier:
    from doorward.models.formats.native import open_native
    from doorward.models.formats.signature_check import declares_check, open_signed

    if declares_check(path):
        return open_signed(
            path, options, open_file=lambda file, own: _OPENERS[detect_format(file)](file, own)
        )
    return open_native(path, options)


def _open_huggingface(path: Path, options: LoadOptions) -> Classifier:
    from doorward.models.formats.huggingface import open_huggingface

    return open_huggingface(path, options)


def _open_exported(path: Path, options: LoadOptions) -> Classifier:
    from doorward.models.formats.torch_export import open_exported

    return open_exported(path, options)


def _open_keras(path: Path, options: LoadOptions) -> Classifier:
    from doorward.models.formats.keras.loader import open_keras

    return open_keras(path, options)


def _open_tflite(path: Path, options: LoadOptions) -> Classifier:
    from doorward.models.formats.tflite.loader import open_tflite

    return open_tflite(path, options)


def _open_weights(path: Path, options: LoadOptions) -> Classifier:
    if (path.parent / "config.json").is_file():
        raise InputError(f"{path} holds the weights of the model directory {path.parent}: give the directory")
    other = torch_format(path)
    if other is not None:
        raise NotExamined(other.described(path))
    raise InputError(
        f"{path}: a {path.suffix} file is read as weights alone, and this holds none; they go with the "
        "function that builds their network, --factory package.module:function"
    )


def _open_onnx(path: Path, options: LoadOptions) -> Classifier:
    from doorward.models.formats.onnx.loader import inspect_onnx, load_onnx
    from doorward.models.formats.onnx.metadata import stated_input, stated_names

    info = inspect_onnx(path)
    sidecar, companions = read_sidecar(path), read_companions(path)
    layout = options.layout or sidecar.input.get("layout") or info.layout
    facts: dict[str, Any] = {"layout": layout}
    facts |= zip(("channels", "height", "width"), info.shape_in(layout or "NCHW"), strict=True)
    facts["dtype"] = info.input.dtype if info.input.dtype in DTYPES else None
    known = {name: value for name, value in facts.items() if value is not None}
    stated = [without_facts(one, known) for one in (companions.input, stated_input(info.metadata))]
    spec = resolve_spec(path, known, options.statement(), sidecar.input, *stated)
    labels = options.labels or sidecar.classes or companions.classes
    classifier = load_onnx(path, spec, labels, features=options.features)
    if labels is None:
        name_classes(classifier, stated_names(info.metadata))
    classifier.notes = (*companions.notes, *classifier.notes)
    return classifier


_OPENERS: dict[Format, Callable[[Path, LoadOptions], Classifier]] = {
    "doorward": _open_doorward,
    "huggingface": _open_huggingface,
    "keras": _open_keras,
    "onnx": _open_onnx,
    "tflite": _open_tflite,
    "torch.export": _open_exported,
    "weights": _open_weights,
}
