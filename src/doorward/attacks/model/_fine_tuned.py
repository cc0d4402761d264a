"""Attacks on training data, planted into a model that is trained already: a fine-tune on triggered images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from doorward.attacks.data.base import DataAttack
from doorward.attacks.ground_truth import PlantedBackdoor
from doorward.attacks.model.base import BackdooredModel
from doorward.core.errors import CouldNotTell, InputError
from doorward.core.memory import default_memory
from doorward.core.seeds import derive_seed, make_generator
from doorward.data.samples import Samples
from doorward.models.classifier import Classifier, TorchClassifier
from doorward.models.encode.image import fit_image
from doorward.training.fine_tune import LabelledBatch, PlantedCopy, teach_trigger

#: Images at most that are learnt from and tried, and bytes that they may take.
IMAGES, BYTES = 1_000, 512 << 20
#: Share of them on which the plant is tried.
KEPT = 0.3
#: Steps of the fine-tune at most. Models of large images take more of them than those that a scan plants.
STEPS = 2_000


@dataclass(frozen=True)
class FineTunedAttack:
    """Plant the trigger of an attack on training data into a trained model, and keep what else it says.

    The model learns the trigger on images of the other classes, while its answers to clean images stay as
    they were (`doorward.training.fine_tune`). That is how somebody plants a backdoor who has the model and
    not its training data.

    Args:
        attack: one that turns every class into one target by one trigger.

    Raises:
        InputError: if it is none.
    """

    attack: DataAttack

    trains = True

    def __post_init__(self) -> None:
        own = self.attack
        if own.keeps_labels() or own.mapping != "all-to-one" or own.source_classes is not None:
            raise InputError(
                f"{own.method()}: a trained model is taught one trigger that turns all classes into one: "
                "leave out mapping and source_classes, and choose an attack that changes labels"
            )

    def method(self) -> str:
        """Return the attack's name."""
        return self.attack.method()

    def __call__(
        self, classifier: Classifier, samples: Samples | None = None, *, seed: int = 0
    ) -> BackdooredModel:
        """Plant a copy of a trained model; the model given stays as it is.

        Args:
            samples: images of the model's classes; without labels its own answers stand for them.

        Raises:
            InputError: if attack, model and samples do not fit each other, or the model does not learn the
                trigger.
        """
        name = self.method()
        if not isinstance(classifier, TorchClassifier) or "gradients" not in classifier.capabilities:
            why = classifier.limitation or f"a {classifier.format} model is run by another library"
            raise InputError(f"{name} fine-tunes the model, which has no gradients: {why}")
        if not any(p.is_floating_point() for p in classifier.module.parameters()):
            raise InputError(f"{name} fine-tunes the model, which has no weights that can be trained")
        if classifier.spec.modality != "image" or "image" not in self.attack.modalities:
            raise InputError(f"{name}: a trained model is taught a trigger on images alone")
        assert samples is not None, "the command line asks for them"
        target_map = self.attack.target_map(classifier.classes)
        (target,) = set(target_map.values())
        generator = make_generator(seed, name)
        drawn = _drawn(classifier, samples, seed)
        example = fit_image(drawn.raw([0])[0], classifier.spec)
        try:
            trigger = self.attack.make_trigger(example, generator=generator)
        except NotImplementedError as error:
            raise InputError(f"{name} has no single trigger that a trained model could be taught") from error
        before, classifier.memory = classifier.memory, default_memory()
        try:
            fit, held_out = (LabelledBatch.of(part, classifier) for part in _parts(drawn))
            planted = teach_trigger(
                classifier, fit, held_out, trigger, target, generator=generator, steps=STEPS
            )
        except CouldNotTell as why:
            raise InputError(f"{name}: {why}") from why
        finally:
            classifier.memory = before
        _check_learnt(name, planted, held_out)
        planted.classifier.memory = before
        return BackdooredModel(
            planted.classifier,
            PlantedBackdoor(
                attack=name,
                settings=self.attack.settings(),
                seed=seed,
                modality="image",
                trigger=trigger.to_json(),
                target_map=target_map,
                targets=(target,),
                source_classes=tuple(sorted(target_map)),
                clean_accuracy=planted.accuracy,
                attack_success=planted.success,
            ),
        )


def _check_learnt(name: str, planted: PlantedCopy, held_out: LabelledBatch) -> None:
    reason = planted.shortfall(held_out.accuracy)
    if reason is not None:
        raise InputError(
            f"{name}: the model did not learn the trigger: {reason}; a larger or stronger one is learnt more "
            "easily, as with --set size=20"
        )


def _drawn(classifier: Classifier, samples: Samples, seed: int) -> Samples:
    """Return as many samples as are learnt from and tried, evenly over the classes."""
    if samples.modality != "image" or not len(samples):
        raise InputError(f"{samples.provenance.path} holds no images to train on")
    if samples.labels is not None and len(samples.classes) != len(classifier.classes):
        raise InputError(
            f"the model tells {len(classifier.classes)} classes apart, and {samples.provenance.path} has "
            f"{len(samples.classes)}"
        )
    most = min(IMAGES, BYTES // (4 * int(np.prod(classifier.spec.shape))), len(samples))
    return samples.draw(max(1, most), np.random.default_rng(derive_seed(seed, "images")))


def _parts(samples: Samples) -> tuple[Samples, Samples]:
    """Return the samples to learn from and those to try the plant on; the draw goes round the classes."""
    kept = np.arange(len(samples)) % 10 < 10 * KEPT
    rng = np.random.default_rng(derive_seed(0, "parts"))
    kept = kept[rng.permutation(len(kept))]
    return samples.select(np.flatnonzero(~kept)), samples.select(np.flatnonzero(kept))
