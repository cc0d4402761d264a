"""Run the end of a network again and again, from one layer on, without running what comes before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from doorward.models import TorchClassifier
from doorward.models.classifier import evaluating, output_tensor


@dataclass
class _Call:
    """A module that has run: when it began, what it gave, and the version of each tensor in that."""

    module: nn.Module
    began: int
    output: Any
    versions: tuple[int, ...]

    @property
    def changed(self) -> bool:
        """Return whether a tensor was written to after the module had given it."""
        return _versions(self.output) != self.versions


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _cloned(output: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, output)


class Replay:
    """Run a classifier's network from one layer on; the modules that run before it give what they gave.

    This works for whatever Python a network is made of: `record` keeps what the largest modules give that
    end before the layer begins, and `run` has them give it again. What is left is the code between them.

    Args:
        layer: name of the layer. It runs once in each run of the network.
    """

    def __init__(self, classifier: TorchClassifier, layer: str) -> None:
        self._classifier, self._layer = classifier, classifier.module.get_submodule(layer)
        self._calls: list[_Call] = []
        self._fragile: set[int] = set()  # places of calls whose outputs are written to
        self._x = torch.empty(0)
        self.given, self.made = torch.empty(0), torch.empty(0)

    def record(self, x: Tensor) -> Tensor:
        """Return logits (n, k) of inputs (n, c, h, w); keep what the layer is given, and what it makes."""
        self._x = self._classifier.spec.to_model(x)
        while True:
            logits = self._recorded()
            changed = {i for i, call in enumerate(self._calls) if call.changed} - self._fragile
            if not changed:
                return logits
            self._fragile |= changed

    def run(self, made: Tensor) -> Tensor:
        """Return logits (n, k) for what the layer makes, with the inputs that were recorded last."""
        with self._replaying(made):
            return self._forward()

    def run_many(self, made: Tensor) -> Tensor:
        """Return logits (m, n, k) for what the layer makes, m times for the inputs recorded last.

        Where nothing but the layer's output goes into what follows, all run at once as one batch.
        """
        first = self.run(made[0])
        together: Tensor | None = None
        with suppress(Exception):  # of whatever Python follows, where what the layer is given goes on as well
            together = self.run(made.flatten(0, 1)).reshape(*made.shape[:2], -1)
        if together is None or not torch.allclose(together[0], first, rtol=1e-4, atol=1e-5):
            return torch.stack([first, *(self.run(one) for one in made[1:])])
        return together

    def _forward(self) -> Tensor:
        module, spec = self._classifier.module, self._classifier.spec
        with torch.no_grad(), evaluating(module):
            return spec.to_logits(output_tensor(module(self._x)))

    def _recorded(self) -> Tensor:
        clock, done, begun = 0, False, []  # begun: modules that run now, with the time of their beginning
        calls: list[_Call] = []

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal clock, done
            clock += 1
            begun.append(clock)
            if module is self._layer:
                done, self.given = True, args[0].clone()

        def end(module: nn.Module, _: Any, output: Any) -> None:
            began = begun.pop()
            if module is self._layer:
                self.made = output.clone()
            if done:
                return
            while calls and calls[-1].began > began:  # it ran inside of this one
                calls.pop()
            kept = _cloned(output) if len(calls) in self._fragile else output
            calls.append(_Call(module, began, kept, _versions(kept)))

        inner = list(self._classifier.module.modules())
        handles = [module.register_forward_pre_hook(begin) for module in inner]
        handles += [module.register_forward_hook(end) for module in inner]
        try:
            logits = self._forward()
        finally:
            for handle in handles:
                handle.remove()
        self._calls = calls
        return logits

    @contextmanager
    def _replaying(self, made: Tensor) -> Iterator[None]:
        """Have the modules give what they gave, and the layer what is asked for, inside the block."""
        outputs: dict[nn.Module, list[Any]] = {}
        for i, call in enumerate(self._calls):
            output = _cloned(call.output) if i in self._fragile else call.output
            outputs.setdefault(call.module, []).append(output)
        outputs[self._layer] = [made]
        own = {module: module.__dict__.get("forward") for module in outputs}
        for module, queue in outputs.items():
            module.forward = _giving(module.forward, queue)
        try:
            yield
        finally:
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward


def _giving(forward: Any, queue: list[Any]) -> Any:
    """Return a function that gives what is in the queue, and then runs: a module may run again later on."""
    left = iter(queue)

    def give(*args: Any, **kwargs: Any) -> Any:
        for output in left:
            return output
        return forward(*args, **kwargs)

    return give
