"""Which files of a folder loading the model opens, and which only lie next to them.

A folder with a `config.json` (or the index of a pipeline) is a model: transformers' `from_pretrained` and
Doorward itself open files by their names, and those that the configuration names. The rest (what a trainer
leaves, scripts, other people's pickles) runs only if somebody opens it by hand. In a folder without one,
nothing says which file is the model, so each may be, apart from what never is one.

Source: `_get_resolved_checkpoint_files` and `get_checkpoint_shard_files` of transformers 4.56 to 5.23.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doorward.artifacts.examination import Doubt, Reference
from doorward.artifacts.links import leaves
from doorward.core.files import is_inside, open_regular

_INDEXES = ("config.json", "model_index.json", "modules.json")
#: Names that `from_pretrained` or Doorward opens, of this and earlier versions.
_OPENED = re.compile(
    r"(\w+_)?config(_\w+)?\.json|doorward\.json|model_index\.json|modules\.json"
    r"|(pytorch_model|model|adapter_model|tf_model|flax_model|diffusion_pytorch_model|open_clip_\w*model)"
    r"([.-][\w.-]*)?\.(bin|safetensors|h5|msgpack|pt|pth|ckpt)(\.index(\.[\w-]+)?\.json)?"
    r"|[\w.-]+\.index\.json|adapter\.[\w-]+\.(bin|safetensors)"
    r"|tokenizer\.json|(\w+_)?vocab\.(json|txt|pkl|bin|bpe)|merges\.txt|[\w.-]+\.(model|spm|tiktoken|codes)"
    r"|dict\.txt|encoder\.json|tekken\.json"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template\.(json|jinja)"
)
#: What a trainer leaves, and sources: never a model by themselves.
_NEVER_A_MODEL = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler|rng_state|random_states)([_-]?\d+)*\.(pt|pth|bin|pkl)"
    r"|trainer_state\.json|.*\.(py|pyc|pyi|ipynb|ya?ml|md|sh)",
    re.IGNORECASE,
)
_SOURCES = re.compile(r".*\.(py|pyc|pyo|pyd|so)", re.IGNORECASE)
_JSON_LIMIT = 64 << 20


@dataclass
class _Model:
    """What loading the model in one folder opens.

    Attributes:
        folder: the model's folder.
        named: real paths of files that its configurations name.
        parts: folders within that hold parts of it, opened as it is itself.
        code: whether its configurations ask for source files of its own.
    """

    folder: Path
    named: set[str] = field(default_factory=set)
    parts: list[Path] = field(default_factory=list)
    code: bool = False


@dataclass
class Reach:
    """What loading opens of a folder, or of one file.

    Attributes:
        references: files outside of the folder that it would open.
        doubts: what its configurations name and cannot be followed.
    """

    root: Path
    references: list[Reference] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    _models: dict[Path, _Model | None] = field(default_factory=dict)

    def opens(self, path: Path) -> bool:
        """Return whether loading opens a file of the folder."""
        if path == self.root:
            return True
        if self._model_of(path.parent) is None:
            return not _NEVER_A_MODEL.fullmatch(path.name) and ".git" not in path.relative_to(self.root).parts
        return self.names(path)

    def names(self, path: Path) -> bool:
        """Return whether a file of the folder is opened by its name, or by a configuration that names it."""
        model = self._model_of(path.parent)
        if model is None:
            return False
        if path.parent in (model.folder, *model.parts) and _OPENED.fullmatch(path.name):
            return True
        return (model.code and _SOURCES.fullmatch(path.name) is not None) or os.path.realpath(
            path
        ) in model.named

    def _model_of(self, folder: Path) -> _Model | None:
        """Return the model that a folder belongs to: the outermost one within the root."""
        if folder not in self._models:
            above = self._model_of(folder.parent) if folder != self.root else None
            self._models[folder] = above or self._read(folder)
        return self._models[folder]

    def _read(self, folder: Path) -> _Model | None:
        if not any((folder / name).is_file() for name in _INDEXES):
            return None
        model = _Model(folder)
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return model
        for name in names:
            if name.lower().endswith(".json") and _OPENED.fullmatch(name):
                document = self._json(folder / name)
                self._follow(model, name, document)
        for part in model.parts:
            for file in sorted(part.glob("*.index.json")):
                self._weights(model, file.relative_to(folder).as_posix(), self._json(file), part)
        return model

    def _json(self, file: Path) -> Any:
        """Return a JSON document, None where it cannot be read, which its own examination tells."""
        try:
            with open_regular(file) as stream:
                return json.loads(stream.read(_JSON_LIMIT))
        except (OSError, ValueError, RecursionError):
            return None

    def _follow(self, model: _Model, name: str, document: Any) -> None:
        """Note what one configuration names."""
        if name == "modules.json" and isinstance(document, list):
            paths = [str(one.get("path", "")) for one in document if isinstance(one, dict)]
            self._parts(model, name, paths)
        if not isinstance(document, dict):
            return
        model.code |= any(_asks_for_code(document))
        if name == "model_index.json":
            self._parts(model, name, [key for key, value in document.items() if isinstance(value, list)])
        if name.endswith(".json") and "weight_map" in document:
            self._weights(model, name, document, model.folder)
        if name == "config.json" and isinstance(explicit := document.get("transformers_weights"), str):
            self._name(model, name, explicit, model.folder)
        if name == "config.json" and isinstance(network := document.get("network"), str):
            self._name(model, name, network, model.folder)  # of Doorward's own format
        base = document.get("base_model_name_or_path")
        if name == "adapter_config.json" and base and not self._is_own(model, str(base)):
            why = f"names a base model that is not in the folder ({str(base)[:100]})"
            self.doubts.append(Doubt(self._relative(model.folder / name), why))

    def _is_own(self, model: _Model, base: str) -> bool:
        return is_inside(model.folder / base, model.folder) and (model.folder / base).exists()

    def _parts(self, model: _Model, name: str, paths: list[str]) -> None:
        for path in paths:
            part = model.folder / path
            if not is_inside(part, model.folder):
                self._outside(model, name, path)
            elif part.is_dir() and part != model.folder:
                model.parts.append(part)

    def _weights(self, model: _Model, name: str, document: Any, folder: Path) -> None:
        """Note the files that an index of weights names."""
        table = document.get("weight_map") if isinstance(document, dict) else None
        for value in sorted({str(one) for one in table.values()}) if isinstance(table, dict) else ():
            self._name(model, name, value, folder)

    def _name(self, model: _Model, name: str, value: str, folder: Path) -> None:
        if "\0" in value:
            self._outside(model, name, value)
            return
        file = folder / value
        stated = posixpath.normpath(value).startswith("..") or os.path.isabs(value) or value[1:2] == ":"
        if stated or leaves(file, model.folder):
            self._outside(model, name, value)
        else:
            model.named.add(os.path.realpath(file))

    def _outside(self, model: _Model, name: str, value: str) -> None:
        why = "is read although it lies outside of the model's folder"
        self.references.append(Reference(self._relative(model.folder / name), value[:200], "weight_map", why))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _asks_for_code(document: Any) -> Iterator[bool]:
    """Yield True for each place where a configuration asks for source files to be imported."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            if any(value.get(key) for key in ("auto_map", "custom_pipelines", "trust_remote_code")):
                yield True
            waiting.extend(value.values())
