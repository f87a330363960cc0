"""Client authentication by `private_key_jwt` (RFC 7523, FAPI 2.0 Security Profile section 5.3.2).

Rules this module keeps:
- Only ES256; iss = sub = the client; aud is exactly the issuer; `jti` is good once; `exp` is at most 60 s ahead.
- An assertion that is not in canonical base64url is refused: libraries forgive it, so it would have two spellings.
"""

import base64
import binascii
from collections.abc import Mapping

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from sandbox.directory import Client
from sandbox.web import Clock, parse_json_object

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
MAX_LIFE_SECONDS = 60
_ROUNDING_SECONDS = 1  # `exp` is in whole seconds
_SKEW_SECONDS = 5  # for `iat` and `nbf` only; an expired assertion is expired


class AssertionRefused(Exception):
    """The client has not proved who it is; the text says why."""


class ClientAuthenticator:
    """Judges client assertions and remembers their `jti`."""

    def __init__(self, *, clients: Mapping[str, Client], issuer: str, clock: Clock) -> None:
        self._clients = clients
        self._issuer = issuer
        self._clock = clock
        self._keys = {client.client_id: KeySet.import_key_set(dict(client.jwks)) for client in clients.values()}  # type: ignore[arg-type]
        self._seen: dict[tuple[str, str], float] = {}  # (client, jti) to exp

    def authenticate(self, parameters: Mapping[str, str]) -> Client:
        """Return the client that signed the assertion in these form parameters."""
        if parameters.get("client_assertion_type") != ASSERTION_TYPE:
            raise AssertionRefused("client_assertion_type must be the JWT bearer type")
        assertion = parameters.get("client_assertion", "")
        client = self._client_named(assertion, parameters.get("client_id"))
        claims = self._verified_claims(assertion, client)
        self._check_claims(claims, client)
        self._use_once(claims, client)
        return client

    def _client_named(self, assertion: str, client_id: str | None) -> Client:
        """Find whose keys to use; the name is believed only after the signature fits."""
        try:
            segments = [_canonical(segment) for segment in assertion.split(".")]
            claimed = parse_json_object(segments[1])
        except (ValueError, IndexError) as error:
            raise AssertionRefused("client_assertion is not a JWT in canonical form") from error
        issuer = claimed.get("iss")
        client = self._clients.get(issuer) if isinstance(issuer, str) else None
        if client is None or len(segments) != 3:
            raise AssertionRefused("the client is not known")
        if client_id is not None and client_id != client.client_id:
            raise AssertionRefused("client_id and the assertion name different clients")
        return client

    def _verified_claims(self, assertion: str, client: Client) -> dict[str, object]:
        try:
            return dict(jwt.decode(assertion, self._keys[client.client_id], algorithms=["ES256"]).claims)
        except (JoseError, ValueError) as error:
            raise AssertionRefused("the assertion's signature or form is not valid") from error

    def _check_claims(self, claims: Mapping[str, object], client: Client) -> None:
        now = self._clock()
        if claims.get("sub") != client.client_id:
            raise AssertionRefused("iss and sub must both be the client")
        if claims.get("aud") not in (self._issuer, [self._issuer]):
            raise AssertionRefused("aud must be the issuer")
        exp = _number(claims.get("exp"), "exp")
        if exp <= now:
            raise AssertionRefused("the assertion has expired")
        if exp > now + MAX_LIFE_SECONDS + _ROUNDING_SECONDS:
            raise AssertionRefused("exp is more than 60 s ahead")
        for name in ("iat", "nbf"):
            if name in claims and _number(claims[name], name) > now + _SKEW_SECONDS:
                raise AssertionRefused(f"{name} is in the future")

    def _use_once(self, claims: Mapping[str, object], client: Client) -> None:
        now = self._clock()
        jti = claims.get("jti")
        if not isinstance(jti, str) or not 1 <= len(jti) <= 256:
            raise AssertionRefused("jti is missing")
        if self._seen.get((client.client_id, jti), 0.0) > now:
            raise AssertionRefused("this assertion was used before")
        if len(self._seen) > 10_000:
            self._seen = {key: exp for key, exp in self._seen.items() if exp > now}
        self._seen[client.client_id, jti] = _number(claims.get("exp"), "exp")


def _canonical(segment: str) -> bytes:
    try:
        content = base64.b64decode(segment.encode("ascii") + b"=" * (-len(segment) % 4), b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64url") from error
    if base64.urlsafe_b64encode(content).rstrip(b"=").decode() != segment:
        raise ValueError("not canonical base64url")
    return content


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AssertionRefused(f"{name} must be a number")
    return value
