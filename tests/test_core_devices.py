from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from doorward.core import devices

#: Prints how often the system handed out pages while large tensors came and went.
SCRIPT = """
import resource, sys, torch
from doorward.core.devices import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000)
before = faults()
for _ in range(30):
    torch.ones(16_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has this setting")
def test_freed_memory_is_used_again() -> None:
    """Else all pages of a large tensor are cleared again each time."""
    faults = {}
    for name in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, check=True, env={}
        )
        faults[name] = int(done.stdout)
    assert 3 * faults["kept"] < faults["returned"]


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: ("", ""))
    assert devices.keep_freed_memory() is False
