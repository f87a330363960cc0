"""The store: SQLite and PostgreSQL behind `sidecar.ports.Store`. See docs/store.md."""

from sidecar.store.errors import StoreRefused
from sidecar.store.store import PostgresqlStore, SqliteStore

__all__ = ["PostgresqlStore", "SqliteStore", "StoreRefused"]
