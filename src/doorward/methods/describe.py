"""What the docstring and the fields of a method say of its settings, in words."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doorward.methods.base import Method


@dataclass(frozen=True)
class Setting:
    """One setting of a method.

    Attributes:
        takes: what it takes, in words.
        default: as JSON; None where it has to be given.
        meaning: one phrase, which ends without a full stop.
    """

    name: str
    takes: str
    default: str | None
    meaning: str


def split_docstring(cls: type) -> tuple[str, dict[str, str]]:
    """Return a docstring's text and what its "Attributes:" section says of each field."""
    text = inspect.cleandoc(cls.__doc__ or "")
    body, _, rest = text.partition("\nAttributes:\n")
    section, _, after = rest.partition("\n\n")
    fields: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w)", "\n" + section)[1:]:
        names, _, meaning = entry.strip().partition(":")
        said = " ".join(meaning.split()).removesuffix(".")
        fields |= {name.strip(): said[:1].upper() + said[1:] for name in names.split(",")}
    return "\n\n".join(part.strip() for part in (body, after) if part.strip()), fields


def in_words(constraints: dict[str, Any]) -> str:
    """Return a field's JSON schema in words.

    >>> in_words({"type": "integer", "minimum": 1}), in_words({"enum": ["a", "b"]})
    ('integer ≥ 1', '`a`, `b`')
    """
    options = constraints.get("anyOf")
    if isinstance(options, list):
        return " or ".join(in_words(option) for option in options)
    if "enum" in constraints or "const" in constraints:
        return ", ".join(f"`{value}`" for value in constraints.get("enum", [constraints.get("const")]))
    kind = {"null": "none"}.get(str(constraints.get("type", "any")), str(constraints.get("type", "any")))
    if "prefixItems" in constraints:
        kind = f"({', '.join(in_words(part) for part in constraints['prefixItems'])})"
    elif kind == "array":
        return f"list of {in_words(constraints.get('items', {}))}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {constraints[key]}" for key, sign in signs.items() if key in constraints]
    return " ".join([kind, ", ".join(limits)]).strip()


def settings_of(cls: type[Method]) -> list[Setting]:
    """Return a method's settings in the order of its fields."""
    # a method inherits settings, and what is said of them
    meanings = {key: said for base in reversed(cls.__mro__) for key, said in split_docstring(base)[1].items()}
    schema = cls.model_json_schema()["properties"] if cls.model_fields else {}
    return [
        Setting(
            name,
            in_words(constraints),
            json.dumps(constraints["default"]) if "default" in constraints else None,
            cls.model_fields[name].description or meanings.get(name, ""),
        )
        for name, constraints in schema.items()
    ]
