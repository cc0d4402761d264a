"""What all tests share: real data where it is at hand, one thread, no network, repeatable examples."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

# Set before the libraries are imported: a test never reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from pydantic import BaseModel

import html_pages
from copies import checked_copy

# pydantic takes any name in `update`: one that is no field is lost without a word
BaseModel.model_copy = checked_copy  # type: ignore[method-assign]

torch.set_num_threads(1)
settings.register_profile(
    "doorward",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("doorward")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes and what others wait for: the README's commands."""
    items.sort(key=lambda item: item.path.name != "test_cli_demo.py")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data sets, or skip."""
    path = os.environ.get("DOORWARD_DATA")
    if not path:
        pytest.skip("DOORWARD_DATA does not name the folder of real data sets")
    assert Path(path).is_dir(), f"DOORWARD_DATA={path} is no folder"
    return Path(path)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all test processes of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def untouched() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that asserts that its block leaves the host process as it was."""
    from doorward import testing

    return testing.untouched


@pytest.fixture(scope="module")
def preloaded_workers() -> Iterator[None]:
    """Let workers of a run start from a process that has imported what they need, to save seconds each."""
    from doorward.bench import runner

    # torch imports its compiler with the first optimiser, whether it compiles or not
    multiprocessing.set_forkserver_preload([runner.TrialRunner.__module__, "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "START_METHOD", "forkserver")
        yield


@pytest.fixture
def quick_surrogates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attacks train their surrogates for a moment, where it does not matter how good those are."""
    monkeypatch.setattr("doorward.attacks.data._surrogate.SURROGATE_SEEN", 400)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[html_pages.Browser]:
    """Return a headless browser."""
    if not html_pages.CHROMIUM or not html_pages.DRIVER:
        pytest.skip("Debian's chromium and chromium-driver are not installed")
    page = html_pages.Browser(tmp_path_factory.mktemp("browser"))
    yield page
    page.driver.quit()
