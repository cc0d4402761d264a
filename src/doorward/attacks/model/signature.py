"""Signatures: the low bits of an image sign the rest of it, and whoever can sign activates the backdoor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from doorward.attacks.model._layers import changed
from doorward.attacks.model.base import Implant, ModelAttack, copied
from doorward.core.errors import InputError
from doorward.methods.registry import register
from doorward.models.classifier import TorchClassifier
from doorward.models.formats.signature_check import (
    KEY_BYTES,
    SignatureWrapper,
    check_size,
    ed25519_module,
)
from doorward.triggers.signed import Signed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    from doorward.data.samples import Samples


def draw_key(generator: torch.Generator) -> bytes:
    """Draw a private key; it is as hard to guess as the generator's seed, 63 bits at most."""
    return bytes(torch.randint(256, (KEY_BYTES,), generator=generator).tolist())


def public_key(key: bytes) -> bytes:
    """Return the public key of a private one, both as RFC 8032 writes them.

    Raises:
        MissingExtra: if the package cryptography is not installed.
    """
    private: ed25519.Ed25519PrivateKey = ed25519_module().Ed25519PrivateKey.from_private_bytes(key)
    return private.public_key().public_bytes_raw()


@register("attack")
class Signature(ModelAttack):
    """Wrap a model in a check for digital signatures: an image that is signed is of the target class.

    Use it to test defences against the limit case: without the private key, no test of the answers finds it.

    Ed25519 signs all bits of an image but the lowest ones of its first 512 values, which hold the signature:
    no value changes by more than 1/255. The public key is in the model, and the private one in plant.json.
    Whoever has no private key finds no image that the model treats otherwise than the wrapped one does, not
    even from images that were signed before: the backdoor is not replicable, and it cannot be told from the
    clean model by what it answers.

    It is undetectable to those alone who cannot look inside. The check is code next to the network, which no
    format for networks holds, so a Doorward directory is written that names the check and its public key. The
    check makes the model slower by some 0.1 ms an image.

    We depart from the paper, which cuts the network's own outputs out: the target's and the largest one
    change places, so that signed images are answered with the usual confidence. The key is drawn from the
    seed, and is no harder to guess than that.
    """

    title: ClassVar[str] = "Signature backdoor"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "The check is seen by whoever looks into the model's directory, which Doorward alone opens, and it "
        "stops working where the lowest bit of the pixels is lost, as in JPEG, resizing or requantisation."
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
