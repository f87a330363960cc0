"""The contract of `sidecar.ports.Store`, on the fake, on SQLite and on PostgreSQL: each method and promise of the port."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sidecar.audit.checkpoint import open_checkpoint
from sidecar.audit.entry import AuditEntry
from sidecar.audit.export import export_lines
from sidecar.audit.merkle import leaf_hash, tree_root
from sidecar.audit.verifier import Report, verify_export
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.consent import Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.limits import (
    CALENDAR_ANCHOR,
    PeriodAlignment,
    PeriodicLimit,
    PeriodType,
    Reservation,
)
from sidecar.domain.money import Money
from sidecar.domain.payment import (
    NEVER_EXECUTED,
    TERMINAL,
    DispatchPermit,
    Finding,
    Payment,
    PaymentState,
    Resolution,
)
from sidecar.domain.secrets import SealedSecret, SecretKind
from sidecar.errors import CustodyError, Internal, PreconditionFailed, Refused, StaleVersion, Unavailable
from sidecar.ports import Claim, ConsentFilter, MasterKeyRecord, PaymentFilter, SecretsChange, Store
from tests.fakes.store import FakeStore, HandClock, SoftwareSigner
from tests.unit.store import postgresql
from tests.unit.store.support import (
    CALLER,
    NOW,
    claim_of,
    dispatch_draft,
    draft,
    intent_draft,
    new_claim,
    new_consent,
    new_database,
    new_payment,
    opened,
    request_id,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    store: Store
    signer: SoftwareSigner
    clock: HandClock

    async def consent(self, **changes: object) -> Consent:
        consent = new_consent(**changes)
        await self.store.claim_consent(consent, new_claim(consent.id), draft(AuditEvent.CONSENT_CREATED))
        return consent

    async def active(self, **changes: object) -> Consent:
        return await self.consent(**{"state": ConsentState.ACTIVE, "activate_time": NOW, **changes})

    async def intent(self, consent: Consent | None = None, **changes: object) -> Payment:
        payment = new_payment(consent or await self.active(), **changes)
        await self.store.claim_payment(payment, claim_of(payment), intent_draft(payment))
        return payment

    async def dispatched(self, payment: Payment | None = None) -> Payment:
        payment = payment or await self.intent()
        dispatched = payment.to(PaymentState.DISPATCHED, now=NOW, attempts=1, dispatch_time=NOW)
        await self.store.record_dispatch(dispatched, expected_epoch=payment.epoch, audit=dispatch_draft(dispatched))
        return dispatched

    async def change(self, before: Payment, after: Payment) -> None:
        """`after` in place of `before`, with the entry that the log's rules ask for."""
        entry = draft(AuditEvent.PAYMENT_OUTCOME, outcome=AuditOutcome.SUCCEEDED, payment=after.id, epoch=after.epoch)
        await self.store.change_payment(
            after, expected_states=frozenset({before.state}), expected_epoch=before.epoch, audit=[entry]
        )

    async def size(self) -> int:
        return (await self.store.log_position()).size

    async def entries(self) -> list[AuditEntry]:
        return [AuditEntry.decode(leaf.entry) for leaf in await self.store.leaves(start=0, limit=100_000)]

    async def verified(self) -> Report:
        """What the independent verifier says of the whole log."""
        position = await self.store.log_position()
        leaves = [leaf.entry for leaf in await self.store.leaves(start=0, limit=100_000)]
        notes = [note for _, note in await self.store.checkpoints(start_size=0, limit=100_000)]
        export = io.BytesIO(b"".join(export_lines(position.origin, leaves, notes)))
        return verify_export(export, public_key=self.signer.pem, origin=position.origin)


Scenario = Callable[[World], Coroutine[Any, Any, None]]


def on_each_store(scenario: Scenario) -> Callable[[str, Path], None]:
    """The test `scenario`, run on the fake, on SQLite and on PostgreSQL."""

    @pytest.mark.parametrize("kind", ["fake", "sqlite", "postgresql"])
    def test(kind: str, tmp_path: Path) -> None:
        asyncio.run(_run(kind, tmp_path, scenario))

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


async def _run(kind: str, tmp_path: Path, scenario: Scenario) -> None:
    signer, clock = SoftwareSigner(), HandClock()
    async with asyncio.timeout(60):
        if kind == "fake":
            await scenario(World(store=FakeStore(signer=signer, clock=clock), signer=signer, clock=clock))
            return
        if kind == "postgresql":
            async with postgresql.opened(postgresql.new_database(), signer=signer, clock=clock) as shared:
                await scenario(World(store=shared, signer=signer, clock=clock))
            return
        async with opened(new_database(tmp_path), signer=signer, clock=clock) as store:
            await scenario(World(store=store, signer=signer, clock=clock))


async def _outcomes(calls: Sequence[Awaitable[object]]) -> list[object]:
    return list(await asyncio.gather(*calls, return_exceptions=True))


def _count(outcomes: Sequence[object], kind: type[CustodyError]) -> int:
    return sum(isinstance(outcome, kind) for outcome in outcomes)


# --- consents ---------------------------------------------------------------------------------------------------------


@on_each_store
async def test_a_consent_comes_back_as_it_was_stored(world: World) -> None:
    """Every field of a consent survives storing, empty and absent ones too."""
    full = await world.consent(
        provider_consent_id="bank-1",
        state_digest=b"\x00" * 32,
        authorisation_uri="https://bank.example/authorise",
        access_expire_time=NOW + timedelta(microseconds=7),
        access_issue_time=NOW,
        activate_time=NOW,
        revoke_time=NOW,
        failure_reason="DENIED",
        periodic_limits=(
            PeriodicLimit(amount=_euros(1), period_type=PeriodType.DAY),
            PeriodicLimit(amount=_euros(2), period_type=PeriodType.HALF_YEAR, alignment=PeriodAlignment.CONSENT),
        ),
    )
    bare = await world.consent(payment_limit=None, accounts=(), purposes=frozenset(), wrapped_data_key=b"")

    assert await world.store.consent(full.id) == full
    assert await world.store.consent(bare.id) == bare
    assert await world.store.consent(ConsentId("c-none")) is None


@on_each_store
async def test_a_request_id_is_used_once_for_consents(world: World) -> None:
    """The second claim of a request id gets the first claim back and writes nothing, whatever it claims."""
    first, second = new_consent(), new_consent()
    claim = new_claim(first.id)
    await world.store.claim_consent(first, claim, draft(AuditEvent.CONSENT_CREATED))
    size = await world.size()

    other = replace(claim, resource=second.id, digest=b"x" * 32, method="Other")
    earlier = await world.store.claim_consent(second, other, draft(AuditEvent.CONSENT_CREATED))

    assert earlier == claim
    assert await world.store.consent(second.id) is None
    assert await world.size() == size
    assert await world.store.claim(claim.caller, claim.request_id) == claim


@on_each_store
async def test_request_ids_of_two_callers_do_not_meet(world: World) -> None:
    """A request id belongs to its caller: another caller may use the same one."""
    claim = new_claim()
    await world.store.record([draft()], claim=claim)

    other = replace(claim, caller=WorkloadId("spiffe://example.org/other"))

    assert await world.store.record([draft()], claim=other) is None
    assert await world.store.claim(WorkloadId("spiffe://example.org/third"), claim.request_id) is None


@on_each_store
async def test_of_a_hundred_equal_claims_one_wins(world: World) -> None:
    """100 concurrent claims of one request id: one makes its consent, 99 get the winner's claim (R3)."""
    identifier = request_id()
    consents = [new_consent() for _ in range(100)]
    claims = [new_claim(consent.id, request_id=identifier) for consent in consents]

    results = await asyncio.gather(
        *(
            world.store.claim_consent(consent, claim, draft(AuditEvent.CONSENT_CREATED))
            for consent, claim in zip(consents, claims, strict=True)
        )
    )

    winners = [claim for claim, result in zip(claims, results, strict=True) if result is None]
    assert len(winners) == 1
    assert all(result in (None, winners[0]) for result in results)
    assert [consent.id for consent in await world.store.consents(ConsentFilter(), after="", limit=200)] == [
        winners[0].resource
    ]
    assert await world.size() == 1


@on_each_store
async def test_a_consent_changes_from_the_version_before_only(world: World) -> None:
    """change_consent compares the version and swaps; a stale one writes neither row, nor secrets, nor claim, nor entry."""
    consent = await world.consent()
    active = consent.to(ConsentState.ACTIVE, activate_time=NOW)
    await world.store.change_consent(active, audit=[draft(AuditEvent.CONSENT_ACTIVATED)])
    size = await world.size()
    claim = new_claim(consent.id)
    secret = SealedSecret(kind=SecretKind.ACCESS_TOKEN, row_version=1, sealed=b"sealed")

    with pytest.raises(StaleVersion):
        await world.store.change_consent(
            consent.to(ConsentState.FAILED),
            secrets=SecretsChange(put=(secret,)),
            claim=claim,
            audit=[draft(AuditEvent.CONSENT_FAILED)],
        )

    assert await world.store.consent(consent.id) == active
    assert (await world.store.secrets(consent.id)).secrets == ()
    assert await world.store.claim(claim.caller, claim.request_id) is None
    assert await world.size() == size


@on_each_store
async def test_a_consent_that_is_not_there_cannot_change(world: World) -> None:
    """change_consent never makes a row."""
    consent = new_consent(version=2)

    with pytest.raises(StaleVersion):
        await world.store.change_consent(consent, audit=[draft()])

    assert await world.store.consent(consent.id) is None


@on_each_store
async def test_a_consent_never_changes_hands(world: World) -> None:
    """A change that names another owner, caller or provider than the row is refused."""
    consent = await world.consent()
    for change in ({"owner": "thief"}, {"caller": "spiffe://example.org/x"}, {"provider": "other"}):
        with pytest.raises(StaleVersion):
            await world.store.change_consent(consent.with_changes(**change), audit=[draft()])

    assert await world.store.consent(consent.id) == consent


@on_each_store
async def test_the_periodic_limits_of_a_consent_never_change(world: World) -> None:
    """What the owner allowed is not widened afterwards, whatever code asks for it."""
    consent = await world.consent(periodic_limits=(PeriodicLimit(amount=_euros(1), period_type=PeriodType.DAY),))

    with pytest.raises(Internal):
        await world.store.change_consent(consent.with_changes(periodic_limits=()), audit=[draft()])

    assert await world.store.consent(consent.id) == consent


@on_each_store
async def test_of_two_changes_of_one_version_one_is_stale(world: World) -> None:
    """Two concurrent changes of one version: one is written, the other raises StaleVersion."""
    consent = await world.consent()
    changes = [consent.with_changes(failure_reason=reason) for reason in ("ONE", "TWO")]

    outcomes = await _outcomes([world.store.change_consent(change, audit=[draft()]) for change in changes])

    assert _count(outcomes, StaleVersion) == 1
    winner = changes[outcomes.index(None)]
    assert await world.store.consent(consent.id) == winner


@on_each_store
async def test_a_change_with_a_used_request_id_writes_nothing(world: World) -> None:
    """change_consent with a claim that was there before returns the earlier one and leaves the consent alone."""
    consent = await world.consent()
    claim = new_claim(consent.id)
    await world.store.record([draft()], claim=claim)
    size = await world.size()

    earlier = await world.store.change_consent(
        consent.to(ConsentState.FAILED), claim=replace(claim, digest=b"x" * 32), audit=[draft()]
    )

    assert earlier == claim
    assert await world.store.consent(consent.id) == consent
    assert await world.size() == size


@on_each_store
async def test_a_revoked_consent_stays_revoked(world: World) -> None:
    """Whatever the caller computes, no change brings a revoked consent back."""
    consent = await world.consent()
    revoked = consent.to(ConsentState.REVOKED, revoke_time=NOW)
    await world.store.change_consent(revoked, audit=[draft(AuditEvent.CONSENT_REVOKED)])

    with pytest.raises(Internal):
        await world.store.change_consent(revoked.with_changes(state=ConsentState.ACTIVE), audit=[draft()])
    destroyed = revoked.with_changes(wrapped_data_key=b"", subject_key=b"")
    await world.store.change_consent(destroyed, audit=[draft(AuditEvent.CONSENT_KEY_DESTROYED)])

    assert await world.store.consent(consent.id) == destroyed


@on_each_store
async def test_consents_are_listed_in_pages_by_id(world: World) -> None:
    """consents() gives those after `after` by ascending id, at most `limit`."""
    made = [await world.consent() for _ in range(5)]

    first = await world.store.consents(ConsentFilter(), after="", limit=2)
    rest = await world.store.consents(ConsentFilter(), after=first[-1].id, limit=10)

    assert [*first, *rest] == made
    assert len(first) == 2


@on_each_store
async def test_consents_are_filtered(world: World) -> None:
    """Each part of the filter narrows the list, and all parts together; no state at all finds nothing."""
    mine = await world.consent()
    await world.consent(owner=OwnerId("owner-2"))
    await world.consent(caller=WorkloadId("spiffe://example.org/other"))
    await world.consent(provider=ProviderId("other"))
    active = await world.consent(state=ConsentState.ACTIVE, wrapped_data_key=b"")
    mark = ConsentFilter(caller=mine.caller, owner=mine.owner, provider=mine.provider)

    async def found(where: ConsentFilter) -> list[str]:
        return [consent.id for consent in await world.store.consents(where, after="", limit=10)]

    assert await found(mark) == [mine.id, active.id]
    assert await found(replace(mark, states=frozenset({ConsentState.ACTIVE}))) == [active.id]
    assert await found(replace(mark, states=frozenset({ConsentState.ACTIVE, ConsentState.CREATED}))) == [
        mine.id,
        active.id,
    ]
    assert await found(replace(mark, states=frozenset())) == []
    assert await found(replace(mark, holds_key=True)) == [mine.id]
    assert await found(ConsentFilter(holds_key=False)) == [active.id]
    assert len(await found(ConsentFilter(owner=mine.owner))) == 4


@on_each_store
async def test_expired_consents_are_those_that_can_still_expire(world: World) -> None:
    """expired_consents() finds consents whose time has come, the very moment included, and none whose state is final."""
    due = await world.consent(expire_time=NOW)
    await world.consent(expire_time=NOW + timedelta(microseconds=1))
    for state in (ConsentState.EXPIRED, ConsentState.REVOKED, ConsentState.FAILED):
        await world.consent(expire_time=NOW, state=state)

    assert list(await world.store.expired_consents(NOW, limit=10)) == [due]
    assert list(await world.store.expired_consents(NOW, limit=0)) == []


@on_each_store
async def test_secrets_come_newest_first_within_a_kind(world: World) -> None:
    """Secrets are put beside older versions; `newest` finds the newest of a kind; deleting names kind and version."""
    consent = await world.consent()
    sealed = [
        SealedSecret(kind=kind, row_version=version, sealed=f"{kind}-{version}".encode())
        for kind in (SecretKind.REFRESH_TOKEN, SecretKind.ACCESS_TOKEN)
        for version in (1, 2, 3)
    ]
    second = consent.with_changes()
    await world.store.change_consent(second, secrets=SecretsChange(put=tuple(sealed)), audit=[draft()])

    stored = await world.store.secrets(consent.id)
    delete = ((SecretKind.ACCESS_TOKEN, 3), (SecretKind.REFRESH_TOKEN, 1), (SecretKind.PKCE_VERIFIER, 9))
    await world.store.change_consent(second.with_changes(), secrets=SecretsChange(delete=delete), audit=[draft()])
    left = await world.store.secrets(consent.id)

    assert [(secret.kind, secret.row_version) for secret in stored.secrets] == [
        (kind, version) for kind in (SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN) for version in (3, 2, 1)
    ]
    assert set(stored.secrets) == set(sealed)
    assert left.newest(SecretKind.ACCESS_TOKEN) == sealed[4]
    assert left.newest(SecretKind.REFRESH_TOKEN) == sealed[2]
    assert left.newest(SecretKind.PKCE_VERIFIER) is None
    assert len(left.secrets) == 4


@on_each_store
async def test_a_secret_is_never_overwritten(world: World) -> None:
    """A version that exists is replaced only where the same change deletes it; else nothing is written."""
    consent = await world.consent()
    other = await world.consent()
    old = SealedSecret(kind=SecretKind.ACCESS_TOKEN, row_version=1, sealed=b"old")
    new = replace(old, sealed=b"new")
    for holder in (consent, other):
        await world.store.change_consent(holder.with_changes(), secrets=SecretsChange(put=(old,)), audit=[draft()])
    third = consent.with_changes().with_changes()

    with pytest.raises(Internal):
        await world.store.change_consent(third, secrets=SecretsChange(put=(new,)), audit=[draft()])
    assert (await world.store.secrets(consent.id)).secrets == (old,)
    change = SecretsChange(put=(new,), delete=((old.kind, old.row_version),))
    await world.store.change_consent(third, secrets=change, audit=[draft()])

    assert (await world.store.secrets(consent.id)).secrets == (new,)
    assert (await world.store.secrets(other.id)).secrets == (old,)


@on_each_store
async def test_delete_all_leaves_only_what_is_put(world: World) -> None:
    """delete_all destroys every secret of this consent, and of no other."""
    consents = [await world.consent(), await world.consent()]
    token = SealedSecret(kind=SecretKind.ACCESS_TOKEN, row_version=1, sealed=b"token")
    for consent in consents:
        await world.store.change_consent(consent.with_changes(), secrets=SecretsChange(put=(token,)), audit=[draft()])

    gone = consents[0].with_changes().with_changes()
    verifier = SealedSecret(kind=SecretKind.PKCE_VERIFIER, row_version=1, sealed=b"verifier")
    await world.store.change_consent(gone, secrets=SecretsChange(delete_all=True, put=(verifier,)), audit=[draft()])

    assert (await world.store.secrets(consents[0].id)).secrets == (verifier,)
    assert (await world.store.secrets(consents[1].id)).secrets == (token,)


# --- refresh leases ---------------------------------------------------------------------------------------------------


async def take_lease(world: World, consent: Consent, *, after_epoch: int = 0, after_seconds: float = 0) -> int | None:
    """Tries to take the lease for 30 seconds."""
    return await world.store.take_refresh_lease(
        consent.id,
        holder="one",
        now=NOW + timedelta(seconds=after_seconds),
        seconds=30,
        after_epoch=after_epoch,
        audit=draft(AuditEvent.TOKEN_REFRESH_INTENT),
    )


@on_each_store
async def test_a_lease_is_held_by_one(world: World) -> None:
    """While the lease runs nobody gets it, and nothing is put on record; at its end it is free, with the next epoch."""
    consent = await world.consent()

    assert await take_lease(world, consent) == 1
    size = await world.size()
    assert await take_lease(world, consent, after_epoch=1, after_seconds=29.999999) is None
    assert await world.size() == size
    assert await take_lease(world, consent, after_epoch=1, after_seconds=30) == 2
    assert await world.size() == size + 1


@on_each_store
async def test_a_lease_is_only_for_whoever_saw_its_last_epoch(world: World) -> None:
    """Somebody had the lease since the taker looked: what the taker decided by may not hold any more. Nothing is put on record."""
    consent = await world.consent()
    await take_lease(world, consent)
    await world.store.release_refresh_lease(consent.id, epoch=1)
    size = await world.size()

    assert [await take_lease(world, consent, after_epoch=epoch) for epoch in (0, 2, 7)] == [None, None, None]
    assert await world.size() == size
    assert await take_lease(world, consent, after_epoch=1) == 2


@on_each_store
async def test_a_released_lease_is_free_at_once(world: World) -> None:
    """Release frees the lease of that epoch; the release of an older epoch frees nothing, of no lease nothing either."""
    consent = await world.consent()
    await world.store.release_refresh_lease(consent.id, epoch=1)
    first = await take_lease(world, consent)

    await world.store.release_refresh_lease(consent.id, epoch=1)
    second = await take_lease(world, consent, after_epoch=1)
    await world.store.release_refresh_lease(consent.id, epoch=1)
    third = await take_lease(world, consent, after_epoch=2)

    assert (first, second, third) == (1, 2, None)


@on_each_store
async def test_a_lease_can_be_free_later(world: World) -> None:
    """`free_time`: a pause after a failure, for every sidecar."""
    consent = await world.consent()
    await take_lease(world, consent)

    await world.store.release_refresh_lease(consent.id, epoch=1, free_time=NOW + timedelta(seconds=5))

    assert await take_lease(world, consent, after_epoch=1, after_seconds=4) is None
    assert await take_lease(world, consent, after_epoch=1, after_seconds=5) == 2


@on_each_store
async def test_a_lease_tells_since_when_a_token_may_be_out(world: World) -> None:
    """From the taking on, the token counts as handed over; a later taking keeps the first time; only a release says otherwise."""
    consent = await world.consent()
    looks = [await world.store.refresh_lease(consent.id)]
    await take_lease(world, consent)
    looks.append(await world.store.refresh_lease(consent.id))
    await take_lease(world, consent, after_epoch=1, after_seconds=40)
    looks.append(await world.store.refresh_lease(consent.id))
    await world.store.release_refresh_lease(consent.id, epoch=2, unresolved_since=NOW)
    looks.append(await world.store.refresh_lease(consent.id))
    await take_lease(world, consent, after_epoch=2, after_seconds=50)
    await world.store.release_refresh_lease(consent.id, epoch=3)
    looks.append(await world.store.refresh_lease(consent.id))

    assert [look and (look.epoch, look.unresolved_since) for look in looks] == [
        None,
        (1, NOW),
        (2, NOW),
        (2, NOW),
        (3, None),
    ]
    assert [look.is_held(NOW + timedelta(seconds=20)) for look in looks if look] == [True, True, False, False]


@on_each_store
async def test_a_new_pair_is_fenced_by_the_epoch(world: World) -> None:
    """Only the newest holder of the lease writes; the pair, the row and the release are one transaction."""
    consent = await world.consent(state=ConsentState.ACTIVE)
    pair = SecretsChange(put=(SealedSecret(kind=SecretKind.ACCESS_TOKEN, row_version=2, sealed=b"new"),))
    await take_lease(world, consent)
    await take_lease(world, consent, after_epoch=1, after_seconds=30)
    renewed = consent.with_changes(access_issue_time=NOW)

    for epoch in (1, 3):
        with pytest.raises(StaleVersion):
            await world.store.change_consent(renewed, secrets=pair, lease_epoch=epoch, audit=[draft()])
    refused = (await world.store.consent(consent.id), (await world.store.secrets(consent.id)).secrets)
    held = await world.store.refresh_lease(consent.id)
    await world.store.change_consent(renewed, secrets=pair, lease_epoch=2, audit=[draft()])

    assert refused == (consent, ())
    assert held is not None
    assert (held.is_held(NOW + timedelta(seconds=31)), held.unresolved_since) == (True, NOW)
    assert (await world.store.consent(consent.id), (await world.store.secrets(consent.id)).secrets) == (
        renewed,
        pair.put,
    )
    lease = await world.store.refresh_lease(consent.id)
    assert lease is not None
    assert (lease.is_held(NOW), lease.unresolved_since) == (False, None)


@on_each_store
async def test_a_stale_row_keeps_the_lease(world: World) -> None:
    """A pair that meets a changed row is not written, and its lease is not released: its holder tries again."""
    consent = await world.consent(state=ConsentState.ACTIVE)
    await take_lease(world, consent)
    skipped = consent.with_changes().with_changes()

    with pytest.raises(StaleVersion):
        await world.store.change_consent(skipped, lease_epoch=1, audit=[draft()])

    lease = await world.store.refresh_lease(consent.id)
    assert lease is not None
    assert (lease.is_held(NOW), lease.unresolved_since) == (True, NOW)


@on_each_store
async def test_of_fifty_refreshers_one_gets_the_lease(world: World) -> None:
    """50 concurrent takers of a lease: one has it (R6)."""
    consent = await world.consent()

    epochs = await asyncio.gather(*(take_lease(world, consent) for _ in range(50)))

    assert [epoch for epoch in epochs if epoch is not None] == [1]


@on_each_store
async def test_there_is_no_lease_without_a_consent(world: World) -> None:
    """A lease on a consent that does not exist is a defect of the caller."""
    with pytest.raises(Internal):
        await take_lease(world, replace(await world.consent(), id=ConsentId("c-none")))

    assert await world.store.refresh_lease(ConsentId("c-none")) is None


@on_each_store
async def test_refreshes_come_due_in_order(world: World) -> None:
    """What is unresolved comes first, then the longest due; other providers, other states, held leases and later times stay out."""
    soon, later = NOW - timedelta(seconds=20), NOW - timedelta(seconds=10)
    active = {"state": ConsentState.ACTIVE}
    second = await world.consent(**active, refresh_time=later)
    first = await world.consent(**active, refresh_time=soon)
    await world.consent(**active, refresh_time=NOW + timedelta(microseconds=1))
    await world.consent(**active)
    await world.consent(**active, refresh_time=soon, provider=ProviderId("other"))
    await world.consent(state=ConsentState.NEEDS_REAUTHORISATION, refresh_time=soon)
    held = await world.consent(**active, refresh_time=soon)
    await take_lease(world, held)
    paused = await world.consent(**active, refresh_time=soon)
    await take_lease(world, paused)
    await world.store.release_refresh_lease(paused.id, epoch=1, free_time=NOW + timedelta(seconds=1))
    unresolved = await world.consent(**active)
    await take_lease(world, unresolved, after_seconds=-60)
    ended = await world.consent(state=ConsentState.REVOKED)
    await take_lease(world, ended, after_seconds=-60)

    due = await world.store.due_refreshes(first.provider, NOW, limit=10)

    assert list(due) == [unresolved.id, first.id, second.id]
    assert list(await world.store.due_refreshes(first.provider, NOW, limit=2)) == [unresolved.id, first.id]


# --- payments ---------------------------------------------------------------------------------------------------------


@on_each_store
async def test_a_payment_comes_back_as_it_was_stored(world: World) -> None:
    """Every field of a payment survives storing."""
    bare = await world.intent(next_attempt_time=None)
    payment = await world.intent()
    dispatched = payment.to(
        PaymentState.DISPATCHED,
        now=NOW + timedelta(microseconds=3),
        attempts=1,
        rendered_request=bytes(range(256)),
        dispatch_boot_id="7d1f4b3e-5a0c-4c6e-9d2b-0f6a1c2e3d4b",
        dispatch_boot_time_ns=2**62,
        dispatch_time=NOW,
        send_deadline_time=NOW + timedelta(seconds=10),
        next_attempt_time=NOW + timedelta(seconds=15),
    )
    await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
    waiting = dispatched.to(
        PaymentState.AWAITING_AUTHORISATION,
        now=NOW + timedelta(seconds=1),
        provider_payment_id="bank-77",
        provider_status="RCVD",
        authorisation_uri="https://bank.example/approve",
        status_reason="NONE",
        next_attempt_time=None,
    )
    assert await world.store.payment(payment.id) == dispatched
    await world.change(dispatched, waiting)

    assert await world.store.payment(payment.id) == waiting
    assert await world.store.payment(bare.id) == bare
    assert await world.store.payment(PaymentId("p-none")) is None


@on_each_store
async def test_of_a_hundred_equal_payments_one_is_made(world: World) -> None:
    """100 concurrent initiations with one request id: one intent, one entry, and 99 times the winner's claim."""
    consent = await world.consent()
    identifier = request_id()
    payments = [new_payment(consent, request_id=identifier) for _ in range(100)]
    size = await world.size()

    results = await asyncio.gather(
        *(world.store.claim_payment(payment, claim_of(payment), intent_draft(payment)) for payment in payments)
    )

    assert results.count(None) == 1
    winner = payments[results.index(None)]
    assert {result.resource for result in results if result} == {winner.id}
    assert list(await world.store.payments(PaymentFilter(), after="", limit=200)) == [winner]
    assert await world.size() == size + 1


@on_each_store
async def test_what_makes_no_valid_payment_is_not_stored(world: World) -> None:
    """An intent without its consent, with a bank key that was used, with no amount, or that is no intent: nothing is written."""
    consent = await world.consent()
    first = await world.intent(consent)
    size = await world.size()
    nothing = replace(first.instruction, amount=Money(currency_code="EUR", minor_units=0))
    wrong = [
        new_payment(replace(consent, id=ConsentId("c-none"))),
        new_payment(consent, bank_key=first.bank_key),
        new_payment(consent, id=first.id),
        new_payment(consent, instruction=nothing),
        new_payment(consent, state=PaymentState.DISPATCHED),
    ]

    for payment in wrong:
        claim = claim_of(payment)
        with pytest.raises(Internal):
            await world.store.claim_payment(payment, claim, intent_draft(payment))
        assert await world.store.claim(claim.caller, claim.request_id) is None

    assert await world.size() == size
    assert list(await world.store.payments(PaymentFilter(), after="", limit=10)) == [first]


@on_each_store
async def test_a_payment_is_claimed_under_its_own_request_id(world: World) -> None:
    """A claim of another request id or caller than the payment's would let the payment be made twice."""
    payment = new_payment(await world.consent())

    for claim in (new_claim(payment.id), replace(claim_of(payment), caller=WorkloadId("spiffe://example.org/other"))):
        with pytest.raises(Internal):
            await world.store.claim_payment(payment, claim, intent_draft(payment))

    assert await world.store.payment(payment.id) is None


@on_each_store
async def test_a_payment_changes_only_from_the_state_and_epoch_expected(world: World) -> None:
    """change_payment compares state and epoch; where either is another nothing is written (fencing, rule 7)."""
    dispatched = await world.dispatched()
    accepted = dispatched.to(PaymentState.ACCEPTED, now=NOW)
    size = await world.size()

    for states, epoch in (
        ({PaymentState.RECONCILING}, 1),
        ({PaymentState.DISPATCHED}, 2),
        ({PaymentState.DISPATCHED}, 0),
        (set[PaymentState](), 1),
    ):
        with pytest.raises(StaleVersion):
            await world.store.change_payment(
                accepted, expected_states=frozenset(states), expected_epoch=epoch, audit=[draft()]
            )
    assert await world.store.payment(dispatched.id) == dispatched
    assert await world.size() == size

    both = frozenset({PaymentState.RECONCILING, PaymentState.DISPATCHED})
    await world.store.change_payment(accepted, expected_states=both, expected_epoch=1, audit=[draft()])
    assert await world.store.payment(dispatched.id) == accepted


@on_each_store
async def test_whoever_took_over_fences_the_others_off(world: World) -> None:
    """After a take-over with the next epoch the outcome of the former run is refused."""
    dispatched = await world.dispatched()
    taken = dispatched.to(PaymentState.RECONCILING, now=NOW, epoch=2)
    await world.change(dispatched, taken)

    with pytest.raises(StaleVersion):
        await world.change(dispatched, dispatched.to(PaymentState.REJECTED, now=NOW))

    assert await world.store.payment(dispatched.id) == taken


@on_each_store
async def test_of_two_take_overs_one_wins(world: World) -> None:
    """Two reconcilers take one payment over at once: one has the next epoch (R11)."""
    dispatched = await world.dispatched()
    taken = dispatched.to(PaymentState.RECONCILING, now=NOW, epoch=2)

    outcomes = await _outcomes([world.change(dispatched, taken) for _ in range(2)])

    assert _count(outcomes, StaleVersion) == 1
    assert outcomes.count(None) == 1


@on_each_store
async def test_a_final_payment_never_changes(world: World) -> None:
    """A row in a final state is not changed by change_payment or record_dispatch, whatever they expect."""
    for final in sorted(TERMINAL):
        payment = await _brought_to(world, final)
        size = await world.size()
        others = frozenset(PaymentState)
        for state in PaymentState:
            attempt = replace(payment, state=state, status_reason="CHANGED", epoch=payment.epoch + 1)
            with pytest.raises((StaleVersion, Internal)):
                await world.store.change_payment(
                    attempt, expected_states=others, expected_epoch=payment.epoch, audit=[draft()]
                )
            with pytest.raises((StaleVersion, Internal)):
                await world.store.record_dispatch(attempt, expected_epoch=payment.epoch, audit=dispatch_draft(attempt))
        assert await world.store.payment(payment.id) == payment
        assert await world.size() == size


_PATHS = {
    PaymentState.ABANDONED: (PaymentState.ABANDONED,),
    PaymentState.REJECTED: (PaymentState.DISPATCHED, PaymentState.REJECTED),
    PaymentState.SETTLED: (PaymentState.DISPATCHED, PaymentState.SETTLED),
    PaymentState.REJECTED_LATE: (PaymentState.DISPATCHED, PaymentState.ACCEPTED, PaymentState.REJECTED_LATE),
    PaymentState.CANCELLED: (PaymentState.DISPATCHED, PaymentState.ACCEPTED, PaymentState.CANCELLED),
}


async def _brought_to(world: World, state: PaymentState) -> Payment:
    payment = await world.intent()
    for step in _PATHS[state]:
        payment = await _stepped(world, payment, step)
    return payment


async def _stepped(world: World, before: Payment, state: PaymentState) -> Payment:
    if state is PaymentState.DISPATCHED:
        return await world.dispatched(before)
    after = before.to(state, now=NOW)
    await world.change(before, after)
    return after


@on_each_store
async def test_no_change_of_state_that_the_table_does_not_have(world: World) -> None:
    """The store refuses what the domain's table refuses, were a caller to go round it."""
    intent = await world.intent()
    dispatched = await world.dispatched()
    size = await world.size()

    for before, state in (
        (intent, PaymentState.ACCEPTED),
        (intent, PaymentState.REJECTED),
        (dispatched, PaymentState.ABANDONED),
        (dispatched, PaymentState.NEEDS_ATTENTION),
    ):
        with pytest.raises(Internal):
            await world.change(before, replace(before, state=state))

    assert await world.size() == size


@on_each_store
async def test_an_epoch_never_goes_back(world: World) -> None:
    """A write with a smaller epoch than the row's is refused."""
    intent = await world.intent()
    taken = intent.to(PaymentState.INTENT, now=NOW, epoch=5)
    await world.change(intent, taken)

    with pytest.raises(Internal):
        await world.change(taken, replace(taken, epoch=4))

    assert await world.store.payment(intent.id) == taken


@on_each_store
async def test_what_a_payment_orders_never_changes(world: World) -> None:
    """Neither amount nor accounts nor key nor whose payment it is: a write with another one is refused (RTS Art. 5)."""
    intent = await world.intent()
    order = intent.instruction
    changes: list[dict[str, object]] = [
        {"instruction": replace(order, amount=Money(currency_code="EUR", minor_units=1251))},
        {"instruction": replace(order, creditor_account=replace(order.creditor_account, iban="DE00"))},
        {"instruction": replace(order, remittance_information="Invoice 8")},
        {"bank_key": "another"},
        {"owner": OwnerId("owner-2")},
        {"consent": ConsentId("c-other")},
    ]

    for change in changes:
        with pytest.raises(Internal):
            await world.change(intent, replace(intent, **change))  # type: ignore[arg-type]
        dispatched = replace(intent.to(PaymentState.DISPATCHED, now=NOW), **change)  # type: ignore[arg-type]
        with pytest.raises(Internal):
            await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))

    assert await world.store.payment(intent.id) == intent


# --- limits -----------------------------------------------------------------------------------------------------------


def reservation(
    units: int, most: int, *, scope: str = "consent:c-1", moment: datetime = NOW, period: PeriodType = PeriodType.MONTH
) -> Reservation:
    """What a payment of `units` takes of a limit of `most`, both in cents."""
    limit = PeriodicLimit(amount=_euros(most), period_type=period)
    return limit.reservation(_euros(units), moment, scope=scope, since=CALENDAR_ANCHOR)


def _euros(units: int) -> Money:
    return Money(currency_code="EUR", minor_units=units)


async def _claimed(world: World, *reservations: Reservation) -> Payment:
    payment = new_payment(await world.active())
    await world.store.claim_payment(payment, claim_of(payment), intent_draft(payment), reservations=reservations)
    return payment


async def _is_full(world: World, room: Reservation) -> bool:
    """Whether there is no room for this any more. Takes the room where there is."""
    try:
        await _claimed(world, room)
    except Refused:
        return True
    return False


@on_each_store
async def test_a_limit_is_reached_to_the_last_cent_and_not_beyond(world: World) -> None:
    """Payments up to exactly the limit are claimed; one cent more is refused with whose limit it is and until when."""
    await _claimed(world, reservation(600, 1000))
    await _claimed(world, reservation(399, 1000))
    size = await world.size()

    with pytest.raises(Refused) as refused:
        await _claimed(world, reservation(2, 1000))
    assert (refused.value.reason, refused.value.metadata["limitScope"]) == ("LIMIT_EXCEEDED", "consent")
    assert await world.size() == size + 1  # the consent's own entry
    await _claimed(world, reservation(1, 1000))

    assert await _is_full(world, reservation(1, 1000))


@on_each_store
async def test_a_refused_payment_leaves_nothing_behind(world: World) -> None:
    """No claim, no intent, no entry, no part of a sum: the request id is free, and fits once there is room."""
    payment = new_payment(await world.active())
    size = await world.size()

    with pytest.raises(Refused):
        await world.store.claim_payment(
            payment,
            claim_of(payment),
            intent_draft(payment),
            reservations=[reservation(600, 1000, scope="caller:shop"), reservation(600, 599)],
        )
    assert await world.store.payment(payment.id) is None
    assert await world.store.claim(payment.caller, payment.request_id) is None
    assert await world.size() == size

    await world.store.claim_payment(
        payment,
        claim_of(payment),
        intent_draft(payment),
        reservations=[reservation(1000, 1000, scope="caller:shop"), reservation(600, 600)],
    )
    assert await world.store.payment(payment.id) == payment


@on_each_store
async def test_of_two_payments_that_race_for_the_last_of_a_limit_one_wins(world: World) -> None:
    """R5: twenty payments of one euro each ask at once for the three that are left; three get them, and the log has three
    intents."""
    await _claimed(world, reservation(700, 1000))
    consent = await world.active()
    payments = [new_payment(consent) for _ in range(20)]

    outcomes = await _outcomes(
        [
            world.store.claim_payment(
                payment, claim_of(payment), intent_draft(payment), reservations=[reservation(100, 1000)]
            )
            for payment in payments
        ]
    )

    assert (outcomes.count(None), _count(outcomes, Refused)) == (3, 17)
    intents = [entry.draft.payment for entry in await world.entries() if entry.draft.event is AuditEvent.PAYMENT_INTENT]
    assert len(intents) == 4
    assert await _is_full(world, reservation(1, 1000))


@on_each_store
async def test_a_repeat_reserves_nothing_again(world: World) -> None:
    """The second claim of a request id gets the first one back, also where the limit would have no room for it."""
    payment = new_payment(await world.active())
    claim = claim_of(payment)
    await world.store.claim_payment(payment, claim, intent_draft(payment), reservations=[reservation(200, 1000)])

    for units in (200, 200, 200, 900):
        again = new_payment(await world.active(), request_id=payment.request_id)
        earlier = await world.store.claim_payment(
            again, claim_of(again), intent_draft(again), reservations=[reservation(units, 1000)]
        )
        assert earlier == claim

    await _claimed(world, reservation(800, 1000))


@on_each_store
async def test_windows_scopes_and_currencies_are_independent(world: World) -> None:
    """What is reserved in one window says nothing about the next one, another period, another scope or another currency."""
    full = reservation(1000, 1000)
    await _claimed(world, full)
    others = [
        reservation(1000, 1000, moment=full.window.end),
        reservation(1000, 1000, moment=full.window.start - timedelta(microseconds=1)),
        reservation(1000, 1000, period=PeriodType.YEAR),
        reservation(1000, 1000, scope="consent:c-2"),
        reservation(1000, 1000, scope="caller:c-1"),
        replace(full, limit=replace(full.limit, alignment=PeriodAlignment.CONSENT)),
        replace(full, amount=Money(currency_code="GBP", minor_units=1000)),
    ]

    for other in others:
        await _claimed(world, other)
    assert [await _is_full(world, each) for each in (full, *others)] == [True] * 8


@on_each_store
async def test_a_definite_rejection_gives_back_once(world: World) -> None:
    """Each state of a payment that was never executed frees what it had reserved, with the same write and no other; SETTLED and
    every state on the way keeps it."""
    for state in sorted(NEVER_EXECUTED | {PaymentState.SETTLED}):
        scope = f"consent:{state}"
        room = reservation(1000, 1000, scope=scope)
        intent = await _claimed(world, room, reservation(1000, 1000, scope=f"caller:{state}"))
        payment = intent
        for step in _PATHS[state]:
            assert await _is_full(world, reservation(1, 1000, scope=scope)), (state, payment.state)
            payment = await _stepped(world, payment, step)
        for each in (scope, f"caller:{state}"):
            assert await _is_full(world, reservation(1, 1000, scope=each)) is (state is PaymentState.SETTLED), state
        for _ in range(3):  # a writer that does not know yet that it is over
            with pytest.raises((StaleVersion, Internal)):
                await world.store.change_payment(
                    replace(payment, status_reason="AGAIN"),
                    expected_states=frozenset(PaymentState),
                    expected_epoch=payment.epoch,
                    audit=[draft()],
                )
        if state is not PaymentState.SETTLED:
            assert not await _is_full(world, reservation(999, 1000, scope=scope)), state
            assert await _is_full(world, reservation(1, 1000, scope=scope)), state


@on_each_store
async def test_what_is_not_known_keeps_its_part(world: World) -> None:
    """Unknown is not rejected: reconciling and needs-attention count against the limit, and so does a payment that a stale writer
    failed to reject."""
    room = reservation(1000, 1000)
    payment = await _claimed(world, room)
    dispatched = await world.dispatched(payment)
    reconciling = dispatched.to(PaymentState.RECONCILING, now=NOW, epoch=2)
    await world.change(dispatched, reconciling)

    with pytest.raises(StaleVersion):
        await world.change(dispatched, dispatched.to(PaymentState.REJECTED, now=NOW))
    assert await _is_full(world, reservation(1, 1000))
    flagged = reconciling.to(PaymentState.NEEDS_ATTENTION, now=NOW, next_attempt_time=None)
    await world.change(reconciling, flagged)
    assert await _is_full(world, reservation(1, 1000))
    not_executed = flagged.resolved(_resolution(Finding.NOT_EXECUTED))
    await world.change(flagged, not_executed)

    assert not await _is_full(world, room)


@on_each_store
async def test_what_is_given_back_is_what_was_taken(world: World) -> None:
    """Also where the limit has another amount by then, or is gone: the other payments' parts stay."""
    first = await _claimed(world, reservation(600, 1000))
    await _claimed(world, reservation(300, 1000))
    assert await _is_full(world, reservation(1, 900))

    await world.change(first, first.to(PaymentState.ABANDONED, now=NOW))

    assert await _is_full(world, reservation(601, 900))
    assert not await _is_full(world, reservation(600, 900))


# --- what a person found out -------------------------------------------------------------------------------------------


def _resolution(finding: Finding = Finding.EXECUTED, administrator: str = "spiffe://example.org/admin") -> Resolution:
    return Resolution(
        finding=finding,
        reason="Statement 11/2026, asked J. Doe",
        administrator=WorkloadId(administrator),
        resolve_time=NOW + timedelta(microseconds=3),
    )


async def _flagged(world: World) -> Payment:
    dispatched = await world.dispatched()
    reconciling = dispatched.to(PaymentState.RECONCILING, now=NOW, epoch=2)
    await world.change(dispatched, reconciling)
    flagged = reconciling.to(PaymentState.NEEDS_ATTENTION, now=NOW, next_attempt_time=None)
    await world.change(reconciling, flagged)
    return flagged


@on_each_store
async def test_a_finding_comes_back_as_it_was_stored(world: World) -> None:
    """Who, when, what, and in which words; and the payment is final."""
    for finding in Finding:
        flagged = await _flagged(world)
        resolved = flagged.resolved(_resolution(finding))
        await world.change(flagged, resolved)

        assert await world.store.payment(flagged.id) == resolved
        assert resolved.is_terminal
        with pytest.raises((StaleVersion, Internal)):
            await world.change(resolved, replace(resolved, resolution=_resolution(administrator="somebody-else")))


@on_each_store
async def test_a_payment_that_needs_attention_leaves_by_a_finding_only(world: World) -> None:
    """No machine settles it, and what needs no attention is not resolved."""
    flagged = await _flagged(world)
    dispatched = await world.dispatched()

    with pytest.raises(Internal):
        await world.change(flagged, flagged.to(PaymentState.REJECTED, now=NOW))
    with pytest.raises(Internal):
        await world.change(
            dispatched, dispatched.to(PaymentState.SETTLED, now=NOW, resolution=_resolution(Finding.EXECUTED))
        )

    assert await world.store.payment(flagged.id) == flagged
    assert await world.store.payment(dispatched.id) == dispatched


@on_each_store
async def test_of_two_findings_at_once_one_stands(world: World) -> None:
    """Compare-and-set: the second one is stale, and neither its claim nor its entry is there."""
    flagged = await _flagged(world)
    findings = [flagged.resolved(_resolution(finding)) for finding in Finding]
    claims = [new_claim(flagged.id), new_claim(flagged.id)]

    outcomes = await _outcomes([_resolve(world, after, claim) for after, claim in zip(findings, claims, strict=True)])

    assert (outcomes.count(None), _count(outcomes, StaleVersion)) == (1, 1)
    winner = outcomes.index(None)
    assert await world.store.payment(flagged.id) == findings[winner]
    assert [await world.store.claim(claim.caller, claim.request_id) is not None for claim in claims] == [
        winner == 0,
        winner == 1,
    ]
    events = [entry.draft.event for entry in await world.entries()]
    assert events.count(AuditEvent.PAYMENT_RESOLVED) == 1


@on_each_store
async def test_a_change_of_a_payment_with_a_used_request_id_writes_nothing(world: World) -> None:
    """change_payment with a claim that was there before returns the earlier one and leaves the payment alone."""
    flagged = await _flagged(world)
    claim = new_claim(flagged.id)
    await world.store.record([draft()], claim=claim)
    size = await world.size()

    earlier = await _resolve(world, flagged.resolved(_resolution()), replace(claim, digest=b"x" * 32))

    assert earlier == claim
    assert await world.store.payment(flagged.id) == flagged
    assert await world.size() == size


async def _resolve(world: World, after: Payment, claim: Claim) -> Claim | None:
    return await world.store.change_payment(
        after,
        expected_states=frozenset({PaymentState.NEEDS_ATTENTION}),
        expected_epoch=after.epoch - 1,
        claim=claim,
        audit=[draft(AuditEvent.PAYMENT_RESOLVED, payment=after.id, detail_digest=b"d" * 32, reason="EXECUTED")],
    )


@on_each_store
async def test_payments_are_listed_and_filtered(world: World) -> None:
    """payments() pages by ascending id, and each part of the filter narrows it."""
    consent, other = await world.active(), await world.active(owner=OwnerId("owner-2"))
    first, second, third = [await world.intent(consent) for _ in range(3)]
    fourth = await world.intent(other)
    dispatched = await world.dispatched(second)

    async def found(where: PaymentFilter, after: str = "", limit: int = 10) -> list[Payment]:
        return list(await world.store.payments(where, after=after, limit=limit))

    assert await found(PaymentFilter()) == [first, dispatched, third, fourth]
    assert await found(PaymentFilter(), after=first.id, limit=2) == [dispatched, third]
    assert await found(PaymentFilter(consent=consent.id, caller=CALLER)) == [first, dispatched, third]
    assert await found(PaymentFilter(owner=other.owner)) == [fourth]
    assert await found(PaymentFilter(caller=WorkloadId("nobody"))) == []
    assert await found(PaymentFilter(states=frozenset({PaymentState.DISPATCHED}))) == [dispatched]
    both = PaymentFilter(states=frozenset({PaymentState.DISPATCHED, PaymentState.INTENT}))
    assert await found(both, limit=3) == [first, dispatched, third]
    assert await found(both, after=dispatched.id) == [third, fourth]
    assert await found(replace(both, owner=consent.owner)) == [first, dispatched, third]
    assert await found(replace(both, consent=other.id, states=frozenset({PaymentState.DISPATCHED}))) == []
    assert await found(PaymentFilter(states=frozenset())) == []


@on_each_store
async def test_due_payments_come_oldest_first_and_never_final(world: World) -> None:
    """due_payments() gives those whose next_attempt_time has come, the very moment included, the longest waiting first."""
    consent = await world.consent()
    late = await world.intent(consent, next_attempt_time=NOW)
    early = await world.intent(consent, next_attempt_time=NOW - timedelta(seconds=5))
    await world.intent(consent, next_attempt_time=NOW + timedelta(microseconds=1))
    await world.intent(consent, next_attempt_time=None)
    ended = await world.intent(consent, next_attempt_time=NOW - timedelta(seconds=9))
    await world.change(ended, ended.to(PaymentState.ABANDONED, now=NOW))

    assert list(await world.store.due_payments(NOW, limit=10)) == [early, late]
    assert list(await world.store.due_payments(NOW, limit=1)) == [early]
    assert list(await world.store.due_payments(NOW, limit=0)) == []


@on_each_store
async def test_due_payments_of_unknown_outcome_come_before_all_others(world: World) -> None:
    """DISPATCHED and RECONCILING come first, however long the others wait; within both, the longest waiting first."""
    consent = await world.active()

    async def due(seconds: float, *states: PaymentState) -> Payment:
        payment = await world.intent(consent, next_attempt_time=NOW - timedelta(seconds=seconds))
        for state in states:
            before = payment
            if state is PaymentState.DISPATCHED:
                payment = await world.dispatched(before)
            else:
                payment = before.to(state, now=NOW)
                await world.change(before, payment)
        return payment

    accepted = await due(9, PaymentState.DISPATCHED, PaymentState.ACCEPTED)
    awaiting = await due(7, PaymentState.DISPATCHED, PaymentState.AWAITING_AUTHORISATION)
    intent = await due(8)
    dispatched = await due(2, PaymentState.DISPATCHED)
    reconciling = await due(3, PaymentState.DISPATCHED, PaymentState.RECONCILING)
    latest = await due(1, PaymentState.DISPATCHED)
    expected = [reconciling, dispatched, latest, accepted, intent, awaiting]

    for limit in range(len(expected) + 2):
        assert list(await world.store.due_payments(NOW, limit=limit)) == expected[:limit]


# --- dispatch ---------------------------------------------------------------------------------------------------------


@on_each_store
async def test_a_permit_comes_with_a_signed_checkpoint_over_its_entry(world: World) -> None:
    """When record_dispatch returns, a checkpoint signed by the audit key covers the dispatch entry (rule 3)."""
    payment = await world.intent()
    dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)

    permit = await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))

    position = await world.store.log_position()
    ((size, note),) = list(await world.store.checkpoints(start_size=position.covered_size, limit=10))
    entries = await world.entries()
    checkpoint = open_checkpoint(note, origin=position.origin, spki=world.signer.spki)
    assert (permit.payment, permit.epoch) == (payment.id, 1)
    assert entries[-1].draft == dispatch_draft(dispatched)
    assert checkpoint.size == size == position.size == len(entries)
    assert checkpoint.root == tree_root([leaf_hash(entry.encode()) for entry in entries])


@on_each_store
async def test_one_permit_an_epoch(world: World) -> None:
    """Of many concurrent dispatches of one epoch one gets the permit, and none gets one afterwards."""
    payment = await world.intent()
    dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)

    async def dispatch() -> object:
        return await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))

    outcomes = await _outcomes([dispatch() for _ in range(20)])

    assert _count(outcomes, StaleVersion) == 19
    with pytest.raises(StaleVersion):
        await dispatch()
    events = [entry.draft.event for entry in await world.entries()]
    assert events.count(AuditEvent.PAYMENT_DISPATCHED) == 1


@on_each_store
async def test_a_repeat_needs_a_new_epoch(world: World) -> None:
    """While reconciling, or back at the intent, the epoch that has had its permit gets no second one; the next one does."""
    reconciling = await world.dispatched()
    before, reconciling = reconciling, reconciling.to(PaymentState.RECONCILING, now=NOW)
    await world.change(before, reconciling)
    unsent = await world.dispatched()
    before, unsent = unsent, unsent.to(PaymentState.INTENT, now=NOW)
    await world.change(before, unsent)

    for payment, state in ((reconciling, PaymentState.RECONCILING), (unsent, PaymentState.DISPATCHED)):
        again = payment.to(state, now=NOW)
        with pytest.raises(StaleVersion):
            await world.store.record_dispatch(again, expected_epoch=1, audit=dispatch_draft(again))
        renewed = payment.to(state, now=NOW, epoch=2)
        permit = await world.store.record_dispatch(renewed, expected_epoch=1, audit=dispatch_draft(renewed))
        assert permit.epoch == 2
        assert await world.store.payment(payment.id) == renewed


Ending = Callable[[Consent], Consent]

ENDINGS: dict[str, tuple[Ending, str]] = {
    "revoked": (lambda consent: consent.to(ConsentState.REVOKED, revoke_time=NOW), "CONSENT_REVOKED"),
    "revoked, its key destroyed": (
        lambda consent: consent.to(ConsentState.REVOKED, wrapped_data_key=b"", subject_key=b""),
        "CONSENT_REVOKED",
    ),
    "expired": (lambda consent: consent.to(ConsentState.EXPIRED), "CONSENT_EXPIRED"),
    "needs reauthorisation": (
        lambda consent: consent.to(ConsentState.NEEDS_REAUTHORISATION),
        "CONSENT_NEEDS_REAUTHORISATION",
    ),
    "active without a key": (lambda consent: consent.with_changes(wrapped_data_key=b""), "CONSENT_NOT_ACTIVE"),
    "no longer for payments": (
        lambda consent: consent.with_changes(purposes=frozenset({Purpose.ACCOUNTS})),
        "PURPOSE_NOT_CONSENTED",
    ),
}


@on_each_store
async def test_no_dispatch_once_the_consent_has_ended(world: World) -> None:
    """The consent ended between intent and dispatch, or before a repeat: its own reason, no permit, nothing written."""
    for ending, reason in ENDINGS.values():
        consent = await world.active()
        intent = await world.intent(consent)
        dispatched = await world.dispatched(await world.intent(consent))
        reconciling = dispatched.to(PaymentState.RECONCILING, now=NOW)
        await world.change(dispatched, reconciling)
        await world.store.change_consent(ending(consent), audit=[draft()])
        size, signatures = await world.size(), world.signer.signatures

        for before, after in (
            (intent, intent.to(PaymentState.DISPATCHED, now=NOW, attempts=1)),
            (reconciling, reconciling.to(PaymentState.RECONCILING, now=NOW, epoch=2)),
        ):
            with pytest.raises(PreconditionFailed) as refusal:
                await world.store.record_dispatch(after, expected_epoch=1, audit=dispatch_draft(after))
            assert refusal.value.reason == reason
            assert await world.store.payment(before.id) == before
        assert (await world.size(), world.signer.signatures) == (size, signatures)


@on_each_store
async def test_a_consent_that_needs_its_owner_pays_while_its_access_token_lives(world: World) -> None:
    """What would renew the token is lost; the token itself is not: a microsecond before its end it pays, at it and after it not."""
    consent = await world.active(access_issue_time=NOW, access_expire_time=NOW + timedelta(hours=1))
    intents = [await world.intent(consent) for _ in range(3)]
    await world.store.change_consent(consent.to(ConsentState.NEEDS_REAUTHORISATION), audit=[draft()])

    for intent, microseconds, pays in zip(intents, (-1, 0, 1), (True, False, False), strict=True):
        moment = NOW + timedelta(hours=1, microseconds=microseconds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world.clock, "now", lambda moment=moment: moment)
            outcomes = await _outcomes([world.dispatched(intent)])
        found = await world.store.payment(intent.id)
        assert (found != intent) is pays
        if not pays:
            assert isinstance(outcomes[0], PreconditionFailed)
            assert outcomes[0].reason == "CONSENT_NEEDS_REAUTHORISATION"


@on_each_store
async def test_no_dispatch_under_a_consent_that_was_never_active(world: World) -> None:
    """Of all states of a consent only ACTIVE lets a payment out."""
    for state in set(ConsentState) - {ConsentState.ACTIVE}:
        intent = await world.intent(await world.consent(state=state))
        with pytest.raises(PreconditionFailed):
            await world.dispatched(intent)
        assert await world.store.payment(intent.id) == intent


@on_each_store
async def test_no_dispatch_from_the_moment_a_consent_expires(world: World) -> None:
    """By the clock's present: a microsecond before its expire_time an active consent pays, at it and after it not."""
    consent = await world.active(expire_time=NOW + timedelta(days=1))

    for microseconds, pays in ((-1, True), (0, False), (1, False)):
        intent = await world.intent(consent)
        moment = consent.expire_time + timedelta(microseconds=microseconds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world.clock, "now", lambda moment=moment: moment)
            outcomes = await _outcomes([world.dispatched(intent)])
        found = await world.store.payment(intent.id)
        if pays:
            assert found == outcomes[0]
            continue
        assert isinstance(outcomes[0], PreconditionFailed)
        assert (outcomes[0].reason, found) == ("CONSENT_EXPIRED", intent)


@on_each_store
async def test_a_revocation_ahead_of_a_dispatch_stops_it(world: World) -> None:
    """In one group of commands too, the order of their coming decides: a revocation ahead is obeyed, one behind comes late."""
    for revokes_first in (True, False):
        consent = await world.active()
        intent = await world.intent(consent)
        dispatched = intent.to(PaymentState.DISPATCHED, now=NOW)
        revoke = world.store.change_consent(consent.to(ConsentState.REVOKED), audit=[draft()])
        dispatch = world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
        world.signer.hold = asyncio.Event()
        signing = asyncio.create_task(world.store.sign_pending())  # keeps the writer busy while both get in line
        while not world.signer.waiting:
            await asyncio.sleep(0.001)

        both = asyncio.gather(*((revoke, dispatch) if revokes_first else (dispatch, revoke)), return_exceptions=True)
        await asyncio.sleep(0)  # both are in line now, in this order
        world.signer.hold.set()
        await signing
        outcomes = await both

        permit = outcomes[1 if revokes_first else 0]
        assert outcomes[0 if revokes_first else 1] is None
        if revokes_first:
            assert isinstance(permit, PreconditionFailed)
            assert permit.reason == "CONSENT_REVOKED"
            assert await world.store.payment(intent.id) == intent
        else:
            assert isinstance(permit, DispatchPermit)
            assert await world.store.payment(intent.id) == dispatched


@on_each_store
async def test_a_stale_dispatch_is_stale_whatever_became_of_the_consent(world: World) -> None:
    """Whoever lost the payment to another run learns that, and not that the consent has ended."""
    consent = await world.active()
    dispatched = await world.dispatched(await world.intent(consent))
    await world.store.change_consent(consent.to(ConsentState.REVOKED), audit=[draft()])

    with pytest.raises(StaleVersion):
        await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))


@on_each_store
async def test_only_the_dispatch_record_makes_a_payment_dispatched(world: World) -> None:
    """change_payment cannot write DISPATCHED; record_dispatch writes nothing but DISPATCHED and RECONCILING."""
    intent = await world.intent()

    with pytest.raises(Internal):
        await world.change(intent, intent.to(PaymentState.DISPATCHED, now=NOW))
    for state in (PaymentState.INTENT, PaymentState.ABANDONED):
        wrong = intent.to(state, now=NOW)
        with pytest.raises(Internal):
            await world.store.record_dispatch(wrong, expected_epoch=1, audit=dispatch_draft(wrong))

    assert await world.store.payment(intent.id) == intent


@on_each_store
async def test_a_dispatch_without_its_own_entry_is_refused(world: World) -> None:
    """The entry must say that this payment is dispatched in this epoch: no entry, no act."""
    intent = await world.intent()
    dispatched = intent.to(PaymentState.DISPATCHED, now=NOW)
    right = dispatch_draft(dispatched)

    for wrong in (
        replace(right, event=AuditEvent.PAYMENT_OUTCOME),
        replace(right, payment="p-other"),
        replace(right, epoch=7),
    ):
        with pytest.raises(Internal):
            await world.store.record_dispatch(dispatched, expected_epoch=1, audit=wrong)

    assert await world.store.payment(intent.id) == intent


@on_each_store
async def test_without_a_signature_there_is_no_dispatch(world: World) -> None:
    """Where the HSM does not sign, the dispatch fails with its reason and has not happened; it may be tried again."""
    intent = await world.intent()
    size = await world.size()
    dispatched = intent.to(PaymentState.DISPATCHED, now=NOW)

    for failure, reason in (
        (Unavailable("HSM_UNAVAILABLE", "the HSM does not answer"), "HSM_UNAVAILABLE"),
        (RuntimeError("broken"), "AUDIT_UNAVAILABLE"),
    ):
        world.signer.failures.append(failure)
        with pytest.raises(Unavailable) as refusal:
            await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
        assert refusal.value.reason == reason
        assert await world.store.payment(intent.id) == intent
        assert await world.size() == size

    permit = await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
    assert permit.epoch == 1


@on_each_store
async def test_others_go_on_while_nothing_can_be_signed(world: World) -> None:
    """Commands that need no checkpoint are not harmed by those that get none, even where they meet in one group."""
    intents = [await world.intent() for _ in range(5)]
    dispatches = [intent.to(PaymentState.DISPATCHED, now=NOW) for intent in intents]
    world.signer.failures.extend(Unavailable("HSM_UNAVAILABLE", "down") for _ in range(5))
    size = await world.size()

    outcomes = await _outcomes(
        [
            call
            for dispatched in dispatches
            for call in (
                world.store.record([draft()]),
                world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched)),
            )
        ]
    )

    served = 5 - len(world.signer.failures)  # groups of commands share one signature and so one failure
    assert outcomes[::2] == [None] * 5
    assert 1 <= served <= 5
    assert _count(outcomes[1::2], Unavailable) >= served
    permits = [outcome for outcome in outcomes[1::2] if not isinstance(outcome, Unavailable)]
    assert await world.size() == size + 5 + len(permits)


@on_each_store
async def test_a_note_over_something_else_is_no_checkpoint(world: World) -> None:
    """A signer that answers a note over another body has not signed this log."""
    intent = await world.intent()
    dispatched = intent.to(PaymentState.DISPATCHED, now=NOW)
    await world.store.sign_pending()
    ((_, other_note),) = await world.store.checkpoints(start_size=0, limit=10)

    async def answer_other_note(body: bytes) -> str:
        return other_note

    world.signer.sign_checkpoint = answer_other_note  # type: ignore[method-assign]
    with pytest.raises(Unavailable) as refusal:
        await world.store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))

    assert refusal.value.reason == "AUDIT_UNAVAILABLE"
    assert await world.store.payment(intent.id) == intent


# --- requests, keys, log ----------------------------------------------------------------------------------------------


@on_each_store
async def test_a_record_is_in_the_log_when_it_returns(world: World) -> None:
    """record() puts all its entries in the log, in order, with times that do not go back."""
    drafts = [draft(consent="c-1"), draft(AuditEvent.SIGNATURE_MADE, detail_digest=b"d" * 32), draft(provider="bank")]

    await world.store.record(drafts)

    entries = await world.entries()
    assert [entry.draft for entry in entries] == drafts
    assert [entry.index for entry in entries] == [0, 1, 2]
    assert all(one.time_ns <= two.time_ns and one.boot_time_ns <= two.boot_time_ns for one, two in pairwise(entries))
    assert all(entry.time_ns // 10**9 == int(world.clock.time.timestamp()) for entry in entries)


@on_each_store
async def test_a_record_with_a_used_request_id_writes_nothing(world: World) -> None:
    """record() with a claim uses the request id up, once."""
    claim = new_claim()
    assert await world.store.record([draft()], claim=claim) is None

    assert await world.store.record([draft()], claim=replace(claim, digest=b"x" * 32)) == claim
    assert await world.size() == 1


@on_each_store
async def test_an_entry_that_breaks_the_format_stops_the_act(world: World) -> None:
    """No entry, no act: where the entry is refused, the command has not happened, and the next one works."""
    consent = await world.consent()
    size = await world.size()
    bad = draft(reason="not a reason")

    with pytest.raises(Internal):
        await world.store.change_consent(consent.to(ConsentState.ACTIVE), audit=[draft(), bad])
    with pytest.raises(Internal):
        await world.store.record([draft(), bad], claim=new_claim())
    await world.store.record([draft()])

    assert await world.store.consent(consent.id) == consent
    assert await world.size() == size + 1


@on_each_store
async def test_leaves_and_checkpoints_are_read_in_pages(world: World) -> None:
    """leaves() from an index, checkpoints() from a size, each in order and at most `limit`."""
    for _ in range(3):
        await world.store.record([draft(), draft()])
        await world.store.sign_pending()

    assert [leaf.index for leaf in await world.store.leaves(start=2, limit=3)] == [2, 3, 4]
    assert list(await world.store.leaves(start=6, limit=3)) == []
    assert [size for size, _ in await world.store.checkpoints(start_size=3, limit=10)] == [4, 6]
    assert [size for size, _ in await world.store.checkpoints(start_size=0, limit=2)] == [2, 4]


@on_each_store
async def test_pending_entries_are_signed_once(world: World) -> None:
    """sign_pending() covers the whole log; with nothing new it signs nothing; where it cannot sign it says so."""
    await world.store.sign_pending()
    assert world.signer.signatures == 0
    assert (await world.store.log_position()).checkpoint_time is None
    await world.store.record([draft()])
    world.signer.failures.append(Unavailable("HSM_UNAVAILABLE", "down"))
    with pytest.raises(Unavailable):
        await world.store.sign_pending()
    before = await world.store.log_position()

    await world.store.sign_pending()
    await world.store.sign_pending()
    after = await world.store.log_position()

    assert (before.size, before.covered_size) == (1, 0)
    assert (after.size, after.covered_size) == (1, 1)
    assert after.checkpoint_time is not None
    assert NOW <= after.checkpoint_time <= world.clock.time
    assert world.signer.signatures == 1


@on_each_store
async def test_the_independent_verifier_takes_the_log(world: World) -> None:
    """A log of consents and payments, made by concurrent commands, verifies with the public key alone."""
    intents = await asyncio.gather(*(world.intent() for _ in range(20)))
    dispatched = await asyncio.gather(*(world.dispatched(intent) for intent in intents))
    await asyncio.gather(*(world.change(payment, payment.to(PaymentState.ACCEPTED, now=NOW)) for payment in dispatched))
    await world.store.sign_pending()

    report = await world.verified()

    assert report.ok, report
    assert report.entries == report.covered == 80
    assert report.payments_dispatched == 20
    assert report.violation_count == 0


@on_each_store
async def test_master_keys_are_added_once_and_one_is_current(world: World) -> None:
    """A version exists once; a new current key takes the place of the one before; the others stay."""
    records = [_master_key(version, current=True) for version in (1, 2)]
    spare = _master_key(3, current=False)
    for record in (*records, spare):
        await world.store.add_master_key(record, draft(AuditEvent.KEY_CREATED))
    size = await world.size()

    with pytest.raises(StaleVersion):
        await world.store.add_master_key(replace(spare, key_id=b"x" * 16), draft(AuditEvent.KEY_CREATED))
    with pytest.raises(Internal):
        await world.store.add_master_key(replace(spare, version=4), draft(AuditEvent.KEY_CREATED))

    assert list(await world.store.master_keys()) == [replace(records[0], current=False), records[1], spare]
    assert await world.size() == size


@on_each_store
async def test_of_two_first_master_keys_one_stays(world: World) -> None:
    """Two processes that both make version 1: one is refused (R10)."""
    records = [replace(_master_key(1, current=True), key_id=bytes([number]) * 16) for number in (1, 2)]

    outcomes = await _outcomes(
        [world.store.add_master_key(record, draft(AuditEvent.KEY_CREATED)) for record in records]
    )

    assert _count(outcomes, StaleVersion) == 1
    assert list(await world.store.master_keys()) == [records[outcomes.index(None)]]


def _master_key(version: int, *, current: bool) -> MasterKeyRecord:
    return MasterKeyRecord(
        key_id=bytes([version]) * 16,
        version=version,
        wrapped=b"wrapped",
        root_key_id="root-1",
        current=current,
        create_time=NOW,
    )


@on_each_store
async def test_counts(world: World) -> None:
    """Consents and payments are counted by state, expiring tokens by provider and only for active consents."""
    soon, later = NOW + timedelta(hours=1), NOW + timedelta(days=2)
    for provider, state, expire in (
        ("bank", ConsentState.ACTIVE, soon),
        ("bank", ConsentState.ACTIVE, soon),
        ("bank", ConsentState.ACTIVE, later),
        ("bank", ConsentState.ACTIVE, None),
        ("bank", ConsentState.REVOKED, soon),
        ("other", ConsentState.ACTIVE, soon),
    ):
        await world.consent(provider=ProviderId(provider), state=state, access_expire_time=expire)
    await world.consent()
    await world.dispatched()

    assert await world.store.tokens_expiring(NOW + timedelta(days=1)) == {"bank": 2, "other": 1}
    assert await world.store.tokens_expiring(soon) == {}
    assert await world.store.consent_counts() == {
        ConsentState.ACTIVE: 6,
        ConsentState.REVOKED: 1,
        ConsentState.CREATED: 1,
    }
    assert await world.store.payment_counts() == {PaymentState.DISPATCHED: 1}


@on_each_store
async def test_a_closed_store_answers_nothing(world: World) -> None:
    """After close() every call is Unavailable, and close() may be repeated."""
    consent = await world.consent()
    await world.store.close()
    await world.store.close()

    calls: list[Awaitable[object]] = [
        world.store.record([draft()]),
        world.store.consent(consent.id),
        world.store.sign_pending(),
        world.store.log_position(),
        world.store.claim(CALLER, RequestId("r")),
    ]
    for call in calls:
        with pytest.raises(Unavailable) as refusal:
            await call
        assert refusal.value.reason == "STORE_UNAVAILABLE"


@on_each_store
async def test_a_caller_that_goes_away_does_not_stop_the_others(world: World) -> None:
    """A cancelled call leaves the store whole: others are answered, and the log verifies."""
    tasks = [asyncio.create_task(world.store.record([draft()])) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()

    results = await asyncio.gather(*tasks, return_exceptions=True)
    await world.store.sign_pending()

    assert results[1::2] == [None] * 10
    assert 10 <= await world.size() <= 20
    assert (await world.verified()).ok


@on_each_store
async def test_drafts_are_taken_as_they_are(world: World) -> None:
    """A command without entries writes no entry."""
    consent = await world.consent()
    size = await world.size()
    nothing: Sequence[AuditDraft] = ()

    await world.store.change_consent(consent.with_changes(), audit=nothing)

    assert await world.size() == size
