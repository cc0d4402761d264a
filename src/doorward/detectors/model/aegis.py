"""AEGIS: images translated to each class of an adversarially trained model, and what they have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell
from doorward.core.formatting import percent
from doorward.core.records import Cost, Measurement, RecoveredTrigger, Table
from doorward.core.seeds import derive_seed, make_generator
from doorward.detectors.model._representations import (
    FEWEST,
    QUANTILES,
    STEPS,
    Representations,
    class_features,
    representations,
    scatter,
)
from doorward.detectors.model.base import ImageDetector
from doorward.inversion.common_pixels import (
    SNAPSHOTS,
    TRIED,
    CommonPixels,
    find_common_pixels,
    rightly_classified,
    work,
)
from doorward.inversion.distilled import DistilledSurrogates
from doorward.inversion.problem import InversionProblem
from doorward.methods.base import EVIDENCE_ONLY
from doorward.methods.registry import register
from doorward.models.batching import batched_logits
from doorward.stats.outliers import gap_to_others
from doorward.training.adversarial import AdversarialSettings, perturb

#: L2 radii, in pixel values, within which images are attacked to see how robust the model is, and the steps.
RADII, ATTACK_STEPS = (0.25, 0.5, 1.0, 2.0), 10
#: Classes whose pixels are held until all scores are known, beyond those that are shown.
SPARE = 4
#: How far from none and from all a share of images is kept before its log-odds are taken.
LEAST_SHARE = 0.02


@register("detector")
class Aegis(ImageDetector):
    """Translate images to each class, and try whether the few pixels they have in common send others there.

    Use it on image classifiers with gradients, adversarially trained ones too, with 20 clean images or more,
    against patches and triggers of several parts.

    Images of other classes are moved to the class by long steps along the gradient. The mean change is what
    they have in common. Of its strongest pixels those are dropped that matter least for the class, a few at
    a time, until about one in a hundred is left. Pasted, they send a share of the images kept back to the
    class. The steps are long since a patch of which a part shows has often no gradient.

    In some models most classes are easy to reach, and in some one is by nature. So a class's score is how far
    the log-odds of its share lie above the median of the other classes, less what distilled surrogates, which
    learn the model's answers on clean images, do as well.

    Pixels are pasted at 1 or 0 in each channel. That stands for colours and for the grey of a whole patch,
    less for a fine texture of many levels; values that follow the gradient did not help in most trials, and
    made clean classes easier to reach. A patch that is larger than the pixels left has to work by a part.

    The model's robustness is measured on the way: the share of images whose class it keeps under an attack
    (10 steps of PGD, L2) within several radii. It is reported and decides nothing.

    With more than 20 classes half as many images are translated.

    From AEGIS we take its models and the translation of images. It then counts clusters in the plane, which
    did not tell poisoned classes from clean ones in our trials; we try the pixels themselves.
    """

    title = "Translated images (AEGIS)"
    source = (
        "after E. Soremekun, S. Udeshi and S. Chattopadhyay, Computers & Security 2023, arXiv 2003.00865; "
        "the common pixels and the score are ours"
    )
    limits = (
        "It can miss triggers all over the image (blended, warped), large patches, input-dependent and "
        "source-specific triggers, and it needs gradients."
    )
    order: ClassVar[int] = 18
    quick: ClassVar[dict[str, Any]] = {"images": 6, "tried": 16, "attacked": 8, "mixtures": 1_600}

    images: int = Field(16, ge=2, le=1024, description="Images that are translated to each class")
    many_classes: int = Field(20, ge=2, description="Classes above which those are halved")
    tried: int = Field(100, ge=2, description="Images per class on which the pixels are tried, at most")
    length: float = Field(
        0.286, gt=0, description="L2 length of a step, as a share of that of an image that is white all over"
    )
    mixtures: int = Field(
        6_400, ge=64, description="Mixtures of clean images from which the surrogates learn"
    )
    published: bool = Field(
        False, description="Count clusters of real and of translated images instead, as published; no verdict"
    )
    published_seeds: int = Field(3, ge=1, le=100, description="How often those are laid out in the plane")
    attacked: int = Field(
        32,
        ge=0,
        description="Images that are attacked to see how robust the model is",
        json_schema_extra=EVIDENCE_ONLY,
    )
    shown: int = Field(
        1,
        ge=1,
        description="Of how many classes the pixels are kept as evidence",
        json_schema_extra=EVIDENCE_ONLY,
    )

    def work(self, *, classes: int, images: int) -> Cost | None:
        """Return how many images it sends through a model, about."""
        attacked = min(self.attacked, images) * len(RADII) * ATTACK_STEPS
        if self.published:
            moved = classes * images
            return Cost(forwards=moved, gradients=moved * STEPS + attacked)
        translated = self._translated(classes)
        tried = max(0, min(self.tried, images - images // classes - translated))
        forwards, gradients = work(translated, tried)
        return Cost(
            forwards=classes * forwards,
            gradients=classes * gradients + attacked,
        )

    def lesson(self) -> int:
        """Return how many images its surrogates learn from."""
        return 0 if self.published else self.mixtures

    def _translated(self, classes: int) -> int:
        """Return how many images are translated to each of so many classes."""
        return max(2, self.images // (1 if classes <= self.many_classes else 2))

    def score_classes(
        self, problem: InversionProblem, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a measurement with one score per class: how much easier than natural it is reached."""
        base = int(torch.randint(2**62, (), generator=generator))
        if self.published:
            return self._by_clusters(problem, base, deadline)
        classes, rows = problem.classes, {}
        best: list[CommonPixels] = []
        with problem.fast_inference():
            surrogates = DistilledSurrogates.of(problem, images=self.mixtures, deadline=deadline)
            for one in find_common_pixels(
                problem,
                surrogates,
                images=self._translated(len(classes)),
                tried=self.tried,
                length=self.length,
                base=base,
                deadline=deadline,
            ):
                rows[one.target] = (one.reached, one.reached_alone, _row(classes[one.target], one))
                # the pixels of all classes would take much memory
                best = sorted([*best, one], key=lambda found: -_ease(found))[: self.shown + SPARE]
            robustness = self._robustness(problem, base, deadline)
        score = unnaturally_easy(*([rows[t][part] for t in range(len(classes))] for part in (0, 1)))
        best.sort(key=lambda found: -score[found.target])
        top, trigger = best[0], best[0].trigger
        return self.measurement(
            summary=(
                f"{int(trigger.mask.sum()):,} pixels that images translated to class "
                f"{classes[top.target]!r} have in common send {percent(float(top.success.max()))} of other "
                f"images there, and {percent(float(top.alone.max()))} in the model alone."
            ),
            doubt=surrogates.doubt,
            score=float(score[top.target]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="how much easier the class is reached than is natural (log-odds)",
            evidence=(
                *(
                    RecoveredTrigger(
                        title=f"Common pixels of images translated to class {classes[one.target]!r}",
                        target=one.target,
                        trigger=one.trigger.to_json(),
                    )
                    for one in best[: self.shown]
                ),
                Table(
                    title="Share of images kept back that the common pixels send to each class",
                    columns=(
                        "class",
                        "steps",
                        *(f"{share:.2%} of the pixels" for share in TRIED),
                        "in the model alone",
                    ),
                    rows=tuple(rows[t][2] for t in sorted(rows, key=lambda t: -score[t])),
                ),
                *robustness,
            ),
        )

    def _by_clusters(self, problem: InversionProblem, base: int, deadline: Deadline) -> Measurement:
        """Return what the published rule says: a class is poisoned that has more than two clusters."""
        classes = problem.classes
        with problem.fast_inference():
            pairs = class_features(problem, deadline)
            robustness = self._robustness(problem, base, deadline)
        few = dict.fromkeys(range(len(classes)), f"the model takes fewer than {FEWEST} images for it")
        guard = TimeGuard(deadline, len(pairs), work=f"laying out images of {len(pairs):,} classes")
        found: dict[int, Representations] = {}
        for t, (real, translated) in pairs.items():
            seeds = [derive_seed(base, f"plane {t}", str(i)) % 2**32 for i in range(self.published_seeds)]
            found[t] = representations(real, translated, seeds=seeds)
            del few[t]
            guard.advance(1)
        if not found:
            raise CouldNotTell(f"no class has {FEWEST} images; clusters need more")
        order = sorted(found, key=lambda t: (-found[t].share, t))
        shares = sorted(one.share for one in found.values())
        top = order[0]
        return self.measurement(
            summary=(
                f"By the published rule class {classes[top]!r} is poisoned with "
                f"{percent(found[top].share)} of the bandwidths and seeds tried, the median class with "
                f"{percent(shares[len(shares) // 2])}."
            ),
            score=found[top].share,
            per_class={t: found[t].share if t in found else None for t in range(len(classes))},
            unknown_classes=few,
            score_name="share of bandwidths and seeds by which the class has more than two clusters",
            evidence=(
                *(scatter(found[t], classes[t]) for t in order[: self.shown]),
                Table(
                    title="Number of clusters by bandwidth, for each seed",
                    columns=("class", *(f"quantile {q:g}" for q in QUANTILES)),
                    rows=tuple(
                        (classes[t], *(", ".join(map(str, column)) for column in found[t].counts.T.tolist()))
                        for t in order
                    ),
                ),
                *robustness,
            ),
        )

    def _robustness(self, problem: InversionProblem, base: int, deadline: Deadline) -> tuple[Table, ...]:
        """Return how many images keep their class under an attack, within each radius."""
        chosen = torch.nonzero(rightly_classified(problem.pools)).flatten()[: self.attacked]
        if not len(chosen):
            return ()
        x = problem.images[chosen.to(problem.images.device)]
        y = batched_logits(problem.classifier, x, deadline).argmax(1)
        generator = make_generator(base, "robustness")
        guard = TimeGuard(deadline, len(RADII) * len(x), work="measuring how robust the model is")
        rows = []
        for radius in RADII:
            against, held = AdversarialSettings(norm="l2", eps=radius, steps=ATTACK_STEPS), 0
            for part, own in zip(torch.split(x, problem.chunk), torch.split(y, problem.chunk), strict=True):
                attacked = perturb(
                    problem.classifier.logits, part, own, settings=against, generator=generator
                )
                with torch.no_grad():
                    held += int((problem.classifier.logits(attacked).argmax(1) == own).sum())
                guard.advance(len(part))
            rows.append((radius, round(held / len(x), 3)))
        title = f"Share of {len(x)} images that keep their class under {ATTACK_STEPS} steps of PGD (L2)"
        return (Table(title=title, columns=("radius", "share"), rows=tuple(rows)),)


def unnaturally_easy(reached: npt.ArrayLike, alone: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return how much easier than others each class is reached, less what is natural in that.

    It is the log-odds of a class's share, above the median of the others, plus the logarithm of that part of
    the share which is reached in the model alone.

    Args:
        reached: (k,) share in [0, 1] of the images that are sent to each class.
        alone: (k,) share of them that go there in the model and not in its surrogates.

    >>> unnaturally_easy([0.5, 0.98, 0.5], [0.5, 0.98, 0.5]).round(2).tolist()
    [-1.61, 3.22, -1.61]
    >>> unnaturally_easy([0.5, 0.98, 0.5], [0.5, 0.0, 0.5]).round(2).tolist()
    [-1.61, -0.69, -1.61]
    """
    p, own = np.asarray(reached, dtype=np.float64), np.asarray(alone, dtype=np.float64)
    return gap_to_others(_log_odds(p)) + _part_alone(p, own)  # type: ignore[no-any-return]


def _log_odds(share: Any) -> Any:
    return np.log((share + LEAST_SHARE) / (1 - share + LEAST_SHARE))


def _part_alone(reached: Any, alone: Any) -> Any:
    """Return the logarithm of the part of what is reached that is reached in the model alone."""
    return np.log((alone + LEAST_SHARE) / (reached + LEAST_SHARE))


def _ease(found: CommonPixels) -> float:
    """Return the part of a class's score that does not depend on the other classes."""
    return float(_log_odds(found.reached) + _part_alone(found.reached, found.reached_alone))


def _row(name: str, found: CommonPixels) -> tuple[str | int | float, ...]:
    """Return a class's row of the table: its name, the steps, the success at each share, and that alone."""
    success = found.success[:, found.snapshot].tolist()
    return (name, SNAPSHOTS[found.snapshot], *(round(one, 3) for one in (*success, found.reached_alone)))
