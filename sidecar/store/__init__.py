"""The store: SQLite behind `sidecar.ports.Store`, and in `sidecar.store.postgresql` PostgreSQL. See docs/store.md."""

from sidecar.store.errors import StoreRefused
from sidecar.store.store import SqliteStore, SqlStore

__all__ = ["SqlStore", "SqliteStore", "StoreRefused"]
