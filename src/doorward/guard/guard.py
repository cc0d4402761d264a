"""Guard: a classifier with filters in front, which together reject a preset share of clean inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from doorward.core.arguments import refuse_wrong, several
from doorward.core.budget import Deadline
from doorward.core.errors import InputError
from doorward.core.files import open_regular
from doorward.core.report_json import dump
from doorward.core.seeds import make_generator
from doorward.data import Modality, Samples
from doorward.data.given import as_samples
from doorward.detectors.inputs.base import FittedFilters, InputFilter, finite_logits, fit_filters
from doorward.detectors.inputs.feature_squeezing import FeatureSqueezing, squeeze
from doorward.detectors.inputs.strip import Strip
from doorward.methods import registry
from doorward.models import Classifier, InputSpec
from doorward.models.batching import batched_logits
from doorward.models.encode.dispatch import NOUNS, blank, to_tensor
from doorward.models.errors import SizeUnknown
from doorward.models.formats.given import as_classifier
from doorward.models.spec import RowSpec
from doorward.stats.rejection import Floats, Rule

STATE, TENSORS = "guard.json", "guard.safetensors"
#: The squeezer whose copies the model answers, where none is named.
REFORM = "median-2"


@dataclass(frozen=True)
class Answers:
    """What a guard answers to n inputs.

    Attributes:
        predictions: classes (n,), of the squeezed inputs where the guard reforms.
        accepted: (n,).
        reasons: for each input, why it is rejected; empty if it is accepted.
        scores: (f, n), one row for each filter.
        logits: (n, k) float32, in the model's own scale, which the predictions follow.
    """

    predictions: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.bool_]
    reasons: tuple[tuple[str, ...], ...]
    scores: Floats
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Give predictions of a classifier with accept or reject.

        guard = Guard.fit(classifier, clean)
        answers = guard(images)

    Attributes:
        rate: share of clean inputs that all filters together reject, at most.
        rule: how thresholds follow from clean scores.
        reform: the squeezer whose copies the model answers, None if it answers the inputs themselves.
    """

    classifier: Classifier
    fitted: FittedFilters
    rate: float
    rule: Rule
    reform: str | None = None

    @classmethod
    def fit(
        cls,
        classifier: Any,
        clean: Any,
        *,
        filters: Sequence[InputFilter | str] | InputFilter | str | None = None,
        rate: float = 0.01,
        rule: Rule = "conformal",
        reform: str | None = None,
        seed: int = 0,
        deadline: Deadline | None = None,
    ) -> Guard:
        """Fit filters to clean inputs.

        Args:
            classifier: the model: a classifier, or whatever `doorward.examine` takes.
            clean: images, texts or recordings that the model was not trained on: samples, or whatever
                `doorward.examine` takes; as a tensor, images (n, c, h, w) uint8.
            filters: those to fit, or their names; if None STRIP, and for images feature squeezing. Their own
                rates and rules do not count.

        Raises:
            InputError: if the inputs do not fit, a filter is named twice, or it takes inputs of another kind.
            CouldNotTell: if the inputs are too few, or the model's outputs say nothing.
        """
        refuse_wrong("Guard.fit", {"rate": rate, "seed": seed})
        if not 0 < rate < 1:
            raise InputError(f"the rate of false rejections lies between 0 and 1, got {rate}")
        if not isinstance(classifier, Classifier):
            clean = clean if isinstance(clean, Tensor) else as_samples(clean, what="clean")
            try:
                classifier = as_classifier(classifier)
            except SizeUnknown:
                classifier = as_classifier(classifier, size=_shape(clean))
        spec = classifier.spec
        every = (Strip(), FeatureSqueezing())
        usual = tuple(one for one in every if spec.modality in one.modalities)
        chosen = usual if filters is None else _filters(filters)
        names = [one.method() for one in chosen]
        if not names or len(set(names)) < len(names):
            raise InputError(f"a guard takes one filter or more, each once; got {', '.join(names) or 'none'}")
        inputs = _inputs(classifier, clean)
        if reform is not None:
            _check_reform(reform, spec.modality, spec.shape)
        with classifier.frozen():
            fitted = fit_filters(
                classifier,
                inputs,
                chosen,
                rate=rate,
                rule=rule,
                generator=make_generator(seed, "guard"),
                deadline=deadline,
            )
        return cls(classifier=classifier, fitted=fitted, rate=rate, rule=rule, reform=reform)

    def __call__(self, batch: Any, *, deadline: Deadline | None = None) -> Answers:
        """Answer inputs and judge each.

        Args:
            batch: samples, or whatever `doorward.examine` takes; as a tensor, what `models.encode` makes of
                them: images (n, c, h, w) uint8, texts (n, 1, 1, m) int32, recordings (n, 1, 1, m) int16.

        Raises:
            InputError: if they do not fit the model.
            CouldNotTell: if the model's outputs are not finite, or the deadline is too near.
        """
        inputs = _inputs(self.classifier, batch)
        with self.classifier.frozen():
            logits = finite_logits(self.classifier, inputs, deadline)
            seen = self.fitted.score(self.classifier, inputs, logits, deadline)
            answered = logits if self.reform is None else self._reformed(inputs, self.reform, deadline)
        scores = np.stack([one.score for one in seen])  # (f, n)
        spoke = scores >= self.fitted.thresholds[:, None]
        told = [
            [f"{one.method()}: {why}" for why in own.told]
            for one, own in zip(self.fitted.filters, seen, strict=True)
        ]
        reasons = tuple(
            tuple(own[i] for own, rejects in zip(told, spoke[:, i], strict=True) if rejects)
            for i in range(len(inputs))
        )
        accepted: npt.NDArray[np.bool_] = np.logical_not(np.any(spoke, axis=0))
        return Answers(answered.argmax(1).numpy(), accepted, reasons, scores, answered.float().numpy())

    def _reformed(self, images: Tensor, squeezer: str, deadline: Deadline | None) -> Tensor:
        if not len(images):
            return torch.zeros(0, len(self.classifier.classes))
        return batched_logits(self.classifier, squeeze(images, squeezer), deadline, raw=True).cpu()

    def save(self, folder: str | Path) -> Path:
        """Write what was fitted to a folder, as JSON and safetensors, without the classifier.

        Raises:
            InputError: if the folder cannot be written.
        """
        state = _Saved(
            filters=tuple(
                _SavedFilter(name=one.method(), settings=one.settings(), threshold=float(threshold))
                for one, threshold in zip(self.fitted.filters, self.fitted.thresholds, strict=True)
            ),
            rate=self.rate,
            rule=self.rule,
            reform=self.reform,
            classes=self.classifier.classes,
            modality=self.classifier.spec.modality,
            shape=self.classifier.spec.shape,
        )
        tensors = {"clean": torch.from_numpy(self.fitted.clean.copy())}
        for one, kept in zip(self.fitted.filters, self.fitted.states, strict=True):
            tensors |= {f"{one.method()}.{name}": value.cpu().contiguous() for name, value in kept.items()}
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TENSORS).write_bytes(save(tensors))
            (folder / STATE).write_text(dump(state.model_dump(mode="json")), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot write the guard: {error.strerror or error}") from error
        return folder

    @staticmethod
    def load(folder: str | Path, classifier: Classifier) -> Guard:
        """Read a guard that `save` wrote, for the classifier that it was fitted to.

        Raises:
            InputError: if it cannot be read, or was fitted to a model of other classes or inputs.
        """
        folder = Path(folder)
        state, tensors = _read(folder)
        spec = classifier.spec
        own = (classifier.classes, spec.modality, spec.shape)
        if (state.classes, state.modality, state.shape) != own:
            raise InputError(
                f"{folder}: this guard was fitted to a model of {len(state.classes)} classes and "
                f"{NOUNS[state.modality]} of shape {state.shape}; this one has {len(classifier.classes)} and "
                f"{NOUNS[spec.modality]} of shape {spec.shape}, or other classes. Fit one with --clean"
            )
        unknown = [one.name for one in state.filters if one.name not in registry.modules("detector")]
        if unknown:  # a name such as file.py:Class would run that file
            raise InputError(f"{folder / STATE}: there is no filter {unknown[0]!r}")
        filters = tuple(registry.build("detector", one.name, one.settings) for one in state.filters)
        if not all(isinstance(one, InputFilter) for one in filters):
            raise InputError(f"{folder / STATE}: it names detectors that are no filters of inputs")
        states = tuple(
            {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{one.name}.")}
            for one in state.filters
        )
        clean = tensors.get("clean")
        whole = clean is not None and clean.ndim == 2 and len(clean) == len(filters)
        pairs = zip(filters, states, strict=True)
        if not whole or not all(_fits(one, kept, spec) for one, kept in pairs):
            raise InputError(f"{folder / TENSORS}: it does not hold what {STATE} says; fit the guard again")
        assert clean is not None
        thresholds = np.array([one.threshold for one in state.filters])
        fitted = FittedFilters(filters, states, thresholds, clean.double().numpy())
        return Guard(
            classifier=classifier, fitted=fitted, rate=state.rate, rule=state.rule, reform=state.reform
        )


class _SavedFilter(BaseModel):
    """One filter as `guard.json` holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    settings: dict[str, Any]
    threshold: float


class _Saved(BaseModel):
    """What `guard.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["doorward-guard"] = "doorward-guard"
    version: Literal[1] = 1
    filters: tuple[_SavedFilter, ...] = Field(min_length=1)
    rate: float = Field(gt=0, lt=1)
    rule: Rule
    reform: str | None
    classes: tuple[str, ...]
    modality: Modality = "image"
    shape: tuple[int, int, int]


def _read(folder: Path) -> tuple[_Saved, dict[str, Tensor]]:
    """Read both files of a guard.

    Raises:
        InputError: if one is missing or damaged.
    """
    file = folder / STATE
    try:
        with open_regular(file) as stream:
            state = _Saved.model_validate_json(stream.read())
        file = folder / TENSORS
        with open_regular(file) as stream:
            tensors = load(stream.read())
    except OSError as error:
        raise InputError(
            f"{file}: cannot read the guard: {error.strerror or error}; give the folder that one was saved to"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: this is no saved guard: {where}: {first['msg']}") from error
    except SafetensorError as error:
        raise InputError(f"{file}: this is no whole safetensors file: {error}") from error
    if state.reform is not None:
        _check_reform(state.reform, state.modality, state.shape)
    return state, tensors


def _check_reform(squeezer: str, modality: Modality, shape: tuple[int, int, int]) -> None:
    """Raise InputError unless a model's inputs can be squeezed like that."""
    if modality != "image":
        raise InputError(f"only images can be squeezed, and this model takes {NOUNS[modality]}")
    squeeze(torch.zeros(1, *shape, dtype=torch.uint8), squeezer)


def _fits(one: InputFilter, kept: dict[str, Tensor], spec: InputSpec) -> bool:
    """Return whether tensors are those that a filter keeps for a model."""
    expected = one.keep(blank(spec, one.kept), spec, make_generator(0, "guard"))
    own, its = ({name: (x.shape, x.dtype) for name, x in each.items()} for each in (kept, expected))
    return own == its


def _shape(samples: Samples | Tensor) -> tuple[int, int, int]:
    """Return (channels, height, width) of the first of some images.

    Raises:
        InputError: if there are none.
    """
    if isinstance(samples, Tensor):
        if samples.ndim != 4:
            raise InputError(f"a guard takes images (n, c, h, w) uint8, got {tuple(samples.shape)}")
        return int(samples.shape[1]), int(samples.shape[2]), int(samples.shape[3])
    if samples.modality != "image" or not len(samples):
        raise InputError("a guard filters images; give some as clean")
    height, width, channels = samples.raw([0])[0].shape
    return int(channels), int(height), int(width)


def _filters(given: Any) -> tuple[InputFilter, ...]:
    """Return filters of what a Python user gave: names or filters, or one alone."""
    built = tuple(
        registry.build("detector", one, {}) if isinstance(one, str) else one
        for one in several("Guard.fit", "filters", given, (str, InputFilter))
    )
    for one in built:
        if not isinstance(one, InputFilter):
            raise InputError(f"Guard.fit: filters: {one.method()} filters no inputs; {Strip.method()} does")
    return built


def _inputs(classifier: Classifier, given: Any) -> Tensor:
    """Return inputs that fit the model, as compact as `models.encode` makes them.

    Raises:
        InputError: if they do not fit.
    """
    spec = classifier.spec
    if not isinstance(given, Tensor):
        return to_tensor(as_samples(given, what=NOUNS[spec.modality]), spec)
    kind, shape = blank(spec, 0).dtype, tuple(given.shape[1:])
    if isinstance(spec, RowSpec) and len(shape) == 3 and 0 < shape[2] < spec.width:
        shape = (*shape[:2], spec.width)  # rows may be shorter
    if given.dtype != kind or shape != spec.shape:
        raise InputError(
            f"a guard takes {NOUNS[spec.modality]} (n, {', '.join(map(str, spec.shape))}) "
            f"{str(kind).removeprefix('torch.')}, got {given.dtype} {tuple(given.shape)}"
        )
    return given.cpu()
