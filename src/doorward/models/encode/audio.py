"""Recordings: from waveforms of any rate to rows of samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from doorward.data import Samples
    from doorward.data.samples import Waveform
    from doorward.models.spec import AudioSpec

#: The type of samples in the compact tensor.
DTYPE = torch.int16

#: Levels of 16-bit sound on either side of silence.
LEVELS = 32768


def fit_sound(sound: Waveform, spec: AudioSpec) -> npt.NDArray[np.float32]:
    """Return a recording as one channel at the spec's rate, cut as it says: (m,) float32.

    Several channels are averaged; another rate is changed by a polyphase filter.
    """
    pcm = sound.pcm if sound.pcm.ndim == 1 else sound.pcm.mean(1)
    # what is cut anyway is not filtered, but for a second that the filter may look ahead
    enough = (spec.width // spec.rate + 2) * sound.rate
    if spec.cut == "end":
        pcm = pcm[:enough]
    elif len(pcm) > 2 * enough:
        pcm = np.concatenate([pcm[:enough], pcm[-enough:]])
    pcm = resample(pcm, sound.rate, spec.rate)
    begin, end = spec.kept(len(pcm))
    return np.concatenate([pcm[:begin], pcm[len(pcm) - end :]])


def resample(pcm: npt.NDArray[np.float32], rate: int, new: int) -> npt.NDArray[np.float32]:
    """Return samples (m,) of one rate at another."""
    if rate == new or not len(pcm):
        return pcm
    from scipy.signal import resample_poly

    common = math.gcd(rate, new)
    return np.asarray(resample_poly(pcm, new // common, rate // common), dtype=np.float32)


def to_levels(pcm: npt.NDArray[np.floating]) -> npt.NDArray[np.int16]:
    """Return samples in [-1, 1] as 16-bit levels; what is louder is cut off."""
    levels: npt.NDArray[np.int16] = np.clip(np.rint(pcm * LEVELS), -LEVELS, LEVELS - 1).astype(np.int16)
    return levels


def to_tensor(samples: Samples, spec: AudioSpec) -> Tensor:
    """Decode all samples into 16-bit levels (n, 1, 1, m) int16, m being the longest one's length.

    Recordings longer than the spec allows are cut as it says; shorter ones are filled up with silence.
    """
    sounds = [to_levels(fit_sound(sound, spec)) for i in range(len(samples)) for sound in samples.raw([i])]
    out = torch.zeros((len(sounds), 1, 1, max(1, max(map(len, sounds), default=1))), dtype=torch.int16)
    for row, levels in zip(out, sounds, strict=True):
        row[0, 0, : len(levels)] = torch.from_numpy(levels)
    return out


def to_float(x: Tensor) -> Tensor:
    """Return 16-bit levels as float32 in [-1, 1]."""
    return x.float().div_(LEVELS)
