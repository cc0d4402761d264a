"""Unlearning: teach the model that the recovered trigger means nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.core.records import Need
from doorward.methods.registry import register
from doorward.repairs._relearning import (
    Disturb,
    RelearningRepair,
    by_turns,
    recovered,
    searched,
    universal,
)
from doorward.repairs._without_data import agreement, make_images, unlearn
from doorward.repairs.base import Damage, Mended, network_of


@register("repair")
class Unlearning(RelearningRepair):
    """Teach the model to answer images with the recovered triggers as it answers them without.

    Use it where a scan has recovered a trigger: the model learns that the trigger means nothing.

    A recovered trigger is seldom the planted one. So with clean samples two searches go on during the
    training: random patches, blends, warps and waves, of which those that lead most images to one class are
    used most, and universal perturbations towards the classes that the findings name.

    The network learns the answers that the original gives on clean images, and no labels. That is meant to
    cost less accuracy where clean samples are few; whether it does is not measured yet.

    Without clean samples it uses images that are made from the model itself, by model inversion. How much
    accuracy that costs on real images cannot be measured then.

    We depart from the paper, which trains on labels, and on the recovered trigger alone.
    """

    title = "Unlearning of recovered triggers"
    source = "B. Wang et al., IEEE S&P 2019, doi:10.1109/SP.2019.00031"
    limits = "It cannot promise that a backdoor is gone: a trigger unlike all that it trains on may stay."
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    needs_findings: ClassVar[bool] = True
    order: ClassVar[int] = 20

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
        if damage.clean is None:
            return self._without_data(damage)
        targets = damage.targets

        def disturbing(images: Tensor, generator: torch.Generator) -> Disturb:
            known = recovered(damage.triggers, generator)
            others = (searched(images, generator), universal(images, targets, generator))
            return by_turns((known, *others), generator)

        return self.relearnt(
            damage, disturbing, named=f"{_which(damage)}, searched triggers and perturbations"
        )

    def _without_data(self, damage: Damage) -> Mended:
        """Return a model that has unlearnt the triggers on images made from it.

        Raises:
            InputError: if none can be made, or the model surely changes more than is allowed on those kept
                back: the upper end of the 95 % interval of what stays is less.
            TrainingDiverged: if the loss is no longer finite.
        """
        network = network_of(damage.classifier)
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
