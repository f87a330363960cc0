"""Seals tokens for ImportConsent (HPKE, RFC 9180), so that they leave this process as ciphertext only.

The written form is in the contract, at ImportConsentRequest.sealed_tokens; tests hold it to vectors.
"""

import json

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

__all__ = ["SUITE_NAME", "import_info", "import_plaintext", "seal", "suite"]

SUITE_NAME = "DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM"
_LABEL = "custody/v1/import"


def seal(*, public_key: bytes, info: bytes, plaintext: bytes) -> bytes:
    """Seal to a raw X25519 key: the encapsulated key (32 bytes), then ciphertext and tag."""
    return suite().encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info)


def import_info(*, owner: str, provider: str, request_id: str) -> bytes:
    """Bind to the request: each string as its length (4 bytes, big-endian) and its UTF-8 bytes."""
    parts = (text.encode() for text in (_LABEL, owner, provider, request_id))
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def import_plaintext(*, access_token: str, refresh_token: str | None) -> bytes:
    """Write the tokens as the JSON object of the contract."""
    tokens = {"access_token": access_token, "refresh_token": refresh_token}
    return json.dumps({name: token for name, token in tokens.items() if token is not None}).encode()


def suite() -> hpke.Suite:
    """The one suite there is."""
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
