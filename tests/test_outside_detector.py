"""A detector of somebody else comes in without a change here: installed, found, calibrated, scanned with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import CLEAN, CLOTHES, call
from doorward.bench.suite import get_suite
from doorward.core.errors import InputError
from doorward.methods import registry
from doorward.testing import check_detector

PACKAGE = Path(__file__).parent / "outside_detector"
FILE = PACKAGE / "src" / "flat_images_detector" / "flat_images.py"
NAME = "flat-images"


def python(*words: str, site: Path | None = None) -> str:
    """Run Python in a process of its own, which finds a folder of packages; return what it prints."""
    places = [str(site)] if site else []
    places += [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packages into which the detector's is installed."""
    folder = tmp_path_factory.mktemp("site")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    python("-m", "pip", "install", "--quiet", *offline, "--target", str(folder), str(PACKAGE))
    return folder


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Let this process know nothing of the detector after a test."""
    yield
    registry._registered.pop(("detector", NAME), None)
    for module in [name for name in sys.modules if name.startswith(("flat_images", "flat_images_detector"))]:
        del sys.modules[module]


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> Path:
    """Let this process find the detector's package too: a process of its own costs seconds each."""
    monkeypatch.syspath_prepend(str(site))
    return site


def test_it_is_found_by_its_entry_point(site: Path) -> None:
    code = "from doorward.cli.app import main; main()"
    assert f"{NAME}: Flat images" in python("-c", code, "list", "detectors", site=site)
    assert NAME not in registry.modules("detector"), "it is installed for these tests alone"


@pytest.mark.usefixtures("installed")
def test_it_keeps_the_contract(capfd: pytest.CaptureFixture[str]) -> None:
    check_detector(registry.build("detector", NAME, {}))
    assert capfd.readouterr().out == ""


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ten models of a calibration be trained on a few images: how good they are does not matter."""
    suite = get_suite("calibration")
    (group,) = suite.scales["smoke"]
    small = group.model_copy(
        update={
            "data": group.data.model_copy(update={"rows": 240}),
            "architectures": ("small-cnn",),
            "training": {"epochs": 3},
        }
    )
    monkeypatch.setitem(suite.scales, "smoke", (small,))


@pytest.mark.long
@pytest.mark.usefixtures("small_models", "preloaded_workers")
def test_it_is_calibrated_on_ten_models_and_scanned_with(installed: Path, tmp_path: Path) -> None:
    def scan(*detectors: str) -> dict[str, Any]:
        named = [word for name in detectors for word in ("--detector", name)]
        done = call("scan", CLEAN, "--clean", CLOTHES, *named, "--format", "json", "--images", 100)
        assert done.code == 0, done
        report: dict[str, Any] = json.loads(done.out)
        return report

    before = scan("max-margin")
    uncalibrated = scan("max-margin", NAME)
    (stranger,) = [f for f in uncalibrated["findings"] if f["detector"] == NAME]
    assert "has not been measured" in stranger["uncalibrated"]
    assert uncalibrated["verdict"] == before["verdict"]
    assert uncalibrated["p_value"] == before["p_value"]

    done = call("bench", "calibrate", NAME, "--scale", "smoke", "--cache", tmp_path)
    assert done.code == 0, done
    assert re.search(r"written: .*calibration/flat-images\.json \(10 of 10 clean models\)", done.out)
    file = installed / "flat_images_detector" / "calibration" / "flat-images.json"
    assert len(json.loads(file.read_text())["models"]) == 10
    calibrated = scan(NAME)
    (finding,) = calibrated["findings"]
    assert finding["uncalibrated"] is None
    assert finding["p_value"] == calibrated["p_value"] >= 1 / 11
    # ten models are no measure for the others, which were calibrated on hundreds
    both = scan("max-margin", NAME)
    assert both["p_value"] == before["p_value"]
    assert {f["detector"]: f["uncalibrated"] for f in both["findings"]} == {"max-margin": None, NAME: None}


@pytest.mark.usefixtures("forgotten")
def test_a_class_in_a_file_is_a_detector_too() -> None:
    done = call("scan", CLEAN, "--detector", f"{FILE}:FlatImages", "--format", "json")
    assert done.code == 3, done
    assert "flat-images is not calibrated" in json.loads(done.out)["reason"]


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
