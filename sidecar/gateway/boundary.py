"""The one boundary: every call passes here, in this order: deadline, identity, method table, limits, shape; then the servicer.

Every error becomes a status here. An unexpected one becomes INTERNAL with a request id: gRPC would send its text to the caller.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import Message

from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller, Policy
from sidecar.domain.ids import WorkloadId
from sidecar.errors import CustodyError, Internal, Refused, Unauthenticated, Unavailable
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
StreamHandler = Callable[[Any, Any], AsyncIterator[Any]]
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

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler  # gRPC answers UNIMPLEMENTED
        return self._guarded(handler, handler_call_details.method)

    def _guarded(self, handler: RpcHandler, method: str) -> RpcHandler:
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(cast(StreamHandler, handler.unary_stream), method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(cast(StreamHandler, handler.stream_stream), method),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _unary(self, inner: Handler, method: str) -> Handler:
        async def call(request: Message, context: Context) -> Message:
            rpc = _Rpc(metrics=self._metrics, method=method, kind="unary")
            try:
                with self._admitted(method, request, context):
                    response: Message = await inner(request, context)
                rpc.code = grpc.StatusCode.OK
                return response
            except Exception as error:
                await self._abort(error, rpc, context)
                raise
            finally:
                rpc.done()

        return call

    def _stream(
        self, inner: Callable[[Any, Any], AsyncIterator[Any]], method: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: object, context: Context) -> AsyncIterator[Message]:
            rpc = _Rpc(metrics=self._metrics, method=method, kind="server_stream")
            try:
                with self._admitted(method, request if isinstance(request, Message) else None, context):
                    async for answer in inner(request, context):
                        yield answer
                rpc.code = grpc.StatusCode.OK
            except Exception as error:
                await self._abort(error, rpc, context)
                raise
            finally:
                rpc.done()

        return call

    @contextmanager
    def _admitted(self, method: str, request: Message | None, context: Context) -> Iterator[None]:
        """Lets the call in or raises. The order matters: nothing is told to whom nothing may be told."""
        workload: WorkloadId | None = None
        entered = False
        try:
            self._check_time(method, context)
            workload = self._identity.workload(context.auth_context())
            self._limiter.enter(workload)
            entered = True
            _caller.set(self._permitted(workload, method))
            if request is not None and not method.startswith(_INFRASTRUCTURE):
                self._validator.check(request)
            yield
        except (Unauthenticated, Refused) as refusal:
            self._metrics.calls_refused.labels(refusal.reason).inc()
            self._refusals.note(workload, refusal.reason)
            raise
        finally:
            if entered:
                self._limiter.leave()

    def _check_time(self, method: str, context: Context) -> None:
        if self._draining.began and not method.startswith(_INFRASTRUCTURE):
            raise Unavailable("SHUTTING_DOWN", "the sidecar is stopping; try again", retry_after_seconds=1)
        left = context.time_remaining()
        if left is not None and left < _SHORTEST_DEADLINE_SECONDS:
            raise CustodyError("DEADLINE_TOO_SHORT", "less than 100 ms were left: nothing was begun")

    def _permitted(self, workload: WorkloadId, method: str) -> Caller:
        caller = self._policy.caller(workload)
        if caller is None:
            raise Unauthenticated("CALLER_UNKNOWN", "the policy does not know this workload")
        caller = caller.acting_as(self._roles)
        if not caller.roles & METHODS.get(method, frozenset()):
            raise Refused("METHOD_NOT_ALLOWED", "this caller may not use this method here")
        return caller

    async def _abort(self, error: Exception, rpc: "_Rpc", context: Context) -> None:
        if isinstance(error, grpc.aio.AbortError):
            rpc.code = context.code() or grpc.StatusCode.UNKNOWN  # a servicer of gRPC's own (health) has aborted
            return
        request_id = str(uuid.uuid4())
        if not isinstance(error, CustodyError):
            self._log.exception("call_failed", error, method=rpc.method, request_id=request_id)
            error = Internal()
        status = status_of(error, request_id=request_id)
        rpc.code = code_of(status)
        await context.abort(rpc.code, status.message, trailing_metadata=details_metadata(status))


class _Rpc:
    """The metrics of one RPC."""

    def __init__(self, *, metrics: Metrics, method: str, kind: str) -> None:
        self.method = method
        self.code = grpc.StatusCode.CANCELLED
        service, _, name = method.lstrip("/").partition("/")
        self._labels = (kind, service, name)
        self._metrics = metrics
        self._began = time.monotonic()
        metrics.grpc_started.labels(*self._labels).inc()

    def done(self) -> None:
        code = _CODE_NAMES[self.code]
        self._metrics.grpc_handled.labels(*self._labels, code).inc()
        self._metrics.grpc_seconds.labels(*self._labels, code).observe(time.monotonic() - self._began)


# go-grpc-prometheus spells codes like Go does: NotFound, not NOT_FOUND.
_CODE_NAMES = {
    code: "OK" if code is grpc.StatusCode.OK else code.name.title().replace("_", "") for code in grpc.StatusCode
}
