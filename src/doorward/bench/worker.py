"""One trial at a time: find its data, name its contents, have its model made or cached, judge it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from doorward.attacks.data.base import DataAttack
from doorward.attacks.ground_truth import attack_success, read_plant, triggered, write_plant
from doorward.attacks.model.base import ModelAttack
from doorward.bench.cache import ModelCache
from doorward.bench.inspection import Inspection, compared, raw_baseline
from doorward.bench.mending import MendingData, measure_repairs
from doorward.bench.outcome import Outcome, Truth, without_pictures
from doorward.bench.plan import ACCURACY_IMAGES, ROBUST_IMAGES, SUCCESS_IMAGES, Planned, Sources, detectors_of
from doorward.bench.planting import Planting
from doorward.bench.suite import RepairSettings, Trial
from doorward.core.seeds import derive_seed
from doorward.data import InMemorySamples, Samples
from doorward.methods import registry
from doorward.models import Classifier, TorchClassifier, open_classifier
from doorward.models.formats.saving import save_classifier
from doorward.scan.behaviour import observe
from doorward.scan.context import ScanContext
from doorward.scan.training_data import looks_at_training_data, observe_training_data
from doorward.training import (
    AdversarialSettings,
    TrainingSettings,
    adversarial_batches,
    evaluate,
    robust_accuracy,
    train_classifier,
)

PLANT = "plant.json"


class TrialRunner:
    """Run planned trials, with what they share kept at hand.

    Args:
        device: torch device that trains and scans.
    """

    def __init__(self, cache: ModelCache, sources: Sources, device: str = "cpu") -> None:
        self.cache, self.sources, self.device = cache, sources, device

    def make(self, planned: Planned) -> bool:
        """Have the trial's model and its counterpart, if any, in the cache; tell whether both were there.

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
        if trial.repair_settings is not None:
            return self._mend(planned, trial.repair_settings, cached=cached)
        if trial.scan_settings.detectors is None:
            return self._measure(planned, cached=cached)
        if any(looks_at_training_data(one) for one in detectors_of(trial.scan_settings)):
            return self._inspect(planned, cached=cached)
        meta = self.cache.meta(planned.model_key)
        scan_settings = trial.scan_settings
        classifier = self._cached(planned)
        given = self._given(trial)
        _forget_peak_memory()
        context = ScanContext(
            seed=scan_settings.seed, device=self.device, images=max(1, scan_settings.images)
        )
        asked = [d for d in detectors_of(scan_settings) if d.method() not in planned.seen]
        observed = observe(classifier, given, asked, context)
        outcome = Outcome(
            truth=Truth.model_validate(meta["truth"]),
            seen=without_pictures(observed.observations),
            cached=cached,
            trained=meta["training"]["seconds"],
            seconds=context.deadline.spent(),
            peak_memory=_peak_memory(),
        )
        return _with_earlier_scans(outcome, planned)

    def _given(self, trial: Trial) -> Samples | None:
        """Return the clean images that a scan is given; None if there are none."""
        count, draw = trial.scan_settings.images, trial.scan_settings.draw
        if not count:
            return None
        rng = np.random.default_rng(derive_seed(draw, "given images"))
        return _decoded(self.sources.part(trial.data, "test").draw(count, rng))

    def _inspect(self, planned: Planned, *, cached: bool) -> Outcome:
        """Look for poison in the set that the trial's model was trained on, and compare with the truth."""
        trial, meta = planned.trial, self.cache.meta(planned.model_key)
        classifier, attack = self._cached(planned), self._attack(trial)
        train, poisoned = self._training(trial), frozenset[str]()
        if attack is not None:
            assert isinstance(attack, DataAttack), "models themselves have no poisoned training set"
            made = attack(train, seed=trial.seed)
            train = _decoded(made.samples)
            # what carries no trigger, such as wrong labels, is no poison that a backdoor comes from
            ids = made.plant.poisoned_ids if made.plant.trigger is not None else ()
            poisoned = frozenset(ids)
        mask = np.array([one in poisoned for one in train.ids], dtype=np.bool_)
        _forget_peak_memory()
        context = ScanContext(seed=trial.scan_settings.seed, device=self.device)
        seen = observe_training_data(classifier, train, detectors_of(trial.scan_settings), context)
        seconds = context.deadline.spent()
        inspection = Inspection(
            samples=len(train),
            poisoned=int(mask.sum()),
            detectors={one.detector: compared(one, train, mask) for one in seen.measurements},
            raw=raw_baseline(train, mask, trial.seed) if len(poisoned) and train.modality == "image" else {},
        )
        return Outcome(
            truth=Truth.model_validate(meta["truth"]),
            seen=without_pictures(seen),
            inspection=inspection,
            cached=cached,
            trained=meta["training"]["seconds"],
            seconds=seconds,
            peak_memory=_peak_memory(),
        )

    def _mend(self, planned: Planned, settings: RepairSettings, *, cached: bool) -> Outcome:
        """Mend the trial's model by every repair, and measure what came of it."""
        trial, meta = planned.trial, self.cache.meta(planned.model_key)
        started, classifier, train = time.monotonic(), self._cached(planned), self._training(trial)
        assert isinstance(classifier, TorchClassifier), "models of the cache have networks"
        count = round(settings.share * len(train))

        def drawn(name: str) -> Samples:
            return train.draw(count, np.random.default_rng(derive_seed(trial.seed, name)))

        rng = np.random.default_rng(derive_seed(trial.seed, "measured"))
        data = MendingData(
            clean=drawn("given to repairs"),
            others=drawn("fine-tuned on afterwards"),
            test=_decoded(self.sources.part(trial.data, "test").draw(ACCURACY_IMAGES, rng)),
        )
        mending = measure_repairs(
            classifier,
            read_plant(self.cache.place(planned.model_key) / PLANT),
            data,
            settings,
            seed=trial.seed,
            device=self.device,
        )
        return Outcome(
            truth=Truth.model_validate(meta["truth"]),
            mending=mending,
            cached=cached,
            trained=meta["training"]["seconds"],
            seconds=time.monotonic() - started,
            peak_memory=None,
        )

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
                twin=evaluate(self._counterpart(planned), test),
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

    def _counterpart(self, planned: Planned) -> Classifier:
        """Return what a planted model is measured next to."""
        trial, attack = planned.trial, self._attack(planned.trial)
        assert planned.twin is not None
        twin = self._cached(planned.twin)
        if not isinstance(attack, ModelAttack):
            return twin
        assert isinstance(twin, TorchClassifier)
        return attack.counterpart(twin, self._training(trial), seed=trial.seed)

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


def _with_earlier_scans(outcome: Outcome, planned: Planned) -> Outcome:
    """Add what earlier scans hold, as if all detectors had been asked now."""
    seen = outcome.seen
    if seen is None or not planned.seen:
        return outcome
    earlier = {name: held.seen for name, held in planned.seen.items() if held.seen is not None}
    measurements = [
        *seen.measurements,
        *(m for name, held in earlier.items() for m in held.measurements if m.detector == name),
    ]
    tried = [c for name, held in earlier.items() for c in held.confirmations if c.detector == name]
    order = [d.method() for d in detectors_of(planned.trial.scan_settings)]
    seconds = sum(m.seconds for m in measurements if m.detector in planned.seen)
    memory = [one.peak_memory for one in (outcome, *planned.seen.values()) if one.peak_memory is not None]
    joined = seen.model_copy(
        update={
            "measurements": tuple(sorted(measurements, key=lambda m: order.index(m.detector))),
            "confirmations": tuple(
                sorted((*seen.confirmations, *tried), key=lambda c: order.index(c.detector))
            ),
            "seconds": seen.seconds + seconds,
        }
    )
    return outcome.model_copy(
        update={
            "seen": joined,
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


def _forget_peak_memory() -> None:
    """Start the system's record of this process's memory again, where it can be (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_memory() -> int | None:
    """Return the largest resident size in bytes since the record was started again (Linux), else None."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None
