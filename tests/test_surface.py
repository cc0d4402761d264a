"""What a user can see is documented, up to date, and works as written."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import typer
from PIL import Image

import docs_pages
import doorward
import file_scanners
from documents import ROOT, Block, marked_blocks, run_block
from doorward.methods import registry
from doorward.methods.base import Method
from doorward.methods.registry import MethodKind

SOURCE = ROOT / "src"
FILES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


# Names and docstrings (that every public name has one is ruff's to say: D1)


def own_imports(file: Path) -> set[str]:
    """Return the names of ours that a file imports at its top."""
    return {
        alias.asname or alias.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("doorward")
        for alias in node.names
    }


#: The package itself loads what it offers on demand, and has a test of its own.
FRONTS = [
    name
    for name, file in FILES.items()
    if name != "doorward" and file.name == "__init__.py" and own_imports(file)
]


@pytest.mark.parametrize("name", FRONTS)
def test_a_front_offers_what_it_imports_no_more_and_no_less(name: str) -> None:
    listed = importlib.import_module(name).__all__
    assert sorted(listed) == sorted(own_imports(FILES[name]))


def test_the_package_offers_what_it_lists_and_loads_each_from_its_home() -> None:
    assert dir(doorward) == sorted(doorward.__all__)
    homes = vars(doorward)["_HOME"]
    assert {*homes, "__version__"} == set(doorward.__all__)
    typed = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(doorward)))
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert typed == set(homes), "what type checkers see is what is loaded"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = doorward.nonsense


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if ">>>" in file.read_text()])
def test_doctests(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.attempted
    assert not results.failed


# The command line


def undocumented(command: Any, words: tuple[str, ...] = ("doorward",)) -> list[str]:
    """Return the commands, arguments and options below a command that have no help."""
    own = [] if command.help else [" ".join(words)]
    own += [" ".join([*words, param.name]) for param in command.params if not getattr(param, "help", None)]
    inner = getattr(command, "commands", {})
    return own + [missing for name, each in inner.items() for missing in undocumented(each, (*words, name))]


def test_every_command_and_option_has_help() -> None:
    from doorward.cli.app import app

    assert undocumented(typer.main.get_command(app)) == []


def test_the_help_check_can_fail() -> None:
    app = typer.Typer(help="Have two commands.")

    @app.command()
    def first(documented: Annotated[int, typer.Option(help="How many.")] = 1, bare: int = 2) -> None:
        """Do one thing."""

    @app.command()
    def second(word: str) -> None: ...

    assert undocumented(typer.main.get_command(app)) == [
        "doorward first bare",
        "doorward second",
        "doorward second word",
    ]


# Generated pages and links


def test_generated_pages_are_up_to_date() -> None:
    assert docs_pages.stale() == [], "run `make docs`"


def test_stale_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.arange(200, dtype=np.uint8).reshape(10, 20)
    monkeypatch.setattr(docs_pages, "pages", lambda: {"cli.md": "a\n", "methods/one.md": "b\n"})
    monkeypatch.setattr(docs_pages, "pictures", lambda: {"methods/one.png": image})
    docs_pages.write(tmp_path)
    assert docs_pages.stale(tmp_path) == []
    Image.fromarray(image + (image % 20 == 7)).save(tmp_path / "methods/one.png")
    assert docs_pages.stale(tmp_path) == [], "roundings of another machine"
    (tmp_path / "cli.md").write_text("old\n")
    (tmp_path / "methods/gone.md").write_text("left over\n")
    (tmp_path / "methods/gone.png").write_bytes(b"left over")
    (tmp_path / "methods/one.md").unlink()
    Image.fromarray(image + 1).save(tmp_path / "methods/one.png")
    wrong = ["cli.md", "methods/gone.md", "methods/gone.png", "methods/one.md", "methods/one.png"]
    assert docs_pages.stale(tmp_path) == wrong
    docs_pages.write(tmp_path)
    assert docs_pages.stale(tmp_path) == []
    Image.fromarray(image[:5]).save(tmp_path / "methods/one.png")
    assert docs_pages.stale(tmp_path) == ["methods/one.png"]


def test_attributes_of_a_docstring_are_read() -> None:
    class Example:
        """Do something.

        More of it.

        Attributes:
            alpha: how much, in
                [0, 1].
            height, width: in pixels.

        After.
        """

    text, fields = docs_pages.split_docstring(Example)
    assert text == "Do something.\n\nMore of it.\n\nAfter."
    assert fields == {"alpha": "How much, in [0, 1]", "height": "In pixels", "width": "In pixels"}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in docs_pages.KINDS for name in registry.own_modules(kind)]
)
def test_a_method_page_opens_with_what_when_and_what_not(kind: MethodKind, name: str) -> None:
    cls = registry.get(kind, name)
    first, more = docs_pages.opening(cls)
    what, when, misses = re.split(r"(?<=[.?!]) (?=[A-Z])", first)
    assert cls.__doc__.startswith(what)
    assert when.startswith("Use it ")
    assert misses == cls.limits
    assert f"`{name}`\n\n{first}\n\n" in docs_pages.method_page(kind, name)
    assert "Use it" not in more


def test_a_page_opens_without_a_second_sentence_where_none_is_written() -> None:
    class Example(Method):
        """Do one thing.

        More of it.
        """

        limits: ClassVar[str] = "It sees little."

    assert docs_pages.opening(Example) == ("Do one thing. It sees little.", "More of it.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(
        r"(?:src|srcset|href)=\"([^\"#]+)\"", text
    )
    lost = [
        target
        for target in targets
        if not target.startswith(("http://", "https://", "mailto:"))
        and not (document.parent / target).exists()
    ]
    assert lost == []


# Tables made from results


def test_file_scanners_were_asked_about_the_present_models() -> None:
    results = json.loads(file_scanners.RESULTS.read_text(encoding="utf-8"))
    assert results["weights"] == file_scanners.digests(), "run `make file-scanners` for the present models"


def test_the_table_of_file_scanners_is_what_was_measured() -> None:
    codes = {"modelscan": 2, "picklescan": 0, "modelaudit": 0, "doorward": 1}
    results = {
        "versions": {"modelscan": "0.8", "picklescan": "1.0", "modelaudit": "0.2", "doorward": "0.1"},
        "rows": [{"model": "clean", "format": ".pt2", "exit_codes": codes}],
    }
    made = file_scanners.table(results)
    assert made.splitlines() == [
        "| model | file | ModelScan 0.8 | picklescan 1.0 | modelaudit 0.2 | Doorward 0.1 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| clean | .pt2 | exit 2 (failed) | exit 0 (passes) | exit 0 (passes) | exit 1 (alarm) |",
    ]


# Documents that are tests: a block after <!-- test --> runs as written


# (those of the README run for test_cli_demo.py and others, which look at what they leave)
WITH_BLOCKS = [
    file for file in DOCUMENTS if file.name != "README.md" and "<!-- test" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("document", WITH_BLOCKS, ids=lambda file: file.name)
def test_marked_blocks_run_as_written(document: Path, tmp_path: Path) -> None:
    outcomes = [run_block(one, tmp_path) for one in marked_blocks(document.read_text(encoding="utf-8"))]
    assert outcomes, "run_block compares exit codes and outputs; there has to be one"
    assert all(outcomes)


EXAMPLE = """
<!-- test -->
```console
$ echo one; echo "two   three"
one
... three
$ echo \\
  more > file
```

```console
$ false
```
<!-- test: exit 3 -->

```python
import sys
from pathlib import Path
sys.exit(3 if Path("file").read_text() == "more\\n" else 1)
```
"""


def test_the_example_document_runs(tmp_path: Path) -> None:
    blocks = marked_blocks(EXAMPLE)
    assert [(block.language, block.exit_code) for block in blocks] == [("console", 0), ("python", 3)]
    for block in blocks:
        run_block(block, tmp_path)


@pytest.mark.parametrize(
    "code",
    ["$ false\n", "$ echo one\ntwo\n", "echo one\n", "$ exit 1\n$ true\n"],
    ids=["exit", "output", "empty", "early"],
)
def test_a_wrong_block_is_found(code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_block(Block("console", code, 0, 1), tmp_path)
