"""The links against a child that this test plays: what an answer becomes, and what a lost answer is called."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvloop

from sidecar.domain.ids import PaymentId
from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import (
    Answer,
    KeyPurpose,
    NotSent,
    ProviderRequest,
    SendOutcome,
    TokenGrant,
    TokenOutcome,
    TokensRefused,
    Unknown,
)
from sidecar.domain.secrets import SecretContext
from sidecar.errors import Corrupt, CustodyError, Internal, InvalidField, PreconditionFailed, Refused, Unavailable
from sidecar.gateway import links
from sidecar.gateway.links import Connection, EgressLink, HsmLink
from sidecar.gateway.supervisor import SupervisorTimes
from sidecar.ipc.frames import HEADER, boot_time_ns, encode_frame, frame_length
from sidecar.ipc.messages import (
    Answered,
    Discard,
    Done,
    EgressToGatewayFrame,
    Failure,
    GatewayToEgressFrame,
    GatewayToHsmFrame,
    Granted,
    GrantRefused,
    HsmToGatewayFrame,
    Message,
    NothingSent,
    OutcomeUnknown,
    Pong,
    PreparedHandle,
    Send,
    Sign,
    Signature,
    decoder_for,
)
from sidecar.ports import Prepared

REQUEST = ProviderRequest(method="GET", origin="https://bank.example:443", target="/", headers=())
CONTEXT = SecretContext(cluster="c", owner="o", consent="x", provider_origin="https://bank.example:443")

Asking = Callable[[EgressLink], Coroutine[Any, Any, object]]


class Child:
    """The other end of the socket, played by the test."""

    def __init__(self, peer: socket.socket, *, request_type: Any, answer_type: Any) -> None:
        peer.settimeout(0)
        self._peer = peer
        self._decoder = decoder_for(request_type)
        self._answer_type = answer_type

    async def request(self) -> Any:
        length = frame_length(await self._exactly(HEADER.size))
        return self._decoder.decode(await self._exactly(length))

    async def answer(self, request_id: int, body: Message) -> None:
        await self.write(encode_frame(self._answer_type(id=request_id, body=body)))

    def answer_now(self, request_id: int, body: Message) -> None:
        """In this turn of the loop."""
        self._peer.sendall(encode_frame(self._answer_type(id=request_id, body=body)))

    async def write(self, octets: bytes | bytearray) -> None:
        await asyncio.get_running_loop().sock_sendall(self._peer, octets)

    async def closed_by_gateway(self) -> bool:
        return await asyncio.get_running_loop().sock_recv(self._peer, 1) == b""

    def die(self) -> None:
        self._peer.close()

    async def _exactly(self, length: int) -> bytes:
        octets = b""
        while len(octets) < length:
            part = await asyncio.get_running_loop().sock_recv(self._peer, length - len(octets))
            assert part, "the gateway closed its end"
            octets += part
        return octets


@asynccontextmanager
async def connected(link: HsmLink | EgressLink) -> AsyncIterator[Child]:
    """A child that plays hsm or egress, attached to `link`."""
    ours, of_child = socket.socketpair()
    hsm = isinstance(link, HsmLink)
    request_type = GatewayToHsmFrame if hsm else GatewayToEgressFrame
    answer_type = HsmToGatewayFrame if hsm else EgressToGatewayFrame
    connection = await Connection.over(ours, request_type=request_type, answer_type=answer_type)
    link.attach(connection)
    child = Child(of_child, request_type=request_type, answer_type=answer_type)
    try:
        yield child
    finally:
        child.die()
        connection.close()


async def asked_and(child: Child, asking: Coroutine[Any, Any, Any], reaction: Callable[[Any], Any]) -> Any:
    """What `asking` gives when the child does `reaction` upon its request."""
    task = asyncio.create_task(asking)
    request = await child.request()
    done = reaction(request)
    if asyncio.iscoroutine(done):
        await done
    return await task


def permit() -> DispatchPermit:
    return DispatchPermit(payment=PaymentId("p1"), epoch=1)


async def prepared_on(link: EgressLink, child: Child, handle: int = 7) -> Any:
    asking = link.prepare(REQUEST, wrapped_data_key=b"w", secrets=(), deadline_seconds=20)
    return await asked_and(child, asking, lambda request: child.answer(request.id, PreparedHandle(handle=handle)))


# --- hsm ---------------------------------------------------------------------------------------------------------------


def test_answers_find_their_questions_in_any_order() -> None:
    """Two calls under way, answered the other way round."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            first = asyncio.create_task(link.sign(KeyPurpose.AUDIT, bytes(32)))
            second = asyncio.create_task(link.sign(KeyPurpose.REQUEST_SIGNING, bytes(32)))
            requests = [await child.request(), await child.request()]
            for request in reversed(requests):
                purpose: Sign = request.body
                await child.answer(request.id, Signature(value=purpose.purpose.value[:1].encode() * 64))

            assert await first == b"a" * 64
            assert await second == b"r" * 64

    asyncio.run(check())


def test_a_request_carries_the_deadline_of_its_caller() -> None:
    """The child can see when nobody waits any more, on the clock that all processes share."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            task = asyncio.create_task(link.sign(KeyPurpose.AUDIT, bytes(32)))
            request = await child.request()
            await child.answer(request.id, Signature(value=bytes(64)))
            await task

        left_seconds = (request.deadline_boot_time_ns - boot_time_ns()) / 1e9
        assert 0 < left_seconds <= links.HSM_DEADLINE_SECONDS

    asyncio.run(check())


def test_silence_is_unavailable_and_a_late_answer_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that answers after the deadline: the caller has failed by then, and the next call gets its own answer."""
    monkeypatch.setattr(links, "HSM_DEADLINE_SECONDS", 0.1)

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            with pytest.raises(Unavailable) as caught:
                await link.sign(KeyPurpose.AUDIT, bytes(32))
            late = await child.request()
            await child.answer(late.id, Signature(value=b"l" * 64))
            monkeypatch.setattr(links, "HSM_DEADLINE_SECONDS", 20.0)
            signature = await asked_and(
                child,
                link.sign(KeyPurpose.AUDIT, bytes(32)),
                lambda request: child.answer(request.id, Signature(value=b"n" * 64)),
            )

            assert caught.value.reason == "HSM_UNAVAILABLE"
            assert signature == b"n" * 64

    asyncio.run(check())


def test_a_link_that_never_had_a_child_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process within the deadline: Unavailable, for every method."""
    monkeypatch.setattr(links, "HSM_DEADLINE_SECONDS", 0.05)

    async def check() -> None:
        link = HsmLink()
        for asking in (link.sign(KeyPurpose.AUDIT, bytes(32)), link.status(), link.create_master_key(1)):
            with pytest.raises(Unavailable):
                await asking
        assert not link.connected

    asyncio.run(check())


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure(kind="Corrupt", reason="ENVELOPE_CORRUPT", description="d"), Corrupt),
        (Failure(kind="Refused", reason="METHOD_NOT_ALLOWED", description="d"), Refused),
        (Failure(kind="Unavailable", reason="HSM_UNAVAILABLE", description="d"), Unavailable),
        (Failure(kind="NeverHeardOf", reason="HSM_UNAVAILABLE", description="d"), Unavailable),
    ],
)
def test_a_failure_becomes_its_error(failure: Failure, error: type[CustodyError]) -> None:
    """The child names an error of our tree, and the caller gets it; a kind that is not expected is Unavailable."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            with pytest.raises(CustodyError) as caught:
                await asked_and(child, link.status(), lambda request: child.answer(request.id, failure))

        assert type(caught.value) is error
        assert caught.value.reason == failure.reason

    asyncio.run(check())


BAD_ANSWERS = {
    "a frame of another direction": encode_frame(
        GatewayToHsmFrame(id=1, body=Sign(purpose=KeyPurpose.AUDIT, digest=bytes(32)))
    ),
    "no msgpack": HEADER.pack(4) + b"\xc1\xc1\xc1\xc1",
    "an impossible length": b"\xff\xff\xff\xff",
    "an empty frame": b"\x00\x00\x00\x00",
    "an answer to a question that was not asked": encode_frame(HsmToGatewayFrame(id=99, body=Pong())),
    "an unknown field": HEADER.pack(len(body := msgspec.msgpack.encode({"id": 1, "body": {"type": "Pong", "x": 1}})))
    + body,
}


@pytest.mark.parametrize("octets", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_rubbish_ends_the_connection(octets: bytes | bytearray) -> None:
    """Bytes that are no answer of this socket fail every waiting caller and end the connection."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            with pytest.raises(Unavailable):
                await asked_and(child, link.sign(KeyPurpose.AUDIT, bytes(32)), lambda _: child.write(octets))

            assert await child.closed_by_gateway()
            assert not link.connected

    asyncio.run(check())


def test_an_answer_of_another_kind_ends_the_connection() -> None:
    """A well-formed answer that does not fit its question is no answer."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            with pytest.raises(Unavailable):
                await asked_and(
                    child, link.sign(KeyPurpose.AUDIT, bytes(32)), lambda request: child.answer(request.id, Pong())
                )

            assert await child.closed_by_gateway()

    asyncio.run(check())


def test_an_answer_in_single_octets_is_put_together() -> None:
    """The kernel may deliver a frame in any pieces."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:

            async def dribble(request: Any) -> None:
                for octet in encode_frame(HsmToGatewayFrame(id=request.id, body=Signature(value=b"s" * 64))):
                    await child.write(bytes([octet]))
                    await asyncio.sleep(0)

            assert await asked_and(child, link.sign(KeyPurpose.AUDIT, bytes(32)), dribble) == b"s" * 64

    asyncio.run(check())


def test_a_caller_that_goes_away_leaves_nothing_behind() -> None:
    """A cancelled call is forgotten; its answer harms nobody."""

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            task = asyncio.create_task(link.sign(KeyPurpose.AUDIT, bytes(32)))
            request = await child.request()
            task.cancel()
            await asyncio.wait((task,))
            await child.answer(request.id, Signature(value=bytes(64)))
            signature = await asked_and(
                child,
                link.sign(KeyPurpose.AUDIT, bytes(32)),
                lambda request: child.answer(request.id, Signature(value=b"n" * 64)),
            )

            assert signature == b"n" * 64

    asyncio.run(check())


def test_more_calls_than_the_bound_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue to the child has an end, and whoever comes after it is told at once."""
    monkeypatch.setattr(links, "_MAX_IN_FLIGHT", 3)

    async def check() -> None:
        link = HsmLink()
        async with connected(link) as child:
            waiting = [asyncio.create_task(link.sign(KeyPurpose.AUDIT, bytes(32))) for _ in range(3)]
            for _ in waiting:
                await child.request()
            with pytest.raises(Unavailable):
                await asyncio.wait_for(link.sign(KeyPurpose.AUDIT, bytes(32)), 2)
            child.die()
            results = await asyncio.gather(*waiting, return_exceptions=True)

        assert [type(result) for result in results] == [Unavailable] * 3

    asyncio.run(check())


def test_each_call_is_observed_once() -> None:
    """Operation, outcome and seconds of every call reach the observer: the metrics' source."""
    seen: list[tuple[str, str]] = []

    async def check() -> None:
        link = HsmLink(observe=lambda operation, outcome, _: seen.append((operation, outcome)))
        async with connected(link) as child:
            await asked_and(
                child,
                link.sign(KeyPurpose.AUDIT, bytes(32)),
                lambda request: child.answer(request.id, Signature(value=bytes(64))),
            )
            failure = Failure(kind="Corrupt", reason="ENVELOPE_CORRUPT", description="d")
            with pytest.raises(Corrupt):
                await asked_and(child, link.load_master_keys([]), lambda request: child.answer(request.id, failure))
            with pytest.raises(Unavailable):
                await asked_and(child, link.status(), lambda _: child.die())

    asyncio.run(check())

    assert seen == [("Sign", "ok"), ("LoadMasterKeys", "ENVELOPE_CORRUPT"), ("GetHsmStatus", "lost")]


# --- egress: what is known about a request that got no answer ----------------------------------------------------------


@pytest.mark.parametrize("method", ["call", "call_once"])
@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (Answered(status=201, headers=(("a", "b"),), body=b"x"), Answer(status=201, headers=(("a", "b"),), body=b"x")),
        (NothingSent(code="CONNECT_FAILED"), NotSent(code="CONNECT_FAILED")),
        (OutcomeUnknown(code="CONNECTION_LOST"), Unknown(code="CONNECTION_LOST")),
    ],
)
def test_an_outcome_is_passed_on_as_it_is(method: str, body: Message, outcome: SendOutcome) -> None:
    """Egress says what happened, and the core hears exactly that."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            asking = getattr(link, method)(REQUEST, deadline_seconds=20)
            request_of: list[Any] = []

            async def react(request: Any) -> None:
                request_of.append(request.body)
                await child.answer(request.id, body)

            assert await asked_and(child, asking, react) == outcome
            assert request_of[0].own_connection is (method == "call_once")

    asyncio.run(check())


def tokens(link: EgressLink) -> Coroutine[Any, Any, Any]:
    return link.request_tokens(
        REQUEST, wrapped_data_key=b"", secrets=(), seal_access_as=CONTEXT, seal_refresh_as=CONTEXT, deadline_seconds=20
    )


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (
            Granted(access_token=b"a", refresh_token=None, expires_in_seconds=60, scope="s"),
            TokenGrant(access_token=b"a", refresh_token=None, expires_in_seconds=60, scope="s"),
        ),
        (GrantRefused(status=400, error="invalid_grant"), TokensRefused(status=400, error="invalid_grant")),
        (NothingSent(code="TLS_FAILED"), NotSent(code="TLS_FAILED")),
        (OutcomeUnknown(code="ANSWER_TRUNCATED"), Unknown(code="ANSWER_TRUNCATED")),
    ],
)
def test_the_outcome_of_a_token_request_is_passed_on(body: Message, outcome: TokenOutcome) -> None:
    """Sealed tokens, a refusal, nothing sent, or unknown."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            assert await asked_and(child, tokens(link), lambda request: child.answer(request.id, body)) == outcome

    asyncio.run(check())


SENDING: dict[str, Asking] = {
    "call": lambda link: link.call(REQUEST, deadline_seconds=20),
    "call_once": lambda link: link.call_once(REQUEST, deadline_seconds=20),
    "request_tokens": tokens,
}


@pytest.mark.parametrize("asking", SENDING.values(), ids=SENDING)
def test_a_request_that_was_handed_over_and_lost_is_unknown(asking: Asking) -> None:
    """Egress dies with the request in hand: it may have been sent, so nobody says that it was not."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            assert await asked_and(child, asking(link), lambda _: child.die()) == Unknown(code="EGRESS_LOST")

    asyncio.run(check())


@pytest.mark.parametrize("asking", SENDING.values(), ids=SENDING)
def test_a_request_that_is_answered_with_something_else_is_unknown(asking: Asking) -> None:
    """An egress that answers out of place has the request in hand all the same."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            reaction = lambda request: child.answer(request.id, Pong())  # noqa: E731
            assert await asked_and(child, asking(link), reaction) == Unknown(code="EGRESS_LOST")

    asyncio.run(check())


def test_a_request_that_is_not_answered_in_time_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes in silence: unknown."""
    monkeypatch.setattr(links, "_GRACE_SECONDS", 0.05)

    async def check() -> None:
        link = EgressLink()
        async with connected(link):
            assert await link.call(REQUEST, deadline_seconds=0.05) == Unknown(code="EGRESS_LOST")

    asyncio.run(check())


def test_a_request_that_nobody_took_was_not_sent() -> None:
    """There is no egress process within the deadline: nothing can have left, and the caller may try again."""

    async def check() -> None:
        with pytest.raises(Unavailable) as caught:
            await EgressLink().call(REQUEST, deadline_seconds=0.05)
        assert caught.value.reason == "PROVIDER_UNAVAILABLE"

    asyncio.run(check())


LOCAL: dict[str, Asking] = {
    "new_secrets": lambda link: link.new_secrets(CONTEXT),
    "prepare": lambda link: link.prepare(REQUEST, wrapped_data_key=b"", secrets=(), deadline_seconds=20),
    "import_key": lambda link: link.import_key(),
    "import_tokens": lambda link: link.import_tokens(
        key_id="k", sealed_tokens=b"s", info=b"i", seal_access_as=CONTEXT, seal_refresh_as=CONTEXT
    ),
    "forget": lambda link: link.forget(b"w"),
    "status": lambda link: link.status(),
}


@pytest.mark.parametrize("asking", LOCAL.values(), ids=LOCAL)
def test_what_needs_no_provider_and_is_lost_is_unavailable(asking: Asking) -> None:
    """Nothing can have left for these: the caller may try again."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            with pytest.raises(Unavailable) as caught:
                await asked_and(child, asking(link), lambda _: child.die())
        assert caught.value.reason == "PROVIDER_UNAVAILABLE"

    asyncio.run(check())


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure(kind="Corrupt", reason="ENVELOPE_CORRUPT", description="d"), Corrupt),
        (Failure(kind="PreconditionFailed", reason="IMPORT_KEY_UNKNOWN", description="d"), PreconditionFailed),
        (Failure(kind="InvalidField", reason="FIELD_INVALID", description="sealed_tokens: d"), InvalidField),
    ],
)
def test_egresss_refusals_keep_their_kind(failure: Failure, error: type[CustodyError]) -> None:
    """A secret that does not open is corrupt, not unavailable."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            with pytest.raises(error):
                await asked_and(child, LOCAL["import_tokens"](link), lambda request: child.answer(request.id, failure))

    asyncio.run(check())


# --- egress: a payment ---------------------------------------------------------------------------------------------------


def test_a_prepared_request_is_sent_once_under_a_permit() -> None:
    """The permit is used up, the handle is egress's own, and the time to start is bounded by the call's deadline."""

    async def check() -> None:
        link, right = EgressLink(), permit()
        async with connected(link) as child:
            prepared = await prepared_on(link, child, handle=41)
            sent: list[Send] = []

            async def react(request: Any) -> None:
                sent.append(request.body)
                await child.answer(request.id, Answered(status=201, headers=(), body=b""))

            outcome = await asked_and(child, link.send(prepared, right, deadline_seconds=20), react)

            assert outcome == Answer(status=201, headers=(), body=b"")
            assert sent[0].handle == 41
            assert 0 < sent[0].send_before_boot_time_ns - boot_time_ns() <= 20e9
            with pytest.raises(Internal):
                right.redeem()

    asyncio.run(check())


def test_a_permit_that_was_used_sends_nothing() -> None:
    """The second sending on one permit is a defect, and no byte goes to egress for it."""

    async def check() -> None:
        link, used = EgressLink(), permit()
        used.redeem()
        async with connected(link) as child:
            prepared = await prepared_on(link, child)
            with pytest.raises(Internal):
                await link.send(prepared, used, deadline_seconds=20)
            probe = asyncio.create_task(link.status())

            assert not isinstance((await child.request()).body, Send)
            probe.cancel()

    asyncio.run(check())


def test_one_preparation_is_sent_at_most_once_even_under_two_permits() -> None:
    """The handle goes with the first sending."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            prepared = await prepared_on(link, child)
            await asked_and(
                child,
                link.send(prepared, permit(), deadline_seconds=20),
                lambda request: child.answer(request.id, OutcomeUnknown(code="CONNECTION_LOST")),
            )

            assert await link.send(prepared, permit(), deadline_seconds=20) == NotSent(code="PREPARED_GONE")

    asyncio.run(check())


def test_a_sending_that_is_lost_is_unknown() -> None:
    """Egress dies between the order to send and its answer: the payment may be made."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            prepared = await prepared_on(link, child)
            outcome = await asked_and(child, link.send(prepared, permit(), deadline_seconds=20), lambda _: child.die())

            assert outcome == Unknown(code="EGRESS_LOST")

    asyncio.run(check())


def test_a_sending_that_is_not_answered_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes after the order to send."""
    monkeypatch.setattr(links, "_GRACE_FOR_THE_ONLY_ANSWER_SECONDS", 0.05)

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            prepared = await prepared_on(link, child)

            assert await link.send(prepared, permit(), deadline_seconds=0.05) == Unknown(code="EGRESS_LOST")

    asyncio.run(check())


ONLY_ANSWERS: dict[str, tuple[Asking, Message, object]] = {
    "call_once": (
        lambda link: link.call_once(REQUEST, deadline_seconds=0.05),
        Answered(status=201, headers=(), body=b""),
        Answer(status=201, headers=(), body=b""),
    ),
    "request_tokens": (
        lambda link: link.request_tokens(
            REQUEST,
            wrapped_data_key=b"",
            secrets=(),
            seal_access_as=CONTEXT,
            seal_refresh_as=CONTEXT,
            deadline_seconds=0.05,
        ),
        Granted(access_token=b"a", refresh_token=b"r", expires_in_seconds=60, scope=None),
        TokenGrant(access_token=b"a", refresh_token=b"r", expires_in_seconds=60, scope=None),
    ),
    "send": (
        lambda link: link.send(Prepared(handle=1), permit(), deadline_seconds=0.05),
        Answered(status=201, headers=(), body=b""),
        Answer(status=201, headers=(), body=b""),
    ),
}


@pytest.mark.parametrize("case", ONLY_ANSWERS.values(), ids=ONLY_ANSWERS)
def test_an_answer_that_cannot_be_had_again_is_waited_for(case: tuple[Asking, Message, object]) -> None:
    """Egress is paused for longer than the deadline, and not long enough to be replaced: what the bank said is not lost."""
    asking, body, outcome = case

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            await prepared_on(link, child)

            async def react(request: Any) -> None:
                await asyncio.sleep(links._GRACE_SECONDS + 0.5)
                await child.answer(request.id, body)

            assert await asked_and(child, asking(link), react) == outcome

    asyncio.run(check())


def test_the_only_answer_is_waited_for_longer_than_silence_is_tolerated() -> None:
    """Before the link gives an answer up, the supervisor has replaced an egress that does not answer."""
    assert SupervisorTimes().silence_seconds < links._GRACE_FOR_THE_ONLY_ANSWER_SECONDS


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_an_answer_that_came_while_the_gateway_stood_still_counts(
    run: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole wait passes in one turn of the loop, and the answer lies in the socket: it is read before it is given up."""
    monkeypatch.setattr(links, "_GRACE_FOR_THE_ONLY_ANSWER_SECONDS", 0.05)

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            prepared = await prepared_on(link, child)

            trigger, lever = socket.socketpair()

            def answer_and_stand_still(request_id: int) -> None:
                asyncio.get_running_loop().remove_reader(trigger)
                child.answer_now(request_id, Answered(status=201, headers=(), body=b""))
                time.sleep(0.5)

            def react(request: Any) -> None:
                # From a reader, because one loop looks at its timers right after its sockets.
                asyncio.get_running_loop().add_reader(trigger, answer_and_stand_still, request.id)
                lever.send(b"x")

            sending = link.send(prepared, permit(), deadline_seconds=0.05)
            with trigger, lever:
                assert await asked_and(child, sending, react) == Answer(status=201, headers=(), body=b"")

    run(check())


def test_a_sending_that_was_never_written_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue to egress is full: the order to send did not leave this process, so nobody calls the payment unknown."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            prepared = await prepared_on(link, child)
            monkeypatch.setattr(links, "_MAX_IN_FLIGHT", 0)

            assert await link.send(prepared, permit(), deadline_seconds=20) == NotSent(code="PREPARED_GONE")
            monkeypatch.undo()
            probe = asyncio.create_task(link.status())
            assert not isinstance((await child.request()).body, Send)
            probe.cancel()

    asyncio.run(check())


def test_a_preparation_of_an_earlier_egress_is_never_sent_by_the_next() -> None:
    """The new process has a preparation under the same number, of another payment. It must not be sent for this one."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as first:
            old = await prepared_on(link, first, handle=1)
        async with connected(link) as second:
            new = await prepared_on(link, second, handle=1)
            outcome = await link.send(old, permit(), deadline_seconds=20)
            sent = await asked_and(
                second,
                link.send(new, permit(), deadline_seconds=20),
                lambda request: second.answer(request.id, Answered(status=201, headers=(), body=b"")),
            )

        assert outcome == NotSent(code="PREPARED_GONE")
        assert isinstance(sent, Answer)

    asyncio.run(check())


def test_a_preparation_that_comes_too_late_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it any more, so egress is told to drop it instead of holding a connection for it."""
    monkeypatch.setattr(links, "_GRACE_SECONDS", 0.02)

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            asking = link.prepare(REQUEST, wrapped_data_key=b"", secrets=(), deadline_seconds=0.05)
            with pytest.raises(Unavailable):
                await asking
            await child.answer((await child.request()).id, PreparedHandle(handle=9))

            assert (await child.request()).body == Discard(handle=9)

    asyncio.run(check())


def test_discarding_tells_egress_once() -> None:
    """A second discard, and one after egress is gone, are harmless."""

    async def check() -> None:
        link = EgressLink()
        async with connected(link) as child:
            prepared = await prepared_on(link, child, handle=5)
            bodies: list[object] = []

            async def react(request: Any) -> None:
                bodies.append(request.body)
                await child.answer(request.id, Done())

            await asked_and(child, link.discard(prepared), react)
            await link.discard(prepared)
            other = await prepared_on(link, child)
        await link.discard(other)

        assert bodies == [Discard(handle=5)]

    asyncio.run(check())


def test_a_request_that_is_too_long_is_our_defect() -> None:
    """Longer than a frame may be: refused before a byte is written, and the link goes on."""

    async def check() -> None:
        link = EgressLink()
        request = ProviderRequest(
            method="POST", origin=REQUEST.origin, target="/", headers=(), body=(bytes(7 * 1024 * 1024),)
        )
        async with connected(link) as child:
            with pytest.raises(Internal):
                await link.call(request, deadline_seconds=20)
            answer = await asked_and(
                child,
                link.call(REQUEST, deadline_seconds=20),
                lambda asked: child.answer(asked.id, Answered(status=200, headers=(), body=b"")),
            )

            assert isinstance(answer, Answer)

    asyncio.run(check())
