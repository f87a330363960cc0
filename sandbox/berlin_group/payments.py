"""Payments: initiate, read, status, cancel, and the list by reference.

Rules this module keeps:
- Every reading and checking comes before the one step that executes.
- The debtor's account must be one that the person ticked; members that the bank does not process are refused.
- A repeat under an idempotency key is judged like a first request (certificate, signature, token) before it is answered.
"""

import re
from collections.abc import Mapping

from sandbox import pki
from sandbox.berlin_group.callers import Callers, must_have_role
from sandbox.berlin_group.fields import Refusal, amount, iban, json_body, psu_ip, redirect_uri, request_id, text
from sandbox.directory import Client
from sandbox.oauth import Grant
from sandbox.payments import IdempotencyKeys, Instruction, KeyConflict, Payment, Payments
from sandbox.web import Addresses, Answer, Call, Clock, json_answer, parse_parameters

PRODUCTS = ("sepa-credit-transfers", "instant-sepa-credit-transfers")
SERVICES = ("payments", "bulk-payments", "periodic-payments")
MAX_KEY_LENGTH = 40
_TEXT_LENGTHS = {
    "endToEndIdentification": 35,
    "instructionIdentification": 35,
    "creditorName": 70,
    "debtorName": 70,
    "remittanceInformationUnstructured": 140,
}
_CODES = {
    "creditorAgent": re.compile(r"[A-Z]{6}[A-Z2-9][A-NP-Z0-9]([A-Z0-9]{3})?"),
    "chargeBearer": re.compile(r"DEBT|CRED|SHAR|SLEV"),
}
_PAYMENT_MEMBERS = frozenset((*_TEXT_LENGTHS, *_CODES, "debtorAccount", "creditorAccount", "instructedAmount"))


class PaymentEndpoints:
    """`/v1/payments`."""

    def __init__(
        self,
        *,
        clock: Clock,
        payments: Payments,
        idempotency: IdempotencyKeys | None,
        lookup: bool,
        callers: Callers,
        addresses: Addresses,
    ) -> None:
        """Without `idempotency` every POST is a new payment; `lookup` says whether payments can be listed by reference."""
        self._clock = clock
        self._payments = payments
        self._idempotency = idempotency
        self._lookup = lookup
        self._callers = callers
        self._addresses = addresses

    def initiate(self, call: Call, client: Client, service: str, product: str) -> Answer:
        """Take up a payment."""
        must_have_role(call, pki.ROLE_PAYMENTS)
        _must_be_product(service, product)
        psu_ip(call, required=True)
        grant = self._callers.payment_grant(call, client)
        key = self._idempotency_key(call)
        body = json_body(call)
        request = call.path.encode() + b"\n" + call.body
        if key is not None and self._idempotency is not None:
            earlier = self._earlier(client, key, request)
            if earlier is not None:
                return earlier
        payment = self._payments.initiate(self._instruction(call, client, grant, product, body))
        answer = self._initiated(payment)
        if key is not None and self._idempotency is not None:
            self._idempotency.remember(client.client_id, key, request, answer)
        return answer

    def list_by_reference(self, call: Call, client: Client, service: str, product: str) -> Answer:
        """List the payments that carried a reference: a resource of this bank's own, the standard has none."""
        if not self._lookup:
            raise Refusal(405, "SERVICE_INVALID", "this method is not offered at this address")
        must_have_role(call, pki.ROLE_PAYMENTS)
        _must_be_product(service, product)
        grant = self._callers.payment_grant(call, client)
        query = parse_parameters(call.query)
        reference = text(query, "instructionIdentification", _TEXT_LENGTHS["instructionIdentification"])
        if not reference or len(query) > 1:
            raise Refusal(400, "FORMAT_ERROR", "instructionIdentification is required, and nothing else is")
        found = self._payments.by_reference(
            reference, product=product, client_id=client.client_id, person_id=grant.person_id
        )
        return json_answer(200, {"payments": [{**self._summary(payment), **_references(payment)} for payment in found]})

    def read_or_cancel(self, call: Call, client: Client, service: str, product: str, payment_id: str) -> Answer:
        """Show a payment (GET) or cancel it (DELETE)."""
        payment = self._own_payment(call, client, service, product, payment_id)
        if call.method == "DELETE":
            if not self._payments.cancel(payment):
                raise Refusal(405, "CANCELLATION_INVALID", "this payment can no longer be cancelled")
            return Answer(status=204)
        return json_answer(200, {**payment.instruction.body, "transactionStatus": payment.status(self._clock())})

    def status(self, call: Call, client: Client, service: str, product: str, payment_id: str) -> Answer:
        """Tell a payment's status."""
        payment = self._own_payment(call, client, service, product, payment_id)
        status = payment.status(self._clock())
        document: dict[str, object] = {"transactionStatus": status}
        if status in ("RJCT", "CANC") and payment.reason is not None:
            document["psuMessage"] = payment.reason
        return json_answer(200, document)

    def _earlier(self, client: Client, key: str, request: bytes) -> Answer | None:
        assert self._idempotency is not None
        try:
            return self._idempotency.earlier(client.client_id, key, request)
        except KeyConflict as error:
            raise Refusal(409, "STATUS_INVALID", "this Idempotency-Key was used with another request") from error

    def _idempotency_key(self, call: Call) -> str | None:
        if self._idempotency is None:
            return None
        key = call.header("idempotency-key")
        if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
            raise Refusal(400, "FORMAT_ERROR", f"Idempotency-Key must have 1 to {MAX_KEY_LENGTH} characters")
        return key

    def _instruction(
        self, call: Call, client: Client, grant: Grant, product: str, body: Mapping[str, object]
    ) -> Instruction:
        unknown = set(body) - _PAYMENT_MEMBERS
        if unknown:
            raise Refusal(400, "PARAMETER_NOT_SUPPORTED", "the body has members that this bank does not process")
        texts = {name: text(body, name, length) for name, length in _TEXT_LENGTHS.items()}
        for name, pattern in _CODES.items():
            if name in body and not pattern.fullmatch(str(body[name])):
                raise Refusal(400, "FORMAT_ERROR", f"{name} has not the form that the standard gives it")
        creditor_name = texts["creditorName"]
        if not creditor_name:
            raise Refusal(400, "FORMAT_ERROR", "creditorName is required")
        debtor_iban = iban(body, "debtorAccount")
        if debtor_iban not in grant.ibans:
            raise Refusal(401, "CONSENT_INVALID", "the debtor's account is not in the consent")
        return Instruction(
            product=product,
            body=body,
            amount_cents=amount(body.get("instructedAmount")),
            debtor_iban=debtor_iban,
            creditor_iban=iban(body, "creditorAccount"),
            creditor_name=creditor_name,
            end_to_end_id=texts["endToEndIdentification"],
            remittance=texts["remittanceInformationUnstructured"],
            client_id=grant.client_id,
            person_id=grant.person_id,
            x_request_id=request_id(call),
            idempotency_key=call.header("idempotency-key"),
            redirect_uri=redirect_uri(call, "tpp-redirect-uri", client),
            nok_redirect_uri=redirect_uri(call, "tpp-nok-redirect-uri", client),
        )

    def _initiated(self, payment: Payment) -> Answer:
        path = f"/v1/payments/{payment.instruction.product}/{payment.payment_id}"
        links = {"self": {"href": path}, "status": {"href": f"{path}/status"}}
        document = self._summary(payment)
        headers = {"Location": self._addresses.api + path}
        if payment.approval_id is not None:
            links = {"scaRedirect": {"href": f"{self._addresses.issuer}/sca/{payment.approval_id}"}, **links}
            document["scaStatus"] = "received"
            headers["ASPSP-SCA-Approach"] = "REDIRECT"
        else:
            document["scaStatus"] = "exempted"
        return json_answer(201, {**document, "_links": links}, headers)

    def _summary(self, payment: Payment) -> dict[str, object]:
        return {"transactionStatus": payment.status(self._clock()), "paymentId": payment.payment_id}

    def _own_payment(self, call: Call, client: Client, service: str, product: str, payment_id: str) -> Payment:
        must_have_role(call, pki.ROLE_PAYMENTS)
        _must_be_product(service, product)
        grant = self._callers.payment_grant(call, client)
        payment = self._payments.get(payment_id, client_id=client.client_id, person_id=grant.person_id)
        if payment is None or payment.instruction.product != product:
            raise Refusal(404, "RESOURCE_UNKNOWN", "this payment is not known")
        return payment


def _references(payment: Payment) -> dict[str, object]:
    names = ("instructionIdentification", "endToEndIdentification")
    return {name: payment.instruction.body[name] for name in names if name in payment.instruction.body}


def _must_be_product(service: str, product: str) -> None:
    if service != "payments" or product not in PRODUCTS:
        raise Refusal(404, "PRODUCT_UNKNOWN", "this bank offers payments of sepa- and instant-sepa-credit-transfers")
