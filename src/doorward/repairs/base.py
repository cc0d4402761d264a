"""The shell that every repair shares."""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import nn

from doorward.core.errors import InputError
from doorward.core.records import Evidence, Finding, FlaggedSample, Kind, Need, Record, RecoveredTrigger
from doorward.data import Samples
from doorward.methods.base import Method
from doorward.models import Classifier, TorchClassifier
from doorward.training import TrainingProgress
from doorward.triggers.base import Trigger


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What is to be mended, and with what; a repair takes findings and does not detect.

    Attributes:
        classifier: the model.
        findings: of a scan; those that raise an alarm say what is wrong.
        train: the training set, with the model's class numbers; some repairs need it.
        clean: labelled samples that are trusted; some repairs need them.
        validation: other such samples, by which a repair decides where to stop; the clean ones if None.
        keep_shapes: whether layers stay as large as they are, since the file's format needs that.
        seed: of everything random.
        progress: called after every step of a training.
    """

    classifier: TorchClassifier
    findings: tuple[Finding, ...]
    train: Samples | None = None
    clean: Samples | None = None
    validation: Samples | None = None
    keep_shapes: bool = False
    seed: int = 0
    progress: Callable[[TrainingProgress], None] | None = field(default=None, compare=False)

    @property
    def offers(self) -> frozenset[Need]:
        """Return what repairs can count on."""
        offered: set[Need] = set(self.classifier.capabilities)
        offered |= {"train"} if self.train is not None else set()
        if self.clean is not None:
            offered |= {"clean"} if self.clean.labels is None else {"clean", "clean_labels"}
        return frozenset(offered)

    @property
    def flagged(self) -> dict[str, FlaggedSample]:
        """Return the training samples that are flagged, by id."""
        return {one.id: one for f in self.findings if f.flagged for one in f.flagged_samples}

    @property
    def targets(self) -> tuple[int, ...]:
        """Return the classes that alarms about a backdoor name, in their order."""
        alarms = [f for f in self.findings if f.flagged and f.kind == "backdoor"]
        return tuple(sorted({target for finding in alarms for target in finding.targets}))

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """Return the triggers that were recovered for the classes that alarms name."""
        found = [finding for finding in self.findings if finding.kind == "backdoor"]
        named = set(self.targets)
        return tuple(
            Trigger.from_json(one.trigger)
            for finding in found
            for one in finding.evidence
            if isinstance(one, RecoveredTrigger) and one.target in named
        )


@dataclass(frozen=True)
class Mended:
    """What a repair made.

    Attributes:
        classifier: the mended model, which shares nothing with the one given.
        train: the training set as it is now, where the repair changes it.
        done: what was done, in one sentence.
        evidence: what the repair went by, for the record.
    """

    classifier: TorchClassifier
    train: Samples | None
    done: str
    evidence: tuple[Evidence, ...] = ()


class RepairRecord(Record):
    """What a repair did, as it is written next to the mended model."""

    repair: str
    settings: dict[str, object]
    seed: int
    done: str
    evidence: tuple[Evidence, ...] = ()
    seconds: float


@dataclass(frozen=True)
class Repaired:
    """A mended model, the data that go with it, and the record of both."""

    classifier: TorchClassifier
    train: Samples | None
    record: RepairRecord


class Repair(Method):
    """Mend a model by what a scan has found. Subclasses write `mend` alone.

    Attributes:
        needs: what the repair cannot do without.
        mends: kinds of findings that it acts on.
        needs_findings: whether it has nothing to do where nothing of these kinds was found.
        automatic: whether it may be chosen without being named.
        order: place among the repairs that fit, the best first.
    """

    needs: ClassVar[frozenset[Need]]
    mends: ClassVar[frozenset[Kind]]
    needs_findings: ClassVar[bool] = True
    automatic: ClassVar[bool] = True
    order: ClassVar[int] = 50

    @abstractmethod
    def mend(self, damage: Damage) -> Mended:
        """Return a mended copy of the model.

        Raises:
            InputError: if model, findings and data do not fit the repair.
            TrainingDiverged: if the loss is no longer finite.
        """

    @classmethod
    def unfit(cls, damage: Damage) -> str | None:
        """Return why the repair cannot act on this damage, None if it can."""
        missing = sorted(cls.needs - damage.offers)
        if missing:
            return f"it needs {', '.join(missing)}"
        found = any(finding.flagged and finding.kind in cls.mends for finding in damage.findings)
        if cls.needs_findings and not found:
            return f"nothing of the kind that it mends was found ({', '.join(sorted(cls.mends))})"
        return None

    @final
    def __call__(self, damage: Damage) -> Repaired:
        """Mend a copy of a model; the one given stays as it is.

        Raises:
            InputError: if model, findings and data do not fit the repair.
            TrainingDiverged: if the loss is no longer finite.
        """
        why = self.unfit(damage)
        if why is not None:
            raise InputError(f"{self.method()} cannot mend this: {why}")
        started = time.monotonic()
        mended = self.mend(damage)
        record = RepairRecord(
            repair=self.method(),
            settings=self.settings(),
            seed=damage.seed,
            done=mended.done,
            evidence=mended.evidence,
            seconds=time.monotonic() - started,
        )
        return Repaired(mended.classifier, mended.train, record)


def network_of(classifier: Classifier) -> TorchClassifier:
    """Return a copy of a classifier whose network can be trained on.

    Raises:
        InputError: if the network is out of reach or has no weights to train.
    """
    if not isinstance(classifier, TorchClassifier):
        why = classifier.limitation or f"a {classifier.format} model is run by another library"
        raise InputError(f"a repair changes the network itself, which is out of reach: {why}")
    try:
        module = copy.deepcopy(classifier.module)
    except Exception as error:  # a module of the user's own may hold anything
        raise InputError(f"the model cannot be copied, and so not mended: {error}") from error
    weights = [p for p in module.parameters() if p.is_floating_point() and not p.is_inference()]
    if not weights:
        raise InputError("the model has no weights that can be trained; give it in a format that has them")
    for p in weights:  # networks from ONNX files come with frozen ones
        p.requires_grad_(True)
    return like(classifier, module)


def like(classifier: TorchClassifier, module: nn.Module) -> TorchClassifier:
    """Return a classifier of another network that takes and gives what this one's does."""
    return TorchClassifier(
        module,
        classifier.spec,
        classifier.classes,
        format=classifier.format,
        architecture=classifier.architecture,
        batch=classifier.batch,
    )


def positions(samples: Samples, ids: Sequence[str]) -> list[int]:
    """Return the rows of some ids, in their order."""
    row = {value: i for i, value in enumerate(samples.ids)}
    return [row[one] for one in ids]
