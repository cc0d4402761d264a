"""Unlearning: fine-tune with the recovered trigger under right labels."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from doorward.core.errors import InputError
from doorward.core.records import Need
from doorward.methods.registry import register
from doorward.models import TorchClassifier
from doorward.repairs._clean import check_accuracy
from doorward.repairs._without_data import agreement, make_images, unlearn
from doorward.repairs.base import Damage, Mended, network_of
from doorward.repairs.fine_tuning import ADVICE, TunedRepair
from doorward.training.loop import LogitsOf, OnBatch
from doorward.triggers.base import Trigger


@register("repair")
class Unlearning(TunedRepair):
    """Fine-tune on clean images of which some bear the recovered triggers, under their right labels.

    Use it where a scan has recovered a trigger: the model learns that the trigger means nothing.

    Without clean samples it uses images that are made from the model itself, by model inversion. With a
    trigger they keep the answer that the model gives without it. How much accuracy that costs on real images
    cannot be measured then.

    We depart from the paper in fine-tuning: it is sharpness-aware unless another variant is asked for, and
    goes on for more than one epoch.
    """

    title = "Unlearning of recovered triggers"
    source = "B. Wang et al., IEEE S&P 2019, doi:10.1109/SP.2019.00031"
    limits = "What it unlearns is the recovered trigger; a planted one that differs much from it may stay."
    modalities = frozenset({"image"})
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    mends = frozenset({"backdoor"})
    needs_findings: ClassVar[bool] = True
    order: ClassVar[int] = 20

    triggered: float = Field(
        0.3, gt=0, le=1, description="Share of each batch that bears a recovered trigger"
    )

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
        """Return a model that has gone on training with the triggers under right labels."""
        network = network_of(damage.classifier)
        if damage.clean is None:
            return self._without_data(network, damage)
        done = self.tune(network, damage, bearing(damage.triggers, self.triggered))
        check_accuracy(network, damage, self.drop, advice=ADVICE)
        return Mended(network, damage.train, f"{done}; {self.triggered:.0%} of them bore {_which(damage)}")

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


def bearing(triggers: tuple[Trigger, ...], share: float) -> OnBatch:
    """Return what puts one of some triggers, drawn for each batch, into a share of its images."""

    def put(logits_of: LogitsOf, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(len(x), generator=generator) < share
        trigger = triggers[int(torch.randint(len(triggers), (), generator=generator))]
        if not bool(chosen.any()):
            return x
        x = x.clone()
        where = chosen.to(x.device)
        x[where] = trigger.apply(x[where], generator=generator)
        return x

    return put
