"""Samples without those that cannot be read."""

from __future__ import annotations

import numpy as np

from doorward.core.errors import InputError
from doorward.data.samples import Samples, View

#: Samples that are decoded at a time.
BATCH = 512


def without_unreadable(samples: Samples, most: int) -> Samples:
    """Return the samples that can be decoded, with a note that names the first of the others.

    All are decoded once. Ids are numbered among the samples that are left.

    Args:
        most: samples that may be unreadable.

    Raises:
        InputError: if more are; the message is that of the first.
    """
    bad: dict[int, InputError] = {}
    for start in range(0, len(samples), BATCH):
        rows = range(start, min(start + BATCH, len(samples)))
        try:
            samples.raw(rows)
        except InputError:
            bad |= {row: why for row in rows if (why := _why_unreadable(samples, row)) is not None}
        if len(bad) > most:
            first = next(iter(bad.values()))
            raise InputError(f"more than {most} samples cannot be read, the first: {first}") from first
    if not bad:
        return samples
    count = f"{len(bad)} sample{'s' if len(bad) > 1 else ''}"
    samples.provenance.note(f"left out {count} that cannot be read, the first: {next(iter(bad.values()))}")
    return View(samples, np.setdiff1d(np.arange(len(samples)), list(bad)), own_ids=True)


def _why_unreadable(samples: Samples, row: int) -> InputError | None:
    try:
        samples.raw([row])
    except InputError as error:
        return error
    return None
