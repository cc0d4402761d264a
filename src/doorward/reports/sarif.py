"""The report as SARIF 2.1.0, for code scanning services.

Only alarms become results. Code scanning services show every result as an alert, whatever its `kind`
says, so "nothing found", "could not tell" and "did not run" are notifications of the invocation instead.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import metadata
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from doorward.core.formatting import classes_label, plain, sentence
from doorward.core.records import Finding, Level, Report, Verdict
from doorward.core.report_json import dump
from doorward.reports import atlas
from doorward.reports.exit_codes import exit_code
from doorward.reports.phrases import explanation

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
TAXONOMY = "MITRE ATLAS"

_LEVELS: dict[Verdict, str] = {
    "unsafe": "error",
    "backdoored": "error",
    "suspicious": "warning",
    "could_not_tell": "warning",
    "nothing_found": "note",
}
_OBJECTS: dict[Level, str] = {
    "artifact": "the files of a model",
    "model": "a model's weights and behaviour",
    "class": "a model's weights and behaviour, class by class",
    "sample": "training data",
    "input": "inputs at run time",
}


def to_sarif(report: Report, *, fail_on: str = "suspicious") -> str:
    """Write a report as SARIF 2.1.0; `fail_on` is what its exit code follows (see `exit_code`)."""
    by_name = {finding.detector: finding for finding in report.findings}
    rules = {name: index for index, name in enumerate(by_name)}
    names = sorted({identifier for finding in report.findings for identifier in finding.atlas})
    artifact = _artifact(report)
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "Doorward",
                "version": report.environment.doorward,
                "semanticVersion": report.environment.doorward,
                **_home(),
                "rules": [_rule(finding, names) for finding in by_name.values()],
                "supportedTaxonomies": [{"name": TAXONOMY, "index": 0}],
            }
        },
        "taxonomies": [_taxonomy(names)],
        "invocations": [_invocation(report, rules, fail_on)],
        "artifacts": [artifact] if artifact else [],
        "results": [
            _result(report, finding, rules, artifact) for finding in report.findings if finding.flagged
        ],
        "columnKind": "unicodeCodePoints",
        "properties": {
            "verdict": report.verdict,
            "targets": list(report.targets),
            "pValue": report.p_value,
            "calibrated": report.calibrated,
            "covered": {
                "files": [plain(name) for name in report.covered.files],
                "behaviour": [plain(name) for name in report.covered.behaviour],
            },
        },
    }
    return dump({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


@cache
def _home() -> dict[str, str]:
    """Return the address of the project's home page, where the installed package states one."""
    try:
        stated = metadata.metadata("doorward").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        stated = []
    pages = dict(one.split(", ", 1) for one in stated if ", " in one)
    return {"informationUri": pages["Homepage"]} if "Homepage" in pages else {}


def help_address(finding: Finding) -> str | None:
    """Return where a detector's method is described: its paper, else the technique that it points to.

    >>> one = Finding(detector="d", level="model", kind="backdoor", summary="", verdict="suspicious")
    >>> help_address(one.model_copy(update={"source": "IEEE S&P 2019, doi 10.1109/SP.2019.00031"}))
    'https://doi.org/10.1109/SP.2019.00031'
    >>> help_address(one.model_copy(update={"source": "Wang et al., arXiv 2205.06900; with changes"}))
    'https://arxiv.org/abs/2205.06900'
    """
    if found := re.search(r"\bdoi[ :](10\.\d{4,9}/[\w.()/:-]+)", finding.source):
        return f"https://doi.org/{found[1].rstrip('.')}"
    if found := re.search(r"\barXiv[ :](\d{4}\.\d{4,5})\b", finding.source):
        return f"https://arxiv.org/abs/{found[1]}"
    return atlas.lookup(finding.atlas[0]).url if finding.atlas else None


def _rule(finding: Finding, atlas_ids: list[str]) -> dict[str, Any]:
    name = plain(finding.detector)
    looks_for = finding.kind.replace("_", " ")
    limits = (
        f"What it cannot see: {plain(finding.limits)}" if finding.limits else "Its limits are not stated."
    )
    source = f"Source: {plain(finding.source)}" if finding.source else ""
    entries = [atlas.lookup(identifier) for identifier in finding.atlas]
    rule: dict[str, Any] = {
        "id": name,
        "name": "".join(part.capitalize() for part in name.split("-")),
        "shortDescription": {"text": f"{name}: looks for {looks_for} in {_OBJECTS[finding.level]}."},
        "fullDescription": {"text": limits},
        "help": {
            "text": "\n".join(filter(None, [limits, source])),
            "markdown": "\n\n".join(filter(None, [f"**{name}**", limits, source])),
        },
        "defaultConfiguration": {"level": "error"},
        "properties": {
            "tags": ["security", "machine-learning", finding.kind, *finding.atlas],
            "atlas": {entry.id: entry.title for entry in entries},
        },
    }
    if address := help_address(finding):
        rule["helpUri"] = address
    if entries:
        rule["relationships"] = [
            {
                "target": {
                    "id": entry.id,
                    "index": atlas_ids.index(entry.id),
                    "toolComponent": {"name": TAXONOMY, "index": 0},
                },
                "kinds": ["relevant"],
            }
            for entry in entries
        ]
    return rule


def _taxonomy(atlas_ids: list[str]) -> dict[str, Any]:
    return {
        "name": TAXONOMY,
        "version": atlas.VERSION,
        "organization": "MITRE",
        "informationUri": atlas.HOME,
        "shortDescription": {"text": "Adversarial tactics and techniques against AI systems."},
        "taxa": [
            {
                "id": entry.id,
                "name": entry.name,
                "helpUri": entry.url,
                "properties": {"tactics": list(entry.tactics)},
            }
            for entry in map(atlas.lookup, atlas_ids)
        ],
    }


def _invocation(report: Report, rules: dict[str, int], fail_on: str) -> dict[str, Any]:
    notes: list[dict[str, Any]] = [
        {
            "level": _LEVELS[finding.verdict],
            "message": {"text": plain(f"{finding.detector}: {finding.reason or finding.summary}")},
            "associatedRule": {"id": plain(finding.detector), "index": rules[finding.detector]},
        }
        for finding in report.findings
        if not finding.flagged
    ]
    notes += [
        {"level": "warning", "message": {"text": sentence(plain(warning))}} for warning in report.warnings
    ]
    notes += [
        {"level": "note", "message": {"text": plain(f"{one.detector} did not run: {one.reason}")}}
        for one in report.not_run
    ]
    return {
        "executionSuccessful": report.verdict != "could_not_tell",
        "exitCode": exit_code(report.verdict, fail_on),
        "exitCodeDescription": plain(explanation(report)),
        "toolExecutionNotifications": notes,
    }


def _result(
    report: Report, finding: Finding, rules: dict[str, int], artifact: dict[str, Any] | None
) -> dict[str, Any]:
    text = plain(finding.summary)
    if finding.targets:
        names = report.subject.classes if report.subject else ()
        text += f" Target class: {classes_label(finding.targets, names)}."
    sha256 = _hash(report) or ""
    key = "\0".join([sha256, finding.detector, *map(str, finding.targets)])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    result: dict[str, Any] = {
        "ruleId": plain(finding.detector),
        "ruleIndex": rules[finding.detector],
        "level": _LEVELS[finding.verdict],
        "message": {"text": text},
        # GitHub compares the first of these alone
        "partialFingerprints": {"primaryLocationLineHash": fingerprint, "doorwardFinding/v1": fingerprint},
        "properties": {
            "verdict": finding.verdict,
            "kind": finding.kind,
            "targets": list(finding.targets),
            "scoreName": plain(finding.score_name),
            "score": finding.score,
            "threshold": finding.threshold,
            "pValue": finding.p_value,
            "calibrated": finding.calibrated,
            "flaggedSamples": len(finding.flagged_ids),
        },
    }
    if artifact:
        # a model has no lines; services show an alert only where it names one
        place = {"artifactLocation": artifact["location"] | {"index": 0}, "region": {"startLine": 1}}
        result["locations"] = [{"physicalLocation": place}]
    return result


def _hash(report: Report) -> str | None:
    if report.subject:
        return report.subject.sha256
    return report.data[0].sha256 if report.data else None


def _artifact(report: Report) -> dict[str, Any] | None:
    """Describe what was scanned: the model, or the data where there is no model."""
    if report.subject:
        path = report.subject.path
    elif report.data:
        path = report.data[0].path
    else:
        return None
    artifact: dict[str, Any] = {"location": location(path), "roles": ["analysisTarget"]}
    if report.subject and report.subject.bytes is not None:
        artifact["length"] = report.subject.bytes
    if sha256 := _hash(report):
        artifact["hashes"] = {"sha-256": sha256}
    return artifact


def location(path: str) -> dict[str, str]:
    """Return the SARIF location of a path or hub id: relative to the source root unless it is absolute.

    >>> location("models/my model.onnx")
    {'uri': 'models/my%20model.onnx', 'uriBaseId': '%SRCROOT%'}
    >>> location("/srv/model.pt")
    {'uri': 'file:///srv/model.pt'}
    """
    pure = PurePath(path)
    if pure.is_absolute():
        return {"uri": pure.as_uri()}
    return {"uri": quote(pure.as_posix(), safe="/"), "uriBaseId": "%SRCROOT%"}
