"""Removal: leave the flagged samples out, and train from scratch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from doorward.core.errors import InputError
from doorward.methods.registry import register
from doorward.models import networks
from doorward.repairs.base import Damage, Mended, Repair, positions
from doorward.training import default_settings, train_classifier


@register("repair")
class Removal(Repair):
    """Leave out the flagged samples, and train a new network of the same architecture on the others.

    Use it where nothing of the poisoned model shall remain, or where flagged samples have no class that
    they seem to come from.

    It takes as long as the first training did.
    """

    title = "Remove and train again"
    source = "B. Tran, J. Li, A. Madry, NeurIPS 2018, arXiv 1811.00636"
    limits = (
        "It trains architectures that Doorward knows, with its own settings; poison that was not flagged is "
        "learnt again."
    )
    atlas = ("AML.T0020", "AML.T0018.000")
    modalities = frozenset({"image", "text", "audio"})
    needs = frozenset({"train"})
    mends = frozenset({"poison"})
    order: ClassVar[int] = 20

    epochs: int | None = Field(None, ge=1, description="How often each sample is seen; as usual if none")

    def mend(self, damage: Damage) -> Mended:
        """Return a new network that was trained without the flagged samples."""
        samples, name, spec = damage.train, damage.classifier.architecture, damage.classifier.spec
        assert samples is not None
        if networks.NAMES.get(name or "") != spec.modality:
            raise InputError(
                f"removal trains from scratch, and cannot build {name or 'an unknown network'}: "
                f"use relabelling, or train your own network on what --write-clean writes"
            )
        flagged = positions(samples, list(damage.flagged))
        data = samples.select(np.setdiff1d(np.arange(len(samples)), flagged))
        settings = default_settings(str(name), images=len(data), side=min(spec.height, spec.width))
        if self.epochs is not None:
            settings = settings.model_copy(update={"epochs": self.epochs})
        trained = train_classifier(
            str(name),
            data,
            seed=damage.seed,
            spec=spec,
            settings=settings,
            device=damage.classifier.device,
            progress=damage.progress,
        )
        return Mended(
            trained.classifier,
            data,
            f"{len(flagged):,} flagged samples were removed, and a new {name} was trained on {len(data):,}",
        )
