"""Files that run code when opened: each is shown to run, and named by Doorward, which runs none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from doorward.artifacts import examine
from doorward.artifacts.findings import conclude
from hostile_files import HOSTILE

#: Opens one file after another, each with its statement; whatever they raise is left to them.
_OPEN_ALL = """
import json, sys, warnings
warnings.simplefilter("ignore")
for path, statement in json.load(sys.stdin):
    try:
        exec(statement, {"path": path})
    except BaseException:
        pass
"""


def write(case: str, folder: Path) -> tuple[Path, Path]:
    """Write a hostile file; return it and the folder that running it makes."""
    path, canary = folder / HOSTILE[case].file, folder / "it ran"
    path.write_bytes(HOSTILE[case].make(canary))
    return path, canary


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_named_and_not_run(case: str, tmp_path: Path) -> None:
    path, canary = write(case, tmp_path)
    conclusion = conclude(examine(path))
    assert conclusion["verdict"] == HOSTILE[case].verdict, conclusion["summary"]
    assert not canary.exists()


def test_there_are_many_kinds() -> None:
    assert len(HOSTILE) >= 70


def test_their_loaders_run_them(tmp_path: Path) -> None:
    """Without this, the tests above would show nothing."""
    opened, canaries = [], {}
    for i, case in enumerate(HOSTILE):
        (tmp_path / str(i)).mkdir()
        path, canary = write(case, tmp_path / str(i))
        if (loader := HOSTILE[case].loader) is not None:
            opened.append((str(path), loader))
            canaries[case] = canary
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL],
        input=json.dumps(opened),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [case for case, canary in canaries.items() if not canary.exists()] == []
    assert len(canaries) >= 60
