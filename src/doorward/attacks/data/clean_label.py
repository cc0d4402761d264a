"""Clean-label: a patch on images of its own target class that were made hard to tell otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from doorward.attacks.data._surrogate import PerturbingAttack
from doorward.attacks.data.badnets import BadNets
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch

    from doorward.data.samples import Samples


@register("attack")
class CleanLabel(PerturbingAttack, BadNets):
    """Make images of the target class hard to tell, stamp a patch on them, and leave their labels alone.

    Use it to test defences that look for wrong labels: here every label is right.

    At test the patch alone is stamped, on images of other classes. With `eps=0` it is the baseline of patches
    on target images as they are.

    We depart from the authors. A faint patch is blended (`alpha`), where theirs is added and cut off. It is
    in one place, where theirs may be in all four corners. Of their two ways to make images hard, there is no
    interpolation by a generative model.

    Attributes:
        poison_rate: poisoned samples per sample of the whole set, in [0, 1]; all are of the target class.
    """

    title: ClassVar[str] = "Clean-label (label-consistent) backdoor"
    source: ClassVar[str] = "Turner, Tsipras and Madry, 2019, arXiv:1912.02771"
    limits: ClassVar[str] = (
        "The patch can be seen; where the surrogate's weak points are not the victim's, it works no better "
        "than a patch alone."
    )
    clean_label: ClassVar[bool] = True

    poison_rate: float = Field(0.02, ge=0, le=1)

    def change(
        self, samples: Samples, poisoned: npt.NDArray[np.int64], *, generator: torch.Generator
    ) -> Samples:
        """Return the samples, those of the target class that are poisoned made hard to tell.

        Raises:
            InputError: if the surrogate does not fit the samples.
        """
        return self.perturbed(samples, poisoned, generator=generator)
