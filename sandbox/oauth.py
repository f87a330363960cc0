"""The authorization server's rules: pushed requests, codes, and tokens bound to a certificate. No HTTP here.

RFC 6749, 7636 (S256 only), 9126 (required), 8705 (certificate-bound), 7009, 7662, 9700.

Rules this module keeps:
- A pushed request, a code and a refresh token are each good once. A second use of a code or of a refresh token is taken
  for theft: everything issued under the grant dies (RFC 6749 section 4.1.2, RFC 9700 section 4.14.2).
- A token, and the right to refresh it, belongs to one TLS client certificate.
- Secrets are kept as SHA-256 hashes.
"""

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from sandbox.consents import Consent, Consents
from sandbox.directory import Client
from sandbox.web import Clock

REQUEST_URI_PREFIX = "urn:ietf:params:oauth:request_uri:"
REQUEST_URI_SECONDS = 60
CODE_SECONDS = 60
REFRESH_SECONDS = 90 * 86400
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")
_KEEP_EXPIRED_SECONDS = 3600  # so that the answer can be TOKEN_EXPIRED, not TOKEN_UNKNOWN


class OAuthError(Exception):
    """An error answer of RFC 6749 section 5.2."""

    def __init__(self, error: str, description: str, *, status: int = 400) -> None:
        super().__init__(f"{error}: {description}")
        self.error = error
        self.description = description
        self.status = status


class TokenRefused(Exception):
    """An access token that opens nothing; `code` is Berlin Group's name for why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedRequest:
    """A checked authorization request."""

    client: Client
    redirect_uri: str
    scope: str
    payments: bool
    consent: Consent | None
    state: str | None
    code_challenge: str
    expires_at: float


@dataclass(slots=True, kw_only=True)
class Grant:
    """What a person gave to a client: the family of all codes and tokens that come from one approval."""

    client_id: str
    person_id: str
    scope: str
    payments: bool
    consent: Consent | None
    ibans: tuple[str, ...]
    redirect_uri: str
    code_challenge: str
    code_expires_at: float
    code_used: bool = False
    thumbprint: str | None = None  # set when the code is exchanged
    revoked: bool = False
    refresh_hash: bytes | None = None  # the current one
    refresh_expires_at: float = 0.0


@dataclass(slots=True, kw_only=True)
class _AccessToken:
    grant: Grant
    expires_at: float
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedTokens:
    """A token answer. Its repr shows no token."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    expires_in_seconds: int
    scope: str


@dataclass(slots=True, kw_only=True)
class OAuthMemory:
    """What the authorization server remembers; codes and tokens only as hashes."""

    pushed: dict[str, PushedRequest] = field(default_factory=dict)
    codes: dict[bytes, Grant] = field(default_factory=dict)
    access: dict[bytes, _AccessToken] = field(default_factory=dict)  # in order of issue, so in order of expiry
    refresh: dict[bytes, Grant] = field(default_factory=dict)  # current and used ones
    grants: list[Grant] = field(default_factory=list)


class AuthorizationServer:
    """All pushed requests, codes, grants and tokens of the bank."""

    def __init__(
        self,
        *,
        clock: Clock,
        consents: Consents,
        access_token_seconds: int,
        memory: OAuthMemory,
        token_prefix: str = "",
    ) -> None:
        self._clock = clock
        self._consents = consents
        self._access_token_seconds = access_token_seconds
        self._token_prefix = token_prefix
        self._pushed = memory.pushed
        self._codes = memory.codes
        self._access = memory.access
        self._refresh = memory.refresh
        self._grants = memory.grants

    def push(self, client: Client, parameters: Mapping[str, str]) -> str:
        """Check and keep an authorization request (RFC 9126); return its request_uri."""
        if "request_uri" in parameters or "request" in parameters:
            raise OAuthError("invalid_request", "request and request_uri are not accepted here")
        if parameters.get("response_type") != "code":
            raise OAuthError("unsupported_response_type", "response_type must be code")
        if parameters.get("redirect_uri") not in client.redirect_uris:
            raise OAuthError("invalid_request", "redirect_uri is not registered exactly so")
        challenge = parameters.get("code_challenge", "")
        if parameters.get("code_challenge_method") != "S256" or not _CHALLENGE.fullmatch(challenge):
            raise OAuthError("invalid_request", "PKCE with S256 is required (RFC 7636)")
        scope = parameters.get("scope", "")
        payments, consent = self._read_scope(client, scope)
        request_uri = REQUEST_URI_PREFIX + secrets.token_urlsafe(32)
        self._pushed[request_uri] = PushedRequest(
            client=client,
            redirect_uri=parameters["redirect_uri"],
            scope=scope,
            payments=payments,
            consent=consent,
            state=parameters.get("state"),
            code_challenge=challenge,
            expires_at=self._clock() + REQUEST_URI_SECONDS,
        )
        return request_uri

    def begin(self, client_id: str, request_uri: str) -> PushedRequest:
        """Take a pushed request out for its one use."""
        request = self._pushed.pop(request_uri, None)
        if request is None or request.client.client_id != client_id:
            raise OAuthError(
                "invalid_request", "this request_uri is not known, was used before, or is another client's"
            )
        if request.expires_at < self._clock():
            raise OAuthError("invalid_request", "this request_uri has expired")
        return request

    def approve(self, request: PushedRequest, person_id: str, ibans: tuple[str, ...]) -> str:
        """Record the person's yes, and return the code for the redirect."""
        if request.consent is not None:
            self._consents.approve(request.consent, person_id, ibans)
        code = secrets.token_urlsafe(32)
        self._codes[_hash(code)] = Grant(
            client_id=request.client.client_id,
            person_id=person_id,
            scope=request.scope,
            payments=request.payments,
            consent=request.consent,
            ibans=ibans,
            redirect_uri=request.redirect_uri,
            code_challenge=request.code_challenge,
            code_expires_at=self._clock() + CODE_SECONDS,
        )
        return code

    def deny(self, request: PushedRequest) -> None:
        """Record the person's no."""
        if request.consent is not None:
            self._consents.reject(request.consent)

    def exchange(self, client: Client, parameters: Mapping[str, str], thumbprint: str) -> IssuedTokens:
        """Turn a code into tokens (RFC 6749 section 4.1.3)."""
        grant = self._codes.get(_hash(parameters.get("code", "")))
        if grant is None or grant.client_id != client.client_id:
            raise OAuthError("invalid_grant", "this code is not known")
        if grant.code_used:
            self._revoke(grant)
            raise OAuthError("invalid_grant", "this code was used before; what it gave is revoked")
        grant.code_used = True  # also when the rest does not fit: a code is tried once
        if grant.code_expires_at < self._clock():
            raise OAuthError("invalid_grant", "this code has expired")
        if parameters.get("redirect_uri") != grant.redirect_uri:
            raise OAuthError("invalid_grant", "redirect_uri is not that of the authorization request")
        if not _verifier_fits(parameters.get("code_verifier", ""), grant.code_challenge):
            raise OAuthError("invalid_grant", "code_verifier does not fit")
        self._must_be_live(grant)
        grant.thumbprint = thumbprint
        self._grants.append(grant)
        return self._issue(grant)

    def refresh(self, client: Client, parameters: Mapping[str, str], thumbprint: str) -> IssuedTokens:
        """Turn a refresh token into a new pair; the old one is used up."""
        token_hash = _hash(parameters.get("refresh_token", ""))
        grant = self._refresh.get(token_hash)
        if grant is None or grant.client_id != client.client_id:
            raise OAuthError("invalid_grant", "this refresh token is not known")
        if grant.thumbprint != thumbprint:
            raise OAuthError("invalid_grant", "this refresh token belongs to another client certificate")
        if grant.refresh_hash != token_hash:
            self._revoke(grant)
            raise OAuthError("invalid_grant", "this refresh token was used before; the whole family is revoked")
        if grant.refresh_expires_at < self._clock():
            raise OAuthError("invalid_grant", "this refresh token has expired")
        if not set(parameters.get("scope", grant.scope).split(" ")) <= set(grant.scope.split(" ")):
            raise OAuthError("invalid_scope", "more scope than was granted")
        self._must_be_live(grant)
        return self._issue(grant)

    def revoke_token(self, client: Client, token: str) -> None:
        """Revoke a token (RFC 7009); a refresh token takes its whole family along. Unknown tokens are no error."""
        token_hash = _hash(token)
        grant = self._refresh.get(token_hash)
        if grant is not None and grant.client_id == client.client_id:
            self._revoke(grant)
        access = self._access.get(token_hash)
        if access is not None and access.grant.client_id == client.client_id:
            access.revoked = True

    def revoke_consent(self, consent: Consent) -> None:
        """Revoke all tokens under a consent."""
        for grant in self._grants:
            if grant.consent is consent:
                self._revoke(grant)

    def introspect(self, client: Client, token: str) -> dict[str, object]:
        """Tell a client about its own token (RFC 7662, RFC 8705 section 3.2)."""
        access = self._access.get(_hash(token))
        if access is None or access.grant.client_id != client.client_id or self._why_dead(access) is not None:
            return {"active": False}
        return {
            "active": True,
            "client_id": client.client_id,
            "scope": access.grant.scope,
            "token_type": "Bearer",
            "exp": int(access.expires_at),
            "cnf": {"x5t#S256": access.grant.thumbprint},
        }

    def open(self, token: str, thumbprint: str | None) -> Grant:
        """Return what an access token stands for; TokenRefused if it does not, or not for this certificate."""
        access = self._access.get(_hash(token))
        if access is None:
            raise TokenRefused("TOKEN_UNKNOWN")
        if access.grant.thumbprint != thumbprint:
            raise TokenRefused("TOKEN_INVALID")
        why = self._why_dead(access)
        if why is not None:
            raise TokenRefused(why)
        return access.grant

    def _why_dead(self, access: _AccessToken) -> str | None:
        if access.revoked or access.grant.revoked:
            return "TOKEN_INVALID"
        return "TOKEN_EXPIRED" if access.expires_at <= self._clock() else None

    def _read_scope(self, client: Client, scope: str) -> tuple[bool, Consent | None]:
        """Read `AIS:<consentId>` and `PIS`, each at most once and at least one of them."""
        values = scope.split(" ")
        ais = [value.removeprefix("AIS:") for value in values if value.startswith("AIS:")]
        payments = values.count("PIS")
        if len(ais) > 1 or payments > 1 or len(ais) + payments != len(values):
            raise OAuthError("invalid_scope", "scope must be AIS:<consentId>, PIS, or both")
        if not ais:
            return True, None
        consent = self._consents.get(ais[0], client.client_id)
        if consent is None or consent.status(self._clock()) != "received":
            raise OAuthError("invalid_scope", "the consent in scope is not known or was decided before")
        return bool(payments), consent

    def _must_be_live(self, grant: Grant) -> None:
        if grant.revoked:
            raise OAuthError("invalid_grant", "the grant is revoked")
        if grant.consent is not None and grant.consent.status(self._clock()) != "valid":
            raise OAuthError("invalid_grant", "the consent is no longer valid")

    def _issue(self, grant: Grant) -> IssuedTokens:
        now = self._clock()
        self._forget_expired(now)
        access_token = self._token_prefix + secrets.token_urlsafe(32)
        self._access[_hash(access_token)] = _AccessToken(grant=grant, expires_at=now + self._access_token_seconds)
        return IssuedTokens(
            access_token=access_token,
            refresh_token=self._rotate(grant, now),
            expires_in_seconds=self._access_token_seconds,
            scope=grant.scope,
        )

    def _rotate(self, grant: Grant, now: float) -> str | None:
        if grant.consent is not None and not grant.consent.recurring:
            return None  # a one-off consent lives no longer than its first access token
        refresh_token = self._token_prefix + secrets.token_urlsafe(32)
        grant.refresh_hash = _hash(refresh_token)
        grant.refresh_expires_at = now + REFRESH_SECONDS
        self._refresh[grant.refresh_hash] = grant
        return refresh_token

    def _forget_expired(self, now: float) -> None:
        while self._access:
            oldest = next(iter(self._access))
            if self._access[oldest].expires_at > now - _KEEP_EXPIRED_SECONDS:
                return
            del self._access[oldest]

    def _revoke(self, grant: Grant) -> None:
        grant.revoked = True


def _verifier_fits(verifier: str, challenge: str) -> bool:
    if not _VERIFIER.fullmatch(verifier):
        return False
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")
    return secrets.compare_digest(digest, challenge.encode())


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
