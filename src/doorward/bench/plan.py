"""Which data, model and detectors a trial needs, and the keys they are cached by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from doorward import bundled
from doorward.attacks.model.base import ModelAttack
from doorward.bench import synthetic
from doorward.bench.fingerprints import detector_fingerprint, fingerprint, repair_code, units_of
from doorward.bench.outcome import Outcome
from doorward.bench.suite import (
    Data,
    MethodChoice,
    RepairSettings,
    ScanSettings,
    Trial,
    content_key,
    work_of,
)
from doorward.core.errors import InputError
from doorward.core.records import Record
from doorward.data import Samples, open_samples
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.scan.calibration import calibrations, shipped
from doorward.training import (
    AdversarialSettings,
    TrainingSettings,
    default_settings,
    example_shape,
)

#: Test images that clean accuracy, and held-out triggered ones that attack success, are measured on.
ACCURACY_IMAGES, SUCCESS_IMAGES = 2000, 500
#: Test images that the robust accuracy of adversarially trained models is measured on.
ROBUST_IMAGES = 200
#: Test images of generated data, and training images where none are asked for.
GENERATED = 2000
#: How the name of a data set begins whose classes are joined.
MERGED = "merged:"
#: Grows when what is measured of planting changes.
PLANTING = 1


class Contents(Record):
    """What keys and settings need of a trial's data.

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

        A name `merged:N:NAME` is the data set with its classes joined into N, so that each has several modes.

        Raises:
            InputError: if they are not there, or have not the classes asked for.
        """
        if data.world is not None:
            made, joined = f"{data.name}/{synthetic.EDITION}", unmerged(data.name)
            channels = synthetic.FAMILIES[joined.name.split("-")[0]].channels
            shape = (channels, data.world.size, data.world.size)
            images, classes = data.rows or GENERATED, joined.classes or data.world.classes
            return Contents(train=made, test=made, images=images, shape=shape, classes=classes)
        train, test = self.part(data, "train"), self.part(data, "test")
        into = unmerged(data.name).classes  # its files are the same, what is learnt from them is not
        how = "" if into is None else f", joined into {into} classes"
        return Contents(
            train=f"{train.provenance.sha256}{how}",
            test=f"{test.provenance.sha256}{how}",
            images=min(data.rows or len(train), len(train)),
            shape=example_shape(train),
            classes=len(train.classes),
        )

    def given(self, method: MethodChoice) -> dict[str, Any]:
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
        joined = unmerged(data.name)
        if joined.classes is not None:
            whole = self.part(data.model_copy(update={"name": joined.name}), split)
            return merged(whole, joined.classes)
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
            return open_samples(bundled.FOLDER / name.removeprefix("reference:"), split=split)
        return open_samples(self._folder(name), split=split)


class Joined(NamedTuple):
    """The data set that a name is about, and how many classes its own are joined into; None for none."""

    name: str
    classes: int | None


def unmerged(name: str) -> Joined:
    """Read a name such as `merged:5:mnist`.

    >>> unmerged("merged:5:mnist"), unmerged("mnist")
    (Joined(name='mnist', classes=5), Joined(name='mnist', classes=None))
    """
    if not name.startswith(MERGED):
        return Joined(name, None)
    _, classes, inner = name.split(":", 2)
    return Joined(inner, int(classes))


def merged(samples: Samples, classes: int) -> Samples:
    """Return samples whose classes are joined into fewer: i becomes i modulo `classes`."""
    numbers = np.arange(len(samples.classes)) % classes
    names = [
        "+".join(samples.classes[i] for i in np.flatnonzero(numbers == c).tolist()) for c in range(classes)
    ]
    return samples.relabel(numbers, names)


@dataclass(frozen=True)
class Planned:
    """A trial whose contents are known.

    Attributes:
        key: of the result: suite, scale and name, model, and everything that judges it.
        model_key: of the cached model.
        work: of model and judging alone, so that trials of several suites share it.
        resolved: what the keys are made of; all settings with defaults, all hashes.
        contents: of the data, unless they are missing.
        missing: why the trial cannot be run here, if so.
        twin: the clean model that a planted one is made from or measured next to, where it is.
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
    scan_settings: dict[str, Any] = {"planting": PLANTING}
    if trial.scan_settings.detectors is not None:
        detectors = [
            {
                "name": d.method(),
                "settings": d.settings(),
                "code": detector_fingerprint(type(d).__module__),
            }
            for d in detectors_of(trial.scan_settings)
        ]
        scan_settings = {
            **trial.scan_settings.model_dump(mode="json", exclude={"detectors"}),
            "detectors": detectors,
        }
    if trial.repair_settings is not None:
        scan_settings = {
            "repairs": trial.repair_settings.model_dump(mode="json"),
            "code": repair_code(),
            "calibration": _calibration_of(trial.repair_settings),
        }
    attack = twin = None
    if trial.attack is not None:
        method = registry.build("attack", trial.attack.name, trial.attack.settings)
        attack = {"name": trial.attack.name, "settings": method.settings()}
        compared = trial.scan_settings.detectors is None and trial.repair_settings is None
        if isinstance(method, ModelAttack) or compared:
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
        "code": {name: fingerprint(name) for name in sorted(units_of([trial]))},
        "measured": [ACCURACY_IMAGES, SUCCESS_IMAGES],
    }
    if trial.robust is not None:  # no entry else, so that the keys of other models are what they were
        model["adversarial"] = {
            "settings": AdversarialSettings.model_validate(trial.robust).model_dump(mode="json"),
            "measured": ROBUST_IMAGES,
        }
    model_key = content_key(model)
    resolved = {"model": model, "judging": scan_settings}
    key = content_key([trial.suite, trial.scale, trial.name, model_key, scan_settings])
    return Planned(trial, key, model_key, work_of(resolved, key), resolved, contents, twin=twin)


def _calibration_of(repair_settings: RepairSettings) -> str:
    """Return the sha256 of the calibration that scans before and after repairs are judged by."""
    named = [one.name for one in repair_settings.detectors]
    return content_key((calibrations(named) if named else shipped()).model_dump(mode="json"))


def _data_of(method: MethodChoice) -> dict[str, str]:
    """Return the settings that name a data set, with its name."""
    return {
        name: value.removeprefix("data:")
        for name, value in method.settings.items()
        if isinstance(value, str) and value.startswith("data:")
    }


def detectors_of(scan_settings: ScanSettings) -> list[Detector]:
    """Return the detectors of behaviour that judge a trial, in the order of a scan.

    Where none is named, all of Doorward's own: results must not hang on what else is installed.
    """
    named = scan_settings.detectors or ()
    chosen = [registry.build("detector", d.name, d.settings) for d in named] or [
        registry.build("detector", name, {}) for name in registry.own_modules("detector")
    ]
    found = [d for d in chosen if isinstance(d, Detector) and not d.needs & {"artifact", "inputs"}]
    if not named:  # training data and graphs where a suite says so; there are clean images
        found = [d for d in found if "train" not in d.needs and d.level != "artifact"]
        found = [d for d in found if "clean" not in d.stands_in_for]
    return sorted(found, key=lambda d: (d.order, d.method()))
