"""All that is SQLite: the file and who may touch it, the connection and its settings, what its errors mean.

Rules: a committed transaction survives a power cut (WAL with synchronous FULL, read back on every connection); one sidecar has
the file (a lock beside it); nobody else can read it (mode 0600, a directory that not everybody may write to); the schema is
exactly the one that our migrations make, so no constraint is missing and no trigger or view of others is in the way.
"""

import ctypes
import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy.dialects import sqlite as core_sqlite
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.dml import Insert
from sqlalchemy.sql.schema import Table

from sidecar.errors import Corrupt, CustodyError, Internal, Unavailable
from sidecar.store.errors import RESTORING, StoreRefused
from sidecar.store.fingerprint import SCHEMA_OBJECTS, fingerprints
from sidecar.store.schema import SCHEMA_REVISION
from sidecar.store.statements import Connection, Row, Statement, Value

__all__ = [
    "FileLock",
    "SqliteConnection",
    "SqliteDatabase",
    "SqliteDialect",
    "create_file",
    "our_error",
    "path_of_url",
    "stored_revision",
]

APPLICATION_ID = 0x43555354  # "CUST": tells our files from other SQLite files
_OLDEST_SQLITE = (3, 37, 0)  # STRICT tables
_BUSY_SECONDS = 2.0  # only a stranger with the same file can make us wait
_SYNCHRONOUS = {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}

# linux/magic.h. Locks and shared memory do not work across machines there, and WAL needs both (sqlite.org/wal.html).
# 9P and FUSE are not in the list: sandboxed container run-times show their local disks as these.
_NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB2",
    0xFF534D42: "CIFS",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x0BD00BD0: "Lustre",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x47504653: "GPFS",
    0x73757245: "Coda",
    0x564C: "NCP",
}


T = TypeVar("T")


class SqliteDialect:
    schema: str | None = None

    def __init__(self) -> None:
        self.core: Dialect = core_sqlite.dialect(paramstyle="qmark")

    def insert_unless_there(self, table: Table) -> Insert:
        return core_sqlite.insert(table).on_conflict_do_nothing(index_elements=list(table.primary_key.columns))

    def insert_unless_taken(self, table: Table) -> Insert:
        return core_sqlite.insert(table).on_conflict_do_nothing()

    def without_index(self, column: str) -> str:
        return f"+{column}"


class SqliteConnection:
    """One connection with its settings proven; used by one thread at a time. Lets out sqlite3's errors, see `our_error`."""

    def __init__(self, path: Path, *, synchronous: str = "FULL", read_only: bool = False) -> None:
        level = _SYNCHRONOUS.get(synchronous.upper(), 0)
        if level < _SYNCHRONOUS["FULL"]:
            raise StoreRefused("synchronous must be FULL or EXTRA: with less, a power cut can undo a payment's record")
        self.driver = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self._set_up(level, read_only=read_only, path=path)
        except BaseException:
            self.driver.close()
            raise

    def change(self, statement: Statement, values: Mapping[str, Value]) -> int:
        return self.driver.execute(statement.text, statement.bind(values)).rowcount

    def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        return self.driver.execute(statement.text, statement.bind(values)).fetchall()

    def begin(self) -> None:
        self.driver.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self.driver.execute("COMMIT")

    def roll_back(self) -> None:
        """Also after an error upon which SQLite has rolled back by itself."""
        if self.driver.in_transaction:
            self.driver.execute("ROLLBACK")

    def save(self) -> None:
        self.driver.execute("SAVEPOINT command")

    def keep(self) -> None:
        self.driver.execute("RELEASE command")

    def undo(self) -> None:
        self.driver.execute("ROLLBACK TO command")
        self.driver.execute("RELEASE command")

    def flush(self) -> None:
        """Moves the write-ahead log into the file, on disk, and empties it.

        Raises OperationalError where a reader is in the way.
        """
        busy, _, _ = self.driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("the write-ahead log is in use")

    def close(self) -> None:
        self.driver.close()

    def _set_up(self, synchronous: int, *, read_only: bool, path: Path) -> None:
        self._set("busy_timeout", int(_BUSY_SECONDS * 1000), path)
        if self.driver.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StoreRefused("the database cannot use a write-ahead log here", path=path)
        self._set("synchronous", synchronous, path)
        self._set("foreign_keys", 1, path)
        self._set("trusted_schema", 0, path)
        self._set("secure_delete", 1, path)  # a destroyed key is overwritten, not only unlinked
        self._set("query_only", int(read_only), path)

    def _set(self, name: str, value: int, path: Path) -> None:
        """SQLite ignores a pragma that it does not know or cannot obey, so each is read back."""
        self.driver.execute(f"PRAGMA {name} = {value}")
        if self.driver.execute(f"PRAGMA {name}").fetchone() != (value,):
            raise StoreRefused(f"the database does not take the setting {name} = {value}", path=path)


class FileLock:
    """Held as long as a sidecar uses the database; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, database: Path) -> None:
        """Raises StoreRefused when another process holds it."""
        path = database.with_name(database.name + ".lock")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreRefused("the lock file cannot be opened", path=path) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise StoreRefused(
                "another sidecar uses this database; stop it or give this one its own", path=database
            ) from error

    def release(self) -> None:
        # The file stays: were it removed, two processes could hold locks on two files of one name.
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SqliteDatabase:
    """The checked file: `sidecar.store.store.Database` on SQLite.

    Reads run in the loop's thread on a connection of their own: an indexed read costs less than a hop to another thread would.
    """

    def __init__(self, path: Path, *, synchronous: str = "FULL") -> None:
        """Raises StoreRefused when the file, its place or its schema is not as it must be."""
        self.path = check_file(path)
        self.dialect = SqliteDialect()
        self._synchronous = synchronous
        self._identity = _identity(self.path)
        self._log_path = self.path.with_name(self.path.name + "-wal")
        self._log_identity: tuple[int, int] | None = None
        _check_revision(self.path)  # before anything is written, be it a setting: the file may not be ours
        first = self.connect()
        try:
            _check_objects(first, self.path)
        except sqlite3.Error as error:
            raise StoreRefused("the database cannot be read", path=self.path) from error
        finally:
            first.close()
        self._reader: SqliteConnection | None = None

    def __str__(self) -> str:
        return str(self.path)

    async def read(self, query: Callable[[Connection], T]) -> T:
        if self._reader is None:
            raise Unavailable("STORE_UNAVAILABLE", "the store is closed")
        try:
            return query(self._reader)
        except sqlite3.Error as error:
            raise our_error(error) from error

    def open_reader(self) -> None:
        """From its first read on, the reader keeps the write-ahead log in being, which `check_unchanged` watches."""
        self._reader = self.connect(read_only=True)
        self._reader.driver.execute("SELECT count(*) FROM sqlite_master").fetchone()

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def connect(self, *, read_only: bool = False) -> SqliteConnection:
        try:
            return SqliteConnection(self.path, synchronous=self._synchronous, read_only=read_only)
        except sqlite3.Error as error:
            raise StoreRefused("the database cannot be opened", path=self.path) from error

    @property
    def driver_error(self) -> type[Exception]:
        return sqlite3.Error

    def our_error(self, error: Exception) -> CustodyError:
        return our_error(error)

    def spoils_transaction(self, error: Exception) -> bool:
        """After a full disk, an I/O error or a broken file SQLite may have rolled all back; after a constraint it has not."""
        harmless = sqlite3.IntegrityError | sqlite3.DataError | sqlite3.InterfaceError | sqlite3.ProgrammingError
        return isinstance(error, sqlite3.Error) and not isinstance(error, harmless)

    def is_conflict(self, error: Exception) -> bool:  # noqa: ARG002 - the port's
        """Never: one transaction writes at a time."""
        return False

    def is_disconnect(self, error: Exception) -> bool:  # noqa: ARG002 - the port's
        return False

    def check_unchanged(self) -> None:
        """SQLite goes on writing into a file that was removed or replaced, and all of it would be lost.

        The write-ahead log is watched from the first time on that it is there: the store's reader keeps it in being. Raises
        Unavailable(STORE_UNAVAILABLE).
        """
        log = _identity(self._log_path)
        if self._log_identity is None:
            self._log_identity = log
        if _identity(self.path) != self._identity or log != self._log_identity:
            raise Unavailable("STORE_UNAVAILABLE", "the database file was removed or replaced; restart the sidecar")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def our_error(error: Exception) -> CustodyError:
    """What an error of sqlite3 means for a caller. Its text is not passed on: it may hold values."""
    if isinstance(
        error, sqlite3.IntegrityError | sqlite3.DataError | sqlite3.InterfaceError | sqlite3.ProgrammingError
    ):
        return Internal("a value does not fit the database")
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return Corrupt("ENVELOPE_CORRUPT", "the database is damaged")
    return Unavailable("STORE_UNAVAILABLE", "the database does not answer; try again")


def path_of_url(url: str) -> Path:
    """The file of `sqlite:////absolute/path`. Raises StoreRefused for any other URL."""
    prefix, separator, path = url.partition("sqlite:///")
    if prefix or not separator or not path.startswith("/"):
        raise StoreRefused("the database URL must have the form sqlite:////ABSOLUTE/PATH")
    return Path(path)


def create_file(path: Path) -> bool:
    """Makes an empty database file that only we can read. False when there is one already. Raises StoreRefused."""
    _check_place(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    except OSError as error:
        raise StoreRefused("the database file cannot be made", path=path) from error
    return True


def check_file(path: Path) -> Path:
    """The real path of a database file that is ours alone and stands where SQLite is safe. Raises StoreRefused."""
    _check_place(path)
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except OSError as error:
        raise StoreRefused(
            "there is no database file; make it with python -m sidecar.store.migrate", path=path
        ) from error
    _check_place(real)
    if not stat.S_ISREG(status.st_mode):
        raise StoreRefused("the database is not a regular file", path=real)
    if status.st_mode & 0o077:
        raise StoreRefused("others may read or write the database file; set its mode to 0600", path=real)
    if status.st_nlink != 1:  # a second name would have a lock file of its own
        raise StoreRefused("the database file has more than one name; remove the other hard links", path=real)
    if not os.access(real, os.R_OK | os.W_OK):
        raise StoreRefused("the database file is not readable and writable for this user", path=real)
    return real


def stored_revision(path: Path) -> str | None:
    """The revision of the schema in the file, None in an empty one. Raises StoreRefused where the file is not ours."""
    try:
        driver = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            (application,) = driver.execute("PRAGMA application_id").fetchone()
            names = {
                name for (name,) in driver.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
            }
            if application != APPLICATION_ID and (application or names):
                raise StoreRefused("the file is a database of another application", path=path)
            if "alembic_version" not in names:
                return None
            revisions = driver.execute("SELECT version_num FROM alembic_version").fetchall()
        finally:
            driver.close()
    except sqlite3.Error as error:
        raise StoreRefused("the file is not a database that can be read", path=path) from error
    if len(revisions) != 1:
        raise StoreRefused("the database does not say which schema it has", path=path)
    return str(revisions[0][0])


def _check_place(path: Path) -> None:
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreRefused("this Python's SQLite is older than 3.37")
    if ":memory:" in str(path) or not path.is_absolute():
        raise StoreRefused("the database must be a file, given by its absolute path", path=path)
    directory = path.parent
    try:
        mode = directory.stat().st_mode
        read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
    except OSError as error:
        raise StoreRefused("the directory of the database cannot be read", path=directory) from error
    if mode & stat.S_IWOTH:
        raise StoreRefused("everybody may write to the directory of the database; set its mode to 0700", path=directory)
    if read_only or not os.access(directory, os.W_OK | os.X_OK):
        raise StoreRefused("the directory of the database is read-only", path=directory)
    network = _NETWORK_FILE_SYSTEMS.get(file_system_type(directory))
    if network:
        raise StoreRefused(
            f"the database cannot be on a network file system ({network}); use a local disk", path=directory
        )


def file_system_type(path: Path) -> int:
    """The magic number of the file system that `path` is on (statfs(2)), 0 where it cannot be told."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs begins with f_type, a word
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer) != 0:
        return 0
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def _check_revision(path: Path) -> None:
    revision = stored_revision(path)
    if revision is None or revision < SCHEMA_REVISION:
        raise StoreRefused("the database has an older schema; run python -m sidecar.store.migrate", path=path)
    if revision != SCHEMA_REVISION:
        raise StoreRefused("the database has a newer schema than this sidecar knows; use a newer sidecar", path=path)


def _check_objects(connection: SqliteConnection, path: Path) -> None:
    found = fingerprints(connection.driver)
    for name in sorted(SCHEMA_OBJECTS.keys() | found.keys()):
        if name not in found:
            raise StoreRefused(f"the database lacks the {name}; {RESTORING}", path=path)
        if name not in SCHEMA_OBJECTS:
            raise StoreRefused(
                "the database has a table, index, view or trigger that is not ours; remove it", path=path
            )
        if found[name] != SCHEMA_OBJECTS[name]:
            raise StoreRefused(f"the {name} of the database is not as our migrations made it", path=path)
