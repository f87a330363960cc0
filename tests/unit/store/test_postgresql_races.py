"""Sidecars that share one PostgreSQL: who comes first, and that the other one learns it. Each race is run as it happens, and the
two orders that matter for money are forced."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from sidecar.domain.consent import ConsentState
from sidecar.domain.payment import DispatchPermit, PaymentState
from sidecar.errors import PreconditionFailed, StaleVersion
from sidecar.ports import Claim, MasterKeyRecord
from sidecar.store import StoreRefused
from sidecar.store.postgresql import PostgresqlStore
from tests.contract.test_store_contract import World
from tests.fakes.store import SoftwareSigner
from tests.unit.store.postgresql import FaultyConnection, FaultyDatabase, backends, faulty, new_database, opened, until
from tests.unit.store.support import (
    NOW,
    active_consent,
    claim_of,
    dispatch_draft,
    draft,
    intent_draft,
    new_claim,
    new_payment,
    stored_intent,
)

_ROUNDS = 25


@asynccontextmanager
async def two() -> AsyncIterator[tuple[PostgresqlStore, PostgresqlStore]]:
    name = new_database()
    async with opened(name) as one, opened(name, instance="pod-2") as other:
        yield one, other


async def _both(one: Awaitable[object], other: Awaitable[object]) -> list[object]:
    return list(await asyncio.gather(one, other, return_exceptions=True))


def test_r1_one_request_id_is_claimed_once() -> None:
    """Two pods, one request id, the same instant: one wins, the other is told of the winner's claim, and there is one payment."""

    async def run() -> None:
        async with two() as (one, other):
            consent = active_consent()
            await one.claim_consent(consent, new_claim(), draft())
            for _ in range(_ROUNDS):
                first = new_payment(consent)
                second = new_payment(consent, request_id=first.request_id)
                outcomes = await _both(
                    one.claim_payment(first, claim_of(first), intent_draft(first)),
                    other.claim_payment(second, claim_of(second), intent_draft(second)),
                )
                (loser,) = [outcome for outcome in outcomes if outcome is not None]
                assert isinstance(loser, Claim)
                winner, lost = (first, second) if outcomes[0] is None else (second, first)
                assert loser.resource == winner.id
                assert await one.payment(winner.id) == winner
                assert await other.payment(lost.id) is None

    asyncio.run(run())


def test_r6_one_pod_gets_the_refresh_lease() -> None:
    """Two pods want to refresh: one gets the lease with the next epoch, the other gets none."""

    async def run() -> None:
        async with two() as (one, other):
            consent = active_consent()
            await one.claim_consent(consent, new_claim(), draft())
            for number in range(_ROUNDS):
                outcomes = await _both(
                    *(
                        store.take_refresh_lease(
                            consent.id, holder=str(store), now=NOW, seconds=30, after_epoch=number, audit=draft()
                        )
                        for store in (one, other)
                    )
                )
                assert sorted(outcomes, key=str) == [number + 1, None]
                await one.release_refresh_lease(consent.id, epoch=number + 1)

    asyncio.run(run())


def test_r11_one_epoch_has_one_permit() -> None:
    """Two pods record the dispatch of one payment: one gets the permit, the other learns that it is late."""

    async def run() -> None:
        async with two() as (one, other):
            consent = active_consent()
            await one.claim_consent(consent, new_claim(), draft())
            for _ in range(_ROUNDS):
                payment = new_payment(consent)
                await one.claim_payment(payment, claim_of(payment), intent_draft(payment))
                dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
                outcomes = await _both(
                    *(
                        store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
                        for store in (one, other)
                    )
                )
                assert {type(outcome) for outcome in outcomes} == {DispatchPermit, StaleVersion}

    asyncio.run(run())


def test_r11_one_reconciler_takes_the_next_epoch() -> None:
    """Two reconcilers take over one payment: the later one is told that it is stale, which is no defect."""

    async def run() -> None:
        async with two() as (one, other):
            consent = active_consent()
            await one.claim_consent(consent, new_claim(), draft())
            for _ in range(_ROUNDS):
                payment = new_payment(consent)
                await one.claim_payment(payment, claim_of(payment), intent_draft(payment))
                dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
                await one.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
                taken = dispatched.to(PaymentState.RECONCILING, now=NOW, epoch=2)
                outcomes = await _both(
                    *(
                        store.change_payment(
                            taken,
                            expected_states=frozenset({PaymentState.DISPATCHED}),
                            expected_epoch=1,
                            audit=[draft()],
                        )
                        for store in (one, other)
                    )
                )
                assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "StaleVersion"]

    asyncio.run(run())


def test_one_first_master_key() -> None:
    """Two pods start on an empty database: one makes the master key, the other learns that there is one; one is current."""

    async def run() -> None:
        for _ in range(20):
            async with two() as (one, other):
                first = MasterKeyRecord(
                    key_id=b"1" * 16, version=1, wrapped=b"w", root_key_id="root", current=True, create_time=NOW
                )
                second = replace(first, key_id=b"2" * 16)
                outcomes = await _both(one.add_master_key(first, draft()), other.add_master_key(second, draft()))
                assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "StaleVersion"]
                assert list(await one.master_keys()) == [first if outcomes[0] is None else second]

    asyncio.run(run())


def test_of_two_first_master_keys_of_different_versions_one_stays() -> None:
    """The constraint that notices is the one on the current key: that, too, is being late, and no defect."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (one, first), faulty(name, instance="pod-2") as (other, second):
            await other.record([draft()])
            key = MasterKeyRecord(
                key_id=b"1" * 16, version=1, wrapped=b"w", root_key_id="root", current=True, create_time=NOW
            )
            pause = first.fault = Pause("COMMIT")
            earlier = asyncio.create_task(one.add_master_key(key, draft()))
            await until(pause.reached.is_set)
            later = asyncio.create_task(other.add_master_key(replace(key, key_id=b"2" * 16, version=2), draft()))
            await _is_blocked(second)
            pause.go_on.set()
            await earlier
            with pytest.raises(StaleVersion):
                await later
            assert list(await other.master_keys()) == [key]

    asyncio.run(run())


class Pause:
    """Holds a writer before the first statement that begins with `before`, until it is let go."""

    def __init__(self, before: str) -> None:
        self.before = before
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, connection: FaultyConnection, text: str) -> None:
        if text.startswith(self.before) and not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(20)


async def _is_blocked(database: FaultyDatabase) -> None:
    pid = database.first.driver.info.backend_pid
    await until(lambda: backends(database.name, condition=f"pid = {pid} AND wait_event_type = 'Lock'"))


def test_r8_a_dispatch_waits_for_the_revocation_before_it() -> None:
    """Another pod's revocation is written and not yet committed when a payment is dispatched: the dispatch waits, and then gets
    no permit. Without the lock it would see the consent as it was, and money would go out after the revocation was answered."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (one, first), faulty(name, instance="pod-2") as (other, second):
            consent, payment = await stored_intent(one)
            await other.record([draft()])
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
            pause = first.fault = Pause("COMMIT")
            revoking = asyncio.create_task(one.change_consent(consent.to(ConsentState.REVOKED), audit=[draft()]))
            await until(pause.reached.is_set)
            dispatching = asyncio.create_task(
                other.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
            )
            await _is_blocked(second)
            pause.go_on.set()
            await revoking
            with pytest.raises(PreconditionFailed) as refused:
                await dispatching
            assert refused.value.reason == "CONSENT_REVOKED"
            assert await one.payment(payment.id) == payment

    asyncio.run(run())


def test_r8_a_revocation_waits_for_the_dispatch_before_it() -> None:
    """The other order: the permit is on its way, so the revocation is answered only once that is durable."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (one, first), faulty(name, instance="pod-2") as (other, second):
            consent, payment = await stored_intent(one)
            await one.record([draft()])
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
            pause = second.fault = Pause("COMMIT")
            dispatching = asyncio.create_task(
                other.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
            )
            await until(pause.reached.is_set)
            revoking = asyncio.create_task(one.change_consent(consent.to(ConsentState.REVOKED), audit=[draft()]))
            await _is_blocked(first)
            assert not revoking.done()
            pause.go_on.set()
            assert isinstance(await dispatching, DispatchPermit)
            await revoking

    asyncio.run(run())


def test_a_late_reconciler_is_stale_and_no_defect() -> None:
    """It has looked at the payment, and another pod's change is committed before its own is written: forced, not by chance."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (one, first), faulty(name, instance="pod-2") as (other, second):
            _, payment = await stored_intent(one)
            await other.record([draft()])
            ended = payment.to(PaymentState.ABANDONED, now=NOW)

            def change(store: PostgresqlStore) -> Awaitable[object]:
                return store.change_payment(
                    ended, expected_states=frozenset({PaymentState.INTENT}), expected_epoch=1, audit=[draft()]
                )

            pause = first.fault = Pause("COMMIT")
            earlier = asyncio.ensure_future(change(one))
            await until(pause.reached.is_set)
            later = asyncio.ensure_future(change(other))
            await _is_blocked(second)
            pause.go_on.set()
            await earlier
            with pytest.raises(StaleVersion):
                await later

    asyncio.run(run())


def test_each_instance_has_a_log_of_its_own() -> None:
    """Entries of two pods stand in two logs, each of which verifies by itself; consents and payments are everybody's."""

    async def run() -> None:
        name = new_database()
        signers = SoftwareSigner(), SoftwareSigner()
        async with opened(name, signer=signers[0]) as one, opened(name, instance="pod-2", signer=signers[1]) as other:
            consent = active_consent()
            await one.claim_consent(consent, new_claim(), draft())
            assert await other.consent(consent.id) == consent
            await asyncio.gather(*(store.record([draft()]) for store in (one, other, other) for _ in range(10)))
            for store, signer, size in ((one, signers[0], 11), (other, signers[1], 20)):
                await store.sign_pending()
                report = await World(store=store, signer=signer, clock=None).verified()  # type: ignore[arg-type]
                assert report.ok
                assert (await store.log_position()).size == size
            assert one.origin != other.origin

    asyncio.run(run())


def test_the_next_process_of_a_name_continues_its_log() -> None:
    """The log of an instance is that of its name, whichever process writes it."""

    async def run() -> None:
        name = new_database()
        origins = []
        for size in range(1, 4):
            async with opened(name) as store:
                await store.record([draft()])
                origins.append(store.origin)
                assert (await store.log_position()).size == size
        async with opened(name, instance="pod-2") as store:
            origins.append(store.origin)
        assert len(set(origins)) == 2

    asyncio.run(run())


def test_a_second_process_of_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers of one log would break it: the second is refused with one message, before and after the first has lost and
    renewed its connection; once the first has ended, it may come."""
    monkeypatch.setattr("sidecar.store.postgresql.connection.LOCK_SECONDS", 1)

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, database):
            for _ in range(2):
                with pytest.raises(StoreRefused, match="another sidecar uses this database under the name pod-1"):
                    async with opened(name):
                        pass
                database.first.driver.close()
                await store.record([draft()])
            assert database.connections == 2
        async with opened(name) as store:
            assert (await store.log_position()).size == 2

    asyncio.run(run())


def test_whoever_lost_the_name_does_not_write() -> None:
    """A sidecar's connection ended and another process has taken its name: the first one is refused every write, and its log goes
    on where the second one is."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (one, database):
            await one.record([draft()])
            database.first.driver.close()
            async with opened(name) as other:
                await other.record([draft()])
                with pytest.raises(Exception, match="does not answer"):
                    await one.record([draft()])
                await other.record([draft()])
            await one.record([draft()])
            assert (await one.log_position()).size == 4

    asyncio.run(run())


def test_a_log_that_somebody_else_wrote_to_is_not_continued_blindly() -> None:
    """Without the lock on the name the compare-and-set on the head still keeps two writers apart."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (one, first):
            await one.record([draft()])
            first.first.driver.execute("SELECT pg_advisory_unlock_all()")
            async with faulty(name) as (other, _):
                await other.record([draft()])
                with pytest.raises(Exception, match="the log cannot be continued"):
                    await one.record([draft()])

    asyncio.run(run())
