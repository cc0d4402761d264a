"""A server behind the guard that speaks the same protocol and gives the answers."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx

from doorward.core.errors import InputError
from doorward.guard.serving.protocol import LENGTH, Reply

#: Seconds in which the upstream has to take a connection.
CONNECTING = 5.0


class UpstreamGoneError(Exception):
    """The upstream does not answer."""


class Upstream:
    """A model of another server.

    Args:
        url: of the model, such as `http://host:8000/v2/models/NAME`.
        seconds: in which it has to answer.
        transport: how it is reached, over the network if None.

    Raises:
        InputError: if the address is none.
    """

    def __init__(
        self, url: str, *, seconds: float = 30.0, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "/v2/models/" not in parts.path:
            raise InputError(f"an upstream is a model's address, http://HOST/v2/models/NAME; got {url!r}")
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(seconds, connect=CONNECTING), transport=transport
        )

    async def ready(self) -> bool:
        """Return whether the model is ready."""
        try:
            return (await self._client.get(f"{self.url}/ready")).status_code == 200
        except httpx.HTTPError:
            return False

    async def infer(self, body: bytes, length: str | None) -> tuple[int, Reply]:
        """Pass a request on; return the status and what the upstream answers.

        Raises:
            UpstreamGoneError: if it does not answer.
        """
        headers = {"Content-Type": "application/octet-stream" if length else "application/json"}
        headers |= {LENGTH: length} if length else {}
        try:
            found = await self._client.post(f"{self.url}/infer", content=body, headers=headers)
        except httpx.HTTPError as error:
            raise UpstreamGoneError(f"the upstream does not answer: {type(error).__name__}") from None
        return found.status_code, Reply(found.content, dict(found.headers))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
