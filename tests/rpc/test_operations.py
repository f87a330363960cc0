"""A sidecar as its operator sees it: health, reflection, limits, sockets, probes, metrics, and how it stops."""

import http.client
import os
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.system import eventually
from tests.rpc.calls import Outcome, call, details_of, every_method, valid
from tests.rpc.conftest import OWN_CONNECTION, Rpc, started

METHODS = {name: method for method in every_method() for name in (str(method), method.path)}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def new_rpc() -> Iterator[Callable[..., Rpc]]:
    """Systems of a test's own, which it may break."""
    running: list[tuple[Rpc, Path]] = []

    def make(**changes: Any) -> Rpc:
        folder = Path(tempfile.mkdtemp(prefix="custody-rpc-"))
        rpc = started(folder, **changes)
        running.append((rpc, folder))
        return rpc

    yield make
    for rpc, folder in running:
        rpc.close()
        rpc.system.stop()
        shutil.rmtree(folder, ignore_errors=True)


# --- health and reflection -----------------------------------------------------------------------------------------------


def test_health_of_every_service(rpc: Rpc) -> None:
    """Check knows the server and each of its services, List names them, and neither knows another."""
    services = {method.service for method in METHODS.values() if method.service.startswith("custody.")}

    for service in ("", *services):
        answer = call(rpc.operator, METHODS["Check"], health_pb2.HealthCheckRequest(service=service)).answer
        assert answer == health_pb2.HealthCheckResponse(status=SERVING)
    listed = call(rpc.operator, METHODS["List"]).answer
    assert isinstance(listed, health_pb2.HealthListResponse)
    assert {name: status.status for name, status in listed.statuses.items()} == dict.fromkeys(services, SERVING)
    unknown = call(rpc.operator, METHODS["Check"], health_pb2.HealthCheckRequest(service="custody.v1.TokenService"))
    assert unknown.code is grpc.StatusCode.NOT_FOUND


def test_health_is_watched(rpc: Rpc) -> None:
    """Watch answers at once with what is, and with SERVICE_UNKNOWN for what is not served."""
    first = call(rpc.application, METHODS["Watch"]).answer
    unknown = call(rpc.application, METHODS["Watch"], health_pb2.HealthCheckRequest(service="x")).answer

    assert first == health_pb2.HealthCheckResponse(status=SERVING)
    assert unknown == health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_gives_the_contract(rpc: Rpc, version: str) -> None:
    """A tool without our protos can learn every service with its file, in both versions of the protocol."""
    method = METHODS[f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"]

    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="custody.v1.PaymentService")
    answer = call(rpc.application, method, request).answer
    assert isinstance(answer, reflection_pb2.ServerReflectionResponse)

    assert any(b"InitiatePaymentRequest" in file for file in answer.file_descriptor_response.file_descriptor_proto)


# --- limits --------------------------------------------------------------------------------------------------------------


def test_rate_limit_is_each_callers_own(new_rpc: Callable[..., Rpc]) -> None:
    """Who calls too often is told how long to wait; others are served meanwhile, and so is the one who has waited."""
    rpc = new_rpc(limits={"calls_per_second": 5, "concurrent_calls": 4})
    refused = _until(lambda: call(rpc.application, METHODS["ListProviders"]), lambda outcome: bool(outcome.status))

    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    (info,) = details_of(refused.status, error_details_pb2.RetryInfo)
    assert 0 < info.retry_delay.ToTimedelta().total_seconds() <= 1
    assert call(rpc.as_workload("application"), METHODS["ListProviders"]).code is grpc.StatusCode.OK
    assert call(rpc.operator, METHODS["GetStatus"]).code is grpc.StatusCode.OK
    time.sleep(info.retry_delay.ToTimedelta().total_seconds() + 0.3)
    assert call(rpc.application, METHODS["ListProviders"]).code is grpc.StatusCode.OK
    assert _metric(rpc, "custody_calls_refused_total", reason="RATE_LIMITED") >= 1

    _calls_in_flight(rpc)


def _calls_in_flight(rpc: Rpc) -> None:
    """More calls at a time than are allowed are refused, on this surface only; those that end make room."""
    channels = [grpc.insecure_channel(rpc.system.development.address, options=OWN_CONNECTION) for _ in range(2)]
    stubs: list[Any] = [channel.unary_stream(METHODS["Watch"].path, None, None) for channel in channels]
    watches = []
    for number in range(4):
        time.sleep(0.4)  # within the rate
        watch = stubs[number % 2](b"", timeout=60)
        next(iter(watch))
        watches.append(watch)
    time.sleep(0.4)
    refused = call(rpc.as_workload("application"), METHODS["ListProviders"])
    assert refused.reason == "RATE_LIMITED"
    assert call(rpc.operator, METHODS["GetStatus"]).code is grpc.StatusCode.OK

    for watch in watches:
        watch.cancel()
    freed = _until(
        lambda: call(rpc.as_workload("application"), METHODS["ListProviders"]),
        lambda outcome: outcome.code is grpc.StatusCode.OK,
        pause_seconds=0.4,
    )
    assert freed.code is grpc.StatusCode.OK
    for channel in channels:
        channel.close()


# --- sockets -------------------------------------------------------------------------------------------------------------


def test_sockets_are_for_their_owner_only(rpc: Rpc) -> None:
    """A socket, and its lock, is born with the mode of the configuration: nobody else's process can connect."""
    for address in (rpc.system.development.address, rpc.system.development.admin_address, rpc.addresses["unix-api"]):
        path = Path(address.removeprefix("unix:"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600


def test_socket_of_a_sidecar_that_died(new_rpc: Callable[..., Rpc]) -> None:
    """A socket file that a killed sidecar left is no obstacle: the next one serves on it."""
    rpc = new_rpc()
    rpc.system.sidecar.process.kill()
    rpc.system.sidecar.process.wait(20)
    assert Path(rpc.system.development.address.removeprefix("unix:")).exists()

    rpc.system.restart_sidecar()

    assert rpc.system.client.providers.list()


# --- probes and metrics --------------------------------------------------------------------------------------------------


def test_metrics_of_calls(rpc: Rpc) -> None:
    """Each RPC is counted by service, method, type and code in the names that gRPC dashboards know; refusals by reason."""
    labels = {"grpc_service": "custody.v1.ConsentService", "grpc_method": "GetConsent", "grpc_type": "unary"}
    before = _metric(rpc, "grpc_server_handled_total", **labels, grpc_code="NotFound")
    refused = _metric(rpc, "custody_calls_refused_total", reason="CALLER_UNKNOWN")
    call(rpc.application, METHODS["GetConsent"], valid(METHODS["GetConsent"]))
    call(rpc.as_workload("unknown"), METHODS["GetConsent"])
    call(rpc.operator, METHODS["Check"], health_pb2.HealthCheckRequest(service="x"))
    stub: Any = rpc.application.unary_stream(METHODS["Watch"].path, None, None)
    watch = stub(b"", timeout=60)
    next(iter(watch))
    watch.cancel()

    assert _metric(rpc, "grpc_server_handled_total", **labels, grpc_code="NotFound") == before + 1
    assert _metric(rpc, "grpc_server_handling_seconds_count", **labels, grpc_code="NotFound") == before + 1
    assert _metric(rpc, "grpc_server_started_total", **labels) >= before + 2
    assert _metric(rpc, "custody_calls_refused_total", reason="CALLER_UNKNOWN") == refused + 1
    health = {"grpc_service": "grpc.health.v1.Health"}
    assert _metric(rpc, "grpc_server_handled_total", **health, grpc_method="Check", grpc_code="NotFound") >= 1
    watched = {**health, "grpc_method": "Watch", "grpc_type": "server_stream", "grpc_code": "Canceled"}
    assert eventually(lambda: _metric(rpc, "grpc_server_handled_total", **watched), lambda count: count >= 1) >= 1


HTTP = {
    "a word": (b"hello\r\n\r\n", b"400"),
    "another method": (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
    "another path": (b"GET /secrets HTTP/1.1\r\n\r\n", b"404"),
    "a path that goes up": (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
    "a wrong Accept": (b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=x\r\n\r\n", b"200"),
    "an Accept that is sent back": (
        b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\x0bX-Evil: 1\r\n\r\n",
        b"200",
    ),
    "HTTP/0.9": (b"GET /metrics\r\n\r\n", b"400"),
}


@pytest.mark.parametrize("what", HTTP)
def test_operations_port_answers_nothing_else(rpc: Rpc, what: str) -> None:
    """What is no request for one of the four paths is refused in one line, and never sent back."""
    sent, status = HTTP[what]
    with socket.create_connection(("127.0.0.1", rpc.system.sidecar.operations_port), timeout=10) as raw:
        raw.sendall(sent)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"X-Evil" not in answer
    assert rpc.system.sidecar.get("/livez") == (200, "ok\n")


def test_operations_port_is_bounded(rpc: Rpc) -> None:
    """A head that never ends, and a hundred silent connections, keep Prometheus out for a moment and the sidecar not at all."""
    silent = [
        socket.create_connection(("127.0.0.1", rpc.system.sidecar.operations_port), timeout=10) for _ in range(100)
    ]
    with socket.create_connection(("127.0.0.1", rpc.system.sidecar.operations_port), timeout=10) as raw:
        try:
            raw.sendall(b"GET /metrics HTTP/1.1\r\n" + b"X-Long: " + b"a" * 100_000)
            assert raw.recv(100) == b""
        except ConnectionError:
            pass  # the other way of saying no
    assert call(rpc.application, METHODS["ListProviders"]).code is grpc.StatusCode.OK
    for connection in silent:
        connection.close()

    assert eventually(lambda: _livez(rpc), lambda ok: ok)


def test_ready_only_with_its_children(new_rpc: Callable[..., Rpc]) -> None:
    """While the hsm process hangs or is gone the probe and the callers hear of it; afterwards all is well by itself."""
    rpc = new_rpc()
    assert rpc.system.sidecar.get("/readyz")[0] == 200
    consent = rpc.system.shared_consent()

    os.kill(rpc.system.child("hsm").pid, signal.SIGSTOP)
    request = valid(METHODS["Sign"], consent=consent.name)
    outcome = call(rpc.application, METHODS["Sign"], request, timeout=20)
    not_ready = eventually(lambda: rpc.system.sidecar.get("/readyz")[0], lambda status: status != 200, seconds=5)

    assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "HSM_UNAVAILABLE")
    assert [packed.TypeName() for packed in outcome.status.details] == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]  # type: ignore[union-attr]
    assert not_ready in (200, 503)  # the new process may be there before the next look
    assert eventually(lambda: rpc.system.sidecar.get("/readyz")[0], lambda status: status == 200) == 200
    assert call(rpc.application, METHODS["Sign"], request, timeout=20).code is grpc.StatusCode.OK
    assert eventually(lambda: _metric(rpc, "custody_process_restarts_total", process="hsm"), lambda n: n >= 1) >= 1


# --- the end -------------------------------------------------------------------------------------------------------------


def test_graceful_stop(new_rpc: Callable[..., Rpc]) -> None:
    """A stop lets the payment in flight come to its end, refuses new calls with a reason, says so on every channel of health,
    and ends with status 0."""
    rpc = new_rpc()
    consent = rpc.system.consent()
    rpc.system.bank.set_fault("delay_after_commit", "/v1/payments", method="POST", seconds=2.5)
    payments: list[Any] = []
    paying = threading.Thread(target=lambda: payments.append(rpc.system.pay(consent, amount="1.00")))
    stub: Any = rpc.operator.unary_stream(METHODS["Watch"].path, None, health_pb2.HealthCheckResponse.FromString)
    watch = iter(stub(b"", timeout=60))
    assert next(watch).status == SERVING
    paying.start()
    assert eventually(lambda: rpc.system.bank.ledger(), lambda entries: len(entries) == 1)

    rpc.system.sidecar.process.terminate()
    watched = next(watch).status
    refused = call(rpc.application, METHODS["ListProviders"])
    ready = rpc.system.sidecar.get("/readyz")[0]
    health = call(rpc.application, METHODS["Check"]).answer
    paying.join(30)

    assert watched == NOT_SERVING
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert [packed.TypeName() for packed in refused.status.details] == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]  # type: ignore[union-attr]
    assert ready == 503
    assert health == health_pb2.HealthCheckResponse(status=NOT_SERVING)
    assert len(payments) == 1
    assert rpc.system.sidecar.process.wait(20) == 0


# --- helpers -------------------------------------------------------------------------------------------------------------


def _metric(rpc: Rpc, name: str, **labels: str) -> float:
    """The sum of the samples of this name with these labels."""
    status, text = rpc.system.sidecar.get("/metrics")
    assert status == 200
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _livez(rpc: Rpc) -> bool:
    try:
        return rpc.system.sidecar.get("/livez")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _until(
    look: Callable[[], Outcome], good: Callable[[Outcome], bool], *, tries: int = 50, pause_seconds: float = 0.0
) -> Outcome:
    outcome = look()
    for _ in range(tries):
        if good(outcome):
            break
        time.sleep(pause_seconds)
        outcome = look()
    return outcome
