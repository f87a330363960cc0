"""The boundary in front of a real grpc.aio server: how every error is told, and that nothing of an unexpected one is."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import pytest
from custody.v1 import account_pb2 as pb
from custody.v1 import account_pb2_grpc, audit_pb2, audit_pb2_grpc
from google.rpc import error_details_pb2
from prometheus_client import CollectorRegistry

from sidecar.domain.audit import AuditDraft
from sidecar.domain.caller import Policy, Role, WorkloadPolicy
from sidecar.domain.ids import WorkloadId
from sidecar.errors import (
    Corrupt,
    CustodyError,
    Exhausted,
    FieldViolation,
    InvalidField,
    PreconditionFailed,
    StaleVersion,
    Unavailable,
)
from sidecar.gateway.boundary import Boundary, Draining, Refusals, current_caller
from sidecar.gateway.identity import BoundSocketIdentity
from sidecar.gateway.ratelimit import RateLimiter
from sidecar.gateway.validation import RequestValidator
from sidecar.ports import Store
from sidecar.telemetry.logging import Log
from sidecar.telemetry.metrics import Metrics
from tests.rpc.calls import Method, Outcome, details_of, reasons
from tests.rpc.calls import call as called

RULES = dict(reasons())
LIST = Method(
    path="/custody.v1.AccountService/ListAccounts",
    request_type=pb.ListAccountsRequest,
    response_type=pb.ListAccountsResponse,
)
EXPORT = Method(
    path="/custody.v1.AuditService/ExportLog",
    request_type=audit_pb2.ExportLogRequest,
    response_type=audit_pb2.ExportLogResponse,
    server_streaming=True,
)
REQUEST = pb.ListAccountsRequest(consent="consents/c-1", owner="person-1")
SECRET = "zzsecret"


class Records:
    """A store that only takes records."""

    def __init__(self) -> None:
        self.drafts: list[AuditDraft] = []

    async def record(self, drafts: Sequence[AuditDraft]) -> None:
        self.drafts += drafts


class Servicer(account_pb2_grpc.AccountServiceServicer, audit_pb2_grpc.AuditServiceServicer):
    """Does what the test says."""

    def __init__(self, act: Callable[[], Awaitable[None]]) -> None:
        self._act = act

    async def ListAccounts(self, request: object, context: object) -> pb.ListAccountsResponse:  # noqa: N802
        await self._act()
        return pb.ListAccountsResponse()

    async def ExportLog(  # noqa: N802
        self, request: object, context: object
    ) -> AsyncIterator[audit_pb2.ExportLogResponse]:
        yield audit_pb2.ExportLogResponse(chunk=b"first")
        await self._act()


class Running:
    def __init__(self, *, surface: str = "api", calls_per_second: float = 1000) -> None:
        self.registry = CollectorRegistry()
        self.log = io.StringIO()
        self.records = Records()
        self.draining = Draining()
        log = Log(process="gateway", stream=self.log)
        workload = WorkloadId("workload:shop")
        roles = frozenset({Role.APPLICATION if surface == "api" else Role.AUDITOR})
        self.boundary = Boundary(
            surface=surface,
            identity=BoundSocketIdentity(name="shop"),
            policy=Policy(workloads={workload: WorkloadPolicy(workload=workload, roles=roles)}),
            limiter=RateLimiter(calls_per_second=calls_per_second, concurrent_calls=100),
            validator=RequestValidator(message_bytes=1024),
            refusals=Refusals(store=cast(Store, self.records), log=log),
            draining=self.draining,
            metrics=Metrics(registry=self.registry),
            log=log,
        )
        self._address = ""

    @asynccontextmanager
    async def serving(self, act: Callable[[], Awaitable[None]]) -> AsyncIterator["Running"]:
        server = grpc.aio.server(interceptors=[self.boundary])
        servicer: Any = Servicer  # what it does not implement is not called
        account_pb2_grpc.add_AccountServiceServicer_to_server(servicer(act), server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(servicer(act), server)
        self._address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)

    async def call(self, method: Method = LIST, request: Any = REQUEST, **options: Any) -> Outcome:
        def blocking() -> Outcome:
            with grpc.insecure_channel(self._address) as channel:
                return called(channel, method, request if method is LIST else b"", **options)

        return await asyncio.to_thread(blocking)

    def handled(self, code: str) -> float:
        labels = {"grpc_type": "unary", "grpc_service": "custody.v1.AccountService", "grpc_method": "ListAccounts"}
        return self.registry.get_sample_value("grpc_server_handled_total", {**labels, "grpc_code": code}) or 0.0


def answered(error: BaseException | None, **options: Any) -> tuple[Outcome, Running]:
    """What a caller is told when the servicer raises `error`."""

    async def act() -> None:
        if error is not None:
            raise error

    async def scenario() -> tuple[Outcome, Running]:
        async with Running().serving(act) as running:
            return await running.call(**options), running

    return asyncio.run(scenario())


@pytest.mark.parametrize("reason", RULES)
def test_every_reason_is_told_as_the_contract_says(reason: str) -> None:
    """Code and details come from the reason's row in the contract, whatever class of error carries the reason."""
    rule = RULES[reason]
    codes = set()
    for error in (
        CustodyError(reason, "a message", metadata={"provider": "p"}),
        Unavailable(reason, "a message", metadata={"provider": "p"}),
        PreconditionFailed(reason, "a message", metadata={"provider": "p"}),
    ):
        outcome, running = answered(error)
        assert outcome.status is not None
        codes.add(outcome.code.value[0])
        names = [packed.TypeName() for packed in outcome.status.details]
        assert names == ["google.rpc.ErrorInfo", *(f"google.rpc.{name}" for name in rule.details)]
        assert (outcome.reason, dict(outcome.info.metadata)) == (reason, {"provider": "p"})
        assert outcome.message == "a message"
        assert running.handled(_go_name(outcome.code)) == 1
    assert codes == {rule.code}


@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRET),
        RuntimeError({"token": SECRET}),
        KeyError(SECRET),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
        AssertionError(SECRET),
        ExceptionGroup(SECRET, [ValueError(SECRET)]),
        grpc.RpcError(SECRET),
        StopAsyncIteration(SECRET),
        TimeoutError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unexpected_error(error: Exception) -> None:
    """An error that nobody thought of becomes INTERNAL with a request id; its text goes neither to the caller nor to the log,
    which has its class and place under the same id."""
    outcome, running = answered(error)

    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert SECRET.encode() not in outcome.shown()
    assert type(error).__name__.encode() not in outcome.shown()
    (info,) = details_of(outcome.status, error_details_pb2.RequestInfo)
    (line,) = [json.loads(line) for line in running.log.getvalue().splitlines()]
    assert SECRET not in running.log.getvalue()
    assert (line["event"], line["request_id"], line["error_class"]) == (
        "call_failed",
        info.request_id,
        type(error).__name__,
    )
    assert running.handled("Internal") == 1


@pytest.mark.parametrize("error", [StaleVersion(), Corrupt("NO_SUCH_REASON", SECRET)], ids=["stale", "unknown reason"])
def test_error_that_the_contract_does_not_have(error: CustodyError) -> None:
    """An error of ours that should not have come this far is INTERNAL, and the log has its reason under the request id."""
    outcome, running = answered(error)

    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert SECRET.encode() not in outcome.shown()
    (info,) = details_of(outcome.status, error_details_pb2.RequestInfo)
    (line,) = [json.loads(line) for line in running.log.getvalue().splitlines()]
    assert (line["request_id"], line["reason"]) == (info.request_id, error.reason)


def test_error_in_the_middle_of_a_stream() -> None:
    """A stream that has begun ends with a status like any call; the error's text is not in it."""

    async def act() -> None:
        raise ValueError(SECRET)

    async def scenario() -> None:
        async with (
            Running(surface="admin").serving(act) as running,
            grpc.aio.insecure_channel(running._address) as channel,
        ):
            stub: Any = channel.unary_stream(EXPORT.path, None, EXPORT.response_type.FromString)
            answers = stub(b"", timeout=10)
            assert (await answers.read()).chunk == b"first"
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await answers.read()
            assert refusal.value.code() is grpc.StatusCode.INTERNAL
            assert SECRET not in str(refusal.value.details())

    asyncio.run(scenario())


def test_violations_are_told_by_field() -> None:
    """BadRequest has each violation with path, rule and description."""
    outcome, _ = answered(
        InvalidField(
            FieldViolation(field="a.b[1]", rule="string.max_len", description="is too long"),
            FieldViolation(field="c", rule="required", description="is missing"),
        )
    )

    assert outcome.violations == {"a.b[1]": "STRING_MAX_LEN", "c": "REQUIRED"}
    assert dict(outcome.info.metadata) == {"field": "a.b[1]", "rule": "string.max_len"}


def test_delay_is_told() -> None:
    """How long to wait comes from the error."""
    outcome, _ = answered(Exhausted("RATE_LIMITED", "wait", retry_after_seconds=2.5))

    (info,) = details_of(outcome.status, error_details_pb2.RetryInfo)
    assert info.retry_delay.ToMilliseconds() == 2500


def test_caller_is_the_sockets_in_its_role_here() -> None:
    """The servicer sees the caller, with the roles that count on this surface, and each call its own."""
    seen: list[tuple[str, frozenset[Role]]] = []

    async def act() -> None:
        seen.append((current_caller().workload, current_caller().roles))

    async def scenario() -> None:
        async with Running().serving(act) as running:
            await running.call()

    asyncio.run(scenario())
    assert seen == [("workload:shop", frozenset({Role.APPLICATION}))]


def test_nothing_reaches_the_servicer_that_is_refused() -> None:
    """Draining, too little time, wrong form, too large, not allowed: the servicer never sees the call."""
    seen: list[str] = []

    async def act() -> None:
        seen.append("called")

    async def scenario() -> list[str]:
        async with Running().serving(act) as running:
            outcomes = [
                await running.call(request=b"\xff"),
                await running.call(request=pb.ListAccountsRequest()),
                await running.call(request=bytes(1025)),
                await running.call(EXPORT),
            ]
            running.draining.began = True
            outcomes.append(await running.call())
            return [outcome.reason for outcome in outcomes]

    assert asyncio.run(scenario()) == [
        "FIELD_INVALID",
        "FIELD_INVALID",
        "MESSAGE_TOO_LARGE",
        "METHOD_NOT_ALLOWED",
        "SHUTTING_DOWN",
    ]
    assert seen == []


def test_cancelled_call_is_counted_as_such() -> None:
    """A call that its caller gives up is Canceled in the metrics, and makes room again."""
    began = asyncio.Event

    async def scenario() -> None:
        started = began()

        async def act() -> None:
            started.set()
            await asyncio.sleep(60)

        async with Running().serving(act) as running, grpc.aio.insecure_channel(running._address) as channel:
            stub: Any = channel.unary_unary(LIST.path, None, None)
            pending = stub(REQUEST.SerializeToString(), timeout=30)
            await asyncio.wait_for(started.wait(), 10)
            pending.cancel()
            for _ in range(100):
                if running.handled("Canceled"):
                    break
                await asyncio.sleep(0.05)
            assert running.handled("Canceled") == 1

    asyncio.run(scenario())


def test_refusals_on_record_are_bounded() -> None:
    """A flood of refused calls is counted whole, and put on record up to a bound a second."""

    async def act() -> None:
        return

    async def scenario() -> tuple[int, float]:
        async with Running().serving(act) as running, grpc.aio.insecure_channel(running._address) as channel:
            stub: Any = channel.unary_stream(EXPORT.path, None, None)
            for _ in range(100):
                await stub(b"", timeout=10).code()
            count = running.registry.get_sample_value("custody_calls_refused_total", {"reason": "METHOD_NOT_ALLOWED"})
            return len(running.records.drafts), count or 0.0

    recorded, counted = asyncio.run(scenario())
    assert counted == 100
    assert 1 <= recorded <= 80  # 20 in each second that the loop took


def _go_name(code: grpc.StatusCode) -> str:
    return code.name.title().replace("_", "")
