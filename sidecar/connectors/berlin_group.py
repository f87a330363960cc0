"""Berlin Group NextGenPSD2 XS2A 1.3.x: consents, single SEPA payments, accounts, balances, transactions.

Rules of this module: links of a bank are never followed, only our own path templates are used (a next page gives its query, no
more); an answer counts only if it is JSON of the expected form and echoes our X-Request-ID where it has one; an initiation is
refused only by an answer that the descriptor lists, everything else that is not a clear yes is unknown; a look-up finds nothing
only where the bank's list is complete and empty.
"""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from typing import TypeVar
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from sidecar.connectors.base import (
    ConsentDetails,
    InitiationAccepted,
    InitiationReading,
    InitiationRefused,
    InitiationUnknown,
    PaymentReading,
    Problem,
    ProblemKind,
    Reading,
    SignaturePlace,
    UnsignedRequest,
)
from sidecar.connectors.descriptor import Descriptor, origin_of
from sidecar.connectors.oauth import OAuthClient
from sidecar.connectors.signing import Base64Der, SigningCertificate, digest_header, signature_prefix, signing_string
from sidecar.connectors.strict_json import JsonObject, object_at, objects_at, read_object, text_at
from sidecar.domain.account import Account, Balance, BookingStatus, PsuContext, Transaction, TransactionPage
from sidecar.domain.consent import AccountReference, Consent, Purpose
from sidecar.domain.money import Money, parse_amount
from sidecar.domain.payment import Payment, PaymentInstruction, PaymentProduct, PaymentState
from sidecar.domain.provider import Answer, Header, KeyPurpose, ProviderRequest, SecretSlot, SlotEncoding
from sidecar.domain.secrets import SecretKind
from sidecar.errors import PreconditionFailed

__all__ = ["BerlinGroupConnector"]

T = TypeVar("T")

_ACCESS_TOKEN = SecretSlot(kind=SecretKind.ACCESS_TOKEN, encoding=SlotEncoding.RAW)
# Identifiers of a bank go into paths of ours: never empty, never a dot segment.
_IDENTIFIER = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~=-]{1,128}\Z")
_ACCOUNT_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~=-]{0,127}\Z")  # as the contract's Account.name
_QUERY = re.compile(r"[!$%&'()*+,./0-9:;=?@A-Z_a-z~-]{1,1024}\Z")  # RFC 3986 section 3.4, bounded
_HREF = re.compile(r"[!#-;=?-Z_a-z~\[\]]{1,2048}\Z")  # printable ASCII without what no URI may hold
_ACCOUNT_PURPOSES = (Purpose.ACCOUNTS, Purpose.BALANCES, Purpose.TRANSACTIONS)

# ISO 20022 ExternalPaymentTransactionStatus1Code as Berlin Group 1.3.11 lists it. What is not here is "in progress": never
# failed, never done.
_PAYMENT_STATES = {
    "ACSC": PaymentState.SETTLED,
    "ACCC": PaymentState.SETTLED,
    "RJCT": PaymentState.REJECTED_LATE,
    "CANC": PaymentState.CANCELLED,
}
_AWAITING_OWNER = frozenset({"RCVD", "PATC", "PDNG"})
_UNDECIDED = frozenset({"RCVD", "PATC"})
_STATUS = re.compile(r"[A-Z]{4}\Z")
_TOKEN_EXPIRED = frozenset({"TOKEN_EXPIRED"})
_CONSENT_ENDED = frozenset({"TOKEN_INVALID", "TOKEN_UNKNOWN", "CONSENT_INVALID", "CONSENT_EXPIRED", "CONSENT_UNKNOWN"})
_CODE = re.compile(r"[A-Z][A-Z_]{2,47}\Z")


class BerlinGroupConnector:
    def __init__(self, *, descriptor: Descriptor, oauth: OAuthClient, certificate: SigningCertificate | None) -> None:
        self._descriptor = descriptor
        self._oauth = oauth
        self._certificate = certificate
        self._path = urlsplit(descriptor.api).path.rstrip("/")

    @property
    def descriptor(self) -> Descriptor:
        return self._descriptor

    # -- consent

    def register_consent(self, consent: Consent, *, psu: PsuContext | None, call_id: str) -> UnsignedRequest | None:
        """POST /consents (6.3.1); None for a consent to payments only, which has no account access."""
        access = _access(consent)
        if not access:
            return None
        body = {
            "access": access,
            "recurringIndicator": True,
            "validUntil": consent.expire_time.date().isoformat(),
            "frequencyPerDay": self._descriptor.accounts.frequency_per_day,
            "combinedServiceIndicator": Purpose.PAYMENTS in consent.purposes,
        }
        headers = (*self._psu_headers(psu, required=True), *_redirect_headers(consent))
        return self._request("POST", "/consents", headers=headers, body=_json(body), call_id=call_id)

    def read_registration(self, answer: Answer, *, call_id: str) -> Reading[str] | Problem:
        document = _expected(answer, 201, call_id)
        if isinstance(document, Problem):
            return document
        identifier = text_at(document, "consentId")
        return Reading(value=identifier) if _IDENTIFIER.match(identifier) else _invalid()

    def push_authorisation(
        self, consent: Consent, *, state: str, code_challenge: str, now: datetime, assertion_id: str
    ) -> UnsignedRequest:
        scope = self._descriptor.oauth.scope
        scopes = (
            [scope.accounts.replace("{consent_id}", consent.provider_consent_id)] if consent.provider_consent_id else []
        )
        if Purpose.PAYMENTS in consent.purposes:
            scopes.append(scope.payments)
        return self._oauth.push_authorisation(
            consent,
            scope=" ".join(scopes),
            state=state,
            code_challenge=code_challenge,
            now=now,
            assertion_id=assertion_id,
        )

    def read_pushed_authorisation(self, answer: Answer) -> Reading[str] | Problem:
        return self._oauth.read_pushed_authorisation(answer)

    def exchange_code(self, consent: Consent, *, code: str, now: datetime, assertion_id: str) -> UnsignedRequest:
        return self._oauth.exchange_code(consent, code=code, now=now, assertion_id=assertion_id)

    def refresh(self, *, now: datetime, assertion_id: str) -> UnsignedRequest:
        return self._oauth.refresh(now=now, assertion_id=assertion_id)

    def revoke_token(self, *, now: datetime, assertion_id: str) -> UnsignedRequest | None:
        return self._oauth.revoke_token(now=now, assertion_id=assertion_id)

    def consent_details(self, consent: Consent, *, call_id: str) -> UnsignedRequest | None:
        """GET /consents/{consentId} (6.3.3)."""
        if not consent.provider_consent_id:
            return None
        return self._request("GET", f"/consents/{_segment(consent.provider_consent_id)}", call_id=call_id, token=True)

    def read_consent_details(self, answer: Answer, *, call_id: str) -> Reading[ConsentDetails] | Problem:
        document = _expected(answer, 200, call_id)
        if isinstance(document, Problem):
            return document
        references = _account_references(object_at(document, "access"))
        if references is None:
            return _invalid()
        return Reading(value=ConsentDetails(valid=text_at(document, "consentStatus") == "valid", accounts=references))

    def end_consent(self, consent: Consent, *, call_id: str) -> UnsignedRequest | None:
        """DELETE /consents/{consentId} (6.3.5)."""
        if not consent.provider_consent_id:
            return None
        return self._request(
            "DELETE", f"/consents/{_segment(consent.provider_consent_id)}", call_id=call_id, token=True
        )

    def read_end(self, answer: Answer) -> Problem | None:
        if answer.status in (204, 404):
            return None
        problem = _problem(answer)
        return None if problem.kind is ProblemKind.CONSENT_ENDED else problem

    # -- payments

    def initiate_payment(
        self, consent: Consent, instruction: PaymentInstruction, *, bank_key: str, psu: PsuContext | None, call_id: str
    ) -> UnsignedRequest:
        """POST /payments/{payment-product} (5.3.1)."""
        headers = [*self._psu_headers(psu, required=True), *_redirect_headers(consent)]
        if consent.provider_consent_id:
            headers.append(Header(name="Consent-ID", value=consent.provider_consent_id))
        idempotency = self._descriptor.payments.idempotency
        if idempotency.header:
            headers.append(Header(name=idempotency.header, value=bank_key))
        path = self._payment_path(instruction.product)
        body = _payment_body(instruction)
        if idempotency.lookup_parameter:
            body["instructionIdentification"] = _reference_of(bank_key)
        return self._request("POST", path, headers=tuple(headers), body=_json(body), call_id=call_id, token=True)

    def read_initiation(self, answer: Answer, *, call_id: str) -> InitiationReading:
        if answer.status == 201:
            return self._read_created(answer, call_id)
        codes = _error_codes(answer)
        listed = {
            code for row in self._descriptor.payments.refusals if row.status == answer.status for code in row.codes
        }
        if codes and listed.issuperset(codes) and _echoes(answer, call_id) and not _speaks_of_payment(answer):
            return InitiationRefused(code=codes[0])
        return InitiationUnknown(code=f"HTTP_{answer.status}")

    def _read_created(self, answer: Answer, call_id: str) -> InitiationReading:
        document = _expected(answer, 201, call_id)
        if isinstance(document, Problem):
            return InitiationUnknown(code="ANSWER_INVALID")
        identifier = text_at(document, "paymentId")
        reading = self._payment_reading(document)
        if not _IDENTIFIER.match(identifier) or reading is None:
            return InitiationUnknown(code="ANSWER_INVALID")
        return InitiationAccepted(provider_payment_id=identifier, reading=reading)

    def payment_status(self, payment: Payment, *, call_id: str) -> UnsignedRequest:
        """GET /payments/{payment-product}/{paymentId}/status (5.4)."""
        path = f"{self._payment_path(payment.instruction.product)}/{_segment(payment.provider_payment_id)}/status"
        return self._request("GET", path, call_id=call_id, token=True)

    def _payment_path(self, product: PaymentProduct) -> str:
        segment = self._descriptor.payments.products.get(product)
        if segment is None:
            raise PreconditionFailed("PROVIDER_REFUSED", "the provider does not offer this payment product any more")
        return f"/payments/{segment}"

    def read_payment_status(self, answer: Answer, *, call_id: str) -> Reading[PaymentReading] | Problem:
        document = _expected(answer, 200, call_id)
        if isinstance(document, Problem):
            return document
        reading = self._payment_reading(document)
        return Reading(value=reading) if reading else _invalid()

    def look_up_payment(self, payment: Payment, *, call_id: str) -> UnsignedRequest | None:
        """GET /payments/{payment-product}?PARAMETER=REFERENCE: the bank's own resource, the standard has none."""
        parameter = self._descriptor.payments.idempotency.lookup_parameter
        if parameter is None:
            return None
        query = urlencode({parameter: _reference_of(payment.bank_key)})
        path = f"{self._payment_path(payment.instruction.product)}?{query}"
        return self._request("GET", path, call_id=call_id, token=True)

    def read_look_up(
        self, answer: Answer, *, payment: Payment, call_id: str
    ) -> Reading[InitiationAccepted | None] | Problem:
        """A list with more pages, with payments of other references or with two of ours does not tell what became of this one.
        That there is none is believed only of an answer to this very request."""
        document = _expected(answer, 200, call_id)
        if isinstance(document, Problem):
            return document
        items = objects_at(document, "payments")
        if items is None or len(items) > 1 or "next" in object_at(document, "_links"):
            return _invalid()
        if not items:
            return Reading(value=None) if answer.header("x-request-id") else _invalid()
        identifier, reading = text_at(items[0], "paymentId"), self._payment_reading(items[0])
        reference = text_at(items[0], "instructionIdentification")
        if reference != _reference_of(payment.bank_key) or not _IDENTIFIER.match(identifier) or reading is None:
            return _invalid()
        return Reading(value=InitiationAccepted(provider_payment_id=identifier, reading=reading))

    def _payment_reading(self, document: JsonObject) -> PaymentReading | None:
        status = text_at(document, "transactionStatus", max_length=4)
        if not _STATUS.match(status):
            return None
        link = self._owner_link(document)
        if link and status in _AWAITING_OWNER:
            return PaymentReading(
                state=PaymentState.AWAITING_AUTHORISATION,
                provider_status=status,
                authorisation_uri=link,
                undecided=status in _UNDECIDED,
            )
        state = _PAYMENT_STATES.get(status, PaymentState.ACCEPTED)
        return PaymentReading(state=state, provider_status=status, undecided=status in _UNDECIDED)

    def _owner_link(self, document: JsonObject) -> str:
        """The scaRedirect link, if it leads where the descriptor says the owner may be sent; else ""."""
        href = text_at(object_at(object_at(document, "_links"), "scaRedirect"), "href", max_length=2048)
        return href if _safe_origin(href) in self._descriptor.owner_origins else ""

    # -- account reads

    def accounts(self, consent: Consent, *, psu: PsuContext | None, call_id: str) -> UnsignedRequest:
        return self._read("/accounts", consent, psu, call_id)

    def read_accounts(self, answer: Answer, *, call_id: str) -> Reading[tuple[Account, ...]] | Problem:
        return _read_all(answer, call_id, "accounts", _account)

    def balances(self, consent: Consent, account: str, *, psu: PsuContext | None, call_id: str) -> UnsignedRequest:
        return self._read(f"/accounts/{_segment(account)}/balances", consent, psu, call_id)

    def read_balances(self, answer: Answer, *, call_id: str) -> Reading[tuple[Balance, ...]] | Problem:
        return _read_all(answer, call_id, "balances", _balance)

    def transactions(
        self,
        consent: Consent,
        account: str,
        *,
        booking_status: BookingStatus,
        date_from: date,
        date_to: date | None,
        page_query: str,
        psu: PsuContext | None,
        call_id: str,
    ) -> UnsignedRequest:
        query = {"bookingStatus": booking_status.value, "dateFrom": date_from.isoformat()}
        if date_to:
            query["dateTo"] = date_to.isoformat()
        path = f"/accounts/{_segment(account)}/transactions?{page_query or urlencode(query)}"
        return self._read(path, consent, psu, call_id)

    def read_transactions(self, answer: Answer, *, account: str, call_id: str) -> Reading[TransactionPage] | Problem:
        document = _expected(answer, 200, call_id)
        if isinstance(document, Problem):
            return document
        report = object_at(document, "transactions")
        booked = _all(_list_at(report, "booked"), lambda item: _transaction(item, pending=False))
        pending = _all(_list_at(report, "pending"), lambda item: _transaction(item, pending=True))
        next_query = self._next_query(report, account)
        if not report or booked is None or pending is None or next_query is None:
            return _invalid()
        return Reading(value=TransactionPage(transactions=booked + pending, next_query=next_query))

    def _next_query(self, report: JsonObject, account: str) -> str | None:
        """The query of the next page's link: "" where there is none, None where there is one that leads away from this very
        resource. To take that for the end would be half an answer."""
        links = object_at(report, "_links")
        if "next" not in links:
            return ""
        href = text_at(object_at(links, "next"), "href", max_length=2048)
        parts = _parts(href)
        if parts is None or not _QUERY.match(parts.query):
            return None
        if (parts.scheme or parts.netloc) and _safe_origin(href) != origin_of(self._descriptor.api):
            return None
        own_path = f"/accounts/{_segment(account)}/transactions"
        return parts.query if parts.path in (self._path + own_path, own_path) else None

    def _read(self, path: str, consent: Consent, psu: PsuContext | None, call_id: str) -> UnsignedRequest:
        headers = (
            Header(name="Consent-ID", value=consent.provider_consent_id),
            *self._psu_headers(psu, required=False),
        )
        return self._request("GET", path, headers=headers, call_id=call_id, token=True)

    # -- rendering

    def _request(
        self,
        method: str,
        path: str,
        *,
        call_id: str,
        headers: tuple[Header, ...] = (),
        body: bytes = b"",
        token: bool = False,
    ) -> UnsignedRequest:
        everything = [
            Header(name="X-Request-ID", value=call_id),
            Header(name="Accept", value="application/json"),
            *headers,
        ]
        if body:
            everything.append(Header(name="Content-Type", value="application/json"))
        if token:
            everything.append(Header(name="Authorization", value="Bearer ", slot=_ACCESS_TOKEN))
        return self._to_sign(method, path, everything, body)

    def _to_sign(self, method: str, path: str, headers: list[Header], body: bytes) -> UnsignedRequest:
        names: list[str] = []
        if self._certificate:
            headers.append(Header(name="Digest", value=digest_header(body)))
            headers.append(Header(name="TPP-Signature-Certificate", value=self._certificate.header_value))
            signing = self._descriptor.signing
            sent = {header.name.lower() for header in headers}
            names = [*signing.signed_headers, *(name for name in signing.signed_if_sent if name in sent)]
        return UnsignedRequest(
            request=ProviderRequest(
                method=method,
                origin=origin_of(self._descriptor.api),
                target=self._path + path,
                headers=tuple(headers),
                body=(body,) if body else (),
            ),
            key=KeyPurpose.REQUEST_SIGNING,
            signing_input=signing_string(headers, names) if names else b"",
            place=SignaturePlace.HEADER,
            prefix=signature_prefix(self._certificate.key_id, names) if self._certificate else "",
            suffix='"',
            encoding=Base64Der(),
        )

    def _psu_headers(self, psu: PsuContext | None, *, required: bool) -> tuple[Header, ...]:
        """PSU-IP-Address on a read says that the person is asking; on a POST it is mandatory (the TPP's own as last resort)."""
        if psu is None:
            return (Header(name="PSU-IP-Address", value=self._descriptor.tpp_ip_address),) if required else ()
        headers = [Header(name="PSU-IP-Address", value=psu.ip_address)]
        if psu.user_agent:
            headers.append(Header(name="PSU-User-Agent", value=psu.user_agent))
        return tuple(headers)


# --- reading ------------------------------------------------------------------------------------------------------------


def _expected(answer: Answer, status: int, call_id: str) -> JsonObject | Problem:
    """The JSON object of an answer with the expected status, or the problem it shows. An answer to another request shows none."""
    if not _echoes(answer, call_id):
        return _invalid()
    if answer.status != status:
        return _problem(answer)
    if not _is_json(answer):
        return _invalid()
    return read_object(answer.body) or _invalid()


def _echoes(answer: Answer, call_id: str) -> bool:
    """False when the answer names another request than ours: it may belong to somebody else's call."""
    echoed = [value for name, value in answer.headers if name == "x-request-id"]
    return all(value.lower() == call_id.lower() for value in echoed)


def _is_json(answer: Answer) -> bool:
    media_type = (answer.header("content-type") or "").partition(";")[0].strip().lower()
    return media_type in ("application/json", "application/problem+json")


def _problem(answer: Answer) -> Problem:
    code = _error_code(answer)
    if answer.status == 401 and code in _TOKEN_EXPIRED:
        return Problem(kind=ProblemKind.TOKEN_EXPIRED, code=code)
    if answer.status in (400, 401, 403) and code in _CONSENT_ENDED:
        return Problem(kind=ProblemKind.CONSENT_ENDED, code=code)
    if answer.status == 429:
        return Problem(kind=ProblemKind.ACCESS_EXCEEDED, code=code)
    if answer.status == 404:
        return Problem(kind=ProblemKind.NOT_FOUND, code=code)
    if answer.status >= 500 or answer.status in (408, 425):
        return Problem(kind=ProblemKind.UNAVAILABLE, code=code)
    return Problem(kind=ProblemKind.REFUSED if 400 <= answer.status < 500 else ProblemKind.INVALID_ANSWER, code=code)


def _error_code(answer: Answer) -> str:
    """The first error code, or ""."""
    return next(iter(_error_codes(answer)), "")


def _error_codes(answer: Answer) -> tuple[str, ...]:
    """All error codes of either form of Berlin Group error (tppMessages, or RFC 7807 with `code` and `additionalErrors`); none
    where one of them has no form of a code, because then not all that went wrong is known."""
    document = read_object(answer.body) if _is_json(answer) else None
    if document is None:
        return ()
    messages = (*_some(document, "tppMessages"), *_some(document, "additionalErrors"))
    codes = [text_at(message, "code") for message in messages if text_at(message, "category") != "WARNING"]
    if "code" in document:
        codes.insert(0, text_at(document, "code"))
    return tuple(codes) if all(_CODE.match(code) for code in codes) else ()


def _some(document: JsonObject, name: str) -> tuple[JsonObject, ...]:
    """The objects of the array `name`, () where there is no such member; a member of another form counts as one without a code."""
    items = _list_at(document, name)
    return ({},) if items is None else items


def _speaks_of_payment(answer: Answer) -> bool:
    """Whether an error answer names a payment resource or a status other than rejected: then one may have been made."""
    document = read_object(answer.body) or {}
    return "paymentId" in document or document.get("transactionStatus", "RJCT") != "RJCT"


def _invalid() -> Problem:
    return Problem(kind=ProblemKind.INVALID_ANSWER)


def _read_all(
    answer: Answer, call_id: str, name: str, read: Callable[[JsonObject], T | None]
) -> Reading[tuple[T, ...]] | Problem:
    document = _expected(answer, 200, call_id)
    if isinstance(document, Problem):
        return document
    values = _all(objects_at(document, name), read)
    return _invalid() if values is None else Reading(value=values)


def _list_at(document: JsonObject, name: str) -> tuple[JsonObject, ...] | None:
    """The objects of the array `name`; () where it is missing, None where it is something else."""
    return objects_at(document, name) if name in document else ()


def _all(items: tuple[JsonObject, ...] | None, read: Callable[[JsonObject], T | None]) -> tuple[T, ...] | None:
    """All items read, or None if any of them cannot be: half an answer about money is no answer."""
    if items is None:
        return None
    values = tuple(value for value in map(read, items) if value is not None)
    return values if len(values) == len(items) else None


def _account(item: JsonObject) -> Account | None:
    resource_id, currency = text_at(item, "resourceId"), text_at(item, "currency", max_length=3)
    if not _ACCOUNT_IDENTIFIER.match(resource_id) or not currency:
        return None
    return Account(
        resource_id=resource_id,
        iban=text_at(item, "iban", max_length=34),
        currency_code=currency,
        owner_name=text_at(item, "ownerName", max_length=140),
        display_name=text_at(item, "displayName", max_length=70) or text_at(item, "name", max_length=70),
        product=text_at(item, "product", max_length=35),
        cash_account_type=text_at(item, "cashAccountType", max_length=4),
    )


def _balance(item: JsonObject) -> Balance | None:
    amount = _amount(object_at(item, "balanceAmount"))
    balance_type = text_at(item, "balanceType", max_length=35)
    if amount is None or not balance_type:
        return None
    return Balance(
        balance_type=balance_type,
        amount=amount,
        credit_limit_included=included if isinstance(included := item.get("creditLimitIncluded"), bool) else None,
        reference_date=_date(text_at(item, "referenceDate")),
        last_change_time=_time(text_at(item, "lastChangeDateTime")),
    )


def _transaction(item: JsonObject, *, pending: bool) -> Transaction | None:
    amount = _amount(object_at(item, "transactionAmount"))
    if amount is None:
        return None
    return Transaction(
        transaction_id=text_at(item, "transactionId", max_length=128),
        entry_reference=text_at(item, "entryReference", max_length=128),
        end_to_end_id=text_at(item, "endToEndId", max_length=35),
        amount=amount,
        pending=pending,
        booking_date=_date(text_at(item, "bookingDate")),
        value_date=_date(text_at(item, "valueDate")),
        creditor_name=text_at(item, "creditorName", max_length=140),
        creditor_iban=text_at(object_at(item, "creditorAccount"), "iban", max_length=34),
        debtor_name=text_at(item, "debtorName", max_length=140),
        debtor_iban=text_at(object_at(item, "debtorAccount"), "iban", max_length=34),
        remittance_information=text_at(item, "remittanceInformationUnstructured", max_length=140),
    )


def _amount(item: JsonObject) -> Money | None:
    return parse_amount(text_at(item, "currency", max_length=3), text_at(item, "amount", max_length=20))


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if len(text) == 10 else None
    except ValueError:
        return None


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _parts(href: str) -> SplitResult | None:
    """The parts of a link, None where it is none: urlsplit raises for some texts and repairs others, and neither is wanted."""
    try:
        parts = urlsplit(href) if _HREF.match(href) else None
        return None if parts is None or parts.port == 0 else parts
    except ValueError:
        return None


def _safe_origin(href: str) -> str:
    """The origin of an absolute https link without userinfo, or ""."""
    parts = _parts(href)
    if parts is None or parts.scheme != "https" or not parts.hostname or "@" in parts.netloc:
        return ""
    return origin_of(href)


# --- bodies -------------------------------------------------------------------------------------------------------------


def _redirect_headers(consent: Consent) -> tuple[Header, ...]:
    """An imported consent has no redirect URI of ours, and a header without a value says nothing."""
    return (Header(name="TPP-Redirect-URI", value=consent.redirect_uri),) if consent.redirect_uri else ()


def _access(consent: Consent) -> dict[str, object]:
    """`access` of 1.3.11: named accounts, or empty arrays where the owner chooses at the bank."""
    references = [_reference(account) for account in consent.accounts]
    return {purpose.value: references for purpose in _ACCOUNT_PURPOSES if purpose in consent.purposes}


def _account_references(access: JsonObject) -> tuple[AccountReference, ...] | None:
    """Every account that any kind of access names, once; None where the answer is not of this form."""
    found: dict[str, AccountReference] = {}
    for purpose in _ACCOUNT_PURPOSES:
        if purpose.value not in access:
            continue
        items = objects_at(access, purpose.value)
        if items is None:
            return None
        for item in items:
            iban = text_at(item, "iban", max_length=34)
            if iban:
                found.setdefault(
                    iban, AccountReference(iban=iban, currency_code=text_at(item, "currency", max_length=3))
                )
    return tuple(found.values())


def _payment_body(instruction: PaymentInstruction) -> dict[str, object]:
    body: dict[str, object] = {
        "debtorAccount": _reference(instruction.debtor_account),
        "instructedAmount": {"currency": instruction.amount.currency_code, "amount": instruction.amount.amount},
        "creditorAccount": _reference(instruction.creditor_account),
        "creditorName": instruction.creditor_name,
    }
    if instruction.end_to_end_id:
        body["endToEndIdentification"] = instruction.end_to_end_id
    if instruction.remittance_information:
        body["remittanceInformationUnstructured"] = instruction.remittance_information
    return body


def _reference_of(bank_key: str) -> str:
    """Our key as an instructionIdentification, which has at most 35 characters (Max35Text of ISO 20022)."""
    return bank_key.replace("-", "")


def _reference(account: AccountReference) -> dict[str, str]:
    return {"iban": account.iban, **({"currency": account.currency_code} if account.currency_code else {})}


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def _segment(identifier: str) -> str:
    """One path segment: an identifier of the bank can never name another resource of theirs."""
    return quote(identifier, safe="")
