"""The one tree of errors.

    CustodyError                      always has a reason (an ErrorReason of the contract) and says what happened and what to do
    ├── InvalidField                  a value of the request breaks a rule           INVALID_ARGUMENT
    ├── Unauthenticated               who calls is not established                   UNAUTHENTICATED
    ├── Refused                       the caller may not do this                     PERMISSION_DENIED
    ├── NotFound                      not there, or not for this caller              NOT_FOUND
    ├── Conflict                      the request id was used for something else     ALREADY_EXISTS
    ├── PreconditionFailed            the resource is in a state that forbids it     FAILED_PRECONDITION
    ├── Exhausted                     too many calls                                 RESOURCE_EXHAUSTED
    ├── Unavailable                   try again with the same request id             UNAVAILABLE
    ├── Corrupt                       stored or received data fails its checks       DATA_LOSS
    └── Internal                      a defect of ours                               INTERNAL

Messages are constants of ours: no message carries a token, a key, a PIN, an account number, a person's name, the text of a
foreign exception or a value from the request. What varies and is harmless goes into `metadata`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "Conflict",
    "Corrupt",
    "CustodyError",
    "Exhausted",
    "FieldViolation",
    "Internal",
    "InvalidField",
    "NotFound",
    "PreconditionFailed",
    "Refused",
    "StaleVersion",
    "Unauthenticated",
    "Unavailable",
]


class CustodyError(Exception):
    """Base of all errors that may cross a port.

    `reason` is the name of a value of `custody.v1.ErrorReason` without its prefix; `metadata` holds harmless values with
    lowerCamelCase keys (AIP-193).
    """

    def __init__(self, reason: str, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """Which field (proto path) breaks which rule. The value itself is never repeated."""

    field: str
    rule: str
    description: str


class InvalidField(CustodyError):
    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__(
            "FIELD_INVALID",
            "; ".join(f"{violation.field}: {violation.description}" for violation in violations),
            metadata={"field": violations[0].field, "rule": violations[0].rule} if violations else None,
        )
        self.violations = violations


class Unauthenticated(CustodyError):
    pass


class Refused(CustodyError):
    pass


class NotFound(CustodyError):
    pass


class Conflict(CustodyError):
    pass


class PreconditionFailed(CustodyError):
    pass


class Exhausted(CustodyError):
    def __init__(
        self, reason: str, message: str, *, retry_after_seconds: float, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason, message, metadata=metadata)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(CustodyError):
    """Nothing was done that a repeat with the same request id could double."""

    def __init__(
        self, reason: str, message: str, *, retry_after_seconds: float = 1.0, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason, message, metadata=metadata)
        self.retry_after_seconds = retry_after_seconds


class Corrupt(CustodyError):
    pass


class Internal(CustodyError):
    def __init__(self, message: str = "an internal error occurred; report the request id") -> None:
        super().__init__("INTERNAL", message)


class StaleVersion(CustodyError):
    """Somebody else changed the row first: read it again and decide anew. Never crosses the contract."""

    def __init__(self) -> None:
        super().__init__("INTERNAL", "the row was changed by somebody else")
