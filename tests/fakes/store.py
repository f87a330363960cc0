"""The store in memory: `sidecar.ports.Store` with its own rules, and nothing of SQL. It passes the contract suite of the real one.

Also what a store needs for company in tests: a signer with a key in memory and a clock that is set by hand.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.audit.checkpoint import assemble_note, checkpoint_body, parse_note
from sidecar.audit.log import LogHead
from sidecar.domain.audit import AuditDraft, AuditEvent
from sidecar.domain.consent import TRANSITIONS as CONSENT_TRANSITIONS
from sidecar.domain.consent import Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.limits import Reservation
from sidecar.domain.payment import NEVER_EXECUTED, TERMINAL, TRANSITIONS, DispatchPermit, Payment, PaymentState
from sidecar.domain.secrets import SealedSecret, SecretKind
from sidecar.errors import CustodyError, Internal, StaleVersion, Unavailable
from sidecar.ports import (
    CheckpointSigner,
    Claim,
    Clock,
    ConsentFilter,
    ConsentSecrets,
    LogPosition,
    MasterKeyRecord,
    PaymentFilter,
    RefreshLease,
    SecretsChange,
    StoredLeaf,
)

__all__ = ["FakeStore", "HandClock", "SoftwareSigner"]

T = TypeVar("T")

_FREE = datetime(1970, 1, 1, tzinfo=UTC)
_OUTCOME_UNKNOWN = (PaymentState.DISPATCHED, PaymentState.RECONCILING)


class HandClock:
    """Goes on by a microsecond with every look, and by more when it is told to."""

    def __init__(self, start: datetime = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)) -> None:
        self.time = start
        self.boot_ns = 1_000_000_000

    def now(self) -> datetime:
        self.time += timedelta(microseconds=1)
        return self.time

    def boot_time_ns(self) -> int:
        self.boot_ns += 1000
        return self.boot_ns

    def boot_id(self) -> str:
        return "boot"

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
        self.boot_ns += int(seconds * 1_000_000_000)


class SoftwareSigner:
    """A CheckpointSigner with its key in memory. Each next signature fails with what is put into `failures`, first in first out;
    `hold`, where it is set, delays every signature until the event comes. The same `seed` gives the same key."""

    def __init__(self, *, seed: int | None = None) -> None:
        curve = ec.SECP256R1()
        self._key = ec.generate_private_key(curve) if seed is None else ec.derive_private_key(seed, curve)
        public = self._key.public_key()
        self.spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.failures: list[Exception] = []
        self.hold: asyncio.Event | None = None
        self.signatures = 0
        self.waiting = 0  # how many signatures `hold` is delaying

    async def sign_checkpoint(self, body: bytes) -> str:
        if self.hold is not None:
            self.waiting += 1
            try:
                await self.hold.wait()
            finally:
                self.waiting -= 1
        if self.failures:
            raise self.failures.pop(0)
        self.signatures += 1
        origin = body.partition(b"\n")[0].decode("ascii")
        return assemble_note(body, origin, self.spki, self._key.sign(body, ec.ECDSA(hashes.SHA256())))


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """All that is stored. A command makes the next one; only a command that succeeds replaces the old one."""

    head: LogHead
    claims: dict[tuple[WorkloadId, RequestId], Claim] = field(default_factory=dict)
    consents: dict[ConsentId, Consent] = field(default_factory=dict)
    secrets: dict[tuple[ConsentId, SecretKind, int], SealedSecret] = field(default_factory=dict)
    leases: dict[ConsentId, RefreshLease] = field(default_factory=dict)
    payments: dict[PaymentId, Payment] = field(default_factory=dict)
    dispatch_epochs: dict[PaymentId, int] = field(default_factory=dict)
    reservations: dict[PaymentId, tuple[Reservation, ...]] = field(default_factory=dict)  # those not given back
    master_keys: dict[int, MasterKeyRecord] = field(default_factory=dict)
    leaves: tuple[StoredLeaf, ...] = ()
    notes: tuple[tuple[int, str, datetime], ...] = ()

    @property
    def covered_size(self) -> int:
        return self.notes[-1][0] if self.notes else 0


class FakeStore:
    """`failures`: each next command fails with the first of them, and nothing is written."""

    def __init__(
        self, *, signer: CheckpointSigner | None = None, clock: Clock | None = None, origin: str = "audit/test/fake"
    ) -> None:
        self._signer = signer or SoftwareSigner()
        self._clock = clock or HandClock()
        self._state = _State(head=LogHead.empty(origin))
        self._one_at_a_time = asyncio.Lock()
        self._closed = False
        self.origin = origin
        self.failures: list[Exception] = []

    async def close(self) -> None:
        self._closed = True

    # -- consents

    async def claim_consent(self, consent: Consent, claim: Claim, audit: AuditDraft) -> Claim | None:
        def command(state: _State) -> tuple[_State, Claim | None]:
            if earlier := state.claims.get((claim.caller, claim.request_id)):
                return state, earlier
            if consent.id in state.consents:
                raise Internal("a value does not fit the database")
            state = replace(_claimed(state, claim), consents={**state.consents, consent.id: consent})
            return self._recorded(state, [audit]), None

        return await self._run(command)

    async def change_consent(
        self,
        consent: Consent,
        *,
        secrets: SecretsChange | None = None,
        claim: Claim | None = None,
        lease_epoch: int | None = None,
        audit: Sequence[AuditDraft],
    ) -> Claim | None:
        def command(state: _State) -> tuple[_State, Claim | None]:
            if claim and (earlier := state.claims.get((claim.caller, claim.request_id))):
                return state, earlier
            state = _claimed(state, claim) if claim else state
            if lease_epoch is not None:
                lease = state.leases.get(consent.id)
                if lease is None or lease.epoch != lease_epoch:
                    raise StaleVersion
                resolved = RefreshLease(epoch=lease_epoch, expire_time=_FREE, unresolved_since=None)
                state = replace(state, leases={**state.leases, consent.id: resolved})
            _check_next_version(state.consents.get(consent.id), consent)
            state = replace(state, consents={**state.consents, consent.id: consent})
            state = _with_secrets(state, consent.id, secrets) if secrets else state
            return self._recorded(state, audit), None

        return await self._run(command)

    async def consent(self, consent: ConsentId) -> Consent | None:
        return self._read().consents.get(consent)

    async def consents(self, where: ConsentFilter, *, after: str, limit: int) -> Sequence[Consent]:
        found = [consent for consent in self._read().consents.values() if consent.id > after and _fits(consent, where)]
        return sorted(found, key=lambda consent: consent.id)[:limit]

    async def expired_consents(self, now: datetime, *, limit: int) -> Sequence[Consent]:
        return [
            consent
            for consent in self._read().consents.values()
            if consent.expire_time <= now and ConsentState.EXPIRED in CONSENT_TRANSITIONS[consent.state]
        ][:limit]

    async def secrets(self, consent: ConsentId) -> ConsentSecrets:
        mine = [secret for (owner, _, _), secret in self._read().secrets.items() if owner == consent]
        return ConsentSecrets(secrets=tuple(sorted(mine, key=lambda secret: (secret.kind, -secret.row_version))))

    async def refresh_lease(self, consent: ConsentId) -> RefreshLease | None:
        return self._read().leases.get(consent)

    async def take_refresh_lease(
        self, consent: ConsentId, *, holder: str, now: datetime, seconds: float, after_epoch: int, audit: AuditDraft
    ) -> int | None:
        def command(state: _State) -> tuple[_State, int | None]:
            held = state.leases.get(consent)
            if (held.epoch if held else 0) != after_epoch or (held and held.is_held(now)):
                return state, None
            if consent not in state.consents:
                raise Internal("a value does not fit the database")
            open_since = (held.unresolved_since if held else None) or now
            lease = RefreshLease(
                epoch=after_epoch + 1, expire_time=now + timedelta(seconds=seconds), unresolved_since=open_since
            )
            state = replace(state, leases={**state.leases, consent: lease})
            return self._recorded(state, [audit]), lease.epoch

        return await self._run(command)

    async def release_refresh_lease(
        self,
        consent: ConsentId,
        *,
        epoch: int,
        unresolved_since: datetime | None = None,
        free_time: datetime | None = None,
    ) -> None:
        def command(state: _State) -> tuple[_State, None]:
            held = state.leases.get(consent)
            if held is None or held.epoch != epoch:
                return state, None
            lease = RefreshLease(epoch=epoch, expire_time=free_time or _FREE, unresolved_since=unresolved_since)
            return replace(state, leases={**state.leases, consent: lease}), None

        await self._run(command)

    async def due_refreshes(self, provider: ProviderId, now: datetime, *, limit: int) -> Sequence[ConsentId]:
        state = self._read()
        unresolved, due = [], []
        for consent in state.consents.values():
            lease = state.leases.get(consent.id)
            if (consent.provider, consent.state) != (provider, ConsentState.ACTIVE) or (lease and lease.is_held(now)):
                continue
            if lease and lease.unresolved_since is not None:
                unresolved.append((lease.expire_time, consent.id))
            elif consent.refresh_time is not None and consent.refresh_time <= now:
                due.append((consent.refresh_time, consent.id))
        return [identifier for _, identifier in (*sorted(unresolved), *sorted(due))][:limit]

    # -- payments

    async def claim_payment(
        self, payment: Payment, claim: Claim, audit: AuditDraft, *, reservations: Sequence[Reservation] = ()
    ) -> Claim | None:
        def command(state: _State) -> tuple[_State, Claim | None]:
            if earlier := state.claims.get((claim.caller, claim.request_id)):
                return state, earlier
            state = _claimed(state, claim)
            _check_new_payment(state, payment)
            state = replace(state, payments={**state.payments, payment.id: payment})
            state = _reserved(state, payment.id, reservations)
            return self._recorded(state, [audit]), None

        return await self._run(command)

    async def change_payment(
        self,
        payment: Payment,
        *,
        expected_states: frozenset[PaymentState],
        expected_epoch: int,
        claim: Claim | None = None,
        audit: Sequence[AuditDraft],
    ) -> Claim | None:
        def command(state: _State) -> tuple[_State, Claim | None]:
            if claim and (earlier := state.claims.get((claim.caller, claim.request_id))):
                return state, earlier
            state = _claimed(state, claim) if claim else state
            before = _seen(state, payment, expected_states, expected_epoch)
            if payment.state is PaymentState.DISPATCHED:
                raise Internal("only the dispatch record makes a payment dispatched")
            state = _with_payment(state, before, payment)
            if payment.state in NEVER_EXECUTED:
                kept = {key: held for key, held in state.reservations.items() if key != payment.id}
                state = replace(state, reservations=kept)
            return self._recorded(state, audit), None

        return await self._run(command)

    async def record_dispatch(self, payment: Payment, *, expected_epoch: int, audit: AuditDraft) -> DispatchPermit:
        if (audit.event, audit.payment, audit.epoch) != (AuditEvent.PAYMENT_DISPATCHED, payment.id, payment.epoch):
            raise Internal("the entry of a dispatch must be of this dispatch")

        def command(state: _State) -> tuple[_State, None]:
            expected = frozenset({PaymentState.INTENT, PaymentState.RECONCILING})
            before = _seen(state, payment, expected, expected_epoch)
            if payment.state not in (PaymentState.DISPATCHED, PaymentState.RECONCILING):
                raise Internal("a dispatch record leaves a payment dispatched or reconciling")
            if state.dispatch_epochs.get(payment.id, 0) >= payment.epoch:
                raise StaleVersion
            state = _with_payment(state, before, payment)
            _check_pays(state.consents[payment.consent], self._clock.now())
            state = replace(state, dispatch_epochs={**state.dispatch_epochs, payment.id: payment.epoch})
            return self._recorded(state, [audit]), None

        await self._run(command, signed=True)
        return DispatchPermit(payment=payment.id, epoch=payment.epoch)

    async def payment(self, payment: PaymentId) -> Payment | None:
        return self._read().payments.get(payment)

    async def payments(self, where: PaymentFilter, *, after: str, limit: int) -> Sequence[Payment]:
        found = [
            payment
            for payment in self._read().payments.values()
            if payment.id > after and _payment_fits(payment, where)
        ]
        return sorted(found, key=lambda payment: payment.id)[:limit]

    async def due_payments(self, now: datetime, *, limit: int) -> Sequence[Payment]:
        due = [
            (payment.state not in _OUTCOME_UNKNOWN, payment.next_attempt_time, payment.id, payment)
            for payment in self._read().payments.values()
            if not payment.is_terminal and payment.next_attempt_time is not None and payment.next_attempt_time <= now
        ]
        return [payment for *_, payment in sorted(due, key=lambda entry: entry[:3])][:limit]

    # -- requests, keys, log

    async def claim(self, caller: WorkloadId, request_id: RequestId) -> Claim | None:
        return self._read().claims.get((caller, request_id))

    async def record(self, audit: Sequence[AuditDraft], *, claim: Claim | None = None) -> Claim | None:
        def command(state: _State) -> tuple[_State, Claim | None]:
            if claim and (earlier := state.claims.get((claim.caller, claim.request_id))):
                return state, earlier
            return self._recorded(_claimed(state, claim) if claim else state, audit), None

        return await self._run(command)

    async def add_master_key(self, record: MasterKeyRecord, audit: AuditDraft) -> None:
        def command(state: _State) -> tuple[_State, None]:
            if record.version in state.master_keys:
                raise StaleVersion
            if any(key.key_id == record.key_id for key in state.master_keys.values()):
                raise Internal("a value does not fit the database")
            keys = state.master_keys
            if record.current:
                keys = {version: replace(key, current=False) for version, key in keys.items()}
            return self._recorded(replace(state, master_keys={**keys, record.version: record}), [audit]), None

        await self._run(command)

    async def master_keys(self) -> Sequence[MasterKeyRecord]:
        return [key for _, key in sorted(self._read().master_keys.items())]

    async def leaves(self, *, start: int, limit: int) -> Sequence[StoredLeaf]:
        return self._read().leaves[start : start + limit]

    async def checkpoints(self, *, start_size: int, limit: int) -> Sequence[tuple[int, str]]:
        return [(size, note) for size, note, _ in self._read().notes if size >= start_size][:limit]

    async def log_position(self) -> LogPosition:
        state = self._read()
        return LogPosition(
            origin=self.origin,
            size=state.head.size,
            covered_size=state.covered_size,
            checkpoint_time=state.notes[-1][2] if state.notes else None,
        )

    async def sign_pending(self) -> None:
        await self._run(lambda state: (state, None), signed=True)

    async def consent_counts(self) -> dict[ConsentState, int]:
        states = [consent.state for consent in self._read().consents.values()]
        return {state: states.count(state) for state in states}

    async def payment_counts(self) -> dict[PaymentState, int]:
        states = [payment.state for payment in self._read().payments.values()]
        return {state: states.count(state) for state in states}

    async def tokens_expiring(self, before: datetime) -> dict[ProviderId, int]:
        providers = [
            consent.provider
            for consent in self._read().consents.values()
            if consent.state is ConsentState.ACTIVE
            and consent.access_expire_time is not None
            and consent.access_expire_time < before
        ]
        return {provider: providers.count(provider) for provider in providers}

    # -- parts

    def _read(self) -> _State:
        if self._closed:
            raise Unavailable("STORE_UNAVAILABLE", "the store is closed")
        return self._state

    async def _run(self, command: Callable[[_State], tuple[_State, T]], *, signed: bool = False) -> T:
        """One command at a time: as in a transaction, either all of it is there afterwards or nothing."""
        async with self._one_at_a_time:
            before = self._read()
            if self.failures:
                raise self.failures.pop(0)
            try:
                after, result = command(before)
            except CustodyError:
                raise
            except Exception as error:  # as the real store does: a defect is an Internal
                raise Internal from error
            if signed and after.covered_size < after.head.size:
                after = await self._signed(after)
            await asyncio.sleep(0)  # callers meet a real suspension here, as with a database
            self._state = after
            return result

    async def _signed(self, state: _State) -> _State:
        body = checkpoint_body(self.origin, state.head.size, state.head.root())
        try:
            note = await self._signer.sign_checkpoint(body)
            if parse_note(note).body.encode() != body:
                raise Internal
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable("AUDIT_UNAVAILABLE", "the log's checkpoint could not be signed; try again") from error
        return replace(state, notes=(*state.notes, (state.head.size, note, self._clock.now())))

    def _recorded(self, state: _State, drafts: Sequence[AuditDraft]) -> _State:
        for draft in drafts:
            time_ns = int(self._clock.now().timestamp() * 1_000_000) * 1000
            head, leaf = state.head.append(draft, time_ns=time_ns, boot_time_ns=self._clock.boot_time_ns())
            stored = StoredLeaf(index=leaf.index, entry=leaf.entry)
            state = replace(state, head=head, leaves=(*state.leaves, stored))
        return state


def _claimed(state: _State, claim: Claim) -> _State:
    return replace(state, claims={**state.claims, (claim.caller, claim.request_id): claim})


def _check_next_version(before: Consent | None, after: Consent) -> None:
    if before is None or before.version != after.version - 1:
        raise StaleVersion
    if _identity(before) != _identity(after):
        raise StaleVersion
    if before.state is ConsentState.REVOKED and after.state is not ConsentState.REVOKED:
        raise Internal("a value does not fit the database")
    if before.periodic_limits != after.periodic_limits:
        raise Internal("a value does not fit the database")


def _identity(consent: Consent) -> tuple[object, ...]:
    return consent.caller, consent.owner, consent.provider, consent.create_time


def _with_secrets(state: _State, consent: ConsentId, change: SecretsChange) -> _State:
    gone = {(consent, kind, row_version) for kind, row_version in change.delete}
    kept = {
        key: secret
        for key, secret in state.secrets.items()
        if key not in gone and not (change.delete_all and key[0] == consent)
    }
    for secret in change.put:
        key = consent, secret.kind, secret.row_version
        if key in kept:
            raise Internal("a value does not fit the database")
        kept[key] = secret
    return replace(state, secrets=kept)


def _check_new_payment(state: _State, payment: Payment) -> None:
    if payment.state is not PaymentState.INTENT:
        raise Internal("a payment begins as an intent")
    taken = any(
        payment.id == other.id
        or payment.bank_key == other.bank_key
        or (payment.caller, payment.request_id) == (other.caller, other.request_id)
        for other in state.payments.values()
    )
    claimed = (payment.caller, payment.request_id) in state.claims
    if taken or not claimed or payment.consent not in state.consents or payment.instruction.amount.minor_units <= 0:
        raise Internal("a value does not fit the database")


def _seen(state: _State, payment: Payment, expected_states: frozenset[PaymentState], expected_epoch: int) -> Payment:
    before = state.payments.get(payment.id)
    if before is None or before.state in TERMINAL or before.state not in expected_states:
        raise StaleVersion
    if before.epoch != expected_epoch:
        raise StaleVersion
    if payment.epoch < before.epoch:
        raise Internal("the epoch of a payment cannot go back")
    return before


def _with_payment(state: _State, before: Payment, after: Payment) -> _State:
    if after.state is not before.state and after.state not in TRANSITIONS[before.state]:
        raise Internal("a payment cannot make this change of state")
    if _order(before) != _order(after):
        raise Internal("what a payment orders never changes")
    if before.state is PaymentState.NEEDS_ATTENTION:
        resolved_well = (after.state is PaymentState.NEEDS_ATTENTION) == (after.resolution is None)
    else:
        resolved_well = before.resolution == after.resolution
    if not resolved_well:
        raise Internal("a value does not fit the database")
    return replace(state, payments={**state.payments, after.id: after})


def _reserved(state: _State, payment: PaymentId, reservations: Sequence[Reservation]) -> _State:
    held = [each for of_payment in state.reservations.values() for each in of_payment]
    for wanted in reservations:
        same = [each.amount.minor_units for each in held if _window(each) == _window(wanted)]
        if sum(same) + wanted.amount.minor_units > wanted.limit.amount.minor_units:
            raise wanted.exceeded()
    return replace(state, reservations={**state.reservations, payment: tuple(reservations)})


def _window(reservation: Reservation) -> tuple[object, ...]:
    limit = reservation.limit
    return (
        reservation.scope,
        limit.period_type,
        limit.alignment,
        reservation.window.start,
        reservation.amount.currency_code,
    )


def _check_pays(consent: Consent, now: datetime) -> None:
    consent.check_usable(Purpose.PAYMENTS, now)
    if not consent.wrapped_data_key:
        raise consent.not_active()


def _order(payment: Payment) -> tuple[object, ...]:
    return (
        payment.caller,
        payment.request_id,
        payment.consent,
        payment.owner,
        payment.provider,
        payment.instruction,
        payment.idempotency_class,
        payment.bank_key,
        payment.create_time,
    )


def _fits(consent: Consent, where: ConsentFilter) -> bool:
    return (
        where.caller in (None, consent.caller)
        and where.owner in (None, consent.owner)
        and where.provider in (None, consent.provider)
        and (where.states is None or consent.state in where.states)
        and where.holds_key in (None, bool(consent.wrapped_data_key))
    )


def _payment_fits(payment: Payment, where: PaymentFilter) -> bool:
    return (
        where.caller in (None, payment.caller)
        and where.owner in (None, payment.owner)
        and where.consent in (None, payment.consent)
        and (where.states is None or payment.state in where.states)
    )
