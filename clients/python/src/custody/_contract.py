"""The methods of the contract, read from its descriptors: where each is, what it takes, and whether it may be repeated."""

from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from custody.v1 import account_pb2, audit_pb2, consent_pb2, key_pb2, payment_pb2, provider_pb2, signing_pb2

__all__ = ["Method", "method_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method. `repeatable`: it reads only, or carries a request_id, so that a repeat has no further effect."""

    path: str
    request_type: type[Message]
    response_type: type[Message]
    repeatable: bool


def method_named(name: str) -> Method:
    """Answer with the method `Service.Method`."""
    return _methods()[name]


@cache
def _methods() -> dict[str, Method]:
    modules = (account_pb2, audit_pb2, consent_pb2, key_pb2, payment_pb2, provider_pb2, signing_pb2)
    services = (service for module in modules for service in module.DESCRIPTOR.services_by_name.values())
    return {
        f"{service.name}.{method.name}": Method(
            path=f"/{service.full_name}/{method.name}",
            request_type=GetMessageClass(method.input_type),
            response_type=GetMessageClass(method.output_type),
            repeatable=method.GetOptions().idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN,
        )
        for service in services
        for method in service.methods
    }
