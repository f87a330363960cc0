"""The writer's connection, with its settings proven; and the session that a reader has too.

Rules: explicit transactions at READ COMMITTED, where every change is a compare-and-set and what must be unique is a constraint;
`synchronous_commit` is forced; every wait is bounded, by the server and, where it is silent, by us; COMMIT has happened only
where the server says COMMIT, and no warning casts doubt on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8Dumper
from sqlalchemy.dialects import postgresql as core_postgresql
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.dml import Insert
from sqlalchemy.sql.schema import Table

from sidecar.store.errors import StoreRefused
from sidecar.store.postgresql.address import Address
from sidecar.store.postgresql.errors import connection_refused, is_lock_timeout
from sidecar.store.postgresql.rights import SCHEMA
from sidecar.store.statements import Row, Statement, Value

__all__ = ["SET_ALL", "PostgresqlConnection", "PostgresqlDialect", "adapt", "check_settings", "session_settings"]

LOCK_SECONDS = 2  # only another sidecar with the same row, or a stranger, can make us wait
STATEMENT_SECONDS = 5
IDLE_SECONDS = 10  # longer than a signature may take, which is made inside the transaction
_SILENCE_SECONDS = 8.0  # longer than the server's own limits: it has stopped, or the network swallows what it says

RV = TypeVar("RV")


_SAVE, _RELEASE = "SAVEPOINT command", "RELEASE SAVEPOINT command"


class PostgresqlDialect:
    schema: str | None = SCHEMA

    def __init__(self) -> None:
        self.core: Dialect = core_postgresql.dialect(paramstyle="format")  # type: ignore[no-untyped-call]

    def insert_unless_there(self, table: Table) -> Insert:
        return core_postgresql.insert(table).on_conflict_do_nothing(index_elements=list(table.primary_key.columns))

    def insert_unless_taken(self, table: Table) -> Insert:
        return core_postgresql.insert(table).on_conflict_do_nothing()

    def without_index(self, column: str) -> str:
        return column  # its planner knows by itself which index sorts


def adapt(connection: "psycopg.BaseConnection[Any]") -> None:
    """Every number is a bigint, as in the tables: else its size would choose another prepared statement."""
    connection.adapters.register_dumper(int, Int8Dumper)


# So that the server, too, notices a dead sidecar: until then its connection has the instance's name.
_KEEPALIVES = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


def session_settings(address: Address, *, synchronous_commit: str, read_only: bool) -> dict[str, str]:
    """As the server says them once they are set. `pg_temp` comes last, so that no temporary table is taken for ours."""
    own = {"default_transaction_read_only": "on"} if read_only else {}  # what makes a writer read-only is not overruled
    return {
        **own,
        **({} if address.is_local else _KEEPALIVES),
        "search_path": f"pg_catalog, {SCHEMA}, pg_temp",
        "synchronous_commit": synchronous_commit,
        "default_transaction_isolation": "read committed",
        "lock_timeout": f"{LOCK_SECONDS}s",
        "statement_timeout": f"{STATEMENT_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
    }


SET_ALL = "SELECT name, set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS wanted (name, value)"


def check_settings(wanted: Mapping[str, str], found: Sequence[Row], *, where: str) -> None:
    """Each setting is read back. Raises StoreRefused for one that the server does not take."""
    taken: dict[str, str] = dict(found)
    for name, value in wanted.items():
        if taken.get(name) != value:
            raise StoreRefused(f"the database does not take the setting {name} = {value}", path=where)


class _BoundedConnection(psycopg.Connection[Row]):
    """Gives a silent server up: an answer that never comes would hold the writer for ever."""

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        return super().wait(gen, interval, _SILENCE_SECONDS if timeout is None else timeout)


class PostgresqlConnection:
    """One connection; used by one thread at a time. Lets out psycopg's errors, see `sidecar.store.postgresql.errors`."""

    @classmethod
    def open(cls, address: Address, *, synchronous_commit: str, read_only: bool = False) -> Self:
        """Raises StoreRefused where there is no server, or one that does not take the settings."""
        try:
            driver = _BoundedConnection.connect(**address.parameters, autocommit=True)  # type: ignore[arg-type]
        except psycopg.Error as error:
            raise connection_refused(error, where=str(address)) from error
        try:
            adapt(driver)
            wanted = session_settings(address, synchronous_commit=synchronous_commit, read_only=read_only)
            found = driver.execute(SET_ALL, (list(wanted), list(wanted.values()))).fetchall()
            check_settings(wanted, found, where=str(address))
        except psycopg.Error as error:
            driver.close()
            raise StoreRefused("the database does not take the sidecar's settings", path=str(address)) from error
        except BaseException:
            driver.close()
            raise
        return cls(driver)

    def __init__(self, driver: "psycopg.Connection[Row]") -> None:
        self.driver = driver
        self._cursor = driver.cursor(binary=True)
        self._control = driver.cursor()  # without parameters or binary answers: more than one statement in a message
        self._is_kept = False
        self._warned = False
        self._waited = False
        driver.add_notice_handler(self._note)

    def change(self, statement: Statement, values: Mapping[str, Value]) -> int:
        return self._execute(statement.text, statement.bind(values)).rowcount

    def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        return self._execute(statement.text, statement.bind(values)).fetchall()

    def begin(self) -> None:
        self._waited = self._is_kept = False
        self._execute("BEGIN ISOLATION LEVEL READ COMMITTED")

    def commit(self) -> None:
        self._warned = False
        tag = self._execute("COMMIT").statusmessage
        if tag != "COMMIT":  # the answer to COMMIT in a transaction that has failed is ROLLBACK, and no error
            raise psycopg.OperationalError("the transaction was rolled back")
        if self._warned:  # such as: the wait for a synchronous standby was given up
            raise psycopg.OperationalError("the server warns of this commit")

    def roll_back(self) -> None:
        """Also after the connection was lost, or while the server has not answered yet."""
        match self.driver.info.transaction_status:
            case TransactionStatus.INTRANS | TransactionStatus.INERROR:
                self._execute("ROLLBACK")
            case TransactionStatus.ACTIVE:
                self.driver.close()

    def save(self) -> None:
        self._execute(f"{_RELEASE}; {_SAVE}" if self._is_kept else _SAVE)
        self._is_kept = False

    def keep(self) -> None:
        self._is_kept = True  # released on the way of the next one, or by COMMIT: a round trip less for each command

    def undo(self) -> None:
        self._execute(f"ROLLBACK TO SAVEPOINT command; {_RELEASE}")
        if self._waited:  # each of the group's other commands would wait as long for the same stranger
            self._execute("SET LOCAL lock_timeout = '50ms'")

    def flush(self) -> None:
        """Nothing: where former copies of a row lie is the server's affair (docs/store.md, Erasure)."""

    def close(self) -> None:
        self.driver.close()

    def _execute(self, text: str, values: tuple[Value, ...] | None = None) -> "psycopg.Cursor[Row]":
        try:
            if values is None:
                return self._control.execute(text, prepare=False)
            return self._cursor.execute(text, values)
        except psycopg.Error as error:
            self._waited = self._waited or is_lock_timeout(error)
            raise

    def _note(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        self._warned = self._warned or diagnostic.severity_nonlocalized == "WARNING"
