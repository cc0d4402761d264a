"""Pruning-aware: a backdoor in neurons that pruning leaves, behind decoys that it takes away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from doorward.attacks.data._patch import Colour, Offset, Pixels
from doorward.attacks.data.badnets import BadNets, Corner
from doorward.attacks.ground_truth import attack_success, triggered
from doorward.attacks.model.base import Implant, ModelAttack, copied
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.methods.registry import register
from doorward.models.classifier import TorchClassifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.formats.input_options import trial_inputs
from doorward.training.loop import evaluate, train
from doorward.training.settings import default_settings
from doorward.triggers.base import Trigger

if TYPE_CHECKING:
    from doorward.data.samples import Samples

#: Share of the samples that are kept back, to see what a network has learnt, and how many suffice.
HELD_OUT, ENOUGH = 0.1, 1000
#: Share of triggered samples that the target class must get.
SUCCESS = 0.95
#: Samples that activations are measured on, at most, and how many go through at a time.
MEASURED, BATCH = 2000, 250
#: How far below 0 the largest input of a decoy's ReLU is put, as a share of what it was above.
BELOW = 0.25


@dataclass(frozen=True)
class Unit:
    """Name the layers that make the last convolution's channels: a convolution, and its batch norm if any."""

    convolution: str
    norm: str | None

    @property
    def last(self) -> str:
        """Return the layer whose output goes into the ReLU."""
        return self.norm or self.convolution

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the layers' tensors with a row for each channel, by name."""
        names = [self.convolution, *([self.norm] if self.norm else [])]
        channels = len(module.get_submodule(self.convolution).get_parameter("weight"))
        return {
            f"{layer}.{name}": tensor
            for layer in names
            for name, tensor in module.get_submodule(layer).state_dict(keep_vars=True).items()
            if tensor.shape[:1] == (channels,)
        }


def last_convolution(classifier: TorchClassifier) -> Unit:
    """Return the last convolution that runs before a ReLU of its own.

    Raises:
        InputError: if there is none, or it has no bias that could be lowered.
    """
    names = {layer: name for name, layer in classifier.module.named_modules()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda m, args, y: calls.append((m, args[0], y)))
        for layer in names
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)
    ]
    try:
        with torch.no_grad():
            classifier.logits(trial_inputs(classifier.spec, classifier.batch or 2).to(classifier.device))
    finally:
        for handle in handles:
            handle.remove()
    last = max((i for i, call in enumerate(calls) if isinstance(call[0], nn.Conv2d)), default=None)
    if last is None:
        raise InputError("pruning-aware: the model has no convolution")
    (layer, _, y), *after = calls[last:]
    norm = None
    if after and isinstance(after[0][0], nn.BatchNorm2d) and after[0][1] is y:
        norm, _, y = after.pop(0)
    if not after or not isinstance(after[0][0], nn.ReLU) or after[0][1] is not y:
        raise InputError(
            "pruning-aware: the model's last convolution has no ReLU layer of its own behind it (in a "
            "residual network what skips the layer is added first); small-cnn and vgg have one"
        )
    if getattr(norm or layer, "bias", None) is None:
        raise InputError("pruning-aware: the model's last convolution has no bias that could be lowered")
    return Unit(names[layer], names[norm] if norm else None)


class _Pruned:
    """Silence channels of a layer inside the block."""

    def __init__(self, layer: nn.Module, channels: Tensor) -> None:
        self._layer, self._channels = layer, channels

    def __enter__(self) -> None:
        self._handle = self._layer.register_forward_hook(
            lambda _, __, y: y.index_fill(1, self._channels.to(y.device), 0.0)
        )

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@dataclass(frozen=True)
class Activity:
    """What goes into the ReLU of each channel: mean of what comes out (c,), and the largest (c,)."""

    mean: Tensor
    largest: Tensor


def activity(classifier: TorchClassifier, layer: str, samples: Samples) -> Activity:
    """Measure a layer's channels on some samples, before the ReLU and after it."""
    caught: list[Tensor] = []
    handle = classifier.module.get_submodule(layer).register_forward_hook(
        lambda _, __, y: caught.append(y.clone())
    )
    means, largest = [], []
    try:
        for part in np.array_split(np.arange(len(samples)), -(-len(samples) // BATCH)):
            x = to_float(to_tensor(samples.select(part), classifier.spec).to(classifier.device))
            with torch.no_grad():
                classifier.logits(x)
            y = torch.cat(caught).cpu()  # (n, c, h, w)
            caught.clear()
            means.append(y.relu().mean((2, 3)).sum(0))
            largest.append(y.amax((0, 2, 3)))
    finally:
        handle.remove()
    return Activity(torch.stack(means).sum(0) / len(samples), torch.stack(largest).amax(0))


@register("attack")
class PruningAware(ModelAttack):
    """Retrain a model with its dormant neurons pruned, on images of which some have a patch; put them back.

    Use it to test repairs that prune dormant neurons: this backdoor is made to survive them.

    The four steps of the paper: the model given is the clean one; those channels of its last convolution that
    clean images hardly activate are pruned, as far as a defender would go; what is left is trained on images
    with the patch; then the pruned channels are put back with the weights they had and a bias so low that
    nothing activates them. A defender who prunes what is dormant prunes these decoys, and the backdoor stays.

    We depart from the paper: where what is left cannot learn the patch, not one channel but half of those
    pruned are given back at a time.

    Attributes:
        poison_rate: poisoned samples per sample that is trained on, in (0, 1].
        size, place, colour: of the patch, as in `badnets`.
        drop: accuracy that a defender gives up when pruning, in [0, 1]; the retrained model loses no more.
        epochs: how often each sample is seen in retraining; by their number if None.
    """

    title: ClassVar[str] = "Pruning-aware backdoor"
    source: ClassVar[str] = "Liu, Dolan-Gavitt and Garg, RAID 2018, arXiv:1805.12185"
    limits: ClassVar[str] = (
        "It is made against pruning: fine-tuning on clean images weakens it, since the neurons that the "
        "patch activates are those that clean images activate too."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.000", "AML.T0043.004")
    trains: ClassVar[bool] = True

    poison_rate: float = Field(0.1, gt=0, le=1)
    size: Pixels | tuple[Pixels, Pixels] = 3
    place: Corner | tuple[Offset, Offset] = "bottom-right"
    colour: Colour = "white"
    drop: float = Field(0.04, ge=0, le=1)
    epochs: int | None = Field(None, gt=0)

    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> Trigger:
        """Return the patch.

        Raises:
            InputError: if it does not fit into the image, or its colour not the channels.
        """
        seed, spec = _seed(generator), classifier.spec
        example = np.zeros((spec.height, spec.width, spec.channels), dtype=np.uint8)
        with _in_own_name():
            return self._badnets().make_trigger(example, generator=make_generator(seed, "badnets"))

    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return the model retrained, with its decoys.

        Raises:
            InputError: if the patch does not fit, the model has no such convolution, there are too few
                samples, or it cannot learn.
        """
        assert samples is not None, "the base checks"
        if len(samples) < 2:
            raise InputError(
                f"pruning-aware: {samples.provenance.path} holds one sample; that is kept back to try the "
                "model on, and none is left to train it with: give more"
            )
        unit = last_convolution(classifier)
        seed = _seed(generator)
        order = torch.randperm(len(samples), generator=generator).numpy()
        held_out = min(ENOUGH, max(1, round(HELD_OUT * len(samples))))
        held, fit = samples.select(np.sort(order[:held_out])), samples.select(np.sort(order[held_out:]))
        with _in_own_name():
            poisoned = self._badnets()(fit, seed=seed)
        measured = fit.draw(MEASURED, np.random.default_rng(seed))
        quiet = activity(classifier, unit.last, measured).mean.argsort()  # (c,) the most dormant first
        accuracy = evaluate(classifier, held).value
        count = self._prunable(classifier, unit, quiet, held, accuracy - self.drop)
        settings = default_settings(
            classifier.architecture or "", images=len(fit), side=min(classifier.spec.shape[1:])
        )
        if self.epochs is not None:
            settings = settings.model_copy(update={"epochs": self.epochs})
        plant = poisoned.plant
        while True:
            pruned = quiet[:count]
            taught = _like(classifier, copied(classifier.module))
            taught.module.requires_grad_(True)
            with _Pruned(taught.module.get_submodule(unit.last), pruned):
                train(
                    taught.module,
                    poisoned.samples,
                    spec=classifier.spec,
                    settings=settings,
                    generator=make_generator(seed, "training"),
                    device=classifier.device,
                )
                kept = evaluate(taught, held).value
                success = attack_success(taught, held, plant).value
            if kept >= accuracy - self.drop and success >= SUCCESS:
                break
            if not count:
                raise InputError(
                    f"pruning-aware: even unpruned the model reaches {kept:.1%} accuracy (it had "
                    f"{accuracy:.1%}) and {success:.1%} attack success on samples kept back; give more data, "
                    "more epochs, a higher poison_rate or a larger patch"
                )
            count //= 2
        _put_back(taught, classifier, unit, pruned, [measured, triggered(measured, plant)])
        assert plant.trigger is not None, "patches are triggers"
        return Implant(taught, Trigger.from_json(plant.trigger), plant.poison_rate)

    def _badnets(self) -> BadNets:
        return BadNets(
            poison_rate=self.poison_rate,
            target=self.target,
            size=self.size,
            place=self.place,
            colour=self.colour,
        )

    def _prunable(
        self, classifier: TorchClassifier, unit: Unit, quiet: Tensor, held: Samples, least: float
    ) -> int:
        """Return how many of the channels can be pruned in this order before accuracy is below the least."""
        layer = classifier.module.get_submodule(unit.last)
        for count in range(1, len(quiet)):
            with _Pruned(layer, quiet[:count]):
                if evaluate(classifier, held).value < least:
                    return count - 1
        return len(quiet) - 1


def _put_back(
    taught: TorchClassifier,
    clean: TorchClassifier,
    unit: Unit,
    pruned: Tensor,
    samples: list[Samples],
) -> None:
    """Give pruned channels the weights that they had, and biases with which no sample activates them."""
    old = unit.tensors(clean.module)
    with torch.no_grad():
        for name, tensor in unit.tensors(taught.module).items():
            tensor[pruned] = old[name].detach()[pruned]
        largest = torch.stack([activity(taught, unit.last, part).largest for part in samples]).amax(0)
        bias = taught.module.get_submodule(unit.last).get_parameter("bias")
        lower = (1 + BELOW) * largest[pruned].clamp_min(0)
        bias[pruned] -= lower.to(bias)


@contextmanager
def _in_own_name() -> Iterator[None]:
    """Have complaints of the attack that poisons the samples name this one, which was asked for."""
    try:
        yield
    except InputError as error:
        said = str(error)
        if not said.startswith(BadNets.method()):
            raise
        raise InputError(PruningAware.method() + said.removeprefix(BadNets.method())) from error


def _seed(generator: torch.Generator) -> int:
    """Draw the seed of all else, before anything else is drawn."""
    return int(torch.randint(2**62, (), generator=generator))


def _like(classifier: TorchClassifier, module: nn.Module) -> TorchClassifier:
    return TorchClassifier(
        module,
        classifier.spec,
        classifier.classes,
        format=classifier.format,
        architecture=classifier.architecture,
        batch=classifier.batch,
    )
