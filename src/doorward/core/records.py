"""Frozen, versioned results: what a detector found, what a scan concludes.

Records are plain data. Every reporter is a function of them, and their JSON Schema is published.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = "1.0"

Need = Literal[
    "artifact",
    "graph",
    "weights",
    "gradients",
    "features",
    "probabilities",
    "clean",
    "clean_labels",
    "train",
    "inputs",
]
Verdict = Literal["unsafe", "backdoored", "suspicious", "could_not_tell", "nothing_found"]
Level = Literal["artifact", "model", "class", "sample", "input"]
Kind = Literal["unsafe_code", "backdoor", "poison", "tamper"]

#: Found goes before could-not-tell, and could-not-tell before nothing-found.
SEVERITY: dict[Verdict, int] = {
    "nothing_found": 0,
    "could_not_tell": 1,
    "suspicious": 2,
    "backdoored": 3,
    "unsafe": 4,
}


class Record(BaseModel):
    """Is the base of all results: frozen, closed to unknown fields, NaN refused in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def framed(page: str) -> str:
    """Return a whole page as an element for notebooks, that lets it neither run nor load anything."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" sandbox="" title="Doorward report" '
        'style="width: 100%; height: 52rem; border: 0"></iframe>'
    )


class Picture(Record):
    """One PNG picture."""

    type: Literal["picture"] = "picture"
    title: str
    alt: str = Field(description="What the picture shows, for those who cannot see it")
    png: str = Field(repr=False, description="The PNG file in base64")
    role: Literal["picture", "trigger", "example"] = Field(
        "picture", description="Whether it shows a trigger alone, or an input without and with it"
    )


class Text(Record):
    """One piece of text, such as a decompiled payload."""

    type: Literal["text"] = "text"
    title: str
    text: str


class Table(Record):
    """One small table."""

    type: Literal["table"] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


class RecoveredTrigger(Record):
    """A trigger that a detector recovered, in a form that rebuilds it (see `doorward.triggers.base`)."""

    type: Literal["trigger"] = "trigger"
    title: str
    target: int
    trigger: dict[str, Any] = Field(
        repr=False, description="The trigger's JSON form: type, settings, tensors in base64"
    )


class HiddenBranch(Record):
    """A place in a network's graph at which something hidden joins the answer."""

    type: Literal["branch"] = "branch"
    title: str
    target: int | None = Field(None, description="The class that it leads to")
    value: int = Field(description="Number of the value, counted along the calls of operators")
    operator: str = Field(description="The operator that makes the value")
    elements: tuple[int, ...] = Field((), description="Elements of the value, all of them if empty")
    calls: int = Field(description="How many calls of operators the graph has")


Evidence = Annotated[Picture | Text | Table | RecoveredTrigger | HiddenBranch, Field(discriminator="type")]


class Rate(Record):
    """A proportion with its count and its 95 % Clopper-Pearson interval."""

    successes: int
    n: int
    value: float
    low: float
    high: float


class Cost(Record):
    """Count what a method spent: images sent forward, and images whose input gradient was taken."""

    forwards: int = 0
    gradients: int = 0


class Measurement(Record):
    """What one detector measured on one subject. A higher score is always more suspicious.

    A measurement knows no threshold, p-value or verdict: these come from comparing it with clean models.
    """

    detector: str
    level: Level
    kind: Kind
    summary: str = Field(description="One sentence for a reader who does not know the method")
    reason: str | None = Field(None, description="Why the detector could not tell")
    doubt: str | None = Field(None, description="Why a high score says little; a low one counts all the same")
    score: float | None = None
    per_class: dict[int, float | None] = Field(default_factory=dict)
    unknown_classes: dict[int, str] = Field(
        default_factory=dict, description="Why a class has no score: reason by class"
    )
    score_name: str = Field("score", description="What score, threshold and per_class measure")
    scores: dict[str, float] | str | None = Field(
        None, description="Score by sample id, or the file with them"
    )
    suspects: dict[int, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Ids of the samples that a class's score is about; they are flagged if the class is",
    )
    sources: dict[str, int] = Field(
        default_factory=dict, description="The class that a suspect sample seems to come from, by its id"
    )
    published_threshold: float | None = Field(
        None, description="From which score on the method's authors find a class poisoned, if they say so"
    )
    published_flags: tuple[int, ...] | None = Field(
        None, description="Classes that the rule of the method's authors flags, where `score` is another"
    )
    evidence: tuple[Evidence, ...] = ()
    atlas: tuple[str, ...] = Field(
        (), description="MITRE ATLAS ids of the techniques that an alarm points to"
    )
    seconds: float = 0.0
    cost: Cost = Cost()
    settings: dict[str, Any] = Field(default_factory=dict)
    code: str | None = Field(None, description="Hash of the code that makes the score")
    seed: int = 0
    limits: str = Field("", description="One sentence: what this detector cannot see")
    source: str = ""


class FlaggedSample(Record):
    """One training sample that is flagged: where it lies, its label, and where it seems to come from."""

    id: str
    row: int = Field(description="Its number in the set, from 0")
    place: str = Field(description="The file, or the row of a file, that it was read from")
    label: int
    source: int | None = Field(None, description="The class that it seems to come from")
    score: float | None = None


class Finding(Measurement):
    """A measurement, or what was read in files, with what follows from it."""

    verdict: Verdict
    threshold: float | None = None
    p_value: float | None = Field(None, ge=0, le=1)
    calibrated: bool = False
    uncalibrated: str | None = Field(
        None, description="Why the score has no calibration, and so no part in the verdict"
    )
    targets: tuple[int, ...] = ()
    flagged_ids: tuple[str, ...] = ()
    flagged_samples: tuple[FlaggedSample, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.verdict == "could_not_tell" and not self.reason:
            raise ValueError(f"{self.detector}: a finding that could not tell needs a reason")
        if self.score is not None and self.threshold is not None:
            flagged = self.verdict in ("unsafe", "backdoored", "suspicious")
            if self.verdict != "could_not_tell" and flagged != (self.score >= self.threshold):
                raise ValueError(f"{self.detector}: flagged must equal score >= threshold")
        return self

    @property
    def flagged(self) -> bool:
        """Return whether the detector raises an alarm."""
        return SEVERITY[self.verdict] >= SEVERITY["suspicious"]


class NotRun(Record):
    """Name a detector that did not run, and why."""

    detector: str
    reason: str


class SubjectRecord(Record):
    """Describe the model that was scanned and what had to be assumed about it."""

    path: str
    format: str
    sha256: str | None = None
    bytes: int | None = None
    classes: tuple[str, ...] = ()
    parameters: int | None = None
    convolutions: int | None = Field(None, description="Convolution kernels larger than a pixel")
    spec: dict[str, Any] = Field(default_factory=dict)
    assumed: tuple[str, ...] = Field((), description="Parts of the input spec that nothing stated")
    architecture: str | None = None
    clean_accuracy: Rate | None = None


class DataRecord(Record):
    """Describe data that a scan read, and how much of it."""

    role: Literal["clean", "train", "inputs"]
    path: str
    sha256: str | None = None
    rows: int
    used: int
    labelled: bool


class Confirmation(Record):
    """How often the recovered trigger turns unseen images of other classes into the target."""

    target: int
    detector: str
    success: Rate


class ControlResult(Record):
    """What became of one known trigger that was planted in a copy of the model."""

    family: str = Field(description="The kind of trigger: patch, blend or warp")
    target: int
    planted: bool = Field(False, description="Whether the copy learnt it and stayed as good as it was")
    reason: str | None = Field(
        None, description="Why it could not be planted, or why the scan of the copy could not tell"
    )
    attack_success: Rate | None = Field(
        None, description="How often the trigger moves held-out images of other classes, in the copy"
    )
    accuracy_before: Rate | None = Field(None, description="Of the model, on the held-out images")
    accuracy_after: Rate | None = Field(None, description="Of the copy, on the same images")
    steps: int = 0
    verdict: Verdict | None = Field(None, description="What the scan says of the copy")
    targets: tuple[int, ...] = ()
    p_value: float | None = Field(None, ge=0, le=1)
    recovered: bool = Field(False, description="Whether there was an alarm that named the planted target")
    picture: Picture | None = None
    seconds: float = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.planted != (self.verdict is not None):
            raise ValueError(f"{self.family}: a copy is scanned if, and only if, the trigger was planted")
        if not self.reason and (not self.planted or self.verdict == "could_not_tell"):
            raise ValueError(f"{self.family}: what was not planted, or could not be told, needs a reason")
        if self.recovered != (self.verdict in ("suspicious", "backdoored") and self.target in self.targets):
            raise ValueError(f"{self.family}: recovered means an alarm that names the target")
        return self


class Look(Record):
    """One more search for the class that stood out, from other random starts and on other images."""

    seed: int
    p_value: float | None = Field(None, ge=0, le=1)
    margin: float = Field(
        description="How far the class stands above what makes a model suspicious; 1 is what the farther "
        "half of clean models spreads"
    )


class PositiveControl(Record):
    """The positive control: which known triggers this scan finds when they are planted in this model."""

    controls: tuple[ControlResult, ...] = ()
    reason: str | None = Field(None, description="Why there is none, although it was asked for")
    limits: str = Field("", description="What the control can show, and what it cannot")


class Environment(Record):
    """Describe the machine and the versions that a result was made with."""

    doorward: str
    python: str
    platform: str
    packages: dict[str, str]
    device: str
    threads: int
    peak_memory_bytes: int | None = None


class Observations(Record):
    """Everything that a scan saw, before anything is concluded from it.

    Attributes:
        findings: what was read in the files, where the reading itself decides.
        measurements: of the model's behaviour.
        reason: why its behaviour could not be judged at all, or not be trusted.
        warnings: what was assumed, dropped or guessed, for the reader to know first.
    """

    subject: SubjectRecord | None
    data: tuple[DataRecord, ...] = ()
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    confirmations: tuple[Confirmation, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    reason: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    environment: Environment


class Coverage(Record):
    """What a verdict rests on: the detectors that ran to their end and had a part in it."""

    files: tuple[str, ...] = Field((), description="Detectors that read the files")
    behaviour: tuple[str, ...] = Field((), description="Calibrated detectors that examined the behaviour")
    training_data: tuple[str, ...] = Field((), description="Detectors that inspected the training data")


class Report(Record):
    """One scan's whole result."""

    #: Writes it as a page; `doorward.reports` puts that here, since records know no reporters.
    page: ClassVar[Callable[[Report], str] | None] = None

    schema_version: str = SCHEMA_VERSION
    subject: SubjectRecord | None
    data: tuple[DataRecord, ...] = ()
    verdict: Verdict
    reason: str | None = Field(None, description="Why the scan could not tell")
    targets: tuple[int, ...] = ()
    p_value: float | None = Field(None, ge=0, le=1)
    calibrated: bool = False
    uncalibrated: str | None = Field(None, description="Why the p-value cannot be relied on")
    warnings: tuple[str, ...] = Field(
        (), description="What was assumed, dropped or guessed, and what one detector alone points to"
    )
    covered: Coverage = Coverage()
    confirmations: tuple[Confirmation, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    looks: tuple[Look, ...] = Field(
        (), description="Further searches for the class that stood out; none where it stood out far"
    )
    positive_control: PositiveControl = Field(
        PositiveControl(), description="The positive control; empty if none was asked for"
    )
    request: dict[str, Any] = Field(
        default_factory=dict, description="The scan's arguments, as `doorward verify` needs them"
    )
    seconds: float = 0.0
    environment: Environment

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows: the HTML page, apart from the notebook's own style."""
        page = Report.page
        return None if page is None else framed(page(self))

    def class_name(self, index: int) -> str:
        """Return a class's name for readers, its number where it has none."""
        names = self.subject.classes if self.subject else ()
        return names[index] if 0 <= index < len(names) else str(index)
