"""One trial at a time: find its data, name its contents, have its model made or cached, judge it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from doorward import reference, registry
from doorward.attacks.base import DataAttack
from doorward.attacks.model.base import ModelAttack
from doorward.bench import synthetic
from doorward.bench.cache import ModelCache
from doorward.bench.planting import Planting
from doorward.bench.revisions import TRAINERS, judging_code
from doorward.bench.suite import Data, Judging, Method, Trial, content_key, work_of
from doorward.data import InMemorySamples, Samples, open_samples
from doorward.detectors.base import Detector
from doorward.errors import InputError
from doorward.examination import examine
from doorward.methods import Deadline, derive_seed
from doorward.models import Classifier, TorchClassifier, open_classifier, sequences
from doorward.models.saving import save_classifier
from doorward.plants import attack_success, read_plant, triggered, write_plant
from doorward.records import Rate, Record, Report
from doorward.training import (
    AdversarialSettings,
    TrainingSettings,
    adversarial,
    adversarial_batches,
    default_settings,
    evaluate,
    example_shape,
    robust_accuracy,
    train_classifier,
)
from doorward.verdict import conclude

#: Test images that clean accuracy, and held-out triggered ones that attack success, are measured on.
ACCURACY_IMAGES, SUCCESS_IMAGES = 2000, 500
#: Test images that the robust accuracy of adversarially trained models is measured on.
ROBUST_IMAGES = 200
#: Test images of generated data, and training images where none are asked for.
GENERATED = 2000
PLANT = "plant.json"
#: Grows when what is measured of planting changes.
PLANTING = 1


class Truth(Record):
    """Hold what is known of a trial's model: its accuracy and, where one is planted, its backdoor.

    Attributes:
        robust_accuracy: of an adversarially trained model, under an attack stronger than in training.
    """

    classes: int
    clean_accuracy: Rate
    robust_accuracy: Rate | None = None
    attack: str | None = None
    targets: tuple[int, ...] = ()
    attack_success: Rate | None = None


class Outcome(Record):
    """Hold what one trial gave.

    Attributes:
        report: of the scan, if there is one.
        planting: what planting did, where that is measured instead.
        trained: seconds that the training took, now or when the model was cached.
        seconds: of the scan, or of measuring.
        peak_memory: bytes of the process at most during the scan; None where the system does not tell.
    """

    truth: Truth
    report: Report | None = None
    planting: Planting | None = None
    cached: bool
    trained: float
    seconds: float
    peak_memory: int | None


class Contents(Record):
    """Hold what keys and settings need of a trial's data.

    Attributes:
        train, test: hashes of the splits' files, or what generates them.
        images: for training.
        shape: of one image: channels, height, width; all 1 of texts and recordings.
    """

    train: str
    test: str
    images: int
    shape: tuple[int, int, int]
    classes: int


class Sources:
    """Open the data sets that suites name, and keep those at hand that were used last.

    Args:
        root: the folder of data sets; those that lie there are missing if None.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._opened = lru_cache(32)(self._open)
        self.part = lru_cache(8)(self._part)

    def contents(self, data: Data) -> Contents:
        """Name the content of training and test images, without making any.

        Raises:
            InputError: if they are not there, or have not the classes asked for.
        """
        if data.world is not None:
            made = f"{data.name}/{synthetic.REVISION}"
            channels = synthetic.FAMILIES[data.name.split("-")[0]].channels
            shape = (channels, data.world.size, data.world.size)
            images, classes = data.rows or GENERATED, data.world.classes
            return Contents(train=made, test=made, images=images, shape=shape, classes=classes)
        train, test = self.part(data, "train"), self.part(data, "test")
        return Contents(
            train=str(train.provenance.sha256),
            test=str(test.provenance.sha256),
            images=min(data.rows or len(train), len(train)),
            shape=example_shape(train),
            classes=len(train.classes),
        )

    def given(self, method: Method) -> dict[str, Any]:
        """Return a method's settings, each that names a data set with the folder that it is in.

        Raises:
            InputError: if one is not there.
        """
        return method.settings | {name: str(self._folder(data)) for name, data in _data_of(method).items()}

    def _folder(self, name: str) -> Path:
        """Return the folder of a data set.

        Raises:
            InputError: if it is not there.
        """
        if self.root is None:
            raise InputError(f"data set {name}: no folder of data sets is given; use --data or DOORWARD_DATA")
        if not (self.root / name).exists():
            raise InputError(f"data set {name} is not in {self.root}")
        return self.root / name

    def _part(self, data: Data, split: Literal["train", "test"]) -> Samples:
        """Return one split, restricted to the classes asked for, which are renumbered; not to the rows.

        Raises:
            InputError: if the data set is not there, has no labels, or not those classes.
        """
        if data.world is not None:
            rows = data.rows or GENERATED if split == "train" else GENERATED
            return synthetic.open_synthetic(data.name, split=split, rows=rows, **data.world.model_dump())
        samples = self._opened(data.name, split)
        if samples.labels is None:
            raise InputError(f"data set {data.name} has no labels, and the bench needs them")
        if data.classes is None:
            return samples
        if not set(data.classes) <= set(range(len(samples.classes))):
            raise InputError(f"data set {data.name} has {len(samples.classes)} classes, not {data.classes}")
        numbers = np.full(len(samples.classes), -1, dtype=np.int64)
        numbers[list(data.classes)] = np.arange(len(data.classes))
        kept = samples.select(np.flatnonzero(np.isin(samples.labels, data.classes)))
        return kept.relabel(numbers, [samples.classes[c] for c in data.classes])

    def _open(self, name: str, split: str) -> Samples:
        """Return one split of a whole data set.

        Raises:
            InputError: if it is not there.
        """
        if name.startswith("reference:"):
            return open_samples(reference.FOLDER / name.removeprefix("reference:"), split=split)
        return open_samples(self._folder(name), split=split)


@dataclass(frozen=True)
class Planned:
    """Hold a trial whose contents are known.

    Attributes:
        key: of the result: suite, scale and name, model, and everything that judges it.
        model_key: of the cached model.
        work: of model and judging alone, so that trials of several suites share it.
        resolved: what the keys are made of; all settings with defaults, all hashes.
        contents: of the data, unless they are missing.
        missing: why the trial cannot be run here, if so.
        twin: the clean model that a planted one is made from or measured beside, where it is.
        seen: by detector, an earlier scan that holds what this detector sees; it is not asked again.
    """

    trial: Trial
    key: str
    model_key: str
    work: str
    resolved: dict[str, Any]
    contents: Contents | None = None
    missing: str | None = None
    twin: Planned | None = None
    seen: Mapping[str, Outcome] = field(default_factory=dict)


def plan(trial: Trial, sources: Sources) -> Planned:
    """Find a trial's data and name its contents; where data are missing, that is what is planned.

    Raises:
        InputError: if a method or a setting is unknown.
    """
    judging: dict[str, Any] = {"planting": PLANTING}
    if trial.judging.detectors is not None:
        detectors = [
            {
                "name": d.method(),
                "settings": d.settings(),
                "revision": d.revision,
                "code": judging_code(d.method()),
            }
            for d in _detectors(trial.judging)
        ]
        judging = {
            **trial.judging.model_dump(mode="json", exclude={"detectors"}),
            "detectors": detectors,
        }
    attack = twin = None
    if trial.attack is not None:
        method = registry.build("attack", trial.attack.name, trial.attack.settings)
        attack = {"name": trial.attack.name, "settings": method.settings(), "revision": method.revision}
        if isinstance(method, ModelAttack) or trial.judging.detectors is None:
            twin = plan(trial.model_copy(update={"attack": None}), sources)
    try:
        contents = sources.contents(trial.data)
        if attack is not None and trial.attack is not None and (named := _data_of(trial.attack)):
            attack["data"] = {name: sources.contents(Data(name=data)).test for name, data in named.items()}
    except InputError as error:
        key = content_key([trial.suite, trial.scale, trial.name, trial.key])
        return Planned(trial, key, trial.key, key, {}, missing=str(error))
    defaults = default_settings(trial.architecture, images=contents.images, side=min(contents.shape[1:]))
    training = TrainingSettings.model_validate(defaults.model_dump() | trial.training)
    model = {
        "data": trial.data.model_dump(mode="json", exclude={"name"})
        | contents.model_dump(mode="json", include={"train", "test"}),
        "attack": attack,
        "architecture": trial.architecture,
        "training": training.model_dump(mode="json"),
        "seed": trial.seed,
        "revisions": {name: import_module(f"doorward.{name}").REVISION for name in TRAINERS},
        "measured": [ACCURACY_IMAGES, SUCCESS_IMAGES],
    }
    if trial.robust is not None:  # no entry else, so that the keys of other models are what they were
        model["adversarial"] = {
            "settings": AdversarialSettings.model_validate(trial.robust).model_dump(mode="json"),
            "revision": adversarial.REVISION,
            "measured": ROBUST_IMAGES,
        }
    if trial.architecture in sequences.NAMES:
        model["sequences"] = sequences.REVISION
    model_key = content_key(model)
    resolved = {"model": model, "judging": judging}
    key = content_key([trial.suite, trial.scale, trial.name, model_key, judging])
    return Planned(trial, key, model_key, work_of(resolved, key), resolved, contents, twin=twin)


def _data_of(method: Method) -> dict[str, str]:
    """Return the settings that name a data set, with its name."""
    return {
        name: value.removeprefix("data:")
        for name, value in method.settings.items()
        if isinstance(value, str) and value.startswith("data:")
    }


def _detectors(judging: Judging) -> list[Detector]:
    named = judging.detectors or ()
    chosen = [registry.build("detector", d.name, d.settings) for d in named] or [
        registry.build("detector", name, {}) for name in registry.modules("detector")
    ]
    found = [d for d in chosen if isinstance(d, Detector) and "artifact" not in d.needs]
    return sorted(found, key=lambda d: (d.order, d.method()))


class Workbench:
    """Run planned trials, with what they share kept at hand.

    Args:
        device: torch device that trains and scans.
    """

    def __init__(self, cache: ModelCache, sources: Sources, device: str = "cpu") -> None:
        self.cache, self.sources, self.device = cache, sources, device

    def make(self, planned: Planned) -> bool:
        """Have the trial's model in the cache, and its twin if it has one; tell whether both were there.

        Raises:
            InputError: if data, attack and architecture do not fit, or the cache cannot be written to.
            TrainingDiverged: if the loss is no longer finite.
        """
        cached = planned.twin is None or self.make(planned.twin)
        if self.cache.get(planned.model_key) is not None:
            return cached
        self.cache.put(planned.model_key, lambda folder: self._train(planned, folder))
        return False

    def judge(self, planned: Planned, *, cached: bool) -> Outcome:
        """Scan the trial's model, which is in the cache, with images of the test split.

        Where no scan is wanted, what planting did is measured on all of them.
        """
        trial = planned.trial
        if trial.judging.detectors is None:
            return self._measure(planned, cached=cached)
        meta = self.cache.meta(planned.model_key)
        judging = trial.judging
        classifier = self._cached(planned)
        test = self.sources.part(trial.data, "test")
        given = test.draw(judging.images, np.random.default_rng(derive_seed(judging.draw, "given images")))
        given = _decoded(given)
        _forget_peak_memory()
        clock = Deadline()
        report = examine(
            classifier,
            given,
            detectors=[d for d in _detectors(judging) if d.method() not in planned.seen],
            seed=judging.seed,
            device=self.device,
            deadline=clock,
            images=judging.images,
        )
        outcome = Outcome(
            truth=Truth.model_validate(meta["truth"]),
            report=_light(report),
            cached=cached,
            trained=meta["training"]["seconds"],
            seconds=clock.spent(),
            peak_memory=_peak_memory(),
        )
        return _joined(outcome, planned)

    def _measure(self, planned: Planned, *, cached: bool) -> Outcome:
        """Measure what planting did, on the whole test split."""
        started = time.monotonic()
        meta = self.cache.meta(planned.model_key)
        truth = Truth.model_validate(meta["truth"])
        classifier = self._cached(planned)
        test = self.sources.part(planned.trial.data, "test")
        accuracy, planting = evaluate(classifier, test), None
        if planned.twin is not None:
            plant = read_plant(self.cache.place(planned.model_key) / PLANT)
            planting = Planting(
                accuracy=accuracy,
                twin=evaluate(self._honest(planned), test),
                success=attack_success(classifier, test, plant) if plant.trigger else None,
                poison_rate=plant.poison_rate,
                robust_accuracy=truth.robust_accuracy,
                planted=meta.get("planted"),
                trained=meta["training"]["seconds"],
            )
            truth = truth.model_copy(update={"attack_success": planting.success})
        return Outcome(
            truth=truth.model_copy(update={"clean_accuracy": accuracy}),
            planting=planting,
            cached=cached,
            trained=meta["training"]["seconds"],
            seconds=time.monotonic() - started,
            peak_memory=None,
        )

    def _cached(self, planned: Planned) -> Classifier:
        """Open the trial's model, which is in the cache."""
        file = self.cache.meta(planned.model_key).get("file", "")
        return open_classifier(str(self.cache.place(planned.model_key) / file), device=self.device)

    def _honest(self, planned: Planned) -> Classifier:
        """Return what a planted model is measured beside."""
        trial, attack = planned.trial, self._attack(planned.trial)
        assert planned.twin is not None
        twin = self._cached(planned.twin)
        if not isinstance(attack, ModelAttack):
            return twin
        assert isinstance(twin, TorchClassifier)
        return attack.honest(twin, self._training(trial), seed=trial.seed)

    def _attack(self, trial: Trial) -> DataAttack | ModelAttack | None:
        if trial.attack is None:
            return None
        attack = registry.build("attack", trial.attack.name, self.sources.given(trial.attack))
        assert isinstance(attack, DataAttack | ModelAttack)
        return attack

    def _training(self, trial: Trial) -> Samples:
        """Return the training images that a trial asks for, decoded."""
        train = self.sources.part(trial.data, "train")
        if trial.data.rows is not None:
            train = train.draw(trial.data.rows, np.random.default_rng(derive_seed(trial.seed, "rows")))
        return _decoded(train)

    def _train(self, planned: Planned, folder: Path) -> dict[str, Any]:
        """Make the trial's model, write it, and return what there is to say of it."""
        trial = planned.trial
        train, test = self._training(trial), self.sources.part(trial.data, "test")
        attack, plant, planted = self._attack(trial), None, None
        against = None if trial.robust is None else AdversarialSettings.model_validate(trial.robust)
        started = time.process_time()  # a busy machine makes no attack slower
        if isinstance(attack, ModelAttack):
            assert planned.twin is not None
            implanted = attack(self._cached(planned.twin), train, seed=trial.seed)
            classifier, plant = implanted.classifier, implanted.plant
            planted = time.process_time() - started
            training = self.cache.meta(planned.twin.model_key)["training"]
        else:
            if attack is not None:
                poisoned = attack(train, seed=trial.seed)
                train, plant = poisoned.samples, poisoned.plant
                planted = time.process_time() - started
            trained = train_classifier(
                trial.architecture,
                train,
                seed=trial.seed,
                settings=TrainingSettings.model_validate(planned.resolved["model"]["training"]),
                device=self.device,
                on_batch=None if against is None else adversarial_batches(against),
            )
            classifier, training = trained.classifier, trained.record.model_dump(mode="json")
        rng = np.random.default_rng(derive_seed(trial.seed, "measured"))
        accuracy = evaluate(classifier, test.draw(ACCURACY_IMAGES, rng))
        truth = Truth(classes=len(test.classes), clean_accuracy=accuracy)
        if against is not None:
            held = robust_accuracy(
                classifier, test.draw(ROBUST_IMAGES, rng), settings=against.stronger(), seed=trial.seed
            )
            truth = truth.model_copy(update={"robust_accuracy": held})
        if plant is not None:
            success = None
            if plant.trigger is not None:
                success = evaluate(classifier, triggered(test, plant).draw(SUCCESS_IMAGES, rng))
            plant = plant.model_copy(update={"clean_accuracy": accuracy, "attack_success": success})
            truth = truth.model_copy(
                update={"attack": plant.attack, "targets": plant.targets, "attack_success": success}
            )
            write_plant(plant, folder / PLANT)
        saved = save_classifier(classifier, folder)
        return {
            "resolved": planned.resolved["model"],
            "truth": truth.model_dump(mode="json"),
            "training": training,
            "planted": planted,
            "file": "" if saved == folder else saved.name,
        }


def _joined(outcome: Outcome, planned: Planned) -> Outcome:
    """Add what earlier scans hold, as if all detectors had been asked now."""
    report, seen = outcome.report, planned.seen
    if report is None or not seen:
        return outcome
    earlier = {name: held.report for name, held in seen.items() if held.report is not None}
    findings = [
        *report.findings,
        *(f for name, r in earlier.items() for f in r.findings if f.detector == name),
    ]
    tried = [c for name, r in earlier.items() for c in r.confirmations if c.detector == name]
    order = [d.method() for d in _detectors(planned.trial.judging)]
    seconds = sum(f.seconds for f in findings if f.detector in seen)
    memory = [one.peak_memory for one in (outcome, *seen.values()) if one.peak_memory is not None]
    joined = report.model_copy(
        update={
            "findings": tuple(sorted(findings, key=lambda f: order.index(f.detector))),
            "confirmations": tuple(
                sorted((*report.confirmations, *tried), key=lambda c: order.index(c.detector))
            ),
            "seconds": report.seconds + seconds,
        }
    )
    return outcome.model_copy(
        update={
            "report": conclude(joined),
            "seconds": outcome.seconds + seconds,
            "peak_memory": max(memory, default=None),
        }
    )


def _decoded(samples: Samples) -> Samples:
    """Return the samples decoded once and for all."""
    return InMemorySamples(
        samples.raw(np.arange(len(samples))),
        samples.labels,
        classes=samples.classes,
        modality=samples.modality,
        path=samples.provenance.path,
    )


def _light(report: Report) -> Report:
    """Return a report without pictures and recovered triggers, which would fill the results store."""
    findings = tuple(
        finding.model_copy(
            update={"evidence": tuple(e for e in finding.evidence if e.type not in ("picture", "trigger"))}
        )
        for finding in report.findings
    )
    return report.model_copy(update={"findings": findings})


def _forget_peak_memory() -> None:
    """Start the system's record of this process's memory anew, where it can be (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_memory() -> int | None:
    """Return the largest resident size in bytes since the record was started anew (Linux), else None."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None
