"""OAuth 2 requests that every standard shares: PAR (RFC 9126), code exchange and refresh (RFC 6749), revocation (RFC 7009).

The client proves itself by private_key_jwt (RFC 7523); secrets are slots that egress fills.
"""

from datetime import datetime
from urllib.parse import urlencode, urlsplit

from sidecar.connectors.base import Problem, ProblemKind, Reading, SignaturePlace, UnsignedRequest
from sidecar.connectors.descriptor import Descriptor, origin_of
from sidecar.connectors.signing import Base64UrlRaw, assertion_input
from sidecar.connectors.strict_json import read_object, text_at
from sidecar.domain.consent import Consent
from sidecar.domain.provider import Answer, Header, KeyPurpose, ProviderRequest, SecretSlot, SlotEncoding
from sidecar.domain.secrets import SecretKind

__all__ = ["OAuthClient"]

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


class OAuthClient:
    """`key_id` is the `kid` under which the provider knows our client-authentication key."""

    def __init__(self, *, descriptor: Descriptor, key_id: str) -> None:
        self._descriptor = descriptor
        self._oauth = descriptor.oauth
        self._key_id = key_id

    def push_authorisation(
        self, consent: Consent, *, scope: str, state: str, code_challenge: str, now: datetime, assertion_id: str
    ) -> UnsignedRequest:
        form = {
            "response_type": "code",
            "client_id": self._oauth.client_id,
            "redirect_uri": consent.redirect_uri,
            "scope": scope,
            "state": state,
            "code_challenge": code_challenge,
            "code_challenge_method": "S256",
        }
        endpoint = self._oauth.pushed_authorization_request_endpoint
        return self._form_request(endpoint, (urlencode(form).encode("ascii"),), now=now, assertion_id=assertion_id)

    def read_pushed_authorisation(self, answer: Answer) -> Reading[str] | Problem:
        if answer.status != 201:
            return oauth_problem(answer)
        document = read_object(answer.body)
        request_uri = text_at(document or {}, "request_uri", max_length=512)
        if not request_uri:
            return Problem(kind=ProblemKind.INVALID_ANSWER)
        query = urlencode({"client_id": self._oauth.client_id, "request_uri": request_uri})
        return Reading(value=f"{self._oauth.authorization_endpoint}?{query}")

    def exchange_code(self, consent: Consent, *, code: str, now: datetime, assertion_id: str) -> UnsignedRequest:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": consent.redirect_uri,
            "client_id": self._oauth.client_id,
        }
        body = (
            urlencode(form).encode("ascii") + b"&code_verifier=",
            SecretSlot(kind=SecretKind.PKCE_VERIFIER, encoding=SlotEncoding.FORM),
        )
        return self._form_request(self._oauth.token_endpoint, body, now=now, assertion_id=assertion_id)

    def refresh(self, *, now: datetime, assertion_id: str) -> UnsignedRequest:
        form = {"grant_type": "refresh_token", "client_id": self._oauth.client_id}
        body = (
            urlencode(form).encode("ascii") + b"&refresh_token=",
            SecretSlot(kind=SecretKind.REFRESH_TOKEN, encoding=SlotEncoding.FORM),
        )
        return self._form_request(self._oauth.token_endpoint, body, now=now, assertion_id=assertion_id)

    def revoke_token(self, *, now: datetime, assertion_id: str) -> UnsignedRequest | None:
        """None where the provider has no revocation endpoint."""
        if self._oauth.revocation_endpoint is None:
            return None
        form = {"token_type_hint": "refresh_token", "client_id": self._oauth.client_id}
        body = (
            urlencode(form).encode("ascii") + b"&token=",
            SecretSlot(kind=SecretKind.REFRESH_TOKEN, encoding=SlotEncoding.FORM),
        )
        return self._form_request(self._oauth.revocation_endpoint, body, now=now, assertion_id=assertion_id)

    def _form_request(
        self, endpoint: str, body: tuple[bytes | SecretSlot, ...], *, now: datetime, assertion_id: str
    ) -> UnsignedRequest:
        audience = self._oauth.issuer if self._oauth.assertion_audience == "issuer" else self._oauth.token_endpoint
        signing_input = assertion_input(
            client_id=self._oauth.client_id,
            audience=audience,
            assertion_id=assertion_id,
            issued_at=int(now.timestamp()),
            lifetime_seconds=self._oauth.assertion_seconds,
            key_id=self._key_id,
        )
        assertion = urlencode({"client_assertion_type": _ASSERTION_TYPE}) + "&client_assertion="
        return UnsignedRequest(
            request=ProviderRequest(
                method="POST",
                origin=origin_of(endpoint),
                target=urlsplit(endpoint).path or "/",
                headers=(
                    Header(name="Content-Type", value="application/x-www-form-urlencoded"),
                    Header(name="Accept", value="application/json"),
                ),
                body=(*body, b"&" + assertion.encode("ascii")),
            ),
            key=KeyPurpose.CLIENT_AUTHENTICATION,
            signing_input=signing_input.encode("ascii"),
            place=SignaturePlace.BODY,
            prefix=signing_input + ".",
            suffix="",
            encoding=Base64UrlRaw(),
        )


def oauth_problem(answer: Answer) -> Problem:
    """What an OAuth endpoint's error answer means (RFC 6749 section 5.2)."""
    if answer.status >= 500 or answer.status == 429:
        return Problem(kind=ProblemKind.UNAVAILABLE)
    document = read_object(answer.body)
    code = text_at(document or {}, "error", max_length=64)
    return Problem(kind=ProblemKind.REFUSED if code else ProblemKind.INVALID_ANSWER, code=_known(code))


_CODES = frozenset(
    {
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
    }
)


def _known(code: str) -> str:
    return code if code in _CODES else ""
