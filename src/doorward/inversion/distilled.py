"""Surrogates that never saw a trigger: small networks that learn a model's answers on clean images alone."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.formatting import percent
from doorward.core.seeds import derive_seed, make_generator
from doorward.inversion.problem import InversionProblem
from doorward.models import networks
from doorward.models.batching import batched_logits, margin
from doorward.models.classifier import computes_bfloat16
from doorward.models.fusion import fused
from doorward.models.logit_scale import measure_logit_scale
from doorward.models.spec import InputSpec
from doorward.training.augment import moved, shifted_places

#: The surrogates' network, and between what the shorter side of what they see lies, in pixels.
ARCHITECTURE, SIDES = "small-cnn", (16, 32)
#: How many there are, images that they learn from, how often those go through, images in a step, and AdamW's
#: highest rate.
SURROGATES, IMAGES, EPOCHS, BATCH, RATE = 2, 6_400, 3, 64, 6e-3
#: Share of the clean images on which they have to agree with the model for what they know to count.
KNOWN = 0.5
#: Elements of such images that are made at a time: 64 MiB of them.
ELEMENTS = 1 << 24


class DistilledSurrogates:
    """Learn what a model says of clean images, and answer like it where nothing is planted.

    What is natural in a model, such as a stroke that turns a 3 into an 8, its surrogates learn too; what only
    a trigger activates, no clean image teaches. So a class that a pattern reaches in the model and in every
    surrogate is easy to reach by nature. There are several since each answers as it likes what is like no
    clean image. From a few clean images many are made: mixtures of two, half of them with a square of a third
    cut in, shifted; the model's probabilities on them are what is learnt.

    The transfer of knowledge is that of G. Hinton et al. (2015, arXiv 1503.02531), mixing that of H. Zhang et
    al. (2018, arXiv 1710.09412) and cutting in that of S. Yun et al. (2019, arXiv 1905.04899).

    Args:
        problem: the model and the clean images.
        seed: of the images that are made and of the surrogates' first weights.
        images: how many are made; 6,400 if None.

    Attributes:
        networks: they take images of the size that they were taught on, around 0.
        scales: of the logits of each, on the clean images.
        answers: the model's logits on the clean images (n, k).
        agreement: share of the clean images that they put into the model's class; of the one that knows
            least.

    Raises:
        CouldNotTell: if the deadline is too near.
    """

    def __init__(
        self,
        problem: InversionProblem,
        *,
        seed: int,
        images: int | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        generator, deadline = make_generator(seed, "twins"), deadline or Deadline()
        h, w = problem.images.shape[2:]
        scale = min(max(min(h, w), SIDES[0]), SIDES[1]) / min(h, w)
        self._size = (round(h * scale), round(w * scale))
        varied = Variations.draw(problem.images, images or IMAGES, generator)
        seen, goal = self._lesson(problem, varied, deadline)
        guard = TimeGuard(deadline, SURROGATES * EPOCHS, work="learning what the model says of clean images")
        self.networks = [_taught(seen, goal, generator, guard) for _ in range(SURROGATES)]
        # half as long where the processor multiplies so
        self._dtype = torch.bfloat16 if computes_bfloat16(problem.images.device) else torch.float32
        self._quick = [copy.deepcopy(network).to(self._dtype) for network in self.networks]
        clean = self._seen(problem.images)
        with torch.no_grad():
            logits = [net(clean) for net in self.networks]
        self.scales = [measure_logit_scale(one) for one in logits]
        with problem.fast_inference():
            self.answers = batched_logits(problem.classifier, problem.images, deadline)
        own = self.answers.argmax(1)
        self.agreement = min(float((one.argmax(1) == own).float().mean()) for one in logits)

    @staticmethod
    def of(
        problem: InversionProblem, *, images: int | None = None, deadline: Deadline | None = None
    ) -> DistilledSurrogates:
        """Return the surrogates that all searches on a problem share; the first of them waits for them.

        Raises:
            CouldNotTell: if the deadline is too near; the next search may have more time.
        """
        images = images or IMAGES
        if not DistilledSurrogates.there(problem, images):
            seed = derive_seed(problem.seed, "surrogates")
            problem.shared["surrogates", images] = DistilledSurrogates(
                problem, seed=seed, images=images, deadline=deadline
            )
        shared: DistilledSurrogates = problem.shared["surrogates", images]
        return shared

    @staticmethod
    def there(problem: InversionProblem, images: int) -> bool:
        """Return whether there are surrogates that learnt from so many images and are shared."""
        return ("surrogates", images) in problem.shared

    @property
    def doubt(self) -> str | None:
        """Return why a class that stands out may do so by nature, None where they know the model."""
        if self.agreement >= KNOWN:
            return None
        return (
            "surrogates that learnt from the clean images agree with the model on "
            f"{percent(self.agreement)} of them alone, so that what is natural cannot be told from what is "
            "planted; more images of the kind that the model is made for would help"
        )

    def _lesson(
        self, problem: InversionProblem, varied: Variations, deadline: Deadline
    ) -> tuple[Tensor, Tensor]:
        """Return images as the surrogates take them, and what the model says of each: (n, k).

        No more of them than fit are there in the model's own size at a time.
        """
        guard = TimeGuard(deadline, varied.count, work=f"running the model on {varied.count} images")
        chunk = problem.chunk
        size = chunk * max(1, ELEMENTS // (chunk * problem.images[0].numel()))
        seen, goal = [], []
        with problem.fast_inference(), torch.no_grad():
            for part in torch.split(torch.arange(varied.count), size):
                x = varied.make(part)
                for some in torch.split(x, chunk):
                    goal.append(problem.classifier.logits(some).softmax(1))
                    guard.advance(len(some))
                seen.append(self._seen(x))
        return torch.cat(seen), torch.cat(goal)

    def all_predict(self, x: Tensor, target: int) -> Tensor:
        """Return which images (n, c, h, w) in [0, 1] every surrogate takes for a class: (n,) bool."""
        seen = self._seen(x)
        with torch.no_grad():
            return torch.stack([network(seen).argmax(1) == target for network in self.networks]).all(0)

    def margins(self, x: Tensor, targets: Tensor, turn: int) -> Tensor:
        """Return by how much a surrogate prefers the target of each image: (n,). Differentiable.

        Its logits are brought to the scale that is usual for networks.

        Args:
            x: (n, c, h, w) in [0, 1].
            targets: (n,) class numbers.
            turn: which surrogate; they are counted round and round.
        """
        i = turn % len(self.networks)
        seen = self._seen(x).to(self._dtype, memory_format=torch.channels_last)
        return margin(self.scales[i].apply(self._quick[i](seen).float()), targets)

    def _seen(self, x: Tensor) -> Tensor:
        """Return images as the surrogates take them."""
        if tuple(x.shape[2:]) != self._size:
            x = F.interpolate(x, self._size, mode="bilinear", antialias=True)
        return x - 0.5


def _taught(x: Tensor, goal: Tensor, generator: torch.Generator, guard: TimeGuard) -> nn.Module:
    """Return a network that has learnt probabilities (n, k) on images (n, c, h, w)."""
    n, c, h, w = x.shape
    spec = InputSpec(channels=c, height=h, width=w)
    network = networks.build(ARCHITECTURE, spec, classes=goal.shape[1], generator=generator).to(x.device)
    less = fused(network)  # the same weights, pooled before they are rectified
    network = network if less is None else less
    optimizer = torch.optim.AdamW(network.parameters(), fused=x.device.type in ("cpu", "cuda"))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * math.ceil(n / BATCH))
    kind, reduced = x.device.type, computes_bfloat16(x.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # without the cache: weights that autocast has cast once would never be seen to change
    with torch.enable_grad(), torch.autocast(kind, torch.bfloat16, enabled=reduced, cache_enabled=False):
        for _ in range(EPOCHS):
            for part in torch.split(torch.randperm(n, generator=generator).to(x.device), BATCH):
                shown = x[part].contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(network(shown), goal[part])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            guard.advance(1)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Variations:
    """Many images that are made of a few (n, c, h, w), on their device; `make` makes some of them.

    Half of them are mixtures of two. Into half of them a square of another is cut, of up to half of the side.
    All are shifted a little.

    Attributes:
        weight: (m, 1, 1, 1) of the second image of a mixture.
        mixed, cut: (m, 2) and (m,) which images are mixed, and which is cut in.
        square: (m, h) and (m, w) bool, the rows and the columns of the square that is cut in.
        places: (m, h) and (m, w) the rows and columns that are shown after the shift.
    """

    images: Tensor
    weight: Tensor
    mixed: Tensor
    cut: Tensor
    square: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]

    @property
    def count(self) -> int:
        """Return how many there are."""
        return len(self.cut)

    @staticmethod
    def draw(images: Tensor, count: int, generator: torch.Generator) -> Variations:
        """Draw what `count` images are made of."""
        n, _, h, w = images.shape

        def share(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator).to(images.device)

        def some() -> Tensor:
            return torch.randint(n, (count,), generator=generator).to(images.device)

        weight = torch.where(share(1, 1, 1) < 0.5, share(1, 1, 1), torch.ones((), device=images.device))
        mixed = torch.stack([some(), some()], 1)
        side = (share() * (min(h, w) / 2)).ceil() * (share() < 0.5)
        inside = []
        for length in (h, w):
            at = torch.arange(length, device=images.device)[None]
            first = (share() * (length - side)).floor()[:, None]
            inside.append((at >= first) & (at < first + side[:, None]))
        cut = some()
        return Variations(
            images, weight, mixed, cut, (inside[0], inside[1]), shifted_places(count, (h, w), generator)
        )

    def make(self, which: Tensor) -> Tensor:
        """Return the images at some positions (m,): (m, c, h, w)."""
        own = which.to(self.images.device)
        one, other = (self.images[column] for column in self.mixed[own].unbind(1))
        rows, columns = (part[own] for part in self.square)
        cut = (rows[:, :, None] & columns[:, None, :])[:, None]
        x = torch.where(cut, self.images[self.cut[own]], torch.lerp(one, other, self.weight[own]))
        return moved(x, *(part[which] for part in self.places))
