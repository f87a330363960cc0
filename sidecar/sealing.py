"""The sealed format: seal, open, parse. Pure; the format is written down in docs/sealed-token.md.

Rules:
- A sealed secret opens only under its key and only for its context; whatever is unknown is refused.
- A refusal for key, tag, commitment, kind or context is one error after the same work, so neither its text nor its
  time tells which it was. Errors about the stored bytes name a field and no content.
- A plaintext is written only into the caller's buffer, never into a `str` or `bytes`; derived keys are wiped.
  On any failure the caller's buffer is wiped.
- The root key's operations happen in the HSM; here is only what surrounds them (`root_wrap_header` and so on).
"""

import hmac
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar import hkdf
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.secretbuffer import Buffer, WritableBuffer, wipe

__all__ = [
    "HEADER_BYTES",
    "IV_BYTES",
    "KEY_BYTES",
    "KEY_ID_BYTES",
    "MAX_PLAINTEXT_BYTES",
    "TAG_BYTES",
    "RootUnwrap",
    "RootWrap",
    "SealedHeader",
    "SealedSecretMalformed",
    "SealedSecretRefused",
    "Suite",
    "WrappingKey",
    "assemble",
    "check_master_commitment",
    "open_into",
    "parse",
    "root_unwrap_parts",
    "root_wrap_header",
    "seal",
]

KEY_BYTES = 32
KEY_ID_BYTES = 16
IV_BYTES = 12
TAG_BYTES = 16
MAX_PLAINTEXT_BYTES = 65_536

_HEADER = struct.Struct(">4sBHBH16sI32s32sI")
HEADER_BYTES = _HEADER.size
_MAGIC = b"TCSS"
_FORMAT = 1
_SALT_BYTES = 32
_COMMITMENT_BYTES = 32
_DIGEST_BYTES = 64  # of SHA-512
_MAX_TEXT_BYTES = 65_535
_ROOT_SALT_PADDING = bytes(_SALT_BYTES - IV_BYTES)
# The message key is new for every message, so the nonce may be constant.
_ZERO_NONCE = bytes(IV_BYTES)


class Suite(IntEnum):
    """Codes are part of the sealed format: never renumber, never reuse."""

    HKDF_SHA512_AES_256_GCM = 0x0001
    HSM_AES_256_GCM = 0x0002


_SUITE_OF_KIND = {
    SecretKind.MASTER_KEY: Suite.HSM_AES_256_GCM,
    SecretKind.DATA_KEY: Suite.HKDF_SHA512_AES_256_GCM,
    SecretKind.ACCESS_TOKEN: Suite.HKDF_SHA512_AES_256_GCM,
    SecretKind.REFRESH_TOKEN: Suite.HKDF_SHA512_AES_256_GCM,
    SecretKind.PKCE_VERIFIER: Suite.HKDF_SHA512_AES_256_GCM,
    SecretKind.CLIENT_SECRET: Suite.HKDF_SHA512_AES_256_GCM,
}
_SUITES, _KINDS = frozenset(Suite), frozenset(SecretKind)
_KINDS_OF_KEYS = frozenset({SecretKind.MASTER_KEY, SecretKind.DATA_KEY})


class SealedSecretRefused(Exception):
    """The sealed secret does not open: key, commitment, tag, kind or context. It never says which."""

    def __init__(self, message: str = "the sealed secret cannot be opened") -> None:
        super().__init__(message)


class SealedSecretMalformed(SealedSecretRefused):
    """The stored bytes break the format; `field` names the first field that does, never its content."""

    def __init__(self, field: str) -> None:
        super().__init__(f"the sealed secret is malformed: {field}")
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedHeader:
    """What a sealed secret says about itself. `length` counts the bytes of ciphertext and tag together."""

    suite: Suite
    kind: SecretKind
    key_id: bytes
    key_version: int
    salt: bytes
    commitment: bytes
    length: int

    @property
    def plaintext_bytes(self) -> int:
        return self.length - TAG_BYTES


class WrappingKey:
    """A wrapping key for opening, with what was derived from it for the newest salt; all in `room`, memory of the caller's.

    Deriving costs several times the decryption, and one secret is opened again and again. What is derived lives as long as the
    key and no longer: the caller wipes `room` as a whole.
    """

    ROOM_BYTES = KEY_BYTES + KEY_BYTES + _COMMITMENT_BYTES

    __slots__ = ("_derived", "_salt", "key")

    def __init__(self, room: memoryview) -> None:
        """`room` is ROOM_BYTES long and begins with the key."""
        if len(room) != self.ROOM_BYTES:
            raise ValueError("a wrapping key needs room for itself and what is derived from it")
        self.key = room[:KEY_BYTES]
        self._derived = _DerivedKeys(message_key=room[KEY_BYTES : 2 * KEY_BYTES], commitment=room[2 * KEY_BYTES :])
        self._salt: bytes | None = None

    def derived(self, salt: bytes) -> "_DerivedKeys":
        if self._salt != salt:
            self._salt = None
            self._derived.derive(key=self.key, salt=salt)
            self._salt = salt
        return self._derived

    def release(self) -> None:
        """Lets go of `room`."""
        self.key.release()
        self._derived.release()


class RootWrap(NamedTuple):
    """What the HSM needs to wrap a master key: its output goes to `assemble(header, output)`."""

    header: bytes
    associated_data: bytes


class RootUnwrap(NamedTuple):
    """What the HSM needs to unwrap a master key; `ciphertext` ends with the 16-byte tag."""

    header: SealedHeader
    iv: bytes
    ciphertext: bytes
    associated_data: bytes


def seal(
    *, key: Buffer, key_id: bytes, key_version: int, kind: SecretKind, context: SecretContext, plaintext: Buffer
) -> bytes:
    """Seal `plaintext` under the wrapping key `key` (32 bytes) for `context`.

    Raises ValueError if an argument breaks the format (a master key among them: that is the HSM's to wrap).
    """
    return _seal_with_salt(
        salt=os.urandom(_SALT_BYTES),
        key=key,
        key_id=key_id,
        key_version=key_version,
        kind=kind,
        context=context,
        plaintext=plaintext,
    )


def open_into(
    *, key: Buffer | WrappingKey, sealed: Buffer, kind: SecretKind, context: SecretContext, buffer: WritableBuffer
) -> int:
    """Write the plaintext to the start of `buffer` and return its length in bytes.

    Raises SealedSecretMalformed for bytes that are no sealed secret, SealedSecretRefused for everything else that does
    not fit, ValueError for a key of another size or a buffer that is too small. In each case `buffer` is wiped whole.
    """
    try:
        return _open_checked(key=key, sealed=sealed, kind=kind, context=context, buffer=buffer)
    except BaseException:
        wipe(buffer)
        raise


def parse(sealed: Buffer) -> SealedHeader:
    """Read the header and check the record's shape; says nothing about whether it opens.

    Raises SealedSecretMalformed, naming the first field that is wrong.
    """
    if len(sealed) < HEADER_BYTES:
        raise SealedSecretMalformed("header")
    fields = _HEADER.unpack(bytes(sealed[:HEADER_BYTES]))
    magic, format_number, suite, kind, flags, key_id, key_version, salt, commitment, length = fields
    _require(magic == _MAGIC, "magic")
    _require(format_number == _FORMAT, "format")
    _require(suite in _SUITES, "suite")
    _require(kind in _KINDS, "kind")
    _require(flags == 0, "flags")
    header = SealedHeader(
        suite=Suite(suite),
        kind=SecretKind(kind),
        key_id=key_id,
        key_version=key_version,
        salt=salt,
        commitment=commitment,
        length=length,
    )
    _check_header(header)
    _require(len(sealed) == HEADER_BYTES + length, "length")
    return header


def root_wrap_header(
    *, key_id: bytes, key_version: int, iv: bytes, master_key: Buffer, context: SecretContext
) -> RootWrap:
    """Header and associated data for wrapping `master_key` (32 bytes) with the HSM's root key `key_id`.

    `iv` is 12 bytes, random and new. The HSM encrypts with CKM_AES_GCM and a 128-bit tag; `assemble` joins the result.
    Raises ValueError if an argument breaks the format.
    """
    if len(iv) != IV_BYTES or len(master_key) != KEY_BYTES:
        raise ValueError("wrapping a master key takes a 12-byte IV and a 32-byte key")
    salt = iv + _ROOT_SALT_PADDING
    header = SealedHeader(
        suite=Suite.HSM_AES_256_GCM,
        kind=SecretKind.MASTER_KEY,
        key_id=key_id,
        key_version=key_version,
        salt=salt,
        commitment=_master_commitment(salt, master_key),
        length=KEY_BYTES + TAG_BYTES,
    )
    encoded = _encode(header)
    return RootWrap(encoded, _associated_data(encoded, header.kind, context))


def root_unwrap_parts(sealed: Buffer, context: SecretContext) -> RootUnwrap:
    """Take a wrapped master key apart for the HSM. Its output must pass `check_master_commitment` before any use.

    Raises SealedSecretMalformed, or SealedSecretRefused if this is not a master key under the HSM's root key.
    """
    header = parse(sealed)
    if header.suite is not Suite.HSM_AES_256_GCM:
        raise SealedSecretRefused
    associated_data = _associated_data_to_open(sealed, header.kind, context)
    return RootUnwrap(header, header.salt[:IV_BYTES], bytes(sealed[HEADER_BYTES:]), associated_data)


def check_master_commitment(header: SealedHeader, master_key: Buffer) -> None:
    """Raise SealedSecretRefused unless `master_key`, as the HSM decrypted it, is the one that was wrapped."""
    commitment = _master_commitment(header.salt, master_key)
    genuine = hmac.compare_digest(commitment, header.commitment)
    if header.suite is not Suite.HSM_AES_256_GCM or not genuine:
        raise SealedSecretRefused


def assemble(header: bytes, ciphertext: bytes) -> bytes:
    """Join a header from `root_wrap_header` and what the HSM returned (ciphertext and tag).

    Raises SealedSecretMalformed if the HSM returned another length than the header promises.
    """
    sealed = header + ciphertext
    parse(sealed)
    return sealed


def _seal_with_salt(
    *,
    salt: bytes,
    key: Buffer,
    key_id: bytes,
    key_version: int,
    kind: SecretKind,
    context: SecretContext,
    plaintext: Buffer,
) -> bytes:
    """`seal` with the salt given: one salt must never serve two messages, so only the test vectors call this."""
    _check_wrapping_key(key)
    with _derived(key, salt) as derived:
        header = SealedHeader(
            suite=Suite.HKDF_SHA512_AES_256_GCM,
            kind=kind,
            key_id=key_id,
            key_version=key_version,
            salt=salt,
            commitment=bytes(derived.commitment),
            length=len(plaintext) + TAG_BYTES,
        )
        encoded = _encode(header)
        associated_data = _associated_data(encoded, kind, context)
        sealed = bytearray(encoded) + bytearray(header.length)
        with memoryview(sealed) as view:
            _aead_seal_into(
                key=derived.message_key,
                nonce=_ZERO_NONCE,
                plaintext=plaintext,
                associated_data=associated_data,
                buffer=view[HEADER_BYTES:],
            )
    return bytes(sealed)


def _open_checked(
    *, key: Buffer | WrappingKey, sealed: Buffer, kind: SecretKind, context: SecretContext, buffer: WritableBuffer
) -> int:
    _check_wrapping_key(key)
    header = parse(sealed)
    if header.suite is not Suite.HKDF_SHA512_AES_256_GCM:
        raise SealedSecretRefused
    if len(buffer) < header.plaintext_bytes:
        raise ValueError("the buffer is smaller than the secret")
    associated_data = _associated_data_to_open(sealed, kind, context)
    with _derived(key, header.salt) as derived:
        committed = hmac.compare_digest(derived.commitment, header.commitment)
        # Decrypting even when the commitment is wrong keeps the time of all refusals the same.
        opened = _aead_open_into(
            key=derived.message_key,
            nonce=_ZERO_NONCE,
            ciphertext=memoryview(sealed)[HEADER_BYTES:],
            associated_data=associated_data,
            buffer=memoryview(buffer)[: header.plaintext_bytes],
        )
    if not (committed and opened and header.kind is kind):
        raise SealedSecretRefused
    return header.plaintext_bytes


class _DerivedKeys:
    """Message key and commitment for one salt, 32 bytes each, in memory of the caller's."""

    __slots__ = ("commitment", "message_key")

    def __init__(self, *, message_key: memoryview, commitment: memoryview) -> None:
        self.message_key = message_key
        self.commitment = commitment

    def derive(self, *, key: Buffer, salt: bytes) -> None:
        pseudorandom_key = bytearray(_DIGEST_BYTES)
        hkdf.extract_into(digest="sha512", salt=salt, key=key, into=pseudorandom_key)
        for label, into in ((b"DERIVEKEY", self.message_key), (b"COMMITKEY", self.commitment)):
            info = _info(Suite.HKDF_SHA512_AES_256_GCM, label)
            hkdf.expand_into(digest="sha512", pseudorandom_key=pseudorandom_key, info=info, into=into)
        wipe(pseudorandom_key)

    def release(self) -> None:
        self.message_key.release()
        self.commitment.release()


@contextmanager
def _derived(key: Buffer | WrappingKey, salt: bytes) -> Iterator[_DerivedKeys]:
    """What `key` and `salt` give. For a bare key it is wiped at the end of the block; a WrappingKey keeps it."""
    if isinstance(key, WrappingKey):
        yield key.derived(salt)
        return
    with memoryview(bytearray(KEY_BYTES + _COMMITMENT_BYTES)) as room:
        derived = _DerivedKeys(message_key=room[:KEY_BYTES], commitment=room[KEY_BYTES:])
        try:
            derived.derive(key=key, salt=salt)
            yield derived
        finally:
            wipe(room)
            derived.release()


def _master_commitment(salt: bytes, master_key: Buffer) -> bytes:
    commitment = bytearray(_COMMITMENT_BYTES)
    info = _info(Suite.HSM_AES_256_GCM, b"COMMITCONTENT")
    hkdf.derive_into(digest="sha512", key=master_key, salt=salt, info=info, into=commitment)
    return bytes(commitment)


def _aead_seal_into(
    *, key: Buffer, nonce: bytes, plaintext: Buffer, associated_data: bytes, buffer: WritableBuffer
) -> None:
    """AES-GCM; `buffer` is exactly as long as ciphertext and tag."""
    AESGCM(key).encrypt_into(nonce, plaintext, associated_data, buffer)


def _aead_open_into(
    *, key: Buffer, nonce: bytes, ciphertext: Buffer, associated_data: bytes, buffer: WritableBuffer
) -> bool:
    """AES-GCM; `buffer` is exactly as long as the plaintext. False, without an exception, if the tag is wrong."""
    try:
        AESGCM(key).decrypt_into(nonce, ciphertext, associated_data, buffer)
    except InvalidTag:
        return False
    return True


def _info(suite: Suite, label: bytes) -> bytes:
    return b"token-custody/sealed/1" + suite.to_bytes(2, "big") + label


def _encode(header: SealedHeader) -> bytes:
    """The 98 bytes of a header we are about to write. Raises ValueError if it would not parse."""
    if len(header.key_id) != KEY_ID_BYTES:
        raise ValueError("a key id has 16 bytes")
    if not 1 <= header.key_version < 2**32:
        raise ValueError("a key version is between 1 and 2**32 - 1")
    try:
        _check_header(header)
    except SealedSecretMalformed as error:
        raise ValueError(f"cannot be sealed: {error.field}") from None
    return _HEADER.pack(
        _MAGIC,
        _FORMAT,
        header.suite,
        header.kind,
        0,
        header.key_id,
        header.key_version,
        header.salt,
        header.commitment,
        header.length,
    )


def _check_header(header: SealedHeader) -> None:
    """The rules between fields, for writing and reading alike."""
    _require(_SUITE_OF_KIND[header.kind] is header.suite, "suite of this kind")
    _require(header.key_version >= 1, "key version")
    if header.suite is Suite.HSM_AES_256_GCM:
        _require(header.salt[IV_BYTES:] == _ROOT_SALT_PADDING, "salt")
    _require(1 <= header.plaintext_bytes <= MAX_PLAINTEXT_BYTES, "length")
    if header.kind in _KINDS_OF_KEYS:
        _require(header.plaintext_bytes == KEY_BYTES, "length")


def _associated_data_to_open(sealed: Buffer, kind: SecretKind, context: SecretContext) -> bytes:
    """As `_associated_data`; a context that nothing can have been sealed for is a refusal like any other."""
    try:
        return _associated_data(bytes(sealed[:HEADER_BYTES]), kind, context)
    except ValueError:
        raise SealedSecretRefused from None


def _associated_data(header: bytes, kind: SecretKind, context: SecretContext) -> bytes:
    _check_context(kind, context)
    texts = (context.cluster, context.owner, context.consent, context.provider_origin)
    parts = (header, *map(_encode_text, texts), context.row_version.to_bytes(8, "big"))
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _check_context(kind: SecretKind, context: SecretContext) -> None:
    if not context.cluster:
        raise ValueError("a sealed secret belongs to a cluster")
    if kind is SecretKind.MASTER_KEY and (context.owner or context.consent):
        raise ValueError("a master key belongs to no owner and no consent")
    if (kind in _KINDS_OF_KEYS) == bool(context.provider_origin):
        raise ValueError("a key has no provider origin, and every other secret has one")
    if not 1 <= context.row_version < 2**64:
        raise ValueError("a row version is between 1 and 2**64 - 1")


def _encode_text(text: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # its message would repeat the text
        raise ValueError("a context value is not valid Unicode text") from None
    if len(encoded) > _MAX_TEXT_BYTES:
        raise ValueError("a context value is longer than 65535 bytes")
    return encoded


def _check_wrapping_key(key: Buffer | WrappingKey) -> None:
    if len(key.key if isinstance(key, WrappingKey) else key) != KEY_BYTES:
        raise ValueError("a wrapping key has 32 bytes")


def _require(condition: bool, field: str) -> None:  # noqa: FBT001
    if not condition:
        raise SealedSecretMalformed(field)
