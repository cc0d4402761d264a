"""Write a mended model: in the format of the original where that can be, all at once, and never over it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from doorward.core.errors import InputError
from doorward.core.files import is_inside
from doorward.core.records import Record
from doorward.models import TorchClassifier, open_classifier
from doorward.models.adapted import plain_module
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.models.formats.input_options import first_line, trial_inputs
from doorward.models.formats.loading import locate
from doorward.models.formats.saving import GRAPH, PROGRAM, save_classifier

#: The record of what was done, next to the model.
RECORD = "repair.json"
#: Files of a Hugging Face folder that say how inputs are made, and not what the network holds.
_CARRIED = ("*.json", "*.txt", "*.model")
#: How far the outputs of the model that is read back may be from those of the one that was written.
SAME = 1e-3


def check_place(out: Path, model: str) -> None:
    """Raise unless a folder is apart from the original model.

    Raises:
        InputError: if it is the original, lies in it, or holds it.
    """
    original = Path(model)
    if not original.exists():
        return
    if is_inside(out, original) or is_inside(original, out):
        raise InputError(f"{out} is the model itself, or lies in it or around it: name another folder as OUT")


def write_mended(
    classifier: TorchClassifier, report: Record, out: Path, pages: Mapping[str, str] | None = None
) -> Path:
    """Write a mended model and the record into a folder, and return the model's path.

    Args:
        pages: further texts to be written, by the names of their files.

    Raises:
        InputError: if it cannot be written, or is not the same when it is read back.
    """
    model = str(getattr(report, "model", ""))
    check_place(out, model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doorward-", dir=out.parent) as name:
            made = Path(name) / out.name
            made.mkdir()
            saved = _save(classifier, model, made)
            (made / RECORD).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            for page, text in (pages or {}).items():
                (made / page).write_text(text, encoding="utf-8", newline="\n")
            _move(made, out)
    except OSError as error:
        raise InputError(f"{out}: cannot write the model: {error.strerror or error}") from error
    return out if saved == made else out / saved.name


def _save(classifier: TorchClassifier, model: str, folder: Path) -> Path:
    """Write a model in its own format, or else in one that can hold it, and return its path.

    Raises:
        InputError: if no format gives the same model back.
    """
    ways: dict[str, Callable[[], Path]] = {
        "huggingface": lambda: _save_huggingface(classifier, locate(model), folder),
        "onnx": lambda: export_onnx(classifier, folder / GRAPH),
        "torch.export": lambda: export_pt2(classifier, folder / PROGRAM),
        "doorward": lambda: save_classifier(classifier, folder),
    }
    first: InputError | None = None
    for name in dict.fromkeys([classifier.format, "doorward", "onnx"]):
        if name not in ways:
            continue
        try:
            saved = ways[name]()
            _check(classifier, saved)
        except InputError as error:
            first = first or error
            for file in folder.glob("*"):
                file.unlink()
            folder.mkdir(exist_ok=True)
            continue
        return saved
    assert first is not None
    raise first


def _save_huggingface(classifier: TorchClassifier, original: Path, folder: Path) -> Path:
    network: Any = next(
        (m for m in plain_module(classifier.module).modules() if hasattr(m, "save_pretrained")), None
    )
    if network is None:
        raise InputError(f"{folder}: the network is none of Hugging Face")
    try:
        network.save_pretrained(folder)
    except Exception as error:  # of transformers, which raises many kinds
        raise InputError(f"{folder}: cannot write the model: {first_line(error)}") from error
    for pattern in _CARRIED:
        for file in original.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json") and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    return folder


def _check(classifier: TorchClassifier, saved: Path) -> None:
    """Raise unless what was written gives what the model gives.

    Raises:
        InputError: if not.
    """
    again = open_classifier(saved)
    x = trial_inputs(classifier.spec, classifier.batch or 4)
    ours, theirs = classifier.logits(x.to(classifier.device)).cpu(), again.logits(x)
    if again.classes != classifier.classes or ours.shape != theirs.shape:
        raise InputError("the mended model has other classes when it is read back; nothing was written")
    if bool((ours - theirs).abs().amax() > SAME * ours.abs().amax().clamp_min(1)):
        raise InputError("the mended model gives other outputs when it is read back; nothing was written")


def _move(made: Path, out: Path) -> None:
    """Move a folder to its place, or its files into a folder that is there."""
    if out.is_dir() and any(out.iterdir()):
        for file in made.iterdir():
            os.replace(file, out / file.name)
        return
    if out.is_dir():
        out.rmdir()
    os.replace(made, out)
