"""Errors become statuses here and nowhere else: google.rpc.Status with exactly one ErrorInfo (AIP-193).

The code and the details of each reason stand beside the reason in `errors.proto`; an error without a known reason becomes INTERNAL
with nothing but a request id.
"""

from collections.abc import Mapping
from types import MappingProxyType
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
_RETRY_SECONDS: Final = 1.0
_RULES: Final[Mapping[str, errors_pb2.ErrorRule]] = MappingProxyType(
    {
        value.name.removeprefix(_PREFIX): value.GetOptions().Extensions[errors_pb2.error_rule]
        for value in errors_pb2.ErrorReason.DESCRIPTOR.values
        if value.number
    }
)


def status_of(error: CustodyError, *, request_id: str) -> status_pb2.Status:
    """The status that a caller gets for `error`; `request_id` is ours, for the operator."""
    rule = _RULES.get(error.reason)
    if rule is None:
        error = Internal()
        rule = _RULES[error.reason]
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata))
    details: list[Message] = [info, *(_detail(name, error, request_id) for name in rule.details)]
    return status_pb2.Status(code=rule.code, message=error.message, details=[_packed(detail) for detail in details])


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    return _CODES[status.code]


def details_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries a status's details over gRPC."""
    return (("grpc-status-details-bin", status.SerializeToString()),)


def _detail(name: str, error: CustodyError, request_id: str) -> Message:
    detail: Message
    match name:
        case "BadRequest":
            detail = _bad_request(error)
        case "RetryInfo":
            detail = _retry_info(error)
        case "RequestInfo":
            detail = error_details_pb2.RequestInfo(request_id=request_id)
        case _:
            raise ValueError(f"the contract asks for a detail that is not known here: {name}")
    return detail


def _retry_info(error: CustodyError) -> error_details_pb2.RetryInfo:
    seconds = error.retry_after_seconds if isinstance(error, Unavailable | Exhausted) else _RETRY_SECONDS
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(error: CustodyError) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=violation.field,
                description=violation.description,
                reason=violation.rule.upper().replace(".", "_"),
            )
            for violation in (error.violations if isinstance(error, InvalidField) else ())
        ]
    )


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
