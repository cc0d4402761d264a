"""The Open Inference Protocol (KServe v2, REST): requests and answers, as JSON and as binary tensor data.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol, and the binary
tensor data extension that Triton's clients use by default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from doorward.guard.guard import Answers
from doorward.guard.serving import tensors
from doorward.guard.serving.tensors import BadRequestError, TensorIn
from doorward.models import InputSpec
from doorward.models.encode.dispatch import NOUNS

#: The header with the length of the JSON part, where binary tensor data follow it.
LENGTH = "Inference-Header-Content-Length"
#: Names of the outputs, their types as the protocol and as NumPy have them.
OUTPUTS: dict[str, tuple[str, type[np.generic]]] = {
    "logits": ("FP32", np.float32),
    "class": ("INT64", np.int64),
    "accepted": ("BOOL", np.bool_),
}
#: Rejected rows whose reasons are told in an answer's parameters, at most.
TOLD = 16


class OutputWanted(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="ignore")

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferenceRequest(BaseModel):
    """The JSON part of a request for inference."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[TensorIn] = Field(min_length=1)
    outputs: list[OutputWanted] | None = None


class TensorOut(BaseModel):
    """An output tensor; its parameters hold the guard's verdict."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any]
    data: list[Any] | None = None


class InferenceAnswer(BaseModel):
    """The JSON part of an answer."""

    model_name: str
    model_version: str = "1"
    id: str | None = None
    outputs: list[TensorOut]


class Failure(BaseModel):
    """What went wrong, as the protocol tells it."""

    error: str


@dataclass(frozen=True)
class ReadRequest:
    """A request that has been read.

    Attributes:
        inputs: as a guard takes them.
        binary: the outputs that are wanted, and whether each is sent as binary data.
    """

    inputs: Tensor
    id: str | None
    binary: Mapping[str, bool]


@dataclass(frozen=True)
class Reply:
    """The body of an answer and its headers."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def metadata(name: str, spec: InputSpec, classes: Sequence[str]) -> dict[str, Any]:
    """Return the model's metadata."""
    widths = {"logits": [len(classes)]}
    return {
        "name": name,
        "versions": ["1"],
        "platform": "doorward_guard",
        "inputs": [tensors.metadata(spec)],
        "outputs": [
            {"name": one, "datatype": datatype, "shape": [-1, *widths.get(one, [])]}
            for one, (datatype, _) in OUTPUTS.items()
        ],
        "parameters": {"classes": ",".join(classes)},
    }


def read_request(body: bytes, length: str | None, spec: InputSpec, *, most: int) -> ReadRequest:
    """Read a request for inference.

    Args:
        length: the header `LENGTH`, None if there is none.
        most: inputs that a request may hold.

    Raises:
        BadRequestError: if it is not one, or does not fit the model.
    """
    head, tail = _parted(body, length)
    try:
        request = InferenceRequest.model_validate(json.loads(head, parse_constant=_no_constant))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequestError(f"{where or 'the request'}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {str(error)[:200]}") from None
    name = NOUNS[spec.modality]
    if len(request.inputs) != 1 or request.inputs[0].name != name:
        given = ", ".join(repr(one.name[:40]) for one in request.inputs[:4])
        raise BadRequestError(f"the model has one input, {name!r}; got {given}")
    return ReadRequest(tensors.read(request.inputs[0], tail, spec, most=most), request.id, _wanted(request))


def _parted(body: bytes, length: str | None) -> tuple[bytes, bytes]:
    """Return the JSON part and what follows it."""
    if length is None:
        return body, b""
    if not (length.isascii() and length.isdigit() and int(length) <= len(body)):
        raise BadRequestError(f"{LENGTH}: takes a number of bytes up to {len(body)}, got {length[:40]!r}")
    return body[: int(length)], body[int(length) :]


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _wanted(request: InferenceRequest) -> dict[str, bool]:
    """Return the outputs that are wanted, and whether each is sent as binary data."""
    usual = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return dict.fromkeys(OUTPUTS, usual)
    for one in request.outputs:
        if one.name not in OUTPUTS:
            raise BadRequestError(f"there is no output {one.name[:40]!r}; there are {', '.join(OUTPUTS)}")
        if one.parameters.get("classification"):
            raise BadRequestError("the classification extension is not served; the output 'class' names it")
    return {one.name: one.parameters.get("binary_data", usual) is True for one in request.outputs}


def verdict(answers: Answers) -> dict[str, Any]:
    """Return what the guard says of a request's inputs, as the parameters of an output."""
    rejected = np.flatnonzero(~answers.accepted).tolist()
    told = {"verdict": "rejected" if rejected else "accepted", "rejected": len(rejected)}
    if not rejected:
        return told
    reasons = [f"{row}: {'; '.join(answers.reasons[row])}" for row in rejected[:TOLD]]
    return told | {"rejected_rows": ",".join(map(str, rejected)), "reasons": "\n".join(reasons)}


def write_answer(name: str, asked: ReadRequest, answers: Answers) -> Reply:
    """Write an answer: the outputs that are wanted, with the verdict in the parameters of each."""
    tables = {"logits": answers.logits, "class": answers.predictions, "accepted": answers.accepted}
    said, tail, outputs = verdict(answers), b"", []
    for one, binary in asked.binary.items():
        datatype, kind = OUTPUTS[one]
        values = np.ascontiguousarray(tables[one], dtype=np.dtype(kind).newbyteorder("<"))
        out: dict[str, Any] = {"name": one, "shape": list(values.shape), "datatype": datatype}
        if binary:
            out["parameters"] = said | {"binary_data_size": values.nbytes}
            tail += values.tobytes()
        else:
            out |= {"parameters": said, "data": values.reshape(-1).tolist()}
        outputs.append(out)
    answer: dict[str, Any] = {"model_name": name, "model_version": "1", "outputs": outputs}
    if asked.id is not None:
        answer["id"] = asked.id
    return _joined(answer, tail)


def add_verdict(reply: Reply, answers: Answers) -> Reply:
    """Return another server's answer with the verdict in the parameters of each output.

    Raises:
        BadRequestError: if it is not an answer of this protocol.
    """
    length = {name.lower(): value for name, value in reply.headers.items()}.get(LENGTH.lower())
    head, tail = _parted(reply.body, length)
    try:
        answer = json.loads(head)
        for one in answer["outputs"]:
            one["parameters"] = {**one.get("parameters", {}), **verdict(answers)}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadRequestError("the upstream's answer is not one of the Open Inference Protocol") from None
    return _joined(answer, tail)


def _joined(answer: Any, tail: bytes) -> Reply:
    head = json.dumps(answer, allow_nan=False).encode()
    if not tail:
        return Reply(head, {"Content-Type": "application/json"})
    return Reply(head + tail, {"Content-Type": "application/octet-stream", LENGTH: str(len(head))})
