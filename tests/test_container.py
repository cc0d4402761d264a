"""The Dockerfile, as far as it can be checked without Docker."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def test_it_copies_what_there_is_and_what_is_not_left_out() -> None:
    kept = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    sources = [word for one in instructions("COPY") if "--from" not in one for word in one.split()[:-1]]
    assert sources == ["pyproject.toml", "README.md", "LICENSE", "constraints.txt", "src"]
    for name in sources:
        assert (ROOT / name).exists()
        assert f"!{name}" in kept


def test_it_runs_as_a_user_without_rights_and_with_pinned_versions() -> None:
    assert instructions("USER") == ["doorward"]
    assert "useradd" in instructions("RUN")[1]
    assert "--constraint constraints.txt" in instructions("RUN")[0]
    assert instructions("ENTRYPOINT") == ['["doorward"]']
