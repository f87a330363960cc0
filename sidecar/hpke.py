"""HPKE (RFC 9180) base mode, opening side only: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

`cryptography` has HPKE, and clients seal with it, but its `decrypt` returns `bytes`, which cannot be wiped. Here the
plaintext goes straight into the caller's buffer; shared secrets and keys are overwritten. Rules:

- One message per encapsulated key (sequence number 0): the single-shot form of RFC 9180, section 6.1.
- The wire form is `enc` (32 bytes) followed by ciphertext and tag, as `cryptography`'s `Suite.encrypt` writes it.
- One error for whatever does not open. On any failure the caller's buffer is wiped.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar import hkdf
from sidecar.secretbuffer import Buffer, WritableBuffer, wipe, wipe_bytes

__all__ = ["ENC_BYTES", "OVERHEAD_BYTES", "HpkeRefused", "open_into"]

ENC_BYTES = 32
_TAG_BYTES = 16
OVERHEAD_BYTES = ENC_BYTES + _TAG_BYTES
_KEY_BYTES = 32
_NONCE_BYTES = 12
_SECRET_BYTES = 32

_KEM_SUITE = b"KEM" + (0x0020).to_bytes(2, "big")  # DHKEM(X25519, HKDF-SHA256)
_HPKE_SUITE = b"HPKE" + b"".join(code.to_bytes(2, "big") for code in (0x0020, 0x0001, 0x0002))
_VERSION_LABEL = b"HPKE-v1"
_MODE_BASE = b"\x00"


class HpkeRefused(Exception):
    """The message does not open under this key, info and associated data. It never says which."""

    def __init__(self) -> None:
        super().__init__("the encrypted message cannot be opened")


def open_into(
    *, private_key: X25519PrivateKey, enc_and_ciphertext: Buffer, info: bytes, aad: bytes, buffer: WritableBuffer
) -> int:
    """Write the plaintext to the start of `buffer` and return its length in bytes (message length - OVERHEAD_BYTES).

    Raises HpkeRefused if the message does not open, ValueError if the buffer is too small. In each case `buffer` is
    wiped whole.
    """
    try:
        return _open(private_key, memoryview(enc_and_ciphertext), info, aad, memoryview(buffer))
    except BaseException:
        wipe(buffer)
        raise


def _open(private_key: X25519PrivateKey, message: memoryview, info: bytes, aad: bytes, buffer: memoryview) -> int:
    length = len(message) - OVERHEAD_BYTES
    if length < 0:
        raise HpkeRefused
    if len(buffer) < length:
        raise ValueError("the buffer is smaller than the secret")
    secret, key, nonce = bytearray(_SECRET_BYTES), bytearray(_KEY_BYTES), bytearray(_NONCE_BYTES)
    try:
        _decapsulate(private_key, bytes(message[:ENC_BYTES]), into=secret)
        _key_schedule(secret, info, key=key, nonce=nonce)
        AESGCM(key).decrypt_into(nonce, message[ENC_BYTES:], aad, buffer[:length])
    except InvalidTag:
        raise HpkeRefused from None
    finally:
        for derived in (secret, key, nonce):
            wipe(derived)
    return length


def _decapsulate(private_key: X25519PrivateKey, enc: bytes, *, into: bytearray) -> None:
    """Decap and ExtractAndExpand of RFC 9180, section 4.1; HKDF does both steps at once."""
    try:
        shared = private_key.exchange(X25519PublicKey.from_public_bytes(enc))
    except ValueError:  # the all-zero result that section 7.1.4 tells to refuse
        raise HpkeRefused from None
    keying = bytearray(_VERSION_LABEL + _KEM_SUITE + b"eae_prk") + shared
    wipe_bytes(shared)
    context = enc + private_key.public_key().public_bytes_raw()
    expand_info = _labeled_info(_KEM_SUITE, b"shared_secret", context, len(into))
    hkdf.derive_into(digest="sha256", key=keying, salt=b"", info=expand_info, into=into)
    wipe(keying)


def _key_schedule(shared_secret: bytearray, info: bytes, *, key: bytearray, nonce: bytearray) -> None:
    """KeySchedule of RFC 9180, section 5.1, in base mode (no PSK)."""
    context = _MODE_BASE + _labeled_extract(b"psk_id_hash", b"") + _labeled_extract(b"info_hash", info)
    secret = _labeled_extract(b"secret", b"", salt=shared_secret)
    for label, into in ((b"key", key), (b"base_nonce", nonce)):
        expand_info = _labeled_info(_HPKE_SUITE, label, context, len(into))
        hkdf.expand_into(digest="sha256", pseudorandom_key=secret, info=expand_info, into=into)
    wipe(secret)


def _labeled_extract(label: bytes, keying: bytes, *, salt: Buffer = b"") -> bytearray:
    extracted = bytearray(_SECRET_BYTES)
    hkdf.extract_into(digest="sha256", salt=salt, key=_VERSION_LABEL + _HPKE_SUITE + label + keying, into=extracted)
    return extracted


def _labeled_info(suite: bytes, label: bytes, context: bytes, length: int) -> bytes:
    return length.to_bytes(2, "big") + _VERSION_LABEL + suite + label + context
