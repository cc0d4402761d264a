"""Universal blend search: how faint a picture over the whole image sends images to each class."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.formatting import percent
from doorward.core.records import Measurement, RecoveredTrigger, Table
from doorward.core.seeds import make_generator
from doorward.detectors.model.base import ImageDetector
from doorward.inversion.adam import Adam
from doorward.inversion.masks import trigger_success
from doorward.inversion.problem import InversionProblem
from doorward.inversion.uniform_blend import colours, uniform_opacity
from doorward.methods.base import EVIDENCE_ONLY
from doorward.methods.registry import register
from doorward.models.batching import margin
from doorward.stats.outliers import gap_to_nearest
from doorward.triggers.masked import MaskedPattern

#: Between what the logarithm of the opacity moves: one step of 8 bits is 1/255.
FAINTEST, STRONGEST = math.log(1 / 255), math.log(0.9)


@register("detector")
class BlendSearch(ImageDetector):
    """Find how faint a picture may be that, blended in, sends images to each class, and compare the classes.

    Use it on image classifiers with gradients, with 20 clean images or more, against triggers all over the
    image.

    A picture of the image's size is moved for every class (margin loss); how much of it images show falls as
    long as enough of them go to the class, and rises otherwise. Networks can be steered towards any class by
    faint pictures, but towards the target of a backdoor whose trigger is spread over the image by far fainter
    ones.

    What counts is how many times fainter a class's picture is than a uniform blend of the same colour that
    does the same. The score is how far, on a log scale, that lies above that of the next class: classes of
    clean models lie along a line, of which the first is seldom far ahead.

    This is Neural Cleanse with one number in place of the mask; the score is ours, as its use of pictures.
    """

    title = "Universal blend search"
    source = (
        "after B. Wang et al., IEEE S&P 2019, and S. Moosavi-Dezfooli et al., CVPR 2017; the score is ours"
    )
    limits = (
        "It can miss small patches, pictures of one constant colour, source-specific triggers, many that "
        "bend the image and several targets at once, and it needs gradients."
    )
    order: ClassVar[int] = 16

    steps: int = Field(100, ge=1, le=10_000, description="Steps for every class")
    batch_size: int = Field(8, ge=1, le=1024, description="Images per class and step")
    learning_rate: float = Field(0.3, gt=0, description="Adam's step in the sigmoid's argument")
    success: float = Field(0.93, gt=0.5, lt=1, description="Share of source images that must go to the class")
    opacity: float = Field(0.3, gt=0, lt=1, description="How much of the pictures images show at first")
    shown: int = Field(
        3,
        ge=1,
        description="Of how many classes the picture is kept as evidence",
        json_schema_extra=EVIDENCE_ONLY,
    )

    def score_classes(
        self, problem: InversionProblem, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a finding with one score per class: how far it is ahead of the next in faintness."""
        k, (h, w) = len(problem.classes), problem.images.shape[2:]
        with problem.fast_inference():
            opacity, picture = self._search(problem, generator, deadline)
            mask = opacity[:, None, None, None].expand(k, 1, h, w)
            uniform = uniform_opacity(problem, colours(mask, picture), deadline)
        targets = torch.arange(k)
        success = trigger_success(
            problem.classifier, problem.images, problem.pools.outside, targets, mask, picture, deadline
        ).tolist()
        fainter = (uniform / opacity).clamp_min(1).cpu().double().numpy()
        score = gap_to_nearest(np.log(fainter))
        order, classes = np.argsort(-score).tolist(), problem.classes
        top = order[0]
        return self.measurement(
            summary=(
                f"A picture blended in at {percent(float(opacity[top]))} sends other images to class "
                f"{classes[top]!r}, {fainter[top]:.1f} times fainter than a uniform blend; the "
                f"next class's is {fainter[order[1]]:.1f} times fainter."
            ),
            score=float(score[top]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="how much fainter the picture is than a uniform blend, less the next class's (log)",
            evidence=(
                *(
                    RecoveredTrigger(
                        title=f"Picture recovered for class {classes[t]!r}",
                        target=t,
                        trigger=MaskedPattern(mask=mask[t].cpu().clone(), pattern=picture[t].cpu()).to_json(),
                    )
                    for t in order[: self.shown]
                ),
                Table(
                    title="Faintest picture by class",
                    columns=(
                        "class",
                        "opacity",
                        "success on images used",
                        "opacity of a uniform blend",
                        "times fainter than that",
                    ),
                    rows=tuple(
                        (
                            classes[t],
                            round(float(opacity[t]), 4),
                            round(success[t], 3),
                            round(float(uniform[t]), 4) if uniform[t] < 1 else None,
                            round(float(fainter[t]), 2),
                        )
                        for t in order
                    ),
                ),
            ),
        )

    def _search(
        self, problem: InversionProblem, generator: torch.Generator, deadline: Deadline
    ) -> tuple[Tensor, Tensor]:
        """Return how faint each class's picture may be, and the picture: (k,) and (k, c, h, w) in [0, 1].

        A class that was never held gets an opacity of 1.
        """
        images, b, device = problem.images, self.batch_size, problem.images.device
        k = problem.pools.outside.shape[1]
        base = int(torch.randint(2**62, (), generator=generator))
        guard = TimeGuard(deadline, k * self.steps, work=f"searching faint pictures for {k:,} classes")
        opacities, pictures = [], []
        for group in torch.split(torch.arange(k), max(1, problem.chunk // b)):
            g = len(group)
            # each class draws from a generator of its own, so that the grouping changes nothing
            own = [make_generator(base, str(t)) for t in group.tolist()]
            at = torch.stack([torch.randn(images.shape[1:], generator=one) * 0.5 for one in own]).to(device)
            adam, where = Adam(at, self.learning_rate), group.repeat_interleave(b).to(device)
            faint = torch.full((g,), math.log(self.opacity), device=device)  # the logarithm of the opacity
            success_ema, best = torch.zeros(g, device=device), torch.ones(g, device=device)
            kept = at.sigmoid()
            for _ in range(self.steps):
                x = images[problem.pools.draw(group, b, own).to(device)]  # (g, b, c, h, w)
                picture, opacity = at.sigmoid().requires_grad_(), faint.exp()
                shown = torch.lerp(x, picture[:, None].expand_as(x), opacity.view(g, 1, 1, 1, 1).expand_as(x))
                gap = margin(problem.classifier.logits(shown.flatten(0, 1)), where).view(g, b)
                (gradient,) = torch.autograd.grad(F.softplus(-gap).mean(1).sum(), picture)
                picture = picture.detach()
                now = (gap.detach() > 0).float().mean(1)  # (g,)
                success_ema.lerp_(now, 0.2)
                # the running success lags behind, so this step has to succeed as well
                better = (torch.minimum(success_ema, now) >= self.success) & (opacity < best)
                best[better], kept[better] = opacity[better], picture[better]
                adam.step(gradient * picture * (1 - picture))  # the chain rule through the sigmoid
                # full speed downwards, at most a third of it upwards while the wanted success is not held
                error = ((success_ema - self.success) / (1 - self.success)).clamp_min(-1)
                faint = (faint - 0.1 * torch.where(error > 0, error, 0.3 * error)).clamp(FAINTEST, STRONGEST)
                guard.advance(g)
            opacities.append(best)
            pictures.append(kept)
        return torch.cat(opacities), torch.cat(pictures)
