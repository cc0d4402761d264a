"""Neural Cleanse: invert the smallest trigger of every class and look for one that is far too small."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from doorward.detectors.base import Detector
from doorward.errors import CouldNotTell
from doorward.inversion import Inversion, SourcePools, invert, outside_class
from doorward.methods import Deadline
from doorward.modalities.image import to_float, to_tensor
from doorward.outliers import Spread, deleted_residuals, mad_index
from doorward.records import Finding, RecoveredTrigger, Table
from doorward.registry import register
from doorward.subject import Subject

#: How far log norms spread over the classes of clean models: .24 to .32 in five of CIFAR-10, which no suite
#: judges. Other data differ, so it weighs little. The bank of clean models will take its place.
USUAL = Spread(0.3, 5)


@register("detector")
class NeuralCleanse(Detector):
    """Invert a small trigger for every class and flag the class whose trigger is an outlier in size.

    The size is the L1 norm of the mask, compared on a log scale: a class needs `log(norm)` far below that of
    the others. We depart from the paper in the statistic (a one-sided, moderated Grubbs test on log norms
    instead of a MAD index above 2, which flags 17 to 33 % of clean ten-class models) and in the optimisation
    (see `doorward.inversion`). The paper's index is in the evidence table.
    """

    title = "Neural Cleanse"
    source = "B. Wang et al., Neural Cleanse, IEEE S&P 2019, doi 10.1109/SP.2019.00031"
    limits = (
        "Sees backdoors that a small, fixed, visible patch can wake; large, blended, warped, input-dependent "
        "or source-specific triggers, all-to-all backdoors and modules without gradients can escape it."
    )
    atlas = ("AML.T0018.000", "AML.T0020", "AML.T0043.004")
    needs = frozenset({"gradients", "clean"})
    order: ClassVar[int] = 20

    steps: int = Field(150, ge=10, le=10_000, description="Optimisation steps for every class")
    batch_size: int = Field(16, ge=1, le=1024, description="Images per class and step")
    many_classes: int = Field(20, ge=1, description="Classes above which the first run halves the batch")
    learning_rate: float = Field(0.3, gt=0, description="Adam's step in the sigmoid's argument")
    success: float = Field(0.93, gt=0.5, lt=1, description="Share of source images a trigger must convert")
    restarts: int = Field(2, ge=0, le=20, description="Further runs for the classes in doubt")
    doubtful: int = Field(3, ge=1, description="How many of the most suspicious classes are run again")
    level_of_test: float = Field(0.045, gt=0, lt=1, description="Its share of the 5 % a scan may be wrong")
    min_images: int = Field(20, ge=2, description="Clean images below which nothing is concluded")

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Return a finding with one score per class: how far its log norm lies below the others'."""
        classifier, samples = subject.classifier, subject.clean
        assert classifier is not None
        assert samples is not None
        if len(samples) < self.min_images:
            raise CouldNotTell(f"{len(samples)} clean images are too few; give at least {self.min_images}")
        images = to_float(to_tensor(samples, classifier.spec))  # (n, c, h, w)
        labels = None if samples.labels is None else torch.from_numpy(samples.labels)
        pools = SourcePools(outside_class(classifier, images, labels, deadline))

        k = len(classifier.classes)

        def run(targets: torch.Tensor, to_come: int) -> Inversion:
            few = len(targets) <= self.many_classes
            return invert(
                classifier,
                images,
                pools,
                targets,
                steps=self.steps,
                batch_size=self.batch_size if few else max(1, self.batch_size // 2),
                learning_rate=self.learning_rate,
                success=self.success,
                generator=generator,
                deadline=deadline,
                to_come=to_come,
            )

        first = run(torch.arange(k), self.restarts * min(self.doubtful, k))
        runs = [first.norm.cpu().numpy().astype(np.float64)]
        best = {t: (float(first.norm[t]), first, t) for t in range(k)}
        doubtful = np.argsort(runs[0])[: self.doubtful]
        for to_come in reversed(range(self.restarts)):
            again = run(torch.from_numpy(doubtful), to_come * len(doubtful))
            norms = np.full(k, np.nan)
            norms[doubtful] = again.norm.cpu().numpy()
            runs.append(norms)
            for position, target in enumerate(doubtful.tolist()):
                best[target] = min(
                    best[target], (float(again.norm[position]), again, position), key=lambda found: found[0]
                )
        # the median: the least of several runs would make an outlier of any class that is run again
        norms = np.nanmedian(runs, axis=0)
        test = deleted_residuals(-np.log(norms), level=self.level_of_test, prior=USUAL)
        return self._conclude(classifier.classes, norms, test.index, test.critical, test.p_value, best)

    def _conclude(
        self,
        classes: tuple[str, ...],
        norms: np.ndarray[tuple[int], np.dtype[np.float64]],
        index: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
        critical: float,
        p_value: float,
        best: dict[int, tuple[float, Inversion, int]],
    ) -> Finding:
        order = np.argsort(norms)
        top = int(order[0])
        flagged = index[top] >= critical
        targets = tuple(int(t) for t in order if index[t] >= critical)
        shown = targets or (top,)
        median = float(np.median(norms))
        summary = (
            f"A mask of {norms[top]:.1f} pixels sends other images to class {classes[top]!r}; "
            f"the median class needs {median:.1f}."
        )
        triggers = [
            RecoveredTrigger(
                title=f"Smallest trigger found for class {classes[t]!r}",
                target=t,
                trigger=best[t][1].trigger(best[t][2]).to_json(),
            )
            for t in shown
        ]
        paper = mad_index(-norms)
        table = Table(
            title="Mask size by class",
            columns=(
                "class",
                "mask norm (pixels)",
                "success on images used",
                "index",
                "MAD index (paper)",
            ),
            rows=tuple(
                (
                    classes[t],
                    round(float(norms[t]), 2),
                    round(float(best[t][1].success[best[t][2]]), 3),
                    round(float(index[t]), 2),
                    round(float(paper[t]), 2) if np.isfinite(paper[t]) else None,
                )
                for t in order.tolist()
            ),
        )
        return self.finding(
            verdict="suspicious" if flagged else "nothing_found",
            summary=summary,
            score=float(index[top]),
            threshold=critical,
            p_value=p_value,
            targets=targets,
            per_class={t: float(value) for t, value in enumerate(index)},
            score_name="how far log mask size lies below the other classes (Student's t)",
            evidence=(*triggers, table),
        )
