"""The PostgreSQL database that a vault moves into, with the rights of a sidecar and no more.

Rules: as long as this is open, no sidecar uses the database (the lock that a migration of the schema takes, too); a page is one
transaction; what was committed is found again by the greatest key of a table, so no record of progress can contradict the rows.
"""

from collections.abc import Sequence

import psycopg
from psycopg import sql

from sidecar.store.errors import StoreRefused
from sidecar.store.log import LogTables
from sidecar.store.postgresql.address import Address
from sidecar.store.postgresql.connection import PostgresqlDialect
from sidecar.store.postgresql.database import SCHEMA_LOCK, checked
from sidecar.store.postgresql.errors import is_disconnect, is_lock_timeout
from sidecar.store.postgresql.rights import SCHEMA
from sidecar.store.relocation.marks import Mark, Marks
from sidecar.store.relocation.tables import MovingTable, moving_tables
from sidecar.store.statements import Row

__all__ = ["Target", "refusal"]


class Target:
    """`tables` are read on `connection`."""

    def __init__(self, url: str) -> None:
        """Raises StoreRefused where server, role or schema are not as a sidecar needs them, or where one is connected."""
        address = Address.of_url(url, application="custodyctl store migrate")
        self._where = str(address)
        self.connection = checked(address, synchronous_commit="on")
        try:
            self._lock()
            dialect = PostgresqlDialect()
            self.tables = [MovingTable(table, dialect) for table in moving_tables()]
            self.log = LogTables(dialect)
            self._marks = Marks(dialect)
            self.mark = self._marks.newest(self.connection)
        except psycopg.Error as error:
            self.close()
            raise refusal(error, where=self._where) from error
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return self._where

    def close(self) -> None:
        self.connection.close()

    def origins(self) -> dict[str, str]:
        """The origin of each instance's log."""
        return self.log.origins(self.connection)

    def first_filled(self) -> MovingTable | None:
        """A table that has rows."""
        filled = (table for table in self.tables if table.last_key(self.connection) is not None)
        return next(filled, None)

    def add_mark(self, mark: Mark) -> None:
        """Durable when this returns: a commit that comes with doubts is an error."""
        self.connection.begin()
        self._marks.add(self.connection, mark)
        self.connection.commit()
        self.mark = mark

    def insert(self, table: MovingTable, rows: Sequence[Row]) -> None:
        """All of them or none."""
        self.connection.begin()
        with self.connection.driver.cursor() as cursor, cursor.copy(_copy_statement(table)) as copy:
            for row in rows:
                copy.write_row(row)
        self.connection.commit()

    def _lock(self) -> None:
        """Waits as long as for any lock: the connection of a migration that was killed may not have ended yet."""
        try:
            self.connection.driver.execute("SELECT pg_advisory_lock(%s)", (SCHEMA_LOCK,))
        except psycopg.errors.LockNotAvailable as error:
            raise StoreRefused(
                "a sidecar, or another migration, uses the database; stop it first", path=self._where
            ) from error


def refusal(error: psycopg.Error, *, where: str) -> StoreRefused:
    """What an error of the database means here. Its text is not passed on: it may hold values."""
    if is_disconnect(error):
        message = "the connection to the database was lost; run the same command again, it goes on where it was"
    elif is_lock_timeout(error):
        message = (
            "somebody holds a lock in the database for too long; run the same command again, it goes on where it was"
        )
    elif (error.sqlstate or "").startswith("23"):
        message = "the database holds rows that did not come from this file; make a new database and begin anew"
    else:
        message = f"the database refused a statement ({error.sqlstate or 'no code'}); see the log of its server"
    return StoreRefused(message, path=where)


def _copy_statement(table: MovingTable) -> sql.Composed:
    columns = sql.SQL(", ").join(sql.Identifier(column) for column in table.columns)
    return sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(SCHEMA, table.name), columns)
