"""SQL is written with SQLAlchemy Core, compiled once, and run on the driver's connection itself.

Why not SQLAlchemy's own connection: its work per statement costs several times that of an indexed SQLite read, on the hot path.
The driver keeps the prepared form by the text, so a text that never varies is prepared once.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from sqlalchemy import BindParameter, Column, bindparam, literal_column, select, text
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import Insert
from sqlalchemy.sql.expression import ClauseElement
from sqlalchemy.sql.schema import Table

__all__ = ["Connection", "Listing", "Row", "SqlDialect", "Statement", "Value", "named"]

Value = int | str | bytes | None
Row = tuple[Any, ...]  # as the database gives it; rows.py checks every value


class Connection(Protocol):
    """One database connection, used by one thread. Lets out the driver's own errors; its callers turn them into ours."""

    def change(self, statement: "Statement", values: Mapping[str, Value]) -> int:
        """How many rows were written."""

    def rows(self, statement: "Statement", values: Mapping[str, Value]) -> Sequence[Row]: ...


class SqlDialect(Protocol):
    """What differs between databases in the text of SQL. The rest of a database's habits are in its own module."""

    @property
    def core(self) -> Dialect: ...

    @property
    def schema(self) -> str | None:
        """The schema that every table's name is qualified with, where the database has schemas."""

    def insert_unless_there(self, table: Table) -> Insert:
        """Inserts a row, or nothing where the primary key is taken."""

    def insert_unless_taken(self, table: Table) -> Insert:
        """Inserts a row, or nothing where anything of it that must be unique is taken."""

    def without_index(self, column: str) -> str:
        """The column as SQL, so that no index on it is chosen where another one sorts."""


def named(name: str) -> BindParameter[Any]:
    """A value that is given when the statement runs."""
    return bindparam(name, required=False)


class Statement:
    """One statement in the database's dialect. Running it without one of its values is a KeyError: nothing defaults to NULL."""

    __slots__ = ("_fixed", "_names", "text")

    def __init__(self, element: ClauseElement, dialect: SqlDialect) -> None:
        compiled = element.compile(
            dialect=dialect.core,
            schema_translate_map={None: dialect.schema} if dialect.schema else None,
            render_schema_translate=bool(dialect.schema),
            compile_kwargs={"render_postcompile": True},
        )
        assert isinstance(compiled, SQLCompiler)
        self.text = str(compiled)
        self._names = tuple(compiled.positiontup or ())
        self._fixed = {name: value for name, value in compiled.params.items() if value is not None}

    def bind(self, values: Mapping[str, Value]) -> tuple[Value, ...]:
        fixed = self._fixed
        return tuple([fixed[name] if name in fixed else values[name] for name in self._names])


class Listing:
    """A page of a table that has the columns `id` and `state`, by ascending id. Compiled once for each combination of filters."""

    def __init__(self, dialect: SqlDialect, columns: Sequence[Column[Any]]) -> None:
        self._dialect = dialect
        self._columns = columns
        self._compiled: dict[tuple[tuple[str, ...], tuple[str, ...] | None, tuple[str, ...]], Statement] = {}

    def rows(
        self,
        connection: Connection,
        equal: Mapping[str, Value],
        states: Iterable[StrEnum] | None,
        *,
        extra: tuple[str, ...] = (),
        after: str,
        limit: int,
    ) -> Sequence[Row]:
        """Rows whose columns equal the values of `equal` (None means any) and whose state is one of `states`.

        `extra` are conditions of ours in SQL.
        """
        given = {name: value for name, value in equal.items() if value is not None}
        chosen = None if states is None else tuple(sorted(state.value for state in states))
        key = tuple(given), chosen, extra
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        return connection.rows(self._compiled[key], {**given, "after": after, "limit": limit})

    def _compile(self, given: tuple[str, ...], states: tuple[str, ...] | None, extra: tuple[str, ...]) -> Statement:
        column = {column.name: column for column in self._columns}
        conditions = [column[name] == named(name) for name in given]
        if states is not None:
            # Whose rows they are says more than their state, so no index on the state is to be taken then.
            state = literal_column(self._dialect.without_index("state")) if given else column["state"]
            # Written out: a plan for all values could not know that a partial index of these states will do.
            conditions.append(state.in_([literal_column(f"'{each}'") for each in states]))
        page = select(*self._columns).where(column["id"] > named("after"), *conditions, *map(text, extra))
        return Statement(page.order_by(column["id"]).limit(named("limit")), self._dialect)
