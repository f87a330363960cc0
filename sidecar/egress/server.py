"""The gateway's socket: frames in, one task each, frames out.

Rules:
- A frame that does not parse ends the process; so does the end of the socket. There is no other peer.
- At most `MAX_IN_FLIGHT` requests are worked on; one more is answered Unavailable at once. What has a bound of its own is
  always taken: a payment that was prepared must not fail, nor look as if it might have been made, because reads are many.
- Every request has a deadline, and a little of it is kept to say that it passed.
- What a task raises becomes a Failure of `sidecar.errors`; anything unexpected becomes INTERNAL, with no text of its own.
"""

import asyncio
from typing import Final, assert_never, cast

import msgspec

from sidecar.domain.provider import TokenGrant, TokensRefused
from sidecar.egress.deadline import Deadline
from sidecar.egress.log import log
from sidecar.egress.service import Egress
from sidecar.errors import CustodyError, Internal, Unavailable
from sidecar.ipc.frames import HEADER, BadFrame, encode_frame, frame_length
from sidecar.ipc.messages import (
    Call,
    Discard,
    Done,
    EgressToGateway,
    EgressToGatewayFrame,
    Forget,
    GatewayToEgress,
    GatewayToEgressFrame,
    GetEgressStatus,
    GetImportKey,
    Granted,
    GrantRefused,
    ImportKeyIs,
    ImportTokens,
    NewSecrets,
    Ping,
    Pong,
    Prepare,
    PreparedHandle,
    RequestTokens,
    Send,
    decoder_for,
    failure_of,
    outcome_message,
)

__all__ = ["MAX_IN_FLIGHT", "GatewayServer"]

MAX_IN_FLIGHT: Final = 1024
_REPORTING_SECONDS: Final = 0.05
# A Send waits only under a handle that Prepare gave out; the others never wait.
_ALWAYS_TAKEN: Final = (Send, Discard, Forget, Ping, GetEgressStatus)


class GatewayServer(asyncio.Protocol):
    """`ended` completes when the socket is over: True if the gateway closed it, False if it broke the protocol."""

    def __init__(self, egress: Egress) -> None:
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._egress = egress
        self._decoder = decoder_for(GatewayToEgressFrame)
        self._received = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytearray] = []

    async def close(self) -> None:
        """Cancels what is being worked on and waits for it."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flush()
        if self._transport is not None:
            self._transport.abort()

    # -- the event loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not registered as such

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while not self.ended.done() and (frame := self._next_frame()) is not None:
                self._accept(frame)
        except (BadFrame, msgspec.MsgspecError, UnicodeDecodeError):  # the last for a text that is not UTF-8
            log("error", "gateway_broke_the_protocol", "the gateway sent a frame that is not of our protocol")
            self._end(by_gateway=False)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (an end is an end)
        self._end(by_gateway=True)

    def pause_writing(self) -> None:
        """The gateway reads slower than we answer: take no more work from it until it does."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    # -- frames

    def _next_frame(self) -> GatewayToEgressFrame | None:
        if len(self._received) < HEADER.size:
            return None
        end = HEADER.size + frame_length(self._received[: HEADER.size])
        if len(self._received) < end:
            return None
        frame: GatewayToEgressFrame
        with memoryview(self._received) as view, view[HEADER.size : end] as document:
            frame = self._decoder.decode(document)
        del self._received[:end]
        return frame

    def _accept(self, frame: GatewayToEgressFrame) -> None:
        if len(self._tasks) >= MAX_IN_FLIGHT and not isinstance(frame.body, _ALWAYS_TAKEN):
            self._answer(
                frame.id, failure_of(Unavailable("PROVIDER_UNAVAILABLE", "too many requests are being worked on"))
            )
            return
        task = asyncio.get_running_loop().create_task(self._work(frame))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, frame: GatewayToEgressFrame) -> None:
        deadline = _with_time_to_report(Deadline(frame.deadline_boot_time_ns))
        try:
            body = await answer_to(frame.body, self._egress, deadline)
        except CustodyError as error:
            body = failure_of(error)
        except Exception as error:  # noqa: BLE001 (the boundary: nothing of a foreign exception leaves)
            log(
                "error",
                "request_failed",
                "a request failed unexpectedly",
                operation=type(frame.body).__name__,
                error_class=type(error).__name__,
            )
            body = failure_of(Internal())
        self._answer(frame.id, body)

    def _answer(self, number: int, body: EgressToGateway) -> None:
        """Answers of one turn of the loop go out together."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(encode_frame(EgressToGatewayFrame(id=number, body=body)))

    def _flush(self) -> None:
        frames, self._outgoing = self._outgoing, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(frames)

    def _end(self, *, by_gateway: bool) -> None:
        if not self.ended.done():
            self.ended.set_result(by_gateway)


async def answer_to(body: GatewayToEgress, egress: Egress, deadline: Deadline) -> EgressToGateway:
    match body:
        case Ping():
            return Pong()
        case Call():
            outcome = await egress.call(
                body.request,
                wrapped_data_key=body.wrapped_data_key,
                secrets=body.secrets,
                own_connection=body.own_connection,
                deadline=deadline,
            )
            return outcome_message(outcome)
        case RequestTokens():
            return await _answer_to_token_request(body, egress, deadline)
        case Prepare():
            handle = await egress.prepare(
                body.request, wrapped_data_key=body.wrapped_data_key, secrets=body.secrets, deadline=deadline
            )
            return PreparedHandle(handle=handle)
        case Send():
            send_before = Deadline(body.send_before_boot_time_ns)
            return outcome_message(await egress.send(body.handle, send_before=send_before, deadline=deadline))
        case NewSecrets():
            return await egress.new_secrets(body.context, deadline=deadline)
        case ImportTokens():
            return await egress.import_tokens(
                key_id=body.key_id,
                sealed_tokens=body.sealed_tokens,
                info=body.info,
                seal_access_as=body.seal_access_as,
                seal_refresh_as=body.seal_refresh_as,
                deadline=deadline,
            )
        case GetImportKey():
            key_id, public_key = egress.import_key()
            return ImportKeyIs(key_id=key_id, public_key=public_key)
        case Discard():
            egress.discard(body.handle)
            return Done()
        case Forget():
            egress.forget(body.wrapped_data_key)
            return Done()
        case GetEgressStatus():
            return egress.status()
        case _:
            assert_never(body)


async def _answer_to_token_request(body: RequestTokens, egress: Egress, deadline: Deadline) -> EgressToGateway:
    outcome = await egress.request_tokens(
        body.request,
        wrapped_data_key=body.wrapped_data_key,
        secrets=body.secrets,
        seal_access_as=body.seal_access_as,
        seal_refresh_as=body.seal_refresh_as,
        deadline=deadline,
    )
    match outcome:
        case TokenGrant():
            return Granted(
                access_token=outcome.access_token,
                refresh_token=outcome.refresh_token,
                expires_in_seconds=outcome.expires_in_seconds,
                scope=outcome.scope,
            )
        case TokensRefused():
            return GrantRefused(status=outcome.status, error=outcome.error)
        case _:
            return outcome_message(outcome)


def _with_time_to_report(deadline: Deadline) -> Deadline:
    kept_seconds = min(_REPORTING_SECONDS, deadline.remaining_seconds / 10)
    return Deadline(deadline.boot_time_ns - int(kept_seconds * 1e9))
