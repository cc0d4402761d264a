"""Where links lead: nothing outside of a model's folder is opened, but for the store of the hub's cache."""

from __future__ import annotations

from pathlib import Path

from doorward.core.files import is_inside


def leaves(path: Path, root: Path, *, is_folder: bool = False) -> bool:
    """Return whether a path leads out of a folder, and not to a file in the store of the hub's cache."""
    return not is_inside(path, root) and (is_folder or not _in_hub_cache(path, root))


def _in_hub_cache(path: Path, folder: Path) -> bool:
    """Return whether a link in a folder of the Hugging Face hub's cache leads to the cache's own store.

    The cache keeps files below `blobs` and shows them by links below `snapshots`, for each repository.
    """
    target = path.resolve()
    for above in (folder.resolve(), *folder.resolve().parents):
        if above.name == "snapshots":
            return target.parent == above.parent / "blobs"
    return False
