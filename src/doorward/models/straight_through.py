"""Straight-through gradients: rounding, and other steps that are flat nearly everywhere, pass them unchanged.

Source: Y. Bengio, N. Leonard, A. Courville, Estimating or Propagating Gradients Through Stochastic Neurons,
2013, arXiv 1308.3432; as an attack on masked gradients: A. Athalye et al., ICML 2018, arXiv 1802.00420.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Names of torch's own functions that are flat nearly everywhere.
FLAT = frozenset({"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"})
#: Functions that turn floats into whole numbers, or that may: the result says whether they did.
_CASTS = frozenset({"to", "type", "type_as", "byte", "char", "short", "int", "long"})
#: Functions that cut the gradient off and compute nothing.
_CUTS = frozenset({"detach", "detach_"})


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, y: Tensor, __: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def passed(y: Tensor, x: Tensor) -> Tensor:
    """Return y with the gradient of x, both being of one shape; y counts as a constant."""
    if not torch.is_grad_enabled():
        return y.detach()  # there is no gradient to pass, and functorch refuses such functions
    result: Tensor = _Through.apply(y.detach(), x)  # type: ignore[no-untyped-call]
    return result


def straight(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function with the same values whose gradient is that of its input, unchanged."""

    def run(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return function(x)
        with torch.no_grad():
            y = function(x)
        return passed(y, x)

    return run


class StraightThrough(nn.Module):
    """Run a module with the same outputs, and with gradients where its own code has none.

    Rounding passes gradients through; so do whole numbers made of floats and turned back, by any elementwise
    arithmetic between. `detach`, `.data` and `no_grad` in its code cut nothing off. Code that runs under
    `inference_mode`, in numpy or in TorchScript stays as it is.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """Return the module's own output."""
        if not torch.is_grad_enabled():
            return self.inner(x)
        with _StraightThroughMode():
            return self.inner(x)


class _StraightThroughMode(TorchFunctionMode):
    """Watch torch's functions as a module calls them, and put straight-through gradients in."""

    def __init__(self) -> None:
        super().__init__()
        #: Whole numbers and the floats that they were made of, by the id of the former; both are kept alive.
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            return None
        name = getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is not None and (name in _CUTS or func == Tensor.data.__get__):  # type: ignore[attr-defined]
            return x
        y = func(*args, **kwargs)
        if not isinstance(y, Tensor):
            return y
        if x is not None and name in FLAT and y.is_floating_point():
            return passed(y, x)
        origin = self._origin(args, name)
        if origin is None or origin.shape != y.shape:
            return y
        if y.is_floating_point():
            return y if x is origin else passed(y, origin)  # else it is a cast among floats
        if y.dtype != torch.bool:
            self._origins[id(y)] = (y, origin)
        return y

    def _origin(self, args: tuple[Any, ...], name: str) -> Tensor | None:
        """Return the floats that the whole numbers among the arguments were made of, if just one was."""
        tensors = [one for one in args if isinstance(one, Tensor)]
        known = [self._origins[id(one)][1] for one in tensors if id(one) in self._origins]
        if len(known) == 1 and not any(one.requires_grad for one in tensors):
            return known[0]
        cast = name in _CASTS and tensors and tensors[0].is_floating_point() and tensors[0].requires_grad
        return tensors[0] if cast and not known else None
