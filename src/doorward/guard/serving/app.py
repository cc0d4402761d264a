"""The server: a guard behind the Open Inference Protocol, with health, metrics and a status page."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from doorward._version import __version__
from doorward.core.errors import CouldNotTell, InputError
from doorward.core.formatting import duration, number, percent
from doorward.guard.guard import Answers, Guard
from doorward.guard.serving import protocol
from doorward.guard.serving.batches import Batcher, QueueFullError
from doorward.guard.serving.protocol import Failure, InferenceAnswer, InferenceRequest, Reply
from doorward.guard.serving.tensors import BadRequestError
from doorward.guard.serving.upstream import Upstream, UpstreamGoneError
from doorward.guard.serving.watch import Watch
from doorward.reports.page import template
from doorward.reports.phrases import Fact

LOG = logging.getLogger("doorward.guard")
#: Bodies beyond which reading one is left to a thread, so that others do not wait.
LARGE = 1 << 16
#: The only version of a model that is served.
VERSION = "1"
#: What needs no token: probes of a cluster have none.
OPEN = ("/v2/health/live", "/v2/health/ready")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
        body: bytes of a request.
        inputs: of a request.
        waiting: inputs that may wait.
        batch: inputs of one batch.
        receiving, answering: seconds in which a body has to arrive, and in which it is answered.
    """

    body: int = 64 << 20
    inputs: int = 1_024
    waiting: int = 2_048
    batch: int = 64
    receiving: float = 10.0
    answering: float = 30.0


class _RefusedError(Exception):
    """A request that ends with a status other than 200."""

    def __init__(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.headers = status, headers or {}


def build(
    guard: Guard,
    *,
    name: str,
    limits: Limits | None = None,
    token: str | None = None,
    refuse: bool = False,
    upstream: Upstream | None = None,
    watch: Watch | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        name: of the model in addresses.
        token: what clients have to bear, None if nothing.
        refuse: give no answer to a request with a rejected input, instead of marking it.
        upstream: the server that answers, None if the guard's own model does.
    """
    server = _Server(guard, name, limits or Limits(), refuse, upstream, watch or Watch(guard))
    app = FastAPI(
        title="Doorward guard",
        version=__version__,
        description="A guarded model behind the Open Inference Protocol (KServe v2).",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=server.lifespan,
    )
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": Failure} for status in (400, 401, 404, 408, 413, 415, 422, 429, 500, 502, 503)
    }
    body = InferenceRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = body.pop("$defs")
    asks = {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
    app.add_api_route("/v2", server.about, methods=["GET"])
    app.add_api_route("/v2/health/live", server.live, methods=["GET"])
    app.add_api_route("/v2/health/ready", server.ready, methods=["GET"], responses={503: {"model": Failure}})
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.add_api_route(base, server.model, methods=["GET"], responses={404: {"model": Failure}})
        app.add_api_route(
            f"{base}/ready", server.model_ready, methods=["GET"], responses={404: {"model": Failure}}
        )
        app.add_api_route(
            f"{base}/infer",
            server.infer,
            methods=["POST"],
            response_model=InferenceAnswer,
            responses=failures,
            openapi_extra=asks,
        )
    app.add_api_route("/metrics", server.metrics, methods=["GET"], response_class=Response)
    app.add_api_route("/", server.status, methods=["GET"], response_class=HTMLResponse)
    _complete(app.openapi(), parts, {"model": name, "version": VERSION})
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(Exception, _broken)

    @app.middleware("http")
    async def checked(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Let in who bears the token, and write a line for each request."""
        begun = time.perf_counter()
        if token is not None and request.url.path not in OPEN and not _bears(request, token):
            reply: Response = _failure(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        else:
            reply = await go_on(request)
        took = time.perf_counter() - begun
        if request.url.path.endswith("/infer"):
            server.watch.answered(reply.status_code, took)
        LOG.info(
            json.dumps(
                {
                    "at": round(time.time(), 3),
                    "method": request.method,
                    "path": request.url.path[:200],
                    "status": reply.status_code,
                    "seconds": round(took, 4),
                }
                | getattr(request.state, "seen", {})
            )
        )
        return reply

    return app


class _Server:
    """The handlers and what they share."""

    def __init__(
        self,
        guard: Guard,
        name: str,
        limits: Limits,
        refuse: bool,
        upstream: Upstream | None,
        watch: Watch,
    ) -> None:
        self.guard, self.name, self.limits, self.refuse = guard, name, limits, refuse
        self.upstream, self.watch = upstream, watch
        self._batcher = Batcher(self._judge, largest=limits.batch, room=limits.waiting)

    def _judge(self, inputs: torch.Tensor) -> Answers:
        answers = self.guard(inputs)
        self.watch.judged(inputs, answers)
        return answers

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Finish what was accepted before the server ends."""
        yield
        await self._batcher.close()
        if self.upstream is not None:
            await self.upstream.close()

    async def about(self) -> dict[str, Any]:
        """Say what this server is."""
        return {"name": "doorward", "version": __version__, "extensions": ["binary_tensor_data"]}

    async def live(self) -> dict[str, bool]:
        """Say that the server runs."""
        return {"live": True}

    async def ready(self) -> Response:
        """Say whether the server can answer; in front of another server that is for that one to say."""
        if self.upstream is not None and not await self.upstream.ready():
            return _failure(503, "the upstream is not ready")
        return JSONResponse({"ready": True})

    async def model(self, model: str, version: str = VERSION) -> dict[str, Any]:
        """Return the model's metadata."""
        self._known(model, version)
        return protocol.metadata(self.name, self.guard.classifier.spec, self.guard.classifier.classes)

    async def model_ready(self, model: str, version: str = VERSION) -> dict[str, Any]:
        """Say that the model can answer."""
        self._known(model, version)
        return {"name": self.name, "ready": True}

    async def metrics(self) -> Response:
        """Return metrics in the text format of Prometheus."""
        self.watch.waiting.set(self._batcher.held)
        return Response(self.watch.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, renew: bool = False) -> HTMLResponse:
        """Return the status page, which renews itself where that is asked for."""
        watch, guard = self.watch, self.guard
        share = percent(watch.rejected_inputs / watch.inputs) if watch.inputs else "none yet"
        page = template("status.html.j2", ("doorward.guard",)).render(
            name=self.name,
            renew=renew,
            facts=[
                Fact("Inputs", f"{watch.inputs:,}"),
                Fact("Rejected", f"{watch.rejected_inputs:,}"),
                Fact("Share rejected", share, f"of clean inputs at most {percent(guard.rate)}"),
            ],
            alarm=watch.alarm,
            running=duration(time.time() - watch.started),
            histograms=watch.histograms(),
            newest=[(one, time.strftime("%H:%M:%S", time.gmtime(one.at))) for one in watch.newest()],
            number=number,
            tallest=lambda bars: max(*bars.clean, *bars.served, 1e-9),
            version=__version__,
        )
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def infer(self, request: Request, model: str, version: str = VERSION) -> Response:
        """Judge inputs and answer them."""
        try:
            self._known(model, version)
            body = await self._body(request)
            answers, reply = await self._answer(request, body)
        except _RefusedError as why:
            return _failure(why.status, str(why), why.headers)
        except ClientDisconnect:
            return _failure(408, "the client has left")
        if self.refuse and not answers.accepted.all():
            said = protocol.verdict(answers)
            return _failure(422, f"{said['rejected']} inputs are rejected: {said['reasons']}")
        return Response(reply.body, headers=reply.headers)

    async def _answer(self, request: Request, body: bytes) -> tuple[Answers, Reply]:
        length = request.headers.get(protocol.LENGTH)
        spec, most = self.guard.classifier.spec, self.limits.inputs
        try:
            if len(body) > LARGE:
                asked = await asyncio.to_thread(protocol.read_request, body, length, spec, most=most)
            else:
                asked = protocol.read_request(body, length, spec, most=most)
        except BadRequestError as why:
            raise _RefusedError(400, str(why)) from None
        try:
            async with asyncio.timeout(self.limits.answering):
                answers = await self._batcher.submit(asked.inputs)
                request.state.seen = {"inputs": len(asked.inputs), "rejected": int((~answers.accepted).sum())}
                if self.upstream is None or (self.refuse and not answers.accepted.all()):
                    return answers, protocol.write_answer(self.name, asked, answers)
                return answers, await self._from_upstream(body, length, answers)
        except QueueFullError as why:
            raise _RefusedError(429, str(why), {"Retry-After": str(why.retry_after)}) from None
        except TimeoutError:
            raise _RefusedError(503, f"no answer within {duration(self.limits.answering)}") from None
        except (CouldNotTell, InputError) as why:
            raise _RefusedError(500, f"could not tell: {why}") from None

    async def _from_upstream(self, body: bytes, length: str | None, answers: Answers) -> Reply:
        assert self.upstream is not None
        try:
            status, reply = await self.upstream.infer(body, length)
            if status != 200:
                raise _RefusedError(status, f"the upstream says: {reply.body[:500].decode(errors='replace')}")
            return protocol.add_verdict(reply, answers)
        except (UpstreamGoneError, BadRequestError) as why:
            raise _RefusedError(502, str(why)) from None

    def _known(self, model: str, version: str) -> None:
        if model != self.name or version != VERSION:
            raise HTTPException(404, f"there is no such model; there is {self.name!r}, version {VERSION}")

    async def _body(self, request: Request) -> bytes:
        """Return the body, unless it is too large, too slow or packed."""
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise _RefusedError(415, "compressed requests are not served")
        most = self.limits.body
        too_large = _RefusedError(413, f"a request may have {most:,} bytes", {"Connection": "close"})
        declared = request.headers.get("Content-Length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.receiving):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise _RefusedError(
                            413, f"a request may have {most:,} bytes", {"Connection": "close"}
                        )
                    parts.append(part)
        except TimeoutError:
            why = f"the request did not arrive within {duration(self.limits.receiving)}"
            raise _RefusedError(408, why, {"Connection": "close"}) from None
        return b"".join(parts)


def _complete(document: dict[str, Any], parts: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Add to the OpenAPI document the parts of a request, and what can stand in an address."""
    document["components"]["schemas"].update(parts)
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"]["enum"] = [names[parameter["name"]]]


def _bears(request: Request, token: str) -> bool:
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _failure(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": why}, status, headers)


async def _told(request: Request, error: Exception) -> Response:
    """Tell what is wrong as the protocol has it."""
    assert isinstance(error, HTTPException)
    return _failure(error.status_code, str(error.detail), dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    """Tell of a fault without what is inside."""
    LOG.error(json.dumps({"at": round(time.time(), 3), "fault": repr(error)[:500]}))
    return _failure(500, "a fault in the server; its log has more")
