"""Files of odd kinds that run nothing: none of them becomes an alarm or a doubt."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import random
import sqlite3
import struct
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from doorward.artifacts import examine
from doorward.artifacts.findings import conclude
from hostile_files import elf, tarred

ELF = elf(Path())


def torch_of(value: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).bytes(4000))
    return buffer.getvalue()


def safetensors_of(data: bytes) -> bytes:
    import safetensors.torch

    return bytes(safetensors.torch.save({"w": tensor_of(data)}))


def joblib_of(value: Any, **settings: Any) -> bytes:
    import joblib

    buffer = io.BytesIO()
    joblib.dump(value, buffer, **settings)
    return buffer.getvalue()


def npz_of(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_of(array: Any, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=version)
    return buffer.getvalue()


def zip_of(compression: int = zipfile.ZIP_DEFLATED, comment: bytes = b"", **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.comment = comment
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class _Unseekable(io.RawIOBase):
    """Writing to this makes an archive state sizes behind its members."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


def streamed_zip() -> bytes:
    stream = _Unseekable()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[type-var]
        archive.writestr("a.txt", b"x" * 500)
        archive.writestr("b.txt", b"")
    return stream.data


def tarred_pictures() -> bytes:
    files = [(f"{i}.png", picture("png")) for i in range(3)]
    links = (("latest.png", "0.png", tarfile.SYMTYPE), ("first.png", "0.png", tarfile.LNKTYPE))
    return tarred(tarfile.GNU_FORMAT, *files, links=links)


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (a)")
    return connection.serialize()


def exported() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), buffer)
    return buffer.getvalue()


def keras_of(layer: dict[str, Any]) -> bytes:
    return zip_of(**{"config.json": json.dumps({"class_name": "Sequential", "config": [layer]}).encode()})


def h5_of(config: str) -> bytes:
    return b"\x89HDF\r\n\x1a\n" + bytes(80) + config.encode() + bytes(80)


STATE = {"a.weight": torch.arange(6.0), "a.bias": torch.zeros(2)}
ARRAYS = {"a": np.arange(12.0).reshape(3, 4), "b": [np.array(["x", "yz"]), np.zeros((0, 3))], "c": (1, "d")}
DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"activation": "relu"}}
#: Bytes that a tensor, an image or a file of numbers may begin with by chance.
HEADS: dict[str, bytes] = {
    "a program": b"\x7fELF",
    "a whole header of a program": ELF,
    "a program for a Mac": b"\xcf\xfa\xed\xfe",
    "a program for Windows": b"MZ",
    "a pickle": b"\x80\x04\x95",
    "an old pickle": b"(dp0\n",
    "zlib": b"\x78\x9c",
    "lzma": b"\x5d\x00",
    "bzip2": b"BZh9",
    "joblib": b"ZF0x",
    "gzip": b"\x1f\x8b\x08",
    "one and the same mark": b"(" * 3000,
    "one and the same constant": b"\x88" * 3000,
    "an import": b"cutlery\nfork\n",
}

HARMLESS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "class names": ("labels.txt", lambda: b"cat\ndog\nfrog\nhorse\n"),
    "class names that import": ("labels.txt", lambda: b"class\nimage\ncar\n"),
    "a table that begins with a bracket": ("a.csv", lambda: b"(a,b)\n1,2\n"),
    "a readme": ("README.md", lambda: b"import os; os.system('ls')\n!!python/object/apply:os.system\n"),
    "an empty file": ("a.bin", lambda: b""),
    "one instruction": ("a.txt", lambda: b"."),
    "png": ("a.png", lambda: picture("png")),
    "jpeg": ("a.jpg", lambda: picture("jpeg")),
    "gif named as weights": ("weights.bin", lambda: picture("gif")),
    "sound": ("a.wav", sound),
    "a database": ("a.db", database),
    "state_dict": ("a.pt", lambda: torch_of(STATE)),
    "state_dict under another name": ("a.weights", lambda: torch_of(STATE)),
    "state_dict before zip": ("a.pth", lambda: torch_of(STATE, _use_new_zipfile_serialization=False)),
    "state_dict before zip under another name": (
        "a.weights",
        lambda: torch_of(STATE, _use_new_zipfile_serialization=False),
    ),
    "no tensors before zip": ("a.pt", lambda: torch_of({"a": 1}, _use_new_zipfile_serialization=False)),
    "a program of torch.export": ("a.pt2", exported),
    **{
        f"a tensor that begins like {name}": (
            "a.pt",
            lambda head=head: torch_of({"w": tensor_of(head + b"\xff")}),
        )
        for name, head in HEADS.items()
    },
    **{
        f"numbers that begin like {name}": (
            "weights.bin",
            lambda head=head: head + np.random.default_rng(1).bytes(9000),
        )
        for name, head in HEADS.items()
        if name != "a whole header of a program"
    },
    "safetensors": ("a.safetensors", lambda: safetensors_of(ELF)),
    "plain data of protocol 0": ("a.bin", lambda: pickle.dumps({"a": [1, 2.5, None, "x"]}, 0)),
    "two pickles of plain data": ("a.pkl", lambda: pickle.dumps([1]) + pickle.dumps({"a": 2})),
    "plain data and what follows": ("a.bin", lambda: pickle.dumps([1]) + b"\x00\x01rest of the file"),
    "a long text in a pickle": ("a.pkl", lambda: pickle.dumps("x" * 3_000_000, 0)),
    "arrays of joblib": ("a.joblib", lambda: joblib_of(ARRAYS)),
    "arrays of joblib, protocol 0": ("a.joblib", lambda: joblib_of(ARRAYS, protocol=0)),
    "arrays of joblib, packed": ("a.joblib.z", lambda: joblib_of(ARRAYS, compress=3)),
    "arrays of joblib, packed by lzma": ("a.dat", lambda: joblib_of(ARRAYS, compress=("lzma", 3))),
    "arrays of objects of joblib": ("a.joblib", lambda: joblib_of([np.array([{}, None], dtype=object)])),
    "npz": ("a.npz", lambda: npz_of(a=np.zeros(3), b=np.array(["x"]))),
    "npy of fields": ("a.npy", lambda: npy_of(np.zeros(2, dtype=[("a", "f8"), ("b", "i4", 3)]))),
    "npy by Python 2": (
        "a.npy",
        lambda: (
            b"\x93NUMPY\1\0\x40\0{'descr': '<f8', 'fortran_order': False, 'shape': (1L,), }     \n" + bytes(8)
        ),
    ),
    "npy of version 3": ("a.npy", lambda: npy_of(np.zeros(2, dtype=[("ä", "f8")]), (3, 0))),
    "zip": ("a.zip", lambda: zip_of(a=b"x", b=picture("png"))),
    "zip with a comment": ("a.zip", lambda: zip_of(comment=b"made by hand", a=b"x")),
    "zip of zips": ("a.zip", lambda: zip_of(zipfile.ZIP_STORED, a=zip_of(b=b"x"), c=zip_of(d=b""))),
    "zip without members": ("a.zip", lambda: zip_of()),
    "zip that was streamed": ("a.zip", streamed_zip),
    "tar of pictures": ("a.tar", tarred_pictures),
    "packed tar": ("a.tar.gz", lambda: gzip.compress(tarred_pictures())),
    "packed text": ("a.txt.bz2", lambda: bz2.compress(b"cat\ndog\n")),
    "packed numbers": ("a.bin", lambda: zlib.compress(struct.pack("<99f", *range(99)))),
    "YAML": (
        "a.yaml",
        lambda: b"a: !!float 1\nb: !local x\nc: [!!python/tuple [1]]\n# !!python/object:os.x\n",
    ),
    "settings of a tokenizer": (
        "tokenizer_config.json",
        lambda: json.dumps({"tokenizer_file": "/elsewhere/tokenizer.json", "auto_map": {}}).encode(),
    ),
    "attention without a kernel": (
        "config.json",
        lambda: json.dumps({"_attn_implementation": "sdpa", "attn_implementation": None}).encode(),
    ),
    "Keras": ("a.keras", lambda: keras_of(DENSE)),
    "Keras with a function of its own": (
        "a.keras",
        lambda: keras_of({"module": "builtins", "class_name": "function", "config": "softmax"}),
    ),
    "Keras in HDF5": ("a.h5", lambda: h5_of('{"class_name": "Dense", "module": "keras.layers"}')),
    "text that speaks of Lambda in HDF5": ("a.h5", lambda: h5_of('{"note": "class_name Lambda"}')),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_a_harmless_file_is_no_alarm_and_no_doubt(case: str, tmp_path: Path) -> None:
    name, make = HARMLESS[case]
    (tmp_path / name).write_bytes(make())
    examination = examine(tmp_path / name)
    assert (examination.references, examination.doubts) == ([], [])
    conclusion = conclude(examination)
    assert (conclusion["verdict"], conclusion["score"], conclusion["evidence"]) == ("nothing_found", 0.0, ())


def test_there_are_many_kinds() -> None:
    assert len(HARMLESS) >= 60


def test_random_bytes_are_no_alarm(tmp_path: Path) -> None:
    """Also where each of them is an instruction, and where they begin like some format."""
    generator = random.Random(0)
    instructions = [
        code for code in range(256) if code in set(b"()0123IJKLMNQVX]abdehlopqrtu}.\x80\x85\x88\x89\x94")
    ]
    for i in range(600):
        pool = instructions if i % 2 else list(range(256))
        head = generator.choice([b"", *HEADS.values()])[:4]
        data = head + bytes(generator.choice(pool) for _ in range(generator.randint(0, 3000)))
        (tmp_path / f"{i}.bin").write_bytes(data)
    examination = examine(tmp_path)
    assert (examination.references, examination.doubts) == ([], [])
    assert examination.files >= 600  # and what may be packed in some of them
