"""Units that can be pruned: what the layer behind a network's last convolution, or in an MLP block, reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.data import Samples
from doorward.models import TorchClassifier
from doorward.models.encode.dispatch import to_float, to_tensor
from doorward.models.formats.input_options import trial_inputs
from doorward.repairs._replay import Replay
from doorward.repairs.base import like

Convolution = nn.Conv1d | nn.Conv2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d
Reader = nn.Linear | nn.Conv1d | nn.Conv2d

#: Samples that go through at a time.
BATCH = 250
#: Numbers that are computed at a time where units are pruned one after the other.
NUMBERS = 1 << 23
#: How far outputs are raised to see where they go, so that no ReLU behind them hides it.
RAISED = 1000
#: Layers in front of the reader that are looked at, whether they make the units too.
SEARCHED = 8
#: By how much the logits of a network whose units were removed may differ from those with zeros there, as a
#: share of the largest.
SAME = 1e-4


@dataclass(frozen=True)
class Units:
    """Units of one layer, and the layer that reads them; names are those of the classifier's module.

    Attributes:
        reader: the layer that reads the units.
        columns: its inputs that belong to each unit: (c, g).
        producer: the layer that makes the units, where each is made by one of its outputs.
        what: what the units are called.
    """

    reader: str
    columns: Tensor
    producer: str | None
    what: str

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class _Call:
    name: str
    layer: nn.Module
    given: Tensor
    made: Tensor


@dataclass(frozen=True)
class _Maker:
    """A layer whose outputs may be units: how many there are, and along which axis."""

    layer: nn.Module
    count: int
    axis: int


def find_units(classifier: TorchClassifier) -> Units:
    """Return the channels of the last convolution, or the hidden units of the last MLP block behind it.

    Where what is read cannot be told apart by channel (a sum over branches keeps channels apart, joined
    branches do not), each input of the layer behind the last convolution is a unit of its own.

    Raises:
        InputError: if the network has no such layers that are modules of torch.
    """
    calls = _calls(classifier)
    once = [c for c in calls if sum(o.layer is c.layer for o in calls) == 1]
    readers = [c for c in once if isinstance(c.layer, Reader) and getattr(c.layer, "groups", 1) == 1]
    last = max((i for i, c in enumerate(readers) if not isinstance(c.layer, nn.Linear)), default=-1)
    pair = _last_block(readers[last + 1 :])
    if pair is not None:
        maker, reader = pair
        what = "hidden units of the last MLP block"
    elif last < 0 or len(readers) < 2 or (last == 0 and len(readers) == 1):
        raise InputError(
            "pruning takes units of a convolution or of an MLP block away, and this network has none that "
            "are layers of their own: use fine-tuning"
        )
    else:  # without a linear layer behind it, the last convolution makes the logits, and reads the units
        at = last + 1 if last + 1 < len(readers) else last
        maker, reader = readers[at - 1], readers[at]
        what = "channels of the last convolution"
    last_of_unit = _norm_behind(calls, maker) or maker
    axis = -1 if isinstance(maker.layer, nn.Linear) else 1
    count = len(maker.layer.get_parameter("weight"))
    columns = _columns(classifier, _Maker(last_of_unit.layer, count, axis), reader.layer)
    if columns is None:
        width = reader.layer.get_parameter("weight").shape[1]
        return Units(reader.name, torch.arange(width)[:, None], None, "features behind the last block")
    return Units(reader.name, columns, maker.name, what)


def _calls(classifier: TorchClassifier) -> list[_Call]:
    """Return layers with weights, and modules that pass on what they get, in the order in which they run."""
    found: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda layer, args, y: found.append(_Call(name, layer, args[0], y))

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in classifier.module.named_modules()
        if isinstance(layer, Reader | Norm | nn.Identity)
    ]
    try:
        with torch.no_grad():
            classifier.logits(trial_inputs(classifier.spec, classifier.batch or 2).to(classifier.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _last_block(readers: list[_Call]) -> tuple[_Call, _Call] | None:
    """Return the last two linear layers in a row of which one widens and the next narrows again."""
    for first, second in zip(readers[-2::-1], readers[:0:-1], strict=False):
        a, b = (tuple(one.layer.get_parameter("weight").shape) for one in (first, second))  # (out, in)
        if a == b[::-1] and a[0] > a[1]:
            return first, second
    return None


def _norm_behind(calls: list[_Call], maker: _Call) -> _Call | None:
    """Return the batch norm that takes what a layer makes."""
    return next((c for c in calls if isinstance(c.layer, Norm) and c.given is maker.made), None)


def _columns(classifier: TorchClassifier, maker: _Maker, reader: nn.Module) -> Tensor | None:
    """Return which inputs of the reader each output of a layer goes into: (c, g), None if that is not plain.

    Outputs are raised in groups, by the digits of their numbers in base 2, and inputs that move with the
    same groups belong to the same output.
    """
    count, width = maker.count, reader.get_parameter("weight").shape[1]
    x = trial_inputs(classifier.spec, classifier.batch or 2).to(classifier.device)

    def read(raised: Tensor | None) -> Tensor:
        """Return the reader's inputs, a row for each of its columns."""
        caught: list[Tensor] = []

        def lift(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            if raised is None:
                return y
            shape = [1] * y.ndim
            shape[maker.axis] = count
            return y + RAISED * (1 + y.abs().amax()) * raised.to(y).reshape(shape)

        handles = [
            maker.layer.register_forward_hook(lift),
            reader.register_forward_pre_hook(lambda _, args: caught.append(args[0].clone())),
        ]
        try:
            with torch.no_grad():
                classifier.logits(x)
        finally:
            for handle in handles:
                handle.remove()
        return _by_column(caught[-1], reader)

    plain = read(None)
    near = 1e-6 * plain.abs().amax()
    owner, numbers = torch.zeros(width, dtype=torch.long), torch.arange(count)
    for bit in range(max(1, (count - 1).bit_length())):
        ones = numbers >> bit & 1
        moved = [((read(part) - plain).abs().amax(1) > near).cpu() for part in (ones, 1 - ones)]
        if bool((moved[0] == moved[1]).any()):  # by both, or by none
            return None
        owner += moved[0].long() << bit
    if int(owner.amax()) >= count or bool((owner.bincount(minlength=count) != width // count).any()):
        return None
    return owner.argsort(stable=True).reshape(count, -1)


def _by_column(x: Tensor, reader: nn.Module) -> Tensor:
    """Return a layer's inputs as (columns, rest)."""
    return x.transpose(0, -1 if isinstance(reader, nn.Linear) else 1).flatten(1)


@dataclass(frozen=True)
class Sweep:
    """What pruning more and more units does.

    Attributes:
        correct: samples that are right when so many units are pruned, from none to all but one.
        n: how many samples there are.
    """

    correct: tuple[int, ...]
    n: int


def mean_activations(
    classifier: TorchClassifier,
    units: Units,
    samples: Samples,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the mean absolute activation (c,) of each unit, as the reader is given it.

    Args:
        change: puts a trigger into images (n, c, h, w).
    """
    reader = classifier.module.get_submodule(units.reader)
    sums: list[Tensor] = []
    handle = reader.register_forward_pre_hook(
        lambda m, args: sums.append(_by_column(args[0], m).abs().double().mean(1).cpu())
    )
    total, count = torch.zeros(units.columns.numel(), dtype=torch.float64), 0
    try:
        for x in batches(classifier, samples, exact=classifier.batch is not None):
            with torch.no_grad():
                classifier.logits(x if change is None else change(x))
            total += sum(sums) / len(sums) * len(x)
            sums.clear()
            count += len(x)
    finally:
        handle.remove()
    return (total / count)[units.columns].mean(1).float()


def sweep(classifier: TorchClassifier, units: Units, order: Tensor, samples: Samples) -> Sweep:
    """Return how many samples are right at every level of pruning, in one run of what lies before the reader.

    The reader is linear, so what it makes without some units is what it makes, less their part in it.

    Args:
        order: numbers of the units (c,), the first to be pruned first.
    """
    assert samples.labels is not None
    reader = classifier.module.get_submodule(units.reader)
    replay, labels = Replay(classifier, units.reader), torch.from_numpy(samples.labels)
    correct, start = torch.zeros(len(units), dtype=torch.long), 0
    for x in batches(classifier, samples, exact=classifier.batch is not None):
        wanted = labels[start : start + len(x)]
        start += len(x)
        filled = _filled(x, classifier.batch)
        logits = replay.record(filled)
        correct[0] += int((logits[: len(x)].argmax(1).cpu() == wanted).sum())
        # where the reader's outputs are the network's, nothing is left to run
        ends = replay.made.ndim == 2 and torch.equal(classifier.spec.to_logits(replay.made), logits)
        level = 1
        for made in _levels(reader, replay.given, replay.made, units.columns[order[:-1]]):
            if ends:
                logits = classifier.spec.to_logits(made.flatten(0, 1)).reshape(*made.shape[:2], -1)
            else:
                logits = replay.run_many(made)
            right = logits[:, : len(x)].argmax(2).cpu() == wanted  # (levels, n)
            correct[level : level + len(made)] += right.sum(1)
            level += len(made)
    return Sweep(tuple(correct.tolist()), len(samples))


def batches(classifier: TorchClassifier, samples: Samples, *, exact: bool = False) -> Iterator[Tensor]:
    """Yield samples as the classifier takes them, some at a time; at most its own number if `exact`."""
    size = (classifier.batch or BATCH) if exact else BATCH
    for start in range(0, len(samples), size):
        part = samples.select(range(start, min(start + size, len(samples))))
        yield to_float(to_tensor(part, classifier.spec).to(classifier.device), classifier.spec)


def _filled(x: Tensor, size: int | None) -> Tensor:
    """Fill inputs up to the number that a network takes at a time."""
    return x if size is None else torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])


def _levels(reader: nn.Module, given: Tensor, made: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield what a layer makes without its first units, some levels at a time: (levels, *made.shape).

    Args:
        given, made: what the layer is given and makes.
        columns: its inputs that belong to each unit (levels, g), in the order of pruning.
    """
    left, at_a_time = made.double(), max(1, NUMBERS // made.numel())
    for start in range(0, len(columns), at_a_time):
        parts = _parts(reader, given, columns[start : start + at_a_time]).cumsum(0, dtype=torch.float64)
        yield (left - parts).to(made)
        left = left - parts[-1]


def _parts(reader: nn.Module, given: Tensor, columns: Tensor) -> Tensor:
    """Return what the inputs of each unit add to a layer's output: (units, *made.shape)."""
    weight = reader.get_parameter("weight").detach()
    if isinstance(reader, nn.Linear):
        inputs = given[..., columns].flatten(0, -3).permute(1, 0, 2)  # (units, rest, g)
        parts = inputs @ weight[:, columns].permute(1, 2, 0)  # (units, rest, out)
        return parts.reshape(len(columns), *given.shape[:-1], -1)
    assert isinstance(reader, nn.Conv1d | nn.Conv2d)
    return torch.stack([reader._conv_forward(given[:, own], weight[:, own], None) for own in columns])


@contextmanager
def silenced(module: nn.Module, units: Units, pruned: Tensor) -> Iterator[None]:
    """Keep units at zero inside the block, also while the network is trained."""
    reader, columns = module.get_submodule(units.reader), units.columns[pruned].flatten()
    axis = -1 if isinstance(reader, nn.Linear) else 1
    handle = reader.register_forward_pre_hook(
        lambda _, args: (args[0].index_fill(axis, columns.to(args[0].device), 0.0), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def zero(module: nn.Module, units: Units, pruned: Tensor) -> None:
    """Set what a network makes of units to zero, by the weights of the layer that reads them."""
    weight = module.get_submodule(units.reader).get_parameter("weight")
    with torch.no_grad():
        weight[:, units.columns[pruned].flatten()] = 0


def remove(classifier: TorchClassifier, units: Units, pruned: Tensor) -> TorchClassifier:
    """Return a smaller classifier without some units, whose weights in the reader are zero already.

    Ways to cut layers are tried in turn, and the first whose logits stay as they are is taken: all layers
    that make the units (in a residual block several do, and are added), with or without modules that pass
    the units on, or the reader alone.
    """
    kept = torch.ones(len(units), dtype=torch.bool)
    kept[pruned] = False
    x = trial_inputs(classifier.spec, classifier.batch or 4).to(classifier.device)
    makers, passing = _makers(classifier, units)
    with torch.no_grad():
        exact = classifier.logits(x)
        for narrowed, selecting in ((makers, passing), (makers, ()), ((), ())):
            module = copy.deepcopy(classifier.module)
            try:
                _cut(module, units, kept, narrowed, selecting)
                smaller = like(classifier, module)
                now = smaller.logits(x)
            except Exception:
                continue
            if now.shape == exact.shape and bool((now - exact).abs().amax() <= SAME * exact.abs().amax()):
                return smaller
    return classifier


def _makers(classifier: TorchClassifier, units: Units) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all layers whose outputs become the units, and of modules that pass these on."""
    if units.producer is None:
        return (), ()
    calls = _calls(classifier)
    names = [call.name for call in calls]
    reader = classifier.module.get_submodule(units.reader)
    axis = -1 if isinstance(classifier.module.get_submodule(units.producer), nn.Linear) else 1
    makers: list[str] = []
    passing: list[str] = []
    for call in calls[max(0, names.index(units.reader) - SEARCHED) : names.index(units.reader)]:
        fits = call.made.ndim > 1 and call.made.shape[axis] == len(units)
        found = _columns(classifier, _Maker(call.layer, len(units), axis), reader) if fits else None
        if found is not None and torch.equal(found, units.columns):
            (passing if isinstance(call.layer, nn.Identity) else makers).append(call.name)
    return tuple(makers), tuple(passing)


def _cut(
    module: nn.Module, units: Units, kept: Tensor, makers: tuple[str, ...], passing: tuple[str, ...]
) -> None:
    """Cut units out of the layers that make and pass them, and of the reader, which picks them if none do."""
    for name in makers:
        _narrow_outputs(module.get_submodule(name), kept)
    for name in passing:
        module.set_submodule(name, Select(kept))
    reader = module.get_submodule(units.reader)
    _narrow_inputs(reader, units, kept)
    if makers:
        return
    columns = torch.zeros(units.columns.numel(), dtype=torch.bool)
    columns[units.columns[kept].flatten()] = True
    select = Select(columns, axis=-1 if isinstance(reader, nn.Linear) else 1)
    module.set_submodule(units.reader, nn.Sequential(select, reader))


class Select(nn.Module):
    """Pass some channels on."""

    kept: Tensor

    def __init__(self, kept: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("kept", kept.nonzero().flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels that are kept."""
        return x.index_select(self.axis, self.kept)


def _narrow_outputs(layer: nn.Module, kept: Tensor) -> None:
    """Leave a layer those of its outputs that are kept."""
    for tensors in (layer._parameters, layer._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.ndim:
                _replace(layer, name, tensor[kept.to(tensor.device)])
    count = int(kept.sum())
    for name in ("out_features", "out_channels", "num_features"):
        if hasattr(layer, name):
            setattr(layer, name, count)


def _narrow_inputs(layer: nn.Module, units: Units, kept: Tensor) -> None:
    """Leave a layer those of its inputs that belong to units that are kept."""
    columns = units.columns[kept].flatten().sort().values
    weight = layer.get_parameter("weight")
    _replace(layer, "weight", weight[:, columns.to(weight.device)])
    for name in ("in_features", "in_channels"):
        if hasattr(layer, name):
            setattr(layer, name, len(columns))


def _replace(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if name in layer._parameters:
        old = layer.get_parameter(name)
        setattr(layer, name, nn.Parameter(tensor.detach().clone(), old.requires_grad))
    else:
        layer._buffers[name] = tensor.detach().clone()
