"""What all tests share: real data where it is at hand, one thread, no network, repeatable examples."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Set before the libraries are imported: a test never reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "doorward",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("doorward")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data sets, or skip."""
    path = os.environ.get("DOORWARD_DATA")
    if not path:
        pytest.skip("DOORWARD_DATA does not name the folder of real data sets")
    assert Path(path).is_dir(), f"DOORWARD_DATA={path} is no folder"
    return Path(path)


@contextmanager
def untouched_globals() -> Iterator[None]:
    """Assert that the block leaves the global generators and the host's settings as they were."""

    def state() -> dict[str, object]:
        name, keys, position, gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the legacy state is what is watched
        return {
            "random": random.getstate(),
            "numpy.random": (name, keys.tobytes(), position, gauss, cached),
            "torch": torch.get_rng_state().numpy().tobytes(),
            "threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            # torch itself sets this when an optimiser is made for the first time
            "environment": {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"},
        }

    before = state()
    yield
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"a library call changed the host's {', '.join(changed)}"


@pytest.fixture
def untouched() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that asserts that its block leaves the host process as it was."""
    return untouched_globals
