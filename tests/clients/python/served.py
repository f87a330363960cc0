"""A gRPC server of the whole contract over a Unix socket, which answers as FakeCustody does: for tests of the wire.

What the fake refuses goes out as google.rpc.Status, as the sidecar's does. `raw_failures` lets a test answer with any status.
"""

import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from custody._contract import Method, _methods
from custody.errors import CustodyError
from custody.testing import FakeCustody
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

__all__ = ["Served", "served"]


@dataclass(slots=True, kw_only=True)
class Served:
    """A running server.

    `seen` holds each attempt that arrived: method, request, and the seconds left of its deadline. `peers` holds the common
    name in the certificate of each.
    """

    fake: FakeCustody
    address: str
    server: grpc.Server
    health: health.HealthServicer
    seen: list[tuple[str, Message, float]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    raw_failures: deque[Callable[[grpc.ServicerContext], None]] = field(default_factory=deque)

    def attempts(self, method: str) -> list[Message]:
        return [request for name, request, _ in self.seen if name == method]

    def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self.health.set("", status.SERVING if serving else status.NOT_SERVING)


@contextmanager
def served(
    fake: FakeCustody | None = None,
    *,
    credentials: grpc.ServerCredentials | None = None,
    tcp: bool = False,
    address: str | None = None,
    register_health: bool = True,
) -> Iterator[Served]:
    """Serve a fake until the block ends, on `address` or else on a fresh Unix socket (or loopback TCP)."""
    folder = Path(tempfile.mkdtemp(prefix="cu"))
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    address = address or ("127.0.0.1:0" if tcp else f"unix:{folder}/s")
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    state = Served(
        fake=fake or FakeCustody(),
        address=f"127.0.0.1:{port}" if tcp else address,
        server=server,
        health=health.HealthServicer(),
    )
    if register_health:
        health_pb2_grpc.add_HealthServicer_to_server(state.health, server)
        state.set_serving(True)
    server.add_generic_rpc_handlers((_Handlers(state),))
    server.start()
    try:
        yield state
    finally:
        server.stop(grace=None).wait(10)
        shutil.rmtree(folder, ignore_errors=True)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its types only
    def __init__(self, state: Served) -> None:
        self._state = state
        self._by_path = {method.path: (name, method) for name, method in _methods().items()}
        self._lock = threading.Lock()

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        found = self._by_path.get(details.method)
        return _handler(self._state, self._lock, *found) if found else None


def _handler(state: Served, lock: threading.Lock, name: str, method: Method) -> "grpc.RpcMethodHandler[Any, Any]":
    def note(request: Message, context: grpc.ServicerContext) -> None:
        with lock:
            state.seen.append((name, request, context.time_remaining()))
            authenticated: Any = context.auth_context()  # lists of bytes, whatever the types say
            state.peers += [name.decode() for name in authenticated.get("x509_common_name", ())]
            fail = state.raw_failures.popleft() if state.raw_failures else None
        if fail:
            fail(context)

    def answer(request: Message, context: grpc.ServicerContext) -> Any:
        note(request, context)
        try:
            return state.fake.invoke(name, request)
        except CustodyError as error:
            abort(context, error)

    def stream(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        note(request, context)
        try:
            yield from state.fake.stream(name, request)
        except CustodyError as error:
            abort(context, error)

    serialize = method.response_type.SerializeToString
    parse = method.request_type.FromString
    if name == "AuditService.ExportLog":
        return grpc.unary_stream_rpc_method_handler(stream, parse, serialize)
    return grpc.unary_unary_rpc_method_handler(answer, parse, serialize)


def abort(context: grpc.ServicerContext, error: CustodyError) -> None:
    """Answer with an error as the contract has it."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain="custody.v1", metadata=dict(error.metadata))
    ]
    if error.field_violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, reason=v.rule, description=v.description)
            for v in error.field_violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMicroseconds(int(error.retry_after_seconds * 1e6))
        details.append(retry)
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=error.message)
    for detail in details:
        status.details.add().Pack(detail)
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    context.set_trailing_metadata(trailers)
    context.abort(grpc.StatusCode[error.code], error.message)
