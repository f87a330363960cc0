"""PKCE verifiers (RFC 7636, S256), made where they stay."""

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sidecar.secretbuffer import SecretBuffer, scrub

__all__ = ["VERIFIER_BYTES", "pkce_verifier"]

_RANDOM_BYTES: Final = 32
VERIFIER_BYTES: Final = 43
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@contextmanager
def pkce_verifier() -> Iterator[tuple[memoryview, str]]:
    """A new verifier, inside the block only, and its challenge, which is public."""
    with SecretBuffer(_RANDOM_BYTES + VERIFIER_BYTES) as buffer:
        random, verifier = buffer.view[:_RANDOM_BYTES], buffer.view[_RANDOM_BYTES:]
        _fill_with_random(random)
        _write_base64url(random, verifier)
        challenge = urlsafe_b64encode(hashlib.sha256(verifier).digest()).rstrip(b"=").decode("ascii")
        scrub()
        yield verifier, challenge


def _fill_with_random(buffer: memoryview) -> None:
    # Not os.urandom: it gives a `bytes`, which cannot be overwritten.
    with Path("/dev/urandom").open("rb", buffering=0) as source:
        if source.readinto(buffer) != len(buffer):
            raise OSError("the kernel's random generator gave too few bytes")


def _write_base64url(octets: memoryview, into: memoryview) -> None:
    """RFC 4648 section 5, without padding."""
    bits = held = written = 0
    for octet in octets:
        bits = (bits << 8 | octet) & 0xFFFF
        held += 8
        while held >= 6:
            held -= 6
            into[written] = _ALPHABET[bits >> held & 63]
            written += 1
    if held:
        into[written] = _ALPHABET[bits << (6 - held) & 63]
