"""Which of a model's outputs are its scores, and what it does to them at its end.

A final clip, softmax, hyperbolic tangent, rounding or quantisation keeps the order of the classes and hides
how far they are apart. Where a network can be followed, such an end is left out, and scores come from before
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.models.errors import NotExamined
from doorward.models.spec import Output

#: A key, attribute or position on the way to an output.
Key = str | int
#: How deep outputs may be nested.
_DEEPEST = 3


@dataclass(frozen=True)
class Candidate:
    """An output that may be the scores of the classes.

    Attributes:
        name: its name or position, for messages.
        width: how many numbers it has for each input.
        inner: whether another candidate is computed from it.
    """

    name: str
    width: int
    inner: bool = False


@dataclass(frozen=True)
class Choice:
    """Which candidate was taken, and why; there is no reason where it was the only one."""

    position: int
    reason: str | None = None


def choose(candidates: Sequence[Candidate], classes: int | None) -> Choice:
    """Choose the output that holds the scores of the classes.

    The number of classes decides where it is known, then the name `logits`, then which is computed from
    which.

    Args:
        candidates: one at least.
        classes: how many classes there are, if anything states it.

    Raises:
        InputError: if none fits, or several do.
    """
    if len(candidates) == 1:
        return Choice(0)
    listed = ", ".join(f"{one.name} ({one.width} numbers)" for one in candidates[:6])
    widths = {classes, 1} if classes == 2 else {classes}  # one number tells two classes apart
    pool = [i for i, one in enumerate(candidates) if classes is None or one.width in widths]
    if not pool:
        raise InputError(f"the model gives {listed}; none fits {classes} classes: are the labels right?")
    if len(pool) == 1:
        return Choice(pool[0], f"it alone has {candidates[pool[0]].width} numbers for {classes} classes")
    named = [i for i in pool if candidates[i].name == "logits"]
    if len(named) == 1:
        return Choice(named[0], "it is named so")
    last = [i for i in pool if not candidates[i].inner]
    if len(last) == 1:
        return Choice(last[0], "it is computed from the others")
    raise InputError(
        f"the model gives {listed}, and nothing tells which are the scores of its classes: state --labels, "
        "as many as there are classes, or give a model with one output"
    )


def refuse_places(scores: Sequence[int], others: Mapping[str, Sequence[int]], classes: int | None) -> None:
    """Raise where scores are of places in an image, as of a network that finds objects, and not of classes.

    Args:
        scores: sizes of the output that was taken for the scores.
        others: sizes of the model's other outputs.
        classes: how many classes there are, if anything states it.

    Raises:
        NotExamined: if the scores have an axis for the place, and another output has more numbers for each;
            or if it has four, the corners of a box.
    """
    width = math.prod(scores[1:])
    for name, shape in others.items():
        if width in (1, classes) or len(shape) != 3 or shape[1] != width:
            continue
        if shape[2] == 4 or (shape[2] > 1 and len(scores) == 3):
            raise NotExamined(
                f"only its file was examined: for each of {width} places in an image the model gives a "
                f"score, and {shape[2]} numbers more ({name}): it finds objects, and is no classifier of "
                "images"
            )


def told(names: Sequence[str], taken: str, reason: str) -> str:
    """Return the note of which output was taken."""
    return f"of the model's outputs {', '.join(names)}, {taken} was taken for the scores, since {reason}"


def leaves(y: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Tensor]]:
    """Yield the tensors in a model's output, each with the way to it."""
    if isinstance(y, Tensor):
        yield path, y
    elif len(path) < _DEEPEST:
        inner: Sequence[tuple[Key, Any]] = ()
        if isinstance(y, Mapping):
            inner = [(key, value) for key, value in y.items() if isinstance(key, str | int)]
        elif hasattr(y, "_fields"):
            inner = list(zip(y._fields, y, strict=True))
        elif isinstance(y, tuple | list):
            inner = list(enumerate(y))
        elif isinstance(attributes := getattr(y, "__dict__", None), dict):
            inner = list(attributes.items())
        for key, value in inner:
            yield from leaves(value, (*path, key))


def follow(y: Any, path: Sequence[Key]) -> Tensor:
    """Return the tensor at the end of a way.

    Raises:
        InputError: if the output has no such part, unlike the one that the way was found in.
    """
    for key in path:
        try:
            named = isinstance(key, str) and not isinstance(y, Mapping)
            y = getattr(y, str(key)) if named else y[key]
        except (AttributeError, LookupError, TypeError) as error:
            raise InputError(f"the model gives outputs without {key!r}, which it gave at first") from error
    if not isinstance(y, Tensor):
        raise InputError(f"the model gives a {type(y).__name__} where it gave a tensor at first")
    return y


def usual_path(y: Any) -> tuple[Key, ...] | None:
    """Return the way to a module's scores where nothing else is said: itself, `.logits`, or the first."""
    if isinstance(y, Tensor):
        return ()
    if isinstance(getattr(y, "logits", None), Tensor):
        return ("logits",)
    if isinstance(y, tuple | list) and y and isinstance(y[0], Tensor):
        return (0,)
    return None


def choose_leaf(y: Any, n: int, classes: int | None) -> tuple[tuple[Key, ...], str | None]:
    """Return the way to the scores in a module's output for n inputs, and the note of what was chosen.

    Args:
        y: with gradients, where it is to be told which output is computed from which.

    Raises:
        InputError: if there is none, or nothing tells which it is.
        NotExamined: if the model finds objects.
    """
    if isinstance(y, Tensor):
        return (), None
    every = {_spelt(path): leaf for path, leaf in leaves(y)}
    found = [(path, leaf) for path, leaf in leaves(y) if _is_row(leaf, n)]
    if not found:
        raise InputError(f"the model gives a {type(y).__name__}, not a tensor of logits (n, classes)")
    tensors = [leaf for _, leaf in found]
    names = [_spelt(path) for path, _ in found]
    candidates = [
        Candidate(name, leaf.numel() // n, _is_inner(leaf, tensors))
        for name, leaf in zip(names, tensors, strict=True)
    ]
    choice = choose(candidates, classes)
    shapes = {name: leaf.shape for name, leaf in every.items()}
    refuse_places(shapes[names[choice.position]], shapes, classes)
    note = told(names, names[choice.position], choice.reason) if choice.reason else None
    return found[choice.position][0], note


def _spelt(path: Sequence[Key]) -> str:
    return ".".join(map(str, path)) if isinstance(path[0], str) else f"number {path[0]}"


def _is_row(x: Tensor, n: int) -> bool:
    return x.is_floating_point() and x.ndim > 1 and len(x) == n and x.numel() == n * max(x.shape[1:]) > 0


def _is_inner(x: Tensor, others: Sequence[Tensor]) -> bool:
    """Return whether another tensor is computed from x, as far as gradients tell."""
    if not x.requires_grad:
        return False
    last = [other for other in others if other is not x and other.requires_grad]
    with torch.enable_grad():
        return any(
            torch.autograd.grad(other.sum(), x, retain_graph=True, allow_unused=True)[0] is not None
            for other in last
        )


# --- the end of a network ----------------------------------------------------------------------------------

#: Functions of one class's score that never fall, by any of the names that they go by. What they do can be
#: left out: they bound, round or bend scores, and keep their order.
SQUASHES = frozenset(
    {
        "atan", "arctan", "ceil", "clamp", "clamp_max", "clamp_min", "clip", "clip_by_value", "erf", "floor",
        "hardsigmoid", "hardtanh", "quantize", "relu", "relu6", "round", "sigmoid", "softplus", "softsign",
        "tanh", "trunc",
    }
)  # fmt: skip
#: Functions that make rows of scores sum to one.
SOFTMAXES = frozenset({"softmax", "log_softmax", "logsoftmax"})
#: Those of one number that say how likely the second of two classes is.
SIGMOIDS = frozenset({"sigmoid"})
#: Those that do no more than bound or bend one number around 0, so that its sign stays.
ODD = frozenset({"atan", "arctan", "erf", "hardtanh", "softsign", "tanh"})
#: Those that are left out with a softmax or sigmoid before them, and stay without one.
LOGARITHMS = frozenset({"log"})
#: What some are called where it is told.
_SPOKEN = {"clamp": "clip", "quantize": "quantisation", "relu": "ReLU", "relu6": "ReLU6", "round": "rounding"}
#: What is nothing to tell of: no two scores become one but by rounding in the last digits.
_EXACT = SOFTMAXES | SIGMOIDS | LOGARITHMS


class Followed(Protocol):
    """A network whose end can be left out."""

    def strip_end(self, classes: int) -> tuple[str, ...]:
        """Leave out what squashes scores at the end from now on; return its names, in order."""

    def restore_end(self) -> None:
        """Take back what `strip_end` did."""


@dataclass(frozen=True)
class End:
    """What a model's outputs are once its end is left out.

    Attributes:
        output: what the scores from before it are.
        read: whether the network itself says so: it ended in a softmax or a sigmoid.
        notes: what was left out, where that is worth telling.
    """

    output: Output
    read: bool
    notes: tuple[str, ...] = ()


def strip_end(model: Followed, run: Callable[[], Tensor], y: Tensor, output: Output) -> End | None:
    """Leave out what squashes the scores at the end of a network, if that changes no order of classes.

    Args:
        run: gives the outputs (n, k) of a trial once more.
        y: the outputs (n, k) of the trial before.
        output: what they are.

    Returns:
        None where nothing was left out.
    """
    names = model.strip_end(y.shape[1])
    if not names:
        return None
    try:
        z = run()
    except (Exception, SystemExit):  # a network that does not run without its end keeps it
        z = y[:0]
    end = _meaning(names, z, output) if z.shape == y.shape and keeps_order(z, y) else None
    if end is None:
        model.restore_end()
    return end


def _meaning(names: Sequence[str], z: Tensor, output: Output) -> End | None:
    """Return what scores (n, k) mean that come from before an end; None if that is not known."""
    kinds = set(names)
    lossy = ", ".join(dict.fromkeys(_SPOKEN.get(name, name) for name in names if name not in _EXACT))
    told = (f"scores are taken from before the model's final {lossy}, which hides how far they go",)
    notes = told if lossy else ()
    if z.shape[1] == 1:
        if kinds & SIGMOIDS:
            return End("one_logit", True, notes)
        kept = output == "one_logit" and kinds <= ODD | {"quantize"}
        return End(output, False, notes) if kept else None
    if kinds & (SOFTMAXES | SIGMOIDS):
        return End("logits", True, notes)
    if output == "probabilities" and not bool(((z >= 0) & (z <= 1)).all()):
        return None
    return End(output, False, notes)


def keeps_order(z: Tensor, y: Tensor) -> bool:
    """Return whether scores z (n, k) rank classes as y does, but for ties in y and for rounding."""
    if not bool(torch.isfinite(z).all()):
        return False
    if z.shape[1] == 1:
        return True
    y = y.nan_to_num()
    near = 1e-5 * (y.amax(1) - y.amin(1)).clamp_min(torch.finfo(y.dtype).tiny)  # (n,)
    ranked = y.gather(1, z.argsort(1))  # (n, k), from the lowest score on
    falls = ranked.cummax(1).values - ranked  # (n, k)
    return bool((falls <= near[:, None]).all())
