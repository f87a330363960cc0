"""The single writer: groups, failures of the disk, commits of which nobody knows whether they happened, and a hanging signer."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import pytest

from sidecar.audit.errors import EntryRefused
from sidecar.domain.consent import ConsentState
from sidecar.domain.payment import PaymentState
from sidecar.domain.secrets import SealedSecret, SecretKind
from sidecar.errors import Corrupt, PreconditionFailed, Unavailable
from sidecar.ports import SecretsChange
from sidecar.store import SqliteStore, StoreRefused
from sidecar.store import committer as module
from sidecar.store.sqlite import FileLock, SqliteConnection, SqliteDatabase, our_error
from tests.fakes.store import HandClock, SoftwareSigner
from tests.unit.store.support import (
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


class FaultyDatabase(SqliteDatabase):
    """`commit`, where it is set, is what the next COMMIT does instead; `commits` counts those that were asked for."""

    commit: Callable[[sqlite3.Connection], None] | None = None
    commits = 0
    flushes = 0

    def connect(self, *, read_only: bool = False) -> SqliteConnection:
        return FaultyConnection.of(self, read_only=read_only)


class FaultyConnection(SqliteConnection):
    database: FaultyDatabase

    @classmethod
    def of(cls, database: FaultyDatabase, *, read_only: bool) -> Self:
        connection = cls(database.path, read_only=read_only)
        connection.database = database
        return connection

    def commit(self) -> None:
        self.database.commits += 1
        fault, self.database.commit = self.database.commit, None
        if fault:
            fault(self.driver)
        else:
            super().commit()

    def flush(self) -> None:
        self.database.flushes += 1
        super().flush()


@asynccontextmanager
async def faulty(
    path: Path, *, signer: SoftwareSigner | None = None, linger_seconds: float = 0.002
) -> AsyncIterator[tuple[SqliteStore, FaultyDatabase]]:
    database = FaultyDatabase(path)
    store = SqliteStore(
        database=database,
        lock=FileLock(path),
        cluster="test",
        signer=signer or SoftwareSigner(),
        clock=HandClock(),
        linger_seconds=linger_seconds,
    )
    database.commits = 0
    try:
        yield store, database
    finally:
        await store.close()


def _happens_and_complains(driver: sqlite3.Connection) -> None:
    driver.execute("COMMIT")
    raise sqlite3.OperationalError("disk I/O error")


def _complains(driver: sqlite3.Connection) -> None:
    raise sqlite3.OperationalError("disk I/O error")


def _rolls_back_and_complains(driver: sqlite3.Connection) -> None:
    driver.execute("ROLLBACK")
    raise sqlite3.OperationalError("database or disk is full")


async def _size(store: SqliteStore) -> int:
    return (await store.log_position()).size


def test_many_commands_share_few_commits(tmp_path: Path) -> None:
    """200 concurrent commands need far fewer transactions, and each is on record once."""

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            await asyncio.gather(*(store.record([draft()]) for _ in range(200)))
            assert database.commits <= 10
            assert await _size(store) == 200

    asyncio.run(run())


def test_a_command_alone_does_not_linger(tmp_path: Path) -> None:
    """One call after the other is not delayed: with a linger of 30 s, 20 of them would not end in time."""

    async def run() -> None:
        async with faulty(new_database(tmp_path), linger_seconds=30) as (store, database):
            async with asyncio.timeout(20):
                for _ in range(20):
                    await store.record([draft()])
            assert database.commits == 20

    asyncio.run(run())


def test_one_signature_serves_a_group(tmp_path: Path) -> None:
    """Concurrent dispatches share checkpoints: far fewer signatures than permits, and each entry is covered."""
    signer = SoftwareSigner()

    async def run() -> None:
        async with faulty(new_database(tmp_path), signer=signer) as (store, _):
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            payments = [new_payment(consent) for _ in range(50)]
            await asyncio.gather(
                *(store.claim_payment(payment, claim_of(payment), intent_draft(payment)) for payment in payments)
            )
            assert signer.signatures == 0
            dispatched = [payment.to(PaymentState.DISPATCHED, now=NOW) for payment in payments]
            permits = await asyncio.gather(
                *(store.record_dispatch(one, expected_epoch=1, audit=dispatch_draft(one)) for one in dispatched)
            )
            assert len(permits) == 50
            assert 1 <= signer.signatures <= 10
            position = await store.log_position()
            assert position.covered_size == position.size

    asyncio.run(run())


def test_a_revocation_stops_the_dispatch_of_its_own_group(tmp_path: Path) -> None:
    """Both wait and are executed in one transaction: the dispatch sees the revocation ahead of it, and gets no permit."""
    signer = SoftwareSigner()

    async def run() -> None:
        async with faulty(new_database(tmp_path), signer=signer) as (store, database):
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            payment = new_payment(consent)
            await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
            signer.hold = asyncio.Event()
            signing = asyncio.create_task(store.sign_pending())
            while not signer.waiting:
                await asyncio.sleep(0.001)
            both = asyncio.gather(
                store.change_consent(consent.to(ConsentState.REVOKED), audit=[draft()]),
                store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched)),
                return_exceptions=True,
            )
            await asyncio.sleep(0)  # both are in the queue now
            commits = database.commits
            signer.hold.set()
            await signing
            revoked, refused = await both
            assert revoked is None
            assert isinstance(refused, PreconditionFailed)
            assert refused.reason == "CONSENT_REVOKED"
            assert database.commits == commits + 2  # that of the signature, and one for both
            assert await store.payment(payment.id) == payment
            assert await _size(store) == 3

    asyncio.run(run())


@pytest.mark.parametrize("fault", [_complains, _rolls_back_and_complains])
def test_a_commit_that_failed_has_not_happened(tmp_path: Path, fault: Callable[[sqlite3.Connection], None]) -> None:
    """Nobody of the group is told of a success; nothing is there; the next group works and the log goes on."""

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            await store.record([draft()])
            claims = [new_claim() for _ in range(5)]
            database.commit = fault
            outcomes = await asyncio.gather(
                *(store.record([draft()], claim=claim) for claim in claims[:1]), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [Unavailable]
            assert await store.claim(claims[0].caller, claims[0].request_id) is None
            assert await _size(store) == 1
            assert await store.record([draft()], claim=claims[0]) is None
            await store.sign_pending()
            assert await _size(store) == 2

    asyncio.run(run())


def test_refusals_of_a_group_that_was_not_committed_are_void(tmp_path: Path) -> None:
    """The loser of a claim is not told of a winner that never was: both are Unavailable."""

    async def run() -> None:
        async with faulty(new_database(tmp_path), linger_seconds=0.2) as (store, database):
            await asyncio.gather(*(store.record([draft()]) for _ in range(3)))  # company, so that the next ones meet
            claim = new_claim()
            database.commit = _complains
            outcomes = await asyncio.gather(
                *(store.record([draft()], claim=claim) for _ in range(2)), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
            assert await store.claim(claim.caller, claim.request_id) is None

    asyncio.run(run())


def test_a_command_that_fails_leaves_nothing_in_its_group(tmp_path: Path) -> None:
    """What a failing command had already written is taken back, and the commands beside it in the transaction stay."""

    async def run() -> None:
        async with faulty(new_database(tmp_path), linger_seconds=0.2) as (store, database):
            consent = new_consent()
            await store.claim_consent(consent, new_claim(), draft())
            await asyncio.gather(*(store.record([draft()]) for _ in range(3)))  # company, so that the next ones meet
            before, size, claim = database.commits, await _size(store), new_claim()
            active = consent.to(ConsentState.ACTIVE)
            outcomes = await asyncio.gather(
                store.record([draft()]),
                store.change_consent(active, claim=claim, audit=[draft(), draft(reason="not a reason")]),
                store.record([draft()]),
                return_exceptions=True,
            )
            assert database.commits == before + 1
            assert [type(outcome) for outcome in outcomes] == [type(None), EntryRefused, type(None)]
            assert await store.consent(consent.id) == consent
            assert await store.claim(claim.caller, claim.request_id) is None
            assert await _size(store) == size + 2
            await store.sign_pending()

    asyncio.run(run())


def test_a_commit_that_happened_is_a_success(tmp_path: Path) -> None:
    """COMMIT reports an error although the rows are there: the answer is the truth, and it is on disk before it is given."""

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            consent, claim = active_consent(), new_claim()
            database.commit = _happens_and_complains
            assert await store.claim_consent(consent, claim, draft()) is None
            assert database.flushes == 1
            assert await store.consent(consent.id) == consent
            payment = new_payment(consent)
            await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
            database.commit = _happens_and_complains
            permit = await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
            assert permit.epoch == 1
            assert await _size(store) == 3

    asyncio.run(run())


def test_what_cannot_be_found_out_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the database does not say whether the commit happened, there is no permit, whatever stands in the row."""

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            payment = new_payment(consent)
            await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)

            def no_connection(*, read_only: bool = False) -> SqliteConnection:
                raise StoreRefused("the database cannot be opened")

            def fault(driver: sqlite3.Connection) -> None:
                monkeypatch.setattr(database, "connect", no_connection)
                _happens_and_complains(driver)

            database.commit = fault
            with pytest.raises(Unavailable):
                await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
            monkeypatch.undo()
            assert await store.payment(payment.id) == dispatched  # to be reconciled: unknown is not failed
            await store.record([draft()])
            await store.sign_pending()

    asyncio.run(run())


def test_a_full_disk_is_unavailable_and_passes(tmp_path: Path) -> None:
    """On a full disk commands fail as Unavailable and have not happened; with space again all goes on (L2, U1)."""

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            await store.record([draft()])
            real = database.connect

            def small(*, read_only: bool = False) -> SqliteConnection:
                connection = real(read_only=read_only)
                (pages,) = connection.driver.execute("PRAGMA page_count").fetchone()
                connection.driver.execute(f"PRAGMA max_page_count = {pages}")
                return connection

            database.connect = small  # type: ignore[method-assign]
            database.commit = _complains  # so that the next group gets a new connection
            with pytest.raises(Unavailable):
                await store.record([draft()])
            refused = stored = 0
            for _ in range(100):
                (outcome,) = await asyncio.gather(store.record([draft(caller="x" * 2000)]), return_exceptions=True)
                stored += outcome is None
                refused += isinstance(outcome, Unavailable) and outcome.reason == "STORE_UNAVAILABLE"
            assert refused + stored == 100
            assert refused >= 90
            assert await _size(store) == 1 + stored
            database.connect = real  # type: ignore[method-assign]
            for _ in range(20):
                await store.record([draft(caller="x" * 2000)])
            await store.sign_pending()
            assert await _size(store) == 21 + stored

    asyncio.run(run())


def test_a_locked_database_is_unavailable_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who holds the file's write lock makes commands fail by deadline, not hang (L4)."""
    monkeypatch.setattr("sidecar.store.sqlite._BUSY_SECONDS", 0.05)
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            stranger = sqlite3.connect(path, isolation_level=None)
            stranger.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable):
                await store.record([draft()])
            stranger.execute("ROLLBACK")
            stranger.close()
            await store.record([draft()])
            assert await _size(store) == 1

    asyncio.run(run())


@pytest.mark.parametrize("act", ["remove", "replace", "remove the write-ahead log"])
def test_a_file_that_is_gone_takes_no_commits(tmp_path: Path, act: str) -> None:
    """SQLite would go on writing into a removed or replaced file; we do not (L5, H23, U3)."""
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            for _ in range(3):
                await store.record([draft()])
            if act == "remove":
                path.unlink()
            elif act == "replace":
                new_database(tmp_path).replace(path)
            else:
                path.with_name("store.db-wal").unlink()
            with pytest.raises(Unavailable, match="removed or replaced"):
                await store.record([draft()])

    asyncio.run(run())


def test_a_signer_that_hangs_fails_its_callers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for a signature is bounded; then the dispatch fails, and commands that need none go on (U6)."""
    monkeypatch.setattr(module, "_SIGN_SECONDS", 0.1)
    signer = SoftwareSigner()

    async def run() -> None:
        async with opened(new_database(tmp_path), signer=signer) as store:
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            payment = new_payment(consent)
            await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
            dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
            signer.hold = asyncio.Event()
            outcomes = await asyncio.gather(
                store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched)),
                store.record([draft()]),
                return_exceptions=True,
            )
            assert isinstance(outcomes[0], Unavailable)
            assert outcomes[0].reason == "AUDIT_UNAVAILABLE"
            assert outcomes[1] is None
            assert await store.payment(payment.id) == payment
            signer.hold = None
            permit = await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
            assert permit.epoch == 1

    asyncio.run(run())


def test_the_signers_wait_fits_the_five_seconds() -> None:
    """A hanging HSM must fail its callers within 5 s, so the wait for a signature is shorter."""
    assert module._SIGN_SECONDS < 5 < module._COMMAND_SECONDS


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When too many commands wait, the next is refused at once; those that wait are served."""
    monkeypatch.setattr(module, "_MAX_WAITING", 10)

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            gate, reached = threading.Event(), threading.Event()

            def slow(driver: sqlite3.Connection) -> None:
                reached.set()
                gate.wait(30)
                driver.execute("COMMIT")

            database.commit = slow
            first = asyncio.create_task(store.record([draft()]))
            await asyncio.to_thread(reached.wait, 30)
            waiting = [asyncio.create_task(store.record([draft()])) for _ in range(10)]
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="too many"):
                await store.record([draft()])
            gate.set()
            assert await asyncio.gather(first, *waiting) == [None] * 11
            assert await _size(store) == 11

    asyncio.run(run())


def test_a_blocked_disk_fails_by_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that hangs fails its caller in bounded time, and what waited behind it is not executed later (U2)."""
    monkeypatch.setattr(module, "_COMMAND_SECONDS", 0.2)

    async def run() -> None:
        async with faulty(new_database(tmp_path)) as (store, database):
            gate, reached = threading.Event(), threading.Event()

            def slow(driver: sqlite3.Connection) -> None:
                reached.set()
                gate.wait(30)
                driver.execute("COMMIT")

            database.commit = slow
            blocked = asyncio.create_task(store.record([draft()]))
            await asyncio.to_thread(reached.wait, 30)
            claim = new_claim()
            outcomes = await asyncio.gather(blocked, store.record([draft()], claim=claim), return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
            gate.set()
            monkeypatch.setattr(module, "_COMMAND_SECONDS", 10)
            await store.record([draft()])
            assert await _size(store) == 2
            assert await store.claim(claim.caller, claim.request_id) is None

    asyncio.run(run())


def test_closing_finishes_what_waits(tmp_path: Path) -> None:
    """close() answers all commands that were accepted, and lets go of the file."""
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            calls = [asyncio.create_task(store.record([draft()])) for _ in range(50)]
            await asyncio.sleep(0)
            await store.close()
            assert await asyncio.gather(*calls) == [None] * 50
        async with opened(path) as store:
            assert await _size(store) == 50

    asyncio.run(run())


def test_somebody_elses_entries_stop_the_writer(tmp_path: Path) -> None:
    """When the head in the database is not the one that this writer left, nothing more is written by it."""
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path) as store:
            await store.record([draft()])
            stranger = sqlite3.connect(path, isolation_level=None)
            stranger.execute("UPDATE log_heads SET commits = commits + 1")
            stranger.close()
            with pytest.raises(Unavailable) as refusal:
                await store.record([draft()])
            assert refusal.value.reason == "AUDIT_UNAVAILABLE"
            assert await _size(store) == 1

    asyncio.run(run())


DAMAGED_LOGS = {
    "the newest leaf is gone": 'DELETE FROM log_leaves WHERE "index" = 2',
    "all leaves are gone": "DELETE FROM log_leaves",
    "the newest leaf is altered": "UPDATE log_leaves SET entry = x'00' WHERE \"index\" = 2",
    "a leaf too many": 'INSERT INTO log_leaves SELECT origin, 3, entry FROM log_leaves WHERE "index" = 2',
    "the newest checkpoint is gone": "DELETE FROM log_checkpoints WHERE size = 3",
    "the newest checkpoint is an older one": (
        "UPDATE log_checkpoints SET note = (SELECT note FROM log_checkpoints WHERE size = 2) WHERE size = 3"
    ),
    "the head is damaged": "UPDATE log_heads SET head = CAST(substr(head, 1, 40) || x'ff' || substr(head, 42) AS BLOB)",
    "the head is gone": "DELETE FROM log_heads",
    "the row says another size": "UPDATE log_heads SET size = 4",
}


@pytest.mark.parametrize("case", DAMAGED_LOGS)
def test_a_log_whose_end_is_damaged_is_not_continued(tmp_path: Path, case: str) -> None:
    """Leaf, head and checkpoint at the end of the log must fit each other when the store is opened (H15, H16)."""
    path = new_database(tmp_path)

    async def fill() -> None:
        async with opened(path) as store:
            await store.record([draft(), draft()])
            await store.sign_pending()
            await store.record([draft()])
            await store.sign_pending()

    async def reopen() -> None:
        with pytest.raises(StoreRefused, match="a repeat may pay again"):
            async with opened(path):
                pass

    asyncio.run(fill())
    _past_the_guards(path, DAMAGED_LOGS[case])
    asyncio.run(reopen())


def _past_the_guards(path: Path, statement: str) -> None:
    """The guards are taken away for one statement and put back, as by somebody who has the file."""
    driver = sqlite3.connect(path, isolation_level=None)
    guards = driver.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in guards:
        driver.execute(f"DROP TRIGGER {name}")
    driver.execute(statement)
    for _, text in guards:
        driver.execute(text)
    driver.close()


def test_destroyed_keys_leave_the_disk(tmp_path: Path) -> None:
    """When a consent's secrets are destroyed, no copy of them stays in the file or its write-ahead log."""
    path = new_database(tmp_path)
    canary, key = b"CANARY-SEALED-TOKEN-" * 10, b"CANARY-WRAPPED-KEY-" * 10

    def on_disk() -> bool:
        return any(mark in file.read_bytes() for file in path.parent.iterdir() for mark in (canary[:60], key[:60]))

    async def run() -> None:
        async with opened(path) as store:
            consent = new_consent(wrapped_data_key=key)
            await store.claim_consent(consent, new_claim(), draft())
            secret = SealedSecret(kind=SecretKind.ACCESS_TOKEN, row_version=1, sealed=canary)
            active = consent.to(ConsentState.ACTIVE)
            await store.change_consent(active, secrets=SecretsChange(put=(secret,)), audit=[draft()])
            assert on_disk()
            ended = active.to(ConsentState.REVOKED, wrapped_data_key=b"", subject_key=b"")
            await store.change_consent(ended, secrets=SecretsChange(delete_all=True), audit=[draft()])
            for _ in range(100):
                if not on_disk():
                    return
                await asyncio.sleep(0.05)
            pytest.fail("a destroyed secret is still on the disk")

    asyncio.run(run())


def test_a_damaged_file_is_corrupt(tmp_path: Path) -> None:
    """What SQLite calls malformed is Corrupt for callers, and its words are not passed on."""
    path = new_database(tmp_path)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)  # all but the page where the schema begins
    path.write_bytes(content)
    driver = sqlite3.connect(path)

    with pytest.raises(sqlite3.DatabaseError) as failure:
        driver.execute("SELECT * FROM payments").fetchall()
    driver.close()
    ours = our_error(failure.value)

    assert isinstance(ours, Corrupt)
    assert "malformed" not in str(ours)
