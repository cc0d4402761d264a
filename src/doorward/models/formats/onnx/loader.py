"""ONNX files: looked at, read safely, and made into classifiers."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from doorward.core.contents import kind_of
from doorward.core.errors import InputError, MissingExtra
from doorward.models.classifier import Classifier, TorchClassifier, in_batches
from doorward.models.errors import NotExamined
from doorward.models.formats.input_options import (
    first_line,
    guess_layout,
    resolve_output,
    resolve_scores,
    trial_inputs,
)
from doorward.models.formats.onnx.graph import (
    OnnxGraph,
    distance,
    is_row_per_image,
    resolve_batch,
)
from doorward.models.formats.onnx.operators import MOST_ELEMENTS, Unsupported
from doorward.models.outputs import Candidate, choose, refuse_places, told
from doorward.models.spec import InputSpec, Layout

if TYPE_CHECKING:
    import onnx

#: A protobuf file cannot be larger; larger models keep their weights next to it.
MOST_BYTES = 2**31 - 1
#: Nodes that a model may have once its local functions are written out.
MOST_NODES = 200_000
#: How deep functions may call each other: every level takes some of the stack, here and in onnx.
DEEPEST_FUNCTIONS = 100
#: How far a torch graph may be from onnxruntime, as a share of the largest output: models of float32, of
#: half precision, and with quantised numbers (where a tie may be rounded either way).
TOLERANCE = {"float": 1e-4, "half": 2e-2, "quantised": 5e-2}
#: What is said where onnxruntime agrees only if it sums 8-bit products in full.
SATURATES = (
    "on this processor onnxruntime is {:.1%} off the graph that was examined, and agrees with it when told "
    "to sum 8-bit products in full: the model may answer otherwise where it runs"
)
_NUMPY_TYPES: dict[str, type[np.number[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class OnnxValue:
    """An input's or output's name, shape (None for an axis of any size) and number type.

    Shape and type are None where the file does not state them, or where it is no tensor.
    """

    name: str
    shape: Shape | None
    dtype: str | None


@dataclass(frozen=True)
class OnnxInfo:
    """What an ONNX file says of itself.

    Attributes:
        inputs, outputs: without the weights.
        opset: version of ONNX's own operators.
        operators: names of all operators, those of other domains with their domain.
        metadata: the file's own key-value pairs.
        producer: the program that wrote it.
    """

    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    opset: int
    operators: tuple[str, ...]
    metadata: dict[str, str]
    producer: str

    @property
    def input(self) -> OnnxValue:
        """Return the one input.

        Raises:
            InputError: if there are several, or none.
        """
        if len(self.inputs) != 1:
            names = ", ".join(value.name for value in self.inputs) or "none"
            raise NotExamined(
                "only its file was examined: an image classifier has one input; "
                f"this ONNX model has {len(self.inputs)}: {names}"
            )
        return self.inputs[0]

    @property
    def layout(self) -> Layout | None:
        """Return the order of the input's axes, where its shape tells."""
        shape = self.input.shape
        return guess_layout(shape) if shape is not None and len(shape) == 4 else None

    @property
    def image_shape(self) -> Shape:
        """Return (channels, height, width) in the guessed layout (see `shape_in`)."""
        return self.shape_in(self.layout or "NCHW")

    def shape_in(self, layout: Layout) -> Shape:
        """Return (channels, height, width) of the input, None where any size goes.

        Raises:
            InputError: if the input is no batch of images.
        """
        shape = self.input.shape or (None, None, None, None)
        if len(shape) != 4:
            raise NotExamined(
                "only its file was examined: an image classifier takes (n, channels, height, width); "
                f"the input {self.input.name!r} of this ONNX model is {_words(shape)}"
            )
        _, a, b, c = shape
        return (c, a, b) if layout == "NHWC" else (a, b, c)


def inspect_onnx(path: Path) -> OnnxInfo:
    """Read what an ONNX file says of itself; no weights outside of the file are read.

    Raises:
        InputError: if it is no ONNX file.
        MissingExtra: if the package onnx is not installed.
    """
    return _describe(_parse(path))


def load_onnx(
    path: Path,
    spec: InputSpec,
    classes: Sequence[str] | None = None,
    *,
    features: str | None = None,
    threads: int | None = None,
) -> Classifier:
    """Load an ONNX classifier as a torch graph with gradients, or else to run in onnxruntime.

    The torch graph's outputs for random images are compared with onnxruntime's, where that is installed. A
    model that has an operator without a torch form, or whose outputs differ, runs in onnxruntime: it gives
    probabilities and no gradients, and its `limitation` says why. Where onnxruntime itself is wrong, as
    8-bit products are on some processors, it is asked once more with these in full, and `notes` says so.
    Where the graph ends in a softmax, a clip or in anything else that squashes scores, the torch graph gives
    the scores before that (see `doorward.models.outputs`). Pixels of whole-number types are rounded, and the
    gradient passes straight through.

    Args:
        path: the file; weights next to it are read from its own folder only.
        spec: what the model takes.
        classes: class names; numbers if None.
        features: name of a graph value that holds the features, if it is not the last linear layer's input.
        threads: number of threads of onnxruntime; those of torch if None.

    Raises:
        InputError: if it is no ONNX image classifier, or does not take what the spec says.
        MissingExtra: if the package onnx, or onnxruntime where it is needed, is not installed.
    """
    model = _parse(path)
    info = _describe(model)
    batch = _check(path, info, spec)
    model = _inlined(path, model)
    _load_weights(path, model)
    tolerance = _tolerance(model, info)
    reference: OnnxRuntimeClassifier | InputError
    try:
        reference = OnnxRuntimeClassifier(path, spec, classes, batch=batch or 1, threads=threads)
    except InputError as error:
        reference = error
    # the graph itself takes whole-number pixels as floats
    own = spec.model_copy(update={"dtype": "float32"}) if spec.dtype == "uint8" else spec
    x = own.to_model(trial_inputs(own))
    try:
        graph = _read_graph(model, batch, own, features, None if classes is None else len(classes))
        del model  # its weights are in the graph now
        settled = resolve_batch(graph, x, batch or 1)
        if isinstance(reference, OnnxRuntimeClassifier):
            apart = _distance(settled.outputs, reference.outputs(x, graph.output))
            if apart > tolerance:
                wide = partial(
                    OnnxRuntimeClassifier,
                    path,
                    spec,
                    classes,
                    batch=batch or 1,
                    threads=threads,
                    wide_products=True,
                )
                if (
                    not _has_integer_products(info)
                    or _off(settled.outputs, wide, x, graph.output) > tolerance
                ):
                    raise Unsupported(f"the torch graph's outputs are {apart:.1%} off those of onnxruntime")
                graph.notes = (*graph.notes, SATURATES.format(apart))
    except Unsupported as why:
        if not isinstance(reference, OnnxRuntimeClassifier):
            raise NotExamined(f"{path}: {why}; it would run in onnxruntime instead, but {reference}") from why
        reference.limitation = f"it runs in onnxruntime: {why}"
        return reference
    scores = resolve_scores(
        path, own, settled.outputs, classes, graph, lambda: resolve_batch(graph, x, batch or 1).outputs
    )
    classifier = TorchClassifier(
        graph.eval(),
        scores.spec,
        scores.classes,
        feature_layer=graph.feature_layer,
        format="onnx",
        architecture=f"ONNX graph, opset {info.opset}" + (f", by {info.producer}" if info.producer else ""),
        batch=settled.batch,
    )
    classifier.notes = (*graph.notes, *scores.notes)
    return classifier


class OnnxRuntimeClassifier(Classifier):
    """Run an ONNX classifier in onnxruntime: probabilities, no gradients.

    Args:
        path: the file, already checked.
        spec: what the model takes.
        classes: class names; numbers if None.
        batch: number of images that the graph is sure to take at a time.
        threads: number of threads; those of torch if None.
        wide_products: whether 8-bit products are summed in full. By its defaults, onnxruntime stops such
            sums at 16 bits on x86 processors without VNNI:
            https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Raises:
        InputError: if onnxruntime cannot run the model, or it has no output of shape (n, k).
        MissingExtra: if onnxruntime is not installed.
    """

    capabilities = frozenset({"probabilities"})
    format = "onnx"
    architecture = "ONNX graph, run by onnxruntime"

    def __init__(
        self,
        path: Path,
        spec: InputSpec,
        classes: Sequence[str] | None = None,
        *,
        batch: int = 1,
        threads: int | None = None,
        wide_products: bool = False,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra("onnxruntime", "onnx", "running an ONNX model without torch")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        # as the file says: some rewritings change outputs (1.31 joins a Pad of zeros to a MaxPool)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if wide_products:  # it is a rewriting too
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4  # fatal alone: errors come as exceptions
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=False
            )  # its fallback prints on standard output
            source, *_ = self._session.get_inputs()
            self._input, kind = source.name, source.type
        except Exception as error:  # onnxruntime's own exceptions have no base in common
            raise InputError(f"onnxruntime cannot load it: {first_line(error)}") from error
        if kind not in _NUMPY_TYPES:
            raise InputError(f"onnxruntime wants an input of type {kind}, which numpy has not")
        self.spec = spec
        self._type = _NUMPY_TYPES[kind]
        grey = spec.to_model(torch.full((batch, *spec.shape), 0.5))
        self.output = self._choose_output(grey, None if classes is None else len(classes))
        x = spec.to_model(trial_inputs(spec))
        settled = resolve_batch(lambda group: self._infer(group, self.output), x, batch)
        self._batch = settled.batch
        self.spec, self.classes = resolve_output(path, spec, settled.outputs.flatten(1), classes)

    def _choose_output(self, x: Tensor, classes: int | None) -> str:
        shapes, rows = dict[str, tuple[int, ...]](), []
        for output in self._session.get_outputs():
            if "float" in output.type or "double" in output.type:
                shape = tuple(self._infer(x, output.name).shape)
                shapes[str(output.name)] = shape
                if is_row_per_image(shape, len(x)):
                    rows.append(Candidate(str(output.name), math.prod(shape[1:])))
        if not rows:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise NotExamined(
                f"only its file was examined: it has no output of shape (n, classes), but {listed or 'none'}"
            )
        choice = choose(rows, classes)
        taken = rows[choice.position].name
        refuse_places(shapes[taken], shapes, classes)
        if choice.reason:
            self.notes = (told([row.name for row in rows], taken, choice.reason),)
        return taken

    def _infer(self, x: Tensor, output: str) -> Tensor:
        array = x.detach().cpu()
        array = array.round() if np.issubdtype(self._type, np.integer) else array
        given = {self._input: array.numpy().astype(self._type)}
        try:
            return torch.from_numpy(self._session.run([output], given)[0])
        except Exception as error:
            raise InputError(f"onnxruntime cannot run it: {first_line(error)}") from error

    def outputs(self, x: Tensor, name: str) -> Tensor:
        """Return one of the model's outputs (n, k) for its own inputs.

        Raises:
            InputError: if onnxruntime cannot compute it.
        """
        return in_batches(lambda group: self._infer(group, name), x, self._batch).flatten(1)

    def _run(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.output).to(self.device)


# --- reading -----------------------------------------------------------------------------------------------


def _parse(path: Path) -> onnx.ModelProto:
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtra("onnx", "onnx", "reading ONNX files")
    import onnx

    if not path.is_file():
        raise InputError(f"{path}: expected an ONNX file, but there is no such file")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: an ONNX file has at most 2 GB; larger models keep their weights beside it")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, of whichever of its implementations
        kind = kind_of(path)
        why = f"it is {kind}" if kind else f"{first_line(error)}; it may be cut off, or of another format"
        raise InputError(f"{path} is no ONNX model: {why}") from error
    if not (model.ir_version and model.opset_import and model.graph.node and model.graph.output):
        raise InputError(f"{path} is no ONNX model: it has no graph")
    graphs = (model.graph, *model.functions)
    nodes = [node for graph in graphs for node in _nodes(graph)]
    words = [word for n in nodes for word in (n.op_type, n.domain, n.name, *n.input, *n.output)]
    values = [*model.graph.input, *model.graph.output, *model.graph.initializer]
    words += [value.name for value in values]
    if not all(isinstance(word, str) and word.isprintable() for word in words):
        raise InputError(f"{path} is no ONNX model: it has names that are no text")
    if twice := _named_twice(model):
        raise InputError(
            f"{path} is no ONNX model: {twice!r} is made twice, and readers may differ in which counts"
        )
    newest = onnx.defs.onnx_opset_version()
    if any(opset.domain in ("", "ai.onnx") and opset.version > newest for opset in model.opset_import):
        raise InputError(
            f"{path}: its operators are of a version after {newest}; a newer onnx package may read it"
        )
    return model


def _named_twice(model: onnx.ModelProto) -> str | None:
    """Return a name that several nodes or weights of one graph give, None if there is none."""
    for graph in (model.graph, *model.functions):
        weights = [tensor.name for tensor in getattr(graph, "initializer", ())]
        counts = Counter([*weights, *(name for node in graph.node for name in node.output if name)])
        if twice := [name for name, count in counts.items() if count > 1]:
            return str(twice[0])
    return None


def _describe(model: onnx.ModelProto) -> OnnxInfo:
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    operators = {
        f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for nodes in (graph, *model.functions)
        for node in _nodes(nodes)
    }
    return OnnxInfo(
        inputs=tuple(_value(value) for value in graph.input if value.name not in weights),
        outputs=tuple(_value(value) for value in graph.output),
        opset=opsets.get("", opsets.get("ai.onnx", 1)),
        operators=tuple(sorted(operators)),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
    )


def _value(value: onnx.ValueInfoProto) -> OnnxValue:
    from onnx import TensorProto

    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in TensorProto.DataType.values():
        return OnnxValue(value.name, None, None)
    name = TensorProto.DataType.Name(kind.elem_type).lower()
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if not kind.HasField("shape"):
        return OnnxValue(value.name, None, dtype)
    return OnnxValue(
        value.name, tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim), dtype
    )


def _nodes(owner: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes of a graph or function, those of inner graphs too."""
    for node in owner.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _maps(path: Path, info: OnnxInfo) -> str:
    """Say what to do with a model that gives dictionaries, one an image, from class to probability."""
    if not any(name.endswith(("Conv", "Gemm", "MatMul")) for name in info.operators):
        return (
            f"{path}: a scikit-learn pipeline that gives dictionaries; "
            "convert it again with options={'zipmap': False}"
        )
    return (
        f"{path}: the network ends in a ZipMap, which gives dictionaries; cut that off: "
        f"onnx.utils.extract_model({path.name!r}, 'cut.onnx', [{info.input.name!r}], [NAME]), where NAME is "
        "the ZipMap's input"
    )


def _check(path: Path, info: OnnxInfo, spec: InputSpec) -> int | None:
    """Return the fixed batch size, if there is one, of a model that takes what the spec says."""
    if "ai.onnx.ml.ZipMap" in info.operators:
        raise NotExamined(_maps(path, info))
    declared = info.shape_in(spec.layout)
    if any(d is not None and d != s for d, s in zip(declared, spec.shape, strict=True)):
        raise InputError(
            f"{path}: the model takes images of (channels, height, width) = {_words(declared)}, "
            f"not {spec.shape}"
        )
    shape = info.input.shape
    batch = shape[0] if shape else None
    if batch is not None and batch * math.prod(spec.shape) > MOST_ELEMENTS:
        raise InputError(f"{path}: the model takes {batch:,} images at a time, which is too many")
    return batch


def _words(shape: Shape) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """Write out the calls of the model's own functions, if they are not endless or too many."""
    if not model.functions:
        return model
    from onnx import inliner

    bodies = {(f.domain, f.name): [(n.domain, n.op_type) for n in _nodes(f)] for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def count(key: tuple[str, str], inside: tuple[tuple[str, str], ...]) -> int:
        if key in inside:
            raise InputError(f"{path}: the function {key[1]!r} calls itself")
        if len(inside) >= DEEPEST_FUNCTIONS:
            raise InputError(
                f"{path}: the model's functions call each other more than {DEEPEST_FUNCTIONS} levels deep"
            )
        if key not in sizes:
            sizes[key] = sum(count(k, (*inside, key)) if k in bodies else 1 for k in bodies[key])
        return sizes[key]

    keys = [(node.domain, node.op_type) for node in _nodes(model.graph)]
    if sum(count(key, ()) if key in bodies else 1 for key in keys) > MOST_NODES:
        raise InputError(
            f"{path}: the model has more than {MOST_NODES} operators once its functions are written out"
        )
    try:
        inlined: onnx.ModelProto = inliner.inline_local_functions(model)
    except Exception as error:  # raised from C++ in several kinds
        raise InputError(f"{path}: its functions cannot be written out: {first_line(error)}") from error
    return inlined


def _load_weights(path: Path, model: onnx.ModelProto) -> None:
    """Read the weights that lie next to the file, from its own folder only."""
    from onnx import TensorProto

    owners = [model.graph]
    tensors: list[onnx.TensorProto] = []
    while owners:
        graph = owners.pop()
        tensors += graph.initializer
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("g"):
                owners.append(attribute.g)
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.raw_data = _read_beside(path, tensor)
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def _read_beside(path: Path, tensor: onnx.TensorProto) -> bytes:
    from onnx import helper

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if Path(location).is_absolute():
        raise InputError(
            f"{path}: refused, its weights {tensor.name!r} are named by an absolute path, {location!r}: they "
            "have to lie beside the file"
        )
    file = (path.parent / location).resolve()
    # the second folder is where a link to the model leads, as in a cache of downloads
    folders = (path.parent.resolve(), path.resolve().parent)
    if not location or not any(file.is_relative_to(folder) for folder in folders):
        raise InputError(
            f"{path}: refused, its weights {tensor.name!r} lie outside its own folder: {location!r}"
        )
    if not file.is_file():
        raise InputError(
            f"{path}: its weights {tensor.name!r} are missing: there is no file {location!r} beside it"
        )
    try:
        size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its weights {tensor.name!r} are ill described: {first_line(error)}"
        ) from error
    if length != size or not 0 <= offset <= offset + length <= file.stat().st_size:
        raise InputError(
            f"{path}: its weights {tensor.name!r} need {size} bytes of {location!r}, which states {length} "
            f"from {offset} on and has {file.stat().st_size}"
        )
    with file.open("rb") as data:
        data.seek(offset)
        content: bytes = data.read(length)
    return content


# --- making a torch graph ----------------------------------------------------------------------------------


def _read_graph(
    model: onnx.ModelProto, batch: int | None, spec: InputSpec, features: str | None, classes: int | None
) -> OnnxGraph:
    channels, height, width = spec.shape
    image = (height, width, channels) if spec.layout == "NHWC" else spec.shape
    if batch is not None:
        return OnnxGraph(model, (batch, *image), fixed=True, features=features, classes=classes)
    try:
        return OnnxGraph(model, (2, *image), features=features, classes=classes)
    except Unsupported as why:
        try:  # a batch of any size is declared, but the graph may hold a reshape for one image
            return OnnxGraph(model, (1, *image), fixed=True, features=features, classes=classes)
        except Unsupported:
            raise why from None


def _tolerance(model: onnx.ModelProto, info: OnnxInfo) -> float:
    half = {10, 16}
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if any("Quantize" in name or "QLinear" in name or "Integer" in name for name in info.operators):
        return TOLERANCE["quantised"]
    return TOLERANCE["half" if kinds & half or info.input.dtype in ("float16", "bfloat16") else "float"]


def _distance(y: Tensor, expected: Tensor) -> float:
    apart = distance(y, expected.to(y.dtype))
    return math.inf if math.isnan(apart) else apart


def _off(y: Tensor, runtime: Callable[[], OnnxRuntimeClassifier], x: Tensor, output: str) -> float:
    """Return how far outputs are from those of a runtime; infinite if it cannot run the model."""
    try:
        return _distance(y, runtime().outputs(x, output))
    except InputError:  # of weights that nodes share, it makes two of one name
        return math.inf


def _has_integer_products(info: OnnxInfo) -> bool:
    return any(word in name for name in info.operators for word in ("QLinear", "Integer", "QGemm"))
