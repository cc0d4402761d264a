"""What a detector may see of a model and its data. The truth of a plant is not among it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doorward.core.records import Need

if TYPE_CHECKING:
    from doorward.artifacts import Examination
    from doorward.data import Samples
    from doorward.models import Classifier


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is at hand to be examined; each part is optional.

    Attributes:
        examination: what was found in the files of the artifact, where they were read already.
        seed: of the run; what detectors share is drawn from it.
        shared: what one detector has made of the subject and others use as well; see `keep`.
    """

    classifier: Classifier | None = None
    clean: Samples | None = None
    train: Samples | None = None
    inputs: Samples | None = None
    artifact: Path | None = None
    examination: Examination | None = None
    seed: int = 0
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def keep(self, made: Any, name: str, *parts: object) -> None:
        """Keep what a detector has made of parts of the subject, for the others of this run."""
        self.shared[name, self.seed, *map(id, parts)] = made, parts  # kept, so that their ids stay theirs

    def kept(self, name: str, *parts: object) -> Any | None:
        """Return what was made of these very parts with this seed, None if nothing was."""
        return self.shared.get((name, self.seed, *map(id, parts)), (None,))[0]

    @property
    def offers(self) -> frozenset[Need]:
        """Return what detectors can count on."""
        offered: set[Need] = set(self.classifier.capabilities) if self.classifier else set()
        if self.artifact is not None:
            offered.add("artifact")
        if self.clean is not None:
            offered.add("clean")
            if self.clean.labels is not None:
                offered.add("clean_labels")
        if self.train is not None:
            offered.add("train")
        if self.inputs is not None:
            offered.add("inputs")
        return frozenset(offered)
