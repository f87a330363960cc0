"""Master keys, wrapped by the root key. Exactly one is current; the others only open what was sealed under them."""

from collections.abc import Sequence
from typing import NoReturn

from sqlalchemy import select, update

from sidecar.errors import Internal, StaleVersion
from sidecar.ports import MasterKeyRecord
from sidecar.store.rows import master_key_of, to_microseconds
from sidecar.store.schema import MASTER_KEYS
from sidecar.store.statements import Connection, SqlDialect, Statement, Value, named

__all__ = ["MasterKeyTable"]


class MasterKeyTable:
    def __init__(self, dialect: SqlDialect) -> None:
        table = MASTER_KEYS
        self._retire = Statement(update(table).where(table.c.current == 1).values(current=0), dialect)
        self._lock = Statement(select(table.c.version).where(table.c.current == 1).with_for_update(), dialect)
        # Whatever is taken: when two make the first key at once, either constraint may be the one that notices.
        self._insert = Statement(dialect.insert_unless_taken(table), dialect)
        self._version = Statement(select(table.c.version).where(table.c.key_id == named("key_id")), dialect)
        self._all = Statement(select(table).order_by(table.c.version), dialect)

    def add(self, connection: Connection, record: MasterKeyRecord) -> None:
        """A current record takes the place of the one before. Raises StaleVersion when the version exists, or another
        sidecar has made the first one meanwhile."""
        if record.current:
            # Waits for another sidecar that does the same; what that one has made current is then seen.
            connection.rows(self._lock, {})
            connection.change(self._retire, {})
        values: dict[str, Value] = {
            "version": record.version,
            "key_id": record.key_id,
            "wrapped": record.wrapped,
            "root_key_id": record.root_key_id,
            "current": int(record.current),
            "create_time": to_microseconds(record.create_time),
        }
        if connection.change(self._insert, values) != 1:
            self._refuse(connection, record)

    def _refuse(self, connection: Connection, record: MasterKeyRecord) -> NoReturn:
        if any(version != record.version for (version,) in connection.rows(self._version, {"key_id": record.key_id})):
            raise Internal("a master key has one version")
        raise StaleVersion

    def all(self, connection: Connection) -> Sequence[MasterKeyRecord]:
        return [master_key_of(row) for row in connection.rows(self._all, {})]
