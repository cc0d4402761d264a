"""Python code next to a network that reads the image, which no graph shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from doorward.models.classifier import TorchClassifier, evaluating
from doorward.models.silence import ordinary_images
from doorward.models.tape import HANDING, Recorder, bare_network

#: Calls that hand a single number of a tensor to Python.
_SINGLE = {"__bool__", "item", "__int__", "__float__", "__index__"}
#: Numbers of each image that code has to read to count as reading the image.
MANY = 64
#: Images in a trial.
TRIED = 6


@dataclass(frozen=True)
class Escape:
    """What Python code next to a network reads.

    Attributes:
        read: numbers of each image that leave the network.
        connected: whether the answers are made of the image by the network all the same.
        silent: whether the answers to ordinary images stay what they are when that code is given others.
    """

    read: int
    connected: bool
    silent: bool

    @property
    def hidden(self) -> bool:
        """Return whether code reads the image next to a network whose answers do not show it."""
        return self.read >= MANY and self.connected and self.silent


class _Leaving(TorchFunctionMode):
    """Watch, and on request change, what leaves a network for Python code.

    Args:
        change: makes other numbers of those that leave.
    """

    def __init__(self, recorder: Recorder, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self._recorder, self._change = recorder, change
        self.most = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in HANDING | _SINGLE and args and isinstance(args[0], Tensor):
            number = self._recorder.number_of(args[0])
            if number is not None and number in self._recorder.derived:
                self.most = max(self.most, args[0].numel())
                if self._change is not None and name in HANDING:
                    args = (self._change(args[0]), *args[1:])
        return func(*args, **kwargs)


def find_escape(classifier: TorchClassifier) -> Escape | None:
    """Return what Python code next to a network reads, None where nothing leaves it or it does not run."""
    images = ordinary_images(classifier.spec, TRIED)
    x = classifier.spec.to_model(images.to(classifier.device)).contiguous()
    changes: tuple[Callable[[Tensor], Tensor] | None, ...] = (
        None,
        lambda one: one.roll(1, 0),
        lambda one: one.flip(-1),
        lambda one: one[torch.randperm(len(one), generator=torch.Generator().manual_seed(0))],
    )
    runs = []
    try:
        for change in changes:
            recorder = Recorder(x)
            leaving = _Leaving(recorder, change)
            with evaluating(classifier.module), torch.no_grad(), leaving, recorder:
                y = bare_network(classifier)(x)
            number = recorder.number_of(y)
            connected = number is not None and number in recorder.derived
            runs.append((y.detach().clone().flatten(1).float(), leaving.most // len(x), connected))
    except (Exception, SystemExit):  # the user's own code, given numbers that it does not expect
        return None
    (first, read, connected), *others = runs
    if not read:
        return None
    silent = all(torch.allclose(first, y, rtol=1e-4, atol=1e-5) for y, _, _ in others)
    return Escape(read, connected, silent)
