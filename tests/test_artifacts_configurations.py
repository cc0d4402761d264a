"""Code that configurations ask for: Keras, transformers, pipelines, YAML, in every spelling."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from doorward.artifacts import examine
from doorward.artifacts.configurations import yaml_references


def names(path: Path) -> set[str]:
    examination = examine(path)
    assert examination.doubts == []
    return {one.name for one in examination.references}


def keras_file(path: Path, config: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", config)
    return path


def layer(name: str, module: str | None = "keras.layers", config: Any = None, **more: Any) -> dict[str, Any]:
    stated = {"class_name": name, "config": config or {}, **more}
    return {"module": module, **stated} if module else stated


#: (an object of a Keras configuration, what would be imported or run).
KERAS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a layer": (layer("Dense"), set()),
    "a layer of an early version": (layer("Dense", None), set()),
    "an optimizer": (layer("Adam", "keras.optimizers"), set()),
    "a network in a network": (layer("Functional", "keras.src.models.functional"), set()),
    "a layer of TensorFlow's": (layer("Dense", "tensorflow.keras.layers"), set()),
    "a registered layer": (layer("ResizingLayer", "keras_hub.src.layers.resizing"), set()),
    "a function": (layer("function", "builtins", "relu"), set()),
    "Lambda": (layer("Lambda"), {"Lambda"}),
    "Lambda without a module": (layer("Lambda", None), {"Lambda"}),
    "Lambda by its whole name": (layer("keras.layers.Lambda", None), {"Lambda"}),
    "Lambda of a package": (layer("Custom>Lambda"), {"Lambda"}),
    "__lambda__": (layer("__lambda__", None, {"value": "4wEAAA=="}), {"__lambda__"}),
    "a pickled torch module": (
        layer("TorchModuleWrapper", "keras.src.utils.torch_utils", {"module": "gASV"}),
        {"TorchModuleWrapper"},
    ),
    "a saved graph": (layer("TFSMLayer", "keras.layers", {"filepath": "x"}), {"TFSMLayer"}),
    "a function that downloads": (layer("function", "keras.utils", "get_file"), {"keras.utils.function"}),
    "a function that changes settings": (
        layer("function", "keras.config", "enable_unsafe_deserialization"),
        {"keras.config.function"},
    ),
    "a function built into Python": (layer("function", "builtins", "exec"), {"builtins.exec"}),
    "a class built into Python": (layer("compile", "builtins"), {"builtins.compile"}),
    "a module of Python's": (layer("system", "os"), {"os.system"}),
    "TensorFlow itself": (layer("load_library", "tensorflow"), {"tensorflow.load_library"}),
    "deep inside": (layer("Sequential", config={"layers": [layer("Dense"), layer("Lambda")]}), {"Lambda"}),
}


@pytest.mark.parametrize("case", KERAS)
def test_an_object_of_keras_is_judged_by_what_it_imports(case: str, tmp_path: Path) -> None:
    value, expected = KERAS[case]
    assert names(keras_file(tmp_path / "a.keras", json.dumps(value))) == expected
    (tmp_path / "anything.txt").write_text(json.dumps(value, indent=3))
    assert names(tmp_path / "anything.txt") == expected


#: Ways to write the same JSON.
SPELLINGS = [
    '{"class_name":"Lambda"}',
    '{"class_name"  :\n\t"Lambda"}',
    r'{"class_name": "\u004cambda"}',
    r'{"class_name": "L\u0061mbd\u0061"}',
    r'{"\u0063lass_name": "Lambda"}',
    r'{"cl\u0061ss_n\u0061me" : "keras.l\u0061yers.Lambda"}',
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_lambda_is_seen_however_it_is_written(spelling: str, kind: str, tmp_path: Path) -> None:
    assert json.loads(spelling)["class_name"].endswith("Lambda")
    if kind == "keras":
        path = keras_file(tmp_path / "a.keras", spelling)
    else:
        path = tmp_path / "a.h5"
        # across the border of two reads
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes((1 << 20) - 20) + spelling.encode() + bytes(99))
    assert names(path) == {"Lambda"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"module": "os", "class_name": "system"}', {"os"}),
        ('{"module": "keras.utils", "class_name": "function", "config": "get_file"}', {"keras.utils"}),
        ('{"module": "builtins", "class_name": "function", "config": "exec"}', {"builtins.exec"}),
        ('{"module": "builtins", "class_name": "function", "config": "relu"}', set()),
        ('{"module": "keras.src.models.sequential", "class_name": "Sequential"}', set()),
    ],
)
def test_hdf5_is_searched_for_what_keras_would_import(text: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50) + text.encode() + b"\0")
    assert names(tmp_path / "a.hdf5") == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_attn_implementation": "sdpa"}, set()),
        ({"_attn_implementation": "flash_attention_2"}, set()),
        ({"attn_implementation": {"": "sdpa", "vision_config": "eager"}}, set()),
        ({"attn_implementation": "a/b"}, {"a/b"}),
        ({"_attn_implementation": "paged|a/b@main:run"}, {"paged|a/b@main:run"}),
        ({"attn_implementation": {"text_config": "a/b"}}, {"a/b"}),
        ({"vision_config": {"layers": [{"_attn_implementation": "a/b"}]}}, {"a/b"}),
        ({"experts_implementation": "a/b"}, {"a/b"}),
        ({"_name_or_path": "a/b"}, set()),
        ({"auto_map": {}}, set()),
        ({"auto_map": {"AutoModel": "net.Net"}}, {"net.Net"}),
        ({"auto_map": {"AutoModel": "someone/else--net.Net"}}, {"someone/else--net.Net"}),
        ({"custom_pipelines": {"x": {"impl": "run.Pipe"}}}, {"run.Pipe"}),
        ({"trust_remote_code": False}, set()),
        ({"trust_remote_code": True}, {"trust_remote_code"}),
    ],
)
def test_what_a_configuration_of_transformers_asks_for(
    config: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert names(tmp_path / "config.json") == expected


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": ""}], set()),
        ("modules.json", [{"type": "os.system", "path": ""}], {"os.system"}),
        (
            "model_index.json",
            {"_class_name": "X", "unet": ["diffusers", "UNet"], "safety": [None, None]},
            set(),
        ),
        ("model_index.json", {"unet": ["subprocess", "Popen"]}, {"subprocess"}),
    ],
)
def test_what_a_pipeline_imports(file: str, content: Any, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert names(tmp_path / file) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [ls]", {"os.system"}),
        ("a: !!python/object/new:os.system\n  args: [ls]", {"os.system"}),
        ("a: !!python/object:os.x {}", {"os.x"}),
        ("a: !!python/name:os.system", {"os.system"}),
        ("a: !!python/module:os", {"os"}),
        ("- !!python/object/apply:os.system [ls]", {"os.system"}),
        ("[!!python/object/apply:os.system [ls]]", {"os.system"}),
        ("!!python/object/apply:os.system [ls]", {"os.system"}),
        ("a: !<tag:yaml.org,2002:python/object/apply:os.system> [ls]", {"os.system"}),
        ("%TAG !x! tag:yaml.org,2002:python/\n---\na: !x!object/apply:os.system [ls]", {"os.system"}),
        ("%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system [ls]", {"os.system"}),
        ("a: !!py%74hon/object/apply:os.system [ls]", {"os.system"}),
        ("a: !!python/tuple [1, 2]\nb: !!python/str x\nc: !!python/none", set()),
        ("# !!python/object/apply:os.system", set()),
        ("a: 1\nb: text with ! in it", set()),
        ("net:\n  _target_: torch.nn.Linear", {"torch.nn.Linear"}),
        ("'_target_' : 'os.system'", {"os.system"}),
        ('"\\x5ftarget_": os.system', {"os.system"}),
        ('"_tar\\\n  get_": os.system', {"os.system"}),
        ("? _target_\n: os.system", {"os.system"}),
        ("target: os.system", set()),
    ],
)
def test_yaml_is_read_as_its_loaders_read_it(text: str, expected: set[str]) -> None:
    assert {one.name for one in yaml_references(text.encode(), "a.yaml")} == expected
    assert {one.name for one in yaml_references(text.encode("utf-16"), "a.yaml")} == expected


def test_mlflow_imports_the_loader_that_a_model_names() -> None:
    text = b"flavors:\n  python_function:\n    loader_module: %s\n"
    assert [one.name for one in yaml_references(text % b"my.loader", "m/MLmodel")] == ["my.loader"]
    assert list(yaml_references(text % b"mlflow.sklearn", "m/MLmodel")) == []
