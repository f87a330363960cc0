"""The way of a request through the gateway without a network: bytes, shape, servicer, core; over fakes, so that what was written
and sent can be compared to the last byte."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from custody.v1 import account_reference_pb2, consent_pb2, payment_pb2
from google.protobuf.message import Message
from google.type import money_pb2

from sidecar.custody.resolve import Resolver
from sidecar.domain.caller import Caller
from sidecar.domain.consent import Consent
from sidecar.errors import CustodyError, InvalidField
from sidecar.gateway import boundary
from sidecar.gateway.servicers.consents import ConsentServicer
from sidecar.gateway.servicers.payments import PaymentServicer
from sidecar.gateway.servicers.values import timestamp
from sidecar.gateway.validation import RequestValidator
from tests.unit.custody.support import CREDITOR, World, caller, create_request, request_id

__all__ = ["Front", "Refusal", "consent_message_for", "payment_message_for", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """`fields` are the paths of the violations, where the reason has any."""

    reason: str
    fields: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Front:
    world: World
    caller: Caller = field(default_factory=caller)
    _validator: RequestValidator = field(default_factory=lambda: RequestValidator(message_bytes=1_000_000))

    async def send(self, kind: type[Message], method: str, data: Message | bytes) -> Any:
        """The answer's message, or the Refusal. Anything else that is raised is a defect, and fails the test."""
        try:
            encoded = data if isinstance(data, bytes) else data.SerializeToString()
            request = self._validator.parse(encoded, kind.FromString)
            self._validator.check(request)
            boundary._caller.set(self.caller)
            return await self._method(method)(request, None)
        except InvalidField as refused:
            return Refusal(reason=refused.reason, fields=tuple(v.field for v in refused.violations))
        except CustodyError as refused:
            return Refusal(reason=refused.reason)

    async def pay(self, data: Message | bytes) -> Any:
        return await self.send(payment_pb2.InitiatePaymentRequest, "InitiatePayment", data)

    def _method(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        core = self.world.core
        resolver = Resolver(store=core.store, clock=self.world.clock, payments=core.payments)
        payments = PaymentServicer(payments=core.payments, reconciler=core.reconciler, resolver=resolver)
        servicer = (
            payments if hasattr(payments, name) and "Payment" in name else ConsentServicer(consents=core.consents)
        )
        method: Callable[[Any, Any], Awaitable[Any]] = getattr(servicer, name)
        return method

    # -- what is there, to be compared

    def written(self) -> object:
        """Another value after every command that has succeeded, and after nothing else."""
        return self.world.store._state

    def sent(self) -> int:
        return len(self.world.bank.requests)


def payment_message_for(of: Consent, /, **changes: Any) -> payment_pb2.InitiatePaymentRequest:
    """A request that is right in everything, with `changes`; a change to None leaves a field out."""
    values: dict[str, Any] = {
        "consent": f"consents/{of.id}",
        "owner": of.owner,
        "request_id": request_id(),
        "amount": money_pb2.Money(currency_code="EUR", units=12, nanos=500_000_000),
        "creditor_account": account_reference_pb2.AccountReference(iban=CREDITOR),
        "creditor_name": "Example Shop",
        "product": payment_pb2.PAYMENT_PRODUCT_SEPA_CREDIT_TRANSFER,
        "end_to_end_id": "E2E-1",
    }
    values |= changes
    return payment_pb2.InitiatePaymentRequest(**{name: value for name, value in values.items() if value is not None})


def consent_message_for(world: World, **changes: Any) -> consent_pb2.CreateConsentRequest:
    """As `payment_message_for`, for CreateConsent."""
    request = create_request(world)
    values: dict[str, Any] = {
        "owner": request.owner,
        "provider": f"providers/{request.provider}",
        "purposes": [1, 4],
        "accounts": [account_reference_pb2.AccountReference(iban=account.iban) for account in request.accounts],
        "expire_time": timestamp(request.expire_time),
        "redirect_uri": request.redirect_uri,
        "request_id": request.request_id,
    }
    values |= changes
    return consent_pb2.CreateConsentRequest(**{name: value for name, value in values.items() if value is not None})


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(bounded())
