"""The report as JSON, its way back, and the published schema."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from doorward.core.errors import InputError
from doorward.core.records import SCHEMA_VERSION, Report

# JSON lets these stand in strings as they are, but on a terminal they act (C1) or reorder text.
_ACTING = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def dump(value: Any) -> str:
    """Write JSON for files and terminals: two spaces, keys in the order given, no characters that act."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return _ACTING.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def to_json(report: Report) -> str:
    """Write a report as JSON. Equal reports give equal text."""
    return dump(report.model_dump(mode="json"))


def from_json(text: str) -> Report:
    """Read a report back.

    Raises:
        InputError: if it is no report, or one of another schema version.
    """
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError("this is no Doorward report; expected the report.json that a scan wrote") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"this report has schema version {version!r}, and this Doorward reads {SCHEMA_VERSION}; "
            "use the version of Doorward that the report's environment names"
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"this report does not fit its schema: {where}: {first['msg']}") from error


def schema_text() -> str:
    """Write the JSON Schema that every report fits, as published in `docs/report.schema.json`."""
    schema = Report.model_json_schema(mode="serialization")
    return dump({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
