"""Asks the hsm process for data keys, and for nothing else.

Rules:
- A data key goes from the socket into a locked buffer and from there into the asker's locked buffer; it is never a `bytes`.
- The link may be replaced at any time (hsm was restarted): who waits on the old one is told Unavailable at once.
- A frame that is not one of ours ends the link; the supervisor sees to the rest.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from sidecar.domain.secrets import SecretContext
from sidecar.egress.deadline import Deadline
from sidecar.errors import CustodyError, Unavailable
from sidecar.ipc.frames import HEADER, BadFrame, encode_frame, frame_length
from sidecar.ipc.messages import (
    CreateDataKey,
    DataKeyCreated,
    DataKeyOpened,
    EgressToHsm,
    EgressToHsmFrame,
    Failure,
    HsmToEgressFrame,
    OpenDataKey,
    decoder_for,
    error_of,
)
from sidecar.sealing import KEY_BYTES
from sidecar.secretbuffer import SecretBuffer, wipe

__all__ = ["HsmLink", "KeyMaterial"]

_ANSWER_SECONDS: Final = 5.0
_WIRING_SECONDS: Final = 3.0  # how long a request waits for hsm to come back
_MAX_ANSWER_BYTES: Final = 8 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaterial:
    """What belongs to a data key that was written into the asker's buffer."""

    key_id: bytes
    wrapped: bytes


@dataclass(slots=True, kw_only=True)
class _Asked:
    into: memoryview
    answered: asyncio.Future[KeyMaterial]


class HsmLink:
    def __init__(self) -> None:
        self._peer: socket.socket | None = None
        self._reading: asyncio.Task[None] | None = None
        self._wired = asyncio.Event()
        self._asked: dict[int, _Asked] = {}
        self._next_id = 1
        self._decoder = decoder_for(HsmToEgressFrame)
        self._sending = asyncio.Lock()

    @property
    def connected(self) -> bool:
        return self._peer is not None

    async def open_data_key(
        self, *, wrapped: bytes, context: SecretContext, into: memoryview, deadline: Deadline
    ) -> KeyMaterial:
        """Writes the key (32 bytes) into `into`. Raises Corrupt or Unavailable, then `into` is untouched or wiped."""
        return await self._ask(OpenDataKey(wrapped=wrapped, context=context), into, deadline)

    async def create_data_key(self, *, context: SecretContext, into: memoryview, deadline: Deadline) -> KeyMaterial:
        return await self._ask(CreateDataKey(context=context), into, deadline)

    def wire(self, peer: socket.socket) -> None:
        """Uses `peer` from now on; what waits on the one before fails."""
        self._unwire()
        peer.settimeout(0)
        self._peer = peer
        self._reading = asyncio.get_running_loop().create_task(self._read(peer))
        self._wired.set()

    async def close(self) -> None:
        reading = self._reading
        self._unwire()
        if reading is not None:
            await asyncio.gather(reading, return_exceptions=True)

    async def _ask(self, question: EgressToHsm, into: memoryview, deadline: Deadline) -> KeyMaterial:
        deadline = deadline.earlier(_ANSWER_SECONDS)
        number, self._next_id = self._next_id, self._next_id + 1
        try:
            async with deadline.timeout():
                peer = await self._wired_peer()
                asked = _Asked(into=into, answered=asyncio.get_running_loop().create_future())
                self._asked[number] = asked
                frame = EgressToHsmFrame(id=number, deadline_boot_time_ns=deadline.boot_time_ns, body=question)
                await self._send(peer, encode_frame(frame))
                return await asked.answered
        except (TimeoutError, OSError, BadFrame):
            wipe(into)
            raise _unavailable() from None
        except BaseException:
            wipe(into)
            raise
        finally:
            self._asked.pop(number, None)

    async def _wired_peer(self) -> socket.socket:
        async with asyncio.timeout(_WIRING_SECONDS):
            await self._wired.wait()
        if self._peer is None:
            raise _unavailable()
        return self._peer

    async def _send(self, peer: socket.socket, frame: bytearray) -> None:
        async with self._sending:
            try:
                await asyncio.get_running_loop().sock_sendall(peer, frame)
            except BaseException:
                # Half a frame may be out: nothing that follows it could be understood.
                if peer is self._peer:
                    self._unwire()
                raise

    def _unwire(self) -> None:
        peer, self._peer = self._peer, None
        self._wired.clear()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        for asked in self._asked.values():
            if not asked.answered.done():
                asked.answered.set_exception(_unavailable())
        if peer is not None:
            peer.close()

    async def _read(self, peer: socket.socket) -> None:
        try:
            with SecretBuffer(_MAX_ANSWER_BYTES) as buffer:
                while await self._read_frame(peer, buffer.view):
                    pass
        except (OSError, BadFrame, msgspec.MsgspecError, UnicodeDecodeError):
            pass  # whatever it was, the link is of no use, and the supervisor watches hsm itself
        if peer is self._peer:
            self._reading = None
            self._unwire()

    async def _read_frame(self, peer: socket.socket, buffer: memoryview) -> bool:
        receive = asyncio.get_running_loop().sock_recv_into
        try:
            if not await _fill(receive, peer, buffer[: HEADER.size]):
                return False
            length = frame_length(buffer[: HEADER.size])
            if length > len(buffer):
                raise BadFrame("hsm answers with a frame that is too long")
            if not await _fill(receive, peer, buffer[:length]):
                return False
            self._take(self._decoder.decode(buffer[:length]))
            return True
        finally:
            wipe(buffer)

    def _take(self, frame: HsmToEgressFrame) -> None:
        asked = self._asked.get(frame.id)
        if asked is None or asked.answered.done():
            return  # it did not wait that long
        try:
            asked.answered.set_result(_taken(frame, asked.into))
        except CustodyError as error:
            asked.answered.set_exception(error)


def _taken(frame: HsmToEgressFrame, into: memoryview) -> KeyMaterial:
    match frame.body:
        case DataKeyOpened(key_id=key_id, key=key):
            wrapped = b""
        case DataKeyCreated(key_id=key_id, key=key, wrapped=wrapped):
            pass
        case Failure() as failure:
            raise error_of(failure)
        case _:
            raise BadFrame("hsm answers something else than a data key")
    with key:
        if len(key) != KEY_BYTES:
            raise BadFrame("hsm answers with a key of another size")
        into[:] = key
    return KeyMaterial(key_id=key_id, wrapped=wrapped)


async def _fill(
    receive: Callable[[socket.socket, memoryview], Awaitable[int]], peer: socket.socket, view: memoryview
) -> bool:
    """False when the peer closed."""
    filled = 0
    while filled < len(view):
        count = await receive(peer, view[filled:])
        if count == 0:
            return False
        filled += count
    return True


def _unavailable() -> Unavailable:
    return Unavailable("HSM_UNAVAILABLE", "the HSM process does not answer; try again")
