"""The baseline: an application that holds the token and its keys in its own memory, and calls the bank itself.

It does what the sidecar does towards the bank (the same request, signed, over TLS with a client certificate), in the leanest way
that Python offers: uvloop, its own few lines of HTTP, a key in memory. It keeps no record, and a payment may go out twice.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import ssl
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.workers import Work, run_load, serve
from sandbox.direct import tls_context
from sandbox.directory import Layout, load_certificate

__all__ = ["main"]

_PAYMENT = {
    "instructedAmount": {"currency": "EUR", "amount": "10.00"},
    "debtorAccount": {"iban": "DE19100100100000000404"},
    "creditorAccount": {"iban": "DE75512108001245126199"},
    "creditorName": "Wholesale Ltd",
}

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def main(arguments: Sequence[str]) -> tuple[dict[str, Any], Work]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--instant-port", type=int, required=True)
    parser.add_argument("--slow-port", type=int, required=True)
    options = parser.parse_args(arguments)
    layout = Layout(root=options.directory)
    banks = {
        "instant": _Bank(layout=layout, port=options.instant_port),
        "slow": _Bank(layout=layout, port=options.slow_port),
    }

    async def work(command: dict[str, Any]) -> dict[str, Any]:
        what, _, bank = command["work"].partition("@")
        return await run_load(command, banks[bank].works[what])

    return {}, work


class _Bank:
    """`works`: a payment on a connection of its own, a payment on a kept one, balances on a kept one."""

    def __init__(self, *, layout: Layout, port: int) -> None:
        self._port = port
        self._tls: ssl.SSLContext = tls_context(layout.ca_certificate, layout.tpp_certificate, layout.tpp_key)
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = load_certificate(layout.signing_certificate)
        self._key_id = f"SN={certificate.serial_number:x},CA={certificate.issuer.rfc4514_string()}"
        der = certificate.public_bytes(serialization.Encoding.DER)
        self._certificate = base64.b64encode(der).decode()
        self._token = "a" * 43
        self._idle: list[_Streams] = []
        self.works = {
            "payment_own": self.pay_on_own_connection,
            "payment_kept": self.pay_on_kept_connection,
            "balances": self.balances,
        }

    async def pay_on_own_connection(self) -> None:
        reader, writer = await self._connect()
        try:
            await self._exchange(reader, writer, self._payment("Connection: close\r\n"), b"HTTP/1.1 201 ")
        finally:
            writer.close()

    async def pay_on_kept_connection(self) -> None:
        await self._on_kept_connection(self._payment(""), b"HTTP/1.1 201 ")

    async def balances(self) -> None:
        request = self._request("GET", "/v1/accounts/account-1/balances", b"", "")
        await self._on_kept_connection(request, b"HTTP/1.1 200 ")

    async def _on_kept_connection(self, request: bytes, expected: bytes) -> None:
        reader, writer = self._idle.pop() if self._idle else await self._connect()
        await self._exchange(reader, writer, request, expected)
        self._idle.append((reader, writer))

    async def _connect(self) -> _Streams:
        return await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, expected: bytes
    ) -> None:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        json.loads(await reader.readexactly(length))
        assert head.startswith(expected), head

    def _payment(self, connection: str) -> bytes:
        return self._request("POST", "/v1/payments/sepa-credit-transfers", json.dumps(_PAYMENT).encode(), connection)

    def _request(self, method: str, path: str, body: bytes, connection: str) -> bytes:
        call_id = str(uuid.uuid4())
        digest = f"SHA-256={base64.b64encode(hashlib.sha256(body).digest()).decode()}"
        to_sign = f"digest: {digest}\nx-request-id: {call_id}".encode()
        signature = base64.b64encode(self._key.sign(to_sign, ec.ECDSA(hashes.SHA256()))).decode()
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nAccept-Encoding: identity\r\n{connection}"
            f"X-Request-ID: {call_id}\r\nAccept: application/json\r\nPSU-IP-Address: 192.0.2.1\r\n{length}"
            f"Authorization: Bearer {self._token}\r\nDigest: {digest}\r\n"
            f'Signature: keyId="{self._key_id}",algorithm="ecdsa-sha256",headers="digest x-request-id",'
            f'signature="{signature}"\r\nTPP-Signature-Certificate: {self._certificate}\r\n\r\n'
        )
        return head.encode() + body


if __name__ == "__main__":
    serve(main)
