"""Networks that the user's own code builds, with weights that are read as data."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from doorward.artifacts import Examination
from doorward.artifacts.findings import refuse_code
from doorward.core.contents import cut_off, kind_of, stand_in, weights_kind
from doorward.core.errors import InputError
from doorward.core.files import open_regular
from doorward.models.classifier import Classifier
from doorward.models.formats.input_options import LoadOptions, first_line, read_sidecar, resolve_spec
from doorward.models.formats.wrapping import finish, own_dtype

#: Under which keys checkpoints keep their weights: of torch's own tutorials, Lightning, timm, DeepSpeed.
HOLDERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module",
)  # fmt: skip
#: What DataParallel, torch.compile and wrappers of one attribute put before names.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")


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
    load_weights(module, read_weights(weights, examination), weights)
    sidecar = read_sidecar(weights)
    facts = {} if (dtype := own_dtype(module)) is None else {"dtype": dtype}
    spec = resolve_spec(weights, facts, options.statement(), sidecar.input)
    return finish(
        weights, module, spec, options.labels or sidecar.classes, features=options.features, format="factory"
    )


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


def read_weights(path: Path, examination: Examination | None = None) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, or from a torch file that holds nothing but tensors.

    A checkpoint that keeps its weights under one of `HOLDERS` is looked into.

    Args:
        examination: what was found in the file before; it is not read for code again then.

    Raises:
        InputError: if the file is missing, damaged, or holds no tensors.
        UnsafeArtifact: if reading it would execute code.
    """
    if path.is_file():
        why = "not loaded, because loading it would execute code (save the state_dict alone)"
        refuse_code(path, why, examination)
    return read_examined_weights(path)


def read_examined_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, as `read_weights` does, from a file that was read for code already.

    What the file holds decides how it is read, not its name.

    Raises:
        InputError: if the file is missing, damaged, or holds no tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights")
    if why := stand_in(path) or cut_off(path):
        raise InputError(f"{path}: {why}")
    kind = weights_kind(path)
    if kind is None:
        held = kind_of(path) or "neither a file of torch's nor safetensors, or it is damaged"
        raise InputError(f"{path} is not readable as weights: it is {held}")
    try:
        if kind == "safetensors":
            import safetensors.torch

            return dict(safetensors.torch.load_file(path))
        with open_regular(path) as stream:  # by name, torch would go by the suffix
            value: Any = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle each have errors of their own
        raise InputError(f"{path} is not readable as weights: {_why_unread(path, error)}") from error
    value, keys = _unwrapped(value)
    if not isinstance(value, dict) or not value or not all(isinstance(one, Tensor) for one in value.values()):
        held = f"a dictionary with {keys}" if keys else f"a {type(value).__name__}"
        raise InputError(
            f"{path}: expected tensors by name (a state_dict), it holds {held}; save the state_dict alone: "
            "torch.save(model.state_dict(), FILE)"
        )
    return {str(name): tensor for name, tensor in value.items()}


def _unwrapped(value: Any) -> tuple[Any, str]:
    """Return the weights inside a checkpoint, and the names of what it holds where none are found."""
    while isinstance(value, dict) and not all(isinstance(one, Tensor) for one in value.values()):
        inner = next((value[key] for key in HOLDERS if isinstance(value.get(key), dict)), None)
        if inner is None:
            names = [repr(str(key)) for key in value]
            return value, ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        value = inner
    return value, ""


def _why_unread(path: Path, error: Exception) -> str:
    """Say why torch or safetensors cannot read a file, without advice of theirs that is unsafe."""
    text = str(error)
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return (
            f"it holds more than tensors ({found[1]}), which only its own code could load; save the "
            "state_dict alone: torch.save(model.state_dict(), FILE)"
        )
    if "weights_only" in text.lower() or "weights only" in text.lower():
        kind = kind_of(path)
        return (
            f"it is {kind}" if kind else "it is neither a file of torch's nor safetensors, or it is damaged"
        )
    return first_line(error)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill a module with tensors, each of which must fit.

    Raises:
        InputError: naming some that are missing, left over, or of another shape.
    """
    try:
        own = module.state_dict()
        _fill(module, own, without_prefixes(tensors, set(own)), path)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # both may be the user's own code
        raise InputError(f"{path}: the network does not take the weights: {first_line(error)}") from error


def without_prefixes(tensors: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Return tensors without what wrappers put before all of their names, as far as the network lacks it.

    >>> one = torch.zeros(1)
    >>> list(without_prefixes({"module._orig_mod.fc.weight": one}, {"fc.weight"}))
    ['fc.weight']
    >>> list(without_prefixes({"model.fc.weight": one}, {"model.fc.weight"}))
    ['model.fc.weight']
    """
    names = {name: name for name in tensors}
    while not set(names.values()) & own:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names.values())), None)
        if prefix is None or not names:
            return tensors
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    return {short: tensors[name] for name, short in names.items()}


def _fill(module: nn.Module, own: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    refuse_misfits(
        path,
        missing=sorted(set(own) - set(tensors)),
        unexpected=sorted(set(tensors) - set(own)),
        mismatched=[
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(set(own) & set(tensors))
            if own[name].shape != tensors[name].shape
        ],
    )
    module.load_state_dict(tensors)


def refuse_misfits(path: Path, *, missing: list[str], unexpected: list[str], mismatched: list[str]) -> None:
    """Raise if weights and network do not fit each other.

    Raises:
        InputError: with the first few names.
    """
    kinds = {"lack": missing, "hold unknown": unexpected, "have another shape in": mismatched}
    parts = [
        f"{verb} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for verb, names in kinds.items()
        if names
    ]
    if parts:
        raise InputError(f"{path}: the weights do not fit the network: they {'; they '.join(parts)}")
