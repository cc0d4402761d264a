"""Every ONNX operator against onnxruntime, at the opsets where its form or meaning changed."""

# ruff: noqa: E501  # a table is read by its rows

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from doorward.models.formats.onnx.graph import read_attribute, to_torch
from doorward.models.formats.onnx.operators import OPERATORS, Node, Operation, Unsupported, make_function

onnxruntime = pytest.importorskip("onnxruntime")

NOISE = np.random.default_rng(0)
INT64 = np.int64


def noise(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return NOISE.uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, INT64)


@dataclass
class Case:
    """One node. Inputs are arrays, None where left out; `known` says which do not depend on the image."""

    operator: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    opsets: tuple[int, ...] = (17,)
    known: str = "rest"  # "rest": all but the first; "none": a function of all inputs; "all"
    outputs: int = 1
    domain: str = ""
    tolerance: float = 1e-5

    def __str__(self) -> str:
        words = "-".join(
            f"{k}={v}" for k, v in self.attributes.items() if not isinstance(v, onnx.TensorProto)
        )
        shapes = "x".join(str(list(x.shape)) for x in self.inputs if x is not None)
        return f"{self.operator}-{shapes}-{words}-{self.known}".replace(" ", "")


def session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def reference(case: Case, opset: int) -> list[np.ndarray]:
    """Return what onnxruntime computes."""
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(case.inputs)]
    outputs = [f"o{i}" for i in range(case.outputs)]
    node = helper.make_node(case.operator, names, outputs, domain=case.domain, **case.attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, case.inputs, strict=True)
            if x is not None
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    opsets = [helper.make_opsetid("", opset)]
    if case.domain:
        opsets.append(helper.make_opsetid(case.domain, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 20 else 10)
    feeds = {n: x for n, x in zip(names, case.inputs, strict=True) if x is not None}
    return session(model).run(None, feeds)


def ours(case: Case, opset: int) -> list[torch.Tensor]:
    """Return what the torch function of the node computes."""
    names = tuple(f"i{i}" if x is not None else "" for i, x in enumerate(case.inputs))
    proto = helper.make_node(case.operator, names, ["o"], **case.attributes)
    attributes = {a.name: read_attribute(a) for a in proto.attribute}
    name = f"{case.domain}.{case.operator}" if case.domain else case.operator
    node = Node(name, names, tuple(f"o{i}" for i in range(case.outputs)), attributes, opset)
    real = {n: to_torch(numpy_helper.from_array(x)) for n, x in zip(names, case.inputs, strict=True) if n}
    depends = {"rest": names[:1], "none": names, "all": ()}[case.known]
    values = {n: x.to("meta") if n in depends else x for n, x in real.items()}
    op = Operation(node, values, torch.device("cpu"))
    function = make_function(op)
    given = [real[n] if n else None for n in op.left()]
    result = function(*given)
    several = list(result) if isinstance(result, tuple) else [result]
    if depends:  # the trial run sees the same shapes and types
        trial = function(*[None if x is None else x.to("meta") for x in given])
        for one, other in zip(several, trial if isinstance(trial, tuple) else [trial], strict=True):
            assert one is None or (one.shape == other.shape and one.dtype == other.dtype)
    return several


X = noise(2, 4, 5, 6)
POSITIVE = noise(2, 4, 5, 6, low=0.1, high=3)
UNIT = noise(2, 4, 5, 6, low=-0.9, high=0.9)
NONE = np.zeros(0, np.float32)
WHOLE = NOISE.integers(-9, 9, (2, 3, 4)).astype(INT64)
LOGICAL = NOISE.integers(0, 2, (2, 3, 4)).astype(bool)
IMAGE = noise(2, 3, 8, 9)
SEQUENCE = noise(2, 5, 8)

UNARY = [
    *[
        (name, X)
        for name in [
            "Abs",
            "Ceil",
            "Cos",
            "Cosh",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "Identity",
            "Neg",
            "Relu",
            "Round",
            "Selu",
        ]
    ],
    *[
        (name, X)
        for name in [
            "Sigmoid",
            "Sign",
            "Sin",
            "Sinh",
            "Softplus",
            "Softsign",
            "Tan",
            "Tanh",
            "LeakyRelu",
            "Celu",
        ]
    ],
    *[(name, X) for name in ["HardSigmoid", "ThresholdedRelu", "Shrink", "IsNaN", "IsInf", "Asinh", "Atan"]],
    *[(name, POSITIVE) for name in ["Log", "Sqrt", "Reciprocal"]],
    *[(name, UNIT) for name in ["Acos", "Asin", "Atanh"]],
    ("Acosh", POSITIVE + 1),
    ("Not", LOGICAL),
    ("Neg", WHOLE),
    ("Abs", WHOLE),
    ("Round", np.array([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]], np.float32)),
    ("IsNaN", np.array([np.nan, 1, np.inf], np.float32)),
    ("IsInf", np.array([np.nan, -np.inf, np.inf, 0], np.float32)),
]
BINARY = [
    *[
        (name, X, noise(5, 1))
        for name in ["Add", "Sub", "Mul", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    ],
    *[
        (name, WHOLE, NOISE.integers(1, 5, (3, 1)))
        for name in ["Add", "Sub", "Mul", "Div", "Mod", "Equal", "Less", "Greater"]
    ],
    *[(name, LOGICAL, LOGICAL[:1]) for name in ["And", "Or", "Xor", "Equal"]],
    *[(name, WHOLE, NOISE.integers(1, 5, (3, 1))) for name in ["BitwiseAnd", "BitwiseOr", "BitwiseXor"]],
    ("Pow", POSITIVE, noise(6)),
    ("Pow", X, np.array(2.0, np.float32)),
    ("Pow", X, np.array([3], INT64)),
    ("Pow", WHOLE, np.array(2, INT64)),
    ("PRelu", X, noise(4, 1, 1)),
    ("MatMul", noise(2, 3, 5, 6), noise(6, 4)),
    ("MatMul", noise(2, 3, 5, 6), noise(2, 1, 6, 4)),
    ("MatMul", noise(5, 6), noise(6)),
]
CONV = {"kernel_shape": [3, 3]}
CASES = [
    *[Case(name, [x]) for name, x in UNARY],
    *[Case(name, [x, y], opsets=(18,)) for name, x, y in BINARY],
    *[Case(name, [x, y], opsets=(18,), known="none") for name, x, y in BINARY],
    Case("Mod", [X, noise(6)], {"fmod": 1}),
    Case("Mod", [WHOLE, -NOISE.integers(1, 5, (3, 1))]),
    Case("Mod", [WHOLE, NOISE.integers(1, 5, (3, 1))], {"fmod": 1}),
    Case("BitShift", [WHOLE.astype(np.uint8), np.array([1, 2, 3, 1], np.uint8)], {"direction": "RIGHT"}),
    Case("BitShift", [WHOLE.astype(np.uint8), np.array([1, 2, 3, 1], np.uint8)], {"direction": "LEFT"}),
    Case("BitwiseNot", [WHOLE], opsets=(18,)),
    Case("IsInf", [np.array([np.nan, -np.inf, np.inf], np.float32)], {"detect_negative": 0}),
    Case("LeakyRelu", [X], {"alpha": 0.3}, opsets=(7, 16)),
    Case("ThresholdedRelu", [X], {"alpha": 0.5}, opsets=(10,)),
    Case("Elu", [X], {"alpha": 0.7}),
    Case("Selu", [X], {"alpha": 1.3, "gamma": 0.8}),
    Case("Celu", [X], {"alpha": 0.7}),
    Case("HardSigmoid", [X], {"alpha": 0.3, "beta": 0.4}),
    Case("HardSwish", [2 * X], opsets=(14, 22)),
    Case("Mish", [X], opsets=(18, 22)),
    Case("Gelu", [X], opsets=(20,), tolerance=1e-4),
    Case("Gelu", [X], {"approximate": "tanh"}, opsets=(20,), tolerance=1e-4),
    Case("Swish", [X], {"alpha": 0.7}, opsets=(24,)),
    Case("Shrink", [X], {"bias": 0.2, "lambd": 0.4}),
    Case("Clip", [X], {"min": -0.5, "max": 0.7}, opsets=(7, 10)),
    Case("Clip", [X], {"min": -0.5}, opsets=(7,)),
    Case("Clip", [X], {}, opsets=(7, 13)),
    Case("Clip", [X, np.array(-0.5, np.float32), np.array(0.7, np.float32)], opsets=(11, 13)),
    Case("Clip", [X, None, np.array(0.7, np.float32)]),
    Case("Clip", [X, np.array(-0.5, np.float32), np.array(0.7, np.float32)], known="none"),
    Case("Clip", [WHOLE, np.array(-2), np.array(3)]),
    *[Case(name, [X, noise(6), noise(5, 1)], known=known) for name in ("Max", "Min", "Sum", "Mean") for known in ("rest", "none")],
    Case("Max", [WHOLE, WHOLE[:1]]),
    Case("Sum", [X]),
    Case("Where", [LOGICAL, noise(3, 4), noise(2, 3, 1)], known="none"),
    Case("Where", [LOGICAL, noise(3, 4), noise(1)]),
    *[Case("Cast", [3 * X], {"to": to}) for to in (TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.INT32)],
    Case("Cast", [LOGICAL], {"to": TensorProto.FLOAT}),
    Case("CastLike", [WHOLE, noise(1)], opsets=(15, 19)),
    Case("Dropout", [X], {"ratio": 0.4}, opsets=(7, 10)),
    Case("Dropout", [X, np.array(0.4, np.float32)], opsets=(12, 13)),
    Case("Dropout", [X], outputs=2, opsets=(13,)),
    # softmax: before opset 13 all axes from `axis` on are one
    *[Case(name, [X], {"axis": axis}, (7, 11, 13)) for name in ("Softmax", "LogSoftmax") for axis in (1, 2, 3)],
    *[Case(name, [X], {}, (11, 13)) for name in ("Softmax", "LogSoftmax", "Hardmax")],
    Case("Softmax", [X], {"axis": -2}, (11, 13)),
    # convolutions
    Case("Conv", [IMAGE, noise(4, 3, 3, 3)], CONV, opsets=(7, 11, 22)),
    Case("Conv", [IMAGE, noise(4, 3, 3, 3), noise(4)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    Case("Conv", [IMAGE, noise(4, 3, 3, 3), noise(4)], {"pads": [0, 1, 2, 0], "dilations": [2, 1]}),
    Case("Conv", [IMAGE, noise(6, 1, 3, 2)], {"group": 3}),
    *[Case("Conv", [IMAGE, noise(4, 3, 3, 2)], {"auto_pad": auto, "strides": [2, 3]}) for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")],
    Case("Conv", [noise(2, 3, 9), noise(4, 3, 3), noise(4)], {"pads": [1, 1]}),
    Case("Conv", [noise(1, 2, 4, 5, 6), noise(3, 2, 2, 2, 2)], {"pads": [1, 0, 1, 1, 0, 1]}),
    Case("Conv", [IMAGE, noise(4, 3, 3, 3)], CONV, known="none"),
    Case("ConvTranspose", [IMAGE, noise(3, 4, 3, 3)], opsets=(7, 11, 22)),
    Case("ConvTranspose", [IMAGE, noise(3, 4, 3, 3), noise(4)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    Case("ConvTranspose", [IMAGE, noise(3, 2, 3, 3)], {"group": 3, "strides": [2, 1], "pads": [0, 1, 1, 2], "dilations": [1, 2]}),
    *[Case("ConvTranspose", [IMAGE, noise(3, 4, 3, 3)], {"strides": [2, 2], "auto_pad": auto}) for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")],
    Case("ConvTranspose", [IMAGE, noise(3, 4, 3, 3)], {"strides": [2, 2], "output_shape": [16, 18]}),
    Case("ConvTranspose", [noise(2, 3, 7), noise(3, 4, 4)], {"strides": [2], "pads": [1, 1]}),
    # pooling
    *[
        Case(name, [IMAGE], {"kernel_shape": [3, 2], **attributes}, opsets)
        for name in ("MaxPool", "AveragePool")
        for attributes, opsets in [
            ({}, (7, 10, 11, 12, 19, 22)),
            ({"strides": [2, 2]}, (7, 19)),
            ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, (7, 19)),
            ({"strides": [2, 2], "pads": [0, 1, 1, 0]}, (7, 19)),
            ({"strides": [2, 2], "ceil_mode": 1}, (11, 19)),
            ({"strides": [3, 2], "ceil_mode": 1, "pads": [1, 0, 1, 1]}, (19,)),
            ({"strides": [3, 2], "auto_pad": "SAME_UPPER"}, (7, 19)),
            ({"strides": [2, 2], "auto_pad": "SAME_LOWER"}, (7, 19)),
            ({"strides": [2, 2], "auto_pad": "VALID"}, (7, 19)),
            ({"dilations": [2, 3], "pads": [1, 1, 0, 1]}, (19,)),
        ]
    ],
    *[
        Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "count_include_pad": 1, "strides": [2, 2], **attributes}, (19,))
        for attributes in [{"pads": [1, 1, 1, 1]}, {"pads": [0, 1, 1, 0]}, {"pads": [1, 1, 1, 1], "ceil_mode": 1}]
    ],
    Case("MaxPool", [noise(2, 3, 9)], {"kernel_shape": [3], "strides": [2]}),
    Case("AveragePool", [noise(2, 3, 9)], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
    Case("MaxPool", [noise(2, 3, 4, 5, 6)], {"kernel_shape": [2, 2, 2]}),
    Case("AveragePool", [noise(2, 3, 4, 5, 6)], {"kernel_shape": [2, 2, 2], "pads": [0, 0, 0, 1, 1, 1]}),
    Case("LpPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "p": 3}, (11, 18)),
    Case("LpPool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, (18,)),
    *[Case(name, [IMAGE]) for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")],
    Case("GlobalAveragePool", [noise(2, 3, 7)]),
    # normalisation
    Case("BatchNormalization", [IMAGE, *(noise(3, low=0.5) for _ in range(4))], {"epsilon": 1e-3}, (7, 9, 14, 15)),
    Case("BatchNormalization", [noise(4, 3), *(noise(3, low=0.5) for _ in range(4))], known="none"),
    Case("InstanceNormalization", [IMAGE, noise(3), noise(3)], {"epsilon": 1e-3}),
    Case("LayerNormalization", [SEQUENCE, noise(8), noise(8)], {"epsilon": 1e-3}, (17, 20)),
    Case("LayerNormalization", [SEQUENCE, noise(8)], opsets=(17,)),
    Case("LayerNormalization", [SEQUENCE, noise(5, 8), noise(5, 8)], {"axis": 1}, (17,)),
    Case("LayerNormalization", [SEQUENCE, noise(8)], {"axis": -2}, (17,)),
    Case("GroupNormalization", [X, noise(2), noise(2)], {"num_groups": 2}, (18,)),
    Case("GroupNormalization", [X, noise(4), noise(4)], {"num_groups": 2, "epsilon": 1e-2}, (21,)),
    Case("RMSNormalization", [SEQUENCE, noise(8)], {"epsilon": 1e-3}, (23,)),
    Case("LRN", [noise(2, 7, 3, 3)], {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.5}),
    Case("LRN", [noise(2, 7, 3, 3)], {"size": 5}),
    Case("LpNormalization", [X], {"axis": 1, "p": 2}),
    Case("LpNormalization", [X], {"axis": -1, "p": 1}),
    # products
    Case("Gemm", [noise(3, 4), noise(4, 5), noise(5)], {}, (7, 9, 11, 13)),
    Case("Gemm", [noise(4, 3), noise(5, 4), noise(3, 1)], {"alpha": 0.5, "beta": 2.0, "transA": 1, "transB": 1}),
    Case("Gemm", [noise(3, 4), noise(4, 5)]),
    Case("Einsum", [noise(2, 3, 4), noise(2, 4, 5)], {"equation": "bij, bjk -> bik"}, known="none"),
    Case("Einsum", [noise(2, 3, 3)], {"equation": "...ii->...i"}),
    *[
        Case("Attention", [noise(2, h, 5, 4), noise(2, k, 6, 4), noise(2, k, 6, 3), *mask], attributes, (23,), known, tolerance=1e-4)
        for h, k, mask, attributes, known in [
            (3, 3, [], {}, "none"),
            (3, 3, [], {"is_causal": 1}, "none"),
            (3, 3, [noise(5, 6)], {"scale": 0.3}, "rest"),
            (3, 3, [noise(5, 6) > -1.5], {}, "none"),
        ]
    ],
    Case("Attention", [noise(2, 5, 12), noise(2, 6, 12), noise(2, 6, 12)], {"q_num_heads": 3, "kv_num_heads": 3}, (23,), "none"),
    # reductions: axes are an attribute before opset 18 (sum: 13), an input from there on
    *[
        case
        for name in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
        for old in [(11, 12) if name == "Sum" else (11, 13, 17)]
        for new in [(13, 18, 20) if name == "Sum" else (18, 20)]
        for case in [
            Case(f"Reduce{name}", [POSITIVE], {"axes": [1, -1]}, old, tolerance=1e-4),
            Case(f"Reduce{name}", [POSITIVE], {"axes": [2], "keepdims": 0}, old, tolerance=1e-4),
            Case(f"Reduce{name}", [POSITIVE], {"keepdims": 0}, old + new, tolerance=1e-4),
            Case(f"Reduce{name}", [POSITIVE, ints(1, -1)], {"keepdims": 0}, new, tolerance=1e-4),
            Case(f"Reduce{name}", [POSITIVE, ints()], {"noop_with_empty_axes": 1}, new) if name in ("Sum", "Mean") else None,
        ]
        if case is not None
    ],
    Case("ReduceSum", [WHOLE, ints(1)]),
    Case("ReduceMax", [WHOLE], {"axes": [1]}, (13,)),
    *[Case(name, [WHOLE], {"axis": axis, "keepdims": keep}, (11, 13)) for name in ("ArgMax", "ArgMin") for axis, keep in ((0, 1), (-1, 0))],
    Case("ArgMax", [np.array([[1, 3, 3], [2, 2, 0]], np.float32)], {"axis": 1, "select_last_index": 1}),
    Case("TopK", [X, ints(3)], {"axis": 1}, (10, 11), outputs=2),
    Case("TopK", [X], {"axis": -1, "k": 2}, (9,), outputs=2),
    Case("TopK", [X, ints(3)], {"axis": 3, "largest": 0}, (11,), outputs=2),
    *[Case("CumSum", [X, np.array(2)], {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)],
    # shapes
    Case("Shape", [X]),
    Case("Shape", [X], {"start": 1, "end": -1}, (15, 19)),
    Case("Size", [X]),
    *[Case("Reshape", [X, ints(*shape)], opsets=(7, 13, 19)) for shape in ((2, 120), (-1, 6), (0, 0, -1), (0, -1, 5, 0))],
    Case("Reshape", [np.zeros((0, 3), np.float32), ints(3, 0)], {"allowzero": 1}, (14,)),
    *[Case("Flatten", [X], {"axis": axis}, (9, 11, 13)) for axis in (0, 1, 2, 4)],
    Case("Flatten", [X], {"axis": -1}, (11, 13)),
    Case("Transpose", [X]),
    Case("Transpose", [X], {"perm": [0, 3, 1, 2]}),
    Case("Squeeze", [noise(1, 3, 1, 4)], {"axes": [2]}, (7, 11)),
    Case("Squeeze", [noise(1, 3, 1, 4), ints(0, -2)]),
    Case("Squeeze", [noise(1, 3, 1, 4)], {}, (7, 13)),
    Case("Unsqueeze", [noise(3, 4)], {"axes": [0, 3]}, (7, 11)),
    Case("Unsqueeze", [noise(3, 4), ints(-1, 0)]),
    Case("Concat", [X, X[:, :2], noise(2, 1, 5, 6)], {"axis": 1}, known="none"),
    Case("Concat", [X, X], {"axis": -1}),
    Case("Split", [X], {"axis": 1}, (7, 13), outputs=2),
    Case("Split", [X], {"axis": 2, "split": [1, 4]}, (7, 11), outputs=2),
    Case("Split", [X, ints(1, 4)], {"axis": -2}, (13, 18), outputs=2),
    Case("Split", [X], {"axis": 2, "num_outputs": 3}, (18,), outputs=3),
    Case("Slice", [X], {"starts": [1, 0], "ends": [9, -1], "axes": [2, 3]}, (7, 9)),
    Case("Slice", [X], {"starts": [0, 1], "ends": [1, 3]}, (7,)),
    Case("Slice", [X, ints(1, -4), ints(2**62, -1), ints(2, -1), ints(2, 1)], opsets=(10, 13)),
    Case("Slice", [X, ints(-1, 4), ints(-(2**62), 1), ints(2, 3), ints(-1, -2)], opsets=(10, 13)),
    Case("Slice", [X, ints(0, 1), ints(1, 3)]),
    Case("Slice", [X, ints(3), ints(1), ints(1)]),
    Case("Expand", [noise(3, 1), ints(2, 1, 4)]),
    Case("Expand", [noise(3, 4), ints(1)]),
    Case("Tile", [noise(2, 3), ints(2, 3)]),
    Case("Pad", [IMAGE], {"pads": [0, 0, 1, 2, 0, 1, 3, 0], "value": 0.5}, (7, 10)),
    Case("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 1, 3, 0), np.array(0.5, np.float32)], opsets=(11, 13, 18)),
    Case("Pad", [IMAGE, ints(0, 0, -1, 2, 0, 0, 3, -2)]),
    *[Case("Pad", [IMAGE, ints(0, 1, 2, 0, 0, 0, 3, 4)], {"mode": mode}) for mode in ("reflect", "edge")],
    *[Case("Pad", [IMAGE], {"mode": mode, "pads": [0, 0, 2, 0, 0, 0, 3, 4]}, (10,)) for mode in ("reflect", "edge")],
    Case("Pad", [IMAGE, ints(0, 0, 2, 1, 0, 0, 3, 4)], {"mode": "wrap"}, (19,)),
    Case("Pad", [IMAGE, ints(1, 2, 0, 1), None, ints(-1, 2)], opsets=(18,)),
    Case("DepthToSpace", [noise(2, 8, 3, 4)], {"blocksize": 2}, (7, 11, 13)),
    Case("DepthToSpace", [noise(2, 8, 3, 4)], {"blocksize": 2, "mode": "CRD"}, (11, 13)),
    Case("SpaceToDepth", [noise(2, 3, 4, 6)], {"blocksize": 2}, (7, 13)),
    # picking and placing
    *[
        Case("Gather", [X, indices], {"axis": axis}, known=known)
        for indices in (np.array(-1), ints(0, -2, 1), ints(0, 1, 1, 0).reshape(2, 2))
        for axis in (1, -1)
        for known in ("rest", "none")
    ],
    Case("GatherElements", [X, NOISE.integers(-4, 4, (2, 2, 5, 6))], {"axis": 1}),
    Case("GatherND", [X, NOISE.integers(-2, 2, (3, 2))]),
    Case("GatherND", [X, NOISE.integers(0, 4, (2, 3, 2))], {"batch_dims": 1}),
    Case("ScatterElements", [X, NOISE.integers(0, 1, (2, 1, 5, 6)), noise(2, 1, 5, 6)], {"axis": 1}, (11, 13, 18)),
    Case("ScatterElements", [X, NOISE.integers(-4, 4, (2, 3, 5, 6)), noise(2, 3, 5, 6)], {"axis": 1, "reduction": "add"}, (16, 18)),
    Case("ScatterElements", [X, NOISE.integers(0, 4, (2, 3, 5, 6)), noise(2, 3, 5, 6)], {"axis": 1, "reduction": "max"}, (18,)),
    Case("ScatterND", [X, ints(0, 1, 1, 2).reshape(2, 2), noise(2, 5, 6)], {}, (11, 18)),
    Case("ScatterND", [X, ints(0, 1, 0, 1).reshape(2, 2), noise(2, 5, 6)], {"reduction": "add"}, (18,)),
    Case("OneHot", [ints(0, 2, -1), ints(4), noise(2)], {"axis": 0}, (9, 11)),
    Case("OneHot", [ints(0, 2, -1), np.array(4), noise(2)], {}, (11,)),
    *[Case("Trilu", [X, *k], {"upper": upper}, (14,)) for upper in (0, 1) for k in ([], [np.array(1)])],
    Case("NonZero", [WHOLE], known="all"),
    Case("Constant", [], {"value": numpy_helper.from_array(noise(2, 3))}, known="all"),
    Case("Constant", [], {"value_floats": [1.0, 2.0]}, known="all"),
    Case("Constant", [], {"value_int": 3}, known="all"),
    Case("ConstantOfShape", [ints(2, 3)], {"value": numpy_helper.from_array(ints(7))}, known="all"),
    Case("ConstantOfShape", [ints(2, 3)], known="all"),
    Case("Range", [np.array(2), np.array(11), np.array(3)], known="all"),
    Case("Range", [np.array(5.0, np.float32), np.array(1.0, np.float32), np.array(-1.5, np.float32)], known="all"),
    Case("EyeLike", [noise(3, 4)], {"k": 1, "dtype": TensorProto.INT64}),
    # resizing
    Case("Upsample", [IMAGE], {"scales": [1.0, 1.0, 2.0, 3.0]}, (7,)),
    *[Case("Upsample", [IMAGE, np.array([1, 1, 2, 1.5], np.float32)], {"mode": mode}, (9,)) for mode in ("nearest", "linear")],
    *[Case("Resize", [IMAGE, np.array([1, 1, 0.6, 2], np.float32)], {"mode": mode}, (10,)) for mode in ("nearest", "linear")],
    *[
        Case("Resize", [IMAGE, NONE, np.array([1, 1, 0.6, 1.7], np.float32)], {"mode": mode, "coordinate_transformation_mode": transform}, (13, 19), tolerance=1e-4)
        for mode in ("nearest", "linear", "cubic")
        for transform in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ],
    *[
        Case("Resize", [IMAGE, None, None, ints(2, 3, 5, 12)], {"mode": mode, "coordinate_transformation_mode": transform}, (13, 19), tolerance=1e-4)
        for mode in ("nearest", "linear", "cubic")
        for transform in ("half_pixel", "align_corners", "asymmetric")
    ],
    *[
        Case("Resize", [IMAGE, None, np.array([1, 1, 2, 0.5], np.float32)], {"mode": "nearest", "nearest_mode": rounding, "coordinate_transformation_mode": "asymmetric"}, (13,))
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ],
    Case("Resize", [IMAGE, None, np.array([1, 1, 0.6, 1.7], np.float32)], {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}, (13,), tolerance=1e-4),
    Case("Resize", [IMAGE, None, np.array([1, 1, 0.6, 1.7], np.float32)], {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}, (19,), tolerance=1e-4),
    Case("Resize", [IMAGE, noise(8), np.array([1, 1, 0.6, 1.7], np.float32)], {"mode": "nearest", "coordinate_transformation_mode": "tf_half_pixel_for_nn"}, (11,)),
    *[Case("Resize", [IMAGE, None, None, ints(2, 3, 3, 4)], {"mode": mode, "antialias": 1, "exclude_outside": outside}, (18,), tolerance=1e-4) for mode in ("linear", "cubic") for outside in (0, 1)],
    Case("Resize", [IMAGE, None, np.array([0.6, 1.7], np.float32)], {"mode": "linear", "axes": [2, 3]}, (18,), tolerance=1e-4),
    *[
        Case("GridSample", [IMAGE, noise(2, 4, 5, 2)], {"mode": mode, "padding_mode": padding, "align_corners": corners}, (16,), "none", tolerance=1e-4)
        for mode in ("bilinear", "nearest", "bicubic")
        for padding in ("zeros", "border", "reflection")
        for corners in (0, 1)
    ],
    *[Case("GridSample", [IMAGE, noise(2, 4, 5, 2)], {"mode": mode}, (20,), "none", tolerance=1e-4) for mode in ("linear", "cubic")],
    *[Case("AffineGrid", [noise(2, 2, 3), ints(2, 3, 4, 5)], {"align_corners": corners}, (20,)) for corners in (0, 1)],
    # quantised numbers
    *[Case("QuantizeLinear", [3 * X, np.array(0.02, np.float32), np.array(zero, dtype)], {}, (10, 13, 19)) for zero, dtype in ((7, np.uint8), (-3, np.int8))],
    Case("QuantizeLinear", [3 * X, np.array(0.02, np.float32)], {}, (13,)),
    Case("QuantizeLinear", [X, noise(4, low=0.01), ints(1, 2, 3, 4).astype(np.uint8)], {"axis": 1}, (13,)),
    Case("QuantizeLinear", [3 * X, np.array(0.02, np.float32)], {"output_dtype": TensorProto.INT8}, (21,)),
    Case("DequantizeLinear", [WHOLE.astype(np.int8), np.array(0.02, np.float32), np.array(3, np.int8)], {}, (10, 13, 19)),
    Case("DequantizeLinear", [WHOLE.astype(np.int8), noise(3)], {"axis": 1}, (13,)),
    Case("DequantizeLinear", [WHOLE.astype(np.int32), np.array(0.02, np.float32)], {}, (13,), "all"),
    Case("DynamicQuantizeLinear", [X], outputs=3),
    Case("MatMulInteger", [NOISE.integers(0, 255, (3, 4)).astype(np.uint8), WHOLE[0, :, :2].astype(np.int8).repeat(2, 0)[:4], np.array(9, np.uint8), np.array(2, np.int8)]),
    Case("ConvInteger", [NOISE.integers(0, 255, (1, 2, 5, 5)).astype(np.uint8), NOISE.integers(0, 255, (3, 2, 3, 3)).astype(np.uint8), np.array(9, np.uint8)], {"pads": [1, 1, 1, 1]}),
    Case(
        "QLinearConv",
        [
            NOISE.integers(0, 255, (1, 2, 5, 5)).astype(np.uint8), np.array(0.02, np.float32), np.array(9, np.uint8),
            NOISE.integers(-99, 99, (3, 2, 3, 3)).astype(np.int8), noise(3, low=0.01, high=0.02), np.zeros(3, np.int8),
            np.array(0.5, np.float32), np.array(100, np.uint8), NOISE.integers(-99, 99, 3).astype(np.int32),
        ],
        {"pads": [0, 1, 1, 0]},
        tolerance=1,
    ),
    Case(
        "QLinearMatMul",
        [
            NOISE.integers(0, 255, (3, 4)).astype(np.uint8), np.array(0.02, np.float32), np.array(9, np.uint8),
            NOISE.integers(0, 255, (4, 5)).astype(np.uint8), np.array(0.01, np.float32), np.array(99, np.uint8),
            np.array(0.05, np.float32), np.array(100, np.uint8),
        ],
        tolerance=1,
    ),
    *[
        Case(
            name,
            [
                NOISE.integers(0, 255, (2, 3, 4)).astype(np.uint8), np.array(0.02, np.float32), np.array(9, np.uint8),
                NOISE.integers(0, 255, (3, 1)).astype(np.uint8), np.array(0.01, np.float32), np.array(99, np.uint8),
                np.array(0.05, np.float32), np.array(100, np.uint8),
            ],
            domain="com.microsoft",
            tolerance=1,
        )
        for name in ("QLinearAdd", "QLinearMul")
    ],
    *[
        Case(
            name,
            [
                NOISE.integers(0, 255, (2, 3, 4, 4)).astype(np.uint8), np.array(0.02, np.float32), np.array(99, np.uint8),
                np.array(scale, np.float32), np.array(zero, np.uint8),
            ],
            attributes,
            domain="com.microsoft",
            tolerance=1,
        )
        for name, scale, zero, attributes in [
            ("QLinearSigmoid", 1 / 256, 0, {}), ("QLinearLeakyRelu", 0.03, 50, {"alpha": 0.3}), ("QLinearGlobalAveragePool", 0.01, 100, {}),
        ]
    ],
    Case(
        "QLinearConcat",
        [
            np.array(0.03, np.float32), np.array(50, np.uint8),
            NOISE.integers(0, 255, (2, 3)).astype(np.uint8), np.array(0.02, np.float32), np.array(9, np.uint8),
            NOISE.integers(0, 255, (2, 4)).astype(np.uint8), np.array(0.01, np.float32), np.array(99, np.uint8),
        ],
        {"axis": 1},
        known="none",
        domain="com.microsoft",
        tolerance=1,
    ),
    *[
        Case(
            "QGemm",
            [
                NOISE.integers(0, 255, (2, 4)).astype(np.uint8), np.array(0.02, np.float32), np.array(9, np.uint8),
                NOISE.integers(-99, 99, (5, 4)).astype(np.int8), noise(5, low=0.01, high=0.02), np.zeros(5, np.int8),
                NOISE.integers(-999, 999, 5).astype(np.int32), *end,
            ],
            {"alpha": 0.5, "transB": 1},
            domain="com.microsoft",
            tolerance=tolerance,
        )
        for end, tolerance in [([np.array(0.05, np.float32), np.array(100, np.uint8)], 1), ([], 1e-4)]
    ],
    # onnxruntime's own
    Case("Gelu", [X], domain="com.microsoft"),
    Case("QuickGelu", [X], domain="com.microsoft"),
    Case("BiasGelu", [X, noise(6)], domain="com.microsoft"),
    Case("FastGelu", [X, noise(6)], domain="com.microsoft", tolerance=1e-4),
    Case("FastGelu", [X], domain="com.microsoft", tolerance=1e-4),
    *[
        Case("FusedConv", [IMAGE, noise(4, 3, 3, 3), noise(4)], {"activation": name, **more}, domain="com.microsoft")
        for name, more in [("Relu", {}), ("LeakyRelu", {"activation_params": [0.2]}), ("Clip", {"activation_params": [-0.5, 0.5]})]
    ],
    Case("FusedGemm", [noise(3, 4), noise(4, 5), noise(5)], {"activation": "Relu"}, domain="com.microsoft"),
    Case("FusedMatMul", [noise(2, 3, 4), noise(2, 5, 4)], {"alpha": 0.5, "transB": 1}, domain="com.microsoft"),
    Case("SkipLayerNormalization", [SEQUENCE, noise(2, 5, 8), noise(8), noise(8), noise(8)], {"epsilon": 1e-5}, domain="com.microsoft", known="none"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "opset"), [pytest.param(c, o, id=f"{o}-{c}") for c in CASES for o in c.opsets]
)
def test_operator_gives_what_onnxruntime_gives(case: Case, opset: int) -> None:
    expected, given = reference(case, opset), ours(case, opset)
    assert len(expected) == len(given)
    for e, g in zip(expected, given, strict=True):
        if e is None:
            continue
        assert tuple(g.shape) == e.shape
        np.testing.assert_allclose(
            g.numpy().astype(np.float64), e.astype(np.float64), rtol=case.tolerance, atol=case.tolerance
        )


def test_every_operator_is_tested() -> None:
    tested = {f"{case.domain}.{case.operator}" if case.domain else case.operator for case in CASES}
    # Linear stands in for Gemm and MatMul with known weights, CastThrough for a Cast that passes gradients;
    # Scatter is the old name of ScatterElements
    assert set(OPERATORS) - tested == {"CastThrough", "Linear", "Scatter"}


def function(operator: str, inputs: dict[str, torch.Tensor], opset: int = 17, **attributes: Any) -> Any:
    node = Node(operator, tuple(inputs), ("y",), attributes, opset)
    return make_function(Operation(node, inputs, torch.device("cpu")))


def test_gradient_passes_straight_through_rounding_inside_the_range() -> None:
    x = torch.tensor([-3.0, -0.5, 0.2, 0.7, 3.0], requires_grad=True)
    inputs = {"x": x, "s": torch.tensor(0.01), "z": torch.tensor(0, dtype=torch.int8)}
    levels = function("QuantizeLinear", inputs)(*inputs.values())
    assert levels.tolist() == [-128, -50, 20, 70, 127]
    levels.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 100, 100, 100, 0])


def test_what_an_operator_does_not_cover_is_said() -> None:
    x = {"x": torch.zeros(1, 4, 4, 4)}
    kernel = {"kernel_shape": [2, 2]}
    for operator, attributes in {
        "Nonsense": {},
        "MaxPool": kernel | {"auto_pad": "SOME"},
        "Cast": {"to": TensorProto.STRING},
        "Resize": {"mode": "area"},
    }.items():
        with pytest.raises(Unsupported):
            function(operator, x | {"": torch.zeros(0), "s": torch.ones(4)}, **attributes)
