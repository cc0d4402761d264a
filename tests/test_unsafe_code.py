"""What a file would execute: found, named, and never executed."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from doorward.artifacts import pickles
from doorward.artifacts.examination import Budget
from doorward.artifacts.pickles import harmless, read_pickles
from doorward.artifacts.programs import only_arithmetic
from doorward.core.errors import UnsafeArtifact
from doorward.core.records import Finding
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import open_classifier


def examine(path: Path, **settings: Any) -> Finding:
    finding = registry.build("detector", "unsafe-code", settings)(Subject(artifact=path))
    assert isinstance(finding, Finding)
    return finding


def named(finding: Finding) -> set[str]:
    """Return the names of the code that a finding lists."""
    return {str(row[1]) for table in finding.evidence if table.type == "table" for row in table.rows}


class Payload:
    """Touch a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


class UsersNetwork(nn.Module):
    """A network of somebody's own, pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


SYSTEM = f"{os.system.__module__}.system"


# --- pickles that run code ---------------------------------------------------------------------------------


def torch_zip(path: Path, canary: Path) -> None:
    torch.save({"weight": torch.zeros(3), "extra": Payload(canary)}, path)


def torch_legacy(path: Path, canary: Path) -> None:
    torch.save(
        {"weight": torch.zeros(3), "extra": Payload(canary)}, path, _use_new_zipfile_serialization=False
    )


def protocol(number: int) -> Callable[[Path, Path], None]:
    def write(path: Path, canary: Path) -> None:
        path.write_bytes(pickle.dumps([1, Payload(canary)], protocol=number))

    return write


def inst_opcode(path: Path, canary: Path) -> None:
    path.write_bytes(f"(S'touch {canary}'\nios\nsystem\n.".encode())


def broken_behind(path: Path, canary: Path) -> None:
    """The payload runs before the pickle breaks off."""
    path.write_bytes(pickle.dumps([Payload(canary), list(range(100))])[:-50])


def polyglot(path: Path, canary: Path) -> None:
    """A pickle in front of a zip archive: readers that look at the end see only the archive."""
    path.write_bytes(pickle.dumps(Payload(canary)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "nothing to see")


def nested(path: Path, canary: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("deep/data.pkl", pickle.dumps(Payload(canary)))
    zipped(path, {"inner.zip": inner.getvalue()})


def tarred(path: Path, canary: Path) -> None:
    data = pickle.dumps(Payload(canary), protocol=2)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("pickle", "sys_info"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def gzipped(path: Path, canary: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(Payload(canary), protocol=0)))


def object_array(path: Path, canary: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Payload(canary)], dtype=object), allow_pickle=True)


def object_arrays(path: Path, canary: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.array([Payload(canary)], dtype=object))


def joblib_dump(path: Path, canary: Path) -> None:
    joblib = pytest.importorskip("joblib")
    joblib.dump([Payload(canary), np.zeros(3)], path, compress=3)


def plain_text(path: Path, canary: Path) -> None:
    """No known suffix, protocol 0."""
    path.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())


RUNS_SYSTEM: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "torch zip": ("model.pt", torch_zip),
    "torch legacy": ("model.pth", torch_legacy),
    **{f"protocol {n}": ("model.pkl", protocol(n)) for n in range(6)},
    "INST": ("model.pkl", inst_opcode),
    "broken behind the payload": ("model.ckpt", broken_behind),
    "pickle before zip": ("model.bin", polyglot),
    "archive in archive": ("model.zip", nested),
    "tar": ("model.pt", tarred),
    "gzip": ("model.pkl.gz", gzipped),
    "npy": ("array.npy", object_array),
    "npz": ("arrays.npz", object_arrays),
    "joblib": ("model.joblib", joblib_dump),
    "unknown suffix": ("weights.dat", plain_text),
}


@pytest.mark.parametrize("case", RUNS_SYSTEM)
def test_a_pickle_that_runs_a_command_is_named_and_not_run(case: str, tmp_path: Path) -> None:
    name, write = RUNS_SYSTEM[case]
    path, canary = tmp_path / name, tmp_path / "canary"
    write(path, canary)
    finding = examine(path)
    assert finding.verdict == "unsafe"
    assert named(finding) & {SYSTEM, "os.system"}
    assert finding.score is not None
    assert finding.score >= 1
    assert finding.kind == "unsafe_code"
    assert finding.atlas == ("AML.T0011.000", "AML.T0018.002", "AML.T0010.003")
    assert "system" in finding.summary
    assert "can run commands" in finding.summary
    assert not canary.exists()


def test_the_canary_sings_when_the_file_is_loaded(tmp_path: Path) -> None:
    """Without this, the tests above could not fail."""
    torch_zip(tmp_path / "model.pt", tmp_path / "canary")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_the_instructions_around_the_code_are_evidence(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps([7, Payload(tmp_path / "canary")], protocol=4))
    text = next(one for one in examine(tmp_path / "model.pkl").evidence if one.type == "text")
    lines = [line.split()[1] for line in text.text.splitlines()]
    assert lines[lines.index("STACK_GLOBAL") :][:3] == ["STACK_GLOBAL", "MEMOIZE", "SHORT_BINUNICODE"]
    assert "'posix'" in text.text
    assert f"touch '{tmp_path}" in text.text


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x80\x04cbuiltins\nstr\n(Vos\ntRVsystem\n\x93.", "<computed name>"),
        (b"\x80\x04\x8c\x08builtins\x94\x8c\x04eval\x94h\x00h\x01\x93.", "builtins.eval"),
        (b"\x80\x02\x82\x01.", "copyreg extension 1"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "collections.OrderedDict"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "collections.OrderedDict.__init__"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"c__builtin__\nexec\n.", "__builtin__.exec"),
    ],
)
def test_tricks_with_names_are_seen(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(data)
    finding = examine(tmp_path / "model.pkl")
    assert finding.verdict == "unsafe"
    assert named(finding) == {name}


def test_a_module_pickled_whole_would_import_its_class(tmp_path: Path) -> None:
    torch.save(UsersNetwork(), tmp_path / "model.pt")
    finding = examine(tmp_path / "model.pt")
    assert finding.verdict == "unsafe"
    assert any(name.endswith("UsersNetwork") for name in named(finding))
    with pytest.raises(UnsafeArtifact, match="save its state_dict and use --factory, or export it"):
        open_classifier(tmp_path / "model.pt")


def test_each_reference_counts_once(tmp_path: Path) -> None:
    payloads = [Payload(tmp_path / "canary") for _ in range(50)]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps([*payloads, UsersNetwork]))
    finding = examine(tmp_path / "model.pkl")
    assert finding.score == 2.0
    assert finding.threshold == 1.0


# --- pickles that run nothing ------------------------------------------------------------------------------


def state_dict(path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2)).state_dict(), path)


def legacy_state_dict(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=False)


def checkpoint(path: Path) -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    types = [
        torch.zeros(1, dtype=getattr(torch, name))
        for name in ("float16", "bfloat16", "int8", "bool", "complex64")
    ]
    torch.save(
        {
            "model": layer.state_dict(),
            "optimizer": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1, path=Path("x")),
            "random": np.random.default_rng(0).bit_generator.state,
            "array": np.arange(3),
            "score": np.float64(0.5),
            "types": types,
            "parameter": nn.Parameter(torch.zeros(2)),
            "sparse": torch.eye(2).to_sparse(),
            "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "device": torch.device("cpu"),
            "size": torch.Size([1]),
        },
        path,
    )


def plain_data(path: Path) -> None:
    path.write_bytes(pickle.dumps([{"a": (1, 2.5, None, True, b"x", {3}, frozenset({4}))}, OrderedDict(b=1)]))


def safetensors_file(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(3)}, path)


def numbers(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3), b=np.array(["x"]))


def numbers_and_objects(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)


HARMLESS_FILES: dict[str, Callable[[Path], None]] = {
    "model.pt": state_dict,
    "legacy.pt": legacy_state_dict,
    "checkpoint.pt": checkpoint,
    "pytorch_model.bin": state_dict,
    "data.pkl": plain_data,
    "model.safetensors": safetensors_file,
    "numbers.npz": numbers,
    "objects.npy": numbers_and_objects,
}


@pytest.mark.parametrize("name", HARMLESS_FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # quantised tensors are announced to go
def test_weights_run_nothing(name: str, tmp_path: Path) -> None:
    HARMLESS_FILES[name](tmp_path / name)
    finding = examine(tmp_path / name)
    assert finding.verdict == "nothing_found", finding.evidence
    assert finding.score == 0.0
    assert finding.atlas == ()


def test_bytes_that_look_like_a_pickle_by_chance_are_no_doubt(tmp_path: Path) -> None:
    tensors = {"a": torch.frombuffer(bytearray(b"\x80\x02" + b"\xff" * 30), dtype=torch.uint8)}
    torch.save(tensors, tmp_path / "model.pt")
    assert examine(tmp_path / "model.pt").verdict == "nothing_found"


def test_torchs_own_list_of_safe_globals_is_ours_too() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    missing = [name for name in _get_allowed_globals() if not harmless(*name.rsplit(".", 1))]
    assert missing == []


def test_paths_saved_by_any_python_are_harmless(tmp_path: Path) -> None:
    for module in (b"pathlib", b"pathlib._local"):  # Python 3.13 names the second
        (tmp_path / "paths.pkl").write_bytes(b"c" + module + b"\nPosixPath\n(Vx\ntR.")
        assert examine(tmp_path / "paths.pkl").verdict == "nothing_found"


def test_nothing_on_a_published_block_list_is_harmless() -> None:
    scanner = pytest.importorskip("picklescan.scanner")
    for module, names in scanner._unsafe_globals.items():
        for name in ["anything"] if names == "*" else names:
            assert not harmless(module, name), (module, name)


def test_what_picklescan_calls_dangerous_is_unsafe_here(tmp_path: Path) -> None:
    scanner = pytest.importorskip("picklescan.scanner")
    known = [case for case in RUNS_SYSTEM if RUNS_SYSTEM[case][0].endswith((".pt", ".pth", ".pkl"))]
    agreed = 0
    for i, case in enumerate(known):
        path = tmp_path / str(i) / RUNS_SYSTEM[case][0]
        path.parent.mkdir()
        RUNS_SYSTEM[case][1](path, tmp_path / "canary")
        if scanner.scan_file_path(str(path)).issues_count:
            assert examine(path).verdict == "unsafe"
            agreed += 1
    assert agreed >= 6
    assert not (tmp_path / "canary").exists()


# --- what the real unpickler would import, against what we read ---------------------------------------------


class Recorder(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Unpickle with inert stand-ins and write down what would have been imported.

    This is the unpickler in Python: the one in C makes room for whatever number a damaged pickle names.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.problem: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.problem.add((module, name))
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        return None


class Inert(dict[Any, Any]):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return dict.__new__(cls)

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


SEEDS = [
    *(
        pickle.dumps([{"a": (1, 2.5)}, OrderedDict(b=[1]), Path("x"), {3}, Payload(Path("c"))], p)
        for p in range(6)
    ),
    *(pickle.dumps(np.arange(3), p) for p in (2, 4)),
    b"(S'touch'\nios\nsystem\n.",
    b"\x80\x04\x8c\x08builtins\x94\x8c\x04eval\x94h\x00h\x01\x93(\x8c\x011tR.",
]


@settings(max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255), st.sampled_from("fid")), max_size=4),
)
def test_whatever_the_unpickler_imports_was_read_before(
    seed: bytes, changes: list[tuple[int, int, str]]
) -> None:
    """Flip, insert and drop bytes: no damage may hide an import from the walk but not from the unpickler."""
    data = bytearray(seed)
    for place, value, kind in changes:
        at = place % len(data)
        if kind == "f":
            data[at] = value
        elif kind == "i":
            data.insert(at, value)
        elif len(data) > 1:
            del data[at]
    if 0x96 in data:  # BYTEARRAY8 makes room for whatever length it names
        return
    recorder = Recorder(io.BytesIO(bytes(data)))
    with contextlib.suppress(Exception):  # a damaged pickle breaks off with anything
        recorder.load()
    reading = read_pickles(io.BytesIO(bytes(data)), Budget(opcodes=10_000, bytes=1 << 20))
    dangerous = {f"{module}.{name}" for module, name in recorder.problem if not harmless(module, name)}
    assert dangerous <= set(reading.hits) or reading.error is not None


# --- programs of torch.export ------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.convolution(image).relu().mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the members of a small exported program."""
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    dynamic = ({0: torch.export.Dim("n", min=1)},)
    exported = torch.export.export(Network().eval(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=dynamic)
    torch.export.save(exported, path)
    with zipfile.ZipFile(path) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


Members = dict[str, bytes]


def changed(members: Members, name: str, change: Callable[[dict[str, Any]], None]) -> Members:
    document = json.loads(members[name])
    change(document)
    return members | {name: json.dumps(document).encode()}


MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def pickled_inputs(members: Members, canary: Path) -> Members:
    buffer = io.BytesIO()
    torch.save(((Payload(canary),), {}), buffer)
    return members | {"data/sample_inputs/model.pt": buffer.getvalue()}


def pickled_weight(members: Members, canary: Path) -> Members:
    buffer = io.BytesIO()
    torch.save(Payload(canary), buffer)

    def change(document: dict[str, Any]) -> None:
        entry = next(iter(document["config"].values()))
        entry["use_pickle"] = True
        members[f"data/weights/{entry['path_name']}"] = buffer.getvalue()

    members = dict(members)
    return changed(members, WEIGHTS, change) | {k: v for k, v in members.items() if k not in (WEIGHTS,)}


def opaque_object(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        document["config"]["c"] = {
            "path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None,
        }  # fmt: skip

    payload = {"data/constants/opaque_obj_0": pickle.dumps(Payload(canary))}
    return changed(members, CONSTANTS, change) | payload


def evaluated_size(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        value = next(iter(document["graph_module"]["graph"]["tensor_values"].values()))
        value["sizes"][0] = {
            "as_expr": {"expr_str": f"__import__('os').system('touch {canary}')", "hint": None}
        }

    return changed(members, MODEL, change)


def evaluated_guard(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        document["guards_code"] = [f"__import__('os').system('touch {canary}') or True"]

    return changed(members, MODEL, change)


def name_as_source(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        evil = f"x=__import__('os').system('touch {canary}')"
        names = [one["as_tensor"]["name"] for one in document["graph_module"]["graph"]["inputs"]]
        text = json.dumps(document).replace(json.dumps(names[-1]), json.dumps(evil))
        document.clear()
        document.update(json.loads(text))

    return changed(members, MODEL, change)


def foreign_function(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        node = {
            "target": "torch.os.system",
            "inputs": [{"name": "", "arg": {"as_string": f"touch {canary}"}, "kind": 1}],
            "outputs": [],
            "metadata": {},
            "name": "evil",
        }
        document["graph_module"]["graph"]["nodes"].insert(0, node)

    return changed(members, MODEL, change)


def imported_module(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
        spec = [1, {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}]
        call = next(one for one in document["graph_module"]["module_call_graph"] if one["signature"])
        call["signature"]["in_spec"] = json.dumps(spec)

    return changed(members, MODEL, change)


def file_writer(members: Members, canary: Path) -> Members:
    def change(document: dict[str, Any]) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    return changed(members, MODEL, change)


def compiled_library(members: Members, canary: Path) -> Members:
    return members | {"data/aotinductor/model/kernel.so": b"\x7fELF" + bytes(100)}


EVIL_PROGRAMS: dict[str, tuple[Callable[[Members, Path], Members], str, bool]] = {
    # what is done to the program, what the finding names, whether torch.export.load alone runs it
    "pickled sample inputs": (pickled_inputs, SYSTEM, True),
    "use_pickle": (pickled_weight, "weight_0", True),
    "opaque object": (opaque_object, "opaque_obj_0", True),
    "size that is evaluated": (evaluated_size, "__import__('os')", True),
    "guard that is evaluated": (evaluated_guard, "__import__('os')", False),
    "name that becomes source": (name_as_source, "__import__('os')", True),
    "function that is no operator": (foreign_function, "torch.os.system", False),
    "module that is imported": (imported_module, "antigravity", False),
    "operator that reads files": (file_writer, "from_file", False),
    "compiled library": (compiled_library, "kernel.so", False),
}


@pytest.mark.parametrize("case", EVIL_PROGRAMS)
def test_a_program_that_runs_code_is_named_refused_and_not_run(
    case: str, program: dict[str, bytes], tmp_path: Path
) -> None:
    change, name, _ = EVIL_PROGRAMS[case]
    canary = tmp_path / "canary"
    members = change(dict(program), canary)
    path = zipped(tmp_path / "model.pt2", {f"m/{key}": value for key, value in members.items()})
    finding = examine(path)
    assert finding.verdict == "unsafe"
    assert any(name in one for one in named(finding)), named(finding)
    with pytest.raises(UnsafeArtifact) as refusal:
        open_classifier(path)
    assert refusal.value.finding is not None
    assert refusal.value.finding.model_dump(
        include={"verdict", "score", "evidence", "atlas", "detector"}
    ) == (finding.model_dump(include={"verdict", "score", "evidence", "atlas", "detector"}))
    assert "\n" not in str(refusal.value)
    assert not canary.exists()


@pytest.mark.parametrize("case", [case for case, row in EVIL_PROGRAMS.items() if row[2]])
@pytest.mark.filterwarnings("ignore")
def test_torch_itself_runs_these_programs(case: str, program: dict[str, bytes], tmp_path: Path) -> None:
    """The danger is real: `torch.export.load` runs each of these, most of them without a single pickle."""
    canary = tmp_path / "canary"
    members = EVIL_PROGRAMS[case][0](dict(program), canary)
    path = zipped(tmp_path / "model.pt2", {f"m/{key}": value for key, value in members.items()})
    with contextlib.suppress(Exception):  # it breaks afterwards
        torch.export.load(path).module()
    assert canary.exists()


def test_programs_as_torch_writes_them_run_nothing(program: dict[str, bytes], tmp_path: Path) -> None:
    path = zipped(tmp_path / "model.pt2", {f"m/{key}": value for key, value in program.items()})
    assert examine(path).verdict == "nothing_found"


@pytest.mark.parametrize(
    "expression",
    [
        "s0",
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s0'))",
        "8*s1//2 + 1",
        "Max(1, s3)",
    ],
)
def test_sizes_as_torch_writes_them_are_arithmetic(expression: str) -> None:
    assert only_arithmetic(expression)


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "().__class__", "Symbol('s0').__class__", "exec('x')", "lambda: 0",
     "s0 if s1 else 2", "Symbol(\"s0\")", "open", "", "Integer(2).name", "[x for x in s0]", "'a'.b"],
)  # fmt: skip
def test_whatever_else_is_no_arithmetic(expression: str) -> None:
    assert not only_arithmetic(expression)


# --- directories, Keras, ONNX ------------------------------------------------------------------------------


def directory(path: Path, files: dict[str, bytes | dict[str, Any]]) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_directory_with_custom_code_is_named_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = directory(
        tmp_path / "model",
        {
            "config.json": {
                "architectures": ["EvilForImageClassification"],
                "model_type": "evil",
                "auto_map": {
                    "AutoConfig": "configuration_evil.EvilConfig",
                    "AutoModelForImageClassification": "modeling_evil.EvilModel",
                },
            },
            "modeling_evil.py": f"open({str(canary)!r}, 'w')".encode(),
            "configuration_evil.py": f"open({str(canary)!r}, 'w')".encode(),
        },
    )
    finding = examine(path)
    assert finding.verdict == "unsafe"
    classes = {"configuration_evil.EvilConfig", "modeling_evil.EvilModel"}
    assert named(finding) == classes | {"modeling_evil.py", "configuration_evil.py"}
    with pytest.raises(UnsafeArtifact, match="custom code"):
        open_classifier(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Slow", None]}}, "tok.Slow"),
        ("config.json", {"vision": {"auto_map": {"AutoConfig": "other/repo--conf.C"}}}, "other/repo--conf.C"),
        ("model_index.json", {"custom_pipelines": "run.py"}, "run.py"),
        ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("metadata.json", {"layers": [{"class_name": "Lambda", "config": {}}]}, "Lambda"),
        ("metadata.json", {"module": "os", "class_name": "system"}, "os.system"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(70) + b'{"class_name": "Lambda", "config": {}}', "Lambda"),
        ("libop.so", b"\x7fELF" + bytes(60), "libop.so"),
    ],
)
def test_other_ways_to_bring_code(
    file: str, content: bytes | dict[str, Any], name: str, tmp_path: Path
) -> None:
    finding = examine(directory(tmp_path / "model", {file: content}))
    assert finding.verdict == "unsafe"
    assert named(finding) == {name}


def test_a_keras_archive_is_looked_into(tmp_path: Path) -> None:
    layer = {"module": "keras.layers", "class_name": "Dense", "config": {}}
    clean = zipped(tmp_path / "clean.keras", {"config.json": json.dumps({"layers": [layer]}).encode()})
    assert examine(clean).verdict == "nothing_found"
    layer = {"module": "keras.layers", "class_name": "Lambda", "config": {}}
    evil = zipped(tmp_path / "evil.keras", {"config.json": json.dumps({"layers": [layer]}).encode()})
    assert named(examine(evil)) == {"Lambda"}


def test_a_directory_of_weights_and_settings_runs_nothing(tmp_path: Path) -> None:
    path = directory(
        tmp_path / "model",
        {
            "config.json": {
                "architectures": ["ViTForImageClassification"],
                "id2label": {"0": "cat", "1": "dog"},
            },
            "preprocessor_config.json": {"do_resize": True, "size": {"height": 8, "width": 8}},
            "README.md": b"os.system",
        },
    )
    safetensors_file(path / "model.safetensors")
    state_dict(path / "pytorch_model.bin")
    assert examine(path).verdict == "nothing_found"
    torch_zip(path / "pytorch_model.bin", tmp_path / "canary")
    assert examine(path).verdict == "unsafe"


def test_an_onnx_model_that_reaches_outside_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def model(operator: str = "Relu", domain: str = "", location: str | None = None) -> Any:
        weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
        if location is not None:
            weight.ClearField("float_data")
            weight.data_location = TensorProto.EXTERNAL
            weight.external_data.add(key="location", value=location)
        nodes = [
            helper.make_node("Mul", ["x", "w"], ["z"], name="first"),
            helper.make_node(operator, ["z"], ["y"], name="second", domain=domain),
        ]
        value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])  # noqa: E731
        graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], [weight])
        imports = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
        return helper.make_model(graph, opset_imports=imports)

    cases = [
        (model(), set()),
        (model("FusedConv", "com.microsoft"), set()),
        (model("Custom", "my.company"), {"my.company.Custom"}),
        (model("PythonOp", "com.microsoft"), {"com.microsoft.PythonOp"}),
        (model(location="weights.data"), set()),
        (model(location="../../etc/passwd"), {"../../etc/passwd"}),
        (model(location="/etc/passwd"), {"/etc/passwd"}),
        (model(location="C:\\secret"), {"C:\\secret"}),
    ]
    for i, (proto, names) in enumerate(cases):
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(proto.SerializeToString())
        finding = examine(path)
        assert (finding.verdict, named(finding)) == ("unsafe" if names else "nothing_found", names)
    assert onnx.__name__ == "onnx"


# --- what cannot be told -----------------------------------------------------------------------------------


def encrypted(path: Path) -> None:
    """Set the bit that says "encrypted"; readers that ignore it read the pickle all the same."""
    zipped(path, {"m/data.pkl": pickle.dumps([1])})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)


def truncated_zip(path: Path) -> None:
    state_dict(path)
    path.write_bytes(path.read_bytes()[:-100])


def unclear_array(path: Path) -> None:
    pytest.importorskip("joblib").dump(np.zeros(2, dtype=[("a", "f8"), ("b", "i4")]), path)


UNREADABLE: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any]]] = {
    "truncated pickle": ("a.pkl", lambda p: p.write_bytes(pickle.dumps(list(range(99)))[:-20]), {}),
    "noise": ("a.pt", lambda p: p.write_bytes(b"\x01\x02\x03noise"), {}),
    "empty": ("a.pkl", lambda p: p.write_bytes(b""), {}),
    "truncated zip": ("a.pt", truncated_zip, {}),
    "encrypted zip": ("a.pt", encrypted, {}),
    "broken JSON": ("config.json", lambda p: p.write_text("{"), {}),
    "deep JSON": ("config.json", lambda p: p.write_text("[" * 100_000), {}),
    "noise named onnx": ("a.onnx", lambda p: p.write_bytes(b"noise" * 9), {}),
    "too many instructions": (
        "a.pkl",
        lambda p: p.write_bytes(pickle.dumps(list(range(999)))),
        {"opcodes": 99},
    ),
    "too many bytes": (
        "a.pkl",
        lambda p: p.write_bytes(pickle.dumps([str(i) * 300 for i in range(2500)], 0)),
        {"megabytes": 1},
    ),
    "bomb": ("a.pkl.gz", lambda p: p.write_bytes(gzip.compress(bytes(9 << 20))), {"megabytes": 1}),
    "forged length": ("a.pkl", lambda p: p.write_bytes(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f"), {}),
    "arrays in joblib whose type is unclear": ("a.joblib", unclear_array, {}),
    "archives too deep": ("a.zip", lambda p: nested(p, p), {"depth": 0}),
    "missing": ("gone.pt", lambda p: None, {}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_to_its_end_is_neither_safe_nor_unsafe(case: str, tmp_path: Path) -> None:
    name, write, settings = UNREADABLE[case]
    write(tmp_path / name)
    finding = examine(tmp_path / name, **settings)
    assert finding.verdict == "could_not_tell"
    assert finding.reason
    assert finding.score is None


def test_an_empty_member_of_an_archive_runs_nothing(tmp_path: Path) -> None:
    # torch.export.save writes one where a program has no sample inputs
    program = zipped(tmp_path / "a.pt2", {"a/data/sample_inputs/model.pt": b"", "a/archive_format": b"pt2"})
    finding = examine(program)
    assert (finding.verdict, finding.score) == ("nothing_found", 0.0)


def test_a_crash_of_the_parser_is_could_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> Any:
        raise ZeroDivisionError("a bug in the parser")

    state_dict(tmp_path / "model.pt")
    monkeypatch.setattr(pickles._Walk, "_step", crash)
    finding = examine(tmp_path / "model.pt")
    assert finding.verdict == "could_not_tell"
    assert "a bug in the parser" in str(finding.reason)


def test_code_that_was_found_counts_although_the_rest_is_unreadable(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", {"a.pkl": b"\x80\x04", "config.json": {"auto_map": {"A": "b.C"}}})
    finding = examine(path)
    assert finding.verdict == "unsafe"
    assert any(one.type == "text" and "a.pkl" in one.text for one in finding.evidence)


SUFFIXES = [
    ".pt",
    ".pkl",
    ".pt2",
    ".onnx",
    ".npy",
    ".npz",
    ".json",
    ".h5",
    ".keras",
    ".tar",
    ".gz",
    ".joblib",
]
HEADS = [
    b"",
    b"PK\x03\x04",
    b"\x80\x04",
    b"\x1f\x8b\x08",
    b"\x93NUMPY",
    b"{",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"x\x9c",
]


@given(st.binary(max_size=200), st.sampled_from(SUFFIXES), st.sampled_from(HEADS))
def test_no_bytes_make_the_detector_fail(tmp_path: Path, data: bytes, suffix: str, head: bytes) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(head + data)
    assert examine(path).verdict in ("nothing_found", "could_not_tell", "unsafe")
