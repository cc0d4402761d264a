"""A classifier of whatever a Python user has at hand: a path, a module, a function, a wrapper of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doorward.core.errors import InputError
from doorward.models.classifier import Classifier
from doorward.models.errors import SizeUnknown
from doorward.models.formats.input_options import LoadOptions, resolve_spec
from doorward.models.formats.loading import open_classifier
from doorward.models.formats.wrapping import wrap

TAKES = (
    "a path or hub id, a torch module, an object whose .model is one (as of the Adversarial Robustness "
    "Toolbox), a function of a batch of images, or a Classifier"
)


def as_classifier(
    given: Any,
    *,
    size: tuple[int, int, int] | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Return a classifier of whatever answers images.

    Args:
        given: see `TAKES`. A module of timm says itself how images are normalised.
        size: (channels, height, width) of its images, where it does not say so.
        classes: class names; numbers if None.

    Raises:
        InputError: if it is none of these, or its size is not known.
    """
    if isinstance(given, Classifier):
        return given
    if isinstance(given, str | Path):
        options = LoadOptions(size=size, labels=None if classes is None else tuple(classes))
        return open_classifier(given, options=options, device=device)
    model, told = _unwrapped(given)
    if not isinstance(model, nn.Module) and not callable(model):
        kind = f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
        raise InputError(f"model: expected {TAKES}, got {'None' if given is None else kind}")
    if isinstance(given, type):
        raise InputError(f"model: expected a model, got the class {given.__qualname__}: make one of it first")
    stated: dict[str, Any] = dict(zip(("channels", "height", "width"), size or (), strict=False)) or told
    if not stated:
        raise SizeUnknown(
            f"{type(model).__name__}: nothing says how large its images are; give size=(channels, height, "
            "width), or images"
        )
    normalised = {name: told[name] for name in ("mean", "std") if name in told}
    if not normalised and not (told.keys() - {"channels", "height", "width"}):
        return wrap(model, size=(stated["channels"], stated["height"], stated["width"]), classes=classes)
    spec = resolve_spec(type(model).__name__, {}, stated | normalised | {"layout": "NCHW"})
    return wrap(model, spec=spec, classes=classes)


def _unwrapped(given: Any) -> tuple[Any, dict[str, Any]]:
    """Return the module or function inside an object, and what the object states of its input."""
    told: dict[str, Any] = {}
    model = given
    inner = getattr(given, "model", None)
    if not isinstance(given, nn.Module) and isinstance(inner, nn.Module):
        shape = getattr(given, "input_shape", None)
        if isinstance(shape, tuple) and len(shape) == 3:
            told = dict(zip(("channels", "height", "width"), map(int, shape), strict=True))
        model = inner
        wrapped = getattr(inner, "_model", None)  # what the toolbox puts around a module gives lists
        if type(inner).__module__.startswith("art.") and isinstance(wrapped, nn.Module):
            model = wrapped
    own = getattr(model, "pretrained_cfg", None)
    if isinstance(own, dict):
        told = _of_timm(own) or told
    return model, told


def _of_timm(own: dict[str, Any]) -> dict[str, Any]:
    """Return what a module of timm states of its input."""
    told: dict[str, Any] = {}
    size = own.get("input_size")
    if isinstance(size, tuple | list) and len(size) == 3:
        told = dict(zip(("channels", "height", "width"), map(int, size), strict=True))
    for name in ("mean", "std"):
        if told and isinstance(own.get(name), tuple | list):
            told[name] = tuple(map(float, own[name]))
    return told
