"""Adversarial unlearning: search for what a hidden trigger could be, and unlearn that."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from doorward.core.records import Need
from doorward.methods.registry import register
from doorward.repairs._relearning import Disturb, RelearningRepair, by_turns, searched, universal
from doorward.repairs.base import Damage, Mended


@register("repair")
class AdversarialUnlearning(RelearningRepair):
    """Search for perturbations that lead many images at once to a class, and teach the model to ignore them.

    Use it where nothing was found, or no trigger recovered: a backdoor that nobody knows of is such a
    perturbation, and one that is easy to find.

    The answers of the original on clean images are kept, and images with a trigger are to get the answer that
    the original gives without it. Two searches go on in the model as it is by then. Patches, blends, warps
    and waves are drawn at random, and those that lead most images to one class are used most. Universal
    perturbations are found by gradients, each towards another class.

    We depart from the paper: perturbations are targeted, answers of the original stand for labels, the
    network takes ordinary gradient steps, without the implicit hypergradient, and the random triggers are
    ours.

    It does not reach the published numbers, a mean success of 16.7 % that is left: much of what a patch
    does can stay. Suite `repairs` measures it.
    """

    title = "Adversarial unlearning"
    source = "Y. Zeng et al., ICLR 2022, arXiv 2110.03735"
    limits = (
        "It cannot promise that a backdoor is gone: what it searches for is the same for all images, and the "
        "random triggers are of four kinds."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients", "clean", "clean_labels"})
    order: ClassVar[int] = 25

    @classmethod
    def unfit(cls, damage: Damage) -> str | None:
        """Return why the repair cannot act, None if it can."""
        why = super().unfit(damage)
        if why is None and damage.classifier.spec.modality != "image":
            return "it mends models of images"
        return why

    def mend(self, damage: Damage) -> Mended:
        """Return a model that answers images with universal perturbations as without."""
        classes = range(len(damage.classifier.classes))

        def disturbing(images: Tensor, generator: torch.Generator) -> Disturb:
            # perturbations towards classes that nobody suspects cost accuracy, so they come more rarely
            both = (searched(images, generator), universal(images, classes, generator))
            return by_turns(both, generator, shares=(3.0, 1.0))

        return self.relearnt(damage, disturbing, named="searched triggers and perturbations")
