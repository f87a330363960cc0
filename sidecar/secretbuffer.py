"""Memory for secrets: where a plaintext may lie, and how it is removed.

Rules:
- A secret lives in a `SecretBuffer` or a `bytearray`, never in a `str` or `bytes`, because those cannot be overwritten.
- A secret is readable only inside the `with` block of its buffer; leaving the block, by whatever way, wipes it.
- A buffer does not reach swap (mlock, where the limit allows), a core dump (MADV_DONTDUMP) or a forked child
  (MADV_WIPEONFORK), and shows nothing in a repr, a pickle or a copy.
- After work with key material, `scrub()` on the same thread: registers and stack belong to a thread.
"""

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import NoReturn, Self

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["Buffer", "SecretBuffer", "WritableBuffer", "scrub", "wipe", "wipe_bytes"]

WritableBuffer = bytearray | memoryview
Buffer = bytes | bytearray | memoryview

_MADV_DONTDUMP = 16  # <linux/mman.h>; Python 3.11 names only the first of the two
_MADV_WIPEONFORK = 18
_SCRUB_BYTES = 1024  # enough for the widest AES-GCM loop, which is what fills the most vector registers
_COPY_BYTES = 4096


class SecretBuffer:
    """A page-aligned, locked, zeroed piece of memory of `size_bytes` bytes; use it in a `with` statement.

    `view` is a writable memoryview of exactly `size_bytes` bytes and ends with the block. `locked` tells whether the
    kernel agreed to keep it out of swap; a refusal for want of RLIMIT_MEMLOCK is not an error here, the caller decides.

    Raises ValueError for a size below 1 or for use after the end; OSError when the kernel gives no memory.
    """

    __slots__ = ("_memory", "_view", "locked")

    def __init__(self, size_bytes: int) -> None:
        if size_bytes < 1:
            raise ValueError("a secret buffer has at least one byte")
        self._memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(_MADV_DONTDUMP)
        self._memory.madvise(_MADV_WIPEONFORK)
        self._view: memoryview | None = memoryview(self._memory)
        self.locked = _lock(self._view)

    @property
    def view(self) -> memoryview:
        if self._view is None:
            raise ValueError("the secret buffer is closed")
        return self._view

    def close(self) -> None:
        """Wipe the memory and give it back. Harmless when repeated."""
        if self._view is None:
            return
        wipe(self._view)
        self._view.release()
        self._view = None
        # A slice that somebody still holds keeps the pages mapped. They are zero by now, and go when the slice goes.
        with suppress(BufferError):
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_view"):  # false when the constructor failed
            self.close()

    def __len__(self) -> int:
        return len(self.view)

    def __repr__(self) -> str:
        return "<SecretBuffer>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickle and copy alike: both go through here."""
        raise TypeError("a secret buffer is neither pickled nor copied")


def wipe(buffer: WritableBuffer) -> None:
    """Overwrite `buffer` with zeros. Raises TypeError if it is read-only."""
    with memoryview(buffer) as view, view.cast("B") as octets:
        octets[:] = bytes(len(octets))


def wipe_bytes(value: bytes) -> None:
    """Overwrite the body of an immutable `bytes` that some library insisted on returning.

    Only for a value that the caller alone refers to: whoever else holds it sees zeros. Values below two bytes are
    shared by the interpreter and are left alone.
    """
    if len(value) > 1:
        ctypes.memset(id(value) + bytes.__basicsize__ - 1, 0, len(value))


def scrub() -> None:
    """Push what AES-GCM left of a key or plaintext out of this thread's vector registers and stack (some microseconds).

    A dummy encryption and decryption under a zero key overwrites key schedule and data registers; copies of three
    sizes take the remaining ones through the C library's copy routines. Measured: hardening notes, "The splice".
    """
    message = bytearray(_SCRUB_BYTES + 16)
    cipher = AESGCM(bytes(32))
    cipher.encrypt_into(bytes(12), bytes(_SCRUB_BYTES), b"", message)
    cipher.decrypt_into(bytes(12), message, b"", memoryview(message)[:_SCRUB_BYTES])
    del cipher
    zeros, scratch = memoryview(bytes(_COPY_BYTES)), memoryview(bytearray(_COPY_BYTES))
    for size_bytes in (_COPY_BYTES, 200, 100):
        scratch[:size_bytes] = zeros[:size_bytes]


def _lock(view: memoryview) -> bool:
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    if _c_library().mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(view))) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):  # over RLIMIT_MEMLOCK, or not allowed at all
        return False
    raise OSError(code, os.strerror(code))


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
