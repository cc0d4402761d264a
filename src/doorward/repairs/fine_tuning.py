"""Fine-tuning: go on training on clean samples."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.methods.registry import register
from doorward.models import TorchClassifier
from doorward.repairs._clean import CleanRepair, check_accuracy, check_classes
from doorward.repairs.base import Damage, Mended, network_of
from doorward.training import TrainingSettings, default_settings, train
from doorward.training.loop import OnBatch

Variant = Literal["plain", "high-rate", "sharpness-aware"]
#: Highest learning rate of each variant, in units of the usual one for such a network.
RATES: dict[Variant, float] = {"plain": 0.1, "high-rate": 1.0, "sharpness-aware": 0.5}


class TunedRepair(CleanRepair):
    """Mend a model by going on with its training."""

    variant: Variant = Field(
        "sharpness-aware",
        description="How it is trained: at a low learning rate, at one as high as in a first training, or "
        "towards weights around which the loss is flat",
    )
    share: float = Field(
        0.3, gt=0, le=1, description="Share of the usual number of training samples that go through"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Learning rate, in units of the usual one for such a network; by the variant if none",
    )
    sharpness: float = Field(
        0.1, gt=0, le=10, description="Length of the step uphill of the sharpness-aware variant"
    )

    def tune(self, network: TorchClassifier, damage: Damage, on_batch: OnBatch | None = None) -> str:
        """Go on training a network in place, and return what was done.

        Raises:
            InputError: if clean samples and network do not fit.
            TrainingDiverged: if the loss is no longer finite.
        """
        samples, spec = damage.clean, network.spec
        assert samples is not None
        check_classes(damage)
        if network.batch is not None:
            raise InputError(
                f"the model takes exactly {network.batch} inputs at a time, so it cannot be fine-tuned: "
                "export it with a batch of any size, or use pruning"
            )
        usual = default_settings(
            network.architecture or "", images=len(samples), side=min(spec.height, spec.width)
        )
        settings = self.training(usual)
        train(
            network.module,
            samples,
            spec=spec,
            settings=settings,
            generator=make_generator(damage.seed, self.method()),
            device=network.device,
            progress=damage.progress,
            on_batch=on_batch,
            sharpness=self.sharpness if self.variant == "sharpness-aware" else 0.0,
        )
        return (
            f"it was trained on {len(samples):,} clean samples for {settings.epochs} epochs "
            f"({self.variant}, learning rate {settings.learning_rate:.2g})"
        )

    def training(self, usual: TrainingSettings) -> TrainingSettings:
        """Return how to go on training, from how a first training usually goes."""
        rate = RATES[self.variant] if self.learning_rate is None else self.learning_rate
        return usual.model_copy(
            update={
                "epochs": max(1, round(self.share * usual.epochs)),
                "learning_rate": rate * usual.learning_rate,
                "schedule": "one-cycle" if self.variant == "high-rate" else "cosine",
            }
        )


#: What to do where fine-tuning costs too much accuracy.
ADVICE = "give more clean samples, a lower learning_rate, or allow more (drop)"


@register("repair")
class FineTuning(TunedRepair):
    """Go on training on clean samples.

    Use it as a measure against a backdoor that nobody has found.

    Plain fine-tuning at a low learning rate often leaves a backdoor as it is; a high one, or
    sharpness-aware minimisation, moves the weights that plain fine-tuning leaves in place.

    The variants are those of the papers: the high rate rises and falls within the training, as in
    super-fine-tuning; the sharpness-aware one takes each gradient a step uphill, as in FT-SAM.
    """

    title = "Fine-tuning on clean samples"
    source = (
        "M. Zhu et al., ICCV 2023, arXiv 2304.11823 (sharpness-aware); Z. Sha et al., 2022, arXiv 2212.09067 "
        "(high rate); K. Liu et al., RAID 2018, arXiv 1805.12185 (plain)"
    )
    limits = "It cannot promise that a backdoor is gone; the less clean samples there are, the more stays."
    order: ClassVar[int] = 40

    def mend(self, damage: Damage) -> Mended:
        """Return a model that has gone on training on the clean samples."""
        network = network_of(damage.classifier)
        done = self.tune(network, damage)
        check_accuracy(network, damage, self.drop, advice=ADVICE)
        return Mended(network, damage.train, done)
