"""Networks that the user's own code builds, with weights that are read as data."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from torch import nn

from doorward.artifacts import Examination
from doorward.core.errors import InputError
from doorward.models.classifier import Classifier
from doorward.models.formats.input_options import LoadOptions, first_line, read_sidecar, resolve_spec
from doorward.models.formats.weights import fill, read_weights
from doorward.models.formats.wrapping import finish, own_dtype


def open_factory(
    factory: str, weights: Path, options: LoadOptions, *, examination: Examination | None = None
) -> Classifier:
    """Build a module by the user's own function and fill it with weights.

    This runs the user's code. The weights are read without: safetensors, or a .pt that holds tensors alone.

    Args:
        factory: "package.module:function" or "file.py:function"; the function is called without arguments.
        weights: a .safetensors file, or a state_dict saved by torch.
        options: must state the size, unless `doorward.json` next to the weights does.
        examination: what was found in the weights before; they are not read for code again then.

    Raises:
        InputError: if the function or the weights cannot be used, or do not fit each other.
        UnsafeArtifact: if the weights would execute code.
    """
    module = build_module(factory)
    notes = fill(module, read_weights(weights, examination), weights)
    sidecar = read_sidecar(weights)
    facts = {} if (dtype := own_dtype(module)) is None else {"dtype": dtype}
    spec = resolve_spec(weights, facts, options.statement(), sidecar.input)
    labels = options.labels or sidecar.classes
    classifier = finish(weights, module, spec, labels, features=options.features, format="factory")
    classifier.notes = (*notes, *classifier.notes)
    return classifier


def build_module(factory: str) -> nn.Module:
    """Import the user's function and call it.

    Raises:
        InputError: if there is no such function, or it gives no torch module.
    """
    place, separator, name = factory.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise InputError(f"--factory {factory}: expected package.module:function or file.py:function")
    function = getattr(_import(place), name, None)
    if not callable(function):
        raise InputError(f"--factory {factory}: {place} has no function {name!r}")
    try:
        module = function()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(
            f"--factory {factory}: the function failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"--factory {factory}: expected a torch.nn.Module, the function gave: {type(module).__name__}"
        )
    return module


def _import(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(
            f"--factory: cannot import {place}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return module
