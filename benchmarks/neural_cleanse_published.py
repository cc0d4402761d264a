"""Neural Cleanse as published: one class after the other, by the schedule of its authors.

Written plainly, to compare with; `doorward.inversion.masks` is what Doorward uses.

Source: B. Wang et al., Neural Cleanse, IEEE S&P 2019, doi 10.1109/SP.2019.00031, and the settings that the
authors gave out with it (GTSRB example).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.models import Classifier


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The authors' settings.

    Attributes:
        steps, mini_batches, batch_size: 1,000 steps of 31 batches of 32 images, about 1,000 images a step.
        success: share of a step's images that must go to the target for the step to succeed.
        first_cost: weight of the mask's size once the attack succeeds; until then it is 0.
        patience: successes (failures) in a row after which the cost goes up (down).
        up, down: by what the cost is multiplied, or divided.
        stop_after: steps without a smaller mask after which a class is done; None runs all steps.
    """

    steps: int = 1000
    mini_batches: int = 31
    batch_size: int = 32
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    success: float = 0.99
    first_cost: float = 1e-3
    patience: int = 5
    up: float = 2.0
    down: float = 2.0**1.5
    stop_after: int | None = 25


@dataclass(frozen=True)
class Found:
    """The trigger of one class.

    Attributes:
        mask: (1, h, w) in [0, 1]; the last one where no step ever succeeded.
        pattern: (c, h, w) in [0, 1].
        norm: sum of the mask.
        reached: whether a step succeeded.
        steps: steps that were run.
    """

    target: int
    mask: Tensor
    pattern: Tensor
    norm: float
    reached: bool
    steps: int


@dataclass
class Cost:
    """Keep the weight of the mask's size: it doubles while the attack succeeds, and falls while it fails."""

    schedule: Schedule
    value: float = 0.0
    went_up: bool = False
    went_down: bool = False
    _start: int = field(default=0, repr=False)
    _up: int = field(default=0, repr=False)
    _down: int = field(default=0, repr=False)

    def update(self, succeeded: bool) -> None:
        """Take note of one step."""
        s = self.schedule
        self._start = self._start + 1 if self.value == 0 and succeeded else 0
        if self._start >= s.patience:
            self.value = s.first_cost
            self._up = self._down = 0
            self.went_up = self.went_down = False
        self._up, self._down = (self._up + 1, 0) if succeeded else (0, self._down + 1)
        if self._up >= s.patience:
            self._up, self.value, self.went_up = 0, self.value * s.up, True
        elif self._down >= s.patience:
            self._down, self.value, self.went_down = 0, self.value / s.down, True


def _shuffled(images: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches for ever, going through all images in a new order each time."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(len(images), generator=generator)])
        yield images[left[:size].to(images.device)]
        left = left[size:]


def invert_class(
    classifier: Classifier, images: Tensor, target: int, *, schedule: Schedule, generator: torch.Generator
) -> Found:
    """Find a small mask and a pattern that send images (n, c, h, w) of all classes to the target.

    Both live behind a tanh. Images of the target class itself are among the sources, as with the authors.
    """
    s, (c, h, w), device = schedule, images.shape[1:], classifier.device
    start = torch.rand(1 + c, h, w, generator=generator)  # uniform mask and pattern
    behind = torch.atanh((start - 0.5) * (2 - 1e-7)).clamp(-10, 10)
    mask_at, pattern_at = (
        part.to(device).requires_grad_() for part in (behind[:1].clone(), behind[1:].clone())
    )
    optimizer = torch.optim.Adam([mask_at, pattern_at], lr=s.learning_rate, betas=s.betas, eps=1e-7)
    batches = _shuffled(images.to(device), s.batch_size, generator)
    wanted = torch.full((s.batch_size,), target, device=device)
    cost, best, smallest_seen, idle = Cost(s), float("inf"), float("inf"), 0
    kept: tuple[Tensor, Tensor] | None = None
    steps = 0
    while steps < s.steps:
        steps += 1
        hits, sizes = torch.zeros((), device=device), torch.zeros((), device=device)
        for _ in range(s.mini_batches):
            mask, pattern = mask_at.tanh() / 2 + 0.5, pattern_at.tanh() / 2 + 0.5
            logits = classifier.logits((1 - mask) * next(batches) + mask * pattern)
            size = mask.sum()
            loss = F.cross_entropy(logits, wanted) + cost.value * size
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            hits += (logits.detach().argmax(1) == target).float().mean()
            sizes += size.detach()
        succeeded = hits.item() / s.mini_batches >= s.success
        if succeeded and sizes.item() / s.mini_batches < best:
            best = sizes.item() / s.mini_batches
            kept = (mask_at.detach().tanh() / 2 + 0.5, pattern_at.detach().tanh() / 2 + 0.5)
        if s.stop_after is not None:
            if best < float("inf"):
                idle = idle + 1 if best >= smallest_seen else 0
            smallest_seen = min(best, smallest_seen)
            if cost.went_up and cost.went_down and idle >= s.stop_after:
                break
        cost.update(succeeded)
    mask, pattern = kept or (mask_at.detach().tanh() / 2 + 0.5, pattern_at.detach().tanh() / 2 + 0.5)
    return Found(target, mask, pattern, float(mask.sum()), kept is not None, steps)
