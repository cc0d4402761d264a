"""Which code makes a result, told by its content: what is only for readers does not count.

That is comments, docstrings, spacing, a method's title, limits and source, and descriptions of its settings.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sys
import tokenize
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: The package's own files.
PACKAGE = Path(__file__).parent.parent

#: Packages whose code makes a detector's score, besides the detector's own file. Of the others, a change
#: leaves scores as they are or is an error that their own tests find.
SCORING = (
    "doorward.detectors.model.",
    "doorward.detectors.training_data.",
    "doorward.inversion.",
    "doorward.stats.",
    "doorward.training.augment",
)


def source_hash(files: Iterable[Path]) -> str:
    """Return the start of the sha256 of some Python files, without what is only for readers."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(_bare(file).encode() + b"\0")
    return digest.hexdigest()[:16]


@cache
def score_code(module: str) -> str:
    """Return the hash of the code that makes a detector's score: its module and what that uses of `SCORING`.

    Args:
        module: dotted name; a module that was loaded from a file by its path is found as well.
    """
    return source_hash(reached([module], keep=lambda name: name == module or name.startswith(SCORING)))


def reached(modules: Iterable[str], *, keep: Callable[[str], bool]) -> list[Path]:
    """Return the files of modules and of all that they import, directly or not, sorted by module name.

    Args:
        keep: whether a module counts; what only a module that does not count imports, does not either.
    """
    todo, files = list(modules), dict[str, Path]()
    while todo:
        name = todo.pop()
        file = file_of(name) if keep(name) and name not in files else None
        if file is not None:
            files[name] = file
            todo += imports(file)
    return [files[name] for name in sorted(files)]


def imports(file: Path) -> list[str]:
    """Return the names of the package's own that a file imports, modules and what is in them alike."""
    found = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.startswith("doorward.")]


def file_of(module: str) -> Path | None:
    """Return a module's file, None where there is none; the package's own modules are not imported."""
    if module.split(".")[0] == "doorward":
        base = PACKAGE.joinpath(*module.split(".")[1:])
        return next(
            (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None
        )
    loaded = getattr(sys.modules.get(module), "__file__", None)
    spec = None if loaded else find_spec(module)
    named = loaded or (spec.origin if spec else None)
    return Path(named) if named and Path(named).is_file() else None


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


#: Attributes of a method that are for readers alone.
_WORDS = frozenset({"title", "limits", "source"})


def _bare(file: Path) -> str:
    """Return source text without what is for readers alone and white space, as every Python version does."""
    text = file.read_text(encoding="utf-8")
    lines = [list(line) for line in text.splitlines(keepends=True)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1][column:] = "\n"
    for node in ast.walk(_tree(file)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [[]] * ((first.end_lineno or 0) - first.lineno + 1)
        for part in _for_readers(node):
            row, column = _remove(lines, text.splitlines(), part)
            if isinstance(part, ast.keyword):
                _remove_comma(lines, row, column)
    return "".join("".join("".join(line).split()) for line in lines)


def _for_readers(node: ast.AST) -> list[ast.stmt | ast.keyword]:
    """Return what in a node is for readers alone: a class's title and the like, or a field's description."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
        return [word for word in node.keywords if word.arg == "description"]
    if not isinstance(node, ast.ClassDef):
        return []
    found: list[ast.stmt | ast.keyword] = []
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) and statement.value else targets
        if targets and all(isinstance(one, ast.Name) and one.id in _WORDS for one in targets):
            found.append(statement)
    return found


def _remove(lines: list[list[str]], text: list[str], part: ast.stmt | ast.keyword) -> tuple[int, int]:
    """Remove a part of a tree from the characters of its lines; return the line and column where it began."""

    def column(row: int, n_bytes: int) -> int:
        return len(text[row].encode()[:n_bytes].decode())

    first, last = part.lineno - 1, (part.end_lineno or part.lineno) - 1
    begin, end = column(first, part.col_offset), column(last, part.end_col_offset or 0)
    for row in range(first, last + 1):
        line = lines[row]
        for i in range(begin if row == first else 0, min(end if row == last else len(line), len(line))):
            line[i] = ""
    return first, begin


def _remove_comma(lines: list[list[str]], row: int, column: int) -> None:
    """Remove the comma before a place, if nothing but white space lies between."""
    while row >= 0:
        for i in range(min(column, len(lines[row])) - 1, -1, -1):
            if lines[row][i] == ",":
                lines[row][i] = ""
            if lines[row][i].strip() or not lines[row][i]:
                return
        row -= 1
        column = len(lines[row])
