"""Berlin Group NextGenPSD2 1.3.11: consents, accounts, payments.

Rules this module keeps:
- Each answer fits the official OpenAPI description; each error names a code of its list in `tppMessages`.
- In this order: request id, TLS certificate, signature, token, consent, the request itself.
- The debtor's account must be one that the person ticked; what another client or person has looks like nothing.
"""

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from sandbox import pki
from sandbox.books import BIC, Account, Books, Movement, format_cents, iso_date, iso_time, parse_cents
from sandbox.consents import RIGHTS, Consent, Consents, FrequencyExceeded, granted_access
from sandbox.directory import Client
from sandbox.oauth import AuthorizationServer, Grant, TokenRefused
from sandbox.payments import IdempotencyKeys, Instruction, KeyConflict, Payment, Payments
from sandbox.signatures import SignatureRefused, SignatureVerifier
from sandbox.web import Answer, Call, Clock, json_answer, parse_json_object, parse_parameters

PRODUCTS = ("sepa-credit-transfers", "instant-sepa-credit-transfers")
SERVICES = ("payments", "bulk-payments", "periodic-payments")
MAX_KEY_LENGTH = 40
_CONSENT_DAYS = 180
_DEFAULT_PAGE = 25
_MAX_PAGE = 200
_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}[a-zA-Z0-9]{1,30}")
_TEXT = re.compile(r"[A-Za-z0-9/\-?:().,'+ ]*")
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


class Refusal(Exception):
    """A request that the bank does not fulfil: HTTP status, Berlin Group's code, and a text without secrets."""

    def __init__(self, status: int, code: str, text: str, *, challenge: bool = False) -> None:
        super().__init__(f"{status} {code}: {text}")
        self.status = status
        self.code = code
        self.text = text
        self.challenge = challenge  # whether the answer carries WWW-Authenticate (RFC 6750 section 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the bank is reached."""

    issuer: str  # the browser's listener; also OAuth's issuer
    api: str  # the listener with client certificates


class Xs2a:
    """The dedicated interface for third-party providers."""

    def __init__(
        self,
        *,
        clock: Clock,
        clients: Mapping[str, Client],
        books: Books,
        consents: Consents,
        payments: Payments,
        oauth: AuthorizationServer,
        signatures: SignatureVerifier,
        signature_required: Callable[[str], bool],
        idempotency: IdempotencyKeys | None,
        addresses: Addresses,
    ) -> None:
        """`signature_required` says for which HTTP methods; without `idempotency` every POST is a new payment."""
        self._clock = clock
        self._by_organisation = {client.organisation_identifier: client for client in clients.values()}
        self._books = books
        self._consents = consents
        self._payments = payments
        self._oauth = oauth
        self._signatures = signatures
        self._signature_required = signature_required
        self._idempotency = idempotency
        self._addresses = addresses

    def answer(self, call: Call) -> Answer:
        """Answer one request below /v1."""
        request_id = None
        try:
            request_id = _request_id(call)
            client = self._client(call)
            self._signatures.check(call, required=self._signature_required(call.method))
            answer = self._route(call, client, call.path.strip("/").split("/")[1:])
        except SignatureRefused as error:
            answer = _refuse(Refusal(401, error.code, str(error)))
        except Refusal as error:
            answer = _refuse(error)
        except ValueError as error:  # what a parser found
            answer = _refuse(Refusal(400, "FORMAT_ERROR", str(error)))
        headers = dict(answer.headers)
        if request_id is not None:
            headers["X-Request-ID"] = request_id
        return Answer(status=answer.status, body=answer.body, content_type=answer.content_type, headers=headers)

    def _client(self, call: Call) -> Client:
        certificate = call.certificate
        if certificate is None:
            raise Refusal(401, "CERTIFICATE_MISSING", "a TLS client certificate is required")
        if not certificate.in_force(self._clock()):
            raise Refusal(401, "CERTIFICATE_EXPIRED", "the TLS client certificate is not in force")
        client = self._by_organisation.get(certificate.organisation_identifier or "")
        if client is None:
            raise Refusal(401, "CERTIFICATE_INVALID", "the TLS client certificate names no registered client")
        return client

    def _route(self, call: Call, client: Client, segments: list[str]) -> Answer:
        match call.method, segments:
            case "POST", ["consents"]:
                return self._create_consent(call, client)
            case (("GET" | "DELETE"), ["consents", consent_id]):
                return self._consent(call, client, consent_id)
            case "GET", ["consents", consent_id, "status"]:
                return json_answer(200, {"consentStatus": self._own_consent(call, client, consent_id)[1]})
            case "GET", ["accounts", *rest]:
                return self._accounts(call, client, rest)
            case "POST", [service, product] if service in SERVICES:
                return self._initiate(call, client, service, product)
            case (("GET" | "DELETE"), [service, product, payment_id]) if service in SERVICES:
                return self._payment(call, client, service, product, payment_id)
            case "GET", [service, product, payment_id, "status"] if service in SERVICES:
                return self._payment_status(call, client, service, product, payment_id)
            case _, ["consents" | "accounts" | "payments", *_]:
                raise Refusal(405, "SERVICE_INVALID", "this method is not offered at this address")
        raise Refusal(404, "RESOURCE_UNKNOWN", "there is nothing at this address")

    # Consents

    def _create_consent(self, call: Call, client: Client) -> Answer:
        self._must_have_role(call, pki.ROLE_ACCOUNTS)
        _psu_ip(call, required=True)
        body = _json_body(call)
        valid_until = _valid_until(body.get("validUntil"), self._clock())
        per_day = body.get("frequencyPerDay")
        if not isinstance(per_day, int) or isinstance(per_day, bool) or per_day < 1:
            raise Refusal(400, "FORMAT_ERROR", "frequencyPerDay must be a whole number of at least 1")
        recurring = _boolean(body, "recurringIndicator")
        _boolean(body, "combinedServiceIndicator")
        if not recurring and per_day != 1:
            raise Refusal(400, "FORMAT_ERROR", "frequencyPerDay of a one-off consent must be 1")
        access = _access(body.get("access"))
        consent = self._consents.create(
            client_id=client.client_id, access=access, recurring=recurring, valid_until=valid_until, per_day=per_day
        )
        path = f"/v1/consents/{consent.consent_id}"
        document = {
            "consentStatus": "received",
            "consentId": consent.consent_id,
            "_links": {
                "scaOAuth": {"href": f"{self._addresses.issuer}/.well-known/oauth-authorization-server"},
                "self": {"href": path},
                "status": {"href": f"{path}/status"},
            },
        }
        headers = {
            "Location": self._addresses.api + path,
            "ASPSP-SCA-Approach": "REDIRECT",
            "ASPSP-Multiple-Consent-Support": "true",
        }
        return json_answer(201, document, headers)

    def _consent(self, call: Call, client: Client, consent_id: str) -> Answer:
        consent, status = self._own_consent(call, client, consent_id)
        if call.method == "DELETE":
            self._consents.terminate(consent)
            self._oauth.revoke_consent(consent)
            return Answer(status=204)
        document = {
            "access": granted_access(consent),
            "recurringIndicator": consent.recurring,
            "validUntil": consent.valid_until.isoformat(),
            "frequencyPerDay": consent.frequency_per_day,
            "lastActionDate": iso_date(consent.last_action),
            "consentStatus": status,
        }
        return json_answer(200, document)

    def _own_consent(self, call: Call, client: Client, consent_id: str) -> tuple[Consent, str]:
        """Return a client's consent; a token is not needed, but one that is sent must fit."""
        if call.headers.get("authorization"):
            self._grant(call, client)
        consent = self._consents.get(consent_id, client.client_id)
        if consent is None:
            raise Refusal(403, "CONSENT_UNKNOWN", "this consent is not known")
        return consent, consent.status(self._clock())

    # Accounts

    def _accounts(self, call: Call, client: Client, rest: list[str]) -> Answer:
        self._must_have_role(call, pki.ROLE_ACCOUNTS)
        attended = _psu_ip(call, required=False)
        grant = self._grant(call, client)
        consent = self._read_consent(call, grant)
        query = parse_parameters(call.query)
        account = self._consented(consent, rest[0]) if rest else None
        match rest:
            case []:
                answer = self._list_accounts(consent, query)
            case [_]:
                answer = self._account_answer(consent, account, query)
            case [_, "balances"]:
                answer = self._balances(consent, account)
            case [_, "transactions"]:
                answer = self._transactions(consent, account, query)
            case _:
                raise Refusal(404, "RESOURCE_UNKNOWN", "there is nothing at this address")
        if not attended:
            self._count(consent, call.path)
        return answer

    def _read_consent(self, call: Call, grant: Grant) -> Consent:
        consent_id = call.header("consent-id")
        if consent_id is None:
            raise Refusal(400, "FORMAT_ERROR", "Consent-ID is required")
        consent = self._consents.get(consent_id, grant.client_id)
        if consent is None:
            raise Refusal(403, "CONSENT_UNKNOWN", "this consent is not known")
        if consent is not grant.consent:
            raise Refusal(401, "CONSENT_INVALID", "the token was not given under this consent")
        status = consent.status(self._clock())
        if status == "expired":
            raise Refusal(401, "CONSENT_EXPIRED", "this consent has expired")
        if status != "valid":
            raise Refusal(401, "CONSENT_INVALID", f"this consent is {status}")
        return consent

    def _count(self, consent: Consent, address: str) -> None:
        try:
            self._consents.count_read(consent, address)
        except FrequencyExceeded as error:
            raise Refusal(
                429, "ACCESS_EXCEEDED", "the reads of today without the person present are used up"
            ) from error

    def _consented(self, consent: Consent, resource_id: str) -> Account:
        account = self._books.by_resource.get(resource_id)
        if account is None or account.iban not in consent.account_ibans():
            raise Refusal(404, "RESOURCE_UNKNOWN", "this account is not known under this consent")
        account.settle(self._clock())
        return account

    def _list_accounts(self, consent: Consent, query: Mapping[str, str]) -> Answer:
        accounts = [self._books.accounts[iban] for iban in consent.account_ibans()]
        return json_answer(200, {"accounts": [self._details(consent, account, query) for account in accounts]})

    def _account_answer(self, consent: Consent, account: Account | None, query: Mapping[str, str]) -> Answer:
        assert account is not None
        return json_answer(200, {"account": self._details(consent, account, query)})

    def _details(self, consent: Consent, account: Account, query: Mapping[str, str]) -> dict[str, object]:
        account.settle(self._clock())
        links = {
            right: {"href": f"/v1/accounts/{account.resource_id}/{right}"}
            for right in RIGHTS[1:]
            if consent.may(right, account.iban)
        }
        details: dict[str, object] = {
            "resourceId": account.resource_id,
            "iban": account.iban,
            "currency": "EUR",
            "name": account.name,
            "product": account.product,
            "cashAccountType": "CACC",
            "status": "enabled",
            "bic": BIC,
            "ownerName": account.owner_name,
            "_links": links,
        }
        if query.get("withBalance") == "true":
            _must_allow(consent, "balances", account)
            details["balances"] = self._balance_list(account)
        return details

    def _balances(self, consent: Consent, account: Account | None) -> Answer:
        assert account is not None
        _must_allow(consent, "balances", account)
        reference = {"iban": account.iban, "currency": "EUR"}
        return json_answer(200, {"account": reference, "balances": self._balance_list(account)})

    def _balance_list(self, account: Account) -> list[dict[str, object]]:
        now = self._clock()
        kinds = (("closingBooked", account.booked_cents), ("interimAvailable", account.available_cents))
        return [
            {
                "balanceAmount": {"currency": "EUR", "amount": format_cents(cents)},
                "balanceType": kind,
                "lastChangeDateTime": iso_time(now),
                "referenceDate": iso_date(now),
            }
            for kind, cents in kinds
        ]

    def _transactions(self, consent: Consent, account: Account | None, query: Mapping[str, str]) -> Answer:
        assert account is not None
        _must_allow(consent, "transactions", account)
        wanted = query.get("bookingStatus")
        if wanted not in ("booked", "pending", "both"):
            raise Refusal(400, "FORMAT_ERROR", "bookingStatus is required: booked, pending or both")
        first = _date(query.get("dateFrom"), "dateFrom")
        last = _date(query["dateTo"], "dateTo") if "dateTo" in query else datetime.date.max
        if last < first:
            raise Refusal(400, "PERIOD_INVALID", "dateTo is before dateFrom")
        page = _whole(query.get("pageIndex", "0"), "pageIndex", 0, 1_000_000)
        size = _whole(query.get("itemsPerPage", str(_DEFAULT_PAGE)), "itemsPerPage", 1, _MAX_PAGE)
        now = self._clock()
        found = self._find(account, wanted, first, last, now)
        lines = _slice(found, page * size, size + 1)
        report: dict[str, object] = {
            kind: [_line(line) for line in lines[:size] if (line.booked_at <= now) == (kind == "booked")]
            for kind in (("booked", "pending") if wanted == "both" else (wanted,))
        }
        report["_links"] = _report_links(account, query, page, more=len(lines) > size)
        return json_answer(200, {"account": {"iban": account.iban, "currency": "EUR"}, "transactions": report})

    def _find(
        self, account: Account, wanted: str, first: datetime.date, last: datetime.date, now: float
    ) -> Iterable[Movement]:
        for line in account.newest_first():
            day = iso_date(line.entered_at)
            if day < first.isoformat():
                return
            if day <= last.isoformat() and (wanted == "both" or (line.booked_at <= now) == (wanted == "booked")):
                yield line

    # Payments

    def _initiate(self, call: Call, client: Client, service: str, product: str) -> Answer:
        self._must_have_role(call, pki.ROLE_PAYMENTS)
        _must_be_product(service, product)
        _psu_ip(call, required=True)
        grant = self._payment_grant(call, client)
        key = self._idempotency_key(call)
        body = _json_body(call)
        request = call.path.encode() + b"\n" + call.body
        if key is not None and self._idempotency is not None:
            earlier = self._earlier(client, key, request)
            if earlier is not None:
                return earlier
        payment = self._payments.initiate(self._instruction(call, grant, product, body))
        answer = self._initiated(payment)
        if key is not None and self._idempotency is not None:
            self._idempotency.remember(client.client_id, key, request, answer)
        return answer

    def _earlier(self, client: Client, key: str, request: bytes) -> Answer | None:
        assert self._idempotency is not None
        try:
            return self._idempotency.earlier(client.client_id, key, request)
        except KeyConflict as error:
            text = "this Idempotency-Key was used with another request"
            raise Refusal(409, "STATUS_INVALID", text) from error

    def _idempotency_key(self, call: Call) -> str | None:
        if self._idempotency is None:
            return None
        key = call.header("idempotency-key")
        if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
            raise Refusal(400, "FORMAT_ERROR", f"Idempotency-Key must have 1 to {MAX_KEY_LENGTH} characters")
        return key

    def _instruction(self, call: Call, grant: Grant, product: str, body: Mapping[str, object]) -> Instruction:
        unknown = set(body) - _PAYMENT_MEMBERS
        if unknown:
            raise Refusal(400, "PARAMETER_NOT_SUPPORTED", "the body has members that this bank does not process")
        texts = {name: _text(body, name, length) for name, length in _TEXT_LENGTHS.items()}
        for name, pattern in _CODES.items():
            if name in body and not pattern.fullmatch(str(body[name])):
                raise Refusal(400, "FORMAT_ERROR", f"{name} has not the form that the standard gives it")
        creditor_name = texts["creditorName"]
        if not creditor_name:
            raise Refusal(400, "FORMAT_ERROR", "creditorName is required")
        debtor_iban = _iban(body, "debtorAccount")
        if debtor_iban not in grant.ibans:
            raise Refusal(401, "CONSENT_INVALID", "the debtor's account is not in the consent")
        return Instruction(
            product=product,
            body=body,
            amount_cents=_amount(body.get("instructedAmount")),
            debtor_iban=debtor_iban,
            creditor_iban=_iban(body, "creditorAccount"),
            creditor_name=creditor_name,
            end_to_end_id=texts["endToEndIdentification"],
            remittance=texts["remittanceInformationUnstructured"],
            client_id=grant.client_id,
            person_id=grant.person_id,
            x_request_id=_request_id(call),
            idempotency_key=call.header("idempotency-key"),
            redirect_uri=_redirect_uri(call, "tpp-redirect-uri", self._client(call)),
            nok_redirect_uri=_redirect_uri(call, "tpp-nok-redirect-uri", self._client(call)),
        )

    def _initiated(self, payment: Payment) -> Answer:
        path = f"/v1/payments/{payment.instruction.product}/{payment.payment_id}"
        links = {"self": {"href": path}, "status": {"href": f"{path}/status"}}
        document: dict[str, object] = {
            "transactionStatus": payment.status(self._clock()),
            "paymentId": payment.payment_id,
        }
        headers = {"Location": self._addresses.api + path}
        if payment.approval_id is not None:
            links = {"scaRedirect": {"href": f"{self._addresses.issuer}/sca/{payment.approval_id}"}, **links}
            document["scaStatus"] = "received"
            headers["ASPSP-SCA-Approach"] = "REDIRECT"
        else:
            document["scaStatus"] = "exempted"
        return json_answer(201, {**document, "_links": links}, headers)

    def _payment(self, call: Call, client: Client, service: str, product: str, payment_id: str) -> Answer:
        payment = self._own_payment(call, client, service, product, payment_id)
        if call.method == "DELETE":
            if not self._payments.cancel(payment):
                raise Refusal(405, "CANCELLATION_INVALID", "this payment can no longer be cancelled")
            return Answer(status=204)
        return json_answer(200, {**payment.instruction.body, "transactionStatus": payment.status(self._clock())})

    def _payment_status(self, call: Call, client: Client, service: str, product: str, payment_id: str) -> Answer:
        payment = self._own_payment(call, client, service, product, payment_id)
        status = payment.status(self._clock())
        document: dict[str, object] = {"transactionStatus": status}
        if status in ("RJCT", "CANC") and payment.reason is not None:
            document["psuMessage"] = payment.reason
        return json_answer(200, document)

    def _own_payment(self, call: Call, client: Client, service: str, product: str, payment_id: str) -> Payment:
        self._must_have_role(call, pki.ROLE_PAYMENTS)
        _must_be_product(service, product)
        grant = self._payment_grant(call, client)
        payment = self._payments.get(payment_id, client_id=client.client_id, person_id=grant.person_id)
        if payment is None or payment.instruction.product != product:
            raise Refusal(404, "RESOURCE_UNKNOWN", "this payment is not known")
        return payment

    # Who is asking

    def _grant(self, call: Call, client: Client) -> Grant:
        scheme, _, token = (call.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "TOKEN_UNKNOWN", "a Bearer token is required", challenge=True)
        try:
            grant = self._oauth.open(token, call.thumbprint)
        except TokenRefused as error:
            text = "the token is not valid, or not with this client certificate"
            raise Refusal(401, error.code, text, challenge=True) from error
        if grant.client_id != client.client_id:
            raise Refusal(401, "TOKEN_INVALID", "the token belongs to another client", challenge=True)
        return grant

    def _payment_grant(self, call: Call, client: Client) -> Grant:
        grant = self._grant(call, client)
        if not grant.payments:
            raise Refusal(401, "TOKEN_INVALID", "the token has not the scope PIS", challenge=True)
        if grant.consent is not None and grant.consent.status(self._clock()) != "valid":
            raise Refusal(401, "CONSENT_INVALID", "the consent is no longer valid")
        if call.headers.get("consent-id") and (
            grant.consent is None or call.header("consent-id") != grant.consent.consent_id
        ):
            raise Refusal(401, "CONSENT_INVALID", "the token was not given under this consent")
        return grant

    def _must_have_role(self, call: Call, role: str) -> None:
        if call.certificate is None or role not in call.certificate.roles:
            raise Refusal(401, "ROLE_INVALID", f"the TLS client certificate has not the role {role}")


def _refuse(refusal: Refusal) -> Answer:
    if refusal.status == 415:  # the description gives this status no body
        return Answer(status=415)
    message = {"category": "ERROR", "code": refusal.code, "text": refusal.text[:500]}
    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'} if refusal.challenge else {}
    return json_answer(refusal.status, {"tppMessages": [message]}, headers)


def _request_id(call: Call) -> str:
    value = call.header("x-request-id")
    if value is None or not _UUID.fullmatch(value):
        raise Refusal(400, "FORMAT_ERROR", "X-Request-ID is required and must be a UUID")
    return value


def _psu_ip(call: Call, *, required: bool) -> bool:
    """Check PSU-IP-Address; say whether it was sent."""
    value = call.header("psu-ip-address")
    if value is None:
        if required:
            raise Refusal(400, "FORMAT_ERROR", "PSU-IP-Address is required")
        return False
    ipaddress.ip_address(value)
    return True


def _json_body(call: Call) -> dict[str, object]:
    media_type = (call.header("content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(415, "FORMAT_ERROR", "Content-Type must be application/json")
    return parse_json_object(call.body)


def _boolean(body: Mapping[str, object], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be true or false")
    return value


def _valid_until(value: object, now: float) -> datetime.date:
    """Read validUntil; a date further ahead than the bank gives is brought down to what it gives."""
    asked = _date(value, "validUntil")
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
    if asked < today:
        raise Refusal(400, "PERIOD_INVALID", "validUntil is in the past")
    return min(asked, today + datetime.timedelta(days=_CONSENT_DAYS))


def _access(value: object) -> dict[str, object]:
    """Check the `access` member: one global form, or lists of account references by IBAN."""
    if not isinstance(value, dict) or not value:
        raise Refusal(400, "FORMAT_ERROR", "access is required")
    names = set(value)
    if names <= set(RIGHTS):
        for references in value.values():
            if not isinstance(references, list):
                raise Refusal(400, "FORMAT_ERROR", "access must list account references")
            for reference in references:
                _iban({"account": reference}, "account")
        return value
    if len(names) == 1 and names <= {"availableAccounts", "availableAccountsWithBalance", "allPsd2"}:
        if next(iter(value.values())) in ("allAccounts", "allAccountsWithOwnerName"):
            return value
        raise Refusal(400, "FORMAT_ERROR", "a global access must be allAccounts or allAccountsWithOwnerName")
    raise Refusal(400, "PARAMETER_NOT_SUPPORTED", "this combination of access members is not offered")


def _must_allow(consent: Consent, right: str, account: Account) -> None:
    if not consent.may(right, account.iban):
        raise Refusal(401, "CONSENT_INVALID", f"the consent does not give {right} of this account")


def _must_be_product(service: str, product: str) -> None:
    if service != "payments" or product not in PRODUCTS:
        raise Refusal(404, "PRODUCT_UNKNOWN", "this bank offers payments of sepa- and instant-sepa-credit-transfers")


def _text(body: Mapping[str, object], name: str, max_length: int) -> str | None:
    value = body.get(name)
    if value is None and name not in body:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= max_length or not _TEXT.fullmatch(value):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be 1 to {max_length} characters of the SEPA set")
    return value


def _iban(body: Mapping[str, object], name: str) -> str:
    reference = body.get(name)
    iban = reference.get("iban") if isinstance(reference, dict) else None
    if not isinstance(iban, str) or not _IBAN.fullmatch(iban):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be an account reference with an IBAN")
    return iban


def _amount(value: object) -> int:
    if not isinstance(value, dict) or set(value) != {"currency", "amount"} or value["currency"] != "EUR":
        raise Refusal(400, "FORMAT_ERROR", "instructedAmount must be {currency: EUR, amount}")
    if not isinstance(value["amount"], str):
        raise Refusal(400, "FORMAT_ERROR", "the amount must be a string")
    return parse_cents(value["amount"])


def _redirect_uri(call: Call, header: str, client: Client) -> str | None:
    """Return a redirect address: a registered one, to which the provider may have added a query of its own."""
    value = call.header(header)
    if value is None:
        return None
    if urlsplit(value)._replace(query="").geturl() not in client.redirect_uris:
        raise Refusal(400, "FORMAT_ERROR", f"{header} is not registered")
    return value


def _date(value: object, name: str) -> datetime.date:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be a date (YYYY-MM-DD)")
    return datetime.date.fromisoformat(value)


def _whole(value: str, name: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", value) or not low <= int(value) <= high:
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be a whole number from {low} to {high}")
    return int(value)


def _slice(lines: Iterable[Movement], skip: int, count: int) -> list[Movement]:
    found = []
    for number, line in enumerate(lines):
        if number >= skip + count:
            break
        if number >= skip:
            found.append(line)
    return found


def _line(line: Movement) -> dict[str, object]:
    outgoing = line.amount_cents < 0
    document: dict[str, object] = {
        "transactionId": line.transaction_id,
        "bookingDate": iso_date(line.booked_at),
        "valueDate": iso_date(line.booked_at),
        "transactionAmount": {"currency": "EUR", "amount": format_cents(line.amount_cents)},
        "creditorName" if outgoing else "debtorName": line.counterparty,
        "creditorAccount" if outgoing else "debtorAccount": {"iban": line.counterparty_iban},
        "remittanceInformationUnstructured": line.remittance,
    }
    if line.end_to_end_id is not None:
        document["endToEndId"] = line.end_to_end_id
    return document


def _report_links(account: Account, query: Mapping[str, str], page: int, *, more: bool) -> dict[str, object]:
    path = f"/v1/accounts/{account.resource_id}"
    links: dict[str, object] = {"account": {"href": path}}

    def link(index: int) -> dict[str, str]:
        return {"href": f"{path}/transactions?{urlencode({**query, 'pageIndex': str(index)}, quote_via=quote)}"}

    if page:
        links["previous"] = link(page - 1)
    if more:
        links["next"] = link(page + 1)
    return links
