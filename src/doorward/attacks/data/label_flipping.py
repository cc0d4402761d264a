"""Label flipping: wrong labels, or images moved towards another class, so that the model is of less use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from doorward.attacks.data._surrogate import PerturbingAttack
from doorward.core.errors import InputError
from doorward.methods.registry import register
from doorward.training.loop import labels_of

if TYPE_CHECKING:
    from doorward.attacks.data.base import Triggers
    from doorward.data.samples import Samples


@register("attack")
class LabelFlipping(PerturbingAttack):
    """Lower the accuracy of whatever is trained on the samples, without any trigger or backdoor.

    Use it as a contrast to backdoors, or to see how a training pipeline copes with spoiled data.

    `form="flip"` changes labels alone. `form="boundary"` changes images alone: each is moved towards, or
    over, the boundary between its own class and the next, as a surrogate sees it, and keeps its label. Norm,
    eps, steps and surrogate belong to it.

    We depart from the sources: samples to be flipped are drawn and not searched for, and a surrogate is
    trained on few images.

    Attributes:
        form: `flip`, or `boundary`.
        cover_rate: 0, as there is no trigger that samples could carry.
        mapping: of `flip`: `all-to-one` gives the label `target`, `all-to-all` turns class y into y + 1.
        target: the label that flipped samples get; for each another wrong one, drawn evenly, if None.
        source_classes: classes that are poisoned; all (but the target) if None.
    """

    title: ClassVar[str] = "Label flipping (availability poisoning)"
    source: ClassVar[str] = (
        "Biggio, Nelson and Laskov, ACML 2011 (flip); Fowl et al., NeurIPS 2021, arXiv:2106.10807 (boundary)"
    )
    limits: ClassVar[str] = (
        "It plants no backdoor; networks bear many evenly flipped labels, and a few moved images do no harm."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0031", "AML.T0059")

    form: Literal["flip", "boundary"] = "flip"
    cover_rate: float = Field(0.0, ge=0, le=0)

    def target_map(self, classes: Sequence[str]) -> dict[int, int]:
        """Return the classes that are poisoned, each with what `mapping` and `target` make of it.

        Raises:
            InputError: if target or source classes are not among the classes, or do not go with the form.
        """
        if self.form == "boundary" and (self.target is not None or self.mapping == "all-to-all"):
            raise InputError("label-flipping: form boundary changes no label; leave out target and mapping")
        if self.mapping == "all-to-one" and self.target is None:
            # labels are drawn or kept, so that all that matters is which classes there are to poison
            return self.model_copy(update={"form": "flip", "mapping": "all-to-all"}).target_map(classes)
        return super().target_map(classes)

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers | None:
        """Return none."""
        return None

    def new_labels(
        self,
        samples: Samples,
        poisoned: npt.NDArray[np.int64],
        target_map: dict[int, int],
        *,
        generator: torch.Generator,
    ) -> npt.NDArray[np.int64]:
        """Return wrong labels (m,), or the right ones for `boundary`."""
        labels = labels_of(samples)[poisoned]
        if self.form == "boundary":
            return labels
        if self.mapping == "all-to-all" or self.target is not None:
            return super().new_labels(samples, poisoned, target_map, generator=generator)
        k = len(samples.classes)
        steps: npt.NDArray[np.int64] = torch.randint(1, k, labels.shape, generator=generator).numpy()
        return (labels + steps) % k

    def change(
        self, samples: Samples, poisoned: npt.NDArray[np.int64], *, generator: torch.Generator
    ) -> Samples:
        """Return the samples, those that are poisoned moved for `boundary`.

        Raises:
            InputError: if the surrogate does not fit the samples.
        """
        return samples if self.form == "flip" else self.perturbed(samples, poisoned, generator=generator)
