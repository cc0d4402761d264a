"""Models of an MLflow registry: every version scanned once, the verdict written to it."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from command_line import assert_one_line, call
from doorward.fleet.remote import is_address, join
from doorward.fleet.store import Done
from doorward.fleet.tags import tags
from test_fleet import Harmful

MLFLOW = importlib.util.find_spec("mlflow") is not None
needs_mlflow = pytest.mark.skipif(not MLFLOW, reason="MLflow is not installed")
GOOD, BAD = pickle.dumps({"weight": [1]}, protocol=2), pickle.dumps(Harmful())


def done(path: str, verdict: str | None, **words: Any) -> Done:
    state = "failed" if verdict is None else "done"
    return Done(key=f"key of {path}", digest="d", path=path, state=state, verdict=verdict, **words)


def test_a_version_has_the_tags_of_its_worst_file() -> None:
    rows = [
        done("models:/cat/1/model.onnx", "nothing_found", p_value=0.4),
        done("models:/cat/1/python_model.pkl", "unsafe"),
        done("models:/cat/2", "backdoored", p_value=0.00123456, targets=("lynx", "lion")),
        done("models:/dog/10", None, error="it did not end"),
        done("s3://bucket/cat/1", "unsafe"),
        Done(key="k", digest="d", path="models:/dog/11", state="waiting"),
    ]
    assert tags(rows, "s3://out") == {
        ("cat", "1"): {
            "doorward.verdict": "unsafe",
            "doorward.sha256": "d",
            "doorward.report": "s3://out/reports/key of models:/cat/1/python_model.pkl.html",
        },
        ("cat", "2"): {
            "doorward.verdict": "backdoored",
            "doorward.p_value": "0.001235",
            "doorward.targets": "lynx, lion",
            "doorward.sha256": "d",
            "doorward.report": "s3://out/reports/key of models:/cat/2.html",
        },
        ("dog", "10"): {
            "doorward.verdict": "failed",
            "doorward.sha256": "d",
            "doorward.error": "it did not end",
        },
    }
    assert tags(rows)["cat", "2"]["doorward.report"] == "key of models:/cat/2"


def test_registries_have_addresses() -> None:
    assert is_address("models:/")
    assert is_address("models:/cat/1")
    assert not is_address("models/cat")
    assert join("models:/", "cat") == "models:/cat"


def test_what_is_missing_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = ("fleet", "scan", "--store", f"sqlite:///{tmp_path}/fleet.sqlite", "models:/cat")
    for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    if not MLFLOW:
        assert_one_line(call(*scan), "'mlflow-skinny': pip install 'doorward[mlflow]'")
        return
    assert_one_line(call(*scan), "MLFLOW_TRACKING_URI says where the registry is")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.sqlite")
    assert_one_line(call(*scan), "none.sqlite: there is no such file")
    assert not (tmp_path / "none.sqlite").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    told = call(*scan)
    assert_one_line(told, "no server answers at 127.0.0.1:1")
    assert "secret" not in told.err


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/registry.sqlite")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/registry.sqlite")


def register(registry: Any, folder: Path, name: str, **files: bytes) -> None:
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / f"{file}.pkl").write_bytes(content)
    (folder / "MLmodel").write_text("flavors: {}\n")
    if not list(registry.search_registered_models(f"name = '{name}'")):
        registry.create_registered_model(name)
    registry.create_model_version(name, str(folder))


@needs_mlflow
@pytest.mark.filterwarnings("default")
def test_new_versions_are_scanned_and_tagged(registry: Any, tmp_path: Path) -> None:
    register(registry, tmp_path / "a", "cat", model=GOOD)
    register(registry, tmp_path / "b", "cat", model=GOOD + b"", loader=BAD)
    register(registry, tmp_path / "c", "dog", model=GOOD)
    scan = ("fleet", "scan", "--store", f"sqlite:///{tmp_path}/fleet.sqlite", "--detector", "unsafe-code")
    first = call(*scan, "models:/cat", "--out", tmp_path / "out")
    assert first.code == 1, first.err
    assert "unsafe: models:/cat/2/loader.pkl" in first.out

    def tagged(name: str, version: int) -> dict[str, str]:
        found: dict[str, str] = registry.get_model_version(name, str(version)).tags
        return found

    assert tagged("cat", 1)["doorward.verdict"] == "could_not_tell"
    assert tagged("cat", 2)["doorward.verdict"] == "unsafe"
    assert Path(tagged("cat", 2)["doorward.report"]).is_file()
    assert tagged("dog", 1) == {}
    # what is known is scanned no second time; a new version is
    register(registry, tmp_path / "d", "cat", model=BAD + b"new")
    again = call(*scan, "models:/", "--new-only", "--no-tags")
    assert again.code == 1, again.err
    assert "models:/cat/2" not in again.err
    assert "models:/cat/3/model.pkl: unsafe" in again.err
    assert tagged("cat", 3) == {}
    third = call(*scan, "models:/cat/3")
    assert third.code == 1, third.err
    assert tagged("cat", 3)["doorward.verdict"] == "unsafe"
    # tags that no longer hold are removed, those of others stay
    registry.set_model_version_tag("cat", "3", "doorward.p_value", "0.5")
    registry.set_model_version_tag("cat", "3", "owner", "me")
    assert call(*scan, "models:/cat/3").code == 1
    assert "doorward.p_value" not in tagged("cat", 3)
    assert tagged("cat", 3)["owner"] == "me"
    assert_one_line(call(*scan, "models:/bird"), "models:/bird: there is nothing")
    assert_one_line(call(*scan, "models:/cat/9"), "models:/cat/9: there is nothing")
