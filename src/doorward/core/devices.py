"""Which device the numbers are made on."""

from __future__ import annotations

import ctypes
import platform

from doorward.core.errors import InputError

#: Parameters of glibc's `mallopt` by number, and the size in bytes up to which freed memory is kept.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _KEPT = -3, -1, 256 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Have this process use freed memory again, where glibc hands it out; tell whether it will.

    Else each large tensor is mapped again, and the system clears its pages when they are touched first, which
    with small networks and large batches takes a good part of the time. Results are the same.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, _KEPT) == 1 for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def check_device(name: str) -> str:
    """Return the name of a device that torch can compute on here.

    Raises:
        InputError: if it cannot; the message names the devices that it can.
    """
    import torch

    try:
        torch.ones(1, device=name).item()  # a device without memory fails here at the latest
    except (RuntimeError, AssertionError, ImportError):
        usable = ["cpu"]
        if torch.cuda.is_available():
            usable += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            usable.append("mps")
        raise InputError(f"the device {name!r} cannot be used here; usable: {', '.join(usable)}") from None
    return name
