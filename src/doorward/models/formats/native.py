"""Doorward's own model directories: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from doorward.core.errors import InputError
from doorward.models import sequences
from doorward.models.classifier import Classifier
from doorward.models.formats.input_options import (
    LoadOptions,
    describe_validation,
    first_line,
    parse_sidecar,
    read_json,
    refuse_statements,
    resolve_spec,
)
from doorward.models.formats.weights import load_weights, read_examined_weights
from doorward.models.formats.wrapping import finish
from doorward.models.networks import build
from doorward.models.spec import InputSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Architecture(BaseModel):
    """What rebuilds one of Doorward's own networks (see `doorward.models.networks`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    channels: int
    height: int
    width: int
    classes: int


class NativeConfig(BaseModel):
    """The `config.json` of a Doorward directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["doorward"] = "doorward"
    version: Literal[1] = 1
    architecture: Architecture
    input: dict[str, Any]
    classes: tuple[str, ...]
    extra: dict[str, Any] = {}


def save_native(
    module: nn.Module,
    *,
    architecture: str,
    spec: InputSpec,
    classes: Sequence[str],
    directory: Path,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write one of Doorward's own networks as `config.json` and `model.safetensors`; return the directory.

    Args:
        module: made by `networks.build(architecture, ...)` for the spec and these classes.
        extra: anything else worth keeping, in JSON types, such as how it was trained.

    Raises:
        InputError: if the directory cannot be written.
    """
    import safetensors.torch

    shape = Architecture(
        name=architecture, channels=spec.channels, height=spec.height, width=spec.width, classes=len(classes)
    )
    config = NativeConfig(
        architecture=shape,
        input=spec.model_dump(mode="json", exclude={"assumed"}),
        classes=tuple(classes),
        extra=dict(extra or {}),
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(tensors, directory / WEIGHTS)
    except OSError as error:
        raise InputError(f"{directory}: cannot write the model: {first_line(error)}") from error
    return directory


def open_native(path: Path, options: LoadOptions, config: NativeConfig | None = None) -> Classifier:
    """Open a Doorward directory.

    Args:
        config: what its `config.json` says; read from there if None.

    Raises:
        InputError: if configuration, weights and options do not fit each other.
    """
    file = path / CONFIG
    try:
        config = config or NativeConfig.model_validate(read_json(file))
    except ValidationError as error:
        raise InputError(f"{file}: {describe_validation(error)}") from error
    shape = config.architecture
    if shape.classes != len(config.classes):
        raise InputError(f"{file}: {len(config.classes)} class names for {shape.classes} classes")
    spec = _row_spec(config, options, file) if shape.name in sequences.NAMES else _spec(config, options, path)
    try:
        module = build(shape.name, spec, classes=shape.classes)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"{file}: cannot build {shape.name!r}: {first_line(error)}") from error
    load_weights(module, read_examined_weights(path / WEIGHTS), path / WEIGHTS)
    labels = options.labels or config.classes
    return finish(
        path, module, spec, labels, features=options.features, format="doorward", architecture=shape.name
    )


def _spec(config: NativeConfig, options: LoadOptions, path: Path) -> InputSpec:
    """Return the spec of a network for images."""
    sidecar = parse_sidecar({"input": config.input, "classes": config.classes}, path / CONFIG)
    shape = config.architecture
    facts = {"channels": shape.channels, "height": shape.height, "width": shape.width}
    return resolve_spec(path, facts, options.statement(), sidecar.input)


def _row_spec(config: NativeConfig, options: LoadOptions, file: Path) -> InputSpec:
    """Return the spec of a network for texts or recordings; there is nothing to be stated of it."""
    kind = sequences.NAMES[config.architecture.name]
    refuse_statements(options, kind.modality, file)
    try:
        return kind.model_validate(config.input)
    except ValidationError as error:
        raise InputError(f"{file}: input: {describe_validation(error)}") from error
