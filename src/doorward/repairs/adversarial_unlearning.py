"""Adversarial unlearning: search for what a hidden trigger could be, and unlearn that."""

from __future__ import annotations

from typing import ClassVar

from doorward.core.records import Need
from doorward.methods.registry import register
from doorward.repairs._relearning import RelearningRepair, universal
from doorward.repairs.base import Damage, Mended


@register("repair")
class AdversarialUnlearning(RelearningRepair):
    """Search for perturbations that lead many images at once to a class, and teach the model to ignore them.

    Use it where nothing was found, or no trigger recovered: a backdoor that nobody knows of is such a
    perturbation, and one that is easy to find.

    The answers of the original on clean images are kept, and images with a perturbation are to get the answer
    that the original gives without it. Perturbations are searched in the model as it is by then, every few
    steps, each towards another class.

    We depart from the paper: perturbations are targeted, answers of the original stand for labels, and the
    network takes ordinary gradient steps, without the implicit hypergradient.

    It does not reach the published numbers, a mean success of 16.7 % that is left: on the small model of
    suite `repairs` at scale smoke most of the trigger's success is left. On more models it has not been
    measured yet.
    """

    title = "Adversarial unlearning"
    source = "Y. Zeng et al., ICLR 2022, arXiv 2110.03735"
    limits = "It cannot promise that a backdoor is gone: what it searches for is the same for all images."
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
        return self.relearnt(
            damage,
            lambda images, generator: universal(images, classes, generator),
            named="perturbations",
        )
