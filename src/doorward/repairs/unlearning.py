"""Unlearning: teach the model that the recovered trigger means nothing."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from doorward.core.errors import InputError
from doorward.core.records import Need
from doorward.core.seeds import make_generator
from doorward.methods.registry import register
from doorward.models import TorchClassifier
from doorward.repairs._clean import CleanRepair, check_accuracy
from doorward.repairs._relearning import STEPS, check_relearnable, images_of, recovered, relearn
from doorward.repairs._without_data import agreement, make_images, unlearn
from doorward.repairs.base import Damage, Mended, network_of

#: What to do where unlearning costs too much accuracy.
ADVICE = "give more clean samples, or allow more (drop)"


@register("repair")
class Unlearning(CleanRepair):
    """Teach the model to answer images with the recovered triggers as it answers them without.

    Use it where a scan has recovered a trigger: the model learns that the trigger means nothing.

    The answers of the original on clean images are kept, which costs less accuracy than training on labels
    does where clean samples are few.

    Without clean samples it uses images that are made from the model itself, by model inversion. How much
    accuracy that costs on real images cannot be measured then.

    We depart from the paper, which trains on labels.
    """

    title = "Unlearning of recovered triggers"
    source = "B. Wang et al., IEEE S&P 2019, doi:10.1109/SP.2019.00031"
    limits = "What it unlearns is the recovered trigger; a planted one that differs much from it may stay."
    modalities = frozenset({"image"})
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    mends = frozenset({"backdoor"})
    needs_findings: ClassVar[bool] = True
    order: ClassVar[int] = 20

    steps: int = Field(STEPS, ge=1, description="How many steps are trained, where there are clean samples")

    @classmethod
    def unfit(cls, damage: Damage) -> str | None:
        """Return why the repair cannot act, None if it can."""
        why = super().unfit(damage)
        if why is None and damage.clean is not None and damage.clean.labels is None:
            return "it needs clean_labels"
        if why is None and not damage.triggers:
            return "no trigger was recovered for the classes that the findings name"
        return why

    def mend(self, damage: Damage) -> Mended:
        """Return a model that answers images with the triggers as without."""
        network = network_of(damage.classifier)
        if damage.clean is None:
            return self._without_data(network, damage)
        check_relearnable(network)
        images, generator = images_of(damage.clean, network.spec), make_generator(damage.seed, self.method())
        relearn(
            network,
            damage.classifier,
            images,
            recovered(damage.triggers, generator),
            steps=self.steps,
            generator=generator,
            progress=damage.progress,
        )
        check_accuracy(network, damage, self.drop, advice=ADVICE)
        done = (
            f"it was trained for {self.steps} steps on {len(images):,} clean images, with and without "
            f"{_which(damage)}"
        )
        return Mended(network, damage.train, done)

    def _without_data(self, network: TorchClassifier, damage: Damage) -> Mended:
        """Return a model that has unlearnt the triggers on images made from it.

        Raises:
            InputError: if none can be made, or the model surely changes more than is allowed on those kept
                back: the upper end of the 95 % interval of what stays is less.
            TrainingDiverged: if the loss is no longer finite.
        """
        made = make_images(damage.classifier, damage.seed)
        done = unlearn(network, damage, made)
        same = agreement(damage.classifier, network, made.kept)
        if same.high < 1 - self.drop:
            raise InputError(
                f"the mended model answers {same.value:.1%} of the images made from the model as before, "
                f"and at most {self.drop:.1%} may change: give labelled samples with --clean DATA, or allow "
                "more (drop)"
            )
        return Mended(network, damage.train, f"{done}; each also bore {_which(damage)}")


def _which(damage: Damage) -> str:
    count = len(damage.triggers)
    return "the recovered trigger" if count == 1 else f"one of {count} recovered triggers"
