"""The one boundary: every call passes here, in this order: identity, deadline, limits, method table, shape; then the servicer.

Requests come as bytes and are parsed here: what gRPC itself answers to bytes that it cannot parse has no reason and no details.
Every error becomes a status here. An unexpected one becomes INTERNAL with a request id: gRPC would send its text to the caller.
"""

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import Message
from prometheus_client import Counter, Histogram

from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller, Policy
from sidecar.domain.ids import WorkloadId
from sidecar.errors import CustodyError, Exhausted, Internal, Refused, Unauthenticated, Unavailable
from sidecar.gateway.identity import Identity
from sidecar.gateway.methods import METHODS, SURFACE_ROLES
from sidecar.gateway.ratelimit import RateLimiter
from sidecar.gateway.status import code_of, details_metadata, status_of
from sidecar.gateway.validation import RequestValidator
from sidecar.ports import Store
from sidecar.telemetry.logging import Log
from sidecar.telemetry.metrics import Metrics

__all__ = ["Boundary", "Draining", "Refusals", "current_caller"]

Handler = Callable[[Any, Any], Awaitable[Any]]
StreamHandler = Callable[[Any, Any], AsyncIterator[Any] | Awaitable[None]]
Parser = Callable[[bytes], Message]
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic in the stubs only
RpcHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# A call with less time left than this is refused instead of begun: its caller would never learn the outcome.
_SHORTEST_DEADLINE_SECONDS = 0.1
_INFRASTRUCTURE = ("/grpc.health.v1.", "/grpc.reflection.")

_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """The caller of the RPC that is being handled."""
    return _caller.get()


class Draining:
    """Set once, when the sidecar begins to stop."""

    def __init__(self) -> None:
        self.began = False


class Refusals:
    """Puts refused calls on record, at most so many a second: a flood of them must not fill the log."""

    def __init__(self, *, store: Store, log: Log, per_second: int = 20) -> None:
        self._store = store
        self._log = log
        self._per_second = per_second
        self._second = 0
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def note(self, workload: WorkloadId | None, reason: str) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        if self._count > self._per_second:
            return
        task = asyncio.ensure_future(self._record(workload, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record(self, workload: WorkloadId | None, reason: str) -> None:
        draft = AuditDraft(
            event=AuditEvent.CALL_REFUSED, outcome=AuditOutcome.REFUSED, caller=workload or "", reason=reason
        )
        try:
            await self._store.record([draft])
        except CustodyError as error:
            self._log.error("refusal_not_recorded", reason=error.reason)


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """`surface` is `api` or `admin`; one boundary per listener, because a listener is what gives identity its meaning."""

    def __init__(
        self,
        *,
        surface: str,
        identity: Identity,
        policy: Policy,
        limiter: RateLimiter,
        validator: RequestValidator,
        refusals: Refusals,
        draining: Draining,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self._surface = surface
        self._roles = SURFACE_ROLES[surface]
        self._identity = identity
        self._policy = policy
        self._limiter = limiter
        self._validator = validator
        self._refusals = refusals
        self._draining = draining
        self._metrics = metrics
        self._log = log
        self._handlers: dict[str, RpcHandler] = {}
        self._callers: dict[WorkloadId, Caller] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler:
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return handler  # gRPC answers UNIMPLEMENTED; not kept, because anybody may make up methods
            guarded = self._handlers[method] = self._guarded(handler, method)
        return guarded

    def _guarded(self, handler: RpcHandler, method: str) -> RpcHandler:
        """The handler behind this boundary; it is given the request's bytes."""
        parser = cast(Parser, handler.request_deserializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method, parser), response_serializer=handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(cast(StreamHandler, handler.unary_stream), method, parser),
                response_serializer=handler.response_serializer,
            )
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(cast(StreamHandler, handler.stream_stream), method, parser),
                response_serializer=handler.response_serializer,
            )
        raise TypeError("no method of the contract streams requests only")

    def _unary(self, inner: Handler, method: str, parser: Parser) -> Handler:
        series = _Series(metrics=self._metrics, method=method, kind="unary")

        async def call(data: bytes, context: Context) -> Message:
            rpc = _Rpc(series)
            try:
                with self._admitted(method, context):
                    response: Message = await inner(self._request(method, data, parser), context)
                rpc.code = grpc.StatusCode.OK
                return response
            except Exception as error:
                await self._abort(error, rpc, context)
                raise
            finally:
                rpc.done()

        return call

    def _stream(self, inner: StreamHandler, method: str, parser: Parser) -> Callable[..., AsyncIterator[Any]]:
        one_request = _Series(metrics=self._metrics, method=method, kind="server_stream")
        many_requests = _Series(metrics=self._metrics, method=method, kind="bidi_stream")

        async def call(data: bytes | AsyncIterator[bytes], context: Context) -> AsyncIterator[Message]:
            rpc = _Rpc(one_request if isinstance(data, bytes) else many_requests)
            try:
                with self._admitted(method, context):
                    request = (
                        self._request(method, data, parser)
                        if isinstance(data, bytes)
                        else self._requests(method, data, parser)
                    )
                    answers = inner(request, context)
                    if inspect.isawaitable(answers):  # gRPC's own health servicer writes its answers to the context
                        await answers
                    else:
                        async for answer in answers:
                            yield answer
                rpc.code = grpc.StatusCode.OK
            except Exception as error:
                await self._abort(error, rpc, context)
                raise
            finally:
                rpc.done()

        return call

    def _request(self, method: str, data: bytes, parser: Parser) -> Message:
        request = self._validator.parse(data, parser)
        if not method.startswith(_INFRASTRUCTURE):  # their messages are not of our contract and carry no rules
            self._validator.check(request)
        return request

    async def _requests(self, method: str, stream: AsyncIterator[bytes], parser: Parser) -> AsyncIterator[Message]:
        async for data in stream:
            yield self._request(method, data, parser)

    @contextmanager
    def _admitted(self, method: str, context: Context) -> Iterator[None]:
        """Lets the call in or raises. The order matters: nothing is told to whom nothing may be told."""
        workload: WorkloadId | None = None
        entered = False
        try:
            workload = self._identity.workload(context.auth_context())
            self._check_time(method, context)
            self._enter(workload)
            entered = True
            _caller.set(self._permitted(workload, method))
            yield
        except (Unauthenticated, Refused) as refusal:
            self._metrics.calls_refused.labels(refusal.reason).inc()
            self._refusals.note(workload, refusal.reason)
            raise
        finally:
            if entered:
                self._limiter.leave()

    def _enter(self, workload: WorkloadId) -> None:
        try:
            self._limiter.enter(workload)
        except Exhausted as limit:  # counted, but not put on record: a record for each would be the flood's next victim
            self._metrics.calls_refused.labels(limit.reason).inc()
            raise

    def _check_time(self, method: str, context: Context) -> None:
        if self._draining.began and not method.startswith(_INFRASTRUCTURE):
            raise Unavailable("SHUTTING_DOWN", "the sidecar is stopping; try again", retry_after_seconds=1)
        left = context.time_remaining()
        if left is not None and left < _SHORTEST_DEADLINE_SECONDS:
            raise CustodyError("DEADLINE_TOO_SHORT", "less than 100 ms were left: nothing was begun")

    def _permitted(self, workload: WorkloadId, method: str) -> Caller:
        caller = self._callers.get(workload)
        if caller is None:
            known = self._policy.caller(workload)
            if known is None:
                raise Unauthenticated("CALLER_UNKNOWN", "the policy does not know this workload")
            caller = self._callers[workload] = known.acting_as(self._roles)
        if not caller.roles & METHODS.get(method, frozenset()):
            raise Refused("METHOD_NOT_ALLOWED", "this caller may not use this method here")
        return caller

    async def _abort(self, error: Exception, rpc: "_Rpc", context: Context) -> None:
        if isinstance(error, grpc.aio.AbortError):
            rpc.code = _status_code(context)  # a servicer of gRPC's own (health) has aborted
            return
        request_id = str(uuid.uuid4())
        if not isinstance(error, CustodyError):
            self._log.exception("call_failed", error, method=rpc.method, request_id=request_id)
            error = Internal()
            reason = ""
        else:
            reason = error.reason
        status = status_of(error, request_id=request_id)
        rpc.code = code_of(status)
        if reason and rpc.code is grpc.StatusCode.INTERNAL:  # the caller got nothing but the request id
            self._log.error("call_answered_internal", method=rpc.method, request_id=request_id, reason=reason)
        await context.abort(rpc.code, status.message, trailing_metadata=details_metadata(status))


class _Series:
    """The time series of one method, each looked up once: by their labels they are found more slowly than they are counted."""

    def __init__(self, *, metrics: Metrics, method: str, kind: str) -> None:
        self.method = method
        service, _, name = method.lstrip("/").partition("/")
        self._labels = (kind, service, name)
        self._metrics = metrics
        self._started: Counter | None = None
        self._done: dict[grpc.StatusCode, tuple[Counter, Histogram]] = {}

    def begin(self) -> None:
        if self._started is None:
            self._started = self._metrics.grpc_started.labels(*self._labels)
        self._started.inc()

    def end(self, code: grpc.StatusCode, seconds: float) -> None:
        if code not in self._done:
            labels = (*self._labels, _CODE_NAMES[code])
            self._done[code] = self._metrics.grpc_handled.labels(*labels), self._metrics.grpc_seconds.labels(*labels)
        handled, took = self._done[code]
        handled.inc()
        took.observe(seconds)


class _Rpc:
    """One RPC, counted when it begins and when it is done."""

    __slots__ = ("_began", "_series", "code")

    def __init__(self, series: _Series) -> None:
        self.code = grpc.StatusCode.CANCELLED
        self._series = series
        self._began = time.monotonic()
        series.begin()

    @property
    def method(self) -> str:
        return self._series.method

    def done(self) -> None:
        self._series.end(self.code, time.monotonic() - self._began)


def _status_code(context: Context) -> grpc.StatusCode:
    """The code that was set on `context`, which gRPC keeps as a number."""
    code: object = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(cast(int, code), grpc.StatusCode.UNKNOWN)


_CODES = {code.value[0]: code for code in grpc.StatusCode}
# go-grpc-prometheus spells codes like Go does: NotFound, not NOT_FOUND; and Canceled.
_CODE_NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}
