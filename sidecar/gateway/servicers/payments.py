"""PaymentService."""

from typing import Any, TypeAlias

import grpc
from custody.v1 import payment_pb2 as pb
from custody.v1 import payment_pb2_grpc

from sidecar.custody.payments import InitiatePayment, Payments
from sidecar.custody.reconcile import Reconciler
from sidecar.custody.resolve import ResolvePayment, Resolver
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, RequestId, parse_name
from sidecar.domain.payment import Payment
from sidecar.gateway.boundary import current_caller
from sidecar.gateway.servicers.paging import after_of, page_of, page_size
from sidecar.gateway.servicers.values import (
    FINDINGS,
    PRODUCTS,
    account_reference,
    money_value,
    payment_message,
    payment_states,
    psu_value,
)
from sidecar.ports import PaymentFilter

__all__ = ["PaymentServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class PaymentServicer(payment_pb2_grpc.PaymentServiceServicer):
    def __init__(self, *, payments: Payments, reconciler: Reconciler, resolver: Resolver) -> None:
        self._payments = payments
        self._reconciler = reconciler
        self._resolver = resolver

    async def InitiatePayment(self, request: pb.InitiatePaymentRequest, context: Context) -> pb.InitiatePaymentResponse:
        payment = await self._payments.initiate(
            current_caller(),
            InitiatePayment(
                consent=_consent(request.consent),
                owner=OwnerId(request.owner),
                request_id=RequestId(request.request_id),
                amount=money_value(request.amount, field="amount"),
                debtor_account=account_reference(request.debtor_account)
                if request.HasField("debtor_account")
                else None,
                creditor_account=account_reference(request.creditor_account),
                creditor_name=request.creditor_name,
                product=PRODUCTS[request.product],
                remittance_information=request.remittance_information,
                end_to_end_id=request.end_to_end_id,
                psu=psu_value(request.psu_context, present=request.HasField("psu_context")),
            ),
        )
        return pb.InitiatePaymentResponse(payment=payment_message(payment))

    async def GetPayment(self, request: pb.GetPaymentRequest, context: Context) -> pb.GetPaymentResponse:
        owner = OwnerId(request.owner) if request.owner else None
        found = await self._payments.get(current_caller(), _payment(request.payment), owner)
        payment = await self._reconciler.latest(found)
        return pb.GetPaymentResponse(payment=_message(payment))

    async def ListPayments(self, request: pb.ListPaymentsRequest, context: Context) -> pb.ListPaymentsResponse:
        limit = page_size(request.page_size)
        where = PaymentFilter(
            owner=OwnerId(request.owner) if request.owner else None,
            consent=_consent(request.consent) if request.consent else None,
            states=payment_states(request.states),
        )
        found = await self._payments.list(
            current_caller(), where, after=after_of(request.page_token, "payments"), limit=limit + 1
        )
        page, token = page_of(found, limit, "payments", lambda payment: payment.id)
        return pb.ListPaymentsResponse(payments=[_message(payment) for payment in page], next_page_token=token)

    async def ResolvePayment(self, request: pb.ResolvePaymentRequest, context: Context) -> pb.ResolvePaymentResponse:
        payment = await self._resolver.resolve(
            current_caller(),
            ResolvePayment(
                payment=_payment(request.payment),
                finding=FINDINGS[request.finding],
                reason=request.reason,
                request_id=RequestId(request.request_id),
            ),
        )
        return pb.ResolvePaymentResponse(payment=_message(payment))


def _message(payment: Payment) -> pb.Payment:
    return payment_message(payment, to_administrator=current_caller().is_administrator)


def _payment(name: str) -> PaymentId:
    return PaymentId(parse_name(name, collection="payments", field="payment"))


def _consent(name: str) -> ConsentId:
    return ConsentId(parse_name(name, collection="consents", field="consent"))
