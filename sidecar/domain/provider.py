"""Requests to providers with slots where secrets go, and what came back.

Pure values: rendering is in `connectors`, sending in `egress`.
"""

from dataclasses import dataclass
from enum import StrEnum

from sidecar.domain.secrets import SecretKind

__all__ = [
    "Answer",
    "Header",
    "KeyPurpose",
    "NotSent",
    "ProviderRequest",
    "SecretSlot",
    "SendOutcome",
    "SlotEncoding",
    "TokenGrant",
    "TokenOutcome",
    "TokensRefused",
    "Unknown",
]


class KeyPurpose(StrEnum):
    """The keys in the HSM, by what they may be used for."""

    ROOT = "root"
    AUDIT = "audit"
    REQUEST_SIGNING = "request-signing"
    CLIENT_AUTHENTICATION = "client-authentication"
    DOCUMENT_SIGNING = "document-signing"


class SlotEncoding(StrEnum):
    RAW = "raw"  # as it is: a header value
    FORM = "form"  # application/x-www-form-urlencoded (RFC 6749 appendix B)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSlot:
    """Where egress writes a secret into the request. Only egress ever fills one."""

    kind: SecretKind
    encoding: SlotEncoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """`value` followed by the secret of `slot`, where there is one."""

    name: str
    value: str
    slot: SecretSlot | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderRequest:
    """`origin` is scheme://host:port in lower case with the port written; `target` is path and query, already encoded.
    `body` is a sequence of literal bytes and slots; Host and Content-Length are written by egress."""

    method: str
    origin: str
    target: str
    headers: tuple[Header, ...]
    body: tuple[bytes | SecretSlot, ...] = ()

    @property
    def slots(self) -> tuple[SecretSlot, ...]:
        in_headers = [header.slot for header in self.headers if header.slot]
        return tuple(in_headers + [part for part in self.body if isinstance(part, SecretSlot)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete, well-formed answer. Header names are lower case; repeated headers are kept."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header that stands exactly once, else None."""
        values = [value for key, value in self.headers if key == name]
        return values[0] if len(values) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NotSent:
    """Not one byte of the request left this machine. `code` is one of egress's own constants, such as CONNECT_FAILED."""

    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """Bytes may have left and no complete, well-formed answer came. Whether the provider acted is not known."""

    code: str


SendOutcome = Answer | NotSent | Unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGrant:
    """Tokens of a token endpoint, sealed. `refresh_token` is None where the provider sent none (keep the old one)."""

    access_token: bytes
    refresh_token: bytes | None
    expires_in_seconds: int | None
    scope: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensRefused:
    """The token endpoint said no, with an error code of RFC 6749 section 5.2 (others are given as `other`)."""

    status: int
    error: str


TokenOutcome = TokenGrant | TokensRefused | NotSent | Unknown
