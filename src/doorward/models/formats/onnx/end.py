"""The end of an ONNX graph: what squashes its scores without changing their order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from doorward.models.formats.onnx.operators import TYPES, UNQUANTISED, Node
from doorward.models.outputs import LOGARITHMS, SIGMOIDS, SOFTMAXES, SQUASHES

#: Operators that change no score.
_SHAPES = {"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
#: Quantised operators that can give their result unrounded, with the place of the output's scale.
_QUANTISED = {
    "QLinearConv": 6,
    "QLinearMatMul": 6,
    "com.microsoft.QGemm": 7,
    "com.microsoft.QLinearAdd": 6,
    "com.microsoft.QLinearMul": 6,
}


@dataclass(frozen=True)
class End:
    """What is left out at the end of a graph.

    Attributes:
        names: of the functions, in order.
        instead: the nodes that take the place of others, by the first output of those.
    """

    names: tuple[str, ...]
    instead: dict[str, Node]


@dataclass(frozen=True)
class _Step:
    """One step back from the output: what is left out (None if nothing is), and where it leads."""

    source: str
    name: str | None = None
    instead: tuple[Node, ...] = ()


def find_end(nodes: Sequence[Node], output: str, values: Mapping[str, Tensor]) -> End:
    """Return what can be left out at the end of a graph.

    Args:
        nodes: those that the output needs.
        values: every value of a trial; on the meta device if it depends on the image.
    """
    steps = list(_walk_back(nodes, output, values))
    sure = any(step.name in SOFTMAXES | SIGMOIDS for step in steps)
    steps = [step for step in steps if step.name is not None and (sure or step.name not in LOGARITHMS)]
    return End(
        tuple(step.name for step in reversed(steps) if step.name is not None),
        {node.outputs[0]: node for step in steps for node in step.instead},
    )


def _walk_back(nodes: Sequence[Node], output: str, values: Mapping[str, Tensor]) -> Iterator[_Step]:
    made = {name: node for node in nodes for name in node.outputs}
    # where a cast passes gradients to is no reader of its own
    read = (name for node in nodes for name in node.inputs[: 1 if node.operator == "CastThrough" else None])
    readers = Counter([output, *read])
    name = output
    alone = {name: node for name, node in made.items() if readers[name] == 1}
    while name in alone:
        step = _step(alone[name], alone, made, values)
        if step is None:
            return
        yield step
        name = step.source


def _step(
    node: Node, alone: Mapping[str, Node], made: Mapping[str, Node], values: Mapping[str, Tensor]
) -> _Step | None:
    """Return one step back, None where the end begins.

    Args:
        alone: nodes by outputs that one other node reads.
        made: nodes by all outputs.
    """
    moving = [name for name in node.inputs if name and values[name].is_meta]
    constants = [values[name] for name in node.inputs if name and not values[name].is_meta]
    if node.operator == "Div" and len(moving) == 2:
        return _softmax_by_hand(node, made, values)
    if node.operator == "CastThrough":
        return _Step(node.inputs[0])
    if len(moving) != 1 or node.layer is not None:
        return None
    (source,) = moving
    kind = node.operator.lower()
    if node.operator == "DequantizeLinear":
        return _dequantised(node, alone.get(source))
    if node.operator in ("Min", "Max") and all(one.numel() == 1 for one in constants):
        return _left_out(node, source, "clip")
    if kind in SOFTMAXES:
        return _left_out(node, source, "softmax") if _over_classes(node, values) else None
    if kind in SQUASHES | LOGARITHMS:
        return _left_out(node, source, kind)
    if node.operator == "Cast":
        whole = not TYPES[node.attributes["to"]].is_floating_point
        return _left_out(node, source, "round") if whole else _Step(source)
    if node.operator in _SHAPES or _keeps_order(node, source, constants):
        return _Step(source)
    return None


def _left_out(node: Node, source: str, name: str) -> _Step:
    return _Step(source, name, (_identity(node, source),))


def _identity(node: Node, source: str) -> Node:
    return Node("Identity", (source,), node.outputs[:1], {}, 13, node.name)


def _keeps_order(node: Node, source: str, constants: Sequence[Tensor]) -> bool:
    """Return whether a node adds one number to all scores, or multiplies all by one that is positive."""
    if len(constants) != 1 or constants[0].numel() != 1 or len(node.inputs) != 2:
        return False
    number = float(constants[0])
    first = node.inputs[0] == source
    if node.operator == "Add" or (node.operator == "Sub" and first):
        return math.isfinite(number)
    return (node.operator == "Mul" or (node.operator == "Div" and first)) and 0 < number < math.inf


def _over_classes(node: Node, values: Mapping[str, Tensor]) -> bool:
    """Return whether a softmax makes the scores of each image sum to one."""
    shape = values[node.inputs[0]].shape
    if node.opset >= 13:
        size: int = shape[node.attributes.get("axis", -1)]
    else:  # all axes from this one on are one
        size = math.prod(shape[node.attributes.get("axis", 1) % len(shape) :])
    return bool(size * shape[0] == math.prod(shape))


def _softmax_by_hand(node: Node, made: Mapping[str, Node], values: Mapping[str, Tensor]) -> _Step | None:
    """Return the step over a quotient of exponentials and their sum."""
    above, below = (made.get(name) for name in node.inputs)
    if above is None or below is None or (above.operator, below.operator) != ("Exp", "ReduceSum"):
        return None
    total, whole = values[below.outputs[0]], values[above.outputs[0]]
    if below.inputs[0] != above.outputs[0] or total.numel() != len(whole):
        return None
    source = above.inputs[0]
    return _left_out(node, source, "softmax")


def _dequantised(node: Node, before: Node | None) -> _Step | None:
    """Return the step over levels that become numbers, and over what made them of numbers."""
    if before is None or before.layer is not None:
        return None
    if before.operator == "QuantizeLinear":
        source = before.inputs[0]
        return _Step(source, "quantize", (_identity(before, source), _identity(node, before.outputs[0])))
    if before.operator not in _QUANTISED or len(before.inputs) <= _QUANTISED[before.operator]:
        return None
    unrounded = replace(before, attributes={**before.attributes, UNQUANTISED: 1})
    return _Step(before.outputs[0], "quantize", (unrounded, _identity(node, before.outputs[0])))
