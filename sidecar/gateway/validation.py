"""The shape of requests: the rules stand on the fields (buf.validate) and are checked here, before any servicer sees a request.

A violation names the field and the rule; the value is never repeated.
"""

from collections.abc import Callable, Iterator
from typing import Final

import protovalidate
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from sidecar.errors import CustodyError, FieldViolation, InvalidField

__all__ = ["RequestValidator"]


# A field path for what is wrong with the request as a whole: rules between fields, bytes that are no message.
_WHOLE: Final = "(request)"
# An answer has to fit the 8 KiB of metadata that gRPC clients accept: whoever breaks more rules than this hears of the first.
_MOST_VIOLATIONS: Final = 16
_NANOS: Final = 1_000_000_000


class RequestValidator:
    """`message_bytes` is the largest request that is read."""

    def __init__(self, *, message_bytes: int) -> None:
        self._message_bytes = message_bytes
        self._validator = protovalidate.Validator()

    def parse(self, data: bytes, parser: Callable[[bytes], Message]) -> Message:
        """The message in `data`. Raises MESSAGE_TOO_LARGE, and InvalidField for bytes that are no such message.

        Not left to gRPC, whose answers to both have neither reason nor details.
        """
        if len(data) > self._message_bytes:
            raise CustodyError(
                "MESSAGE_TOO_LARGE",
                "the message is larger than this method takes; send less",
                metadata={"limitBytes": str(self._message_bytes)},
            )
        try:
            return parser(data)
        except DecodeError as error:  # a string that is not UTF-8 among them
            raise InvalidField(
                FieldViolation(field=_WHOLE, rule="encoding", description="must be a valid message of this method")
            ) from error

    def check(self, request: Message) -> None:
        """Raises InvalidField with the first of the violations, unknown fields among them."""
        violations = [_violation(found) for found in self._validator.collect_violations(request)]
        violations += _violations(request, "")
        if violations:
            raise InvalidField(*violations[:_MOST_VIOLATIONS])


def _violation(found: protovalidate.Violation) -> FieldViolation:
    path = ".".join(_element(element) for element in found.proto.field.elements) if found.proto.field else ""
    return FieldViolation(
        field=path or _WHOLE, rule=found.proto.rule_id, description=found.proto.message or "breaks the field's rule"
    )


def _element(element: object) -> str:
    name = str(getattr(element, "field_name", ""))
    subscript = getattr(element, "subscript", None)
    index = getattr(subscript, "value", None)
    return f"{name}[{index}]" if isinstance(index, int) else name


def _violations(message: Message, path: str) -> Iterator[FieldViolation]:
    """What the rules on the fields cannot say, for a message and all that are in it."""
    if len(
        UnknownFieldSet(message)
    ):  # what is not known cannot be honoured: a newer client must not believe that it was
        yield FieldViolation(
            field=path or _WHOLE, rule="unknown_field", description="has a field that is not known here"
        )
    if isinstance(message, Timestamp) and not 0 <= message.nanos < _NANOS:
        yield FieldViolation(field=path, rule="timestamp.nanos", description="must have nanos from 0 to 999999999")
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        here = f"{path}.{field.name}" if path else field.name
        if field.is_repeated:
            for index, item in enumerate(value):
                yield from _violations(item, f"{here}[{index}]")
        else:
            yield from _violations(value, here)
