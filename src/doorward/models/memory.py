"""How much memory a model takes for each image that goes through it, measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Share of the memory budget that one pass through the model may take; images and the rest take the other.
SHARE = 0.5
#: How much more a pass takes than its tensors, for what kernels lay out by the way.
WORKSPACE = 1.25
#: Times its input that an image takes where nothing can be measured; large detectors take a hundred times.
UNKNOWN = 256


class PeakMeter(TorchDispatchMode):
    """Count the bytes of the tensors that are made inside the block, as long as they live.

    Attributes:
        peak: the most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {one._cdata for one in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        # a place in memory is given away again, so that those that ended are dropped first
        gone = [key for key, (one, _) in self._live.items() if one.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._live[key]
        for storage in _storages(result):
            if storage._cdata not in given:
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._live[storage._cdata] = (weak, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    found = [one for one in tree_leaves(values) if isinstance(one, Tensor) and one.layout == torch.strided]
    return [one.untyped_storage() for one in found if not one.is_meta]


def measure_peak(run: Callable[[Tensor], Tensor], x: Tensor, *, gradients: bool) -> int | None:
    """Return how many bytes the tensors take that a model makes of inputs x, None if it cannot be watched.

    Args:
        gradients: whether the gradient by the inputs is taken as well.
    """
    try:
        with PeakMeter() as meter, torch.set_grad_enabled(gradients):
            x = x.detach().clone().requires_grad_(gradients)
            y = run(x)
            if gradients:
                torch.autograd.grad(y.sum(), x, allow_unused=True)
    except (Exception, SystemExit):  # code of any kind, which the scan meets where it is wanted
        return None
    return int(meter.peak)
