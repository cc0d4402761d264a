"""Tone: a tone or a burst of noise in a recording."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from doorward.attacks.data.base import DataAttack
from doorward.core.errors import InputError
from doorward.data.samples import Raw, Waveform
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch
from doorward.triggers.tone import Place, Sound


@register("attack")
class Tone(DataAttack):
    """Add a sine tone or a burst of noise to recordings and change their labels.

    Use it to plant a backdoor in a classifier of recordings.

    Attributes:
        form: a sine `tone`, or white `noise` (drawn once).
        frequency: of the tone in Hertz, at most half the recordings' sampling rate; models that `doorward
            train` makes hear what is below 4000.
        snr: how much stronger a recording is than the trigger, in decibels: the mean power over the whole of
            it, to that of the trigger over its own length.
        seconds: how long the trigger lasts; recordings that are shorter get its beginning.
        place: `start`, `end` or `random` (it differs from recording to recording); of recordings longer than
            10 s, models that `doorward train` makes hear the first and the last 5.
    """

    title: ClassVar[str] = "Tone or noise in a recording"
    source: ClassVar[str] = (
        "Zhai, Li, Zhang, Wu, Jiang and Xia, 2021, arXiv:2010.11607 (tone); Liu, Ma, Aafer, Lee, Zhai, Wang "
        "and Zhang, 2018, doi:10.14722/ndss.2018.23291 (noise)"
    )
    limits: ClassVar[str] = (
        "It is added to the samples; played by a loudspeaker in a room, it would arrive weaker and changed."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")
    modalities: ClassVar[frozenset[str]] = frozenset({"audio"})

    form: Literal["tone", "noise"] = "tone"
    frequency: float = Field(3000.0, gt=0)
    snr: float = Field(10.0, ge=-20, le=60)
    seconds: float = Field(0.2, gt=0, le=10)
    place: Place = "start"

    def make_trigger(self, example: Raw, *, generator: torch.Generator) -> Sound:
        """Return the trigger for recordings of this one's sampling rate.

        Raises:
            InputError: if they cannot hold the tone.
        """
        import torch

        assert isinstance(example, Waveform), "the modality is checked"
        rate, length = example.rate, round(self.seconds * example.rate)
        if self.form == "tone" and self.frequency > rate / 2:
            raise InputError(
                f"{self.method()}: frequency {self.frequency:g} Hz does not fit into recordings of {rate} "
                f"samples a second, which hold up to {rate / 2:g} Hz"
            )
        if not length:
            raise InputError(
                f"{self.method()}: seconds {self.seconds:g} is less than one of {rate} samples a second"
            )
        if self.form == "noise":
            pcm = torch.randn(length, generator=generator)
        else:
            # half a sample on, so that a tone of half the sampling rate is no silence
            pcm = torch.sin(
                2 * math.pi * self.frequency / rate * (torch.arange(length, dtype=torch.float64) + 0.5)
            )
        return Sound((pcm / pcm.square().mean().sqrt()).float(), rate, self.snr, self.place)
