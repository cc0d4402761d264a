"""`model_copy` that refuses names of fields that do not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

AnyModel = TypeVar("AnyModel", bound=BaseModel)

_plain = BaseModel.model_copy


def checked_copy(self: AnyModel, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> AnyModel:
    """Copy a record as pydantic does; raise if the update names what is no field of it."""
    unknown = set(update or ()) - set(type(self).model_fields)
    if unknown:
        raise AssertionError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
    return _plain(self, update=update, deep=deep)
