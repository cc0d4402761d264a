"""Give Doorward odd files, as packages, public issues and advisories have them, and write down what it says.

    python benchmarks/odd_inputs.py

writes each file, scans it, and asks picklescan about those that run code when they are opened. Ends with 4 if
one that runs code passes, or anything ends in a fault. `tests/test_odd_inputs.py` holds every case to what it
must say.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import measuring

#: Exit codes: nothing found, found or unsafe, unreadable, could not tell.
PASSES, UNSAFE, UNREADABLE, UNTOLD = 0, 1, 2, 3
FILES = ("--files-only",)
#: What looks at behaviour and is quick.
QUICK = ("--detector", "unsafe-code", "--detector", "max-margin")


@dataclass(frozen=True)
class Case:
    """An odd input.

    Attributes:
        write: writes it into a folder, and returns what is scanned.
        codes: exit codes that are right.
        words: options of the scan.
        hostile: whether opening it runs code.
        said: what has to be said of it.
    """

    write: Callable[[Path], Path]
    codes: tuple[int, ...]
    words: tuple[str, ...] = FILES
    hostile: bool = False
    said: str = ""


# --- pickles that call what public advisories name ---------------------------------------------------------

#: Functions that run code, read or write files, or call out, which advisories of picklescan and reports of
#: malicious models name, with arguments of the kind that each takes.
CALLS: dict[str, tuple[Any, ...]] = {
    "posix.system": ("id",),
    "nt.system": ("id",),
    "pty.spawn": ("id",),
    "subprocess.Popen": ("id",),
    "subprocess.getoutput": ("id",),
    "os.popen": ("id",),
    "os.remove": ("a",),
    "shutil.rmtree": ("a",),
    "runpy.run_path": ("a.py",),
    "importlib.import_module": ("a",),
    "ctypes.CDLL": ("a.so",),
    "pydoc.pipepager": ("a", "id"),
    "bdb.Bdb.run": ("1",),
    "timeit.timeit": ("1",),
    "profile.run": ("1",),
    "cProfile.runctx": ("1", {}, {}),
    "trace.Trace.runctx": ("1",),
    "doctest.debug_script": ("1",),
    "code.InteractiveInterpreter.runcode": ("1",),
    "idlelib.run.Executive.runcode": ("1",),
    "idlelib.calltip.get_entity": ("1",),
    "lib2to3.pgen2.grammar.Grammar.loads": (b"N.",),
    "ensurepip._run_pip": (["list"],),
    "logging.config.listen": (9999,),
    "distutils.file_util.write_file": ("a", ["b"]),
    "io.FileIO": ("a", "w"),
    "pathlib.Path.write_text": ("a", "b"),
    "webbrowser.open": ("http://localhost",),
    "urllib.request.urlopen": ("http://localhost",),
    "socket.create_connection": (("localhost", 9),),
    "smtplib.SMTP": ("localhost",),
    "ssl.get_server_certificate": (("localhost", 9),),
    "asyncio.unix_events._UnixSubprocessTransport._start": ("id",),
    "multiprocessing.util.spawnv_passfds": (b"id", [], []),
    "types.FunctionType": ("c", {}),
    "marshal.loads": (b"N",),
    "operator.methodcaller": ("system", "id"),
    "operator.attrgetter": ("system",),
    "functools.partial": ("id",),
    "builtins.compile": ("1", "", "eval"),
    "builtins.breakpoint": (),
    "numpy.f2py.crackfortran.getlincoef": ("1", {}),
    "numpy.f2py.crackfortran.param_eval": ("1", {}, {}),
    "numpy.testing._private.utils.runstring": ("1", {}),
    "torch.utils.bottleneck.__main__.run_cprofile": ("1", {}),
    "torch.utils.collect_env.run": ("id",),
    "torch.utils._config_module.ConfigModule.load_config": (b"N.",),
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression": ("1",),
    "torch._inductor.codecache.compile_file": ("a",),
    "torch.hub.load": ("a/b", "c"),
    "torch.serialization.load": ("a",),
    "joblib.load": ("a",),
    "pandas.read_pickle": ("a",),
    "transformers.utils.import_utils._LazyModule": ("a",),
}


def calling(name: str, arguments: Sequence[Any]) -> bytes:
    """Return a pickle that calls a function by its dotted name; what is a class in it stays with the name."""
    module, _, function = name.rpartition(".")
    parts = module.split(".")
    if parts[-1][:1].isupper() or parts[-1] == "_UnixSubprocessTransport":
        module, function = ".".join(parts[:-1]), f"{parts[-1]}.{function}"

    def text(value: str) -> bytes:
        return b"\x8c" + struct.pack("<B", len(value)) + value.encode()

    given = pickle.dumps(tuple(arguments), 4)[2:-1]
    if given[:1] == b"\x95":  # a frame of its own
        given = given[9:]
    return b"\x80\x04" + text(module) + text(function) + b"\x93" + given + b"R."


def _call(name: str) -> Case:
    def write(folder: Path) -> Path:
        file = folder / "pytorch_model.bin"
        file.write_bytes(calling(name, CALLS[name]))
        return file

    return Case(write, (UNSAFE,), hostile=True, said=name.rpartition(".")[2])


# --- files as packages and sites have them -----------------------------------------------------------------


def data(name: str, content: bytes) -> Callable[[Path], Path]:
    """Return what writes a file."""

    def write(folder: Path) -> Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    return write


def folder_of(**files: bytes) -> Callable[[Path], Path]:
    """Return what writes a folder of files, whose names have `__` for a dot."""

    def write(folder: Path) -> Path:
        place = folder / "model"
        place.mkdir()
        for name, content in files.items():
            (place / name.replace("__", ".")).write_bytes(content)
        return place

    return write


def zipped(members: dict[str, bytes]) -> bytes:
    """Return a zip of some members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    """Return a gzipped tar of some members, as a .nemo file is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def safetensors(header: bytes, body: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    return struct.pack("<Q", len(header)) + header + body


EVIL = calling("posix.system", ("id",))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n"
PAGE = b"<!DOCTYPE html><html><head><title>404: Not Found</title></head></html>"
VIT = json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]}).encode()
TENSOR = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def scripted(folder: Path) -> Path:
    """Write a TorchScript file."""
    import torch
    from torch import nn

    with contextlib.suppress(DeprecationWarning):
        module = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
        module.save(str(folder / "model.pt"))
    return folder / "model.pt"


def whole_module(folder: Path) -> Path:
    """Write a module as `torch.save(module)` does, class and all."""
    import torch
    from torch import nn

    torch.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), folder / "model.pt")
    return folder / "model.pt"


def loop_of_links(folder: Path) -> Path:
    """Write a folder that links to itself."""
    (folder / "model").mkdir()
    (folder / "model" / "again").symlink_to(folder / "model")
    (folder / "model" / "model.onnx").symlink_to("model.onnx")
    return folder / "model"


def many(folder: Path) -> Path:
    """Write a folder of a thousand files, one of which runs code."""
    place = folder / "shards"
    place.mkdir()
    for i in range(1000):
        (place / f"shard-{i:04}.bin").write_bytes(EVIL if i == 777 else b"")
    return place


def onnx_of(change: Callable[[Any], None]) -> Callable[[Path], Path]:
    """Return what writes a small ONNX classifier, changed."""

    def write(folder: Path) -> Path:
        import numpy as np
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        weight = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["x"], ["f"]),
                helper.make_node("MatMul", ["f", "w"], ["y"]),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
            [numpy_helper.from_array(weight, "w")],
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        change(model)
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    return write


def _rename_domain(model: Any) -> None:
    model.graph.node[1].domain = "com.example"


def _future(model: Any) -> None:
    model.opset_import[0].version = 9_999


def _no_output(model: Any) -> None:
    del model.graph.output[:]


def _not_finite(model: Any) -> None:
    raw = bytearray(model.graph.initializer[0].raw_data)
    raw[:4] = struct.pack("<f", float("nan"))
    model.graph.initializer[0].raw_data = bytes(raw)


def _twice(model: Any) -> None:
    model.graph.node.append(model.graph.node[1])


def _circle(model: Any) -> None:
    model.graph.node[0].input[0] = "y"


def _one_class(model: Any) -> None:
    model.graph.node.add(op_type="ReduceSum", input=["y"], output=["s"])
    model.graph.output[0].name = "s"


def _training(model: Any) -> None:
    model.training_info.add()


def _sizes(model: Any) -> None:
    for axis in model.graph.input[0].type.tensor_type.shape.dim:
        axis.ClearField("dim_value")
        axis.dim_value = 2**40


def _refused(write: Callable[[Path], Path]) -> Case:
    return Case(write, (UNREADABLE,), QUICK)


def _untold(write: Callable[[Path], Path]) -> Case:
    """Return a case of a format whose files alone are examined."""
    return Case(write, (UNTOLD,), QUICK)


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    return {
        **{f"a pickle that calls {name}": _call(name) for name in CALLS},
        # what runs code, elsewhere than in a plain pickle
        "a .nemo archive": Case(data("a.nemo", tarred({"model.ckpt": EVIL})), (UNSAFE,), hostile=True),
        "a wheel with a pickle": Case(
            data("a-1-py3-none-any.whl", zipped({"a/model.pkl": EVIL})), (UNSAFE,), hostile=True
        ),
        "a .mar archive of TorchServe": Case(
            data("a.mar", zipped({"MAR-INF/MANIFEST.json": b"{}", "model.pt": EVIL, "handler.py": b"1"})),
            (UNSAFE,),
            hostile=True,
        ),
        "a .keras archive with a Lambda": Case(
            data(
                "a.keras",
                zipped({"config.json": b'{"class_name":"Lambda","config":{"function":["4wEAAAA=",null]}}'}),
            ),
            (UNSAFE, UNTOLD),
            hostile=True,
        ),
        "a zip whose member is named above itself": Case(
            data("a.zip", zipped({"../../model.pkl": EVIL})), (UNSAFE,), hostile=True
        ),
        "a thousand shards, one of them bad": Case(many, (UNSAFE,), hostile=True),
        "a whole module, as torch.save(module)": Case(whole_module, (UNSAFE, UNTOLD), hostile=True),
        "TorchScript": Case(scripted, (UNSAFE, UNTOLD, PASSES)),
        "a configuration that asks for code": Case(
            folder_of(
                config__json=b'{"model_type":"a","auto_map":{"AutoModel":"own.Net"}}', own__py=b"print(1)"
            ),
            (UNSAFE,),
            hostile=True,
        ),
        "a tokenizer that asks for code": Case(
            folder_of(
                config__json=VIT,
                tokenizer_config__json=b'{"auto_map":{"AutoTokenizer":["own.T",null]}}',
                own__py=b"print(1)",
            ),
            (UNSAFE, UNTOLD),
            hostile=True,
        ),
        "a pickle as safetensors in a folder": Case(
            folder_of(config__json=VIT, model__safetensors=EVIL), (UNSAFE,), hostile=True
        ),
        # what is downloaded in place of a model
        "a pointer of Git LFS as .onnx": _refused(data("m.onnx", LFS)),
        "a pointer of Git LFS as weights": _refused(folder_of(config__json=VIT, model__safetensors=LFS)),
        "a web page as .onnx": _refused(data("m.onnx", PAGE)),
        "a web page as .pt2": _refused(data("m.pt2", PAGE)),
        "a web page as weights": _refused(folder_of(config__json=VIT, model__safetensors=PAGE)),
        "an answer in JSON as .onnx": _refused(data("m.onnx", b'{"error":"Repository not found"}')),
        # formats that are none of ours
        "an empty file": _refused(data("m.onnx", b"")),
        "TensorFlow's saved_model.pb": _untold(folder_of(saved_model__pb=b"\x08\x01\x12\x04abcd")),
        "TensorFlow Lite": _untold(data("m.tflite", b"\x1c\0\0\0TFL3" + bytes(64))),
        "GGUF": _untold(data("m.gguf", b"GGUF\x03\0\0\0" + bytes(64))),
        "Core ML": _untold(data("m.mlmodel", b"\x08\x05\x12\x08" + bytes(32))),
        "OpenVINO": _untold(folder_of(m__xml=b"<net name='a'/>", m__bin=bytes(64))),
        "XGBoost in JSON": _refused(data("m.json", b'{"learner":{},"version":[2,0,0]}')),
        "LightGBM in text": _refused(data("m.txt", b"tree\nversion=v4\n")),
        "HDF5": _untold(data("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(64))),
        "a picture": _refused(data("m.png", b"\x89PNG\r\n\x1a\n" + bytes(16))),
        # configurations
        "a configuration that is a list": _refused(folder_of(config__json=b"[1, 2]")),
        "a configuration with a byte order mark": _refused(folder_of(config__json=b"\xef\xbb\xbf" + VIT)),
        "a configuration in UTF-16": _refused(folder_of(config__json=VIT.decode().encode("utf-16"))),
        "a configuration a million levels deep": Case(
            folder_of(config__json=b"[" * 1_000_000), (UNREADABLE, UNTOLD), QUICK
        ),
        "a configuration with numbers beyond all sense": _refused(
            folder_of(
                config__json=b'{"model_type":"vit","hidden_size":1e999,"num_hidden_layers":-1,'
                b'"architectures":["ViTForImageClassification"]}'
            )
        ),
        "an adapter without its model": _refused(
            folder_of(adapter_config__json=b'{"base_model_name_or_path":"a/b"}')
        ),
        "an index that names shards that are missing": _refused(
            folder_of(
                config__json=VIT,
                model__safetensors__index__json=b'{"weight_map":{"a":"model-00001-of-00002.safetensors"}}',
            )
        ),
        "a folder that links to itself": _refused(loop_of_links),
        # safetensors
        **{
            f"safetensors, {what}": _refused(folder_of(config__json=VIT, model__safetensors=content))
            for what, content in {
                "whose header is longer than the file": struct.pack("<Q", 2**40) + b"{}",
                "whose header is empty": safetensors(b""),
                "whose header is no JSON": safetensors(b"hello"),
                "with bytes missing": safetensors(TENSOR, b"\0\0"),
                "with bytes left over": safetensors(TENSOR, bytes(8)),
                "of an unknown type": safetensors(TENSOR.replace(b"F32", b"Q9X"), bytes(4)),
                "with tensors that overlap": safetensors(
                    TENSOR[:-1] + b',"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
                ),
                "of a negative shape": safetensors(TENSOR.replace(b"[1]", b"[-1]"), bytes(4)),
                "of another network": safetensors(TENSOR, bytes(4)),
            }.items()
        },
        # ONNX
        "ONNX, sound": Case(onnx_of(lambda _: None), (UNTOLD, PASSES), QUICK),
        "ONNX with an operator of somebody's own": Case(onnx_of(_rename_domain), (UNSAFE,), QUICK),
        "ONNX of a version to come": _refused(onnx_of(_future)),
        "ONNX without outputs": _refused(onnx_of(_no_output)),
        "ONNX with weights that are no numbers": Case(onnx_of(_not_finite), (UNREADABLE, UNTOLD), QUICK),
        "ONNX that gives one name twice": _refused(onnx_of(_twice)),
        "ONNX in a circle": Case(onnx_of(_circle), (UNREADABLE, UNTOLD), QUICK),
        "ONNX of one number for all images": Case(onnx_of(_one_class), (UNREADABLE, UNTOLD), QUICK),
        "ONNX for training": Case(onnx_of(_training), (UNREADABLE, UNTOLD, PASSES), QUICK),
        "ONNX of images of 2^40 pixels a side": Case(onnx_of(_sizes), (UNREADABLE, UNTOLD), QUICK),
        # archives
        "a zip that is cut off, as .pt2": _refused(data("m.pt2", zipped({"a": b"b" * 999})[:-40])),
        "a zip of something else, as .pt2": _refused(data("m.pt2", zipped({"a/b": b"c"}))),
        "a zip that unpacks to 4 GiB, as .pt2": Case(data("m.pt2", bomb()), (UNREADABLE, UNTOLD), QUICK),
    }


def bomb() -> bytes:
    """Return a zip whose directory claims a member of four gigabytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/models/model.json", bytes(1 << 20))
    content = bytearray(buffer.getvalue())
    directory = content.rfind(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 0xFFFFFFF0)
    return bytes(content)


@dataclass(frozen=True)
class Answer:
    """How a scan ended, and what it printed."""

    code: int
    text: str


def ask(case: Case, folder: Path) -> Answer:
    """Write an input and scan it in this process."""
    from doorward.cli.app import main

    words = ["doorward", "scan", *case.words, "--", str(case.write(folder))]
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    code = 0
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", words),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    text = output.buffer.getvalue().decode()
    return Answer(code, text)


def picklescan(path: Path) -> int:
    """Return picklescan's exit code for a file: 1 is an alarm."""
    program = str(Path(sys.executable).with_name("picklescan"))
    return subprocess.run([program, "-p", str(path)], capture_output=True, check=False).returncode


def measure() -> dict[str, Any]:
    """Ask about every input."""
    rows = []
    for name, case in cases().items():
        with tempfile.TemporaryDirectory() as place:
            answer = ask(case, Path(place))
            row = {"input": name, "hostile": case.hostile, "right": case.codes, "exit_code": answer.code}
            if case.hostile:
                row["picklescan"] = picklescan(Path(place))
            rows.append(row | {"said": " ".join(answer.text.replace(place, "").split())[:200]})
    return {"picklescan": metadata.version("picklescan"), "rows": rows}


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    for row in results["rows"]:
        if row["exit_code"] not in row["right"]:
            yield f"{row['input']}: exit code {row['exit_code']}, {row['said']}"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    spoken = {0: "nothing found", 1: "unsafe", 2: "refused", 3: "could not tell"}
    rows = [
        [row["input"], spoken.get(row["exit_code"], "a fault"), _of_picklescan(row), row["said"]]
        for row in results["rows"]
    ]
    return measuring.markdown(
        ["input", "Doorward", f"picklescan {results['picklescan']}", "what it says"], rows
    )


def _of_picklescan(row: dict[str, Any]) -> str:
    return {0: "passes", 1: "alarm", None: "-"}.get(row.get("picklescan"), "failed")


def main() -> None:
    """Measure, write the results, and end with 4 if anything is not as it must be."""
    measuring.here(measuring.parser(__doc__, threads=1))
    results = measuring.begin(1) | measure()
    measuring.conclude("odd_inputs", results, table(results), failures(results))


if __name__ == "__main__":
    main()
