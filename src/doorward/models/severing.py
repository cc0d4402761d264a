"""Build a network from its tape again, with some values held at what ordinary images make of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from doorward.models.tape import Ref, Size, Spread, Tape


@dataclass(frozen=True)
class Cut:
    """A value to be held.

    Attributes:
        elements: of each image's value, all if empty.
        constant: (1, ...) what it is held at.
    """

    value: int
    elements: tuple[int, ...]
    constant: Tensor


def rebuild(tape: Tape, cuts: Sequence[Cut] = ()) -> nn.Module:
    """Return a network that computes what a tape says, for as many images as the tape takes.

    Weights are copies; calls that only made what is held are left out.
    """
    return _Builder(tape, {cut.value: cut for cut in cuts}).build()


class _Builder:
    def __init__(self, tape: Tape, cuts: Mapping[int, Cut]) -> None:
        self._tape, self._cuts = tape, cuts
        self._root, self._graph = nn.Module(), fx.Graph()
        self._held: dict[int, tuple[Tensor, fx.Node]] = {}
        self._values: dict[int, fx.Node] = {}
        self._image = self._graph.placeholder("image")
        self._count: fx.Node | None = None
        self._sizes: dict[Size, Any] = {}

    def build(self) -> nn.Module:
        self._values[0] = self._image
        whole = {number for number, cut in self._cuts.items() if not cut.elements}
        wanted, steps = {self._tape.output}, []
        for step in reversed(self._tape.steps):
            made = {number for number in step.outputs if number is not None}
            if wanted & made and not (wanted & made) <= whole:
                wanted |= set(step.reads)
                steps.append(step)
        for number in whole & wanted:
            self._values[number] = self._constant(self._cuts[number])
        for step in reversed(steps):
            args, kwargs = self._filled((step.args, step.kwargs))
            node = self._graph.call_function(step.call, args, kwargs)
            several = len(step.outputs) > 1 or isinstance(_returns(step.call), list)
            for i, own in enumerate(step.outputs):
                if own is None or own in whole or own not in wanted:
                    continue
                value = self._graph.call_function(operator.getitem, (node, i)) if several else node
                if own in self._cuts:
                    value = self._part(self._cuts[own], value)
                self._values[own] = value
        self._graph.output(self._values[self._tape.output])
        self._graph.lint()
        module = fx.GraphModule(self._root, self._graph)
        module.eval()
        return module

    def _filled(self, value: Any) -> Any:
        def fill(one: Any) -> Any:
            if isinstance(one, Ref):
                return self._values[one.value]
            if isinstance(one, Size):
                return self._size(one)
            if isinstance(one, Spread):
                return self._rows(one.tensor, Size(one.slope, 0))
            return self._tensor(one) if isinstance(one, Tensor) else one

        return tree_map(fill, value, is_leaf=lambda one: isinstance(one, Ref | Size | Spread))

    def _size(self, size: Size) -> Any:
        if size not in self._sizes:
            if self._count is None:
                self._count = self._graph.call_function(torch.ops.aten.sym_size.int, (self._image, 0))
            made = self._count
            if size.slope != 1:
                made = self._graph.call_function(operator.mul, (made, size.slope))
            if size.offset:
                made = self._graph.call_function(operator.add, (made, size.offset))
            self._sizes[size] = made
        return self._sizes[size]

    def _tensor(self, tensor: Tensor) -> fx.Node:
        """Return what reads a tensor of the network's own, of which the module gets a copy."""
        if id(tensor) in self._held:
            return self._held[id(tensor)][1]
        name = f"tensor_{len(self._held)}"
        copy = tensor.detach().clone()
        if copy.is_floating_point() and isinstance(tensor, nn.Parameter):
            self._root.register_parameter(name, nn.Parameter(copy))
        else:
            self._root.register_buffer(name, copy)
        node = self._graph.get_attr(name)
        self._held[id(tensor)] = (tensor, node)
        return node

    def _constant(self, cut: Cut) -> fx.Node:
        """Return a value that is held as a whole, for as many images as there are."""
        return self._rows(cut.constant, Size(1, 0))

    def _rows(self, tensor: Tensor, size: Size) -> fx.Node:
        """Return a tensor (1, ...) as often as a size says."""
        fixed = self._tape.images
        count = self._size(size) if fixed is None else size.slope * fixed
        held = self._tensor(tensor)
        return self._graph.call_function(torch.ops.aten.expand.default, (held, [count, *tensor.shape[1:]]))

    def _part(self, cut: Cut, value: fx.Node) -> fx.Node:
        """Return a value of which some elements are held."""
        chosen = torch.zeros(cut.constant.numel(), dtype=torch.bool)
        chosen[list(cut.elements)] = True
        mask, held = self._tensor(chosen.view(cut.constant.shape)), self._tensor(cut.constant)
        return self._graph.call_function(torch.ops.aten.where.self, (mask, held, value))


def _returns(call: Any) -> Any:
    """Return a list if an operator gives several values, also where it gave but one."""
    schema = getattr(call, "_schema", None)
    if schema is None:
        return None
    listed = len(schema.returns) > 1 or str(schema.returns[0].type).startswith("List")
    return [] if listed else None
