"""Each extra was tried alone in an empty environment, and sufficed."""

from __future__ import annotations

import json
import tomllib

import extras_alone
from documents import ROOT


def test_every_extra_was_tried_alone_and_sufficed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    measured = json.loads(extras_alone.RESULTS.read_text(encoding="utf-8"))["extras"]
    assert {one["extra"] for one in measured} == set(extras_alone.USES)
    assert set(project["optional-dependencies"]) - set(extras_alone.USES) == {"all", "ray", "mlflow"}
    assert [one for one in measured if not one["installed"] or one["exit_code"]] == []
