"""Files of weights: tensors by name, found in what training code saves with them, and fitted to a network."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doorward.artifacts import Examination
from doorward.artifacts.findings import refuse_code
from doorward.core.contents import cut_off, kind_of, stand_in, weights_kind
from doorward.core.errors import InputError
from doorward.core.files import open_regular
from doorward.core.formatting import joined
from doorward.models.formats.input_options import first_line

#: Names under which training code keeps weights in a checkpoint, those that are most likely meant first.
_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "module",
)
#: How deep weights may lie in a checkpoint, and parts of a name that may be a wrapper's.
_DEEPEST, _PARTS = 2, 4
#: Ends of names of numbers that tools of measurement leave in a network, and that no layer has.
_COUNTERS = ("total_ops", "total_params")
#: End of the name of a count that torch of before 0.4.1 did not save, and that changes no output.
_TRACKED = "num_batches_tracked"

Tensors = dict[str, Tensor]


class _LeftOut:
    """Stands for any object in a checkpoint that is no tensor: it is made and filled without its own code."""

    def __new__(cls, *given: Any) -> _LeftOut:
        return object.__new__(cls)

    def __init__(self, *given: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def read_weights(path: Path, examination: Examination | None = None) -> dict[str, Tensors]:
    """Read tensors by name, from a safetensors file or a file of torch, without running anything in it.

    Args:
        examination: what was found in the file before; it is not read for code again then.

    Returns:
        What may be the weights, by the name that the checkpoint has for them: "" for the file itself.

    Raises:
        InputError: if the file is missing, damaged, or holds no tensors.
        UnsafeArtifact: if reading it would execute code.
    """
    if path.is_file():
        why = "not loaded, because loading it would execute code (save the state_dict alone)"
        refuse_code(path, why, examination)
    return _read(path)


def read_examined_weights(path: Path) -> Tensors:
    """Read the likeliest tensors by name from a file that was read for code already.

    Raises:
        InputError: if the file is missing, damaged, or holds no tensors.
    """
    return next(iter(_read(path).values()))


def _read(path: Path) -> dict[str, Tensors]:
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights")
    if why := stand_in(path) or cut_off(path):
        raise InputError(f"{path}: {why}")
    kind = weights_kind(path)  # by what it holds, not by its name
    if kind is None:
        held = kind_of(path) or "neither a file of torch's nor safetensors, or it is damaged"
        raise InputError(f"{path} is not readable as weights: it is {held}")
    try:
        if kind == "safetensors":
            import safetensors.torch

            value: Any = dict(safetensors.torch.load_file(path))
        else:
            value = _load(path)
    except InputError:
        raise
    except Exception as error:  # safetensors, zipfile and pickle each have errors of their own
        raise InputError(f"{path} is not readable as weights: {first_line(error)}") from error
    found = dict(_sets(value))
    if not found:
        held = f"a {type(value).__name__}"
        if isinstance(value, dict):
            held += f" of {', '.join(repr(key) for key in list(value)[:5])}" if value else " that is empty"
        raise InputError(f"{path}: expected tensors by name (a state_dict), it holds {held}")
    order = {key: i for i, key in enumerate(_KEYS)}
    return dict(sorted(found.items(), key=lambda one: order.get(one[0].rpartition(".")[2], len(order))))


def _load(path: Path) -> Any:
    """Load a file of torch; what is no tensor in it is left out."""
    try:
        return _torch_load(path)
    except pickle.UnpicklingError as error:
        names = _other_objects(path)
        allowed: list[Any] = [(_LeftOut, name) for name in names]
        try:
            with torch.serialization.safe_globals(allowed):
                return _torch_load(path)
        except pickle.UnpicklingError:
            what = f" ({', '.join(names[:3])})" if names else ""
            raise InputError(
                f"{path} is not readable as weights: it holds objects other than tensors{what}; save the "
                "weights alone: torch.save(model.state_dict(), FILE)"
            ) from error


def _torch_load(path: Path) -> Any:
    with open_regular(path) as stream:  # by name, torch would go by the suffix
        return torch.load(stream, map_location="cpu", weights_only=True)


def _other_objects(path: Path) -> list[str]:
    """Return what classes and functions a file of torch names that torch does not know as safe."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # torch's own reader of the format before 1.6 raises many kinds, or has none
        return []


def _sets(value: Any, key: str = "") -> Iterable[tuple[str, Tensors]]:
    """Yield every dictionary of tensors that lies in a checkpoint, with the name that it has there."""
    if not isinstance(value, dict) or not value:
        return
    tensors = {str(name): one for name, one in value.items() if isinstance(one, Tensor)}
    if len(tensors) == len(value):
        yield key, tensors
        return
    if key.count(".") < _DEEPEST:
        for name, one in value.items():
            yield from _sets(one, f"{key}.{name}" if key else str(name))


# --- fitting -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """Weights by the names that a network has for them.

    Attributes:
        tensors: those to be loaded.
        left: names of others, which belong to no part of the network.
        known: how many of the network's own names are among them.
    """

    tensors: Tensors
    left: tuple[str, ...]
    known: int


def fill(module: nn.Module, sets: Mapping[str, Tensors], path: Path) -> tuple[str, ...]:
    """Fill a module with those weights of a file that fit it; return what is to be told of the choice.

    Raises:
        InputError: naming some that are missing, left over, or of another shape.
    """
    own = _own(module, path)
    fitted = {key: fit(tensors, own) for key, tensors in sets.items()}
    taken = max(fitted, key=lambda key: fitted[key].known)
    chosen, notes = fitted[taken], []
    load_weights(module, chosen.tensors, path)
    others = [repr(key) for key, one in fitted.items() if key != taken and one.known == chosen.known]
    if others:
        notes.append(f"{path.name} holds several sets of weights: {taken!r} was taken, not {joined(others)}")
    if chosen.left:
        few = ", ".join(chosen.left[:3]) + (f" and {len(chosen.left) - 3} more" * (len(chosen.left) > 3))
        notes.append(f"not loaded from {path.name}, since they are not the network's: {few}")
    return tuple(notes)


def fit(tensors: Tensors, own: Mapping[str, Tensor]) -> Fitted:
    """Name weights as a network does: without, or with, what a wrapper puts before all names.

    >>> weights = {"module.a": torch.ones(1), "count": torch.ones(1)}
    >>> fit(weights, {"a": torch.ones(1)}).left
    ('count',)
    """
    known = _known(tensors, own)
    best = max(_beginnings(tensors), key=lambda start: _known(_without(tensors, start), own), default="")
    if best and _known(_without(tensors, best), own) > known:
        left = tuple(name for name in tensors if not name.startswith(best))
        inner = _without(tensors, best)
        return Fitted(inner, left, _known(inner, own))
    for start in _beginnings(own) if known == 0 else ():
        inside = {start + name: tensor for name, tensor in tensors.items()}
        if set(own) <= set(inside):
            return Fitted(inside, (), len(own))
    return Fitted(tensors, (), known)


def _beginnings(names: Iterable[str]) -> list[str]:
    """Return what may be a wrapper's part of names, "a." and "a.b." of "a.b.c", the shortest first."""
    found = {
        ".".join(parts[:depth]) + "."
        for parts in (name.split(".") for name in names)
        for depth in range(1, min(len(parts), _PARTS + 1))
    }
    return sorted(found, key=lambda start: (start.count("."), start))


def _without(tensors: Tensors, start: str) -> Tensors:
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _known(tensors: Collection[str], own: Mapping[str, Tensor]) -> int:
    return sum(name in own for name in tensors)


def load_weights(module: nn.Module, tensors: Tensors, path: Path) -> None:
    """Fill a module with tensors, each of which must fit.

    Raises:
        InputError: naming some that are missing, left over, or of another shape.
    """
    own = _own(module, path)
    given = {name: one for name, one in tensors.items() if name.rpartition(".")[2] not in _COUNTERS}
    given = {name: one for name, one in own.items() if name.endswith(_TRACKED)} | given
    refuse_misfits(
        path,
        missing=sorted(set(own) - set(given)),
        unexpected=sorted(set(given) - set(own)),
        mismatched=[
            f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(set(own) & set(given))
            if own[name].shape != given[name].shape
        ],
    )
    try:
        module.load_state_dict(given)
    except (Exception, SystemExit) as error:  # it may be the user's own code
        raise InputError(f"{path}: the network does not take the weights: {first_line(error)}") from error


def _own(module: nn.Module, path: Path) -> Tensors:
    """Return the tensors that a network has.

    Raises:
        InputError: if its own code fails.
    """
    try:
        return {str(name): one for name, one in module.state_dict().items() if isinstance(one, Tensor)}
    except (Exception, SystemExit) as error:  # it may be the user's own code
        raise InputError(f"{path}: the network does not take the weights: {first_line(error)}") from error


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
