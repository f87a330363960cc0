"""Reads on PostgreSQL: few connections, bounded waits, and none that outlives its use."""

import asyncio
import os
import signal
import time

import pytest
from sqlalchemy import text

from sidecar.errors import Corrupt, Unavailable
from sidecar.store.postgresql import readers
from sidecar.store.postgresql.connection import PostgresqlDialect
from sidecar.store.statements import Connection, Statement
from tests.unit.store.postgresql import backends, cluster, execute, faulty, new_database, opened, terminate, until
from tests.unit.store.support import active_consent, draft, new_claim


def _one(words: str) -> Statement:
    return Statement(text(words), PostgresqlDialect())


def test_many_reads_use_few_connections() -> None:
    """A hundred reads at once are all answered, over no more connections than there may be."""

    async def run() -> None:
        name = new_database()
        async with opened(name, read_connections=3) as store:
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            assert await asyncio.gather(*(store.consent(consent.id) for _ in range(100))) == [consent] * 100
            assert len(backends(name)) == 1 + 3

    asyncio.run(run())


def test_reads_cannot_write() -> None:
    """A reader's session is read-only, whatever it is asked."""

    async def run() -> None:
        async with opened(new_database()) as store:
            statement = _one("INSERT INTO custody.instances VALUES ('x', 'y', 1) RETURNING id")
            with pytest.raises(Unavailable):
                await store._read(lambda connection: connection.rows(statement, {}))
            assert await store._read(
                lambda connection: connection.rows(_one("SELECT count(*) FROM custody.instances"), {})
            ) == [(1,)]

    asyncio.run(run())


def test_when_all_connections_are_busy_a_read_is_unavailable_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is locked by a stranger: reads end by deadline, those that waited for a connection too, the loop goes on
    meanwhile, and afterwards every connection is there again (D9)."""
    monkeypatch.setattr(readers, "READ_SECONDS", 0.5)

    async def run() -> None:
        name = new_database()
        async with opened(name, read_connections=2) as store:
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            with cluster().connect(name) as stranger:
                stranger.execute("BEGIN")
                stranger.execute("LOCK TABLE custody.consents IN ACCESS EXCLUSIVE MODE")
                began, longest = time.monotonic(), 0.0
                reads = asyncio.gather(*(store.consent(consent.id) for _ in range(20)), return_exceptions=True)
                while not reads.done():
                    before = time.monotonic()
                    await asyncio.sleep(0.005)
                    longest = max(longest, time.monotonic() - before)
                assert time.monotonic() - began < 5
                assert longest < 0.4
                outcomes = await reads
            assert {type(outcome) for outcome in outcomes} == {Unavailable}
            assert {outcome.reason for outcome in outcomes if isinstance(outcome, Unavailable)} == {"STORE_UNAVAILABLE"}
            assert await asyncio.gather(*(store.consent(consent.id) for _ in range(20))) == [consent] * 20

    asyncio.run(run())


def test_too_many_waiting_reads_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue for a connection is bounded."""
    monkeypatch.setattr(readers, "_MAX_WAITING", 3)

    async def run() -> None:
        async with opened(new_database(), read_connections=1) as store:
            outcomes = await asyncio.gather(*(store.log_position() for _ in range(30)), return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, Unavailable)]
            assert len(refused) == 30 - 4  # one is served, three wait
            assert all("too many" in str(outcome) for outcome in refused)
            await store.log_position()

    asyncio.run(run())


def test_a_reader_that_died_idle_is_replaced() -> None:
    """The server ended the connections between two reads: the next ones do not notice."""

    async def run() -> None:
        name = new_database()
        async with opened(name, read_connections=3) as store:
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            await asyncio.gather(*(store.consent(consent.id) for _ in range(10)))
            assert terminate(name) == 4
            assert await asyncio.gather(*(store.consent(consent.id) for _ in range(10))) == [consent] * 10

    asyncio.run(run())


def test_a_server_that_is_gone_is_unavailable_and_passes() -> None:
    """Nobody may connect: reads and commands are refused in time; when they may again, all goes on."""

    async def run() -> None:
        name = new_database()
        async with opened(name) as store:
            await store.record([draft()])
            execute("postgres", f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            with cluster().connect() as stranger:
                stranger.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await store.log_position()
                with pytest.raises(Unavailable):
                    await store.record([draft()])
            execute("postgres", f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await store.record([draft()])
            assert (await store.log_position()).size == 2

    asyncio.run(run())


def test_a_read_that_is_cancelled_gives_its_connection_up() -> None:
    """Its caller went away while the server had stopped: that takes no time, the connection is closed and not handed to the next
    one with an answer under way, and there is room for another."""

    async def run() -> None:
        name = new_database()
        async with opened(name, read_connections=1) as store:
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            with cluster().connect(name) as stranger:
                stranger.execute("BEGIN")
                stranger.execute("LOCK TABLE custody.consents IN ACCESS EXCLUSIVE MODE")
                reading = asyncio.create_task(store.consent(consent.id))
                await until(lambda: backends(name, condition="wait_event_type = 'Lock'"))
                (pid,) = backends(name, condition="wait_event_type = 'Lock'")
                os.kill(pid, signal.SIGSTOP)
                reading.cancel()
                began = time.monotonic()
                try:
                    with pytest.raises(asyncio.CancelledError):
                        await reading
                    assert time.monotonic() - began < 1
                finally:
                    os.kill(pid, signal.SIGCONT)
            await until(lambda: pid not in backends(name))
            assert await store.consent(consent.id) == consent

    asyncio.run(run())


def test_a_row_that_cannot_be_read_costs_no_connection() -> None:
    """Corrupt comes out as it is, and the connection is used again."""

    async def run() -> None:
        name = new_database()
        async with opened(name, read_connections=1) as store:
            consent = active_consent()
            await store.claim_consent(consent, new_claim(), draft())
            execute(name, "UPDATE custody.consents SET purposes = '{}'")
            for _ in range(3):
                with pytest.raises(Corrupt):
                    await store.consent(consent.id)
            assert len(backends(name)) == 2

    asyncio.run(run())


def test_no_reader_outlives_the_writers_connection() -> None:
    """When the writer has found its connection lost, the readers' may lead to a server that is none any more: they are replaced."""

    async def run() -> None:
        name = new_database()
        async with faulty(name) as (store, database):
            await store.log_position()
            (before,) = set(backends(name)) - {database.first.driver.info.backend_pid}
            database.first.driver.close()
            await store.record([draft()])
            await store.log_position()
            await until(lambda: before not in backends(name))

    asyncio.run(run())


def test_a_query_of_many_statements_reads_each_once() -> None:
    """A query is run again for each of its statements; each is asked of the database once, and what it answers is in order."""

    async def run() -> None:
        async with opened(new_database()) as store:
            runs = []

            def query(connection: Connection) -> list[int]:
                runs.append(1)
                return [
                    int(connection.rows(_one(f"SELECT {number} + count(*) FROM custody.instances"), {})[0][0])
                    for number in range(5)
                ]

            assert await store._read(query) == [1, 2, 3, 4, 5]
            assert len(runs) == 6

    asyncio.run(run())


def test_after_close_nothing_is_read_and_nothing_is_open() -> None:
    """A closed store says so, and leaves no connection behind."""

    async def run() -> None:
        name = new_database()
        async with opened(name) as store:
            await asyncio.gather(*(store.log_position() for _ in range(10)))
        with pytest.raises(Unavailable, match="closed"):
            await store.log_position()
        await until(lambda: not backends(name))

    asyncio.run(run())
