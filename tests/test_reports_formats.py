"""The report as text, JSON, SARIF and files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.reports import from_json, render, schema_text, to_json, to_sarif, to_text, write_reports
from doorward.reports.sarif import _home, location
from report_examples import (
    EXAMPLES,
    HOSTILE,
    backdoored,
    could_not_tell,
    hostile,
    nothing_found,
    suspicious,
    unsafe,
)

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PUBLISHED = HERE.parent / "docs" / "report.schema.json"
every_example = pytest.mark.parametrize("name", EXAMPLES)


# Text


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("backdoored", 100),
        ("backdoored", 48),
        ("nothing_found", 80),
        ("could_not_tell", 80),
        ("unsafe", 80),
        ("suspicious", 80),
        ("hostile", 80),
    ],
)
def test_text_is_as_approved(name: str, width: int) -> None:
    """Compare with the golden file; DOORWARD_UPDATE_GOLDEN=1 writes it again: read it first."""
    file = GOLDEN / f"report_{name}_{width}.txt"
    text = to_text(EXAMPLES[name](), width=width)
    if os.environ.get("DOORWARD_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def rendered(report: Report, **settings: Any) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, **settings))
    return stream.getvalue()


def test_the_verdict_comes_first() -> None:
    assert to_text(backdoored()).startswith("BACKDOORED  models/garments.onnx\nA hidden trigger ")


def test_colour_appears_on_a_terminal_alone() -> None:
    assert "\x1b[" not in rendered(backdoored(), width=80)
    assert "\x1b[1;31mBACKDOORED" in rendered(
        backdoored(), width=80, force_terminal=True, color_system="standard"
    )


def test_text_obeys_no_hostile_string() -> None:
    text = rendered(hostile(), width=80)
    assert set(text) & {chr(i) for i in [*range(32), *range(127, 160)]} == {"\n"}
    assert "\u202e" not in text
    assert "[bold red]rich markup[/] :boom:" in " ".join(text.split()), "markup is shown, not obeyed"
    assert "\\x1b[2J" in text
    assert "…" not in text, "nothing is cut off"


def test_a_long_text_is_cut_and_says_so() -> None:
    report = unsafe()
    (evidence,) = report.findings[0].evidence
    long = evidence.model_copy(update={"text": "\n".join(f"opcode {i}" for i in range(100))})
    finding = report.findings[0].model_copy(update={"evidence": (long,)})
    text = to_text(report.model_copy(update={"findings": (finding,)}))
    assert "      opcode 11\n      (88 more lines in report.json)\n" in text
    assert "opcode 12" not in text
    assert "from os import system" in to_text(report)


@every_example
@pytest.mark.parametrize("width", [20, 48, 200])
def test_text_fits_the_width(name: str, width: int) -> None:
    lines = to_text(EXAMPLES[name](), width=width).splitlines()
    assert all(len(line) <= width or line.startswith("      doorward ") for line in lines), (
        "commands stay whole"
    )


def test_a_command_stays_in_one_line() -> None:
    assert "      doorward scan models/signs.pt2 --clean data/fashion:test --seed 1\n" in to_text(
        suspicious(), width=20
    )


# JSON


@every_example
def test_json_comes_back_as_it_was(name: str) -> None:
    report = EXAMPLES[name]()
    text = to_json(report)
    assert from_json(text) == report
    assert to_json(from_json(text)) == text
    assert json.loads(text)["verdict"] == report.verdict
    assert text.endswith("}\n")
    assert '\n  "schema_version": "1.0",\n' in text


def test_json_is_utf8_without_characters_that_act() -> None:
    report = suspicious()
    assert report.subject
    names = ("Übergröße", "スニーカー", *HOSTILE)
    text = to_json(
        report.model_copy(update={"subject": report.subject.model_copy(update={"classes": names})})
    )
    assert "Übergröße" in text
    assert set(text) & {chr(i) for i in [*range(32), *range(127, 160)]} == {"\n"}
    assert "\u202e" not in text
    assert json.loads(text)["subject"]["classes"] == list(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no Doorward report"),
        ("[]", "no Doorward report"),
        ("3", "no Doorward report"),
        ('{"runs": []}', "no Doorward report"),
        ('{"schema_version": "9.0"}', "'9.0', and this Doorward reads 1.0"),
        ('{"schema_version": "1.0"}', "does not fit its schema: subject"),
        ("\x00\xff", "no Doorward report"),
        ("[" * 100_000, "no Doorward report"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


def test_a_damaged_report_is_refused() -> None:
    form = json.loads(to_json(backdoored()))
    form["findings"][1]["score"] = 0.1
    with pytest.raises(InputError, match=r"findings\.1.*flagged must equal score >= threshold"):
        from_json(json.dumps(form))


def test_the_published_schema_is_up_to_date() -> None:
    fresh = "python -c 'from doorward.reports import schema_text; print(schema_text(), end=str())'"
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), f"{fresh} > docs/report.schema.json"


@every_example
def test_reports_fit_the_published_schema(name: str) -> None:
    schema = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(to_json(EXAMPLES[name]())), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("key", "value"), [("verdict", "clean"), ("p_value", 1.5), ("surprise", 1), ("seconds", None)]
)
def test_the_published_schema_refuses(key: str, value: object) -> None:
    form = json.loads(to_json(backdoored())) | {key: value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(form, json.loads(PUBLISHED.read_text(encoding="utf-8")))


# SARIF


def sarif(report: Report, **settings: str) -> dict[str, Any]:
    """Return the one run of a report's SARIF form, after validation by the official schema."""
    form: dict[str, Any] = json.loads(to_sarif(report, **settings))
    schema = json.loads((HERE / "schemas" / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.validate(form, schema, jsonschema.Draft202012Validator, format_checker=checker)
    assert len(form["runs"]) == 1
    run: dict[str, Any] = form["runs"][0]
    return run


@every_example
def test_sarif_fits_the_official_schema(name: str) -> None:
    run = sarif(EXAMPLES[name]())
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["locations"]
    for note in run["invocations"][0]["toolExecutionNotifications"]:
        if "associatedRule" in note:
            rule = run["tool"]["driver"]["rules"][note["associatedRule"]["index"]]
            assert rule["id"] == note["associatedRule"]["id"]


def test_the_official_schema_refuses() -> None:
    form = json.loads(to_sarif(backdoored()))
    form["runs"][0]["results"][0]["level"] = "dreadful"
    schema = json.loads((HERE / "schemas" / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(form, schema, jsonschema.Draft202012Validator)


def test_sarif_of_a_backdoored_model() -> None:
    run = sarif(backdoored())
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [
        ("neural-cleanse", "error"),
        ("max-margin", "warning"),
    ]
    first = run["results"][0]
    assert first["message"]["text"].endswith("Target class: 3 (Dress).")
    assert first["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "models/garments.onnx",
        "uriBaseId": "%SRCROOT%",
        "index": 0,
    }
    assert first["locations"][0]["physicalLocation"]["region"] == {"startLine": 1}
    assert run["artifacts"][0]["hashes"]["sha-256"].startswith("3f0c9a52")
    rule = run["tool"]["driver"]["rules"][1]
    assert rule["properties"]["atlas"] == {
        "AML.T0018.000": "Manipulate AI Model: Poison AI Model",
        "AML.T0043.004": "Craft Adversarial Data: Insert Backdoor Trigger",
    }
    assert rule["helpUri"] == "https://doi.org/10.1109/SP.2019.00031"
    assert {"security", "backdoor", "AML.T0018.000"} <= set(rule["properties"]["tags"])
    assert "warp" in rule["help"]["text"]
    (taxonomy,) = run["taxonomies"]
    assert (taxonomy["name"], taxonomy["version"]) == ("MITRE ATLAS", "5.6.0")
    for relation in rule["relationships"]:
        assert taxonomy["taxa"][relation["target"]["index"]]["id"] == relation["target"]["id"]


def test_sarif_names_the_home_page_that_the_package_states(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = Message()
    stated["Project-URL"] = "Homepage, https://example.org/doorward"
    monkeypatch.setattr("importlib.metadata.metadata", lambda _: stated)
    _home.cache_clear()
    try:
        assert sarif(unsafe())["tool"]["driver"]["informationUri"] == "https://example.org/doorward"
    finally:
        _home.cache_clear()


def test_only_alarms_are_results_and_the_rest_are_notifications() -> None:
    run = sarif(nothing_found())
    assert run["results"] == []
    (invocation,) = run["invocations"]
    notes = [
        (note["level"], note["message"]["text"].split()[0])
        for note in invocation["toolExecutionNotifications"]
    ]
    assert notes == [
        ("note", "unsafe-code:"),
        ("note", "neural-cleanse:"),
        ("warning", "max-margin"),
        ("note", "max-margin"),
    ]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (True, 0)

    (invocation,) = sarif(could_not_tell())["invocations"]
    assert [note["level"] for note in invocation["toolExecutionNotifications"]] == ["warning", "note"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (False, 3)


def test_the_exit_code_follows_fail_on() -> None:
    assert sarif(suspicious())["invocations"][0]["exitCode"] == 1
    assert sarif(suspicious(), fail_on="backdoored")["invocations"][0]["exitCode"] == 0


def test_fingerprints_name_the_subject_the_detector_and_the_target() -> None:
    def fingerprint(report: Report) -> str:
        prints = sarif(report)["results"][0]["partialFingerprints"]
        assert len(set(prints.values())) == 1
        return str(prints["doorwardFinding/v1"])

    report = suspicious()
    assert report.subject
    assert fingerprint(report) == fingerprint(report.model_copy(update={"seconds": 99.0}))
    other_file = report.subject.model_copy(update={"sha256": "0" * 64})
    other_target = report.findings[0].model_copy(update={"targets": (1,)})
    changed = [{"subject": other_file}, {"findings": (other_target,)}]
    assert len({fingerprint(report), *(fingerprint(report.model_copy(update=c)) for c in changed)}) == 3


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("m.onnx", "m.onnx"),
        ("org/model", "org/model"),
        ("a b/ü#?.pt", "a%20b/%C3%BC%23%3F.pt"),
        ("c:weird", "c%3Aweird"),
        ("/srv/a b.pt", "file:///srv/a%20b.pt"),
        ("<memory>", "%3Cmemory%3E"),
    ],
)
def test_locations(path: str, uri: str) -> None:
    assert location(path)["uri"] == uri


def test_sarif_of_data_alone_and_of_nothing() -> None:
    data = suspicious().model_copy(update={"subject": None})
    assert sarif(data)["artifacts"][0]["location"]["uri"] == "data/fashion%3Atest"
    run = sarif(data.model_copy(update={"data": ()}))
    assert (run["artifacts"], "locations" in run["results"][0]) == ([], False)


def test_sarif_obeys_no_hostile_string() -> None:
    text = to_sarif(hostile())
    assert set(text) & {chr(i) for i in [*range(32), *range(127, 160)]} == {"\n"}
    assert "\\u001b" not in text, "what another tool prints holds no escape sequence either"


# Files


def test_write_reports(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = write_reports(backdoored(), folder)
    assert {name: path.name for name, path in paths.items()} == {
        "json": "report.json",
        "html": "report.html",
        "sarif": "report.sarif",
        "text": "report.txt",
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths.values())
    assert from_json(paths["json"].read_text(encoding="utf-8")) == backdoored()
    write_reports(unsafe(), folder)
    assert from_json(paths["json"].read_text(encoding="utf-8")) == unsafe(), "reports are replaced"


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_reports(backdoored(), tmp_path)
    before = {path: path.read_bytes() for path in paths.values()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_reports(unsafe(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the reports need a folder to write to"):
        write_reports(unsafe(), tmp_path / "file")


def test_reports_need_no_torch() -> None:
    code = "import sys, doorward.reports; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
