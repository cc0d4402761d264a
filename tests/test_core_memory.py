from __future__ import annotations

import pytest

from doorward.core import memory
from doorward.core.memory import GIB, MOST, default_memory, free_memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that says what the system tells: bytes available, and a limit with what is used."""

    def says(available: int | None, limit: str = "max", used: int = 0) -> None:
        told, maximum, current = (tmp_path / name for name in ("meminfo", "max", "current"))
        lines = "MemTotal: 99 kB\n" + (f"MemAvailable: {available // 1024} kB\n" if available else "")
        told.write_text(lines, encoding="ascii")
        maximum.write_text(f"{limit}\n", encoding="ascii")
        current.write_text(f"{used}\n", encoding="ascii")
        monkeypatch.setattr(memory, "_AVAILABLE", told)
        monkeypatch.setattr(memory, "_LIMITS", ((maximum, current), (tmp_path / "none", tmp_path / "none")))

    return says


@pytest.mark.parametrize(
    ("available", "limit", "used", "free"),
    [
        (6 * GIB, "max", 0, 6 * GIB),
        (6 * GIB, str(4 * GIB), GIB, 3 * GIB),
        (2 * GIB, str(64 * GIB), GIB, 2 * GIB),
        (2 * GIB, str(GIB), 2 * GIB, 0),
        (None, "max", 0, None),
    ],
)
def test_what_is_free_is_what_system_and_control_group_leave(machine, available, limit, used, free) -> None:
    machine(available, limit, used)
    assert free_memory() == free


def test_a_scan_takes_half_of_what_is_free_and_four_gib_at_most(machine) -> None:
    machine(3 * GIB)
    assert default_memory() == 3 * GIB // 2
    machine(64 * GIB)
    assert default_memory() == MOST == 4 * GIB
    machine(None)
    assert default_memory() == MOST
