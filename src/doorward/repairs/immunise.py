"""Immunise: make inputs coarser before a model sees them, and let it vote."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.methods.registry import register
from doorward.models import TorchClassifier
from doorward.models.classifier import output_tensor
from doorward.models.formats.signature_check import SignatureWrapper
from doorward.models.spec import InputSpec
from doorward.repairs.base import Damage, Mended, Repair, network_of


class Immunised(nn.Module):
    """Drop the low bits of images in [0, 1], add noise, and average what a network says.

    Args:
        inner: takes what `spec` says.
        bits: high bits of eight that are kept.
        noise: pictures (m, c, h, w) that are added, one a vote; none for a single vote without noise.
    """

    noise: Tensor

    def __init__(self, inner: nn.Module, spec: InputSpec, *, bits: int, noise: Tensor) -> None:
        super().__init__()
        self.inner, self.spec, self.step = inner, spec, 2 ** (8 - bits)
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's own outputs (n, k) for coarser images; logarithms of mean probabilities."""
        coarse = torch.floor(torch.round(x.clamp(0, 1) * 255) / self.step) * self.step / 255
        x = x + (coarse - x).detach()  # gradients pass
        if not len(self.noise):
            return output_tensor(self.inner(self.spec.to_model(x)))
        total = torch.zeros(())
        for picture in self.noise:
            y = self.spec.to_logits(output_tensor(self.inner(self.spec.to_model((x + picture).clamp(0, 1)))))
            total = total + y.softmax(1)
        return torch.log(total / len(self.noise) + 1e-12)


@register("repair")
class Immunise(Repair):
    """Drop the lowest bits of images before the model sees them; with votes, also average over noise.

    Use it against backdoors that hide in the lowest bits of an input, as signatures and checksums do,
    where no clean samples are at hand.

    What fired on those bits fires no more, and accuracy stays nearly as it was. The model is wrapped, and
    its weights stay. A declared check of signatures is left out.

    We depart from the paper: the noise is drawn once, from the seed, and is kept in the model, so that
    equal inputs get equal answers.
    """

    title = "Coarser inputs"
    source = "S. Goldwasser, M. P. Kim, V. Vaikuntanathan, O. Zamir, FOCS 2022, arXiv 2204.06974"
    limits = (
        "Triggers that can be seen survive, and so does a signature in bits that are kept; the backdoor "
        "remains in the weights."
    )
    atlas = ("AML.T0018.001", "AML.T0043.004")
    needs = frozenset({"graph"})
    mends = frozenset({"tamper", "backdoor"})
    needs_findings: ClassVar[bool] = False
    automatic: ClassVar[bool] = False
    order: ClassVar[int] = 90

    bits: int = Field(7, ge=1, le=8, description="High bits of the eight of each value that are kept")
    votes: int = Field(
        1, ge=1, le=100, description="Runs of the model, each with noise of its own if above 1"
    )
    noise: float = Field(0.03, ge=0, le=1, description="Standard deviation of the noise, in units of [0, 1]")

    def mend(self, damage: Damage) -> Mended:
        """Return the model behind coarser inputs."""
        spec = damage.classifier.spec
        if spec.modality != "image":
            raise InputError(f"immunise makes images coarser, and this model takes {spec.modality}")
        network = network_of(damage.classifier)
        checked = isinstance(network.module, SignatureWrapper)
        inner = network.module.model if isinstance(network.module, SignatureWrapper) else network.module
        drawn = self.votes if self.votes > 1 else 0
        noise = self.noise * torch.randn(
            (drawn, *spec.shape), generator=make_generator(damage.seed, "immunise")
        )
        module = Immunised(inner, spec, bits=self.bits, noise=noise).eval().to(network.device)
        plain = {
            "mean": (0.0,) * spec.channels,
            "std": (1.0,) * spec.channels,
            "range": (0.0, 1.0),
            "layout": "NCHW",
            "dtype": "float32",
        }
        mended = TorchClassifier(
            module,
            spec.model_copy(update=plain | ({"output": "logits"} if drawn else {})),
            network.classes,
            format=network.format,
            architecture=f"Immunised({network.architecture})",
            batch=network.batch,
        )
        done = f"images are cut to {self.bits} of 8 bits before the model sees them"
        done += f", and it votes {self.votes} times under noise" if drawn else ""
        done += "; the declared check of signatures was left out" if checked else ""
        return Mended(mended, damage.train, done)
