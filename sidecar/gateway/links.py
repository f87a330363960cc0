"""The gateway's ends of the sockets to its children: requests out, answers in, and what a lost answer means.

Rules:
- Each call waits for a child that can take it until its deadline, and for its answer a grace longer: long enough, where the
  answer cannot be had a second time, for a child that was paused.
- What became of a lost call is said as it is. A signature that did not come: try again. A request to a provider that was
  handed over and not answered: unknown, never "not sent". A payment's permit is redeemed before anything else, and its
  bytes are handed over at most once.
- What was prepared in one egress process is never sent in another: handles here belong to the connection they came from.
- An answer to a question that was not asked, or that does not parse, ends the connection.
- Nothing here repeats a call.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, cast

import msgspec

from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import KeyPurpose, NotSent, ProviderRequest, SendOutcome, TokenOutcome, Unknown
from sidecar.domain.secrets import SecretContext
from sidecar.errors import Internal, Refused, Unavailable
from sidecar.ipc.frames import HEADER, BadFrame, boot_time_ns, encode_frame, frame_length
from sidecar.ipc.messages import (
    Answered,
    Call,
    CreateMasterKey,
    Discard,
    Done,
    EgressStatus,
    Envelope,
    Failure,
    Forget,
    GatewayToEgress,
    GatewayToHsm,
    GetEgressStatus,
    GetHsmStatus,
    GetImportKey,
    Granted,
    GrantRefused,
    HsmStatus,
    ImportKeyIs,
    ImportTokens,
    LoadMasterKeys,
    MasterKeyCreated,
    MasterKeysLoaded,
    Message,
    NewSecretsMade,
    NothingSent,
    OpenSecretMessage,
    OutcomeUnknown,
    Ping,
    Pong,
    Prepare,
    PreparedHandle,
    RequestTokens,
    Send,
    Sign,
    Signature,
    TokensImported,
    WrappedMasterKey,
    decoder_for,
    error_of,
    send_outcome,
    token_outcome,
)
from sidecar.ipc.messages import NewSecrets as NewSecretsMessage
from sidecar.ports import ImportedTokens, ImportKey, MasterKeyRecord, NewSecrets, OpenSecret, Prepared, PublicKey

__all__ = ["AnswerLost", "Connection", "EgressLink", "HsmLink", "LinkObserver"]

HSM_DEADLINE_SECONDS: Final = 4.5
_LOCAL_DEADLINE_SECONDS: Final = 4.5  # for what egress does without a provider
# Egress gives up at the deadline and says so; the gateway waits a little longer for those words.
_GRACE_SECONDS: Final = 0.5
SILENCE_SECONDS: Final = 3.0
"""How long the supervisor tolerates a silent child, which may be paused with an answer in hand."""
# An answer that cannot be had a second time (a rotated pair of tokens, a bank's 201) is waited for as long as egress may still
# be replaced for its silence. A dead egress closes the socket, so nobody waits this long for nothing.
_GRACE_FOR_THE_ONLY_ANSWER_SECONDS: Final = SILENCE_SECONDS + 1.0
# After a standstill of this process the timers may come first, with the answer unread in the socket.
_LAST_LOOK_SECONDS: Final = 0.02
_MAX_IN_FLIGHT: Final = 4096
_MAX_UNSENT_BYTES: Final = 64 * 1024 * 1024
_SIGNATURE_BYTES: Final = 64
_DIGEST_BYTES: Final = 32

LinkObserver = Callable[[str, str, float], None]
"""Called after each call with the operation's name, its outcome (`ok`, `lost` or an error's reason) and its seconds."""

M = TypeVar("M", bound=Message)


class AnswerLost(Exception):
    """No answer came. `handed_over` tells whether the request may have reached the child."""

    def __init__(self, *, handed_over: bool) -> None:
        super().__init__("no answer came")
        self.handed_over = handed_over


class Connection(asyncio.Protocol):
    """One socket to one child process, from its start to its end. Writes of one turn of the loop go out together."""

    def __init__(self, *, request_type: type[Envelope], answer_type: type[Envelope]) -> None:
        self._request_type = request_type
        self._decoder = decoder_for(answer_type)
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._outgoing: list[bytearray] = []
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._last_id = 0
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.last_heard = time.monotonic()
        self.on_late_answer: Callable[[Message], None] | None = None

    @classmethod
    async def over(
        cls, peer: socket.socket, *, request_type: type[Envelope], answer_type: type[Envelope]
    ) -> "Connection":
        """Takes `peer` over."""
        peer.settimeout(0)
        _, connection = await asyncio.get_running_loop().create_unix_connection(
            lambda: cls(request_type=request_type, answer_type=answer_type), sock=peer
        )
        return connection

    async def ask(self, body: Message, *, answer_before_seconds: float, child_deadline_seconds: float) -> Message:
        """The child's answer, whatever it is. Raises AnswerLost."""
        if self._transport is None or self.closed.done() or self._overfull():
            raise AnswerLost(handed_over=False)
        frame = self._frame(body, deadline_seconds=child_deadline_seconds)
        request_id = self._last_id
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._waiting[request_id] = answer
        timer = self._loop.call_later(answer_before_seconds, self._look_once_more, answer)
        self._write(frame)
        try:
            return await answer
        finally:
            timer.cancel()
            self._waiting.pop(request_id, None)

    def _look_once_more(self, answer: "asyncio.Future[Message]") -> None:
        self._loop.call_later(_LAST_LOOK_SECONDS, _give_up, answer)

    def tell(self, body: Message) -> None:
        """Asks, and takes no interest in the answer."""
        if not self.closed.done():
            self._write(self._frame(body, deadline_seconds=_LOCAL_DEADLINE_SECONDS))

    async def ping(self, *, within_seconds: float) -> bool:
        """Whether the child answered in time."""
        try:
            answer = await self.ask(Ping(), answer_before_seconds=within_seconds, child_deadline_seconds=within_seconds)
        except AnswerLost:
            return False
        return isinstance(answer, Pong)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        self.last_heard = time.monotonic()
        self._received += data
        try:
            self._take_whole_frames()
        except (BadFrame, msgspec.MsgspecError, UnicodeDecodeError):  # the last for a text that is not UTF-8
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(AnswerLost(handed_over=True))
        if not self.closed.done():
            self.closed.set_result(None)

    def _take_whole_frames(self) -> None:
        start = 0
        while len(self._received) - start >= HEADER.size:
            end = start + HEADER.size + frame_length(self._received[start : start + HEADER.size])
            if len(self._received) < end:
                break
            with memoryview(self._received) as view, view[start + HEADER.size : end] as document:
                envelope = self._decoder.decode(document)
            self._take(envelope.id, envelope.body)
            start = end
        del self._received[:start]

    def _take(self, request_id: int, body: Message) -> None:
        if not 0 < request_id <= self._last_id:
            raise BadFrame("an answer to a question that was not asked")
        answer = self._waiting.pop(request_id, None)
        if answer is not None and not answer.done():
            answer.set_result(body)
        elif self.on_late_answer is not None:
            self.on_late_answer(body)

    def _frame(self, body: Message, *, deadline_seconds: float) -> bytearray:
        deadline = boot_time_ns() + int(deadline_seconds * 1e9)
        try:
            frame = encode_frame(self._request_type(id=self._last_id + 1, deadline_boot_time_ns=deadline, body=body))  # type: ignore[call-arg]
        except BadFrame as error:
            raise Internal("a request is too long for the child process") from error
        self._last_id += 1
        return frame

    def _write(self, frame: bytearray) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frame)

    def _flush(self) -> None:
        frames, self._outgoing = self._outgoing, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(frames) if len(frames) > 1 else frames[0])

    def _overfull(self) -> bool:
        assert self._transport is not None
        return len(self._waiting) >= _MAX_IN_FLIGHT or self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES


class _Slot:
    """Where the newest connection stands. A call that comes while there is none waits for the next one, within its deadline."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._offered = asyncio.Event()
        self._callers_waiting = 0

    @property
    def current(self) -> Connection | None:
        return self._connection

    def offer(self, connection: Connection | None) -> None:
        self._connection = connection
        if connection is None:
            self._offered.clear()
        else:
            self._offered.set()

    async def take(self, *, within_seconds: float) -> Connection:
        """Raises AnswerLost."""
        if self._connection is not None and not self._connection.closed.done():
            return self._connection
        if self._callers_waiting >= _MAX_IN_FLIGHT:
            raise AnswerLost(handed_over=False)
        self._callers_waiting += 1
        try:
            async with asyncio.timeout(within_seconds):
                return await self._next()
        except TimeoutError:
            raise AnswerLost(handed_over=False) from None
        finally:
            self._callers_waiting -= 1

    async def _next(self) -> Connection:
        while self._connection is None or self._connection.closed.done():
            if self._connection is not None:  # dead, and the supervisor has not noticed yet
                self.offer(None)
            await self._offered.wait()
        return self._connection


class _Link:
    """What both links share: the slot, the asking, the observing."""

    def __init__(self, *, observe: LinkObserver | None = None) -> None:
        self._slot = _Slot()
        self._observe = observe or (lambda _operation, _outcome, _seconds: None)

    @property
    def connected(self) -> bool:
        connection = self._slot.current
        return connection is not None and not connection.closed.done()

    def attach(self, connection: Connection) -> None:
        """Every later call goes over this connection."""
        self._slot.offer(connection)

    def detach(self) -> None:
        self._slot.offer(None)

    async def _ask(
        self,
        body: Message,
        expected: type[M],
        *,
        deadline_seconds: float,
        grace_seconds: float = 0.0,
        over: Connection | None = None,
    ) -> M:
        """Raises AnswerLost, or the error that the child answered with."""
        answer = await self._ask_any(
            body, (expected,), deadline_seconds=deadline_seconds, grace_seconds=grace_seconds, over=over
        )
        assert isinstance(answer, expected)
        return answer

    async def _ask_any(
        self,
        body: Message,
        expected: tuple[type[Message], ...],
        *,
        deadline_seconds: float,
        grace_seconds: float = 0.0,
        over: Connection | None = None,
    ) -> Message:
        started = time.monotonic()
        outcome = "lost"
        try:
            connection = over or await self._slot.take(within_seconds=deadline_seconds)
            left_seconds = deadline_seconds - (time.monotonic() - started)
            answer = await connection.ask(
                body, answer_before_seconds=left_seconds + grace_seconds, child_deadline_seconds=left_seconds
            )
            if isinstance(answer, Failure):
                outcome = answer.reason
                raise error_of(answer)
            if not isinstance(answer, expected):
                connection.close()
                raise AnswerLost(handed_over=True)
            outcome = "ok"
            return answer
        finally:
            self._observe(type(body).__name__, outcome, time.monotonic() - started)


class HsmLink(_Link):
    """The `Hsm` port, and what the gateway alone does with the hsm process."""

    def __init__(self, *, observe: LinkObserver | None = None) -> None:
        super().__init__(observe=observe)
        self._public_keys: dict[KeyPurpose, PublicKey] = {}

    def attach(self, connection: Connection) -> None:
        self._public_keys = {}
        super().attach(connection)

    async def sign(self, purpose: KeyPurpose, digest: bytes) -> bytes:
        if purpose is KeyPurpose.ROOT:
            raise Refused("METHOD_NOT_ALLOWED", "the root key does not sign")
        if len(digest) != _DIGEST_BYTES:
            raise Internal("a digest has 32 bytes")
        signature = await self._asked(Sign(purpose=purpose, digest=digest), Signature)
        if len(signature.value) != _SIGNATURE_BYTES:
            raise _hsm_unavailable()
        return signature.value

    async def public_key(self, purpose: KeyPurpose) -> PublicKey:
        """Raises Refused for the root key and for a purpose that has no key."""
        if purpose not in self._public_keys:
            status = await self.status()
            self._public_keys = {
                key.purpose: PublicKey(purpose=key.purpose, key_id=key.key_id, algorithm="ES256", spki_der=key.spki_der)
                for key in status.keys
                if key.purpose is not KeyPurpose.ROOT
            }
        try:
            return self._public_keys[purpose]
        except KeyError:
            raise Refused("METHOD_NOT_ALLOWED", "there is no signing key for this purpose") from None

    async def create_master_key(self, version: int) -> MasterKeyCreated:
        """Wrapped, and not loaded: store it first. Raises Unavailable(HSM_UNAVAILABLE)."""
        return await self._asked(CreateMasterKey(version=version), MasterKeyCreated)

    async def load_master_keys(self, records: Sequence[MasterKeyRecord]) -> int:
        """Replaces all that is loaded; how many there are now. Raises Corrupt(ENVELOPE_CORRUPT) with nothing changed."""
        keys = tuple(
            WrappedMasterKey(
                key_id=record.key_id, version=record.version, wrapped=record.wrapped, current=record.current
            )
            for record in records
        )
        return (await self._asked(LoadMasterKeys(keys=keys), MasterKeysLoaded)).count

    async def status(self) -> HsmStatus:
        return await self._asked(GetHsmStatus(), HsmStatus)

    async def _asked(self, body: GatewayToHsm, expected: type[M]) -> M:
        try:
            return await self._ask(body, expected, deadline_seconds=HSM_DEADLINE_SECONDS)
        except AnswerLost as lost:
            raise _hsm_unavailable() from lost


class EgressLink(_Link):
    """The `TokenEgress` port."""

    def __init__(self, *, observe: LinkObserver | None = None) -> None:
        super().__init__(observe=observe)
        self._prepared: dict[int, tuple[Connection, int]] = {}
        self._last_handle = 0

    def attach(self, connection: Connection) -> None:
        connection.on_late_answer = lambda answer: self._discard_unclaimed(connection, answer)
        # Handles of an earlier egress process name nothing any more: their requests died with it, unsent.
        self._prepared = {key: value for key, value in self._prepared.items() if value[0] is connection}
        super().attach(connection)

    async def new_secrets(self, context: SecretContext) -> NewSecrets:
        made = await self._locally(NewSecretsMessage(context=context), NewSecretsMade)
        return NewSecrets(
            wrapped_data_key=made.wrapped_data_key,
            pkce_verifier=made.pkce_verifier,
            code_challenge=made.code_challenge,
        )

    async def call(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        body = Call(
            request=request, wrapped_data_key=wrapped_data_key, secrets=_messages(secrets), own_connection=False
        )
        return await self._outcome(body, deadline_seconds=deadline_seconds)

    async def call_once(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        body = Call(request=request, wrapped_data_key=wrapped_data_key, secrets=_messages(secrets), own_connection=True)
        return await self._outcome(body, deadline_seconds=deadline_seconds)

    async def request_tokens(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
        deadline_seconds: float,
    ) -> TokenOutcome:
        body = RequestTokens(
            request=request,
            wrapped_data_key=wrapped_data_key,
            secrets=_messages(secrets),
            seal_access_as=seal_access_as,
            seal_refresh_as=seal_refresh_as,
        )
        try:
            answer = await self._ask_any(
                body,
                _TOKEN_ANSWERS,
                deadline_seconds=deadline_seconds,
                grace_seconds=_GRACE_FOR_THE_ONLY_ANSWER_SECONDS,
            )
        except AnswerLost as lost:
            return _unknown_if_handed_over(lost)
        return _told_of_tokens(answer)

    async def prepare(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        deadline_seconds: float,
    ) -> Prepared:
        body = Prepare(request=request, wrapped_data_key=wrapped_data_key, secrets=_messages(secrets))
        try:
            connection = await self._slot.take(within_seconds=deadline_seconds)
            answer = await self._ask(
                body,
                PreparedHandle,
                deadline_seconds=deadline_seconds,
                grace_seconds=_GRACE_SECONDS,
                over=connection,
            )
        except AnswerLost as lost:
            raise _egress_unavailable() from lost
        self._last_handle += 1
        if len(self._prepared) >= _MAX_IN_FLIGHT:  # a caller that neither sends nor discards: its request stays unsent
            del self._prepared[next(iter(self._prepared))]
        self._prepared[self._last_handle] = (connection, answer.handle)
        return Prepared(handle=self._last_handle)

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        permit.redeem()
        connection, handle = self._prepared.pop(prepared.handle, (None, 0))
        if connection is None or connection.closed.done():
            # Egress sends on this message alone, and this message was never written.
            return NotSent(code=_PREPARED_GONE)
        send_before_ns = boot_time_ns() + int(deadline_seconds * 1e9)
        if (
            permit.send_before_boot_time_ns is not None
        ):  # this process may have stood still since the seconds were counted
            send_before_ns = min(send_before_ns, permit.send_before_boot_time_ns)
        body = Send(handle=handle, send_before_boot_time_ns=send_before_ns)
        try:
            answer = await self._ask_any(
                body,
                _SEND_ANSWERS,
                deadline_seconds=deadline_seconds,
                grace_seconds=_GRACE_FOR_THE_ONLY_ANSWER_SECONDS,
                over=connection,
            )
        except AnswerLost as lost:
            return Unknown(code=_EGRESS_LOST) if lost.handed_over else NotSent(code=_PREPARED_GONE)
        return _told(answer)

    async def discard(self, prepared: Prepared) -> None:
        connection, handle = self._prepared.pop(prepared.handle, (None, 0))
        if connection is None:
            return
        try:
            await self._ask(Discard(handle=handle), Done, deadline_seconds=_LOCAL_DEADLINE_SECONDS, over=connection)
        except AnswerLost:
            return  # what egress prepared ends with it, or by its own time limit

    async def import_key(self) -> ImportKey:
        key = await self._locally(GetImportKey(), ImportKeyIs)
        return ImportKey(key_id=key.key_id, public_key=key.public_key)

    async def import_tokens(
        self,
        *,
        key_id: str,
        sealed_tokens: bytes,
        info: bytes,
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
    ) -> ImportedTokens:
        body = ImportTokens(
            key_id=key_id,
            sealed_tokens=sealed_tokens,
            info=info,
            seal_access_as=seal_access_as,
            seal_refresh_as=seal_refresh_as,
        )
        imported = await self._locally(body, TokensImported)
        return ImportedTokens(
            wrapped_data_key=imported.wrapped_data_key,
            access_token=imported.access_token,
            refresh_token=imported.refresh_token,
        )

    async def forget(self, wrapped_data_key: bytes) -> None:
        await self._locally(Forget(wrapped_data_key=wrapped_data_key), Done)

    async def status(self) -> EgressStatus:
        return await self._locally(GetEgressStatus(), EgressStatus)

    async def _locally(self, body: GatewayToEgress, expected: type[M]) -> M:
        """For what egress does without any provider: a lost answer did nothing that matters."""
        try:
            return await self._ask(body, expected, deadline_seconds=_LOCAL_DEADLINE_SECONDS)
        except AnswerLost as lost:
            raise _egress_unavailable() from lost

    async def _outcome(self, body: Call, *, deadline_seconds: float) -> SendOutcome:
        grace_seconds = _GRACE_FOR_THE_ONLY_ANSWER_SECONDS if body.own_connection else _GRACE_SECONDS
        try:
            answer = await self._ask_any(
                body, _SEND_ANSWERS, deadline_seconds=deadline_seconds, grace_seconds=grace_seconds
            )
        except AnswerLost as lost:
            return _unknown_if_handed_over(lost)
        return _told(answer)

    def _discard_unclaimed(self, connection: Connection, answer: Message) -> None:
        """Nobody waits for this preparation any more; egress should not hold a connection and a token's place for it."""
        if isinstance(answer, PreparedHandle):
            connection.tell(Discard(handle=answer.handle))


_PREPARED_GONE: Final = "PREPARED_GONE"
_EGRESS_LOST: Final = "EGRESS_LOST"
_SEND_ANSWERS: Final = (Answered, NothingSent, OutcomeUnknown)
_TOKEN_ANSWERS: Final = (Granted, GrantRefused, NothingSent, OutcomeUnknown)


def _unknown_if_handed_over(lost: AnswerLost) -> Unknown:
    if not lost.handed_over:
        raise _egress_unavailable() from lost
    return Unknown(code=_EGRESS_LOST)


def _told(answer: Message) -> SendOutcome:
    outcome = send_outcome(answer)
    assert outcome is not None, "the answer's type was checked before"
    return outcome


def _told_of_tokens(answer: Message) -> TokenOutcome:
    outcome = token_outcome(answer)
    assert outcome is not None, "the answer's type was checked before"
    return outcome


def _messages(secrets: Sequence[OpenSecret]) -> tuple[OpenSecretMessage, ...]:
    return tuple(OpenSecretMessage(secret=secret.secret, context=secret.context) for secret in secrets)


def _give_up(answer: "asyncio.Future[Message]") -> None:
    if not answer.done():
        answer.set_exception(AnswerLost(handed_over=True))


def _hsm_unavailable() -> Unavailable:
    return Unavailable("HSM_UNAVAILABLE", "the HSM did not answer in time; try again with the same request id")


def _egress_unavailable() -> Unavailable:
    return Unavailable(
        "PROVIDER_UNAVAILABLE",
        "the process that speaks to providers did not answer; nothing was sent to any; try again",
    )
