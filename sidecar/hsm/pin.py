"""The PIN: read once from a file, used once, wiped.

Rules:
- The file is a regular file that only its owner may read, and the owner is this process's user or root. A symbolic link
  or a FIFO is refused: neither says whose content it delivers.
- The PIN is never a `str` or `bytes`, and nothing shows it.
"""

import os
import stat
from typing import Self

from sidecar.hsm.errors import StartRefused
from sidecar.ipc.messages import ChildExit
from sidecar.secretbuffer import SecretBuffer, wipe

__all__ = ["Pin"]

_MAX_BYTES = 255
_LINE_ENDS = (b"\r\n", b"\n")


class Pin:
    """The content of a PIN file without one line end; use it in a `with` statement, which wipes it at the end."""

    __slots__ = ("_buffer", "_encoded", "_length")

    def __init__(self, path: str) -> None:
        """Raises StartRefused(PIN_FILE_REFUSED)."""
        self._buffer = SecretBuffer(_MAX_BYTES + 3)
        self._encoded: list[bytearray] = []
        try:
            self._length = _content_length(self._buffer.view, _read_into(self._buffer.view, path))
        except BaseException:
            self._buffer.close()
            raise

    def encode(self, _encoding: str) -> bytearray:
        """What python-pkcs11 calls to get the octets: it takes any object with this method, so no `str` is needed."""
        octets = bytearray(self._buffer.view[: self._length])
        self._encoded.append(octets)
        return octets

    def close(self) -> None:
        for octets in self._encoded:
            wipe(octets)
        self._buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Pin>"


def _read_into(buffer: memoryview, path: str) -> int:
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused("cannot be opened, or is a symbolic link") from error
    try:
        _check_owner_only(os.fstat(descriptor))
        return os.readv(descriptor, [buffer])
    except OSError as error:
        raise _refused("cannot be read") from error
    finally:
        os.close(descriptor)


def _check_owner_only(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refused("is not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise _refused("belongs to another user")
    if status.st_mode & 0o077:
        raise _refused("may be read or written by others than its owner (run: chmod 400 on it)")


def _content_length(buffer: memoryview, read_bytes: int) -> int:
    length = read_bytes
    for line_end in _LINE_ENDS:
        if buffer[:length][-len(line_end) :] == line_end:
            length -= len(line_end)
            break
    if not 0 < length <= _MAX_BYTES:
        raise _refused("does not hold 1 to 255 octets")
    if any(octet in buffer[:length] for octet in (0, 10, 13)):
        raise _refused("holds more than one line")
    return length


def _refused(what: str) -> StartRefused:
    return StartRefused(ChildExit.PIN_FILE_REFUSED, f"the PIN file {what}")
