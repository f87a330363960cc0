"""How a request reaches the sidecar: the two ports, and their gRPC adapters.

Both let out CustodyError only, give every call a deadline, and repeat only what `Retries` allows, byte for byte.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from custody._contract import Method, method_named
from custody._retry import Retries
from custody._settings import Settings, Tls
from custody.errors import CustodyError, UnavailableError, error_of

__all__ = ["AsyncGrpcTransport", "AsyncTransport", "GrpcTransport", "Transport"]

ChannelT = TypeVar("ChannelT", grpc.Channel, grpc.aio.Channel)

_HEALTH_POLL_SECONDS = 0.1
_HEALTH_ATTEMPT_SECONDS = 2.0


class Transport(Protocol):
    """Carries requests for a blocking client."""

    def invoke(self, method: str, request: Message, *, timeout_seconds: float | None) -> Message:
        """Answer a request of a method `Service.Method`; raises CustodyError."""

    def stream(self, method: str, request: Message, *, timeout_seconds: float | None) -> Iterator[Message]:
        """Answer a request of a streaming method; raises CustodyError."""

    def wait_ready(self, timeout_seconds: float) -> None:
        """Return when the sidecar serves; raises UnavailableError when it does not in time."""

    def close(self) -> None:
        """Give up the connection."""


class AsyncTransport(Protocol):
    """Carries requests for an asyncio client."""

    async def invoke(self, method: str, request: Message, *, timeout_seconds: float | None) -> Message:
        """Answer a request of a method `Service.Method`; raises CustodyError."""

    def stream(self, method: str, request: Message, *, timeout_seconds: float | None) -> AsyncIterator[Message]:
        """Answer a request of a streaming method; raises CustodyError."""

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return when the sidecar serves; raises UnavailableError when it does not in time."""

    async def close(self) -> None:
        """Give up the connection."""


class _Renewal(Generic[ChannelT]):
    """Keeps the channel of the day: when the TLS files are replaced, the next call is made on a new one.

    The old channel stays until the one after it is replaced in turn, so that calls on it come to their end.
    """

    def __init__(self, settings: Settings, connect: Callable[[], ChannelT]) -> None:
        self._tls = settings.tls
        self._connect: Callable[[], ChannelT] = connect
        self._lock = threading.Lock()
        self._fingerprint = self._tls.fingerprint() if self._tls else ()
        self._channels: deque[ChannelT] = deque([connect()], maxlen=2)
        self._closed = False

    def channel(self) -> ChannelT:
        """Answer with the channel for a call that begins now."""
        if self._closed:
            raise RuntimeError("the client is closed")
        with self._lock:
            if self._tls is not None:
                self._renew(self._tls)
            return self._channels[-1]

    def _renew(self, tls: Tls) -> None:
        try:
            found = tls.fingerprint()
            if found != self._fingerprint:
                self._channels.append(self._connect())
                self._fingerprint = found
        except FileNotFoundError:
            return  # between the old file and the new one; the channel that there is still serves

    def give_up(self) -> list[ChannelT]:
        """Take no more calls; answers with the channels to close."""
        self._closed = True
        return list(self._channels)


class GrpcTransport:
    """A gRPC connection for a blocking client. Safe to share between threads; not across fork."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._renewal = _Renewal(settings, self._connect)

    @property
    def channel(self) -> grpc.Channel:
        """The channel for a call that begins now."""
        return self._renewal.channel()

    def invoke(self, method: str, request: Message, *, timeout_seconds: float | None) -> Message:
        """Send a request, and again where that is safe, until the deadline."""
        target = method_named(method)
        retries = _retries(self._settings, target, timeout_seconds)
        while True:
            call = self.channel.unary_unary(target.path, _serialize, target.response_type.FromString)
            try:
                answer: Message = call(request, timeout=_left(retries))
            except grpc.RpcError as failure:
                error = error_of(failure, request_id=_request_id(request))
                pause = retries.pause_after(error, now_seconds=time.monotonic())
                if pause is None:
                    raise error from failure
                time.sleep(pause)
            else:
                return answer

    def stream(self, method: str, request: Message, *, timeout_seconds: float | None) -> Iterator[Message]:
        """Send a request once, and answer as the messages come."""
        target = method_named(method)
        timeout = timeout_seconds or self._settings.timeout_seconds
        call = self.channel.unary_stream(target.path, _serialize, target.response_type.FromString)
        answers: Any = call(request, timeout=timeout)  # an iterator and a call in one, which the types do not say
        try:
            yield from answers
        except grpc.RpcError as failure:
            raise error_of(failure, request_id=None) from failure
        finally:
            answers.cancel()

    def wait_ready(self, timeout_seconds: float) -> None:
        """Ask the health service until it answers SERVING."""
        deadline_seconds = time.monotonic() + timeout_seconds
        health = health_pb2_grpc.HealthStub(self.channel)
        while (left := deadline_seconds - time.monotonic()) > 0:
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=min(left, _HEALTH_ATTEMPT_SECONDS))
            except grpc.RpcError as failure:
                _raise_unless_passing(error_of(failure, request_id=None), failure)
            else:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(min(_HEALTH_POLL_SECONDS, max(0.0, deadline_seconds - time.monotonic())))
        raise _not_ready(timeout_seconds)

    def close(self) -> None:
        """Close the connection."""
        for channel in self._renewal.give_up():
            channel.close()

    def _connect(self) -> grpc.Channel:
        settings = self._settings
        if settings.tls is None:
            return grpc.insecure_channel(settings.address, settings.channel_options())
        return grpc.secure_channel(settings.address, settings.tls.credentials(), settings.channel_options())


class AsyncGrpcTransport:
    """A gRPC connection for an asyncio client, of one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._renewal = _Renewal(settings, self._connect)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        return self._renewal.channel()

    async def invoke(self, method: str, request: Message, *, timeout_seconds: float | None) -> Message:
        """Send a request, and again where that is safe, until the deadline."""
        target = method_named(method)
        retries = _retries(self._settings, target, timeout_seconds)
        while True:
            call = self.channel.unary_unary(target.path, _serialize, target.response_type.FromString)
            try:
                answer: Message = await call(request, timeout=_left(retries))
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure, request_id=_request_id(request))
                pause = retries.pause_after(error, now_seconds=time.monotonic())
                if pause is None:
                    raise error from failure
                await asyncio.sleep(pause)
            else:
                return answer

    async def stream(self, method: str, request: Message, *, timeout_seconds: float | None) -> AsyncIterator[Message]:
        """Send a request once, and answer as the messages come."""
        target = method_named(method)
        timeout = timeout_seconds or self._settings.timeout_seconds
        answers = self.channel.unary_stream(target.path, _serialize, target.response_type.FromString)(
            request, timeout=timeout
        )
        try:
            async for answer in answers:
                yield answer
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, request_id=None) from failure
        finally:
            answers.cancel()

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Ask the health service until it answers SERVING."""
        deadline_seconds = time.monotonic() + timeout_seconds
        health: Any = health_pb2_grpc.HealthStub(self.channel)
        while (left := deadline_seconds - time.monotonic()) > 0:
            try:
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=min(left, _HEALTH_ATTEMPT_SECONDS))
            except grpc.aio.AioRpcError as failure:
                _raise_unless_passing(error_of(failure, request_id=None), failure)
            else:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(min(_HEALTH_POLL_SECONDS, max(0.0, deadline_seconds - time.monotonic())))
        raise _not_ready(timeout_seconds)

    async def close(self) -> None:
        """Close the connection."""
        for channel in self._renewal.give_up():
            await channel.close(None)

    def _connect(self) -> grpc.aio.Channel:
        settings = self._settings
        if settings.tls is None:
            return grpc.aio.insecure_channel(settings.address, settings.channel_options())
        return grpc.aio.secure_channel(settings.address, settings.tls.credentials(), settings.channel_options())


def _retries(settings: Settings, method: Method, timeout_seconds: float | None) -> Retries:
    timeout_seconds = settings.timeout_seconds if timeout_seconds is None else timeout_seconds
    deadline_seconds = time.monotonic() + timeout_seconds
    return Retries(method=method, max_retries=settings.max_retries, deadline_seconds=deadline_seconds)


def _left(retries: Retries) -> float:
    """The sidecar sees the time that is truly left, so that it can refuse to begin what cannot end in it."""
    return max(0.001, retries.deadline_seconds - time.monotonic())


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _request_id(request: Message) -> str | None:
    return getattr(request, "request_id", None)


def _raise_unless_passing(error: CustodyError, failure: grpc.RpcError) -> None:
    """A sidecar that is not there yet, or slow, may come; one that does not know us will not by waiting."""
    if error.code not in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND"}:
        raise error from failure


def _not_ready(timeout_seconds: float) -> UnavailableError:
    return UnavailableError(f"the sidecar was not ready within {timeout_seconds:g} seconds", code="UNAVAILABLE")
