"""What tests of the store on PostgreSQL share: one scratch server a run, a migrated database for each test, and faults."""

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

import psycopg

from sidecar.ports import CheckpointSigner, Clock
from sidecar.store.migrate import migrate_postgresql
from sidecar.store.postgresql import PostgresqlStore
from sidecar.store.postgresql.connection import PostgresqlConnection
from sidecar.store.postgresql.database import PostgresqlDatabase
from sidecar.store.statements import Row, Value
from sidecar.store.store import instance_origin
from tests.fakes.store import HandClock, SoftwareSigner
from tools.postgresql.cluster import OWNER, SIDECAR, ScratchCluster


@cache
def cluster() -> ScratchCluster:
    made = ScratchCluster.create()
    atexit.register(made.remove)
    return made


@cache
def _template() -> str:
    return migrated_on(cluster())


def migrated_on(server: ScratchCluster) -> str:
    name = server.create_database()
    migrate_postgresql(server.url(name, role=OWNER), grant=SIDECAR)
    return name


def new_database() -> str:
    """The name of a migrated, empty database."""
    return cluster().create_database(template=_template())


def url_of(database: str, *, role: str = SIDECAR) -> str:
    return cluster().url(database, role=role)


def execute(database: str, *statements: str) -> list[tuple[Any, ...]]:
    """As superuser, behind the sidecar's back, with all triggers off. The rows of the last statement."""
    with cluster().connect(database) as connection:
        connection.execute("SET session_replication_role = replica")
        cursor = None
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor is not None and cursor.description else []


def backends(database: str, *, condition: str = "true") -> list[int]:
    """Process ids of the sidecars' connections to this database."""
    rows = execute(
        database,
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'custody%'"
        f" AND {condition}",
    )
    return [pid for (pid,) in rows]


def terminate(database: str, *, condition: str = "true") -> int:
    """Ends the sidecars' connections; answers how many there were."""
    pids = backends(database, condition=condition)
    execute(database, *(f"SELECT pg_terminate_backend({pid}, 5000)" for pid in pids))
    return len(pids)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def opened(
    database: str,
    *,
    url: str | None = None,
    instance: str = "pod-1",
    signer: CheckpointSigner | None = None,
    clock: Clock | None = None,
    linger_seconds: float = 0.002,
    read_connections: int = 4,
    alarm: Callable[[str], None] = lambda event: None,
) -> AsyncIterator[PostgresqlStore]:
    store = await PostgresqlStore.open(
        url=url or url_of(database),
        instance=instance,
        cluster="test",
        signer=signer or SoftwareSigner(),
        clock=clock or HandClock(),
        linger_seconds=linger_seconds,
        read_connections=read_connections,
        alarm=alarm,
    )
    try:
        yield store
    finally:
        await store.close()


Fault = Callable[["FaultyConnection", str], None]


class FaultyConnection(PostgresqlConnection):
    """Tells `database` of each statement, which may do something else in its place."""

    database: "FaultyDatabase"

    def _execute(self, text: str, values: tuple[Value, ...] | None = None) -> "psycopg.Cursor[Row]":
        self.database.before(self, text)
        return super()._execute(text, values)

    def really(self, text: str) -> None:
        """Past all faults."""
        self.driver.execute(text)

    def fails_with(self, code: str) -> None:
        """The server raises this error here, and its transaction has failed."""
        self.really(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$")


class FaultyDatabase(PostgresqlDatabase):
    """`fault`, where it is set, is called before each of the writer's statements; `statements` are those that were asked for."""

    fault: Fault | None = None
    statements: list[str]

    def __init__(self, name: str, *, url: str | None = None, instance: str = "pod-1") -> None:
        super().__init__(url or url_of(name), instance=instance)
        self.name = name
        self.first = self._faulty(self.first)
        self.statements = []
        self.connections = 0

    def connect(self) -> PostgresqlConnection:
        self.connections += 1
        connection = super().connect()
        return connection if isinstance(connection, FaultyConnection) else self._faulty(connection)

    def before(self, connection: FaultyConnection, text: str) -> None:
        self.statements.append(text)
        if self.fault is not None:
            self.fault(connection, text)

    def _faulty(self, connection: PostgresqlConnection) -> FaultyConnection:
        faulty = FaultyConnection(connection.driver)
        faulty.database = self
        return faulty


@contextlib.asynccontextmanager
async def faulty(
    database: str,
    *,
    url: str | None = None,
    instance: str = "pod-1",
    signer: CheckpointSigner | None = None,
    linger_seconds: float = 0.002,
    alarm: Callable[[str], None] = lambda event: None,
) -> AsyncIterator[tuple[PostgresqlStore, FaultyDatabase]]:
    checked = FaultyDatabase(database, url=url, instance=instance)
    clock = HandClock()
    origin = instance_origin(checked, checked.first, cluster="test", clock=clock, name=instance)
    checked.statements.clear()
    store = PostgresqlStore(
        database=checked,
        origin=origin,
        signer=signer or SoftwareSigner(),
        clock=clock,
        linger_seconds=linger_seconds,
        alarm=alarm,
    )
    try:
        yield store, checked
    finally:
        checked.fault = None
        await store.close()
