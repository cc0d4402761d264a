"""Write a classifier's network in formats that other tools read, with `doorward.json` next to it."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from doorward.core.errors import InputError, MissingExtra
from doorward.models.classifier import TorchClassifier, evaluating
from doorward.models.formats.input_options import SIDECAR, Sidecar, first_line, trial_inputs


def export_onnx(classifier: TorchClassifier, path: Path, *, opset: int = 18) -> Path:
    """Write an ONNX file with a batch of any size; return its path.

    Raises:
        InputError: if the network cannot be exported.
        MissingExtra: if the packages onnx and onnxscript are not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "onnx", "writing ONNX files")
    with _exporting(classifier, path) as x:
        torch.onnx.export(
            classifier.module,
            (x,),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=opset,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    return path


def export_pt2(classifier: TorchClassifier, path: Path) -> Path:
    """Write a `torch.export` program with a batch of any size; return its path.

    Raises:
        InputError: if the network cannot be exported.
    """
    with _exporting(classifier, path) as x:
        program = torch.export.export(
            classifier.module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        program.example_inputs = None  # images have no business in a model file
        torch.export.save(program, path)
    return path


@contextmanager
def _exporting(classifier: TorchClassifier, path: Path) -> Iterator[torch.Tensor]:
    """Give two images to trace with, quietly and in evaluation mode, and write the description afterwards."""
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad(), evaluating(classifier.module):
            warnings.simplefilter("ignore")
            yield classifier.spec.to_model(trial_inputs(classifier.spec, 2).to(classifier.device))
    except Exception as error:  # torch's exporters raise many kinds
        if made:
            shutil.rmtree(path.parent, ignore_errors=True)
        raise InputError(f"{path}: this network cannot be exported: {first_line(error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    stated = classifier.spec.model_dump(mode="json", exclude={"assumed", *classifier.spec.assumed})
    sidecar = Sidecar(input=stated, classes=classifier.classes)
    (path.parent / SIDECAR).write_text(sidecar.model_dump_json(indent=2) + "\n", encoding="utf-8")
