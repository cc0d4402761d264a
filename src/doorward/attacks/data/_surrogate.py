"""What attacks share that need a classifier: a surrogate of the victim's, and images attacked with it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationInfo, field_validator

from doorward.attacks.data.base import DataAttack
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data.samples import Samples
from doorward.models import open_classifier
from doorward.models.encode.image import from_raw, to_uint8
from doorward.training.adversarial import AdversarialSettings, Norm, adversarial_batches, perturb
from doorward.training.loop import train_classifier
from doorward.training.settings import default_settings

if TYPE_CHECKING:
    from doorward.models import Classifier

#: Images that a surrogate is trained on, at most, and about how many go through in all.
SURROGATE_IMAGES, SURROGATE_SEEN = 5000, 40_000
#: Radii that Turner et al. use, in units of pixel values in [0, 1].
USUAL_EPS: dict[str, float] = {"linf": 16 / 255, "l2": 600 / 255}
#: Images that are attacked at a time.
BATCH = 256


class PerturbingAttack(DataAttack):
    """Move poisoned images to where a surrogate classifier finds them hard, by projected gradient descent.

    Attributes:
        norm: that the largest move is measured in.
        eps: how far each image is moved at most, in units of pixel values in [0, 1]; 16/255 for `linf` and
            600/255 for `l2` if None. No surrogate is needed for 0.
        steps: gradients taken for each image.
        surrogate: a trained model, as other commands take it; if None, a small one is trained on the samples,
            adversarially, as a robust model's gradients show what people see.
    """

    norm: Norm = "l2"
    eps: float | None = Field(None, ge=0)
    steps: int = Field(30, gt=0)
    surrogate: str | None = None

    @field_validator("eps")
    @classmethod
    def _in_range(cls, eps: float | None, info: ValidationInfo) -> float | None:
        if eps is not None and info.data.get("norm") == "linf" and eps > 1:
            raise ValueError("pixel values are in [0, 1], so eps is 1 at most (16/255 is 0.063)")
        return eps

    def perturbed(
        self, samples: Samples, positions: npt.NDArray[np.int64], *, generator: torch.Generator
    ) -> Samples:
        """Return the samples with the images at these positions moved away from their own class.

        Raises:
            InputError: if the surrogate does not fit the samples, or gives no gradients.
        """
        eps = USUAL_EPS[self.norm] if self.eps is None else self.eps
        if eps == 0 or not len(positions):
            return samples
        seed = int(torch.randint(1 << 62, (), generator=generator))
        classifier = self._classifier(
            samples, AdversarialSettings(norm=self.norm, eps=eps, variant="fast"), seed
        )
        settings = AdversarialSettings(norm=self.norm, eps=eps, steps=self.steps)
        return Replaced(samples, positions, _attacked(classifier, samples, positions, settings, seed))

    def _classifier(self, samples: Samples, against: AdversarialSettings, seed: int) -> Classifier:
        if self.surrogate is not None:
            classifier = open_classifier(self.surrogate)
            if len(classifier.classes) != len(samples.classes):
                raise InputError(
                    f"{self.method()}: the surrogate {self.surrogate} knows {len(classifier.classes)} "
                    f"classes, and the samples have {len(samples.classes)}"
                )
            if "gradients" not in classifier.capabilities:
                raise InputError(f"{self.method()}: the surrogate {self.surrogate} gives no gradients")
            return classifier
        drawn = samples.draw(SURROGATE_IMAGES, np.random.default_rng(seed))
        height, width, _ = samples.raw([0])[0].shape
        settings = default_settings("small-cnn", images=len(drawn), side=min(height, width))
        settings = settings.model_copy(update={"epochs": min(20, -(-SURROGATE_SEEN // len(drawn)))})
        return train_classifier(
            "small-cnn", drawn, seed=seed, settings=settings, on_batch=adversarial_batches(against)
        ).classifier


def _attacked(
    classifier: Classifier,
    samples: Samples,
    positions: npt.NDArray[np.int64],
    settings: AdversarialSettings,
    seed: int,
) -> npt.NDArray[np.uint8]:
    """Return the attacked images (m, h, w, c), which lie in a nameless file so that memory does not grow."""
    assert samples.labels is not None
    generator = make_generator(seed, "perturb")
    with tempfile.TemporaryFile() as file, classifier.frozen():
        for start in range(0, len(positions), BATCH):
            part = positions[start : start + BATCH]
            x = from_raw(samples.raw(part))  # (n, c, h, w)
            y = torch.from_numpy(samples.labels[part])
            attacked = to_uint8(perturb(classifier.logits, x, y, settings=settings, generator=generator))
            file.write(attacked.tobytes())
        file.flush()
        return np.memmap(file, dtype=np.uint8, mode="r", shape=(len(positions), *attacked.shape[1:]))


class Replaced(Samples):
    """Show samples of another set, some of them with other images.

    Args:
        positions: (m,) ascending.
        images: (m, h, w, c) uint8, in the place of those.
    """

    def __init__(
        self, base: Samples, positions: npt.NDArray[np.int64], images: npt.NDArray[np.uint8]
    ) -> None:
        self._base, self._positions, self._images = base, positions, images
        self.modality, self.classes, self.labels = base.modality, base.classes, base.labels
        self.provenance = base.provenance

    def __len__(self) -> int:
        return len(self._base)

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Decode some samples."""
        problem = np.asarray(indices, dtype=np.int64)
        row = np.searchsorted(self._positions, problem).clip(max=len(self._positions) - 1)
        ours = self._positions[row] == problem
        others = iter(self._base.raw(problem[~ours]))
        return [np.array(self._images[r]) if own else next(others) for r, own in zip(row, ours, strict=True)]
