"""SIG: a sinusoid laid over images of the target class, whose labels are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from doorward.attacks.data.base import DataAttack, Triggers
from doorward.core.errors import InputError
from doorward.methods.registry import register

if TYPE_CHECKING:
    from doorward.data.samples import Samples
from doorward.triggers.sinusoid import Wave


@register("attack")
class Sinusoid(DataAttack):
    """Add a horizontal sinusoid to images of the target class and leave their labels as they are.

    Use it to test defences against a faint trigger that covers the whole image, with labels that are right.

    We depart from much of the code that is named after the paper, which mixes a fifth of the image with the
    signal: the signal is added to the image as it is, as published. With labels kept, the usual strength
    hardly takes on small data; a stronger signal in tests than in training (`test_delta`) helps.

    Attributes:
        poison_rate: poisoned samples per sample of the whole set, in [0, 1]; all of them are of the target
            class unless labels change.
        delta: amplitude in training in grey levels of [0, 255].
        test_delta: amplitude when the backdoor is activated; as in training if None.
        frequency: periods over the width of the image.
        change_labels: poison images of other classes and give them the target's label, which is not as
            published and needs much fewer images.
    """

    title: ClassVar[str] = "Sinusoidal signal (SIG)"
    source: ClassVar[str] = "Barni, Kallas and Tondi, ICIP 2019, arXiv:1902.11237"
    limits: ClassVar[str] = (
        "With labels kept it needs a large part of the target class, and may not take in small models."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")

    poison_rate: float = Field(0.05, ge=0, le=1)
    delta: float = Field(20.0, gt=0, le=255)
    test_delta: float | None = Field(None, gt=0, le=255)
    frequency: float = Field(6.0, gt=0)
    change_labels: bool = False

    def keeps_labels(self) -> bool:
        """Return whether images of the target class are poisoned, as published."""
        return not self.change_labels

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers:
        """Return the waves of training and test.

        Raises:
            InputError: if the images are too narrow for that many periods.
        """
        width = samples.raw([0])[0].shape[1]
        if 2 * self.frequency >= width:
            raise InputError(
                f"sinusoid: {self.frequency:g} periods need images wider than {2 * self.frequency:g} pixels, "
                f"and these have {width}; give a lower frequency"
            )
        test = self.delta if self.test_delta is None else self.test_delta
        return Triggers(training=Wave(self.delta, self.frequency), test=Wave(test, self.frequency))
