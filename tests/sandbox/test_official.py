"""The judge itself: the official description, as these tests read it, tells right from wrong."""

import json
from pathlib import Path

import pytest

from sandbox.direct import Reply
from tests.sandbox import official
from tests.sandbox.official import official_description
from tests.sandbox.support import payment_body

HEADERS = {
    "X-Request-ID": "99391c7e-ad88-49ec-a2ad-99ddcb1f7721",
    "PSU-IP-Address": "192.0.2.1",
    "Content-Type": "application/json",
}
SCT = "/v1/payments/sepa-credit-transfers"


def reply(status: int, document: object, **headers: str) -> Reply:
    lower = {"x-request-id": HEADERS["X-Request-ID"], "content-type": "application/json"}
    return Reply(status=status, headers={**lower, **headers}, body=json.dumps(document).encode())


def created(**changes: object) -> dict[str, object]:
    return {"transactionStatus": "RCVD", "paymentId": "1", "_links": {"self": {"href": "/v1/x"}}, **changes}


def location() -> dict[str, str]:
    return {"location": "https://bank.example/v1/payments/1"}


def test_a_right_exchange_passes() -> None:
    """A payment and its answer as the standard describes them are accepted."""
    official_description().check_request("POST", SCT, HEADERS, json.dumps(payment_body()).encode())
    official_description().check_answer("POST", SCT, reply(201, created(), **location()))


@pytest.mark.parametrize(
    "wrong",
    [
        reply(201, created(transactionStatus="DONE"), **location()),
        reply(201, created(transactionStatus=None), **location()),
        reply(201, created(unheard_of=1), **location()),
        reply(201, {"paymentId": "1"}, **location()),
        reply(299, created(), **location()),
        reply(201, created(), **location(), **{"content-type": "text/html"}),
        reply(201, created(), **{"x-request-id": "no uuid"}),
        Reply(status=201, headers={"content-type": "application/json"}, body=json.dumps(created()).encode()),
    ],
)
def test_a_wrong_answer_is_found(wrong: Reply) -> None:
    """Wrong status, header, type, code or member: none gets past the judge."""
    with pytest.raises(AssertionError, match="POST"):
        official_description().check_answer("POST", SCT, wrong)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({**HEADERS, "X-Request-ID": "no uuid"}, payment_body()),
        ({name: value for name, value in HEADERS.items() if name != "PSU-IP-Address"}, payment_body()),
        (HEADERS, payment_body(instructedAmount={"currency": "EUR", "amount": "12,50"})),
        (HEADERS, payment_body(creditorName=None)),
        (HEADERS, payment_body(endToEndIdentification="x" * 36)),
        (HEADERS, payment_body(unheardOf=True)),
    ],
)
def test_a_wrong_request_is_found(headers: dict[str, str], body: dict[str, object]) -> None:
    """Missing headers, wrong forms and unknown members of a request are found."""
    with pytest.raises(AssertionError, match="POST"):
        official_description().check_request("POST", SCT, headers, json.dumps(body).encode())


def test_a_missing_description_fails_loudly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the official file the tests fail and say where it should be; they never skip."""
    monkeypatch.setattr(official, "_ROOT", tmp_path / "elsewhere")
    with pytest.raises(pytest.fail.Exception, match=r"\.\./shared/specs/berlin-group"):
        official_description.__wrapped__()
