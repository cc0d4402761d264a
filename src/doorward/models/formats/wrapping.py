"""Modules and functions as classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.core.records import Need
from doorward.models.adapted import AdaptedModule
from doorward.models.classifier import (
    Classifier,
    TorchClassifier,
    evaluating,
    in_batches,
    output_tensor,
    why_no_gradient,
)
from doorward.models.formats.input_options import (
    LoadOptions,
    first_line,
    resolve_output,
    resolve_scores,
    resolve_spec,
    trial_inputs,
    try_outputs,
)
from doorward.models.outputs import Key, choose_leaf, follow, leaves, usual_path
from doorward.models.spec import InputSpec
from doorward.models.straight_through import StraightThrough


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
    if not isinstance(model, nn.Module):
        return _finish_function(path, model, spec, labels, trials=trials, batch=batch)
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")

    def run(module: nn.Module, spec: InputSpec) -> Tensor:
        with evaluating(module):
            return try_outputs(
                path,
                spec,
                lambda x: in_batches(lambda part: output_tensor(module(part)), x, batch),
                n=trials,
                device=device,
            )

    finder, y, spec = _first_run(model, spec, None if labels is None else len(labels), run)
    module: nn.Module = model
    adapted = AdaptedModule(model, finder.path or ())
    if spec.modality == "image":
        with evaluating(model):
            adapted.find_end(spec.to_model(trial_inputs(spec, batch or trials).to(device)), y.shape[1])
    scores = resolve_scores(path, spec, y, labels, adapted, lambda: run(adapted, spec))
    if adapted.end or not finder.usual:
        module = adapted

    def wrapped(module: nn.Module) -> TorchClassifier:
        return TorchClassifier(
            module,
            scores.spec,
            scores.classes,
            feature_layer=features,
            format=format,
            architecture=architecture,
            batch=batch,
        )

    classifier = wrapped(module)
    told: tuple[str, ...] = ()
    if classifier.limitation is not None and spec.modality == "image" and spec.dtype != "uint8":
        through = wrapped(StraightThrough(module))
        if through.limitation is None and _same(through, classifier):
            classifier = through
            told = ("the model's own code cuts gradients off (detach or no_grad); here they pass",)
    classifier.notes = (*finder.notes, *scores.notes, *told)
    return classifier


def name_classes(classifier: Classifier, names: tuple[str, ...] | None) -> None:
    """Give the classes the names that the file has for them, if there is one for each."""
    if names is not None and len(names) == len(classifier.classes):
        classifier.classes = names
        assumed = tuple(name for name in classifier.spec.assumed if name != "labels")
        classifier.spec = classifier.spec.model_copy(update={"assumed": assumed})


def _first_run(
    model: nn.Module, spec: InputSpec, classes: int | None, run: Callable[[nn.Module, InputSpec], Tensor]
) -> tuple[_Finder, Tensor, InputSpec]:
    """Run a module for the first time; return what found its scores, the outputs, and what it takes.

    Weights of half precision take either images like them, or those that their own code converts.
    """
    own = own_dtype(model) or "float32"
    first: InputError | None = None
    for dtype in dict.fromkeys([spec.dtype, own] if spec.modality == "image" else [spec.dtype]):
        tried = spec if dtype == spec.dtype else spec.model_copy(update={"dtype": dtype})
        finder = _Finder(model, classes)
        try:
            return finder, run(finder, tried), tried
        except InputError as error:
            first = first or error
    assert first is not None
    raise first


def own_dtype(module: nn.Module) -> str | None:
    """Return the number type that a network's weights have, None where that is float32 or there are none."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    known = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
    return None if first is None else known.get(first.dtype)


def _same(through: TorchClassifier, classifier: TorchClassifier) -> bool:
    """Return whether two classifiers give the same in a trial, the first with gradients."""
    x = trial_inputs(classifier.spec).to(classifier.device)
    with torch.enable_grad():
        own = through.raw_logits(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        return torch.equal(own, classifier.raw_logits(x))


class _Finder(nn.Module):
    """Run a module, and find the scores in what it gives the first time.

    Attributes:
        path: the way to the scores.
        usual: whether `output_tensor` finds them too.
        notes: which of several outputs was taken, and why.
    """

    def __init__(self, inner: nn.Module, classes: int | None) -> None:
        super().__init__()
        self.inner, self._classes = inner, classes
        self.path: tuple[Key, ...] | None = None
        self.usual = True
        self.notes: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (n, k), or whatever else stands in their place."""
        y = self.inner(x)
        if self.path is None:
            self._find(x, y)
        return follow(y, self.path or ())

    def _find(self, x: Tensor, y: Any) -> None:
        found = list(leaves(y))
        if not isinstance(y, Tensor) and len(found) > 1 and x.is_floating_point():
            with suppress(Exception), torch.enable_grad():  # so that it can be told what is made of what
                y = self.inner(x.detach().clone().requires_grad_())
        self.path, note = choose_leaf(y, len(x), self._classes)
        self.notes = (note,) if note else ()
        self.usual = self.path == () or usual_path(y) == self.path


def _finish_function(
    path: str | Path,
    function: Callable[[Tensor], Tensor],
    spec: InputSpec,
    labels: Sequence[str] | None,
    *,
    trials: int,
    batch: int | None,
) -> Classifier:
    """Try a function of the user's own, settle what its outputs mean, and wrap it."""
    y = try_outputs(
        path,
        spec,
        lambda x: in_batches(lambda part: output_tensor(function(part)), x, batch),
        n=trials,
    )
    spec, classes = resolve_output(path, spec, y, labels)
    return FunctionClassifier(function, spec, classes)


class FunctionClassifier(Classifier):
    """Wrap a function of one's own. It serves gradients if its outputs carry them."""

    def __init__(self, function: Callable[[Tensor], Tensor], spec: InputSpec, classes: Sequence[str]) -> None:
        super().__init__()
        self.function, self.spec, self.classes = function, spec, tuple(classes)
        x = torch.full((2, *spec.shape), 0.5, requires_grad=True)
        try:
            with torch.enable_grad():
                self.limitation = why_no_gradient(self._run(spec.to_model(x)), x)
        except (Exception, SystemExit) as error:
            self.limitation = f"its code fails where gradients are wanted: {first_line(error)}"
        needs: set[Need] = {"probabilities"}
        self.capabilities = frozenset(needs | ({"gradients"} if self.limitation is None else set()))

    def _run(self, x: Tensor) -> Tensor:
        return output_tensor(self.function(x))
