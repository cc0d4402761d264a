"""Code that a configuration asks a library to import or call: JSON, YAML, and Keras' text inside HDF5."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any
from urllib.parse import unquote

from doorward.artifacts.examination import Reference
from doorward.artifacts.pickles import words

_IN_KERAS = "is a layer with code of its own, which runs when Keras loads it"
#: Classes of Keras whose configuration holds code, or names files with code.
_KERAS_RUNS = words("Lambda __lambda__ TorchModuleWrapper TFSMLayer JaxLayer FlaxLayer")
_KERAS_ROOTS = words("keras keras_hub keras_cv keras_nlp tf_keras tensorflow")
#: Packages below Keras' root that hold what layers are made of; others download, unpickle or change settings.
_KERAS_PARTS = words(
    """layers models initializers regularizers constraints activations losses metrics optimizers ops
    dtype_policies quantizers random engine legacy"""
)
_BUILTIN_FUNCTIONS = frozenset(name for name in dir(builtins) if not name.startswith("_")) | {"__import__"}
#: Functions built into Python that run code, for texts where the rest of the configuration is not at hand.
_BUILTIN_RUNS = words("exec eval compile open getattr setattr delattr globals locals vars input breakpoint")
#: Implementations of attention and of experts: one with a slash is code that comes from the hub.
_KERNEL_KEY = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_LOOSE = "asks for custom code to be trusted"


def json_references(document: Any, file: str) -> Iterator[Reference]:
    """Yield the code that a JSON configuration asks a library to import."""
    waiting: list[tuple[Any, str]] = [(document, "")]
    while waiting:
        value, where = waiting.pop()
        if isinstance(value, list):
            waiting.extend((inner, f"{where}[{i}]") for i, inner in enumerate(value))
        if not isinstance(value, dict):
            continue
        yield from _keras(value, file, where or "top")
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key in ("auto_map", "custom_pipelines") and inner:
                why = "is custom code that the configuration asks transformers to import"
                yield from (Reference(file, text, at, why) for text, at in _texts(inner, place))
            elif key == "trust_remote_code" and inner:
                yield Reference(file, "trust_remote_code", place, _LOOSE)
            elif _KERNEL_KEY.fullmatch(str(key)):
                why = "is compiled code that transformers takes from the hub and runs"
                yield from (
                    Reference(file, text, at, why) for text, at in _texts(inner, place) if "/" in text
                )
            else:
                waiting.append((inner, place))
    yield from _pipelines(document, file)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield each text in a value, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, where)
    elif value is not None:
        yield str(value)[:200], where


def _keras(value: dict[str, Any], file: str, where: str) -> Iterator[Reference]:
    """Yield what an object of Keras' would import or run."""
    name, module = value.get("class_name"), value.get("module")
    if not isinstance(name, str):
        return
    if re.split(r"[.>]", name)[-1] in _KERAS_RUNS:
        yield Reference(file, re.split(r"[.>]", name)[-1], where, _IN_KERAS)
    elif module and not _keras_module(str(module)):
        function = value.get("config") if name == "function" else None
        if module != "builtins" or name != "function":
            yield Reference(file, f"{module}.{name}"[:200], where, "is imported when Keras loads it")
        elif not isinstance(function, str) or function in _BUILTIN_FUNCTIONS:
            yield Reference(file, f"builtins.{function}"[:200], where, "is imported when Keras loads it")


def _keras_module(module: str) -> bool:
    """Return whether a module holds parts of networks and nothing that reaches outside of them."""
    root, *parts = [part for part in module.split(".") if part not in ("src", "api", "_tf_keras", "python")]
    if root not in _KERAS_ROOTS:
        return False
    if root == "tensorflow":
        if parts[:1] != ["keras"]:
            return False
        parts = parts[1:]
    return not parts or parts[0] in _KERAS_PARTS or (root.startswith("keras_") and parts[0] != "utils")


def _pipelines(document: Any, file: str) -> Iterator[Reference]:
    """Yield what the index of a pipeline of several models would import by name."""
    base = file.rpartition("/")[2]
    if base == "modules.json" and isinstance(document, list):
        for i, module in enumerate(document):
            name = str(module.get("type", "")) if isinstance(module, dict) else ""
            if name and name.split(".")[0] != "sentence_transformers":
                why = "is imported when sentence-transformers loads it"
                yield Reference(file, name[:200], f"[{i}].type", why)
    if base == "model_index.json" and isinstance(document, dict):
        for key, value in document.items():
            library = value[0] if isinstance(value, list) and value else None
            if isinstance(library, str) and library.split(".")[0] in sys.stdlib_module_names:
                yield Reference(file, library[:200], str(key), "is imported when diffusers loads it")


def target_references(document: Any, file: str) -> Iterator[Reference]:
    """Yield what Hydra would call if it made the objects that a JSON configuration describes."""
    waiting: list[tuple[Any, str]] = [(document, "")]
    while waiting:
        value, where = waiting.pop()
        if isinstance(value, list):
            waiting.extend((inner, f"{where}[{i}]") for i, inner in enumerate(value))
        elif isinstance(value, dict):
            if isinstance(value.get("_target_"), str):
                why = "is called when Hydra makes what is described"
                yield Reference(file, value["_target_"][:200], where or "top", why)
            waiting.extend((inner, f"{where}.{key}" if where else str(key)) for key, inner in value.items())


# --- YAML ---

_TAG_HANDLE = re.compile(r"^%TAG[ \t]+(!\w*!?)[ \t]+(\S+)", re.MULTILINE)
_TAG = re.compile(r"(?:^|(?<=[\s,\[{:\-?]))!(?:<([^>\s]*)>|([\w-]*!)?([^\s,\[\]{}]*))")
_PYTHON_TAG = re.compile(r"tag:yaml\.org,2002:python/(object|name|module)\b[^:]*:?(.*)")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
_TARGET = re.compile(r"_target_[\"']?\s*:\s*[\"']?([\w.]+)")
_LOADER = re.compile(r"^\s*loader_module[\"']?\s*:\s*[\"']?([\w.]+)", re.MULTILINE)


def yaml_references(data: bytes, file: str) -> Iterator[Reference]:
    """Yield what a YAML file makes Python import or call: its tags for Python objects, Hydra's targets.

    The tags run with PyYAML's loaders other than its safe one, the targets with `hydra.utils.instantiate`.
    """
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if wide else "utf-8", "replace")
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    handles = {"!": "!", "!!": "tag:yaml.org,2002:"} | dict(_TAG_HANDLE.findall(text))
    for match in _TAG.finditer(text):
        verbatim, handle, rest = match.groups()
        whole = verbatim or handles.get(f"!{handle or ''}", "") + (rest or "")
        if python := _PYTHON_TAG.match(unquote(whole)):
            line = text.count("\n", 0, match.start()) + 1
            yield Reference(
                file, (python[2] or python[0])[:200], f"line {line}", "is imported or called by a YAML tag"
            )
    plain = _ESCAPE.sub(_unescape, re.sub(r"\\\n\s*", "", text))
    targets = set(_TARGET.findall(plain))
    if "_target_" in plain:
        for name in sorted(targets) or ["_target_"]:
            yield Reference(file, name[:200], "_target_", "is called when Hydra makes what is described")
    if file.rpartition("/")[2] == "MLmodel":
        for name in _LOADER.findall(text):
            if name.split(".")[0] != "mlflow":
                yield Reference(file, name[:200], "loader_module", "is imported when MLflow loads the model")


def _unescape(match: re.Match[str]) -> str:
    number = int(next(group for group in match.groups() if group), 16)
    return chr(number) if number < sys.maxunicode else "?"


# --- HDF5 ---


def _spelled(word: str) -> bytes:
    """Return a pattern for a word in JSON, any letter of which may be escaped."""
    return b"".join(b"(?:%s|\\\\u00%s)" % (re.escape(char).encode(), _hex(char)) for char in word)


def _hex(char: str) -> bytes:
    return b"".join(
        b"[%s%s]" % (digit.encode(), digit.upper().encode()) if digit.isalpha() else digit.encode()
        for digit in f"{ord(char):02x}"
    )


_PAIR = re.compile(
    rb'"('
    + b"|".join(map(_spelled, ("class_name", "module", "config")))
    + rb')"\s*:\s*"((?:[^"\\]|\\.){0,200})"'
)
_OVERLAP = 4096


def hdf5_references(stream: IO[bytes], file: str, spend: Callable[[int], None]) -> Iterator[Reference]:
    """Yield what the configuration that Keras keeps as text inside an HDF5 file would import or run.

    Args:
        spend: called with the bytes that were read.
    """
    tail, seen = b"", set()
    while block := stream.read(1 << 20):
        spend(len(block))
        window = tail + block
        for key, value in _PAIR.findall(window):
            pair = _json_text(key), _json_text(value)
            if pair in seen:
                continue
            seen.add(pair)
            if (found := _hdf5_pair(*pair)) is not None:
                yield Reference(file, found[0][:200], "model_config", found[1])
        tail = window[-_OVERLAP:]


def _hdf5_pair(key: str, value: str) -> tuple[str, str] | None:
    if key == "class_name" and (name := re.split(r"[.>]", value)[-1]) in _KERAS_RUNS:
        return name, _IN_KERAS
    if key == "module" and value and value != "builtins" and not _keras_module(value):
        return value, "is imported when Keras loads it"
    if key == "config" and value in _BUILTIN_RUNS | {"__import__"}:
        return f"builtins.{value}", "is imported when Keras loads it"
    return None


def _json_text(data: bytes) -> str:
    try:
        return str(json.loads(b'"' + data + b'"'))
    except ValueError:
        return data.decode("latin-1")
