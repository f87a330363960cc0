"""Master keys in the clear, and the data keys that they wrap. The only place where a master key is in the clear.

Rules:
- A master key lies in a locked buffer. It comes out of the HSM's root key, passes its commitment, and leaves only by being wiped.
- The current version wraps; the others only unwrap.
- Loading replaces all versions or none.
- A data key is opened straight into the memory that the caller gives; no copy of it stays here.

The records: docs/sealed-token.md.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sidecar import sealing
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.errors import Corrupt, Unavailable
from sidecar.hsm.errors import HsmFault, RootRefused
from sidecar.ipc.messages import WrappedMasterKey
from sidecar.secretbuffer import SecretBuffer, WritableBuffer, scrub, wipe, wipe_bytes

__all__ = ["NewDataKey", "RandomSource", "RootWrapping", "Vault", "data_key_id"]

# A root key is never replaced under its id, so its version never changes.
_ROOT_KEY_VERSION = 1
_DATA_KEY_ID_PREFIX = b"token-custody/data-key-id/1"


class RootWrapping(Protocol):
    """The root key, as the vault uses it."""

    key_id: bytes

    def encrypt(self, *, iv: bytes, plaintext: memoryview, associated_data: bytes) -> bytes: ...

    def decrypt_into(self, *, iv: bytes, ciphertext: bytes, associated_data: bytes, buffer: WritableBuffer) -> None: ...


class RandomSource(Protocol):
    def random_into(self, buffer: WritableBuffer) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDataKey:
    """`key_id` names the data key in the records that are sealed under it."""

    wrapped: bytes
    key_id: bytes


@dataclass(slots=True, kw_only=True)
class _MasterKey:
    key_id: bytes
    version: int
    buffer: SecretBuffer


class Vault:
    def __init__(self, *, root: RootWrapping, random: RandomSource, cluster: str) -> None:
        self._root = root
        self._random = random
        self._cluster = cluster
        self._keys: dict[tuple[bytes, int], _MasterKey] = {}
        self._current: _MasterKey | None = None

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted(key.version for key in self._keys.values()))

    @property
    def current_version(self) -> int:
        """0 while no master key is loaded."""
        return self._current.version if self._current else 0

    def create_master_key(self, version: int) -> WrappedMasterKey:
        """A new master key, wrapped, and proven to come out of its wrapping again. It is not loaded.

        Raises HsmFault.
        """
        key_id, iv = bytearray(sealing.KEY_ID_BYTES), bytearray(sealing.IV_BYTES)
        self._random.random_into(key_id)
        self._random.random_into(iv)
        with SecretBuffer(sealing.KEY_BYTES) as key, SecretBuffer(sealing.KEY_BYTES) as again:
            self._random.random_into(key.view)
            wrapped = self._wrap(key=key.view, version=version, iv=bytes(iv))
            try:
                # The record commits to the key: whatever opens is the key that was wrapped.
                self._unwrap_into(again.view, wrapped=wrapped, version=version)
            except Corrupt as error:
                raise HsmFault("NEW_MASTER_KEY_DOES_NOT_OPEN") from error
            scrub()
        return WrappedMasterKey(key_id=bytes(key_id), version=version, wrapped=wrapped, current=False)

    def load(self, wrapped_keys: Sequence[WrappedMasterKey]) -> None:
        """Replaces what is loaded. Raises Corrupt(ENVELOPE_CORRUPT), with everything as it was; HsmFault."""
        _check_set(wrapped_keys)
        loaded: list[_MasterKey] = []
        try:
            loaded.extend(map(self._unwrapped, wrapped_keys))
        except BaseException:
            _close(loaded)
            raise
        finally:
            scrub()
        _close(self._keys.values())
        self._keys = {(key.key_id, key.version): key for key in loaded}
        self._current = next(
            self._keys[(wrapped.key_id, wrapped.version)] for wrapped in wrapped_keys if wrapped.current
        )

    def create_data_key(self, context: SecretContext, buffer: WritableBuffer) -> NewDataKey:
        """Fills `buffer` (32 bytes) with a new data key and wraps it under the current master key for `context`.

        Raises Unavailable(HSM_UNAVAILABLE) while no master key is loaded, Corrupt(ENVELOPE_CORRUPT) for a context that
        no data key can have.
        """
        master = self._current
        if master is None:
            raise _not_loaded()
        self._check_context(context)
        octets = os.urandom(sealing.KEY_BYTES)
        buffer[:] = octets
        wipe_bytes(octets)
        try:
            wrapped = sealing.seal(
                key=master.buffer.view,
                key_id=master.key_id,
                key_version=master.version,
                kind=SecretKind.DATA_KEY,
                context=context,
                plaintext=buffer,
            )
        except ValueError:
            wipe(buffer)
            raise _corrupt("a data key cannot belong to this context") from None
        finally:
            scrub()
        return NewDataKey(wrapped=wrapped, key_id=data_key_id(context))

    def open_data_key(self, wrapped: bytes, context: SecretContext, buffer: WritableBuffer) -> bytes:
        """Fills `buffer` (32 bytes) with the data key and returns its id.

        Raises Unavailable(HSM_UNAVAILABLE) while no master key is loaded, Corrupt(ENVELOPE_CORRUPT) when it does not open.
        """
        if self._current is None:
            raise _not_loaded()
        self._check_context(context)
        try:
            header = sealing.parse(wrapped)
            master = self._keys.get((header.key_id, header.key_version))
            if master is None:
                raise _corrupt("a data key is wrapped under a master key that is not loaded")
            sealing.open_into(
                key=master.buffer.view, sealed=wrapped, kind=SecretKind.DATA_KEY, context=context, buffer=buffer
            )
        except sealing.SealedSecretRefused as error:
            raise _corrupt("a wrapped data key does not open for this context") from error
        finally:
            scrub()
        return data_key_id(context)

    def close(self) -> None:
        _close(self._keys.values())
        self._keys, self._current = {}, None

    def _wrap(self, *, key: memoryview, version: int, iv: bytes) -> bytes:
        wrap = sealing.root_wrap_header(
            key_id=self._root.key_id,
            key_version=_ROOT_KEY_VERSION,
            iv=iv,
            master_key=key,
            context=self._master_context(version),
        )
        ciphertext = self._root.encrypt(iv=iv, plaintext=key, associated_data=wrap.associated_data)
        return sealing.assemble(wrap.header, ciphertext)

    def _unwrapped(self, wrapped: WrappedMasterKey) -> _MasterKey:
        buffer = SecretBuffer(sealing.KEY_BYTES)
        try:
            self._unwrap_into(buffer.view, wrapped=wrapped.wrapped, version=wrapped.version)
        except BaseException:
            buffer.close()
            raise
        return _MasterKey(key_id=wrapped.key_id, version=wrapped.version, buffer=buffer)

    def _unwrap_into(self, buffer: memoryview, *, wrapped: bytes, version: int) -> None:
        try:
            parts = sealing.root_unwrap_parts(wrapped, self._master_context(version))
            if (parts.header.key_id, parts.header.key_version) != (self._root.key_id, _ROOT_KEY_VERSION):
                raise _corrupt("a master key is wrapped under another root key than the configured one")
            self._root.decrypt_into(
                iv=parts.iv, ciphertext=parts.ciphertext, associated_data=parts.associated_data, buffer=buffer
            )
            sealing.check_master_commitment(parts.header, buffer)
        except (sealing.SealedSecretRefused, RootRefused) as error:
            raise _corrupt("a wrapped master key does not open in this cluster under this version") from error

    def _master_context(self, version: int) -> SecretContext:
        return SecretContext(cluster=self._cluster, row_version=version)

    def _check_context(self, context: SecretContext) -> None:
        if context.cluster != self._cluster:
            raise _corrupt("a data key was asked for in the name of another cluster")


def data_key_id(context: SecretContext) -> bytes:
    """16 bytes that name the data key of a context. From the context and not from the key, so that they survive a rewrap."""
    texts = [text.encode() for text in (context.cluster, context.owner, context.consent)]
    parts = [*texts, context.row_version.to_bytes(8, "big")]
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(_DATA_KEY_ID_PREFIX + framed).digest()[: sealing.KEY_ID_BYTES]


def _check_set(wrapped_keys: Sequence[WrappedMasterKey]) -> None:
    if sum(key.current for key in wrapped_keys) != 1:
        raise _corrupt("of the master keys not exactly one is current")
    versions = {key.version for key in wrapped_keys}
    if len(versions) != len(wrapped_keys) or len({key.key_id for key in wrapped_keys}) != len(wrapped_keys):
        raise _corrupt("two master keys have one version or one id")
    if not all(1 <= version < 2**32 for version in versions):
        raise _corrupt("a master key has an impossible version")


def _close(keys: Iterable[_MasterKey]) -> None:
    for key in keys:
        key.buffer.close()


def _not_loaded() -> Unavailable:
    return Unavailable("HSM_UNAVAILABLE", "no master key is loaded yet; try again")


def _corrupt(message: str) -> Corrupt:
    return Corrupt("ENVELOPE_CORRUPT", message)
