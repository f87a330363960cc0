"""Frames: a 4-byte big-endian length, then one msgpack document. A frame that is too long or does not parse ends the connection.

Deadlines are CLOCK_BOOTTIME nanoseconds, which all processes of one machine share.
"""

import struct
import time
from typing import Final

import msgspec

__all__ = ["HEADER", "MAX_FRAME_BYTES", "BadFrame", "boot_time_ns", "deadline_after", "encode_frame", "frame_length"]

HEADER: Final = struct.Struct(">I")
# A request body is at most 1 MiB, an answer's at most 4 MiB (egress bounds it); the rest is small.
MAX_FRAME_BYTES: Final = 6 * 1024 * 1024

_encoder = msgspec.msgpack.Encoder()


class BadFrame(Exception):
    """The peer does not speak our frames: the only cure is to end the connection."""


def encode_frame(message: msgspec.Struct) -> bytearray:
    """One frame, header included, in a buffer that the caller may wipe."""
    buffer = bytearray(HEADER.size)
    _encoder.encode_into(message, buffer, HEADER.size)
    length = len(buffer) - HEADER.size
    if length > MAX_FRAME_BYTES:
        raise BadFrame("a frame is too long")
    HEADER.pack_into(buffer, 0, length)
    return buffer


def frame_length(header: bytes | bytearray | memoryview) -> int:
    """The length that a header announces. Raises BadFrame when it is 0 or too long."""
    (length,) = HEADER.unpack(header)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise BadFrame("a frame has an impossible length")
    return int(length)


def boot_time_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def deadline_after(seconds: float) -> int:
    return boot_time_ns() + int(seconds * 1e9)
