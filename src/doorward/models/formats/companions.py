"""What lies next to an exported file and says how it takes images: `preprocessor_config.json` and others."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doorward.models.formats.image_processors import PREPROCESSOR
from doorward.models.formats.input_options import read_json

#: A folder of this name holds exports of the model in the folder above.
_EXPORTS = "onnx"
_SIZES = {"height", "width"}


@dataclass(frozen=True)
class Companions:
    """What the files next to an exported model state.

    Attributes:
        input: fields of an input spec.
        classes: class names.
        notes: what could not be read, one sentence each.
    """

    input: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_companions(path: Path) -> Companions:
    """Read what lies next to an exported file, or above its folder `onnx`.

    Raises:
        InputError: if such a file is there and cannot be read.
    """
    folders = [path.parent, *([path.parent.parent] if path.parent.name == _EXPORTS else [])]
    folder = next((one for one in folders if (one / PREPROCESSOR).is_file()), None)
    if folder is None:
        return Companions()
    if importlib.util.find_spec("transformers") is None:
        return Companions(
            notes=(f"the {PREPROCESSOR} next to the model was not read: that needs transformers",)
        )
    from doorward.models.formats.huggingface import quiet
    from doorward.models.formats.image_processors import describe_processor, load_processor

    with quiet():
        processor = load_processor(folder)
    declared = {} if processor is None else describe_processor(processor, folder)
    return Companions(declared, _classes(folder))


def without_facts(stated: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is stated, less a size that the file itself has otherwise: an export may take another."""
    apart = any(name in facts and facts[name] != stated[name] for name in _SIZES & set(stated))
    return {name: value for name, value in stated.items() if not (apart and name in {*_SIZES, "resize"})}


def _classes(folder: Path) -> tuple[str, ...] | None:
    """Return the class names of a `config.json`, None where it has none or numbers them with gaps."""
    file = folder / "config.json"
    names = read_json(file).get("id2label") if file.is_file() else None
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        return None
    return tuple(str(names[str(i)]) for i in range(len(names)))
