"""The operations port: plain HTTP for the kubelet and Prometheus, and nothing else on it.

GET /livez: this process serves. GET /startup: it has become ready once. GET /readyz: it could serve a call now. GET /metrics.
Liveness never looks at the HSM or a bank: restarting this container would not heal them.
"""

import asyncio
import re
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

__all__ = ["OperationsServer"]

_HEAD_BYTES = 8 * 1024
_HEAD_SECONDS = 5.0
_CONNECTIONS = 64
_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]")
_OPEN_METRICS = "application/openmetrics-text"


class OperationsServer:
    """`is_started` and `is_ready` are asked at each probe."""

    def __init__(
        self,
        *,
        registry: CollectorRegistry,
        is_started: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._probes = {"/livez": lambda: True, "/startup": is_started, "/readyz": is_ready}
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port. Raises OSError when the address cannot be taken."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=_HEAD_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection: bounded in size, time and number."""
        self._open += 1
        try:
            if self._open > _CONNECTIONS:
                return
            async with asyncio.timeout(_HEAD_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                status, media_type, body = self._answer(head)
                if head.startswith(b"HEAD "):
                    body = b""
                writer.write(_head(status, media_type, len(body)) + body)
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # a peer that does not speak or does not read is no event of ours
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, head: bytes) -> tuple[HTTPStatus, str, bytes]:
        lines = head.decode("latin-1").split("\r\n")
        parsed = _REQUEST_LINE.fullmatch(lines[0])
        if parsed is None:
            return HTTPStatus.BAD_REQUEST, "text/plain", b"no request\n"
        method, path = parsed[1], parsed[2].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET\n"
        if path == "/metrics":
            return self._metrics(lines[1:])
        if path not in self._probes:
            return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics /livez /readyz /startup\n"
        if self._probes[path]():
            return HTTPStatus.OK, "text/plain", b"ok\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"not yet\n"

    def _metrics(self, headers: list[str]) -> tuple[HTTPStatus, str, bytes]:
        """Of the Accept header only one word is looked at: what is chosen, and sent back, is never text of the request."""
        wanted = any(line.lower().startswith("accept:") and _OPEN_METRICS in line.lower() for line in headers)
        encode, media_type = choose_encoder(_OPEN_METRICS if wanted else "")
        return HTTPStatus.OK, media_type, encode(self._registry)


def _head(status: HTTPStatus, media_type: str, length: int) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n{allow}"
        "Connection: close\r\nX-Content-Type-Options: nosniff\r\n\r\n"
    ).encode("ascii")
