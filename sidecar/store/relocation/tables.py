"""Every table that moves, in an order in which foreign keys hold, read page by page in the order of its key.

Rules: which tables and columns there are is taken from the schema alone, so a new one moves without a word here. Both databases
order keys by their bytes. A row has one canonical encoding, whatever database it comes from: each value by its kind, its length
where it has one, and its bytes; nothing is converted, so a value of another kind is another row.
"""

import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256

from sqlalchemy import func, select, tuple_
from sqlalchemy.sql.schema import Table

from sidecar.errors import Corrupt
from sidecar.store.schema import INSTANCES, METADATA, RELOCATIONS
from sidecar.store.statements import Connection, Row, SqlDialect, Statement, Value, named

__all__ = ["Digest", "MovingTable", "RenamedInstance", "moving_tables"]

_NULL = b"\x00"
_NUMBER = struct.Struct(">Bq")  # kind 1
_LENGTH = struct.Struct(">BQ")  # kind 2 text, 3 bytes; the length of what follows


def moving_tables() -> Sequence[Table]:
    """All but `relocations`, whose rows are of the one database that they stand in."""
    return [table for table in METADATA.sorted_tables if table is not RELOCATIONS]


class MovingTable:
    """One table in one database."""

    def __init__(self, table: Table, dialect: SqlDialect) -> None:
        keys = list(table.primary_key.columns)
        self.name = table.name
        self.columns = tuple(column.name for column in table.columns)
        self.key = tuple(column.name for column in keys)
        self._places = [self.columns.index(name) for name in self.key]
        at = tuple_(*(named(f"at_{name}") for name in self.key))
        page = select(*table.columns).order_by(*keys).limit(named("limit"))
        self._first = Statement(page, dialect)
        self._after = Statement(page.where(tuple_(*keys) > at), dialect)
        self._last = Statement(select(*keys).order_by(*(key.desc() for key in keys)).limit(1), dialect)
        self._count = Statement(select(func.count()).select_from(table), dialect)
        self._count_until = Statement(select(func.count()).select_from(table).where(tuple_(*keys) <= at), dialect)

    def pages(self, connection: Connection, *, after: Row | None, size: int) -> Iterator[Sequence[Row]]:
        """Rows behind the key `after`, in the order of the key, none of the pages empty."""
        while rows := self._page(connection, after, size):
            yield rows
            after = self.key_of(rows[-1])

    def rows(self, connection: Connection, *, page_size: int) -> Iterator[Row]:
        for page in self.pages(connection, after=None, size=page_size):
            yield from page

    def last_key(self, connection: Connection) -> Row | None:
        """The greatest, None in an empty table."""
        return next(iter(connection.rows(self._last, {})), None)

    def count(self, connection: Connection, *, until: Row | None = None) -> int:
        """How many rows there are, or how many up to and with the key `until`."""
        ((count,),) = (
            connection.rows(self._count, {})
            if until is None
            else connection.rows(self._count_until, self._position(until))
        )
        return int(count)

    def key_of(self, row: Row) -> Row:
        return tuple([row[place] for place in self._places])

    def _page(self, connection: Connection, after: Row | None, size: int) -> Sequence[Row]:
        if after is None:
            return connection.rows(self._first, {"limit": size})
        return connection.rows(self._after, {**self._position(after), "limit": size})

    def _position(self, key: Row) -> dict[str, Value]:
        return {f"at_{name}": value for name, value in zip(self.key, key, strict=True)}


class RenamedInstance(MovingTable):
    """`instances` of a file, which has one row: under the name that this instance has where it moves to."""

    def __init__(self, dialect: SqlDialect, *, name: str) -> None:
        super().__init__(INSTANCES, dialect)
        self._name = name

    def count(self, connection: Connection, *, until: Row | None = None) -> int:  # noqa: ARG002 - it is before any key
        return super().count(connection)

    def _page(self, connection: Connection, after: Row | None, size: int) -> Sequence[Row]:
        if after is not None:
            return ()
        return [self._renamed(row) for row in super()._page(connection, None, size)]

    def _renamed(self, row: Row) -> Row:
        return tuple(self._name if column == "id" else value for column, value in zip(self.columns, row, strict=True))


class Digest:
    """Of the rows of a table: SHA-256 over the names of its columns and each row in canonical encoding, in the order of the key."""

    def __init__(self, table: MovingTable) -> None:
        self.count = 0
        self._hash = sha256(encoded((table.name, *table.columns)))

    def add(self, row: Row) -> None:
        self.count += 1
        self._hash.update(encoded(row))

    def hex(self) -> str:
        return self._hash.hexdigest()


def encoded(row: Row) -> bytes:
    """No two rows have the same. Raises Corrupt for a value that is none of the schema's kinds."""
    parts = [_LENGTH.pack(0, len(row))]
    for value in row:
        match value:
            case None:
                parts.append(_NULL)
            case bool():
                raise _unknown_kind()
            case int():
                parts.append(_NUMBER.pack(1, value))
            case str():
                text = value.encode()
                parts += (_LENGTH.pack(2, len(text)), text)
            case bytes():
                parts += (_LENGTH.pack(3, len(value)), value)
            case _:
                raise _unknown_kind()
    return b"".join(parts)


def _unknown_kind() -> Corrupt:
    return Corrupt("ENVELOPE_CORRUPT", "a stored value is neither number, text, bytes nor absent")
