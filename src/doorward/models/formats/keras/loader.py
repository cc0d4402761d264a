"""Keras models as classifiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doorward.models.classifier import Classifier
from doorward.models.formats.input_options import LoadOptions
from doorward.models.formats.keras.layers import build, constant_operation, numbers_of, refuse_other_numbers
from doorward.models.formats.keras.reading import KerasFile, Layer, Weights, read_keras
from doorward.models.formats.other_formats import KERAS
from doorward.models.formats.rebuilt import (
    Built,
    Description,
    LayerGraph,
    Unknown,
    Unreadable,
    first,
    image_facts,
    open_rebuilt,
    unused_name,
)
from doorward.models.spec import InputSpec

MODELS = frozenset({"Sequential", "Functional", "Model"})
#: How deep models may be nested, and how many calls of layers all of them may make.
DEEPEST, MOST_CALLS = 8, 3_000
#: A value of a graph: the layer that gives it, which of its calls, and which of its outputs.
Key = tuple[str, int, int]


def open_keras(path: Path, options: LoadOptions) -> Classifier:
    """Open a Keras file.

    Raises:
        NotExamined: if it cannot be read, or holds a layer or an input that is not read.
        InputError: if what was stated does not fit it.
    """
    return open_rebuilt(path, options, KERAS, "keras", _described)


def _described(path: Path) -> Description:
    file = read_keras(path)
    refuse_endless(file.model)
    mixed = "its layers compute in half precision in Keras; here they do in float32"
    return Description(
        image_facts(_input_shape(file.model)),
        lambda spec: Built(_network(file, spec), notes=(mixed,) if _mixed(file.model) else ()),
        file.model.name,
    )


def refuse_endless(model: Layer, depth: int = 0) -> int:
    """Return how many calls a model makes, those of the models in it included.

    Raises:
        Unreadable: if they are too many, or models are nested too deeply.
    """
    if depth > DEEPEST:
        raise Unreadable("its models are nested too deeply")
    calls = 0
    for layer in model.layers():
        each = refuse_endless(layer, depth + 1) if layer.kind in MODELS else 1
        calls += max(1, len(layer.nodes)) * each
        if calls > MOST_CALLS:
            raise Unreadable(f"it makes more than {MOST_CALLS:,} calls of layers")
    return calls


def _input_shape(model: Layer) -> list[int | None] | None:
    """Return the size of what goes into a model, None for an axis of any size; None if it is not stated."""
    layers = model.layers()
    inputs = [layer for layer in layers if layer.kind == "InputLayer"]
    if len(inputs) > 1:
        raise Unknown(f"{len(inputs)} inputs")
    head = inputs[0] if inputs else layers[0]
    if head.kind not in MODELS:
        refuse_other_numbers(head)
    for key in ("batch_shape", "batch_input_shape"):
        shape = head.config.get(key)
        if isinstance(shape, list):
            return [None if one is None else int(one) for one in shape]
    return _input_shape(head) if head.kind in MODELS else model.config.get("build_input_shape")


def _mixed(model: Layer) -> bool:
    """Return whether a layer computes in half precision."""
    return any(
        _mixed(layer) if layer.kind in MODELS else "float16" in numbers_of(layer) for layer in model.layers()
    )


def _network(file: KerasFile, spec: InputSpec) -> nn.Module:
    """Return a model as a torch module that takes images (n, h, w, c)."""
    trial = torch.zeros((2, spec.channels, spec.height, spec.width))
    with torch.no_grad():
        network, _ = _model(file.model, file.weights, file.version, [trial])
    return _FromChannelsLast(network).eval()


class _FromChannelsLast(nn.Module):
    """Take images as Keras does, and give what the network makes of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        """Return the network's outputs for images (n, h, w, c)."""
        return self.network(first(x))


@dataclass(frozen=True)
class _Call:
    """One call of a layer in a graph.

    Attributes:
        takes: the values that it is given.
        constant: a number that it is given too; `reverse` says that it comes first.
    """

    layer: Layer
    number: int
    takes: tuple[Key, ...]
    constant: float | None = None
    reverse: bool = False


def _outputs(call: _Call, given: Any) -> dict[Key, Tensor]:
    """Return what a call gives, by the names of its values."""
    several = given if isinstance(given, tuple) else (given,)
    return {(call.layer.name, call.number, i): value for i, value in enumerate(several)}


def _model(
    model: Layer, weights: Weights, version: tuple[int, ...], values: Sequence[Tensor]
) -> tuple[nn.Module, Any]:
    """Return a model as a module, and what it gives in the trial."""
    if model.kind not in MODELS:
        raise Unknown(f"a model of the kind {model.kind!r}")
    if max(Counter(layer.name for layer in model.layers()).values()) > 1:
        raise Unreadable("two of its layers have one name")
    if model.kind == "Sequential":
        return _sequence(model, weights, version, values)
    return _graph(model, weights, version, values)


def _layer(
    layer: Layer, weights: Weights, version: tuple[int, ...], values: Sequence[Tensor]
) -> tuple[nn.Module, Any]:
    """Return a layer as a module, and what it gives in the trial."""
    if layer.kind in MODELS:
        return _model(layer, weights.within(layer), version, values)
    module = build(layer, weights, version, values).eval()
    return module, module(*values)


def _sequence(
    model: Layer, weights: Weights, version: tuple[int, ...], values: Sequence[Tensor]
) -> tuple[nn.Module, Any]:
    modules = nn.Sequential()
    given: Any = values[0]
    for layer in model.layers():
        if layer.kind == "InputLayer":
            continue
        module, given = _layer(layer, weights, version, [given])
        modules.add_module(unused_name(layer.name, modules), module)
    return modules, given


def _graph(
    model: Layer, weights: Weights, version: tuple[int, ...], values: Sequence[Tensor]
) -> tuple[nn.Module, Any]:
    inputs, outputs = (_ends(model.config.get(key)) for key in ("input_layers", "output_layers"))
    if len(inputs) != len(values):
        raise Unknown(f"{len(inputs)} inputs")
    graph = LayerGraph()
    held: dict[Key, Tensor] = dict(zip(inputs, values, strict=True))
    slots: dict[str, str] = {}
    first_calls: dict[str, tuple[Any, ...]] = {}
    waiting = [call for layer in model.layers() if layer.kind != "InputLayer" for call in _calls(layer)]
    waiting = _numbered(waiting, outputs)
    if weights.numbered:
        _refuse_other_order(model.layers(), waiting, outputs)
    while waiting:
        ready = [call for call in waiting if all(key in held for key in call.takes)]
        if not ready:
            raise Unreadable(f"the layer {waiting[0].layer.name!r} is given what no layer before it makes")
        for call in ready:
            name, taken = call.layer.name, [held[key] for key in call.takes]
            like = (call.constant, call.reverse, *(value.shape for value in taken))
            if first_calls.setdefault(name, like) != like:
                raise Unknown("a layer that is called on values of several sizes, or with several numbers")
            if name not in slots:
                module, made = _called(call, weights, version, taken)
                slots[name] = unused_name(name, graph.layers)
                graph.layers[slots[name]] = module
            else:
                made = graph.layers[slots[name]](*taken)
            gives = _outputs(call, made)
            held |= gives
            graph.call(slots[name], call.takes, tuple(gives))
        done = {id(call) for call in ready}
        waiting = [call for call in waiting if id(call) not in done]
    missing = [key for key in outputs if key not in held]
    if missing or not outputs:
        raise Unreadable("its outputs are made by none of its layers")
    graph.settle(inputs, outputs)
    return graph, tuple(held[key] for key in outputs) if len(outputs) > 1 else held[outputs[0]]


def _numbered(calls: list[_Call], outputs: Sequence[Key]) -> list[_Call]:
    """Return calls with the numbers that others know them by: Keras 2 counts those of a model from one."""
    last: dict[str, int] = {}
    for name, number, _ in (*(key for call in calls for key in call.takes), *outputs):
        last[name] = max(number, last.get(name, 0))
    several = Counter(call.layer.name for call in calls)
    return [
        replace(
            call, number=call.number + max(0, last.get(call.layer.name, 0) + 1 - several[call.layer.name])
        )
        if call.layer.kind in MODELS
        else call
        for call in calls
    ]


def _refuse_other_order(layers: Sequence[Layer], calls: Sequence[_Call], outputs: Sequence[Key]) -> None:
    """Raise where layers of one kind are listed otherwise than Keras sorts, and numbers, them.

    It sorts layers by how many others follow them, and then as a walk back from the outputs meets them.

    Raises:
        Unreadable: if so, since each would get the other's weights.
    """
    by_key = {(call.layer.name, call.number): call for call in calls}
    met: dict[str, int] = {}
    begun: set[tuple[str, int]] = set()
    done: dict[tuple[str, int], _Call] = {}

    def walk(key: tuple[str, int]) -> None:
        if key not in by_key or key in done or key in begun:
            return
        begun.add(key)
        met.setdefault(key[0], len(met))
        for name, number, _ in by_key[key].takes:
            walk((name, number))
        done[key] = by_key[key]

    for name, number, _ in outputs:
        walk((name, number))
    of_calls: dict[tuple[str, int], int] = {}
    depths: dict[str, int] = {}
    for key in reversed(done):
        depth = max(of_calls.get(key, 0), depths.get(key[0], 0))
        depths[key[0]] = of_calls[key] = depth
        for name, number, _ in done[key].takes:
            of_calls[name, number] = max(depth + 1, of_calls.get((name, number), 0))
    known = [layer for layer in layers if layer.name in met]
    ordered = sorted(known, key=lambda layer: (-depths[layer.name], met[layer.name]))
    for kind in {layer.kind for layer in known}:
        own, theirs = ([one.name for one in some if one.kind == kind] for some in (known, ordered))
        if own != theirs:
            raise Unreadable("its layers are not in the order in which Keras numbers their weights")


def _called(
    call: _Call, weights: Weights, version: tuple[int, ...], values: Sequence[Tensor]
) -> tuple[nn.Module, Any]:
    """Return the module of a call's layer, which may be an operation with a number."""
    kind = str(call.layer.config.get("function", call.layer.kind))
    if call.constant is None and call.layer.kind != "TFOpLambda" and not kind.startswith("ops."):
        return _layer(call.layer, weights, version, values)
    module = constant_operation(kind, call.constant, reverse=call.reverse)
    if module is None:
        raise Unknown(f"an operation {kind!r}")
    return module, module(*values)


def _ends(value: Any) -> list[Key]:
    """Return the values that go into a model, or come out: [name, call, output], or several of these."""
    if isinstance(value, dict):
        raise Unknown("inputs or outputs that have names")
    if not isinstance(value, list):
        raise Unreadable("its inputs or outputs are not stated")
    if len(value) == 3 and isinstance(value[0], str):
        return [(value[0], int(value[1]), int(value[2]))]
    return [key for one in value for key in _ends(one)]


def _calls(layer: Layer) -> Iterator[_Call]:
    """Yield the calls of a layer in a graph."""
    for number, node in enumerate(layer.nodes):
        given = list(
            _of_keras_3(node, layer.kind) if isinstance(node, dict) else _of_keras_2(node, layer.kind)
        )
        tensors = tuple(one for one in given if isinstance(one, tuple))
        if not tensors:
            raise Unreadable(f"the layer {layer.name!r} is called without a value")
        numbers = [one for one in given if not isinstance(one, tuple)]
        if len(numbers) > 1 or (numbers and len(tensors) > 1):
            raise Unknown(f"a call of {layer.kind!r} with several numbers")
        reverse = bool(numbers) and not isinstance(given[0], tuple)
        yield _Call(layer, number, tensors, numbers[0] if numbers else None, reverse)


def _of_keras_2(node: Any, kind: str) -> Iterator[Key | float]:
    """Yield the values and numbers of a call as Keras 2 writes it: [[name, call, output, more], ...]."""
    for name, call, output, *more in node if node and isinstance(node[0], list) else [node]:
        yield (str(name), int(call), int(output))
        for key, value in (more[0] if more and isinstance(more[0], dict) else {}).items():
            if key == "y" and isinstance(value, list):  # another value
                yield (str(value[0]), int(value[1]), int(value[2]))
            elif key == "y" and isinstance(value, (int, float)):
                yield float(value)
            elif value is not None and value is not False and key != "name":
                raise Unknown(f"a call of {kind!r} with {key}={value!r}")


def _of_keras_3(node: Mapping[str, Any], kind: str) -> Iterator[Key | float]:
    """Yield the values and numbers of a call as Keras 3 writes it."""
    for key, value in node.get("kwargs", {}).items():
        idle = key == "training" and kind.startswith(("Random", "Resizing", "Rescaling", "CenterCrop"))
        if value is not None and value is not False and key != "name" and not idle:
            raise Unknown(f"a call of {kind!r} with {key}={value!r}")
    yield from _leaves(node.get("args", []))


def _leaves(value: Any) -> Iterator[Key | float]:
    if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
        name, call, output = value["config"]["keras_history"]
        yield (str(name), int(call), int(output))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
    elif value is not None:
        raise Unknown("a call with more than values and numbers")
