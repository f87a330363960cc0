"""Asks the hsm process for data keys, and for nothing else.

Rules:
- A data key goes from the socket into a locked buffer and from there into the asker's locked buffer; it is never a `bytes`.
- The link may be replaced at any time (hsm was restarted): who waits on the old one is told Unavailable at once.
- An asker that gives up does not end the link: frames are written by the link itself, one whole frame after the other.
- A frame that is not one of ours ends the link; the supervisor sees that it is gone (`EgressStatus.hsm_connected`) and gives
  both sides a new one.
"""

import asyncio
import socket
from collections import deque
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
        self._wire: _Wire | None = None
        self._wired = asyncio.Event()
        self._asked: dict[int, _Asked] = {}
        self._next_id = 1

    @property
    def connected(self) -> bool:
        return self._wire is not None

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
        self._wire = _Wire(peer, take=self._take, is_wanted=self._asked.__contains__, lost=self._lost)
        self._wired.set()

    async def close(self) -> None:
        wire = self._wire
        self._unwire()
        if wire is not None:
            await wire.ended()

    async def _ask(self, question: EgressToHsm, into: memoryview, deadline: Deadline) -> KeyMaterial:
        deadline = deadline.earlier(_ANSWER_SECONDS)
        number, self._next_id = self._next_id, self._next_id + 1
        try:
            async with deadline.timeout():
                wire = await self._current_wire()
                frame = EgressToHsmFrame(id=number, deadline_boot_time_ns=deadline.boot_time_ns, body=question)
                octets = encode_frame(frame)
                asked = _Asked(into=into, answered=asyncio.get_running_loop().create_future())
                self._asked[number] = asked
                wire.write(number, octets)
                return await asked.answered
        except (TimeoutError, BadFrame):
            wipe(into)
            raise _unavailable() from None
        except BaseException:
            wipe(into)
            raise
        finally:
            self._asked.pop(number, None)

    async def _current_wire(self) -> "_Wire":
        async with asyncio.timeout(_WIRING_SECONDS):
            await self._wired.wait()
        if self._wire is None:
            raise _unavailable()
        return self._wire

    def _lost(self, wire: "_Wire") -> None:
        if wire is self._wire:
            self._unwire()

    def _unwire(self) -> None:
        wire, self._wire = self._wire, None
        self._wired.clear()
        for asked in self._asked.values():
            if not asked.answered.done():
                asked.answered.set_exception(_unavailable())
        if wire is not None:
            wire.end()

    def _take(self, frame: HsmToEgressFrame) -> None:
        asked = self._asked.get(frame.id)
        if asked is None or asked.answered.done():
            return  # it did not wait that long
        try:
            asked.answered.set_result(_taken(frame, asked.into))
        except CustodyError as error:
            asked.answered.set_exception(error)


class _Wire:
    """One socket to hsm, from its wiring to its end. `lost` is called once when it is of no use any more."""

    def __init__(
        self,
        peer: socket.socket,
        *,
        take: Callable[[HsmToEgressFrame], None],
        is_wanted: Callable[[int], bool],
        lost: Callable[["_Wire"], None],
    ) -> None:
        peer.settimeout(0)
        self._peer = peer
        self._take = take
        self._is_wanted = is_wanted
        self._lost = lost
        self._decoder = decoder_for(HsmToEgressFrame)
        self._outgoing: deque[tuple[int, bytearray]] = deque()
        self._more = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._tasks = (loop.create_task(self._read()), loop.create_task(self._write()))
        for task in self._tasks:
            task.add_done_callback(self._one_ended)

    def write(self, number: int, frame: bytearray) -> None:
        """Behind what waits already; as many wait as there are askers, and the gateway's socket bounds those."""
        self._outgoing.append((number, frame))
        self._more.set()

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _one_ended(self, _: "asyncio.Task[None]") -> None:
        self.end()
        self._lost(self)
        if all(task.done() for task in self._tasks):
            # Not before: the loop still watches the descriptor for who is left.
            self._peer.close()

    async def _write(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._outgoing:
                number, frame = self._outgoing.popleft()
                if not self._is_wanted(number):
                    continue
                try:
                    await asyncio.get_running_loop().sock_sendall(self._peer, frame)
                except OSError:
                    return

    async def _read(self) -> None:
        try:
            with SecretBuffer(_MAX_ANSWER_BYTES) as buffer:
                while await self._read_frame(buffer.view):
                    pass
        except (OSError, BadFrame, msgspec.MsgspecError, UnicodeDecodeError):
            return  # whatever it was, the link is of no use

    async def _read_frame(self, buffer: memoryview) -> bool:
        receive = asyncio.get_running_loop().sock_recv_into
        try:
            if not await _fill(receive, self._peer, buffer[: HEADER.size]):
                return False
            length = frame_length(buffer[: HEADER.size])
            if length > len(buffer):
                raise BadFrame("hsm answers with a frame that is too long")
            if not await _fill(receive, self._peer, buffer[:length]):
                return False
            self._take(self._decoder.decode(buffer[:length]))
            return True
        finally:
            wipe(buffer)


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
