"""What loading a model file or directory would execute, found by reading alone.

Every file is judged by what it holds, whatever its name says: archives are opened in memory, member by
member, and nothing in them is unpacked to disk, imported or unpickled.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from doorward.artifacts.pickles import Budget, Reference, read_pickles
from doorward.artifacts.programs import payload_references, program_references
from doorward.core.errors import CouldNotTell

_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"})
_BINARY_SUFFIXES = frozenset({".so", ".dll", ".dylib", ".pyd", ".cubin", ".hsaco", ".exe", ".o"})
_BINARY_HEADS = (
    b"\x7fELF",
    b"\xfe\xed\xfa\xce",
    b"\xfe\xed\xfa\xcf",
    b"\xce\xfa\xed\xfe",
    b"\xcf\xfa\xed\xfe",
)
_ONNX_DOMAINS = re.compile(
    r"|ai\.onnx|ai\.onnx\.(ml|training|preview\.training)|com\.microsoft(\.(nchwc|experimental))?|com\.ms\.internal\.nhwc"
)
_JSON_LIMIT = 64 << 20
_KERAS_ROOTS = frozenset({"keras", "keras_hub", "keras_cv", "keras_nlp", "tf_keras", "tensorflow"})
#: Protocols 2 to 5, and the first import of protocols 0 and 1.
_PICKLE_HEAD = re.compile(rb"\x80[\x02-\x05]|\(?[ci][\w.]+\n[\w.]+\n")
#: What the standard library's readers raise on malformed or hostile files.
_FAULTS = (
    CouldNotTell,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    NotImplementedError,
    RecursionError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
#: Instructions after which random bytes that begin like a pickle can be told from a broken pickle.
_PICKLE_BY_CHANCE = 8


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much an examination reads before it gives up.

    Attributes:
        depth: archives inside archives.
        members: files and archive members.
        opcodes: pickle instructions.
        bytes: bytes read as pickle or unpacked.
        unpacked: bytes of one unpacked archive that are held in memory.
    """

    depth: int = 4
    members: int = 100_000
    opcodes: int = 5_000_000
    bytes: int = 4 << 30
    unpacked: int = 1 << 30


@dataclass
class Examination:
    """What was found in an artifact.

    Attributes:
        references: code that loading would import or run.
        unreadable: what could not be checked to its end, and why.
        files: how many files and members were looked at.
    """

    references: list[Reference] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    files: int = 0


def examine(path: Path, limits: Limits | None = None) -> Examination:
    """Find what loading a file, or any file of a directory, would execute. Nothing is executed here.

    Raises:
        CouldNotTell: if the path cannot be read at all.
    """
    return _Examiner(limits or Limits()).run(path)


class _Examiner:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.budget = Budget(opcodes=limits.opcodes, bytes=limits.bytes)
        self.result = Examination()

    def run(self, path: Path) -> Examination:
        try:
            if path.is_dir():
                inside = (file for file in path.rglob("*") if ".git" not in file.relative_to(path).parts)
                files = sorted(file for file in inside if file.is_file())
                is_model = any(file.name == "config.json" for file in files)
            else:
                files, is_model = [path], False
        except OSError as error:
            raise CouldNotTell(f"{path}: {error.strerror or error}") from error
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            try:
                with file.open("rb") as stream:
                    self._look(name, stream, 0)
            except OSError as error:
                self._unreadable(name, error.strerror or str(error))
            if file.suffix == ".py" and is_model:
                self._found(Reference(name, file.name, "whole file", "is Python source beside the weights"))
            if file.suffix == ".onnx":
                self._onnx(name, file)
        return self.result

    def _found(self, *references: Reference) -> None:
        self.result.references.extend(references)

    def _unreadable(self, name: str, why: str) -> None:
        self.result.unreadable.append(f"{name}: {why}")

    def _look(self, name: str, stream: IO[bytes], depth: int) -> None:
        """Examine one file or archive member by its content."""
        self.result.files += 1
        if self.result.files > self.limits.members:
            if self.result.files == self.limits.members + 1:
                self._unreadable(name, f"more than {self.limits.members} files")
            return
        try:
            self._dispatch(name, stream, depth)
        except _FAULTS as error:
            self._unreadable(name, str(error)[:200] or type(error).__name__)

    def _dispatch(self, name: str, stream: IO[bytes], depth: int) -> None:
        hidden_zip = depth == 0 and zipfile.is_zipfile(stream)
        stream.seek(0)
        head = stream.read(512)
        stream.seek(0)
        suffix = posixpath.splitext(name)[1].lower()
        if depth and not head:
            return  # runs nothing; torch.export leaves such a file where a program has no sample inputs
        if head.startswith(_BINARY_HEADS) or suffix in _BINARY_SUFFIXES:
            self._found(Reference(name, posixpath.basename(name), "whole file", "is compiled machine code"))
        elif head.startswith(b"PK\x03\x04"):
            self._zip(name, self._unpacked(stream, depth) if depth else stream, depth)
        elif hidden_zip:  # behind something else: which of the two is read depends on the reader
            self._zip(name, stream, depth)
            stream.seek(0)
            self._pickle(name, stream, strict=suffix in _PICKLE_SUFFIXES)
        elif head[257:262] == b"ustar":
            self._tar(name, stream, depth)
        elif head.startswith(b"\x1f\x8b\x08"):
            self._compressed(name, gzip.GzipFile(fileobj=stream), depth)
        elif head.startswith(b"BZh"):
            self._compressed(name, bz2.BZ2File(stream), depth)
        elif head.startswith(b"\xfd7zXZ\x00"):
            self._compressed(name, lzma.LZMAFile(stream), depth)  # noqa: SIM115 (it reads our open stream)
        elif (
            head[:1] == b"\x78"
            and suffix in _PICKLE_SUFFIXES
            and head[1:2] in (b"\x01", b"\x5e", b"\x9c", b"\xda")
        ):
            self._compressed(name, _Inflate(stream), depth)
        elif head.startswith(b"\x93NUMPY"):
            self._numpy(name, stream)
        elif head.startswith(b"\x89HDF"):
            self._hdf5(name, stream)
        elif suffix in _PICKLE_SUFFIXES or _PICKLE_HEAD.match(head):
            self._pickle(name, stream, strict=suffix in _PICKLE_SUFFIXES)
        elif suffix == ".json" or (depth and head.lstrip().startswith(b"{")):
            self._json(name, stream, strict=suffix == ".json")

    def _unpacked(self, stream: Any, depth: int) -> io.BytesIO:
        """Read an archive inside an archive into memory."""
        if depth > self.limits.depth:
            raise CouldNotTell(f"archives are nested more than {self.limits.depth} deep")
        data = stream.read(self.limits.unpacked + 1)
        if len(data) > self.limits.unpacked:
            raise CouldNotTell(f"unpacks to more than {self.limits.unpacked >> 20} MiB")
        self.budget.spend(n_bytes=len(data))
        return io.BytesIO(data)

    def _pickle(self, name: str, stream: IO[bytes], *, strict: bool) -> None:
        reading = read_pickles(stream, self.budget)
        self._found(*reading.references(name))
        if reading.error and (strict or reading.hits or reading.instructions >= _PICKLE_BY_CHANCE):
            self._unreadable(name, reading.error)

    def _zip(self, name: str, stream: IO[bytes], depth: int) -> None:
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                inner = f"{name}:{member.filename}"
                try:
                    with archive.open(member) as file:
                        self._look(inner, file, depth + 1)
                except _FAULTS as error:
                    self._unreadable(inner, str(error)[:200] or type(error).__name__)

    def _tar(self, name: str, stream: IO[bytes], depth: int) -> None:
        with tarfile.open(fileobj=self._unpacked(stream, depth) if depth else stream, mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    continue
                inner = f"{name}:{member.name}"
                if member.name in ("pickle", "sys_info"):
                    self._pickle(inner, file, strict=True)
                elif member.name in ("storages", "tensors"):
                    self._unreadable(inner, "torch's tar format mixes pickles and numbers; save it again")
                else:
                    self._look(inner, file, depth + 1)

    def _compressed(self, name: str, stream: Any, depth: int) -> None:
        stem, suffix = posixpath.splitext(posixpath.basename(name))
        inner = stem if suffix.lower() in (".gz", ".bz2", ".xz", ".z") else stem + suffix
        self._look(f"{name}:{inner}", self._unpacked(stream, depth + 1), depth + 1)

    def _numpy(self, name: str, stream: IO[bytes]) -> None:
        import numpy.lib.format as npy

        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        if read(stream)[2].hasobject:
            self._pickle(name, stream, strict=True)

    def _hdf5(self, name: str, stream: IO[bytes]) -> None:
        """Look for code in the configuration that Keras keeps as text inside an HDF5 file."""
        tail = b""
        while block := stream.read(1 << 20):
            window = tail + block
            if _KERAS_LAMBDA.search(window):
                self._found(
                    Reference(name, "Lambda", "model_config", "is a layer with Python bytecode of its own")
                )
                return
            tail = window[-256:]

    def _json(self, name: str, stream: IO[bytes], *, strict: bool) -> None:
        data = stream.read(_JSON_LIMIT + 1)
        try:
            document = json.loads(data)
        except ValueError as error:
            if strict:
                why = "is too large to check" if len(data) > _JSON_LIMIT else f"is not valid JSON ({error})"
                raise CouldNotTell(why) from error
            return
        self._found(*_configured_code(document, name))
        if isinstance(document, dict) and "graph_module" in document:
            self._found(*program_references(document, name))
        elif isinstance(document, dict) and "config" in document:
            self._found(*payload_references(document, name))

    def _onnx(self, name: str, path: Path) -> None:
        """Look for operators that need a native library, and for weights outside of the model's folder."""
        try:
            import onnx
        except ImportError:
            self._unreadable(
                name, "checking ONNX files needs the package 'onnx': pip install 'doorward[onnx]'"
            )
            return
        try:
            model = onnx.load_model(str(path), load_external_data=False)
            self._found(*_onnx_references(model, name))
        except Exception as error:  # protobuf's own exceptions differ, and names need not be text
            self._unreadable(name, f"is not a readable ONNX file ({type(error).__name__})")


class _Inflate:
    """Read a bare zlib stream."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._inflater = stream, zlib.decompressobj()

    def read(self, size: int) -> bytes:
        return self._inflater.decompress(self._stream.read(), size)


_KERAS_LAMBDA = re.compile(rb'"class_name":\s*"(Lambda|__lambda__)"')


def _configured_code(value: Any, file: str, where: str = "") -> Iterator[Reference]:
    """Yield the code that a JSON configuration asks a library to import."""
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _configured_code(inner, file, f"{where}[{i}]")
    if not isinstance(value, dict):
        return
    if value.get("class_name") in ("Lambda", "__lambda__"):
        yield Reference(file, "Lambda", where or "top", "is a layer with Python bytecode of its own")
    elif "class_name" in value and str(value.get("module") or "keras").split(".")[0] not in _KERAS_ROOTS:
        name = f"{value['module']}.{value['class_name']}"
        yield Reference(file, name[:200], where or "top", "is imported when Keras loads it")
    for key, inner in value.items():
        place = f"{where}.{key}" if where else str(key)
        if key in ("auto_map", "custom_pipelines") and inner:
            yield from _custom_code(inner, file, place)
        elif key == "trust_remote_code" and inner:
            yield Reference(file, "trust_remote_code", place, "asks for custom code to be trusted")
        else:
            yield from _configured_code(inner, file, place)


def _custom_code(value: Any, file: str, where: str) -> Iterator[Reference]:
    why = "is custom code that the configuration asks transformers to import"
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _custom_code(inner, file, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _custom_code(inner, file, where)
    elif value is not None:
        yield Reference(file, str(value)[:200], where, why)


def _onnx_references(model: Any, file: str) -> Iterator[Reference]:
    """Yield what an ONNX model (a parsed ModelProto) would reach outside of itself."""
    own = {(function.domain, function.name) for function in model.functions}
    tensors = list(model.graph.initializer)
    graphs = [model.graph, *model.functions]
    seen = set()
    while graphs:
        graph = graphs.pop()
        tensors.extend(getattr(graph, "initializer", ()))
        for node in graph.node:
            for attribute in node.attribute:
                tensors.extend([*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors])
                graphs.extend([*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs])
            operator = (node.domain, node.op_type)
            foreign = operator not in own and not _ONNX_DOMAINS.fullmatch(node.domain)
            if (foreign or node.op_type in ("PythonOp", "PyOp")) and operator not in seen:
                seen.add(operator)
                why = "is an operator outside of ONNX: it needs native or Python code from elsewhere"
                yield Reference(file, f"{node.domain}.{node.op_type}", f"node {node.name!r}", why)
    for tensor in tensors:
        for entry in tensor.external_data:
            place = posixpath.normpath(entry.value.replace("\\", "/"))
            outside = place.startswith(("..", "/")) or place[1:2] == ":"
            if entry.key == "location" and outside and place not in seen:
                seen.add(place)
                why = "is read although it lies outside of the model's folder"
                yield Reference(file, entry.value[:200], f"tensor {tensor.name!r}", why)
