"""`sidecar.ports.Store` on SQL. Each command reads as what happens in its one transaction.

What differs between databases is behind `Database`, and in how a store is opened and whose log it continues.
"""

import contextlib
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self, TypeVar

from sidecar.audit.errors import EntryRefused, LogCorrupt
from sidecar.domain.audit import AuditDraft, AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ConsentId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.limits import Reservation
from sidecar.domain.payment import NEVER_EXECUTED, DispatchPermit, Payment, PaymentState
from sidecar.errors import Internal, StaleVersion
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
from sidecar.store import committer
from sidecar.store.committer import GroupCommitter, Transaction, WriteConnection
from sidecar.store.consents import ConsentTables
from sidecar.store.errors import RESTORING, StoreRefused
from sidecar.store.keys import MasterKeyTable
from sidecar.store.limits import LimitTables
from sidecar.store.log import LogTables
from sidecar.store.payments import PaymentTable
from sidecar.store.prepare import migrate_in_subprocess
from sidecar.store.relocation.marks import Marks
from sidecar.store.requests import ClaimTable
from sidecar.store.sqlite import FileLock, SqliteDatabase, check_file
from sidecar.store.statements import Connection, SqlDialect

__all__ = ["Alarm", "Database", "SqlStore", "SqliteStore", "instance_origin", "no_alarm"]

T = TypeVar("T")
Alarm = Callable[[str], None]


class Database(committer.Database, Protocol):
    """What the store needs of a database, beside what the writer needs. `str()` of it says where it is, without secrets."""

    @property
    def dialect(self) -> SqlDialect: ...

    async def read(self, query: Callable[[Connection], T]) -> T:
        """The value of `query`, which may be run more than once. Raises what it raises, Unavailable, and Corrupt."""

    async def close(self) -> None: ...


def no_alarm(event: str) -> None:
    """Where nobody is to be told."""


class SqlStore:
    """The commands and reads. `origin` names the log of this instance: audit/CLUSTER/INSTANCE."""

    def __init__(
        self,
        *,
        database: Database,
        origin: str,
        signer: CheckpointSigner,
        clock: Clock,
        linger_seconds: float,
        alarm: Alarm = no_alarm,
    ) -> None:
        dialect = database.dialect
        self._consents = ConsentTables(dialect)
        self._payments = PaymentTable(dialect)
        self._limits = LimitTables(dialect)
        self._claims = ClaimTable(dialect)
        self._keys = MasterKeyTable(dialect)
        self._log = LogTables(dialect)
        self._database = database
        self._read = database.read
        self.origin = origin
        self._committer = GroupCommitter(
            database=database,
            log=self._log,
            origin=origin,
            signer=signer,
            clock=clock,
            linger_seconds=linger_seconds,
            alarm=alarm,
        )

    async def close(self) -> None:
        """Finishes the commands that wait, then lets go of the database."""
        await self._committer.close()
        await self._database.close()

    # -- consents

    async def claim_consent(self, consent: Consent, claim: Claim, audit: AuditDraft) -> Claim | None:
        def command(transaction: Transaction) -> Claim | None:
            if earlier := self._claims.use(transaction, claim, transaction.now):
                return earlier
            self._consents.insert(transaction, consent)
            transaction.append(audit)
            return None

        return await self._committer.run(command)

    async def change_consent(
        self,
        consent: Consent,
        *,
        secrets: SecretsChange | None = None,
        claim: Claim | None = None,
        lease_epoch: int | None = None,
        audit: Sequence[AuditDraft],
    ) -> Claim | None:
        def command(transaction: Transaction) -> Claim | None:
            if claim and (earlier := self._claims.use(transaction, claim, transaction.now)):
                return earlier
            if lease_epoch is not None and not self._consents.release_lease(
                transaction, consent.id, epoch=lease_epoch, unresolved_since=None, free_time=None
            ):
                raise StaleVersion
            self._consents.change(transaction, consent)
            if secrets:
                self._consents.change_secrets(transaction, consent.id, secrets)
            transaction.append(*audit)
            return None

        shreds = bool(secrets and (secrets.delete or secrets.delete_all))
        return await self._committer.run(command, shreds=shreds)

    async def consent(self, consent: ConsentId) -> Consent | None:
        return await self._read(lambda reader: self._consents.get(reader, consent))

    async def consents(self, where: ConsentFilter, *, after: str, limit: int) -> Sequence[Consent]:
        return await self._read(lambda reader: self._consents.list(reader, where, after=after, limit=limit))

    async def expired_consents(self, now: datetime, *, limit: int) -> Sequence[Consent]:
        return await self._read(lambda reader: self._consents.expired(reader, now, limit=limit))

    async def secrets(self, consent: ConsentId) -> ConsentSecrets:
        return await self._read(lambda reader: self._consents.secrets(reader, consent))

    async def refresh_lease(self, consent: ConsentId) -> RefreshLease | None:
        return await self._read(lambda reader: self._consents.lease(reader, consent))

    async def take_refresh_lease(
        self, consent: ConsentId, *, holder: str, now: datetime, seconds: float, after_epoch: int, audit: AuditDraft
    ) -> int | None:
        def command(transaction: Transaction) -> int | None:
            epoch = self._consents.take_lease(
                transaction, consent, holder=holder, now=now, seconds=seconds, after_epoch=after_epoch
            )
            if epoch is not None:
                transaction.append(audit)
            return epoch

        return await self._committer.run(command)

    async def release_refresh_lease(
        self,
        consent: ConsentId,
        *,
        epoch: int,
        unresolved_since: datetime | None = None,
        free_time: datetime | None = None,
    ) -> None:
        await self._committer.run(
            lambda transaction: self._consents.release_lease(
                transaction, consent, epoch=epoch, unresolved_since=unresolved_since, free_time=free_time
            )
        )

    async def due_refreshes(self, provider: ProviderId, now: datetime, *, limit: int) -> Sequence[ConsentId]:
        return await self._read(lambda reader: self._consents.due_refreshes(reader, provider, now, limit=limit))

    # -- payments

    async def claim_payment(
        self, payment: Payment, claim: Claim, audit: AuditDraft, *, reservations: Sequence[Reservation] = ()
    ) -> Claim | None:
        def command(transaction: Transaction) -> Claim | None:
            if earlier := self._claims.use(transaction, claim, transaction.now):
                return earlier
            self._payments.insert(transaction, payment)
            self._limits.reserve(transaction, payment.id, reservations)
            transaction.append(audit)
            return None

        return await self._committer.run(command)

    async def change_payment(
        self,
        payment: Payment,
        *,
        expected_states: frozenset[PaymentState],
        expected_epoch: int,
        claim: Claim | None = None,
        audit: Sequence[AuditDraft],
    ) -> Claim | None:
        def command(transaction: Transaction) -> Claim | None:
            if claim and (earlier := self._claims.use(transaction, claim, transaction.now)):
                return earlier
            self._payments.change(transaction, payment, expected_states=expected_states, expected_epoch=expected_epoch)
            if payment.state in NEVER_EXECUTED:
                self._limits.release(transaction, payment.id)
            transaction.append(*audit)
            return None

        return await self._committer.run(command)

    async def record_dispatch(self, payment: Payment, *, expected_epoch: int, audit: AuditDraft) -> DispatchPermit:
        if (audit.event, audit.payment, audit.epoch) != (AuditEvent.PAYMENT_DISPATCHED, payment.id, payment.epoch):
            raise Internal("the entry of a dispatch must be of this dispatch")

        def command(transaction: Transaction) -> None:
            self._payments.dispatch(transaction, payment, expected_epoch=expected_epoch)
            # Where this refuses, the line above is undone. It comes second so that a stale caller learns that it is stale.
            self._consents.check_pays(transaction, payment.consent, transaction.now)
            transaction.append(audit)

        await self._committer.run(command, signed=True)
        return DispatchPermit(payment=payment.id, epoch=payment.epoch)  # the only one: its record is durable and signed

    async def payment(self, payment: PaymentId) -> Payment | None:
        return await self._read(lambda reader: self._payments.get(reader, payment))

    async def payments(self, where: PaymentFilter, *, after: str, limit: int) -> Sequence[Payment]:
        return await self._read(lambda reader: self._payments.list(reader, where, after=after, limit=limit))

    async def due_payments(self, now: datetime, *, limit: int) -> Sequence[Payment]:
        return await self._read(lambda reader: self._payments.due(reader, now, limit=limit))

    # -- requests, keys, log

    async def claim(self, caller: WorkloadId, request_id: RequestId) -> Claim | None:
        return await self._read(lambda reader: self._claims.get(reader, caller, request_id))

    async def record(self, audit: Sequence[AuditDraft], *, claim: Claim | None = None) -> Claim | None:
        def command(transaction: Transaction) -> Claim | None:
            if claim and (earlier := self._claims.use(transaction, claim, transaction.now)):
                return earlier
            transaction.append(*audit)
            return None

        return await self._committer.run(command)

    async def add_master_key(self, record: MasterKeyRecord, audit: AuditDraft) -> None:
        def command(transaction: Transaction) -> None:
            self._keys.add(transaction, record)
            transaction.append(audit)

        await self._committer.run(command)

    async def master_keys(self) -> Sequence[MasterKeyRecord]:
        return await self._read(self._keys.all)

    async def leaves(self, *, start: int, limit: int) -> Sequence[StoredLeaf]:
        return await self._read(lambda reader: self._log.leaves(reader, self.origin, start=start, limit=limit))

    async def checkpoints(self, *, start_size: int, limit: int) -> Sequence[tuple[int, str]]:
        return await self._read(
            lambda reader: self._log.checkpoints(reader, self.origin, start_size=start_size, limit=limit)
        )

    async def log_position(self) -> LogPosition:
        return await self._read(lambda reader: self._log.position(reader, self.origin))

    async def sign_pending(self) -> None:
        await self._committer.run(lambda transaction: None, signed=True)  # noqa: ARG005 - the signing is all there is to do

    async def consent_counts(self) -> dict[ConsentState, int]:
        return await self._read(self._consents.counts)

    async def payment_counts(self) -> dict[PaymentState, int]:
        return await self._read(self._payments.counts)

    async def tokens_expiring(self, before: datetime) -> dict[ProviderId, int]:
        return await self._read(lambda reader: self._consents.expiring(reader, before))


class SqliteStore(SqlStore):
    """On a file of its own. Made by `open`, ended by `close`."""

    @classmethod
    async def open(
        cls,
        *,
        path: Path,
        cluster: str,
        signer: CheckpointSigner,
        clock: Clock,
        linger_seconds: float = 0.002,
        synchronous: str = "FULL",
        migrate: bool = True,
        alarm: Alarm = no_alarm,
    ) -> Self:
        """Opens the database, which is made or migrated first (in a short-lived process) unless `migrate` is False.

        Raises StoreRefused where the file, its place, its settings or its schema are not as they must be, where another
        sidecar has it, or where its log is damaged. The caller puts SIDECAR_STARTED on record before anything else: the
        log refuses other entries once the machine has been restarted.
        """
        if migrate:
            await migrate_in_subprocess(path)
        lock = FileLock(check_file(path))
        try:
            database = SqliteDatabase(path, synchronous=synchronous)
            return cls(
                database=database,
                lock=lock,
                cluster=cluster,
                signer=signer,
                clock=clock,
                linger_seconds=linger_seconds,
                alarm=alarm,
            )
        except BaseException:
            lock.release()
            raise

    def __init__(
        self,
        *,
        database: SqliteDatabase,
        lock: FileLock,
        cluster: str,
        signer: CheckpointSigner,
        clock: Clock,
        linger_seconds: float,
        alarm: Alarm = no_alarm,
    ) -> None:
        self._lock = lock
        with contextlib.closing(database.connect()) as connection:
            Marks(database.dialect).check_may_be_used(connection, where=str(database))
            origin = instance_origin(database, connection, cluster=cluster, clock=clock)
        database.open_reader()
        super().__init__(
            database=database, origin=origin, signer=signer, clock=clock, linger_seconds=linger_seconds, alarm=alarm
        )

    async def close(self) -> None:
        await super().close()
        self._lock.release()


def instance_origin(
    database: Database, connection: WriteConnection, *, cluster: str, clock: Clock, name: str | None = None
) -> str:
    """The origin of this instance's log, which is begun here the first time. Without a name there is one instance only.

    Raises StoreRefused where it is not sound.
    """
    log = LogTables(database.dialect)
    try:
        connection.begin()
        origins = log.origins(connection)
        known = origins.get(name) if name else next(iter(origins.values()), None)
        origin = known or _begin_log(connection, log, name=name, cluster=cluster, clock=clock)
        clusters = {each.rpartition("/")[0] for each in (*origins.values(), origin)}
        if clusters != {f"audit/{cluster}"} or (name is None and len(origins) > 1):
            raise StoreRefused("the database belongs to another cluster", path=str(database))
        log.check_end(connection, log.state(connection, origin))
        connection.commit()
    except LogCorrupt as error:
        raise StoreRefused(f"{error.message}; {RESTORING}", path=str(database)) from error
    except database.driver_error as error:
        raise StoreRefused("the database cannot be read or written", path=str(database)) from error
    return origin


def _begin_log(connection: WriteConnection, log: LogTables, *, name: str | None, cluster: str, clock: Clock) -> str:
    """Named by a new UUID and not by the instance's name: a log that is begun again in another database is another log."""
    identifier = str(uuid.uuid4())
    origin = f"audit/{cluster}/{identifier}"
    try:
        log.add_instance(connection, identifier=name or identifier, origin=origin, now=clock.now())
    except EntryRefused as error:
        raise StoreRefused("the name of the cluster must be visible ASCII without '+'") from error
    return origin
