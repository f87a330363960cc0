"""Payments: executed once, told honestly, with and without idempotency keys."""

import time
import uuid
from collections.abc import Iterator

import pytest

from sandbox.direct import Reply
from sandbox.testing import SandboxProcess
from tests.sandbox.support import (
    BUSINESS,
    CURRENT,
    PSU,
    REDIRECT_URI,
    SAVINGS,
    SCT,
    SOMEBODY,
    JudgedTpp,
    Prepared,
    Session,
    approve,
    code_of,
    create_consent,
    payment_body,
)


def statuses(tpp: JudgedTpp, session: Session, payment_id: object) -> list[object]:
    """Poll until the status is final; the distinct statuses in order."""
    seen: list[object] = []
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = tpp.xs2a("GET", f"{SCT}/{payment_id}/status", token=session.access_token).json()["transactionStatus"]
        if status not in seen:
            seen.append(status)
        if status in ("ACSC", "RJCT", "CANC"):
            break
        time.sleep(0.05)
    return seen


def test_a_payment_is_executed_and_settles(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """Under the standing authorisation a payment goes RCVD, ACSP, ACSC, and the ledger has it once with its facts."""
    request_id = str(uuid.uuid4())
    reply = session.pay(tpp, X_Request_ID=request_id)
    document = reply.json()
    life = statuses(tpp, session, document["paymentId"])

    assert (reply.status, document["transactionStatus"], document["scaStatus"]) == (201, "RCVD", "exempted")
    assert reply.headers["location"].endswith(f"{SCT}/{document['paymentId']}")
    assert life[-1] == "ACSC"
    assert life == [status for status in ("RCVD", "ACSP", "ACSC") if status in life]
    (entry,) = bank.ledger()
    expected = {
        "sequence": 1,
        "payment_id": document["paymentId"],
        "product": "sepa-credit-transfers",
        "end_to_end_id": "E2E-1",
        "amount": "12.50",
        "currency": "EUR",
        "debtor_iban": CURRENT,
        "creditor_iban": SOMEBODY,
        "creditor_name": "Somebody",
        "remittance": "Invoice 1",
        "x_request_id": request_id,
        "idempotency_key": None,
        "client_id": "demo-platform",
    }
    assert {name: entry[name] for name in expected} == expected


def test_an_instant_payment_is_its_own_product(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """instant-sepa-credit-transfers works alike, and its payments are not found under the other product."""
    path = "/v1/payments/instant-sepa-credit-transfers"
    reply = tpp.xs2a("POST", path, token=session.access_token, body=payment_body(), headers=PSU)
    payment_id = reply.json()["paymentId"]
    own = tpp.xs2a("GET", f"{path}/{payment_id}", token=session.access_token)
    other = tpp.xs2a("GET", f"{SCT}/{payment_id}", token=session.access_token)

    assert reply.status == 201
    assert own.json()["creditorName"] == "Somebody"
    assert (other.status, code_of(other)) == (404, "RESOURCE_UNKNOWN")
    assert [entry["product"] for entry in bank.ledger()] == ["instant-sepa-credit-transfers"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"debtorAccount": {"iban": SAVINGS}, "instructedAmount": {"currency": "EUR", "amount": "20.01"}}, "AM04"),
        ({"creditorAccount": {"iban": "XX0000000000000000"}}, "AC01"),
        ({"creditorName": "XX"}, "AC01"),
    ],
)
def test_a_payment_that_cannot_be_executed_is_rejected_later(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, changes: dict[str, object], reason: str
) -> None:
    """No funds or no such creditor: accepted at first (201 RCVD), then RJCT with the reason; the ledger stays empty."""
    reply = session.pay(tpp, payment_body(**changes))
    payment_id = reply.json()["paymentId"]
    life = statuses(tpp, session, payment_id)
    told = tpp.xs2a("GET", f"{SCT}/{payment_id}/status", token=session.access_token).json()["psuMessage"]

    assert (reply.status, life[-1]) == (201, "RJCT")
    assert str(told).startswith(reason)
    assert bank.ledger() == []


def test_exactly_the_balance_can_be_spent_once(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """The last cent can be spent, and then nothing more: the second payment is rejected."""
    body = payment_body(debtorAccount={"iban": SAVINGS}, instructedAmount={"currency": "EUR", "amount": "20"})
    ids = [session.pay(tpp, body).json()["paymentId"] for _ in range(2)]
    ends = [statuses(tpp, session, payment_id)[-1] for payment_id in ids]

    assert ends == ["ACSC", "RJCT"]
    assert [entry["payment_id"] for entry in bank.ledger()] == ids[:1]


def test_without_idempotency_every_post_is_a_payment(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """Class C: the same bytes, X-Request-ID and key twice are two payments."""
    headers = {"Idempotency_Key": "k-1", "X_Request_ID": str(uuid.uuid4())}
    ids = {str(session.pay(tpp, **headers).json()["paymentId"]) for _ in range(2)}

    assert len(ids) == 2
    assert {entry["payment_id"] for entry in bank.ledger()} == ids


@pytest.mark.parametrize("amount", ["0", "0.00", "-5", "1,50", "1.505", "1e3", " 1", "01.2.3", "", "999999999999999"])
def test_a_wrong_amount_is_refused(bank: SandboxProcess, tpp: JudgedTpp, session: Session, amount: str) -> None:
    """Amounts are positive decimal numbers with a point and at most two decimals."""
    reply = session.pay(tpp, payment_body(instructedAmount={"currency": "EUR", "amount": amount}))

    assert (reply.status, code_of(reply)) == (400, "FORMAT_ERROR")
    assert bank.ledger() == []


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"instructedAmount": {"currency": "USD", "amount": "1"}}, 400, "FORMAT_ERROR"),
        ({"instructedAmount": {"currency": "EUR", "amount": 1}}, 400, "FORMAT_ERROR"),
        ({"instructedAmount": None}, 400, "FORMAT_ERROR"),
        ({"creditorName": ""}, 400, "FORMAT_ERROR"),
        ({"creditorName": "x" * 71}, 400, "FORMAT_ERROR"),
        ({"creditorName": "Zoë"}, 400, "FORMAT_ERROR"),
        ({"creditorAccount": {"iban": "nl91"}}, 400, "FORMAT_ERROR"),
        ({"creditorAccount": {"bban": "1234"}}, 400, "FORMAT_ERROR"),
        ({"creditorAccount": {"iban": "NL92ABNA0417164300"}}, 400, "FORMAT_ERROR"),
        ({"endToEndIdentification": "x" * 36}, 400, "FORMAT_ERROR"),
        ({"remittanceInformationUnstructured": "line\nbreak"}, 400, "FORMAT_ERROR"),
        ({"creditorAgent": "not a bic"}, 400, "FORMAT_ERROR"),
        ({"unheardOf": 1}, 400, "PARAMETER_NOT_SUPPORTED"),
        ({"debtorAccount": {"iban": "NL22INGB0000000303"}}, 401, "CONSENT_INVALID"),
    ],
)
def test_a_wrong_payment_is_refused(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, changes: dict[str, object], status: int, code: str
) -> None:
    """Each member has its form, unknown ones are refused, and the debtor's account must be in the consent."""
    reply = session.pay(tpp, payment_body(**changes))

    assert (reply.status, code_of(reply)) == (status, code)
    assert bank.ledger() == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"creditorName":"A","creditorName":"B"}', b'{"x":NaN}', b"\xff", b"[" * 100_000],
)
def test_a_body_that_is_no_object_is_refused(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, body: bytes
) -> None:
    """Broken JSON, other JSON, members given twice, wrong encoding, and absurd nesting are all refused."""
    reply = session.pay(tpp, body, Content_Type="application/json")

    assert (reply.status, code_of(reply)) == (400, "FORMAT_ERROR")
    assert bank.ledger() == []


def test_a_payment_in_another_media_type_is_refused(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """Only application/json is taken (pain.001 is not offered)."""
    reply = session.pay(tpp, b"<Document/>", Content_Type="application/xml")

    assert (reply.status, bank.ledger()) == (415, [])


def test_a_payment_needs_the_persons_address(tpp: JudgedTpp, session: Session) -> None:
    """PSU-IP-Address is mandatory, and must be an address."""
    replies = [
        tpp.xs2a("POST", SCT, token=session.access_token, body=payment_body(), headers=headers)
        for headers in ({}, {"PSU-IP-Address": "nowhere"})
    ]

    assert [(reply.status, code_of(reply)) for reply in replies] == [(400, "FORMAT_ERROR")] * 2


@pytest.mark.parametrize(
    "path", ["/v1/payments/target-2-payments", "/v1/bulk-payments/sepa-credit-transfers", "/v1/payments/other"]
)
def test_other_products_are_unknown(tpp: JudgedTpp, session: Session, path: str) -> None:
    """Products that the bank does not offer are 404 PRODUCT_UNKNOWN."""
    tpp.judge = "other" not in path  # the description lists all products that exist
    reply = tpp.xs2a("POST", path, token=session.access_token, body=payment_body(), headers=PSU)

    assert (reply.status, code_of(reply)) == (404, "PRODUCT_UNKNOWN")


def test_another_persons_payment_looks_like_none(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """A token of another person cannot see the payment; the answer is that of an unknown one."""
    payment_id = session.pay(tpp).json()["paymentId"]
    pushed = tpp.push("PIS", state="s", verifier="v" * 43)
    answer = bank.approve(tpp.authorisation_url(str(pushed.json()["request_uri"])), person="bert")
    token = str(tpp.exchange(answer["code"], "v" * 43).json()["access_token"])
    replies = [tpp.xs2a("GET", f"{SCT}/{name}/status", token=token) for name in (payment_id, uuid.uuid4())]

    assert [(reply.status, code_of(reply)) for reply in replies] == [(404, "RESOURCE_UNKNOWN")] * 2
    assert replies[0].body == replies[1].body


def test_a_waiting_payment_can_be_cancelled(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """DELETE while the payment waits for approval cancels it, and its approval link is dead."""
    body = payment_body(debtorAccount={"iban": BUSINESS}, instructedAmount={"currency": "EUR", "amount": "100000.00"})
    payment_id = session.pay(tpp, body).json()["paymentId"]
    deleted = tpp.xs2a("DELETE", f"{SCT}/{payment_id}", token=session.access_token)
    life = statuses(tpp, session, payment_id)

    assert (deleted.status, deleted.body, life) == (204, b"", ["CANC"])
    assert bank.ledger() == []


def test_an_executed_payment_cannot_be_cancelled(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """DELETE of an executed payment is refused, and the payment stays."""
    payment_id = session.pay(tpp).json()["paymentId"]
    reply = tpp.xs2a("DELETE", f"{SCT}/{payment_id}", token=session.access_token)

    assert (reply.status, code_of(reply)) == (405, "CANCELLATION_INVALID")
    assert len(bank.ledger()) == 1


def test_a_redirect_address_must_be_registered(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """TPP-Redirect-URI may add a query to a registered address, and nothing else."""
    good = session.pay(tpp, TPP_Redirect_URI=f"{REDIRECT_URI}?session=1")
    bad = session.pay(tpp, TPP_Redirect_URI="https://evil.example/")

    assert (good.status, bad.status, code_of(bad)) == (201, 400, "FORMAT_ERROR")
    assert len(bank.ledger()) == 1


def test_no_payment_under_an_ended_consent(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """A consent that was deleted pays nothing."""
    tpp.xs2a("DELETE", f"/v1/consents/{session.consent_id}")
    reply = session.pay(tpp)

    assert (reply.status, bank.ledger()) == (401, [])


def test_the_consent_named_must_be_the_tokens(tpp: JudgedTpp, session: Session) -> None:
    """A Consent-ID on a payment must be that of the token."""
    good = session.pay(tpp, Consent_ID=session.consent_id)
    bad = session.pay(tpp, Consent_ID=create_consent(tpp))

    assert (good.status, bad.status, code_of(bad)) == (201, 401, "CONSENT_INVALID")


@pytest.fixture(scope="module")
def idempotent(prepared: Prepared) -> Iterator[SandboxProcess]:
    arguments = ["--idempotency", "header"]
    with SandboxProcess.start(prepared.layout.root, arguments=arguments) as bank:
        yield bank


class TestIdempotencyKey:
    """Class A: `--idempotency header`."""

    @pytest.fixture
    def bank(self, idempotent: SandboxProcess) -> SandboxProcess:
        idempotent.reset()
        return idempotent

    @pytest.fixture
    def tpp(self, bank: SandboxProcess, prepared: Prepared) -> Iterator[JudgedTpp]:
        tpp = prepared.tpp(bank)
        yield tpp
        tpp.close()

    def test_a_repeat_is_the_same_payment(self, bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
        """The same key and body within the window give the same answer, with this call's X-Request-ID."""
        first, second = (session.pay(tpp, Idempotency_Key="k" * 40) for _ in range(2))

        assert (first.status, second.status) == (201, 201)
        assert first.body == second.body
        assert first.headers["location"] == second.headers["location"]
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert [entry["idempotency_key"] for entry in bank.ledger()] == ["k" * 40]

    def test_another_body_under_the_key_is_refused(
        self, bank: SandboxProcess, tpp: JudgedTpp, session: Session
    ) -> None:
        """The key with another body is 409, and nothing is executed."""
        session.pay(tpp, Idempotency_Key="k-2")
        reply = session.pay(tpp, payment_body(creditorName="Else"), Idempotency_Key="k-2")

        assert (reply.status, code_of(reply)) == (409, "STATUS_INVALID")
        assert len(bank.ledger()) == 1

    def test_another_product_under_the_key_is_refused(
        self, bank: SandboxProcess, tpp: JudgedTpp, session: Session
    ) -> None:
        """The product is part of what a key stands for."""
        session.pay(tpp, Idempotency_Key="k-3")
        headers = {**PSU, "Idempotency-Key": "k-3"}
        path = "/v1/payments/instant-sepa-credit-transfers"
        reply = tpp.xs2a("POST", path, token=session.access_token, body=payment_body(), headers=headers)

        assert (reply.status, len(bank.ledger())) == (409, 1)

    def test_another_key_is_another_payment(self, bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
        """Two keys, or none, are new payments."""
        for headers in ({"Idempotency_Key": "a"}, {"Idempotency_Key": "b"}, {}, {}):
            assert session.pay(tpp, **headers).status == 201

        assert len(bank.ledger()) == 4

    def test_a_refusal_does_not_use_the_key_up(self, bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
        """A request that was refused leaves its key free."""
        refused = session.pay(tpp, payment_body(creditorName=""), Idempotency_Key="k-6")
        paid = session.pay(tpp, Idempotency_Key="k-6")

        assert (refused.status, paid.status, len(bank.ledger())) == (400, 201, 1)

    @pytest.mark.parametrize("key", ["", "k" * 41])
    def test_a_key_has_1_to_40_characters(
        self, bank: SandboxProcess, tpp: JudgedTpp, session: Session, key: str
    ) -> None:
        """Longer and empty keys are refused."""
        reply = session.pay(tpp, Idempotency_Key=key)

        assert (reply.status, code_of(reply), bank.ledger()) == (400, "FORMAT_ERROR", [])

    def test_keys_of_an_ended_consent_pay_nothing(self, bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
        """The token is judged before the key: a repeat without the right to pay gets no answer from before."""
        session.pay(tpp, Idempotency_Key="k-7")
        tpp.xs2a("DELETE", f"/v1/consents/{session.consent_id}")
        reply = session.pay(tpp, Idempotency_Key="k-7")

        assert reply.status == 401

    def test_approval_is_asked_once(self, bank: SandboxProcess, tpp: JudgedTpp) -> None:
        """A repeat of a payment that needs approval gives the same approval link."""
        session = approve(bank, tpp)
        body = payment_body(instructedAmount={"currency": "EUR", "amount": "700"})
        links = {str(session.pay(tpp, body, Idempotency_Key="k-8").json()["_links"]) for _ in range(2)}

        assert len(links) == 1


@pytest.fixture(scope="module")
def listing(prepared: Prepared) -> Iterator[SandboxProcess]:
    with SandboxProcess.start(prepared.layout.root, arguments=["--payment-lookup"]) as bank:
        yield bank


class TestPaymentLookup:
    """Class B: `--payment-lookup`. The list is the bank's own resource, so the official description does not judge it."""

    @pytest.fixture
    def bank(self, listing: SandboxProcess) -> SandboxProcess:
        listing.reset()
        return listing

    @pytest.fixture
    def tpp(self, bank: SandboxProcess, prepared: Prepared) -> Iterator[JudgedTpp]:
        tpp = prepared.tpp(bank)
        yield tpp
        tpp.close()

    @staticmethod
    def listed(tpp: JudgedTpp, session: Session, query: str, path: str = SCT) -> Reply:
        tpp.judge = False
        reply = tpp.xs2a("GET", f"{path}{query}", token=session.access_token)
        tpp.judge = True
        return reply

    def test_a_payment_is_listed_by_its_reference(self, tpp: JudgedTpp, session: Session) -> None:
        """Those that carried the reference, with id, status and references; an empty list where there is none."""
        first = session.pay(tpp, payment_body(instructionIdentification="our-key-1")).json()
        session.pay(tpp, payment_body(instructionIdentification="our-key-2"))
        found = self.listed(tpp, session, "?instructionIdentification=our-key-1").json()
        nothing = self.listed(tpp, session, "?instructionIdentification=our-key-3").json()

        assert found["payments"] == [
            {
                "paymentId": first["paymentId"],
                "transactionStatus": "RCVD",
                "instructionIdentification": "our-key-1",
                "endToEndIdentification": "E2E-1",
            }
        ]
        assert nothing == {"payments": []}

    def test_each_post_is_a_payment_and_all_are_listed(self, tpp: JudgedTpp, session: Session) -> None:
        """The reference is no idempotency key: the bank tells of two payments."""
        for _ in range(2):
            session.pay(tpp, payment_body(instructionIdentification="twice"))

        assert len(self.listed(tpp, session, "?instructionIdentification=twice").json()["payments"]) == 2  # type: ignore[arg-type]

    def test_only_the_own_payments_of_the_product_are_listed(
        self, bank: SandboxProcess, tpp: JudgedTpp, session: Session
    ) -> None:
        """Neither another person's nor another product's."""
        session.pay(tpp, payment_body(instructionIdentification="mine"))
        query, instant = "?instructionIdentification=mine", "/v1/payments/instant-sepa-credit-transfers"
        pushed = tpp.push("PIS", state="s", verifier="v" * 43).json()
        answer = bank.approve(tpp.authorisation_url(str(pushed["request_uri"])), person="bert")
        bert = tpp.exchange(answer["code"], "v" * 43).json()["access_token"]
        tpp.judge = False
        other = tpp.xs2a("GET", SCT + query, token=str(bert)).json()

        assert other == {"payments": []}
        assert self.listed(tpp, session, query, instant).json() == {"payments": []}

    @pytest.mark.parametrize("query", ["", "?instructionIdentification=", "?instructionIdentification=a&x=b", "?x=b"])
    def test_a_list_of_everything_is_not_given(self, tpp: JudgedTpp, session: Session, query: str) -> None:
        """The reference is required, and no other parameter is known."""
        assert self.listed(tpp, session, query).status == 400


def test_without_the_option_nothing_is_listed(tpp: JudgedTpp, session: Session) -> None:
    """A bank of class C has no such resource."""
    tpp.judge = False

    assert tpp.xs2a("GET", f"{SCT}?instructionIdentification=x", token=session.access_token).status == 405
