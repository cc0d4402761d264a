"""What a pickle would import and call when it is loaded, read from its opcodes without running any.

A pickle is a program for a small stack machine. It reaches outside of itself only through globals: names
of functions and classes that the machine imports and may call. This module walks the opcodes with the
stack machine's values left symbolic and reports every global that is not on a list of constructors known
to be harmless. A list of what is allowed is safer than one of what is forbidden: any installed package
may hold a function that runs commands.
"""

from __future__ import annotations

import pickletools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from doorward.core.errors import CouldNotTell


def words(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Reference:
    """One piece of code that loading a file would import or run.

    Attributes:
        file: file, and member inside an archive after a colon.
        name: the function, class or expression.
        position: where in the file.
        why: what makes it dangerous, in words.
        excerpt: the instructions around it.
    """

    file: str
    name: str
    position: str
    why: str
    excerpt: str = ""


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

_CONSTANTS = words(
    """STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 INT LONG LONG1 LONG4
    BININT BININT1 BININT2"""
)
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_EXTENSIONS = frozenset({"EXT1", "EXT2", "EXT4"})
#: First object of a torch file in the format before zip; four more pickles follow it.
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LINES_BEFORE, _LINES_AFTER = 6, 6


@dataclass(frozen=True)
class _Global:
    name: str


class _Mark:
    pass


_MARK = _Mark()


@dataclass
class Budget:
    """Count down what one examination may still read.

    Attributes:
        opcodes: pickle instructions left.
        bytes: bytes left to decompress or read as pickle.
    """

    opcodes: int
    bytes: int

    def spend(self, *, opcodes: int = 0, n_bytes: int = 0) -> None:
        """Take from the budget.

        Raises:
            CouldNotTell: if it is used up.
        """
        self.opcodes -= opcodes
        self.bytes -= n_bytes
        if self.opcodes < 0:
            raise CouldNotTell("too many pickle instructions to check")
        if self.bytes < 0:
            raise CouldNotTell("too many bytes to check")


class _Metered:
    """Read from a stream at a budget's expense."""

    def __init__(self, stream: IO[bytes], budget: Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, size: int) -> bytes:
        self._budget.spend(n_bytes=max(0, size))  # before the read: a forged length must not allocate
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(1 << 20)
        self._budget.spend(n_bytes=len(line))
        return line

    def tell(self) -> int:
        return self._stream.tell()


@dataclass
class _Hit:
    offset: int
    why: str
    lines: list[str]
    wanted: int = _LINES_AFTER


@dataclass
class Reading:
    """What a walk over one pickle file found.

    Attributes:
        hits: each dangerous global by name, at its first place.
        instructions: how many opcodes were read.
        error: why the walk ended early, or None.
    """

    hits: dict[str, _Hit] = field(default_factory=dict)
    instructions: int = 0
    error: str | None = None

    def references(self, file: str) -> Iterator[Reference]:
        """Yield each dangerous global once."""
        for name, hit in self.hits.items():
            yield Reference(file, name, f"byte {hit.offset}", hit.why, "\n".join(hit.lines))


def explain(module: str) -> str:
    """Return what a global of this module would do."""
    if module.split(".")[0] == "__torch__":
        return "runs TorchScript code that the file carries"
    if module.split(".")[0] in _NOTORIOUS:
        return "can run commands or code of the file's choice"
    return f"is imported from {module} and called, which weights alone (a state_dict) do not need"


def read_pickles(stream: IO[bytes], budget: Budget) -> Reading:
    """Walk over the pickles at the start of a stream; nothing is executed.

    After the first pickle the walk goes on while another one follows, which formats that write several
    objects need. Whatever stops it early becomes `error`; what was found until then is kept, because a
    pickle runs up to the place where it breaks.
    """
    reading = Reading()
    metered = _Metered(stream, budget)
    try:
        value = _walk(metered, reading, budget)
        if value == TORCH_MAGIC:
            for _ in range(4):  # protocol, machine, the object itself, keys of its storages
                _walk(metered, reading, budget)
        else:
            while _another(stream):
                _walk(metered, reading, budget)
    except CouldNotTell as why:
        reading.error = str(why)
    except Exception as error:  # the standard library's parser raises many kinds on malformed input
        reading.error = f"the pickle is malformed ({type(error).__name__}: {str(error)[:120]})"
    return reading


def _another(stream: IO[bytes]) -> bool:
    place = stream.tell()
    head = stream.read(2)
    stream.seek(place)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def _walk(stream: _Metered, reading: Reading, budget: Budget) -> Any:
    """Walk over one pickle and return its value where that is a plain string or number, else None."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    before: deque[tuple[int | None, str, Any]] = deque(maxlen=_LINES_BEFORE)
    waiting: list[_Hit] = []

    def hit(name: str, why: str) -> None:
        if name not in reading.hits:
            found = _Hit(position or 0, why, [_line(*one) for one in before])
            reading.hits[name] = found
            waiting.append(found)

    def imported(module: str, name: str) -> None:
        if (module, name) == ("joblib.numpy_pickle", "NumpyArrayWrapper"):
            raise CouldNotTell("joblib writes arrays between the instructions; what follows is not checked")
        if not harmless(module, name):
            hit(f"{module}.{name}", explain(module))
        stack.append(_Global(f"{module}.{name}"))

    for opcode, argument, position in pickletools.genops(stream):  # type: ignore[arg-type]
        budget.spend(opcodes=1)
        reading.instructions += 1
        for one in waiting:
            one.lines.append(_line(position, opcode.name, argument))
            one.wanted -= 1
        waiting = [one for one in waiting if one.wanted]
        before.append((position, opcode.name, argument))
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(argument)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _PUT:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            imported(*str(argument).split(" ", 1))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if isinstance(module, str) and isinstance(attribute, str):
                imported(module, attribute)
            else:
                hit("<computed name>", "the name of what it imports is computed while loading")
                stack.append(_Global("<computed name>"))
        elif name == "INST":
            _pop_mark(stack)
            imported(*str(argument).split(" ", 1))
        elif name in _EXTENSIONS:
            hit(f"copyreg extension {argument}", "calls whatever is registered under a number")
            stack.append(None)
        else:
            if name == "BUILD" and len(stack) > 1 and isinstance(stack[-2], _Global):
                hit(stack[-2].name, "changes a function or class that others use")
            top = stack[-1] if stack else None
            needs = [kind.name for kind in opcode.stack_before]
            if "mark" in needs:
                _pop_mark(stack)
                needs = needs[: needs.index("mark")]
            for _ in needs:
                stack.pop()
            stack.extend([None] * len(opcode.stack_after))
            if name == "STOP":
                return top
    raise CouldNotTell("the pickle ends without its last instruction")


def _pop_mark(stack: list[Any]) -> None:
    while stack.pop() is not _MARK:
        pass


def _line(position: int | None, name: str, argument: Any) -> str:
    shown = "" if argument is None else repr(argument[:80] if isinstance(argument, str | bytes) else argument)
    return f"{position:>8}: {name:<18} {shown[:100]}".rstrip()
