"""The checked database: `sidecar.store.store.Database` on PostgreSQL.

Rules: one process of each instance name writes its log (a session lock in the database, and behind it the compare-and-set on
`log_heads.commits`); no migration runs beside a sidecar (the same lock of all, shared); nothing is trusted that was not checked
on this very connection: after a fail-over the server is another one.
"""

from collections.abc import Callable
from hashlib import sha256
from typing import TypeVar

import psycopg

from sidecar.errors import CustodyError
from sidecar.store.errors import StoreRefused
from sidecar.store.postgresql import errors
from sidecar.store.postgresql.address import Address
from sidecar.store.postgresql.connection import PostgresqlConnection, PostgresqlDialect
from sidecar.store.postgresql.readers import Readers
from sidecar.store.postgresql.server import check_revision, check_rights, check_role, check_schema, check_server
from sidecar.store.relocation.marks import Marks
from sidecar.store.statements import Connection

__all__ = ["SCHEMA_LOCK", "PostgresqlDatabase", "checked"]

T = TypeVar("T")


def lock_key(name: str) -> int:
    """Of an advisory lock: they are numbers, and every application of the database shares them."""
    return int.from_bytes(sha256(b"token-custody-sidecar\0" + name.encode()).digest()[:8], "big", signed=True)


SCHEMA_LOCK = lock_key("schema")


class PostgresqlDatabase:
    """Holds the instance's name from its making until `close`."""

    def __init__(self, url: str, *, instance: str, synchronous_commit: str = "on", read_connections: int = 4) -> None:
        """Blocks, for some seconds at most. Raises StoreRefused where server, role or schema is not as it must be, or where
        another process has the instance's name."""
        self.dialect = PostgresqlDialect()
        self.address = Address.of_url(url, application=f"custody {instance}")
        self.instance = instance
        self._marks = Marks(self.dialect)
        self._synchronous_commit = synchronous_commit
        self._readers = Readers(self.address, size=read_connections, synchronous_commit=synchronous_commit)
        self.first = checked(self.address, synchronous_commit=synchronous_commit)
        self._is_first = True
        try:
            self._take_name(self.first)
        except BaseException:
            self.first.close()
            raise

    def __str__(self) -> str:
        return str(self.address)

    def connect(self) -> PostgresqlConnection:
        """The writer's connection, which holds the name. Raises StoreRefused."""
        if self._is_first:  # it has the name already, and nobody can have taken it since
            self._is_first = False
            return self.first
        self._readers.renew()
        connection = PostgresqlConnection.open(self.address, synchronous_commit=self._synchronous_commit)
        try:
            check_server(connection, where=str(self))
            self._take_name(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def read(self, query: Callable[[Connection], T]) -> T:
        try:
            return await self._readers.read(query)
        except psycopg.Error as error:
            raise self.our_error(error) from error

    async def close(self) -> None:
        await self._readers.close()
        self.first.close()

    @property
    def driver_error(self) -> type[Exception]:
        return psycopg.Error

    def check_unchanged(self) -> None:
        """Nothing: a server is no file that could be replaced under a connection."""

    def our_error(self, error: Exception) -> CustodyError:
        return errors.our_error(error)

    def spoils_transaction(self, error: Exception) -> bool:
        return errors.spoils_transaction(error)

    def is_conflict(self, error: Exception) -> bool:
        return errors.is_conflict(error)

    def is_disconnect(self, error: Exception) -> bool:
        return errors.is_disconnect(error)

    def _take_name(self, connection: PostgresqlConnection) -> None:
        """Waits as long as for any lock: the connection before may not have ended yet."""
        try:
            connection.driver.execute("SELECT pg_advisory_lock_shared(%s)", (SCHEMA_LOCK,))
        except psycopg.errors.LockNotAvailable as error:
            raise StoreRefused("a migration of the database is under way", path=str(self)) from error
        try:
            connection.driver.execute("SELECT pg_advisory_lock(%s)", (lock_key(f"instance {self.instance}"),))
        except psycopg.errors.LockNotAvailable as error:
            raise StoreRefused(
                f"another sidecar uses this database under the name {self.instance}; stop it or give this one its own",
                path=str(self),
            ) from error
        self._marks.check_may_be_used(connection, where=str(self))


def checked(address: Address, *, synchronous_commit: str) -> PostgresqlConnection:
    """A connection to a database that is as it must be. Raises StoreRefused."""
    where = str(address)
    connection = PostgresqlConnection.open(address, synchronous_commit=synchronous_commit)
    try:
        check_server(connection, where=where)
        check_revision(connection, where=where)
        check_role(connection, where=where)
        check_schema(connection, where=where)
        check_rights(connection, where=where)
    except psycopg.Error as error:
        connection.close()
        raise StoreRefused("the database cannot be read", path=where) from error
    except BaseException:
        connection.close()
        raise
    return connection
