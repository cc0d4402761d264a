"""What a pickle would import and call when it is loaded, read from its opcodes without running any.

A pickle is a program for a small stack machine. It reaches outside of itself only through globals: names
of functions and classes that the machine imports and may call. This module walks the opcodes with the
stack machine's values left symbolic and reports every global that is not on a list of constructors known
to be harmless. A list of what is allowed is safer than one of what is forbidden: any installed package
may hold a function that runs commands.

Arguments are read as `_pickle.c` and `pickle._Unpickler` read them, which take more than `pickletools`
does: numbers as C writes them, lines of any length, names in UTF-8. Where the two differ, what either of
them takes is taken here.
"""

from __future__ import annotations

import codecs
import pickletools
import re
import struct
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from doorward.artifacts.examination import Budget, Reference
from doorward.artifacts.joblib_arrays import WRAPPER, ArrayWrapper, NumberType, skip_array
from doorward.artifacts.source import Broken, Piece, Source
from doorward.core.errors import CouldNotTell


def words(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


_HARMLESS = {
    "_codecs": "encode",
    "argparse": "Namespace",
    "builtins": "bool bytearray bytes complex dict float frozenset int list object set slice str tuple",
    "collections": "Counter OrderedDict defaultdict deque",
    "copyreg": "_reconstructor",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",  # Python 3.13
    "torch": "Size Tensor bool device strided",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
    "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state "
    "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 "
    "_rebuild_wrapper_subclass",
    "torch.nn.parameter": "Buffer Parameter UninitializedParameter",
    "torch.serialization": "_get_layout",
    "torch.storage": "TypedStorage UntypedStorage",
    "uuid": "UUID",
}
_ALLOWED = frozenset((module, name) for module, names in _HARMLESS.items() for name in names.split())
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
#: Storage and tensor types, and number types, of which there are many.
_TENSOR_TYPE = re.compile(r"torch(\.cuda)?(\.sparse)?\.[A-Z]\w*(Storage|Tensor)")
_NUMBER_TYPE = re.compile(
    r"torch\.((b?float|complex|u?int|qu?int|bits)\d+(x\d)?(_e\w+)?|per_(tensor|channel)_(affine|symmetric)\w*)"
)


def harmless(module: str, name: str) -> bool:
    """Return whether weights need this global and it runs no code of the file's choice.

    >>> harmless("torch", "FloatStorage"), harmless("torch", "load")
    (True, False)
    """
    whole = f"{module}.{name}"
    return (
        (_PYTHON_2.get(module, module), name) in _ALLOWED
        or _TENSOR_TYPE.fullmatch(whole) is not None
        or _NUMBER_TYPE.fullmatch(whole) is not None
    )


#: Modules whose functions run commands, code or network requests; for the explanation alone.
_NOTORIOUS = words(
    """__builtin__ asyncio bdb builtins cProfile code codeop commands ctypes cffi doctest ensurepip functools
    idlelib imp importlib lib2to3 marshal nt operator os pdb pickle pip pkgutil platform popen2 posix profile
    pty pydoc runpy setuptools shutil site socket ssl subprocess sys tempfile timeit trace types urllib
    urllib2 venv webbrowser zipimport"""
)


def explain(module: str) -> str:
    """Return what a global of this module would do."""
    if module.split(".")[0] == "__torch__":
        return "runs TorchScript code that the file carries"
    if module.split(".")[0] in _NOTORIOUS:
        return "can run commands or code of the file's choice"
    return f"is imported from {module} and called, which weights alone (a state_dict) do not need"


#: First object of a torch file in the format before zip; four more pickles follow it.
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
_LINES_BEFORE, _LINES_AFTER = 6, 6
#: Longest tuple whose items are kept.
_LONGEST_TUPLE = 16
#: Digits or bytes of the longest number that is kept.
_DIGITS = 64
COMPUTED = "<computed name>"


class _Symbol:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


_MARK, _UNKNOWN = _Symbol("<mark>"), _Symbol("<unknown>")


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _Hit:
    offset: int
    why: str
    module: str
    lines: list[str]
    wanted: int = _LINES_AFTER


@dataclass
class Reading:
    """What a walk over the pickles of one file found.

    Attributes:
        hits: each dangerous global by name, at its first place.
        calls: names of those that are called, instantiated or changed, not only imported.
        instructions: how many opcodes were read.
        finished: whether the first pickle was read to its last instruction.
        wrappers: whether joblib's wrappers of arrays are in it.
        error: why the walk ended early, or None.
        broken: whether every unpickler would end where the walk did, so that nothing behind it runs.
        unsure: in what unpicklers differ about it, or None.
    """

    hits: dict[str, _Hit] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)
    instructions: int = 0
    finished: bool = False
    wrappers: bool = False
    error: str | None = None
    broken: bool = False
    unsure: str | None = None

    @property
    def imports_known(self) -> bool:
        """Return whether a module of the standard library is among what it imports."""
        return any(hit.module.split(".")[0] in sys.stdlib_module_names for hit in self.hits.values())

    def references(self, file: str) -> Iterator[Reference]:
        """Yield each dangerous global once."""
        for name, hit in self.hits.items():
            yield Reference(file, name, f"byte {hit.offset}", hit.why, "\n".join(hit.lines))

    def add(self, other: Reading) -> None:
        """Take over what another walk found."""
        self.hits = other.hits | self.hits
        self.calls |= other.calls
        self.wrappers |= other.wrappers
        self.unsure = self.unsure or other.unsure


@dataclass(frozen=True, slots=True)
class _Code:
    """One instruction: what its argument is, and what it takes from the stack and puts there."""

    name: str
    argument: str
    mark: bool
    before: int
    after: int


def _code(info: pickletools.OpcodeInfo) -> _Code:
    kinds = [kind.name for kind in info.stack_before]
    mark = "mark" in kinds
    before = kinds.index("mark") if mark else len(kinds)
    return _Code(info.name, info.arg.name if info.arg else "", mark, before, len(info.stack_after))


_CODES = {info.code.encode("latin-1")[0]: _code(info) for info in pickletools.opcodes}
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
#: Arguments of a fixed length: bytes, and whether the number is signed.
_FIXED = {
    "uint1": (1, False),
    "uint2": (2, False),
    "uint4": (4, False),
    "uint8": (8, False),
    "int4": (4, True),
}
#: Arguments that begin with their own length: bytes of the length, whether it is signed, what they are.
_COUNTED = {
    "string1": (1, False, "text"),
    "string4": (4, True, "text"),
    "unicodestring1": (1, False, "text"),
    "unicodestring4": (4, False, "text"),
    "unicodestring8": (8, False, "text"),
    "bytes1": (1, False, "bytes"),
    "bytes4": (4, False, "bytes"),
    "bytes8": (8, False, "bytes"),
    "bytearray8": (8, False, "bytes"),
    "long1": (1, False, "number"),
    "long4": (4, True, "number"),
}
#: What C's `strtol` with base 0 takes, up to the end or a zero byte.
_C_NUMBER = re.compile(rb"[ \t\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)(\0.*)?", re.DOTALL)
_STACK_KEEPERS = frozenset({"APPEND", "APPENDS", "ADDITEMS"})
_SIMPLE: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _text(piece: Piece) -> str:
    """Return a string as text; one that is longer than what is kept gets a mark that no name has."""
    return piece.head.decode("utf-8", "surrogateescape") + ("" if piece.whole else "\N{HORIZONTAL ELLIPSIS}")


def _key(line: Piece) -> int:
    """Return the place in the memo that a PUT or GET line names: always in decimal."""
    try:
        return int(line.head.split(b"\0")[0])
    except ValueError:
        raise Broken(f"{line.head[:20]!r} is no place in the memo") from None


def _number(line: Piece) -> Any:
    """Return the number of an INT or LONG line, as C's or Python's reader takes it."""
    if len(line.head) > _DIGITS and re.fullmatch(rb"[ \t]*[-+]?[0-9a-fA-F_xX]+L?", line.head):
        return _UNKNOWN
    if line.head[:1] == b"\0":
        return 0  # to strtol it is the end
    if match := _C_NUMBER.fullmatch(line.head):
        digits = match[2]
        octal = digits[:1] == b"0" and digits[1:2] not in (b"x", b"X")
        try:
            return int(match[1] + digits, 8 if octal else 0)
        except ValueError:
            return _UNKNOWN  # 089: strtol stops inside
    text = line.head.split(b"\0")[0].strip()
    try:
        return int(text.removesuffix(b"L"), 0)
    except ValueError:
        raise Broken(f"{text[:20]!r} is no number") from None


class _Walk:
    """Follow one pickle with a stack of symbols.

    Args:
        arrays: whether joblib's arrays stand between the instructions, or the pickle is a plain one.
    """

    def __init__(self, source: Source, reading: Reading, budget: Budget, *, arrays: bool) -> None:
        self.source, self.reading, self.budget, self.arrays = source, reading, budget, arrays
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.position = source.position
        self.frame_ends: list[int] = []
        self.before: deque[tuple[int, str, Any]] = deque(maxlen=_LINES_BEFORE)
        self.waiting: list[_Hit] = []

    def run(self) -> Any:
        """Return the pickle's value where that is a plain string or number, else a symbol."""
        while True:
            self.position = self.source.position
            byte = self.source.take(1)[0]
            code = _CODES.get(byte)
            if code is None:
                raise Broken(f"byte {byte:#04x} at {self.position} is no instruction")
            argument = self._argument(code) if code.argument else None
            if self.frame_ends:
                self._check_frames()
            self.budget.spend(opcodes=1)
            self.reading.instructions += 1
            self._note(code.name, argument)
            if code.name == "STOP":
                return self.pop()
            self._step(code, argument)

    def _check_frames(self) -> None:
        """Note an instruction across the end of a frame: the unpickler in C loses its first part."""
        end = self.source.position
        if any(self.position < one < end for one in self.frame_ends):
            self.reading.unsure = "an instruction crosses the end of a frame, where unpicklers differ"
        self.frame_ends = [one for one in self.frame_ends if one >= end]

    def _note(self, name: str, argument: Any) -> None:
        """Keep the instructions around each hit."""
        for one in self.waiting:
            one.lines.append(_line(self.position, name, argument))
            one.wanted -= 1
        if self.waiting:
            self.waiting = [one for one in self.waiting if one.wanted]
        self.before.append((self.position, name, argument))

    # --- arguments ---

    def _argument(self, code: _Code) -> Any:
        source, kind = self.source, code.argument
        if kind in _FIXED:
            length, signed = _FIXED[kind]
            return int.from_bytes(source.take(length), "little", signed=signed)
        if kind in _COUNTED:
            length, signed, what = _COUNTED[kind]
            n = int.from_bytes(source.take(length), "little", signed=signed)
            if n < 0:
                raise Broken("a length is negative")
            return _value(source.counted(n), what)
        if kind == "float8":
            return struct.unpack(">d", source.take(8))[0]
        line = source.line()
        if kind == "stringnl_noescape_pair":
            try:
                return _text(line), _text(source.line())
            except Broken:
                return _text(line), ""  # Python's unpickler imports the module all the same
        return _key(line) if code.name in ("PUT", "GET") else _line_value(line, kind)

    # --- the stack ---

    def pop(self) -> Any:
        """Take the topmost value."""
        if not self.stack or self.stack[-1] is _MARK:
            raise Broken("it takes more from the stack than there is")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Take all down to the topmost mark, which goes too, and return it in its order."""
        items: list[Any] = []
        while self.stack:
            if (item := self.stack.pop()) is _MARK:
                return items[::-1]
            items.append(item)
        raise Broken("there is no mark on the stack")

    def top(self) -> Any:
        """Return the topmost value."""
        if not self.stack or self.stack[-1] is _MARK:
            raise Broken("it takes more from the stack than there is")
        return self.stack[-1]

    def _step(self, code: _Code, argument: Any) -> None:
        name = code.name
        if name in _SPECIAL:
            _SPECIAL[name](self, argument)
        elif name in _PUT:
            self.memo[argument] = self.top()
        elif name in _GET:
            if argument not in self.memo:
                raise Broken("it takes from the memo what is not there")
            self.stack.append(self.memo[argument])
        elif name in _SIMPLE:
            self.stack.append(_SIMPLE[name])
        elif name in _STACK_KEEPERS:
            self.pop_mark() if code.mark else self.pop()
            self.top()
        elif code.argument and not code.before:
            self.stack.extend([argument] * code.after)
        else:
            if code.mark:
                self.pop_mark()
            for _ in range(code.before):
                self.pop()
            self.stack.extend([_UNKNOWN] * code.after)

    # --- what reaches outside ---

    def hit(self, name: str, why: str, module: str = "") -> None:
        """Note a dangerous global, and that it is there once more if it is known."""
        if name not in self.reading.hits:
            found = _Hit(self.position, why, module, [_line(*one) for one in self.before])
            self.reading.hits[name] = found
            self.waiting.append(found)

    def imported(self, module: str, name: str) -> None:
        """Put a global on the stack."""
        if (module, name) == WRAPPER:
            self.reading.wrappers = True
        elif not harmless(module, name):
            self.hit(f"{module}.{name}", explain(module), module)
        self.stack.append(_Global(module, name))

    def called(self, function: Any, arguments: Any) -> Any:
        """Note a call and return its value as far as it matters."""
        if not isinstance(function, _Global):
            return _UNKNOWN
        if function.path in self.reading.hits:
            self.reading.calls.add(function.path)
        whole = (_PYTHON_2.get(function.module, function.module), function.name)
        if whole == WRAPPER or (whole == ("copyreg", "_reconstructor") and _of_wrapper(arguments)):
            if self.arrays and whole == WRAPPER and arguments != ():
                raise CouldNotTell("it makes a wrapper of an array in an unusual way")
            return ArrayWrapper()
        if whole == ("numpy", "dtype") and isinstance(arguments, tuple) and arguments:
            return NumberType(arguments[0]) if isinstance(arguments[0], str) else _UNKNOWN
        return _UNKNOWN

    def build(self, _: Any) -> None:
        """Give an object its state; joblib then puts the array in the place of its wrapper."""
        state, thing = self.pop(), self.top()
        if isinstance(thing, _Global):
            self.hit(thing.path, "changes a function or class that others use", thing.module)
            self.reading.calls.add(thing.path)
        elif isinstance(thing, NumberType):
            thing.state = state if isinstance(state, tuple) else ()
        elif isinstance(thing, ArrayWrapper) and self.arrays:
            if not isinstance(state, dict):
                raise CouldNotTell("it holds an array whose shape is computed while loading")
            thing.state.update(state)
            if any(self.source.position < one for one in self.frame_ends):
                raise CouldNotTell("it holds an array in the middle of a frame")
            if skip_array(thing, self.source):
                _Walk(self.source, self.reading, self.budget, arrays=False).run()
            self.stack[-1] = _UNKNOWN


def _of_wrapper(arguments: Any) -> bool:
    return isinstance(arguments, tuple) and arguments[:1] == (_Global(*WRAPPER),)


def _value(piece: Piece, what: str) -> Any:
    """Return a counted string as what it stands for."""
    if what == "text":
        return _text(piece)
    if what == "bytes":
        return piece.head
    return int.from_bytes(piece.head, "little", signed=True) if len(piece.head) <= _DIGITS else _UNKNOWN


def _line_value(line: Piece, kind: str) -> Any:
    """Return the argument that a line holds."""
    if kind in ("decimalnl_short", "decimalnl_long"):
        return _number(line)
    if kind == "floatnl":
        try:
            return float(line.head.split(b"\0")[0])
        except ValueError:
            raise Broken(f"{line.head[:20]!r} is no number") from None
    if kind == "stringnl":
        quote = line.head[:1]
        if quote not in (b"'", b'"') or line.last != quote or line.head == quote:
            raise Broken("a string has no quotes")
        inner = line.head[1:-1] if line.whole else line.head[1:]
        return _unescaped(inner, whole=line.whole)
    if kind == "unicodestringnl":
        try:
            return line.head.decode("raw-unicode-escape") if line.whole else _UNKNOWN
        except UnicodeDecodeError:
            raise Broken("a string is not valid") from None
    return _text(line)


def _unescaped(inner: bytes, *, whole: bool) -> Any:
    if b"\\" in inner:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know, which unpicklers take
                inner = codecs.escape_decode(inner)[0]
        except ValueError:
            if whole:
                raise Broken("a string is not valid") from None
            return _UNKNOWN
    return _text(Piece(inner, b"", whole))


def _line(position: int, name: str, argument: Any) -> str:
    if isinstance(argument, tuple):
        argument = " ".join(argument)
    shown = "" if argument is None else repr(argument[:80] if isinstance(argument, str | bytes) else argument)
    return f"{position:>8}: {name:<18} {shown[:100]}".rstrip()


# --- instructions that need more than a count of what they take and give ---


def _mark(walk: _Walk, _: Any) -> None:
    walk.stack.append(_MARK)


def _pop(walk: _Walk, _: Any) -> None:
    if not walk.stack:
        raise Broken("it takes more from the stack than there is")
    walk.stack.pop()  # a mark too


def _dup(walk: _Walk, _: Any) -> None:
    walk.stack.append(walk.top())


def _memoize(walk: _Walk, _: Any) -> None:
    walk.memo[len(walk.memo)] = walk.top()


def _global(walk: _Walk, argument: tuple[str, str]) -> None:
    walk.imported(*argument)


def _stack_global(walk: _Walk, _: Any) -> None:
    name, module = walk.pop(), walk.pop()
    if isinstance(module, str) and isinstance(name, str):
        walk.imported(module, name)
    elif any(not isinstance(one, str | _Symbol) for one in (name, module)):
        raise Broken("it imports by a name that is no text")
    else:
        walk.hit(COMPUTED, "the name of what it imports is computed while loading")
        walk.stack.append(_Global("", COMPUTED))
        walk.reading.calls.add(COMPUTED)


def _inst(walk: _Walk, argument: tuple[str, str]) -> None:
    walk.imported(*argument)  # Python's unpickler imports before it looks for the mark
    cls = walk.pop()
    walk.pop_mark()
    walk.stack.append(walk.called(cls, _UNKNOWN))


def _obj(walk: _Walk, _: Any) -> None:
    items = walk.pop_mark()
    if not items:
        raise Broken("it makes an object of no class")
    walk.stack.append(walk.called(items[0], tuple(items[1:])))


def _reduce(walk: _Walk, _: Any) -> None:
    arguments, function = walk.pop(), walk.pop()
    walk.stack.append(walk.called(function, arguments))


def _newobj(walk: _Walk, _: Any) -> None:
    arguments, cls = walk.pop(), walk.pop()
    walk.stack.append(walk.called(cls, arguments))


def _newobj_ex(walk: _Walk, _: Any) -> None:
    walk.pop(), walk.pop()
    walk.stack.append(walk.called(walk.pop(), _UNKNOWN))


def _extension(walk: _Walk, argument: int) -> None:
    # no call by which bytes are told to be a pickle: in a tensor such a byte comes up by chance
    walk.hit(f"copyreg extension {argument}", "calls whatever is registered under a number")
    walk.stack.append(_UNKNOWN)


def _tuple_of(n: int) -> Callable[[_Walk, Any], None]:
    def make(walk: _Walk, _: Any) -> None:
        items = [walk.pop() for _ in range(n)]
        walk.stack.append(tuple(items[::-1]))

    return make


def _tuple(walk: _Walk, _: Any) -> None:
    items = walk.pop_mark()
    walk.stack.append(tuple(items) if len(items) <= _LONGEST_TUPLE else _UNKNOWN)


def _empty_dict(walk: _Walk, _: Any) -> None:
    walk.stack.append({} if walk.reading.wrappers else _UNKNOWN)


def _dict(walk: _Walk, _: Any) -> None:
    items = walk.pop_mark()
    walk.stack.append({} if walk.reading.wrappers else _UNKNOWN)
    _set(walk.top(), items)


def _setitem(walk: _Walk, _: Any) -> None:
    value, key = walk.pop(), walk.pop()
    _set(walk.top(), [key, value])


def _setitems(walk: _Walk, _: Any) -> None:
    items = walk.pop_mark()
    _set(walk.top(), items)


def _set(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=False) if isinstance(k, str))


def _frame(walk: _Walk, length: int) -> None:
    walk.frame_ends.append(walk.source.position + length)


def _persistent(walk: _Walk, _: Any) -> None:
    walk.stack.append(_UNKNOWN)  # what the loader makes of the name


def _nothing(walk: _Walk, _: Any) -> None:
    """Change nothing."""


_SPECIAL: dict[str, Callable[[_Walk, Any], None]] = {
    "MARK": _mark,
    "POP": _pop,
    "DUP": _dup,
    "MEMOIZE": _memoize,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _inst,
    "OBJ": _obj,
    "REDUCE": _reduce,
    "NEWOBJ": _newobj,
    "NEWOBJ_EX": _newobj_ex,
    "BUILD": _Walk.build,
    "EXT1": _extension,
    "EXT2": _extension,
    "EXT4": _extension,
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": _tuple,
    "EMPTY_DICT": _empty_dict,
    "DICT": _dict,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "FRAME": _frame,
    "PROTO": _nothing,
    "PERSID": _persistent,
}


def read_pickles(stream: IO[bytes], budget: Budget, size: int | None = None) -> Reading:
    """Walk over the pickles at the start of a stream; nothing is executed.

    After the first pickle the walk goes on while others follow, which formats that write several objects
    need. Whatever stops it early becomes `error`; what was found until then is kept, because a pickle runs
    up to the place where it breaks. A file with joblib's arrays is read twice, as joblib and as pickle.

    Args:
        size: bytes in the stream, if known.
    """
    start = stream.tell()
    reading = _read(Source(stream, budget, size), budget, arrays=True)
    if reading.wrappers:
        stream.seek(start)
        plain = _read(Source(stream, budget, size), budget, arrays=False)
        reading.add(plain)
        if plain.error and not plain.broken:
            reading.error = reading.error or plain.error
            reading.broken = False
    if reading.unsure:
        reading.error, reading.broken = reading.unsure, False
    return reading


def _read(source: Source, budget: Budget, *, arrays: bool) -> Reading:
    reading = Reading()
    value = _attempt(source, reading, budget, arrays=arrays)
    reading.finished = reading.error is None
    count = 1
    while reading.error is None:
        following = Reading()
        _attempt(source, following, budget, arrays=arrays)
        reading.instructions += following.instructions
        if following.error is None or following.calls or following.unsure:
            reading.add(following)
        if following.error is not None:
            expected = value == TORCH_MAGIC and count < _LEGACY_PICKLES
            if expected or not following.broken or following.imports_known:
                reading.error, reading.broken = following.error, following.broken and not following.hits
            break
        count += 1
    return reading


def _attempt(source: Source, reading: Reading, budget: Budget, *, arrays: bool) -> Any:
    """Walk over one pickle and return its value where that is a plain string or number."""
    try:
        return _Walk(source, reading, budget, arrays=arrays).run()
    except Broken as why:
        reading.error, reading.broken = f"the pickle is malformed: {why}", True
    except CouldNotTell as why:
        reading.error = str(why)
    except Exception as error:
        reading.error = f"the pickle could not be read ({type(error).__name__}: {str(error)[:120]})"
    return None
