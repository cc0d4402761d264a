"""Torch modules as classifiers take them: one tensor of scores, from before a final clip or softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from doorward.models.errors import ModelFailed
from doorward.models.outputs import LOGARITHMS, SIGMOIDS, SOFTMAXES, SQUASHES, Key, follow
from doorward.models.straight_through import StraightThrough

#: Functions that change no number, or all of them alike by the numbers that follow in the call.
_SHAPES = frozenset(
    {
        "clone", "contiguous", "double", "flatten", "float", "reshape", "squeeze", "to", "type", "unsqueeze",
        "view",
    }
)  # fmt: skip
_SUMS = frozenset({"add", "sub", "__add__", "__radd__", "__sub__"})
_PRODUCTS = frozenset(
    {"mul", "multiply", "div", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__"}
)
#: Casts to types that hold fewer numbers, under the name of what they do.
_CASTS = dict.fromkeys(("half", "bfloat16", "byte", "char", "short", "int", "long", "to", "type"), "round")
_COARSE = (torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FOLLOWED = SQUASHES | SOFTMAXES | LOGARITHMS | _SHAPES | _SUMS | _PRODUCTS | frozenset(_CASTS)


class AdaptedModule(nn.Module):
    """Run a module and give its scores alone: one of its outputs, from before what squashes them at its end.

    The end is found as the module runs, whatever Python it is made of, and has to be the same each time.

    Args:
        inner: the module.
        path: the way to the scores in its output.

    Attributes:
        end: names of the functions at the end that are left out, the last one first.
    """

    def __init__(self, inner: nn.Module, path: Sequence[Key]) -> None:
        super().__init__()
        self.inner, self.path = inner, tuple(path)
        self.end: tuple[str, ...] = ()
        self._classes = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (n, k)."""
        if not self.end:
            whole: Tensor = follow(self.inner(x), self.path)
            return whole
        with _Recorder(len(x) * self._classes) as recorder:
            y = follow(self.inner(x), self.path)
        found = recorder.end_of(y)
        if found.names != self.end:
            raise ModelFailed(
                f"the model's outputs ended in {', '.join(self.end)} in a trial, and do not for other inputs"
            )
        scores: Tensor = found.scores
        return scores

    def with_inner(self, inner: nn.Module) -> AdaptedModule:
        """Return the same for another module that computes the same."""
        other = AdaptedModule(inner, self.path)
        other.end, other._classes = self.end, self._classes
        return other

    def strip_end(self, classes: int) -> tuple[str, ...]:
        """Leave out what squashes the scores at the end from now on; return its names, in order."""
        self._classes = classes
        return self.end[::-1]

    def restore_end(self) -> None:
        """Take back what `strip_end` did."""
        self.end = ()

    def find_end(self, x: Tensor, classes: int) -> None:
        """Look for the end in a run on inputs x of the module's own kind.

        Args:
            classes: how many numbers there are in a row of scores.
        """
        try:
            with torch.no_grad(), _Recorder(len(x) * classes) as recorder:
                y = follow(self.inner(x), self.path)
            self.end = recorder.end_of(y).names
        except (Exception, SystemExit):  # code that cannot be watched keeps its end
            self.end = ()


@dataclass(frozen=True)
class _End:
    """Scores from before the end, and the names of what was left out, the last one first."""

    scores: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Call:
    """A call of one of torch's functions on a tensor of scores, and what it made.

    Attributes:
        versions: of the source and of the result when it was made: both count changes in place.
    """

    name: str
    source: Tensor
    result: Tensor
    again: Callable[[Tensor], Tensor]
    versions: tuple[int, int]

    @property
    def untouched(self) -> bool:
        """Return whether nothing changed the source and the result in place since."""
        return (self.source._version, self.result._version) == self.versions


class _Recorder(TorchFunctionMode):
    """Remember the calls that make tensors of as many elements as the scores have."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._elements = elements
        self._calls: dict[int, _Call] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        y = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in _FOLLOWED or not isinstance(y, Tensor) or y.numel() != self._elements:
            return y
        given = list(args) or [kwargs.pop("input", None)]
        x = given[0]
        if not isinstance(x, Tensor) or x is y or x.numel() != y.numel() or len(x) != len(y):
            return y
        if name in _CASTS and y.dtype in _COARSE and x.dtype not in _COARSE:
            name = _CASTS[name]
        if _keeps_rank(name, x, given[1:], kwargs):

            def again(z: Tensor) -> Tensor:
                result: Tensor = func(z, *given[1:], **kwargs)
                return result

            self._calls[id(y)] = _Call(name, x, y, again, (x._version, y._version))
        return y

    def end_of(self, y: Tensor) -> _End:
        """Return the scores from before the end of an output, by the calls that made it.

        What stands between two functions that are left out, such as a product with a number, stays.
        """
        chain: list[_Call] = []
        while (call := self._calls.get(id(chain[-1].source if chain else y))) and call.untouched:
            chain.append(call)
        sure = any(call.name in SOFTMAXES | SIGMOIDS for call in chain)
        dropped = SQUASHES | SOFTMAXES | (LOGARITHMS if sure else frozenset())
        # what is before the first function to be left out is of no interest
        length = max((i + 1 for i, call in enumerate(chain) if call.name in dropped), default=0)
        chain = chain[:length]
        if not chain or not _same(
            reduce(lambda z, call: call.again(z), reversed(chain), chain[-1].source), y
        ):
            return _End(y, ())
        kept = [call for call in reversed(chain) if call.name not in dropped]
        scores = reduce(lambda z, call: call.again(z), kept, chain[-1].source)
        return _End(scores, tuple(call.name for call in chain if call.name in dropped))


def _same(z: Tensor, y: Tensor) -> bool:
    """Return whether two tensors hold the same numbers; what was changed behind torch's back shows here."""
    return torch.equal(z.detach().nan_to_num(), y.detach().nan_to_num())


def _keeps_rank(name: str, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call keeps the order of the scores in each row."""
    if name in SOFTMAXES:
        axis = kwargs.get("dim", args[0] if args else None)
        return isinstance(axis, int) and x.ndim > 1 and x.shape[axis] * len(x) == x.numel()
    others = [*args, *kwargs.values()]
    numbers = [one.item() if isinstance(one, Tensor) and one.numel() == 1 else one for one in others]
    if name in _PRODUCTS:
        return len(numbers) == 1 and isinstance(numbers[0], int | float) and numbers[0] > 0
    if name in _SUMS:
        return len(numbers) == 1 and isinstance(numbers[0], int | float)
    return not any(isinstance(one, Tensor) for one in numbers)


def plain_module(module: nn.Module) -> nn.Module:
    """Return the module itself, whatever it was put into here."""
    while isinstance(module, AdaptedModule | StraightThrough):
        module = module.inner
    return module
