"""The model cache: entries are whole or absent, whatever happens to the disk or the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from doorward.bench.cache import META, SUMS, ModelCache
from doorward.core.errors import InputError

KEY = "ab" * 32


def write(folder: Path) -> dict[str, Any]:
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    return {"seconds": 1.5}


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    found = ModelCache(tmp_path / "cache")
    found.put(KEY, write)
    return found


def test_an_entry_comes_back(cache: ModelCache) -> None:
    place = cache.get(KEY)
    assert place == cache.place(KEY)
    assert sorted(file.name for file in place.iterdir()) == [SUMS, "config.json", META, "model.safetensors"]
    assert cache.meta(KEY) == {"seconds": 1.5}
    assert list((cache.folder / "making").iterdir()) == []
    assert cache.get("cd" * 32) is None


def test_the_sums_are_those_of_sha256sum(cache: ModelCache) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=cache.place(KEY), check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", META, SUMS])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_absent_and_can_be_made_again(cache: ModelCache, name: str, damage: str) -> None:
    file = cache.place(KEY) / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    assert cache.get(KEY) is None
    assert not cache.place(KEY).exists()
    cache.put(KEY, write)
    assert cache.get(KEY) is not None


def test_a_strange_file_in_an_entry_is_damage(cache: ModelCache) -> None:
    (cache.place(KEY) / "plant.json").write_text("{}")
    assert cache.get(KEY) is None


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)

    def fail(folder: Path) -> dict[str, Any]:
        write(folder)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        cache.put(KEY, fail)
    assert cache.get(KEY) is None
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


def test_a_second_writer_of_the_same_content_is_no_error(cache: ModelCache) -> None:
    first = (cache.place(KEY) / SUMS).stat().st_ino
    assert cache.put(KEY, write) == cache.place(KEY)
    assert (cache.place(KEY) / SUMS).stat().st_ino == first, "the first one's files stay"
    assert list((cache.folder / "making").iterdir()) == []


def test_what_a_killed_process_left_is_swept(cache: ModelCache) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom doorward.bench.cache import ModelCache\n"
        "def die(folder):\n    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "ModelCache(Path(sys.argv[1])).put('cd' * 32, die)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(cache.folder)], check=False)
    assert done.returncode == -9
    (left,) = (cache.folder / "making").iterdir()
    assert (left / "half").exists()
    assert cache.get("cd" * 32) is None
    mine = cache.folder / "making" / f"{os.getpid()}-mine"
    mine.mkdir()
    cache.sweep()
    assert list((cache.folder / "making").iterdir()) == [mine], "what is being made stays"
    assert cache.get(KEY) is not None


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the cache .*file cannot be written to \(Not a directory\)"):
        ModelCache(tmp_path / "file").put(KEY, write)


def test_meta_is_readable_json(cache: ModelCache) -> None:
    assert json.loads((cache.place(KEY) / META).read_text()) == {"seconds": 1.5}
