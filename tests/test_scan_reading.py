"""Files are read for code once: what is found serves the detector and the loader."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from doorward import bundled
from doorward.artifacts.files import _Examiner
from doorward.core.budget import Deadline
from doorward.core.errors import UnsafeArtifact
from doorward.models import LoadOptions, open_classifier
from doorward.models.formats.export import export_onnx
from doorward.scan.context import ScanContext
from doorward.scan.pipeline import _read_files, scan
from doorward.scan.request import ScanRequest

FACTORY = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
"""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the paths that are read for code, as they are read."""
    paths: list[str] = []
    plain = _Examiner.run

    def run(self: _Examiner, path: Path) -> Any:
        paths.append(path.name)
        return plain(self, path)

    monkeypatch.setattr(_Examiner, "run", run)
    return paths


def factory(folder: Path, weights: object) -> dict[str, Any]:
    (folder / "own.py").write_text(FACTORY)
    torch.save(weights, folder / "w.pt")
    return {
        "model": str(folder / "w.pt"),
        "factory": f"{folder / 'own.py'}:build",
        "options": LoadOptions(size=(3, 2, 2)),
    }


def doorward(folder: Path, _: object) -> dict[str, Any]:
    shutil.copytree(bundled.model("clean"), folder / "m")
    return {"model": str(folder / "m")}


def onnx(folder: Path, _: object) -> dict[str, Any]:
    classifier = open_classifier(bundled.model("clean"))
    return {"model": str(export_onnx(classifier, folder / "m.onnx"))}


WEIGHTS = {"1.weight": torch.ones(3, 12), "1.bias": torch.ones(3)}


@pytest.mark.parametrize("form", [factory, doorward, onnx])
def test_every_format_is_read_once(form: Any, read: list[str], tmp_path: Path) -> None:
    given = form(tmp_path, WEIGHTS)
    read.clear()
    report = scan(ScanRequest(detectors=("unsafe-code",), **given))
    assert report.findings[0].detector == "unsafe-code"
    assert report.subject is not None
    assert report.subject.classes, "it was loaded"
    assert read == [Path(given["model"]).name]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1/0",)


@pytest.mark.parametrize("detectors", [("unsafe-code",), ("max-margin",)])
def test_what_was_found_is_refused_by_the_loader(
    detectors: tuple[str, ...], read: list[str], tmp_path: Path
) -> None:
    """Also where the detector of such code was not asked for."""
    report = scan(ScanRequest(detectors=detectors, **factory(tmp_path, Evil())))
    assert report.verdict == "unsafe"
    assert len(read) == 1


def test_a_loader_that_is_handed_nothing_reads_for_itself(read: list[str], tmp_path: Path) -> None:
    given = factory(tmp_path, Evil())
    with pytest.raises(UnsafeArtifact):
        open_classifier(given["model"], factory=given["factory"], options=given["options"])
    assert read == ["w.pt"]


def test_what_was_not_read_to_its_end_is_handed_to_nobody(tmp_path: Path) -> None:
    factory(tmp_path, Evil())
    assert _read_files(tmp_path / "w.pt", ScanContext(deadline=Deadline(0.0))) is None
    found = _read_files(tmp_path / "w.pt", ScanContext())
    assert found is not None
    assert found.references
    assert _read_files(tmp_path / "nowhere.pt", ScanContext()) is None
