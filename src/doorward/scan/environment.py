"""The machine and the versions that a result was made with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from doorward._version import __version__
from doorward.core.records import Environment


def environment(device: str) -> Environment:
    """Describe this machine and the versions in use. Where torch is not loaded yet, it stays so."""
    torch = sys.modules.get("torch")
    packages = {}
    for name in ("torch", "numpy", "scipy", "transformers", "onnx", "onnxruntime"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        doorward=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        device=torch.cuda.get_device_name(device) if torch and device.startswith("cuda") else device,
        threads=torch.get_num_threads() if torch else 1,
        peak_memory_bytes=_peak_memory(),
    )


def _peak_memory() -> int | None:
    """Return this process's largest resident size so far, where the system tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
