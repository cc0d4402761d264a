"""Adversarial unlearning: search for what a hidden trigger could be, and unlearn that."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from doorward.core.records import Need
from doorward.core.seeds import make_generator
from doorward.methods.registry import register
from doorward.repairs._clean import CleanRepair, check_accuracy
from doorward.repairs._relearning import STEPS, check_relearnable, images_of, relearn, universal
from doorward.repairs.base import Damage, Mended, network_of
from doorward.repairs.unlearning import ADVICE


@register("repair")
class AdversarialUnlearning(CleanRepair):
    """Search for perturbations that lead many images at once to a class, and teach the model to ignore them.

    Use it where nothing was found, or no trigger recovered: a backdoor that nobody knows of is such a
    perturbation, and one that is easy to find.

    The answers of the original on clean images are kept, and images with a perturbation are to get the answer
    that the original gives without it. Perturbations are searched in the model as it is by then, every few
    steps, each towards another class.

    We depart from the paper: perturbations are targeted, answers of the original stand for labels, and the
    network takes ordinary gradient steps, without the implicit hypergradient.
    """

    title = "Adversarial unlearning"
    source = "Y. Zeng et al., ICLR 2022, arXiv 2110.03735"
    limits = "It cannot promise that a backdoor is gone: what it searches for is the same for all images."
    modalities = frozenset({"image"})
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients", "clean", "clean_labels"})
    mends = frozenset({"backdoor"})
    order: ClassVar[int] = 25

    steps: int = Field(STEPS, ge=1, description="How many steps are trained")

    @classmethod
    def unfit(cls, damage: Damage) -> str | None:
        """Return why the repair cannot act, None if it can."""
        why = super().unfit(damage)
        if why is None and damage.classifier.spec.modality != "image":
            return "it mends models of images"
        return why

    def mend(self, damage: Damage) -> Mended:
        """Return a model that answers images with universal perturbations as without."""
        network = network_of(damage.classifier)
        check_relearnable(network)
        assert damage.clean is not None
        images, generator = images_of(damage.clean, network.spec), make_generator(damage.seed, self.method())
        relearn(
            network,
            damage.classifier,
            images,
            universal(images, range(len(network.classes)), generator),
            steps=self.steps,
            generator=generator,
            progress=damage.progress,
        )
        check_accuracy(network, damage, self.drop, advice=ADVICE)
        done = (
            f"it was trained for {self.steps} steps on {len(images):,} clean images, with and without "
            "perturbations"
        )
        return Mended(network, damage.train, done)
