"""The house keeps its order: who may import whom, who may print, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from doorward.models import InputSpec

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"

#: The rooms from the cellar up, as docs/design.md draws them; each imports from its own floor or from below.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"_version", "core"}),
    frozenset({"stats", "methods", "artifacts", "data", "reports", "bundled"}),
    frozenset({"models"}),
    frozenset({"inversion", "training", "triggers"}),
    frozenset({"attacks", "detectors", "repairs"}),
    frozenset({"scan", "repair", "guard", "testing"}),
    frozenset({"bench", "fleet"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
#: Names used in annotations alone may come from above; each with its reason.
ONLY_FOR_TYPES: dict[tuple[str, str], str] = {}
#: Rooms that must not know each other, wherever they stand.
STRANGERS = {
    "attacks": {"detectors", "repairs"},
    "detectors": {"attacks", "repairs", "bench"},
    "repairs": {"attacks", "detectors", "bench"},
    "scan": {"attacks", "bench"},
    "repair": {"attacks", "bench"},
    "guard": {"attacks", "bench"},
    "fleet": {"attacks", "bench"},
}


@dataclass(frozen=True)
class Import:
    """One import of one of our modules by another."""

    importer: str
    imported: str
    for_types: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_of(file: Path) -> str:
    """Return the dotted name of a source file."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    """Return what a source file says, read once for all tests."""
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    """Return the room a module is in ("" for the package itself)."""
    return [*module.split("."), ""][1]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(module: str, tree: ast.Module, known: frozenset[str]) -> Iterator[Import]:
    """Yield each import of one of our modules, at whatever depth it stands."""
    for_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        for name in dict.fromkeys(names):
            if name.split(".")[0] == "doorward":
                yield Import(module, name, id(node) in for_types, node.lineno)


@cache
def all_imports() -> tuple[Import, ...]:
    known = frozenset(FILES)
    return tuple(found for module in FILES for found in imports_of(module, tree_of(module), known))


def floor_of(room: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"the room {room!r} is not in the plan of the house: add it to FLOORS and docs/design.md"
    return floors[0]


def upward(imports: Iterable[Import]) -> list[str]:
    """Return the imports that point upward or into the package itself."""
    wrong = []
    for found in imports:
        importer, imported = room_of(found.importer), room_of(found.imported)
        if not importer or importer == imported:
            continue
        if not imported or (
            floor_of(imported) > floor_of(importer)
            and not (found.for_types and (importer, imported) in ONLY_FOR_TYPES)
        ):
            wrong.append(str(found))
    return wrong


def circle(imports: Iterable[Import]) -> tuple[str, ...]:
    """Return one circle of modules that import each other while the program runs, or nothing."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        if not found.for_types:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return tuple(error.args[1])
    return ()


def test_nothing_imports_upward() -> None:
    assert upward(all_imports()) == []


def test_there_are_no_circles() -> None:
    assert circle(all_imports()) == ()


def test_rooms_on_one_floor_have_an_order() -> None:
    edges = [
        Import(room_of(found.importer), room_of(found.imported), found.for_types, found.line)
        for found in all_imports()
        if room_of(found.importer)
        and room_of(found.imported)
        and room_of(found.importer) != room_of(found.imported)
    ]
    assert circle(edges) == ()


def test_strangers_stay_strangers() -> None:
    met = [
        str(found)
        for found in all_imports()
        if room_of(found.imported) in STRANGERS.get(room_of(found.importer), set())
    ]
    assert met == []


def test_every_exception_for_types_is_used() -> None:
    used = {(room_of(f.importer), room_of(f.imported)) for f in all_imports() if f.for_types}
    assert set(ONLY_FOR_TYPES) <= used, "take out the rows that nothing needs"


@pytest.mark.parametrize(
    ("importer", "code", "expected"),
    [
        ("doorward.core.records", "from doorward.stats.metrics import rate", 1),
        ("doorward.core.errors", "def f():\n    import doorward.models.spec", 1),
        ("doorward.core.records", "if TYPE_CHECKING:\n    from doorward.data import Samples", 1),
        ("doorward.data.samples", "if TYPE_CHECKING:\n    from doorward.models import Classifier", 1),
        ("doorward.models.encode.image", "from doorward.data import Samples", 0),
        ("doorward.methods.registry", "import_module('doorward.models')", 1),
        ("doorward.scan.pipeline", "from doorward.core import records, errors", 0),
        ("doorward.models.spec", "from doorward.scan import pipeline", 1),
        ("doorward.scan.pipeline", "from doorward import open_samples", 1),
        ("doorward.scan.pipeline", "from doorward._version import __version__", 0),
        ("doorward.detectors.base", "from doorward.methods.base import Method", 0),
    ],
)
def test_the_check_sees_every_form_of_import(importer: str, code: str, expected: int) -> None:
    known = frozenset(FILES) | {"doorward.scan.pipeline"}
    found = list(imports_of(importer, ast.parse(code), known))
    assert found
    assert len(upward(found)) == expected


def test_the_check_sees_circles() -> None:
    there, back = Import("a", "b", False, 1), Import("b", "a", False, 1)
    assert set(circle([there, back])) == {"a", "b"}
    assert circle([there]) == ()
    assert circle([there, Import("b", "a", True, 1)]) == ()


#: Modules outside the command line that print: a report in text, and a tool for developers.
PRINTING = {"doorward.reports.text", "doorward.bench.fingerprints"}


def test_only_the_command_line_and_the_text_report_print() -> None:
    printing = [
        f"{module}:{node.lineno}"
        for module in FILES
        if room_of(module) != "cli" and module not in PRINTING
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "rich.print", "sys.stdout.write", "Console")
    ]
    assert printing == []


HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "onnx",
    "onnxruntime",
    "sklearn",
    "scipy",
    "matplotlib",
    "numpy",
)


def modules_after(code: str) -> set[str]:
    """Return the heavy libraries that a fresh interpreter has loaded after some code."""
    script = (
        f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_the_check_sees_a_heavy_import() -> None:
    assert modules_after("import numpy") == {"numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "doorward",
        "doorward.core.errors",
        "doorward.core.records",
        "doorward.artifacts",
        "doorward.artifacts.digest",
        "doorward.artifacts.findings",
        "doorward.detectors.artifact.unsafe_code",
        "doorward.methods.registry",
        "doorward.methods.base",
    ],
)
def test_import_pulls_in_nothing_heavy(module: str) -> None:
    assert modules_after(f"import {module}") == set()


def test_listing_methods_pulls_in_nothing_heavy() -> None:
    assert (
        modules_after(
            "from doorward.methods.registry import modules\nassert 'neural-cleanse' in modules('detector')"
        )
        == set()
    )


HELP = """
import sys
from doorward.cli.app import main
sys.argv = ["doorward", *{words!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["scan", "--help"]])
def test_help_pulls_in_nothing_heavy(words: list[str]) -> None:
    assert modules_after(HELP.format(words=words)) == set()


# A path that exists on one machine only: a home, a root account or a work folder.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users|tmp/pip)/[\w.-]+|[A-Z]:\\\\?Users")


def tracked_files() -> list[Path]:
    """Return the repository's text files."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no git checkout")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()}"
        for file in tracked_files()
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        for match in MACHINE_PATH.finditer(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "hit"),
    [
        ("see /" + "home/ann/model.onnx", True),
        ("x=/" + "work/main", True),
        ("docs/home/page", False),
        ("~/" + "work/x", False),
    ],
)
def test_the_path_check_can_fail(line: str, hit: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == hit


def updated_fields(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the names that calls of `model_copy` write out for their update, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "model_copy":
            for update in (word.value for word in node.keywords if word.arg == "update"):
                for key in update.keys if isinstance(update, ast.Dict) else ():
                    if isinstance(key, ast.Constant):
                        yield node.lineno, str(key.value)


def test_copies_of_records_update_fields_that_exist() -> None:
    """Of the record itself when a test runs the line (see `copies.py`), and here of some record in each."""
    for module in FILES:
        if not module.endswith("__main__"):
            importlib.import_module(module)
    todo, fields = [BaseModel], set()
    while todo:
        record = todo.pop()
        todo += record.__subclasses__()
        fields |= set(record.model_fields)
    found = {(module, line, name) for module in FILES for line, name in updated_fields(tree_of(module))}
    assert len(found) > 60
    assert not {one for one in found if one[2] not in fields}


def test_a_copy_that_updates_no_field_is_noticed() -> None:
    spec = InputSpec(channels=1, height=2, width=3)
    assert spec.model_copy(update={"height": 4}).height == 4
    with pytest.raises(AssertionError, match="InputSpec has no field heigth"):
        spec.model_copy(update={"heigth": 4})
    (found,) = updated_fields(ast.parse("a.model_copy(update={'heigth': 4})"))
    assert found == (1, "heigth")
