"""The shape of requests: the rules stand on the fields (buf.validate) and are checked here, before any servicer sees a request.

A violation names the field and the rule; the value is never repeated.
"""

import protovalidate
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from sidecar.errors import FieldViolation, InvalidField

__all__ = ["RequestValidator"]


class RequestValidator:
    def __init__(self) -> None:
        self._validator = protovalidate.Validator()

    def check(self, request: Message) -> None:
        """Raises InvalidField with every violation, unknown fields among them."""
        violations = [_violation(found) for found in self._validator.collect_violations(request)]
        violations += _unknown_fields(request, "")
        if violations:
            raise InvalidField(*violations)


def _violation(found: protovalidate.Violation) -> FieldViolation:
    path = ".".join(_element(element) for element in found.proto.field.elements) if found.proto.field else ""
    return FieldViolation(
        field=path, rule=found.proto.rule_id, description=found.proto.message or "breaks the field's rule"
    )


def _element(element: object) -> str:
    name = str(getattr(element, "field_name", ""))
    subscript = getattr(element, "subscript", None)
    index = getattr(subscript, "value", None)
    return f"{name}[{index}]" if isinstance(index, int) else name


def _unknown_fields(message: Message, path: str) -> list[FieldViolation]:
    """What this version does not know it cannot honour: a newer client must not believe that it was."""
    found = []
    if len(UnknownFieldSet(message)):
        found.append(
            FieldViolation(field=path or "(request)", rule="unknown_field", description="has a field that is not known")
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in value if field.is_repeated else (value,):
            found += _unknown_fields(item, f"{path}.{field.name}" if path else field.name)
    return found
