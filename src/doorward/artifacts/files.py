"""What opening a model file or directory would execute, found by reading alone.

Every file is judged by what it holds, whatever its name says, and by every reader that would take it: a
file may be a pickle, an archive and an image at once. Archives are opened in memory, member by member, and
nothing in them is unpacked to disk, imported or unpickled.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from doorward.artifacts import kinds, numpy_files, zips
from doorward.artifacts.configurations import (
    hdf5_references,
    json_references,
    target_references,
    yaml_references,
)
from doorward.artifacts.examination import (
    SOURCE,
    Budget,
    Doubt,
    Examination,
    Exhausted,
    Limits,
    Reference,
    printable,
)
from doorward.artifacts.folders import Entry, walk
from doorward.artifacts.onnx_files import onnx_references
from doorward.artifacts.pickles import read_pickles
from doorward.artifacts.programs import payload_references, program_references
from doorward.artifacts.reach import Reach
from doorward.artifacts.unpacking import compression, unpack
from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.files import open_regular

#: Files of these names are expected to be pickles, so that one that cannot be read is a doubt.
_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill"})
_COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".z", ".lzma", ".zlib"})
_HEAD = 4096
_TEXT_LIMIT = 64 << 20
#: Bytes by which compressed data are told from numbers that begin like them.
_PROBE = 1 << 16
#: Members of a torch archive that hold the numbers of tensors, which no loader takes for anything else.
_STORAGE = re.compile(r"(?P<root>.+?)/(data|constants)/\d+")
#: Members of torch's format before zip and pickle, in which pickles and numbers take turns.
_TAR_MIXED = ("storages", "tensors")
#: What names of types begin with that a TorchScript program defines itself, and what makes its lists.
_SCRIPT_TYPES = "__torch__."
_SCRIPT_BUILDERS = frozenset(
    f"torch.jit._pickle.{name}"
    for name in (
        "build_intlist",
        "build_tensorlist",
        "build_doublelist",
        "build_boollist",
        "build_tensor_from_id",
        "restore_type_tag",
    )
)


def examine(path: Path, limits: Limits | None = None, deadline: Deadline | None = None) -> Examination:
    """Find what opening a file, or any file of a directory, would execute. Nothing is executed here.

    Of a directory, what loading the model opens is told apart from what only lies in it (`reached`). Only
    regular files are opened, and none outside of the directory.

    Raises:
        CouldNotTell: if the path cannot be read at all.
    """
    return _Examiner(limits or Limits(), deadline or Deadline()).run(path)


class _Examiner:
    def __init__(self, limits: Limits, deadline: Deadline) -> None:
        self.limits = limits
        self.budget = Budget(opcodes=limits.opcodes, bytes=limits.bytes, deadline=deadline)
        self.result = Examination()
        self.reached = True
        self.alone = True
        self.script = False

    def run(self, path: Path) -> Examination:
        try:
            self.alone = not path.is_dir()
            entries = self._alone(path) if self.alone else self._inside(path)
        except OSError as error:
            raise CouldNotTell(f"{path}: {error.strerror or error}") from error
        for i, (entry, self.reached) in enumerate(entries):
            name = path.name if self.alone else entry.path.relative_to(path).as_posix()
            try:
                self.budget.check_time()
                self._file(entry, name)
            except Exhausted as why:
                rest = entries[i + 1 :]
                self.reached = any(reached for _, reached in entries[i:])
                self._doubt(name, f"{why}" + (f"; {len(rest)} further files were left out" if rest else ""))
                break
        return self.result

    @staticmethod
    def _alone(path: Path) -> list[tuple[Entry, bool]]:
        return [(Entry(path, os.stat(path).st_size), True)]

    def _inside(self, path: Path) -> list[tuple[Entry, bool]]:
        """Return the files of a directory, each once, and whether loading opens it by one of its names."""
        reach = Reach(path)
        found: dict[str, tuple[Entry, bool]] = {}
        for entry in walk(path, self.limits.members):
            inner = entry.path / "model.safetensors" if entry.is_folder else entry.path
            reached = reach.opens(inner)
            real = os.path.realpath(entry.path) if entry.problem is None else f"{entry.path}\0"
            if real not in found or (reached and not found[real][1]):
                found[real] = entry, reached
        self.result.references.extend(map(_printable, reach.references))
        self.result.doubts.extend(reach.doubts)
        return list(found.values())

    def _file(self, entry: Entry, name: str) -> None:
        if entry.problem is not None:
            self._doubt(name, entry.problem)
            return
        try:
            with open_regular(entry.path) as stream:
                self._look(name, stream, entry.size, 0)
        except OSError as error:
            if self.alone:
                raise CouldNotTell(f"{entry.path}: {error.strerror or error}") from error
            self._doubt(name, error.strerror or str(error))
            return
        suffix = entry.path.suffix.lower()
        if suffix == ".py":
            self._found(Reference(name, entry.path.name, "whole file", SOURCE))
        if suffix == ".onnx":
            self._onnx(name, entry.path)

    def _found(self, *references: Reference) -> None:
        self.result.references.extend(
            _printable(replace(one, reached=one.reached and self.reached))
            for one in references
            if not (self.script and _is_of_script(one.name))
        )

    def _doubt(self, name: str, why: str) -> None:
        self.result.doubts.append(Doubt(printable(name), printable(why), self.reached))

    def _look(self, name: str, stream: IO[bytes], size: int, depth: int) -> None:
        """Examine one file or archive member by its content."""
        self.result.files += 1
        if self.result.files > self.limits.members:
            if self.result.files == self.limits.members + 1:
                self._doubt(name, f"more than {self.limits.members} files")
            return
        with self._faults_noted(name):
            self._dispatch(name, stream, size, depth)

    @contextmanager
    def _faults_noted(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exhausted:
            raise
        except CouldNotTell as why:
            self._doubt(name, str(why))
        except Exception as error:  # readers of malformed and hostile files raise anything
            self._doubt(name, _said(error))

    def _dispatch(self, name: str, stream: IO[bytes], size: int, depth: int) -> None:
        head = stream.read(_HEAD)
        if not head and depth:
            return  # runs nothing; torch.export leaves such a file where a program has no sample inputs
        suffix = posixpath.splitext(name)[1].lower()
        known = self._one_kind(name, stream, head, suffix, depth)
        for archive in (self._zip, self._tar):
            with self._faults_noted(name):
                known |= archive(name, stream, head, depth)
        if head.startswith(zips.HEAD):
            return  # 'P' begins no pickle that a loader would take
        stream.seek(0)
        self._pickle(name, stream, size, strict=suffix in _PICKLE_SUFFIXES and not known)
        if not known:
            stream.seek(0)
            self._text(name, stream, head, suffix)

    def _one_kind(self, name: str, stream: IO[bytes], head: bytes, suffix: str, depth: int) -> bool:
        """Look into a file of a kind that is known by its first bytes; return whether it is of one."""
        stream.seek(0)
        base = posixpath.basename(name)
        known = True
        with self._faults_noted(name):
            if kinds.is_machine_code(head) or suffix in kinds.BINARY_SUFFIXES:
                self._found(Reference(name, base, "whole file", "is compiled machine code"))
            elif kinds.is_bytecode(head, suffix):
                self._found(Reference(name, base, "whole file", "is compiled Python code"))
            elif head.startswith(numpy_files.MAGIC):
                self._numpy(name, stream)
            elif head.startswith(b"\x89HDF"):
                # a file has the length that it has; a member of an archive may unpack to any
                spend = self._spend if depth else lambda _: self.budget.check_time()
                self._found(*hdf5_references(stream, name, spend))
            elif kind := kinds.unread_kind(head, suffix):
                self._doubt(name, f"is {kind}, which is not looked into")
            elif packing := compression(head, suffix):
                known = self._compressed(name, stream, packing, suffix, depth)
            else:
                known = False
        return known

    def _spend(self, n_bytes: int) -> None:
        self.budget.spend(n_bytes=n_bytes)

    def _in_memory(self, stream: IO[bytes], depth: int) -> io.BytesIO:
        """Read an archive inside an archive, or a compressed file, into memory."""
        if depth > self.limits.depth:
            raise CouldNotTell(f"archives are nested more than {self.limits.depth} deep")
        data = stream.read(self.limits.unpacked + 1)
        if len(data) > self.limits.unpacked:
            raise CouldNotTell(f"unpacks to more than {self.limits.unpacked >> 20} MiB")
        self.budget.spend(n_bytes=len(data))
        return io.BytesIO(data)

    # --- pickles ---

    def _pickle(self, name: str, stream: IO[bytes], size: int | None, *, strict: bool) -> None:
        """Read a file as a pickle; it need not be one unless its name or place says so.

        Bytes that are a pickle by chance are told from one by how far they make sense: to the last
        instruction, or to a call of what was imported, which then runs.
        """
        reading = read_pickles(stream, self.budget, size)
        if strict or reading.finished or reading.calls:
            self._found(*reading.references(name))
        elif reading.hits and reading.imports_known:
            self._doubt(name, f"begins like a pickle that imports {next(iter(reading.hits))}, and breaks off")
        if reading.error and self.budget.is_used_up:
            raise Exhausted(reading.error)
        if reading.error and (strict or not reading.broken):
            self._doubt(name, reading.error)

    def _numpy(self, name: str, stream: IO[bytes]) -> None:
        if numpy_files.holds_objects(stream):
            self._pickle(name, stream, None, strict=True)

    # --- archives ---

    def _zip(self, name: str, stream: IO[bytes], head: bytes, depth: int) -> bool:
        """Look into a zip archive, also one behind other data; return whether the file is one."""
        stream.seek(0)
        if not head.startswith(zips.HEAD) and (
            not self._is_whole(stream, depth) or not zipfile.is_zipfile(stream)
        ):
            return False
        whole = stream if self._is_whole(stream, depth) else self._in_memory(stream, depth)
        try:
            archive = zipfile.ZipFile(whole)
        except zips.FAULTS:
            if head.startswith(zips.HEAD):
                raise
            return False
        with archive:
            storages, outer = _storages(archive), self.script
            self.script = depth == 0 and is_torchscript(archive.namelist())
            for member in archive.infolist():
                if not member.is_dir():
                    self._member(f"{name}:{member.filename}", whole, archive, member, depth, storages)
            if self.script:
                self._doubt(name, "is a TorchScript program, which runs when loaded and is not looked into")
            self.script = outer
            behind = kinds.is_tflite(head, posixpath.splitext(name)[1].lower())
            why = zips.disagreement(whole, archive, behind=behind)
            if why is not None:
                self._doubt(name, f"readers of zip archives may find different members in it: {why}")
            if why is not None or behind:
                self._hidden(name, whole, archive, depth)
        return True

    def _hidden(self, name: str, stream: IO[bytes], archive: zipfile.ZipFile, depth: int) -> None:
        """Look into members that the directory which Python reads does not name."""
        for inner, offset in zips.hidden_members(stream, archive):
            label = f"{name}:{inner} (at byte {offset}, not in the directory)"
            with self._faults_noted(label):
                data = zips.raw_member(stream, offset, None, self.limits.unpacked, self.budget)
                self._look(label, io.BytesIO(data), len(data), depth + 1)

    @staticmethod
    def _is_whole(stream: IO[bytes], depth: int) -> bool:
        """Return whether a stream is a file or memory, in which an archive's reader can go about."""
        return depth == 0 or isinstance(stream, io.BytesIO)

    def _member(
        self,
        name: str,
        stream: IO[bytes],
        archive: zipfile.ZipFile,
        member: zipfile.ZipInfo,
        depth: int,
        storages: frozenset[str],
    ) -> None:
        try:
            with archive.open(member) as file:
                vars(file)["_expected_crc"] = None  # torch reads members whatever their checksum
                if member.filename in storages:
                    self._storage(name, file)
                else:
                    self._look(name, file, member.file_size, depth + 1)
        except Exhausted:
            raise
        except Exception as error:  # other readers may take what Python's does not
            self._doubt(name, _said(error))
            with self._faults_noted(name):
                data = zips.raw_member(
                    stream, member.header_offset, member.compress_size, self.limits.unpacked, self.budget
                )
                self._look(name, io.BytesIO(data), len(data), depth + 1)

    def _storage(self, name: str, file: IO[bytes]) -> None:
        """Look at the numbers of a tensor: only numpy would take them for anything else."""
        self.result.files += 1
        head = file.read(8)
        if head.startswith(numpy_files.MAGIC):
            file.seek(0)
            with self._faults_noted(name):
                self._numpy(name, file)

    def _tar(self, name: str, stream: IO[bytes], head: bytes, depth: int) -> bool:
        """Look into a tar archive; return whether the file is one."""
        if not _is_tar(head):
            return False
        stream.seek(0)
        whole = stream if self._is_whole(stream, depth) else self._in_memory(stream, depth)
        with tarfile.open(fileobj=whole, mode="r:") as archive:
            members = archive.getmembers()
            names = {member.name for member in members}
            for member in members:
                inner = f"{name}:{member.name}"
                if member.islnk() or member.issym():
                    target = posixpath.normpath(member.linkname)
                    beside = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
                    if not {target, beside} & names:
                        self._doubt(inner, f"is a link to {member.linkname[:100]!r}, which the archive lacks")
                elif not member.isdir() and (file := archive.extractfile(member)) is not None:
                    self._look(inner, file, member.size, depth + 1)
            if mixed := [one for one in _TAR_MIXED if one in names]:
                why = "torch's tar format mixes pickles and numbers; save it again"
                self._doubt(f"{name}:{mixed[0]}", why)
        return True

    def _compressed(self, name: str, stream: IO[bytes], packing: str, suffix: str, depth: int) -> bool:
        """Look into a compressed file; return whether it is one.

        Numbers may begin like compressed data; those that end in nonsense and are not named as such are
        none. What stands before the damage is looked into all the same, since readers hand it on.
        """
        packed = suffix in _COMPRESSED_SUFFIXES
        expected = packed or suffix in _PICKLE_SUFFIXES
        start = unpack(packing, stream.read(_PROBE), self.limits.unpacked, self.budget)
        if not start.data and not expected:
            return False
        content = start
        if not start.damaged:  # else more of it changes nothing
            stream.seek(0)
            raw = self._in_memory(stream, depth + 1).getvalue()
            content = unpack(packing, raw, self.limits.unpacked, self.budget)
        stem = posixpath.basename(name)
        inner = f"{name}:{posixpath.splitext(stem)[0] if packed else stem}"
        self._look(inner, io.BytesIO(content.data), len(content.data), depth + 1)
        if content.error and expected:
            self._doubt(name, content.error)
        return content.error is None or expected

    # --- texts ---

    def _text(self, name: str, stream: IO[bytes], head: bytes, suffix: str) -> None:
        """Look for code in a configuration."""
        is_json = suffix == ".json"
        if is_json or head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            self._json(name, stream, strict=is_json)
        elif suffix in (".yaml", ".yml") or posixpath.basename(name) == "MLmodel":
            data = stream.read(_TEXT_LIMIT + 1)
            if len(data) > _TEXT_LIMIT:
                raise CouldNotTell("is too large to check")
            self._found(*yaml_references(data, name))

    def _json(self, name: str, stream: IO[bytes], *, strict: bool) -> None:
        data = stream.read(_TEXT_LIMIT + 1)
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            if strict:
                why = "is too large to check" if len(data) > _TEXT_LIMIT else f"is not valid JSON ({error})"
                raise CouldNotTell(why) from error
            return
        self._found(*json_references(document, name))
        # loading a model reads no target of Hydra's; somebody who gives the file to Hydra does
        self._found(*(replace(one, reached=self.alone) for one in target_references(document, name)))
        if isinstance(document, dict) and "graph_module" in document:
            self._found(*program_references(document, name))
        elif isinstance(document, dict) and "config" in document:
            self._found(*payload_references(document, name))

    def _onnx(self, name: str, path: Path) -> None:
        """Look for operators that need a native library, and for weights outside of the model's folder."""
        try:
            import onnx
        except ImportError:
            self._doubt(name, "checking ONNX files needs the package 'onnx': pip install 'doorward[onnx]'")
            return
        try:
            model = onnx.load_model(str(path), load_external_data=False)
            self._found(*onnx_references(model, name, path.parent))
        except Exception as error:  # protobuf's own exceptions differ, and names need not be text
            self._doubt(name, f"is not a readable ONNX file ({type(error).__name__})")


def _said(error: Exception) -> str:
    """Return what an error says, on one line."""
    return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _printable(one: Reference) -> Reference:
    return replace(
        one,
        file=printable(one.file),
        name=printable(one.name),
        position=printable(one.position),
        why=printable(one.why),
        excerpt=printable(one.excerpt),
    )


def _is_tar(head: bytes) -> bool:
    """Return whether a file begins with a header of a tar archive, of whatever dialect."""
    if len(head) < tarfile.BLOCKSIZE or not head[:100].strip(b"\0"):
        return False
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _is_of_script(name: str) -> bool:
    """Return whether a global is one that torch resolves itself when it reads a TorchScript program."""
    return name.startswith(_SCRIPT_TYPES) or name in _SCRIPT_BUILDERS


def is_torchscript(names: Iterable[str]) -> bool:
    """Return whether an archive with members of these names is one that torch runs as a TorchScript program.

    Its types come from its own source, in a language of tensor operators, and from no module of Python's.
    """
    inner = {name.partition("/")[2] for name in names}
    return "constants.pkl" in inner and any(name.startswith("code/") for name in inner)


def _storages(archive: zipfile.ZipFile) -> frozenset[str]:
    """Return the members of a torch archive that are the numbers of tensors."""
    names = set(archive.namelist())
    found = [(match, name) for name in names if (match := _STORAGE.fullmatch(name))]
    return frozenset(
        name for match, name in found if {f"{match['root']}/data.pkl", f"{match['root']}/version"} <= names
    )
