"""Modules and functions as classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models.classifier import Classifier, TorchClassifier, evaluating, in_batches, output_tensor
from doorward.models.formats.input_options import LoadOptions, resolve_output, resolve_spec, try_outputs
from doorward.models.spec import InputSpec


def wrap(
    model: nn.Module | Callable[[Tensor], Tensor],
    *,
    classes: Sequence[str] | None = None,
    size: tuple[int, int, int] | None = None,
    spec: InputSpec | None = None,
    features: str | None = None,
) -> Classifier:
    """Make a classifier of a module or function of one's own.

    Args:
        model: takes a batch as `spec` says and gives logits, probabilities or one logit (n, k).
        classes: class names; numbers if None.
        size: (channels, height, width) of images that the model takes as they are, in [0, 1].
        spec: what the model takes, where that is more than a size.
        features: name of the layer whose input are the features.

    Raises:
        InputError: if the model does not take such images, or the classes do not fit its outputs.
    """
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "function")
    if (size is None) == (spec is None):
        raise InputError("wrap needs either size=(channels, height, width) or spec=InputSpec(...)")
    stated = spec or resolve_spec(name, {}, LoadOptions(size=size, layout="NCHW").statement())
    return finish(name, model, stated, classes, features=features, format="python", architecture=name)


def finish(
    path: str | Path,
    model: nn.Module | Callable[[Tensor], Tensor],
    spec: InputSpec,
    labels: Sequence[str] | None,
    *,
    features: str | None,
    format: str,  # noqa: A002 - the field's name
    architecture: str | None = None,
    trials: int = 4,
    batch: int | None = None,
) -> Classifier:
    """Try a model on a few inputs, settle what its outputs mean, and wrap it.

    Args:
        batch: number of inputs that the model takes at a time, where it takes no other.

    Raises:
        InputError: if it does not take the images, or the labels do not fit its outputs.
    """
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        y = try_outputs(
            path,
            spec,
            lambda x: in_batches(lambda part: output_tensor(model(part)), x, batch),
            n=trials,
            device=first.device if first is not None else "cpu",
        )
    spec, classes = resolve_output(path, spec, y, labels)
    if not isinstance(model, nn.Module):
        return FunctionClassifier(model, spec, classes)
    return TorchClassifier(
        model,
        spec,
        classes,
        feature_layer=features,
        format=format,
        architecture=architecture,
        batch=batch,
    )


class FunctionClassifier(Classifier):
    """Wrap a function of one's own. It serves gradients if its outputs carry them."""

    def __init__(self, function: Callable[[Tensor], Tensor], spec: InputSpec, classes: Sequence[str]) -> None:
        super().__init__()
        self.function, self.spec, self.classes = function, spec, tuple(classes)
        x = torch.full((2, *spec.shape), 0.5, requires_grad=True)
        differentiable = self._run(spec.to_model(x)).requires_grad
        self.capabilities = frozenset({"probabilities", "gradients"} if differentiable else {"probabilities"})

    def _run(self, x: Tensor) -> Tensor:
        return output_tensor(self.function(x))
