"""What a guard concludes of inputs, as plain data."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from doorward.core.records import DataRecord, Environment, Rate, Record, SubjectRecord, Table

SCHEMA_VERSION = "1.0"


class InputVerdict(Record):
    """The verdict on one input."""

    id: str
    prediction: int = Field(description="The class that the model answers with")
    accepted: bool
    reasons: tuple[str, ...] = Field(
        (), description="Why it is rejected: one sentence for each filter that does"
    )
    scores: dict[str, float] = Field(description="Score by filter; a higher one is more suspicious")


class FilterRecord(Record):
    """A filter, and the score at and above which it rejects an input."""

    name: str
    title: str
    settings: dict[str, Any]
    threshold: float
    limits: str


class GuardReport(Record):
    """What a guard says of a set of inputs."""

    schema_version: str = SCHEMA_VERSION
    subject: SubjectRecord
    data: tuple[DataRecord, ...]
    false_rejection_rate: float
    rule: str
    reform: str | None = Field(None, description="The squeezer whose copy the model answers, if any")
    filters: tuple[FilterRecord, ...]
    clean: Table | None = Field(None, description="Scores of the clean inputs that the thresholds come from")
    verdicts: tuple[InputVerdict, ...]
    rejected: Rate
    alarm: str | None = Field(None, description="Set if more are rejected than of clean inputs would be")
    warnings: tuple[str, ...] = ()
    seed: int
    seconds: float
    environment: Environment
