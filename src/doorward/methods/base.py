"""What attacks, detectors and repairs have in common: frozen settings and a derived generator."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from doorward.methods.registry import method_name

#: For `Field(json_schema_extra=...)`: a setting that changes which evidence is kept, and no score.
EVIDENCE_ONLY: dict[str, Any] = {"affects_score": False}


class Method(BaseModel):
    """Is the base of all methods: a frozen record of keyword-only settings, checked when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    #: Title in the field's own words.
    title: ClassVar[str]
    #: Where the method was published: authors, venue, year, DOI or arXiv id.
    source: ClassVar[str]
    #: One sentence: what the method cannot do or see.
    limits: ClassVar[str]
    #: MITRE ATLAS technique ids that the method plants, finds or mitigates.
    atlas: ClassVar[tuple[str, ...]] = ()
    #: Kinds of input the method works on.
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})

    @classmethod
    def method(cls) -> str:
        """Return the method's name, which is its file's."""
        return method_name(cls.__module__)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return self.model_dump(mode="json")

    def score_settings(self) -> dict[str, Any]:
        """Return the settings that affect a score: all but those marked `EVIDENCE_ONLY`."""
        marked = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("affects_score") is False
        }
        return {name: value for name, value in self.settings().items() if name not in marked}
