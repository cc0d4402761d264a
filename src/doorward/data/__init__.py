"""Samples with stable ids, and the sources they are read from."""

from doorward.data.samples import (
    Batch,
    InMemorySamples,
    Modality,
    Provenance,
    Raw,
    Samples,
    Waveform,
    content_hash,
)
from doorward.data.sources import open_samples

__all__ = [
    "Batch",
    "InMemorySamples",
    "Modality",
    "Provenance",
    "Raw",
    "Samples",
    "Waveform",
    "content_hash",
    "open_samples",
]
