"""Classifiers: one face for every file format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell, InputError
from doorward.core.records import Cost, Need
from doorward.core.seeds import make_generator
from doorward.models.fusion import fused
from doorward.models.spec import InputSpec


class Classifier(ABC):
    """Map images (n, c, h, w) in [0, 1] to logits (n, k); or texts or recordings, as rows (n, 1, 1, m).

    Attributes:
        spec: what the model takes.
        classes: class names, k of them.
        capabilities: which needs it serves: some of graph, weights, gradients, features, probabilities.
        format: file format in words, for reports.
        architecture: name in words, where known.
        limitation: why the model serves fewer needs than its format could, if it does.
    """

    spec: InputSpec
    classes: tuple[str, ...]
    capabilities: frozenset[Need]
    format: str = "python"
    architecture: str | None = None
    limitation: str | None = None

    def __init__(self) -> None:
        self._forwards = 0
        self._gradients = 0
        self.device = torch.device("cpu")

    @property
    def cost(self) -> Cost:
        """Return how many images went through so far, without and with their input gradient."""
        return Cost(forwards=self._forwards, gradients=self._gradients)

    @property
    def convolutions(self) -> int | None:
        """Return the number of convolution kernels larger than a pixel, where it is known."""
        return None

    @property
    def parameters(self) -> int | None:
        """Return the number of parameters, where it is known."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (n, k) float32 for images (n, c, h, w) in [0, 1].

        Raises:
            InputError: if the size or the type does not fit.
        """
        self.spec.check(x)
        self._count(x)
        y = self.spec.to_logits(self._run(self.spec.to_model(x)))  # (n, k)
        if y.shape != (len(x), len(self.classes)):
            raise InputError(
                f"the model gives {y.shape[1]} outputs for {len(self.classes)} classes; use --labels"
            )
        return y

    def features(self, x: Tensor) -> Tensor:
        """Return the input (n, d) of the linear layer that makes the logits.

        Raises:
            CouldNotTell: if the model has no such layer that can be reached.
        """
        self.spec.check(x)
        self._count(x)
        return self._run_features(self.spec.to_model(x)).flatten(1).float()

    def _count(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and x.requires_grad:
            self._gradients += len(x)
        else:
            self._forwards += len(x)

    @abstractmethod
    def _run(self, x: Tensor) -> Tensor:
        """Run the model on its own input and return its own output (n, ...)."""

    def _run_features(self, x: Tensor) -> Tensor:
        raise CouldNotTell("this model gives no features")

    def to(self, device: torch.device | str) -> Classifier:
        """Move the model, where it can be moved, and return it."""
        self.device = torch.device(device)
        return self

    @contextmanager
    def fast_inference(self, images: Tensor) -> Iterator[None]:
        """Compute faster and a little less exactly inside the block, where the model stands it.

        Args:
            images: (n, c, h, w) to try it on.
        """
        yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep weights from collecting gradients inside the block; all is as it was afterwards."""
        yield


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


#: Images on which a model shows whether it stands bfloat16.
TRIED = 16


class TorchClassifier(Classifier):
    """Wrap a torch module.

    The module is used in evaluation mode; its mode, weights and hooks are as they were after any call.

    Args:
        module: takes what `spec` says; gives a tensor or something with `.logits`.
        feature_layer: name of the linear layer whose input are the features; found by a trial run if None.
        batch: number of inputs that the module takes at a time, where it takes no other.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: InputSpec,
        classes: Sequence[str],
        *,
        feature_layer: str | None = None,
        format: str = "python",  # noqa: A002 - the field's name
        architecture: str | None = None,
        batch: int | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.batch = batch
        self._layout = torch.contiguous_format
        self.spec = spec
        self.classes = tuple(classes)
        self.format = format
        self.architecture = architecture or type(module).__name__
        first = next(iter(module.parameters()), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self._feature_layer = self._find_feature_layer(feature_layer)
        needs: set[Need] = {"graph", "weights", "probabilities"}
        if spec.differentiable:
            needs.add("gradients")
        self.capabilities = frozenset(needs | ({"features"} if self._feature_layer is not None else set()))

    @property
    def convolutions(self) -> int | None:
        """Return the number of convolution kernels (out, in, h, w) larger than a pixel."""
        kernels = [p for p in self.module.parameters() if p.ndim == 4]
        return sum(max(kernel.shape[2:]) > 1 for kernel in kernels)

    @property
    def parameters(self) -> int | None:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.module.parameters())

    def _run(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and self._layout == torch.channels_last:
            x = x.clone(memory_format=torch.channels_last)  # of one channel too, which counts as both
        with evaluating(self.module):
            return in_batches(lambda part: output_tensor(self.module(part)), x, self.batch)

    def _run_features(self, x: Tensor) -> Tensor:
        if self._feature_layer is None:
            raise CouldNotTell("no linear layer makes this model's logits; name one with --features")
        caught: list[Tensor] = []
        handle = self._feature_layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))

        def run(part: Tensor) -> Tensor:
            self.module(part)
            return caught[-1]

        try:
            with evaluating(self.module):
                return in_batches(run, x, self.batch)
        finally:
            handle.remove()

    def _find_feature_layer(self, name: str | None) -> nn.Module | None:
        """Return the linear layer whose output is the model's output, by a run on noise."""
        modules: dict[str, nn.Module] = dict(self.module.named_modules())
        if name is not None:
            if name not in modules:
                raise InputError(
                    f"--features {name}: no such layer; there are: {', '.join(list(modules)[1:8])}, ..."
                )
            return modules[name]
        outputs: dict[str, Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda _, __, y, key=key: outputs.__setitem__(key, y))
            for key, layer in modules.items()
            if isinstance(layer, nn.Linear)
        ]
        try:
            with torch.no_grad(), evaluating(self.module):
                noise = torch.rand(
                    (self.batch or 2, *self.spec.trial_shape), generator=make_generator(0, "features")
                )
                y = output_tensor(self.module(self.spec.to_model(noise.to(self.device)))).flatten(1)
        finally:
            for handle in handles:
                handle.remove()
        near = 1e-5 * float(y.nan_to_num().abs().amax())
        for key in reversed(outputs):
            if outputs[key].ndim < 2:
                continue
            z = outputs[key].flatten(1)
            squashed = (z, z.softmax(1), z.log_softmax(1), z.sigmoid())
            if z.shape == y.shape and any(torch.allclose(one, y, atol=near) for one in squashed):
                return modules[key]
        return None

    def to(self, device: torch.device | str) -> Classifier:
        """Move the module and return the classifier."""
        self.module.to(device)
        return super().to(device)

    @contextmanager
    def fast_inference(self, images: Tensor) -> Iterator[None]:
        """Compute without needless work in the block, with channels last and in bfloat16, where each works.

        Bfloat16 pays if the device multiplies it natively, and works if the logits hardly move.
        """
        images, kind = images[:TRIED], self.device.type
        with (
            self._simplified(images),
            self._channels_last(images),
            torch.autocast(kind, torch.bfloat16, enabled=self._stands_bfloat16(images)),
        ):
            yield

    @contextmanager
    def _simplified(self, images: Tensor) -> Iterator[None]:
        """Compute with fewer operations in the block, if the module allows it and logits stay as they are."""
        whole = self.module
        with torch.no_grad(), evaluating(whole):
            less = fused(whole)
        if less is None:
            yield
            return
        images = images.to(self.device)
        try:
            with torch.no_grad():
                exact = self.logits(images)
                self.module = less
                if not torch.allclose(self.logits(images), exact, rtol=1e-3, atol=1e-3):
                    self.module = whole
            yield
        finally:
            self.module = whole

    @contextmanager
    def _channels_last(self, images: Tensor) -> Iterator[None]:
        """Lay out kernels and inputs channels last in the block, which is faster, if the module allows it."""
        kernels = [p for p in self.module.parameters() if p.ndim == 4]
        before = [p.data for p in kernels]

        def lay_out(layout: torch.memory_format) -> None:
            self._layout = layout
            for p, held in zip(kernels, before, strict=True):
                p.data = held.clone(memory_format=layout) if layout == torch.channels_last else held

        try:
            if kernels:
                lay_out(torch.channels_last)
                if not self._runs(images):
                    lay_out(torch.contiguous_format)
            yield
        finally:
            lay_out(torch.contiguous_format)

    def _runs(self, images: Tensor) -> bool:
        """Return whether the module gives logits and gradients; views of memory are made for one layout."""
        x = self.spec.to_model(images.to(self.device, copy=True)).detach()
        try:
            with torch.enable_grad():
                torch.autograd.grad(self._run(x.requires_grad_()).sum(), x, allow_unused=True)
        except RuntimeError:
            return False
        return True

    def _stands_bfloat16(self, images: Tensor) -> bool:
        """Return whether bfloat16 pays and moves no logit by more than a twentieth of their spread."""
        if not computes_bfloat16(self.device):
            return False
        images = images.to(self.device)
        with torch.no_grad():
            exact = self.logits(images)
            try:
                with torch.autocast(self.device.type, torch.bfloat16):
                    rough = self.logits(images)
            except RuntimeError:  # an operator that does not mix number types
                return False
        spread = (exact.amax(1) - exact.amin(1)).mean()
        return bool((rough - exact).abs().amax() <= spread / 20)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep weights from collecting gradients inside the block."""
        learning = [p for p in self.module.parameters() if p.requires_grad]
        for p in learning:
            p.requires_grad_(False)
        try:
            with evaluating(self.module):
                yield
        finally:
            for p in learning:
                p.requires_grad_(True)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep a module in evaluation mode inside the block; each part's mode is as it was afterwards."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def in_batches(run: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """Run a model that takes exactly `size` inputs at a time on any number of them (None: on all at once).

    The last batch is filled up with copies of the last input, whose outputs are dropped.
    """
    if size is None:
        return run(x)
    outputs = []
    for part in torch.split(x, size):
        filler = part[-1:].expand(size - len(part), *part.shape[1:])
        outputs.append(run(torch.cat([part, filler]) if len(filler) else part)[: len(part)])
    return torch.cat(outputs)


def output_tensor(y: Any) -> Tensor:
    """Return the tensor in a model's output: itself, its `.logits`, or the first of a tuple."""
    if isinstance(y, Tensor):
        return y
    inner = getattr(y, "logits", None)
    if isinstance(inner, Tensor):
        return inner
    if isinstance(y, tuple | list) and y and isinstance(y[0], Tensor):
        return y[0]
    raise InputError(f"the model gives a {type(y).__name__}, not a tensor of logits")
