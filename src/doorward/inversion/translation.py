"""Images translated to a class: moved far along the gradient, to where a model sees the class in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.budget import TimeGuard
from doorward.models import Classifier
from doorward.models.batching import chunk_images


def target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits (n, k) with targets (n,): (n,).

    It is made of the target's log odds, so that its gradient does not vanish where the model is sure.
    """
    own = logits.gather(1, targets[:, None]).squeeze(1)
    others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    return F.softplus(others - own)


def target_gradient(classifier: Classifier, x: Tensor, targets: Tensor, guard: TimeGuard) -> Tensor:
    """Return the gradient of each image's loss, (n, c, h, w), for any number of images.

    Args:
        x, targets: (n, c, h, w) in [0, 1] and (n,), on the classifier's device.
        guard: counts images.
    """
    parts, chunk = [], chunk_images(classifier)
    for some, wanted in zip(torch.split(x, chunk), torch.split(targets, chunk), strict=True):
        some = some.detach().requires_grad_()
        with torch.enable_grad():
            loss = target_loss(classifier.logits(some).float(), wanted).sum()
        parts.append(torch.autograd.grad(loss, some)[0])
        guard.advance(len(some))
    return torch.cat(parts)


def translate(
    classifier: Classifier,
    x: Tensor,
    targets: Tensor,
    *,
    length: float,
    snapshots: Sequence[int],
    guard: TimeGuard,
) -> list[Tensor]:
    """Return images (n, c, h, w) in [0, 1] after so many steps to their targets, for each number of steps.

    That is targeted PGD without a ball: every step has one L2 length.

    Args:
        length: of a step, in pixel values.
        snapshots: numbers of steps, in ascending order.
        guard: counts images, once a step.
    """
    taken = []
    for step in range(1, snapshots[-1] + 1):
        gradient = target_gradient(classifier, x, targets, guard)
        # scaled first, since squares of a sure model's gradients may be too small for float32
        tiny = torch.finfo(gradient.dtype).tiny
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
        norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
        x = (x - length * gradient / norm.clamp_min(tiny)).clamp_(0, 1)
        if step in snapshots:
            taken.append(x)
    return taken
