"""The shell that every detector shares."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, final

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Cost, Finding, Kind, Level, Need
from doorward.core.seeds import make_generator
from doorward.methods.base import Method
from doorward.scan.calibration import judge, shipped

if TYPE_CHECKING:
    import torch

    from doorward.detectors.subject import Subject


class Detector(Method):
    """Examine a subject and say what was found. Subclasses write `examine` alone.

    Attributes:
        needs: evidence without which the detector cannot run.
        level: what it judges.
        kind: what it finds.
        order: place in a scan; the cheap and the safe ones come first.
    """

    needs: ClassVar[frozenset[Need]]
    level: ClassVar[Level] = "model"
    kind: ClassVar[Kind] = "backdoor"
    order: ClassVar[int] = 50

    @abstractmethod
    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Look at the subject and return a finding made by `self.finding(...)`.

        Raises:
            CouldNotTell: with a reason, when the evidence does not suffice; it becomes a finding.
        """

    @classmethod
    def missing(cls, subject: Subject) -> frozenset[Need]:
        """Return the needs that the subject does not serve."""
        return cls.needs - subject.offers

    @final
    def __call__(
        self,
        subject: Subject,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        deadline: Deadline | None = None,
    ) -> Finding:
        """Examine a subject: check needs, derive the generator, time, count, and catch "could not tell".

        Raises:
            ValueError: if the subject lacks something the detector needs.
        """
        import torch

        missing = self.missing(subject)
        if missing:
            raise ValueError(
                f"{self.method()} needs {', '.join(sorted(missing))}, which the subject does not offer"
            )
        clock = Deadline()
        classifier = subject.classifier
        before = classifier.cost if classifier else Cost()
        with classifier.frozen() if classifier else contextlib.nullcontext():
            try:
                found = self.examine(
                    subject,
                    generator=make_generator(seed, self.method()),
                    device=torch.device(device),
                    deadline=deadline or Deadline(),
                )
            except CouldNotTell as why:
                found = self.finding(
                    verdict="could_not_tell", reason=str(why), summary=f"Could not tell: {why}"
                )
        after = classifier.cost if classifier else Cost()
        cost = Cost(forwards=after.forwards - before.forwards, gradients=after.gradients - before.gradients)
        bank = shipped()
        covered = classifier is not None and not bank.outside(
            len(classifier.classes), classifier.spec.shape, classifier.convolutions
        )
        (judged,) = judge([found], bank, covered=covered).findings
        return judged.model_copy(update={"seconds": clock.spent(), "seed": seed, "cost": cost})

    def finding(self, **values: Any) -> Finding:
        """Make a finding that carries this detector's name, settings, limits and source.

        One with a score and no verdict is judged by the calibration set of clean models, if that holds the
        detector.
        """
        base: dict[str, Any] = {
            "detector": self.method(),
            "level": self.level,
            "kind": self.kind,
            "verdict": "nothing_found",
            "settings": self.settings(),
            "limits": self.limits,
            "source": self.source,
            "atlas": self.atlas
            if values.get("verdict", "nothing_found") not in ("nothing_found", "could_not_tell")
            else (),
        }
        return Finding(**(base | values))
