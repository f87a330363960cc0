"""What egress does, one method per operation of the gateway's socket.

Rules:
- NotSent is said only where nothing was handed to a connection. Once `_transmit` has returned, only an Answer or Unknown
  follows, whatever goes wrong, and nothing is sent a second time.
- The data key is leased for the whole of a request, so what opened before the send opens for the check of the answer.
- No secret crosses an await: it is opened, written, encrypted and wiped within one turn of the event loop.
- An answer that repeats a secret, or that holds tokens, is not passed on.
"""

import asyncio
import secrets as randomness
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from sidecar.domain.provider import NotSent, ProviderRequest, SendOutcome, TokenOutcome, Unknown
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.egress import codes
from sidecar.egress.answers import AnswerReader, BadAnswer, BytesSink
from sidecar.egress.connection import ConnectFailed, ConnectionLost, NothingSent, TlsConnection
from sidecar.egress.datakeys import DataKeys, Lease, data_key_context
from sidecar.egress.deadline import Deadline
from sidecar.egress.importing import ImportKeyPair
from sidecar.egress.log import log
from sidecar.egress.origins import Origins
from sidecar.egress.pkce import pkce_verifier
from sidecar.egress.requests import Bench, CheckedRequest, check_request, plaintext_bytes
from sidecar.egress.tokenanswers import MAX_TOKEN_ANSWER_BYTES, Sealer, SecretSink, token_outcome
from sidecar.errors import Internal, Unavailable
from sidecar.ipc.messages import EgressStatus, NewSecretsMade, OpenSecretMessage, TokensImported
from sidecar.secretbuffer import SecretBuffer

__all__ = ["Egress"]

PREPARED_SECONDS: Final = 30.0
_MAX_PREPARED: Final = 256
_MAX_REMEMBERED_HANDLES: Final = 65_536
_MAX_CALL_SECONDS: Final = 60.0
_PLAINTEXT_BYTES: Final = 32 * 1024
# Below this length a match says nothing: such a text stands in any answer by chance.
_MIN_ECHO_BYTES: Final = 8
_TOKEN_MEMBERS: Final = (b'"access_token"', b'"refresh_token"')

_Outcome = TypeVar("_Outcome")


@dataclass(slots=True, kw_only=True, eq=False)
class _PreparedRequest:
    request: CheckedRequest
    lease: Lease | None = field(repr=False)
    connection: TlsConnection
    expiry: asyncio.TimerHandle


class Egress:
    """`hsm_connected` tells whether the hsm process is wired to this one."""

    def __init__(
        self,
        *,
        cluster: str,
        origins: Origins,
        keys: DataKeys,
        max_answer_bytes: int,
        hsm_connected: Callable[[], bool],
    ) -> None:
        self._cluster = cluster
        self._origins = origins
        self._keys = keys
        self._max_answer_bytes = max_answer_bytes
        self._hsm_connected = hsm_connected
        self._bench = Bench()
        self._plaintext = SecretBuffer(_PLAINTEXT_BYTES)
        self._import_key = ImportKeyPair()
        self._prepared: dict[int, _PreparedRequest] = {}
        self._sent_handles: OrderedDict[int, None] = OrderedDict()

    # -- requests that are sent at once

    async def call(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecretMessage],
        own_connection: bool,
        deadline: Deadline,
    ) -> SendOutcome:
        checked = self._check(request, secrets, own_connection=own_connection)
        deadline = deadline.earlier(_MAX_CALL_SECONDS)
        sink = BytesSink()
        reader = AnswerReader(method=checked.method, max_answer_bytes=self._max_answer_bytes, sink=sink)
        lease = await self._take_lease(checked, wrapped_data_key, deadline, for_seconds=deadline.remaining_seconds)
        try:
            return await self._send_at_once(
                checked,
                lease,
                reader,
                lambda: self._answer(reader, sink, checked, lease),
                own_connection=own_connection,
                deadline=deadline,
            )
        finally:
            _end_lease(lease)

    async def request_tokens(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecretMessage],
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
        deadline: Deadline,
    ) -> TokenOutcome:
        checked = self._check(request, secrets, own_connection=True)
        self._check_pair(seal_access_as, seal_refresh_as, request.origin)
        if not secrets:
            raise Internal("egress does not ask for tokens without a secret that says whose they are")
        if any(_whose(secret.context) != _whose(seal_access_as) for secret in secrets):
            raise Internal("egress does not seal tokens for another consent")
        deadline = deadline.earlier(_MAX_CALL_SECONDS)
        with SecretBuffer(MAX_TOKEN_ANSWER_BYTES) as buffer:
            sink = SecretSink(buffer)
            reader = AnswerReader(method=checked.method, max_answer_bytes=MAX_TOKEN_ANSWER_BYTES, sink=sink)
            with await self._keys.lease(
                wrapped_data_key,
                data_key_context(seal_access_as),
                for_seconds=deadline.remaining_seconds,
                deadline=deadline,
            ) as lease:
                sealer = Sealer(
                    key=lease.key, key_id=lease.key_id, access_context=seal_access_as, refresh_context=seal_refresh_as
                )
                return await self._send_at_once(
                    checked,
                    lease,
                    reader,
                    lambda: token_outcome(reader.status, sink.body, sealer),
                    own_connection=True,
                    deadline=deadline,
                )

    async def _send_at_once(
        self,
        request: CheckedRequest,
        lease: Lease | None,
        reader: AnswerReader,
        conclude: Callable[[], _Outcome],
        *,
        own_connection: bool,
        deadline: Deadline,
    ) -> _Outcome | NotSent | Unknown:
        origin = self._origins.find(request.origin)
        try:
            connection = await origin.take(own=own_connection, deadline=deadline)
        except ConnectFailed as error:
            return NotSent(code=error.code)
        keep = False
        try:
            outcome = await self._send(connection, request, lease, reader, conclude, deadline, deadline)
            keep = reader.reusable
            return outcome
        finally:
            origin.give_back(connection, keep=keep)

    # -- requests that are prepared first

    async def prepare(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecretMessage],
        deadline: Deadline,
    ) -> int:
        checked = self._check(request, secrets, own_connection=True)
        if len(self._prepared) >= _MAX_PREPARED:
            raise _provider_unavailable("too many prepared requests are waiting")
        lease = await self._take_lease(checked, wrapped_data_key, deadline, for_seconds=PREPARED_SECONDS)
        try:
            self._bench.check_opens(checked, None if lease is None else lease.opening)
            connection = await self._connect_own(checked, deadline)
        except BaseException:
            _end_lease(lease)
            raise
        # Random, so that a handle of an earlier run of this process never names another request.
        handle = randomness.randbits(62)
        expiry = asyncio.get_running_loop().call_later(PREPARED_SECONDS, self.discard, handle)
        self._prepared[handle] = _PreparedRequest(request=checked, lease=lease, connection=connection, expiry=expiry)
        return handle

    async def send(self, handle: int, *, send_before: Deadline, deadline: Deadline) -> SendOutcome:
        """Sends what was prepared, unless `send_before` has passed; the handle is gone afterwards in any case."""
        prepared = self._prepared.pop(handle, None)
        if prepared is None:
            already = handle in self._sent_handles
            return Unknown(code=codes.ALREADY_SENT) if already else NotSent(code=codes.PREPARED_GONE)
        self._remember(handle)
        outcome: SendOutcome | None = None
        try:
            await prepared.connection.settle()
            outcome = await self._send_prepared(prepared, send_before, deadline.earlier(_MAX_CALL_SECONDS))
            return outcome
        finally:
            if isinstance(outcome, NotSent):
                del self._sent_handles[handle]
            _end(prepared)

    def discard(self, handle: int) -> None:
        prepared = self._prepared.pop(handle, None)
        if prepared is not None:
            _end(prepared)

    async def _send_prepared(
        self, prepared: _PreparedRequest, send_before: Deadline, deadline: Deadline
    ) -> SendOutcome:
        sink = BytesSink()
        request, lease = prepared.request, prepared.lease
        reader = AnswerReader(method=request.method, max_answer_bytes=self._max_answer_bytes, sink=sink)
        return await self._send(
            prepared.connection,
            request,
            lease,
            reader,
            lambda: self._answer(reader, sink, request, lease),
            send_before,
            deadline,
        )

    async def _connect_own(self, request: CheckedRequest, deadline: Deadline) -> TlsConnection:
        origin = self._origins.find(request.origin)
        try:
            async with deadline.timeout():
                return await origin.connect()
        except ConnectFailed as error:
            raise _provider_unavailable(f"the provider cannot be reached: {error.code}") from None
        except TimeoutError:
            raise _provider_unavailable(f"the provider cannot be reached: {codes.CONNECT_TIMED_OUT}") from None

    def _remember(self, handle: int) -> None:
        self._sent_handles[handle] = None
        if len(self._sent_handles) > _MAX_REMEMBERED_HANDLES:
            self._sent_handles.popitem(last=False)

    # -- sending

    async def _send(
        self,
        connection: TlsConnection,
        request: CheckedRequest,
        lease: Lease | None,
        reader: AnswerReader,
        conclude: Callable[[], _Outcome],
        send_before: Deadline,
        deadline: Deadline,
    ) -> _Outcome | NotSent | Unknown:
        try:
            if not self._transmit(connection, request, lease, send_before, deadline):
                return NotSent(code=codes.DEADLINE_BEFORE_SEND)
        except NothingSent:
            return NotSent(code=codes.CONNECTION_LOST_BEFORE_SEND)
        try:
            async with deadline.timeout():
                await connection.receive(reader, self._plaintext.view)
            return conclude()
        except TimeoutError:
            return Unknown(code=codes.DEADLINE_AFTER_SEND)
        except ConnectionLost:
            return Unknown(code=codes.ANSWER_TRUNCATED if reader.started else codes.CONNECTION_LOST)
        except BadAnswer as error:
            return Unknown(code=error.code)
        except Exception as error:  # noqa: BLE001 (bytes are out: a defect of ours must not look like a refusal)
            log("error", "defect_after_send", "a defect after the send", error_class=type(error).__name__)
            return Unknown(code=codes.DEFECT_AFTER_SEND)

    def _transmit(
        self,
        connection: TlsConnection,
        request: CheckedRequest,
        lease: Lease | None,
        send_before: Deadline,
        deadline: Deadline,
    ) -> bool:
        """Opens the secrets, writes the request and wipes them. False if `send_before` had passed: then nothing was sent.

        Raises NothingSent, or Corrupt where a secret does not open; nothing was sent then either.
        """
        with self._bench.rendered(request, None if lease is None else lease.opening) as parts:
            if send_before.passed:
                return False
            connection.send(*parts, within_seconds=deadline.remaining_seconds)
        return True

    # -- answers

    def _answer(
        self, reader: AnswerReader, sink: BytesSink, request: CheckedRequest, lease: Lease | None
    ) -> SendOutcome:
        texts = "\n".join(value for _, value in reader.headers).encode("latin-1")
        if any(member in sink.body for member in _TOKEN_MEMBERS):
            return Unknown(code=codes.ANSWER_HOLDS_TOKENS)
        if lease is not None and self._echoes(request, lease, sink.body, texts):
            return Unknown(code=codes.ANSWER_ECHOES_SECRET)
        return reader.answer(bytes(sink.body))

    def _echoes(self, request: CheckedRequest, lease: Lease, *texts: bytes | bytearray) -> bool:
        longest = max(map(len, texts))
        for kind, encoding in request.forms:
            sealed = request.secrets[kind]
            # A form-encoded secret is never shorter than the secret itself.
            if not _MIN_ECHO_BYTES <= plaintext_bytes(sealed) <= longest:
                continue
            with self._bench.opened(sealed, lease.opening, encoding) as secret:
                if any(text.find(secret) >= 0 for text in texts):
                    return True
        return False

    # -- secrets

    async def new_secrets(self, context: SecretContext, *, deadline: Deadline) -> NewSecretsMade:
        self._check_context(context)
        lease, wrapped = await self._keys.create(data_key_context(context), deadline=deadline)
        with lease, pkce_verifier() as (verifier, challenge):
            sealer = Sealer(key=lease.key, key_id=lease.key_id, access_context=context, refresh_context=context)
            return NewSecretsMade(
                wrapped_data_key=wrapped,
                pkce_verifier=sealer.sealed(SecretKind.PKCE_VERIFIER, verifier, context),
                code_challenge=challenge,
            )

    def import_key(self) -> tuple[str, bytes]:
        """Key id and public key."""
        return self._import_key.key_id, self._import_key.public_key

    async def import_tokens(
        self,
        *,
        key_id: str,
        sealed_tokens: bytes,
        info: bytes,
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
        deadline: Deadline,
    ) -> TokensImported:
        self._check_pair(seal_access_as, seal_refresh_as)
        opened = partial(
            self._import_key.opened,
            key_id=key_id,
            sealed_tokens=sealed_tokens,
            info=info,
            owner=seal_access_as.owner,
            provider=self._origins.find(seal_access_as.provider_origin).provider,
        )
        # Once to refuse what is wrong before a key is made, and once to seal: the plaintext never waits for hsm.
        with opened():
            pass
        lease, wrapped = await self._keys.create(data_key_context(seal_access_as), deadline=deadline)
        with lease, opened() as tokens:
            sealer = Sealer(
                key=lease.key, key_id=lease.key_id, access_context=seal_access_as, refresh_context=seal_refresh_as
            )
            access_token, refresh_token = sealer.sealed_pair(*tokens)
            return TokensImported(wrapped_data_key=wrapped, access_token=access_token, refresh_token=refresh_token)

    def forget(self, wrapped_data_key: bytes) -> None:
        self._keys.forget(wrapped_data_key)

    def status(self) -> EgressStatus:
        return EgressStatus(
            cached_data_keys=self._keys.count, prepared=len(self._prepared), hsm_connected=self._hsm_connected()
        )

    async def close(self) -> None:
        """Ends all connections and wipes all keys."""
        for handle in tuple(self._prepared):
            self.discard(handle)
        self._origins.close()
        await self._keys.close()
        self._bench.close()
        self._plaintext.close()

    # -- checks

    def _check(
        self, request: ProviderRequest, secrets: Sequence[OpenSecretMessage], *, own_connection: bool
    ) -> CheckedRequest:
        checked = check_request(request, secrets, cluster=self._cluster, own_connection=own_connection)
        self._origins.find(request.origin)
        return checked

    def _check_context(self, context: SecretContext) -> None:
        if context.cluster != self._cluster or not context.owner or not context.consent or context.row_version < 1:
            raise Internal("egress does not seal for this context")
        self._origins.find(context.provider_origin)

    def _check_pair(self, access: SecretContext, refresh: SecretContext, *origins: str) -> None:
        """Tokens are sealed for one consent, and for origins of the one provider that issued them."""
        self._check_context(access)
        self._check_context(refresh)
        if _whose(access) != _whose(refresh):
            raise Internal("egress does not seal one answer's tokens for two consents")
        if not self._origins.same_provider((access.provider_origin, refresh.provider_origin, *origins)):
            raise Internal("egress does not seal a provider's tokens for another provider")

    async def _take_lease(
        self, request: CheckedRequest, wrapped_data_key: bytes, deadline: Deadline, *, for_seconds: float
    ) -> Lease | None:
        """None for a request without secrets."""
        if not request.secrets:
            return None
        context = next(iter(request.secrets.values())).context
        return await self._keys.lease(
            wrapped_data_key, data_key_context(context), for_seconds=for_seconds, deadline=deadline
        )


def _whose(context: SecretContext) -> tuple[str, str]:
    return context.owner, context.consent


def _end(prepared: _PreparedRequest) -> None:
    prepared.expiry.cancel()
    prepared.connection.close()
    _end_lease(prepared.lease)


def _end_lease(lease: Lease | None) -> None:
    if lease is not None:
        lease.__exit__(None, None, None)


def _provider_unavailable(message: str) -> Unavailable:
    return Unavailable("PROVIDER_UNAVAILABLE", message)
