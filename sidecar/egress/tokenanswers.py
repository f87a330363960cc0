"""Reads a token endpoint's answer (RFC 6749, 5.1 and 5.2) and seals its tokens before anything leaves egress.

Rules:
- 2xx that is not exactly a grant of a bearer token is unknown: the provider may have spent the code or the refresh token.
- 4xx is a refusal, except for statuses that tell nothing about what was done (408, 409, 425). All else is unknown.
- Of the answer only lifetime, scope and an error code of RFC 6749 are read as text; nothing else of it goes on.
"""

import re
from dataclasses import dataclass, field
from typing import Final

from sidecar.domain.provider import TokenGrant, TokenOutcome, TokensRefused, Unknown
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.egress import codes
from sidecar.egress.answers import BadAnswer
from sidecar.egress.datakeys import DATA_KEY_VERSION
from sidecar.egress.tokenjson import NotTokens, TokenDocument, scanned
from sidecar.sealing import seal
from sidecar.secretbuffer import SecretBuffer, scrub

__all__ = ["MAX_TOKEN_ANSWER_BYTES", "Sealer", "SecretSink", "token_outcome"]

MAX_TOKEN_ANSWER_BYTES: Final = 128 * 1024
_MAX_LIFETIME_SECONDS: Final = 10 * 365 * 24 * 3600
_ERRORS: Final = frozenset(
    {
        "invalid_client",
        "invalid_grant",
        "invalid_request",
        "invalid_scope",
        "unauthorized_client",
        "unsupported_grant_type",
    }
)
_TELLS_NOTHING: Final = frozenset({408, 409, 425})
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*\Z")
_MAX_SCOPE_CHARACTERS: Final = 4096
_READABLE_IN_GRANT: Final = frozenset({"token_type", "scope"})
_READABLE_IN_ERROR: Final = frozenset({"error"})


class SecretSink:
    """For a body that holds tokens: into locked memory, as far as it goes."""

    __slots__ = ("_into", "_used")

    def __init__(self, into: SecretBuffer) -> None:
        self._into = into.view
        self._used = 0

    @property
    def body(self) -> memoryview:
        return self._into[: self._used]

    def append(self, data: memoryview) -> None:
        end = self._used + len(data)
        if end > len(self._into):
            raise BadAnswer(codes.ANSWER_TOO_LARGE)
        self._into[self._used : end] = data
        self._used = end


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealer:
    """Seals tokens under one data key; the two kinds for the origins that they go to."""

    key: memoryview = field(repr=False)
    key_id: bytes
    access_context: SecretContext
    refresh_context: SecretContext

    def sealed_pair(self, access_token: memoryview, refresh_token: memoryview | None) -> tuple[bytes, bytes | None]:
        access = self.sealed(SecretKind.ACCESS_TOKEN, access_token, self.access_context)
        if refresh_token is None:
            return access, None
        return access, self.sealed(SecretKind.REFRESH_TOKEN, refresh_token, self.refresh_context)

    def sealed(self, kind: SecretKind, plaintext: memoryview, context: SecretContext) -> bytes:
        try:
            return seal(
                key=self.key,
                key_id=self.key_id,
                key_version=DATA_KEY_VERSION,
                kind=kind,
                context=context,
                plaintext=plaintext,
            )
        finally:
            scrub()


def token_outcome(status: int, body: memoryview, sealer: Sealer) -> TokenOutcome:
    """What a complete answer with `status` and `body` (which is changed) means."""
    if 200 <= status < 300:
        try:
            with scanned(body, readable=_READABLE_IN_GRANT) as document:
                return _grant(document, sealer)
        except NotTokens:
            return Unknown(code=codes.TOKEN_ANSWER_MALFORMED)
    if 400 <= status < 500 and status not in _TELLS_NOTHING:
        return TokensRefused(status=status, error=_error_code(body))
    return Unknown(code=codes.TOKEN_ANSWER_STATUS)


def _grant(document: TokenDocument, sealer: Sealer) -> TokenGrant:
    access_token, refresh_token = document.token("access_token"), document.token("refresh_token")
    token_type = document.value("token_type")
    if access_token is None or not isinstance(token_type, str) or token_type.lower() != "bearer":
        raise NotTokens
    scope = _scope(document)
    sealed_access, sealed_refresh = sealer.sealed_pair(access_token, refresh_token)
    return TokenGrant(
        access_token=sealed_access,
        refresh_token=sealed_refresh,
        expires_in_seconds=_lifetime_seconds(document.value("expires_in")),
        scope=scope,
    )


def _scope(document: TokenDocument) -> str | None:
    scope = document.value("scope")
    if scope is None or scope == "":
        return None
    if not isinstance(scope, str) or len(scope) > _MAX_SCOPE_CHARACTERS or not _SCOPE.match(scope):
        raise NotTokens
    for name in ("access_token", "refresh_token"):
        token = document.token(name)
        if token is not None and scope.encode("ascii").find(token) >= 0:
            raise NotTokens
    return scope


def _lifetime_seconds(value: object) -> int | None:
    """None for what is no whole number of seconds between 1 and ten years: then the token's end is not known."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_LIFETIME_SECONDS:
        return value
    return None


def _error_code(body: memoryview) -> str:
    try:
        with scanned(body, readable=_READABLE_IN_ERROR) as document:
            error = document.value("error")
    except NotTokens:
        return "other"
    return error if isinstance(error, str) and error in _ERRORS else "other"
