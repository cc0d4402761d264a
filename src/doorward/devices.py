"""Which device the numbers are made on."""

from __future__ import annotations

from doorward.errors import InputError


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
