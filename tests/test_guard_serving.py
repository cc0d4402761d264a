"""A guard behind the Open Inference Protocol: requests, limits, batches, what it remembers."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("fastapi")

import httpx
from fastapi import FastAPI

from command_line import BACKDOORED, CLOTHES, call
from doorward import bundled
from doorward.core.errors import CouldNotTell, InputError
from doorward.guard.guard import Answers, Guard
from doorward.guard.serving import protocol
from doorward.guard.serving.app import Limits, build
from doorward.guard.serving.batches import Batcher, QueueFullError
from doorward.guard.serving.run import ServeRequest, _check_tls, address, local
from doorward.guard.serving.upstream import Upstream
from doorward.guard.serving.watch import BLOCK, Quarantine, Watch
from test_guard import FILTERS, SPEC, block, classifier, clean_images

INFER = "/v2/models/quadrants/infer"


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.fit(classifier(), clean_images(400), filters=FILTERS, rate=0.05)


def ask(
    app: FastAPI, *requests: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
) -> list[httpx.Response]:
    """Return the answers to some requests, one after the other."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://guard") as client:
            return [await one(client) for one in requests]

    return asyncio.run(run())


def get(path: str, **headers: str) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
    return lambda client: client.get(path, headers=headers)


def post(
    body: Any, path: str = INFER, **headers: str
) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda client: client.post(path, content=content, headers=headers)


def tensor(images: Tensor, datatype: str = "UINT8", **values: Any) -> dict[str, Any]:
    return {"name": "images", "shape": list(images.shape), "datatype": datatype} | values


def plain_body(images: Tensor, **more: Any) -> dict[str, Any]:
    return {"inputs": [tensor(images, data=images.flatten().tolist())]} | more


def binary(images: np.ndarray[Any, Any], datatype: str, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Return a request with binary data, as Triton's clients send it, and its headers."""
    about = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": images.nbytes},
    }
    head = json.dumps({"inputs": [about], "parameters": {"binary_data_output": True}} | more).encode()
    return head + images.tobytes(), {protocol.LENGTH: str(len(head))}


def outputs(answer: httpx.Response) -> dict[str, np.ndarray[Any, Any]]:
    """Return the output tensors of an answer."""
    length = int(answer.headers.get(protocol.LENGTH, len(answer.content)))
    head, tail, found = json.loads(answer.content[:length]), answer.content[length:], {}
    for one in head["outputs"]:
        kind = protocol.OUTPUTS[one["name"]][1]
        size = one["parameters"].get("binary_data_size")
        values = np.array(one["data"], kind) if size is None else np.frombuffer(tail[:size], kind)
        tail = tail[size or 0 :]
        found[one["name"]] = values.reshape(one["shape"])
    assert not tail
    return found


def test_every_way_to_send_images_gets_the_guards_own_answers(guard: Guard) -> None:
    images = torch.cat([clean_images(6, seed=3), block(clean_images(4, seed=4))])
    expected = guard(images)
    assert not expected.accepted[-4:].any()
    nested = {"inputs": [tensor(images, data=images.tolist())]}
    asked = {"outputs": [{"name": "class"}, {"name": "logits", "parameters": {"binary_data": True}}]}
    floats = (images.numpy() / 255).astype(np.float32)
    as_bytes, length = binary(images.numpy(), "UINT8")
    as_floats, floats_length = binary(floats, "FP32", id="7")
    answers = ask(
        build(guard, name="quadrants"),
        post(plain_body(images)),
        post(nested),
        post(plain_body(images) | asked),
        post(as_bytes, **length),
        post(as_floats, **floats_length),
        post(plain_body(images), path=INFER.replace("/infer", "/versions/1/infer")),
    )
    for answer in answers:
        assert answer.status_code == 200, answer.text
        found = outputs(answer)
        assert found["class"].tolist() == expected.predictions.tolist()
        if "logits" in found:
            assert found["logits"] == pytest.approx(expected.logits, abs=1e-4)
        if "accepted" in found:
            assert found["accepted"].tolist() == expected.accepted.tolist()
    assert set(outputs(answers[2])) == {"class", "logits"}
    assert answers[4].headers["content-type"] == "application/octet-stream"
    said = answers[0].json()["outputs"][0]["parameters"]
    rows = np.flatnonzero(~expected.accepted).tolist()
    assert (said["verdict"], said["rejected"]) == ("rejected", len(rows))
    assert said["rejected_rows"] == ",".join(map(str, rows))
    assert all(expected.reasons[row][0] in said["reasons"] for row in rows)
    head = answers[4].content[: int(answers[4].headers[protocol.LENGTH])]
    assert json.loads(head)["id"] == "7"


ONE = clean_images(1)
FLAT = ONE.flatten().tolist()
BAD: list[tuple[Any, str]] = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    ([], "the request"),
    ({}, "inputs"),
    ({"inputs": []}, "inputs"),
    ({"inputs": [tensor(ONE, data=FLAT) | {"name": "pixels"}]}, "'images'; got 'pixels'"),
    ({"inputs": [tensor(ONE, data=FLAT)] * 2}, "one input"),
    ({"inputs": [tensor(ONE, data=FLAT) | {"shape": [1, 8, 8]}]}, "[n, 1, 8, 8], got [1, 8, 8]"),
    ({"inputs": [tensor(ONE, data=[]) | {"shape": [0, 1, 8, 8]}]}, "[n, 1, 8, 8]"),
    ({"inputs": [tensor(ONE, data=FLAT) | {"shape": [-1, 1, 8, 8]}]}, "[n, 1, 8, 8]"),
    ({"inputs": [tensor(ONE, data=FLAT) | {"shape": [10**9, 1, 8, 8]}]}, "may hold 1024 images"),
    ({"inputs": [tensor(ONE, "INT64", data=FLAT)]}, "datatype"),
    ({"inputs": [tensor(ONE)]}, "no data"),
    ({"inputs": [tensor(ONE, data=FLAT[:-1])]}, "takes 64 values, got 63"),
    ({"inputs": [tensor(ONE, data=[[1, 2], [3]])]}, "rows differ in length"),
    ({"inputs": [tensor(ONE, data=["x"] * 64)]}, "not numbers"),
    ({"inputs": [tensor(ONE, data=[10**400] * 64)]}, "not numbers"),
    ({"inputs": [tensor(ONE, data=[256] * 64)]}, "0 to 255"),
    ({"inputs": [tensor(ONE, data=[-1] * 64)]}, "0 to 255"),
    ({"inputs": [tensor(ONE, data=[0.5] * 64)]}, "whole numbers"),
    ({"inputs": [tensor(ONE, "FP32", data=[1.5] * 64)]}, "from 0 to 1"),
    (json.dumps({"inputs": [tensor(ONE, "FP32", data=[float("nan")] * 64)]}).encode(), "NaN is no number"),
    (plain_body(ONE, outputs=[{"name": "probability"}]), "there is no output 'probability'"),
    (
        plain_body(ONE, outputs=[{"name": "class", "parameters": {"classification": 3}}]),
        "classification extension",
    ),
    ({"inputs": [tensor(ONE, parameters={"binary_data_size": 64})]}, "0 were sent"),
    ({"inputs": [tensor(ONE, data=FLAT, parameters={"binary_data_size": 64})]}, "takes one of them"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_told_what_is_wrong_and_the_next_one_is_fine(
    guard: Guard, body: Any, words: str
) -> None:
    bad, good = ask(build(guard, name="quadrants"), post(body), post(plain_body(ONE)))
    assert (bad.status_code, good.status_code) == (400, 200)
    assert words in bad.json()["error"]


def test_binary_data_have_the_size_that_is_told(guard: Guard) -> None:
    whole, length = binary(ONE.numpy(), "UINT8")
    nan = np.full((1, 1, 8, 8), np.nan, np.float32)
    not_finite, its = binary(nan, "FP32")
    answers = ask(
        build(guard, name="quadrants"),
        post(whole[:-1], **length),
        post(whole + b"\0", **length),
        post(whole, **{protocol.LENGTH: "9" * 30}),
        post(whole, **{protocol.LENGTH: "-1"}),
        post(plain_body(ONE) | {}, **{protocol.LENGTH: "0"}),
        post(not_finite, **its),
    )
    assert [one.status_code for one in answers] == [400] * 6
    assert "finite numbers" in answers[-1].json()["error"]


def test_metadata_health_and_addresses(guard: Guard) -> None:
    app = build(guard, name="quadrants")
    about, live, ready, model, its, other, version, missing, method = ask(
        app,
        get("/v2"),
        get("/v2/health/live"),
        get("/v2/health/ready"),
        get("/v2/models/quadrants"),
        get("/v2/models/quadrants/versions/1/ready"),
        get("/v2/models/other"),
        get("/v2/models/quadrants/versions/2"),
        get("/nothing"),
        get(INFER),
    )
    assert about.json()["extensions"] == ["binary_tensor_data"]
    assert (live.json()["live"], ready.json()["ready"], its.json()["ready"]) == (True, True, True)
    assert model.json()["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 8, 8]}]
    assert [one["name"] for one in model.json()["outputs"]] == ["logits", "class", "accepted"]
    assert [one.status_code for one in (other, version, missing, method)] == [404, 404, 404, 405]
    assert all(one.json()["error"] for one in (other, version, missing, method))
    (described,) = ask(app, get("/openapi.json"))
    document = described.json()
    asked = document["paths"]["/v2/models/{model}/infer"]["post"]
    assert asked["parameters"][0]["schema"]["enum"] == ["quadrants"]
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', described.text.replace('":"', '": "')))
    assert {"TensorIn", "OutputWanted", "TensorOut", "Failure"} <= names
    assert names <= set(document["components"]["schemas"])
    assert "$defs" not in described.text


def test_clients_bear_the_token_and_probes_need_none(guard: Guard) -> None:
    app = build(guard, name="quadrants", token="sesame")
    answers = ask(
        app,
        get("/v2/health/ready"),
        get("/v2"),
        get("/metrics", Authorization="Bearer open"),
        get("/", Authorization="Basic sesame"),
        post(plain_body(ONE)),
        post(plain_body(ONE), Authorization="Bearer sesame"),
    )
    assert [one.status_code for one in answers] == [200, 401, 401, 401, 401, 200]
    assert answers[1].headers["www-authenticate"] == "Bearer"


def test_large_slow_and_packed_requests_are_turned_away(guard: Guard) -> None:
    app = build(guard, name="quadrants", limits=Limits(body=2_000, receiving=1.0))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 1_000

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(3_600)

    answers = ask(
        app,
        post(b" " * 2_001),
        lambda client: client.post(INFER, content=pieces()),
        lambda client: client.post(INFER, content=never()),
        post(plain_body(ONE), **{"Content-Encoding": "gzip"}),
        post(plain_body(ONE)),
    )
    assert [one.status_code for one in answers] == [413, 413, 408, 415, 200]


def test_requests_with_rejected_inputs_are_refused_where_asked(guard: Guard) -> None:
    bad = block(clean_images(2, seed=8))
    app = build(guard, name="quadrants", refuse=True)
    good, refused = ask(app, post(plain_body(clean_images(4, seed=5)[:1])), post(plain_body(bad)))
    assert (good.status_code, refused.status_code) == (200, 422)
    assert "2 inputs are rejected: 0: strip" in refused.json()["error"]


def test_in_front_of_another_server(guard: Guard) -> None:
    behind = httpx.ASGITransport(build(guard, name="theirs"))
    url = "http://upstream/v2/models/theirs"
    bad = block(clean_images(2, seed=8))
    body, length = binary(bad.numpy(), "UINT8")

    def front(transport: httpx.AsyncBaseTransport) -> FastAPI:
        return build(guard, name="quadrants", upstream=Upstream(url, transport=transport))

    ready, plain, packed = ask(
        front(behind), get("/v2/health/ready"), post(plain_body(bad)), post(body, **length)
    )
    assert ready.status_code == 200
    assert plain.json()["model_name"] == "theirs"
    for one in (plain, packed):
        assert outputs(one)["class"].tolist() == [0, 0]
    assert plain.json()["outputs"][0]["parameters"]["verdict"] == "rejected"

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody there")

    def odd(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"[]")

    def busy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, content=b"busy")

    for answer, status in ((gone, 502), (odd, 502), (busy, 503)):
        app = front(httpx.MockTransport(answer))
        ready, found = ask(app, get("/v2/health/ready"), post(plain_body(ONE)))
        assert found.status_code == status
        assert ready.status_code == (200 if answer is odd else 503)
    with pytest.raises(InputError, match="/v2/models/NAME"):
        Upstream("http://host/predict")


def test_a_model_that_cannot_tell_is_told_as_such(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    app = build(guard, name="quadrants")

    def judge(self: Guard, images: Tensor) -> Answers:
        raise CouldNotTell("the model gives outputs that are not finite")

    monkeypatch.setattr(Guard, "__call__", judge)
    (found,) = ask(app, post(plain_body(ONE)))
    assert found.status_code == 500
    assert "not finite" in found.json()["error"]


def numbered(images: Tensor) -> Answers:
    """Answer each image with its first value."""
    first = images[:, 0, 0, 0].numpy().astype(np.int64)
    if (first == 255).any():
        raise CouldNotTell("this one is bad")
    n = len(images)
    return Answers(first, np.ones(n, bool), ((),) * n, np.zeros((1, n)), np.zeros((n, 2), np.float32))


def image(value: int, count: int = 1) -> Tensor:
    return torch.full((count, 1, 2, 2), value, dtype=torch.uint8)


def test_requests_share_batches_and_each_gets_its_own_answer() -> None:
    sizes = []

    def judge(images: Tensor) -> Answers:
        sizes.append(len(images))
        return numbered(images)

    async def run() -> list[Any]:
        batcher = Batcher(judge, largest=16, room=10_000)
        asked = [batcher.submit(image(i % 255, 1 + i % 3)) for i in range(600)]
        bad = batcher.submit(image(255))
        found = await asyncio.gather(*asked, bad, return_exceptions=True)
        assert batcher.held == 0
        await batcher.close()
        return found

    *found, bad = asyncio.run(run())
    assert isinstance(bad, CouldNotTell)
    for i, one in enumerate(found):
        assert one.predictions.tolist() == [i % 255] * (1 + i % 3)
    assert max(sizes) == 16
    assert len(sizes) < 120


def test_the_queue_is_bounded_and_what_was_taken_is_finished() -> None:
    go = threading.Event()

    def judge(images: Tensor) -> Answers:
        go.wait()
        return numbered(images)

    async def run() -> None:
        batcher = Batcher(judge, largest=4, room=8)
        taken = [asyncio.create_task(batcher.submit(image(i, 4))) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await batcher.submit(image(9))
        assert full.value.retry_after >= 1
        taken[1].cancel()  # a client that leaves
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await batcher.submit(image(9))
        go.set()
        assert (await taken[0]).predictions.tolist() == [0] * 4
        await closing

    asyncio.run(run())


def test_what_was_seen_is_counted_shown_and_kept(guard: Guard, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "kept", most=3)
    watch = Watch(guard, quarantine=quarantine)
    app = build(guard, name="<quadrants>", watch=watch, limits=Limits(batch=1_000))
    name = "/v2/models/%3Cquadrants%3E/infer"
    many = clean_images(BLOCK, seed=11)
    bad = block(clean_images(40, seed=12))
    *_, calm, _, metrics, page, renewed = ask(
        app,
        post(plain_body(many), path=name),
        get("/metrics"),
        post(plain_body(torch.cat([bad, many[:-40]])), path=name),
        get("/metrics"),
        get("/"),
        get("/?renew=1"),
    )
    assert "doorward_guard_drift_alarm 0.0" in calm.text
    assert "doorward_guard_drift_alarm 1.0" in metrics.text
    rejected = watch.rejected_inputs
    assert 40 <= rejected <= 80
    assert f'doorward_guard_inputs_total{{verdict="rejected"}} {float(rejected)}' in metrics.text
    assert 'doorward_guard_requests_total{status="200"} 2.0' in metrics.text
    assert "Alarm." in page.text
    assert 'http-equiv="refresh"' not in page.text, "a page that renews itself is hard to read aloud"
    assert 'http-equiv="refresh" content="10"' in renewed.text
    assert "&lt;quadrants&gt;" in page.text
    assert "<quadrants>" not in page.text
    assert page.text.count("<img") == 12
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert len(list((tmp_path / "kept").glob("*.png"))) == 3
    rows = [json.loads(line) for line in (tmp_path / "kept/rejected.jsonl").read_text().splitlines()]
    assert {"file", "at", "class", "reasons"} == set(rows[0])
    assert quarantine.dropped == rejected - len(rows)
    for bars in watch.histograms():
        assert sum(bars.clean) == pytest.approx(1)
        assert sum(bars.served) == pytest.approx(1)


def test_where_it_listens() -> None:
    assert address("8080") == ("127.0.0.1", 8080)
    assert address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert address("[::1]:80") == ("::1", 80)
    assert [local(one) for one in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [local(one) for one in ("0.0.0.0", "example.org")] == [False] * 2
    for text in ("", "x", "1:2:", "70000", "host:-1"):
        with pytest.raises(InputError, match="takes"):
            address(text)


def test_files_for_tls_are_looked_at_first(tmp_path: Path) -> None:
    from doorward.guard.pipeline import GuardRequest

    file = tmp_path / "cert.pem"
    file.write_text("no certificate")
    asked: dict[str, Any] = {"guard": GuardRequest(model="m")}
    for files, words in (
        ({"certificate": file}, "give both --tls-cert and --tls-key"),
        ({"clients": file}, "certificate too"),
        ({"certificate": file, "key": file}, "it takes certificates in PEM"),
        ({"certificate": file, "key": tmp_path / "none"}, "none: there is no such file"),
    ):
        with pytest.raises(InputError, match=words):
            _check_tls(ServeRequest(**asked, **files))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--check DATA"),
        (("--check", "x", "--serve", "80"), "--check DATA"),
        (("--serve", "zero"), "[HOST:]PORT"),
        (("--check", "x", "--refuse"), "--refuse goes with --serve"),
        (("--serve", "80", "--out", "x"), "--out goes with --check"),
        (("--serve", "80", "--name", "a b"), "--name takes letters"),
        (("--serve", "80", "--token-file", "/nowhere"), "cannot be read"),
        (("--serve", "80", "--upstream", "ftp://x"), "http://HOST/v2/models/NAME"),
        (("--serve", "80", "--tls-clients", "x"), "certificate too"),
    ],
)
def test_wrong_uses_are_told(options: tuple[str, ...], words: str) -> None:
    done = call("guard", BACKDOORED, "--clean", CLOTHES, *options)
    assert done.code == 2
    assert words in done.err


def test_the_command_serves_and_stops_when_told(tmp_path: Path) -> None:
    clean = tmp_path / "clean.npz"
    np.savez(clean, images=np.stack(bundled.fashion_mnist("test").raw(range(120))))
    code = "from doorward.cli.app import main; main()"
    filters = ("--filter", "feature-squeezing", "--rate", "0.1")
    command = [sys.executable, "-c", code, "guard", BACKDOORED, "--clean", clean, "--serve", "0", *filters]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            where = next(line.split(" at ")[1].strip() for line in server.stderr if " at http" in line)
            found = httpx.get(f"{where}/v2/models/backdoored", timeout=60)
            assert found.json()["inputs"][0]["shape"] == [-1, 1, 28, 28]
        finally:
            server.send_signal(signal.SIGTERM)
            rest = server.stderr.read()
        assert '"status": 200' in rest
    assert server.returncode == 128 + signal.SIGTERM


def test_shapes_of_requests_are_those_of_the_model() -> None:
    told = protocol.metadata("m", SPEC, ("a", "b"))
    assert told["outputs"][0]["shape"] == [-1, 2]
