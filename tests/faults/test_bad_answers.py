# ruff: noqa: E501 (the table of cases: one line each)
"""bi_G1 to bi_G44: what a bank may answer to an initiation, by the ids of the list, through the whole core.

The bank has executed each of these payments, or has not seen it, and says something else. Told is accepted, rejected or unknown as
the table says; the bank gets one request; what was not a clear answer is never told as one. The bytes on the wire are
`test_bank_answers`' matter.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from sidecar.custody.accounts import AccountRead
from sidecar.domain.payment import PaymentState
from sidecar.domain.provider import Answer, SendOutcome, Unknown
from sidecar.errors import Unavailable
from tests.fakes.bank import API, ISSUER, answer, error
from tests.faults.front import run
from tests.unit.custody.support import OWNER, World, caller, payment_request

S = PaymentState
JSON = ("content-type", "application/json")
Twist = SendOutcome | Callable[[Answer], SendOutcome]
HOST = ISSUER.removesuffix(":443")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`told` is the state that the caller hears; what the bank did is the bank's."""

    id: str
    twist: Twist
    told: PaymentState = S.RECONCILING


def _body(change: Callable[[bytes], bytes]) -> Callable[[Answer], Answer]:
    return lambda got: replace(got, body=change(got.body))


def _members(**changes: object) -> Callable[[Answer], Answer]:
    """The right answer with other members; `...` leaves one out."""

    def twist(got: Answer) -> Answer:
        members = {**json.loads(got.body), **changes}
        return replace(
            got, body=json.dumps({name: value for name, value in members.items() if value is not ...}).encode()
        )

    return twist


def _headers(*headers: tuple[str, str]) -> Callable[[Answer], Answer]:
    return lambda got: replace(got, headers=headers)


def _status(status: int) -> Callable[[Answer], Answer]:
    """The bank has executed, and says another status with the right body."""
    return lambda got: replace(got, status=status)


def _redirect(status: int) -> Callable[[Answer], Answer]:
    return lambda got: replace(got, status=status, headers=(*got.headers, ("location", "https://169.254.169.254/")))


def _link(href: object) -> Callable[[Answer], Answer]:
    return _members(transactionStatus="RCVD", _links={"scaRedirect": {"href": href}})


OTHER_CALL = "99999999-9999-4999-8999-999999999999"
ACCEPTED = S.ACCEPTED

TABLE = [
    Case(id="bi_G1_no_body", twist=_body(lambda _: b"")),
    Case(id="bi_G2_no_content_type", twist=_headers()),
    Case(id="bi_G2_html", twist=_headers(("content-type", "text/html"))),
    Case(id="bi_G2_xml", twist=lambda got: replace(got, headers=(("content-type", "application/xml"),), body=b"<a/>")),
    Case(id="bi_G2_two_content_types", twist=_headers(JSON, JSON)),
    Case(id="bi_G2_charset_lie", twist=_body(lambda body: body.decode().encode("utf-16"))),
    Case(id="bi_G2_charset_named", twist=_headers(("content-type", "application/json; charset=utf-8")), told=S.SETTLED),
    Case(id="bi_G3_truncated", twist=_body(lambda body: body[:-1])),
    Case(id="bi_G3_trailing_garbage", twist=_body(lambda body: body + b"x")),
    Case(id="bi_G3_two_documents", twist=_body(lambda body: body + body)),
    Case(id="bi_G3_duplicate_names", twist=_body(lambda body: b'{"transactionStatus":"RJCT",' + body[1:])),
    Case(id="bi_G3_byte_order_mark", twist=_body(lambda body: b"\xef\xbb\xbf" + body)),
    Case(id="bi_G3_nan", twist=_body(lambda body: b'{"x":NaN,' + body[1:])),
    Case(id="bi_G3_1e999", twist=_body(lambda body: b'{"x":1e999,' + body[1:])),
    Case(id="bi_G3_depth_10000", twist=_body(lambda body: b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"," + body[1:])),
    Case(id="bi_G3_five_thousand_digits", twist=_body(lambda body: b'{"x":' + b"1" * 5000 + b"," + body[1:])),
    Case(id="bi_G3_list", twist=_body(lambda body: b"[" + body + b"]")),
    Case(id="bi_G3_latin_1", twist=_body(lambda body: b'{"x":"\xe4",' + body[1:])),
    *[Case(id=f"bi_G6_{status}", twist=_status(status)) for status in (200,)],
    *[Case(id=f"bi_G7_{status}", twist=_status(status)) for status in (202, 203, 204, 205, 206)],
    *[Case(id=f"bi_G8_{status}", twist=_redirect(status)) for status in (301, 302, 303, 307, 308)],
    Case(id="bi_G9_listed", twist=error(400, "FORMAT_ERROR"), told=S.REJECTED),
    Case(id="bi_G9_not_listed", twist=error(400, "SESSIONS_NOT_SUPPORTED")),
    Case(id="bi_G9_no_code", twist=answer(400, {})),
    Case(id="bi_G9_no_body", twist=Answer(status=400, headers=(JSON,), body=b"")),
    Case(id="bi_G9_lower_case", twist=error(400, "format_error")),
    Case(id="bi_G9_listed_for_another_status", twist=error(404, "FORMAT_ERROR")),
    Case(id="bi_G9_one_of_two_listed", twist=answer(400, {"tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}, {"category": "ERROR", "code": "X_Y"}]})),
    Case(id="bi_G9_a_warning", twist=answer(400, {"tppMessages": [{"category": "WARNING", "code": "FORMAT_ERROR"}]})),
    Case(id="bi_G9_with_a_payment", twist=answer(400, {"tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}], "paymentId": "p-1"})),
    Case(id="bi_G9_as_html", twist=replace(error(400, "FORMAT_ERROR"), headers=(("content-type", "text/html"),))),
    Case(id="bi_G10_expired", twist=error(401, "TOKEN_EXPIRED"), told=S.REJECTED),
    Case(id="bi_G10_no_code", twist=Answer(status=401, headers=(JSON, ("www-authenticate", "Bearer")), body=b"{}")),
    Case(id="bi_G11_consent_unknown", twist=error(403, "CONSENT_UNKNOWN"), told=S.REJECTED),
    Case(id="bi_G11_firewall", twist=Answer(status=403, headers=(("content-type", "text/html"),), body=b"<h1>Forbidden")),
    Case(id="bi_G12_404", twist=answer(404, {})),
    Case(id="bi_G13_405_listed", twist=error(405, "SERVICE_INVALID"), told=S.REJECTED),
    *[Case(id=f"bi_G13_{status}", twist=error(status, "FORMAT_ERROR")) for status in (405, 406, 415)],
    *[Case(id=f"bi_G14_{status}", twist=error(status, "FORMAT_ERROR")) for status in (408, 425)],
    Case(id="bi_G15_409_with_payment", twist=answer(409, {"tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}], "paymentId": "p-1"})),
    Case(id="bi_G15_409_without_payment", twist=error(409, "FORMAT_ERROR")),
    *[Case(id=f"bi_G16_retry_after_{name}", twist=replace(error(429, "ACCESS_EXCEEDED"), headers=(JSON, ("retry-after", value)))) for name, value in {"0": "0", "minus_1": "-1", "past": "Mon, 01 Jan 1990 00:00:00 GMT", "10_years": "315576000", "text": "soon", "huge": "9" * 400}.items()],
    *[Case(id=f"bi_G17_{status}_before", twist=error(status, "INTERNAL_SERVER_ERROR")) for status in (500, 502, 503, 504)],
    *[Case(id=f"bi_G17_{status}_after", twist=_status(status)) for status in (500, 502, 503, 504)],
    *[Case(id=f"bi_G18_{status}", twist=_status(status)) for status in (299, 451, 499, 599, 999)],
    Case(id="bi_G19_echo_missing", twist=_headers(JSON), told=S.SETTLED),
    Case(id="bi_G19_echo_of_another_call", twist=_headers(JSON, ("x-request-id", OTHER_CALL))),
    Case(id="bi_G19_echo_of_two_calls", twist=lambda got: replace(got, headers=(*got.headers, ("x-request-id", OTHER_CALL)))),
    Case(id="bi_G19_refusal_of_another_call", twist=replace(error(400, "FORMAT_ERROR"), headers=(JSON, ("x-request-id", OTHER_CALL)))),
    *[Case(id=f"bi_G20_{name}", twist=_members(paymentId=value)) for name, value in {"empty": "", "megabyte": "x" * 1_000_000, "dots": "..", "path": "a/../b", "encoded": "%2e%2e", "blank": "a b", "line": "a\n", "null": None, "number": 7, "list": ["a"], "missing": ..., "query": "a?b", "fragment": "a#b", "backslash": "a\\b", "surrogate": "\ud800"}.items()],
    Case(id="bi_G21_unknown_code", twist=_members(transactionStatus="ABCD"), told=ACCEPTED),
    *[Case(id=f"bi_G21_{name}", twist=_members(transactionStatus=value)) for name, value in {"lower_case": "acsc", "null": None, "list": ["ACSC"], "missing": ..., "long": "ACSCX", "empty": "", "number": 1, "true": True, "blank": "ACSC ", "full_width": "\uff21CSC"}.items()],
    Case(id="bi_G21_rejected_at_once", twist=_members(transactionStatus="RJCT"), told=S.REJECTED),
    Case(id="bi_G23_another_amount", twist=_members(instructedAmount={"currency": "EUR", "amount": "999999.00"}, transactionStatus="ACTC"), told=ACCEPTED),
    Case(id="bi_G24_another_consent", twist=_members(consentId="somebody-elses", transactionStatus="ACTC"), told=ACCEPTED),
    Case(id="bi_G25_links_elsewhere", twist=_members(transactionStatus="ACTC", _links={"self": {"href": "https://evil.example/p"}, "status": {"href": "//evil.example/s"}}), told=ACCEPTED),
    *[Case(id=f"bi_G26_{name}", twist=_link(href), told=ACCEPTED) for name, href in {"javascript": "javascript:alert(1)", "http": HOST.replace("https", "http") + "/a", "another_host": "https://evil.example/a", "user_info": f"https://x@{HOST.removeprefix('https://')}/a", "user_info_after": f"{HOST}@evil.example/a", "look_alike": f"{HOST}.evil.example/a", "no_scheme": f"//{HOST.removeprefix('https://')}/a", "line": f"{HOST}/a\nb", "another_port": f"{HOST}:444/a", "list": [f"{HOST}/a"], "backslash": f"{HOST}\\@evil.example/a"}.items()],
    Case(id="bi_G26_right", twist=_link(f"{HOST}/approve/1"), told=S.AWAITING_AUTHORISATION),
    *[Case(id=f"{family}_{code.lower()}", twist=Unknown(code=code)) for family, code in {"bi_G29": "ANSWER_TRUNCATED", "bi_G30": "CONNECTION_LOST", "bi_G32": "ANSWER_MALFORMED", "bi_G33": "DEADLINE_AFTER_SEND", "bi_G4": "ANSWER_TOO_LARGE"}.items()],
    Case(id="bi_G43_cookie", twist=lambda got: replace(got, headers=(*got.headers, ("set-cookie", "a=b"))), told=S.SETTLED),
]  # fmt: skip


@pytest.mark.parametrize("name", ["sandbox-bank", "sandbox-bank-idempotent"], ids=["class_C", "class_A"])
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_an_answer_is_told_for_what_it_is(case: Case, name: str) -> None:
    """Accepted, rejected or unknown; one request; unknown is found out by its class, and ends at what the bank has done."""

    async def test() -> None:
        world = World(name=name, token_seconds=None)
        world.bank.script["initiate"] = [case.twist]
        payment = await world.core.payments.initiate(
            caller(), payment_request(await world.consent(life_seconds=100_000))
        )
        executed = world.bank.executed[payment.instruction.end_to_end_id]
        told = payment.state

        assert told is case.told
        assert told is not S.REJECTED or executed == 0 or case.id == "bi_G21_rejected_at_once"
        assert world.bank.count("initiate") == 1
        assert {request.origin for request in world.bank.requests} <= {API}
        for _ in range(6):
            world.clock.advance(10)
            await world.core.reconciler.run_due()
        stored = await world.stored(payment)
        if told is S.RECONCILING:
            assert stored.state is (S.NEEDS_ATTENTION if name == "sandbox-bank" else S.SETTLED)
        assert world.bank.executed[payment.instruction.end_to_end_id] <= 1
        assert all("evil" not in request.target for request in world.bank.requests)

    run(test)


# --- statuses and reads that change their mind


def test_bi_g20_the_payments_id_changes_between_two_answers() -> None:
    """The status answer names another payment: ours is asked for by the id that its initiation gave, each time."""

    async def test() -> None:
        world = World(initial_status="ACTC")
        world.bank.script["status"] = [_members(paymentId="another")] * 3
        payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
        for _ in range(4):
            world.clock.advance(60)
            await world.core.reconciler.run_due()

        targets = {request.target for request in world.bank.requests if world.bank.kind(request) == "status"}
        assert len(targets) == 1
        assert (await world.stored(payment)).provider_payment_id in targets.pop()

    run(test)


@pytest.mark.parametrize("later", ["PDNG", "RJCT", "RCVD", "CANC"])
def test_bi_g22_a_status_that_goes_back(later: str) -> None:
    """Settled is settled: a later status changes nothing, and is not even asked for."""

    async def test() -> None:
        world = World(initial_status="ACTC")
        payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
        (at_the_bank,) = world.bank.payments.values()
        for status in ("ACSC", later):
            at_the_bank.status = status
            world.clock.advance(60)
            await world.core.reconciler.run_due()

        assert (await world.stored(payment)).state is S.SETTLED
        assert world.bank.count("status") == 1

    run(test)


def test_bi_g12_not_found_right_after_it_was_made() -> None:
    """404 to the status of an accepted payment says nothing of the payment: it stays accepted, and is asked for again."""

    async def test() -> None:
        world = World(initial_status="ACTC")
        world.bank.script["status"] = [error(404, "RESOURCE_UNKNOWN")] * 3
        payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
        states = []
        for _ in range(6):
            world.clock.advance(61)
            await world.core.reconciler.run_due()
            states.append((await world.stored(payment)).state)

        assert set(states) == {S.ACCEPTED}
        assert world.bank.count("initiate") == 1

    run(test)


def test_bi_g10_expired_for_ever() -> None:
    """A token that is refused as expired again and again is renewed once for each try, and never in a loop."""

    async def test() -> None:
        world = World(initial_status="ACTC", token_seconds=1200)
        payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
        world.bank.script["status"] = [error(401, "TOKEN_EXPIRED")] * 1000
        for _ in range(10):
            world.clock.advance(61)
            await world.core.reconciler.run_due()

        assert (await world.stored(payment)).state is S.ACCEPTED
        assert world.bank.refreshes <= 11

    run(test)


def test_bi_g42_the_accounts_of_another_person() -> None:
    """Accounts that the consent does not name are not shown, whatever the bank lists."""

    async def test() -> None:
        world = World()
        consent = await world.consent()

        accounts = await world.core.accounts.list_accounts(caller(), AccountRead(consent=consent.id, owner=OWNER))

        assert [account.resource_id for account in accounts] == ["acc-1"]

    run(test)


def test_the_store_takes_each_answer_though_it_is_away_for_a_moment() -> None:
    """No half-written row: the outcome of every case is written whole, after the store has failed once."""

    async def test() -> None:
        for case in TABLE:
            world = World()
            world.bank.script["initiate"] = [case.twist]
            real, failures = world.store.change_payment, [Unavailable("STORE_UNAVAILABLE", "away")]

            async def flaky(*args: object, real=real, failures=failures, **more: object) -> None:  # type: ignore[no-untyped-def]
                if failures:
                    raise failures.pop()
                await real(*args, **more)

            world.store.change_payment = flaky  # type: ignore[method-assign]
            payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))

            assert payment.state is case.told, case.id
            assert await world.stored(payment) == payment, case.id

    run(test)
