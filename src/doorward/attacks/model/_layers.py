"""Networks that attacks put together: layers with given weights, and classifiers of changed networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doorward.models.classifier import TorchClassifier


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer with these weights; torch's own would be drawn from the global generator."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.float())
    if bias is not None:
        layer.bias = nn.Parameter(bias.float())
    return layer


def changed(classifier: TorchClassifier, module: nn.Module) -> TorchClassifier:
    """Return a classifier of another network that takes and gives what this one's does."""
    return TorchClassifier(
        module.to(classifier.device),
        classifier.spec,
        classifier.classes,
        format=classifier.format,
        architecture=classifier.architecture,
        batch=classifier.batch,
    )
