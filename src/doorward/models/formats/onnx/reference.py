"""ONNX's own evaluator in numpy: slow and exact, for the models that onnxruntime may compute otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.models.formats.input_options import first_line

if TYPE_CHECKING:
    import onnx

    from doorward.models.formats.onnx.loader import OnnxInfo

#: The first version of ONNX's operators of which the evaluator has all that 8-bit numbers need.
_OLDEST = 19


def may_saturate(info: OnnxInfo) -> bool:
    """Return whether onnxruntime may differ from one processor to the next by more than rounding.

    On x86 processors without VNNI, its sums of products of 8-bit numbers stop at the ends of 16 bits:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    return any("QLinear" in name or "Integer" in name for name in info.operators)


def exact_outputs(model: onnx.ModelProto, x: Tensor, output: str, batch: int) -> Tensor:
    """Return an output (n, k) for a model's own inputs.

    Args:
        model: the model, its weights within.
        x: inputs (n, c, h, w), or in the model's own layout.
        output: name of the output.
        batch: number of images at a time.

    Raises:
        InputError: if the evaluator has no form of one of the model's operators, or fails.
    """
    import onnx
    from onnx import version_converter
    from onnx.reference import ReferenceEvaluator

    weights = {tensor.name for tensor in model.graph.initializer}
    (source,) = (value for value in model.graph.input if value.name not in weights)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(source.type.tensor_type.elem_type)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    try:
        newer = version_converter.convert_version(model, _OLDEST) if opset < _OLDEST else model
        evaluator = ReferenceEvaluator(newer)
        parts = [
            torch.from_numpy(evaluator.run([output], {source.name: group.numpy().astype(dtype)})[0])
            for group in torch.split(x, batch)
        ]
    except Exception as error:  # of any kind: it runs whatever numpy runs
        raise InputError(f"ONNX's own evaluator cannot compute it: {first_line(error)}") from error
    return torch.cat(parts).flatten(1)
