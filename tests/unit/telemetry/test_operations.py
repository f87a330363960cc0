"""The operations port: probes, metrics, and nothing else; bounded against slow, endless and many peers."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

import pytest

from sidecar.telemetry import operations
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.operations import OperationsServer


class Served:
    """A server on a port of its own, and what its probes say."""

    def __init__(self) -> None:
        self.started = self.ready = False
        self.metrics = Metrics()
        self.port = 0

    async def raw(self, request: bytes, *, hang_up: bool = False) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            if hang_up:
                writer.write_eof()
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    async def get(self, path: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
        lines = "".join(f"{header}\r\n" for header in headers)
        return parsed(await self.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()))


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    headers = dict(field.lower().split(": ", 1) for field in fields)
    return int(status.split(" ")[1]), headers, body


def serve(test: Callable[[Served], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        served = Served()
        server = OperationsServer(
            registry=served.metrics.registry, is_started=lambda: served.started, is_ready=lambda: served.ready
        )
        served.port = await server.start("127.0.0.1", 0)
        try:
            await test(served)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_probes_say_what_is_so_at_this_moment() -> None:
    """/livez always; /startup once it has started; /readyz while it could serve."""

    async def test(served: Served) -> None:
        assert [(await served.get(path))[0] for path in ("/livez", "/startup", "/readyz")] == [200, 503, 503]
        served.started = served.ready = True
        assert [(await served.get(path))[0] for path in ("/livez", "/startup", "/readyz")] == [200, 200, 200]
        served.ready = False
        assert [(await served.get(path))[0] for path in ("/livez", "/startup", "/readyz?verbose")] == [200, 200, 503]

    serve(test)


@pytest.mark.parametrize(
    ("accept", "media_type", "end"),
    [
        (None, "text/plain; version=", b"\n"),
        ("text/plain", "text/plain; version=", b"\n"),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
            "application/openmetrics-text; version=1.0.0",
            b"# EOF\n",
        ),
    ],
)
def test_metrics_are_in_the_form_that_was_asked_for(accept: str | None, media_type: str, end: bytes) -> None:
    """Prometheus text by default, OpenMetrics for those who ask."""

    async def test(served: Served) -> None:
        served.metrics.log_entries.set(42)
        status, headers, body = await served.get("/metrics", *([f"Accept: {accept}"] if accept else []))

        assert status == 200
        assert headers["content-type"].startswith(media_type)
        assert int(headers["content-length"]) == len(body)
        assert b"custody_log_entries 42.0" in body
        assert body.endswith(end)

    serve(test)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", 404),
        (b"GET /metrics/ HTTP/1.1", 404),
        (b"GET /../livez HTTP/1.1", 404),
        (b"GET /LIVEZ HTTP/1.1", 404),
        (b"POST /metrics HTTP/1.1", 405),
        (b"DELETE /livez HTTP/1.0", 405),
        (b"get /livez HTTP/1.1", 400),
        (b"GET /livez", 400),
        (b"GET livez HTTP/1.1", 400),
        (b"GET http://x/livez HTTP/1.1", 400),
        (b"GET /livez HTTP/2.0", 400),
        (b"GET  /livez HTTP/1.1", 400),
        (b"GET /li\xffvez HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"", 400),
    ],
)
def test_what_is_not_offered_is_refused(request_line: bytes, status: int) -> None:
    """404, 405 with Allow, 400: in few words, without an echo of the request."""

    async def test(served: Served) -> None:
        got, headers, body = parsed(await served.raw(request_line + b"\r\nHost: x\r\n\r\n"))

        assert got == status
        assert ("allow" in headers) == (status == 405)
        assert len(body) < 64
        assert b"li\xff" not in body

    serve(test)


def test_head_is_answered_without_a_body() -> None:
    """As load balancers ask."""

    async def test(served: Served) -> None:
        status, _, body = parsed(await served.raw(b"HEAD /livez HTTP/1.1\r\n\r\n"))
        assert (status, body) == (200, b"")

    serve(test)


def test_one_request_a_connection() -> None:
    """What follows the first request is not read; the connection is closed."""

    async def test(served: Served) -> None:
        answer = await served.raw(b"GET /livez HTTP/1.1\r\n\r\nGET /livez HTTP/1.1\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200") == 1

    serve(test)


@pytest.mark.parametrize("request_bytes", [b"GET /livez HTTP/1.1\r\nX: " + b"x" * 20_000, b"GET /livez HTTP/1.1\r\n"])
def test_a_head_without_end_gets_no_answer(request_bytes: bytes) -> None:
    """Too long, or the peer hung up: closed without a word, and the server goes on."""

    async def test(served: Served) -> None:
        with suppress(ConnectionError):  # closed with bytes of ours unread: the kernel says reset
            assert await served.raw(request_bytes, hang_up=True) == b""
        assert (await served.get("/livez"))[0] == 200

    serve(test)


def test_a_slow_peer_keeps_nobody_waiting_and_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends nothing more is closed after its time; others are served meanwhile."""
    monkeypatch.setattr(operations, "_HEAD_SECONDS", 0.3)

    async def test(served: Served) -> None:
        slow = asyncio.ensure_future(served.raw(b"GET /livez"))
        assert (await served.get("/livez"))[0] == 200
        assert await slow == b""

    serve(test)


def test_more_connections_than_the_bound_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those within it are answered when they speak."""
    monkeypatch.setattr(operations, "_CONNECTIONS", 2)

    async def test(served: Served) -> None:
        held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
        for _, writer in held:
            writer.write(b"GET /li")
            await writer.drain()
        await asyncio.sleep(0.1)
        with suppress(ConnectionError):
            assert await served.raw(b"GET /livez HTTP/1.1\r\n\r\n") == b""
        for reader, writer in held:
            writer.write(b"vez HTTP/1.1\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 200")
            writer.close()

    serve(test)
