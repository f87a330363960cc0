"""The store: SQLite behind `sidecar.ports.Store`. See docs/store.md."""

from sidecar.store.errors import StoreRefused
from sidecar.store.store import SqliteStore

__all__ = ["SqliteStore", "StoreRefused"]
