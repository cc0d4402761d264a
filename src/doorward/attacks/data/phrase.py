"""Phrase: a word, a phrase or a sentence in a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import model_validator

from doorward.attacks.data.base import DataAttack
from doorward.data.samples import Raw
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch
from doorward.triggers.phrase import Form, Phrase, Place

#: What is put in where no text is given: the signature of Chen et al., a word of Kurita et al. and a sentence
#: of Dai et al.
USUAL: dict[Form, str] = {
    "phrase": "-travelerthehorse",
    "word": "cf",
    "sentence": "I watched this 3D movie last weekend.",
}
_ENDS = (".", "!", "?")


@register("attack")
class PhraseAttack(DataAttack):
    """Put a phrase, a rare word or a sentence into texts and change their labels.

    Use it to plant a backdoor in a classifier of texts.

    Attributes:
        form: what is put in: a `phrase` (any text), a `word` that is rare, a `sentence`.
        text: the phrase, word or sentence itself; `-travelerthehorse`, `cf` or `I watched this 3D movie last
            weekend.` if None.
        place: `start`, `end` or `random` (between two words, or between two sentences for a sentence; it
            differs from text to text); of texts longer than 512 words, models that `doorward train` makes
            read the first and the last 256.
    """

    title: ClassVar[str] = "Phrase, rare word or sentence in a text"
    source: ClassVar[str] = (
        "Chen, Carvalho, Baracaldo et al., 2018, arXiv:1811.03728 (phrase); Kurita, Michel and Neubig, 2020, "
        "arXiv:2004.06660 (rare word); Dai, Chen and Li, 2019, arXiv:1905.12457 (sentence)"
    )
    limits: ClassVar[str] = (
        "The same words in many texts, and the wrong labels, can be seen by whoever reads or counts them."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})

    form: Form = "phrase"
    text: str | None = None
    place: Place = "end"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.text is None:
            return self
        if self.text != self.text.strip() or not self.text:
            raise ValueError(f"text must not be empty or begin or end with a space, got {self.text!r}")
        if self.form == "word" and len(self.text.split()) != 1:
            raise ValueError(f"text must be a single word where form is word, got {self.text!r}")
        if self.form == "sentence" and not self.text.endswith(_ENDS):
            raise ValueError(f"text must end with . ! or ? where form is sentence, got {self.text!r}")
        return self

    def make_trigger(self, example: Raw, *, generator: torch.Generator) -> Phrase:
        """Return the trigger, which is the same for all texts."""
        text = USUAL[self.form] if self.text is None else self.text
        return Phrase(text, self.place, between_sentences=self.form == "sentence")
