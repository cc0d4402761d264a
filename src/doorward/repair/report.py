"""What a repair found and did, and the mended model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from doorward.core.errors import InputError
from doorward.core.records import NotRun, Rate, Record, Verdict, framed
from doorward.models import TorchClassifier
from doorward.repair.page import to_html
from doorward.repair.writing import write_mended
from doorward.repairs.base import RepairRecord

#: The page on what was done, next to the model.
PAGE = "repair.html"
#: A recovered trigger still works where its success on samples kept back is surely above this share.
STILL_WORKS = 0.05


class TriggerRecord(Record):
    """How often a recovered trigger leads samples of other classes to its target, on samples kept back."""

    detector: str
    target: int
    before: Rate
    after: Rate


class RepairReport(Record):
    """What a repair found, did, and found afterwards.

    Attributes:
        before, after: verdicts on the model, or on its training data where these were given: as it came, and
            mended.
        flagged: how many samples.
        flagged_label_before, flagged_label_after: how often the model gives flagged samples the label that
            they were flagged with.
        accuracy_before, accuracy_after: on the clean samples; on training samples that were kept, where none
            are given.
        measured_on: which of these; the recovered triggers are tried on the same.
        without_data: whether the model alone was given.
        triggers: what the recovered triggers did before and after.
        parameters_before, parameters_after: how many the model has.
        repair: what was done; None if nothing was found.
        further: what was done after that, since something was still found.
        not_run: detectors that did not run, and repairs that did not fit.
    """

    model: str
    before: Verdict
    after: Verdict
    flagged: int = 0
    flagged_label_before: Rate | None = None
    flagged_label_after: Rate | None = None
    accuracy_before: Rate | None = None
    accuracy_after: Rate | None = None
    measured_on: str = ""
    without_data: bool = False
    triggers: tuple[TriggerRecord, ...] = ()
    parameters_before: int | None = None
    parameters_after: int | None = None
    repair: RepairRecord | None = None
    further: tuple[RepairRecord, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    seconds: float = 0.0

    @property
    def still_works(self) -> bool:
        """Return whether a recovered trigger still works, whatever the scan after the repair finds."""
        return any(one.after.low > STILL_WORKS for one in self.triggers)

    @property
    def unmeasured(self) -> bool:
        """Return whether nothing is known by which to measure what is left of a backdoor."""
        cut = self.repair is not None and self.repair.repair == "remove-branch"
        return not (cut or self.triggers) and self.flagged_label_before is None

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing is found after the repair and no trigger works, 3 if it cannot tell, else 1."""
        return 1 if self.still_works else {"nothing_found": 0, "could_not_tell": 3}.get(self.after, 1)

    def _repr_html_(self) -> str:
        return framed(to_html(self))


@dataclass(frozen=True)
class RepairOutcome:
    """The report on a repair, and the mended model, where there is one."""

    report: RepairReport
    classifier: TorchClassifier | None = None

    def save(self, folder: str | Path) -> Path:
        """Write the mended model, repair.json and repair.html into a folder; return the model's path.

        The model gets the format of the original where that can hold it. All files appear at once, and files
        of other names in the folder stay.

        Raises:
            InputError: if it cannot be written, the folder is the original's, or nothing was mended.
        """
        if self.classifier is None:
            raise InputError("there is no mended model to be saved: the report says why")
        return write_mended(self.classifier, self.report, Path(folder), {PAGE: to_html(self.report)})

    def _repr_html_(self) -> str:
        return self.report._repr_html_()
