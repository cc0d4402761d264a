"""Fit a guard and serve it until it is told to stop."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from doorward.core.budget import Deadline
from doorward.core.errors import InputError
from doorward.guard.pipeline import GuardRequest, prepare
from doorward.guard.serving.app import LOG, Limits, build
from doorward.guard.serving.upstream import Upstream
from doorward.guard.serving.watch import Quarantine, Watch
from doorward.models.encode.dispatch import NOUNS, blank

#: Connections that are served at once, and seconds that requests in work have when the server stops.
CONNECTIONS, STOPPING = 512, 30


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """How a guard is served.

    Attributes:
        host, port: where it listens; with port 0 the system chooses one.
        name: of the model in addresses.
        token: what clients bear.
        certificate, key, clients: files for TLS, and with the authority of clients' certificates for mTLS.
        upstream: address of the model that answers, None if the guard's own model does.
        refuse: give no answer to requests with rejected inputs.
        quarantine: folder for rejected images.
    """

    guard: GuardRequest
    host: str = "127.0.0.1"
    port: int = 8080
    name: str = "model"
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    clients: Path | None = None
    upstream: str | None = None
    refuse: bool = False
    quarantine: Path | None = None
    limits: Limits = field(default_factory=Limits)


def address(text: str) -> tuple[str, int]:
    """Read `[HOST:]PORT`; without a host the server is for this machine alone.

    >>> address("8080"), address("0.0.0.0:80"), address("[::1]:80")
    (('127.0.0.1', 8080), ('0.0.0.0', 80), ('::1', 80))

    Raises:
        InputError: if it is something else.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65_536):
        raise InputError(f"--serve takes [HOST:]PORT, such as 8080, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def local(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(request: ServeRequest, *, progress: Callable[[str], None] | None = None) -> None:
    """Fit the guard, then serve until a signal says to stop.

    Raises:
        InputError: if something is missing, unreadable or does not fit, or the address cannot be had.
        CouldNotTell: if the clean inputs are too few, or the model's outputs say nothing.
        UnsafeArtifact: if loading the model would execute code.
    """
    report_progress = progress or (lambda _: None)
    upstream = Upstream(request.upstream) if request.upstream else None
    quarantine = Quarantine(request.quarantine) if request.quarantine else None
    _check_tls(request)
    guard = prepare(request.guard, Deadline(request.guard.time_budget), progress=progress).guard
    modality = guard.classifier.spec.modality
    if quarantine is not None and modality != "image":
        raise InputError(f"a quarantine keeps images, and this model takes {NOUNS[modality]}")
    if request.guard.keep is not None:
        guard.save(request.guard.keep)
    guard(blank(guard.classifier.spec))
    for warning in guard.fitted.warnings(len(guard.classifier.classes)):
        report_progress(warning)
    app = build(
        guard,
        name=request.name,
        limits=request.limits,
        token=request.token,
        refuse=request.refuse,
        upstream=upstream,
        watch=Watch(guard, quarantine=quarantine),
    )
    listen(app, request, report_progress)


def listen(app: FastAPI, request: ServeRequest, report_progress: Callable[[str], None]) -> None:
    """Serve an application until a signal says to stop.

    Raises:
        InputError: if the address cannot be had.
    """
    if not LOG.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=request.host,
            port=request.port,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=STOPPING,
            ssl_certfile=request.certificate,
            ssl_keyfile=request.key,
            ssl_ca_certs=str(request.clients) if request.clients else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if request.clients else ssl.CERT_NONE,
        )
    )
    sockets = [_bound(server.config)]
    kind = "https" if request.certificate else "http"
    host, port = sockets[0].getsockname()[:2]
    report_progress(f"serving {request.name!r} at {kind}://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=sockets)


def _bound(config: uvicorn.Config) -> socket.socket:
    """Return a socket that listens at the address: from now on a request waits and is not refused.

    Raises:
        InputError: if it cannot be had.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, where = found[0]
        own = socket.socket(family, kind, proto)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(where)
        own.listen(config.backlog)
    except OSError as error:
        raise InputError(f"cannot serve at {config.host}:{config.port}: {error.strerror or error}") from error
    return own


def _check_tls(request: ServeRequest) -> None:
    """See that the files for TLS are there and fit, before the work begins."""
    if (request.certificate is None) != (request.key is None):
        raise InputError("TLS takes a certificate and its key; give both --tls-cert and --tls-key")
    if request.clients is not None and request.certificate is None:
        raise InputError(
            "clients show certificates over TLS alone; give the server's own certificate too (--tls-cert)"
        )
    if request.certificate is None:
        return
    for file in (request.certificate, request.key, request.clients):
        if file is not None and not file.is_file():
            raise InputError(f"{file}: there is no such file; TLS takes certificates and a key in PEM")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(request.certificate, request.key)
        if request.clients is not None:
            context.load_verify_locations(request.clients)
    except ssl.SSLError as error:
        raise InputError(
            f"{request.certificate}: cannot be used for TLS ({error.reason}); it takes certificates in PEM, "
            "and the key of the server's own"
        ) from error
    except OSError as error:
        raise InputError(f"{request.certificate}: cannot be read: {error.strerror or error}") from error
