"""The report as a CycloneDX ML-BOM, for inventories of what is deployed.

The model is a component of the type `machine-learning-model` with its digest. What was found, and by what,
are its properties, named `doorward:...`. Reports hold no time and inventories want one: when it was made.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from doorward.core.errors import MissingExtra
from doorward.core.formatting import plain
from doorward.core.records import DataRecord, Report, SubjectRecord
from doorward.core.report_json import to_json

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

PREFIX = "doorward:"
_SHA256 = re.compile("[0-9a-f]{64}")


def check_installed() -> None:
    """Refuse before any work what cannot be written afterwards.

    Raises:
        MissingExtra: if the package that writes CycloneDX is missing.
    """
    try:
        import cyclonedx  # noqa: F401
    except ImportError as error:
        raise MissingExtra("cyclonedx-python-lib", "bom", "a CycloneDX ML-BOM") from error


def to_cyclonedx(report: Report, *, made: datetime | None = None) -> str:
    """Write a report as a CycloneDX 1.6 BOM in JSON.

    Args:
        made: when, with a time zone; now if None.

    Raises:
        MissingExtra: if the package that writes it is missing.
    """
    check_installed()
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    tool = Component(
        name="doorward", type=ComponentType.APPLICATION, version=plain(report.environment.doorward)
    )
    data = [_data(record, number) for number, record in enumerate(report.data)]
    root = data.pop(0) if report.subject is None and data else _model(report)
    root.properties = [*root.properties, *_properties(_said(report))]
    bom = Bom(
        serial_number=uuid5(NAMESPACE_URL, f"doorward-report:{to_json(report)}"),
        metadata=BomMetaData(
            component=root,
            tools=ToolRepository(components=[tool]),
            timestamp=made or datetime.now(UTC),
            properties=_properties(_made_with(report)),
        ),
        components=data,
    )
    # the verdict rests on the data; every other component depends on nothing that is listed
    bom.register_dependency(root, data)
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def _model(report: Report) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    subject = report.subject or SubjectRecord(path="unknown", format="unknown")
    stated = {
        "path": subject.path,
        "format": subject.format,
        "bytes": subject.bytes,
        "architecture": subject.architecture,
        "parameters": subject.parameters,
        "classes": len(subject.classes) or None,
    }
    return Component(
        name=_name(subject.path),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        hashes=_hashes(subject.sha256),
        properties=_properties(stated),
    )


def _data(record: DataRecord, number: int) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    stated = {"role": record.role, "path": record.path, "rows": record.rows, "rows-used": record.used}
    return Component(
        name=_name(record.path),
        type=ComponentType.DATA,
        bom_ref=f"data-{number}",
        hashes=_hashes(record.sha256),
        properties=_properties(stated),
    )


def _name(path: str) -> str:
    """Return a file's or folder's name, or a hub id as it is."""
    pure = PurePath(path)
    return plain((pure.name if pure.is_absolute() or pure.suffix else path) or path)


def _hashes(sha256: str | None) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    if sha256 is None or not _SHA256.fullmatch(sha256):  # a report may be anybody's
        return []
    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _said(report: Report) -> dict[str, Any]:
    """Return what the scan concludes, and what each detector has to do with it."""
    said: dict[str, Any] = {
        "verdict": report.verdict,
        "reason": report.reason,
        "p-value": report.p_value,
        "calibrated": report.calibrated,
        "targets": ", ".join(report.class_name(target) for target in report.targets) or None,
        "covered:files": ", ".join(report.covered.files) or None,
        "covered:behaviour": ", ".join(report.covered.behaviour) or None,
        "covered:training-data": ", ".join(report.covered.training_data) or None,
    }
    for number, warning in enumerate(report.warnings):
        said[f"warning:{number}"] = warning
    for finding in report.findings:
        said |= {
            f"detector:{finding.detector}:verdict": finding.verdict,
            f"detector:{finding.detector}:score": finding.score,
            f"detector:{finding.detector}:p-value": finding.p_value,
            f"detector:{finding.detector}:flagged-samples": len(finding.flagged_ids) or None,
            f"detector:{finding.detector}:code": finding.code,
        }
    for one in report.not_run:
        said[f"not-run:{one.detector}"] = one.reason
    return said


def _made_with(report: Report) -> dict[str, Any]:
    """Return what one needs to know to do the scan again."""
    made = report.environment
    return {
        "report:schema-version": report.schema_version,
        "seed": report.request.get("seed"),
        "python": made.python,
        "platform": made.platform,
        "device": made.device,
        **{f"package:{name}": version for name, version in made.packages.items()},
    }


def _properties(values: dict[str, Any]) -> list[Any]:
    """Return properties of all values but None, as text."""
    from cyclonedx.model import Property

    return [
        Property(name=plain(PREFIX + name), value=_text(value))
        for name, value in values.items()
        if value is not None
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else plain(str(value))
