"""The hook in `.pre-commit-hooks.yaml`, run by pre-commit itself on a small repository."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
HOOKS: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


class RunsCode:
    """An object whose pickle would run a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("true",)


def git(folder: Path, *words: str) -> str:
    """Run git in a folder as somebody, with nobody's configuration."""
    who = {
        f"GIT_{role}_{what}": "a@example.org"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    env = os.environ | who | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", *words], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path) -> Path:
    """Return a new repository."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    return folder


def commit(folder: Path) -> str:
    """Commit all that is in a repository, and return the revision."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


@pytest.mark.skipif(find_spec("pre_commit") is None, reason="pre-commit is not installed")
@pytest.mark.parametrize("hook", [one["id"] for one in HOOKS])
def test_a_model_that_runs_code_is_not_committed(hook: str, tmp_path: Path) -> None:
    """The package is built and installed by pre-commit; its dependencies are those of this test."""
    source = repository(tmp_path / "source")
    for name in (".pre-commit-hooks.yaml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    revision = commit(source)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "doorward").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m doorward "$@"\n')
    (programs / "doorward").chmod(0o755)
    places = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    env = os.environ | {
        "PRE_COMMIT_HOME": str(tmp_path / "pre-commit"),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "VIRTUALENV_NO_PERIODIC_UPDATE": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # in a variable, this is what --no-build-isolation is
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(places)),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    if hook == "doorward-files-installed":
        env |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}

    own = repository(tmp_path / "own")
    config = {"repos": [{"repo": str(source), "rev": revision, "hooks": [{"id": hook}]}]}
    (own / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    (own / "notes.txt").write_bytes(pickle.dumps(RunsCode()))  # no ending of a model's: not looked at

    def check() -> tuple[int, str]:
        git(own, "add", "--all")
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--all-files", "--verbose"],
            cwd=own,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    (own / "weights.PT").write_bytes(pickle.dumps({"a": 1}))
    code, said = check()
    assert code == 0, said
    assert "weights.PT: Loading it would run no code of its own" in said
    (own / "evil.ckpt").write_bytes(pickle.dumps(RunsCode()))
    code, said = check()
    assert code == 1, said
    assert "exit code: 1" in said
    assert "evil.ckpt: Loading it would run code" in said
    assert "notes.txt" not in said


def test_both_hooks_check_the_same_files_alike() -> None:
    assert [one["id"] for one in HOOKS] == ["doorward-files", "doorward-files-installed"]
    assert len({(one["entry"], one["files"], tuple(one["types"])) for one in HOOKS}) == 1
