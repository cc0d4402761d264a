"""One way out for every torch classifier: a directory that `open_classifier` opens again, or a file in it."""

from __future__ import annotations

from pathlib import Path

from doorward.core.errors import InputError
from doorward.models.classifier import TorchClassifier
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.models.formats.input_options import SIDECAR
from doorward.models.formats.native import CONFIG, WEIGHTS, save_native
from doorward.models.formats.signature_check import SignatureWrapper, save_signed
from doorward.models.networks import NAMES, build

PROGRAM, GRAPH = "model.pt2", "model.onnx"


def save_classifier(classifier: TorchClassifier, directory: Path) -> Path:
    """Write a classifier and return the path to open.

    That is a Doorward directory for networks of ours and for any that checks signatures, else a
    `torch.export` file in the directory, and where there can be none (some networks that came from ONNX
    files) an ONNX file.

    Raises:
        InputError: if the directory cannot be written, or the network not be exported.
    """
    if isinstance(classifier.module, SignatureWrapper):
        return save_signed(classifier, directory, save=save_classifier)
    name = is_native(classifier)
    if name is not None:
        return save_native(
            classifier.module,
            architecture=name,
            spec=classifier.spec,
            classes=classifier.classes,
            directory=directory,
        )
    try:
        try:
            return export_pt2(classifier, directory / PROGRAM)
        except InputError as first:
            try:
                return export_onnx(classifier, directory / GRAPH)
            except InputError:
                raise first from first.__cause__
    except OSError as error:
        raise InputError(f"{directory}: cannot write the model: {error.strerror or error}") from error


def saved_files(directory: Path) -> list[Path]:
    """Return where `save_classifier` writes in a directory, whether or not anything is there."""
    return [directory / name for name in (CONFIG, WEIGHTS, PROGRAM, GRAPH, SIDECAR)]


def is_native(classifier: TorchClassifier) -> str | None:
    """Return the name of the architecture of ours that a classifier is of, None if it is of none."""
    name, spec = classifier.architecture, classifier.spec
    if name is None or NAMES.get(name) != spec.modality:
        return None
    own = build(name, spec, classes=len(classifier.classes))
    if type(own) is not type(classifier.module):
        return None
    shapes = [
        {key: tensor.shape for key, tensor in module.state_dict().items()}
        for module in (own, classifier.module)
    ]
    return name if shapes[0] == shapes[1] else None
