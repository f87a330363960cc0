"""The person's side: login, consent, payment approval, as a browser sees them."""

import re
from urllib.parse import parse_qsl, urlsplit

import pytest

from sandbox.direct import DirectTpp
from sandbox.testing import BankBrowser, Page, SandboxError, SandboxProcess
from tests.sandbox.support import (
    CURRENT,
    REDIRECT_URI,
    SAVINGS,
    JudgedTpp,
    Session,
    create_consent,
    payment_body,
)

LARGE = {"currency": "EUR", "amount": "500.01"}


def authorisation_url(tpp: DirectTpp, **access: object) -> str:
    consent_id = create_consent(tpp, **access)
    pushed = tpp.push(f"AIS:{consent_id} PIS", state="s", verifier="v" * 43)
    return tpp.authorisation_url(str(pushed.json()["request_uri"]))


def browser(bank: SandboxProcess) -> BankBrowser:
    return BankBrowser(issuer=bank.info.issuer, ca_file=bank.info.ca_file)


def log_in(visitor: BankBrowser, page: Page, person: str = "anna", pin: str = "1234") -> Page:
    return visitor.submit(page, {"person": [person], "pin": [pin]})


def test_the_consent_page_says_who_asks_for_what(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """The page names the platform, each right asked, the payments, the end date, and all accounts of the person."""
    visitor = browser(bank)
    page = log_in(visitor, visitor.open(authorisation_url(tpp)))

    for words in (
        "Demo Platform wants to read balances",
        "Demo Platform wants to read transactions",
        "start payments of up to 500.00 EUR",
        "This holds until",
        CURRENT,
        SAVINGS,
        "12480.55 EUR",
    ):
        assert words in page.text()
    assert "NL22INGB0000000303" not in page.text(), "another person's account"


def test_pages_can_be_used_by_everybody(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Each page has a language, one heading, and a label for every visible input."""
    visitor = browser(bank)
    login = visitor.open(authorisation_url(tpp))
    consent = log_in(visitor, login)

    for page in (login, consent):
        assert '<html lang="en">' in page.html
        assert page.html.count("<h1>") == 1
        identifiers = re.findall(r'<(?:input|select) id="([^"]+)"', page.html)
        assert identifiers
        assert all(f'<label for="{identifier}"' in page.html for identifier in identifiers)


def test_pages_are_closed_to_scripts_and_frames(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """The content policy allows no script and no frame, and form answers only to the bank and the platform's origin."""
    page = browser(bank).open(authorisation_url(tpp))
    policy = page.headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "form-action 'self' http://127.0.0.1:8791;" in policy
    assert "<script" not in page.html
    assert page.headers["cache-control"] == "no-store"


def test_a_page_survives_a_reload(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """After the one use of the request_uri the person stands at an address that can be loaded again."""
    visitor = browser(bank)
    page = visitor.open(authorisation_url(tpp))
    again = visitor.open(f"{bank.info.issuer}{page.form().action.removesuffix('/login')}")  # type: ignore[union-attr]

    assert (page.status, again.status) == (200, 200)
    assert again.text() == page.text()


def test_no_comes_back_as_access_denied(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """A no redirects with error, state and iss, gives no code, and rejects the consent."""
    consent_id = create_consent(tpp)
    pushed = tpp.push(f"AIS:{consent_id}", state="s-7", verifier="v" * 43)
    answer = bank.approve(tpp.authorisation_url(str(pushed.json()["request_uri"])), decision="deny")
    status = tpp.xs2a("GET", f"/v1/consents/{consent_id}/status").json()["consentStatus"]

    assert (answer["error"], answer["state"], answer["iss"]) == ("access_denied", "s-7", bank.info.issuer)
    assert "code" not in answer
    assert status == "rejected"


def test_the_redirect_goes_to_the_registered_address(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Code, state and iss come in the query of the redirect address, nothing else."""
    target = urlsplit(bank.redirect_after(authorisation_url(tpp)))

    assert target._replace(query="").geturl() == REDIRECT_URI
    assert sorted(dict(parse_qsl(target.query))) == ["code", "iss", "state"]


def test_a_wrong_pin_asks_again_and_three_end_it(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Two wrong PINs show the page again with a message; the third redirects with access_denied."""
    visitor = browser(bank)
    page = visitor.open(authorisation_url(tpp))
    for _ in range(2):
        page = log_in(visitor, page, pin="0000")
        assert 'role="alert"' in page.html
    last = log_in(visitor, page, pin="0000")

    assert last.redirect is not None
    assert "error=access_denied" in last.redirect


@pytest.mark.parametrize("accounts", [[], ["NL22INGB0000000303"], [CURRENT, "NL22INGB0000000303"]])
def test_only_own_accounts_can_be_ticked(bank: SandboxProcess, tpp: JudgedTpp, accounts: list[str]) -> None:
    """No account, or another person's, gives the page again and no code."""
    with pytest.raises(SandboxError, match="Tick at least one of your accounts"):
        bank.approve(authorisation_url(tpp), accounts=accounts)


def test_a_detailed_consent_cannot_be_enlarged(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Accounts that the request did not list cannot be ticked, even if they are the person's own."""
    url = authorisation_url(tpp, access={"accounts": [{"iban": SAVINGS}]})
    with pytest.raises(SandboxError, match="Tick at least one of your accounts"):
        bank.approve(url, accounts=[CURRENT])


def test_a_page_belongs_to_one_browser(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Another browser (without the cookie) can neither see nor submit the page."""
    page = browser(bank).open(authorisation_url(tpp))
    thief = browser(bank)
    stolen = thief.submit(page, {"person": ["anna"], "pin": ["1234"]})

    assert stolen.status == 403
    assert "another browser" in stolen.text()


def test_a_form_needs_the_pages_own_token(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """A form without the page's csrf value is refused even from the right browser."""
    visitor = browser(bank)
    page = visitor.open(authorisation_url(tpp))
    forged = visitor.submit(page, {"person": ["anna"], "pin": ["1234"], "csrf": ["made-up"]})

    assert forged.status == 403


def test_a_decision_needs_a_login(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Posting the decision before the login gives the login page, no code."""
    visitor = browser(bank)
    page = visitor.open(authorisation_url(tpp))
    skipping = Page(status=200, html=page.html.replace("/login", "/decision"), headers={})
    answer = visitor.submit(skipping, {"decision": ["approve"], "account": [CURRENT]})

    assert answer.redirect is None
    assert "Log in first" in answer.text()


def test_a_large_payment_waits_for_the_person(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """Above the standing limit the payment is RCVD with scaRedirect; the page shows amount and payee; yes executes it."""
    reply = session.pay(tpp, payment_body(instructedAmount=LARGE), TPP_Redirect_URI=f"{REDIRECT_URI}?t=1")
    links = reply.json()["_links"]
    assert isinstance(links, dict)
    before = bank.ledger()
    visitor = browser(bank)
    page = log_in(visitor, visitor.open(links["scaRedirect"]["href"]))
    end = visitor.submit(page, {"decision": ["approve"]})

    assert (reply.json()["transactionStatus"], reply.json()["scaStatus"]) == ("RCVD", "received")
    assert reply.headers["aspsp-sca-approach"] == "REDIRECT"
    assert before == []
    assert "500.01 EUR" in page.text()
    assert "Somebody, NL91ABNA0417164300" in page.text()
    assert end.redirect == f"{REDIRECT_URI}?t=1"
    assert [entry["amount"] for entry in bank.ledger()] == ["500.01"]


def test_a_payment_can_be_refused_by_the_person(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """No at the payment page goes to the nok address, and the payment is rejected and never executed."""
    reply = session.pay(
        tpp,
        payment_body(instructedAmount=LARGE),
        TPP_Redirect_URI=REDIRECT_URI,
        TPP_Nok_Redirect_URI=f"{REDIRECT_URI}?nok=1",
    )
    links = reply.json()["_links"]
    assert isinstance(links, dict)
    url = links["scaRedirect"]["href"]
    end = bank.redirect_after(url, decision="deny")

    assert end == f"{REDIRECT_URI}?nok=1"
    assert bank.ledger() == []
    with pytest.raises(SandboxError, match="decided before"):
        bank.approve(url)


def test_another_person_cannot_approve_a_payment(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """Only the owner of the debtor's account can say yes."""
    links = session.pay(tpp, payment_body(instructedAmount=LARGE)).json()["_links"]
    assert isinstance(links, dict)
    with pytest.raises(SandboxError, match="another customer"):
        bank.approve(links["scaRedirect"]["href"], person="bert")

    assert bank.ledger() == []


def test_unknown_pages_are_not_there(bank: SandboxProcess) -> None:
    """Addresses that are no pages give 404, and an ended interaction says so; no traceback."""
    visitor = browser(bank)
    pages = [visitor.open(f"{bank.info.issuer}{path}") for path in ("/", "/interaction/x", "/sca/x", "/oauth/token")]

    assert [page.status for page in pages] == [404, 400, 400, 404]
    assert all("<h1>" in page.html for page in pages)
