"""Payments: the twelve rules of docs/reliability.md, each by name, and what callers are told."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from sidecar.custody.payments import InitiatePayment
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import PaymentId, ProviderId, WorkloadId
from sidecar.domain.money import Money
from sidecar.domain.payment import DispatchPermit, Payment, PaymentState
from sidecar.domain.provider import Answer, NotSent, SendOutcome, Unknown
from sidecar.errors import (
    Conflict,
    CustodyError,
    Internal,
    InvalidField,
    NotFound,
    PreconditionFailed,
    Refused,
    Unavailable,
)
from sidecar.ports import PaymentFilter, Prepared
from tests.fakes.bank import IBAN, error
from tests.unit.custody.support import (
    ADMINISTRATOR,
    CREDITOR,
    OWNER,
    World,
    caller,
    draft,
    payment_request,
    request_id,
)

S = PaymentState
CLASS_A, CLASS_C = "sandbox-bank-idempotent", "sandbox-bank"
STORE_AWAY = Unavailable("STORE_UNAVAILABLE", "away")


def total(world: World) -> int:
    return sum(world.bank.executed.values())


# --- rule 1: insert first


async def test_rule_1_one_request_id_is_one_payment() -> None:
    """A repeat of the call, however often, gets the same payment, and the bank sees one."""
    world = World()
    request = payment_request(await world.consent())

    first = await world.core.payments.initiate(caller(), request)
    again = [await world.core.payments.initiate(caller(), request) for _ in range(3)]

    assert first.state is S.SETTLED
    assert again == [first] * 3
    assert total(world) == 1


async def test_rule_1_two_calls_at_once_are_one_payment() -> None:
    """50 calls with one request id at the same moment: one payment, one send, and every answer names it."""
    world = World()
    request = payment_request(await world.consent())

    answers = await asyncio.gather(*(world.core.payments.initiate(caller(), request) for _ in range(50)))

    assert {payment.id for payment in answers} == {answers[0].id}
    assert {payment.state for payment in answers} <= {S.SETTLED, S.INTENT, S.DISPATCHED}
    assert world.bank.count("initiate") == total(world) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"amount": Money(currency_code="EUR", minor_units=1251)},
        {"creditor_account": AccountReference(iban="DE75512108001245126199")},
        {"creditor_name": "Example Shoq"},
        {"remittance_information": "other"},
        {"end_to_end_id": "other"},
        {"debtor_account": AccountReference(iban=IBAN)},
        {"product": "instant-sepa-credit-transfer"},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_bi_c5_same_request_id_with_another_content_is_refused(changes: dict[str, Any]) -> None:
    """C5: each part of the instruction alone makes it another payment, which the used request id does not get."""
    world = World()
    request = payment_request(await world.consent())
    await world.core.payments.initiate(caller(), request)

    with pytest.raises(Conflict) as refused:
        await world.core.payments.initiate(caller(), replace(request, **changes))

    assert refused.value.reason == "REQUEST_ID_REUSED"
    assert total(world) == 1


async def test_bi_c6_another_callers_request_id_is_another_payment() -> None:
    """C6: request ids belong to their caller; and what one workload made the other cannot see."""
    world = World()
    other = WorkloadId("workload:other")
    mine, theirs = await world.consent(), await world.consent(caller=other)
    request = payment_request(mine)

    first = await world.core.payments.initiate(caller(), request)
    second = await world.core.payments.initiate(caller(other), replace(request, consent=theirs.id))

    assert first.id != second.id
    assert total(world) == 2


async def test_our_key_towards_the_bank_is_made_once_and_stored_before_use() -> None:
    """The intent on record has the key that the request carries afterwards."""
    world = World(name=CLASS_A)
    request = payment_request(await world.consent())
    world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]

    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)
    (intent,) = world.store._state.payments.values()
    await world.core.payments.initiate(caller(), request)

    sent = [asked for asked in world.bank.requests if world.bank.kind(asked) == "initiate"]
    assert [asked.headers["idempotency-key"] for asked in sent] == [intent.bank_key]
    assert intent.bank_key not in (request.request_id, intent.id)


# --- rule 2: prepare everything before the point of no return


@pytest.mark.parametrize("part", ["hsm", "egress", "token"])
async def test_rule_2_what_fails_before_the_dispatch_leaves_an_intent(part: str) -> None:
    """A key, a connection or a token that is not to be had: nothing is dispatched, and the same request id goes on later."""
    world = World()
    consent = await world.consent()
    request = payment_request(consent)
    if part == "hsm":
        world.hsm.available = False
        world.clock.advance(400)  # half of the token's life: its renewal needs a signature
        world.core.egress.available = False
    elif part == "egress":
        world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    else:
        world.core.egress.available = False

    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)

    (payment,) = world.store._state.payments.values()
    assert payment.state is S.INTENT
    assert AuditEvent.PAYMENT_DISPATCHED not in world.events()
    world.hsm.available = world.core.egress.available = True
    assert (await world.core.payments.initiate(caller(), request)).state is S.SETTLED
    assert total(world) == 1


async def test_rule_2_a_consent_that_ends_while_preparing_pays_nothing() -> None:
    """C24: the consent is looked at again after the connection was opened; a revoked one is used no more."""
    world = World()
    consent = await world.consent()

    async def revoke() -> None:
        current = await world.stored(consent)
        revoked = current.to(ConsentState.REVOKED)
        await world.store.change_consent(revoked, audit=[draft(AuditEvent.CONSENT_REVOKED)])

    world.core.egress.gates["prepare"] = revoke

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.payments.initiate(caller(), payment_request(consent))

    assert refused.value.reason == "CONSENT_REVOKED"
    assert total(world) == 0
    assert AuditEvent.PAYMENT_DISPATCHED not in world.events()
    assert world.core.egress.discarded == 1


async def test_a_revocation_is_not_answered_while_a_payment_may_still_leave() -> None:
    """The dispatch was on record first, and its run stands still before the first byte: the answer waits until it has sent."""
    world = World()
    consent = await world.consent()
    revocations: list[asyncio.Task[Consent]] = []

    async def revoke_meanwhile() -> None:
        revocations.append(asyncio.ensure_future(world.core.consents.revoke(caller(), consent.id, OWNER, request_id())))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await world.stored(consent)).state is ConsentState.REVOKED
        assert not revocations[0].done()

    world.core.egress.gates["send"] = revoke_meanwhile
    paid = await world.core.payments.initiate(caller(), payment_request(consent))

    assert (await revocations[0]).state is ConsentState.REVOKED
    assert paid.state is S.SETTLED
    assert total(world) == 1


async def test_a_revocation_does_not_wait_for_a_permit_that_is_over() -> None:
    """The run that had the permit died. Once its deadline has passed, and the clocks of two machines may differ no further, the
    revocation is answered; a repeat of it, and one where all outcomes are old, wait for nothing."""
    world = World()
    consent = await world.consent()
    world.core.egress.gates["send"] = asyncio.Event().wait  # type: ignore[assignment]
    lost = asyncio.ensure_future(world.core.payments.initiate(caller(), payment_request(consent)))
    while not world.core.egress.deadlines:
        await asyncio.sleep(0)
    (payment,) = world.store._state.payments.values()
    after_crash = world.start("two")
    began_ns = world.clock.boot_time_ns()

    await after_crash.consents.revoke(caller(), consent.id, OWNER, request_id())

    assert payment.send_deadline_time is not None
    waited_seconds = (world.clock.boot_time_ns() - began_ns) / 1e9
    assert world.clock.now() >= payment.send_deadline_time
    assert waited_seconds <= 20
    began_ns = world.clock.boot_time_ns()
    await after_crash.consents.revoke(caller(), consent.id, OWNER, request_id())
    assert world.clock.boot_time_ns() == began_ns
    lost.cancel()


# --- rule 3: the dispatch record


async def test_rule_3_the_dispatch_is_on_record_under_a_checkpoint_before_the_bank_sees_it() -> None:
    """When the request reaches the bank, the log holds the dispatch and a signed checkpoint covers it."""
    world = World()
    seen: list[tuple[bool, bool]] = []

    async def look() -> None:
        position = await world.store.log_position()
        seen.append((AuditEvent.PAYMENT_DISPATCHED in world.events(), position.covered_size == position.size))

    world.core.egress.gates["send"] = look
    await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert seen == [(True, True)]


@pytest.mark.parametrize("signed", [True, False], ids=["store", "signature"])
async def test_rule_3_no_record_no_act(signed: bool) -> None:
    """Where the dispatch cannot be recorded or its checkpoint not signed, nothing is sent; the prepared request is dropped."""
    world = World()
    request = payment_request(await world.consent())

    async def fail() -> None:
        if signed:
            world.store.failures.append(STORE_AWAY)
        else:
            signer = world.store._signer
            signer.failures.append(Unavailable("AUDIT_UNAVAILABLE", "away"))  # type: ignore[attr-defined]

    world.core.egress.gates["prepare"] = fail
    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)

    assert total(world) == 0
    assert world.core.egress.discarded == 1
    del world.core.egress.gates["prepare"]
    assert (await world.core.payments.initiate(caller(), request)).state is S.SETTLED
    assert total(world) == 1


# --- rule 4: one bounded send


async def test_rule_4_a_process_that_is_paused_on_its_way_to_egress_sends_nothing() -> None:
    """The permit says until when: the seconds that were left before the pause are not left after it."""
    world = World()
    request = payment_request(await world.consent())

    async def pause() -> None:
        world.clock.advance(25 * 3600)

    world.core.egress.gates["send"] = pause

    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)
    assert world.bank.count("initiate") == 0


async def test_rule_4_a_process_that_was_paused_after_the_record_sends_nothing() -> None:
    """The time to send runs from before the dispatch record by the boot clock: who wakes up later finds it over."""
    world = World()
    record = world.store.record_dispatch

    async def paused(*args: object, **kwargs: object) -> object:
        permit = await record(*args, **kwargs)  # type: ignore[arg-type]
        world.clock.advance(86_400)
        return permit

    world.store.record_dispatch = paused  # type: ignore[assignment, method-assign]
    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert world.core.egress.deadlines == []
    assert total(world) == 0


async def test_rule_4_what_the_record_took_is_taken_from_the_sends_time() -> None:
    """A record that took 4 of the 10 seconds leaves 6 for the send."""
    world = World()
    record = world.store.record_dispatch

    async def slow(*args: object, **kwargs: object) -> object:
        world.clock.advance(4)
        return await record(*args, **kwargs)  # type: ignore[arg-type]

    world.store.record_dispatch = slow  # type: ignore[assignment, method-assign]
    await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert world.core.egress.deadlines == [pytest.approx(6.0)]


# --- rules 5 and 6: no retries, unknown is unknown

UNKNOWN_OUTCOMES = {
    "no answer": Unknown(code="ANSWER_TIMEOUT"),
    "connection lost": Unknown(code="CONNECTION_LOST"),
    "200": lambda answer: replace(answer, status=200),
    "202": lambda answer: replace(answer, status=202),
    "307": Answer(status=307, headers=(("location", "https://api.bank.example/v1/payments"),), body=b""),
    "400 unlisted": error(400, "SESSIONS_NOT_SUPPORTED"),
    "400 without body": Answer(status=400, headers=(), body=b""),
    "408": error(408, "FORMAT_ERROR"),
    "409": error(409, "FORMAT_ERROR"),
    "425": error(425, "FORMAT_ERROR"),
    "429": error(429, "ACCESS_EXCEEDED"),
    "500": error(500, "FORMAT_ERROR"),
    "503": error(503, "FORMAT_ERROR"),
    "999": error(999, "FORMAT_ERROR"),
    "201 truncated": lambda answer: replace(answer, body=answer.body[:-5]),
    "201 html": lambda answer: replace(answer, headers=(("content-type", "text/html"),)),
    "201 without id": lambda answer: replace(answer, body=answer.body.replace(b"paymentId", b"paymentIx")),
    "201 for another": lambda answer: replace(answer, headers=(*answer.headers[:1], ("x-request-id", request_id()))),
    "egress failed": Internal(),
}


@pytest.mark.parametrize("provider", [CLASS_A, CLASS_C])
@pytest.mark.parametrize("case", UNKNOWN_OUTCOMES)
async def test_rule_6_what_is_no_clear_answer_is_unknown_and_sent_once(case: str, provider: str) -> None:
    """Time-outs, redirects, 5xx, conflicts and everything that does not parse: RECONCILING, never REJECTED; and (rule 5) no layer
    has sent it again."""
    world = World(name=provider)
    outcome = UNKNOWN_OUTCOMES[case]
    if isinstance(outcome, Exception):
        world.core.egress.trouble["send"] = [outcome]
    else:
        world.bank.script["initiate"] = [outcome]  # type: ignore[list-item]

    payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert payment.state is S.RECONCILING
    assert payment.epoch == 2
    assert world.bank.count("initiate") <= 1


@pytest.mark.parametrize("provider", [CLASS_A, CLASS_C])
@pytest.mark.parametrize(
    ("answer", "code"),
    [(error(400, "FORMAT_ERROR"), "FORMAT_ERROR"), (error(401, "CONSENT_INVALID"), "CONSENT_INVALID")],
    ids=["400", "401"],
)
async def test_rule_6_a_listed_refusal_is_a_refusal(answer: Answer, code: str, provider: str) -> None:
    """What the descriptor lists as a refusal, as the answer to the only send, is REJECTED with the bank's code, for good."""
    world = World(name=provider)
    world.bank.script["initiate"] = [answer]
    request = payment_request(await world.consent())

    payment = await world.core.payments.initiate(caller(), request)

    assert (payment.state, payment.status_reason) == (S.REJECTED, code)
    assert await world.core.payments.initiate(caller(), request) == payment
    assert total(world) == 0


async def test_a_payment_that_is_created_as_rejected_was_never_accepted() -> None:
    """201 with RJCT: rejected, with the bank's id kept."""
    world = World(initial_status="RJCT")

    payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert (payment.state, payment.provider_status) == (S.REJECTED, "RJCT")
    assert payment.provider_payment_id == "bank-payment-1"


@pytest.mark.parametrize("provider", [CLASS_A, CLASS_C])
async def test_not_sent_goes_back_to_the_intent_and_the_same_request_id_pays(provider: str) -> None:
    """Egress proves that not one byte left: the caller is told to repeat, and the repeat is the only payment."""
    world = World(name=provider)
    world.bank.script["initiate"] = [NotSent(code="CONNECT_FAILED")]
    request = payment_request(await world.consent())

    with pytest.raises(Unavailable) as away:
        await world.core.payments.initiate(caller(), request)
    (payment,) = world.store._state.payments.values()

    assert away.value.reason == "PROVIDER_UNAVAILABLE"
    assert (payment.state, payment.epoch, payment.attempts) == (S.INTENT, 2, 0)
    assert (await world.core.payments.initiate(caller(), request)).state is S.SETTLED
    assert total(world) == 1


# --- rule 7: fencing


async def test_rule_7_a_run_that_was_taken_over_writes_no_outcome() -> None:
    """While the answer is under way another sidecar takes the payment over: the late answer changes nothing, and the caller gets
    the payment as it stands."""
    world = World()
    request = payment_request(await world.consent())
    first = world.core
    send = first.egress.send

    async def answered_late(prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        outcome = await send(prepared, permit, deadline_seconds=deadline_seconds)
        world.clock.advance(16)
        await world.start("two").reconciler.run_due()
        return outcome

    first.egress.send = answered_late  # type: ignore[method-assign]
    told = await first.payments.initiate(caller(), request)

    assert told.state is S.RECONCILING
    assert (await world.stored(told)) == told


async def test_rule_7_two_runs_that_race_to_the_dispatch_send_once() -> None:
    """Two sidecars hold the same intent: the one with the older epoch gets no permit, and its caller no error."""
    world = World()
    request = payment_request(await world.consent())
    first = world.core
    second_answer = []

    async def overtake() -> None:
        second_answer.append(await world.start("two").payments.initiate(caller(), request))

    first.egress.gates["prepare"] = overtake
    first_answer = await first.payments.initiate(caller(), request)

    assert second_answer[0].state is S.SETTLED
    assert first_answer == second_answer[0]
    assert world.bank.count("initiate") == total(world) == 1


# --- rule 10: what the caller is told


async def test_rule_10_a_repeat_while_it_runs_is_told_in_progress() -> None:
    """C8: the state of the row, at once; no second send."""
    world = World()
    request = payment_request(await world.consent())
    told = []

    async def ask_again() -> None:
        told.append(await world.core.payments.initiate(caller(), request))

    world.core.egress.gates["prepare"] = ask_again
    await world.core.payments.initiate(caller(), request)
    del world.core.egress.gates["prepare"]
    second = payment_request(await world.consent())
    world.core.egress.gates["send"] = lambda: _again(world, second, told)
    await world.core.payments.initiate(caller(), second)

    assert [payment.state for payment in told] == [S.INTENT, S.DISPATCHED]
    assert total(world) == 2


async def _again(world: World, request: InitiatePayment, told: list[Payment]) -> None:
    told.append(await world.core.payments.initiate(caller(), request))


async def test_rule_10_awaiting_the_owner_comes_with_the_address() -> None:
    """RCVD with a scaRedirect to the bank: AWAITING_AUTHORISATION and where to send the owner."""
    world = World(initial_status="RCVD", with_redirect=True)

    payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert payment.state is S.AWAITING_AUTHORISATION
    assert payment.authorisation_uri == "https://issuer.bank.example/approve/bank-payment-1"


# --- rule 12: for ever


async def test_rule_12_a_request_id_is_never_free_again() -> None:
    """C9: a year later the same request id is still the same payment."""
    world = World()
    request = payment_request(await world.consent())
    first = await world.core.payments.initiate(caller(), request)
    world.clock.advance(366 * 86_400)

    assert await world.core.payments.initiate(caller(), request) == first
    assert total(world) == 1


# --- failures of the store


@pytest.mark.parametrize("step", range(8))
async def test_a_store_that_fails_at_one_command_never_doubles_or_loses_a_payment(step: int) -> None:
    """Whichever command fails once: the call answers or says unavailable, and the same request id leads to one payment."""
    world = World(name=CLASS_A)
    request = payment_request(await world.consent())
    run, commands = world.store._run, 0

    async def failing(command: object, **kwargs: object) -> object:
        nonlocal commands
        commands += 1
        if commands == step + 1:
            raise STORE_AWAY
        return await run(command, **kwargs)  # type: ignore[arg-type]

    world.store._run = failing  # type: ignore[assignment, method-assign]
    try:
        await world.core.payments.initiate(caller(), request)
    except Unavailable:
        await world.core.payments.initiate(caller(), request)
    (payment,) = world.store._state.payments.values()

    assert payment.state is S.SETTLED
    assert total(world) == 1


async def test_a_bank_s_answer_outlives_a_store_that_is_away_for_seconds() -> None:
    """The payment id comes once: while the store does not answer, writing it down is tried again."""
    world = World()

    async def away() -> None:
        world.store.failures.extend([STORE_AWAY] * 5)

    world.core.egress.gates["send"] = away
    payment = await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    assert (payment.state, payment.provider_payment_id) == (S.SETTLED, "bank-payment-1")
    assert (await world.stored(payment)) == payment


async def test_a_bank_s_answer_outlives_a_store_that_stays_away() -> None:
    """The answer comes once: it is held until the store is back, however long that takes, and then it is what everybody sees."""
    world = World()
    request = payment_request(await world.consent())

    async def away() -> None:
        world.store.failures.extend([STORE_AWAY] * 1000)

    world.core.egress.gates["send"] = away
    payment = await world.core.payments.initiate(caller(), request)

    assert payment.provider_payment_id
    assert (await world.stored(payment)) == payment
    assert total(world) == 1


async def test_a_dispatch_that_was_not_confirmed_is_no_human_s_work() -> None:
    """The dispatch record's answer is lost although it became durable: nothing was sent, so the same payment may go on."""
    world = World()
    request = payment_request(await world.consent())
    record = world.store.record_dispatch
    lost: list[bool] = []

    async def recorded_but_unheard(*args: Any, **kwargs: Any) -> DispatchPermit:
        permit = await record(*args, **kwargs)
        if not lost:
            lost.append(True)
            raise STORE_AWAY
        return permit

    world.store.record_dispatch = recorded_but_unheard  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)
    await asyncio.sleep(0.01)
    assert total(world) == 0

    payment = await world.core.payments.initiate(caller(), request)

    assert payment.provider_payment_id
    assert total(world) == 1


async def test_a_wall_clock_that_is_set_back_closes_the_window() -> None:
    """Class A: a day has passed by the machine's own clock; a wall clock that says otherwise opens no window again."""
    world = World(name=CLASS_A)
    request = payment_request(await world.consent())
    payment = await world.core.payments.initiate(caller(), request)
    stored = await world.stored(payment)
    day_ns = int(25 * 3600 * 1e9)

    assert world.core.payments.window_is_open(stored)
    assert not world.core.payments.window_is_open(
        replace(stored, dispatch_boot_time_ns=world.clock.boot_time_ns() - day_ns)
    )
    assert not world.core.payments.window_is_open(replace(stored, update_time=world.clock.now() + timedelta(hours=10)))


# --- the caller goes away


@pytest.mark.parametrize("turns", range(1, 40, 2))
async def test_a_caller_that_gives_up_at_any_moment_does_not_cut_the_payment(turns: int) -> None:
    """Cancelling the call after any number of turns of the loop: the payment ends in a definite state, made at most once."""
    world = World()
    request = payment_request(await world.consent())
    call = asyncio.ensure_future(world.core.payments.initiate(caller(), request))
    for _ in range(turns):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert await world.core.tasks.drain(seconds=10) == 0

    states = {payment.state for payment in world.store._state.payments.values()}
    assert states <= {S.SETTLED}
    assert total(world) == len(states)


# --- what may be paid (C)


def amount(minor: int, currency: str = "EUR") -> Money:
    return Money(currency_code=currency, minor_units=minor)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"amount": amount(0)}, "amount"),
        ({"amount": amount(-1)}, "amount"),
        ({"amount": amount(100, "GBP")}, "amount.currency_code"),
        ({"creditor_account": AccountReference(iban="DE02120300000000202052")}, "creditor_account.iban"),
        ({"creditor_account": AccountReference(iban=CREDITOR.lower())}, "creditor_account.iban"),
        ({"creditor_account": AccountReference(iban=IBAN)}, "creditor_account.iban"),
        ({"creditor_name": ""}, "creditor_name"),
        ({"creditor_name": "x" * 71}, "creditor_name"),
        ({"creditor_name": "Zoë"}, "creditor_name"),
        ({"remittance_information": "a\nb"}, "remittance_information"),
        ({"remittance_information": "x" * 141}, "remittance_information"),
        ({"end_to_end_id": "x" * 36}, "end_to_end_id"),
        ({"debtor_account": AccountReference(iban="DE00")}, "debtor_account.iban"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_paid_is_refused_before_anything_is_written(changes: dict[str, Any], field: str) -> None:
    """C11, C15, C17-C20: the refusal names the field; no claim, no payment, no entry."""
    world = World()
    consent = await world.consent()
    entries = len(world.events())

    with pytest.raises(InvalidField) as refused:
        await world.core.payments.initiate(caller(), payment_request(consent, **changes))

    assert refused.value.violations[0].field == field
    assert not world.store._state.payments
    assert len(world.events()) == entries


@pytest.mark.parametrize(
    ("consent_changes", "policy", "changes", "reason"),
    [
        ({}, {}, {"amount": amount(1_000_001)}, "LIMIT_EXCEEDED"),
        ({"payment_limit": amount(1249)}, {}, {}, "LIMIT_EXCEEDED"),
        ({"payment_limit": amount(10**9, "GBP")}, {}, {}, "LIMIT_EXCEEDED"),
        ({}, {"payment_limits": {}}, {}, "LIMIT_EXCEEDED"),
        ({}, {"purposes": frozenset({Purpose.ACCOUNTS})}, {}, "POLICY_REFUSED"),
        ({}, {"providers": frozenset()}, {}, "CONSENT_NOT_FOUND"),
        ({}, {"owners": frozenset()}, {}, "OWNER_MISMATCH"),
        ({"purposes": frozenset({Purpose.ACCOUNTS})}, {}, {}, "PURPOSE_NOT_CONSENTED"),
        ({"accounts": ()}, {}, {"debtor_account": AccountReference(iban=IBAN)}, "ACCOUNT_NOT_CONSENTED"),
        ({}, {}, {"debtor_account": AccountReference(iban=CREDITOR)}, "ACCOUNT_NOT_CONSENTED"),
        ({}, {}, {"debtor_account": AccountReference(iban=IBAN, currency_code="USD")}, "ACCOUNT_NOT_CONSENTED"),
        ({}, {}, {"owner": "owner-2"}, "CONSENT_NOT_FOUND"),
        ({"caller": "workload:other"}, {}, {}, "CONSENT_NOT_FOUND"),
        ({}, {}, {"consent": "c-unknown"}, "CONSENT_NOT_FOUND"),
    ],
)
async def test_who_may_not_pay_is_refused_before_anything_is_written(
    consent_changes: dict[str, Any], policy: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    """C13, C22, C26, C27, C33: limits, policy, purposes, accounts, owners and callers; at the limit itself it may pay."""
    world = World()
    consent = await world.consent(**consent_changes)
    request = replace(payment_request(consent), **changes)
    if "creditor" in str(changes) or changes.get("debtor_account") == AccountReference(iban=CREDITOR):
        request = replace(request, creditor_account=AccountReference(iban="DE75512108001245126199"))

    with pytest.raises(CustodyError) as refused:
        await world.core.payments.initiate(caller(**policy), request)

    assert refused.value.reason == reason
    assert not world.store._state.payments


async def test_bi_c13_at_the_limit_is_within_it() -> None:
    """C13: the limits of policy and consent are the largest payment, not the first that is too large."""
    world = World()
    consent = await world.consent(payment_limit=amount(1_000_000))

    payment = await world.core.payments.initiate(caller(), payment_request(consent, amount=amount(1_000_000)))

    assert payment.state is S.SETTLED


async def test_bi_c24_a_consent_that_expires_now_pays_no_more() -> None:
    """C24: at expire_time it is over, a moment before it is not."""
    world = World()
    consent = await world.consent(expire_time=world.clock.now() + timedelta(seconds=2))
    world.clock.advance(1)
    assert (await world.core.payments.initiate(caller(), payment_request(consent))).state is S.SETTLED
    world.clock.advance(1)

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.payments.initiate(caller(), payment_request(consent))

    assert refused.value.reason == "CONSENT_EXPIRED"


async def test_bi_c31_a_product_that_the_provider_does_not_offer() -> None:
    """C31: refused by name of the field."""
    world = World()
    terms = world.connector.descriptor.payments
    consent = await world.consent()
    world.replace_connector(payments=msgspec.structs.replace(terms, products={}))
    with pytest.raises(InvalidField) as refused:
        await world.core.payments.initiate(caller(), payment_request(consent))

    assert refused.value.violations[0].field == "product"


async def test_an_intent_is_checked_again_before_it_goes_on() -> None:
    """Nothing was sent; meanwhile the policy's limit was lowered: the repeat is refused and nothing is sent."""
    world = World()
    request = payment_request(await world.consent())
    world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)

    with pytest.raises(Refused):
        await world.core.payments.initiate(caller(payment_limits={"EUR": amount(1)}), request)

    assert total(world) == 0


async def test_a_provider_that_left_the_configuration_is_no_defect() -> None:
    """C30: a payment of a consent whose provider is gone says that there is no such provider."""
    world = World()
    consent = await world.consent()
    world.core.connectors.clear()

    with pytest.raises(NotFound) as refused:
        await world.core.payments.initiate(caller(), payment_request(consent))

    assert refused.value.reason == "PROVIDER_NOT_FOUND"


# --- reading


async def test_get_shows_a_payment_to_its_maker_for_its_owner_and_to_administrators() -> None:
    """Everybody else gets NOT_FOUND, for a payment that is there as for one that is not."""
    world = World()
    made = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
    get = world.core.payments.get

    assert await get(caller(), made.id, OWNER) == made
    assert await get(ADMINISTRATOR, made.id, None) == made
    for who, which, owner in [
        (caller(), made.id, "owner-2"),
        (caller(), made.id, None),
        (caller(WorkloadId("workload:other")), made.id, OWNER),
        (caller(providers=frozenset()), made.id, OWNER),
        (caller(), PaymentId("p-unknown"), OWNER),
        (ADMINISTRATOR, made.id, "owner-2"),
    ]:
        with pytest.raises(NotFound):
            await get(who, which, owner)  # type: ignore[arg-type]


async def test_list_is_newest_first_and_of_this_caller_and_its_providers() -> None:
    """The contract's order; a payment at a provider that the policy no longer has is left out, and pages stay full."""
    world = World()
    made = []
    for _ in range(5):
        world.clock.advance(1)
        made.append(await world.core.payments.initiate(caller(), payment_request(await world.consent())))
    gone = replace(made[2], provider=ProviderId("gone"))
    world.store._state.payments[gone.id] = gone
    where = PaymentFilter(owner=OWNER)

    listed = await world.core.payments.list(caller(), where, after="", limit=3)

    assert [payment.id for payment in listed] == [made[4].id, made[3].id, made[1].id]
    assert len(await world.core.payments.list(ADMINISTRATOR, PaymentFilter(), after="", limit=10)) == 5
    assert not await world.core.payments.list(caller(WorkloadId("workload:other")), where, after="", limit=3)
    with pytest.raises(InvalidField):
        await world.core.payments.list(caller(), PaymentFilter(), after="", limit=3)
