"""Files that run code when their usual loader opens them, made here and never loaded by Doorward.

The code makes a folder (`os.mkdir`), by which a test sees whether it ran. Each file comes with the statement
that opens it, where that loader is among the packages that the tests need anyway.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import marshal
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Mark:
    """Make a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@dataclass(frozen=True)
class Hostile:
    """A hostile file.

    Attributes:
        file: its name.
        make: returns its bytes, for the folder that running it makes.
        loader: Python that opens `path`, or None where the loader is not at hand.
        verdict: what `unsafe-code` says of it.
    """

    file: str
    make: Callable[[Path], bytes]
    loader: str | None
    verdict: str = "unsafe"


PICKLE = "import pickle; pickle.load(open(path, 'rb'))"
PICKLE_IN_MEMORY = "import io, pickle; pickle.load(io.BytesIO(open(path, 'rb').read()))"
TWO_PICKLES = "import pickle; f = open(path, 'rb'); pickle.load(f); pickle.load(f)"
TORCH = "import torch; torch.load(path, weights_only=False)"
JOBLIB = "import joblib; joblib.load(path)"
DILL = "import dill; dill.load(open(path, 'rb'))"
NUMPY = "import numpy; numpy.load(path, allow_pickle=True)"
NUMPY_MEMBERS = "import numpy; list(numpy.load(path, allow_pickle=True).values())"
GZIP = "import gzip, pickle; pickle.load(gzip.open(path))"
BZ2 = "import bz2, pickle; pickle.load(bz2.open(path))"
LZMA = "import lzma, pickle; pickle.load(lzma.open(path))"
ZLIB = "import zlib, pickle; pickle.loads(zlib.decompress(open(path, 'rb').read()))"
PANDAS_ZIP = "import zipfile, pickle; z = zipfile.ZipFile(path); pickle.load(z.open(z.namelist()[0]))"
YAML = "import yaml; yaml.unsafe_load(open(path, 'rb'))"
PYTHON = "import runpy; runpy.run_path(path)"


# --- pickles -----------------------------------------------------------------------------------------------


def protocol(number: int) -> Callable[[Path], bytes]:
    return lambda canary: pickle.dumps(Mark(canary), protocol=number)


def text(canary: Path) -> bytes:
    """Protocol 0 with nothing but a global and its call."""
    return f"cos\nmkdir\n(V{canary}\ntR.".encode()


def before(first: bytes) -> Callable[[Path], bytes]:
    """Instructions that leave one value, taken off again, before the call."""
    return lambda canary: first + b"0" + text(canary)


def behind(first: bytes) -> Callable[[Path], bytes]:
    """Bytes in front of the whole pickle."""
    return lambda canary: first + text(canary)


def ahead(last: bytes) -> Callable[[Path], bytes]:
    """The pickle without its last instruction, and other bytes in its place."""
    return lambda canary: text(canary)[:-1] + last


def inst(canary: Path) -> bytes:
    return f"(V{canary}\nios\nmkdir\n.".encode()


def obj(canary: Path) -> bytes:
    return f"(cos\nmkdir\nV{canary}\no.".encode()


def newobj_ex(canary: Path) -> bytes:
    """Make an object of a class whose constructor opens a file; the folder is made by what follows."""
    return f"\x80\x04cos\nmkdir\n(V{canary}\nt\x85\x81.".encode("latin-1")[:-4] + b"R."


def computed_by_str(canary: Path) -> bytes:
    """The module's name is the value of a harmless call."""
    return f"\x80\x04cbuiltins\nstr\n(Vos\ntRVmkdir\n\x93(V{canary}\ntR.".encode("latin-1")


def computed_by_rot13(canary: Path) -> bytes:
    return f"\x80\x04c_codecs\nencode\n(Vbf\nVrot13\ntRVmkdir\n\x93(V{canary}\ntR.".encode("latin-1")


def memo_in_decimal(canary: Path) -> bytes:
    """Names in the memo at places that octal numbers would miss."""
    return f"\x80\x04Vos\np010\n0Vsafe\np8\n0g10\nVmkdir\n\x93(V{canary}\ntR.".encode("latin-1")


def long_line(canary: Path) -> bytes:
    """A text of two million characters on one line."""
    return b"V" + b"x" * (2 << 20) + b"\n0" + text(canary)


def frames_that_overlap(canary: Path) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N0N0" + text(canary)


def across_frames(canary: Path) -> bytes:
    """To the unpickler in C a line across the end of a frame is what is behind it: p1|0 means p0.

    That holds where it reads from an object that cannot be peeked into, as memory.
    """

    def frame(data: bytes) -> bytes:
        return b"\x95" + struct.pack("<Q", len(data)) + data

    names = frame(b"Vbuiltins\np0\n0Vlist\np1\n0Vos\np1") + b"0\n0" + frame(b"Vmkdir\np1") + b"1\n0"
    return b"\x80\x04" + names + f"g0\ng1\n\x93(V{canary}\ntR.".encode("latin-1")


def getattr_chain(canary: Path) -> bytes:
    call = f"cbuiltins\ngetattr\n(cos\npath\nVos\ntRp1\n0cbuiltins\ngetattr\n(g1\nVmkdir\ntR(V{canary}\ntR."
    return call.encode()


def python_2_names(canary: Path) -> bytes:
    return f"c__builtin__\neval\n(V__import__('os').mkdir('{canary}')\ntR.".encode()


def setstate(canary: Path) -> bytes:
    """Change a class that others use: what is set here is called by whoever reads the attribute later."""
    return b"cargparse\nNamespace\nN}Vx\nK\x01s\x86b0" + text(canary)


# --- torch, joblib, numpy, dill ----------------------------------------------------------------------------

_SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def saved(**settings: Any) -> Callable[[Path], bytes]:
    def make(canary: Path) -> bytes:
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(3), "extra": Mark(canary)}, buffer, **settings)
        return buffer.getvalue()

    return make


def computed_magic(canary: Path) -> bytes:
    """Torch's format before zip, whose magic number is the value of a harmless call."""
    magic = b"cbuiltins\nint\n(V119547037146038801333356\ntR."
    return magic + pickle.dumps(1001, 0) + pickle.dumps(_SYSTEM, 0) + text(canary) + pickle.dumps([], 0)


def joblib_of(value: Callable[[Path], Any], **settings: Any) -> Callable[[Path], bytes]:
    def make(canary: Path) -> bytes:
        import joblib

        buffer = io.BytesIO()
        joblib.dump(value(canary), buffer, **settings)
        return buffer.getvalue()

    return make


def array_then_mark(canary: Path) -> list[Any]:
    return [np.arange(12.0).reshape(3, 4), np.array(["a", "bc"]), Mark(canary)]


def mark_in_array(canary: Path) -> list[Any]:
    return [np.zeros(2), np.array([{"a": 1}, Mark(canary)], dtype=object)]


def zfile(canary: Path) -> bytes:
    """Joblib's own compressed files before version 0.10."""
    data = text(canary)
    return b"ZF" + hex(len(data)).encode().ljust(19) + zlib.compress(data)


def npy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Mark(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros(2), b=np.array([Mark(canary)], dtype=object))
    return buffer.getvalue()


def npy_as_storage(canary: Path) -> bytes:
    """An array of objects where a torch archive keeps the numbers of a tensor."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data/1", npy(canary))
    return buffer.getvalue()


def dilled(canary: Path) -> bytes:
    import dill

    return bytes(dill.dumps(Mark(canary), protocol=0))


# --- compressed --------------------------------------------------------------------------------------------


def packed(pack: Callable[[bytes], bytes], inner: Callable[[Path], bytes] = text) -> Callable[[Path], bytes]:
    return lambda canary: pack(inner(canary))


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


def bz2_behind_an_empty_one(data: bytes) -> bytes:
    return bz2.compress(b"") + bz2.compress(data)


def gzip_in_two_parts(data: bytes) -> bytes:
    return gzip.compress(b"") + gzip.compress(data[:9]) + gzip.compress(data[9:])


def gzip_cut_off(data: bytes) -> bytes:
    """Behind the pickle there is more, which is cut off."""
    return gzip.compress(data + os.urandom(9000), 1)[:-100]


def gzip_with_wrong_sum(data: bytes) -> bytes:
    packed_data = bytearray(gzip.compress(data + b" " * 50_000))
    packed_data[-8] ^= 0xFF
    return bytes(packed_data)


def gzip_with_odd_header(data: bytes) -> bytes:
    """With a name, a comment, and a checksum of the header that is wrong and that Python's gzip skips."""
    plain_data = gzip.compress(data)
    return (
        plain_data[:3] + bytes([2 | 8 | 16]) + plain_data[4:10] + b"name\0remark\0\xab\xcd" + plain_data[10:]
    )


# --- archives ----------------------------------------------------------------------------------------------


def members(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def zipped(canary: Path) -> bytes:
    return members(weights=text(canary))


def nested(canary: Path) -> bytes:
    return members(inner=members(deep=members(weights=text(canary))))


def pickle_before_zip(canary: Path) -> bytes:
    return text(canary) + members(readme=b"nothing to see")


def wrong_sum(canary: Path) -> bytes:
    """The checksum of the pickle is wrong in both places that state it."""
    data = bytearray(saved()(canary))
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith("data.pkl"))
    stated = struct.pack("<I", info.CRC)
    for _ in range(data.count(stated)):
        at = data.index(stated)
        data[at : at + 4] = b"\1\2\3\4"
    return bytes(data)


def _local(name: bytes, data: bytes) -> bytes:
    sizes = (zlib.crc32(data), len(data), len(data), len(name), 0)
    return struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, *sizes) + name + data


def _central(name: bytes, data: bytes, offset: int, pad: int) -> bytes:
    head = struct.pack("<4s6H3I", b"PK\1\2", 20, 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data))
    tail = struct.pack("<5H2I", len(name), 0, pad, 0, 0, 0, offset)
    return head + tail + name + b"x" * pad


def _tree(files: dict[str, bytes], base: int, pad: int) -> tuple[bytes, bytes]:
    """Return the members of an archive and its directory."""
    body, directory = b"", b""
    for name, data in files.items():
        directory += _central(name.encode(), data, base + len(body), pad)
        body += _local(name.encode(), data)
    return body, directory


def two_directories(canary: Path) -> bytes:
    """Python counts from the end and finds the clean members; torch counts from the front."""
    evil = pickle.dumps(Mark(canary), protocol=2)
    common = {"a/version": b"3\n", "a/byteorder": b"little"}
    first, shown_to_torch = _tree({"a/data.pkl": evil, **common}, 0, 0)
    second, shown_to_python = _tree({"b/data.pkl": pickle.dumps({}), **common}, 0, 0)
    assert len(shown_to_torch) == len(shown_to_python)
    place = len(first)
    # Python takes the directory in front of the end record and moves all offsets by what is in front
    moved = len(first) + len(shown_to_torch) + len(second) - place
    _, shown_to_python = _tree(
        {"b/data.pkl": pickle.dumps({}), **common}, place + len(shown_to_torch) - moved, 0
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(shown_to_torch), place, 0)
    return first + shown_to_torch + second + shown_to_python + end


def not_in_the_directory(canary: Path) -> bytes:
    """A member between the others that the directory leaves out."""
    hidden = _local(b"a/data.pkl", pickle.dumps(Mark(canary), protocol=2))
    body, directory = _tree({"a/version": b"3\n"}, len(hidden), 0)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(hidden) + len(body), 0)
    return hidden + body + directory + end


def tarred(kind: int, *files: tuple[str, bytes], links: tuple[tuple[str, str, bytes], ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target, link_type in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = link_type, target
            archive.addfile(member)
    return buffer.getvalue()


def torch_tar(canary: Path) -> bytes:
    return tarred(tarfile.USTAR_FORMAT, ("storages", text(canary)), ("tensors", b""), ("pickle", b""))


def torch_tar_by_link(canary: Path) -> bytes:
    return tarred(
        tarfile.PAX_FORMAT, ("notes.txt", text(canary)), links=(("storages", "notes.txt", tarfile.LNKTYPE),)
    )


def torch_tar_v7(canary: Path) -> bytes:
    """A header without a magic number, as tar wrote it until 1988; only its checksum tells it."""
    data = bytearray(tarred(tarfile.USTAR_FORMAT, ("storages", protocol(0)(canary))))
    data[257:345] = bytes(88)
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    return bytes(data)


def tar_over_pickle(canary: Path) -> bytes:
    """A tar archive for torch, whose header is a text within a pickle for everybody else."""
    content = b"0" + text(canary)
    header = bytearray(tarred(tarfile.USTAR_FORMAT, ("placeholder", content))[:512])
    header[:100] = (b"X" + struct.pack("<I", 507)).ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + content.ljust(1024, b"\0") + bytes(1024)


# --- other files that run ----------------------------------------------------------------------------------


def bytecode(canary: Path) -> bytes:
    code = compile(f"import os; os.mkdir({str(canary)!r})", "<file>", "exec")
    return MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def source(canary: Path) -> bytes:
    return f"import os; os.mkdir({str(canary)!r})".encode()


def yaml_tag(tag: str) -> Callable[[Path], bytes]:
    return lambda canary: f"a: 1\nb: {tag} [{canary}]\n".encode()


def yaml_by_directive(canary: Path) -> bytes:
    return f"%TAG !p! tag:yaml.org,2002:python/\n---\nb: !p!object/apply:os.mkdir [{canary}]\n".encode()


def elf(_: Path) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 62, 1) + bytes(100)


def windows_library(_: Path) -> bytes:
    return b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + bytes(100)


HOSTILE: dict[str, Hostile] = {
    # by content, whatever the name
    **{
        f"protocol 0 named {name}": Hostile(name, text, loader)
        for name, loader in {
            "pytorch_model.bin": PICKLE,
            "weights.dat": JOBLIB,
            "spiece.model": PICKLE,
            "weights.dill": DILL,
            "array.npy": NUMPY,
            "weights": PICKLE,
            "model.safetensors": PICKLE,
            "picture.png": PICKLE,
            "labels.txt": PICKLE,
            "settings.json": PICKLE,
            "model.h5": PICKLE,
            "table.csv": NUMPY,
            "model.gguf": PICKLE,
        }.items()
    },
    "protocol 1 named .bin": Hostile("pytorch_model.bin", protocol(1), PICKLE),
    "protocol 2 named .npz": Hostile("a.npz", protocol(2), NUMPY),
    "protocol 5 without a suffix": Hostile("a", protocol(5), PICKLE),
    # where instructions differ between readers
    "number as C writes it": Hostile("a.bin", before(b"I0x1\n"), PICKLE),
    "number in octal": Hostile("a.bin", before(b"I017\n"), PICKLE),
    "number with a zero byte": Hostile("a.bin", before(b"I7\0!\n"), PICKLE),
    "number with more digits than a limit": Hostile("a.bin", before(b"L0x" + b"7" * 9999 + b"L\n"), PICKLE),
    "long number with an L": Hostile("a.bin", before(b"L12L\n"), PICKLE),
    "text with an unknown escape": Hostile("a.bin", before(rb"S'\z'" + b"\n"), PICKLE),
    "a line of two million characters": Hostile("a.bin", long_line, PICKLE),
    "frames that overlap": Hostile("a.bin", frames_that_overlap, PICKLE),
    "a line across frames": Hostile("a.bin", across_frames, PICKLE_IN_MEMORY, "could_not_tell"),
    "place in the memo in decimal": Hostile("a.bin", memo_in_decimal, PICKLE),
    "a mark taken off": Hostile("a.bin", behind(b"(0"), PICKLE),
    "INST": Hostile("a.bin", inst, PICKLE),
    "OBJ": Hostile("a.bin", obj, PICKLE),
    "name computed by str": Hostile("a.bin", computed_by_str, PICKLE),
    "name computed by rot13": Hostile("a.bin", computed_by_rot13, PICKLE),
    "getattr": Hostile("a.bin", getattr_chain, PICKLE),
    "names of Python 2": Hostile("a.bin", python_2_names, PICKLE),
    "a class is changed": Hostile("a.bin", setstate, PICKLE),
    "broken behind the call": Hostile("a.dat", ahead(b"\xff\xff"), PICKLE),
    "cut off behind the call": Hostile("a.dat", ahead(b""), PICKLE),
    "a second pickle": Hostile("a.dat", behind(pickle.dumps({"a": 1})), TWO_PICKLES),
    "a second pickle of protocol 0": Hostile("a.dat", behind(b"I1\n."), TWO_PICKLES),
    # torch, joblib, numpy, dill
    "torch zip": Hostile("model.weights", saved(), TORCH),
    "torch before zip": Hostile("model.weights", saved(_use_new_zipfile_serialization=False), TORCH),
    "torch's magic number by a call": Hostile("model.weights", computed_magic, TORCH),
    "torch zip with a wrong checksum": Hostile("model.pt", wrong_sum, TORCH),
    "joblib, behind an array": Hostile("a.dat", joblib_of(array_then_mark), JOBLIB),
    "joblib, in an array of objects": Hostile("a.dat", joblib_of(mark_in_array), JOBLIB),
    "joblib of protocol 0": Hostile("a.dat", joblib_of(array_then_mark, protocol=0), JOBLIB),
    **{
        f"joblib with {name}": Hostile("a.dat", joblib_of(array_then_mark, compress=(name, 3)), JOBLIB)
        for name in ("zlib", "gzip", "bz2", "lzma", "xz")
    },
    "joblib before 0.10": Hostile("a.dat", zfile, JOBLIB),
    "npy": Hostile("a.dat", npy, NUMPY),
    "npz": Hostile("a.dat", npz, NUMPY_MEMBERS),
    "npy as a tensor": Hostile("a.pt", npy_as_storage, NUMPY_MEMBERS),
    "dill of protocol 0": Hostile("a.dat", dilled, DILL),
    # compressed, under other names
    "zlib": Hostile("a.dat", packed(zlib.compress), ZLIB),
    "zlib without compression": Hostile("a.dat", packed(lambda data: zlib.compress(data, 0)), ZLIB),
    "gzip": Hostile("model.onnx.txt", packed(gzip.compress), GZIP),
    "bz2": Hostile("a", packed(bz2.compress), BZ2),
    "xz": Hostile("a.bin", packed(lzma.compress), LZMA),
    "lzma without a header": Hostile("a.bin", packed(lzma_alone), LZMA),
    "bz2 behind an empty one": Hostile("a.bin", packed(bz2_behind_an_empty_one), BZ2),
    "gzip in parts": Hostile("a.bin", packed(gzip_in_two_parts), GZIP),
    "gzip that is cut off": Hostile("a.bin", packed(gzip_cut_off), GZIP),
    "gzip with a wrong checksum": Hostile("a.bin", packed(gzip_with_wrong_sum), GZIP),
    "gzip with an odd header": Hostile("a.bin", packed(gzip_with_odd_header), GZIP),
    "gzip in bz2 in zlib": Hostile(
        "a.bin", packed(lambda data: zlib.compress(bz2.compress(gzip.compress(data)))), None
    ),
    # archives
    "zip": Hostile("a.bin", zipped, PANDAS_ZIP),
    "zip in zip in zip": Hostile("a.bin", nested, None),
    "pickle in front of a zip": Hostile("a.bin", pickle_before_zip, PICKLE),
    "zip with two directories": Hostile("a.pt", two_directories, TORCH),
    "zip with a member that its directory lacks": Hostile("a.pt", not_in_the_directory, None),
    "torch tar": Hostile("a.pt", torch_tar, TORCH),
    "torch tar, by a hard link": Hostile("a.pt", torch_tar_by_link, TORCH),
    "torch tar of before 1988": Hostile("a.bin", torch_tar_v7, TORCH),
    "pickle below a tar header": Hostile("a.bin", tar_over_pickle, PICKLE),
    # other files that run
    "bytecode": Hostile("a.pyc", bytecode, PYTHON),
    "bytecode under another name": Hostile("a.bin", bytecode, PYTHON),
    "source": Hostile("a.py", source, PYTHON),
    "library": Hostile("a.bin", elf, None),
    "library for Windows": Hostile("a.dat", windows_library, None),
    "YAML tag": Hostile("a.yaml", yaml_tag("!!python/object/apply:os.mkdir"), YAML),
    "YAML tag in upper case": Hostile("A.YML", yaml_tag("!!python/object/apply:os.mkdir"), YAML),
    "YAML tag, whole": Hostile("a.yml", yaml_tag("!<tag:yaml.org,2002:python/object/apply:os.mkdir>"), YAML),
    "YAML tag, escaped": Hostile("a.yaml", yaml_tag("!!python%2Fobject%2Fapply:os.mkdir"), YAML),
    "YAML tag by a directive": Hostile("a.yaml", yaml_by_directive, YAML),
}
