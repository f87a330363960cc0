"""A second reader of sealed secrets, written from docs/sealed-token.md alone.

It shares nothing with the sidecar's reader: HMAC comes from the standard library, the block cipher is the bare AES
permutation, and counter mode, GHASH and HKDF are spelled out here. It makes no attempt at secrecy of memory or time.
"""

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

MASTER_KEY, DATA_KEY = 1, 2
KINDS = range(1, 7)
SUITE_MESSAGE_KEY, SUITE_HSM = 0x0001, 0x0002
INFO_PREFIX = b"token-custody/sealed/1"
GCM_POLYNOMIAL = 0xE1 << 120


class Malformed(Exception):
    """A rule about the stored bytes is broken; `field` is the first field, in the order of the page."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


class Refused(Exception):
    """Well-formed, but not under this key or not for this context."""


@dataclass(frozen=True)
class Context:
    cluster: str
    owner: str
    consent: str
    provider_origin: str
    row_version: int


def decode(*, key: bytes, sealed: bytes, kind: int, context: Context) -> bytes:
    """Open a record of suite 0x0001 with its wrapping key, or of suite 0x0002 with a root key that is known."""
    check_form(sealed)
    if sealed[7] != kind:
        raise Refused
    suite, salt, commitment = number(sealed[5:7]), sealed[30:62], sealed[62:94]
    prefix = INFO_PREFIX + sealed[5:7]
    authenticated = associated_data(sealed[:98], kind, context)
    if suite == SUITE_MESSAGE_KEY:
        if hkdf_sha512(key, salt, prefix + b"COMMITKEY") != commitment:
            raise Refused
        return gcm_open(hkdf_sha512(key, salt, prefix + b"DERIVEKEY"), bytes(12), authenticated, sealed[98:])
    plaintext = gcm_open(key, salt[:12], authenticated, sealed[98:])
    if hkdf_sha512(plaintext, salt, prefix + b"COMMITCONTENT") != commitment:
        raise Refused
    return plaintext


def check_form(sealed: bytes) -> None:
    if len(sealed) < 98:
        raise Malformed("header")
    suite, kind, salt, length = number(sealed[5:7]), sealed[7], sealed[30:62], number(sealed[94:98])
    rules = {
        "magic": sealed[:4] == bytes.fromhex("54435353"),
        "format": sealed[4] == 1,
        "suite": suite in (SUITE_MESSAGE_KEY, SUITE_HSM),
        "kind": kind in KINDS,
        "flags": sealed[8:10] == bytes(2),
        "suite of this kind": (kind == MASTER_KEY) == (suite == SUITE_HSM),
        "key version": number(sealed[26:30]) >= 1,
        "salt": suite != SUITE_HSM or salt[12:] == bytes(20),
        "length": length == 48 if kind in (MASTER_KEY, DATA_KEY) else 17 <= length <= 65_552,
    }
    for field, kept in (*rules.items(), ("length", len(sealed) == 98 + length)):
        if not kept:
            raise Malformed(field)


def associated_data(header: bytes, kind: int, context: Context) -> bytes:
    allowed = (
        context.cluster != ""
        and (kind != MASTER_KEY or (context.owner, context.consent) == ("", ""))
        and (context.provider_origin == "") == (kind in (MASTER_KEY, DATA_KEY))
        and 1 <= context.row_version < 2**64
    )
    if not allowed:
        raise Refused
    texts = [context.cluster, context.owner, context.consent, context.provider_origin]
    try:
        encoded = [text.encode("utf-8") for text in texts]
    except UnicodeEncodeError as error:
        raise Refused from error
    if max(map(len, encoded)) > 65_535:
        raise Refused
    parts = [header, *encoded, context.row_version.to_bytes(8, "big")]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def hkdf_sha512(key: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for 32 bytes: the first half of the first block."""
    pseudorandom_key = hmac.new(salt, key, hashlib.sha512).digest()
    return hmac.new(pseudorandom_key, info + b"\x01", hashlib.sha512).digest()[:32]


def gcm_open(key: bytes, iv: bytes, authenticated: bytes, sealed: bytes) -> bytes:
    """NIST SP 800-38D, algorithm 5, for a 96-bit IV and a 128-bit tag."""
    ciphertext, tag = sealed[:-16], sealed[-16:]
    if gcm_tag(key, iv, authenticated, ciphertext) != tag:
        raise Refused
    counters = b"".join(iv + index.to_bytes(4, "big") for index in range(2, 2 + -(-len(ciphertext) // 16)))
    return bytes(a ^ b for a, b in zip(ciphertext, aes(key, counters), strict=False))


def gcm_tag(key: bytes, iv: bytes, authenticated: bytes, ciphertext: bytes) -> bytes:
    subkey = number(aes(key, bytes(16)))
    lengths = (8 * len(authenticated)).to_bytes(8, "big") + (8 * len(ciphertext)).to_bytes(8, "big")
    padded = pad(authenticated) + pad(ciphertext) + lengths
    state = 0
    for start in range(0, len(padded), 16):
        state = multiply(state ^ number(padded[start : start + 16]), subkey)
    return (state ^ number(aes(key, iv + bytes.fromhex("00000001")))).to_bytes(16, "big")


def multiply(left: int, right: int) -> int:
    """In GCM's field: bit 127 is the coefficient of x to the 0."""
    product = 0
    for bit in range(127, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ GCM_POLYNOMIAL if right & 1 else right >> 1
    return product


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def aes(key: bytes, blocks: bytes) -> bytes:
    """AES on each 16-byte block by itself."""
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")
