"""Relabelling: flagged samples get the label that they seem to have had, and training goes on."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data import Samples
from doorward.methods.registry import register
from doorward.repairs.base import Damage, Mended, Repair, network_of, positions
from doorward.training import TrainingSettings, default_settings, train


def relabelled(samples: Samples, labels: dict[int, int]) -> Samples:
    """Return the samples with other labels in some rows.

    Args:
        labels: the new label, by row.
    """
    assert samples.labels is not None
    view = samples.select(np.arange(len(samples)))
    view.labels = samples.labels.copy()
    view.labels[list(labels)] = list(labels.values())
    return view


@register("repair")
class Relabelling(Repair):
    """Give flagged samples the label that they seem to come from, and go on training on all samples.

    Use it where a scan of the training data has flagged samples: it takes a fraction of the time of training
    again, and the model unlearns the trigger, since it now sees it with the right labels.

    We depart from the paper in the label: each sample has its own, which a network trained without it gave,
    and not one for the whole cluster. Flagged samples without any are left out.
    """

    title = "Relabel and go on training"
    source = "B. Chen et al., SafeAI at AAAI 2019, arXiv 1811.03728"
    limits = "It unlearns what the flagged samples teach; poison that was not flagged stays learnt."
    atlas = ("AML.T0020", "AML.T0018.000")
    modalities = frozenset({"image", "text", "audio"})
    needs = frozenset({"train", "weights"})
    mends = frozenset({"poison"})
    order: ClassVar[int] = 10

    share: float = Field(
        0.2, gt=0, le=1, description="Share of the usual number of training samples that go through"
    )
    learning_rate: float = Field(
        0.3, gt=0, le=1, description="Learning rate, in units of the usual one for such a network"
    )

    def mend(self, damage: Damage) -> Mended:
        """Return a model that has gone on training on relabelled data."""
        samples, flagged = damage.train, damage.flagged
        assert samples is not None
        rows = dict(zip(positions(samples, list(flagged)), flagged.values(), strict=True))
        labels = {row: one.source for row, one in rows.items() if one.source is not None}
        if not labels:
            raise InputError("no flagged sample has a class that it seems to come from; use removal")
        left_out = sorted(set(rows) - set(labels))
        kept = np.setdiff1d(np.arange(len(samples)), left_out)
        data = relabelled(samples, labels).select(kept)
        mended = network_of(damage.classifier)
        usual = default_settings(
            mended.architecture or "", images=len(data), side=min(mended.spec.height, mended.spec.width)
        )
        train(
            mended.module,
            data,
            spec=mended.spec,
            settings=self._settings(usual),
            generator=make_generator(damage.seed, self.method()),
            device=mended.device,
            progress=damage.progress,
        )
        done = f"{len(labels):,} flagged samples were relabelled"
        done += f", {len(left_out):,} were left out" if left_out else ""
        return Mended(mended, data, f"{done}, and the model went on training on {len(data):,} samples")

    def _settings(self, usual: TrainingSettings) -> TrainingSettings:
        return usual.model_copy(
            update={
                "epochs": max(1, round(self.share * usual.epochs)),
                "learning_rate": self.learning_rate * usual.learning_rate,
                "schedule": "cosine",
            }
        )
