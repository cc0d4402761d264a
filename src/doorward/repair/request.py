"""A repair's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.models import LoadOptions


@dataclass(frozen=True, kw_only=True)
class RepairRequest:
    """A repair's arguments.

    Attributes:
        model: path or hub id, as `open_classifier` takes it.
        train, clean: data paths, as `open_samples` takes them, or samples.
        method: name of a repair, or "auto" for the first that fits.
        settings: of the method.
        seed, device, time_budget: as those of a scan.
        data_column, label_column: where inputs and labels are, where it cannot be told.
        options: what the user states of the model.
        factory, weights: the function that builds the network, and its weights, as for `open_classifier`.
        detectors: those that scan the model where clean samples mend it; all that examine behaviour if empty.
    """

    model: str
    train: str | Samples | None = None
    clean: str | Samples | None = None
    method: str = "auto"
    settings: dict[str, object] | None = None
    seed: int = 0
    device: str = "cpu"
    time_budget: float | None = None
    data_column: str | None = None
    label_column: str | None = None
    options: LoadOptions | None = None
    factory: str | None = None
    weights: Path | None = None
    detectors: tuple[Detector, ...] = ()
