"""Rows that hold what this version does not know are Corrupt, and never guessed."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from sidecar.domain.payment import PaymentState
from sidecar.errors import Corrupt, Internal
from sidecar.ports import ConsentFilter, PaymentFilter
from sidecar.store import SqliteStore
from sidecar.store.rows import from_microseconds, to_microseconds
from tests.unit.store.support import (
    CALLER,
    NOW,
    active_consent,
    claim_of,
    dispatch_draft,
    draft,
    intent_draft,
    new_claim,
    new_consent,
    new_database,
    new_payment,
    opened,
)

Read = Callable[[SqliteStore], Awaitable[object]]


def _consent(store: SqliteStore) -> Awaitable[object]:
    return store.consents(ConsentFilter(), after="", limit=10)


def _payment(store: SqliteStore) -> Awaitable[object]:
    return store.payments(PaymentFilter(), after="", limit=10)


DAMAGED: dict[str, tuple[str, Read]] = {
    "unknown consent state": ("UPDATE consents SET state = 'odd', version = 2", _consent),
    "unknown consent state, counted": (
        "UPDATE consents SET state = 'odd', version = 2",
        lambda store: store.consent_counts(),
    ),
    "unknown purpose": ("UPDATE consents SET purposes = '[\"spying\"]', version = 2", _consent),
    "purposes are no JSON": ("UPDATE consents SET purposes = 'accounts', version = 2", _consent),
    "purposes are no list": ("UPDATE consents SET purposes = '\"accounts\"', version = 2", _consent),
    "an account is no pair": ("UPDATE consents SET accounts = '[[\"DE89\"]]', version = 2", _consent),
    "an account is no text": ("UPDATE consents SET accounts = '[[1, 2]]', version = 2", _consent),
    "unknown currency of a limit": ("UPDATE consents SET payment_limit_currency = 'XXX', version = 2", _consent),
    "half a limit": ("UPDATE consents SET payment_limit_minor_units = NULL, version = 2", _consent),
    "a time out of range": ("UPDATE consents SET expire_time = 9223372036854775807, version = 2", _consent),
    "unknown payment state": ("UPDATE payments SET state = 'odd'", _payment),
    "unknown payment state, counted": ("UPDATE payments SET state = 'odd'", lambda store: store.payment_counts()),
    "unknown class": ("UPDATE payments SET idempotency_class = 'Z'", _payment),
    "unknown product": ("UPDATE payments SET product = 'wire'", _payment),
    "unknown currency": ("UPDATE payments SET amount_currency = 'XXX'", _payment),
    "unknown kind of secret": (
        "INSERT INTO secrets SELECT id, 9, 1, x'01' FROM consents",
        lambda store: store.secrets(new_consent(id="c-1").id),
    ),
    "a key that is half current": (
        "INSERT INTO master_keys VALUES (1, x'01', x'01', 'root', 2, 1)",
        lambda store: store.master_keys(),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_not_known_is_corrupt(tmp_path: Path, case: str) -> None:
    """An unknown state, kind or format in a row raises Corrupt(ENVELOPE_CORRUPT) (H14)."""
    damage, read = DAMAGED[case]
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            consent = new_consent(id="c-1")
            payment = new_payment(consent)
            await store.claim_consent(consent, new_claim(), draft())
            await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            await read(store)
            _damage(path, damage)
            with pytest.raises(Corrupt) as refusal:
                await read(store)
            assert refusal.value.reason == "ENVELOPE_CORRUPT"

    asyncio.run(run())


def test_a_payment_that_cannot_be_read_keeps_no_other_from_its_turn(tmp_path: Path) -> None:
    """due_payments() passes damaged rows over, however many stand ahead, and raises Corrupt once nothing else is due."""
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            consent = new_consent()
            await store.claim_consent(consent, new_claim(), draft())
            payments = [new_payment(consent, next_attempt_time=NOW + timedelta(seconds=number)) for number in range(7)]
            for payment in payments:
                await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            damaged = [payments[number].id for number in (0, 1, 2, 4)]
            states = ("dispatched", "intent", "odd", "intent")
            for identifier, state in zip(damaged, states, strict=True):
                change = f"state = '{state}', product = 'wire', dispatch_epoch = 1"
                _damage(path, f"UPDATE payments SET {change} WHERE id = '{identifier}'")
            readable = [payments[number] for number in (3, 5, 6)]

            for limit in range(5):
                assert list(await store.due_payments(NOW + timedelta(days=1), limit=limit)) == readable[:limit]
            for limit in (1, 3, 10):
                with pytest.raises(Corrupt):
                    await store.due_payments(NOW + timedelta(seconds=2), limit=limit)
            assert list(await store.due_payments(NOW - timedelta(seconds=1), limit=3)) == []

    asyncio.run(run())


def test_no_dispatch_under_a_consent_that_cannot_be_read(tmp_path: Path) -> None:
    """A consent whose row is damaged lets no payment out, and the payment stays as it was."""
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            consent = active_consent()
            payment = new_payment(consent)
            await store.claim_consent(consent, new_claim(), draft())
            await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            _damage(path, "UPDATE consents SET purposes = '[\"spying\"]', version = 2")
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
            with pytest.raises(Corrupt):
                await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
            assert await store.payment(payment.id) == payment

    asyncio.run(run())


def _damage(path: Path, statement: str) -> None:
    """As somebody would who has the file: past the constraints, and past the guards."""
    driver = sqlite3.connect(path, isolation_level=None)
    driver.execute("PRAGMA ignore_check_constraints = ON")
    for trigger in ("payments_instruction", "payments_final"):
        driver.execute(f"DROP TRIGGER IF EXISTS {trigger}")
    driver.execute(statement)
    driver.close()


def test_times_are_exact_to_the_microsecond() -> None:
    """Times survive exactly, far ones and those of other zones too; a time without zone is refused."""
    moments = [datetime(2026, 11, 23, 8, 0, 0, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)]
    moments.append(datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
    moments.append(datetime(2026, 7, 1, tzinfo=timezone(timedelta(hours=2))))

    assert [from_microseconds(to_microseconds(moment)) for moment in moments] == moments
    with pytest.raises(Internal):
        to_microseconds(datetime(2026, 11, 23, 8, 0))  # noqa: DTZ001 - that is what is refused


def test_callers_are_compared_byte_for_byte(tmp_path: Path) -> None:
    """Neither case nor Unicode composition makes two callers one."""

    async def run() -> None:
        async with opened(new_database(tmp_path)) as store:
            claim = new_claim()
            await store.record([draft()], claim=claim)
            assert await store.claim(type(CALLER)(CALLER.upper()), claim.request_id) is None
            assert await store.claim(CALLER, claim.request_id) == claim

    asyncio.run(run())
