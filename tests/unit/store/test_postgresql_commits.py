"""The single writer on PostgreSQL: conflicts at every statement, connections that end before, during and after COMMIT, and a
database that has lost commits."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import psycopg
import pytest

from sidecar.domain.consent import ConsentState
from sidecar.domain.payment import DispatchPermit, Payment, PaymentState
from sidecar.errors import Internal, StaleVersion, Unavailable
from sidecar.ports import Claim
from sidecar.store import committer
from sidecar.store.postgresql import PostgresqlStore, connection
from tests.contract.test_store_contract import World
from tests.fakes.store import SoftwareSigner
from tests.unit.store.postgresql import (
    Fault,
    FaultyConnection,
    FaultyDatabase,
    backends,
    cluster,
    execute,
    faulty,
    new_database,
    terminate,
    until,
)
from tests.unit.store.support import (
    NOW,
    active_consent,
    dispatch_draft,
    draft,
    new_claim,
    new_consent,
    stored_intent,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Commands that meet in one group: some succeed, some are refused."""

    payment: Payment
    dispatched: Payment
    claim: Claim

    @classmethod
    async def prepared(cls, store: PostgresqlStore) -> "Work":
        _, payment = await stored_intent(store)
        return cls(payment=payment, dispatched=payment.to(PaymentState.DISPATCHED, now=NOW), claim=new_claim())

    async def together(
        self, store: PostgresqlStore, database: FaultyDatabase, signer: SoftwareSigner, fault: "Fault | None" = None
    ) -> list[object]:
        """All in one transaction: they wait behind a signature. `fault` sees the statements of that transaction."""
        signer.hold = asyncio.Event()
        ahead = asyncio.gather(store.record([draft()]), store.sign_pending(), return_exceptions=True)
        while not signer.waiting:
            await asyncio.sleep(0.001)
        group = asyncio.gather(*self.commands(store), return_exceptions=True)
        await asyncio.sleep(0)
        database.statements.clear()
        database.fault = fault
        signer.hold.set()
        signer.hold = None
        await ahead
        outcomes = await group
        database.fault = None
        return outcomes

    def commands(self, store: PostgresqlStore) -> Sequence[asyncio.Future[object]]:
        stale = new_consent().to(ConsentState.FAILED)
        return [
            asyncio.ensure_future(store.record([draft()], claim=self.claim)),
            asyncio.ensure_future(store.record([draft()], claim=self.claim)),
            asyncio.ensure_future(store.change_consent(stale, audit=[draft()])),
            asyncio.ensure_future(
                store.record_dispatch(self.dispatched, expected_epoch=1, audit=dispatch_draft(self.dispatched))
            ),
        ]

    def check_done(self, outcomes: Sequence[object]) -> None:
        first, second, stale, permit = outcomes
        assert first is None
        assert second == self.claim
        assert isinstance(stale, StaleVersion)
        assert permit == DispatchPermit(payment=self.payment.id, epoch=1)


class At:
    """Breaks the statement with this number of the next transaction, once, or each time that it comes by."""

    def __init__(self, number: int, act: Callable[[FaultyConnection], None], *, again: bool = False) -> None:
        self.number = number
        self.act = act
        self.again = again
        self.times = 0
        self._count: int | None = None

    def __call__(self, connection: FaultyConnection, text: str) -> None:
        if text.startswith("BEGIN") and (self._count is None or self.again):
            self._count = 0
        if self._count is None:
            return
        self._count += 1
        if self._count - 1 == self.number and (self.again or not self.times):
            self.times += 1
            self.act(connection)


def _fails(code: str) -> Callable[[FaultyConnection], None]:
    return lambda connection: connection.fails_with(code)


def _commits_and_fails(code: str) -> Callable[[FaultyConnection], None]:
    def act(connection: FaultyConnection) -> None:
        connection.really("COMMIT")
        connection.fails_with(code)

    return act


def _is_lost(connection: FaultyConnection) -> None:
    connection.driver.close()


def _commits_and_is_lost(connection: FaultyConnection) -> None:
    connection.really("COMMIT")
    connection.driver.close()


async def _verified_size(store: PostgresqlStore, signer: SoftwareSigner) -> int:
    """Of the whole log, which an outsider has verified."""
    await store.sign_pending()
    report = await World(store=store, signer=signer, clock=None).verified()  # type: ignore[arg-type]
    assert report.ok
    return (await store.log_position()).size


def _statements(database: FaultyDatabase) -> list[str]:
    """Those of the last transaction."""
    begins = [index for index, text in enumerate(database.statements) if text.startswith("BEGIN")]
    return database.statements[begins[-1] :]


@cache
def statement_count() -> int:
    """How many statements the group's transaction has, COMMIT included."""
    return asyncio.run(_count_statements())


async def _count_statements() -> int:
    signer = SoftwareSigner()
    async with faulty(new_database(), signer=signer) as (store, database):
        work = await Work.prepared(store)
        work.check_done(await work.together(store, database, signer))
        return len(_statements(database))


# --- conflicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["40001", "40P01"])
def test_a_conflict_at_any_statement_runs_the_group_again(code: str) -> None:
    """Whatever statement is told of a serialization failure or a deadlock, COMMIT included: all are answered as if nothing had
    been, each did its work once, and the refusals are those of the last run."""

    statements = statement_count()
    assert statements > 15

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            for number in range(statements):
                work = await Work.prepared(store)
                size = await _verified_size(store, signer)
                fault = At(number, _fails(code))
                work.check_done(await work.together(store, database, signer, fault))
                assert fault.times == 1, number
                assert await store.payment(work.payment.id) == work.dispatched
                assert await _verified_size(store, signer) == size + 3, (
                    number
                )  # the one ahead, the claim's, the dispatch's
            assert database.connections == 1  # a conflict is no reason for a new one

    asyncio.run(run())


def test_no_savepoint_lies_within_another() -> None:
    """Each command's is released before the next one begins, or the server would carry a hundred of them to COMMIT."""

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            work = await Work.prepared(store)
            work.check_done(await work.together(store, database, signer))
            depth = 0
            for step in "; ".join(_statements(database)).split("; "):
                depth += {"SAVEPOINT command": 1, "RELEASE SAVEPOINT command": -1}.get(step, 0)
                assert depth in (0, 1)

    asyncio.run(run())


def test_a_conflict_that_stays_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group is run again some times and no more; then everybody in it is told to try again, and nothing was written."""
    monkeypatch.setattr(committer, "_CONFLICT_PAUSE_SECONDS", 0.0001)

    last = statement_count() - 1

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            work = await Work.prepared(store)
            size = await _verified_size(store, signer)
            for number in (0, 5, last):
                fault = At(number, _fails("40001"), again=True)
                outcomes = await work.together(store, database, signer, fault)
                assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
                assert fault.times == committer._MAX_RUNS
                assert await store.claim(work.claim.caller, work.claim.request_id) is None
                assert await store.payment(work.payment.id) == work.payment
            assert await _verified_size(store, signer) == size + 3  # those ahead
            work.check_done(await work.together(store, database, signer))

    asyncio.run(run())


def test_a_deadlock_between_two_sidecars_is_resolved() -> None:
    """Two groups that change the same two consents in opposite order: the server ends one, which runs again; each consent
    changes once."""

    async def run() -> None:
        name = new_database()
        meeting = threading.Barrier(2, timeout=20)

        def meet(connection: FaultyConnection, text: str) -> None:
            if text.startswith("RELEASE") and not connection.database.connections > 1:
                connection.database.fault = None
                meeting.wait()  # each has changed its first consent

        async with faulty(name) as (one, first), faulty(name, instance="pod-2") as (two, second):
            left, right = active_consent(), active_consent()
            for consent in (left, right):
                await one.claim_consent(consent, new_claim(), draft())
            failed = [consent.to(ConsentState.EXPIRED) for consent in (left, right)]
            await two.record([draft()])
            first.fault = second.fault = meet
            outcomes = await asyncio.gather(
                *(one.change_consent(consent, audit=[draft()]) for consent in failed),
                *(two.change_consent(consent, audit=[draft()]) for consent in reversed(failed)),
                return_exceptions=True,
            )
            assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType"] * 2 + ["StaleVersion"] * 2
            assert (outcomes[0] is None) != (outcomes[3] is None)
            for consent in failed:
                assert await one.consent(consent.id) == consent

    asyncio.run(run())


# --- every other error, at every statement ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "08006",
        "08007",
        "22003",
        "25006",
        "40003",
        "42501",
        "53300",
        "55P03",
        "57014",
        "57P01",
        "XX000",
    ],
)
def test_an_error_at_any_statement_harms_nobody_for_good(code: str) -> None:
    """Whoever is told of a success has it; whoever is not can repeat the same command, and it is done once (D7)."""

    statements = statement_count()
    assert statements > 15

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            for number in range(statements):
                work = await Work.prepared(store)
                size = await _verified_size(store, signer)
                outcomes = await work.together(store, database, signer, At(number, _fails(code)))
                assert all(
                    outcome is None
                    or isinstance(outcome, Claim | StaleVersion | DispatchPermit | Unavailable | Internal)
                    for outcome in outcomes
                ), (number, outcomes)
                claimed, permit = outcomes[0] is None or outcomes[1] is None, isinstance(outcomes[3], DispatchPermit)
                assert (await store.claim(work.claim.caller, work.claim.request_id) is not None) == claimed, number
                assert await store.payment(work.payment.id) == (work.dispatched if permit else work.payment), number
                again = await asyncio.gather(*work.commands(store), return_exceptions=True)
                assert isinstance(again[3], StaleVersion if permit else DispatchPermit), number
                assert await store.payment(work.payment.id) == work.dispatched
                assert await _verified_size(store, signer) == size + 3, number

    asyncio.run(run())


@pytest.mark.parametrize("act", [_fails("08007"), _fails("40003"), _fails("57P01"), _fails("53100"), _is_lost])
def test_a_commit_that_failed_has_not_happened(act: Callable[[FaultyConnection], None]) -> None:
    """The server ends the connection before COMMIT has come to it, or says that it failed: nobody is told of a success (D1)."""

    last = statement_count() - 1

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            work = await Work.prepared(store)
            size = await _verified_size(store, signer)
            fault = At(last, act)
            outcomes = await work.together(store, database, signer, fault)
            assert fault.times == 1
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
            assert await store.payment(work.payment.id) == work.payment
            work.check_done(await work.together(store, database, signer))
            assert await _verified_size(store, signer) == size + 4

    asyncio.run(run())


@pytest.mark.parametrize("act", [_commits_and_fails("08007"), _commits_and_fails("40003"), _commits_and_is_lost])
def test_a_commit_whose_answer_is_lost_is_found_out(act: Callable[[FaultyConnection], None]) -> None:
    """A fresh connection tells that it happened, one more commit proves that it is durable, and all are answered the truth (D1)."""

    last = statement_count() - 1

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            work = await Work.prepared(store)
            size = await _verified_size(store, signer)
            ((commits,),) = execute(database.name, "SELECT commits FROM custody.log_heads")
            fault = At(last, act)
            work.check_done(await work.together(store, database, signer, fault))
            assert fault.times == 1
            assert database.connections == 2
            ((after,),) = execute(database.name, "SELECT commits FROM custody.log_heads")
            assert after == commits + 3  # the one ahead, the group's, and the one that proves it
            assert await _verified_size(store, signer) == size + 3

    asyncio.run(run())


@pytest.mark.parametrize("code", ["53100", "40001"])
@pytest.mark.parametrize("at", ["SELECT custody.log_heads", "UPDATE custody.log_heads", "COMMIT"])
def test_what_is_only_visible_is_not_told(code: str, at: str) -> None:
    """The commit happened, but what is to find that out or to prove it fails: it may still be lost, so nobody is told of a
    success; and whatever the failure, the group is not run again."""

    last = statement_count() - 1

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            work = await Work.prepared(store)
            lost = At(last, _commits_and_is_lost)

            def fault(connection: FaultyConnection, text: str) -> None:
                if lost.times and text.startswith(at):
                    connection.fails_with(code)
                lost(connection, text)

            outcomes = await work.together(store, database, signer, fault)
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
            assert await store.payment(work.payment.id) == work.dispatched  # to be reconciled: unknown is not failed
            await _verified_size(store, signer)

    asyncio.run(run())


def test_commit_in_a_failed_transaction_is_no_success() -> None:
    """PostgreSQL answers COMMIT with ROLLBACK, and no error, where the transaction had failed before."""

    last = statement_count() - 1

    async def run() -> None:
        signer = SoftwareSigner()
        async with faulty(new_database(), signer=signer) as (store, database):
            work = await Work.prepared(store)

            def act(connection: FaultyConnection) -> None:
                with pytest.raises(psycopg.Error):
                    connection.fails_with("22003")

            outcomes = await work.together(store, database, signer, At(last, act))
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
            assert await store.payment(work.payment.id) == work.payment

    asyncio.run(run())


# --- connections that end ---------------------------------------------------------------------------------------------


def test_a_connection_that_died_idle_is_replaced() -> None:
    """The server ended it between two commands: the next one does not notice."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, database):
            await store.record([draft()])
            assert terminate(name) >= 1
            await store.record([draft()])
            assert database.connections == 2

    asyncio.run(run())


def test_a_connection_that_ends_within_a_transaction_is_unavailable() -> None:
    """Nothing of the group is there, and the next group works."""

    async def run() -> None:
        signer = SoftwareSigner()
        name = new_database()
        async with faulty(name, signer=signer) as (store, database):
            work = await Work.prepared(store)
            size = await _verified_size(store, signer)
            outcomes = await work.together(
                store, database, signer, At(6, lambda connection: _terminated(name, connection))
            )
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
            work.check_done(await work.together(store, database, signer))
            assert await _verified_size(store, signer) == size + 4

    asyncio.run(run())


def _terminated(name: str, connection: FaultyConnection) -> None:
    execute(name, f"SELECT pg_terminate_backend({connection.driver.info.backend_pid}, 5000)")


_WAITS = "wait_event = 'SyncRep'"


@pytest.mark.parametrize("how", ["pg_terminate_backend", "pg_cancel_backend"])
def test_a_commit_that_ends_while_it_waits_for_a_replica_is_proven(how: str) -> None:
    """The server has committed and waits for its standby when the connection ends, or somebody cancels the wait (then it says
    COMMIT, with a warning). Only once a later commit has its standby's word is anybody told of a success."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, database):
            await store.record([draft()])
            with _standby_is_missing():
                claim = new_claim()
                command = asyncio.create_task(store.record([draft()], claim=claim))
                await until(lambda: backends(name, condition=_WAITS))
                execute(name, f"SELECT {how}({backends(name, condition=_WAITS)[0]})")
                await until(lambda: database.statements.count("COMMIT") == 3)  # the one that is to prove it
                await asyncio.sleep(0.1)
                assert not command.done()
            assert await command is None
            assert await store.record([draft()], claim=claim) == claim

    asyncio.run(run())


def test_a_replica_that_stays_away_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that waits for a synchronous standby without end is given up: unknown, not failed, and it may have happened."""
    monkeypatch.setattr(connection, "_SILENCE_SECONDS", 0.5)

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, _):
            claim = new_claim()
            with _standby_is_missing():
                async with asyncio.timeout(6):
                    with pytest.raises(Unavailable):
                        await store.record([draft()], claim=claim)
            assert await store.record([draft()], claim=claim) == claim  # it had happened; a repeat is told so

    asyncio.run(run())


@contextlib.contextmanager
def _standby_is_missing() -> Iterator[None]:
    """Commits wait for a synchronous standby that is not there."""
    execute("postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
    time.sleep(0.2)
    try:
        yield
    finally:
        execute("postgres", "SET synchronous_commit = local")
        with cluster().connect() as stranger:
            stranger.execute("ALTER SYSTEM RESET synchronous_standby_names")
            stranger.execute("SELECT pg_reload_conf()")


def test_a_server_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stops in the middle of a transaction, and its kernel goes on confirming what we send (D11): the command fails
    by deadline. When the server is back, the sidecar goes on."""
    monkeypatch.setattr(connection, "_SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(connection, "LOCK_SECONDS", 1)

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, database):
            await store.record([draft()])
            pid = database.first.driver.info.backend_pid
            database.fault = At(3, lambda connection: os.kill(pid, signal.SIGSTOP))
            claim = new_claim()
            try:
                async with asyncio.timeout(
                    6
                ):  # by the writer's own deadline: its callers' is 10 s, and it would be stuck
                    with pytest.raises(Unavailable):
                        await store.record([draft()], claim=claim)
                database.fault = None
                with pytest.raises(Unavailable):  # the old connection has our name still
                    await store.record([draft()])
            finally:
                os.kill(pid, signal.SIGCONT)
            await until(lambda: pid not in backends(name))
            assert await store.record([draft()], claim=claim) is None

    asyncio.run(run())


# --- others' locks ----------------------------------------------------------------------------------------------------


def test_a_strangers_lock_fails_its_own_command_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that somebody holds fails the command that needs it, by deadline; the others of its group are done (D8)."""

    async def run() -> None:
        signer = SoftwareSigner()
        name = new_database()
        async with faulty(name, signer=signer) as (store, database):
            work = await Work.prepared(store)
            with cluster().connect(name) as stranger:
                stranger.execute("BEGIN")
                stranger.execute("SELECT * FROM custody.payments FOR UPDATE")
                first, second, stale, permit = await work.together(store, database, signer)
                assert isinstance(permit, Unavailable)
                assert "lock" in permit.message
                assert (first, second, type(stale)) == (None, work.claim, StaleVersion)
            assert await store.payment(work.payment.id) == work.payment
            await store.record_dispatch(work.dispatched, expected_epoch=1, audit=dispatch_draft(work.dispatched))

    asyncio.run(run())


def test_many_commands_wait_for_a_stranger_little_longer_than_one() -> None:
    """Who has waited once in vain makes the rest of the transaction impatient: 40 commands on a locked table do not take 80 s."""

    async def run() -> None:
        name = new_database()
        async with faulty(name, linger_seconds=0.1) as (store, _):
            await asyncio.gather(*(store.record([draft()]) for _ in range(3)))  # company, so that the next ones meet
            with cluster().connect(name) as stranger:
                stranger.execute("BEGIN")
                stranger.execute("LOCK TABLE custody.claims IN ACCESS EXCLUSIVE MODE")
                async with asyncio.timeout(9):
                    outcomes = await asyncio.gather(
                        *(store.record([draft()], claim=new_claim()) for _ in range(40)), return_exceptions=True
                    )
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 40
            assert await store.record([draft()], claim=new_claim()) is None

    asyncio.run(run())


# --- a database that takes no writes, or has lost some ------------------------------------------------------------------


def test_a_server_that_becomes_read_only_is_unavailable_and_passes() -> None:
    """Commands fail, reads go on, and when it takes writes again all is as before (D4)."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, _):
            await store.record([draft()])
            execute("postgres", f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            terminate(name)
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await store.record([draft()])
            assert (await store.log_position()).size == 1
            execute("postgres", f"ALTER DATABASE {name} RESET default_transaction_read_only")
            await store.record([draft()])
            assert (await store.log_position()).size == 2

    asyncio.run(run())


@pytest.mark.parametrize("connection_ends", [True, False])
def test_a_database_that_has_lost_commits_is_never_written_to_again(*, connection_ends: bool) -> None:
    """A replica that lagged behind has taken over: the stored count of commits is less than what this process was told. Dispatch
    records may be lost, so every write is refused from then on, also when the row says something else again (D3, D18)."""
    told: list[str] = []

    async def run() -> None:
        name = new_database()
        async with faulty(name, alarm=told.append) as (store, _):
            await store.record([draft()])
            (before,) = execute(name, "SELECT head, size, covered_size, commits FROM custody.log_heads")
            work = await Work.prepared(store)
            (after,) = execute(name, "SELECT head, size, covered_size, commits FROM custody.log_heads")
            _set_head(name, before)
            if connection_ends:
                terminate(name)
            for attempt in range(3):
                with pytest.raises(Unavailable) as refused:
                    await store.record_dispatch(
                        work.dispatched, expected_epoch=1, audit=dispatch_draft(work.dispatched)
                    )
                assert refused.value.reason == "AUDIT_UNAVAILABLE"
                if attempt == 1:
                    _set_head(name, after)
            assert told == ["store_lost_commits"]
            assert await store.payment(work.payment.id) == work.payment

    asyncio.run(run())


def _set_head(name: str, row: tuple[object, ...]) -> None:
    with cluster().connect(name) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE custody.log_heads SET head = %s, size = %s, covered_size = %s, commits = %s", row)
