"""What an ONNX model reaches outside of itself: operators from elsewhere, and files with its weights."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doorward.artifacts.examination import OUTSIDE, Reference
from doorward.artifacts.links import leaves

_DOMAINS = re.compile(
    r"|ai\.onnx|ai\.onnx\.(ml|training|preview\.training)|com\.microsoft(\.(nchwc|experimental))?|com\.ms\.internal\.nhwc"
)


def onnx_references(model: Any, file: str, folder: Path) -> Iterator[Reference]:
    """Yield what an ONNX model (a parsed ModelProto) would reach outside of itself.

    Args:
        folder: where it lies.
    """
    own = {(function.domain, function.name) for function in model.functions}
    seen = set()
    for graph in _graphs(model):
        for node in graph.node:
            operator = (node.domain, node.op_type)
            foreign = operator not in own and not _DOMAINS.fullmatch(node.domain)
            if (foreign or node.op_type in ("PythonOp", "PyOp")) and operator not in seen:
                seen.add(operator)
                why = "is an operator outside of ONNX: it needs native or Python code from elsewhere"
                yield Reference(file, f"{node.domain}.{node.op_type}", f"node {node.name!r}", why)
    for location, name in _external(model).items():
        if not _in_folder(location, folder):
            yield Reference(file, location[:200], f"tensor {name!r}", OUTSIDE)


def external_files(path: Path) -> list[str]:
    """Return the files in an ONNX model's folder that hold its weights, relative to it, sorted."""
    return [name for name in external_names(path) if (path.parent / name).is_file()]


def external_names(path: Path) -> list[str]:
    """Return the names that an ONNX model gives to such files, whether they are there or not."""
    try:
        import onnx

        model = onnx.load_model(str(path), load_external_data=False)
        found = set(_external(model))
    except Exception:  # not readable, or no onnx: then the file alone is what can be named
        return []
    return sorted(
        {posixpath.normpath(name.replace("\\", "/")) for name in found if _in_folder(name, path.parent)}
    )


def _in_folder(location: str, folder: Path) -> bool:
    place = posixpath.normpath(location.replace("\\", "/"))
    if place.startswith(("..", "/")) or place[1:2] == ":" or "\0" in place:
        return False
    return not leaves(folder / place, folder)


def _graphs(model: Any) -> Iterator[Any]:
    """Yield the graph, its functions, and the graphs within their nodes."""
    training = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    waiting = [model.graph, *model.functions, *training]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting.extend([*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs])


def _external(model: Any) -> dict[str, str]:
    """Return each file that holds tensors, and the name of the first of them."""
    found: dict[str, str] = {}
    for graph in _graphs(model):
        tensors = list(getattr(graph, "initializer", ()))
        for sparse in getattr(graph, "sparse_initializer", ()):
            tensors.extend([sparse.values, sparse.indices])
        for node in graph.node:
            for attribute in node.attribute:
                tensors.extend([*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors])
        for tensor in tensors:
            for entry in tensor.external_data:
                if entry.key == "location":
                    found.setdefault(entry.value, tensor.name)
    return found
