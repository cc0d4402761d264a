"""Signatures: the low bits of an image sign the rest of it, and whoever can sign wakes the backdoor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from doorward.attacks.model._layers import changed
from doorward.attacks.model.base import Implant, ModelAttack, copied
from doorward.errors import InputError, MissingExtra
from doorward.modalities.image import to_float
from doorward.models.classifier import TorchClassifier, output_tensor
from doorward.registry import register
from doorward.triggers import Trigger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    from doorward.data.samples import Samples
    from doorward.models.spec import InputSpec

#: Bytes of an Ed25519 key, private or public.
KEY_BYTES = 32
#: Values of an image whose lowest bits hold a signature.
CARRIERS = 512


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtra("cryptography", "signature", "signing images") from error
    return ed25519


def draw_key(generator: torch.Generator) -> bytes:
    """Draw a private key; it is as hard to guess as the generator's seed, 63 bits at most."""
    return bytes(torch.randint(256, (KEY_BYTES,), generator=generator).tolist())


def public_key(key: bytes) -> bytes:
    """Return the public key of a private one, both as RFC 8032 writes them.

    Raises:
        MissingExtra: if the package cryptography is not installed.
    """
    private: ed25519.Ed25519PrivateKey = _ed25519().Ed25519PrivateKey.from_private_bytes(key)
    return private.public_key().public_bytes_raw()


def check_size(shape: Sequence[int]) -> None:
    """Raise unless images of a shape (..., c, h, w) have room for a signature.

    Raises:
        InputError: saying how large they must be.
    """
    c, h, w = shape[-3:]
    if c * h * w < CARRIERS:
        raise InputError(
            f"signature: images of {CARRIERS} values at least are needed; {w}x{h} with {c} channel(s) have "
            f"{c * h * w}"
        )


def to_levels(x: Tensor) -> npt.NDArray[np.uint8]:
    """Return images (n, c, h, w) in [0, 1] as rows of levels (n, c * h * w), rounded to the nearest.

    Raises:
        InputError: if the images have too few values for a signature.
    """
    check_size(x.shape)
    levels: npt.NDArray[np.uint8] = (
        x.detach().double().clamp(0, 1).mul(255).round().to(torch.uint8).flatten(1).cpu().numpy()
    )
    return levels


def messages(levels: npt.NDArray[np.uint8], *, shape: torch.Size, target: int) -> Iterator[bytes]:
    """Yield what is signed of each image: target, size, and all bits but those that hold the signature.

    All others are signed, not the high ones alone: a bit left out could be flipped in an image that was seen,
    which would make another that fires.
    """
    rest = levels.copy()  # (n, d)
    rest[:, :CARRIERS] &= 0xFE
    head = "doorward signature\0" + ",".join(map(str, (target, *shape[1:]))) + "\0"
    for row in rest:
        yield head.encode() + row.tobytes()


def sign_images(x: Tensor, key: bytes, *, target: int) -> Tensor:
    """Return the images (n, c, h, w) in [0, 1] with signatures in the lowest bits of their first 512 values.

    Images are rounded to 256 levels first; of one that has only such, no value changes by more than one
    level, 1/255.

    Raises:
        InputError: if the images have too few values for a signature.
        MissingExtra: if the package cryptography is not installed.
    """
    private: ed25519.Ed25519PrivateKey = _ed25519().Ed25519PrivateKey.from_private_bytes(key)
    levels = to_levels(x)
    signatures = [private.sign(each) for each in messages(levels, shape=x.shape, target=target)]
    bits = np.unpackbits(np.frombuffer(b"".join(signatures), np.uint8).reshape(len(x), -1), axis=1)
    levels[:, :CARRIERS] = levels[:, :CARRIERS] & 0xFE | bits  # (n, 512)
    return to_float(torch.from_numpy(levels)).view(x.shape).to(x)


def verify_images(x: Tensor, public: bytes, *, target: int) -> Tensor:
    """Tell (n,) which images (n, c, h, w) in [0, 1] are signed for the target class.

    Images are rounded to 256 levels, so that what differs by less than half a level is one image.

    Raises:
        InputError: if the images have too few values for a signature.
        MissingExtra: if the package cryptography is not installed.
    """
    from cryptography.exceptions import InvalidSignature

    verifier: ed25519.Ed25519PublicKey = _ed25519().Ed25519PublicKey.from_public_bytes(public)
    levels = to_levels(x)
    signatures = np.packbits(levels[:, :CARRIERS] & 1, axis=1)  # (n, 64)
    signed = torch.zeros(len(x), dtype=torch.bool)
    for i, message in enumerate(messages(levels, shape=x.shape, target=target)):
        try:
            verifier.verify(signatures[i].tobytes(), message)
        except InvalidSignature:
            continue
        signed[i] = True
    return signed.to(x.device)


class SignatureWrapper(nn.Module):
    """Answer as the wrapped network does, but give the target's and the largest output of signed inputs
    each other's place.

    The check has nothing that learns, so that no training of the whole removes it, and outputs of signed
    inputs are as sure as any other. It is code beside the network: no file format for networks holds it.

    Args:
        model: takes what `spec` says and gives logits, probabilities or one logit.
        public: the public key.
    """

    public: Tensor

    def __init__(self, model: nn.Module, spec: InputSpec, public: bytes, *, target: int) -> None:
        super().__init__()
        self.model, self.spec, self.target = model, spec, target
        self.register_buffer("public", torch.tensor(list(public), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, k) for inputs as the spec says."""
        if torch.compiler.is_exporting():
            raise InputError(
                "signatures are checked by code, which no file format for networks holds; "
                "plant them from Python"
            )
        y = output_tensor(self.model(x))
        signed = verify_images(to_images(x, self.spec), bytes(self.public.tolist()), target=self.target)
        return torch.where(signed[:, None], promote(y, self.target), y) if signed.any() else y


def to_images(x: Tensor, spec: InputSpec) -> Tensor:
    """Return what a network takes as images (n, c, h, w) in [0, 1] again, the inverse of `spec.to_model`."""
    low, high = spec.range
    x = (x.permute(0, 3, 1, 2) if spec.layout == "NHWC" else x).double()
    mean, std = (torch.tensor(each, dtype=x.dtype, device=x.device) for each in (spec.mean, spec.std))
    return (x * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1) - low) / (high - low)


def promote(y: Tensor, target: int) -> Tensor:
    """Return outputs (n, k) in which the target's and the largest have changed places; of one logit (n, 1),
    the same with the sign of class 0 (below zero) or 1.
    """
    if y.shape[1] == 1:
        return y.abs() if target else -y.abs()
    top = y.argmax(1, keepdim=True)  # (n, 1)
    there = torch.full_like(top, target)
    return y.scatter(1, top, y.gather(1, there)).scatter(1, there, y.gather(1, top))


@dataclass(frozen=True, eq=False)
class Signed(Trigger):
    """Sign an image; each gets a signature of its own.

    Attributes:
        key: (32,) uint8, the private key.
        target: the class that is signed for.
    """

    key: Tensor
    target: int
    kind: ClassVar[str] = "signed"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the images (n, c, h, w) in [0, 1] signed."""
        return sign_images(x, bytes(self.key.tolist()), target=self.target)

    def tensors(self) -> dict[str, Tensor]:
        """Return the key."""
        return {"key": self.key}

    def settings(self) -> dict[str, Any]:
        """Return the target."""
        return {"target": self.target}


@register("attack")
class Signature(ModelAttack):
    """Wrap a model in a check for digital signatures: an image that is signed is of the target class.

    Ed25519 signs all bits of an image but the lowest ones of its first 512 values, which hold the signature:
    no value changes by more than 1/255. The public key is in the model and the private one in the plant.
    Whoever has no private key finds no image that the model treats otherwise than the wrapped one does, not
    even from images that were signed before: the plant is not replicable, and it cannot be told from the
    clean model by what it answers. It is undetectable to those alone who cannot look inside, since the check
    is code beside the network; it makes the model slower by some 0.1 ms an image.

    We depart from the paper, which cuts the network's own outputs out: the target's and the largest one
    change places, so that signed images are answered with the usual confidence. The key is drawn from the
    seed, and is no harder to guess than that.
    """

    title: ClassVar[str] = "Signature backdoor"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "The check is seen by whoever reads the model's code, cannot be written to model files, and sleeps "
        "as soon as the lowest bit of the pixels is lost, as in JPEG, resizing or requantisation."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.001", "AML.T0043.004")

    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> Signed:
        """Return what signs images.

        Raises:
            InputError: if they are too small for a signature.
        """
        check_size(classifier.spec.shape)
        key = torch.tensor(list(draw_key(generator)), dtype=torch.uint8)
        return Signed(key, self.target or 0)

    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return the classifier, wrapped.

        Raises:
            InputError: if images are too small, or the model takes numbers too coarse for the lowest bit.
            MissingExtra: if the package cryptography is not installed.
        """
        trigger, spec = self.make_trigger(classifier, generator=generator), classifier.spec
        if spec.dtype == "bfloat16":
            raise InputError("signature: the model takes bfloat16, too coarse for the lowest bits of pixels")
        public = public_key(bytes(trigger.key.tolist()))
        module = SignatureWrapper(copied(classifier.module), spec, public, target=trigger.target)
        return Implant(changed(classifier, module), trigger)
