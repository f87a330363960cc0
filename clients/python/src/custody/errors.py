"""One error tree. Every error tells its reason, the request id to ask again with, and what else the sidecar said.

    CustodyError
    ├── InvalidRequestError        a field is wrong: field_violations names it
    ├── UnauthenticatedError       the certificate is unknown or expired
    ├── PermissionDeniedError      the policy says no
    ├── NotFoundError              no such thing, or none that you may see
    ├── RequestIdReusedError       the request id belongs to another request
    ├── PreconditionError          the state of things says no; the same request is refused again
    │   ├── ConsentUnusableError   not active, ended, or not given for this: ask the person
    │   ├── RedirectRefusedError   the redirect is not of this consent: drop it
    │   ├── AuthorisationError     the person or the provider said no
    │   ├── LimitExceededError     above a limit of the consent or the policy
    │   └── ProviderRefusedError   the provider said no
    ├── RateLimitedError           wait for retry_after_seconds
    ├── UnavailableError           ask again later with the same request id
    ├── DeadlineExceededError      not known whether it was done: ask again with the same request id
    ├── DataLossError              a sealed secret does not open: alarm an operator
    ├── InternalError              report the request id
    └── WaitTimeoutError           a payment was not final in time; it goes on

No message holds a token, an account number, or a value of the request.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from custody.reasons import ErrorReason
from custody.values import Payment

__all__ = [
    "AuthorisationError",
    "ConsentUnusableError",
    "CustodyError",
    "DataLossError",
    "DeadlineExceededError",
    "FieldViolation",
    "InternalError",
    "InvalidRequestError",
    "LimitExceededError",
    "NotFoundError",
    "PermissionDeniedError",
    "PreconditionError",
    "ProviderRefusedError",
    "RateLimitedError",
    "RedirectRefusedError",
    "RequestIdReusedError",
    "UnauthenticatedError",
    "UnavailableError",
    "WaitTimeoutError",
    "error_of",
    "error_type_of",
]

DOMAIN = "custody.v1"
_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One field that breaks its rule: its path, the rule's name (such as STRING_MAX_LEN), and what the rule asks for."""

    field: str
    rule: str
    description: str


class CustodyError(Exception):
    """The sidecar refused or failed, or could not be reached.

    `code` is the name of the gRPC status. `reason` names an ErrorReason; None where no sidecar answered. `request_id` is the
    one that the call was made with, or that the sidecar gave it. `metadata` holds what varies, by names of the contract.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
        field_violations: Iterable[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        self.field_violations = tuple(field_violations)
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))

    def __str__(self) -> str:
        violations = "".join(f"; {each.field}: {each.description}" for each in self.field_violations)
        request_id = f" (request id {self.request_id})" if self.request_id else ""
        return f"{self.reason or self.code}: {self.message}{violations}{request_id}"


class InvalidRequestError(CustodyError):
    """A field is wrong; `field_violations` names it. The same request fails again."""


class UnauthenticatedError(CustodyError):
    """The certificate is not trusted, not known, or has expired."""


class PermissionDeniedError(CustodyError):
    """The policy does not allow it; an operator decides."""


class NotFoundError(CustodyError):
    """No such thing, or none that this caller may see for this owner."""


class RequestIdReusedError(CustodyError):
    """The request id was used before for something else, which stands as it is."""


class PreconditionError(CustodyError):
    """The state of things does not allow it; the same request is refused until that changes."""


class ConsentUnusableError(PreconditionError):
    """The consent is not active, has ended, or was not given for this: the person has to be asked."""


class RedirectRefusedError(PreconditionError):
    """The redirect does not belong to this consent; it may be forged. The consent is as it was."""


class AuthorisationError(PreconditionError):
    """The person or the provider said no; the consent has failed."""


class LimitExceededError(PreconditionError):
    """The amount is above the consent's limit."""


class ProviderRefusedError(PreconditionError):
    """The provider understood the request and refused it."""


class RateLimitedError(CustodyError):
    """Too many calls; wait for `retry_after_seconds`."""


class UnavailableError(CustodyError):
    """The sidecar, its HSM, its database or the provider does not answer at the moment."""


class DeadlineExceededError(CustodyError):
    """The time was up. Whether the call was carried out is not known: ask again with the same request id."""


class DataLossError(CustodyError):
    """A sealed secret does not open; the consent cannot be used, and an operator has to know."""


class InternalError(CustodyError):
    """Something that should not happen, or an answer that this client does not understand."""


class WaitTimeoutError(CustodyError):
    """The payment was not final in time. It goes on; `payment` is as it was last seen."""

    def __init__(self, payment: Payment) -> None:
        super().__init__(
            f"the payment is {payment.state} and goes on",
            code="DEADLINE_EXCEEDED",
            request_id=payment.request_id,
        )
        self.payment = payment


_BY_CODE: Mapping[str, type[CustodyError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": RequestIdReusedError,
    "FAILED_PRECONDITION": PreconditionError,
    "RESOURCE_EXHAUSTED": RateLimitedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "DATA_LOSS": DataLossError,
}
_BY_REASON: Mapping[str, type[CustodyError]] = {
    ErrorReason.CONSENT_NOT_ACTIVE: ConsentUnusableError,
    ErrorReason.CONSENT_REVOKED: ConsentUnusableError,
    ErrorReason.CONSENT_EXPIRED: ConsentUnusableError,
    ErrorReason.CONSENT_NEEDS_REAUTHORISATION: ConsentUnusableError,
    ErrorReason.PURPOSE_NOT_CONSENTED: ConsentUnusableError,
    ErrorReason.ACCOUNT_NOT_CONSENTED: ConsentUnusableError,
    ErrorReason.STATE_MISMATCH: RedirectRefusedError,
    ErrorReason.ISSUER_MISMATCH: RedirectRefusedError,
    ErrorReason.AUTHORISATION_DENIED: AuthorisationError,
    ErrorReason.AUTHORISATION_FAILED: AuthorisationError,
    ErrorReason.LIMIT_EXCEEDED: LimitExceededError,
    ErrorReason.PROVIDER_REFUSED: ProviderRefusedError,
    ErrorReason.MESSAGE_TOO_LARGE: InvalidRequestError,
}


def error_of(failure: grpc.RpcError, *, request_id: str | None) -> CustodyError:
    """Read the error that an RPC ended with. Details that this client does not understand are left aside."""
    call: Any = failure  # both grpc's and grpc.aio's errors have these three, and share no typed base that says so
    code: str = call.code().name
    status = _status_of(call.trailing_metadata() or ())
    info = error_details_pb2.ErrorInfo()
    _read(status, info)
    own = info.domain == DOMAIN
    error_type = error_type_of(code=code, reason=info.reason if own else None)
    return error_type(
        status.message or call.details() or "no answer",
        code=code,
        reason=info.reason if own else None,
        request_id=request_id or info.metadata.get("requestId") or _sidecars_request_id(status),
        retry_after_seconds=_retry_after_seconds(status),
        field_violations=_field_violations(status),
        metadata=info.metadata if own else {},
    )


def error_type_of(*, code: str, reason: str | None) -> type[CustodyError]:
    """Choose the class of an error: by its reason where that says more than the status code."""
    return _BY_REASON.get(reason or "", _BY_CODE.get(code, InternalError))


def _status_of(trailers: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status:
    packed = next((value for key, value in trailers if key == _DETAILS_KEY and isinstance(value, bytes)), b"")
    try:
        return status_pb2.Status.FromString(packed)
    except DecodeError:
        return status_pb2.Status()  # the status code still says what happened


def _read(status: status_pb2.Status, detail: Message) -> bool:
    """Fill in a detail message if the status has one of its type."""
    return any(packed.Unpack(detail) for packed in status.details)


def _retry_after_seconds(status: status_pb2.Status) -> float | None:
    retry = error_details_pb2.RetryInfo()
    return retry.retry_delay.ToTimedelta().total_seconds() if _read(status, retry) else None


def _field_violations(status: status_pb2.Status) -> list[FieldViolation]:
    request = error_details_pb2.BadRequest()
    _read(status, request)
    return [FieldViolation(field=v.field, rule=v.reason, description=v.description) for v in request.field_violations]


def _sidecars_request_id(status: status_pb2.Status) -> str | None:
    request = error_details_pb2.RequestInfo()
    return request.request_id if _read(status, request) else None
