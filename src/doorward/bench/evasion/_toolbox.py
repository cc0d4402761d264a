"""The door to the Adversarial Robustness Toolbox.

Source: M.-I. Nicolae et al., Adversarial Robustness Toolbox, 2018 (arXiv 1807.01069).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell, InputError, MissingExtra
from doorward.core.seeds import make_generator
from doorward.models.classifier import Classifier

#: Our names of the attacks, and the toolbox's.
ATTACKS: dict[str, str] = {
    "fgsm": "FastGradientMethod",
    "bim": "BasicIterativeMethod",
    "cw0": "CarliniL0Method",
    "cw2": "CarliniL2Method",
    "cwinf": "CarliniLInfMethod",
    "deepfool": "DeepFool",
    "jsma": "SaliencyMapMethod",
}
#: Arguments of the toolbox that are no settings: they are given by `evade` itself.
_OWN = {"self", "classifier", "estimator", "targeted", "batch_size", "summary_writer", "verbose"}


@dataclass(frozen=True)
class Evaded:
    """Images that an evasion attack changed.

    Attributes:
        images: (n, c, h, w) float32 in [0, 1], in the order given; one that resisted may be as it was.
        seconds: from start to end.
    """

    images: Tensor
    seconds: float


def evade(
    classifier: Classifier,
    x: Tensor,
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Evaded:
    """Drive images away from the class that the classifier gives them.

    JSMA drives each towards one of the other classes, drawn by the seed; nothing else is random. Weights,
    mode and gradients of the model stay as they are. We depart from the toolbox in one thing: its CW0 gives
    up as many values as an image has channels, and so is shown images of one pixel with as many channels as
    ours have values.

    Args:
        x: (n, c, h, w) in [0, 1].
        name: `fgsm`, `bim`, `cw0`, `cw2`, `cwinf`, `deepfool` or `jsma`.
        settings: arguments of the toolbox's class of that attack, its defaults for what is left out.
        batch_size: images that are attacked at a time.
        progress: called with the number of images done and of all, after every batch.

    Raises:
        InputError: if there is no such attack or setting, the images do not fit the classifier, or it gives
            no gradients.
        MissingExtra: if the package adversarial-robustness-toolbox is not installed.
        CouldNotTell: if the logits are not finite.
    """
    attack = _attack(name)
    classifier.spec.check(x)
    if "gradients" not in classifier.capabilities:
        raise InputError(f"{name}: a {classifier.format} model gives no gradients, which the attack follows")
    if not len(x):
        return Evaded(x.clone(), 0.0)
    shape = (x[0].numel(), 1, 1) if name == "cw0" else classifier.spec.shape
    # the toolbox's data loaders draw a seed from the global generator, though they shuffle nothing
    with classifier.frozen(), torch.random.fork_rng(devices=[]):
        made = _build(attack, name, classifier, shape, dict(settings or {}), batch_size)
        started = time.monotonic()
        generator = make_generator(seed, name)
        done = []
        for part in torch.split(x.detach(), batch_size):
            with torch.no_grad():
                z = classifier.logits(part.to(classifier.device)).cpu()  # (m, k)
            if not z.isfinite().all():
                raise CouldNotTell(
                    "the model's logits are not finite, so no attack can follow their gradient"
                )
            others = torch.randint(1, z.shape[1], (len(z),), generator=generator)
            aims = {"y": ((z.argmax(1) + others) % z.shape[1]).numpy()} if name == "jsma" else {}
            flat = np.ascontiguousarray(part.float().cpu().numpy()).reshape(-1, *shape)
            done.append(torch.from_numpy(made.generate(x=flat, **aims)).float().view(part.shape))
            if progress is not None:
                progress(sum(map(len, done)), len(x))
        images = torch.cat(done).clamp(0, 1).to(x)
    return Evaded(images, time.monotonic() - started)


def _attack(name: str) -> Any:
    if name not in ATTACKS:
        raise InputError(f"there is no evasion attack named {name!r}; there are: {', '.join(ATTACKS)}")
    try:
        from art.attacks import evasion
    except ImportError as error:
        raise MissingExtra("adversarial-robustness-toolbox", "evasion", "attacking inputs") from error
    return getattr(evasion, ATTACKS[name])


def _build(
    attack: Any,
    name: str,
    classifier: Classifier,
    shape: tuple[int, int, int],
    settings: dict[str, Any],
    batch_size: int,
) -> Any:
    """Return the toolbox's attack on a classifier that takes images of that shape.

    Raises:
        InputError: if the settings are not the attack's.
    """
    from art.estimators.classification import PyTorchClassifier

    takes = set(inspect.signature(attack.__init__).parameters)
    if unknown := sorted(set(settings) - (takes - _OWN)):
        raise InputError(
            f"{name} has no setting {unknown[0]!r}; its settings are: {', '.join(sorted(takes - _OWN))}"
        )
    quiet = {"verbose": False} if "verbose" in takes else {}
    shown = PyTorchClassifier(
        model=_Logits(classifier),
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=len(classifier.classes),
        clip_values=(0.0, 1.0),
        device_type="cpu",  # `_Logits` goes to the model's own device
    )
    try:
        return attack(shown, **settings, batch_size=batch_size, **quiet)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}") from error


class _Logits(nn.Module):
    """Show a classifier of any kind as a module of torch."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._run = classifier.logits
        self._shape, self._device = classifier.spec.shape, classifier.device

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k) for images (n, c, h, w), or for their values in any other shape."""
        return self._run(x.view(-1, *self._shape).to(self._device)).to(x.device)
