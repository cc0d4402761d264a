"""A scan's arguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from doorward.models import LoadOptions


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """A scan's arguments; `doorward verify` reruns a report from them.

    Attributes:
        model: path or hub id, as `open_classifier` takes it; None to train one on the training data.
        clean, train: data paths, as `open_samples` takes them. Training data are inspected for poison; their
            images serve where no clean ones are.
        detectors: names; all that the evidence allows if empty.
        settings: of these detectors, each as DETECTOR.NAME=VALUE, the value in JSON or as text.
        seed: one seed for everything.
        device: torch device.
        time_budget: seconds for the whole scan; a detector that would not fit runs at a reduced setting, or
            not at all.
        memory: GiB that it may take beyond the model; half of what is free if None, and at most 4.
        images: most clean images that are used; every class gives its share. Half of the first
            hundred, and all beyond, are kept back to confirm a recovered trigger.
        strict_files: files that loading never opens count as well if they would run code when opened.
        control: where nothing is found, plant known triggers in copies of the model and scan those.
        factory, weights: the user's own function that builds the module, and the weights for it.
        data_column, label_column: where the images and their labels are, where it cannot be told.
        options: what the user states of the model.
        skip_unreadable: most samples that are left out since they cannot be read; else they end the scan.
        keep_model: where the model that is trained on the training data is written to; nowhere if None.
        folder: where the scan was asked for; `doorward.scan.rerun` finds relative paths from there.
    """

    model: str | None = None
    clean: str | None = None
    train: str | None = None
    detectors: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    time_budget: float = 900.0
    memory: float | None = None
    images: int = 300
    control: bool = False
    strict_files: bool = False
    factory: str | None = None
    weights: str | None = None
    data_column: str | None = None
    label_column: str | None = None
    folder: str | None = None
    keep_model: str | None = None
    skip_unreadable: int = 0
    options: LoadOptions = field(default_factory=LoadOptions)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as JSON types."""
        return asdict(self) | {"detectors": list(self.detectors), "settings": list(self.settings)}

    @staticmethod
    def from_json(form: dict[str, Any]) -> ScanRequest:
        """Rebuild a request from a report's `request`.

        Raises:
            pydantic.ValidationError: if it is none.
        """
        return TypeAdapter(ScanRequest).validate_python(form)
