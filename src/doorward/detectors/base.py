"""The shell that every detector shares."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, final

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Cost, Finding, Kind, Level, Measurement, Need
from doorward.core.seeds import make_generator
from doorward.methods.base import Method
from doorward.methods.source import score_code

if TYPE_CHECKING:
    import torch

    from doorward.detectors.subject import Subject


class Detector(Method):
    """Examine a subject and return what was measured. Subclasses write `examine` alone.

    A detector measures: it gives each class a score, and evidence. Whether a score is high is judged once, by
    the scan, which compares it with those of clean models. A detector of `level` "artifact" reads files,
    where the reading itself decides; it returns a `Finding` with a verdict.

    Attributes:
        needs: evidence without which the detector cannot run.
        level: what it judges.
        kind: what it finds.
        order: place in a scan; the cheap and the safe ones come first.
    """

    needs: ClassVar[frozenset[Need]]
    #: Evidence in whose place it runs: where a scan has that, it runs only if it is named.
    stands_in_for: ClassVar[frozenset[Need]] = frozenset()
    level: ClassVar[Level] = "model"
    kind: ClassVar[Kind] = "backdoor"
    order: ClassVar[int] = 50
    #: Settings with which it is several times as fast, for a scan whose time does not suffice otherwise.
    quick: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Look at the subject and return what `self.measurement(...)` or `self.finding(...)` makes.

        Raises:
            CouldNotTell: with a reason, when the evidence does not suffice; it becomes part of the result.
        """

    def work(self, *, classes: int, images: int) -> Cost | None:
        """Return how many images it sends through a model, about, with these settings; None if unknown.

        Args:
            images: how many it is given.
        """
        return None

    def lesson(self) -> int:
        """Return how many images the surrogates learn from that it shares with others; 0 if it uses none.

        `work` does not count them.
        """
        return 0

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
    ) -> Measurement:
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
                seen = self.examine(
                    dataclasses.replace(subject, seed=seed),
                    generator=make_generator(seed, self.method()),
                    device=torch.device(device),
                    deadline=deadline or Deadline(),
                )
            except CouldNotTell as why:
                seen = self._could_not_tell(str(why))
        after = classifier.cost if classifier else Cost()
        cost = Cost(forwards=after.forwards - before.forwards, gradients=after.gradients - before.gradients)
        return seen.model_copy(update={"seconds": clock.spent(), "seed": seed, "cost": cost})

    def measurement(self, **values: Any) -> Measurement:
        """Make a measurement that carries this detector's name, settings, code, limits and source."""
        return Measurement(**(self._base() | {"code": score_code(type(self).__module__)} | values))

    def finding(self, **values: Any) -> Finding:
        """Make a finding whose verdict this detector gives itself, since it reads and does not measure."""
        verdict = values.get("verdict", "nothing_found")
        unremarkable = verdict in ("nothing_found", "could_not_tell")
        base = self._base() | {"verdict": verdict, "atlas": () if unremarkable else self.atlas}
        return Finding(**(base | values))

    def _base(self) -> dict[str, Any]:
        return {
            "detector": self.method(),
            "level": self.level,
            "kind": self.kind,
            "settings": self.settings(),
            "limits": self.limits,
            "source": self.source,
            "atlas": self.atlas,
        }

    def _could_not_tell(self, why: str) -> Measurement:
        told = {"reason": why, "summary": f"Could not tell: {why}"}
        if self.level == "artifact":
            return self.finding(verdict="could_not_tell", **told)
        return self.measurement(**told)
