"""Hugging Face model directories: classifiers, with the preprocessing that they declare."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from doorward.core.errors import InputError, MissingExtra
from doorward.models.classifier import Classifier
from doorward.models.errors import NotExamined
from doorward.models.formats.huggingface_text_audio import audio_spec, text_spec
from doorward.models.formats.image_processors import describe_processor, load_processor, refuse_difference
from doorward.models.formats.input_options import (
    LoadOptions,
    first_line,
    read_json,
    read_sidecar,
    refuse_statements,
    resolve_spec,
)
from doorward.models.formats.timm_directory import KEY, open_timm
from doorward.models.formats.weights import refuse_misfits
from doorward.models.formats.wrapping import finish
from doorward.models.spec import InputSpec

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Weights that transformers wrote for other libraries.
_OTHER_WEIGHTS = {"tf_model.h5": "TensorFlow", "flax_model.msgpack": "Flax"}
#: What is fetched next to the weights: configurations and the words of tokenizers. Code is not: what asks
#: for it is in the configurations, and Doorward runs none.
_BESIDE = ("*.json", "*.txt", "*.model")


def fetch(hub_id: str) -> Path:
    """Fetch a model from the hub into its cache and return the directory; pickles only where nothing else is.

    Raises:
        InputError: if the hub cannot be reached or has no such model.
        MissingExtra: if the package huggingface-hub is not installed.
    """
    _need("huggingface_hub", "fetching a model from the hub")
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            local = Path(snapshot_download(hub_id, allow_patterns=[*_BESIDE, "*.safetensors"]))
            if not any(local.glob("*.safetensors")):
                local = Path(snapshot_download(hub_id, allow_patterns=[*_BESIDE, "pytorch_model*"]))
    except Exception as error:  # network, login, name: many kinds
        raise InputError(
            f"{hub_id}: no such directory here, and the hub does not give a model of that name: "
            f"{first_line(error)}"
        ) from error
    return local


def open_huggingface(path: Path, options: LoadOptions) -> Classifier:
    """Open a Hugging Face model directory. No code that it may carry is run.

    Raises:
        InputError: if it is no classifier that is supported, or its parts do not fit each other.
        MissingExtra: if the package transformers is not installed.
    """
    config = read_json(path / "config.json")
    if KEY in config:
        return open_timm(path, config, options)
    _need("transformers", "opening a Hugging Face model")
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    for task, opener in TASKS.items():
        if task in name:
            # some audio models are named as text models are
            return (_open_audio_classifier if _is_audio(name) else opener)(path, name, options)
    tasks = ", ".join(f"...{task}" for task in TASKS)
    what = f"a {name}" if name else "a configuration that names no architecture"
    raise (NotExamined if name else InputError)(
        f"{path}: expected a classifier of images, texts or recordings ({tasks}), this is {what}"
    )


def _open_image_classifier(path: Path, name: str, options: LoadOptions) -> Classifier:
    with quiet():
        module = _load_module(path, "AutoModelForImageClassification")
        _refuse_tokens(module, path, name)
        processor = load_processor(path)
    config = module.config
    sidecar = read_sidecar(path)
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None)
    facts: dict[str, Any] = {"layout": "NCHW", "channels": channels}
    if getattr(config, "num_labels", 1) > 1:
        facts["output"] = "logits"
    # a doorward.json takes the place of the processor; options change parts of it
    own = processor is not None and not sidecar.input
    declared = describe_processor(processor, path) if own else {}
    shape = dict.fromkeys(("height", "width"), size) if isinstance(size, int) else {}
    if isinstance(size, list | tuple) and len(size) == 2:
        shape = {"height": size[0], "width": size[1]}
    spec = resolve_spec(path, facts, options.statement(), sidecar.input, declared, shape)
    if own and not options.statement():
        refuse_difference(processor, spec, path)
    return _finish(path, name, options, config, spec, module)


def _refuse_tokens(module: nn.Module, path: Path, name: str) -> None:
    """Raise if a model takes token numbers, alone or next to its images, as ImageGPT does."""
    if "input_ids" in inspect.signature(module.forward).parameters:
        raise NotExamined(
            f"{path}: only its files were examined: {name} takes token numbers, and models are examined "
            "that take the colours of an image alone"
        )


def _is_audio(name: str) -> bool:
    """Return whether transformers has a class of that name for recordings."""
    from transformers.models.auto import modeling_auto

    return name in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values()


def _open_text_classifier(path: Path, name: str, options: LoadOptions) -> Classifier:
    refuse_statements(options, "text", path)
    with quiet():
        module = _load_module(path, "AutoModelForSequenceClassification")
        spec, runs = text_spec(module, path)
        # without padding of their own, models that answer at the last token take one text at a time
        alone = 1 if getattr(module.config, "pad_token_id", None) is None else None
        stated = _stated(spec, options, module.config)
        return _finish(path, name, options, module.config, stated, runs, batch=alone)


def _open_audio_classifier(path: Path, name: str, options: LoadOptions) -> Classifier:
    refuse_statements(options, "audio", path)
    with quiet():
        module = _load_module(path, "AutoModelForAudioClassification")
        spec, runs = audio_spec(module, path)
        stated = _stated(spec, options, module.config)
        classifier = _finish(path, name, options, module.config, stated, runs, batch=1)
    # the feature extractor computes with numpy
    classifier.capabilities -= {"gradients"}
    return classifier


def _stated(spec: InputSpec, options: LoadOptions, config: Any) -> InputSpec:
    """Return the spec of a model of texts or recordings: it gives logits unless another thing is stated."""
    if options.output is None and config.num_labels != 1:
        return spec
    assumed = () if options.output else ("output",)
    return spec.model_copy(update={"output": options.output or "logits", "assumed": assumed})


def _finish(
    path: Path,
    name: str,
    options: LoadOptions,
    config: Any,
    spec: InputSpec,
    module: nn.Module,
    *,
    batch: int | None = None,
) -> Classifier:
    named = Labels(options.labels or read_sidecar(path).classes)
    if named.names is None:
        named = _labels(config, path)
    labels = named.names
    classifier = finish(
        path,
        module,
        spec,
        labels,
        features=options.features,
        format="huggingface",
        architecture=name,
        trials=2,
        batch=batch,
    )
    classifier.notes = (*named.notes, *classifier.notes)
    return classifier


#: What opens a model, by the part of its class name that tells what it is for.
TASKS: dict[str, Callable[[Path, str, LoadOptions], Classifier]] = {
    "ForImageClassification": _open_image_classifier,
    "ForSequenceClassification": _open_text_classifier,
    "ForAudioClassification": _open_audio_classifier,
}


def _refuse_other_weights(path: Path) -> None:
    """Raise if a directory has its weights in another library's format alone.

    Raises:
        NotExamined: with what to do.
    """
    exported = [file for part in (path, path / "onnx") for file in sorted(part.glob("*.onnx"))]
    if exported:
        raise NotExamined(
            f"{path}: only its files were examined, since its weights are those of an ONNX model: give that "
            f"file, {exported[0]}"
        )
    for name, library in _OTHER_WEIGHTS.items():
        if (path / name).is_file():
            raise NotExamined(
                f"{path}: only its files were examined, since {name} holds weights of {library}: load it "
                "with a release of transformers that reads them, and save it with save_pretrained"
            )


def _load_module(path: Path, kind: str) -> Any:
    import transformers

    if not any((path / file).is_file() for file in _WEIGHTS):
        _refuse_other_weights(path)
        raise InputError(f"{path}: no weights: expected one of {', '.join(_WEIGHTS[:3])}")
    try:
        module, info = getattr(transformers, kind).from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            dtype=torch.float32,
        )
    except Exception as error:  # configurations and weights fail in many kinds
        raise InputError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    refuse_misfits(
        path,
        missing=sorted(info["missing_keys"]),
        # a pooling layer belongs to the base model; classifiers leave it out by design
        unexpected=sorted(key for key in info["unexpected_keys"] if ".pooler." not in f".{key}"),
        mismatched=[
            f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in sorted(info["mismatched_keys"])
        ],
    )
    return module.eval()


class Labels(NamedTuple):
    """Class names in order, None where nothing names them, and what was guessed of them."""

    names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def _labels(config: Any, path: Path) -> Labels:
    """Return class names in order, none where the configuration only numbers them.

    Raises:
        InputError: if it numbers them with holes, so that nothing tells which output has which name.
    """
    names = getattr(config, "id2label", None)
    if not isinstance(names, Mapping) or len(names) < 2:  # one output tells two classes apart
        return Labels(None)
    numbers = sorted(names)
    first, count = numbers[0], len(names)
    if numbers != list(range(first, first + count)) or first not in (0, 1):
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if count > 8 else "")
        raise InputError(
            f"{path / 'config.json'}: id2label numbers its {count} classes {listed}, and outputs are "
            f"numbered from 0 to {count - 1}: state their names in order with --labels"
        )
    labels = tuple(str(names[number]) for number in numbers)
    if all(label == f"LABEL_{i}" for i, label in enumerate(labels)):
        return Labels(None)
    if first == 0:
        return Labels(labels)
    return Labels(
        labels,
        (
            f"id2label begins at 1, and outputs at 0: the first output is taken for {labels[0]!r}, the last "
            f"for {labels[-1]!r}",
        ),
    )


def _need(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package.replace("_", "-"), "hf", purpose)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log, progress bars and warnings of transformers inside the block; then all is as before."""
    from huggingface_hub import utils as hub

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars: Any = None
    hub_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub.disable_progress_bars()
        if importlib.util.find_spec("transformers") is not None:
            bars = importlib.import_module("transformers.utils.logging")
        drawn = bars is not None and bars.is_progress_bar_enabled()
        if drawn:
            bars.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if drawn:
                bars.enable_progress_bar()
            (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
