"""An ONNX graph as a torch module with gradients.

Convolutions, batch norms and linear layers with known weights become torch layers, so that hooks, repairs
and fine-tuning work on them as on any torch model. Everything else runs as a list of functions, made once.
What depends on no more than the input's shape is computed once for each batch size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models.classifier import in_batches
from doorward.models.errors import NotExamined
from doorward.models.formats.input_options import first_line
from doorward.models.formats.onnx.end import find_end
from doorward.models.formats.onnx.operators import (
    TYPES,
    Function,
    Node,
    Operation,
    Unsupported,
    bounded,
    make_function,
    window,
)
from doorward.models.outputs import Candidate, choose, refuse_places, told

if TYPE_CHECKING:
    import onnx

#: How many batch sizes are remembered where the graph computes with its input's shape.
PLANS = 8
#: Operators that a final linear layer may be followed by.
_AFTER_LOGITS = {
    "Add", "Atan", "Cast", "Ceil", "Clip", "DequantizeLinear", "Div", "Dropout", "Erf", "Flatten", "Floor",
    "HardSigmoid", "Identity", "Log", "LogSoftmax", "Max", "Min", "Mul", "QuantizeLinear", "Relu", "Reshape",
    "Round", "Sigmoid", "Softmax", "Softplus", "Softsign", "Squeeze", "Sub", "Tanh", "Unsqueeze",
}  # fmt: skip
#: ONNX's numbers of the whole-number types and of the half types that an image can come in.
_WHOLE = {2, 3, 4, 5, 6, 7, 12, 13}
_HALF = {10: torch.float16, 16: torch.bfloat16}
#: Torch layers by the number of axes of the weight, or of the input.
_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CPU = torch.device("cpu")
#: Name of the value that the layer of chosen features gives; nothing reads it.
_PROBE = "//features"


def is_row_per_image(shape: Sequence[int], batch: int) -> bool:
    """Return whether an output of this shape holds one row of numbers for each image."""
    return len(shape) > 0 and shape[0] == batch and math.prod(shape[1:]) == max([1, *shape[1:]])


def distance(y: Tensor, expected: Tensor) -> float:
    """Return how far outputs are apart, as a share of the largest; infinite if their shapes differ."""
    if y.shape != expected.shape:
        return math.inf
    largest = expected.abs().nan_to_num(0, 0, 0).max().clamp_min(torch.finfo(y.dtype).tiny)
    same = (y == expected) | (y.isnan() & expected.isnan())
    return float((torch.where(same, 0, y - expected).abs() / largest).max())


@dataclass(frozen=True)
class Settled:
    """How many images a model takes at a time (None: any number), and its outputs in a trial."""

    batch: int | None
    outputs: Tensor


def resolve_batch(run: Callable[[Tensor], Tensor], x: Tensor, usual: int) -> Settled:
    """Find out whether a model takes all images together as it takes groups of the usual size.

    Raises:
        Unsupported: if not even groups of the usual size go through.
    """
    with torch.no_grad():
        try:
            apart = in_batches(run, x, usual)
        except InputError:
            raise
        except Exception as error:
            raise Unsupported(f"the graph does not run: {first_line(error)}") from error
        try:
            together = distance(run(x), apart) < 1e-4
        except Exception:  # what a graph for another number of images raises comes in many kinds
            together = False
    return Settled(None if together else usual, apart)


def to_torch(tensor: onnx.TensorProto) -> Tensor:
    """Return an ONNX tensor on the CPU, half types widened to float32.

    Raises:
        Unsupported: if torch has no such number type.
    """
    from onnx import numpy_helper

    if tensor.data_type not in TYPES:
        raise Unsupported(f"the number type {tensor.data_type} of the tensor {tensor.name!r}")
    try:
        array = numpy_helper.to_array(tensor)
    except Exception as error:  # what is wrong with a broken file comes in many kinds
        raise Unsupported(f"the tensor {tensor.name!r} cannot be read: {first_line(error)}") from error
    if array.dtype.name in ("float16", "bfloat16"):
        array = array.astype("float32")
    if array.dtype.name in ("uint16", "uint32", "uint64"):
        array = array.astype("int64")
    return torch.from_numpy(array.copy()).to(TYPES[tensor.data_type])


def read_attribute(proto: onnx.AttributeProto) -> Any:
    """Return an attribute as Python and torch values; an inner graph as it is."""
    from onnx import helper

    value = helper.get_attribute_value(proto)
    if proto.type == proto.STRING:
        return value.decode(errors="replace")
    if proto.type == proto.TENSOR:
        return to_torch(value)
    return list(value) if proto.type in (proto.INTS, proto.FLOATS) else value


@dataclass(frozen=True)
class _Made:
    """A node's function, its inputs, what a trial gave, and whether that depends on the image."""

    node: Node
    function: Function
    names: list[str]
    results: dict[str, Tensor]
    dynamic: bool


@dataclass(frozen=True)
class _Step:
    """A function, or the name of a layer, with the slots that it reads, fills, and empties."""

    function: Function
    layer: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """The steps, what is in the slots at the start, and where each weight goes."""

    steps: tuple[_Step, ...]
    start: tuple[Tensor | None, ...]
    tensors: tuple[tuple[int, str], ...]
    output: int


class OnnxGraph(nn.Module):
    """Run an ONNX graph with one input and the output that holds one row of numbers for each image.

    Args:
        model: the model, with its external data loaded and its local functions inlined.
        shape: shape of a trial input, in the model's own layout; its batch size is that of the graph where
            the graph has a fixed one.
        fixed: whether the graph has a fixed batch size; `forward` takes others where the graph allows it.
        features: name of a graph value that is to pass through the layer `features`.
        classes: how many classes there are, if anything states it.

    Attributes:
        output: name of the output.
        notes: which of several outputs was taken, and why.
        feature_layer: name of the layer whose input are the features, if there is one.

    Raises:
        Unsupported: if the graph has something that has no torch form here; the message names it.
        InputError: if no output is shaped (n, k), or a value would be absurdly large.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        shape: Sequence[int],
        *,
        fixed: bool = False,
        features: str | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        graph = model.graph
        self._opsets = {"ai.onnx": 1} | {o.domain or "ai.onnx": o.version for o in model.opset_import}
        if self._opsets["ai.onnx"] < 7:
            raise Unsupported("its opset is older than 7")
        if graph.sparse_initializer:
            raise Unsupported("it has sparse weights")
        self._constants = {tensor.name: to_torch(tensor) for tensor in graph.initializer}
        source = next(value for value in graph.input if value.name not in self._constants)
        self._input, kind = source.name, source.type.tensor_type.elem_type
        self._whole, self._half = kind in _WHOLE, _HALF.get(kind)
        self._dtype = torch.float64 if TYPES.get(kind) == torch.float64 else torch.float32
        self._homes: dict[str, str] = {}  # where a constant lives on this module, by its name in the graph
        self._usual: dict[str, tuple[int, ...]] = {}
        self._nodes: list[Node] = []
        self._plans: dict[tuple[int | None, torch.device], _Plan] = {}
        self._uses = Counter(_uses(graph))
        self._kept = features

        self._whole_nodes = self._nodes

        with torch.no_grad():
            values = self._lower(graph, shape, fixed)
            self._pass_through_casts(values)
            self.output, self.notes = self._choose_output(
                [value.name for value in graph.output], values, classes
            )
            self.feature_layer = (
                self._find_feature_layer(values) if features is None else self._probe(features, values)
            )
            self._prune()
            self._register(shape)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (n, k) for n images in the model's own layout and number type.

        A model of whole-number pixels takes floats too: they are rounded, and the gradient passes straight
        through.
        """
        if self._half is not None:
            x = x.to(self._half)
        x = x.to(self._dtype)
        if self._whole:
            x = x + (x.round() - x).detach()
        plan = self._plan(tuple(x.shape), x.device)
        values: list[Any] = list(plan.start)
        values[0] = x
        for slot, name in plan.tensors:
            values[slot] = self._tensor(name)
        for step in plan.steps:
            function = step.function if step.layer is None else getattr(self, step.layer)
            result = function(*[values[i] for i in step.inputs])
            if len(step.outputs) == 1:
                values[step.outputs[0]] = result[0] if isinstance(result, tuple) else result
            else:
                for slot, value in zip(step.outputs, result, strict=False):
                    values[slot] = value
            for slot in step.dead:
                values[slot] = None
        y: Tensor = values[plan.output]
        return y.reshape(len(x), -1)

    def strip_end(self, classes: int) -> tuple[str, ...]:
        """Leave out what squashes the scores at the end from now on; return its names, in order."""
        values = self._known()
        values[self._input] = torch.empty(self._shape, device="meta")
        for made in self._walk(self._shape, _CPU):
            values |= made.results
        found = find_end(self._nodes, self.output, values)
        self._whole_nodes = list(self._nodes)
        self._nodes = [found.instead.get(node.outputs[0], node) for node in self._nodes]
        self._plans.clear()
        return found.names

    def restore_end(self) -> None:
        """Take back what `strip_end` did."""
        self._nodes = self._whole_nodes
        self._plans.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the plans, whose functions cannot be pickled; they are made again."""
        return self.__dict__ | {"_plans": {}}

    # --- reading a graph -------------------------------------------------------------------------------

    def _lower(self, graph: onnx.GraphProto, shape: Sequence[int], fixed: bool) -> dict[str, Tensor]:
        """Fold what is known, put layers where weights are known, and return every value of a trial run."""
        values: dict[str, Tensor] = dict(self._constants)
        values[self._input] = torch.empty(tuple(shape), dtype=self._dtype, device="meta")
        for node in self._unfold(graph, values):
            with _naming(node):
                self._lower_node(node, values, fixed)
        return values

    def _unfold(self, graph: onnx.GraphProto, values: dict[str, Tensor]) -> Iterator[Node]:
        """Yield the nodes of a graph in order, with the branches of `If` resolved."""
        for proto in graph.node:
            node = self._read_node(proto)
            if node.operator != "If":
                yield node
                continue
            with _naming(node):
                condition = values[node.inputs[0]]
            if condition.is_meta:
                yield from self._unfold_both(node, values)
                continue
            with _naming(node):
                branch = node.attributes["then_branch" if condition.all() else "else_branch"]
                tensors = {tensor.name: to_torch(tensor) for tensor in branch.initializer}
            self._constants |= tensors
            values |= tensors
            yield from self._unfold(branch, values)
            for inner, outer in zip(branch.output, node.outputs, strict=True):
                yield Node("Identity", (inner.name,), (outer,), {}, 13)

    def _unfold_both(self, node: Node, values: dict[str, Tensor]) -> Iterator[Node]:
        """Yield both branches of an `If` whose condition depends on the image, and what chooses of them.

        Both have to give values of one shape; what either would refuse to compute is computed all the same.
        """
        made: list[list[str]] = []
        for number, key in enumerate(("then_branch", "else_branch")):
            branch = node.attributes[key]
            names = {name: f"{node.outputs[0]}/{number}/{name}" for name in _names_made(branch)}
            own = _renamed(branch, names)
            with _naming(node):
                tensors = {tensor.name: to_torch(tensor) for tensor in own.initializer}
            self._constants |= tensors
            values |= tensors
            self._uses.update(_uses(own))
            yield from self._unfold(own, values)
            made.append([value.name for value in own.output])
        for yes, no, outer in zip(*made, node.outputs, strict=False):  # what nobody reads is left out
            yield Node("Where", (node.inputs[0], yes, no), (outer,), {}, 16, node.name)

    def _read_node(self, proto: onnx.NodeProto) -> Node:
        domain = proto.domain or "ai.onnx"
        operator = proto.op_type if domain == "ai.onnx" else f"{domain}.{proto.op_type}"
        outputs = list(proto.output)
        while operator != "Split" and len(outputs) > 1 and not self._uses[outputs[-1]]:
            outputs.pop()  # what nobody reads needs not be made
        bare = Node(operator, tuple(proto.input), tuple(outputs), {}, 1, proto.name)
        with _naming(bare):
            attributes = {attribute.name: read_attribute(attribute) for attribute in proto.attribute}
        return replace(bare, attributes=attributes, opset=self._opsets.get(domain, 1))

    def _lower_node(self, node: Node, values: dict[str, Tensor], fixed: bool) -> None:
        inputs = [name for name in node.inputs if name]
        if missing := [name for name in inputs if name not in values]:
            raise Unsupported(f"no node before it makes its input {missing[0]!r}")
        known = all(name in self._constants for name in inputs)
        if not known and values[node.inputs[0]].is_meta:
            node = self._rewrite(node, values)
        written = node.operator == "Reshape" and node.inputs[1] in self._constants
        if fixed and not known and (written or node.operator == "Concat"):
            self._usual[node.outputs[0]] = tuple(values[node.inputs[0]].shape)
        results = _trial(self._operation(node, values)).results
        values |= results
        if known:
            self._constants |= results
        else:
            self._nodes.append(node)

    def _operation(self, node: Node, values: Mapping[str, Tensor], device: torch.device = _CPU) -> Operation:
        return Operation(node, values, device, self._usual.get(node.outputs[0]))

    def _rewrite(self, node: Node, values: dict[str, Tensor]) -> Node:
        """Return the node with the layer that stands for it, if one does."""
        constant = all(name in self._constants for name in node.inputs[1:] if name)
        if node.operator == "Squeeze" and len(node.inputs) == 1 and "axes" not in node.attributes:
            # read from the trial batch, so that a batch of one does not lose its axis
            axes = [axis for axis, size in enumerate(values[node.inputs[0]].shape) if size == 1]
            return replace(node, attributes={"axes": axes}, opset=11)
        if node.operator == "Conv" and constant:
            return self._conv_layer(node, values)
        if node.operator == "BatchNormalization" and constant:
            return self._batch_norm_layer(node, values)
        if node.operator in ("Gemm", "MatMul") and constant and values[node.inputs[1]].ndim == 2:
            return self._linear_layer(node, values)
        if node.operator == "Add" and constant:
            return self._bias_layer(node, values)
        return node

    def _conv_layer(self, node: Node, values: dict[str, Tensor]) -> Node:
        weight = values[node.inputs[1]]
        if weight.ndim not in _CONVOLUTIONS:
            return node
        strides, dilations, before, after = window(self._operation(node, values), weight.shape[2:])
        if before != after:  # a torch layer pads both sides alike
            padded = f"{node.outputs[0]}/padded"
            ends = [0, 0, *before, 0, 0, *after]
            self._lower_node(
                Node("Pad", node.inputs[:1], (padded,), {"pads": ends}, 10, node.name), values, False
            )
            node = replace(node, inputs=(padded, *node.inputs[1:]))
            before = [0] * len(before)
        groups = node.attributes.get("group", 1)
        layer = _CONVOLUTIONS[weight.ndim](
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(strides),
            tuple(before),
            tuple(dilations),
            groups,
            bias=len(node.inputs) > 2 and node.inputs[2] != "",
            device="meta",
        )
        attributes = {"strides": strides, "dilations": dilations, "pads": [*before, *before], "group": groups}
        names = dict(zip(["weight", "bias"], node.inputs[1:], strict=False))
        return self._add_layer(replace(node, attributes=attributes), layer, names, values)

    def _batch_norm_layer(self, node: Node, values: dict[str, Tensor]) -> Node:
        x, get = values[node.inputs[0]], node.attributes.get
        if x.ndim not in _BATCH_NORMS or get("training_mode", 0) or get("spatial", 1) != 1:
            return node
        layer = _BATCH_NORMS[x.ndim](
            x.shape[1], get("epsilon", 1e-5), 1 - get("momentum", 0.9), device="meta"
        )
        layer.num_batches_tracked = torch.tensor(0)
        names = ["weight", "bias", "running_mean", "running_var"]
        return self._add_layer(node, layer, dict(zip(names, node.inputs[1:], strict=True)), values)

    def _linear_layer(self, node: Node, values: dict[str, Tensor]) -> Node:
        get = node.attributes.get
        if get("transA", 0):
            return node
        weight = values[node.inputs[1]] if get("transB", 0) else values[node.inputs[1]].T  # (out, in)
        names = {"weight": f"{node.outputs[0]}/weight"}
        values[names["weight"]] = (get("alpha", 1.0) * weight).contiguous()
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = get("beta", 1.0) * values[node.inputs[2]]
            if bias.ndim > 1 and bias.shape[0] != 1:
                return node  # another bias for each image
            names["bias"] = f"{node.outputs[0]}/bias"
            values[names["bias"]] = bias.reshape(-1).expand(weight.shape[0]).contiguous()
        layer = nn.Linear(weight.shape[1], weight.shape[0], "bias" in names, device="meta")
        linear = Node("Linear", (node.inputs[0], *names.values()), node.outputs, {}, 1, node.name)
        return self._add_layer(linear, layer, names, values)

    def _bias_layer(self, node: Node, values: dict[str, Tensor]) -> Node:
        """Join a bias to the linear layer that it is added to, if nothing else reads that layer's output."""
        x, b = node.inputs
        last = self._nodes[-1] if self._nodes else None
        if last is None or last.layer is None or last.operator != "Linear" or last.outputs != (x,):
            return node
        weight, bias = values[last.inputs[1]], values[b]
        fits = bias.numel() in (1, len(weight)) and bias.shape[-1:] in ((), (1,), (len(weight),))
        if (
            len(last.inputs) > 2
            or not fits
            or bias.ndim > values[x].ndim
            or self._uses[x] != 1
            or x == self._kept
        ):
            return node
        self._nodes.pop()
        name = f"{x}/bias"
        values[name] = bias.reshape(-1).expand(len(weight)).contiguous()
        self.get_submodule(last.layer).bias = nn.Parameter(values[name], requires_grad=False)
        self._homes[name] = f"{last.layer}.bias"
        return replace(last, inputs=(*last.inputs, name), outputs=node.outputs)

    def _add_layer(
        self, node: Node, layer: nn.Module, names: Mapping[str, str], values: Mapping[str, Tensor]
    ) -> Node:
        """Give a layer its weights and a name, and return the node that it stands for."""
        place = self._free_name(node.name or node.outputs[0])
        for key, name in names.items():
            if not name:
                continue
            value = values[name]
            if getattr(layer, key).shape != value.shape:
                raise Unsupported(f"its {key.replace('_', ' ')} has the shape {tuple(value.shape)}")
            shared = self._tensor(self._homes[name]) if name in self._homes and value.ndim > 1 else None
            if key.startswith("running"):
                setattr(layer, key, value.clone())
            elif isinstance(shared, nn.Parameter):
                setattr(layer, key, shared)
            else:
                # vectors are not shared: exporters merge those that only happen to be equal
                setattr(layer, key, nn.Parameter(value.clone() if name in self._homes else value, False))
            self._homes.setdefault(name, f"{place}.{key}")
        self.add_module(place, layer)
        return replace(node, layer=place)

    def _free_name(self, name: str) -> str:
        name = re.sub(r"\W+", "_", name).strip("_") or "layer"
        while hasattr(self, name):
            name += "_"
        return name

    def _tensor(self, home: str) -> Tensor:
        module, _, name = home.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(module), name) if module else getattr(self, name)
        return tensor

    # --- shaping what was read -------------------------------------------------------------------------

    def _choose_output(
        self, names: Sequence[str], values: Mapping[str, Tensor], classes: int | None
    ) -> tuple[str, tuple[str, ...]]:
        """Return the output that holds the scores of each image, and the note of which was taken."""
        batch = values[self._input].shape[0]
        moving = {name: values[name] for name in names if name in values and values[name].is_meta}
        rows = [
            name
            for name, value in moving.items()
            if value.is_floating_point() and is_row_per_image(value.shape, batch)
        ]
        if rows:
            candidates = [
                Candidate(
                    name,
                    math.prod(values[name].shape[1:]),
                    any(name in self._needed({other}) for other in rows if other != name),
                )
                for name in rows
            ]
            choice = choose(candidates, classes)
            taken = rows[choice.position]
            shapes = {name: tuple(value.shape) for name, value in moving.items()}
            refuse_places(shapes[taken], shapes, classes)
            return taken, (told(rows, taken, choice.reason),) if choice.reason else ()
        listed = ", ".join(f"{name} {tuple(value.shape)}" for name, value in moving.items())
        raise NotExamined(
            "only its file was examined: a classifier has an output of shape (n, classes); "
            f"for {batch} image(s) this model gives: {listed or 'nothing that depends on the image'}"
        )

    def _needed(self, names: set[str]) -> set[str]:
        """Return the names of all values that some values are made of, themselves included."""
        needed = set(names)
        for node in reversed(self._nodes):
            if needed & set(node.outputs):
                needed |= set(node.inputs)
        return needed

    def _probe(self, features: str, values: dict[str, Tensor]) -> str:
        """Let a graph value pass through a layer of its own, and return that layer's name."""
        inner = [name for node in self._nodes for name in node.outputs if name and values[name].is_meta]
        if features not in inner or features == self.output:
            some = ", ".join(name for name in inner if name != self.output)
            raise InputError(
                f"--features {features}: the graph has no such inner value; it has: {some[:300]}"
            )
        layer = self._free_name("features")
        self.add_module(layer, nn.Identity())
        place = next(i for i, node in enumerate(self._nodes) if features in node.outputs)
        self._nodes.insert(place + 1, Node("Identity", (features,), (_PROBE,), {}, 13, layer=layer))
        return layer

    def _find_feature_layer(self, values: dict[str, Tensor]) -> str | None:
        """Return the linear layer that makes the output, found by walking back from it."""
        made = {name: node for node in self._nodes for name in node.outputs}
        name = self.output
        while name in made:
            node = made[name]
            if node.layer is not None and node.operator in ("Conv", "Linear"):
                x, y = values[node.inputs[0]], values[name]
                one = math.prod(x.shape[2:]) == 1 if node.operator == "Conv" else x.ndim == 2
                return node.layer if one and y.numel() == values[self.output].numel() else None
            read = [i for i in node.inputs if i and values[i].is_meta]
            if node.operator not in _AFTER_LOGITS or len(read) != 1:
                return None
            name = read[0]
        return None

    def _prune(self) -> None:
        """Drop what the output does not need."""
        wanted = self._needed({self.output, _PROBE})
        self._nodes = [node for node in self._nodes if wanted & set(node.outputs)]
        layers = {node.layer for node in self._nodes}
        for name in [name for name, _ in self.named_children() if name not in layers]:
            delattr(self, name)
        self._homes = {
            n: home for n, home in self._homes.items() if n in wanted and home.split(".")[0] in layers
        }
        self._constants = {n: v for n, v in self._constants.items() if n in wanted and n not in self._homes}

    def _register(self, shape: Sequence[int]) -> None:
        """Make parameters of the float constants that steps take, and buffers of the others."""
        self._shape = tuple(shape)
        self._bound = False
        for made in self._walk(self._shape, _CPU):
            self._bound |= not made.dynamic
            for name in made.names if made.dynamic and made.node.layer is None else []:
                if name in self._constants:
                    value, place = self._constants.pop(name).contiguous(), self._free_name(name)
                    if value.is_floating_point() and value.ndim:
                        self.register_parameter(place, nn.Parameter(value, requires_grad=False))
                    else:
                        self.register_buffer(place, value)
                    self._homes[name] = place

    def _pass_through_casts(self, values: Mapping[str, Tensor]) -> None:
        """Let gradients pass where floats become whole numbers and floats again, whatever is between."""
        made = {name: node for node in self._nodes for name in node.outputs}

        def origin(name: str) -> str | None:
            """Return the floats that whole numbers are made of, if they are made of one value."""
            node = made.get(name)
            if node is None or len(node.outputs) != 1:
                return None
            read = [one for one in node.inputs if one and values[one].is_meta]
            if node.operator == "Cast" and values[read[0]].is_floating_point():
                return read[0]
            whole = all(_is_whole(values[one]) for one in read)
            return origin(read[0]) if len(read) == 1 and whole else None

        for i, node in enumerate(self._nodes):
            (x, *_), y = node.inputs, values[node.outputs[0]]
            if node.operator != "Cast" or not y.is_floating_point() or not _is_whole(values[x]):
                continue
            source = origin(x)
            if source is not None and values[source].shape == y.shape:
                self._nodes[i] = replace(node, operator="CastThrough", inputs=(x, source))

    # --- running ---------------------------------------------------------------------------------------

    def _known(self) -> dict[str, Tensor]:
        """Return the weights and constants by their names in the graph."""
        return {name: self._tensor(home) for name, home in self._homes.items()} | self._constants

    def _walk(self, shape: tuple[int, ...], device: torch.device) -> Iterator[_Made]:
        """Yield every node with its function, made for inputs of this shape."""
        values = self._known()
        values[self._input] = torch.empty(shape, dtype=self._dtype, device="meta")
        for node in self._nodes:
            with _naming(node):
                made = _trial(self._operation(node, values, device))
            values |= made.results
            yield made

    def _plan(self, shape: tuple[int, ...], device: torch.device) -> _Plan:
        """Return the steps for one batch size, made at its first use."""
        key = (shape[0] if self._bound else None, device)
        if key not in self._plans:
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            with torch.no_grad():
                self._plans[key] = self._make_plan(shape if self._bound else self._shape, device)
        return self._plans[key]

    def _make_plan(self, shape: tuple[int, ...], device: torch.device) -> _Plan:
        slots = {self._input: 0}
        start: dict[str, Tensor] = {}
        steps: list[_Step] = []
        for made in self._walk(shape, device):
            node, names = made.node, made.names
            if not made.dynamic:
                start |= made.results
                continue
            if node.layer is not None:
                names = [node.inputs[0]]
            inputs = tuple(slots.setdefault(name, len(slots)) for name in names)
            outputs = tuple(slots.setdefault(name, len(slots)) for name in node.outputs)
            steps.append(_Step(made.function, node.layer, inputs, outputs, ()))
        needed = {slots[self.output]} | {slots[name] for name in (*self._homes, *start) if name in slots}
        for i, step in reversed(list(enumerate(steps))):
            used = {*step.inputs, *step.outputs}
            steps[i] = replace(step, dead=tuple(used - needed))
            needed |= used
        return _Plan(
            steps=tuple(steps),
            start=tuple(start[name].to(device) if name in start else None for name in slots),
            tensors=tuple((slots[name], home) for name, home in self._homes.items() if name in slots),
            output=slots[self.output],
        )


def _is_whole(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype != torch.bool


def _trial(op: Operation) -> _Made:
    """Make a node's function and run it: on the meta device if it depends on the image, else in earnest."""
    function, names = make_function(op), op.left()
    given = [op.values[name] if name else None for name in names]
    dynamic = any(value.is_meta for value in given if value is not None)
    trial = _results(op.node, function, [None if v is None else v.to("meta") for v in given])
    for value in trial.values():
        bounded(value.shape[1:] if dynamic else value.shape)
    if not dynamic:
        trial = _results(op.node, function, [None if v is None else v.cpu() for v in given])
    return _Made(op.node, function, names, trial, any(value.is_meta for value in trial.values()))


def _results(node: Node, function: Function, given: list[Any]) -> dict[str, Tensor]:
    result = function(*given)
    several = result if isinstance(result, tuple) else (result,)
    if len(several) < len(node.outputs):
        raise Unsupported("its second output")
    return {name: value for name, value in zip(node.outputs, several, strict=False) if name}


def _names_made(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of the values that a graph makes, and those in it."""
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from (name for name in node.output if name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _names_made(attribute.g)


def _renamed(graph: onnx.GraphProto, names: Mapping[str, str]) -> onnx.GraphProto:
    """Return a graph with other names for some values: the two branches of an `If` may use the same."""
    own = type(graph)()
    own.CopyFrom(graph)
    for tensor in own.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for value in own.output:
        value.name = names.get(value.name, value.name)
    for node in own.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                attribute.g.CopyFrom(_renamed(attribute.g, names))
    return own


def _uses(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the name of every value each time that something reads it."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _uses(attribute.g)


@contextmanager
def _naming(node: Node) -> Iterator[None]:
    """Turn whatever goes wrong with a node into one line that names it: graphs are made by anybody."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        named = f"{node.operator} ({node.name})" if node.name else node.operator
        raise Unsupported(f"operator {named}: {first_line(error)}") from error
