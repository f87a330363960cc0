"""The dedicated interface for third-party providers: from a request to an answer, and errors in one place."""

from collections.abc import Callable

from sandbox.berlin_group.accounts import AccountEndpoints
from sandbox.berlin_group.callers import Callers
from sandbox.berlin_group.consents import ConsentEndpoints
from sandbox.berlin_group.fields import Refusal, request_id
from sandbox.berlin_group.payments import SERVICES, PaymentEndpoints
from sandbox.directory import Client
from sandbox.signatures import SignatureRefused, SignatureVerifier
from sandbox.web import Answer, Call, json_answer


class Xs2a:
    """Everything below `/v1`."""

    def __init__(
        self,
        *,
        callers: Callers,
        signatures: SignatureVerifier,
        signature_required: Callable[[str], bool],
        consents: ConsentEndpoints,
        accounts: AccountEndpoints,
        payments: PaymentEndpoints,
    ) -> None:
        """`signature_required` says for which HTTP methods."""
        self._callers = callers
        self._signatures = signatures
        self._signature_required = signature_required
        self._consents = consents
        self._accounts = accounts
        self._payments = payments

    def answer(self, call: Call) -> Answer:
        """Answer one request below /v1."""
        own_id = None
        try:
            own_id = request_id(call)
            client = self._callers.client(call)
            self._signatures.check(call, required=self._signature_required(call.method))
            answer = self._route(call, client, call.path.strip("/").split("/")[1:])
        except SignatureRefused as error:
            answer = _refuse(Refusal(401, error.code, str(error)))
        except Refusal as error:
            answer = _refuse(error)
        except ValueError as error:  # what a parser found
            answer = _refuse(Refusal(400, "FORMAT_ERROR", str(error)))
        headers = dict(answer.headers)
        if own_id is not None:
            headers["X-Request-ID"] = own_id
        return Answer(status=answer.status, body=answer.body, content_type=answer.content_type, headers=headers)

    def _route(self, call: Call, client: Client, segments: list[str]) -> Answer:
        match call.method, segments:
            case "POST", ["consents"]:
                return self._consents.create(call, client)
            case (("GET" | "DELETE"), ["consents", consent_id]):
                return self._consents.read_or_end(call, client, consent_id)
            case "GET", ["consents", consent_id, "status"]:
                return self._consents.status(call, client, consent_id)
            case "GET", ["accounts", *rest]:
                return self._accounts.read(call, client, rest)
            case "POST", [service, product] if service in SERVICES:
                return self._payments.initiate(call, client, service, product)
            case "GET", [service, product] if service in SERVICES:
                return self._payments.list_by_reference(call, client, service, product)
            case (("GET" | "DELETE"), [service, product, payment_id]) if service in SERVICES:
                return self._payments.read_or_cancel(call, client, service, product, payment_id)
            case "GET", [service, product, payment_id, "status"] if service in SERVICES:
                return self._payments.status(call, client, service, product, payment_id)
            case _, ["consents" | "accounts" | "payments", *_]:
                raise Refusal(405, "SERVICE_INVALID", "this method is not offered at this address")
        raise Refusal(404, "RESOURCE_UNKNOWN", "there is nothing at this address")


def _refuse(refusal: Refusal) -> Answer:
    if refusal.status == 415:  # the description gives this status no body
        return Answer(status=415)
    message = {"category": "ERROR", "code": refusal.code, "text": refusal.text[:500]}
    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'} if refusal.challenge else {}
    return json_answer(refusal.status, {"tppMessages": [message]}, headers)
