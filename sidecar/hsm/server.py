"""Answers two sockets from one thread: the gateway's, which signs and manages master keys, and egress's, which gets data keys.

Rules:
- Each socket has its own decoder, and the decoder knows only that socket's operations. Anything else ends the connection;
  on the gateway's socket it ends the process, because the parent speaks rubbish.
- A request whose deadline has passed is answered with a failure and never reaches the HSM.
- A data key is opened straight into the frame that carries it, and the frame is wiped when the kernel has it.
- Sockets never block, and what waits for a slow reader is bounded.
- The sockets take turns, a few requests each: a full one keeps neither the other nor the pings waiting.
- A fault of the HSM fails the request that met it and ends the process: a new one starts with a new login and keys found anew.
- The process ends when the gateway closes its socket.
"""

import selectors
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, assert_never

import msgspec

from sidecar.domain.provider import KeyPurpose
from sidecar.errors import CustodyError, Refused, Unavailable
from sidecar.hsm.errors import HsmFault
from sidecar.hsm.log import log
from sidecar.hsm.vault import Vault, data_key_id
from sidecar.ipc.frames import HEADER, BadFrame, boot_time_ns, encode_frame, frame_length
from sidecar.ipc.messages import (
    ChildExit,
    CreateDataKey,
    CreateMasterKey,
    DataKeyCreated,
    DataKeyOpened,
    EgressToHsm,
    EgressToHsmFrame,
    Envelope,
    Failure,
    GatewayToHsm,
    GatewayToHsmFrame,
    GetHsmStatus,
    HsmStatus,
    HsmToEgress,
    HsmToEgressFrame,
    HsmToGateway,
    HsmToGatewayFrame,
    LoadMasterKeys,
    MasterKeyCreated,
    MasterKeysLoaded,
    OpenDataKey,
    Ping,
    Pong,
    Sign,
    Signature,
    decoder_for,
    failure_of,
)
from sidecar.sealing import KEY_BYTES
from sidecar.secretbuffer import wipe

__all__ = ["ConnectionEnded", "HsmServer", "SignsDigests"]

_READ_BYTES: Final = 65_536
_MAX_WAITING_BYTES: Final = 4 * 1024 * 1024
_FRAMES_PER_TURN: Final = 8
# msgpack: a binary of 32 bytes. `key` is the last field of its message and the message the last of its envelope.
_KEY_FIELD: Final = b"\xa3key\xc4\x20" + bytes(KEY_BYTES)


class SignsDigests(Protocol):
    def sign(self, digest: bytes) -> bytes: ...


class ConnectionEnded(Exception):
    """The peer closed, or broke the rules (`bad`)."""

    def __init__(self, *, bad: bool) -> None:
        super().__init__("the connection ended")
        self.bad = bad


class HsmServer:
    """`run` returns how the process ends. `status` makes the answer to GetHsmStatus."""

    def __init__(
        self,
        *,
        gateway: socket.socket,
        wiring: socket.socket,
        vault: Vault,
        root_key_id: str,
        signing_keys: dict[KeyPurpose, SignsDigests],
        status: Callable[[], HsmStatus],
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._vault = vault
        self._root_key_id = root_key_id
        self._signing_keys = signing_keys
        self._status = status
        self._wiring = wiring
        self._gateway = _Connection(gateway, GatewayToHsmFrame, self._answer_gateway)
        self._egress: _Connection | None = None
        self._fault: HsmFault | None = None

    def run(self) -> ChildExit:
        self._wiring.settimeout(0)
        self._selector.register(self._wiring, selectors.EVENT_READ)
        self._watch(self._gateway)
        try:
            while self._fault is None:
                self._take_turns()
        except ConnectionEnded as ended:
            return ChildExit.BAD_PEER if ended.bad else ChildExit.STOPPED
        return ChildExit.SICK

    def _take_turns(self) -> None:
        in_hand = [connection for connection in (self._gateway, self._egress) if connection and connection.has_request]
        ready = self._selector.select(0 if in_hand else None)
        events_of = {key.data: events for key, events in ready if key.fileobj is not self._wiring}
        for connection in {**dict.fromkeys(in_hand, 0), **events_of}:
            self._serve(connection, events_of.get(connection, 0))
        if self._fault is None and any(key.fileobj is self._wiring for key, _ in ready):
            self._take_egress()

    def _serve(self, connection: "_Connection", events: int) -> None:
        if self._fault is not None:
            return
        if connection is self._gateway:
            self._exchange(connection, events)
        elif connection is self._egress:
            try:
                self._exchange(connection, events)
            except ConnectionEnded as ended:
                self._drop_egress(bad=ended.bad)

    def _exchange(self, connection: "_Connection", events: int) -> None:
        if events & selectors.EVENT_WRITE:
            connection.flush()
        if connection.has_request:
            connection.answer_a_few()
        elif events & selectors.EVENT_READ:
            connection.read_and_answer()
        self._selector.modify(connection.socket, connection.interest, connection)

    def _watch(self, connection: "_Connection") -> None:
        self._selector.register(connection.socket, connection.interest, connection)

    # -- wiring: each message brings egress's newest socket, which replaces the older one

    def _take_egress(self) -> None:
        message, descriptors, flags, _ = socket.recv_fds(self._wiring, 64, 4)
        if not message and not descriptors:
            raise ConnectionEnded(bad=False)
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        if len(sockets) != 1 or flags & socket.MSG_CTRUNC:
            for surplus in sockets:
                surplus.close()
            raise ConnectionEnded(bad=True)
        if self._egress is not None:
            self._drop_egress(bad=False)
        self._egress = _Connection(sockets[0], EgressToHsmFrame, self._answer_egress)
        self._watch(self._egress)

    def _drop_egress(self, *, bad: bool) -> None:
        if self._egress is None:
            return
        if bad:
            log(
                "error",
                "egress_broke_the_protocol",
                "egress sent what hsm does not understand; its connection is closed",
            )
        self._selector.unregister(self._egress.socket)
        self._egress.close()
        self._egress = None

    # -- operations

    def _answer_gateway(self, request: GatewayToHsmFrame) -> bytearray:
        body: HsmToGateway
        try:
            self._check_may_start(request)
            body = self._for_gateway(request.body)
        except CustodyError as error:
            body = failure_of(error)
        except HsmFault as fault:
            body = self._failed(fault)
        return encode_frame(HsmToGatewayFrame(id=request.id, body=body))

    def _for_gateway(self, operation: GatewayToHsm) -> HsmToGateway:
        match operation:
            case Ping():
                return Pong()
            case Sign():
                return Signature(value=self._signer(operation.purpose).sign(operation.digest))
            case LoadMasterKeys():
                self._vault.load(operation.keys)
                return MasterKeysLoaded(count=len(operation.keys))
            case CreateMasterKey():
                _check_version(operation.version)
                key = self._vault.create_master_key(operation.version)
                return MasterKeyCreated(key=key, root_key_id=self._root_key_id)
            case GetHsmStatus():
                return self._status()
            case _:
                assert_never(operation)

    def _signer(self, purpose: KeyPurpose) -> SignsDigests:
        try:
            return self._signing_keys[purpose]  # the root key is not among them
        except KeyError:
            raise Refused("METHOD_NOT_ALLOWED", "there is no signing key for this purpose") from None

    def _answer_egress(self, request: EgressToHsmFrame) -> bytearray:
        body: HsmToEgress
        try:
            self._check_may_start(request)
            return self._for_egress(request.id, request.body)
        except CustodyError as error:
            body = failure_of(error)
        except HsmFault as fault:
            body = self._failed(fault)
        return encode_frame(HsmToEgressFrame(id=request.id, body=body))

    def _for_egress(self, request_id: int, operation: EgressToHsm) -> bytearray:
        match operation:
            case Ping():
                return encode_frame(HsmToEgressFrame(id=request_id, body=Pong()))
            case CreateDataKey():
                return self._create_data_key(request_id, operation)
            case OpenDataKey():
                return self._open_data_key(request_id, operation)
            case _:
                assert_never(operation)

    def _create_data_key(self, request_id: int, operation: CreateDataKey) -> bytearray:
        key = bytearray(KEY_BYTES)
        try:
            made = self._vault.create_data_key(operation.context, key)
            body = DataKeyCreated(wrapped=made.wrapped, key_id=made.key_id, key=memoryview(bytes(KEY_BYTES)))
            frame = encode_frame(HsmToEgressFrame(id=request_id, body=body))
            _key_place(frame)[:] = key
        finally:
            wipe(key)
        return frame

    def _open_data_key(self, request_id: int, operation: OpenDataKey) -> bytearray:
        body = DataKeyOpened(key_id=data_key_id(operation.context), key=memoryview(bytes(KEY_BYTES)))
        frame = encode_frame(HsmToEgressFrame(id=request_id, body=body))
        # Opened into its place in the frame: there is no other copy to wipe.
        self._vault.open_data_key(operation.wrapped, operation.context, _key_place(frame))
        return frame

    def _check_may_start(self, request: Envelope) -> None:
        if boot_time_ns() >= request.deadline_boot_time_ns:
            raise Unavailable("HSM_UNAVAILABLE", "the request's deadline had passed before the HSM was asked")
        if self._fault is not None:
            raise Unavailable("HSM_UNAVAILABLE", "the HSM failed on an earlier request; try again")

    def _failed(self, fault: HsmFault) -> Failure:
        self._fault = fault
        log("error", "hsm_fault", "the HSM failed an operation; this process ends to be replaced", cause=fault.cause)
        return failure_of(Unavailable("HSM_UNAVAILABLE", "the HSM failed; try again"))


class _Connection:
    """One peer's socket: reads whole frames, answers each, keeps what the peer does not read yet."""

    def __init__(self, peer: socket.socket, frame_type: type[Envelope], answer: Callable[[Any], bytearray]) -> None:
        peer.settimeout(0)
        self.socket = peer
        self._decoder = decoder_for(frame_type)
        self._answer = answer
        self._received = bytearray()
        self._has_whole_frame = False
        self._waiting: deque[bytearray] = deque()
        self._sent_of_first = 0
        self._waiting_bytes = 0

    @property
    def interest(self) -> int:
        """While answers wait for the peer, no further request of its is read."""
        return selectors.EVENT_WRITE if self._waiting else selectors.EVENT_READ

    @property
    def has_request(self) -> bool:
        """Whether a whole request is here and may be answered, without anything new from the peer."""
        return self._has_whole_frame and not self._waiting

    def read_and_answer(self) -> None:
        """Raises ConnectionEnded."""
        try:
            octets = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionEnded(bad=False) from error
        if not octets:
            raise ConnectionEnded(bad=False)
        self._received += octets
        self.answer_a_few()

    def answer_a_few(self) -> None:
        """At most `_FRAMES_PER_TURN`. Raises ConnectionEnded."""
        start = 0
        for _ in range(_FRAMES_PER_TURN):
            body = self._next_body(start)
            if body is None:
                break
            self._put(self._answer(self._decoded(body)))
            start = body.stop
        del self._received[:start]
        self._has_whole_frame = self._next_body(0) is not None
        self.flush()

    def flush(self) -> None:
        """Writes what the kernel takes. Raises ConnectionEnded when the peer is gone."""
        while self._waiting:
            first, *others = self._waiting
            try:
                with memoryview(first) as view, view[self._sent_of_first :] as rest:
                    sent = self.socket.sendmsg((rest, *others))
            except BlockingIOError:
                return
            except OSError as error:
                raise ConnectionEnded(bad=False) from error
            self._waiting_bytes -= sent
            self._sent_of_first += sent
            while self._waiting and self._sent_of_first >= len(self._waiting[0]):
                self._sent_of_first -= len(self._waiting[0])
                wipe(self._waiting.popleft())

    def close(self) -> None:
        for frame in self._waiting:
            wipe(frame)
        self._waiting.clear()
        self.socket.close()

    def _next_body(self, start: int) -> slice | None:
        """Where the next frame's document lies, or None while it is not here whole."""
        begin = start + HEADER.size
        if len(self._received) < begin:
            return None
        try:
            end = begin + frame_length(self._received[start:begin])
        except BadFrame as error:
            raise ConnectionEnded(bad=True) from error
        return slice(begin, end) if len(self._received) >= end else None

    def _decoded(self, body: slice) -> Envelope:
        try:
            with memoryview(self._received) as view, view[body] as document:
                return self._decoder.decode(document)  # type: ignore[no-any-return]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # the last for a text that is not UTF-8
            raise ConnectionEnded(bad=True) from error

    def _put(self, frame: bytearray) -> None:
        if self._waiting_bytes + len(frame) > _MAX_WAITING_BYTES:
            wipe(frame)
            raise ConnectionEnded(bad=True)
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)


def _key_place(frame: bytearray) -> memoryview:
    """Where the 32 bytes of a data key lie in its frame."""
    if not frame.endswith(_KEY_FIELD):
        raise AssertionError("a data key's frame has another layout")
    return memoryview(frame)[-KEY_BYTES:]


def _check_version(version: int) -> None:
    if not 1 <= version < 2**32:
        raise Refused("METHOD_NOT_ALLOWED", "a master key has a version from 1")
