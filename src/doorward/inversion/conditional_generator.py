"""A conditional generator of perturbations: for every class at once, small ones that send images to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.seeds import make_generator
from doorward.inversion.adam import Adam
from doorward.inversion.problem import InversionProblem
from doorward.models.batching import batched_logits

#: Numbers of noise that a perturbation is made of, and units of the hidden layer.
NOISE, HIDDEN = 16, 32
#: Where masks start before the sigmoid: .1. And Adam's step for what all classes share, as a part of that for
#: what each class has of its own.
FAINT, COMMON = -2.2, 0.1
#: How much the running success takes of each step, and by how much the logarithm of a class's weight moves.
SHARE, PACE = 0.2, 0.1


class ConditionalGenerator:
    """Make a perturbation from noise z and a class t: `sigmoid(mask) * tanh(pattern)`.

    Noise and class go through a hidden layer that all classes share. Mask (one for all channels) and pattern
    are linear in its units, with an offset of each class: G(z, t) = sigmoid(a_t + A h) tanh(b_t + B h),
    h = relu(W z + e_t).

    Args:
        shape: of one image: channels, height, width.
        rate: Adam's step.
    """

    def __init__(
        self,
        classes: int,
        shape: tuple[int, int, int],
        rate: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        c, h, w = self.shape = shape

        def normal(*size: int, by: float) -> Tensor:
            return by * torch.randn(*size, generator=generator).to(device)

        common = (
            normal(NOISE, HIDDEN, by=1 / math.sqrt(NOISE)),
            normal(HIDDEN, h * w, by=0.1 / math.sqrt(HIDDEN)),
            normal(HIDDEN, c * h * w, by=0.1 / math.sqrt(HIDDEN)),
        )
        own = (
            normal(classes, HIDDEN, by=1.0),
            FAINT + normal(classes, h * w, by=0.1),
            normal(classes, c * h * w, by=0.5),
        )
        self._adams = [*(Adam(x, COMMON * rate) for x in common), *(Adam(x, rate) for x in own)]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Return all tensors that are learnt: those that all classes share, then each class's own."""
        return tuple(adam.at for adam in self._adams)

    def make(self, z: Tensor, parameters: tuple[Tensor, ...] | None = None) -> Tensor:
        """Return a perturbation of every class from noise z (k, b, NOISE): (k, b, c, h, w) in [-1, 1]."""
        noise, to_mask, to_pattern, embedded, mask, pattern = parameters or self.parameters
        (c, h, w), (k, b) = self.shape, z.shape[:2]
        hidden = (z @ noise + embedded[:, None]).relu()  # (k, b, HIDDEN)
        where = (hidden @ to_mask + mask[:, None]).sigmoid().view(k, b, 1, h, w)
        what = (hidden @ to_pattern + pattern[:, None]).tanh().view(k, b, c, h, w)
        return where * what

    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """Take one step against gradients of the parameters."""
        for adam, gradient in zip(self._adams, gradients, strict=True):
            adam.step(gradient)


@dataclass(frozen=True)
class Perturbations:
    """What a generator found for k classes.

    Attributes:
        norm: (k,) mean over noise of the sum of the absolute values, in pixels: divided by the channels; the
            number of pixels where the wanted success was never held.
        picture: (k, c, h, w) the mean perturbation.
        success: (k,) share of the source images that the mean perturbation sends to the class.
        reached: (k,) bool, whether the wanted success was held.
    """

    norm: Tensor
    picture: Tensor
    success: Tensor
    reached: Tensor


def learn_perturbations(
    problem: InversionProblem,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    success: float,
    initial_weight: float,
    realism: float,
    free: float,
    generator: torch.Generator,
    deadline: Deadline,
) -> Perturbations:
    """Learn one generator whose perturbations send images of other classes to every class.

    Minimises, summed over classes t, `NLL(f(x + G(z, t)), t) + realism (p_t - 1)^2 + weight_t
    max(0, |G(z, t)|_1 - free)`: the losses of the trigger, of the adversary and of the perturbation. The
    model is the fixed discriminator. Each class's weight grows while the wanted success is held and falls
    while it is not.

    Args:
        batch_size: source images, and draws of noise, for each class and step.
        success: share of the sources that must go to the class.
        realism: weight of the adversary's loss.
        free: norm, in pixels, up to which a perturbation costs nothing.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    k, device = len(problem.classes), problem.images.device
    base = int(torch.randint(2**62, (), generator=generator))
    made = ConditionalGenerator(k, problem.classifier.spec.shape, learning_rate, generator, device)
    best = _Best.none(k, made.shape, device)
    weight = torch.full((k,), math.log(initial_weight), device=device)
    draw = _Draws(problem, batch_size, [make_generator(base, str(t)) for t in range(k)])
    guard = TimeGuard(deadline, k * steps, work=f"learning perturbations of {k:,} classes")
    with problem.fast_inference():
        for _ in range(steps):
            sources, z = draw()
            at = tuple(one.detach().requires_grad_() for one in made.parameters)
            delta = made.make(z, at)  # (k, b, c, h, w)
            aim, hits = _aim(problem, (sources + delta).clamp(0, 1), realism)
            norm = delta.abs().flatten(2).sum(2).mean(1) / made.shape[0]  # (k,)
            loss = (aim + weight.exp() * (norm - free).relu()).sum()
            made.step(torch.autograd.grad(loss, at))
            best.update(hits, norm.detach(), delta.detach().mean(1), success)
            # full speed upwards, a third of it downwards while the wanted success is not held
            error = (best.running - success) / (1 - success)
            weight.add_(PACE * torch.where(error > 0, error, (0.3 * error).clamp_min(-1)))
            guard.advance(k)
    return best.told(_success(problem, best.picture, deadline))


def _aim(problem: InversionProblem, x: Tensor, realism: float) -> tuple[Tensor, Tensor]:
    """Return the losses of the trigger and of the adversary for each class (k,), and the share of hits (k,).

    Args:
        x: (k, b, c, h, w) images with the perturbations of each class.
    """
    k, b = x.shape[:2]
    goal = torch.arange(k, device=x.device).repeat_interleave(b)
    parts = torch.split(x.flatten(0, 1), problem.chunk)
    logits = torch.cat([problem.classifier.logits(part) for part in parts])
    probability = logits.softmax(1).gather(1, goal[:, None]).squeeze(1)
    loss = F.cross_entropy(logits, goal, reduction="none") + realism * (probability - 1).square()
    hits = (logits.detach().argmax(1) == goal).float()
    return loss.view(k, b).mean(1), hits.view(k, b).mean(1)


def _success(problem: InversionProblem, pictures: Tensor, deadline: Deadline) -> Tensor:
    """Return the share of all sources that each class's perturbation (k, c, h, w) sends to it: (k,)."""
    shares = []
    for target, picture in enumerate(pictures):
        sources = problem.images[problem.pools.outside[:, target].to(problem.images.device)]
        logits = batched_logits(problem.classifier, (sources + picture).clamp(0, 1), deadline)
        shares.append((logits.argmax(1) == target).float().mean())
    return torch.stack(shares)


@dataclass(frozen=True)
class _Draws:
    """Sources and noise for each class: (k, b, c, h, w) and (k, b, NOISE), each by the class's generator."""

    problem: InversionProblem
    size: int
    own: list[torch.Generator]

    def __call__(self) -> tuple[Tensor, Tensor]:
        device = self.problem.images.device
        rows = self.problem.pools.draw(torch.arange(len(self.own)), self.size, self.own)
        z = torch.stack([torch.randn(self.size, NOISE, generator=g) for g in self.own])
        return self.problem.images[rows.to(device)], z.to(device)


@dataclass
class _Best:
    """The smallest perturbation of each class that held the wanted success, and the running success."""

    running: Tensor
    norm: Tensor
    picture: Tensor

    @staticmethod
    def none(k: int, shape: tuple[int, int, int], device: torch.device) -> _Best:
        zeros = torch.zeros(k, device=device)
        return _Best(zeros.clone(), zeros + torch.inf, torch.zeros(k, *shape, device=device))

    def update(self, hits: Tensor, norm: Tensor, picture: Tensor, success: float) -> None:
        """Take over what a step made, where it is smaller; hits (k,) is the share that went to the class."""
        self.running.lerp_(hits, SHARE)
        # the running success lags behind a shrinking perturbation, so this step has to succeed as well
        better = (torch.minimum(self.running, hits) >= success) & (norm < self.norm)
        self.norm[better], self.picture[better] = norm[better], picture[better]

    def told(self, success: Tensor) -> Perturbations:
        """Return what was found; success (k,) is that of the pictures on all sources."""
        reached, (h, w) = self.norm.isfinite(), self.picture.shape[2:]
        return Perturbations(torch.where(reached, self.norm, float(h * w)), self.picture, success, reached)
