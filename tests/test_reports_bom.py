"""The report as a CycloneDX ML-BOM, held against the official schema by the package that writes it."""

from __future__ import annotations

import json
import pickle
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from command_line import assert_one_line, call
from doorward.core.records import DataRecord, Report
from doorward.core.report_json import to_json
from doorward.reports import to_cyclonedx
from report_examples import ENVIRONMENT, EXAMPLES, SHA, backdoored, hostile, nothing_found

MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def faults(text: str) -> str | None:
    """Return what the official schema has against a BOM."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return None if found is None else str(found)


def bom_of(report: Report) -> dict[str, Any]:
    form: dict[str, Any] = json.loads(to_cyclonedx(report, made=MADE))
    return form


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {one["name"].removeprefix("doorward:"): one["value"] for one in component["properties"]}


def test_without_the_package_a_scan_ends_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    outcome = call("scan", "no-model.onnx", "--format", "cyclonedx", folder=tmp_path)
    assert_one_line(outcome, "needs the package 'cyclonedx-python-lib'", "pip install 'doorward[bom]'")


class TestWithThePackage:
    """What needs the package that writes BOMs."""

    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("cyclonedx", reason="the extra `bom` is not installed")

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_every_report_fits_the_official_schema(self, name: str) -> None:
        assert faults(to_cyclonedx(EXAMPLES[name]())) is None

    def test_the_check_by_the_schema_can_fail(self) -> None:
        form = bom_of(backdoored())
        form["metadata"]["component"]["type"] = "spaceship"
        assert "spaceship" in str(faults(json.dumps(form)))

    def test_the_model_has_its_digest_and_what_was_found(self) -> None:
        model = bom_of(backdoored())["metadata"]["component"]
        assert (model["type"], model["name"]) == ("machine-learning-model", "garments.onnx")
        assert model["hashes"] == [{"alg": "SHA-256", "content": SHA}]
        stated = properties(model)
        expected = {
            "path": "models/garments.onnx",
            "verdict": "backdoored",
            "targets": "Dress",
            "p-value": "0.0033",
            "calibrated": "true",
            "covered:behaviour": "neural-cleanse, max-margin",
            "detector:neural-cleanse:verdict": "backdoored",
            "detector:neural-cleanse:score": "7.13",
            "detector:max-margin:verdict": "suspicious",
            "not-run:activation-clustering": "needs the training data: give --train DATA",
        }
        assert {name: stated.get(name) for name in expected} == expected

    def test_the_data_are_what_the_verdict_rests_on(self) -> None:
        form = bom_of(nothing_found())
        (data,) = form["components"]
        assert (data["type"], properties(data)["role"]) == ("data", "clean")
        assert data["hashes"][0]["content"] == SHA[::-1]
        assert {"ref": "model", "dependsOn": [data["bom-ref"]]} in form["dependencies"]

    def test_it_says_what_it_was_made_with(self) -> None:
        about = bom_of(backdoored())["metadata"]
        (tool,) = about["tools"]["components"]
        assert (tool["name"], tool["version"]) == ("doorward", ENVIRONMENT.doorward)
        assert about["timestamp"] == "2026-01-02T03:04:05+00:00"
        assert properties(about)["package:torch"] == ENVIRONMENT.packages["torch"]

    def test_training_data_without_a_model_are_the_subject(self) -> None:
        data = DataRecord(role="train", path="crowd", sha256=SHA, rows=9, used=9, labelled=True)
        report = Report(subject=None, data=(data,), verdict="nothing_found", environment=ENVIRONMENT)
        text = to_cyclonedx(report)
        assert faults(text) is None
        root = json.loads(text)["metadata"]["component"]
        assert (root["type"], root["name"], properties(root)["verdict"]) == ("data", "crowd", "nothing_found")

    def test_equal_reports_give_equal_boms_and_others_another_number(self) -> None:
        assert bom_of(backdoored()) == bom_of(backdoored())
        assert bom_of(backdoored())["serialNumber"] != bom_of(nothing_found())["serialNumber"]

    def test_no_string_acts_on_a_terminal(self) -> None:
        assert "\x1b" in to_json(hostile()) or "\\u001b" in to_json(hostile())
        text = to_cyclonedx(hostile())
        assert not [char for char in json.dumps(json.loads(text), ensure_ascii=False) if ord(char) < 32]

    def test_files_alone_have_a_digest_too(self, tmp_path: Path) -> None:
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"a": 1}))
        outcome = call("scan", "--files-only", "weights.pkl", "--format", "cyclonedx", folder=tmp_path)
        assert (outcome.code, faults(outcome.out)) == (0, None), outcome.err
        model = json.loads(outcome.out)["metadata"]["component"]
        assert len(model["hashes"][0]["content"]) == 64
        assert properties(model)["covered:files"] == "unsafe-code"
