"""HKDF (RFC 5869) that leaves nothing behind.

`cryptography`'s HKDF writes its result into a caller's buffer, but makes intermediate `bytes` (the pseudorandom key,
the output blocks) that it frees unwiped; one of them was found in the process's memory with a whole message key in it.
Here every intermediate value is wiped. Rules:

- Keys come in as buffers and go out into the caller's buffer.
- The one `bytes` that each HMAC returns never leaves `_hmac_into`, where it is overwritten.
"""

import hmac
from typing import Literal

from sidecar.secretbuffer import Buffer, WritableBuffer, wipe, wipe_bytes

__all__ = ["Digest", "derive_into", "expand_into", "extract_into"]

Digest = Literal["sha256", "sha512"]

DIGEST_BYTES: dict[Digest, int] = {"sha256": 32, "sha512": 64}
_MAX_BLOCKS = 255


def derive_into(*, digest: Digest, key: Buffer, salt: Buffer, info: bytes, into: WritableBuffer) -> None:
    """Extract, then expand: fill `into`. Raises ValueError if it is longer than 255 digests."""
    pseudorandom_key = bytearray(DIGEST_BYTES[digest])
    try:
        extract_into(digest=digest, salt=salt, key=key, into=pseudorandom_key)
        expand_into(digest=digest, pseudorandom_key=pseudorandom_key, info=info, into=into)
    finally:
        wipe(pseudorandom_key)


def extract_into(*, digest: Digest, salt: Buffer, key: Buffer, into: WritableBuffer) -> None:
    """Section 2.2. `into` is as long as the digest. An empty salt stands for zeros, as HMAC pads its key."""
    _hmac_into(digest, salt, key, into)


def expand_into(*, digest: Digest, pseudorandom_key: Buffer, info: bytes, into: WritableBuffer) -> None:
    """Section 2.3. Raises ValueError if `into` is longer than 255 digests."""
    size = DIGEST_BYTES[digest]
    if len(into) > _MAX_BLOCKS * size:
        raise ValueError("HKDF gives at most 255 blocks")
    block = bytearray()
    for number, start in enumerate(range(0, len(into), size), start=1):
        message = block + info + bytes([number])
        wipe(block)
        block = bytearray(size)
        _hmac_into(digest, pseudorandom_key, message, block)
        wipe(message)
        with memoryview(into) as output, memoryview(block) as made:
            output[start : start + size] = made[: len(into) - start]
    wipe(block)


def _hmac_into(digest: Digest, key: Buffer, message: Buffer, into: WritableBuffer) -> None:
    code = hmac.digest(key, message, digest)
    with memoryview(into) as output:
        output[:] = code
    wipe_bytes(code)
