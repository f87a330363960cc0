"""After a call nothing of a token is left in egress's memory, whatever became of the call.

The process runs with the allocator's switches that the supervisor sets. The scan reads all of its memory, as root may.
"""

import asyncio
import base64
import contextlib
import json
import os
import secrets as randomness
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from sidecar.domain.ids import PaymentId
from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import (
    Answer,
    Header,
    NotSent,
    ProviderRequest,
    SecretSlot,
    SlotEncoding,
    TokenGrant,
    Unknown,
)
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.errors import Corrupt
from tests.fakes.egress import SoftwareKeys, data_key_context
from tests.unit.egress.bank_server import BankServer, Exchange, Script, http_answer
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.memory import may_read, places_of, runs_found
from tests.unit.egress.process import CLUSTER, RunningEgress, running_egress, transport


def _marker() -> bytes:
    """A token whose runs of 12 bytes occur nowhere else."""
    return randomness.token_urlsafe(72).encode()


def _request(origin: str, *, kind: SecretKind = SecretKind.ACCESS_TOKEN) -> ProviderRequest:
    if kind is SecretKind.ACCESS_TOKEN:
        slot = SecretSlot(kind=kind, encoding=SlotEncoding.RAW)
        headers = (Header(name="Authorization", value="Bearer ", slot=slot),)
        return ProviderRequest(method="GET", origin=origin, target="/v1/accounts", headers=headers)
    body = (b"grant_type=refresh_token&refresh_token=", SecretSlot(kind=kind, encoding=SlotEncoding.FORM))
    return ProviderRequest(method="POST", origin=origin, target="/token", headers=(), body=body)


@pytest.fixture(autouse=True)
def _may_trace() -> None:
    if not may_read(1) and os.geteuid() != 0:
        pytest.skip("reading another process's memory needs root or CAP_SYS_PTRACE: the memory proof did not run")


def test_the_scan_finds_a_planted_copy() -> None:
    """Positive control: a part of a secret in another process is found in each form, and a secret that it never had is not."""
    planted, absent = _marker(), _marker()
    forms = [planted[20:40], base64.b64encode(planted), planted.hex().encode(), planted.decode().encode("utf-16-le")]
    for form in forms:
        with subprocess.Popen(
            [sys.executable, "-c", "import os, sys; kept = os.read(0, 4096); os.write(1, b'!'); os.read(0, 1)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(form)
            process.stdin.flush()
            process.stdout.read(1)

            assert runs_found(process.pid, planted) != []
            assert runs_found(process.pid, absent) == []
            process.stdin.close()


def test_the_scan_finds_a_copy_in_egress(tmp_path: Path) -> None:
    """Positive control in the process itself: a literal of a request, sent with a slow bank, is found while it is there."""
    marker = _marker()

    async def test() -> None:
        async with _lab(tmp_path, lambda exchange: exchange.stall()) as (egress, bank, _, _):
            body = (marker,)
            request = ProviderRequest(method="POST", origin=bank.origin, target="/", headers=(), body=body)
            call = asyncio.ensure_future(egress.link.call_once(request, deadline_seconds=3))
            await asyncio.sleep(0.7)
            found = await asyncio.to_thread(runs_found, egress.pid, marker)
            await call
            assert found != []

    asyncio.run(test())


def test_nothing_of_a_token_stays_in_memory(tmp_path: Path) -> None:
    """Success, write, payment, discard, time-out, reset, echo, refused connection, wrong context, exchange, import: none
    leaves 12 bytes of any token in the process, not even while the request is in flight."""
    tokens = {kind: _marker() for kind in (SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN)}
    granted = {"access_token": _marker().decode(), "refresh_token": _marker().decode()}
    imported = _marker()
    problems: dict[str, list[str]] = {}

    def script(exchange: Exchange) -> None:
        match mode[0]:
            case "answer":
                exchange.keep = True
                exchange.send(http_answer(200, b'{"ok":true}'))
            case "stall":
                exchange.stall()
            case "reset":
                exchange.reset()
            case "echo":
                exchange.send(http_answer(400, exchange.request))
            case "grant" | "grant-chunked":
                body = json.dumps({**granted, "token_type": "Bearer", "expires_in": 60, "id_token": "x" * 500}).encode()
                exchange.send(http_answer(200, body) if mode[0] == "grant" else _chunked(body))

    mode = ["answer"]

    async def test() -> None:
        async with _lab(tmp_path, script) as (egress, bank, keys, wrapped):
            link = egress.link
            context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=bank.origin)
            access = keys.seal(
                SecretKind.ACCESS_TOKEN, tokens[SecretKind.ACCESS_TOKEN], context, wrapped_data_key=wrapped
            )
            refresh = keys.seal(
                SecretKind.REFRESH_TOKEN, tokens[SecretKind.REFRESH_TOKEN], context, wrapped_data_key=wrapped
            )

            async def check(name: str) -> None:
                texts = [*tokens.values(), *(token.encode() for token in granted.values()), imported]
                problems[name] = await asyncio.to_thread(runs_found, egress.pid, *texts)

            async def read(
                kind: SecretKind = SecretKind.ACCESS_TOKEN, seconds: float = 5.0, *, once: bool = False
            ) -> object:
                secret = access if kind is SecretKind.ACCESS_TOKEN else refresh
                call = link.call_once if once else link.call
                return await call(
                    _request(bank.origin, kind=kind),
                    wrapped_data_key=wrapped,
                    secrets=[secret],
                    deadline_seconds=seconds,
                )

            for _ in range(3):
                assert isinstance(await read(), Answer)
            await check("read")
            assert isinstance(await read(once=True), Answer)
            await check("own connection")
            assert isinstance(await read(SecretKind.REFRESH_TOKEN, once=True), Answer)
            await check("form")
            await asyncio.gather(*(read() for _ in range(50)))
            await check("fifty at once")
            prepared = await link.prepare(
                _request(bank.origin), wrapped_data_key=wrapped, secrets=[access], deadline_seconds=5
            )
            await check("while prepared")
            permit = DispatchPermit(payment=PaymentId("p"), epoch=1)
            assert isinstance(await link.send(prepared, permit, deadline_seconds=5), Answer)
            await check("sent")
            mode[0] = "stall"
            waiting = asyncio.ensure_future(read(seconds=4.0))
            await asyncio.sleep(0.3)
            await check("in flight")
            assert await waiting == Unknown(code="DEADLINE_AFTER_SEND")
            await check("time-out")
            mode[0] = "reset"
            assert await read(once=True) == Unknown(code="CONNECTION_LOST")
            await check("reset")
            mode[0] = "echo"
            assert await read(once=True) == Unknown(code="ANSWER_ECHOES_SECRET")
            await check("echo")
            wrong = SecretContext(cluster=CLUSTER, owner="o2", consent="c", provider_origin=bank.origin)
            with pytest.raises(Corrupt):
                await link.call(
                    _request(bank.origin),
                    wrapped_data_key=wrapped,
                    secrets=[type(access)(secret=access.secret, context=wrong)],
                    deadline_seconds=5,
                )
            await check("wrong context")
            for mode[0] in ("grant", "grant-chunked"):
                grant = await link.request_tokens(
                    _request(bank.origin, kind=SecretKind.REFRESH_TOKEN),
                    wrapped_data_key=wrapped,
                    secrets=[refresh],
                    seal_access_as=context,
                    seal_refresh_as=context,
                    deadline_seconds=5,
                )
                assert isinstance(grant, TokenGrant)
                await check(mode[0])
            await _import(egress, imported, context)
            await check("import")
            mode[0] = "answer"
            await asyncio.to_thread(bank.stop)
            refused = await read(once=True)
            assert refused == NotSent(code="CONNECT_FAILED")
            await check("refused connection")

    asyncio.run(test())

    assert {name: found for name, found in problems.items() if found} == {}


def test_a_forgotten_data_key_is_wiped(tmp_path: Path) -> None:
    """While cached the data key lies in exactly one place, the locked slab; after forget nowhere."""

    async def test() -> None:
        async with _lab(tmp_path, _answer) as (egress, bank, keys, wrapped):
            context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=bank.origin)
            access = keys.seal(SecretKind.ACCESS_TOKEN, _marker(), context, wrapped_data_key=wrapped)
            key = keys.open_data_key(wrapped, data_key_context(context))

            await egress.link.call(
                _request(bank.origin), wrapped_data_key=wrapped, secrets=[access], deadline_seconds=5
            )
            cached = await asyncio.to_thread(places_of, egress.pid, key[:8])
            await egress.link.forget(wrapped)
            forgotten = await asyncio.to_thread(places_of, egress.pid, key[:8])

            assert len(cached) == 1
            assert forgotten == []

    asyncio.run(test())


@contextlib.asynccontextmanager
async def _lab(folder: Path, script: Script) -> AsyncIterator[tuple[RunningEgress, BankServer, SoftwareKeys, bytes]]:
    authority, keys = TestAuthority(folder), SoftwareKeys()
    certificate = authority.issue("bank", hosts=("127.0.0.1",))
    with BankServer(certificate=certificate, script=script) as bank:
        async with running_egress(
            transports=[transport(bank.origin, authority.ca_file)], keys=keys, folder=folder
        ) as egress:
            context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=bank.origin)
            yield egress, bank, keys, keys.create_data_key(data_key_context(context))[0]
            assert '"missing_hardening":"no_capabilities"' in egress.log() or '"missing_hardening":""' in egress.log()


async def _import(egress: RunningEgress, token: bytes, context: SecretContext) -> None:
    key = await egress.link.import_key()
    parts = [b"custody/v1/import", context.owner.encode(), b"providers/bank", b"r"]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    document = json.dumps({"access_token": token.decode()}).encode()
    await egress.link.import_tokens(
        key_id=key.key_id,
        sealed_tokens=suite.encrypt(document, X25519PublicKey.from_public_bytes(key.public_key), info),
        info=info,
        seal_access_as=context,
        seal_refresh_as=context,
    )


def _answer(exchange: Exchange) -> None:
    exchange.keep = True
    exchange.send(http_answer(200, b"{}"))


def _chunked(body: bytes) -> bytes:
    pieces = [body[start : start + 33] for start in range(0, len(body), 33)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
