"""The notebook of `examples/` runs, and shows what it says."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import nbclient
import nbformat
import pytest

from documents import ROOT

NOTEBOOK = ROOT / "examples" / "first-look.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the cells of code after all have run; the first that fails is an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}})
    with warnings.catch_warnings(action="ignore"):  # of Jupyter's own parts
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell: Any) -> str:
    """Return what a cell printed, and what its last value looks like as text."""
    return "\n".join(one.get("text") or one.data["text/plain"] for one in cell.outputs)


def test_nothing_is_kept_of_an_earlier_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.long
@pytest.mark.trains
def test_it_scans_mends_guards_and_inspects(cells: list[Any]) -> None:
    _, report, verdict, mended, guard, _, data = cells
    assert "&lt;h1" in report.outputs[0].data["text/html"], "a notebook shows the report's page"
    assert re.fullmatch(r"(suspicious|backdoored) \['T - shirt / top'\]", said(verdict).strip())
    before, now = map(int, re.findall(r"(\d+)%", said(mended).splitlines()[0]))
    assert before > 90 > 20 > now
    assert re.search(r"(suspicious|backdoored) -> nothing_found", said(mended))
    clean, triggered = (float(one) for one in re.findall(r"0?\.\d+|[01]\.0", said(guard))[:2])
    assert clean < 0.15 < triggered
    flagged, wrong = map(int, re.findall(r"(\d+) (?:samples|of them)", said(data)))
    assert flagged >= 80
    assert wrong <= flagged / 10
