"""A detector of somebody else comes in without a change here: installed, found, calibrated, scanned with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from doorward import bundled
from doorward.core.errors import InputError
from doorward.methods import registry

PACKAGE = Path(__file__).parent / "outside_detector"
FILE = PACKAGE / "src" / "flat_images_detector" / "flat_images.py"
NAME = "flat-images"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packages into which the detector's is installed."""
    folder = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")(
        "--target", str(folder), str(PACKAGE)
    )
    return folder


def run(*first: str, site: Path | None = None):
    """Return a function that runs Python in a process of its own, which finds a folder of packages."""
    places = [str(site)] if site else []
    places += [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def go(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *first, *words], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    return go


def doorward(site: Path | None):
    return run("-c", "from doorward.cli.app import main; main()", site=site)


def test_it_is_found_by_its_entry_point(site: Path) -> None:
    assert f"{NAME}: Flat images" in doorward(site)("list", "detectors")
    assert NAME not in registry.modules("detector"), "it is installed for these tests alone"


def test_it_keeps_the_contract(site: Path) -> None:
    code = (
        "from doorward.methods import registry; from doorward.testing import check_detector; "
        f"check_detector(registry.build('detector', '{NAME}', {{}}))"
    )
    assert run("-c", code, site=site)() == "", "it ends well and prints nothing"


def test_it_is_calibrated_on_ten_models_and_scanned_with(site: Path, tmp_path: Path) -> None:
    words = ("--detector", "max-margin", "--detector", NAME, "--format", "json", "--images", "100")
    clean = ("--clean", f"{bundled.FOLDER / 'fashion_mnist'}:test")

    def scan(model: str, *detectors: str, code: int) -> dict:
        given = words if not detectors else ("--detector", *detectors, *words[4:])
        return json.loads(doorward(site)("scan", str(bundled.model(model)), *clean, *given, code=code))

    before = {"clean": scan("clean", "max-margin", code=0), "backdoored": None}
    uncalibrated = scan("clean", code=0)
    (stranger,) = [f for f in uncalibrated["findings"] if f["detector"] == NAME]
    assert "has not been measured" in stranger["uncalibrated"]
    assert uncalibrated["verdict"] == before["clean"]["verdict"]
    assert uncalibrated["p_value"] == before["clean"]["p_value"]

    out = doorward(site)("bench", "calibrate", NAME, "--scale", "smoke", "--cache", str(tmp_path))
    assert re.search(r"written: .*calibration/flat-images\.json \(10 of 10 clean models\)", out)
    file = site / "flat_images_detector" / "calibration" / "flat-images.json"
    assert len(json.loads(file.read_text())["models"]) == 10
    calibrated = scan("clean", NAME, code=0)
    (finding,) = calibrated["findings"]
    assert finding["uncalibrated"] is None
    assert finding["p_value"] == calibrated["p_value"] >= 1 / 11
    # ten models are no measure for the others, which were calibrated on hundreds
    both = scan("clean", code=0)
    assert both["p_value"] == before["clean"]["p_value"]
    assert {f["detector"]: f["uncalibrated"] for f in both["findings"]} == {"max-margin": None, NAME: None}


def test_a_class_in_a_file_is_a_detector_too() -> None:
    named = f"{FILE}:FlatImages"
    report = doorward(None)(
        "scan", str(bundled.model("clean")), "--detector", named, "--format", "json", code=3
    )
    assert "flat-images is not calibrated" in json.loads(report)["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Loud: pass", "is no subclass of doorward.detectors.base.Detector"),
        ("raise RuntimeError('no luck')", "cannot be run: RuntimeError: no luck"),
        ("", "has no class 'Loud'"),
    ],
)
def test_what_is_no_detector_is_refused_in_words(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / f"loud_{len(text)}.py"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        registry.get("detector", f"{file}:Loud")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.py is no file"):
        registry.get("detector", "nowhere.py:Loud")


def test_the_documentation_shows_the_file_as_it_is() -> None:
    page = (Path(__file__).parent.parent / "docs" / "adding-a-detector.md").read_text()
    assert FILE.read_text().strip() in page
    assert (PACKAGE / "pyproject.toml").read_text().strip() in page
