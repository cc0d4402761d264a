"""Folders of models: what loading opens, what only lies in them, what lies outside or cannot be opened."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from doorward.artifacts import Limits, examine
from doorward.artifacts.findings import NOT_LOADED, conclude, refuse_code
from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell, InputError, UnsafeArtifact
from doorward.models import open_classifier
from hostile_files import HOSTILE, bytecode, elf, text

CONFIG = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "_attn_implementation": "sdpa"}
Files = dict[str, bytes | dict[str, Any] | list[Any]]


def folder(path: Path, files: Files) -> Path:
    """Write a folder; what is no bytes becomes JSON."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def told(path: Path, **settings: Any) -> tuple[str, dict[str, set[str]], set[str]]:
    """Return the verdict, the names of code by the title of their table, and files not checked to the end."""
    conclusion = conclude(examine(path), **settings)
    tables = {
        one.title: {str(row[1]) for row in one.rows} for one in conclusion["evidence"] if one.type == "table"
    }
    doubts = [
        one.text for one in conclusion["evidence"] if one.type == "text" and one.title.startswith("Not")
    ]
    return conclusion["verdict"], tables, {line.split(":")[0] for one in doubts for line in one.splitlines()}


EVIL = text(Path("nowhere"))

#: What loading the model opens: (files, a name that is reported).
REACHED: dict[str, tuple[Files, str]] = {
    "its weights": ({"config.json": CONFIG, "pytorch_model.bin": EVIL}, "os.mkdir"),
    "weights next to better ones": (
        {"config.json": CONFIG, "model.safetensors": b"", "pytorch_model.bin": EVIL},
        "os.mkdir",
    ),
    "a variant of its weights": ({"config.json": CONFIG, "pytorch_model.fp16.bin": EVIL}, "os.mkdir"),
    "a part of its weights": (
        {
            "config.json": CONFIG,
            "pytorch_model.bin.index.json": {"weight_map": {"a": "parts/one.dat"}, "metadata": {}},
            "parts/one.dat": EVIL,
        },
        "os.mkdir",
    ),
    "a part in a hidden folder": (
        {
            "config.json": CONFIG,
            "model.safetensors.index.json": {"weight_map": {"a": ".git/x"}, "metadata": {}},
            ".git/x": EVIL,
        },
        "os.mkdir",
    ),
    "weights that its configuration names": (
        {
            "config.json": CONFIG | {"transformers_weights": "deep/own.safetensors"},
            "deep/own.safetensors": EVIL,
        },
        "os.mkdir",
    ),
    "a vocabulary": ({"config.json": CONFIG, "vocab.pkl": EVIL}, "os.mkdir"),
    "weights of an adapter": ({"config.json": CONFIG, "adapter_model.bin": EVIL}, "os.mkdir"),
    "its own code": (
        {"config.json": CONFIG | {"auto_map": {"AutoModel": "net.Net"}}, "net.py": b"", "sub/helper.py": b""},
        "helper.py",
    ),
    "compiled code of its own": (
        {"config.json": CONFIG | {"auto_map": {"AutoModel": "net.Net"}}, "ops.so": elf(Path())},
        "ops.so",
    ),
    "code of its tokenizer": (
        {"config.json": CONFIG, "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tok.Own", None]}}},
        "tok.Own",
    ),
    "a kernel of the hub": (
        {"config.json": CONFIG | {"attn_implementation": "someone/fast-attention@v1:forward"}},
        "someone/fast-attention@v1:forward",
    ),
    "a kernel of the hub for a part": (
        {"config.json": CONFIG | {"_attn_implementation": {"text_config": "paged|someone/attention"}}},
        "paged|someone/attention",
    ),
    "a kernel of the hub in a part": (
        {"config.json": CONFIG | {"text_config": {"_attn_implementation_internal": "someone/attention"}}},
        "someone/attention",
    ),
    "weights outside": (
        {
            "config.json": CONFIG,
            "model.safetensors.index.json": {"weight_map": {"a": "../outside.bin"}, "metadata": {}},
        },
        "../outside.bin",
    ),
    "weights in a system file": (
        {
            "config.json": CONFIG,
            "pytorch_model.bin.index.json": {"weight_map": {"a": "/etc/passwd"}, "metadata": {}},
        },
        "/etc/passwd",
    ),
    "weights outside by a detour": (
        {
            "config.json": CONFIG,
            "model.safetensors.index.json": {"weight_map": {"a": "a/../../b"}, "metadata": {}},
        },
        "a/../../b",
    ),
    "explicit weights outside": (
        {"config.json": CONFIG | {"transformers_weights": "../x.safetensors"}},
        "../x.safetensors",
    ),
    "a part of a pipeline": (
        {
            "model_index.json": {"_class_name": "P", "unet": ["diffusers", "UNet"]},
            "unet/config.json": {},
            "unet/diffusion_pytorch_model.bin": EVIL,
        },
        "os.mkdir",
    ),
    "a part of a sentence model": (
        {"config.json": CONFIG, "modules.json": [{"path": "2_Dense"}], "2_Dense/pytorch_model.bin": EVIL},
        "os.mkdir",
    ),
    "a module of a sentence model": (
        {"config.json": CONFIG, "modules.json": [{"path": "", "type": "subprocess.run"}]},
        "subprocess.run",
    ),
    "the network of a signed model": (
        {"config.json": {"format": "doorward", "network": "net.pt2", "signature": {}}, "net.pt2": EVIL},
        "os.mkdir",
    ),
    "a file that its configuration names": (
        {"config.json": {"sklearn": {"model": {"file": "skops/a b.pkl"}}}, "skops/a b.pkl": EVIL},
        "os.mkdir",
    ),
    "weights in upper case": ({"config.json": CONFIG, "PyTorch_Model.BIN": EVIL}, "os.mkdir"),
    "the library of an adapter": (
        {"config.json": CONFIG, "adapter_config.json": {"auto_mapping": {"parent_library": "os"}}},
        "os",
    ),
    "the only file": ({"anything.xyz": EVIL}, "os.mkdir"),
    "a file of many": ({"a/b/c": EVIL, "readme.md": b"x"}, "os.mkdir"),
    "a model among several": (
        {"one/config.json": CONFIG, "two/config.json": CONFIG, "two/pytorch_model.bin": EVIL},
        "os.mkdir",
    ),
    "an ONNX file in upper case": ({"M.ONNX": b""}, "my.Custom"),
}


@pytest.mark.parametrize("case", REACHED)
def test_what_loading_opens_is_unsafe(case: str, tmp_path: Path) -> None:
    files, name = REACHED[case]
    path = folder(tmp_path / "model", files)
    if "ONNX" in case:
        (path / "M.ONNX").write_bytes(custom_operator())
    verdict, tables, _ = told(path)
    assert verdict == "unsafe"
    assert name in tables["Code it would run"]
    with pytest.raises(UnsafeArtifact):
        refuse_code(path)


def custom_operator() -> bytes:
    helper = pytest.importorskip("onnx").helper
    node = helper.make_node("Custom", ["x"], ["y"], domain="my")
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=imports)
    return bytes(model.SerializeToString())


MODEL: Files = {
    "config.json": CONFIG,
    "model.safetensors": b"\0" * 8,
    "preprocessor_config.json": {"size": 8},
}
#: What only lies in the folder of a model: (file, content, a name that is reported).
NOT_REACHED: dict[str, tuple[str, bytes | dict[str, Any], str]] = {
    "arguments of a trainer": ("training_args.bin", EVIL, "os.mkdir"),
    "state of an optimizer": ("optimizer.pt", EVIL, "os.mkdir"),
    "random state": ("rng_state.pth", EVIL, "os.mkdir"),
    "earlier weights": ("checkpoint-500/pytorch_model.bin", EVIL, "os.mkdir"),
    "a script": ("convert_to_onnx.py", b"import os", "convert_to_onnx.py"),
    "a script in a folder": ("tools/run.py", b"import os", "run.py"),
    "bytecode": ("__pycache__/a.cpython-311.pyc", bytecode(Path("nowhere")), "a.cpython-311.pyc"),
    "somebody's pickle": ("scaler.joblib", EVIL, "os.mkdir"),
    "a hidden file": (".cache/x", EVIL, "os.mkdir"),
    "a file of git": (".git/lfs/objects/ab", EVIL, "os.mkdir"),
    "a packed pickle": ("data.pkl.gz", gzip.compress(EVIL), "os.mkdir"),
    "settings of Hydra": ("conf/train.yaml", b"net:\n  _target_: os.system\n", "os.system"),
    "settings of Hydra in JSON": ("conf/train.json", {"net": {"_target_": "os.system"}}, "os.system"),
    "another model": ("model.onnx.bak", EVIL, "os.mkdir"),
    "a library": ("libop.so", elf(Path()), "libop.so"),
}


@pytest.mark.parametrize("case", NOT_REACHED)
def test_what_loading_does_not_open_is_told_and_is_no_alarm(case: str, tmp_path: Path) -> None:
    file, content, name = NOT_REACHED[case]
    path = folder(tmp_path / "model", MODEL | {file: content})
    verdict, tables, _ = told(path)
    assert (verdict, tables) == ("nothing_found", {NOT_LOADED: {name}})
    conclusion = conclude(examine(path))
    assert conclusion["score"] == 0.0
    assert conclusion["summary"].startswith(("Do not open", "Loading does not import"))
    assert file in conclusion["summary"]
    refuse_code(path)
    assert told(path, strict_files=True)[:2] == ("unsafe", {"Code it would run": {name}})


def test_a_folder_that_is_no_model_has_no_say_in_what_its_model_is(tmp_path: Path) -> None:
    """Without a configuration any file may be the model, but neither scripts nor what trainers leave."""
    path = folder(tmp_path / "model", {"best.ckpt": b"I1\n.", "training_args.bin": EVIL, "train.py": b""})
    assert told(path)[0] == "nothing_found"
    folder(path, {"last.ckpt": EVIL})
    assert told(path)[0] == "unsafe"


def test_settings_of_hydra_alone_are_what_they_are_for(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.json"):
        (tmp_path / name).write_text('{"_target_": "os.system"}')
        assert told(tmp_path / name)[:2] == ("unsafe", {"Code it would run": {"os.system"}})
    (tmp_path / "b.yaml").write_text('"\\x5ftarget_": os.system')
    assert told(tmp_path / "b.yaml")[0] == "unsafe"


def test_nothing_that_was_found_is_lost_in_many_files(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:03}.pkl").write_bytes(EVIL)
    conclusion = conclude(examine(tmp_path))
    assert conclusion["score"] == 300
    assert conclusion["evidence"][0].title == "Code it would run (the first 200 of 300)"


# --- links -------------------------------------------------------------------------------------------------


def test_a_folder_behind_a_link_is_looked_into(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", {"inside/evil.bin": EVIL})
    (path / "a link").symlink_to("inside", target_is_directory=True)
    (path / "inside/round").symlink_to("..", target_is_directory=True)
    assert told(path) == ("unsafe", {"Code it would run": {"os.mkdir"}}, set())
    index = {"weight_map": {"w": "a link/evil.bin"}, "metadata": {}}
    folder(path, {"config.json": CONFIG, "model.safetensors.index.json": index})
    assert told(path)[0] == "unsafe"


def test_a_name_that_loading_opens_counts_wherever_it_leads(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", {"config.json": CONFIG, "a/kept": EVIL})
    assert told(path)[0] == "nothing_found"
    (path / "pytorch_model.bin").symlink_to("a/kept")
    assert told(path)[0] == "unsafe"


def test_links_out_of_the_folder_are_not_opened(tmp_path: Path) -> None:
    outside = folder(tmp_path / "outside", {"evil.bin": EVIL})
    path = folder(tmp_path / "model", {"config.json": CONFIG, "model.safetensors": b""})
    (path / "data").symlink_to(outside, target_is_directory=True)
    (path / "notes").symlink_to("/etc/hostname")
    assert told(path) == ("nothing_found", {}, {"data", "notes"})
    refuse_code(path)
    (path / "pytorch_model.bin").symlink_to(outside / "evil.bin")
    assert told(path) == ("could_not_tell", {}, {"data", "notes", "pytorch_model.bin"})
    with pytest.raises(
        InputError, match=r"pytorch_model.bin: is a link out of the folder and was not opened"
    ):
        refuse_code(path)
    index = {"weight_map": {"w": "data/evil.bin"}, "metadata": {}}
    folder(path, {"pytorch_model.bin.index.json": index})
    assert "data/evil.bin" in told(path)[1]["Code it would run"]


def test_a_link_to_a_folder_outside_of_a_folder_without_a_model_is_a_doubt(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", {"a.bin": b""})
    (path / "data").symlink_to("/", target_is_directory=True)
    assert told(path) == ("could_not_tell", {}, {"data"})


def test_the_cache_of_the_hub_keeps_its_files_elsewhere(tmp_path: Path) -> None:
    store = folder(tmp_path / "models--a--b/blobs", {"01": CONFIG, "02": b"\0" * 8, "03": EVIL})
    path = tmp_path / "models--a--b/snapshots/abc"
    path.mkdir(parents=True)
    for name, blob in {"config.json": "01", "model.safetensors": "02"}.items():
        (path / name).symlink_to(f"../../blobs/{blob}")
    assert told(path) == ("nothing_found", {}, set())
    (path / "pytorch_model.bin").symlink_to("../../blobs/03")
    assert told(path)[0] == "unsafe"
    (path / "pytorch_model.bin").unlink()
    (path / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere")
    assert told(path)[0] == "could_not_tell"
    assert store.is_dir()


def test_an_adapter_that_names_a_model_elsewhere_is_a_doubt(tmp_path: Path) -> None:
    adapter = {"base_model_name_or_path": "someone/model"}
    path = folder(tmp_path / "model", MODEL | {"adapter_config.json": adapter})
    assert told(path) == ("could_not_tell", {}, {"adapter_config.json"})
    folder(path, {"adapter_config.json": {"base_model_name_or_path": "base"}, "base/config.json": CONFIG})
    assert told(path)[0] == "nothing_found"


# --- what is no regular file, and floods -------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def connection(path: Path) -> None:
    short = Path("/tmp") / f"doorward-{os.getpid()}.sock"  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(short))
    shutil.move(short, path)


@pytest.mark.parametrize("make", [pipe, connection, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_never_opened(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Opening a pipe would wait for ever, as would reading the device."""
    path = folder(tmp_path / "model", {"config.json": CONFIG, "model.safetensors": b""})
    make(path / "unused")
    assert told(path) == ("nothing_found", {}, {"unused"})
    make(path / "pytorch_model.bin")
    assert told(path) == ("could_not_tell", {}, {"unused", "pytorch_model.bin"})
    with pytest.raises(InputError, match=r"was not opened; put a regular file in its place"):
        refuse_code(path)


def test_a_pipe_as_the_model_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(CouldNotTell, match="it is a pipe, and a regular file is needed"):
        examine(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="it is a pipe, and a regular file is needed"):
        open_classifier(tmp_path / "model.onnx")


def test_a_configuration_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder(tmp_path, {"outside.json": {"format": "doorward", "signature": {"public": "x", "target": 1}}})
    path = folder(tmp_path / "model", {"model.safetensors": safetensors.torch.save({"a": torch.zeros(1)})})
    (path / "config.json").symlink_to("../outside.json")
    with pytest.raises(InputError, match=r"config.json: is a link out of the folder and was not opened"):
        open_classifier(path)


def test_time_that_is_over_is_a_doubt_about_all_that_is_left(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", {f"{i}.pkl": EVIL for i in range(5)})
    examination = examine(path, deadline=Deadline(1.0, started=0.0))
    assert (examination.files, examination.references) == (0, [])
    assert "4 further files were left out" in str(examination.doubts[0])
    assert conclude(examination)["verdict"] == "could_not_tell"


def test_a_limit_that_is_reached_is_a_doubt_about_all_that_is_left(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", {"a.bin": b"N0" * 99 + b"N.", "b.bin": EVIL})
    examination = examine(path, Limits(opcodes=100))
    (doubt,) = examination.doubts
    assert str(doubt) == "a.bin: too many pickle instructions to check; 1 further files were left out"
    assert conclude(examination)["verdict"] == "could_not_tell"
    assert conclude(examine(path, Limits(members=1)))["verdict"] == "could_not_tell"


def test_folders_that_link_to_each_other_are_left_in_time(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / str(i)).mkdir()
    for i in range(12):
        for j in range(12):
            (tmp_path / str(i) / str(j)).symlink_to(tmp_path / str(j), target_is_directory=True)
    examination = examine(tmp_path, Limits(members=2000))
    assert any("more than 2000 files" in str(one) for one in examination.doubts)


def test_names_that_are_no_text_can_be_written_down(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.pkl")
    (tmp_path / name).write_bytes(
        text(tmp_path / "x").replace(b"mkdir", "mk\udcffdir".encode("utf-8", "surrogateescape"))
    )
    conclusion = conclude(examine(tmp_path))
    assert conclusion["verdict"] == "unsafe"
    written = json.dumps([one.model_dump() for one in conclusion["evidence"]], ensure_ascii=False)
    assert "caf\\\\udce9.pkl" in written
    assert written.encode("utf-8")


@pytest.mark.parametrize(
    "head", ["7z\xbc\xaf\x27\x1c", "\x28\xb5\x2f\xfd", "Rar!\x1a\x07\0", "\x04\x22\x4d\x18", "GGUF"]
)
def test_formats_that_are_not_read_are_named(head: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", MODEL | {"extra.bin": head.encode("latin-1") + bytes(50)})
    assert told(path) == ("nothing_found", {}, {"extra.bin"})
    assert "not checked to the end: 1" in conclude(examine(path))["summary"]
    assert told(path, strict_files=True)[0] == "could_not_tell"
    assert told(path / "extra.bin")[0] == "could_not_tell"


def test_all_hostile_files_are_told_when_they_lie_next_to_a_model(tmp_path: Path) -> None:
    """Each of them, whatever its kind, is either named as what not to load or as not checked."""
    path = folder(tmp_path / "model", MODEL)
    for i, (_, hostile) in enumerate(HOSTILE.items()):
        folder(path, {f"extra{i}/{hostile.file}": hostile.make(tmp_path / "canary")})
    examination = examine(path)
    told_of = {one.file.split("/")[0] for one in [*examination.references, *examination.doubts]}
    assert told_of == {f"extra{i}" for i in range(len(HOSTILE))}
    assert conclude(examination)["verdict"] == "nothing_found"
    assert not (tmp_path / "canary").exists()
