"""The SQLite file that a vault moves out of.

Rules: as long as this is open, the file's lock is held, so no sidecar writes; everything is read in one read transaction, which
would not see a stranger's writes either. What the write-ahead log still holds after a crash belongs to the vault: it is moved
into the file first (a file opened as `immutable` would be read without it).
"""

import contextlib
import sqlite3
from pathlib import Path

from sidecar.audit.errors import LogCorrupt
from sidecar.store.errors import StoreRefused
from sidecar.store.log import LogState, LogTables
from sidecar.store.relocation.marks import Mark, Marks
from sidecar.store.relocation.tables import MovingTable, RenamedInstance, moving_tables
from sidecar.store.schema import INSTANCES
from sidecar.store.sqlite import FileLock, SqliteDatabase, check_file

__all__ = ["Source"]


class Source:
    """`tables` are read on `connection`, as they shall stand in the target."""

    def __init__(self, path: Path, *, instance: str) -> None:
        """Raises StoreRefused where the file is not as a sidecar would need it, or where one runs on it."""
        self._lock = _locked(check_file(path))
        self._open = contextlib.ExitStack()
        self._open.callback(self._lock.release)
        try:
            self._database = SqliteDatabase(path)
            self._marks = Marks(self._database.dialect)
            self._log = LogTables(self._database.dialect)
            self.tables = self._tables(instance)
            self._settle()
            self.connection = self._database.connect(read_only=True)
            self._open.callback(self.connection.close)
            self.connection.driver.execute("BEGIN")
            self.log = self._checked_log()
            self.mark = self._marks.newest(self.connection)
        except sqlite3.Error as error:
            self.close()
            raise StoreRefused("the file cannot be read", path=path) from error
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self._database)

    @property
    def origin(self) -> str:
        return self.log.head.origin

    def close(self) -> None:
        self._open.close()

    def add_mark(self, mark: Mark) -> None:
        """Durable when this returns, in the file itself."""
        self._database.check_unchanged()
        self.connection.driver.execute("ROLLBACK")  # a reader would be in the way of the flush
        with contextlib.closing(self._database.connect()) as connection:
            connection.begin()
            self._marks.add(connection, mark)
            connection.commit()
            connection.flush()
        self.connection.driver.execute("BEGIN")
        self.mark = mark

    def _tables(self, instance: str) -> list[MovingTable]:
        dialect = self._database.dialect
        return [
            RenamedInstance(dialect, name=instance) if table is INSTANCES else MovingTable(table, dialect)
            for table in moving_tables()
        ]

    def _settle(self) -> None:
        """Also a mark whose commit was not answered is on disk from here on."""
        with contextlib.closing(self._database.connect()) as connection:
            connection.flush()

    def _checked_log(self) -> LogState:
        origins = list(self._log.origins(self.connection).values())
        if len(origins) != 1:
            raise StoreRefused("the file holds no vault: no sidecar has used it yet", path=str(self))
        try:
            state = self._log.state(self.connection, origins[0])
            self._log.check_end(self.connection, state)
        except LogCorrupt as error:
            raise StoreRefused(f"{error.message}; nothing was migrated", path=str(self)) from error
        return state


def _locked(path: Path) -> FileLock:
    try:
        return FileLock(path)
    except StoreRefused as refused:
        if isinstance(refused.__cause__, BlockingIOError):
            raise StoreRefused("a sidecar, or another migration, uses the file; stop it first", path=path) from refused
        raise
