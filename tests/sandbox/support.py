"""What the sandbox's tests share: a provider with file keys whose every exchange the official description judges."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandbox.direct import DirectTpp, Reply, TppKeys
from sandbox.directory import Layout
from sandbox.testing import SandboxProcess
from tests.sandbox.official import official_description

CLIENT_ID = "demo-platform"
REDIRECT_URI = "http://127.0.0.1:8791/callback"
CURRENT = "DE52100100100000000101"
CURRENT_ID = "3dc3d5b3-7023-4848-9853-f5400a64e801"
SAVINGS = "DE41100100100000000202"
BUSINESS = "DE19100100100000000404"
SOMEBODY = "NL91ABNA0417164300"
PSU = {"PSU-IP-Address": "192.0.2.1"}
SCT = "/v1/payments/sepa-credit-transfers"


class JudgedTpp(DirectTpp):
    """A provider that lets the official description judge every answer, and every request that the bank accepts."""

    judge = True  # a test that spoils answers on purpose turns it off

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        reply = super().send(method, path, body, headers)
        if self.judge and path.startswith("/v1/"):
            official_description().check_answer(method, path, reply)
            if reply.status < 300:
                official_description().check_request(method, path, headers, body)
        return reply


@dataclass(frozen=True)
class Prepared:
    """An initialised directory and the keys that it was made for."""

    layout: Layout
    keys: TppKeys

    def tpp(self, bank: SandboxProcess, **changes: object) -> JudgedTpp:
        settings: dict[str, object] = {
            "layout": self.layout,
            "issuer": bank.info.issuer,
            "api_base_url": bank.info.api_base_url,
            "client_id": CLIENT_ID,
            "redirect_uri": REDIRECT_URI,
            "keys": self.keys,
            **changes,
        }
        return JudgedTpp(**settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Session:
    """A consent that was approved, with its tokens."""

    consent_id: str
    access_token: str
    refresh_token: str
    code: str
    verifier: str

    def read(self, tpp: DirectTpp, path: str, *, attended: bool = True) -> Reply:
        headers = {"Consent-ID": self.consent_id, **(PSU if attended else {})}
        return tpp.xs2a("GET", path, token=self.access_token, headers=headers)

    def pay(self, tpp: DirectTpp, body: Mapping[str, object] | bytes | None = None, /, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        content = payment_body() if body is None else body
        return tpp.xs2a("POST", SCT, token=self.access_token, body=content, headers={**PSU, **named})


def code_of(reply: Reply) -> str:
    """The code of a Berlin Group error."""
    messages = json.loads(reply.body)["tppMessages"]
    assert [message["category"] for message in messages] == ["ERROR"]
    return str(messages[0]["code"])


def consent_body(**changes: object) -> dict[str, object]:
    return {
        "access": {"accounts": [], "balances": [], "transactions": []},
        "recurringIndicator": True,
        "validUntil": "2099-12-31",
        "frequencyPerDay": 4,
        "combinedServiceIndicator": True,
        **changes,
    }


def create_consent(tpp: DirectTpp, **changes: object) -> str:
    reply = tpp.xs2a("POST", "/v1/consents", body=consent_body(**changes), headers={"PSU-IP-Address": "192.0.2.1"})
    assert reply.status == 201, reply.body
    return str(reply.json()["consentId"])


def approve(
    bank: SandboxProcess,
    tpp: DirectTpp,
    *,
    consent_id: str | None = None,
    pis: bool = True,
    accounts: Sequence[str] | None = None,
) -> Session:
    """Take a consent all the way: PAR, the person's yes, code exchange."""
    consent_id = consent_id or create_consent(tpp)
    verifier = secrets.token_urlsafe(48)
    pushed = tpp.push(f"AIS:{consent_id} PIS" if pis else f"AIS:{consent_id}", state="s-1", verifier=verifier)
    assert pushed.status == 201, pushed.body
    answer = bank.approve(tpp.authorisation_url(str(pushed.json()["request_uri"])), accounts=accounts)
    assert answer["state"] == "s-1"
    assert answer["iss"] == bank.info.issuer
    tokens = tpp.exchange(answer["code"], verifier)
    assert tokens.status == 200, tokens.body
    document = tokens.json()
    return Session(
        consent_id=consent_id,
        access_token=str(document["access_token"]),
        refresh_token=str(document.get("refresh_token", "")),
        code=answer["code"],
        verifier=verifier,
    )


def payment_body(**changes: object) -> dict[str, object]:
    return {
        "endToEndIdentification": "E2E-1",
        "debtorAccount": {"iban": CURRENT},
        "instructedAmount": {"currency": "EUR", "amount": "12.50"},
        "creditorAccount": {"iban": SOMEBODY},
        "creditorName": "Somebody",
        "remittanceInformationUnstructured": "Invoice 1",
        **changes,
    }
