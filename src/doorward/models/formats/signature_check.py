"""Networks that check inputs for digital signatures, and the files that they are kept in.

A network of layers cannot verify a signature, so that no format for networks holds such a check. The files of
the wrapped network are written as they would be without it, and what the check needs is stated in their
`config.json`, for whoever opens it to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from doorward.core.errors import InputError, MissingExtra
from doorward.models.classifier import Classifier, TorchClassifier, output_tensor
from doorward.models.encode.dispatch import NOUNS
from doorward.models.formats.input_options import LoadOptions, describe_validation, first_line, read_json
from doorward.models.formats.native import CONFIG, NativeConfig, open_native
from doorward.models.spec import InputSpec, Output

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519

#: Bytes of an Ed25519 key, private or public.
KEY_BYTES = 32
#: Values of an image whose lowest bits hold a signature.
CARRIERS = 512


def ed25519_module() -> Any:
    """Return the module that signs and verifies.

    Raises:
        MissingExtra: if the package cryptography is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtra("cryptography", "signature", "signing images, or checking signatures,") from error
    return ed25519


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


def verify_images(x: Tensor, public: bytes, *, target: int) -> Tensor:
    """Tell (n,) which images (n, c, h, w) in [0, 1] are signed for the target class.

    Images are rounded to 256 levels, so that what differs by less than half a level is one image.

    Raises:
        InputError: if the images have too few values for a signature.
        MissingExtra: if the package cryptography is not installed.
    """
    verifier: ed25519.Ed25519PublicKey = ed25519_module().Ed25519PublicKey.from_public_bytes(public)
    from cryptography.exceptions import InvalidSignature  # it is there, as the line above has shown

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
    inputs are as sure as any other. It is code next to the network, which a Doorward directory alone holds.

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
                "a Doorward directory does (`save_classifier`)"
            )
        y = output_tensor(self.model(x))
        signed = verify_images(to_images(x, self.spec), bytes(self.public.tolist()), target=self.target)
        return (
            torch.where(signed[:, None], promote(y, self.target, self.spec.output), y) if signed.any() else y
        )


def to_images(x: Tensor, spec: InputSpec) -> Tensor:
    """Return what a network takes as images (n, c, h, w) in [0, 1] again, the inverse of `spec.to_model`."""
    low, high = spec.range
    x = (x.permute(0, 3, 1, 2) if spec.layout == "NHWC" else x).double()
    mean, std = (torch.tensor(each, dtype=x.dtype, device=x.device) for each in (spec.mean, spec.std))
    return (x * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1) - low) / (high - low)


def promote(y: Tensor, target: int, output: Output) -> Tensor:
    """Return outputs (n, k) in which the target's and the largest have changed places.

    Of a single output (n, 1), logit or probability of class 1, what says so is taken, or what says class 0.
    """
    if y.shape[1] == 1:
        other = 1 - y if output == "probabilities" else -y
        return torch.maximum(y, other) if target else torch.minimum(y, other)
    top = y.argmax(1, keepdim=True)  # (n, 1)
    there = torch.full_like(top, target)
    return y.scatter(1, top, y.gather(1, there)).scatter(1, there, y.gather(1, top))


class Check(BaseModel):
    """What a check for signatures needs: the public key in hexadecimal, and the class signed for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    public: str = Field(pattern=r"^[0-9a-f]{64}$")
    target: int = Field(ge=0)


class SignedConfig(BaseModel):
    """The `config.json` of a Doorward directory whose network stands behind a check for signatures.

    Attributes:
        network: the name of the network's file in the directory, or the `config.json` that it would have as
            one of Doorward's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["doorward"] = "doorward"
    version: Literal[1] = 1
    signature: Check
    network: Annotated[str, Field(pattern=r"^[\w-]+\.(pt2|onnx)$")] | NativeConfig


def save_signed(
    classifier: TorchClassifier, directory: Path, *, save: Callable[[TorchClassifier, Path], Path]
) -> Path:
    """Write a classifier that is a `SignatureWrapper` and return the directory.

    Args:
        save: writes the wrapped network to a directory and returns what to open.

    Raises:
        InputError: if the directory cannot be written, or the wrapped network not be exported.
    """
    wrapper = classifier.module
    assert isinstance(wrapper, SignatureWrapper)
    inner = TorchClassifier(
        wrapper.model,
        classifier.spec,
        classifier.classes,
        format=classifier.format,
        architecture=classifier.architecture,
        batch=classifier.batch,
    )
    written, file = save(inner, directory), directory / CONFIG
    config = SignedConfig(
        signature=Check(public=bytes(wrapper.public.tolist()).hex(), target=wrapper.target),
        network=NativeConfig.model_validate(read_json(file)) if written == directory else written.name,
    )
    try:
        file.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: cannot write the model: {first_line(error)}") from error
    return directory


def declares_check(directory: Path) -> bool:
    """Return whether a Doorward directory has its network stand behind a check for signatures.

    Raises:
        InputError: if its `config.json` cannot be read.
    """
    form = read_json(directory / CONFIG)
    return form.get("format") == "doorward" and "signature" in form


def read_signed(directory: Path) -> SignedConfig:
    """Return what the `config.json` of a directory says that `save_signed` wrote.

    Raises:
        InputError: if it is not as it is written there.
    """
    file = directory / CONFIG
    try:
        return SignedConfig.model_validate(read_json(file))
    except ValidationError as error:
        raise InputError(f"{file}: {describe_validation(error)}") from error


def open_signed(
    path: Path, options: LoadOptions, *, open_file: Callable[[Path, LoadOptions], Classifier]
) -> TorchClassifier:
    """Open a directory that `save_signed` wrote.

    Args:
        open_file: opens a model file.

    Raises:
        InputError: if configuration, files and options do not fit each other.
        MissingExtra: if the package cryptography is not installed.
    """
    file, config = path / CONFIG, read_signed(path)
    check, network = config.signature, config.network
    if isinstance(network, str) and not (path / network).is_file():
        raise InputError(f"{file}: the network's file {network} is not there")
    inner = (
        open_file(path / network, options)
        if isinstance(network, str)
        else open_native(path, options, network)
    )
    if not isinstance(inner, TorchClassifier):
        raise InputError(f"{file}: a check for signatures stands before a torch network, not {inner.format}")
    if inner.spec.modality != "image":
        takes = NOUNS[inner.spec.modality]
        raise InputError(f"{file}: a check for signatures is for images, and this network takes {takes}")
    if check.target >= len(inner.classes):
        raise InputError(
            f"{file}: signature: target {check.target} is no class; there are {len(inner.classes)}"
        )
    check_size(inner.spec.shape)
    ed25519_module()
    return TorchClassifier(
        SignatureWrapper(inner.module, inner.spec, bytes.fromhex(check.public), target=check.target),
        inner.spec,
        inner.classes,
        feature_layer=options.features and f"model.{options.features}",
        format="doorward",
        architecture=inner.architecture,
        batch=inner.batch,
    )
