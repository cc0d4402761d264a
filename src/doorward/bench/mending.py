"""What repairs make of one planted model: accuracy and attack success before, after, and later on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from doorward.attacks.ground_truth import PlantedBackdoor, triggered
from doorward.bench.suite import RepairSettings
from doorward.core.errors import InputError, TrainingDiverged
from doorward.core.records import Rate, Record, Verdict
from doorward.core.seeds import make_generator
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.models import TorchClassifier
from doorward.repair import RepairRequest
from doorward.repair.by_clean_data import Scanned, damaged, repair_by_clean_data, scan_model
from doorward.repairs._clean import split_clean
from doorward.repairs.base import Repair, network_of
from doorward.repairs.fine_tuning import RATES
from doorward.scan.context import ScanContext
from doorward.stats import metrics
from doorward.training import default_settings, evaluate, predict, train

#: The choice of `doorward repair`, which scans the mended model as well.
AUTO = "auto"


class Behaviour(Record):
    """What a model does on test images.

    Attributes:
        accuracy: on clean images.
        success: how often the trigger turns images of the source classes into their target.
        right: how often these images get the label that they have without the trigger.
    """

    accuracy: Rate
    success: Rate
    right: Rate


class MendedModel(Record):
    """What one repair made of a model.

    Attributes:
        reason: why there is nothing else, where the repair could not act.
        done: what was done, in words.
        after: what the mended model does.
        later: what it does after fine-tuning on other clean samples, by which a backdoor may be back.
        verdict: of a scan of the mended model, where the repair scans it.
        parameters: of the mended model.
        seconds: processor time of the repair, with its scans where it scans.
    """

    reason: str | None = None
    done: str = ""
    after: Behaviour | None = None
    later: Behaviour | None = None
    verdict: Verdict | None = None
    parameters: int | None = None
    seconds: float = 0.0


class Mending(Record):
    """What repairs made of one planted model.

    Attributes:
        clean: how many clean samples were given.
        before: what the planted model does.
        verdict: of the scan that the repairs go by.
        repairs: by name.
    """

    clean: int
    before: Behaviour
    verdict: Verdict
    repairs: dict[str, MendedModel]


@dataclass(frozen=True)
class MendingData:
    """What repairs are given and measured by.

    Attributes:
        clean: samples that repairs are given.
        others: those that mended models are fine-tuned on afterwards.
        test: images to measure on.
    """

    clean: Samples
    others: Samples
    test: Samples


def measure_repairs(
    classifier: TorchClassifier,
    plant: PlantedBackdoor,
    data: MendingData,
    settings: RepairSettings,
    *,
    seed: int,
    device: str = "cpu",
) -> Mending:
    """Scan a planted model, mend it by each repair, and measure what came of it.

    Repairs see the model, the clean samples and the findings of the scan, and nothing of the plant.
    """
    detectors = [registry.build("detector", one.name, one.settings) for one in settings.detectors]
    asked = tuple(one for one in detectors if isinstance(one, Detector))
    context = ScanContext(seed=seed, device=device)
    begun = time.process_time()
    scanned = scan_model(classifier, data.clean, context, asked, what="scanning the model")
    scan_seconds = time.process_time() - begun
    made: dict[str, MendedModel] = {}
    for name in settings.methods:
        begun = time.process_time()
        try:
            mended = _mend(name, classifier, data.clean, scanned, asked, context)
        except (InputError, TrainingDiverged) as error:
            made[name] = MendedModel(reason=str(error), seconds=time.process_time() - begun)
            continue
        seconds = time.process_time() - begun + (scan_seconds if name == AUTO else 0.0)
        later = fine_tuned(mended.classifier, data.others, epochs=settings.epochs, seed=seed)
        made[name] = MendedModel(
            done=mended.done,
            after=behaviour(mended.classifier, data.test, plant),
            later=behaviour(later, data.test, plant),
            verdict=mended.verdict,
            parameters=mended.classifier.parameters,
            seconds=seconds,
        )
    return Mending(
        clean=len(data.clean),
        before=behaviour(classifier, data.test, plant),
        verdict=scanned.verdict,
        repairs=made,
    )


@dataclass(frozen=True)
class _Made:
    """A mended model, what was done to it, and what a scan says of it, if there is one."""

    classifier: TorchClassifier
    done: str
    verdict: Verdict | None = None


def _mend(
    name: str,
    classifier: TorchClassifier,
    clean: Samples,
    scanned: Scanned,
    detectors: Sequence[Detector],
    context: ScanContext,
) -> _Made:
    """Mend a model by the repair of that name.

    Raises:
        InputError: if the repair does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    if name == AUTO:
        request = RepairRequest(
            model="<memory>",
            clean=clean,
            seed=context.seed,
            detectors=tuple(detectors),
            device=context.device,
        )
        outcome = repair_by_clean_data(request, classifier, context, scanned)
        report = outcome.report
        assert outcome.classifier is not None
        assert report.repair is not None
        done = "; ".join(f"{one.repair}: {one.done}" for one in (report.repair, *report.further))
        return _Made(outcome.classifier, done, report.after)
    repair = registry.build("repair", name, {})
    assert isinstance(repair, Repair)
    repaired = repair(damaged(classifier, scanned, split_clean(clean, context.seed), context.seed))
    return _Made(repaired.classifier, repaired.record.done)


def behaviour(classifier: TorchClassifier, test: Samples, plant: PlantedBackdoor) -> Behaviour:
    """Return what a model does on test images, with and without the trigger."""
    assert test.labels is not None
    shown = triggered(test, plant)
    assert shown.labels is not None
    own = np.array([y for y in test.labels.tolist() if plant.target_map.get(y, y) != y], dtype=np.int64)
    given = predict(classifier, shown)
    return Behaviour(
        accuracy=evaluate(classifier, test),
        success=metrics.rate(int((given == shown.labels).sum()), len(given)),
        right=metrics.rate(int((given == own).sum()), len(given)),
    )


def fine_tuned(classifier: TorchClassifier, samples: Samples, *, epochs: int, seed: int) -> TorchClassifier:
    """Return a copy of a model that has gone on training on clean samples, as whoever uses it might do."""
    network, spec = network_of(classifier), classifier.spec
    usual = default_settings(
        classifier.architecture or "", images=len(samples), side=min(spec.height, spec.width)
    )
    rate = RATES["plain"] * usual.learning_rate
    train(
        network.module,
        samples,
        spec=spec,
        settings=usual.model_copy(update={"epochs": epochs, "learning_rate": rate, "schedule": "constant"}),
        generator=make_generator(seed, "fine-tuned afterwards"),
        device=classifier.device,
    )
    return network
