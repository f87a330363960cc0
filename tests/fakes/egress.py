"""An egress in memory: the TokenEgress port over a bank that is a callable, with real sealing under keys in software.

It keeps the port's promises as the real process does (tests/contract/test_egress_contract.py runs on both): secrets open only
for their context, tokens come back sealed, a permit is redeemed and a prepared request is sent once. What it leaves out is
what it does not need: TLS, HTTP, locked memory.
"""

import json
import os
import time
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from urllib.parse import quote_plus

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import (
    Answer,
    NotSent,
    ProviderRequest,
    SecretSlot,
    SendOutcome,
    SlotEncoding,
    TokenGrant,
    TokenOutcome,
    TokensRefused,
    Unknown,
)
from sidecar.domain.secrets import SealedSecret, SecretContext, SecretKind
from sidecar.errors import Corrupt, FieldViolation, Internal, InvalidField, PreconditionFailed, Unavailable
from sidecar.hpke import OVERHEAD_BYTES, HpkeRefused, open_into
from sidecar.ports import ImportedTokens, ImportKey, NewSecrets, OpenSecret, Prepared
from sidecar.sealing import KEY_BYTES, KEY_ID_BYTES, SealedSecretRefused, parse, seal
from sidecar.sealing import open_into as open_sealed_into

__all__ = ["BankRequest", "FakeBank", "FakeEgress", "SoftwareKeys"]

_ERRORS = frozenset(
    [
        "invalid_client",
        "invalid_grant",
        "invalid_request",
        "invalid_scope",
        "unauthorized_client",
        "unsupported_grant_type",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BankRequest:
    """A request as the bank gets it, secrets filled in. Header names are lower case."""

    method: str
    origin: str
    target: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


FakeBank = Callable[[BankRequest], SendOutcome | Awaitable[SendOutcome]]
"""Answers, or says what happened instead: NotSent (it could not be reached), Unknown (no answer came). One in another
process is awaited."""


class SoftwareKeys:
    """What hsm does for egress, with a master key in memory."""

    def __init__(self) -> None:
        self._master = os.urandom(KEY_BYTES)
        self._master_id = os.urandom(KEY_ID_BYTES)
        self.opened = 0  # how often a data key was asked for

    def create_data_key(self, context: SecretContext) -> tuple[bytes, bytes]:
        """Wrapped, and in the clear."""
        key = os.urandom(KEY_BYTES)
        wrapped = seal(
            key=self._master,
            key_id=self._master_id,
            key_version=1,
            kind=SecretKind.DATA_KEY,
            context=context,
            plaintext=key,
        )
        return wrapped, key

    def open_data_key(self, wrapped: bytes, context: SecretContext) -> bytes:
        """Raises Corrupt."""
        self.opened += 1
        return _opened(self._master, wrapped, SecretKind.DATA_KEY, context)

    def key_id(self, context: SecretContext) -> bytes:
        return sha256(repr(context).encode()).digest()[:KEY_ID_BYTES]

    def seal(
        self, kind: SecretKind, plaintext: bytes, context: SecretContext, *, wrapped_data_key: bytes
    ) -> OpenSecret:
        """A secret sealed as egress would have done it: for tests that start in the middle."""
        data_context = data_key_context(context)
        sealed = seal(
            key=self.open_data_key(wrapped_data_key, data_context),
            key_id=self.key_id(data_context),
            key_version=1,
            kind=kind,
            context=context,
            plaintext=plaintext,
        )
        return OpenSecret(
            secret=SealedSecret(kind=kind, row_version=context.row_version, sealed=sealed), context=context
        )

    def open(self, secret: OpenSecret, *, wrapped_data_key: bytes) -> bytes:
        """The plaintext of a sealed secret. Raises Corrupt."""
        key = self.open_data_key(wrapped_data_key, data_key_context(secret.context))
        return _opened(key, secret.secret.sealed, secret.secret.kind, secret.context)


class FakeEgress:
    """`origins` maps each origin that may be talked to to its provider."""

    def __init__(
        self,
        *,
        cluster: str,
        origins: Mapping[str, str],
        bank: FakeBank,
        keys: SoftwareKeys,
        boot_time_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    ) -> None:
        self.bank = bank
        self._boot_time_ns = boot_time_ns
        self.available = True  # False: the hsm does not answer
        self._cluster = cluster
        self._origins = dict(origins)
        self._keys = keys
        self._prepared: dict[int, BankRequest] = {}
        self._secrets_of: dict[int, tuple[bytes, ...]] = {}
        self._sent: set[int] = set()
        self._last_handle = 0
        self._import_key = X25519PrivateKey.generate()

    async def new_secrets(self, context: SecretContext) -> NewSecrets:
        self._check_context(context)
        wrapped = self._new_data_key(context)
        verifier = urlsafe_b64encode(os.urandom(32)).rstrip(b"=")
        sealed = self._keys.seal(SecretKind.PKCE_VERIFIER, verifier, context, wrapped_data_key=wrapped)
        challenge = urlsafe_b64encode(sha256(verifier).digest()).rstrip(b"=").decode("ascii")
        return NewSecrets(wrapped_data_key=wrapped, pkce_verifier=sealed.secret.sealed, code_challenge=challenge)

    async def call(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        filled, opened = self._filled(request, wrapped_data_key, secrets)
        return _passed_on(await self._ask(filled), opened)

    async def call_once(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        return await self.call(
            request, wrapped_data_key=wrapped_data_key, secrets=secrets, deadline_seconds=deadline_seconds
        )

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
        filled, _ = self._filled(request, wrapped_data_key, secrets)
        self._check_pair(seal_access_as, seal_refresh_as, request.origin)
        if not secrets:
            raise Internal("egress does not ask for tokens without a secret that says whose they are")
        if any(_whose(secret.context) != _whose(seal_access_as) for secret in secrets):
            raise Internal("egress does not seal tokens for another consent")
        self._open_key(wrapped_data_key, seal_access_as)
        outcome = await self._ask(filled)
        if not isinstance(outcome, Answer):
            return outcome
        return self._token_outcome(outcome, wrapped_data_key, seal_access_as, seal_refresh_as)

    async def prepare(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        deadline_seconds: float,
    ) -> Prepared:
        filled, opened = self._filled(request, wrapped_data_key, secrets)
        self._last_handle += 1
        self._prepared[self._last_handle] = filled
        self._secrets_of[self._last_handle] = opened
        return Prepared(handle=self._last_handle)

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        permit.redeem()
        request = self._prepared.pop(prepared.handle, None)
        if request is None:
            return NotSent(code="PREPARED_GONE")
        opened = self._secrets_of.pop(prepared.handle)
        send_before_ns = permit.send_before_boot_time_ns
        if deadline_seconds <= 0 or (send_before_ns is not None and self._boot_time_ns() >= send_before_ns):
            return NotSent(code="DEADLINE_BEFORE_SEND")
        return _passed_on(await self._ask(request), opened)

    async def discard(self, prepared: Prepared) -> None:
        self._prepared.pop(prepared.handle, None)
        self._secrets_of.pop(prepared.handle, None)

    async def import_key(self) -> ImportKey:
        public = self._import_key.public_key().public_bytes_raw()
        return ImportKey(key_id=sha256(public).hexdigest()[:16], public_key=public)

    async def import_tokens(
        self,
        *,
        key_id: str,
        sealed_tokens: bytes,
        info: bytes,
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
    ) -> ImportedTokens:
        self._check_pair(seal_access_as, seal_refresh_as)
        if key_id != (await self.import_key()).key_id:
            raise PreconditionFailed("IMPORT_KEY_UNKNOWN", "the import key is no longer in use; fetch the current one")
        if not self._binds(info, seal_access_as):
            raise _import_refused("is not bound to this owner and provider")
        tokens = self._imported(sealed_tokens, info)
        wrapped = self._new_data_key(seal_access_as)
        access, refresh = self._sealed_pair(tokens, wrapped, seal_access_as, seal_refresh_as)
        return ImportedTokens(wrapped_data_key=wrapped, access_token=access, refresh_token=refresh)

    async def forget(self, wrapped_data_key: bytes) -> None:
        """Nothing is cached here."""

    # -- parts

    async def _ask(self, request: BankRequest) -> SendOutcome:
        outcome = self.bank(request)
        return await outcome if isinstance(outcome, Awaitable) else outcome

    def _filled(
        self, request: ProviderRequest, wrapped_data_key: bytes, secrets: Sequence[OpenSecret]
    ) -> tuple[BankRequest, tuple[bytes, ...]]:
        opened = {secret.secret.kind: self._open(secret, wrapped_data_key, origin=request.origin) for secret in secrets}
        if {slot.kind for slot in request.slots} != set(opened) or len(opened) != len(secrets):
            raise Internal("egress does not send this request: slots and secrets")
        self._check_origin(request.origin)
        headers = {
            header.name.lower(): header.value + (opened[header.slot.kind].decode("ascii") if header.slot else "")
            for header in request.headers
        }
        body = b"".join(part if isinstance(part, bytes) else _encoded(part, opened) for part in request.body)
        filled = BankRequest(
            method=request.method, origin=request.origin, target=request.target, headers=headers, body=body
        )
        return filled, tuple(opened.values())

    def _open(self, secret: OpenSecret, wrapped_data_key: bytes, *, origin: str) -> bytes:
        if secret.context.provider_origin != origin or secret.context.cluster != self._cluster:
            raise Corrupt("ENVELOPE_CORRUPT", "a sealed secret does not open for this request")
        key = self._open_key(wrapped_data_key, secret.context)
        return _opened(key, secret.secret.sealed, secret.secret.kind, secret.context)

    def _open_key(self, wrapped_data_key: bytes, context: SecretContext) -> bytes:
        self._check_hsm()
        return self._keys.open_data_key(wrapped_data_key, data_key_context(context))

    def _new_data_key(self, context: SecretContext) -> bytes:
        self._check_hsm()
        return self._keys.create_data_key(data_key_context(context))[0]

    def _check_hsm(self) -> None:
        if not self.available:
            raise Unavailable("HSM_UNAVAILABLE", "the HSM process does not answer; try again")

    def _check_origin(self, origin: str) -> str:
        if origin not in self._origins:
            raise Unavailable("PROVIDER_UNAVAILABLE", "the provider's origin is not configured")
        return self._origins[origin]

    def _check_context(self, context: SecretContext) -> None:
        if context.cluster != self._cluster or not context.owner or not context.consent:
            raise Internal("egress does not seal for this context")
        self._check_origin(context.provider_origin)

    def _check_pair(self, access: SecretContext, refresh: SecretContext, *origins: str) -> None:
        self._check_context(access)
        self._check_context(refresh)
        providers = {
            self._origins.get(origin) for origin in (access.provider_origin, refresh.provider_origin, *origins)
        }
        if _whose(access) != _whose(refresh) or len(providers) != 1:
            raise Internal("egress does not seal a provider's tokens for another provider or consent")

    def _token_outcome(
        self, answer: Answer, wrapped: bytes, access_as: SecretContext, refresh_as: SecretContext
    ) -> TokenOutcome:
        if 400 <= answer.status < 500 and answer.status not in (408, 409, 425):
            return TokensRefused(status=answer.status, error=_error_code(answer.body))
        if not 200 <= answer.status < 300:
            return Unknown(code="TOKEN_ANSWER_STATUS")
        document = _json_object(answer.body)
        token_type = document.get("token_type")
        if not isinstance(token_type, str) or token_type.lower() != "bearer":
            return Unknown(code="TOKEN_ANSWER_MALFORMED")
        try:
            access, refresh = self._sealed_pair(document, wrapped, access_as, refresh_as)
        except ValueError:
            return Unknown(code="TOKEN_ANSWER_MALFORMED")
        lifetime, scope = document.get("expires_in"), document.get("scope")
        return TokenGrant(
            access_token=access,
            refresh_token=refresh,
            expires_in_seconds=lifetime if type(lifetime) is int and 0 < lifetime <= 315_360_000 else None,
            scope=scope if isinstance(scope, str) and scope else None,
        )

    def _sealed_pair(
        self, tokens: Mapping[str, object], wrapped: bytes, access_as: SecretContext, refresh_as: SecretContext
    ) -> tuple[bytes, bytes | None]:
        """Raises ValueError for what is no token."""
        access, refresh = tokens.get("access_token"), tokens.get("refresh_token")
        sealed = self._keys.seal(SecretKind.ACCESS_TOKEN, _token(access), access_as, wrapped_data_key=wrapped)
        if refresh is None:
            return sealed.secret.sealed, None
        again = self._keys.seal(SecretKind.REFRESH_TOKEN, _token(refresh), refresh_as, wrapped_data_key=wrapped)
        return sealed.secret.sealed, again.secret.sealed

    def _imported(self, sealed_tokens: bytes, info: bytes) -> Mapping[str, object]:
        plaintext = bytearray(max(len(sealed_tokens) - OVERHEAD_BYTES, 0))
        try:
            open_into(
                private_key=self._import_key, enc_and_ciphertext=sealed_tokens, info=info, aad=b"", buffer=plaintext
            )
        except HpkeRefused:
            raise _import_refused("does not open with this key and info") from None
        document = _json_object(bytes(plaintext))
        try:
            _token(document.get("access_token"))
            if document.get("refresh_token") is not None:
                _token(document["refresh_token"])
        except ValueError:
            raise _import_refused("does not hold a JSON object with access_token and refresh_token") from None
        if document.keys() - {"access_token", "refresh_token"}:
            raise _import_refused("does not hold a JSON object with access_token and refresh_token")
        return document

    def _binds(self, info: bytes, context: SecretContext) -> bool:
        provider = self._origins[context.provider_origin]
        parts = (b"custody/v1/import", context.owner.encode(), b"providers/" + provider.encode())
        start = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        rest = info.removeprefix(start)
        return info.startswith(start) and len(rest) >= 4 and len(rest) == 4 + int.from_bytes(rest[:4], "big")


def data_key_context(context: SecretContext) -> SecretContext:
    return replace(context, provider_origin="", row_version=1)


def _opened(key: bytes, sealed: bytes, kind: SecretKind, context: SecretContext) -> bytes:
    try:
        buffer = bytearray(parse(sealed).plaintext_bytes)
        open_sealed_into(key=key, sealed=sealed, kind=kind, context=context, buffer=buffer)
    except (SealedSecretRefused, ValueError):
        raise Corrupt("ENVELOPE_CORRUPT", "a sealed secret does not open for this request") from None
    return bytes(buffer)


def _passed_on(outcome: SendOutcome, opened: tuple[bytes, ...]) -> SendOutcome:
    if not isinstance(outcome, Answer):
        return outcome
    texts = outcome.body + "\n".join(value for _, value in outcome.headers).encode("latin-1")
    if b'"access_token"' in outcome.body or b'"refresh_token"' in outcome.body:
        return Unknown(code="ANSWER_HOLDS_TOKENS")
    forms = {form for secret in opened for form in (secret, quote_plus(secret, safe="*").encode("ascii"))}
    if any(len(form) >= 8 and form in texts for form in forms):
        return Unknown(code="ANSWER_ECHOES_SECRET")
    return outcome


def _encoded(slot: SecretSlot, opened: Mapping[SecretKind, bytes]) -> bytes:
    secret = opened[slot.kind]
    return quote_plus(secret, safe="*").encode("ascii") if slot.encoding is SlotEncoding.FORM else secret


def _token(value: object) -> bytes:
    if not isinstance(value, str) or not 1 <= len(value) <= 16_384 or not (value.isascii() and value.isprintable()):
        raise ValueError("not a token")
    return value.encode("ascii")


def _json_object(body: bytes) -> dict[str, object]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _error_code(body: bytes) -> str:
    error = _json_object(body).get("error")
    return error if isinstance(error, str) and error in _ERRORS else "other"


def _whose(context: SecretContext) -> tuple[str, str]:
    return context.owner, context.consent


def _import_refused(description: str) -> InvalidField:
    return InvalidField(FieldViolation(field="sealed_tokens", rule="sealed_tokens", description=description))
