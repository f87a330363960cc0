"""The way in for tokens that a platform already holds: as HPKE ciphertext (RFC 9180) for a key that lives as long as this
process, and nowhere else.

Rule: the ciphertext is bound by HPKE's `info` to an owner and a provider (ImportConsentRequest.sealed_tokens says how), and
egress checks that binding itself, so that nobody between the client and here can have a token sealed for somebody else.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sidecar.egress.tokenjson import NotTokens, scanned
from sidecar.errors import FieldViolation, InvalidField, PreconditionFailed
from sidecar.hpke import OVERHEAD_BYTES, HpkeRefused, open_into
from sidecar.secretbuffer import SecretBuffer, scrub

__all__ = ["ImportKeyPair"]

_LABEL: Final = b"custody/v1/import"
_MAX_DOCUMENT_BYTES: Final = 64 * 1024
_MEMBERS: Final = frozenset({"access_token", "refresh_token"})


class ImportKeyPair:
    """X25519. `key_id` is the first 16 hex digits of SHA-256 over the public key."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public_key = self._private.public_key().public_bytes_raw()
        self.key_id = hashlib.sha256(self.public_key).hexdigest()[:16]

    @contextmanager
    def opened(
        self, *, key_id: str, sealed_tokens: bytes, info: bytes, owner: str, provider: str
    ) -> Iterator[tuple[memoryview, memoryview | None]]:
        """Access token and, where there is one, refresh token; inside the block only.

        Raises PreconditionFailed(IMPORT_KEY_UNKNOWN) for another run's key, InvalidField for what does not open or does not
        hold exactly the tokens.
        """
        if key_id != self.key_id:
            raise PreconditionFailed("IMPORT_KEY_UNKNOWN", "the import key is no longer in use; fetch the current one")
        if not _binds_to(info, owner=owner, provider=provider):
            _refuse("is not bound to this owner and provider")
        size_bytes = len(sealed_tokens) - OVERHEAD_BYTES
        if not 0 < size_bytes <= _MAX_DOCUMENT_BYTES:
            _refuse("has an impossible length")
        try:
            with SecretBuffer(size_bytes) as buffer:
                yield self._tokens(sealed_tokens, info, buffer.view)
        finally:
            scrub()

    def _tokens(self, sealed_tokens: bytes, info: bytes, buffer: memoryview) -> tuple[memoryview, memoryview | None]:
        try:
            open_into(private_key=self._private, enc_and_ciphertext=sealed_tokens, info=info, aad=b"", buffer=buffer)
            with scanned(buffer, readable=frozenset()) as document:
                access_token, refresh_token = document.token("access_token"), document.token("refresh_token")
                unknown = document.names - _MEMBERS
        except HpkeRefused:
            _refuse("does not open with this key and info")
        except NotTokens:
            _refuse("does not hold a JSON object with access_token and refresh_token")
        if access_token is None or unknown:
            _refuse("does not hold a JSON object with access_token and refresh_token")
        return access_token, refresh_token


def _binds_to(info: bytes, *, owner: str, provider: str) -> bool:
    parts = []
    rest = info
    while len(rest) >= 4:
        end = 4 + int.from_bytes(rest[:4], "big")
        if end > len(rest):
            return False
        parts.append(rest[4:end])
        rest = rest[end:]
    # The fourth is the request id, which means nothing here.
    return not rest and len(parts) == 4 and parts[:3] == [_LABEL, owner.encode(), b"providers/" + provider.encode()]


def _refuse(description: str) -> NoReturn:
    raise InvalidField(FieldViolation(field="sealed_tokens", rule="sealed_tokens", description=description))
