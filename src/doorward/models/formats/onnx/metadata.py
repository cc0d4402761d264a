"""What an ONNX file's own key-value pairs say of its images and classes.

The pairs for images are those of ONNX's specification. Class names and sizes have no agreed keys: those of
common exporters are read. Nothing is evaluated but literals, and what does not fit is left out.

Source: ONNX, "Metadata for images" (MetadataProps); Ultralytics' exporter (`names`, `imgsz`, `task`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

#: Keys under which exporters keep class names.
_NAMES = ("names", "class_names", "classes", "labels", "character")
#: Characters of a value beyond which it is not read.
_LONGEST = 1 << 20
_RANGES = {
    "NominalRange_0_255": (0.0, 255.0),
    "Normalized_0_1": (0.0, 1.0),
    "Normalized_1_1": (-1.0, 1.0),
}


def stated_input(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the pairs state of the input, as fields of an input spec."""
    stated: dict[str, Any] = {}
    pixels = metadata.get("Image.BitmapPixelFormat", "")
    if pixels.startswith(("Bgr", "Rgb")):
        stated["channel_order"] = pixels[:3].upper()
    if metadata.get("Image.NominalPixelRange") in _RANGES:
        stated["range"] = _RANGES[metadata["Image.NominalPixelRange"]]
    sides = _literal(metadata.get("imgsz", ""))
    if isinstance(sides, int):
        sides = [sides, sides]
    if isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
        stated |= {"height": sides[0], "width": sides[1]}
        if metadata.get("task") == "classify":
            shorter = {"height": max(sides), "width": max(sides), "shortest_edge": True}
            stated |= {"resize": shorter | {"crop": tuple(sides)}, "range": (0.0, 1.0)}
    return stated


def stated_names(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return class names in order, None where no pair holds any."""
    for key in _NAMES:
        if key in metadata:
            names = _names(metadata[key])
            if names is not None and len(set(names)) == len(names) > 1:
                return names
    return None


def _names(text: str) -> tuple[str, ...] | None:
    value = _literal(text)
    if isinstance(value, dict):
        numbers = {str(number): name for number, name in value.items()}
        ordered = [numbers.get(str(i)) for i in range(len(numbers))]
        value = None if None in ordered else ordered
    elif value is None:
        value = [line for line in text.splitlines() if line.strip()] if "\n" in text else None
    return tuple(map(str, value)) if isinstance(value, list | tuple) else None


def _literal(text: str) -> Any:
    """Return the value of a Python or JSON literal, None if the text is none."""
    if len(text) > _LONGEST:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
