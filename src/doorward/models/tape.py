"""What a network computes, as a list of calls of torch's operators, for any number of images.

A network is run twice, on two and on three images, and each call of an operator is written down: the graph,
read off any network, be it Python code, an ONNX file or an exported program. What differs
between the two runs says where the number of images is written into the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from doorward.core.errors import CouldNotTell, DoorwardError
from doorward.models.adapted import AdaptedModule
from doorward.models.classifier import TorchClassifier, evaluating, output_tensor
from doorward.models.formats.input_options import first_line, trial_inputs
from doorward.models.outputs import follow
from doorward.models.straight_through import StraightThrough

#: Calls beyond which a network is not read.
MOST_STEPS = 20_000
#: Numbers of images in the two runs.
FEW, MORE = 2, 3
#: Operators whose results depend on no value of their tensors.
_VALUE_FREE = {
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like",
}  # fmt: skip
#: Functions that hand the numbers of a tensor to Python.
HANDING = {"numpy", "tolist", "__array__", "__dlpack__"}
#: Operators through which values leave the graph.
_LEAVING = {"_local_scalar_dense", "equal", "is_nonzero"}


@dataclass(frozen=True)
class Ref:
    """Stands for the value of that number."""

    value: int


@dataclass(frozen=True)
class Size:
    """Stands for a whole number that grows with the number of images: `slope * images + offset`."""

    slope: int
    offset: int


@dataclass(frozen=True, eq=False)
class Spread:
    """Stands for one of the network's own tensors, repeated for each image: `slope` rows for each."""

    tensor: Tensor
    slope: int

    def rows(self, images: int) -> Tensor:
        """Return the tensor for so many images."""
        return self.tensor.expand(images * self.slope, *self.tensor.shape[1:])


@dataclass
class Step:
    """One call of an operator.

    Attributes:
        args, kwargs: with `Ref` for values and `Size` for sizes.
        outputs: numbers of the values made, None for what is no tensor.
        derived: whether the image has a part in it.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int | None, ...]
    derived: bool = True

    @property
    def name(self) -> str:
        """Return the operator's name, as `add` or `convolution`."""
        return operator_name(self.call)

    @property
    def reads(self) -> list[int]:
        """Return the numbers of the values that it reads."""
        return [one.value for one in tree_flatten((self.args, self.kwargs))[0] if isinstance(one, Ref)]


@dataclass
class Tape:
    """A network as a list of calls.

    Attributes:
        steps: in order.
        output: number of the value that holds the scores, one row for each image; the image is value 0.
        shapes: of each value, for two images.
        switches: numbers of the values that hold true and false.
        derived: numbers of the values that depend on the image.
        images: how many images it takes at a time, None for any number.
        handed: whether numbers of some tensor were handed to Python code on the way.
    """

    steps: list[Step]
    output: int
    shapes: dict[int, tuple[int, ...]]
    derived: set[int]
    switches: set[int] = field(default_factory=set)
    images: int | None = None
    handed: bool = False
    makers: dict[int, Step] = field(default_factory=dict)
    readers: dict[int, list[Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for step in self.steps:
            for number in step.outputs:
                if number is not None:
                    self.makers[number] = step
            for number in dict.fromkeys(step.reads):
                self.readers.setdefault(number, []).append(step)

    def on_cpu(self) -> Tape:
        """Return the same network with its weights on the processor."""

        def move(one: Any) -> Any:
            if isinstance(one, torch.device):
                return torch.device("cpu")
            if isinstance(one, Spread):
                return Spread(one.tensor.cpu(), one.slope)
            return one.cpu() if isinstance(one, Tensor) else one

        steps = [
            replace(step, args=tree_map(move, step.args), kwargs=tree_map(move, step.kwargs))
            for step in self.steps
        ]
        return replace(self, steps=steps, makers={}, readers={})

    def ancestors(self, numbers: Sequence[int]) -> list[Step]:
        """Return the steps that some values are made by, in order."""
        wanted, kept = set(numbers), []
        for step in reversed(self.steps):
            if wanted & set(step.outputs):
                wanted |= set(step.reads)
                kept.append(step)
        return kept[::-1]

    def run(
        self,
        x: Tensor,
        wanted: Sequence[int] = (),
        *,
        change: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        see: Callable[[int, Tensor], None] | None = None,
        call: Callable[[Step, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> dict[int, Tensor]:
        """Run the network on what it takes itself and return some values by their numbers.

        Args:
            wanted: numbers; the scores if empty.
            change: what is made of some values as soon as they are there.
            see: called with each value that depends on the image.
            call: calls the operator of a step in its own way.
        """
        wanted = wanted or (self.output,)
        steps = self.ancestors(wanted)
        last: dict[int, int] = {number: i for i, step in enumerate(steps) for number in step.reads}
        values: dict[int, Any] = {0: x}
        if change and 0 in change:
            values[0] = change[0](x)
        for i, step in enumerate(steps):
            args, kwargs = materialised((step.args, step.kwargs), values, len(x))
            made = step.call(*args, **kwargs) if call is None else call(step, args, kwargs)
            for number, value in zip(step.outputs, _several(made), strict=False):
                if number is None or not isinstance(value, Tensor):
                    continue
                values[number] = change[number](value) if change and number in change else value
                if see is not None and number in self.derived:
                    see(number, values[number])
            for number in step.reads:
                if last.get(number) == i and number not in wanted:
                    values.pop(number, None)
        return {number: values[number] for number in wanted}

    def scores(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the scores (n, k)."""
        return self.run(x, **kwargs)[self.output].flatten(1)


def materialised(value: Any, values: Mapping[int, Any], images: int) -> Any:
    """Return arguments with values and sizes in the places of what stands for them."""
    leaves, spec = tree_flatten(value)
    filled = [
        values[one.value]
        if isinstance(one, Ref)
        else one.slope * images + one.offset
        if isinstance(one, Size)
        else one.rows(images)
        if isinstance(one, Spread)
        else one
        for one in leaves
    ]
    return tree_unflatten(filled, spec)


def operator_name(call: Callable[..., Any]) -> str:
    """Return an operator's bare name, in the form that works on a copy."""
    schema = getattr(call, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else getattr(call, "__name__", "")
    return name if name.startswith("_") else name.rstrip("_")


def _several(made: Any) -> tuple[Any, ...]:
    return tuple(made) if isinstance(made, tuple | list) else (made,)


class _Handing(TorchFunctionMode):
    """Notice whether the numbers of a tensor are handed to Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.noticed = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.noticed |= getattr(func, "__name__", "") in HANDING
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down each call of an operator inside the block.

    Attributes:
        steps: what was called.
        left: names of the operators by which values that depend on the image left the graph for Python.
        handed: whether numbers of some tensor were handed to Python code.
    """

    handed = False

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.left: list[str] = []
        self.derived = {0}
        self.switches: set[int] = set()
        self.shapes: dict[int, tuple[int, ...]] = {0: tuple(x.shape)}
        self._numbers: dict[int, int] = {id(x): 0}
        self._alive: list[Tensor] = [x]
        self._next = 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler, which takes seconds and is not needed."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        (own_args, own_kwargs) = self._referred((args, kwargs))
        made = func(*args, **kwargs)
        # what is detached is the same value, and gradients are to pass when the tape is run
        call = torch.ops.aten.alias.default if func is torch.ops.aten.detach.default else func
        step = Step(call, own_args, own_kwargs, ())
        derived = bool(self.derived & set(step.reads))
        if operator_name(func) in _LEAVING and derived:
            self.left.append(operator_name(func))
        step.derived = derived and operator_name(func) not in _VALUE_FREE
        several = _several(made)
        step.outputs = tuple(self._number(one, step.derived) for one in several)
        if any(number is not None for number in step.outputs):
            self.steps.append(step)
        if len(self.steps) > MOST_STEPS:
            raise CouldNotTell(f"the network makes more than {MOST_STEPS:,} calls")
        return made

    def number_of(self, tensor: Tensor) -> int | None:
        """Return a tensor's number, None if nothing in the block made it."""
        return self._numbers.get(id(tensor))

    def _number(self, value: Any, derived: bool) -> int | None:
        if not isinstance(value, Tensor):
            return None
        known = self._numbers.get(id(value))
        number, self._next = self._next, self._next + 1
        self._numbers[id(value)] = number
        if known is None:
            self._alive.append(value)
        self.shapes[number] = tuple(value.shape)
        if derived:
            self.derived.add(number)
        if value.dtype == torch.bool:
            self.switches.add(number)
        return number

    def _referred(self, value: Any) -> Any:
        leaves, spec = tree_flatten(value)
        referred = [
            Ref(self._numbers[id(one)]) if isinstance(one, Tensor) and id(one) in self._numbers else one
            for one in leaves
        ]
        return tree_unflatten(referred, spec)


def bare_network(classifier: TorchClassifier) -> Callable[[Tensor], Tensor]:
    """Return what gives a network's own scores, with what squashes them at its end, as one tensor."""
    module = classifier.module
    while isinstance(module, StraightThrough):
        module = module.inner
    if isinstance(module, AdaptedModule):
        return lambda x: follow(module.inner(x), module.path)
    return lambda x: output_tensor(module(x))


def read_tape(classifier: TorchClassifier) -> Tape:
    """Read a classifier's network.

    Raises:
        CouldNotTell: if it cannot be read; the message says why.
    """
    module, fixed = classifier.module, classifier.batch
    spec = classifier.spec
    counts = (fixed,) if fixed is not None else (FEW, MORE)
    # another seed than that of the trial inputs elsewhere does not matter: no value is kept
    images = [spec.to_model(trial_inputs(spec, n).to(classifier.device)) for n in counts]
    try:
        with evaluating(module), torch.no_grad(), plain_kernels():
            run = bare_network(classifier)
            recorded = [_record(run, x.contiguous()) for x in images]
    except DoorwardError:
        raise
    except (Exception, SystemExit) as error:
        raise CouldNotTell(f"the network's graph cannot be read: {first_line(error)}") from error
    if fixed is not None:
        tape = _tape(recorded[0], recorded[0])
        tape.images = fixed
    else:
        tape = _tape(*recorded)
    if tape.output not in tape.derived:
        raise CouldNotTell(
            "the network's graph cannot be read: its answers are made by code that is none of torch's"
        )
    return tape


def plain_kernels() -> Any:
    """Return a block in which attention is written out, so that its parts are seen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _record(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Recorder, int]:
    """Run a network and return what it called, and the number of its scores.

    What a network makes at its first run and keeps may not be made while it is watched; then it runs before.
    """
    try:
        return _recorded(run, x)
    except Exception:
        run(x)
        return _recorded(run, x)


def _recorded(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Recorder, int]:
    """Run a network and return what it called, and the number of its scores."""
    made: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        y = run(x)
        made.append(y)
        return y

    recorder, handing = Recorder(x), _Handing()
    with handing, recorder:
        y = torch.func.functionalize(keep, remove="mutations")(x)
    number, recorder.handed = recorder.number_of(y), handing.noticed
    if recorder.left:
        raise CouldNotTell("the network's graph cannot be read: Python code decides by what the image shows")
    if number is None:
        raise CouldNotTell("the network's graph cannot be read: nothing in it makes its answers")
    return recorder, number


def _tape(one: tuple[Recorder, int], other: tuple[Recorder, int]) -> Tape:
    """Return the tape that two runs on different numbers of images have in common."""
    (few, output), (more, second) = one, other
    names = [[step.call for step in run.steps] for run in (few, more)]
    if names[0] != names[1] or output != second:
        raise CouldNotTell("the network's graph cannot be read: it is another for another number of images")
    n, m = few.shapes[0][0], more.shapes[0][0]
    constants: dict[int, Tensor] = {}
    steps = []
    for a, b in zip(few.steps, more.steps, strict=True):
        args, kwargs = _generalised((a.args, a.kwargs), (b.args, b.kwargs), n, m)
        args, kwargs = _filled((args, kwargs), constants)
        step = Step(a.call, args, kwargs, a.outputs, a.derived)
        if not step.derived and _is_constant(step, few, more):
            made = _several(step.call(*args, **kwargs))
            constants |= {
                number: value for number, value in zip(step.outputs, made, strict=False) if number is not None
            }
            continue
        steps.append(step)
    kept, wanted = [], {output}
    for step in reversed(steps):
        if wanted & set(step.outputs):
            kept.append(step)
            wanted |= set(step.reads)
    held = {0} | {number for step in kept for number in values_of(step)}
    return Tape(kept[::-1], output, few.shapes, few.derived & held, few.switches & held, handed=few.handed)


def _is_constant(step: Step, few: Recorder, more: Recorder) -> bool:
    """Return whether a step that no image has a part in gives the same for any number of images."""
    leaves = tree_flatten((step.args, step.kwargs))[0]
    return not any(isinstance(one, Ref | Size | Spread) for one in leaves) and all(
        few.shapes[number] == more.shapes[number] for number in step.outputs if number is not None
    )


def _filled(value: Any, constants: Mapping[int, Tensor]) -> Any:
    leaves, spec = tree_flatten(value)
    filled = [constants.get(one.value, one) if isinstance(one, Ref) else one for one in leaves]
    return tree_unflatten(filled, spec)


def _generalised(one: Any, other: Any, n: int, m: int) -> Any:
    """Return arguments with a `Size` where two runs on n and on m images differ."""
    (left, spec), (right, _) = tree_flatten(one), tree_flatten(other)
    return tree_unflatten([_joined(a, b, n, m) for a, b in zip(left, right, strict=True)], spec)


def _joined(a: Any, b: Any, n: int, m: int) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
        return _spread(a, b, n, m)
    if not isinstance(a, int) or isinstance(a, bool) or a == b or n == m:
        return a
    slope, rest = divmod(b - a, m - n)
    if rest:
        raise CouldNotTell("the network's graph cannot be read: its sizes do not grow with the images")
    return Size(slope, a - slope * n)


def _spread(a: Tensor, b: Tensor, n: int, m: int) -> Spread:
    """Return what stands for a tensor that has as many equal rows as there are images."""
    rows, one = a.shape[0] // n, a[:1]
    grows = a.shape[0] == rows * n and b.shape[0] == rows * m and a.shape[1:] == b.shape[1:]
    if not grows or not torch.equal(a, one.expand_as(a)) or not torch.equal(b, one.expand_as(b)):
        raise CouldNotTell("the network's graph cannot be read: its sizes do not grow with the images")
    return Spread(one.clone(), rows)


def values_of(step: Step) -> Iterator[int]:
    """Yield the numbers of the values that a step makes."""
    yield from (number for number in step.outputs if number is not None)


def as_call(step: Step) -> Any:
    """Return a step's operator with its type left open."""
    return cast(Any, step.call)
