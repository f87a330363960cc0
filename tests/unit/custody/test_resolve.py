"""What a person finds out about a payment: written down once, by somebody with a name, and seen by whoever asked for it."""

import asyncio
import hashlib
from dataclasses import replace
from datetime import timedelta

import pytest

from sidecar.audit.entry import AuditEntry
from sidecar.custody.payments import NETWORK_LIFE_SECONDS
from sidecar.custody.resolve import ResolvePayment, Resolver
from sidecar.domain.audit import AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller, Role, WorkloadPolicy
from sidecar.domain.ids import PaymentId, WorkloadId
from sidecar.domain.limits import PeriodicLimit, PeriodType
from sidecar.domain.money import Money
from sidecar.domain.payment import Finding, Payment, PaymentState
from sidecar.domain.provider import Unknown
from sidecar.errors import Conflict, NotFound, PreconditionFailed, Refused, Unavailable
from tests.unit.custody.support import ADMINISTRATOR, World, caller, payment_request, request_id

S = PaymentState
REASON = "Asked the bank by phone: not in the statement of 30 November"


def resolver(world: World) -> Resolver:
    return Resolver(store=world.store, clock=world.clock, payments=world.core.payments)


def resolution(payment: Payment, finding: Finding = Finding.NOT_EXECUTED, **changes: object) -> ResolvePayment:
    request = ResolvePayment(payment=payment.id, finding=finding, reason=REASON, request_id=request_id())
    return replace(request, **changes)  # type: ignore[arg-type]


async def flagged(world: World, **consent: object) -> Payment:
    """A class C payment whose answer was lost."""
    request = payment_request(await world.consent(**consent))  # type: ignore[arg-type]
    world.bank.script["initiate"] = [Unknown(code="TIMED_OUT")]
    payment = await world.core.payments.initiate(caller(), request)
    world.clock.advance(60)
    await world.core.reconciler.run_due()
    found = await world.stored(payment)
    assert found.state is S.NEEDS_ATTENTION
    return found


@pytest.mark.parametrize(("finding", "state"), [(Finding.EXECUTED, S.SETTLED), (Finding.NOT_EXECUTED, S.REJECTED)])
async def test_a_finding_is_final_and_on_record(finding: Finding, state: PaymentState) -> None:
    """The payment has the state, who said so, when and why; the log has who, what and the digest of why, and nothing was sent."""
    world = World()
    payment = await flagged(world)
    sent = world.bank.count("initiate")
    world.clock.advance(1)

    resolved = await resolver(world).resolve(ADMINISTRATOR, resolution(payment, finding))

    assert resolved == await world.stored(payment)
    assert (resolved.state, resolved.status_reason, resolved.next_attempt_time) == (state, finding.name, None)
    assert resolved.epoch == payment.epoch + 1
    assert resolved.resolution is not None
    assert (resolved.resolution.finding, resolved.resolution.reason) == (finding, REASON)
    assert resolved.resolution.administrator == ADMINISTRATOR.workload
    assert payment.update_time < resolved.resolution.resolve_time == resolved.update_time
    entry = AuditEntry.decode((await world.store.leaves(start=0, limit=1000))[-1].entry).draft
    assert (entry.event, entry.outcome) == (AuditEvent.PAYMENT_RESOLVED, AuditOutcome.SUCCEEDED)
    assert (entry.caller, entry.payment, entry.epoch) == (ADMINISTRATOR.workload, payment.id, resolved.epoch)
    assert entry.reason == finding.name
    assert entry.detail_digest == hashlib.sha256(REASON.encode()).digest()
    assert entry.subject
    assert world.bank.count("initiate") == sent


async def test_not_executed_is_no_finding_while_a_request_may_be_under_way() -> None:
    """The bank may say in good faith that it has nothing, and have it a moment later. That it has it can be said at once."""
    world = World()
    payments = []
    for _ in range(2):
        world.bank.script["initiate"] = [Unknown(code="CONNECTION_LOST")]
        paid = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
        while (await world.stored(paid)).state is not S.NEEDS_ATTENTION:
            world.clock.advance(0.5)
            await world.core.reconciler.run_due()
        payments.append(await world.stored(paid))
    first, second = payments
    assert second.send_deadline_time is not None
    over = second.send_deadline_time + timedelta(seconds=NETWORK_LIFE_SECONDS)
    assert world.clock.now() < over

    with pytest.raises(PreconditionFailed) as refusal:
        await resolver(world).resolve(ADMINISTRATOR, resolution(second, Finding.NOT_EXECUTED))
    at_once = await resolver(world).resolve(ADMINISTRATOR, resolution(first, Finding.EXECUTED))
    world.clock.advance((over - world.clock.now()).total_seconds())
    later = await resolver(world).resolve(ADMINISTRATOR, resolution(second, Finding.NOT_EXECUTED))

    assert refusal.value.reason == "PAYMENT_NOT_RESOLVABLE"
    assert (at_once.state, later.state) == (S.SETTLED, S.REJECTED)


async def test_who_asked_for_the_payment_sees_what_became_of_it() -> None:
    """The same request id, and GetPayment, give the final state; no repeat pays."""
    world = World()
    consent = await world.consent()
    request = payment_request(consent)
    world.bank.script["initiate"] = [Unknown(code="TIMED_OUT")]
    payment = await world.core.payments.initiate(caller(), request)
    world.clock.advance(60)
    await world.core.reconciler.run_due()
    await resolver(world).resolve(ADMINISTRATOR, resolution(payment))

    again = await world.core.payments.initiate(caller(), request)
    read = await world.core.payments.get(caller(), payment.id, consent.owner)
    world.clock.advance(86_400)
    await world.core.reconciler.run_due()

    assert again.state is read.state is S.REJECTED
    assert world.bank.count("initiate") == 1


async def test_a_repeat_gets_the_same_answer() -> None:
    """With the same content; with another one, or for another payment, the request id is used up."""
    world = World()
    payment, other = await flagged(world), await flagged(world)
    request = resolution(payment)
    first = await resolver(world).resolve(ADMINISTRATOR, request)
    entries = len(world.events())

    assert await resolver(world).resolve(ADMINISTRATOR, request) == first
    for changes in ({"finding": Finding.EXECUTED}, {"reason": REASON + "."}, {"payment": other.id}):
        with pytest.raises(Conflict):
            await resolver(world).resolve(ADMINISTRATOR, replace(request, **changes))

    assert len(world.events()) == entries
    assert (await world.stored(other)).state is S.NEEDS_ATTENTION


async def test_of_two_administrators_one_is_first() -> None:
    """They say different things at the same moment: one finding stands, and the other is told what does."""
    world = World()
    payment = await flagged(world)
    second = Caller(
        workload=WorkloadId("workload:second"),
        policy=WorkloadPolicy(workload=WorkloadId("workload:second"), roles=frozenset({Role.ADMINISTRATOR})),
    )

    outcomes = await asyncio.gather(
        resolver(world).resolve(ADMINISTRATOR, resolution(payment, Finding.EXECUTED)),
        resolver(world).resolve(second, resolution(payment, Finding.NOT_EXECUTED)),
        return_exceptions=True,
    )

    stands = await world.stored(payment)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, PreconditionFailed)]
    assert stands in outcomes
    assert [refusal.metadata["state"] for refusal in refusals] == [stands.state.value]
    assert world.events().count(AuditEvent.PAYMENT_RESOLVED) == 1


async def test_one_administrator_twice_at_once_is_one_finding() -> None:
    """Two calls with one request id: both get the same payment, and one entry is on record."""
    world = World()
    payment = await flagged(world)
    request = resolution(payment)

    answers = await asyncio.gather(*(resolver(world).resolve(ADMINISTRATOR, request) for _ in range(5)))

    assert {answer.state for answer in answers} == {S.REJECTED}
    assert world.events().count(AuditEvent.PAYMENT_RESOLVED) == 1


async def test_only_what_needs_attention_is_resolved() -> None:
    """A payment that is settled, or whose outcome is still being found out, is refused with its state."""
    world = World()
    settled = await world.core.payments.initiate(caller(), payment_request(await world.consent()))
    world.bank.script["initiate"] = [Unknown(code="TIMED_OUT")]
    unknown = await world.core.payments.initiate(caller(), payment_request(await world.consent()))

    for payment in (settled, unknown):
        with pytest.raises(PreconditionFailed) as refused:
            await resolver(world).resolve(ADMINISTRATOR, resolution(payment, Finding.EXECUTED))
        assert refused.value.reason == "PAYMENT_NOT_RESOLVABLE"
        assert refused.value.metadata == {"payment": f"payments/{payment.id}", "state": payment.state.value}
        assert await world.stored(payment) == payment


async def test_a_workload_resolves_nothing() -> None:
    """Whoever is no administrator does not even learn that the payment is there."""
    world = World()
    payment = await flagged(world)

    for by in (caller(), caller(WorkloadId("workload:other"))):
        with pytest.raises((NotFound, Refused)):
            await resolver(world).resolve(by, resolution(payment))
    with pytest.raises(NotFound):
        await resolver(world).resolve(ADMINISTRATOR, resolution(replace(payment, id=PaymentId("p-none"))))

    assert (await world.stored(payment)).state is S.NEEDS_ATTENTION


async def test_without_a_record_nothing_is_resolved() -> None:
    """No entry, no act; the same request id works later."""
    world = World()
    payment = await flagged(world)
    request = resolution(payment)
    world.store.failures = [Unavailable("AUDIT_UNAVAILABLE", "away")]

    with pytest.raises(Unavailable):
        await resolver(world).resolve(ADMINISTRATOR, request)

    assert (await world.stored(payment)).state is S.NEEDS_ATTENTION
    assert (await resolver(world).resolve(ADMINISTRATOR, request)).state is S.REJECTED


@pytest.mark.parametrize("finding", Finding)
async def test_limits_are_given_back_for_what_was_not_executed_only(finding: Finding) -> None:
    """ "Executed" goes on counting; "not executed" frees the sum."""
    world = World()
    full = PeriodicLimit(amount=Money(currency_code="EUR", minor_units=1250), period_type=PeriodType.YEAR)
    payment = await flagged(world, periodic_limits=(full,))
    consent = await world.store.consent(payment.consent)
    assert consent is not None

    await resolver(world).resolve(ADMINISTRATOR, resolution(payment, finding))

    if finding is Finding.NOT_EXECUTED:
        assert (await world.core.payments.initiate(caller(), payment_request(consent))).state is S.SETTLED
    else:
        with pytest.raises(Refused):
            await world.core.payments.initiate(caller(), payment_request(consent))


async def test_a_payment_of_a_revoked_consent_can_be_resolved() -> None:
    """The consent may have ended since, with its keys: what became of the payment is still written down."""
    world = World()
    payment = await flagged(world)
    consent = await world.store.consent(payment.consent)
    assert consent is not None
    await world.core.consents.revoke(caller(), consent.id, consent.owner, request_id())

    assert (await resolver(world).resolve(ADMINISTRATOR, resolution(payment))).state is S.REJECTED
