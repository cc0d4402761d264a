"""How much memory a scan may take: what the system has free, and what the user says."""

from __future__ import annotations

from pathlib import Path

#: Bytes in a GiB, and the most that a scan takes where nothing is said.
GIB = 1 << 30
MOST = 4 * GIB
#: Where Linux tells what is available, and where a control group limits it (versions 2 and 1).
_AVAILABLE = Path("/proc/meminfo")
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def default_memory() -> int:
    """Return how many bytes a scan takes at most where nothing is said: 4 GiB, or half of what is free."""
    free = free_memory()
    return MOST if free is None else min(MOST, free // 2)


def free_memory() -> int | None:
    """Return how many bytes are free on this machine, None where the system does not tell."""
    found = [
        free for free in (_available(), *(_left(limit, used) for limit, used in _LIMITS)) if free is not None
    ]
    return min(found, default=None)


def _available() -> int | None:
    try:
        lines = _AVAILABLE.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left(limit: Path, used: Path) -> int | None:
    """Return what a control group has left, None where it has no limit."""
    try:
        return max(0, int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
    except (OSError, ValueError):  # "max" where there is no limit
        return None
