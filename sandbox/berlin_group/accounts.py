"""Accounts, balances, transactions.

Rules this module keeps:
- Only accounts that the person ticked, and only the rights that the consent gives on each.
- A read without PSU-IP-Address is one without the person, and counts.
"""

import datetime
from collections.abc import Iterable, Mapping
from urllib.parse import quote, urlencode

from sandbox import pki
from sandbox.berlin_group.callers import Callers, must_have_role
from sandbox.berlin_group.fields import Refusal, date, psu_ip, whole
from sandbox.books import BIC, Account, Books, Movement, format_cents, iso_date, iso_time
from sandbox.consents import RIGHTS, Consent, Consents, FrequencyExceeded
from sandbox.directory import Client
from sandbox.oauth import Grant
from sandbox.web import Answer, Call, Clock, json_answer, parse_parameters

_DEFAULT_PAGE = 25
_MAX_PAGE = 200


class AccountEndpoints:
    """`/v1/accounts`."""

    def __init__(self, *, clock: Clock, books: Books, consents: Consents, callers: Callers) -> None:
        self._clock = clock
        self._books = books
        self._consents = consents
        self._callers = callers

    def read(self, call: Call, client: Client, rest: list[str]) -> Answer:
        """Answer a read of `/v1/accounts` and below."""
        must_have_role(call, pki.ROLE_ACCOUNTS)
        attended = psu_ip(call, required=False)
        grant = self._callers.grant(call, client)
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
        first = date(query.get("dateFrom"), "dateFrom")
        last = date(query["dateTo"], "dateTo") if "dateTo" in query else datetime.date.max
        if last < first:
            raise Refusal(400, "PERIOD_INVALID", "dateTo is before dateFrom")
        page = whole(query.get("pageIndex", "0"), "pageIndex", 0, 1_000_000)
        size = whole(query.get("itemsPerPage", str(_DEFAULT_PAGE)), "itemsPerPage", 1, _MAX_PAGE)
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


def _must_allow(consent: Consent, right: str, account: Account) -> None:
    if not consent.may(right, account.iban):
        raise Refusal(401, "CONSENT_INVALID", f"the consent does not give {right} of this account")


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
