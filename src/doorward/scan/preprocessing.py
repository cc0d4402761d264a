"""Whether a preprocessing that nobody stated is the right one: the usual ones are tried against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell, DoorwardError
from doorward.core.formatting import percent
from doorward.models import Classifier, InputSpec, TorchClassifier
from doorward.models.batching import batched_logits, chunk_images

#: Images that the candidates are tried on.
TRIED = 300
#: With labels, another candidate clearly beats what is assumed if it is right on so much more of the images,
#: and a paired test of the images that only one of both gets right has at most this p-value.
MORE_RIGHT, LEVEL = 0.05, 0.01
#: Without labels it does if statistics of the first batch normalisation lie so much nearer to those that the
#: model learnt, and the assumed one lies at least so far away.
NEARER, FAR = 0.5, 0.5
#: Without batch normalisation it does if classes of slightly shifted images are so much more alike, while the
#: images are of no fewer classes.
MORE_STABLE = 0.15

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CAFFE: dict[str, Any] = {"range": (0.0, 255.0), "mean": (103.939, 116.779, 123.68)}


@dataclass(frozen=True)
class Candidate:
    """A usual preprocessing.

    Attributes:
        options: what to type for it.
        changes: fields of the input spec.
    """

    options: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class BetterFit:
    """A candidate that clearly fits better than what is assumed.

    Attributes:
        candidate: which.
        why: how it was told, as a phrase.
    """

    candidate: Candidate
    why: str

    @property
    def reason(self) -> str:
        """Return why nothing can be told under what is assumed, and what to type."""
        return (
            f"the preprocessing was not stated and the assumed one fits worse than another: {self.why}; "
            f"scan again with {self.candidate.options}"
        )


def candidates(spec: InputSpec) -> list[Candidate]:
    """Return the usual preprocessings for images of a spec; the assumed one is the first."""
    neutral: dict[str, Any] = {"range": (0.0, 1.0), "mean": (0.0,), "std": (1.0,)}
    found = [
        Candidate("--input-range=0,1", neutral),
        Candidate("--input-range=-1,1", neutral | {"range": (-1.0, 1.0)}),
        Candidate("--input-range=0,255", neutral | {"range": (0.0, 255.0)}),
    ]
    if spec.channels == 3:
        found.append(Candidate("--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225", neutral | _IMAGENET))
        found += [
            Candidate(f"{one.options} --channels bgr", one.changes | {"channel_order": "BGR"})
            for one in found
        ]
        caffe = "--input-range=0,255 --mean 103.939,116.779,123.68 --channels bgr"
        found.append(Candidate(caffe, neutral | _CAFFE | {"channel_order": "BGR"}))
    assumed = {name: getattr(spec, name) for name in neutral}
    return sorted(found, key=lambda one: one.changes != assumed)  # stable: the assumed one first


def passes(classifier: Classifier, *, labelled: bool) -> int:
    """Return how often at most `better_fit` sends each image through the model; 0 where all is stated."""
    if not _is_assumed(classifier.spec):
        return 0
    # without labels, images are shifted in four directions as well
    return len(candidates(classifier.spec)) * (1 if labelled else 5)


def _is_assumed(spec: InputSpec) -> bool:
    return {"range", "mean", "std"} <= set(spec.assumed) and spec.dtype != "uint8"


def better_fit(
    classifier: Classifier, images: Tensor, labels: Tensor | None, *, tried: int = TRIED
) -> BetterFit | None:
    """Return a preprocessing that clearly fits a model better than the assumed one; None if none does.

    With labels, the accuracy tells. Without, the statistics of the first batch normalisation do, or where
    there is none, whether slightly shifted images keep their class. How sure the model is says nothing: that
    prefers the larger range.

    Args:
        images: (n, c, h, w) in [0, 1]; labels: (n,) or None.
        tried: how many of them the candidates are tried on at most.

    Returns:
        None as well where range, mean and std were stated.
    """
    if not _is_assumed(classifier.spec):
        return None
    x = images[:tried]
    usual = candidates(classifier.spec)
    if labels is not None:
        return _by_accuracy(classifier, usual, x, labels[:tried])
    return _by_statistics(classifier, usual, x) or _by_stability(classifier, usual, x)


@contextmanager
def respecified(classifier: Classifier, changes: dict[str, Any]) -> Iterator[None]:
    """Let a classifier take its input in another way inside the block."""
    spec = classifier.spec
    classifier.spec = spec.model_copy(update=changes)
    try:
        yield
    finally:
        classifier.spec = spec


def _predicted(classifier: Classifier, candidate: Candidate, x: Tensor) -> Tensor | None:
    """Return the classes (n,) that images are put in under a candidate, None if the model does not run."""
    try:
        with respecified(classifier, candidate.changes):
            return batched_logits(classifier, x, raw=True).argmax(1).cpu()
    except (DoorwardError, CouldNotTell):
        return None


def _by_accuracy(
    classifier: Classifier, usual: list[Candidate], x: Tensor, labels: Tensor
) -> BetterFit | None:
    right: list[npt.NDArray[np.bool_] | None] = []
    for one in usual:
        classes = _predicted(classifier, one, x)
        right.append(None if classes is None else (classes == labels).numpy())
    own, others = right[0], [(one, r) for one, r in zip(usual[1:], right[1:], strict=True) if r is not None]
    if own is None or not others:
        return None
    best, its = max(others, key=lambda pair: float(pair[1].mean()))
    won, lost = int((its & ~own).sum()), int((own & ~its).sum())
    if its.mean() - own.mean() < MORE_RIGHT or stats.binomtest(won, won + lost).pvalue > LEVEL:
        return None
    why = (
        f"with {best.options} the model is right on {percent(float(its.mean()))} of {len(x)} images, and now "
    )
    return BetterFit(best, why + f"on {percent(float(own.mean()))}")


def _by_statistics(classifier: Classifier, usual: list[Candidate], x: Tensor) -> BetterFit | None:
    far = [(_distance(classifier, one, x), one) for one in usual]
    own, others = far[0][0], [(d, one) for d, one in far[1:] if d is not None]
    if own is None or not others:
        return None
    least, best = min(others, key=lambda pair: pair[0])
    if own < FAR or least > NEARER * own:
        return None
    why = (
        f"with {best.options} what the first batch normalisation sees is far nearer to what the model learnt"
    )
    return BetterFit(best, why)


def _distance(classifier: Classifier, candidate: Candidate, x: Tensor) -> float | None:
    """Return how far inputs of the first batch normalisation lie from what it learnt, None without one."""
    if not isinstance(classifier, TorchClassifier):
        return None
    norms = [
        m for m in classifier.module.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats
    ]
    if not norms:
        return None
    seen: list[Tensor] = []
    handle = norms[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            classes = _predicted(classifier, candidate, x[: chunk_images(classifier)])
    finally:
        handle.remove()
    mean, variance = norms[0].running_mean, norms[0].running_var
    if classes is None or not seen or mean is None or variance is None:
        return None
    y = torch.cat(seen)  # (n, c, h, w)
    known = variance.clamp_min(1e-12)
    apart = (y.mean((0, 2, 3)) - mean).abs() / known.sqrt()
    wider = (y.var((0, 2, 3), correction=0).clamp_min(1e-12) / known).log().abs() / 2
    return float((apart + wider).mean())


def _by_stability(classifier: Classifier, usual: list[Candidate], x: Tensor) -> BetterFit | None:
    told = [(_stability(classifier, one, x), one) for one in usual]
    own = told[0][0]
    others = [(s, one) for s, one in told[1:] if s is not None]
    if own is None or not others:
        return None
    highest, best = max(others, key=lambda pair: pair[0])
    if highest - own < MORE_STABLE:
        return None
    why = f"with {best.options} slightly shifted images keep their class more often"
    return BetterFit(best, why)


def _stability(classifier: Classifier, candidate: Candidate, x: Tensor) -> float | None:
    """Return the share of shifted images that keep their class, times how evenly classes are used."""
    classes = _predicted(classifier, candidate, x)
    if classes is None:
        return None
    kept = []
    for shift in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        moved = _predicted(classifier, candidate, x.roll(shift, (2, 3)))
        if moved is None:
            return None
        kept.append(float((moved == classes).float().mean()))
    counts = torch.bincount(classes, minlength=len(classifier.classes)).double()
    shares = counts[counts > 0] / counts.sum()
    evenness = float(-(shares * shares.log()).sum()) / float(np.log(min(len(classifier.classes), len(x))))
    return float(np.mean(kept)) * evenness
