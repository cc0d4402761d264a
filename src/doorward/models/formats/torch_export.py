"""`torch.export` programs (.pt2), read as data.

`torch.export.load` is not used: it unpickles, evaluates expressions and writes names from the file into
Python source. A program is a zip of raw tensors and one JSON list of operator calls; this module reads both
and calls the operators itself. Convolutions, batch norms and linear layers with weights of their own become
torch layers, so that hooks, repairs and fine-tuning find them as in any torch model.
"""

from __future__ import annotations

import json
import math
import operator
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models.classifier import TorchClassifier, in_batches
from doorward.models.errors import NotExamined
from doorward.models.formats.companions import read_companions, without_facts
from doorward.models.formats.input_options import (
    LoadOptions,
    dtype_name,
    first_line,
    guess_layout,
    read_sidecar,
    resolve_scores,
    resolve_spec,
    trial_inputs,
    try_outputs,
)
from doorward.models.outputs import (
    LOGARITHMS,
    SIGMOIDS,
    SOFTMAXES,
    SQUASHES,
    Candidate,
    choose,
    refuse_places,
    told,
)
from doorward.models.spec import InputSpec
from doorward.models.straight_through import FLAT, passed, straight

#: Numbers in one batch beyond which a program is refused.
MOST_ELEMENTS = 1 << 28
#: Major version of the JSON's schema that this module was written for (torch 2.8 to 2.13).
SCHEMA = 8
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
#: Those of whole numbers, and of floats.
_WHOLE, _FLOATS = {1, 2, 3, 4, 5}, {6, 7, 8, 13}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
#: Arguments of text that choose a variant of an operator; any other (a file name) is refused.
_TEXT_ARGUMENTS = {
    "approximate",
    "equation",
    "indexing",
    "mode",
    "padding",
    "padding_mode",
    "reduce",
    "rounding_mode",
}
#: Operators that change no score.
_SHAPES_ALONE = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "flatten",
    "reshape",
    "squeeze",
    "unsqueeze",
    "view",
}
#: Number types that hold fewer numbers than float32 does.
_COARSE = {torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
#: Checks of sizes and types that make no value.
_CHECKS = {
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range",
    "sym_constrain_range_for_size",
}  # fmt: skip
_NUMBERS: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in "add sub mul floordiv truediv mod pow neg eq ne lt le gt ge and_ or_ not_ getitem".split()  # noqa: SIM905
} | {
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_ite": lambda condition, yes, no: yes if condition else no,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
    "torch.sym_sum": sum,
    "torch._sym_sqrt": math.sqrt,
}


class _UnfitError(Exception):
    """Tells why a program cannot be read or run."""


@dataclass(frozen=True)
class _Value:
    """Stand for a value that is known when the program runs."""

    name: str


class _Device:
    """Stands for the device that the image is on."""


@dataclass
class _Step:
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]
    last: tuple[str, ...] = ()


@dataclass
class _Part:
    """Run a part of a program that was exported as a graph of its own."""

    steps: list[_Step]
    names: list[str]
    results: list[str]

    def __call__(self, *values: Any) -> Any:
        known = dict(zip(self.names, values, strict=True))
        _run(self.steps, known, next(value.device for value in values if isinstance(value, Tensor)))
        made = tuple(known[name] for name in self.results)
        return made[0] if len(made) == 1 else made


class _Folder(nn.Module):
    """Parameters under the names they had in the exported model."""


class Program(nn.Module):
    """Run the operators of an exported program.

    Attributes:
        image_shape: shape of the input, None where any size goes.
        image_dtype: its number type.
        notes: which of several outputs was taken, and why.

    Args:
        classes: how many classes there are, if anything states it.
    """

    def __init__(
        self, program: Mapping[str, Any], tensors: Mapping[str, Tensor], classes: int | None = None
    ) -> None:
        super().__init__()
        version = program["schema_version"]["major"]
        if version != SCHEMA:
            raise _UnfitError(
                f"its schema has version {version}, {SCHEMA} is what can be read: export it again"
            )
        graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
        self._names: dict[str, str] = {}
        self._layers = 0
        self._swapped: dict[str, _Value] = {}
        images = []
        for argument, spec in zip(graph["inputs"], signature["input_specs"], strict=True):
            (kind, value), *_ = spec.items()
            if kind in _TENSOR_NAMES:
                self._names[argument["as_tensor"]["name"]] = value[_TENSOR_NAMES[kind]]
            elif kind == "user_input" and "as_tensor" in argument:
                images.append(argument["as_tensor"]["name"])
            elif kind not in ("constant_input", "user_input"):
                raise _UnfitError(f"it takes a {kind}")
        if len(images) != 1:
            raise _UnfitError(f"it takes {len(images)} tensors; an image classifier takes one")
        self._keep(tensors)
        meta = graph["tensor_values"][images[0]]
        self.image_shape = tuple(size.get("as_int") for size in meta["sizes"])
        self.image_dtype = _dtype(meta["dtype"])
        given = [
            argument
            for argument, spec in zip(graph["outputs"], signature["output_specs"], strict=True)
            if "user_output" in spec
        ]
        keyed = zip(given, _output_keys(program, len(given)), strict=True)
        outputs = [(argument["as_tensor"]["name"], key) for argument, key in keyed if "as_tensor" in argument]
        if not outputs:
            raise _UnfitError("it gives no tensor")
        self._image = images[0]
        self._shapes = {
            name: [size.get("as_int") for size in value["sizes"]]
            for name, value in graph["tensor_values"].items()
        }
        kinds = {name: value["dtype"] for name, value in graph["tensor_values"].items()}
        self._floats = {name for name, kind in kinds.items() if kind in _FLOATS}
        self._whole: list[tuple[_Step, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        #: Values that depend on the image.
        self._moving = {self._image}
        results = [name for name, _ in outputs]
        self._steps = self._compile(graph["nodes"], *results)
        self._output, self.notes = self._choose_output(results, [key for _, key in outputs], classes)
        self._pass_through_casts(kinds)
        used = {value.name for step in self._steps for value in _values((step.args, step.kwargs))}
        self._names = {value: name for value, name in self._names.items() if value in used}
        self._mutates = any(isinstance(step.call, _Part) or _mutable(step.call) for step in self._steps)

    def forward(self, x: Tensor) -> Tensor:
        """Run the program and return its scores."""
        x = x.clone() if self._mutates else x  # an operator that works in place must not reach the caller's
        values: dict[str, Any] = {value: self._get(name) for value, name in self._names.items()}
        values[self._image] = x
        _run(self._steps, values, x.device)
        y = values[self._output]
        assert isinstance(y, Tensor)
        return y

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Hang the tensors into folders named after the exported model's modules."""
        for name in dict.fromkeys(self._names.values()):
            if name not in tensors:
                raise _UnfitError(f"the tensor {name!r} is not in the archive")
            *path, leaf = name.split(".")
            folder: nn.Module = self
            for part in path:
                if part not in folder._modules:
                    folder.add_module(part, _Folder())
                folder = folder.get_submodule(part)
            tensor = tensors[name]
            if isinstance(tensor, nn.Parameter):
                folder.register_parameter(leaf, tensor)
            else:
                folder.register_buffer(leaf, tensor)

    def _choose_output(
        self, names: Sequence[str], keys: Sequence[str], classes: int | None
    ) -> tuple[str, tuple[str, ...]]:
        """Return the name of the output that holds the scores, and the note of which was taken.

        Raises:
            InputError: if nothing tells which it is.
        """
        rows = [i for i, name in enumerate(names) if self._is_row(name)]
        if not rows:
            return names[0], ()
        candidates = [
            Candidate(
                keys[i],
                math.prod(self._shapes[names[i]][1:]),
                any(names[i] in self._needed(names[j]) for j in rows if j != i),
            )
            for i in rows
        ]
        choice = choose(candidates, classes)
        taken = rows[choice.position]
        shapes = {key: self._shapes.get(name, []) for key, name in zip(keys, names, strict=True)}
        known = {key: [size or 0 for size in sizes] for key, sizes in shapes.items()}
        refuse_places(known[keys[taken]], known, classes)
        return names[taken], (told(keys, keys[taken], choice.reason),) if choice.reason else ()

    def _is_row(self, name: str) -> bool:
        """Return whether a value holds one row of float numbers for each image."""
        sizes = self._shapes.get(name, [])[1:]
        known = [size for size in sizes if size is not None]
        return len(known) == len(sizes) > 0 and math.prod(known) == max(known) and name in self._floats

    def _needed(self, result: str) -> set[str]:
        """Return the names of all values that a value is made of."""
        needed: set[str] = set()
        wanted = {result}
        for step in reversed(self._steps):
            if wanted & set(_flat(step.outputs)):
                read = {one.name for one in _values((step.args, step.kwargs))}
                needed |= read
                wanted |= read
        return needed

    def _get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor = getattr(self.get_submodule(path), leaf)
        assert isinstance(tensor, Tensor)
        return tensor

    def strip_end(self, classes: int) -> tuple[str, ...]:
        """Leave out what squashes the scores at the end from now on; return its names, in order."""
        steps = list(self._walk_back(classes))
        sure = any(name in SOFTMAXES | SIGMOIDS for _, name in steps)
        left_out = [(step, name) for step, name in steps if name and (sure or name not in LOGARITHMS)]
        self._whole = [(step, step.call, step.args, step.kwargs) for step, _ in left_out]
        for step, _ in left_out:
            step.call, step.args, step.kwargs = _first, step.args[:1], {}
        return tuple(name for _, name in reversed(left_out))

    def restore_end(self) -> None:
        """Take back what `strip_end` did."""
        for step, call, args, kwargs in self._whole:
            step.call, step.args, step.kwargs = call, args, kwargs
        self._whole = []

    def _walk_back(self, classes: int) -> Iterator[tuple[_Step, str]]:
        """Yield the steps at the end that keep the order of the scores, the last first, each with its name.

        The name is empty where a step changes no score, or all alike.
        """
        made = {name: step for step in self._steps for name in _flat(step.outputs)}
        read = (
            one.name
            for step in self._steps
            # where gradients pass to is no reader of its own
            for one in _values((step.args[isinstance(step.call, _Passing) :], step.kwargs))
        )
        readers = Counter([self._output, *read])
        name = self._output
        while name in made and readers[name] == 1:
            step = made[name]
            passing = isinstance(step.call, _Passing)
            source = step.args[1 if passing else 0] if step.args else None
            kind = "" if passing else self._kind_at_end(step, classes)
            if kind is None or not isinstance(source, _Value):
                return
            yield step, kind
            name = source.name

    def _kind_at_end(self, step: _Step, classes: int) -> str | None:
        """Return the name of what squashes scores in a step, "" where it keeps them, None if neither."""
        call = step.call.call if isinstance(step.call, _Straight) else step.call
        if not isinstance(call, torch._ops.OpOverload) or len(step.outputs) != 1:
            return None
        name = call._schema.name.removeprefix("aten::").strip("_")
        others = [*step.args[1:], *step.kwargs.values()]
        numbers = [one for one in others if isinstance(one, int | float) and not isinstance(one, bool)]
        if any(isinstance(one, _Value) for one in others):
            return None
        if name in SOFTMAXES:
            shape = self._shapes.get(step.outputs[0], [])
            rows = len(shape) > 1 and bool(numbers) and shape[int(numbers[0])] == classes
            return "softmax" if rows else None
        if name in SQUASHES | LOGARITHMS:
            return name
        if name in ("to", "_to_copy", "to_copy"):
            kinds = [one for one in others if isinstance(one, torch.dtype)]
            return "round" if kinds and kinds[0] in _COARSE else ""
        if name in ("mul", "div"):
            return "" if len(others) == len(numbers) == 1 and 0 < numbers[0] < math.inf else None
        if name in ("add", "sub"):
            return "" if len(others) == len(numbers) == 1 else None
        return "" if name in _SHAPES_ALONE else None

    def _compile(self, nodes: Sequence[Mapping[str, Any]], *results: str) -> list[_Step]:
        steps = []
        for node in nodes:
            step = self._step(node)
            if step is None:
                continue
            steps.append(step)
            if self._reads_image((step.args, step.kwargs)):
                self._moving |= set(_flat(step.outputs))
        _mark_last(steps, results)
        return steps

    def _reads_image(self, value: Any) -> bool:
        """Return whether arguments of a call depend on the image."""
        return any(one.name in self._moving for one in _values(value))

    def _pass_through_casts(self, kinds: Mapping[str, int]) -> None:
        """Let gradients pass where floats become whole numbers and floats again, whatever is between.

        Args:
            kinds: number types of all values.
        """
        origins: dict[str, str] = {}
        for step in self._steps:
            read = [one.name for one in _values((step.args, step.kwargs)) if one.name in self._moving]
            made = _flat(step.outputs)
            if len(read) != 1 or len(made) != 1 or not isinstance(step.call, torch._ops.OpOverload):
                continue
            (source,), (result,) = read, made
            if kinds.get(result) in _WHOLE:
                cast = step.call._schema.name in ("aten::to", "aten::_to_copy")
                origin = origins.get(source, source if cast else None)
                if origin is not None:
                    origins[result] = origin
            elif source in origins and self._shapes.get(result) == self._shapes.get(origins[source]):
                step.call, step.args = _Passing(step.call), (_Value(origins[source]), *step.args)
        _mark_last(self._steps, [self._output])

    def _step(self, node: Mapping[str, Any]) -> _Step | None:
        target = node["target"]
        args, kwargs = [], {}
        inputs = node["inputs"]
        outputs = [_output_names(output) for output in node["outputs"]]
        match = _ATEN.fullmatch(target)
        if match and match[1] in _CHECKS:
            return None
        if target == "torch.ops.higher_order.wrap_with_set_grad_enabled":
            return self._subprogram(inputs, outputs)
        call = _NUMBERS.get(target) or (_aten(match[1], match[2]) if match else None)
        if call is None:
            raise _UnfitError(f"the operator {target!r} is not supported")
        decoded = {entry["name"]: _decode(entry["arg"]) for entry in inputs}
        if match:
            _refuse_training(match[1], decoded, of_weights=not self._reads_image(decoded))
            first = decoded[inputs[0]["name"]] if inputs else None
            if _mutable(call) and self._owns(first):
                raise _UnfitError(f"{target} changes weights: call .eval() before torch.export.export")
            if _swaps_axes(match[1], decoded):
                self._swapped[outputs[0]] = decoded["self"]
            layer = self._layer(match[1], decoded)
            if layer is not None:
                return _Step(self.get_submodule(layer[0]), layer[1], {}, outputs)
        for entry in inputs:
            value = _decode(entry["arg"])
            if entry.get("kind") == 2 or (not entry.get("kind") and match):
                kwargs[entry["name"]] = value
            else:
                args.append(value)
        if match and match[1] in FLAT:
            call = _Straight(call)
        return _Step(call, tuple(args), kwargs, outputs)

    def _subprogram(self, inputs: Sequence[Mapping[str, Any]], outputs: list[Any]) -> _Step:
        """Run a part that was exported under `no_grad`; here it keeps its gradients."""
        _, graph, *operands = (entry["arg"] for entry in inputs)
        inner = graph["as_graph"]["graph"]
        names = [argument["as_tensor"]["name"] for argument in inner["inputs"]]
        results = [argument["as_tensor"]["name"] for argument in inner["outputs"]]
        self._moving |= set(names)
        part = _Part(self._compile(inner["nodes"], *results), names, results)
        return _Step(part, tuple(_decode(operand) for operand in operands), {}, outputs)

    def _layer(self, kind: str, values: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
        """Make a torch layer for a call whose weights are parameters; return its name and its input."""
        if kind == "addmm" and not {"alpha", "beta"} & set(values) and isinstance(values["mat2"], _Value):
            weight = self._swapped.get(values["mat2"].name)  # a linear layer that was decomposed
            return self._layer("linear", {"input": values["mat1"], "weight": weight, "bias": values["self"]})
        if kind == "convolution" and not values["transposed"] and len(values["stride"]) == 2:
            return self._layer("conv2d", values)
        if kind not in _LAYERS or not self._owns(values.get("weight")):
            return None
        tensors = {}
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = values.get(name)
            if isinstance(value, _Value) and self._owns(value):
                tensors[name] = self._get(self._names[value.name])
            elif value is not None:  # weights that are computed
                return None
        image = values["input"]
        axes = len(self._shapes.get(image.name, ())) if isinstance(image, _Value) else 0
        layer = _LAYERS[kind](values, tensors, axes)
        if layer is None:
            return None
        for name, tensor in tensors.items():
            learned = name in ("weight", "bias") and not isinstance(tensor, nn.Parameter)
            setattr(layer, name, nn.Parameter(tensor) if learned else tensor)
        return self._place(layer, self._names[values["weight"].name]), (values["input"],)

    def _owns(self, value: Any) -> bool:
        """Return whether an argument is one of the program's own tensors."""
        return isinstance(value, _Value) and value.name in self._names

    def _place(self, layer: nn.Module, weight_name: str) -> str:
        """Hang a layer where its weights were, if nothing else is there, else under a name of its own."""
        path = weight_name.removesuffix(".weight")
        folder = self.get_submodule(path) if path != weight_name else None
        own = {name for name, _ in layer.named_parameters()} | {name for name, _ in layer.named_buffers()}
        if isinstance(folder, _Folder) and set(folder.state_dict()) <= own:
            parent, _, leaf = path.rpartition(".")
            self.get_submodule(parent).add_module(leaf, layer)
            return path
        self._layers += 1
        name = f"layer_{self._layers}"
        self.add_module(name, layer)
        return name


def _first(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Straight:
    """Call an operator that is flat nearly everywhere, and let gradients pass."""

    call: Callable[..., Any]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return straight(lambda x: self.call(x, *args, **kwargs))(x)


@dataclass(frozen=True)
class _Passing:
    """Call an operator on whole numbers, and let gradients pass to the floats that those were made of."""

    call: Callable[..., Any]

    def __call__(self, origin: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return passed(self.call(*args, **kwargs), origin)


_TENSOR_NAMES = {
    "parameter": "parameter_name",
    "buffer": "buffer_name",
    "tensor_constant": "tensor_constant_name",
}


def _linear(_: Mapping[str, Any], tensors: Mapping[str, Tensor], axes: int) -> nn.Module | None:
    outer, inner = tensors["weight"].shape
    return nn.Linear(inner, outer, "bias" in tensors, device="meta")


def _conv2d(values: Mapping[str, Any], tensors: Mapping[str, Tensor], axes: int) -> nn.Module | None:
    pairs = {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = values.get(name, default)
        if not isinstance(value, int | list):  # padding may be a word
            return None
        one = value if isinstance(value, list) else [value]
        pairs[name] = (one[0], one[-1])
    groups = values.get("groups", 1)
    outer, inner, height, width = tensors["weight"].shape
    return nn.Conv2d(
        inner * groups,
        outer,
        (height, width),
        bias="bias" in tensors,
        groups=groups,
        device="meta",
        stride=pairs["stride"],
        padding=pairs["padding"],
        dilation=pairs["dilation"],
    )


def _batch_norm(values: Mapping[str, Any], tensors: Mapping[str, Tensor], axes: int) -> nn.Module | None:
    if len(tensors) != 4 or axes not in _BATCH_NORMS:
        return None
    layer: nn.Module = _BATCH_NORMS[axes](
        len(tensors["weight"]), values["eps"], values["momentum"], device="meta"
    )
    layer.num_batches_tracked = torch.tensor(0)
    return layer


#: Torch layers by the number of axes of the input.
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_LAYERS = {"linear": _linear, "conv2d": _conv2d, "batch_norm": _batch_norm}


def _run(steps: Sequence[_Step], values: dict[str, Any], device: torch.device) -> None:
    """Run steps, writing what they make into `values` and dropping what no later step needs."""

    def known(value: Any) -> Any:
        if isinstance(value, _Value):
            return values[value.name]
        if value is _Device:
            return device
        if isinstance(value, list):
            return [known(one) for one in value]
        return value

    for step in steps:
        made = step.call(*map(known, step.args), **{name: known(one) for name, one in step.kwargs.items()})
        if len(step.outputs) == 1:
            _store(step.outputs[0], made, values)
        elif step.outputs:
            for output, one in zip(step.outputs, made, strict=True):
                _store(output, one, values)
        for name in step.last:
            values.pop(name, None)


def _mark_last(steps: Sequence[_Step], results: Sequence[str]) -> None:
    """Note in each step which values no later step needs."""
    wanted = set(results)
    for step in reversed(steps):
        used = {one.name for one in _values((step.args, step.kwargs))} | set(_flat(step.outputs))
        step.last = tuple(used - wanted)
        wanted |= used


def _store(output: Any, made: Any, values: dict[str, Any]) -> None:
    if isinstance(output, list):
        for name, one in zip(output, made, strict=True):
            _store(name, one, values)
    elif output is not None:
        values[output] = made


def _values(value: Any) -> list[_Value]:
    if isinstance(value, _Value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [found for one in value for found in _values(one)]
    return []


def _flat(outputs: Sequence[Any]) -> list[str]:
    return [name for one in outputs for name in (_flat(one) if isinstance(one, list) else [one]) if name]


def _output_names(output: Mapping[str, Any]) -> Any:
    """Return the name, the list of names, or None that an output of a call goes by."""
    (kind, value), *_ = output.items()
    if kind == "as_tensor":
        return value["name"]
    if kind == "as_tensors":
        return [one["name"] for one in value]
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return value.get("as_name")
    if kind == "as_none":
        return None
    raise _UnfitError(f"an operator gives a {kind}")


def _decode(argument: Mapping[str, Any]) -> Any:
    """Return an operator's argument: a plain value, or what stands for one that is known later."""
    (kind, value), *_ = argument.items()
    if kind in ("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings", "as_int_lists"):
        return value
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return _Value(value["name"])
    if kind in ("as_float", "as_floats"):
        return [float(one) for one in value] if isinstance(value, list) else float(value)
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _Value(value["as_name"]) if "as_name" in value else next(iter(value.values()))
    if kind in ("as_tensors", "as_nested_tensors"):
        return [_decode({kind: one}) if isinstance(one, list) else _Value(one["name"]) for one in value]
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_decode({kind[:-1]: one}) for one in value]
    if kind == "as_optional_tensors":
        return [_decode(one) for one in value]
    if kind == "as_optional_tensor":
        return _decode(value)
    if kind == "as_scalar_type":
        return _dtype(value)
    if kind == "as_memory_format":
        return _MEMORY_FORMATS.get(value)
    if kind == "as_layout":
        return torch.strided
    if kind == "as_device":
        return _Device  # constants are made where the image is
    raise _UnfitError(f"an operator takes a {kind}")


def _dtype(number: int) -> torch.dtype:
    if number not in _DTYPES:
        raise _UnfitError(f"number type {number} is not supported")
    return _DTYPES[number]


def _aten(name: str, overload: str) -> Callable[..., Any]:
    """Return one of torch's own operators, if it computes on tensors and touches nothing else."""
    packet = getattr(torch.ops.aten, name, None) if not name.startswith("__") else None
    call = getattr(packet, overload, None) if overload in (packet.overloads() if packet else ()) else None
    if not isinstance(call, torch._ops.OpOverload):
        raise _UnfitError(f"torch has no operator aten.{name}.{overload}")
    for argument in call._schema.arguments:
        if "str" in str(argument.type) and argument.name not in _TEXT_ARGUMENTS:
            raise _UnfitError(f"the operator aten.{name}.{overload} takes text ({argument.name})")
    return call


def _swaps_axes(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a call gives a matrix with its axes swapped."""
    if name == "transpose":
        return {values["dim0"], values["dim1"]} == {0, 1}
    return name == "t" or (name == "permute" and values["dims"] == [1, 0])


def _mutable(call: Callable[..., Any]) -> bool:
    return isinstance(call, torch._ops.OpOverload) and call._schema.is_mutable


def _refuse_training(name: str, values: Mapping[str, Any], *, of_weights: bool) -> None:
    """Raise if a call behaves as in training: random numbers, or statistics of the batch.

    Args:
        of_weights: whether the call depends on no image; standardised weights are made by a batch norm.
    """
    training = not (of_weights and "batch_norm" in name) and (values.get("train") or values.get("training"))
    random = name.startswith(("rand", "bernoulli", "multinomial", "normal")) or values.get("dropout_p")
    if training or random:
        raise _UnfitError(f"{name} is exported in training mode: call .eval() before torch.export.export")


def _output_keys(program: Mapping[str, Any], count: int) -> list[str]:
    """Return what the outputs of a program go by in what its module gave: keys, or their positions."""
    entries = program["graph_module"].get("module_call_graph") or [{}]
    signature = entries[0].get("signature") or {}
    numbers = [f"number {i}" for i in range(count)]
    try:
        (_, tree) = json.loads(signature["out_spec"])
        keys = [str(key) for key in json.loads(tree["context"])]
    except (KeyError, TypeError, ValueError):  # it is no mapping, or one of a kind that is not known here
        return numbers
    return keys if len(keys) == len(numbers) and tree["type"].endswith("ict") else numbers


def read_program(path: Path, classes: int | None = None) -> Program:
    """Read a .pt2 file; nothing in it is unpickled, evaluated or compiled.

    Args:
        classes: how many classes there are, if anything states it.

    Raises:
        InputError: if it is no torch.export program, or needs what is not supported; the message says what.
        NotExamined: if it is no classifier.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return Program(*_unpack(archive), classes).eval()
    except _UnfitError as why:
        raise InputError(f"{path}: cannot use this torch.export program: {why}") from why
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # a damaged archive or JSON of another shape raises anything
        raise InputError(f"{path} is not a readable torch.export program: {first_line(error)}") from error


def _unpack(archive: zipfile.ZipFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the program's JSON and its tensors by name."""
    names = archive.namelist()
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise _UnfitError(f"the archive holds {doubled[0]!r} twice")
    if "serialized_exported_program.json" in names:
        raise _UnfitError(
            "it has the layout of torch 2.7 and before: export it again with torch 2.8 or later"
        )
    root = names[0].split("/")[0] if names else ""
    models = [name for name in names if name.startswith(f"{root}/models/")]
    if f"{root}/archive_format" not in names or len(models) != 1:
        raise _UnfitError(f"the archive holds {len(models)} programs, expected one")
    if archive.read(f"{root}/byteorder").strip() != b"little":
        raise _UnfitError("its numbers are big-endian")
    model = models[0].rsplit("/", 1)[1].removesuffix(".json")
    tensors: dict[str, Tensor] = {}
    for folder, kind in (("weights", "weights"), ("constants", "constants")):
        config = json.loads(archive.read(f"{root}/data/{folder}/{model}_{kind}_config.json"))
        raw: dict[str, bytearray] = {}
        for name, entry in config["config"].items():
            if entry["use_pickle"] or entry["tensor_meta"] is None:
                raise _UnfitError(f"{name} is pickled")
            member = entry["path_name"]
            if member not in raw:
                raw[member] = bytearray(archive.read(f"{root}/data/{folder}/{member}"))
            tensors[name] = _tensor(raw[member], entry)
    return json.loads(archive.read(models[0])), tensors


def _tensor(raw: bytearray, entry: Mapping[str, Any]) -> Tensor:
    meta = entry["tensor_meta"]
    dtype = _dtype(meta["dtype"])
    sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
    if entry["is_param"] and dtype.is_floating_point:
        return nn.Parameter(tensor, requires_grad=bool(meta["requires_grad"]))
    return tensor


def open_exported(path: Path, options: LoadOptions) -> TorchClassifier:
    """Open a .pt2 file as a classifier.

    Raises:
        InputError: if it is no image classifier, or the options do not fit it.
    """
    sidecar, companions = read_sidecar(path), read_companions(path)
    labels = options.labels or sidecar.classes or companions.classes
    program = read_program(path, None if labels is None else len(labels))
    shape = program.image_shape
    if len(shape) != 4:
        raise NotExamined(
            f"{path}: an image classifier takes (n, channels, height, width), this takes {shape}"
        )
    dtype = dtype_name(program.image_dtype)
    if dtype is None:
        raise InputError(f"{path}: images of {program.image_dtype} are not supported")
    stated = [options.statement(), dict(sidecar.input)]
    layout = next((one["layout"] for one in stated if "layout" in one), guess_layout(shape))
    axes = shape[1:] if layout != "NHWC" else (shape[3], shape[1], shape[2])
    facts: dict[str, Any] = {"dtype": dtype} | ({"layout": layout} if layout else {})
    facts |= {n: v for n, v in zip(("channels", "height", "width"), axes, strict=True) if v is not None}
    spec = resolve_spec(path, facts, *stated, without_facts(companions.input, facts))
    batch = shape[0]
    if batch is not None and batch * math.prod(spec.shape) > MOST_ELEMENTS:
        raise InputError(f"{path}: the program takes {batch:,} images at a time, which is too many")

    def run() -> Tensor:
        return try_outputs(path, spec, lambda x: in_batches(program, x, batch))

    y = run()
    any_batch = batch is None or _takes_any_batch(program, spec, y, batch)
    scores = resolve_scores(path, spec, y, labels, program, run)
    classifier = TorchClassifier(
        program,
        scores.spec,
        scores.classes,
        feature_layer=options.features,
        format="torch.export",
        architecture="torch.export program",
        batch=None if any_batch else batch,
    )
    classifier.notes = (*companions.notes, *program.notes, *scores.notes)
    return classifier


def _takes_any_batch(program: Program, spec: InputSpec, y: Tensor, batch: int) -> bool:
    """Return whether a program with a fixed batch size gives the same outputs y (n, k) for another one."""
    n = 3 if batch != 3 else 2
    x = spec.to_model(trial_inputs(spec, len(y))[:n])
    try:
        with torch.no_grad():
            z = program(x).flatten(1).float()
    except Exception:  # an operator that has the batch size written into it
        return False
    return z.shape == y[:n].shape and torch.allclose(z, y[:n], rtol=1e-4, atol=1e-5)
