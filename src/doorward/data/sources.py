"""Open whatever holds data: folders, files, names on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from doorward.core.errors import InputError
from doorward.core.paths import neighbours, refuse_unreadable_name, refused_url
from doorward.data.request import Request
from doorward.data.samples import Samples

# one letter and a colon are a Windows drive
_SPLIT = re.compile(r"(?P<path>.{2,}):(?P<split>\w[\w.-]*)", re.DOTALL)
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_FILE_NAME = re.compile(r".*\.(parquet|npz|csv|tsv|jsonl?|ndjson|idx\d?|gz|zip)", re.IGNORECASE)
_IDX = re.compile(r".*(\.idx\d?|ubyte)(\.gz)?", re.DOTALL)
#: What can be done with data of other kinds, by how their names end.
_HINTS = {
    (".npy",): "save images and labels together: numpy.savez('clean.npz', x=images, y=labels)",
    (".pt", ".pth"): "write its tensors as numbers: numpy.savez('clean.npz', x=x.numpy(), y=y.numpy())",
    (".pkl", ".pickle"): "a pickle is not opened, since that may run code; write clean.npz with numpy.savez",
    (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar"): "unpack it, and give the folder",
    (
        ".mat",
        ".h5",
        ".hdf5",
        ".tfrecord",
        ".tfrecords",
    ): "write clean.npz with numpy.savez(..., x=..., y=...)",
}
#: Folders of idx files below the one that torchvision is told.
_RAW = ("raw", "*/raw")
_FILES = ".parquet, .npz, .csv, .tsv, .jsonl, or idx (such as train-images-idx3-ubyte.gz)"


def open_samples(
    path: str | Path,
    *,
    column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    prefer: tuple[str, ...] = ("test", "validation", "val", "train"),
) -> Samples:
    """Open images, texts or recordings, with labels where there are some. Inputs are decoded when asked for.

    Args:
        path: a folder of parquet files in the hub's layout, of images or recordings by class, or of idx
            files; a .parquet, .npz, idx, .csv, .tsv or .jsonl file; or, where no such path exists, the name
            of a data set on the Hugging Face hub. `path:split` picks a split.
        column: the column (or .npz key) of the inputs, where it cannot be told.
        label_column: the column (or .npz key) of the labels, where it cannot be told.
        split: the split, instead of `path:split`.
        classes: class names in the order of their numbers. Data that names its classes is matched by name;
            bare numbers are positions among these names.
        prefer: splits to take, the best first, where there are several and none is asked for.

    Raises:
        InputError: if there is no such path, if it cannot be read, or if split, columns or labels do not fit.
        MissingExtra: if an optional package is needed to read it.
    """
    if not isinstance(path, str | Path):
        raise InputError(
            f"path: expected a path or hub id, got {type(path).__name__}; scan, examine, repair and "
            "Guard.fit take arrays and data sets as they are"
        )
    request = request_of(
        path, column=column, label_column=label_column, split=split, classes=classes, prefer=prefer
    )
    try:
        if request.path.is_dir():
            return _open_folder(request)
        if request.path.is_file():
            return _open_file(request)
    except OSError as error:
        raise InputError(f"{request.path} cannot be read ({error.strerror or error})") from error
    refuse_missing(path, request)
    from doorward.data.hub import open_hub

    return open_hub(request)


def refuse_missing(path: str | Path, request: Request | None = None) -> None:
    """Raise where there is no such file or folder, and no name that the hub could have; read nothing.

    Raises:
        InputError: if there is none.
    """
    if "://" in os.fspath(path):
        raise refused_url(os.fspath(path))
    wanted = (request or request_of(path)).path
    name = os.fspath(wanted)
    # a path that says where it starts is none of the hub's names; Path leaves a leading ./ out
    if os.path.exists(wanted) or (_may_be_on_hub(name) and not os.fspath(path).startswith((".", os.sep))):
        return
    raise InputError(f"there is no file or folder {name!r}{neighbours(wanted)}")


def request_of(
    path: str | Path,
    *,
    column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    prefer: tuple[str, ...] = (),
) -> Request:
    """Return what is asked for; arguments as those of `open_samples`.

    Raises:
        InputError: if two splits are asked for, or the path cannot be read.
    """
    given = os.fspath(path)
    refuse_unreadable_name(given)
    name = given
    if not os.path.lexists(given) and (match := _SPLIT.fullmatch(given)):
        if split is not None and split != match["split"]:
            raise InputError(
                f"{given} asks for split {match['split']!r}, the option for {split!r}; give one of them"
            )
        name, split = match["path"], match["split"]
    names = None if classes is None else tuple(classes)
    return Request(given, Path(name), column, label_column, split, names, tuple(prefer))


def _may_be_on_hub(name: str) -> bool:
    """Return whether a path that does not exist may be a data set's name, which lies in no folder."""
    in_folder = "/" in name and Path(name).parent.exists()
    return _HUB_NAME.fullmatch(name) is not None and _FILE_NAME.fullmatch(name) is None and not in_folder


def _open_folder(request: Request) -> Samples:
    from doorward.data.arrays import find_idx, open_idx
    from doorward.data.folders import find_media, open_folder
    from doorward.data.hub import is_saved, open_saved
    from doorward.data.parquet import find_parquet, open_parquet

    if is_saved(request.path):
        return open_saved(request)
    if splits := find_parquet(request.path):
        return open_parquet(request, splits)
    if images := find_idx(request.path):
        return open_idx(request, images)
    below = [place for pattern in _RAW for place in request.path.glob(pattern) if place.is_dir()]
    if len(below) == 1 and (images := find_idx(below[0])):
        return open_idx(request, images)
    media = find_media(request.path)
    if media.files:
        return open_folder(request, media)
    inside = sorted(entry.name for entry in request.path.iterdir())
    if any(name.startswith("data_batch") for name in inside):
        raise InputError(
            f"{request.path} holds the batches of CIFAR as pickles, which are not opened, since that may run "
            "code; write clean.npz with numpy.savez, or give a parquet file or a folder of images"
        )
    shown = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
    raise InputError(
        f"{request.path} is a folder without parquet files, idx files, images or recordings: "
        f"{'; '.join([f'it holds {shown}' if inside else 'it is empty', *media.notes])}. "
        f"Of other data, give the file itself ({_FILES})"
    )


def _open_file(request: Request) -> Samples:
    name = request.path.name.lower()
    if name.endswith(".parquet"):
        from doorward.data.parquet import open_parquet, split_of

        return open_parquet(request, {split_of(request.path): [request.path]})
    if name.endswith(".npz"):
        from doorward.data.arrays import open_npz

        return open_npz(request)
    if name.endswith((".csv", ".tsv", ".jsonl", ".ndjson", ".json")):
        from doorward.data.tables import open_table

        return open_table(request)
    if _IDX.fullmatch(name):
        from doorward.data.arrays import open_idx

        return open_idx(request, {})
    hint = next((f"; {said}" for ends, said in _HINTS.items() if name.endswith(ends)), "")
    raise InputError(
        f"{request.path} is no file that can be read as data; expected {_FILES}, or a folder{hint}"
    )
