"""A sound in a recording."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from doorward.data.samples import Waveform
from doorward.triggers.base import Trigger

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
        from doorward.models.encode.audio import LEVELS, resample, to_levels

        clean: npt.NDArray[np.float64] = sound.pcm.astype(np.float64)
        added = resample(self.pcm.numpy(), self.rate, sound.rate)[: len(clean)].astype(np.float64)
        spare = len(clean) - len(added)
        # drawn from the recording itself, so that a sample has its trigger always in the same place
        drawn = zlib.crc32(np.ascontiguousarray(sound.pcm).tobytes()) % (spare + 1)
        at = {"start": 0, "end": spare, "random": drawn}[self.place]
        positive_control = max(float(np.mean(clean**2)) if len(clean) else 0.0, _QUIET)
        strength = math.sqrt(positive_control) * 10 ** (-self.snr / 20)
        clean[at : at + len(added)] += strength * (added if clean.ndim == 1 else added[:, None])
        return Waveform((to_levels(clean) / np.float32(LEVELS)).astype(np.float32), sound.rate)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sound."""
        return {"pcm": self.pcm}

    def settings(self) -> dict[str, Any]:
        """Return all other fields."""
        return {"rate": self.rate, "snr": self.snr, "place": self.place}
