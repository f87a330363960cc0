"""Everything that ends by itself, with the bank in this process and its clock in the test's hand."""

import secrets
from collections.abc import Mapping, Sequence
from http.cookies import SimpleCookie
from urllib.parse import parse_qsl, urlsplit

import pytest

from sandbox.books import iso_date
from sandbox.direct import DirectTpp, Reply
from sandbox.directory import Client, load_certificate, load_clients
from sandbox.memory import Memory, opening_memory
from sandbox.options import Options
from sandbox.pki import facts
from sandbox.server import Bank, build_bank
from sandbox.testing import BankBrowser, Page
from sandbox.web import Addresses, Answer, Call
from tests.sandbox.support import (
    CLIENT_ID,
    PSU,
    REDIRECT_URI,
    SCT,
    Prepared,
    code_of,
    consent_body,
    payment_body,
)

ISSUER, API = "https://127.0.0.1:1", "https://127.0.0.1:2"
DAY = 86400.0


class World:
    """A bank without listeners, and a clock that moves only when told."""

    def __init__(self, prepared: Prepared, **options: object) -> None:
        self.now = facts(load_certificate(prepared.layout.tpp_certificate)).not_before + 3600
        clients: Mapping[str, Client] = load_clients(prepared.layout)
        self.memory: Memory = opening_memory(self.now)
        self.bank: Bank = build_bank(
            options=Options(**options),  # type: ignore[arg-type]
            memory=self.memory,
            clients=clients,
            ca=load_certificate(prepared.layout.ca_certificate),
            addresses=Addresses(issuer=ISSUER, api=API),
            clock=lambda: self.now,
        )
        self.tpp = LocalTpp(self, prepared)
        self.browser = LocalBrowser(self, prepared)

    def decide(self, url: str, decision: str = "approve") -> Page:
        page = self.browser.submit(self.browser.open(url), {"person": ["anna"], "pin": ["1234"]})
        return self.browser.submit(page, {"decision": [decision]})

    def push(self, scope: str) -> str:
        pushed = self.tpp.push(scope, state="s", verifier="v" * 43)
        assert pushed.status == 201, pushed.body
        return self.tpp.authorisation_url(str(pushed.json()["request_uri"]))

    def consent(self, **changes: object) -> str:
        reply = self.tpp.xs2a("POST", "/v1/consents", body=consent_body(**changes), headers=PSU)
        return str(reply.json()["consentId"])

    def code(self, scope: str) -> str:
        redirect = self.decide(self.push(scope)).redirect
        assert redirect is not None
        return dict(parse_qsl(urlsplit(redirect).query))["code"]

    def tokens(self, scope: str) -> dict[str, object]:
        return self.tpp.exchange(self.code(scope), "v" * 43).json()

    def status_of(self, consent_id: str) -> object:
        return self.tpp.xs2a("GET", f"/v1/consents/{consent_id}/status").json()["consentStatus"]

    def read(self, token: object, consent_id: str, **psu: str) -> Reply:
        headers = {"Consent-ID": consent_id, **psu}
        return self.tpp.xs2a("GET", "/v1/accounts", token=str(token), headers=headers)

    def pay(self, token: object, amount: str = "1.00", **headers: str) -> Reply:
        body = payment_body(instructedAmount={"currency": "EUR", "amount": amount})
        return self.tpp.xs2a("POST", SCT, token=str(token), body=body, headers={**PSU, **headers})


class LocalTpp(DirectTpp):
    def __init__(self, world: World, prepared: Prepared) -> None:
        super().__init__(
            layout=prepared.layout,
            issuer=ISSUER,
            api_base_url=API,
            client_id=CLIENT_ID,
            redirect_uri=REDIRECT_URI,
            keys=prepared.keys,
        )
        self._world = world
        self._certificate = facts(load_certificate(prepared.layout.tpp_certificate))

    def assertion(self, **changes: object) -> str:
        now = int(self._world.now)
        return super().assertion(**{"iat": now, "exp": now + 60, **changes})

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        parts = urlsplit(path)
        call = Call(
            method=method,
            path=parts.path,
            query=parts.query,
            headers={name.lower(): [value] for name, value in headers.items()},
            body=body,
            certificate=self._certificate,
        )
        bank = self._world.bank
        return _reply(bank.xs2a.answer(call) if path.startswith("/v1/") else bank.oauth.answer(call))


class LocalBrowser(BankBrowser):
    def __init__(self, world: World, prepared: Prepared) -> None:
        super().__init__(issuer=ISSUER, ca_file=prepared.layout.ca_certificate)
        self._world = world

    def _fetch(self, method: str, target: str, body: bytes) -> Page:
        parts = urlsplit(target)
        cookies: Sequence[str] = [f"{name}={value}" for name, value in self._cookies.items()]
        call = Call(
            method=method, path=parts.path, query=parts.query, headers={"cookie": cookies}, body=body, certificate=None
        )
        reply = _reply(self._world.bank.browser.answer(call))
        for name, morsel in SimpleCookie(reply.headers.get("set-cookie", "")).items():
            self._cookies[name] = morsel.value
        return Page(status=reply.status, html=reply.body.decode(), headers=reply.headers)


def _reply(answer: Answer) -> Reply:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return Reply(status=answer.status, headers=headers, body=answer.body)


@pytest.fixture
def world(prepared: Prepared) -> World:
    return World(prepared)


@pytest.mark.parametrize(("seconds", "status"), [(59, 200), (61, 400)])
def test_a_request_uri_lives_a_minute(world: World, seconds: float, status: int) -> None:
    """A request_uri opens the page for 60 s."""
    url = world.push("PIS")
    world.now += seconds

    assert world.browser.open(url).status == status


@pytest.mark.parametrize(("seconds", "status"), [(59, 200), (61, 400)])
def test_a_code_lives_a_minute(world: World, seconds: float, status: int) -> None:
    """A code can be exchanged for 60 s."""
    code = world.code("PIS")
    world.now += seconds

    assert world.tpp.exchange(code, "v" * 43).status == status


def test_a_page_ends_after_ten_minutes(world: World) -> None:
    """Who waits longer than ten minutes at a page has to start again."""
    page = world.browser.open(world.push("PIS"))
    world.now += 601
    late = world.browser.submit(page, {"person": ["anna"], "pin": ["1234"]})

    assert (page.status, late.status) == (200, 400)
    assert "start again" in late.text()


@pytest.mark.parametrize(("seconds", "code"), [(599, None), (600, "TOKEN_EXPIRED"), (5000, "TOKEN_UNKNOWN")])
def test_an_access_token_lives_ten_minutes(world: World, seconds: float, code: str | None) -> None:
    """An access token expires after its life; long afterwards the bank has forgotten it."""
    consent_id = world.consent()
    tokens = world.tokens(f"AIS:{consent_id}")
    world.now += seconds
    if code == "TOKEN_UNKNOWN":
        world.tpp.refresh(str(tokens["refresh_token"]))  # issuing is when the bank forgets old ones
    reply = world.read(tokens["access_token"], consent_id)

    assert (reply.status, None if reply.status == 200 else code_of(reply)) == (200 if code is None else 401, code)


@pytest.mark.parametrize(("days", "status"), [(89.9, 200), (90.1, 400)])
def test_a_refresh_token_lives_90_days(world: World, days: float, status: int) -> None:
    """A refresh token that nobody used for 90 days is dead."""
    tokens = world.tokens("PIS")
    world.now += days * DAY

    assert world.tpp.refresh(str(tokens["refresh_token"])).status == status


def test_a_consent_expires(world: World) -> None:
    """After validUntil a consent is expired: no read, no payment, no refresh."""
    today = world.now - world.now % DAY
    valid_until = iso_date(today + DAY)
    consent_id = world.consent(validUntil=valid_until)
    tokens = world.tokens(f"AIS:{consent_id} PIS")
    world.now = today + 2 * DAY - 1
    last = world.tpp.refresh(str(tokens["refresh_token"])).json()
    before = world.read(last["access_token"], consent_id).status
    world.now += 2
    after = [world.read(last["access_token"], consent_id), world.pay(last["access_token"])]
    refreshed = world.tpp.refresh(str(last["refresh_token"]))

    assert before == 200
    assert [(reply.status, code_of(reply)) for reply in after] == [(401, "CONSENT_EXPIRED"), (401, "CONSENT_INVALID")]
    assert (refreshed.status, refreshed.json()["error"]) == (400, "invalid_grant")
    assert world.status_of(consent_id) == "expired"
    assert world.memory.books.ledger == []


def test_a_consent_lasts_180_days_at_most(world: World) -> None:
    """A later validUntil is brought down to what the bank gives."""
    consent_id = world.consent(validUntil="2999-12-31")
    told = world.tpp.xs2a("GET", f"/v1/consents/{consent_id}").json()["validUntil"]

    assert told == iso_date(world.now + 180 * DAY)


def test_a_one_off_consent_lasts_twenty_minutes(world: World) -> None:
    """A consent that is not recurring ends 20 minutes after the yes."""
    consent_id = world.consent(recurringIndicator=False, frequencyPerDay=1)
    world.tokens(f"AIS:{consent_id}")
    world.now += 1199
    before = world.status_of(consent_id)
    world.now += 2

    assert (before, world.status_of(consent_id)) == ("valid", "expired")


def test_unattended_reads_begin_anew_each_day(world: World) -> None:
    """The day's reads are used up until midnight UTC."""
    world.now += DAY - world.now % DAY - 60
    consent_id = world.consent(frequencyPerDay=2)
    token = world.tokens(f"AIS:{consent_id}")["access_token"]
    today = [world.read(token, consent_id).status for _ in range(3)]
    world.now += 61
    tomorrow = world.read(token, consent_id).status

    assert (today, tomorrow) == ([200, 200, 429], 200)


@pytest.mark.parametrize(
    ("seconds", "status"), [(0, "RCVD"), (0.29, "RCVD"), (0.31, "ACSP"), (0.99, "ACSP"), (1.01, "ACSC"), (1e6, "ACSC")]
)
def test_a_payments_life_follows_the_clock(world: World, seconds: float, status: str) -> None:
    """RCVD, ACSP after 0.3 s, ACSC after 1 s, for ever."""
    tokens = world.tokens("PIS")
    payment_id = world.pay(tokens["access_token"]).json()["paymentId"]
    world.now += seconds
    token = world.tpp.refresh(str(tokens["refresh_token"])).json()["access_token"]
    told = world.tpp.xs2a("GET", f"{SCT}/{payment_id}/status", token=str(token)).json()["transactionStatus"]

    assert told == status


def test_booked_follows_available(world: World) -> None:
    """What left at execution is booked at settlement."""
    consent_id = world.consent()
    token = world.tokens(f"AIS:{consent_id} PIS")["access_token"]
    world.pay(token, "80.55")

    def balances() -> list[str]:
        path = "/v1/accounts/3dc3d5b3-7023-4848-9853-f5400a64e801/balances"
        headers = {"Consent-ID": consent_id, **PSU}
        document = world.tpp.xs2a("GET", path, token=str(token), headers=headers).json()
        return [balance["balanceAmount"]["amount"] for balance in document["balances"]]  # type: ignore[attr-defined]

    early = balances()
    world.now += 1.01

    assert (early, balances()) == (["12480.55", "12400.00"], ["12400.00", "12400.00"])


@pytest.mark.parametrize(("seconds", "status"), [(599, "ACSC"), (601, "RJCT")])
def test_an_approval_waits_ten_minutes(world: World, seconds: float, status: str) -> None:
    """A payment that nobody approved within ten minutes is rejected and cannot be approved any more."""
    tokens = world.tokens("PIS")
    created = world.pay(tokens["access_token"], "600").json()
    links = created["_links"]
    assert isinstance(links, dict)
    world.now += seconds
    if status == "ACSC":
        world.decide(links["scaRedirect"]["href"])
    else:
        assert world.browser.open(links["scaRedirect"]["href"]).status == 400
    world.now += 2
    token = str(world.tpp.refresh(str(tokens["refresh_token"])).json()["access_token"])
    told = world.tpp.xs2a("GET", f"{SCT}/{created['paymentId']}/status", token=token).json()["transactionStatus"]

    assert told == status
    assert len(world.memory.books.ledger) == (1 if status == "ACSC" else 0)


@pytest.mark.parametrize(("seconds", "payments"), [(99, 1), (101, 2)])
def test_an_idempotency_key_is_remembered_for_its_window(prepared: Prepared, seconds: float, payments: int) -> None:
    """Within the window a repeat is the same payment; after it a new one, which a sidecar must never let happen."""
    world = World(prepared, idempotency="header", idempotency_window_seconds=100.0)
    token = world.tokens("PIS")["access_token"]
    world.pay(token, **{"Idempotency-Key": "k"})
    world.now += seconds
    world.pay(token, **{"Idempotency-Key": "k"})

    assert len(world.memory.books.ledger) == payments


def test_a_client_assertion_may_not_be_older_than_its_life(world: World) -> None:
    """An assertion is refused from the second of its exp on; its jti is remembered until then."""
    assertion = world.tpp.assertion()
    first = world.tpp.form("/oauth/revoke", {"token": "x"}, assertion=assertion).status
    world.now += 59
    replayed = world.tpp.form("/oauth/revoke", {"token": "x"}, assertion=assertion).json()
    world.now += 1
    expired = world.tpp.form("/oauth/revoke", {"token": "x"}, assertion=assertion).json()

    assert first == 200
    assert "used before" in str(replayed["error_description"])
    assert "expired" in str(expired["error_description"])


def test_a_certificate_may_end_during_a_connection(prepared: Prepared) -> None:
    """The TLS client certificate is checked at each request, not only in the handshake."""
    world = World(prepared, signature="optional")
    path = f"/v1/consents/{secrets.token_hex(8)}"
    before = world.tpp.xs2a("GET", path, sign=False)
    world.now = facts(load_certificate(prepared.layout.tpp_certificate)).not_after + 1
    after = world.tpp.xs2a("GET", path, sign=False)
    oauth = world.tpp.form("/oauth/par", {})

    assert (before.status, code_of(before)) == (403, "CONSENT_UNKNOWN")
    assert (after.status, code_of(after)) == (401, "CERTIFICATE_EXPIRED")
    assert (oauth.status, oauth.json()["error"]) == (401, "invalid_client")
    assert "certificate" in str(oauth.json()["error_description"])
