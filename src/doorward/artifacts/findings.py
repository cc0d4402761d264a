"""The conclusion from an examination, as the fields of a finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doorward.artifacts.files import Examination, examine
from doorward.core.errors import UnsafeArtifact
from doorward.core.records import Evidence, Finding, Table, Text

#: MITRE ATLAS v5.6.0: Unsafe AI Artifacts; Embed Malware; AI Supply Chain Compromise: Model.
ATLAS = ("AML.T0011.000", "AML.T0018.002", "AML.T0010.003")
_ROWS, _EXCERPTS = 200, 5


def conclude(examination: Examination) -> dict[str, Any]:
    """Return verdict, summary, score and evidence of an examination.

    Code that was found counts, whether or not all could be read; nothing found in files that could not be
    read to their end is "could not tell".
    """
    references, unreadable = examination.references, examination.unreadable
    evidence: list[Evidence] = []
    if references:
        rows = tuple((one.file, one.name, one.position, one.why) for one in references[:_ROWS])
        evidence.append(Table(title="Code it would run", columns=("file", "name", "where", "why"), rows=rows))
        evidence.extend(
            Text(title=f"{one.file}: instructions around {one.name}", text=one.excerpt)
            for one in [one for one in references if one.excerpt][:_EXCERPTS]
        )
    if unreadable:
        rest = [f"... and {len(unreadable) - _ROWS} more"] if len(unreadable) > _ROWS else []
        evidence.append(Text(title="Not checked to the end", text="\n".join(unreadable[:_ROWS] + rest)))
    values: dict[str, Any] = {
        "score_name": "references to code",
        "threshold": 1.0,
        "evidence": tuple(evidence),
    }
    if references:
        first, more = references[0], len(references) - 1
        summary = f"Loading it would run code: {first.name} in {first.file} {first.why}"
        summary += f"; {more} more" if more else ""
        return values | {"verdict": "unsafe", "score": float(len(references)), "summary": summary}
    if unreadable:
        reason = unreadable[0] + (f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else "")
        return values | {
            "verdict": "could_not_tell",
            "reason": reason,
            "summary": f"Could not tell: {reason}",
        }
    summary = f"Loading it would run no code of its own (files looked at: {examination.files})"
    return values | {"verdict": "nothing_found", "score": 0.0, "summary": summary}


def refuse_code(path: Path, message: str = "it is not loaded, because loading would run code") -> None:
    """Raise if loading a file or directory would run code.

    Raises:
        UnsafeArtifact: with the finding.
    """
    examination = examine(path)
    if examination.references:
        first = examination.references[0]
        finding = Finding(
            detector="unsafe-code", level="artifact", kind="unsafe_code", atlas=ATLAS, **conclude(examination)
        )
        raise UnsafeArtifact(f"{path}: {message}: {first.name} in {first.file} {first.why}", finding)
