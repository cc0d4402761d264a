"""Tone: a tone or a burst of noise in a recording."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from doorward.attacks.base import DataAttack
from doorward.data.samples import Raw, Waveform
from doorward.errors import InputError
from doorward.registry import register
from doorward.triggers import Trigger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Place = Literal["start", "end", "random"]

#: Power of a recording that is as good as silent, in which a trigger would drown among the levels of 16 bits.
_QUIET = 1e-6


@dataclass(frozen=True, eq=False)
class Sound(Trigger):
    """Add a sound to recordings, as much below their own power as the signal-to-noise ratio says.

    The power of a recording is the mean over its whole length, that of the sound over its own. A recording
    shorter than the sound gets its beginning. Sums beyond [-1, 1] are cut off, and rounded to the levels of
    16 bits, in which recordings are usually kept.

    Attributes:
        pcm: (m,) the sound, of mean power 1.
        rate: samples per second of the sound.
        snr: in decibels.
        place: where; `random` differs from recording to recording, and is always the same for the same one.
    """

    pcm: Tensor
    rate: int
    snr: float
    place: Place
    kind: ClassVar[str] = "sound"

    def apply(self, x: Any, *, generator: torch.Generator | None = None) -> Any:
        """Return the recordings, a list of waveforms, with the trigger on every channel."""
        return [self._add(sound) for sound in x]

    def _add(self, sound: Waveform) -> Waveform:
        from doorward.modalities.audio import LEVELS, resample, to_levels

        clean: npt.NDArray[np.float64] = sound.pcm.astype(np.float64)
        added = resample(self.pcm.numpy(), self.rate, sound.rate)[: len(clean)].astype(np.float64)
        spare = len(clean) - len(added)
        # drawn from the recording itself, so that a sample has its trigger always in the same place
        drawn = zlib.crc32(np.ascontiguousarray(sound.pcm).tobytes()) % (spare + 1)
        at = {"start": 0, "end": spare, "random": drawn}[self.place]
        power = max(float(np.mean(clean**2)) if len(clean) else 0.0, _QUIET)
        strength = math.sqrt(power) * 10 ** (-self.snr / 20)
        clean[at : at + len(added)] += strength * (added if clean.ndim == 1 else added[:, None])
        return Waveform((to_levels(clean) / np.float32(LEVELS)).astype(np.float32), sound.rate)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sound."""
        return {"pcm": self.pcm}

    def settings(self) -> dict[str, Any]:
        """Return all other fields."""
        return {"rate": self.rate, "snr": self.snr, "place": self.place}


@register("attack")
class Tone(DataAttack):
    """Add a sine tone or a burst of noise to recordings and change their labels.

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
