"""Exclusionary reclassification: what does a model that never saw some samples take them for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell, TrainingDiverged
from doorward.data import InMemorySamples, Samples
from doorward.detectors.training_data._learned import batches
from doorward.models import Classifier, InputSpec, networks
from doorward.training import TrainingProgress, default_settings, measure_spec, train_classifier

Rows = npt.NDArray[np.int64]
#: How often each sample is seen: what is wanted is a fair guess, and not the best network.
LEAST_EPOCHS, MOST_EPOCHS = 3, 12


@dataclass(frozen=True)
class Reclassified:
    """What a model that was trained without some samples says of them.

    Attributes:
        own: (m,) probability of the label that was given with each.
        taken_for: (m,) the class that it finds most likely.
        elsewhere: (m,) probability of the likeliest class but the given one.
    """

    own: npt.NDArray[np.float32]
    taken_for: Rows
    elsewhere: npt.NDArray[np.float32]

    def parts(self, sizes: Sequence[int]) -> list[Reclassified]:
        """Return consecutive parts of these sizes."""
        ends = np.cumsum([0, *sizes])
        return [
            Reclassified(self.own[a:b], self.taken_for[a:b], self.elsewhere[a:b])
            for a, b in pairwise(ends.tolist())
        ]


def reclassify(
    classifier: Classifier,
    samples: Samples,
    kept: Rows,
    excluded: Rows,
    *,
    rows: int,
    seen: int,
    seed: int,
    deadline: Deadline,
) -> Reclassified:
    """Train a small network on the samples that are kept, and ask it about the excluded ones.

    It is trained from scratch: weights that have seen the excluded samples would remember them.

    Args:
        classifier: the model under examination; only the size of its input counts.
        rows: kept samples to train on at most, drawn evenly over the classes.
        seen: how many samples go through in training, about; few samples are seen twelve times at most.

    Raises:
        CouldNotTell: if the deadline is too near, or training diverges.
        InputError: if a sample cannot be decoded.
    """
    assert samples.labels is not None, "the caller checks"
    material = _decoded(samples.select(kept).draw(rows, np.random.default_rng(seed)))
    spec = _spec(classifier, material)
    architecture = networks.usual(spec)
    settings = default_settings(architecture, images=len(material), side=min(spec.height, spec.width))
    epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, round(seen / len(material))))
    guard: list[TimeGuard] = []

    def watch(now: TrainingProgress) -> None:
        if not guard:
            guard.append(TimeGuard(deadline, now.steps, work="training without the suspect samples"))
        guard[0].advance(1)

    try:
        trained = train_classifier(
            architecture,
            material,
            seed=seed,
            spec=spec,
            settings=settings.model_copy(update={"epochs": epochs}),
            device=classifier.device,
            progress=watch,
        ).classifier
    except TrainingDiverged as error:
        raise CouldNotTell(f"training without the suspect samples: {error}") from error
    labels = torch.from_numpy(samples.labels[excluded])
    own, taken, elsewhere = [], [], []
    for places, x in batches(trained, samples.select(excluded)):
        with torch.no_grad():
            likely = trained.logits(x).softmax(1).cpu()  # (b, k)
        given = labels[places][:, None]
        own.append(likely.gather(1, given)[:, 0])
        taken.append(likely.argmax(1))
        elsewhere.append(likely.scatter(1, given, 0.0).amax(1))
    return Reclassified(torch.cat(own).numpy(), torch.cat(taken).numpy(), torch.cat(elsewhere).numpy())


def _spec(classifier: Classifier, material: Samples) -> InputSpec:
    """Return what the small network takes: inputs as they are, or resized as by the model itself."""
    own = classifier.spec
    if own.modality != "image" or own.resize is None:
        return measure_spec(material)
    half, quarter = (0.5,) * own.channels, (0.25,) * own.channels
    return InputSpec(
        channels=own.channels,
        height=own.height,
        width=own.width,
        resize=own.resize,
        mean=half,
        std=quarter,
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
