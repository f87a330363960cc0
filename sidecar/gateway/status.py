"""Errors become statuses here and nowhere else: google.rpc.Status with exactly one ErrorInfo (AIP-193).

The code of each reason stands beside the reason in `errors.proto`; an error without a known reason becomes INTERNAL with nothing
but a request id.
"""

from typing import Final

import grpc
from custody.v1 import errors_pb2
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from sidecar.errors import CustodyError, Exhausted, Internal, InvalidField, Unavailable

__all__ = ["DOMAIN", "code_of", "details_metadata", "status_of"]

DOMAIN: Final = "custody.v1"
_PREFIX: Final = "ERROR_REASON_"
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: CustodyError, *, request_id: str) -> status_pb2.Status:
    """The status that a caller gets for `error`; `request_id` is ours, for the operator."""
    code = _code_of_reason(error.reason)
    if code is None:
        error, code = Internal(), grpc.StatusCode.INTERNAL
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata))
    details: list[Message] = [info, *_more_details(error, request_id)]
    return status_pb2.Status(code=code.value[0], message=error.message, details=[_packed(detail) for detail in details])


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    return _CODES[status.code]


def details_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries a status's details over gRPC."""
    return (("grpc-status-details-bin", status.SerializeToString()),)


def _code_of_reason(reason: str) -> grpc.StatusCode | None:
    """The code that the contract gives a reason, or None for a reason that the contract does not have."""
    value = errors_pb2.ErrorReason.DESCRIPTOR.values_by_name.get(_PREFIX + reason)
    if value is None or value.number == 0:
        return None
    return _CODES[value.GetOptions().Extensions[errors_pb2.error_rule].code]


def _more_details(error: CustodyError, request_id: str) -> list[Message]:
    match error:
        case InvalidField():
            return [_bad_request(error)]
        case Unavailable() | Exhausted():
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case Internal():
            return [error_details_pb2.RequestInfo(request_id=request_id)]
        case _:
            return []


def _bad_request(error: InvalidField) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=violation.field,
                description=violation.description,
                reason=violation.rule.upper().replace(".", "_"),
            )
            for violation in error.violations
        ]
    )


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
