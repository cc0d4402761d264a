"""The shell that attacks on a trained model share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field

from doorward.attacks.ground_truth import PlantedBackdoor
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.methods.base import Method
from doorward.models.classifier import Classifier, TorchClassifier
from doorward.models.encode.dispatch import NOUNS
from doorward.models.errors import ModelFailed
from doorward.models.formats.input_options import trial_inputs

if TYPE_CHECKING:
    from torch import nn

    from doorward.data.samples import Samples
    from doorward.triggers.base import Trigger


@dataclass(frozen=True)
class Implant:
    """What an attack made of a classifier.

    Attributes:
        classifier: the changed one.
        trigger: what activates its backdoor.
        poison_rate: of the samples that it was trained on, if it was.
    """

    classifier: TorchClassifier
    trigger: Trigger
    poison_rate: float | None = None


@dataclass(frozen=True)
class BackdooredModel:
    """A planted classifier and its truth."""

    classifier: TorchClassifier
    plant: PlantedBackdoor


class ModelAttack(Method):
    """Change a trained model so that a trigger activates what it did not do before.

    Subclasses write `make_trigger` and `implant`.

    Attributes:
        target: class that the trigger turns all others into; class 0 if None.
    """

    #: Whether labelled samples are needed, to train on.
    trains: ClassVar[bool] = False

    target: int | None = Field(None, ge=0)

    @abstractmethod
    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> Trigger:
        """Return the trigger for inputs of this classifier; `implant` draws it first of all.

        Raises:
            InputError: if the settings do not fit such inputs.
        """

    @abstractmethod
    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return a planted classifier, which shares nothing with the one given.

        Args:
            samples: with labels and the classes of the model, where the attack trains.

        Raises:
            InputError: if settings, model and samples do not fit each other.
        """

    @final
    def __call__(
        self, classifier: Classifier, samples: Samples | None = None, *, seed: int = 0
    ) -> BackdooredModel:
        """Plant a copy of a trained model; the model given stays as it is.

        Args:
            samples: clean ones; most attacks only check with them what they changed.

        Raises:
            InputError: if settings, model and samples do not fit each other.
        """
        name = self.method()
        if not isinstance(classifier, Classifier):
            raise InputError(f"{name} changes a trained model, and was given a {type(classifier).__name__}")
        if not isinstance(classifier, TorchClassifier):
            why = classifier.limitation or f"a {classifier.format} model is run by another library"
            raise InputError(f"{name} changes the network itself, which is out of reach: {why}")
        if classifier.spec.modality not in self.modalities:
            kinds = " or ".join(NOUNS[kind] for kind in sorted(self.modalities))
            takes = NOUNS[classifier.spec.modality]
            raise InputError(f"{name} changes models of {kinds}, and this one takes {takes}")
        k, target = len(classifier.classes), self.target or 0
        if target >= k:
            raise InputError(f"{name}: target {target} is no class; there are {k}, from 0 to {k - 1}")
        if k < 2:
            raise InputError(f"{name}: no source class is left besides target {target}")
        if samples is None and self.trains:
            raise InputError(f"{name} trains the model, and needs labelled samples for it")
        if samples is not None:
            self._check_samples(samples, k)
        try:
            implant = self.implant(classifier, samples, generator=make_generator(seed, name))
            implant.classifier.module.eval()
            with torch.no_grad():
                shown = trial_inputs(classifier.spec, classifier.batch or 2).to(classifier.device)
                implant.classifier.logits(shown)
        except ModelFailed as why:
            raise InputError(f"{name}: {why}; there is nothing to plant") from why
        sources = tuple(y for y in range(k) if y != target)
        return BackdooredModel(
            implant.classifier,
            PlantedBackdoor(
                attack=name,
                settings=self.settings(),
                seed=seed,
                modality="image",
                trigger=implant.trigger.to_json(),
                target_map=dict.fromkeys(sources, target),
                targets=(target,),
                source_classes=sources,
                poison_rate=implant.poison_rate,
            ),
        )

    def counterpart(self, classifier: TorchClassifier, samples: Samples, *, seed: int = 0) -> TorchClassifier:
        """Return what a planted model is to be measured next to: the one given, where the attack changes
        that.

        Raises:
            InputError: where another one is trained, and the samples do not fit.
        """
        return classifier

    def _check_samples(self, samples: Samples, classes: int) -> None:
        name, path = self.method(), samples.provenance.path
        if samples.modality not in self.modalities:
            raise InputError(
                f"{name} works on {' or '.join(sorted(self.modalities))} data, not {samples.modality}"
            )
        if not len(samples):
            raise InputError(f"{name}: {path} holds no samples")
        if self.trains and samples.labels is None:
            raise InputError(f"{name} needs labelled samples, and {path} has none")
        if samples.labels is not None and len(samples.classes) != classes:
            raise InputError(
                f"{name}: the model tells {classes} classes apart, and {path} has {len(samples.classes)}"
            )


def copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares nothing with it.

    Raises:
        InputError: if it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:  # a module of the user's own may hold anything
        raise InputError(f"the model cannot be copied, and so not changed: {error}") from error
