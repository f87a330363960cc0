"""Consents and account reads, each answer judged by the official description (see JudgedTpp)."""

import datetime
import uuid

import pytest

from sandbox.testing import SandboxProcess
from tests.sandbox.support import (
    CURRENT,
    CURRENT_ID,
    PSU,
    SAVINGS,
    JudgedTpp,
    Prepared,
    Session,
    approve,
    code_of,
    consent_body,
    create_consent,
)

TODAY = datetime.datetime.now(datetime.UTC).date()
TRANSACTIONS = f"/v1/accounts/{CURRENT_ID}/transactions"


def test_a_consent_goes_from_received_to_valid_to_terminated(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """A consent is `received` until the person decides, `valid` after the yes, `terminatedByTpp` after DELETE."""
    consent_id = create_consent(tpp)
    path = f"/v1/consents/{consent_id}"
    statuses = [tpp.xs2a("GET", f"{path}/status").json()["consentStatus"]]
    session = approve(bank, tpp, consent_id=consent_id, accounts=[CURRENT])
    details = tpp.xs2a("GET", path, token=session.access_token).json()
    deleted = tpp.xs2a("DELETE", path, token=session.access_token)
    statuses.append(tpp.xs2a("GET", f"{path}/status").json()["consentStatus"])

    assert statuses == ["received", "terminatedByTpp"]
    assert details["consentStatus"] == "valid"
    reference = [{"iban": CURRENT, "currency": "EUR"}]
    assert details["access"] == {"accounts": reference, "balances": reference, "transactions": reference}
    assert (deleted.status, deleted.body) == (204, b"")


def test_an_ended_consent_ends_its_tokens(tpp: JudgedTpp, session: Session) -> None:
    """After DELETE of the consent neither its access token nor its refresh token is good for anything."""
    tpp.xs2a("DELETE", f"/v1/consents/{session.consent_id}")
    read = session.read(tpp, "/v1/accounts")
    paid = session.pay(tpp)
    refreshed = tpp.refresh(session.refresh_token)

    assert (read.status, code_of(read)) == (401, "TOKEN_INVALID")
    assert (paid.status, code_of(paid)) == (401, "TOKEN_INVALID")
    assert (refreshed.status, refreshed.json()["error"]) == (400, "invalid_grant")


def test_a_repeated_delete_of_a_consent_succeeds(tpp: JudgedTpp) -> None:
    """DELETE without a token may be repeated: the consent stays ended."""
    consent_id = create_consent(tpp)
    statuses = [tpp.xs2a("DELETE", f"/v1/consents/{consent_id}").status for _ in range(2)]

    assert statuses == [204, 204]


def test_only_the_ticked_accounts_are_there(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """An account that the person did not tick is neither listed nor readable."""
    session = approve(bank, tpp, accounts=[SAVINGS])
    listed = session.read(tpp, "/v1/accounts").json()["accounts"]
    other = session.read(tpp, f"/v1/accounts/{CURRENT_ID}")

    assert isinstance(listed, list)
    assert [account["iban"] for account in listed] == [SAVINGS]
    assert (other.status, code_of(other)) == (404, "RESOURCE_UNKNOWN")


def test_a_detailed_consent_gives_each_right_only_where_it_was_asked(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Balances asked for one account are not given for another, and the page offers only the accounts listed."""
    access = {"accounts": [{"iban": CURRENT}, {"iban": SAVINGS}], "balances": [{"iban": SAVINGS}]}
    session = approve(bank, tpp, consent_id=create_consent(tpp, access=access))
    listed = session.read(tpp, "/v1/accounts").json()["accounts"]
    refused = session.read(tpp, f"/v1/accounts/{CURRENT_ID}/balances")

    assert isinstance(listed, list)
    assert [(account["iban"], sorted(account["_links"])) for account in listed] == [
        (CURRENT, []),
        (SAVINGS, ["balances"]),
    ]
    assert (refused.status, code_of(refused)) == (401, "CONSENT_INVALID")


def test_balances_show_what_is_booked_and_what_is_available(tpp: JudgedTpp, session: Session) -> None:
    """A payment lowers what is available at once, and what is booked only when it settles."""
    session.pay(tpp)
    balances = session.read(tpp, f"/v1/accounts/{CURRENT_ID}/balances").json()["balances"]

    assert isinstance(balances, list)
    assert {balance["balanceType"]: balance["balanceAmount"]["amount"] for balance in balances} == {
        "closingBooked": "12480.55",
        "interimAvailable": "12468.05",
    }


def test_an_account_can_be_read_with_its_balance(tpp: JudgedTpp, session: Session) -> None:
    """withBalance=true adds balances, for one account and for the list."""
    one = session.read(tpp, f"/v1/accounts/{CURRENT_ID}?withBalance=true").json()["account"]
    many = session.read(tpp, "/v1/accounts?withBalance=true").json()["accounts"]

    assert isinstance(one, dict)
    assert isinstance(many, list)
    assert len(one["balances"]) == 2
    assert all(account["balances"] for account in many)


def test_transactions_are_paged_without_loss_or_repetition(tpp: JudgedTpp, session: Session) -> None:
    """Following `next` gives every transaction of the period once, newest first, and no empty page at the end."""
    target: str | None = f"{TRANSACTIONS}?bookingStatus=booked&dateFrom=2020-01-01&itemsPerPage=20"
    pages: list[list[str]] = []
    while target is not None:
        report = session.read(tpp, target).json()["transactions"]
        assert isinstance(report, dict)
        pages.append([line["transactionId"] for line in report["booked"]])
        target = report["_links"].get("next", {}).get("href")
    ids = [identifier for page in pages for identifier in page]

    assert [len(page) for page in pages] == [20, 20, 20]
    assert len(set(ids)) == 60
    assert ids == sorted(ids, reverse=True)


def test_transactions_respect_the_period(tpp: JudgedTpp, session: Session) -> None:
    """Only days from dateFrom to dateTo are reported, both included."""
    first, last = TODAY - datetime.timedelta(days=20), TODAY - datetime.timedelta(days=10)
    report = session.read(tpp, f"{TRANSACTIONS}?bookingStatus=booked&dateFrom={first}&dateTo={last}").json()
    days = [line["bookingDate"] for line in report["transactions"]["booked"]]  # type: ignore[index]

    assert days == [(last - datetime.timedelta(days=ago)).isoformat() for ago in range(0, 11, 2)]


def test_a_payment_is_pending_then_booked(tpp: JudgedTpp, session: Session) -> None:
    """An executed payment shows as pending at first; its end-to-end id is reported."""
    session.pay(tpp)
    report = session.read(tpp, f"{TRANSACTIONS}?bookingStatus=pending&dateFrom={TODAY - datetime.timedelta(days=1)}")
    pending = report.json()["transactions"]["pending"]  # type: ignore[index]

    assert [(line["endToEndId"], line["transactionAmount"]["amount"]) for line in pending] == [("E2E-1", "-12.50")]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("dateFrom=2026-01-01", "FORMAT_ERROR"),
        ("bookingStatus=booked", "FORMAT_ERROR"),
        ("bookingStatus=all&dateFrom=2026-01-01", "FORMAT_ERROR"),
        ("bookingStatus=booked&dateFrom=01.01.2026", "FORMAT_ERROR"),
        ("bookingStatus=booked&dateFrom=2026-02-30", "FORMAT_ERROR"),
        ("bookingStatus=booked&dateFrom=2026-02-02&dateTo=2026-02-01", "PERIOD_INVALID"),
        ("bookingStatus=booked&dateFrom=2026-01-01&itemsPerPage=0", "FORMAT_ERROR"),
        ("bookingStatus=booked&bookingStatus=pending&dateFrom=2026-01-01", "FORMAT_ERROR"),
    ],
)
def test_a_wrong_query_for_transactions_is_refused(tpp: JudgedTpp, session: Session, query: str, code: str) -> None:
    """bookingStatus and dateFrom are required, and every parameter must have its form and come once."""
    reply = session.read(tpp, f"{TRANSACTIONS}?{query}")

    assert (reply.status, code_of(reply)) == (400, code)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 400, "FORMAT_ERROR"),
        ({"Consent-ID": str(uuid.UUID(int=0))}, 403, "CONSENT_UNKNOWN"),
    ],
)
def test_a_read_needs_the_consent_id(
    tpp: JudgedTpp, session: Session, headers: dict[str, str], status: int, code: str
) -> None:
    """Consent-ID is required on reads and must be a consent of this client."""
    reply = tpp.xs2a("GET", "/v1/accounts", token=session.access_token, headers=headers)

    assert (reply.status, code_of(reply)) == (status, code)


def test_a_token_does_not_open_another_consent(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """A token works only under the consent for which it was given."""
    other = approve(bank, tpp)
    headers = {"Consent-ID": other.consent_id}
    reply = tpp.xs2a("GET", "/v1/accounts", token=session.access_token, headers=headers)

    assert (reply.status, code_of(reply)) == (401, "CONSENT_INVALID")


def test_reads_without_the_person_are_counted(prepared: Prepared) -> None:
    """Per address and day as many unattended reads as the consent says; attended ones do not count."""
    with SandboxProcess.start(prepared.layout.root, arguments=["--signature", "optional"]) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        attended = [session.read(tpp, "/v1/accounts").status for _ in range(6)]
        unattended = [session.read(tpp, "/v1/accounts", attended=False) for _ in range(5)]
        elsewhere = session.read(tpp, f"/v1/accounts/{CURRENT_ID}/balances", attended=False)
        tpp.close()

    assert attended == [200] * 6
    assert [reply.status for reply in unattended] == [200] * 4 + [429]
    assert code_of(unattended[-1]) == "ACCESS_EXCEEDED"
    assert elsewhere.status == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"access": None},
        {"access": {}},
        {"access": {"accounts": [{"iban": "not an iban"}]}},
        {"access": {"allPsd2": "everything"}},
        {"validUntil": "tomorrow"},
        {"frequencyPerDay": 0},
        {"frequencyPerDay": True},
        {"recurringIndicator": "yes"},
        {"combinedServiceIndicator": None},
        {"recurringIndicator": False, "frequencyPerDay": 4},
    ],
)
def test_a_malformed_consent_is_refused(tpp: JudgedTpp, changes: dict[str, object]) -> None:
    """Each member of a consent is required and has its form."""
    reply = tpp.xs2a("POST", "/v1/consents", body=consent_body(**changes), headers=PSU)

    assert (reply.status, code_of(reply)) == (400, "FORMAT_ERROR")


def test_a_consent_into_the_past_is_refused(tpp: JudgedTpp) -> None:
    """validUntil must not be over already."""
    reply = tpp.xs2a("POST", "/v1/consents", body=consent_body(validUntil="2020-01-01"), headers=PSU)

    assert (reply.status, code_of(reply)) == (400, "PERIOD_INVALID")


def test_a_consent_needs_the_persons_address(tpp: JudgedTpp) -> None:
    """PSU-IP-Address is mandatory when a consent is created."""
    reply = tpp.xs2a("POST", "/v1/consents", body=consent_body())

    assert (reply.status, code_of(reply)) == (400, "FORMAT_ERROR")


def test_a_one_off_consent_gives_no_refresh_token(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """A consent with recurringIndicator false is good for its one access token."""
    consent_id = create_consent(tpp, recurringIndicator=False, frequencyPerDay=1)
    session = approve(bank, tpp, consent_id=consent_id)

    assert session.refresh_token == ""
    assert session.read(tpp, "/v1/accounts").status == 200


@pytest.mark.parametrize("global_form", ["allPsd2", "availableAccountsWithBalance", "availableAccounts"])
def test_a_global_consent_gives_what_its_form_says(bank: SandboxProcess, tpp: JudgedTpp, global_form: str) -> None:
    """allPsd2 gives everything, availableAccounts only the list of accounts."""
    consent_id = create_consent(tpp, access={global_form: "allAccounts"})
    session = approve(bank, tpp, consent_id=consent_id)
    reads = [
        session.read(tpp, path).status
        for path in (
            "/v1/accounts",
            f"/v1/accounts/{CURRENT_ID}/balances",
            f"{TRANSACTIONS}?bookingStatus=booked&dateFrom=2026-01-01",
        )
    ]

    expected = {"allPsd2": [200, 200, 200], "availableAccountsWithBalance": [200, 200, 401]}
    assert reads == expected.get(global_form, [200, 401, 401])


@pytest.mark.parametrize("value", [None, "", "1", "not-a-uuid-at-all-not-a-uuid-at-all-x"])
def test_a_request_id_is_required(tpp: JudgedTpp, session: Session, value: str | None) -> None:
    """X-Request-ID must be a UUID on every request."""
    headers = tpp.headers(token=session.access_token, body=b"", headers={"Consent-ID": session.consent_id})
    headers.pop("X-Request-ID")
    if value is not None:
        headers["X-Request-ID"] = value
    tpp.judge = False  # without an id there is none to echo
    reply = tpp.send("GET", "/v1/accounts", b"", headers)

    assert (reply.status, code_of(reply)) == (400, "FORMAT_ERROR")


def test_the_request_id_is_echoed(tpp: JudgedTpp) -> None:
    """Good answers and refusals carry the request's own X-Request-ID."""
    request_id = str(uuid.uuid4())
    headers = {"X-Request-ID": request_id}
    refused = tpp.xs2a("GET", "/v1/accounts", headers=headers)
    done = tpp.xs2a("GET", f"/v1/consents/{create_consent(tpp)}/status", headers=headers)

    assert (refused.status, done.status) == (401, 200)
    assert refused.headers["x-request-id"] == done.headers["x-request-id"] == request_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "/v1/consents", 405), ("GET", "/v1/nothing", 404), ("DELETE", "/v1/accounts", 405)],
)
def test_what_is_not_offered_is_refused(tpp: JudgedTpp, method: str, path: str, status: int) -> None:
    """Unknown addresses are 404, unknown methods 405, both in Berlin Group's form."""
    reply = tpp.xs2a(method, path)

    assert reply.status == status
    assert code_of(reply) in ("SERVICE_INVALID", "RESOURCE_UNKNOWN")
