"""The one training loop, and prediction over whole sets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.errors import CouldNotTell, InputError, TrainingDiverged
from doorward.core.records import Rate
from doorward.core.seeds import make_generator
from doorward.data.samples import Samples
from doorward.models import sequences
from doorward.models.classifier import Classifier, TorchClassifier, computes_bfloat16, evaluating
from doorward.models.encode.dispatch import to_float, to_tensor
from doorward.models.networks import build, check
from doorward.models.spec import InputSpec
from doorward.stats.metrics import accuracy
from doorward.training.augment import AUGMENTATIONS
from doorward.training.settings import (
    EpochRecord,
    TrainingProgress,
    TrainingRecord,
    TrainingSettings,
    default_settings,
)

#: Gives logits (n, k) for images (n, c, h, w) in [0, 1].
LogitsOf: TypeAlias = Callable[[Tensor], Tensor]


class OnBatch(Protocol):
    """Change a batch before it is normalised."""

    def __call__(self, logits_of: LogitsOf, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return images (n, c, h, w) in [0, 1] in the place of x.

        Args:
            logits_of: the model as trained so far, in evaluation mode: batch norm uses its running statistics
                and does not update them, nothing is dropped.
            x, y: images (n, c, h, w) in [0, 1], and labels (n,).

        Raises:
            CouldNotTell: if the logits are of no use; training has diverged.
        """


#: Decoded images that take more bytes than this are streamed.
MEMORY_LIMIT = 2 << 30


def measure_spec(samples: Samples, *, limit: int = 5000) -> InputSpec:
    """Return the spec of a model for these samples: of images, the size, and mean and deviation per channel.

    The size is the first image's; at most `limit` images, evenly spaced, are decoded. Of texts and
    recordings, all are.

    Raises:
        InputError: if there are no samples, or images differ in size.
    """
    if not len(samples):
        raise InputError(f"training needs samples; {samples.provenance.path} holds none")
    return _MEASURES[samples.modality](samples, limit)


def _measure_images(samples: Samples, limit: int) -> InputSpec:
    positions = np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(np.int64)
    height, width, channels = samples.raw(positions[:1])[0].shape
    spec = InputSpec(channels=channels, height=height, width=width)
    x = to_float(to_tensor(samples.select(positions), spec), spec)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp_min(1 / 255)  # (c,)
    return spec.model_copy(
        update={
            "mean": tuple(round(v, 4) for v in mean.tolist()),
            "std": tuple(round(v, 4) for v in std.tolist()),
        }
    )


_MEASURES: dict[str, Callable[[Samples, int], InputSpec]] = {
    "image": _measure_images,
    "text": lambda samples, _: sequences.measure_text(samples),
    "audio": lambda samples, _: sequences.measure_audio(samples),
}


def example_shape(samples: Samples) -> tuple[int, int, int]:
    """Return channels, height and width of the first image; 1 each of texts and recordings, which vary."""
    if samples.modality != "image":
        return 1, 1, 1
    height, width, channels = samples.raw([0])[0].shape
    return channels, height, width


def labels_of(samples: Samples) -> npt.NDArray[np.int64]:
    """Return the labels (n,).

    Raises:
        InputError: if there are none.
    """
    if samples.labels is None:
        raise InputError(f"labels are needed, and {samples.provenance.path} has none")
    return samples.labels


class _Store:
    """Hand out decoded training images in shuffled buffers: one where all fit in memory, else several.

    When streaming, short runs of neighbouring rows (they decode cheaply) are drawn from all over the set
    until a buffer is full, and mixed within it.
    """

    def __init__(self, samples: Samples, spec: InputSpec, device: torch.device, limit: int) -> None:
        capacity = max(1, limit // (spec.channels * spec.height * spec.width))
        self._samples, self._spec, self._device = samples, spec, device
        self._labels = torch.from_numpy(labels_of(samples))
        self._pieces = -(-len(samples) // capacity)
        self._whole = to_tensor(samples, spec).to(device) if self._pieces == 1 else None
        self.sizes = [len(part) for part in torch.arange(len(samples)).tensor_split(self._pieces)]

    def buffers(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (m, c, h, w) uint8 and labels (m,), all of them once."""
        if self._whole is not None:
            yield self._whole, self._labels
            return
        starts = range(0, len(self._samples), max(1, self.sizes[0] // 64))
        runs = [torch.arange(a, min(a + starts.step, starts.stop)) for a in starts]
        order = torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()])
        for positions in order.tensor_split(self._pieces):
            rows = positions.sort().values
            yield (
                to_tensor(self._samples.select(rows.numpy()), self._spec).to(self._device),
                self._labels[rows],
            )


def train(
    module: nn.Module,
    samples: Samples,
    *,
    spec: InputSpec,
    settings: TrainingSettings,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    test: Samples | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
    on_batch: OnBatch | None = None,
    sharpness: float = 0.0,
    memory_limit: int = MEMORY_LIMIT,
) -> TrainingRecord:
    """Train a module in place and leave it in evaluation mode on the device.

    The same generator state, device and number of threads give the same weights.

    Args:
        module: takes what the spec says (normalised images) and gives logits.
        generator: on the CPU; source of order, augmentation, and of dropout where the module has any.
        progress: called after every step.
        on_batch: changes each augmented batch before it is normalised; adversarial training goes here.
            It may take gradients by its images, and leaves those of the weights alone.
        sharpness: length of the step uphill in the weights at which each gradient is taken (sharpness-aware
            minimisation, Foret et al., arXiv:2010.01412); 0 for plain training.
        memory_limit: bytes of decoded images; a larger set is streamed in shuffled buffers.

    Raises:
        InputError: if labels are missing or do not fit the module, or an image does not fit the spec.
        TrainingDiverged: if the loss is no longer finite.
    """
    started = time.monotonic()
    device = torch.device(device)
    if test is not None:  # what does not fit is said before the work, not after it
        labels_of(test)
        to_tensor(test.select(range(min(1, len(test)))), spec)
    store = _Store(samples, spec, device, memory_limit)
    batches = [max(1, round(size / settings.batch_size)) for size in store.sizes]  # near-equal, none tiny
    steps = sum(batches) * settings.epochs
    bfloat16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and computes_bfloat16(device)
    )
    augment = AUGMENTATIONS[settings.augment]

    def logits_of(x: Tensor) -> Tensor:
        with evaluating(module):
            return _logits(module, spec, x, len(samples.classes), bfloat16=bfloat16)

    # On two cores this layout makes convolutions 1.5 times as fast, bfloat16 twice on top of it.
    module.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = _optimizer(module, settings, device)

    def forward_backward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, k) and loss; leave the loss's gradients in the weights."""
        z = _logits(module, spec, x, len(samples.classes), bfloat16=bfloat16)
        loss = F.cross_entropy(z, y, label_smoothing=settings.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return z, loss

    epochs: list[EpochRecord] = []
    step = 0
    with _own_randomness(generator, device):
        for epoch in range(settings.epochs):
            loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
            for (images, labels), count in zip(store.buffers(generator), batches, strict=True):
                for chosen in torch.randperm(len(labels), generator=generator).tensor_split(count):
                    x = to_float(augment(images[chosen.to(device)], generator=generator), spec)
                    y = labels[chosen].to(device)
                    if on_batch is not None:
                        try:
                            x = on_batch(logits_of, x, y, generator=generator)
                        except CouldNotTell as error:
                            raise _diverged(epoch, settings) from error
                    for group in optimizer.param_groups:
                        group["lr"] = settings.rate_at(step / max(1, steps - 1))
                    z, loss = forward_backward(x, y)
                    if sharpness > 0:
                        with _uphill(module, sharpness):
                            forward_backward(x, y)
                    optimizer.step()
                    step += 1
                    loss_sum += loss.detach() * len(y)
                    correct += (z.detach().argmax(1) == y).sum()
                    if progress is not None:
                        last = epochs[-1].loss if epochs else None
                        progress(TrainingProgress(step, steps, epoch, settings.epochs, last))
            if not loss_sum.isfinite():
                raise _diverged(epoch, settings)
            epochs.append(
                EpochRecord(loss=loss_sum.item() / len(samples), accuracy=correct.item() / len(samples))
            )
    module.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return TrainingRecord(
        settings=settings,
        images=len(samples),
        steps=steps,
        epochs=tuple(epochs),
        test_accuracy=None if test is None else evaluate(TorchClassifier(module, spec, test.classes), test),
        precision="bfloat16" if bfloat16 else "float32",
        device=str(device),
        threads=torch.get_num_threads(),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class Trained:
    """A trained classifier and how it came about."""

    classifier: TorchClassifier
    record: TrainingRecord


def train_classifier(
    architecture: str,
    samples: Samples,
    *,
    seed: int,
    spec: InputSpec | None = None,
    settings: TrainingSettings | None = None,
    device: torch.device | str = "cpu",
    test: Samples | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
    on_batch: OnBatch | None = None,
) -> Trained:
    """Build one of our architectures for these images and train it; all randomness comes from the seed.

    Args:
        spec: measured on the images if None.
        settings: the defaults for this architecture and these images if None.

    Raises:
        InputError: if the architecture is unknown, or labels or images do not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    labels_of(samples)
    check(architecture, samples.modality)
    spec = spec or measure_spec(samples)
    if settings is None:
        side = min(spec.height, spec.width)
        settings = default_settings(architecture, images=len(samples), side=side)
    module = build(
        architecture, spec, classes=len(samples.classes), generator=make_generator(seed, "weights")
    )
    record = train(
        module,
        samples,
        spec=spec,
        settings=settings,
        generator=make_generator(seed, "training"),
        device=device,
        test=test,
        progress=progress,
        on_batch=on_batch,
    )
    return Trained(TorchClassifier(module, spec, samples.classes, architecture=architecture), record)


def predict(classifier: Classifier, samples: Samples, *, batch_size: int = 500) -> npt.NDArray[np.int64]:
    """Return the predicted class (n,) of every image, decoded batch by batch.

    Raises:
        InputError: if an image does not fit the classifier.
    """
    predicted = [np.empty(0, dtype=np.int64)]
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            part = samples.select(np.arange(start, min(start + batch_size, len(samples))))
            x = to_float(
                to_tensor(part, classifier.spec).to(classifier.device), classifier.spec
            )  # (n, c, h, w)
            predicted.append(classifier.logits(x).argmax(1).cpu().numpy())
    return np.concatenate(predicted)


def evaluate(classifier: Classifier, samples: Samples, *, batch_size: int = 500) -> Rate:
    """Return the accuracy on labelled images.

    Raises:
        InputError: if there are no labels, or an image does not fit the classifier.
    """
    return accuracy(predict(classifier, samples, batch_size=batch_size), labels_of(samples))


def _logits(module: nn.Module, spec: InputSpec, x: Tensor, classes: int, *, bfloat16: bool) -> Tensor:
    """Return logits (n, k) for images (n, c, h, w) in [0, 1].

    Raises:
        InputError: if the module tells fewer classes apart.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        x = spec.to_model(x)
        z = module(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
    z = spec.to_logits(z)
    if z.shape[1] < classes:
        raise InputError(f"the model gives {z.shape[1]} outputs for {classes} classes")
    return z


def _diverged(epoch: int, settings: TrainingSettings) -> TrainingDiverged:
    return TrainingDiverged(
        f"training diverged in epoch {epoch + 1}: the loss is no longer finite; "
        f"give a learning rate below {settings.learning_rate}"
    )


def _optimizer(module: nn.Module, settings: TrainingSettings, device: torch.device) -> torch.optim.Optimizer:
    weights = [p for p in module.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            weights, settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        weights,
        settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


@contextlib.contextmanager
def _uphill(module: nn.Module, length: float) -> Iterator[None]:
    """Move the weights a step along their gradients inside the block; batch norm keeps its statistics."""
    moved = [p for p in module.parameters() if p.grad is not None]
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        before = [p.detach().clone() for p in moved]
        gradients = [p.grad for p in moved if p.grad is not None]
        total = torch.stack([g.norm() for g in gradients]).norm()
        for p, g in zip(moved, gradients, strict=True):
            p.add_(g * (length / (total + 1e-12)))
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        with torch.no_grad():
            for p, value in zip(moved, before, strict=True):
                p.copy_(value)


@contextlib.contextmanager
def _own_randomness(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed what draws from global generators (dropout) inside the block; the host gets its own state back."""
    seed = int(torch.randint(1 << 62, (), generator=generator))
    on_gpu = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if on_gpu else []))
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        yield
