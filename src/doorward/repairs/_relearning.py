"""Teach a network to answer images with a trigger as it does without, and to keep its other answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from doorward.core.errors import InputError, TrainingDiverged
from doorward.core.records import Kind
from doorward.core.seeds import make_generator
from doorward.models import TorchClassifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.repairs._clean import CleanRepair, check_accuracy
from doorward.repairs._random_triggers import draw_trigger
from doorward.repairs.base import Damage, Mended, network_of
from doorward.training import TrainingProgress
from doorward.training.fine_tune import HALF, KEEP, RATE, vary
from doorward.triggers.base import Trigger

#: What to do where it costs too much accuracy.
ADVICE = "give more clean samples, or allow more (drop)"
#: On clean samples: size of Adam's steps, as a share of the root mean square of the tensor that is changed,
#: and how much more it counts that clean images keep their answers than that triggered ones get theirs.
CLEAN_RATE, CLEAN_KEEP = 0.03, 2.0
#: Universal perturbations that are searched at a time, steps of their search, images of a step, and how many
#: steps of the network they serve.
TARGETS, SEARCH, SEARCHED, SERVED = 4, 8, 8, 25
#: Random triggers that are compared at a time, how many of the best are kept, and images each is tried on.
DRAWN, BEST, TRIED = 64, 16, 32
#: How likely a perturbation is used that leads no image to its class, next to one that leads all.
UNLIKELY = 0.02
#: Root mean square of a perturbation's pixels at most, or which share of the pixels it changes; and how far
#: the search goes in all, in units of the largest change.
RADIUS, FEW, STRIDE = 0.09, 0.03, 2.5


class Disturb(Protocol):
    """Put a trigger on images."""

    def __call__(self, network: TorchClassifier, x: Tensor, step: int) -> Tensor:
        """Return images (n, c, h, w) with a trigger.

        Args:
            network: as it is at this step.
            step: of the training, the first is 1.
        """


class RelearningRepair(CleanRepair):
    """Mend a model of images by teaching it to answer clean ones with a trigger as it does without."""

    modalities = frozenset({"image"})
    mends: ClassVar[frozenset[Kind]] = frozenset({"backdoor"})

    steps: int = Field(500, ge=1, description="How many steps are trained on clean samples")

    def relearnt(
        self, damage: Damage, disturbing: Callable[[Tensor, torch.Generator], Disturb], *, named: str
    ) -> Mended:
        """Return a copy of a model that has learnt to answer the clean samples with a trigger as without.

        Args:
            disturbing: returns what puts a trigger on images, from the clean ones (n, c, h, w) in [0, 1].
            named: the triggers, for the record.

        Raises:
            InputError: if the model cannot be trained, or loses too much accuracy.
            TrainingDiverged: if the loss is no longer finite.
        """
        network = network_of(damage.classifier)
        check_relearnable(network)
        assert damage.clean is not None
        images = to_float(to_tensor(damage.clean, network.spec))
        generator = make_generator(damage.seed, self.method())
        relearn(
            network,
            damage.classifier,
            images,
            disturbing(images, generator),
            steps=self.steps,
            rate=CLEAN_RATE,
            keep=CLEAN_KEEP,
            generator=generator,
            progress=damage.progress,
        )
        check_accuracy(network, damage, self.drop, advice=ADVICE)
        done = (
            f"it was trained for {self.steps} steps on {len(images):,} clean images, with and without {named}"
        )
        return Mended(network, damage.train, done)


def check_relearnable(network: TorchClassifier) -> None:
    """Raise unless a network takes batches of any size, as its training needs.

    Raises:
        InputError: if not.
    """
    if network.batch is not None:
        raise InputError(
            f"the model takes exactly {network.batch} inputs at a time, so it cannot be trained: export it "
            "with a batch of any size, or use pruning"
        )


def relearn(
    network: TorchClassifier,
    original: TorchClassifier,
    images: Tensor,
    disturb: Disturb,
    *,
    steps: int,
    generator: torch.Generator,
    rate: float = RATE,
    keep: float = KEEP,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> None:
    """Teach a network in place to give images with a trigger the answer that the original gives without it.

    Of each step's images half are as they are and half bear a trigger. All are mixtures of two images,
    shifted, so that few images show much of what the original answers. The network stays in evaluation mode:
    statistics of batch normalisation must not become those of a few images.

    Args:
        images: (n, c, h, w) in [0, 1].
        rate: size of Adam's steps, as a share of the root mean square of the tensor that is changed.
        keep: how much more it counts that clean images keep their answers.

    Raises:
        TrainingDiverged: if the loss is no longer finite.
    """
    weights = [p for p in network.module.parameters() if p.requires_grad]
    # in steps that are a share of each tensor's own size, networks of any kind learn without a search
    sizes = [p.detach().square().mean().sqrt().clamp_min(1e-3).item() for p in weights]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate * size} for p, size in zip(weights, sizes, strict=True)]
    )
    for step in range(1, steps + 1):
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * size * (1 - (step - 1) / steps)
        x = vary(images, generator).to(network.device)  # (HALF, c, h, w)
        disturbed = disturb(network, x, step)
        with torch.no_grad():
            goal = original.logits(x).softmax(1)
        z = network.logits(torch.cat([x, disturbed]))
        loss = keep * F.cross_entropy(z[:HALF], goal) + F.cross_entropy(z[HALF:], goal)
        if not bool(loss.isfinite()):
            raise TrainingDiverged(f"unlearning diverged in step {step}: the loss is no longer finite")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if progress is not None:
            progress(TrainingProgress(step, steps, 0, 1, None))


def recovered(triggers: Sequence[Trigger], generator: torch.Generator) -> Disturb:
    """Return what puts one of some triggers, drawn for each step, on images."""

    def put(network: TorchClassifier, x: Tensor, step: int) -> Tensor:
        trigger = triggers[int(torch.randint(len(triggers), (), generator=generator))]
        return trigger.apply(x, generator=generator)

    return put


def by_turns(
    disturbs: Sequence[Disturb], generator: torch.Generator, shares: Sequence[float] | None = None
) -> Disturb:
    """Return what puts on each image what one of some others, drawn for it, puts on it.

    Args:
        shares: how often each is drawn, next to the others; all alike if None.
    """
    often = torch.tensor(shares or [1.0] * len(disturbs))

    def put(network: TorchClassifier, x: Tensor, step: int) -> Tensor:
        made = torch.stack([disturb(network, x, step) for disturb in disturbs])  # (k, n, c, h, w)
        which = torch.multinomial(often, len(x), replacement=True, generator=generator)
        return made[which.to(x.device), torch.arange(len(x), device=x.device)]

    return put


def searched(images: Tensor, generator: torch.Generator) -> Disturb:
    """Return what puts random triggers on images: patches, blends, warps and waves.

    Every few steps new ones are drawn, and those that led most images to one class before are tried again.
    The more images one leads to a class, the more often it is used: so a backdoor of such a kind is found
    and unlearnt without a gradient, also where the trigger is not quite the planted one.

    Args:
        images: (n, c, h, w) in [0, 1], to try triggers on.
    """
    pool: list[Trigger] = []
    likely = torch.zeros(0)

    def put(network: TorchClassifier, x: Tensor, step: int) -> Tensor:
        nonlocal pool, likely
        if (step - 1) % SERVED == 0:
            fresh = DRAWN - len(pool[:BEST])
            pool = [*pool[:BEST], *(draw_trigger(images, generator) for _ in range(fresh))]
            chosen = images[torch.randint(len(images), (TRIED,), generator=generator)].to(network.device)
            likely, order = led(network, pool, chosen).sort(descending=True, stable=True)
            pool, likely = [pool[i] for i in order.tolist()], likely + UNLIKELY
        which = torch.multinomial(likely, len(x), replacement=True, generator=generator)
        return torch.cat([pool[i].apply(one[None]) for i, one in zip(which.tolist(), x, strict=True)])

    return put


def led(network: TorchClassifier, triggers: Sequence[Trigger], images: Tensor) -> Tensor:
    """Return which share of images (n, c, h, w) each trigger leads from other classes to one: (triggers,)."""
    with torch.no_grad():
        before = network.logits(images).argmax(1)
        each = [network.logits(trigger.apply(images)).argmax(1) for trigger in triggers]
    most = [int(after[after != before].bincount(minlength=1).amax()) for after in each]
    return torch.tensor(most) / len(images)


def universal(images: Tensor, targets: Sequence[int], generator: torch.Generator) -> Disturb:
    """Return what adds perturbations to images that lead many of them at once to a class.

    Some change all pixels by little, as a blended picture does, and some few pixels by much, as a patch does.
    They are searched again in the network as it is every few steps, each towards one of some of the targets.
    The more images one leads to its class, the more often it is used: what a backdoor makes easy comes first.

    Args:
        images: (n, c, h, w) in [0, 1], to search on.
    """
    found, likely = torch.zeros(0), torch.zeros(0)

    def put(network: TorchClassifier, x: Tensor, step: int) -> Tensor:
        nonlocal found, likely
        if (step - 1) % SERVED == 0:
            drawn = torch.randperm(len(targets), generator=generator)[:TARGETS]
            towards = [targets[i] for i in drawn.tolist()]
            both = [search(network, images, towards, generator, sparse=sparse) for sparse in (False, True)]
            found = torch.cat([delta for delta, _ in both])
            likely = torch.cat([success for _, success in both]).cpu() + UNLIKELY
        which = torch.multinomial(likely, len(x), replacement=True, generator=generator)
        return (x + found[which.to(x.device)]).clamp(0, 1)

    return put


def search(
    network: TorchClassifier,
    images: Tensor,
    targets: Sequence[int],
    generator: torch.Generator,
    *,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Search for each target a perturbation that leads images there.

    Args:
        images: (n, c, h, w) in [0, 1].
        sparse: whether it changes few pixels by as much as it takes; else all of them, by little.

    Returns:
        perturbations (k, c, h, w), and which share of some images each led to its target (k,) on the way.
    """
    k, shape = len(targets), tuple(images.shape[1:])
    delta = 0.01 * torch.randn(k, *shape, generator=generator).to(network.device)
    goal = torch.tensor(targets, device=network.device).repeat(SEARCHED)
    with network.frozen():
        for _ in range(SEARCH):
            chosen = torch.randint(len(images), (SEARCHED,), generator=generator)
            x, delta = images[chosen].to(network.device), delta.requires_grad_()
            z = network.logits((x[:, None] + delta).clamp(0, 1).flatten(0, 1))  # (SEARCHED * k, classes)
            success = (z.argmax(1) == goal).float().reshape(SEARCHED, k).mean(0)
            (slope,) = torch.autograd.grad(F.cross_entropy(z, goal), delta)
            delta = (_few if sparse else _little)(delta.detach(), slope)
    return delta, success


def _little(delta: Tensor, slope: Tensor) -> Tensor:
    """Step down the slope, and keep each perturbation (k, c, h, w) within a ball."""
    longest = RADIUS * math.sqrt(math.prod(delta.shape[1:]))
    delta = delta - STRIDE / SEARCH * longest * slope / _length(slope).clamp_min(1e-12)
    return delta * (longest / _length(delta).clamp_min(1e-12)).clamp_max(1)


def _few(delta: Tensor, slope: Tensor) -> Tensor:
    """Step down the slope where it is steepest, and keep the pixels that are changed most."""
    steepest = slope.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    delta = (delta - STRIDE / SEARCH * slope / steepest).clamp(-1, 1)
    change = delta.abs().sum(1, keepdim=True)  # (k, 1, h, w)
    count = max(1, round(FEW * change[0].numel()))
    least = change.flatten(1).topk(count, dim=1).values[:, -1]
    return delta * (change >= least[:, None, None, None])


def _length(x: Tensor) -> Tensor:
    """Return the Euclidean length of each image, as (n, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return length[:, None, None, None]
