"""Calls by method name and raw bytes, and what came of them: the tests decide what is sent, no stub in between."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import grpc
from custody.v1 import (
    account_pb2,
    account_reference_pb2,
    audit_pb2,
    consent_pb2,
    errors_pb2,
    key_pb2,
    payment_pb2,
    periodic_limit_pb2,
    provider_pb2,
    psu_context_pb2,
    purpose_pb2,
    signing_pb2,
)
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from google.type import date_pb2, money_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

__all__ = ["FILES", "OWNER", "Method", "Outcome", "call", "contract_methods", "details_of", "every_method", "valid"]

OWNER = "person-1"
FILES = (consent_pb2, payment_pb2, account_pb2, signing_pb2, provider_pb2, key_pb2, audit_pb2)
Metadata = tuple[tuple[str, str | bytes], ...]
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, kw_only=True)
class Method:
    """`path` is `/package.Service/Method`."""

    path: str
    request_type: type[Message]
    response_type: type[Message]
    client_streaming: bool = False
    server_streaming: bool = False

    @property
    def service(self) -> str:
        return self.path.split("/")[1]

    def __str__(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`status` is the google.rpc.Status of an error, `answer` the first answer of a success."""

    code: grpc.StatusCode
    message: str = ""
    status: status_pb2.Status | None = None
    answer: Message | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    @property
    def info(self) -> error_details_pb2.ErrorInfo:
        """The one ErrorInfo; fails where there is none or more than one."""
        infos = details_of(self.status, error_details_pb2.ErrorInfo)
        assert len(infos) == 1, f"{self.code} {self.message!r} has {len(infos)} ErrorInfo"
        return infos[0]

    @property
    def reason(self) -> str:
        """The reason, "" for a success or an error of gRPC's own."""
        return self.info.reason if self.status else ""

    @property
    def violations(self) -> dict[str, str]:
        """Rule by field."""
        return {
            violation.field: violation.reason
            for request in details_of(self.status, error_details_pb2.BadRequest)
            for violation in request.field_violations
        }

    def shown(self) -> bytes:
        """Everything that the caller is shown."""
        metadata = b"".join(value if isinstance(value, bytes) else value.encode() for _, value in self.metadata)
        return self.message.encode() + metadata


def details_of(status: status_pb2.Status | None, kind: type[M]) -> list[M]:
    found = []
    for packed in status.details if status else ():
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


def contract_methods() -> list[Method]:
    """Every method of the contract, from its descriptors."""
    return [
        _method(f"/{service.full_name}/{method.name}", method)
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def every_method() -> list[Method]:
    """Every method that a listener may serve: the contract's, health, and both versions of reflection."""
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    reflection = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
    others = [_method(f"/{health.full_name}/{method.name}", method) for method in health.methods]
    others += [
        _method(f"/grpc.reflection.{version}.ServerReflection/{method.name}", method)
        for version in ("v1", "v1alpha")
        for method in reflection.methods
    ]
    return contract_methods() + others


def call(
    channel: grpc.Channel,
    method: Method,
    request: Message | bytes = b"",
    *,
    timeout: float | None = 10.0,
    metadata: Metadata = (),
) -> Outcome:
    """One call. Of a stream the first answer is taken, and the call is ended."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    try:
        if method.server_streaming:
            return _streamed(channel, method, data, timeout, metadata)
        stub = channel.unary_unary(method.path, None, method.response_type.FromString)
        answer = stub(data, timeout=timeout, metadata=metadata)
    except grpc.RpcError as error:
        return _refusal(error)
    return Outcome(code=grpc.StatusCode.OK, answer=answer)


def _streamed(channel: grpc.Channel, method: Method, data: bytes, timeout: float | None, metadata: Metadata) -> Outcome:
    answers: Any
    if method.client_streaming:
        both = channel.stream_stream(method.path, None, method.response_type.FromString)
        answers = both(iter([data]), timeout=timeout, metadata=metadata)
    else:
        stub = channel.unary_stream(method.path, None, method.response_type.FromString)
        answers = stub(data, timeout=timeout, metadata=metadata)
    first = next(iter(answers), None)
    answers.cancel()
    return Outcome(code=grpc.StatusCode.OK, answer=first)


def _refusal(error: Any) -> Outcome:
    metadata = tuple((key, value) for key, value in error.trailing_metadata() or ())
    packed = [value for key, value in metadata if key == "grpc-status-details-bin"]
    status = _status(packed[0]) if packed else None
    if status:
        assert (status.code, status.message) == (error.code().value[0], error.details())
    return Outcome(code=error.code(), message=error.details() or "", status=status, metadata=metadata)


def _status(data: Any) -> status_pb2.Status:
    status = status_pb2.Status()
    status.MergeFromString(data)
    return status


def _method(path: str, method: MethodDescriptor) -> Method:
    message_class: Any = GetMessageClass
    return Method(
        path=path,
        request_type=message_class(method.input_type),
        response_type=message_class(method.output_type),
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
    )


# --- requests that keep every rule --------------------------------------------------------------------------------------


def valid(method: Method, **changes: Any) -> Message:
    """A request that the rules of the contract accept, with every field set; what it names does not exist."""
    values = {**_VALID.get(str(method), dict)(), **changes}
    return method.request_type(**values)


def _in(days: int) -> Timestamp:
    time = Timestamp()
    time.FromDatetime(datetime.now(UTC) + timedelta(days=days))
    return time


def _euros(units: int = 12) -> money_pb2.Money:
    return money_pb2.Money(currency_code="EUR", units=units, nanos=340_000_000)


def _account(iban: str = "DE75512108001245126199") -> account_reference_pb2.AccountReference:
    return account_reference_pb2.AccountReference(iban=iban, currency_code="EUR")


def _psu() -> psu_context_pb2.PsuContext:
    return psu_context_pb2.PsuContext(ip_address="192.0.2.7", user_agent="tests")


def _owned() -> dict[str, Any]:
    return {"consent": "consents/c-0000000000000000000000ff", "owner": OWNER}


def _written() -> dict[str, Any]:
    return {"owner": OWNER, "request_id": str(uuid.uuid4())}


def _asked() -> dict[str, Any]:
    return {
        **_written(),
        "provider": "providers/sandbox-bank",
        "purposes": [purpose_pb2.PURPOSE_ACCOUNTS, purpose_pb2.PURPOSE_PAYMENTS],
        "accounts": [_account(), _account("DE02120300000000202051")],
        "expire_time": _in(30),
        "payment_limit": _euros(),
        "periodic_limits": [
            {
                "amount": _euros(units),
                "period_type": period_type,
                "alignment": periodic_limit_pb2.PERIOD_ALIGNMENT_CALENDAR,
            }
            for units, period_type in (
                (20, periodic_limit_pb2.PERIOD_TYPE_DAY),
                (50, periodic_limit_pb2.PERIOD_TYPE_MONTH),
            )
        ],
    }


_VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "CreateConsent": lambda: {
        **_asked(),
        "redirect_uri": "http://127.0.0.1:1/callback",
        "psu_context": _psu(),
    },
    "CompleteConsent": lambda: {
        **_owned(),
        **_written(),
        "code": "a-code",
        "state": "a-state",
        "iss": "https://bank.example",
        "error_description": "",
    },
    "ImportConsent": lambda: {
        **_asked(),
        "access_expire_time": _in(1),
        "provider_consent_id": "at-the-bank-1",
        "import_key_id": "0123456789abcdef",
        "sealed_tokens": bytes(200),
    },
    "GetConsent": _owned,
    "ListConsents": lambda: {"owner": OWNER, "page_size": 10},
    "RevokeConsent": lambda: {**_owned(), **_written()},
    "InitiatePayment": lambda: {
        **_owned(),
        **_written(),
        "amount": _euros(),
        "debtor_account": _account("DE02120300000000202051"),
        "creditor_account": _account(),
        "creditor_name": "Wholesale Ltd",
        "remittance_information": "invoice 17",
        "end_to_end_id": "E2E-17",
        "product": payment_pb2.PAYMENT_PRODUCT_SEPA_CREDIT_TRANSFER,
        "psu_context": _psu(),
    },
    "GetPayment": lambda: {"payment": "payments/p-0000000000000000000000ff", "owner": OWNER},
    "ListPayments": lambda: {
        **_owned(),
        "page_size": 10,
        "states": [payment_pb2.Payment.STATE_UNKNOWN, payment_pb2.Payment.STATE_NEEDS_ATTENTION],
    },
    "ResolvePayment": lambda: {
        "payment": "payments/p-0000000000000000000000ff",
        "finding": payment_pb2.PaymentResolution.FINDING_NOT_EXECUTED,
        "reason": "asked the bank",
        "request_id": str(uuid.uuid4()),
    },
    "ListAccounts": lambda: {**_owned(), "psu_context": _psu()},
    "ListBalances": lambda: {**_owned(), "account": "accounts/a1", "psu_context": _psu()},
    "ListTransactions": lambda: {
        **_owned(),
        "account": "accounts/a1",
        "date_from": date_pb2.Date(year=2026, month=1, day=1),
        "date_to": date_pb2.Date(year=2026, month=2, day=28),
        "booking_filter": account_pb2.ListTransactionsRequest.BOOKING_FILTER_BOTH,
        "psu_context": _psu(),
    },
    "Sign": lambda: {
        **_owned(),
        **_written(),
        "payload_kind": signing_pb2.PAYLOAD_KIND_TEXT_DOCUMENT,
        "payload": b"a document",
    },
    "ListProviders": lambda: {"page_size": 10},
    "GetProvider": lambda: {"provider": "providers/sandbox-bank"},
    "ListEntries": lambda: {
        "consent": "consents/c-0000000000000000000000ff",
        "payment": "payments/p-0000000000000000000000ff",
        "page_size": 10,
    },
}


def reasons() -> Iterator[tuple[str, Any]]:
    """Every reason of the contract with its rule."""
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values:
        if value.number:
            yield (
                value.name.removeprefix("ERROR_REASON_"),
                value.GetOptions().Extensions[errors_pb2.error_rule],
            )
