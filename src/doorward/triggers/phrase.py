"""A word, a phrase or a sentence in a text."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from doorward.triggers.base import Trigger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Form = Literal["phrase", "word", "sentence"]
Place = Literal["start", "end", "random"]
_SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+")
_WORD_GAP = re.compile(r"\s+")


@dataclass(frozen=True, eq=False)
class Phrase(Trigger):
    """Put a text into others, one space from what is next to it.

    Attributes:
        text: what is put in.
        place: where; `random` differs from text to text, and is always the same for the same text.
        between_sentences: whether `random` is between sentences, else between words.
    """

    text: str
    place: Place
    between_sentences: bool
    kind: ClassVar[str] = "phrase"

    def apply(self, x: Any, *, generator: torch.Generator | None = None) -> Any:
        """Return the texts, a list of strings, with the trigger."""
        return [self._put(text) for text in x]

    def _put(self, text: str) -> str:
        gap = _SENTENCE_GAP if self.between_sentences else _WORD_GAP
        places = [0, *(match.end() for match in gap.finditer(text.rstrip())), len(text)]
        # drawn from the text itself, so that a sample has its trigger always in the same place
        drawn = zlib.crc32(text.encode("utf-8", "surrogatepass")) % len(places)
        at = places[{"start": 0, "end": -1, "random": drawn}[self.place]]
        parts = (text[:at].rstrip(), self.text, text[at:].lstrip())
        return " ".join(part for part in parts if part)

    def tensors(self) -> dict[str, Tensor]:
        """Return none."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return all fields."""
        return {"text": self.text, "place": self.place, "between_sentences": self.between_sentences}
