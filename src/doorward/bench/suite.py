"""Suites: what is measured, declared as data, and expanded into trials. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from doorward.core.errors import InputError
from doorward.core.formatting import did_you_mean
from doorward.core.records import Record
from doorward.core.seeds import derive_seed

Scale = Literal["smoke", "cpu", "full", "own"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "full")
#: That of models which are there already, and of which there are as many as there are.
OWN: Scale = "own"

#: What a claim can be about; each is a rate, and `bench.summary` says how it is counted.
Measure = Literal[
    "exact_target",
    "flagged",
    "clean_wrong",
    "alarm_at_5",
    "alarm_at_1",
    "could_not_tell",
    "stable",
    "attack_success",
    "accuracy_kept",
    "alarm_on_clean",
    "samples_found",
    "samples_ranked",
    "classes_right",
    "success_repaired",
    "groups_repaired",
    "accuracy_repaired",
    "success_returned",
    "nothing_found_repaired",
]


#: Attack success below which an attack is taken not to have planted what it was to, unless a suite says so.
LEAST_SUCCESS = 0.9


class OneOf(Record):
    """Vary a setting over a list: shuffled, dealt out, shuffled again, so that all values come up alike."""

    values: tuple[Any, ...]

    def deal(self, count: int, rng: random.Random) -> list[Any]:
        """Return `count` values."""
        dealt: list[Any] = []
        while len(dealt) < count:
            dealt += rng.sample(self.values, len(self.values))
        return dealt[:count]


class Between(Record):
    """Vary a setting over a range: one draw from each of `count` equal parts, in shuffled order."""

    low: float
    high: float

    def deal(self, count: int, rng: random.Random) -> list[Any]:
        """Return `count` values, rounded to four digits."""
        width = (self.high - self.low) / count
        return [round(self.low + width * (i + rng.random()), 4) for i in rng.sample(range(count), count)]


class World(Record):
    """Which data set a family of generated ones shall give; the seed makes its classes."""

    classes: int = Field(10, ge=2)
    size: int = 28
    seed: int = 0


class Data(Record):
    """Name a data set and the part of it that a model is trained on.

    Attributes:
        name: a folder below the data root; `reference:NAME` comes with the package; with a world, a family of
            `bench.synthetic`.
        classes: these class numbers alone, renumbered from 0; all if None.
        rows: so many training images, drawn evenly over the classes; all if None.
        world: of generated data.
    """

    name: str
    classes: tuple[int, ...] | None = None
    rows: int | None = Field(None, ge=1)
    world: World | None = None


class MethodChoice(Record):
    """Name an attack or a detector and its settings; `data:NAME` there is a folder below the data root."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class ScanSettings(Record):
    """How a model is scanned.

    Attributes:
        detectors: these alone; all that look at behaviour if empty. None for no scan at all: what planting
            did is measured instead, on the whole test split and next to its clean counterpart.
        images: clean images of the test split that are given; none are if 0.
        seed: the scan's.
        draw: which draw of the images is given.
    """

    detectors: tuple[MethodChoice, ...] | None = ()
    images: int = Field(100, ge=0)
    seed: int = 0
    draw: int = 0


class RepairSettings(Record):
    """How models are repaired.

    Attributes:
        methods: names of repairs; `auto` is the choice of `doorward repair`.
        share: clean samples that are given, per training sample.
        epochs: of fine-tuning on other clean samples afterwards, after which a backdoor may be back.
        detectors: those that the scan asks which repairs go by; all that look at behaviour if empty.
    """

    methods: tuple[str, ...]
    share: float = Field(0.05, gt=0, le=1)
    epochs: int = Field(2, ge=1)
    detectors: tuple[MethodChoice, ...] = ()


class Group(Record):
    """Declare models that are counted together.

    Attributes:
        about: what is special, for the table's reader.
        models: how many.
        attack: what is planted; the models are clean if None. Settings may vary (`OneOf`, `Between`).
        class_counts: how many classes are taken, dealt out; all classes if empty.
        out_of: how many classes the data set has; needed with `class_counts`, but not for generated
            data, of which every model gets a world of its own.
        architectures: taken by turns.
        training: changes to the default training settings of architecture and data.
        robust: settings of the attack that the models are trained against (`training.adversarial`); ordinary
            training if None.
        seeds, draws: so many seeds of the scan, and so many draws of the images given, one varied at a time.
        apart: not pooled with other groups in the claims that name no group.
        first_of: these are the first models of the group of that name, which has the same declaration.
        first_seed: of the first model; each further one has the next. Others give other models, and other
            settings are dealt.
        repair_settings: how the models are repaired, in suites that measure that; None in others.
    """

    name: str
    about: str = ""
    data: Data
    models: int = Field(ge=1)
    attack: MethodChoice | None = None
    class_counts: tuple[int, ...] = ()
    out_of: int = 0
    architectures: tuple[str, ...] = ("small-cnn",)
    training: dict[str, Any] = Field(default_factory=dict)
    robust: dict[str, Any] | None = None
    seeds: int = Field(1, ge=1)
    draws: int = Field(1, ge=1)
    excluded_from_claims: bool = False
    first_of: str | None = None
    first_seed: int = Field(0, ge=0)
    repair_settings: RepairSettings | None = None

    @property
    def repeated(self) -> bool:
        """Return whether every model is scanned more than once."""
        return self.seeds + self.draws > 2


class Claim(Record):
    """A published figure, or a bar of our own, to be set next to what we measure.

    Attributes:
        text: the figure in words.
        source: who says so.
        groups: names of the groups that are pooled; all that are not apart if empty.
        at_least, at_most: when the claim is reached; a figure without either is shown and not judged.
    """

    text: str
    source: str
    measure: Measure
    groups: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


class Suite(Record):
    """Declare what is measured, at every scale.

    Attributes:
        about: what the suite shows, for the table's reader.
        drawn_as: the name that random draws come from, where the suite was named otherwise when models that
            still count were drawn.
        least_success: attack success from which on a plant counts; below it the attack did not take.
    """

    name: str
    title: str
    about: str
    drawn_as: str | None = None
    least_success: float = LEAST_SUCCESS
    scales: dict[Scale, tuple[Group, ...]]
    claims: tuple[Claim, ...] = ()
    scan_settings: ScanSettings = ScanSettings()

    @property
    def scans(self) -> bool:
        """Return whether models are scanned; else what planting did is measured."""
        return self.scan_settings.detectors is not None

    def groups(self, scale: Scale) -> tuple[Group, ...]:
        """Return the groups of a scale.

        Raises:
            InputError: if the suite has no such scale.
        """
        if scale not in self.scales:
            raise InputError(f"suite {self.name} has no scale {scale!r}; it has: {', '.join(self.scales)}")
        return self.scales[scale]


class Trial(Record):
    """One model to be made and one judging of it, with every setting drawn."""

    suite: str
    scale: Scale
    group: str
    name: str
    data: Data
    attack: MethodChoice | None
    architecture: str
    training: dict[str, Any]
    robust: dict[str, Any] | None = None
    seed: int
    scan_settings: ScanSettings
    repair_settings: RepairSettings | None = None

    @cached_property
    def key(self) -> str:
        """Return the sha256 of what is declared."""
        return content_key(self.model_dump(mode="json"))


def work_of(resolved: dict[str, Any], key: str) -> str:
    """Return the sha256 of a model and its judging; trials that share it, of whatever suite, are one scan.

    Args:
        resolved: what a result's key is made of.
        key: what is returned where that names no model, for lack of data.
    """
    if not {"model", "judging"} <= resolved.keys():
        return key
    return content_key([content_key(resolved["model"]), resolved["judging"]])


def parts_of(resolved: dict[str, Any]) -> dict[str, str]:
    """Return, by detector, the sha256 of a model and of what that detector sees; whatever others are asked.

    Args:
        resolved: what a result's key is made of.
    """
    if not {"model", "judging"} <= resolved.keys():
        return {}
    detectors = resolved["judging"].get("detectors", ())
    around = {name: value for name, value in resolved["judging"].items() if name != "detectors"}
    model = content_key(resolved["model"])
    return {one["name"]: content_key([model, around, one]) for one in detectors}


def content_key(content: Any) -> str:
    """Return the sha256 of some JSON content, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def expand(suite: Suite, scale: Scale) -> tuple[Trial, ...]:
    """Return a suite's trials; the same suite and scale always give the same.

    Raises:
        InputError: if the suite has no such scale.
    """
    return tuple(trial for group in suite.groups(scale) for trial in _expand(suite, scale, group))


def _expand(suite: Suite, scale: Scale, group: Group) -> list[Trial]:
    """Deal out what varies; models of a seed are alike in all groups, so planted ones have counterparts."""
    whole = next(g for g in suite.groups(scale) if g.name == (group.first_of or group.name))

    def rng(what: str) -> random.Random:
        return random.Random(derive_seed(group.first_seed, suite.drawn_as or suite.name, whole.name, what))

    settings: list[dict[str, Any]] = [{} for _ in range(whole.models)]
    if group.attack is not None:
        dealt = {
            name: value.deal(whole.models, rng(name))
            if isinstance(value, OneOf | Between)
            else [value] * whole.models
            for name, value in group.attack.settings.items()
        }
        settings = [{name: values[i] for name, values in dealt.items()} for i in range(whole.models)]
    subset = rng("classes")
    counts = (
        OneOf(values=group.class_counts).deal(whole.models, rng("class counts")) if group.class_counts else []
    )
    varied = [(seed, 0) for seed in range(group.seeds)] + [(0, draw) for draw in range(1, group.draws)]
    trials = []
    for i in range(group.models):
        data = group.data
        if data.world is not None:
            world = {"seed": group.first_seed + i} | ({"classes": counts[i]} if counts else {})
            data = data.model_copy(update={"world": data.world.model_copy(update=world)})
        elif counts:
            data = data.model_copy(
                update={"classes": tuple(sorted(subset.sample(range(group.out_of), counts[i])))}
            )
        for seed, draw in varied:
            label = f"{group.name}-{i:02d}" + (f"-seed{seed}-draw{draw}" if len(varied) > 1 else "")
            trials.append(
                Trial(
                    suite=suite.name,
                    scale=scale,
                    group=group.name,
                    name=label,
                    data=data,
                    attack=group.attack and MethodChoice(name=group.attack.name, settings=settings[i]),
                    architecture=group.architectures[i % len(group.architectures)],
                    training=group.training,
                    robust=group.robust,
                    seed=group.first_seed + i,
                    scan_settings=suite.scan_settings.model_copy(update={"seed": seed, "draw": draw}),
                    repair_settings=group.repair_settings,
                )
            )
    return trials


def suite_names() -> tuple[str, ...]:
    """Return the names of all suites: each is a file, which is not imported."""
    files = (Path(__file__).parent / "suites").glob("[!_]*.py")
    return tuple(sorted(file.stem.replace("_", "-") for file in files))


def get_suite(name: str) -> Suite:
    """Return a suite.

    Args:
        name: one that `suite_names` lists, or a file of Python that makes a `SUITE`. The file is run.

    Raises:
        InputError: if there is none of that name; the message lists those that exist.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in suite_names():
        listed = f"; there are: {', '.join(suite_names())}, and files of your own, as in my_suite.py"
        raise InputError(f"there is no suite named {name!r}{did_you_mean(name, suite_names()) or listed}")
    found = import_module(f"doorward.bench.suites.{name.replace('-', '_')}").SUITE
    assert isinstance(found, Suite)
    return found


def _from_file(file: Path) -> Suite:
    """Run a file and return its suite.

    Raises:
        InputError: if there is no such file, it fails, or makes no suite of a name of its own.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    if not file.is_file():
        raise InputError(f"{file} is no file; a suite of your own is a file of Python with one SUITE")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ValidationError as error:
        from doorward.models.formats.input_options import describe_validation

        raise InputError(f"{file}: {error.title} does not fit: {describe_validation(error)}") from error
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, "SUITE", None)
    if not isinstance(found, Suite):
        raise InputError(f"{file} makes no SUITE = Suite(...), as files in bench/suites/ do")
    if found.name in suite_names():
        raise InputError(f"{file}: the name {found.name!r} is that of a suite of Doorward's; give it another")
    return found


def matching(trials: Sequence[Trial], pattern: str | None) -> tuple[Trial, ...]:
    """Return the trials whose name or group matches a shell pattern, such as `gtsrb*`; all if None.

    Raises:
        InputError: if none does.
    """
    from fnmatch import fnmatchcase

    if not trials:
        raise InputError("the suite has no trials at this scale")
    found = tuple(
        t for t in trials if pattern is None or fnmatchcase(t.name, pattern) or fnmatchcase(t.group, pattern)
    )
    if not found:
        raise InputError(
            f"no trial matches {pattern!r}; groups are: {', '.join(dict.fromkeys(t.group for t in trials))}"
        )
    return found
