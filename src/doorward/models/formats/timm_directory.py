"""Directories that timm writes: its own code builds the network, and the configuration states the images."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from doorward.core.errors import InputError
from doorward.models.classifier import Classifier
from doorward.models.errors import NotExamined
from doorward.models.formats.input_options import LoadOptions, first_line, read_sidecar, resolve_spec
from doorward.models.formats.weights import load_weights, read_examined_weights
from doorward.models.formats.wrapping import finish

#: Key of a configuration that timm alone writes.
KEY = "pretrained_cfg"
#: A name of timm's own; others name a place to fetch a model from.
_NAME = re.compile(r"\w+(\.\w+)*")
#: Arguments of a network that name files or other models.
_ELSEWHERE = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
#: Pillow's numbers of timm's names of filters.
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
#: What transformers puts before the names of weights when it saves a network of timm.
_PREFIX = "timm_model."
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def open_timm(path: Path, config: Mapping[str, Any], options: LoadOptions) -> Classifier:
    """Open a directory of timm with timm itself, which is to be installed. Nothing is fetched.

    Raises:
        NotExamined: if timm is not installed.
        InputError: if timm cannot build the network, or the weights do not fit it.
    """
    stated = config[KEY] if isinstance(config[KEY], dict) else {}
    if importlib.util.find_spec("timm") is None:
        raise NotExamined(_without_timm(path, config, stated))
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise InputError(f"{path}: no weights: expected one of {', '.join(_WEIGHTS)}")
    tensors = read_examined_weights(weights)
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    network = _build(path, config)
    load_weights(network, tensors, weights)
    sidecar = read_sidecar(path)
    spec = resolve_spec(
        path, {"layout": "NCHW", "output": "logits"}, options.statement(), sidecar.input, describe(stated)
    )
    names = config.get("label_names")
    labels = tuple(map(str, names)) if isinstance(names, list) else None
    return finish(
        path,
        network,
        spec,
        options.labels or sidecar.classes or labels,
        features=options.features,
        format="huggingface",
        architecture=f"timm {config['architecture']}",
        trials=2,
    )


def describe(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration of timm states of the images, as fields of an input spec.

    Source: timm.data.transforms_factory.transforms_imagenet_eval
    """
    found = {name: tuple(stated[name]) for name in ("mean", "std") if isinstance(stated.get(name), list)}
    size = stated.get("input_size")
    if not isinstance(size, list) or len(size) != 3:
        return found
    channels, height, width = size
    fields: dict[str, Any] = found | {"channels": channels, "height": height, "width": width}
    mode, share = stated.get("crop_mode") or "center", stated.get("crop_pct") or 0.875
    filter_name = stated.get("interpolation") or "bilinear"
    if mode not in ("center", "squash") or filter_name not in _FILTERS or not isinstance(share, int | float):
        return fields  # images have to be given at their final size
    scaled = [math.floor(side / share) for side in (height, width)]
    shorter = mode == "center" and height == width
    resize = {"height": scaled[0], "width": scaled[1], "shortest_edge": shorter, "crop": (height, width)}
    return fields | {"resize": resize | {"resample": _FILTERS[filter_name]}}


def _build(path: Path, config: Mapping[str, Any]) -> nn.Module:
    """Return the network that a configuration names, with random weights."""
    name, arguments = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        raise InputError(f"{path / 'config.json'}: expected the name of a network of timm, it has {name!r}")
    if elsewhere := sorted(_ELSEWHERE & set(arguments)):
        raise InputError(f"{path / 'config.json'}: {elsewhere[0]} in model_args names another file or model")
    count = config.get("num_classes", config.get("num_labels"))
    timm = importlib.import_module("timm")
    try:
        network = timm.create_model(name, pretrained=False, num_classes=count, **arguments)
    except Exception as error:  # names, arguments and versions: many kinds
        raise InputError(f"{path}: timm {timm.__version__} cannot build it: {first_line(error)}") from error
    assert isinstance(network, nn.Module)
    return network.eval()


def _without_timm(path: Path, config: Mapping[str, Any], stated: Mapping[str, Any]) -> str:
    """Return what to do with a directory of timm where timm is missing, with what it states of images."""
    name, count = config.get("architecture"), config.get("num_classes")
    given = [
        f"--{option} {','.join(map(str, stated[option]))}"
        for option in ("mean", "std")
        if isinstance(stated.get(option), list)
    ]
    size = stated.get("input_size")
    given += [f"--size {','.join(map(str, size))}"] if isinstance(size, list) else []
    files = (path / "model.safetensors", path / "pytorch_model.bin")
    weights = next((file for file in files if file.is_file()), files[0])
    return (
        f"{path}: a model of timm: install timm, which opens it; or write a function that returns "
        f"timm.create_model({name!r}, num_classes={count}), and give it with --factory file.py:function "
        f"--weights {weights} {' '.join(given)}".rstrip()
    )
