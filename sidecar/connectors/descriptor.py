"""What is particular to one provider: data, checked, with no loops and no expressions.

A descriptor is a YAML file in `catalog/` (or in the operator's own folder); `${name}` in its texts is replaced by the variables
that the configuration gives for the provider. Unknown fields are refused.
"""

import ipaddress
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from sidecar.domain.consent import Purpose
from sidecar.domain.payment import IdempotencyClass, PaymentProduct
from sidecar.domain.rotation import CLOCK_ERROR_SECONDS, RotationKind

__all__ = ["Descriptor", "DescriptorError", "origin_of", "parse_descriptor", "substitute"]

_HOST = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
# No userinfo, no query, no fragment, no capitals, no trailing dot, no `.` and `..` segments.
HttpsUri = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"^https://{_HOST}(:[1-9][0-9]{{0,4}})?(/(?!\.{{1,2}}(/|\Z))[A-Za-z0-9._~-]*)*\Z", max_length=512
    ),
]
# https, or an application on the person's own device (RFC 8252 section 7.3); no userinfo and no fragment (RFC 6749 3.1.2).
RedirectUri = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"^(https://{_HOST}|http://(127\.0\.0\.1|\[::1\]|localhost))(:[1-9][0-9]{{0,4}})?(/[!$-?A-Z_a-z~]*)?\Z",
        max_length=512,
    ),
]
Token = Annotated[str, msgspec.Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", max_length=64)]
Printable = Annotated[str, msgspec.Meta(pattern=r"^[!-~]([ -~]*[!-~])?\Z", max_length=256)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]


_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class DescriptorError(Exception):
    """The descriptor breaks a rule; the message says where and which."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Standard(_Part, frozen=True, kw_only=True):
    family: Literal["berlin-group"]
    version: Printable


class Scope(_Part, frozen=True, kw_only=True):
    """`accounts` may contain {consent_id}: the provider's own id of the consent."""

    accounts: Printable
    payments: Printable


class Rotation(_Part, frozen=True, kw_only=True):
    """What the provider does with a refresh token that was used (`domain/rotation.py`); `seconds` only with `grace`."""

    kind: RotationKind
    seconds: Seconds | None = None

    def __post_init__(self) -> None:
        if (self.kind is RotationKind.GRACE) != (self.seconds is not None):
            raise ValueError("rotation of kind grace needs seconds; other kinds must not have them")


class OAuth(_Part, frozen=True, kw_only=True):
    """RFC 8414 names. The issuer is pinned here: nothing is discovered at run time."""

    issuer: HttpsUri
    authorization_endpoint: HttpsUri
    pushed_authorization_request_endpoint: HttpsUri
    token_endpoint: HttpsUri
    client_id: Printable
    scope: Scope
    redirect_uris: Annotated[tuple[RedirectUri, ...], msgspec.Meta(min_length=1, max_length=16)]
    revocation_endpoint: HttpsUri | None = None
    assertion_audience: Literal["issuer", "token_endpoint"] = "issuer"
    assertion_seconds: Annotated[int, msgspec.Meta(ge=10, le=60)] = 60
    access_token_seconds: Annotated[int, msgspec.Meta(ge=30, le=7_776_000)] = 300  # where an answer does not say
    rotation: Rotation = Rotation(kind=RotationKind.STRICT)  # where nothing is said, nothing is ever sent again


_SIGNED_ALWAYS = ("digest", "x-request-id")  # sent with every signed request
_HOLDS_SECRETS = frozenset({"authorization", "signature"})


class Signing(_Part, frozen=True, kw_only=True):
    """draft-cavage-http-signatures-12 as Berlin Group profiles it; `none` where mutual TLS is all a bank asks for."""

    scheme: Literal["cavage", "none"]
    signed_headers: tuple[Token, ...] = _SIGNED_ALWAYS
    signed_if_sent: tuple[Token, ...] = ("psu-id", "psu-corporate-id", "tpp-redirect-uri")

    def __post_init__(self) -> None:
        if set(self.signed_headers) != set(_SIGNED_ALWAYS) or len(self.signed_headers) != len(_SIGNED_ALWAYS):
            raise ValueError("signed_headers must be digest and x-request-id; other headers belong into signed_if_sent")
        names = (*self.signed_headers, *self.signed_if_sent)
        if any(name != name.lower() for name in names) or len(set(names)) != len(names):
            raise ValueError("signed headers must be in lower case, each once")
        if set(self.signed_if_sent) & _HOLDS_SECRETS:
            raise ValueError("signed_if_sent must not name a header that holds a token or a signature")


_OTHER_HEADERS = frozenset(
    {
        "accept", "authorization", "connection", "consent-id", "content-length", "content-type", "digest", "host",
        "psu-ip-address", "psu-user-agent", "signature", "tpp-redirect-uri", "tpp-signature-certificate", "transfer-encoding",
        "x-request-id",
    }
)  # fmt: skip


class Idempotency(_Part, frozen=True, kw_only=True):
    """`header` and `window_seconds` only with class A. `margin_seconds` before the window's end no repeat is sent any more; it has
    to be longer than a repeat can be under way.

    `lookup_parameter` and `quiet_seconds` only with class B: the product's payments can be listed by the query parameter of that
    name, whose value is the instructionIdentification that the initiation carried; and so long after a request can last have
    reached the provider, the list has every payment that was made of it. `not_found` says whether the provider promises more:
    that what the list does not have by then is not made later either. Where that is not promised, a human is asked.
    """

    class_: IdempotencyClass = msgspec.field(name="class")
    header: Token | None = None
    window_seconds: Seconds | None = None
    margin_seconds: Annotated[float, msgspec.Meta(ge=60, le=31_536_000)] = 14_400.0
    lookup_parameter: Token | None = None
    quiet_seconds: Annotated[float, msgspec.Meta(ge=1, le=86_400)] | None = None
    not_found: Literal["never-executed", "needs-attention"] = "needs-attention"

    def __post_init__(self) -> None:
        has_key, has_lookup = _both(self.header, self.window_seconds), _both(self.lookup_parameter, self.quiet_seconds)
        if has_key is not (self.class_ is IdempotencyClass.KEY_WITH_WINDOW):
            raise ValueError("class A needs header and window_seconds; other classes must not have them")
        if has_lookup is not (self.class_ is IdempotencyClass.LOOK_UP):
            raise ValueError("class B needs lookup_parameter and quiet_seconds; other classes must not have them")
        if self.not_found == "never-executed" and not has_lookup:
            raise ValueError("not_found must be needs-attention where nothing can be looked up")
        if self.window_seconds is not None and self.window_seconds <= self.margin_seconds:
            raise ValueError("window_seconds must be longer than margin_seconds")
        if self.header is not None and self.header.lower() in _OTHER_HEADERS:
            raise ValueError("header must be one that no other part of the request uses")


def _both(one: object, other: object) -> bool | None:
    """Whether both are there; None where only one is."""
    return None if (one is None) is not (other is None) else one is not None


# Time-out, conflict, too early, too many: each may be said of a payment that is being made (docs/reliability.md, rule 6).
_NEVER_REFUSALS = frozenset({408, 409, 425, 429})


class Refusal(_Part, frozen=True, kw_only=True):
    """An answer that proves that nothing was executed: this status with one of these codes."""

    status: Annotated[int, msgspec.Meta(ge=400, le=499)]
    codes: Annotated[tuple[Token, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if self.status in _NEVER_REFUSALS:
            raise ValueError("408, 409, 425 and 429 prove nothing and cannot be refusals")


class Payments(_Part, frozen=True, kw_only=True):
    """`products` maps our products to the provider's path segment."""

    products: Mapping[PaymentProduct, Token]
    idempotency: Idempotency
    refusals: tuple[Refusal, ...]
    send_seconds: Annotated[float, msgspec.Meta(gt=0, le=10)] = 10.0
    first_poll_seconds: Seconds = 1.0
    longest_poll_seconds: Seconds = 60.0


class Accounts(_Part, frozen=True, kw_only=True):
    frequency_per_day: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 4
    history_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 90


class Descriptor(_Part, frozen=True, kw_only=True):
    schema: Literal[1]
    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    display_name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    region_code: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{2}$")]  # ISO 3166-1
    standard: Standard
    api: HttpsUri
    oauth: OAuth
    signing: Signing
    payments: Payments
    accounts: Accounts
    purposes: Annotated[tuple[Purpose, ...], msgspec.Meta(min_length=1)]
    tpp_ip_address: Printable  # sent where the person's own address is not known (Berlin Group 1.3.11, PSU-IP-Address)
    call_seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 10.0
    authorisation_origins: tuple[
        HttpsUri, ...
    ] = ()  # where the owner may be sent, besides the authorisation endpoint's

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.tpp_ip_address)
        grace_seconds, needed_seconds = self.oauth.rotation.seconds, self.call_seconds + CLOCK_ERROR_SECONDS
        if grace_seconds is not None and grace_seconds <= needed_seconds:
            raise ValueError(
                f"oauth.rotation.seconds must be more than {needed_seconds:g}: call_seconds and clock error"
            )
        for uri in (self.api, *self._oauth_endpoints(), *self.oauth.redirect_uris, *self.authorisation_origins):
            urlsplit(uri).port  # noqa: B018 - raises ValueError above 65535

    @property
    def origins(self) -> frozenset[str]:
        """Every origin that a request of ours may go to."""
        oauth = self.oauth
        endpoints = [self.api, oauth.pushed_authorization_request_endpoint, oauth.token_endpoint]
        if oauth.revocation_endpoint:
            endpoints.append(oauth.revocation_endpoint)
        return frozenset(origin_of(endpoint) for endpoint in endpoints)

    @property
    def owner_origins(self) -> frozenset[str]:
        """Every origin that the owner may be sent to."""
        return frozenset(map(origin_of, (self.oauth.authorization_endpoint, *self.authorisation_origins)))

    def _oauth_endpoints(self) -> Iterator[str]:
        oauth = self.oauth
        yield from (oauth.issuer, oauth.authorization_endpoint, oauth.pushed_authorization_request_endpoint)
        yield from (oauth.token_endpoint, oauth.revocation_endpoint or oauth.token_endpoint)


def parse_descriptor(document: object, variables: Mapping[str, str]) -> Descriptor:
    """The descriptor in `document` (parsed YAML), its `${name}` replaced from `variables`.

    Raises DescriptorError.
    """
    unused = sorted(set(variables) - set(_names(document)))
    if unused:
        raise DescriptorError(f"the descriptor has no such variables: {', '.join(unused)}")
    try:
        return msgspec.convert(substitute(document, variables), Descriptor)
    except msgspec.ValidationError as error:
        raise DescriptorError(str(error)) from error


def substitute(value: object, variables: Mapping[str, str]) -> object:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _variable(match[1], variables), value)
    if isinstance(value, Mapping):
        return {key: substitute(member, variables) for key, member in value.items()}
    if isinstance(value, list):
        return [substitute(item, variables) for item in value]
    return value


def _names(value: object) -> Iterator[str]:
    """The names of all variables in `value`."""
    if isinstance(value, str):
        yield from _VARIABLE.findall(value)
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for member in members:
        yield from _names(member)


@lru_cache(maxsize=256)  # asked for with the same few endpoints, several times a call
def origin_of(uri: str) -> str:
    """scheme://host:port with the port written (RFC 6454)."""
    parts = urlsplit(uri)
    default = {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or default}"


def _variable(name: str, variables: Mapping[str, str]) -> str:
    if name not in variables:
        raise DescriptorError(f"the descriptor needs the variable {name}, which the configuration does not give")
    return variables[name]
