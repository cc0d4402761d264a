"""Classifiers: one face for every file format."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from doorward.core.errors import CouldNotTell, DoorwardError, InputError
from doorward.core.records import Cost, Need
from doorward.core.seeds import make_generator
from doorward.models.adapted import AdaptedModule, plain_module
from doorward.models.errors import ModelFailed
from doorward.models.formats.input_options import first_line
from doorward.models.fusion import fused
from doorward.models.logit_scale import LogitScale
from doorward.models.memory import SHARE, UNKNOWN, WORKSPACE, measure_peak
from doorward.models.outputs import follow, usual_path
from doorward.models.spec import InputSpec
from doorward.models.straight_through import passed


@dataclass(frozen=True)
class LogitsAndFeatures:
    """What a model makes of some inputs: logits (n, k) and features (n, d), float32."""

    logits: Tensor
    features: Tensor


class Classifier(ABC):
    """Map images (n, c, h, w) in [0, 1] to logits (n, k); or texts or recordings, as rows (n, 1, 1, m).

    Attributes:
        spec: what the model takes.
        classes: class names, k of them.
        capabilities: which needs it serves: some of graph, weights, gradients, features, probabilities.
        format: file format in words, for reports.
        architecture: name in words, where known.
        limitation: why the model serves fewer needs than its format could, if it does.
        notes: what was left out, shifted or guessed when it was opened, one sentence each, for reports.
        logit_scale: what logits are brought to one scale by, None where they stay as they are
            (see `doorward.models.logit_scale`).
        eight_bit: whether images are rounded to the levels of 8 bits first; gradients pass straight through.
        singly: whether images go through one at a time, however many are given.
        memory: bytes that a scan may take; more images than fit go through in parts. None: no limit.
    """

    spec: InputSpec
    classes: tuple[str, ...]
    capabilities: frozenset[Need]
    format: str = "python"
    architecture: str | None = None
    limitation: str | None = None
    notes: tuple[str, ...] = ()
    logit_scale: LogitScale | None = None
    eight_bit: bool = False
    singly: bool = False
    memory: int | None = None

    def __init__(self) -> None:
        self._forwards = 0
        self._gradients = 0
        self._bytes_per_image: int | None = None
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
        """Return logits (n, k) float32 for images (n, c, h, w) in [0, 1], of one scale if that was set.

        Raises:
            InputError: if the size or the type does not fit.
            ModelFailed: if the model's own code fails, or gives numbers that are not finite.
        """
        return self._scaled(self.raw_logits(x))

    def _scaled(self, y: Tensor) -> Tensor:
        if not bool(torch.isfinite(y).all()):
            raise ModelFailed("the model gives outputs that are not finite")
        return y if self.logit_scale is None else self.logit_scale.apply(y)

    def raw_logits(self, x: Tensor) -> Tensor:
        """Return logits (n, k) float32 in the model's own scale, finite or not.

        Raises:
            InputError: if the size or the type does not fit.
            ModelFailed: if the model's own code fails.
        """
        self.spec.check(x)
        self._count(x)
        with _failing(len(x)):
            parts = [self._in_parts(part) for part in self._as_sent(x)]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)  # (n, k)
        return self._checked(y, len(x))

    def _checked(self, y: Tensor, n: int) -> Tensor:
        if y.shape != (n, len(self.classes)):
            raise InputError(
                f"the model gives {y.shape[1]} outputs for {len(self.classes)} classes; use --labels"
            )
        return y

    def features(self, x: Tensor) -> Tensor:
        """Return the input (n, d) of the linear layer that makes the logits.

        Raises:
            CouldNotTell: if the model has no such layer that can be reached, or fails.
        """
        self.spec.check(x)
        self._count(x)
        with _failing(len(x)):
            return self._run_features(self.spec.to_model(x)).flatten(1).float()

    def _as_sent(self, x: Tensor) -> Sequence[Tensor]:
        """Return images (n, c, h, w) as parts that go through one after the other."""
        if self.eight_bit:
            x = to_levels(x)
        return torch.split(x, 1) if self.singly and len(x) else [x]

    @property
    def most_at_once(self) -> int | None:
        """Return how many images may go through the model at once within the memory; None: any number."""
        if self.memory is None:
            return None
        if self._bytes_per_image is None:
            self._bytes_per_image = max(1, int(WORKSPACE * self._measure_bytes()))
        return max(1, int(SHARE * self.memory) // self._bytes_per_image)

    def _measure_bytes(self) -> int:
        """Return how many bytes an image takes on its way through the model."""
        return 4 * UNKNOWN * math.prod(self.spec.shape)

    def _in_parts(self, x: Tensor) -> Tensor:
        """Return logits (n, k), of as many images at a time as the memory holds.

        With gradients, what a part leaves for the way back is made once more when that is gone: a third more
        work, and memory for one part in place of all.
        """
        most = self.most_at_once
        if most is None or len(x) <= most:
            return self._run_part(x)
        parts = torch.split(x, most)
        if not torch.is_grad_enabled():
            return torch.cat([self._run_part(part) for part in parts])
        kept: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        # an early stop is an exception inside the module, which would look as if a fast path had failed
        with set_checkpoint_early_stop(False):
            return torch.cat([checkpoint(self._run_part, part, **kept) for part in parts])

    def _run_part(self, x: Tensor) -> Tensor:
        return self.spec.to_logits(self._run(self.spec.to_model(x)))

    def logits_and_features(self, x: Tensor) -> LogitsAndFeatures:
        """Return logits (n, k) and features (n, d) of the same inputs, in one run where the model allows it.

        Raises:
            CouldNotTell: as `logits` and `features` do.
        """
        return LogitsAndFeatures(self.logits(x), self.features(x))

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


def has_default_strides(x: Tensor) -> bool:
    """Return whether a tensor lies in memory as torch lays out a new one.

    `is_contiguous` does not look at axes of size 1, by which convolutions choose how their output lies.
    """
    expected, strides = 1, []
    for size in reversed(x.shape):
        strides.append(expected)
        expected *= max(1, size)  # as torch does where there is nothing
    return x.stride() == tuple(reversed(strides))


def to_levels(x: Tensor) -> Tensor:
    """Return images in [0, 1] rounded to the levels of 8 bits, as files hold them, with the gradient of x."""
    levels = x.detach().mul(255).round_().clamp_(0, 255).div_(255)
    return passed(levels, x) if x.requires_grad else levels


@contextmanager
def _failing(n: int) -> Iterator[None]:
    """Turn whatever a model's own code raises into one line: it may work in a trial and fail later."""
    try:
        yield
    except DoorwardError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelFailed(
            f"the model's own code fails for {n} inputs: {type(error).__name__}: {first_line(error)}"
        ) from error


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively; emulated, it is slower than float32.

    A processor that can is not enough: torch may be held to older kernels (ATEN_CPU_CAPABILITY).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    newest = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return device.type == "cpu" and newest and bool(torch.cpu._is_avx512_bf16_supported())


#: Images on which a model shows whether it stands what makes it faster.
TRIED = 16
#: The least cosine between gradients of one network computed in two ways, in float32 and with bfloat16: with
#: that, random networks of eight layers come down to .87 and trained ones to .99.
SAME_DIRECTION, ROUGHLY_SAME_DIRECTION = 0.95, 0.5


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
        #: What brings the module back from where it runs faster to where it runs as it came.
        self._slow_down: list[Callable[[], object]] = []
        if any(p.ndim == 4 and not has_default_strides(p) for p in module.parameters()):
            self._slow_down.append(self._lay_out_as_torch_does)
        self._without_autocast = False
        self.spec = spec
        self.classes = tuple(classes)
        self.format = format
        self.architecture = architecture or type(plain_module(module)).__name__
        first = next(iter(module.parameters()), None)
        self.device = first.device if first is not None else torch.device("cpu")
        trial = self._try(feature_layer)
        self._feature_layer = trial.feature_layer
        needs: set[Need] = {"graph", "weights", "probabilities"}
        if spec.differentiable:
            self.limitation = trial.limitation
        if spec.differentiable and trial.limitation is None:
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
        return self._call(lambda part: output_tensor(self.module(part)), x)

    def _measure_bytes(self) -> int:
        """Return what one batch more of images adds, for each of them."""
        n, kept = self.batch or 1, self._slow_down
        self._slow_down = []  # what fails only because it is watched runs no more slowly for it
        try:
            one, two = (self._peak(count) for count in (n, 2 * n))
        finally:
            self._slow_down = kept
        return super()._measure_bytes() if one is None or two is None else math.ceil(max(one, two - one) / n)

    def _peak(self, count: int) -> int | None:
        x = torch.zeros((count, *self.spec.shape), device=self.device)
        return measure_peak(self._run_part, x, gradients="gradients" in self.capabilities)

    def _call(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the module by a function, as fast as it can, and more slowly where that fails."""
        while True:
            try:
                return self._call_as_is(run, x)
            except (Exception, SystemExit):
                # kernels are chosen by size, so a fast path may fail on what it was not tried on
                if not self._slow_down:
                    raise
                self._slow_down.pop()()

    def _call_as_is(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x.ndim == 4 and self._layout == torch.channels_last:
            x = x.clone(memory_format=torch.channels_last)  # of one channel too, which counts as both
        elif not has_default_strides(x):  # as code that says `view` expects them
            x = x.clone(memory_format=torch.contiguous_format)
        with evaluating(self.module), self._autocast():
            y = in_batches(run, x, self.batch)
        return y.clone() if y.is_inference() and not torch.is_inference_mode_enabled() else y

    def _lay_out_as_torch_does(self) -> None:
        for p in self.module.parameters():
            if not has_default_strides(p):  # `to` leaves kernels of one channel as they are
                p.data = p.data.clone(memory_format=torch.contiguous_format)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Turn autocast off inside the block where it has failed."""
        if not self._without_autocast:
            yield
            return
        with torch.autocast(self.device.type, enabled=False):
            yield

    def _run_features(self, x: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def run(part: Tensor) -> Tensor:
            self.module(part)
            return caught[-1]

        with self._catching_features(caught):
            return self._call(run, x)

    def logits_and_features(self, x: Tensor) -> LogitsAndFeatures:
        """Return logits and features of one run."""
        self.spec.check(x)
        self._count(x)
        caught: list[Tensor] = []
        width = 0

        def run(part: Tensor) -> Tensor:
            nonlocal width
            y = output_tensor(self.module(part)).flatten(1).float()
            width = y.shape[1]
            return torch.cat([y, caught[-1].flatten(1).float()], 1)  # (n, outputs + d)

        with self._catching_features(caught), _failing(len(x)):
            both = self._call(run, self.spec.to_model(x))
            logits = self._checked(self.spec.to_logits(both[:, :width]), len(x))
        return LogitsAndFeatures(self._scaled(logits), both[:, width:])

    @contextmanager
    def _catching_features(self, caught: list[Tensor]) -> Iterator[None]:
        """Append the features of each run of the module in the block to a list."""
        if self._feature_layer is None:
            raise CouldNotTell("no linear layer makes this model's logits; name one with --features")
        handle = self._feature_layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            yield
        finally:
            handle.remove()

    def _try(self, feature_layer: str | None) -> _Trial:
        """Run the module on noise, and find its feature layer and whether inputs get gradients.

        Raises:
            InputError: if there is no layer of that name.
        """
        layer = None if feature_layer is None else self._named_layer(feature_layer)
        noise = torch.rand(
            (self.batch or 2, *self.spec.trial_shape), generator=make_generator(0, "features")
        ).to(self.device)
        limitation, outputs, y = None, _LinearOutputs(self.module), None
        with outputs, torch.enable_grad():
            try:
                y = self._trial_outputs(noise.requires_grad_(self.spec.differentiable))
                if self.spec.differentiable:
                    limitation = why_no_gradient(y, noise)
            except (Exception, SystemExit) as error:
                limitation = f"its code fails where gradients are wanted: {first_line(error)}"
        if y is None:
            with outputs, torch.no_grad():
                try:
                    y = self._trial_outputs(noise.detach())
                except (Exception, SystemExit):  # it may fail on noise, and work on images
                    return _Trial(layer, limitation)
        if layer is None:
            layer = outputs.layer_of(y.detach())
        return _Trial(layer, limitation)

    def _trial_outputs(self, noise: Tensor) -> Tensor:
        with evaluating(self.module):
            return output_tensor(self.module(self.spec.to_model(noise))).flatten(1)

    def _named_layer(self, name: str) -> nn.Module:
        modules: dict[str, nn.Module] = dict(plain_module(self.module).named_modules())
        if name not in modules:
            raise InputError(
                f"--features {name}: no such layer; there are: {', '.join(list(modules)[1:8])}, ..."
            )
        return modules[name]

    def to(self, device: torch.device | str) -> Classifier:
        """Move the module and return the classifier."""
        self.module.to(device)
        return super().to(device)

    def lay_out_for_speed(self) -> None:
        """Lay weights out as processors convolve them, 1.2 to 1.9 times as fast; the values stay the same.

        Code that says `view` where `reshape` would do refuses what comes out, and code may read memory as it
        lies: then the weights stay as they were. Where a later run fails, they are laid out as before.
        """
        if not any(p.ndim == 4 for p in self.module.parameters()):
            return
        noise = torch.rand((self.batch or 2, *self.spec.trial_shape), generator=make_generator(0, "layout"))
        noise = noise.to(self.device)
        exact = self._outcome(noise)
        if exact is None:
            return
        module: Any = self.module
        module.to(memory_format=torch.channels_last)
        self._keep_if_same(noise, exact, self._lay_out_as_torch_does)

    @contextmanager
    def fast_inference(self, images: Tensor) -> Iterator[None]:
        """Compute without needless work in the block, with channels last and in bfloat16, where each works.

        Each is tried on the images first, with gradients where there are any. Bfloat16 pays if the device
        multiplies it natively, and works if the logits hardly move.
        """
        images, kind = images[:TRIED].to(self.device), self.device.type
        before, exact = list(self._slow_down), self._outcome(images)
        if exact is None:  # it does not even run as it came
            yield
            return
        try:
            with (
                self._simplified(images, exact),
                self._channels_last(images, exact),
                torch.autocast(kind, torch.bfloat16, enabled=self._stands_bfloat16(images, exact)),
            ):
                yield
        finally:
            self._slow_down, self._without_autocast = before, False

    @contextmanager
    def _simplified(self, images: Tensor, exact: _Outcome) -> Iterator[None]:
        """Compute with fewer operations in the block, if the module allows it and logits stay as they are."""
        whole = self.module
        inner = whole.inner if isinstance(whole, AdaptedModule) else whole
        with torch.no_grad(), evaluating(whole):
            less = fused(inner)
        if less is None:
            yield
            return

        def undo() -> None:
            self.module = whole

        try:
            self.module = whole.with_inner(less) if isinstance(whole, AdaptedModule) else less
            self._keep_if_same(images, exact, undo)
            yield
        finally:
            undo()

    @contextmanager
    def _channels_last(self, images: Tensor, exact: _Outcome) -> Iterator[None]:
        """Lay out kernels and inputs channels last in the block, which is faster, if the module allows it."""
        kernels = [p for p in self.module.parameters() if p.ndim == 4]
        before = [p.data for p in kernels]

        def lay_out(layout: torch.memory_format) -> None:
            self._layout = layout
            for p, held in zip(kernels, before, strict=True):
                p.data = held.clone(memory_format=layout) if layout == torch.channels_last else held

        def undo() -> None:
            lay_out(torch.contiguous_format)

        try:
            if kernels:
                lay_out(torch.channels_last)
                self._keep_if_same(images, exact, undo)
            yield
        finally:
            undo()

    def _keep_if_same(self, images: Tensor, exact: _Outcome, undo: Callable[[], object]) -> None:
        """Undo a change of how the module runs, at once if it computes something else, or when it fails."""
        now = self._outcome(images)
        if now is not None and now.agrees(exact):
            self._slow_down.append(undo)
        else:
            undo()

    def _outcome(self, images: Tensor) -> _Outcome | None:
        """Return what the module makes of images, without any of what could make it run again more slowly."""
        counted, kept = (self._forwards, self._gradients), self._slow_down
        self._slow_down = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.no_grad():
                    logits = self.raw_logits(images)
                if "gradients" not in self.capabilities:
                    return _Outcome(logits, None)
                x = images.detach().clone().requires_grad_()
                with torch.enable_grad():
                    rows = self.raw_logits(x)
                    # one class counts for more than another, since what softmax gives sums to one
                    weights = torch.linspace(1, 2, rows.shape[1], device=rows.device)
                    (gradient,) = torch.autograd.grad((rows * weights).sum(), x, allow_unused=True)
            return _Outcome(logits, gradient)
        except (Exception, SystemExit):  # whatever a kernel, or code made for one layout, complains of
            return None
        finally:
            (self._forwards, self._gradients), self._slow_down = counted, kept

    def _stands_bfloat16(self, images: Tensor, exact: _Outcome) -> bool:
        """Return whether bfloat16 pays and moves no logit by more than a twentieth of their spread."""
        if not computes_bfloat16(self.device):
            return False
        with torch.autocast(self.device.type, torch.bfloat16):
            rough = self._outcome(images)
        if rough is None:  # an operator that does not mix number types
            return False
        moved = (rough.logits - exact.logits).abs().amax()
        if not bool(moved <= exact.spread / 20) or rough.along(exact) < ROUGHLY_SAME_DIRECTION:
            return False

        def undo() -> None:
            self._without_autocast = True

        self._slow_down.append(undo)
        return True

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


@dataclass(frozen=True)
class _Trial:
    """A run on noise: the feature layer, and why inputs get no gradients (None if they do)."""

    feature_layer: nn.Module | None
    limitation: str | None


@dataclass(frozen=True)
class _Outcome:
    """Logits (n, k) of images, and the gradient (n, c, h, w) of a weighted sum, where there is one."""

    logits: Tensor
    gradient: Tensor | None

    @property
    def spread(self) -> Tensor:
        """Return how far apart the largest and the smallest logit of an image are, on average."""
        return (self.logits.amax(1) - self.logits.amin(1)).mean()

    def agrees(self, exact: _Outcome) -> bool:
        """Return whether this is the same but for rounding."""
        near = 1e-3 * exact.logits.abs() + 1e-4 * exact.spread
        same = (self.logits - exact.logits).abs() <= near
        return bool(same.all()) and self.along(exact) >= SAME_DIRECTION

    def along(self, exact: _Outcome) -> float:
        """Return the cosine between the gradients; 1 where both are zero or missing, 0 where one is."""
        if self.gradient is None or exact.gradient is None:
            return float(self.gradient is exact.gradient)
        a, b = (one.flatten().double() for one in (self.gradient, exact.gradient))
        a, b = (one / one.abs().amax().clamp_min(torch.finfo(torch.float64).tiny) for one in (a, b))
        lengths = float(a.norm() * b.norm())
        return float(a @ b) / lengths if lengths else float(a.norm() == b.norm())


def why_no_gradient(y: Tensor, x: Tensor) -> str | None:
    """Return why outputs y have no gradient by inputs x, None if they have one."""
    if not y.requires_grad:
        return "its own code cuts gradients off (no_grad, inference_mode, detach, or whole numbers)"
    (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    return "its outputs have no gradient by its inputs" if gradient is None else None


class _LinearOutputs:
    """Keep, inside the block, what the linear layers of a module give."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._outputs: dict[nn.Module, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._outputs.clear()
        for layer in self._module.modules():
            if isinstance(layer, nn.Linear):
                self._handles.append(
                    layer.register_forward_hook(lambda own, _, y: self._outputs.__setitem__(own, y))
                )

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def layer_of(self, y: Tensor) -> nn.Module | None:
        """Return the last layer whose output is y (n, k), up to one factor, a softmax or a sigmoid."""
        near = 1e-5 * float(y.nan_to_num().abs().amax())
        for layer, own in reversed(self._outputs.items()):
            if own.ndim < 2 or own.flatten(1).shape != y.shape:
                continue
            z = own.detach().flatten(1)
            squashed = (z, z.softmax(1), z.log_softmax(1), z.sigmoid(), _fitted(z, y))
            if any(torch.allclose(one.to(y.dtype), y, atol=near) for one in squashed):
                return layer
        return None


def _fitted(z: Tensor, y: Tensor) -> Tensor:
    """Return the scores z (n, k), multiplied by one number and moved by one, that are nearest to y."""
    a, b = (one.double() - one.double().mean() for one in (z, y))
    factor = (a * b).sum() / a.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    if z.numel() < 4 or not float(factor) > 0:  # two points lie on a line in any case
        return z
    return factor * a + y.double().mean()


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
    """Return the tensor in a model's output: itself, its `.logits`, or the first of a tuple.

    Raises:
        InputError: if there is none of these.
    """
    path = usual_path(y)
    if path is None:
        raise InputError(f"the model gives a {type(y).__name__}, not a tensor of logits")
    return follow(y, path)
