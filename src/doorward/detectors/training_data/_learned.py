"""What a model has learnt of its training samples: one pass, shared by the detectors of one subject."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell
from doorward.data import Samples
from doorward.detectors.subject import Subject
from doorward.models import Classifier
from doorward.models.encode.dispatch import to_float, to_tensor

#: Samples that are decoded and sent through the model at a time.
BATCH = 512
#: Bytes of features from which on they are kept in half the digits.
LARGE = 1 << 30


@dataclass(frozen=True)
class Learned:
    """What the model makes of each training sample.

    Attributes:
        labels: (n,) given with the samples.
        features: (n, d) penultimate activations, float32; float16 where they are very many.
        predicted: (n,) class numbers.
        confidence: (n,) probability of the given label.
    """

    labels: npt.NDArray[np.int64]
    features: Tensor
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]

    @property
    def agrees(self) -> npt.NDArray[np.bool_]:
        """Return which samples the model gives their own label: the others it has not learnt."""
        return np.asarray(self.labels == self.predicted)


def learned(subject: Subject, deadline: Deadline) -> Learned:
    """Run the model over the training samples of a subject, once for all detectors.

    Raises:
        CouldNotTell: if the deadline is too near, or features are not finite.
        InputError: if a sample cannot be decoded or does not fit the model.
    """
    parts = subject.classifier, subject.train
    seen: Learned | None = subject.kept("learned", *parts)
    if seen is None:
        assert subject.classifier is not None
        assert subject.train is not None
        seen = run(subject.classifier, subject.train, deadline)
        subject.keep(seen, "learned", *parts)
    return seen


def run(classifier: Classifier, samples: Samples, deadline: Deadline) -> Learned:
    """Return what a model makes of labelled samples, decoded and dropped batch by batch.

    Raises:
        CouldNotTell: if the deadline is too near, or features are not finite.
        InputError: if a sample cannot be decoded or does not fit the model.
    """
    assert samples.labels is not None, "the caller checks"
    n, labels = len(samples), torch.from_numpy(samples.labels)
    features, scale = torch.empty(0), 1.0
    predicted, confidence = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
    guard = TimeGuard(deadline, n, work=f"running the model on {n:,} training samples")
    for rows, x in batches(classifier, samples):
        with torch.no_grad():
            both = classifier.logits_and_features(x)
        if not bool(torch.isfinite(both.features).all()):
            raise CouldNotTell("the model's features are not finite")
        if not len(features):
            large = 4 * n * both.features.shape[1] > LARGE
            # half precision ends at 65504: a thousandfold of what the first samples have stays in
            scale = max(1.0, float(both.features.abs().amax())) / 60.0 if large else 1.0
            features = torch.empty(n, both.features.shape[1], dtype=torch.float16 if large else torch.float32)
        features[rows] = (both.features / scale).clamp(-6e4, 6e4).to("cpu", features.dtype)
        likely = both.logits.softmax(1).cpu()
        predicted[rows] = likely.argmax(1).numpy()
        confidence[rows] = likely.gather(1, labels[rows][:, None])[:, 0].numpy()
        guard.advance(len(x))
    return Learned(samples.labels, features, predicted, confidence)


def batches(classifier: Classifier, samples: Samples) -> Iterator[tuple[slice, Tensor]]:
    """Yield samples as a classifier takes them, on its device, with the rows that they are."""
    for start in range(0, len(samples), BATCH):
        rows = slice(start, min(start + BATCH, len(samples)))
        part = to_tensor(samples.select(np.arange(rows.start, rows.stop)), classifier.spec)
        yield rows, to_float(part.to(classifier.device), classifier.spec)
