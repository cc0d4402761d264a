"""What a model's files declare that it runs next to its network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from doorward.artifacts.links import leaves
from doorward.core.errors import CouldNotTell, InputError
from doorward.core.records import Finding, Level, Need, Text
from doorward.detectors.base import Detector
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch

    from doorward.core.budget import Deadline
    from doorward.detectors.subject import Subject


@register("detector")
class DeclaredCheck(Detector):
    """Find a check that a model's directory declares next to its network, and that changes the answers.

    Use it on every Doorward directory that others gave you: it needs no images and runs nothing.

    A Doorward directory can state a check for digital signatures in its `config.json`: an image that is
    signed is answered with one class, whatever it shows. No test of behaviour finds that without the private
    key, and reading the directory finds it at once.

    The score is the number of such checks. It makes a model suspicious and no more, since nothing says what
    the check is for.
    """

    title: ClassVar[str] = "A declared check next to the network"
    source: ClassVar[str] = (
        "Documentation of Doorward's own format; the check is that of Goldwasser, Kim, Vaikuntanathan and "
        "Zamir, FOCS 2022, arXiv:2204.06974"
    )
    limits: ClassVar[str] = (
        "It reads what the config.json of a Doorward directory declares and nothing else: a branch that "
        "is part of the network itself, in any format, passes."
    )
    #: Modify AI Model Architecture; AI Supply Chain Compromise: Model.
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.001", "AML.T0010.003")
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[Need]] = frozenset({"artifact"})
    level: ClassVar[Level] = "artifact"
    kind: ClassVar = "backdoor"
    order: ClassVar[int] = 1

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Read what the directory declares.

        Raises:
            CouldNotTell: if it cannot be understood.
        """
        from doorward.models.formats.native import CONFIG
        from doorward.models.formats.signature_check import declares_check, read_signed

        path = Path(subject.artifact or "")
        file = path / CONFIG
        if file.is_symlink() and leaves(file, path):
            raise CouldNotTell(f"{CONFIG} is a link out of the folder and was not opened")
        try:
            check = read_signed(path).signature if file.is_file() and declares_check(path) else None
        except InputError as error:
            raise CouldNotTell(str(error)) from error
        if check is None:
            return self.finding(
                score=0.0,
                threshold=1.0,
                score_name="checks declared",
                summary="The files declare no check beside the network that would change its answers",
            )
        return self.finding(
            verdict="suspicious",
            score=1.0,
            threshold=1.0,
            score_name="checks declared",
            targets=(check.target,),
            summary=f"{CONFIG} declares a check for digital signatures beside the network: whoever has the "
            f"private key can sign any image, and the model then answers class {check.target}, whatever the "
            "image shows",
            evidence=(
                Text(
                    title=f"The check in {CONFIG}",
                    text=f"Ed25519 signatures in the lowest bits\nclass of signed images: {check.target}\n"
                    f"public key: {check.public}",
                ),
            ),
        )
