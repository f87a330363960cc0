"""The operations in this process: what the gateway's link hides, and what needs a clock or a bound moved."""

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop

from sidecar.domain.ids import PaymentId
from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import Answer, Header, NotSent, ProviderRequest, SecretSlot, SlotEncoding, Unknown
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.egress import server, service
from sidecar.egress.datakeys import DataKeys, data_key_context
from sidecar.egress.deadline import Deadline
from sidecar.egress.hsmlink import HsmLink
from sidecar.egress.origins import Origins
from sidecar.egress.server import GatewayServer
from sidecar.egress.service import Egress
from sidecar.errors import Unavailable
from sidecar.gateway.links import Connection, EgressLink
from sidecar.ipc.messages import EgressSettings, EgressToGatewayFrame, GatewayToEgressFrame, OpenSecretMessage
from sidecar.ports import OpenSecret
from tests.fakes.egress import SoftwareKeys
from tests.unit.egress.bank_server import BankServer, Exchange, Script, http_answer
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.process import CLUSTER, HsmStandIn, transport


@dataclass(slots=True, kw_only=True)
class Lab:
    egress: Egress
    bank: BankServer
    secret: OpenSecretMessage
    wrapped: bytes

    @property
    def request(self) -> ProviderRequest:
        slot = SecretSlot(kind=SecretKind.ACCESS_TOKEN, encoding=SlotEncoding.RAW)
        headers = (Header(name="Authorization", value="Bearer ", slot=slot),)
        return ProviderRequest(method="GET", origin=self.bank.origin, target="/v1/accounts", headers=headers)

    async def read(self, *, seconds: float = 10) -> object:
        return await self.egress.call(
            self.request,
            wrapped_data_key=self.wrapped,
            secrets=[self.secret],
            own_connection=False,
            deadline=Deadline.after(seconds),
        )

    async def prepare(self) -> int:
        return await self.egress.prepare(
            self.request, wrapped_data_key=self.wrapped, secrets=[self.secret], deadline=Deadline.after(10)
        )

    async def send(self, handle: int) -> object:
        return await self.egress.send(handle, send_before=Deadline.after(10), deadline=Deadline.after(10))


def _answers(exchange: Exchange) -> None:
    exchange.keep = True
    exchange.send(http_answer(200, b"{}"))


@contextlib.asynccontextmanager
async def _lab(folder: Path, script: Script, limit: int) -> AsyncIterator[Lab]:
    authority, software = TestAuthority(folder), SoftwareKeys()
    certificate = authority.issue("bank", hosts=("127.0.0.1",))
    stand_in, hsm = HsmStandIn(software), HsmLink()
    hsm.wire(stand_in.new_end())
    with BankServer(certificate=certificate, script=script) as bank:
        settings = EgressSettings(
            cluster=CLUSTER, transports=(transport(bank.origin, authority.ca_file),), connections_per_origin=limit
        )
        egress = Egress(
            cluster=CLUSTER,
            origins=Origins(settings),
            keys=DataKeys(hsm=hsm, cache_seconds=60, cache_size=10),
            max_answer_bytes=1000,
            hsm_connected=lambda: hsm.connected,
        )
        context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=bank.origin)
        wrapped, _ = software.create_data_key(data_key_context(context))
        sealed = software.seal(SecretKind.ACCESS_TOKEN, b"token-" * 8, context, wrapped_data_key=wrapped)
        try:
            yield Lab(
                egress=egress,
                bank=bank,
                secret=OpenSecretMessage(secret=sealed.secret, context=sealed.context),
                wrapped=wrapped,
            )
        finally:
            await hsm.close()
            await egress.close()
            stand_in.close()


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
Test = Callable[[Lab], Coroutine[None, None, None]]


def _run(folder: Path, test: Test, *, script: Script = _answers, limit: int = 8, loop: str = "uvloop") -> None:
    async def run() -> None:
        async with _lab(folder, script, limit) as lab:
            await test(lab)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


@pytest.mark.parametrize("loop", LOOPS)
def test_it_works_on_either_event_loop(tmp_path: Path, loop: str) -> None:
    """TLS is driven by our own code, so asyncio's loop and uvloop do the same: reads, kept connections, payments, big bodies."""

    async def test(lab: Lab) -> None:
        for _ in range(3):
            assert isinstance(await lab.read(), Answer)
        assert lab.bank.connections == 1
        assert isinstance(await lab.send(await lab.prepare()), Answer)
        big = ProviderRequest(method="POST", origin=lab.bank.origin, target="/", headers=(), body=(b"x" * 1024 * 1024,))
        outcome = await lab.egress.call(
            big, wrapped_data_key=b"", secrets=(), own_connection=True, deadline=Deadline.after(20)
        )
        assert isinstance(outcome, Answer)
        assert lab.bank.requests[-1].endswith(b"\r\n\r\n" + b"x" * 1024 * 1024)

    _run(tmp_path, test, loop=loop)


def test_a_handle_serves_once_also_while_its_request_is_under_way(tmp_path: Path) -> None:
    """A second send of one handle is ALREADY_SENT, during the first and after it: never "not sent", and nothing goes out again."""

    async def test(lab: Lab) -> None:
        handle = await lab.prepare()
        first = asyncio.ensure_future(lab.send(handle))
        await asyncio.sleep(0)

        assert await lab.send(handle) == Unknown(code="ALREADY_SENT")
        assert isinstance(await first, Answer)
        assert await lab.send(handle) == Unknown(code="ALREADY_SENT")
        assert await lab.send(handle + 1) == NotSent(code="PREPARED_GONE")
        assert len(lab.bank.requests) == 1

    _run(tmp_path, test)


def test_a_prepared_request_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time the connection is closed, the key's lease is over and a send says that nothing left."""
    monkeypatch.setattr(service, "PREPARED_SECONDS", 0.2)

    async def test(lab: Lab) -> None:
        handle = await lab.prepare()
        connection = lab.egress._prepared[handle].connection
        assert connection.alive

        await asyncio.sleep(0.5)

        assert not connection.alive
        assert lab.egress.status().prepared == 0
        assert await lab.send(handle) == NotSent(code="PREPARED_GONE")
        assert lab.bank.requests == []

    _run(tmp_path, test)


def test_prepared_requests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than the bound is refused; a discarded one makes room. Handles do not follow one another."""
    monkeypatch.setattr(service, "_MAX_PREPARED", 3)

    async def test(lab: Lab) -> None:
        handles = [await lab.prepare() for _ in range(3)]
        with pytest.raises(Unavailable):
            await lab.prepare()

        lab.egress.discard(handles[0])

        handles.append(await lab.prepare())
        assert len(set(handles)) == 4
        assert min(abs(one - other) for one in handles for other in handles if one != other) > 1000

    _run(tmp_path, test)


def test_a_defect_of_ours_after_the_send_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are out: an exception of any kind must not look as if nothing had happened."""

    def fails(*_: object) -> object:
        raise RuntimeError("a defect")

    async def test(lab: Lab) -> None:
        monkeypatch.setattr(lab.egress, "_answer", fails)
        assert await lab.read() == Unknown(code="DEFECT_AFTER_SEND")
        assert await lab.send(await lab.prepare()) == Unknown(code="DEFECT_AFTER_SEND")

    _run(tmp_path, test)


def test_connections_per_origin_are_bounded(tmp_path: Path) -> None:
    """Twenty reads at once over two connections: all are answered, each by its own answer."""

    async def test(lab: Lab) -> None:
        outcomes = await asyncio.gather(*(lab.read() for _ in range(20)))

        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        assert lab.bank.connections == 2

    _run(tmp_path, test, limit=2)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_close_that_the_loop_has_not_seen_yet_is_found_before_the_write(tmp_path: Path, loop: str) -> None:
    """The bank closes while this process is busy: the kernel knows it, so the kept connection is not used and nothing is lost."""

    def closes(exchange: Exchange) -> None:
        exchange.send(http_answer(200, b"{}"))
        exchange.stopping.wait(0.1)
        exchange.close_notify()

    async def test(lab: Lab) -> None:
        for _ in range(3):
            assert isinstance(await lab.read(), Answer)
            time.sleep(0.4)
        assert len(lab.bank.requests) == lab.bank.connections == 3

    _run(tmp_path, test, script=closes, loop=loop)


def test_waiting_for_a_connection_ends_at_the_deadline(tmp_path: Path) -> None:
    """Who gets no place in time sent nothing; the place that was waited for is not lost."""

    def slow(exchange: Exchange) -> None:
        exchange.stopping.wait(0.6)
        _answers(exchange)

    async def test(lab: Lab) -> None:
        first = asyncio.ensure_future(lab.read())
        await asyncio.sleep(0.1)

        assert await lab.read(seconds=0.2) == NotSent(code="DEADLINE_BEFORE_SEND")
        assert isinstance(await first, Answer)
        assert isinstance(await lab.read(), Answer)
        assert len(lab.bank.requests) == 2

    _run(tmp_path, test, script=slow, limit=1)


def test_a_failed_connection_gives_its_place_back(tmp_path: Path) -> None:
    """More failures than there are places: each is told the same, none waits for a place that never comes."""

    async def test(lab: Lab) -> None:
        await asyncio.to_thread(lab.bank.stop)
        outcomes = [await lab.read(seconds=5) for _ in range(4)]
        assert outcomes == [NotSent(code="CONNECT_FAILED")] * 4

    _run(tmp_path, test, limit=1)


CASES = [(loop, answers) for loop in LOOPS for answers in (False, True)]


@pytest.mark.parametrize(("loop", "answers"), CASES, ids=[f"{loop}-{answers}" for loop, answers in CASES])
def test_a_payment_does_not_outlive_its_deadline_in_the_kernel(tmp_path: Path, loop: str, answers: bool) -> None:
    """What is not acknowledged is dropped at the deadline: the bank sees a reset. After a whole answer it sees a proper end."""
    seen: list[str] = []

    def script(exchange: Exchange) -> None:
        if answers:
            exchange.send(http_answer(200, b"{}"))
        # Below TLS, which takes a reset for an end.
        with socket.socket(fileno=os.dup(exchange.connection.fileno())) as raw:
            raw.settimeout(20)
            try:
                while raw.recv(100):  # close_notify
                    pass
                seen.append("end")
            except ConnectionResetError:
                seen.append("reset")

    async def test(lab: Lab) -> None:
        handle = await lab.prepare()
        connection = lab.egress._prepared[handle].connection
        assert connection._transport is not None
        peer = connection._transport.get_extra_info("socket")
        in_flight: list[tuple[bytes, int]] = []

        def look(reader: object, plaintext: memoryview) -> Coroutine[None, None, None]:
            linger = peer.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
            in_flight.append((linger, peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)))
            return receive(reader, plaintext)  # type: ignore[arg-type]

        receive, connection.receive = connection.receive, look  # type: ignore[method-assign]
        deadline = Deadline.after(10 if answers else 1)
        outcome = await lab.egress.send(handle, send_before=deadline, deadline=deadline)
        for _ in range(200):
            if seen:
                break
            await asyncio.sleep(0.05)

        [(linger, user_timeout_milliseconds)] = in_flight
        assert linger == struct.pack("ii", 1, 0)
        assert 0 < user_timeout_milliseconds <= (10_000 if answers else 1_000)
        assert isinstance(outcome, Answer) if answers else outcome == Unknown(code="DEADLINE_AFTER_SEND")
        assert seen == (["end"] if answers else ["reset"])

    _run(tmp_path, test, script=script, loop=loop)


def test_a_read_that_is_repeatable_keeps_its_connection_as_it_is(tmp_path: Path) -> None:
    """Kept connections serve many requests: none of them leaves a time limit behind for the next."""

    async def test(lab: Lab) -> None:
        await lab.read()
        [connection] = lab.egress._origins.find(lab.bank.origin)._pool._idle
        assert connection._transport is not None
        peer = connection._transport.get_extra_info("socket")

        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)

    _run(tmp_path, test)


@contextlib.asynccontextmanager
async def _linked(lab: Lab) -> AsyncIterator[EgressLink]:
    """The gateway's own link to the egress of the lab."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(0)
    gateway = GatewayServer(lab.egress)
    await asyncio.get_running_loop().create_unix_connection(lambda: gateway, sock=theirs)
    link = EgressLink()
    link.attach(await Connection.over(ours, request_type=GatewayToEgressFrame, answer_type=EgressToGatewayFrame))
    try:
        yield link
    finally:
        await gateway.close()


def test_a_prepared_payment_is_sent_although_egress_is_full_of_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dispatch is on record: it is not turned away for reads. Another is discarded, a key forgotten, a ping answered."""
    monkeypatch.setattr(server, "MAX_IN_FLIGHT", 2)

    def slow_reads(exchange: Exchange) -> None:
        if exchange.head.startswith("GET /slow"):
            exchange.stopping.wait(10)
        _answers(exchange)

    async def test(lab: Lab) -> None:
        async with _linked(lab) as link:
            secret = OpenSecret(secret=lab.secret.secret, context=lab.secret.context)
            prepared, other = [
                await link.prepare(lab.request, wrapped_data_key=lab.wrapped, secrets=[secret], deadline_seconds=10)
                for _ in range(2)
            ]
            slow = ProviderRequest(method="GET", origin=lab.bank.origin, target="/slow", headers=())
            reads = [asyncio.ensure_future(link.call(slow, deadline_seconds=20)) for _ in range(2)]
            while len(lab.bank.requests) < 2:
                await asyncio.sleep(0.02)

            with pytest.raises(Unavailable):
                await link.call(slow, deadline_seconds=5)
            permit = DispatchPermit(payment=PaymentId("p"), epoch=1)
            assert isinstance(await link.send(prepared, permit, deadline_seconds=10), Answer)
            await link.forget(lab.wrapped)
            await link.discard(other)
            assert lab.egress.status().prepared == 0
            assert link._slot.current is not None
            assert await link._slot.current.ping(within_seconds=5)
            for read in reads:
                read.cancel()

    _run(tmp_path, test, script=slow_reads)


def test_requests_in_flight_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than the bound is refused at once; the others are answered."""
    monkeypatch.setattr(server, "MAX_IN_FLIGHT", 2)

    def slow(exchange: Exchange) -> None:
        exchange.stopping.wait(0.3)
        _answers(exchange)

    async def test(lab: Lab) -> None:
        request = ProviderRequest(method="GET", origin=lab.bank.origin, target="/", headers=())
        async with _linked(lab) as link:
            results = await asyncio.gather(
                *(link.call(request, deadline_seconds=5) for _ in range(3)), return_exceptions=True
            )

        assert [type(result) for result in results] == [Answer, Answer, Unavailable]

    _run(tmp_path, test, script=slow)
