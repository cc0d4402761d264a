"""What a `torch.export` program would run beyond tensor operators, read from its JSON.

Loading such a program with torch evaluates more of it than pickles: symbolic sizes and guards are
expressions given to `eval`, names become Python source, and an operator's name may reach any function
below the `torch` module. Each of these is held against what torch itself writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from doorward.artifacts.examination import Reference
from doorward.artifacts.pickles import words

_OPERATOR = re.compile(
    r"torch\.ops\.[A-Za-z]\w*(\.[A-Za-z]\w*|\._[A-Za-z]\w*){1,2}"
    r"|torch\._?sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift)"
)
_TOUCHES_FILES = re.compile(r"torch\.ops\.aten\.(save|from_file)\b.*")
_NAME = re.compile(r"[\w.@]*")
_NAME_KEYS = words(
    "name as_name parameter_name buffer_name tensor_constant_name custom_obj_name user_input_name fqn"
)
_NAMED_TABLES = words(
    "tensor_values sym_int_values sym_bool_values sym_float_values custom_obj_values range_constraints"
)
_TOKEN = re.compile(r"\s+|'[\w.]*'|\d+(\.\d+)?(e[-+]?\d+)?|[A-Za-z_]\w*|[-+*/%(),<>=!\[\].&|~]")
_EXPRESSION_WORDS = words(
    """Symbol Integer Float Rational Add Mul Pow Mod Max Min FloorDiv CleanDiv CeilDiv ModularIndexing Where
    PythonMod CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal ToFloat IntTrueDiv
    FloatTrueDiv FloatPow PowByNatural Identity LShift RShift Equality Unequality StrictLessThan LessThan
    StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge And Or Not true false True False None oo int_oo positive
    negative nonnegative nonpositive integer real nonzero zero even odd precision finite"""
)
_GUARD_WORDS = words("L args kwargs size stride storage_offset and or not is in len math floor ceil")
_SYMBOL = re.compile(r"(s|u|z|zf|zuf)\d+")
#: Keys in a tree specification that make torch import a module by name.
_IMPORTING_KEYS = frozenset({"__enum__", "default_factory_module"})


def only_arithmetic(expression: str, *, guard: bool = False) -> bool:
    """Return whether an expression holds nothing but numbers, symbols and the functions that torch writes.

    >>> only_arithmetic("Symbol('s77', positive=True, integer=True)"), only_arithmetic("__import__('os')")
    (True, False)
    """
    position, previous = 0, ""
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            return False
        token = match.group()
        if token.isidentifier():
            known = (
                token in _EXPRESSION_WORDS or _SYMBOL.fullmatch(token) or (guard and token in _GUARD_WORDS)
            )
            if not known:
                return False
        if token == "." and not guard:
            return False
        position, previous = match.end(), token
    return previous != ""


def program_references(program: Any, file: str) -> Iterator[Reference]:
    """Yield what a program's JSON would run that is no tensor operator."""

    def name(value: Any, where: str) -> Iterator[Reference]:
        if isinstance(value, str) and not _NAME.fullmatch(value):
            yield Reference(
                file, value[:200], where, "is no plain name; torch writes names into Python source"
            )

    def visit(value: Any, where: str) -> Iterator[Reference]:
        if isinstance(value, list):
            for i, one in enumerate(value):
                yield from visit(one, f"{where}[{i}]")
        if not isinstance(value, dict):
            return
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key == "metadata":
                continue  # stack traces and names of source modules: kept as text
            if key in _NAMED_TABLES and isinstance(inner, dict):
                for one in inner:
                    yield from name(one, place)
            if key in _NAME_KEYS:
                yield from name(inner, place)
            elif key == "forward_arg_names" and isinstance(inner, list):
                for one in inner:
                    yield from name(one, place)
            elif key in ("target", "as_operator") and isinstance(inner, str):
                if not _OPERATOR.fullmatch(inner) or "__" in inner:
                    yield Reference(
                        file, inner[:200], place, "is called as a function and is no tensor operator"
                    )
                elif _TOUCHES_FILES.fullmatch(inner):
                    yield Reference(file, inner, place, "reads or writes files")
            elif key == "expr_str" and isinstance(inner, str):
                if not only_arithmetic(inner):
                    yield Reference(file, inner[:200], place, "is evaluated as Python while loading")
            elif key == "guards_code" and isinstance(inner, list):
                for one in inner:
                    if not only_arithmetic(str(one), guard=True):
                        yield Reference(
                            file, str(one)[:200], place, "is run as Python when the program is called"
                        )
            elif key in ("in_spec", "out_spec") and isinstance(inner, str):
                for module in _imports(inner):
                    yield Reference(file, module, place, "is imported by name while loading")
            yield from visit(inner, place)

    yield from visit(program, "")


def _imports(text: str) -> Iterator[str]:
    """Yield what a tree specification, JSON within JSON, makes torch import."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return

    def visit(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if _IMPORTING_KEYS & set(value):
                yield str(value.get("fqn", value.get("default_factory_module")))[:200]
            for key, inner in value.items():
                if key == "context" and isinstance(inner, str):
                    yield from _imports(inner)
                yield from visit(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from visit(inner)

    yield from visit(value)


def payload_references(config: Any, file: str) -> Iterator[Reference]:
    """Yield which weights or constants of a program torch would unpickle, by their configuration."""
    entries = config.get("config") if isinstance(config, dict) else None
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(entry, dict):
            continue
        path = str(entry.get("path_name"))
        if path.startswith("custom_obj_"):
            yield Reference(file, path, key, "is a script object, which runs code of its own when loaded")
        elif entry.get("use_pickle"):
            yield Reference(
                file, path, key, "use_pickle is set: torch.export.load unpickles it without any limit"
            )
        elif path.startswith("opaque_obj_"):
            yield Reference(
                file, path, key, "is an object that torch.export.load unpickles without any limit"
            )
