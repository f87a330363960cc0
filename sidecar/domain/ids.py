"""Identifiers. Each is opaque, made once, compared byte for byte; the contract's resource names are `collection/id`."""

import re
import secrets
from datetime import datetime
from typing import NewType

from sidecar.errors import FieldViolation, InvalidField

__all__ = [
    "ConsentId",
    "OwnerId",
    "PaymentId",
    "ProviderId",
    "RequestId",
    "WorkloadId",
    "new_consent_id",
    "new_payment_id",
    "parse_name",
    "resource_name",
]

ConsentId = NewType("ConsentId", str)
PaymentId = NewType("PaymentId", str)
ProviderId = NewType("ProviderId", str)
OwnerId = NewType("OwnerId", str)  # the platform's opaque id of the person
WorkloadId = NewType("WorkloadId", str)  # a SPIFFE ID, or `workload:NAME` of a bound socket
RequestId = NewType("RequestId", str)  # UUID, lower case

_SEGMENT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")


def new_consent_id(now: datetime) -> ConsentId:
    return ConsentId(f"c-{_newest_first(now)}")


def new_payment_id(now: datetime) -> PaymentId:
    return PaymentId(f"p-{_newest_first(now)}")


def resource_name(collection: str, identifier: str) -> str:
    return f"{collection}/{identifier}"


def parse_name(name: str, *, collection: str, field: str) -> str:
    """The id in `collection/id`.

    Raises InvalidField when the name has another form.
    """
    prefix, separator, identifier = name.partition("/")
    if prefix != collection or not separator or not _SEGMENT.match(identifier):
        raise InvalidField(
            FieldViolation(
                field=field,
                rule="resource_name",
                description=f"must have the form {collection}/ID with ID of 1 to 63 of a-z, 0-9 and inner '-'",
            )
        )
    return identifier


def _newest_first(now: datetime) -> str:
    """48 bits of time that run backwards, then 80 random bits: lists go by ascending id, and the contract says newest first."""
    milliseconds = int(now.timestamp() * 1000)
    return f"{2**48 - 1 - milliseconds:012x}{secrets.token_hex(10)}"
