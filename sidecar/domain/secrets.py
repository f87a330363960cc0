"""What a sealed secret is bound to. A secret opens only where every one of these values is the same as when it was sealed."""

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["SealedSecret", "SecretContext", "SecretKind"]


class SecretKind(IntEnum):
    """Codes are part of the sealed format: never renumber, never reuse."""

    MASTER_KEY = 1
    DATA_KEY = 2
    ACCESS_TOKEN = 3
    REFRESH_TOKEN = 4
    PKCE_VERIFIER = 5
    CLIENT_SECRET = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretContext:
    """The associated data of a sealed secret, next to what its header says.

    `provider_origin` is the one origin (scheme://host:port, lower case, port always written) the secret may be sent to.
    For a master key owner, consent and provider_origin are empty; for a data key provider_origin is empty too.
    `row_version` counts the replacements of this secret, from 1.
    """

    cluster: str
    owner: str = ""
    consent: str = ""
    provider_origin: str = ""
    row_version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSecret:
    """A sealed secret as it is stored: opaque bytes (docs/sealed-token.md) and the version it was sealed under."""

    kind: SecretKind
    row_version: int
    sealed: bytes
