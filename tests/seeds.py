"""The seeds of tests that train, which one variable shifts together."""

from __future__ import annotations

import os

#: DOORWARD_TEST_SEED=1 gives every test that trains other data, another attack and another network. What such
#: a test asserts must hold there too.
SHIFT = int(os.environ.get("DOORWARD_TEST_SEED", "0"))


def shifted(seed: int) -> int:
    """Return the seed that a test uses in the place of this one."""
    return seed + SHIFT
