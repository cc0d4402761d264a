"""The conclusion from an examination, as the fields of a finding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doorward.artifacts.examination import OUTSIDE, SOURCE, Doubt, Examination, Reference
from doorward.artifacts.files import examine
from doorward.artifacts.folders import NOT_OPENED
from doorward.core.errors import CouldNotTell, InputError, UnsafeArtifact
from doorward.core.records import Evidence, Finding, Table, Text

#: MITRE ATLAS v5.6.0: Unsafe AI Artifacts; Embed Malware; AI Supply Chain Compromise: Model.
ATLAS = ("AML.T0011.000", "AML.T0018.002", "AML.T0010.003")
#: Titles of evidence: what loading the model runs, and what only lies next to it.
WOULD_RUN = "Code it would run"
NOT_LOADED = "Would run if opened by its usual loader: do not load these files"
NOT_CHECKED = "Not checked to the end"
NOT_LOADED_NOT_CHECKED = "Not checked to the end, and not opened when the model is loaded"
_ROWS, _EXCERPTS = 200, 5


def conclude(examination: Examination, *, strict_files: bool = False) -> dict[str, Any]:
    """Return verdict, summary, score and evidence of an examination.

    Code that loading the model runs is unsafe, whether or not all could be read; nothing found in files
    that could not be read to their end is "could not tell". What loading does not open is told, and
    changes the verdict only if asked for.

    Args:
        strict_files: whether what loading does not open counts as if it did.
    """
    runs = [one for one in examination.references if one.reached or strict_files]
    others = [one for one in examination.references if not (one.reached or strict_files)]
    open_doubts = [one for one in examination.doubts if one.reached or strict_files]
    other_doubts = [one for one in examination.doubts if not (one.reached or strict_files)]
    evidence: list[Evidence] = [
        *_table(WOULD_RUN, runs),
        *_table(NOT_LOADED, others),
        *_excerpts(runs or others),
        *_list(NOT_CHECKED, open_doubts),
        *_list(NOT_LOADED_NOT_CHECKED, other_doubts),
    ]
    values: dict[str, Any] = {
        "score_name": "references to code",
        "threshold": 1.0,
        "evidence": tuple(evidence),
    }
    warning = _warning(others)
    if runs:
        first, more = runs[0], len(runs) - 1
        does = "open files outside of its folder" if all(one.why == OUTSIDE for one in runs) else "run code"
        summary = f"Loading it would {does}: {first.name} in {first.file} {first.why}"
        summary += f"; {more} more" if more else ""
        return values | {"verdict": "unsafe", "score": float(len(runs)), "summary": summary}
    if open_doubts:
        reason = str(open_doubts[0]) + (f" (and {len(open_doubts) - 1} more)" if len(open_doubts) > 1 else "")
        summary = f"{warning}Could not tell: {reason}"
        return values | {"verdict": "could_not_tell", "reason": reason, "summary": summary}
    looked = f"files looked at: {examination.files}"
    looked += f", not checked to the end: {_files(other_doubts)}" if other_doubts else ""
    summary = f"{warning}Loading it would run no code of its own ({looked})"
    return values | {"verdict": "nothing_found", "score": 0.0, "summary": summary}


def _warning(others: Sequence[Reference]) -> str:
    """Return in a sentence or two what lies in the folder and is not loaded; empty where there is nothing."""
    sources = _names([one for one in others if one.why == SOURCE])
    files = _names([one for one in others if one.why != SOURCE])
    told = f"Do not open {files}: that would run code, and it is no part of the model. " if files else ""
    return told + (f"Loading does not import {sources}, which is Python source. " if sources else "")


def _names(references: Sequence[Reference]) -> str:
    names = list(dict.fromkeys(one.file.split(":")[0] for one in references))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files(doubts: Sequence[Doubt]) -> int:
    return len({one.file for one in doubts})


def _table(title: str, references: Sequence[Reference]) -> list[Evidence]:
    if not references:
        return []
    rows = tuple((one.file, one.name, one.position, one.why) for one in references[:_ROWS])
    left = f" (the first {_ROWS} of {len(references)})" if len(references) > _ROWS else ""
    return [Table(title=title + left, columns=("file", "name", "where", "why"), rows=rows)]


def _excerpts(references: Sequence[Reference]) -> list[Evidence]:
    shown = [one for one in references if one.excerpt][:_EXCERPTS]
    return [Text(title=f"{one.file}: instructions around {one.name}", text=one.excerpt) for one in shown]


def _list(title: str, doubts: Sequence[Doubt]) -> list[Evidence]:
    if not doubts:
        return []
    rest = [f"... and {len(doubts) - _ROWS} more"] if len(doubts) > _ROWS else []
    return [Text(title=title, text="\n".join([*map(str, doubts[:_ROWS]), *rest]))]


def examine_for_loading(path: Path, examination: Examination | None = None) -> Examination:
    """Examine a file or directory that is to be loaded.

    Args:
        examination: what was found in it before; it is not read again then.

    Raises:
        InputError: if it cannot be read, or loading would open a link out of the folder, a pipe or a device.
    """
    try:
        examination = examination or examine(path)
    except CouldNotTell as error:
        raise InputError(str(error)) from error
    for doubt in examination.doubts:
        if doubt.reached and doubt.why.endswith(NOT_OPENED):
            raise InputError(f"{path}: {doubt}; put a regular file in its place, inside the folder")
    return examination


def refuse_code(
    path: Path,
    message: str = "it is not loaded, because loading would run code",
    examination: Examination | None = None,
) -> None:
    """Raise if loading a file or directory would run code, or would open what could not be looked at.

    Args:
        examination: what was found in it before; it is not read again then.

    Raises:
        UnsafeArtifact: with the finding.
        InputError: as `examine_for_loading`.
    """
    examination = examine_for_loading(path, examination)
    runs = [one for one in examination.references if one.reached]
    if runs:
        first = runs[0]
        finding = Finding(
            detector="unsafe-code", level="artifact", kind="unsafe_code", atlas=ATLAS, **conclude(examination)
        )
        raise UnsafeArtifact(f"{path}: {message}: {first.name} in {first.file} {first.why}", finding)
