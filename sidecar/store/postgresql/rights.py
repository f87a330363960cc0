"""What the sidecar's role may do with each table: exactly this, so a claim cannot be deleted by whoever speaks as the sidecar.

The migration grants it and the start checks it, both by this one list.
"""

from collections.abc import Mapping

__all__ = ["RIGHTS", "SCHEMA", "TABLE_RIGHTS"]

SCHEMA = "custody"

_APPENDED = frozenset({"SELECT", "INSERT"})
_CHANGED = frozenset({"SELECT", "INSERT", "UPDATE"})

RIGHTS: Mapping[str, frozenset[str]] = {
    "alembic_version": frozenset({"SELECT"}),
    "claims": _APPENDED,
    "consents": _CHANGED,
    "instances": _APPENDED,
    "limit_reservations": _CHANGED,
    "limit_windows": _CHANGED,
    "log_checkpoints": _APPENDED,
    "log_heads": _CHANGED,
    "log_leaves": _APPENDED,
    "master_keys": _CHANGED,
    "payments": _CHANGED,
    "refresh_leases": _CHANGED,
    "relocations": _APPENDED,
    "secrets": frozenset({"SELECT", "INSERT", "DELETE"}),
}
TABLE_RIGHTS = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"})
