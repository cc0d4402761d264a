"""Find, plant and remove backdoors in machine-learning models.

Importing this package does nothing; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from doorward._version import __version__

if TYPE_CHECKING:
    from doorward.core.records import Finding, Report
    from doorward.data import Samples, open_samples
    from doorward.detectors.subject import Subject
    from doorward.guard.guard import Guard
    from doorward.models import Classifier, InputSpec, open_classifier, wrap
    from doorward.repair.pipeline import repair
    from doorward.scan.examine import examine
    from doorward.scan.pipeline import scan
    from doorward.scan.request import ScanRequest

_HOME = {
    "Classifier": "doorward.models",
    "Finding": "doorward.core.records",
    "Guard": "doorward.guard.guard",
    "InputSpec": "doorward.models",
    "Report": "doorward.core.records",
    "Samples": "doorward.data",
    "ScanRequest": "doorward.scan.pipeline",
    "Subject": "doorward.detectors.subject",
    "open_classifier": "doorward.models",
    "open_samples": "doorward.data",
    "examine": "doorward.scan.examine",
    "repair": "doorward.repair.pipeline",
    "scan": "doorward.scan.pipeline",
    "wrap": "doorward.models",
}

__all__ = [
    "Classifier",
    "Finding",
    "Guard",
    "InputSpec",
    "Report",
    "Samples",
    "ScanRequest",
    "Subject",
    "__version__",
    "examine",
    "open_classifier",
    "open_samples",
    "repair",
    "scan",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module on first use."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'doorward' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
