"""Nobody gets in who should not: every method of every listener, called by everybody."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest
from grpc.experimental import session_cache  # type: ignore[attr-defined]
from grpc_reflection.v1alpha import reflection_pb2

from sidecar.domain.caller import Role
from sidecar.gateway.methods import METHODS, SURFACE_ROLES
from tests.rpc.calls import Method, Outcome, call, contract_methods, every_method
from tests.rpc.conftest import LISTENERS, POLICY, Rpc
from tests.rpc.pki import SERVER, Authority, Credential

EVERY_METHOD = every_method()
ADMINISTRATION = ("custody.v1.KeyService", "custody.v1.AuditService")
REFUSED_INSIDE = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)
STRANGER = Authority(name="another CA")
DAY = timedelta(days=1)

# Those whom TLS itself keeps out: their connection is never made.
KEPT_OUT: dict[str, Callable[[Rpc], Credential | None]] = {
    "no certificate": lambda rpc: None,
    "another CA": lambda rpc: STRANGER.workload("application"),
    "another CA of the same name": lambda rpc: Authority(name=rpc.authority.name).workload("application"),
    "expired": lambda rpc: rpc.authority.workload("application", starts=-2 * DAY, ends=-DAY),
    "not yet valid": lambda rpc: rpc.authority.workload("application", starts=DAY, ends=2 * DAY),
    "certificate for servers": lambda rpc: rpc.authority.workload("application", usage=SERVER),
}


def _named(*uris: str, **options: Any) -> Callable[[Rpc], Credential]:
    return lambda rpc: rpc.authority.issue(uris=uris, **options)


# Those whom TLS lets in, because our CA vouches for them, but whose name is none of ours.
UNKNOWN: dict[str, Callable[[Rpc], Credential]] = {
    "a workload without a row in the policy": _named("spiffe://custody.test/unknown"),
    "another trust domain": _named("spiffe://other.test/application"),
    "a trust domain that begins like ours": _named("spiffe://custody.test.evil.example/application"),
    "two names": _named("spiffe://custody.test/application", "spiffe://custody.test/other-application"),
    "a second URI": _named("spiffe://custody.test/application", "https://custody.test/"),
    "scheme in capitals": _named("SPIFFE://custody.test/application"),
    "trust domain in capitals": _named("spiffe://CUSTODY.test/application"),
    "path in capitals": _named("spiffe://custody.test/APPLICATION"),
    "a step up": _named("spiffe://custody.test/x/../application"),
    "a step nowhere": _named("spiffe://custody.test/./application"),
    "an empty segment": _named("spiffe://custody.test//application"),
    "a slash at the end": _named("spiffe://custody.test/application/"),
    "no path": _named("spiffe://custody.test"),
    "an escaped character": _named("spiffe://custody.test/applicatio%6e"),
    "a blank": _named("spiffe://custody.test/application "),
    "a query": _named("spiffe://custody.test/application?x=1"),
    "a fragment": _named("spiffe://custody.test/application#x"),
    "a port": _named("spiffe://custody.test:1/application"),
    "a user": _named("spiffe://x@custody.test/application"),
    "the name of a bound socket": _named("workload:shop"),
    "no name but a common name": _named(common_name="spiffe://custody.test/application"),
    "no name at all": _named(),
    "a DNS name": lambda rpc: rpc.authority.issue(dns=("custody.test",)),
}


def test_every_method_of_the_contract_has_a_row() -> None:
    """A method that is added without saying who may call it fails here; so does a row for a method that is not there."""
    assert {method.path for method in EVERY_METHOD} == set(METHODS)


def test_the_table_says_what_the_contract_says() -> None:
    """What the walk goes by, held to the contract's words: who moves money or opens consents is an application on the API, and
    nobody is an application and an administrator in one place."""
    by_service = {method.service: set[frozenset[Role]]() for method in contract_methods()}
    for method in contract_methods():
        by_service[method.service].add(METHODS[method.path])

    assert {"api": {Role.APPLICATION}, "admin": {Role.ADMINISTRATOR, Role.AUDITOR}} == SURFACE_ROLES
    assert by_service["custody.v1.KeyService"] == {frozenset({Role.ADMINISTRATOR})}
    assert by_service["custody.v1.AuditService"] == {frozenset({Role.ADMINISTRATOR, Role.AUDITOR})}
    assert by_service["custody.v1.AccountService"] == {frozenset({Role.APPLICATION})}
    for name in ("CreateConsent", "CompleteConsent", "GetImportKey", "ImportConsent"):
        assert METHODS[f"/custody.v1.ConsentService/{name}"] == {Role.APPLICATION}
    assert METHODS["/custody.v1.PaymentService/InitiatePayment"] == {Role.APPLICATION}
    assert METHODS["/custody.v1.PaymentService/ResolvePayment"] == {Role.ADMINISTRATOR}
    assert METHODS["/custody.v1.SigningService/Sign"] == {Role.APPLICATION}


@pytest.mark.parametrize("listener", LISTENERS)
def test_reflection_names_no_other_service(rpc: Rpc, methods: dict[str, Method], listener: str) -> None:
    """What a listener says it serves is what the walk below tries; an API listener does not even have administration."""
    workload = "administrator" if listener.endswith("admin") else "application"
    request = reflection_pb2.ServerReflectionRequest(list_services="*")

    for version in ("v1", "v1alpha"):
        method = methods[f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"]
        answer = call(rpc.as_workload(workload, listener), method, request).answer
        assert answer is not None
        names = {service.name for service in answer.list_services_response.service}  # type: ignore[attr-defined]
        walked = {method.service for method in EVERY_METHOD} - {"grpc.reflection.v1.ServerReflection"}
        assert names == (walked if listener.endswith("admin") else walked - set(ADMINISTRATION))


@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.parametrize("name", KEPT_OUT)
def test_tls_keeps_them_out_of_every_method(rpc: Rpc, name: str, listener: str) -> None:
    """Without a certificate that our CA issued, that is valid now and that is a client's, no method can be reached."""
    channel = rpc.channel(KEPT_OUT[name](rpc), listener)

    let_in = [str(method) for method in EVERY_METHOD if call(channel, method).code is not grpc.StatusCode.UNAVAILABLE]

    assert let_in == []


@pytest.mark.parametrize("listener", LISTENERS)
def test_plaintext_reaches_no_method(rpc: Rpc, listener: str) -> None:
    """A TLS listener answers nothing to a client that does not speak TLS."""
    channel = rpc.plaintext(listener)

    let_in = [str(method) for method in EVERY_METHOD if call(channel, method).code is not grpc.StatusCode.UNAVAILABLE]

    assert let_in == []


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_that_are_none_of_ours(rpc: Rpc, name: str) -> None:
    """Our CA vouches for them, and still no method of any surface answers them but with UNAUTHENTICATED."""
    for listener in ("tcp-api", "unix-admin"):
        channel = rpc.channel(UNKNOWN[name](rpc), listener)
        outcomes = {str(method): call(channel, method) for method in EVERY_METHOD if _is_served(method, listener)}

        assert {outcome.code for outcome in outcomes.values()} == {grpc.StatusCode.UNAUTHENTICATED}
        assert {outcome.reason for outcome in outcomes.values()} == {"CALLER_UNKNOWN"}


@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.parametrize("workload", POLICY)
def test_known_workloads_get_what_the_table_says(rpc: Rpc, workload: str, listener: str) -> None:
    """Every row of the policy on every listener: let in exactly where the method table and the surface say so."""
    roles = {Role(role) for role in POLICY[workload]["roles"]} & SURFACE_ROLES[listener.partition("-")[2]]
    channel = rpc.as_workload(workload, listener)
    wrong = {}

    for method in EVERY_METHOD:
        outcome = call(channel, method)
        expected = _is_served(method, listener) and bool(roles & METHODS[method.path])
        reason = "METHOD_NOT_ALLOWED"
        if str(method) == "GetImportKey" and expected and not POLICY[workload].get("imports"):
            expected, reason = False, "POLICY_REFUSED"
        if _was_let_in(outcome) is not expected:
            wrong[str(method)] = outcome
        elif _is_served(method, listener) and not expected:
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.PERMISSION_DENIED, reason)

    assert wrong == {}


@pytest.mark.parametrize(
    ("surface", "roles"), [("api", {Role.APPLICATION}), ("admin", {Role.ADMINISTRATOR, Role.AUDITOR})]
)
def test_bound_sockets(rpc: Rpc, surface: str, roles: set[Role]) -> None:
    """A bound socket is its one workload, whatever a caller says of itself in metadata."""
    channel = rpc.application if surface == "api" else rpc.operator
    claims = (
        ("x-forwarded-client-cert", "URI=spiffe://custody.test/all-roles"),
        ("x-spiffe-id", "spiffe://custody.test/administrator"),
        ("authorization", "Bearer administrator"),
    )

    for method in EVERY_METHOD:
        outcome = call(channel, method, metadata=claims)
        expected = _is_served(method, f"unix-{surface}") and bool(roles & METHODS[method.path])
        assert _was_let_in(outcome) is expected, f"{method}: {outcome}"


def test_the_walk_would_notice() -> None:
    """The walk has something to find: of the contract's methods there are those for each role and for none of the others."""
    rows = {method.path: METHODS[method.path] for method in contract_methods()}

    assert any(row == {Role.APPLICATION} for row in rows.values())
    assert any(row == {Role.ADMINISTRATOR} for row in rows.values())
    assert any(Role.AUDITOR in row and Role.APPLICATION not in row for row in rows.values())


def test_certificate_expires_on_an_open_connection(rpc: Rpc, methods: dict[str, Method]) -> None:
    """The connection lives on, the caller does not: each call looks at the dates again."""
    channel = rpc.channel(rpc.authority.workload("application", ends=timedelta(seconds=4)), "tcp-api")
    method = methods["ListProviders"]
    assert call(channel, method).code is grpc.StatusCode.OK

    outcome = _until_refused(channel, method)

    assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_EXPIRED")


def test_certificate_expires_between_resumed_connections(rpc: Rpc, methods: dict[str, Method]) -> None:
    """TLS resumption does not check a certificate again; the call does."""
    credential = rpc.authority.workload("application", ends=timedelta(seconds=4))
    cache = (("grpc.ssl_session_cache", session_cache.ssl_session_cache_lru(4)),)
    method = methods["ListProviders"]
    first = rpc.channel(credential, "tcp-api", options=cache)
    assert call(first, method).code is grpc.StatusCode.OK
    first.close()
    time.sleep(5)

    outcome = call(rpc.channel(credential, "tcp-api", options=cache), method)

    assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_EXPIRED")


def test_refusals_are_on_record(rpc: Rpc, methods: dict[str, Method]) -> None:
    """Who was refused for what stands in the log, with the name that the certificate proved."""
    call(rpc.as_workload("nothing"), methods["GetStatus"])
    call(rpc.as_workload("auditor", "tcp-admin"), methods["GetStatus"])

    request = methods["ListEntries"].request_type(newest_first=True)
    end = time.monotonic() + 10
    seen: set[tuple[str, str, str]] = set()
    wanted = ("CALL_REFUSED", "spiffe://custody.test/auditor", "METHOD_NOT_ALLOWED")
    while wanted not in seen and time.monotonic() < end:
        time.sleep(1.1)  # at most so many refusals a second are recorded; the tests before made many
        call(rpc.as_workload("auditor", "tcp-admin"), methods["GetStatus"])
        answer = call(rpc.operator, methods["ListEntries"], request).answer
        assert answer is not None
        seen = {(entry.event, entry.caller, entry.reason) for entry in answer.entries}  # type: ignore[attr-defined]

    assert wanted in seen


def _is_served(method: Method, listener: str) -> bool:
    return listener.endswith("admin") or method.service not in ADMINISTRATION


def _was_let_in(outcome: Outcome) -> bool:
    """Whether a servicer could see the call. A request without its required fields is refused only after that."""
    return outcome.code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT) and outcome.code not in REFUSED_INSIDE


def _until_refused(channel: grpc.Channel, method: Method) -> Outcome:
    end = time.monotonic() + 20
    while True:
        outcome = call(channel, method)
        if outcome.code is not grpc.StatusCode.OK or time.monotonic() > end:
            return outcome
        time.sleep(0.2)
