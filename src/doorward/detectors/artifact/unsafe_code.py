"""What a model file would execute when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from doorward.artifacts import Examination, Limits, examine
from doorward.artifacts.findings import ATLAS, conclude
from doorward.core.records import Finding, Level, Need
from doorward.detectors.base import Detector
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch

    from doorward.core.budget import Deadline
    from doorward.detectors.subject import Subject


@register("detector")
class UnsafeCode(Detector):
    """Find code that loading an artifact would run: in pickles, configurations, programs and libraries.

    Use it on every file that others gave you, before anything loads it; a scan runs it first.

    The score is the number of references to code outside of a list of constructors known to be harmless.
    Nothing is loaded, imported or unpickled: files are read as bytes, archives in memory. Every file is read
    as each loader that would take it, whatever its name. Of a folder, what loading the model opens counts;
    files that only lie in it are named as what not to open.

    Attributes:
        strict_files: whether files that loading does not open count as if it did.
        depth: how deep archives may lie in archives.
        opcodes: how many pickle instructions are followed in all.
        megabytes: how much is read as pickle or unpacked, in MiB.
    """

    title: ClassVar[str] = "Code that runs when the model is loaded"
    source: ClassVar[str] = (
        "Python documentation of pickle and pickletools; torch.serialization's safe globals"
    )
    limits: ClassVar[str] = (
        "It sees code, not behaviour: weights that hold a backdoor run no code and pass; formats it does "
        "not know (GGUF, TensorFlow graphs, TorchScript, 7z, zstd) are not looked into, and are named."
    )
    atlas: ClassVar[tuple[str, ...]] = ATLAS
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text", "audio"})
    needs: ClassVar[frozenset[Need]] = frozenset({"artifact"})
    level: ClassVar[Level] = "artifact"
    kind: ClassVar = "unsafe_code"
    order: ClassVar[int] = 0

    strict_files: bool = False
    depth: int = Field(4, ge=0)
    opcodes: int = Field(5_000_000, gt=0)
    megabytes: int = Field(4096, gt=0)

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Read the artifact, unless that was done already, and list what it would run."""
        if subject.examination is not None and self.reading_limits == Limits():
            return self.told(subject.examination)
        return self.read(Path(subject.artifact or ""), deadline)

    def read(self, path: Path, deadline: Deadline | None = None) -> Finding:
        """Read a file or folder and list what loading it would run; torch is not loaded for it."""
        return self.told(examine(path, self.reading_limits, deadline))

    def told(self, examination: Examination) -> Finding:
        """Return the finding that follows from what was read."""
        return self.finding(**conclude(examination, strict_files=self.strict_files))

    @property
    def reading_limits(self) -> Limits:
        """Return how much is read at most."""
        return Limits(depth=self.depth, opcodes=self.opcodes, bytes=self.megabytes << 20)
