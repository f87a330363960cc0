"""A provider that costs as little as it can: TLS with client certificates, canned Berlin Group answers, at once or after a while.

The sandbox bank checks signatures and keeps books, which would be most of what a benchmark on two cores measured. This one has
two ports (`instant`, `slow`) and counts payments by X-Request-ID, so that a benchmark can check that each was made once.
"""

import argparse
import asyncio
import ssl
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.workers import Work, serve
from sandbox.directory import Layout

__all__ = ["BALANCES_BYTES", "main"]

_BALANCES = (
    b'{"account":{"iban":"DE19100100100000000404"},"balances":[{"balanceAmount":{"currency":"EUR","amount":"900000000.00"},'
    b'"balanceType":"closingBooked","referenceDate":"2026-11-22"},{"balanceAmount":{"currency":"EUR","amount":"899999990.00"},'
    b'"balanceType":"interimAvailable","lastChangeDateTime":"2026-11-23T08:00:00Z"}]}'
)
BALANCES_BYTES = len(_BALANCES)


async def main(arguments: Sequence[str]) -> tuple[dict[str, Any], Work]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--delay-seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    bank = _Bank()
    context = _context(Layout(root=options.directory))
    ports = {
        "instant": await _listen(bank, context, 0.0),
        "slow": await _listen(bank, context, options.delay_seconds),
    }
    return {"ports": ports}, bank.answer_command


class _Bank:
    """What it has seen."""

    def __init__(self) -> None:
        self.payments: Counter[str] = Counter()
        self.servers: list[asyncio.Server] = []

    async def answer_command(self, command: dict[str, Any]) -> dict[str, Any]:
        assert command == {"work": "counts"}
        repeated = sum(1 for count in self.payments.values() if count > 1)
        return {"payments": len(self.payments), "repeated": repeated}


async def _listen(bank: _Bank, context: ssl.SSLContext, delay_seconds: float) -> int:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Http(bank=bank, delay_seconds=delay_seconds), "127.0.0.1", 0, ssl=context, backlog=512
    )
    bank.servers.append(server)
    return int(server.sockets[0].getsockname()[1])


def _context(layout: Layout) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(layout.server_certificate, layout.server_key)
    context.load_verify_locations(cafile=str(layout.ca_certificate))
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class _Http(asyncio.Protocol):
    """One connection. Reads whole requests, answers each in turn."""

    def __init__(self, *, bank: _Bank, delay_seconds: float) -> None:
        self._bank = bank
        self._delay_seconds = delay_seconds
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not registered as such

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n") + 4) >= 4:
            head = self._received[:end]
            whole = end + int(_field(head, b"content-length") or 0)
            if len(self._received) < whole:
                return
            self._received = self._received[whole:]
            self._serve(head)

    def _serve(self, head: bytes) -> None:
        answer, closes = self._answer(head), b"close" in _field(head, b"connection")
        if self._delay_seconds:
            asyncio.get_running_loop().call_later(self._delay_seconds, self._write, answer, closes)
        else:
            self._write(answer, closes)

    def _answer(self, head: bytes) -> bytes:
        call_id = _field(head, b"x-request-id")
        if head.startswith(b"POST /v1/payments/"):
            self._bank.payments[call_id.decode()] += 1
            number = len(self._bank.payments)
            body = b'{"transactionStatus":"ACSC","paymentId":"payment-%d","_links":{"self":{"href":"/v1/p"}}}' % number
            return _http(b"201 Created", call_id, body)
        if head.startswith(b"GET /v1/accounts/") and b"/balances " in head.partition(b"\r\n")[0]:
            return _http(b"200 OK", call_id, _BALANCES)
        return _http(b"404 Not Found", call_id, b"{}")

    def _write(self, answer: bytes, closes: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(answer)
        if closes:
            self._transport.close()


def _field(head: bytes, name: bytes) -> bytes:
    start = head.lower().find(b"\r\n" + name + b":")
    if start < 0:
        return b""
    start += len(name) + 3
    return head[start : head.find(b"\r\n", start)].strip()


def _http(status: bytes, call_id: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nX-Request-ID: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        call_id,
        len(body),
        body,
    )


if __name__ == "__main__":
    serve(main)
