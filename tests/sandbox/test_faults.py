"""Faults on demand: each spoils what it says, once, and the ledger tells the truth."""

import http.client
import json
import socket
import time

import pytest

from sandbox.direct import DirectTpp
from sandbox.testing import SandboxError, SandboxProcess
from tests.sandbox.support import PSU, SCT, JudgedTpp, Session, payment_body

BROKEN = (http.client.HTTPException, OSError)


@pytest.fixture(autouse=True)
def unjudged(tpp: JudgedTpp) -> None:
    """Spoiled answers are wrong on purpose."""
    tpp.judge = False


def statuses(bank: SandboxProcess) -> list[object]:
    return [request["status"] for request in bank.requests() if request["path"] == SCT]


@pytest.mark.parametrize(
    ("kind", "executed"),
    [
        ("cut_before_read", 0),
        ("cut_before_commit", 0),
        ("cut_after_commit", 1),
        ("cut_mid_header", 1),
        ("cut_mid_body", 1),
        ("wrong_content_length", 1),
    ],
)
def test_a_cut_connection_gives_no_answer(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, kind: str, executed: int
) -> None:
    """The provider sees a broken connection; whether the payment was executed only the ledger knows."""
    bank.set_fault(kind, SCT)
    with pytest.raises(BROKEN):
        session.pay(tpp)

    assert len(bank.ledger()) == executed
    assert statuses(bank) == [None]
    assert session.pay(tpp).status == 201, "the fault struck once"
    assert len(bank.ledger()) == executed + 1


@pytest.mark.parametrize(("kind", "executed_early"), [("delay_before_commit", 0), ("delay_after_commit", 1)])
def test_a_delay_is_before_or_after_the_work(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, kind: str, executed_early: int
) -> None:
    """During the delay the payment is executed or not, as the kind says; the answer comes in the end."""
    bank.set_fault(kind, SCT, seconds=2.0)
    content = json.dumps(payment_body()).encode()
    headers = tpp.headers(token=session.access_token, body=content, headers=PSU)
    started = time.monotonic()
    connection = tpp._connection
    connection.request("POST", SCT, body=content, headers=headers)
    deadline = started + 1.5
    while not statuses(bank) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    early = len(bank.ledger())
    answer = connection.getresponse()
    answer.read()

    assert early == executed_early
    assert answer.status == 201
    assert time.monotonic() - started >= 2.0
    assert len(bank.ledger()) == 1


@pytest.mark.parametrize(("commit", "executed"), [(False, 0), (True, 1)])
def test_a_status_can_be_put_in_place_of_the_answer(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, commit: bool, executed: int
) -> None:
    """500 with or without the payment executed: the same answer, another truth."""
    bank.set_fault("answer", SCT, status=500, commit=commit, body="oops", content_type="text/plain")
    reply = session.pay(tpp)

    assert (reply.status, reply.body, reply.headers["content-type"]) == (500, b"oops", "text/plain")
    assert len(bank.ledger()) == executed


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("truncated_json", {}),
        ("html", {}),
        ("duplicate_keys", {}),
        ("huge", {"size_bytes": 3_000_000}),
        ("wrong_content_type", {}),
        ("echo_token", {}),
        ("empty", {}),
    ],
)
def test_a_body_can_be_spoiled(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, variant: str, fields: dict[str, object]
) -> None:
    """Each variant does what its name says to a 201 whose payment was executed."""
    bank.set_fault("body", SCT, variant=variant, **fields)
    reply = session.pay(tpp)
    text = reply.body.decode()

    assert reply.status == 201
    assert len(bank.ledger()) == 1
    if variant in ("truncated_json", "html", "empty"):
        with pytest.raises(ValueError):
            json.loads(text)
    elif variant == "duplicate_keys":
        assert text.count('"transactionStatus"') == 2
        assert json.loads(text)["transactionStatus"] == "RCVD"
    elif variant == "huge":
        assert len(text) > 3_000_000
    elif variant == "echo_token":
        assert session.access_token in text
    else:
        assert reply.headers["content-type"] == "text/plain"


def test_a_redirect_is_answered(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """A 307 to elsewhere, with nothing executed: a provider that follows it sends the token away."""
    bank.set_fault("redirect", SCT, location="https://127.0.0.1:9/thief")
    reply = session.pay(tpp)

    assert (reply.status, reply.headers["location"]) == (307, "https://127.0.0.1:9/thief")
    assert bank.ledger() == []


def test_a_slow_answer_comes_byte_by_byte(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """The answer arrives whole, but every byte takes its time."""
    bank.set_fault("slow_answer", SCT, seconds=0.003)
    started = time.monotonic()
    reply = session.pay(tpp)

    assert reply.json()["transactionStatus"] == "RCVD"
    assert time.monotonic() - started > 1.0


def test_an_answer_can_be_longer_than_announced(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """With a negative delta more bytes come than were announced: the rest must not be taken for another answer."""
    bank.set_fault("wrong_content_length", SCT, delta=-10)
    reply = session.pay(tpp)

    with pytest.raises(ValueError):
        reply.json()


def test_the_token_endpoint_can_fail(bank: SandboxProcess, tpp: DirectTpp, session: Session) -> None:
    """A failing token endpoint, before and after the rotation was done."""
    bank.set_fault("answer", "/oauth/token", status=503)
    unavailable = tpp.refresh(session.refresh_token)
    again = tpp.refresh(session.refresh_token)
    bank.set_fault("cut_after_commit", "/oauth/token")
    with pytest.raises(BROKEN):
        tpp.refresh(str(again.json()["refresh_token"]))
    lost = tpp.refresh(str(again.json()["refresh_token"]))

    assert (unavailable.status, again.status) == (503, 200)
    assert lost.json()["error"] == "invalid_grant", "the rotation had happened: the old token is used up"


def test_faults_strike_as_often_as_said_and_where_said(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """count, method and path_prefix decide which requests are struck; clear ends it."""
    bank.set_fault("answer", "/v1/", method="POST", count=2, status=500)
    reads = [session.read(tpp, "/v1/accounts").status for _ in range(2)]
    posts = [session.pay(tpp).status for _ in range(3)]
    bank.set_fault("answer", "/v1/", count=5, status=500)
    pending = bank.pending_faults()
    bank.clear_faults()
    after = session.read(tpp, "/v1/accounts").status

    assert (reads, posts, after) == ([200, 200], [500, 500, 201], 200)
    assert [(fault["kind"], fault["count"]) for fault in pending] == [("answer", 5)]
    assert bank.pending_faults() == []


@pytest.mark.parametrize(
    ("kind", "path", "fields"),
    [
        ("explode", "/v1", {}),
        ("body", "/v1", {"variant": "unheard of"}),
        ("answer", "/v1", {}),
        ("answer", "v1", {"status": 500}),
        ("delay_after_commit", "/v1", {"seconds": -1}),
        ("delay_after_commit", "/v1", {"seconds": 1e9}),
        ("answer", "/v1", {"status": 500, "count": 0}),
        ("answer", "/v1", {"status": 500, "unheard_of": 1}),
    ],
)
def test_a_wrong_fault_is_refused(bank: SandboxProcess, kind: str, path: str, fields: dict[str, object]) -> None:
    """A fault that is not one is refused with the reason, and none is set."""
    with pytest.raises(SandboxError, match="400"):
        bank.set_fault(kind, path, **fields)

    assert bank.pending_faults() == []


def test_the_control_listener_shows_no_secret(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """There is no address for tokens, and what is shown holds none."""
    session.pay(tpp)
    tpp.refresh(session.refresh_token)
    shown = json.dumps([bank.ledger(), bank.requests(), bank.pending_faults()])

    assert all(secret not in shown for secret in (session.access_token, session.refresh_token, session.code))
    for path in ("/control/tokens", "/control", "/control/consents", "/"):
        with pytest.raises(SandboxError, match="404"):
            bank._control("GET", path)


def test_the_ledger_can_be_asked_for_one_payment(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """?end_to_end_id= narrows the ledger."""
    for name in ("E2E-A", "E2E-B"):
        session.pay(tpp, payment_body(endToEndIdentification=name))

    assert [entry["end_to_end_id"] for entry in bank.ledger()] == ["E2E-A", "E2E-B"]
    assert [entry["sequence"] for entry in bank.ledger("E2E-B")] == [2]


def test_a_reset_forgets_everything(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """After a reset the books are as at the start, and the tokens of before are unknown."""
    session.pay(tpp)
    bank.set_fault("answer", "/nowhere", status=500)
    bank.reset()
    read = session.read(tpp, "/v1/accounts")

    assert (bank.ledger(), bank.pending_faults()) == ([], [])
    assert read.json()["tppMessages"][0]["code"] == "TOKEN_UNKNOWN"  # type: ignore[index]


def test_a_client_that_sends_nothing_hurts_nobody(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """Connections that say nothing, or nonsense, do not keep others from being served."""
    silent = [socket.create_connection(("127.0.0.1", bank.info.ports["api"]), timeout=10) for _ in range(20)]
    silent[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    status = session.read(tpp, "/v1/accounts").status
    for connection in silent:
        connection.close()

    assert status == 200
