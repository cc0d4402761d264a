"""What is stated about a model's input and output, where from, and what had to be assumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.models.encode.dispatch import NOUNS
from doorward.models.errors import NotExamined
from doorward.models.outputs import Followed, strip_end
from doorward.models.spec import DTYPES, ChannelOrder, InputSpec, Layout, Output, Resize

#: Name of the file next to a model (or in its directory) that describes it.
SIDECAR = "doorward.json"
_NORMALISATION = ("range", "mean", "std")
#: A larger mean of pixels from 0 to 1 is none.
_LARGEST_MEAN = 2.0
#: Numbers in one image beyond which a stated size is taken for a mistake (4096 x 4096, four channels).
_MOST_NUMBERS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the user states of a model; it goes before whatever the files say.

    Attributes:
        input_range: (low, high) that images are stretched to before mean and std.
        mean, std: one value, or one per channel.
        layout: order of the axes that the model takes.
        labels: class names.
        output: what the model gives.
        features: name of the layer whose input are the features.
        size: (channels, height, width), where the file does not tell.
        channel_order: order of the colours that the model takes.
        resize: what images are resized to: one number for the shorter side, or (height, width). What is then
            larger than the model's images is cropped around the centre.
    """

    input_range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Layout | None = None
    labels: tuple[str, ...] | None = None
    output: Output | None = None
    features: str | None = None
    size: tuple[int, int, int] | None = None
    channel_order: ChannelOrder | None = None
    resize: tuple[int, ...] | None = None

    def statement(self) -> dict[str, Any]:
        """Return the options as fields of an input spec."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        size = given.pop("size")
        given |= dict(zip(("channels", "height", "width"), size, strict=True)) if size else {}
        given["range"] = given.pop("input_range")
        del given["labels"], given["features"]
        return {name: value for name, value in given.items() if value is not None}


def refuse_statements(options: LoadOptions, modality: str, path: Path) -> None:
    """Raise if anything is stated of a model's images that takes none.

    Raises:
        InputError: naming the option.
    """
    for name in options.statement():
        if name != "output":
            sizes = dict.fromkeys(("channels", "height", "width"), "--size")
            option = {"range": "--input-range", "channel_order": "--channels"} | sizes
            stated = option.get(name, f"--{name}")
            raise InputError(f"{path}: {stated} goes with models of images; this one takes {modality}")


class Sidecar(BaseModel):
    """What `doorward.json` states: any fields of an input spec, and class names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["doorward"] = "doorward"
    version: Literal[1] = 1
    input: dict[str, Any] = Field(default_factory=dict)
    classes: tuple[str, ...] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: if the file is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def read_sidecar(path: Path) -> Sidecar:
    """Read the `doorward.json` of a model file or directory; an empty one where there is none.

    Raises:
        InputError: if it is there but cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / SIDECAR
    return parse_sidecar(read_json(file), file) if file.is_file() else Sidecar()


def parse_sidecar(value: dict[str, Any], file: Path) -> Sidecar:
    """Check a description that was read from a file.

    Raises:
        InputError: naming the field that does not fit.
    """
    try:
        sidecar = Sidecar.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{file}: {describe_validation(error)}") from error
    unknown = sorted(set(sidecar.input) - set(InputSpec.model_fields))
    if unknown:
        raise InputError(
            f"{file}: input has no field {unknown[0]!r}; it has: {', '.join(InputSpec.model_fields)}"
        )
    return sidecar


def describe_validation(error: ValidationError) -> str:
    """Return a validation error's first complaint in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, 200 characters at most."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0].strip() if lines else type(error).__name__)[:200]


def resolve_spec(path: str | Path, facts: Mapping[str, Any], *statements: Mapping[str, Any]) -> InputSpec:
    """Join what the file fixes and what is stated about a model's input into one spec.

    The first statement that has a field decides; none may contradict a fact. Range, mean and std go
    together: whoever states one of them leaves the others neutral. What nobody states is assumed and marked
    so: pixels in [0, 1], channels first, outputs that are logits.

    Raises:
        InputError: if the size is unknown, or the fields do not fit together.
    """
    merged: dict[str, Any] = dict(facts)
    for statement in statements:
        for name, value in statement.items():
            if name in facts and value != facts[name]:
                raise InputError(f"{path}: {name} is {facts[name]} by the file itself, {value} was stated")
            merged.setdefault(name, value)
    if isinstance(merged.get("resize"), tuple | list):
        merged |= _resizing(path, merged)
    missing = [name for name in ("channels", "height", "width") if name not in merged]
    if missing:
        raise InputError(
            f"{path}: nothing says how large its images are ({', '.join(missing)}); "
            f"state the size (--size C,H,W), or write {SIDECAR} beside it"
        )
    assumed = list(merged.pop("assumed", ()))
    if not any(name in merged for name in _NORMALISATION):
        assumed += _NORMALISATION
        if merged.get("dtype") == "uint8":
            merged["range"] = (0.0, 255.0)
    assumed += [name for name in ("layout", "output") if name not in merged]
    try:
        spec = InputSpec(**merged, assumed=tuple(dict.fromkeys(assumed)))
    except ValidationError as error:
        raise InputError(f"{path}: the input spec does not fit: {describe_validation(error)}") from error
    if "range" not in merged and max(map(abs, spec.mean)) > _LARGEST_MEAN:
        raise InputError(
            f"{path}: mean {spec.mean[0]:g} is of pixels from 0 to 255, and images are taken from 0 to 1: "
            "add --input-range 0,255, or divide mean and std by 255"
        )
    sizes = [(spec.height, spec.width), *([(spec.resize.height, spec.resize.width)] if spec.resize else [])]
    height, width = max(sizes, key=math.prod)
    if height * width * spec.channels > _MOST_NUMBERS:
        raise InputError(f"{path}: images of {width}x{height} with {spec.channels} channel(s) are too large")
    return spec


def _resizing(path: str | Path, merged: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resizing that one number or two state, and the size of the images where nothing else does.

    Raises:
        InputError: if the images become smaller than those that the model takes.
    """
    stated = [int(number) for number in merged["resize"]]
    if len(stated) not in (1, 2) or min(stated) < 1:
        raise InputError(f"{path}: resize takes one side or height and width, got {merged['resize']!r}")
    height, width = stated if len(stated) == 2 else stated * 2
    own = merged.get("height", height), merged.get("width", width)
    if height < own[0] or width < own[1]:
        raise InputError(
            f"{path}: resized to {width}x{height}, images are smaller than those that the model takes, "
            f"{own[1]}x{own[0]}"
        )
    # a shorter side alone leaves the longer one to be cropped
    cut = len(stated) == 1 or (height, width) != own
    resize = Resize(height=height, width=width, shortest_edge=len(stated) == 1, crop=own if cut else None)
    return {"resize": resize, "height": own[0], "width": own[1]}


def trial_inputs(spec: InputSpec, n: int = 4) -> Tensor:
    """Return n inputs (n, c, h, w) in [0, 1], always the same: black, white, and noise."""
    x = torch.rand((n, *spec.trial_shape), generator=make_generator(0, "trial inputs"))
    x[0], x[1 % n] = 0.0, 1.0
    return x


def try_outputs(
    path: str | Path,
    spec: InputSpec,
    run: Callable[[Tensor], Tensor],
    *,
    n: int = 4,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Run a model on its own kind of input and return its own outputs (n, k).

    Raises:
        InputError: if it does not run, or gives no row of outputs for each image.
    """
    x = spec.to_model(trial_inputs(spec, n).to(device))
    try:
        with torch.no_grad():
            y = run(x)
    except InputError as error:
        kind = NotExamined if isinstance(error, NotExamined) else InputError
        raise kind(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    except (Exception, SystemExit) as error:  # whatever a foreign model raises: it does not take this input
        size = f"{spec.channels}x{spec.height}x{spec.width} ({spec.layout}, {spec.dtype})"
        what = f"images of {size}" if spec.modality == "image" else NOUNS[spec.modality]
        raise InputError(f"{path}: the model does not run on {what}: {first_line(error)}") from error
    if not y.is_floating_point() and y.numel() == n:
        raise NotExamined(
            f"{path}: the model gives the number of a class for each image, and scores of all classes are "
            "needed: leave the final argmax out"
        )
    real = y.layout == torch.strided and not y.is_meta and y.is_floating_point()
    if not real or y.ndim < 2 or len(y) != n or y.numel() != n * max(y.shape[1:]):
        raise NotExamined(
            f"{path}: a classifier gives one row of outputs (n, k) for each image; "
            f"for {n} images this model gives {tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}"
        )
    return y.flatten(1).float().cpu()


def guess_output(y: Tensor) -> Output:
    """Return what a model's own outputs (n, k) on trial inputs look like.

    One column within [0, 1] is taken for a probability, one column beyond it for a logit. Rows within
    [0, 1] that sum to one, up to the rounding that their values show, are probabilities. Everything else,
    and outputs that are not finite, is logits.
    """
    inside = bool(((y >= 0) & (y <= 1)).all())
    if y.shape[1] == 1:
        return "probabilities" if inside else "one_logit"
    near = inside and bool(((y.sum(1) - 1).abs() < rounding_of_sums(y)).all())
    return "probabilities" if near else "logits"


def rounding_of_sums(y: Tensor) -> float:
    """Return by how much rows of probabilities (n, k) may miss one, by the rounding that their values show.

    Numbers of half precision miss it by two units of their last place at 1. Numbers that are multiples of one
    step, such as those of 8 bits or of two decimals, miss it by less than a step each, if they were cut off;
    by a fifth at most, as logits may lie on a grid too.
    """
    if torch.equal(y, y.half().float()):
        return max(2e-3, _step_of_sums(y))
    if torch.equal(y, y.bfloat16().float()):
        return max(2**-6, _step_of_sums(y))
    return max(1e-3, _step_of_sums(y))


def _step_of_sums(y: Tensor) -> float:
    """Return by how much sums of multiples of one step may miss one; 0 where values are no such multiples."""
    levels = torch.unique(torch.cat([y.double().flatten(), torch.zeros(1)]))
    if len(levels) < 3:
        return 0.0
    for parts in range(1, 9):  # the nearest two of a few values may be some steps apart
        step = float(levels.diff().min()) / parts
        places = levels / step
        if 1 / 1024 < step < 1 / 50 and bool(((places - places.round()).abs() < 5e-3).all()):
            return min(0.2, step * y.shape[1])
    return 0.0


def resolve_output(
    path: str | Path, spec: InputSpec, y: Tensor, labels: Sequence[str] | None
) -> tuple[InputSpec, tuple[str, ...]]:
    """Settle what the outputs (n, k) of a trial mean, and the class names that go with them.

    Raises:
        InputError: if the number of labels, or the stated kind of output, does not fit the outputs.
    """
    assumed = list(spec.assumed)
    output = guess_output(y) if "output" in assumed else spec.output
    if output == "one_logit" and y.shape[1] != 1:
        raise InputError(f"{path}: 'one_logit' is one output for each image; this model gives {y.shape[1]}")
    one_class = output == "logits" and y.shape[1] == 1
    if one_class and (labels is None or len(labels) != 1):
        raise InputError(
            f"{path}: the model gives one output for each image: state what it is (--output one_logit, or "
            "--output probabilities)"
        )
    k = 1 if one_class else max(2, y.shape[1])
    if labels is None:
        assumed.append("labels")
        labels = [str(i) for i in range(k)]
    if len(labels) != k:
        names = f"{len(labels)} label{'' if len(labels) == 1 else 's'}"
        raise InputError(f"{path}: {names} for a model that tells {k} classes apart")
    settled = spec.model_copy(update={"output": output, "assumed": tuple(dict.fromkeys(assumed))})
    return settled, tuple(labels)


@dataclass(frozen=True)
class Scores:
    """What a model's scores mean.

    Attributes:
        spec: what the model takes, and what its scores are.
        classes: class names.
        notes: what was left out or guessed.
    """

    spec: InputSpec
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def resolve_scores(
    path: str | Path,
    spec: InputSpec,
    y: Tensor,
    labels: Sequence[str] | None,
    model: Followed,
    run: Callable[[], Tensor],
) -> Scores:
    """Settle what a network's scores mean, and take them from before what squashes them at its end.

    Args:
        y: its outputs (n, k) in a trial.
        run: gives the outputs (n, k) of the same trial once more.

    Raises:
        InputError: as `resolve_output` does.
    """
    spec, classes = resolve_output(path, spec, y, labels)
    end = strip_end(model, run, y, spec.output)
    if end is None:
        return Scores(spec, classes)
    assumed = tuple(name for name in spec.assumed if not (end.read and name == "output"))
    return Scores(spec.model_copy(update={"output": end.output, "assumed": assumed}), classes, end.notes)


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return a spec's name for a number type, or None if models of images cannot take it."""
    return next((name for name, value in DTYPES.items() if value == dtype), None)


def guess_layout(shape: Sequence[int | None]) -> Layout | None:
    """Return the order of the axes of an input (n, ., ., .) where only one of the two can hold channels.

    >>> guess_layout((None, 3, 32, 32)), guess_layout((1, 224, 224, 3)), guess_layout((1, 3, 32, 3))
    ('NCHW', 'NHWC', None)
    """
    first, last = shape[1] in (1, 3, 4), shape[3] in (1, 3, 4)
    if first == last:
        return None
    return "NCHW" if first else "NHWC"
