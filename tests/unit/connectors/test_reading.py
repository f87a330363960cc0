"""What a bank answers: nothing raises, half an answer is none, no link is followed, only a listed answer is a refusal (3b, G)."""

import json
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.connectors.base import (
    ConsentDetails,
    InitiationAccepted,
    InitiationReading,
    InitiationRefused,
    InitiationUnknown,
    Problem,
    ProblemKind,
    Reading,
)
from sidecar.domain.consent import AccountReference
from sidecar.domain.money import Money
from sidecar.domain.payment import PaymentState
from sidecar.domain.provider import Answer
from tests.unit.connectors.support import CALL, CLASS_B, IBAN, JSON, KEY, answer, connector, payment

S, P = PaymentState, ProblemKind
BANK = connector()
OTHER_CALL = "99999999-9999-4999-8999-999999999999"
CREATED = {"transactionStatus": "ACTC", "paymentId": "bank-1", "_links": {}}


def created(changes: dict[str, Any] | None = None, *, status: int = 201, headers: object = JSON) -> Answer:
    return Answer(status=status, headers=headers, body=json.dumps({**CREATED, **(changes or {})}).encode())  # type: ignore[arg-type]


def initiation(given: Answer) -> InitiationReading:
    return BANK.read_initiation(given, call_id=CALL)


def refusal(status: int, *codes: str, **more: object) -> Answer:
    messages = [{"category": "ERROR", "code": code} for code in codes]
    return answer(status, json.dumps({"tppMessages": messages, **more}).encode())


def with_redirect(href: object, status: str = "RCVD") -> Answer:
    return created({"transactionStatus": status, "_links": {"scaRedirect": {"href": href}}})


# --- initiation: a clear yes


def test_a_created_payment_is_accepted_with_its_id_and_status() -> None:
    """201, JSON, our X-Request-ID, an id and a status."""
    reading = initiation(created())

    assert isinstance(reading, InitiationAccepted)
    assert (reading.provider_payment_id, reading.reading.state, reading.reading.provider_status) == (
        "bank-1",
        S.ACCEPTED,
        "ACTC",
    )


ACCEPTED = {
    "G2 charset": created(headers=(("content-type", "application/json; charset=utf-8"), ("x-request-id", CALL))),
    "G2 capitals": created(headers=(("content-type", "Application/JSON"), ("x-request-id", CALL.upper()))),
    "G19 no echo": created(headers=(("content-type", "application/json"),)),
    "G43 cookie": created(headers=(*JSON, ("set-cookie", "a=b"))),
    "G21 unknown status": created({"transactionStatus": "ABCD"}),
    "more members": created({"tppMessages": [], "psuMessage": "Hallo", "chargeBearer": None}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_a_bank_may_do_is_accepted(case: str) -> None:
    """Charsets, missing echo, codes that are new: still a clear yes, and an unknown status is in progress."""
    reading = initiation(ACCEPTED[case])

    assert isinstance(reading, InitiationAccepted)
    assert reading.reading.state is S.ACCEPTED


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("ACSC", S.SETTLED),
        ("ACCC", S.SETTLED),
        ("RJCT", S.REJECTED_LATE),
        ("CANC", S.CANCELLED),
        *(
            (code, S.ACCEPTED)
            for code in ("RCVD", "PDNG", "PATC", "ACTC", "ACFC", "ACCP", "ACSP", "ACWC", "ACWP", "PART")
        ),
    ],
)
def test_each_status_of_1_3_11_means_one_state(status: str, state: PaymentState) -> None:
    """ISO 20022 as Berlin Group lists it; only the debtor's or creditor's settlement is SETTLED."""
    reading = initiation(created({"transactionStatus": status}))

    assert isinstance(reading, InitiationAccepted)
    assert reading.reading.state is state
    assert reading.reading.undecided == (status in ("RCVD", "PATC"))


# --- initiation: a listed no


@pytest.mark.parametrize("name", ["sandbox-bank", "sandbox-bank-idempotent", "sandbox-bank-lookup"])
def test_every_refusal_that_the_descriptor_lists_is_one(name: str) -> None:
    """Status and code together, in either form of error."""
    bank = connector(name)
    for row in bank.descriptor.payments.refusals:
        for code in row.codes:
            assert bank.read_initiation(refusal(row.status, code), call_id=CALL) == InitiationRefused(code=code)
            problem = answer(
                row.status,
                json.dumps({"type": "x", "code": code}).encode(),
                ("content-type", "application/problem+json"),
            )
            assert bank.read_initiation(problem, call_id=CALL) == InitiationRefused(code=code)


# --- look-up


LISTED = {"paymentId": "bank-1", "transactionStatus": "ACSP", "instructionIdentification": KEY.replace("-", "")}


def listed(*items: object, headers: object = JSON, status: int = 200, **more: object) -> Answer:
    return Answer(status=status, headers=headers, body=json.dumps({"payments": items, **more}).encode())  # type: ignore[arg-type]


def looked_up(given: Answer) -> Reading[InitiationAccepted | None] | Problem:
    return connector(CLASS_B).read_look_up(given, payment=payment(), call_id=CALL)


@pytest.mark.parametrize(
    ("status", "state"), [("ACSP", S.ACCEPTED), ("ACSC", S.SETTLED), ("RJCT", S.REJECTED_LATE), ("ABCD", S.ACCEPTED)]
)
def test_a_payment_that_is_listed_under_our_key_was_made(status: str, state: PaymentState) -> None:
    """Its id and status as in an answer to the initiation."""
    reading = looked_up(listed({**LISTED, "transactionStatus": status}))

    assert isinstance(reading, Reading)
    assert reading.value is not None
    assert (reading.value.provider_payment_id, reading.value.reading.state) == ("bank-1", state)


def test_a_whole_list_without_payments_has_none() -> None:
    """An empty array, in an answer that names our request."""
    assert looked_up(listed()) == Reading(value=None)


NOT_TOLD = {
    "no list": answer(200, b"{}"),
    "null": answer(200, b'{"payments":null}'),
    "list of texts": listed("bank-1"),
    "two": listed(LISTED, LISTED),
    "another's": listed({**LISTED, "instructionIdentification": "0" * 32}),
    "without reference": listed({"paymentId": "bank-1", "transactionStatus": "ACSC"}),
    "without id": listed({**LISTED, "paymentId": ""}),
    "id with a slash": listed({**LISTED, "paymentId": "a/b"}),
    "without status": listed({**LISTED, "transactionStatus": None}),
    "more pages": listed(_links={"next": {"href": "/v1/payments/x?page=2"}}),
    "more pages, empty link": listed(_links={"next": None}),
    "none, for no request": listed(headers=JSON[:1]),
    "none, for another request": listed(headers=(JSON[0], ("x-request-id", OTHER_CALL))),
    "none, html": listed(headers=(("content-type", "text/html"), JSON[1])),
    "none, 206": listed(status=206),
    "none, truncated": replace(listed(), body=listed().body[:-1]),
    "none, 201": listed(status=201),
    "404": refusal(404, "RESOURCE_UNKNOWN"),
    "500": refusal(500, "X_Y"),
    "redirect": listed(status=302),
}


@pytest.mark.parametrize("case", NOT_TOLD)
def test_what_does_not_tell_all_says_neither_yes_nor_no(case: str) -> None:
    """Half a list, another's payment, an answer to somebody else: a problem, never "not found"."""
    assert isinstance(looked_up(NOT_TOLD[case]), Problem)


UNKNOWN = {
    "G1 no body": answer(201, b""),
    "G2 html": replace(created(), headers=(("content-type", "text/html"), ("x-request-id", CALL))),
    "G2 no type": replace(created(), headers=(("x-request-id", CALL),)),
    "G2 two types": replace(created(), headers=(*JSON, ("content-type", "application/json"))),
    "G2 xml": answer(201, b"<a/>", ("content-type", "application/xml")),
    "G2 charset lie": replace(created(), body=json.dumps(CREATED).encode("utf-16")),
    "G3 truncated": replace(created(), body=created().body[:-1]),
    "G3 trailing": replace(created(), body=created().body + b"x"),
    "G3 duplicate": answer(201, b'{"paymentId":"a","paymentId":"b","transactionStatus":"ACSC"}'),
    "G3 deep duplicate": answer(201, b'{"paymentId":"a","transactionStatus":"ACSC","_links":{"a":1,"a":2}}'),
    "G3 bom": replace(created(), body=b"\xef\xbb\xbf" + created().body),
    "G3 nan": answer(201, b'{"paymentId":"a","transactionStatus":"ACSC","x":NaN}'),
    "G3 1e999": answer(201, b'{"paymentId":"a","transactionStatus":"ACSC","x":1e999}'),
    "G3 depth": answer(201, b'{"paymentId":"a","transactionStatus":"ACSC","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "G3 long number": answer(201, b'{"paymentId":"a","transactionStatus":"ACSC","x":' + b"1" * 5000 + b"}"),
    "G3 list": answer(201, b"[]"),
    "G3 latin-1": answer(201, '{"paymentId":"a","transactionStatus":"ACSC","x":"ä"}'.encode("latin-1")),
    "G6 200": created(status=200),
    "G7 202": created(status=202),
    "G7 204": answer(204, b""),
    "G8 301": created(status=301),
    "G8 307": refusal(307, "FORMAT_ERROR"),
    "G9 400 unlisted": refusal(400, "SESSIONS_NOT_SUPPORTED"),
    "G9 400 no code": answer(400, b"{}"),
    "G9 400 listed for another status": refusal(404, "FORMAT_ERROR"),
    "G9 400 one listed, one not": refusal(400, "FORMAT_ERROR", "INTERNAL_SERVER_ERROR"),
    "G9 400 one listed, one unreadable": answer(
        400, b'{"tppMessages":[{"category":"ERROR","code":"FORMAT_ERROR"},{"category":"ERROR"}]}'
    ),
    "G9 400 warning only": answer(400, b'{"tppMessages":[{"category":"WARNING","code":"FORMAT_ERROR"}]}'),
    "G9 400 messages no list": answer(400, b'{"tppMessages":"x","code":"FORMAT_ERROR"}'),
    "G9 400 lower case": refusal(400, "format_error"),
    "G9 400 with a payment": refusal(400, "FORMAT_ERROR", paymentId="bank-1"),
    "G9 400 with a status": refusal(400, "PAYMENT_FAILED", transactionStatus="ACSC"),
    "G9 400 of another call": Answer(
        status=400, headers=(JSON[0], ("x-request-id", OTHER_CALL)), body=refusal(400, "FORMAT_ERROR").body
    ),
    "G9 400 html": replace(refusal(400, "FORMAT_ERROR"), headers=(("content-type", "text/html"),)),
    "G14 408": refusal(408, "FORMAT_ERROR"),
    "G14 425": refusal(425, "FORMAT_ERROR"),
    "G15 409": refusal(409, "FORMAT_ERROR", paymentId="bank-1"),
    "G16 429": refusal(429, "FORMAT_ERROR"),
    "G17 500": refusal(500, "FORMAT_ERROR"),
    "G17 503": refusal(503, "FORMAT_ERROR"),
    "G18 299": created(status=299),
    "G18 499": refusal(499, "FORMAT_ERROR"),
    "G18 599": refusal(599, "FORMAT_ERROR"),
    "G18 999": refusal(999, "FORMAT_ERROR"),
    "G19 other": replace(created(), headers=(JSON[0], ("x-request-id", OTHER_CALL))),
    "G19 ours and another": replace(created(), headers=(*JSON, ("x-request-id", OTHER_CALL))),
    "G20 id empty": created({"paymentId": ""}),
    "G20 id missing": answer(201, b'{"transactionStatus":"ACSC"}'),
    "G20 id null": created({"paymentId": None}),
    "G20 id number": created({"paymentId": 7}),
    "G20 id dot": created({"paymentId": "."}),
    "G20 id dots": created({"paymentId": ".."}),
    "G20 id path": created({"paymentId": "a/../b"}),
    "G20 id long": created({"paymentId": "a" * 129}),
    "G20 id blank": created({"paymentId": "a b"}),
    "G20 id line": created({"paymentId": "a\n"}),
    "G20 id percent": created({"paymentId": "%2e%2e"}),
    "G21 lower case": created({"transactionStatus": "acsc"}),
    "G21 null": created({"transactionStatus": None}),
    "G21 list": created({"transactionStatus": ["ACSC"]}),
    "G21 long": created({"transactionStatus": "ACSCX"}),
    "G21 missing": answer(201, b'{"paymentId":"a"}'),
    "G21 surrogate": answer(201, b'{"paymentId":"a","transactionStatus":"AC\\ud800S"}'),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_everything_else_is_unknown(case: str) -> None:
    """Neither yes nor no: the bank may have made the payment."""
    assert isinstance(initiation(UNKNOWN[case]), InitiationUnknown)


# --- where the owner is sent


def test_the_owner_is_sent_to_the_bank_by_the_link_unchanged() -> None:
    """An https link to an origin that the descriptor names."""
    href = "https://issuer.bank.example/approve/1?a=b&c=d"
    reading = initiation(with_redirect(href))

    assert isinstance(reading, InitiationAccepted)
    assert (reading.reading.state, reading.reading.authorisation_uri) == (S.AWAITING_AUTHORISATION, href)


@pytest.mark.parametrize(
    "href",
    [
        "javascript:alert(1)",
        "http://issuer.bank.example/x",
        "https://evil.example/x",
        "https://issuer.bank.example.evil.example/x",
        "https://issuer.bank.example@evil.example/x",
        "https://evil@issuer.bank.example/x",
        "https://:pw@issuer.bank.example/x",
        "https://issuer.bank.example\\@evil.example/x",
        "https://issuer.bank.example:8443/x",
        "https://issuer.bank.example:0/x",
        "https://issuer.bank.example:99999/x",
        "https://issuer.bank.example:x/x",
        "https://[/x",
        "https://[::1",
        "https://issuer.bank.example℀/x",
        " https://issuer.bank.example/x",
        "https://issuer.bank.example/x y",
        "https://issuer.bank.example/\nx",
        "//issuer.bank.example/x",
        "/approve/1",
        "data:text/html,x",
        "https://ıssuer.bank.example/x",
        "https://issuer.bank.example/" + "x" * 2048,
        "",
        None,
        7,
        ["https://issuer.bank.example/x"],
    ],
)
def test_bi_g26_the_owner_is_sent_nowhere_else(href: object) -> None:
    """G25, G26: other hosts, schemes, ports and texts that only look like links: no link, no exception, and the payment stays."""
    reading = initiation(with_redirect(href))

    assert isinstance(reading, InitiationAccepted)
    assert reading.reading.authorisation_uri == ""
    assert reading.reading.state is S.ACCEPTED


def test_a_payment_that_is_decided_needs_no_owner() -> None:
    """A redirect link beside ACSC is not shown."""
    reading = initiation(with_redirect("https://issuer.bank.example/x", "ACSC"))

    assert isinstance(reading, InitiationAccepted)
    assert (reading.reading.state, reading.reading.authorisation_uri) == (S.SETTLED, "")


# --- status and problems


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (refusal(401, "TOKEN_EXPIRED"), P.TOKEN_EXPIRED),
        (refusal(401, "TOKEN_INVALID"), P.CONSENT_ENDED),
        (refusal(401, "CONSENT_EXPIRED"), P.CONSENT_ENDED),
        (refusal(403, "CONSENT_UNKNOWN"), P.CONSENT_ENDED),
        (refusal(500, "CONSENT_EXPIRED"), P.UNAVAILABLE),
        (refusal(401, "CERTIFICATE_INVALID"), P.REFUSED),
        (refusal(429, "ACCESS_EXCEEDED"), P.ACCESS_EXCEEDED),
        (refusal(404, "RESOURCE_UNKNOWN"), P.NOT_FOUND),
        (answer(404, b"<html>"), P.NOT_FOUND),
        (refusal(408, "X_Y"), P.UNAVAILABLE),
        (answer(302, b""), P.INVALID_ANSWER),
        (answer(204, b""), P.INVALID_ANSWER),
        (answer(200, b"{}"), P.INVALID_ANSWER),
        (answer(200, b'{"transactionStatus":"acsc"}'), P.INVALID_ANSWER),
        (replace(refusal(401, "CONSENT_EXPIRED"), headers=(JSON[0], ("x-request-id", OTHER_CALL))), P.INVALID_ANSWER),
    ],
)
def test_each_problem_has_its_kind(given: Answer, kind: ProblemKind) -> None:
    """What the core acts on; an error of somebody else's call is none of ours."""
    problem = BANK.read_payment_status(given, call_id=CALL)

    assert isinstance(problem, Problem)
    assert problem.kind is kind


def test_a_status_is_read() -> None:
    """The status resource holds a status and no more."""
    reading = BANK.read_payment_status(answer(200, b'{"transactionStatus":"ACSC"}'), call_id=CALL)

    assert isinstance(reading, Reading)
    assert reading.value.state is S.SETTLED


@pytest.mark.parametrize(
    ("given", "ended"),
    [
        (answer(204, b""), True),
        (refusal(404, "RESOURCE_UNKNOWN"), True),
        (refusal(401, "CONSENT_EXPIRED"), True),
        (refusal(401, "TOKEN_EXPIRED"), False),
        (refusal(500, "X_Y"), False),
        (answer(200, b"{}"), False),
    ],
)
def test_an_end_is_an_end_only_where_the_bank_says_so(given: Answer, *, ended: bool) -> None:
    """Done, or no such consent any more."""
    assert (BANK.read_end(given) is None) == ended


# --- consents


@pytest.mark.parametrize("identifier", ["", ".", "..", "a/b", "a b", None, "a" * 129, "a\r\nb"])
def test_a_registration_without_a_usable_id_is_none(identifier: object) -> None:
    """The id goes into paths and headers of ours."""
    body = json.dumps({"consentId": identifier, "consentStatus": "received"}).encode()

    assert BANK.read_registration(answer(201, body), call_id=CALL) == Problem(kind=P.INVALID_ANSWER)


def test_the_accounts_that_the_owner_chose_are_read_once_each() -> None:
    """From every kind of access; whatever is no list of objects makes the answer unusable."""
    entry = {"iban": IBAN, "currency": "EUR"}
    body = {"consentStatus": "valid", "access": {"accounts": [entry], "balances": [entry, {"maskedPan": "x"}]}}
    wrong = {"consentStatus": "valid", "access": {"accounts": [entry], "balances": "all"}}

    assert BANK.read_consent_details(answer(200, json.dumps(body).encode()), call_id=CALL) == Reading(
        value=ConsentDetails(valid=True, accounts=(AccountReference(iban=IBAN, currency_code="EUR"),))
    )
    assert isinstance(BANK.read_consent_details(answer(200, json.dumps(wrong).encode()), call_id=CALL), Problem)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (answer(200, b'{"request_uri":"urn:x"}'), P.INVALID_ANSWER),
        (answer(201, b"{}"), P.INVALID_ANSWER),
        (answer(201, b'{"request_uri":7}'), P.INVALID_ANSWER),
        (answer(400, b'{"error":"invalid_request"}'), P.REFUSED),
        (answer(400, b"{}"), P.INVALID_ANSWER),
        (answer(429, b"{}"), P.UNAVAILABLE),
        (answer(503, b"{}"), P.UNAVAILABLE),
    ],
)
def test_a_pushed_authorisation_that_was_not_taken_is_a_problem(given: Answer, kind: ProblemKind) -> None:
    """RFC 9126: 201 with a request_uri, or no."""
    problem = BANK.read_pushed_authorisation(given)

    assert isinstance(problem, Problem)
    assert problem.kind is kind


def test_the_request_uri_cannot_break_out_of_the_authorisation_uri() -> None:
    """It is one encoded parameter, whatever it holds."""
    reading = BANK.read_pushed_authorisation(answer(201, b'{"request_uri":"x&redirect_uri=https://evil.example#"}'))

    assert isinstance(reading, Reading)
    assert reading.value.endswith("&request_uri=x%26redirect_uri%3Dhttps%3A%2F%2Fevil.example%23")


# --- accounts


def lines(**report: object) -> Answer:
    return answer(200, json.dumps({"transactions": report}).encode())


LINE = {"transactionAmount": {"currency": "EUR", "amount": "-1.50"}, "bookingDate": "2026-11-01"}


def test_transactions_are_read_exactly() -> None:
    """Signed amounts, dates, and what is pending."""
    reading = BANK.read_transactions(lines(booked=[LINE], pending=[LINE]), account="acc-1", call_id=CALL)

    assert isinstance(reading, Reading)
    first, second = reading.value.transactions
    assert (first.amount, first.booking_date, first.pending) == (
        Money(currency_code="EUR", minor_units=-150),
        date(2026, 11, 1),
        False,
    )
    assert second.pending
    assert reading.value.next_query == ""


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"booked": None},
        {"booked": {}},
        {"booked": ["x"]},
        {"booked": [LINE, {}]},
        {"booked": [{"transactionAmount": {"currency": "EUR", "amount": "1.001"}}]},
        {"booked": [{"transactionAmount": {"currency": "EUR", "amount": 1.5}}]},
        {"booked": [{"transactionAmount": {"currency": "XXX", "amount": "1"}}]},
        {"booked": [LINE], "pending": "none"},
    ],
)
def test_half_a_report_is_none(report: dict[str, Any]) -> None:
    """A line that cannot be read, or a list that is none, is never left out silently."""
    reading = BANK.read_transactions(lines(**report), account="acc-1", call_id=CALL)

    assert reading == Problem(kind=P.INVALID_ANSWER)


@pytest.mark.parametrize(
    ("href", "query"),
    [
        ("/v1/accounts/acc-1/transactions?page=2", "page=2"),
        ("/accounts/acc-1/transactions?page=2&x=a:b,c", "page=2&x=a:b,c"),
        ("https://api.bank.example/v1/accounts/acc-1/transactions?page=2", "page=2"),
        ("https://api.bank.example:443/v1/accounts/acc-1/transactions?page=2", "page=2"),
        ("https://evil.example/v1/accounts/acc-1/transactions?page=2", None),
        ("//evil.example/v1/accounts/acc-1/transactions?page=2", None),
        ("http://api.bank.example/v1/accounts/acc-1/transactions?page=2", None),
        ("https://x@api.bank.example/v1/accounts/acc-1/transactions?page=2", None),
        ("/v1/accounts/acc-2/transactions?page=2", None),
        ("/v1/accounts/acc-1/transactions/../../acc-2/transactions?page=2", None),
        ("/v1/accounts/acc-1/transactions", None),
        ("https://[", None),
        ("javascript:x", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_a_next_page_is_one_of_this_very_account_or_the_answer_is_unusable(href: object, query: str | None) -> None:
    """G25: of a link only the query is taken; a page that cannot be asked for is not the end."""
    report = lines(booked=[LINE], _links={"next": {"href": href}})
    reading = BANK.read_transactions(report, account="acc-1", call_id=CALL)

    if query is None:
        assert reading == Problem(kind=P.INVALID_ANSWER)
    else:
        assert isinstance(reading, Reading)
        assert reading.value.next_query == query


@pytest.mark.parametrize("identifier", ["", ".", "..", "a/b", "-a", "a?b", None])
def test_an_account_without_a_usable_id_makes_the_list_unusable(identifier: object) -> None:
    """It goes into paths, and the contract's names begin with a letter or digit."""
    body = {"accounts": [{"resourceId": "ok", "currency": "EUR"}, {"resourceId": identifier, "currency": "EUR"}]}

    assert isinstance(BANK.read_accounts(answer(200, json.dumps(body).encode()), call_id=CALL), Problem)


def test_an_empty_list_of_accounts_is_an_answer() -> None:
    """200 with an empty array; a missing one is none."""
    assert BANK.read_accounts(answer(200, b'{"accounts":[]}'), call_id=CALL) == Reading(value=())
    assert isinstance(BANK.read_accounts(answer(200, b'{"x":[]}'), call_id=CALL), Problem)


# --- fuzz

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["bank-1", "..", "RCVD", "ACSC", "RJCT", "FORMAT_ERROR", "https://[", "https://issuer.bank.example/x", "ERROR"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=12,
)
NAMES = [
    "paymentId", "transactionStatus", "_links", "tppMessages", "code", "accounts", "balances", "transactions", "consentId",
    "access", "consentStatus", "request_uri", "error", "additionalErrors",
]  # fmt: skip
PIECES = st.one_of(
    VALUES,
    st.fixed_dictionaries({"scaRedirect": st.fixed_dictionaries({"href": TEXTS})}),
    st.lists(st.fixed_dictionaries({"category": TEXTS, "code": TEXTS}), max_size=3),
    st.fixed_dictionaries(
        {"booked": VALUES, "_links": st.fixed_dictionaries({"next": st.fixed_dictionaries({"href": TEXTS})})}
    ),
)
BODIES = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(st.sampled_from(NAMES), PIECES, max_size=5).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(NAMES), PIECES, max_size=5).map(
        lambda value: json.dumps({**CREATED, **value}).encode()
    ),
)
HEADERS = st.lists(
    st.one_of(st.just(JSON[0]), st.just(JSON[1]), st.tuples(st.sampled_from(["content-type", "x-request-id"]), TEXTS)),
    max_size=3,
).map(tuple)
ANSWERS = st.builds(
    Answer,
    status=st.one_of(st.sampled_from([200, 201, 400, 401, 404]), st.integers(min_value=100, max_value=999)),
    headers=HEADERS,
    body=BODIES,
)


@settings(max_examples=600, deadline=None)
@given(ANSWERS)
def test_no_answer_raises_and_none_is_taken_for_more_than_it_says(given: Answer) -> None:
    """Refused only with a listed status; accepted only with 201, our echo and an id that stays one path segment."""
    reading = initiation(given)
    for name in ("read_registration", "read_consent_details", "read_payment_status", "read_accounts", "read_balances"):
        assert isinstance(getattr(BANK, name)(given, call_id=CALL), Reading | Problem)
    assert isinstance(BANK.read_transactions(given, account="acc-1", call_id=CALL), Reading | Problem)
    assert isinstance(BANK.read_pushed_authorisation(given), Reading | Problem)
    assert BANK.read_end(given) is None or isinstance(BANK.read_end(given), Problem)

    if isinstance(reading, InitiationRefused):
        listed = {row.status: row.codes for row in BANK.descriptor.payments.refusals}
        assert reading.code in listed[given.status]
        assert reading.code.encode() in given.body
    if isinstance(reading, InitiationAccepted):
        document = json.loads(given.body)
        assert given.status == 201
        assert reading.provider_payment_id == document["paymentId"]
        assert reading.provider_payment_id not in ("", ".", "..")
        assert "/" not in reading.provider_payment_id
        assert reading.reading.authorisation_uri in ("", "https://issuer.bank.example/x")
        assert document["transactionStatus"] == reading.reading.provider_status
