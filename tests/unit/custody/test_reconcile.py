"""Finding out what became of payments: by the provider's class, fenced, never by a new payment."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest

from sidecar.custody.rendered import decode_request
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.payment import Payment, PaymentState
from sidecar.domain.provider import NotSent, Unknown
from sidecar.errors import Internal, Unavailable
from tests.fakes.bank import answer, error, lost
from tests.unit.custody.support import World, caller, draft, payment_request

S = PaymentState
CLASS_A, CLASS_B, CLASS_C = "sandbox-bank-idempotent", "sandbox-bank-lookup", "sandbox-bank"
# After the dispatch: the time of the send, the life of the network, and the quiet period of the descriptor.
QUIET_SECONDS = 10 + 5 + 5
LOST = Unknown(code="ANSWER_TIMEOUT")
HOUR = 3600


async def initiated(world: World, *script: object) -> Payment:
    world.bank.script["initiate"] = list(script)  # type: ignore[arg-type]
    return await world.core.payments.initiate(caller(), payment_request(await world.consent()))


async def settle(world: World, payment: Payment, *, seconds: float, step: float = 0.25) -> Payment:
    """Runs the background work as the sidecar does, for some seconds of the clock, or until the payment is final."""
    end = world.clock.now() + timedelta(seconds=seconds)
    while world.clock.now() < end:
        world.clock.advance(step)
        await world.core.reconciler.run_due()
        current = await world.stored(payment)
        if current.is_terminal or current.state is S.NEEDS_ATTENTION:
            break
    return await world.stored(payment)


async def end(world: World, consent_id: str) -> None:
    consent = await world.store.consent(consent_id)  # type: ignore[arg-type]
    assert consent is not None
    revoked = consent.to(ConsentState.REVOKED, revoke_time=world.clock.now())
    await world.store.change_consent(revoked, audit=[draft(AuditEvent.CONSENT_REVOKED)])


# --- class A


@pytest.mark.parametrize("executes", [True, False], ids=["executed", "not executed"])
async def test_class_a_repeats_the_identical_request_under_the_same_key(executes: bool) -> None:
    """Within the window the same bytes and key go out again, not sooner than a second later: one payment, and its answer."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost if executes else LOST)
    assert payment.state is S.RECONCILING

    world.clock.advance(0.9)
    await world.core.reconciler.run_due()
    assert world.bank.count("initiate") == 1
    found = await settle(world, payment, seconds=5)

    first, second = [asked for asked in world.bank.requests if world.bank.kind(asked) == "initiate"]
    assert found.state is S.SETTLED
    assert (first.headers, first.body, first.target) == (second.headers, second.body, second.target)
    assert sum(world.bank.executed.values()) == 1
    assert decode_request(found.rendered_request).target == first.target


async def test_class_a_goes_on_until_there_is_an_answer_and_pauses_longer_each_time() -> None:
    """Seven lost answers: eight sends of the same payment, at growing distances, and one execution."""
    world = World(name=CLASS_A)
    payment = await initiated(world, *[lost] * 7)

    found = await settle(world, payment, seconds=200)

    assert found.state is S.SETTLED
    assert found.attempts == 8
    assert sum(world.bank.executed.values()) == 1
    assert (found.update_time - found.create_time).total_seconds() >= 1 + 2 + 4 + 8 + 16 + 30 + 30


async def test_class_a_outside_the_window_asks_a_human() -> None:
    """After window less margin (20 of 24 hours) nothing is sent any more: a key that the bank has forgotten pays again."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost)
    world.clock.advance(20 * HOUR)

    found = await settle(world, payment, seconds=5)

    assert found.state is S.NEEDS_ATTENTION
    assert world.bank.count("initiate") == 1


async def test_class_a_a_process_paused_past_the_window_repeats_nothing() -> None:
    """The window was open when the step began; while the connection was opened a day went by."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost)

    async def pause() -> None:
        world.clock.advance(25 * HOUR)

    world.core.egress.gates["prepare"] = pause
    found = await settle(world, payment, seconds=5)

    assert found.state is S.NEEDS_ATTENTION
    assert world.bank.count("initiate") == 1


async def test_class_a_never_overflows_however_many_attempts() -> None:
    """A bank that answers nothing for the whole window gets more than a thousand repeats; then a human is asked."""
    world = World(name=CLASS_A, token_seconds=None)
    payment = await initiated(world, LOST)
    world.bank.script["initiate"] = [LOST] * 5000

    found = await settle(world, payment, seconds=21 * HOUR, step=61)

    assert found.state is S.NEEDS_ATTENTION
    assert found.attempts > 1025
    assert world.bank.executed.total() == 0


@pytest.mark.parametrize("refusal", [error(400, "FORMAT_ERROR"), error(404, "RESOURCE_UNKNOWN"), error(409, "X_Y")])
async def test_rule_9_the_refusal_of_a_repeat_settles_nothing(refusal: object) -> None:
    """The first send was executed, its answer lost; the bank refuses the repeat: still unknown, until a repeat is answered."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost, refusal)

    await settle(world, payment, seconds=1.5)
    after_refusal = await world.stored(payment)
    found = await settle(world, payment, seconds=10)

    assert after_refusal.state is S.RECONCILING
    assert found.state is S.SETTLED
    assert world.bank.executed.total() == 1


async def test_a_repeat_that_was_not_sent_is_no_answer() -> None:
    """NotSent proves something about this permit only: the first send may still have been executed."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost, NotSent(code="CONNECT_FAILED"))

    found = await settle(world, payment, seconds=1.5)

    assert found.state is S.RECONCILING


async def test_rule_8_each_repeat_takes_the_next_epoch_and_its_own_dispatch_record() -> None:
    """Every send of the payment has an entry of its own with an epoch of its own."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost, lost)

    found = await settle(world, payment, seconds=10)

    assert world.events().count(AuditEvent.PAYMENT_DISPATCHED) == world.bank.count("initiate") == 3
    assert found.epoch == 5  # sent, unknown, sent, unknown, sent


async def test_two_sidecars_that_reconcile_one_payment_send_one_repeat() -> None:
    """R11: the second finds the next epoch taken and sends nothing."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost)
    world.clock.advance(2)
    first, second = world.core, world.start("two")

    async def overtake() -> None:
        first.egress.gates.clear()
        await second.reconciler.run_due()

    first.egress.gates["prepare"] = overtake
    await first.reconciler.run_due()

    assert (await world.stored(payment)).state is S.SETTLED
    assert world.bank.count("initiate") == 2
    assert world.bank.executed.total() == 1


async def test_a_provider_that_is_away_is_asked_again_later() -> None:
    """What cannot be prepared is put off, not given up."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost)
    world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")] * 2

    assert (await settle(world, payment, seconds=3)).state is S.RECONCILING
    assert (await settle(world, payment, seconds=200)).state is S.SETTLED
    assert world.bank.executed.total() == 1


async def test_class_a_whose_consent_has_ended_goes_to_a_human() -> None:
    """Nothing may use the consent any more, also not to find out: a human asks the bank."""
    world = World(name=CLASS_A)
    payment = await initiated(world, lost)
    await end(world, payment.consent)

    assert (await settle(world, payment, seconds=5)).state is S.NEEDS_ATTENTION
    assert world.bank.count("initiate") == 1


# --- class B


def without_the_promise(world: World) -> None:
    """The same bank, which does not promise that what it has not got is not made later."""
    terms = world.connector.descriptor.payments
    idempotency = msgspec.structs.replace(terms.idempotency, not_found="needs-attention")
    world.replace_connector(payments=msgspec.structs.replace(terms, idempotency=idempotency))


async def test_class_b_is_looked_up_after_the_quiet_period_and_never_repeated() -> None:
    """The bank executed it, and the answer was lost: found by our own key, settled, one POST."""
    world = World(name=CLASS_B)
    payment = await initiated(world, lost)

    early = await settle(world, payment, seconds=QUIET_SECONDS - 0.5)
    asked_early = world.bank.count("lookup")
    found = await settle(world, payment, seconds=5)

    assert (early.state, asked_early) == (S.RECONCILING, 0)
    assert (found.state, found.provider_payment_id) == (S.SETTLED, "bank-payment-1")
    assert (world.bank.count("initiate"), world.bank.count("lookup")) == (1, 1)
    assert world.bank.executed.total() == 1


async def test_class_b_not_found_after_the_quiet_period_was_never_executed() -> None:
    """Where the provider promises it, "not found" is a no: told once, and never before the quiet period is over."""
    world = World(name=CLASS_B)
    payment = await initiated(world, LOST)

    early = await settle(world, payment, seconds=QUIET_SECONDS - 0.5)
    found = await settle(world, payment, seconds=5)

    assert early.state is S.RECONCILING
    assert (found.state, found.status_reason, found.next_attempt_time) == (S.REJECTED, "NOT_FOUND", None)
    assert world.bank.count("initiate") == 1


async def test_class_b_without_the_promise_not_found_settles_nothing() -> None:
    """Rule 9: a list that lacks the payment does not say that it will not come. A human asks the bank."""
    world = World(name=CLASS_B)
    without_the_promise(world)

    assert (await settle(world, await initiated(world, LOST), seconds=60)).state is S.NEEDS_ATTENTION
    assert (await settle(world, await initiated(world, lost), seconds=60)).state is S.SETTLED


@pytest.mark.parametrize("seconds", [3600, -3600], ids=["forward", "back"])
async def test_class_b_the_quiet_period_does_not_hear_the_wall_clock(seconds: int) -> None:
    """A wall clock that jumps brings the look-up neither forward, which would deny a payment that is under way, nor to an end."""
    world = World(name=CLASS_B)
    payment = await initiated(world, LOST)
    world.clock.step_wall_clock(seconds)

    await settle(world, payment, seconds=QUIET_SECONDS - 0.5)
    asked_early = world.bank.count("lookup")
    found = await settle(world, payment, seconds=5)

    assert asked_early == 0
    assert found.state is S.REJECTED


async def test_class_b_after_a_restart_of_the_machine_the_whole_quiet_period_is_waited_for() -> None:
    """The boot time of another run says nothing: it is waited for from when this process first saw the payment."""
    world = World(name=CLASS_B)
    payment = await initiated(world, LOST)
    current = await world.stored(payment)
    world.store._state.payments[payment.id] = replace(
        current, dispatch_boot_id="another", dispatch_boot_time_ns=-(10**15)
    )

    early = await settle(world, payment, seconds=QUIET_SECONDS)
    asked_early = world.bank.count("lookup")
    found = await settle(world, payment, seconds=3)

    assert (early.state, asked_early) == (S.RECONCILING, 0)
    assert found.state is S.REJECTED


async def test_class_b_sidecars_do_not_wait_one_after_the_other() -> None:
    """Each sidecar knows a payment of another run of the machine from when it saw it itself: whoever saw it first goes on."""
    world = World(name=CLASS_B)
    cores = [world.start(f"sidecar-{number}") for number in range(3)]

    async def rounds(seconds: int) -> None:
        for second in range(seconds):
            world.clock.advance(1)
            for core in cores[second % 3 :] + cores[: second % 3]:
                await core.reconciler.run_due()

    await rounds(30)
    payment = await initiated(world, lost)
    current = await world.stored(payment)
    world.store._state.payments[payment.id] = replace(current, dispatch_boot_id="another")
    await rounds(QUIET_SECONDS + 4)

    assert (await world.stored(payment)).state is S.SETTLED


async def test_class_b_a_send_that_the_descriptor_no_longer_allows_is_waited_for_all_the_same() -> None:
    """The time of the send is the dispatch record's: a shorter one in a newer configuration shortens no wait."""
    world = World(name=CLASS_B)
    payment = await initiated(world, LOST)
    terms = world.connector.descriptor.payments
    world.replace_connector(payments=msgspec.structs.replace(terms, send_seconds=0.1))

    await settle(world, payment, seconds=QUIET_SECONDS - 0.5)

    assert world.bank.count("lookup") == 0


async def test_class_b_a_sender_that_is_paused_sends_nothing_after_the_look_up() -> None:
    """The sender stands still between its dispatch and its send; another sidecar takes over and finds nothing. When the first
    goes on, its time is over: what was called rejected stays so."""
    world = World(name=CLASS_B)
    request = payment_request(await world.consent())
    sender, going = world.core, asyncio.Event()
    clock = world.clock
    times = iter([clock.boot_time_ns()])

    async def wait() -> None:
        await going.wait()

    sender.egress.gates["discard"] = wait

    class Paused:
        """Stands still for an hour where the sender has read the time once, for the dispatch record."""

        def __getattr__(self, name: str) -> object:
            return getattr(clock, name)

        def boot_time_ns(self) -> int:
            first = next(times, None)
            if first is None:
                return clock.boot_time_ns()
            clock.advance(HOUR)
            return first

    sender.payments._clock = Paused()  # type: ignore[assignment]
    run = asyncio.ensure_future(sender.payments.initiate(caller(), request))
    for _ in range(50):
        await asyncio.sleep(0)
    (payment,) = world.store._state.payments.values()
    world.start("two")
    found = await settle(world, payment, seconds=HOUR, step=5)
    going.set()
    with pytest.raises(Unavailable):
        await run

    assert found.state is S.REJECTED
    assert (world.bank.count("initiate"), world.bank.executed.total()) == (0, 0)


@pytest.mark.parametrize(
    "trouble",
    [
        LOST,
        NotSent(code="CONNECT_FAILED"),
        error(500, "X_Y"),
        error(401, "TOKEN_EXPIRED"),
        answer(200, {}),
        answer(200, {"payments": [], "_links": {"next": {"href": "/v1/payments?page=2"}}}),
        answer(200, {"payments": []}),  # does not name the request that it answers
        lambda answer: replace(answer, body=answer.body[:-1]),
    ],
)
async def test_class_b_a_look_up_that_cannot_be_read_is_asked_again(trouble: object) -> None:
    """Only a complete list says something. Within a minute it is asked for again."""
    world = World(name=CLASS_B)
    payment = await initiated(world, lost)
    world.bank.script["lookup"] = [trouble]  # type: ignore[list-item]

    unknown = await settle(world, payment, seconds=QUIET_SECONDS + 2)
    found = await settle(world, payment, seconds=40)

    assert unknown.state is S.RECONCILING
    assert found.state is S.SETTLED
    assert world.bank.count("lookup") == 2


@pytest.mark.parametrize("trouble", [error(404, "RESOURCE_UNKNOWN"), error(405, "SERVICE_INVALID")])
async def test_class_b_a_bank_that_refuses_the_look_up_leaves_it_to_a_human(trouble: object) -> None:
    """404 is not an empty list: unknown stays unknown."""
    world = World(name=CLASS_B)
    payment = await initiated(world, LOST)
    world.bank.script["lookup"] = [trouble]  # type: ignore[list-item]

    assert (await settle(world, payment, seconds=60)).state is S.NEEDS_ATTENTION


async def test_class_b_is_not_asked_for_without_end() -> None:
    """A bank that answers nothing readable for a day: a human asks it."""
    world = World(name=CLASS_B)
    payment = await initiated(world, LOST)
    world.bank.script["lookup"] = [answer(200, {})] * 10_000

    assert (await settle(world, payment, seconds=23 * HOUR, step=60)).state is S.RECONCILING
    assert (await settle(world, payment, seconds=2 * HOUR, step=60)).state is S.NEEDS_ATTENTION


async def test_class_b_each_look_up_takes_the_next_epoch() -> None:
    """Rule 8: whoever asked before this one can write nothing any more."""
    world = World(name=CLASS_B)
    payment = await initiated(world, lost)
    first, second = world.core, world.start("two")
    world.clock.advance(QUIET_SECONDS)

    async def overtake() -> None:
        first.egress.gates.clear()
        world.clock.advance(30)
        await second.reconciler.run_due()

    first.egress.gates["call"] = overtake
    await first.reconciler.run_due()
    world.clock.advance(1)
    await first.reconciler.run_due()

    found = await world.stored(payment)
    assert found.state is S.SETTLED
    assert found.epoch == payment.epoch + 2
    assert world.events().count(AuditEvent.PAYMENT_OUTCOME) == 2  # unknown, then settled: the first look-up wrote none


async def test_class_b_is_left_to_a_human_where_the_bank_no_longer_offers_the_look_up() -> None:
    """The class was B when it was sent; the descriptor is another's now."""
    world = World(name=CLASS_B)
    payment = await initiated(world, lost)
    other = World(name=CLASS_C).connector.descriptor.payments
    world.replace_connector(payments=other)

    assert (await settle(world, payment, seconds=5)).state is S.NEEDS_ATTENTION


async def test_class_b_whose_consent_has_ended_goes_to_a_human() -> None:
    """Nothing may use the consent any more, also not to look up."""
    world = World(name=CLASS_B)
    payment = await initiated(world, lost)
    await end(world, payment.consent)

    assert (await settle(world, payment, seconds=60)).state is S.NEEDS_ATTENTION
    assert world.bank.count("lookup") == 0


# --- class C


@pytest.mark.parametrize("executes", [True, False], ids=["executed", "not executed"])
async def test_class_c_goes_to_a_human_within_five_seconds(executes: bool) -> None:
    """Without a promise of the bank no machine can find out: NEEDS_ATTENTION soon, and nothing is sent again, ever."""
    world = World(name=CLASS_C)
    payment = await initiated(world, lost if executes else LOST)

    found = await settle(world, payment, seconds=5)
    await settle(world, payment, seconds=10 * HOUR, step=60)

    assert found.state is S.NEEDS_ATTENTION
    assert world.bank.count("initiate") == 1


async def test_class_c_a_store_that_is_away_puts_no_human_off() -> None:
    """The flag could not be written: it is tried again in the next round, not at the pace at which a provider is asked."""
    world = World(name=CLASS_C)
    payment = await initiated(world, lost)
    world.clock.advance(2)
    world.store.failures.append(Unavailable("STORE_UNAVAILABLE", "away"))
    with pytest.raises(Unavailable):
        await world.core.reconciler.run_due()

    assert (await settle(world, payment, seconds=1)).state is S.NEEDS_ATTENTION


# --- what a dead sidecar left


@pytest.mark.parametrize("name", [CLASS_A, CLASS_B, CLASS_C])
async def test_a_sender_that_is_gone_is_taken_over_after_its_time(name: str) -> None:
    """Dispatched, and the process died: not before the send deadline and the network's life are over, then by the class."""
    world = World(name=name)
    request = payment_request(await world.consent())

    async def die() -> None:
        world.store.failures.append(Internal())

    world.core.egress.gates["send"] = die
    with pytest.raises(Internal):  # a defect ends the run between the bank's answer and its record, as a death would
        await world.core.payments.initiate(caller(), request)
    (payment,) = world.store._state.payments.values()
    dispatch = payment.dispatch_time
    world.start("two")

    found = await settle(world, payment, seconds=3, step=0.1)
    early = (world.clock.now() - dispatch).total_seconds() < 15  # type: ignore[operator]
    final = await settle(world, payment, seconds=60)

    assert not early or found.state is S.DISPATCHED
    assert final.state is (S.NEEDS_ATTENTION if name == CLASS_C else S.SETTLED)
    assert world.bank.executed.total() == 1
    assert AuditEvent.PAYMENT_RECONCILING in world.events()


async def test_an_intent_that_nobody_goes_on_with_is_abandoned() -> None:
    """After a minute: never sent, never will be, and a late repeat of the call cannot wake it up."""
    world = World()
    request = payment_request(await world.consent())
    world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)
    (payment,) = world.store._state.payments.values()

    assert (await settle(world, payment, seconds=59)).state is S.INTENT
    assert (await settle(world, payment, seconds=5)).state is S.ABANDONED
    assert (await world.core.payments.initiate(caller(), request)).state is S.ABANDONED
    assert world.bank.executed.total() == 0
    assert AuditEvent.PAYMENT_ABANDONED in world.events()


async def test_a_running_payment_is_not_abandoned_under_its_own_run() -> None:
    """A run that is slow but alive in this process keeps its payment."""
    world = World()
    request = payment_request(await world.consent())

    async def slow() -> None:
        world.clock.advance(61)
        await world.core.reconciler.run_due()

    world.core.egress.gates["prepare"] = slow

    assert (await world.core.payments.initiate(caller(), request)).state is S.SETTLED


# --- a wall clock that is set


@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "next process"])
@pytest.mark.parametrize(
    ("name", "state"), [(CLASS_A, S.NEEDS_ATTENTION), (CLASS_B, S.SETTLED), (CLASS_C, S.NEEDS_ATTENTION)]
)
async def test_a_wall_clock_that_is_set_back_keeps_nobody_waiting(name: str, state: S, restarted: bool) -> None:
    """What was put off by the clock as it stood does not wait until it stands there again; a day of waiting is a day too long."""
    world = World(name=name)
    for _ in range(30):
        world.clock.advance(1)
        await world.core.reconciler.run_due()
    payment = await initiated(world, lost)
    world.clock.step_wall_clock(-24 * HOUR)
    if restarted:
        world.start("two")

    assert (await settle(world, payment, seconds=60)).state is state
    assert world.bank.executed.total() == 1


@pytest.mark.parametrize("name", [CLASS_A, CLASS_B, CLASS_C])
async def test_a_dead_sender_is_taken_over_though_the_wall_clock_was_set_back(name: str) -> None:
    """Dispatched by a clock that stood a day ahead: not before its send is over, and soon after."""
    world = World(name=name)
    request = payment_request(await world.consent())

    async def die() -> None:
        world.store.failures.append(Internal())

    world.core.egress.gates["send"] = die
    with pytest.raises(Internal):
        await world.core.payments.initiate(caller(), request)
    (payment,) = world.store._state.payments.values()
    world.start("two")
    world.clock.step_wall_clock(-24 * HOUR)

    early = await settle(world, payment, seconds=14)
    found = await settle(world, payment, seconds=46)

    assert early.state is S.DISPATCHED
    assert found.state is (S.SETTLED if name == CLASS_B else S.NEEDS_ATTENTION)


async def test_a_step_that_was_under_way_when_the_wall_clock_was_set_back_leaves_nobody_behind() -> None:
    """It puts its payment off by the clock as it stood before, and ends when everybody else has had a turn."""
    world = World(name=CLASS_B)
    payment = await initiated(world, lost)
    reconciler, going = world.core.reconciler, asyncio.Event()
    world.clock.advance(2)
    change = world.store.change_payment

    async def slow(*args: object, **kwargs: object) -> None:
        await going.wait()
        await change(*args, **kwargs)  # type: ignore[arg-type]

    world.store.change_payment = slow  # type: ignore[method-assign]
    under_way = asyncio.ensure_future(reconciler.run_due())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    world.clock.step_wall_clock(-HOUR)
    for _ in range(5):
        world.clock.advance(1)
        await reconciler.run_due()
    going.set()
    await under_way
    world.store.change_payment = change  # type: ignore[method-assign]

    assert (await settle(world, payment, seconds=60)).state is S.SETTLED


async def test_class_c_asks_a_human_at_once_though_the_wall_clock_was_set_back_by_little() -> None:
    """Nobody else is asked about such a payment, so it is never put off for half a minute."""
    world = World(name=CLASS_C)
    payment = await initiated(world, lost)
    world.clock.step_wall_clock(-20)

    assert (await settle(world, payment, seconds=5)).state is S.NEEDS_ATTENTION


async def test_a_wall_clock_that_was_set_back_leaves_none_of_many_behind() -> None:
    """More than one provider's share of a round, more than a page: all have their turn."""
    world = World(name=CLASS_C)
    payments = [await initiated(world, lost) for _ in range(100)]
    world.clock.step_wall_clock(-24 * HOUR)
    world.start("two")

    for _ in range(60):
        world.clock.advance(1)
        await world.core.reconciler.run_due(limit=20)

    assert {(await world.stored(payment)).state for payment in payments} == {S.NEEDS_ATTENTION}


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
async def test_a_wall_clock_that_is_set_takes_no_payment_from_its_sender(seconds: int) -> None:
    """Whether a send is over is CLOCK_BOOTTIME's to say: another sidecar leaves a payment alone that is being sent."""
    world = World(name=CLASS_C)
    first, second = world.core, world.start("two")
    await second.reconciler.run_due()

    async def step() -> None:
        world.clock.step_wall_clock(seconds)
        await second.reconciler.run_due()

    first.egress.gates["send"] = step

    assert (await first.payments.initiate(caller(), payment_request(await world.consent()))).state is S.SETTLED


async def test_a_wall_clock_that_is_set_back_abandons_no_run_early() -> None:
    """An intent has its minute all the same, and ends after it."""
    world = World()
    await world.core.reconciler.run_due()
    request = payment_request(await world.consent())
    world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    with pytest.raises(Unavailable):
        await world.core.payments.initiate(caller(), request)
    (payment,) = world.store._state.payments.values()
    world.clock.step_wall_clock(-HOUR)

    assert (await settle(world, payment, seconds=59)).state is S.INTENT
    assert (await settle(world, payment, seconds=30)).state is S.ABANDONED


async def test_a_wall_clock_that_is_set_back_does_not_make_an_old_payment_new() -> None:
    """Its age sets the pace at which the bank is asked: a payment that seems to be of tomorrow is not asked about every second."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    await settle(world, payment, seconds=600, step=10)
    before = world.bank.count("status")
    world.clock.step_wall_clock(-HOUR)

    world.clock.advance(2)
    await world.core.reconciler.latest(await world.stored(payment))
    await settle(world, payment, seconds=50)

    assert world.bank.count("status") == before + 1


# --- following


async def test_the_status_is_followed_to_the_end() -> None:
    """ACSP, then ACSC: settled, by the same bank resource, with pauses that grow."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    assert payment.state is S.ACCEPTED
    await settle(world, payment, seconds=30)
    world.bank.payments["bank-payment-1"].status = "ACSC"

    found = await settle(world, payment, seconds=60)

    assert (found.state, found.provider_status, found.next_attempt_time) == (S.SETTLED, "ACSC", None)
    assert world.bank.count("status") < 20


@pytest.mark.parametrize(("status", "state"), [("RJCT", S.REJECTED_LATE), ("CANC", S.CANCELLED), ("ACCC", S.SETTLED)])
async def test_a_bank_may_decide_late(status: str, state: S) -> None:
    """Accepted first; then refused, cancelled or settled."""
    world = World(initial_status="ACTC")
    payment = await initiated(world)
    world.bank.payments["bank-payment-1"].status = status

    assert (await settle(world, payment, seconds=5)).state is state


async def test_bi_g22_a_final_status_never_goes_back() -> None:
    """G22: settled is settled, whatever the bank says later; it is not even asked."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    world.bank.payments["bank-payment-1"].status = "ACSC"
    await settle(world, payment, seconds=5)
    world.bank.payments["bank-payment-1"].status = "RJCT"
    asked = world.bank.count("status")

    found = await settle(world, payment, seconds=500, step=10)

    assert found.state is S.SETTLED
    assert world.bank.count("status") == asked


async def test_what_awaits_its_owner_stays_so_until_the_owner_has_approved() -> None:
    """A status resource repeats no link: RCVD still awaits the owner at the same address; ACSP does not."""
    world = World(initial_status="RCVD", with_redirect=True)
    payment = await initiated(world)

    waiting = await settle(world, payment, seconds=10)
    world.bank.payments["bank-payment-1"].status = "ACSP"
    approved = await settle(world, payment, seconds=10)

    assert (waiting.state, waiting.authorisation_uri) == (S.AWAITING_AUTHORISATION, payment.authorisation_uri)
    assert (approved.state, approved.authorisation_uri) == (S.ACCEPTED, "")


@pytest.mark.parametrize(
    "trouble",
    [
        LOST,
        NotSent(code="CONNECT_FAILED"),
        error(404, "RESOURCE_UNKNOWN"),
        error(429, "ACCESS_EXCEEDED"),
        error(500, "X_Y"),
        error(405, "SERVICE_INVALID"),
        answer(200, {"transactionStatus": "acsc"}),
        answer(200, {"transactionStatus": None}),
        answer(200, ["ACSC"]),
        lambda answer: replace(answer, body=answer.body[:-1]),
    ],
)
async def test_a_status_that_cannot_be_read_changes_nothing_and_is_asked_again(trouble: object) -> None:
    """G12, G16, G17, G21: the payment stays as it was, and is followed on."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    world.bank.script["status"] = [trouble]  # type: ignore[list-item]

    await settle(world, payment, seconds=3)
    unchanged = await world.stored(payment)
    world.bank.payments["bank-payment-1"].status = "ACSC"
    found = await settle(world, payment, seconds=2 * HOUR, step=30)

    assert (unchanged.state, unchanged.provider_status) == (S.ACCEPTED, "ACSP")
    assert found.state is S.SETTLED


async def test_a_bank_that_allows_no_more_reads_is_left_alone_for_as_long_as_it_takes() -> None:
    """G16: after ACCESS_EXCEEDED nothing is asked for an hour."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    world.bank.script["status"] = [error(429, "ACCESS_EXCEEDED")]
    await settle(world, payment, seconds=2)
    asked = world.bank.count("status")

    await settle(world, payment, seconds=3500, step=30)
    in_the_pause = world.bank.count("status")
    await settle(world, payment, seconds=300, step=30)

    assert (asked, in_the_pause) == (1, 1)
    assert world.bank.count("status") > 1


async def test_an_expired_token_is_renewed_and_the_status_read_later() -> None:
    """The bank says TOKEN_EXPIRED: the token is renewed, and the next poll reads the status."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    world.bank.expire_tokens()
    world.bank.payments["bank-payment-1"].status = "ACSC"

    assert (await settle(world, payment, seconds=120)).state is S.SETTLED
    assert world.bank.refreshes == 1


async def test_a_payment_whose_consent_the_bank_has_ended_is_followed_no_further() -> None:
    """CONSENT_EXPIRED: the consent needs the owner again; the payment stays as it was last known."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    world.bank.script["status"] = [error(401, "CONSENT_EXPIRED")]

    found = await settle(world, payment, seconds=3)
    consent = await world.store.consent(payment.consent)

    assert (found.state, found.next_attempt_time) == (S.ACCEPTED, None)
    assert isinstance(consent, Consent)
    assert consent.state is ConsentState.NEEDS_REAUTHORISATION


async def test_update_time_is_when_something_changed() -> None:
    """A poll that brings nothing new leaves update_time as it was, as the contract says."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)

    found = await settle(world, payment, seconds=30)

    assert world.bank.count("status") > 1
    assert found.update_time == payment.update_time


# --- one payment cannot stop the others


async def test_a_provider_that_left_the_configuration_stops_nothing() -> None:
    """A payment of a provider that is gone waits for it, an unknown one asks a human; the payment of another goes on."""
    world = World(name=CLASS_A, initial_status="ACSP")
    unknown = await initiated(world, LOST)
    accepted = await initiated(world)
    followed = await initiated(world)
    for payment in (unknown, accepted):
        current = await world.stored(payment)
        world.store._state.payments[payment.id] = replace(current, provider="gone")  # type: ignore[arg-type]
    world.bank.payments["bank-payment-2"].status = "ACSC"

    await settle(world, followed, seconds=10)

    assert (await world.stored(followed)).state is S.SETTLED
    assert (await world.stored(accepted)).state is S.ACCEPTED
    assert (await world.stored(unknown)).state is S.NEEDS_ATTENTION


async def test_a_product_that_left_the_descriptor_stops_nothing() -> None:
    """Its payments are asked about later; the round goes on."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    terms = world.connector.descriptor.payments
    world.replace_connector(payments=msgspec.structs.replace(terms, products={}))

    assert (await settle(world, payment, seconds=10)).state is S.ACCEPTED


async def test_a_defect_in_one_step_is_raised_after_all_others_have_had_their_turn() -> None:
    """What is not an error of ours comes out as Internal, without its text."""
    world = World(initial_status="ACSP")
    broken, fine = await initiated(world), await initiated(world)
    world.bank.payments["bank-payment-2"].status = "ACSC"
    step = world.core.reconciler._reserved_step

    async def failing(payment: Payment) -> None:
        if payment.id == broken.id:
            raise ZeroDivisionError("secret text")
        await step(payment)

    world.core.reconciler._reserved_step = failing  # type: ignore[method-assign]
    world.clock.advance(2)
    with pytest.raises(Internal) as raised:
        await world.core.reconciler.run_due()

    assert "secret" not in str(raised.value)
    assert (await world.stored(fine)).state is S.SETTLED


async def test_a_store_that_is_away_for_the_putting_off_is_said() -> None:
    """Nothing is swallowed: the round's caller hears of it, and the payment is as it was."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    world.clock.advance(2)
    world.store.failures.extend([Unavailable("STORE_UNAVAILABLE", "away")] * 2)

    with pytest.raises(Unavailable):
        await world.core.reconciler.run_due()

    assert (await world.stored(payment)).state is S.ACCEPTED


async def test_readers_poll_at_the_descriptor_s_pace() -> None:
    """A hundred questions at one moment ask the bank once; after the pace it is asked again, and the log grows by uses only."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    for known in world.bank.payments.values():
        known.status = "ACSP"
    entries = len(world.events())

    await asyncio.gather(*(world.core.reconciler.latest(payment) for _ in range(100)))
    at_once = world.bank.count("status")
    world.clock.advance(2)
    await world.core.reconciler.latest(await world.stored(payment))

    assert at_once == 1
    assert world.bank.count("status") == 2
    assert world.events()[entries:] == [AuditEvent.TOKEN_USE] * 2


async def test_overlapping_rounds_work_on_a_payment_once() -> None:
    """Rounds that run side by side, and a reader among them, ask the bank once for a payment that is due."""
    world = World(initial_status="ACSP")
    payment = await initiated(world)
    for known in world.bank.payments.values():
        known.status = "ACSP"
    world.clock.advance(5)

    rounds = (world.core.reconciler.run_due() for _ in range(4))
    await asyncio.gather(*rounds, world.core.reconciler.latest(payment))

    assert world.bank.count("status") == 1
