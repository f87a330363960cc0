"""What must stand in a SQLite file of revision `SCHEMA_REVISION`: every table, index and trigger, by the digest of its text.

A dropped constraint, a changed column, a foreign trigger or view: each differs from this list. A unit test makes the list anew
from the migrations and prints it where it differs.
"""

import sqlite3
from collections.abc import Mapping
from hashlib import sha256

__all__ = ["SCHEMA_OBJECTS", "fingerprints"]


def fingerprints(driver: sqlite3.Connection) -> dict[str, str]:
    """Of each object in the schema: the first 16 hex digits of SHA-256 over its table and its text."""
    objects = driver.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY type, name"
    )
    return {
        f"{kind} {name}": sha256(f"{table}\n{text}".encode()).hexdigest()[:16]
        for kind, name, table, text in objects
        if (kind, name) != ("table", "alembic_version")  # its text is Alembic's and may vary with it
    }


SCHEMA_OBJECTS: Mapping[str, str] = {
    "index consents_by_caller": "ef951f5d7fb896fa",
    "index consents_by_expiry": "1fea160d4e2e8eed",
    "index consents_by_owner": "8c9739347da99d1d",
    "index consents_by_refresh_time": "1b68858876c8f768",
    "index consents_by_token_expiry": "f4eab4cdcf745e6e",
    "index consents_holding_key": "d8ae99a6d79332cf",
    "index one_current_master_key": "4fa3cf8c1223435d",
    "index payments_by_caller": "4caa451f535856e9",
    "index payments_by_consent": "967f0e228b65e7d2",
    "index payments_by_owner": "3f9c66de4945146f",
    "index payments_by_state": "e27a375ed6951f6a",
    "index payments_due_others": "875d327c8dd5611f",
    "index payments_due_unknown": "7c7ed757ed41cf08",
    "index refresh_leases_unresolved": "57165440cd17090e",
    "table claims": "ca094d0cd3e6184a",
    "table consents": "7389beee70cb7466",
    "table instances": "74c39f8c1d3fb26e",
    "table limit_reservations": "74cfb2117016e2c9",
    "table limit_windows": "180fe4a43907d606",
    "table log_checkpoints": "50bc508e10f4967f",
    "table log_heads": "fadef445d8328286",
    "table log_leaves": "8f96b81ae795cd76",
    "table master_keys": "c493d689449689dc",
    "table payments": "4a4e3b7da5869d8b",
    "table refresh_leases": "8b526d2f3330ef53",
    "table relocations": "09674c47cbd077dc",
    "table secrets": "95d991da2935d426",
    "trigger claims_fixed": "a5dc9007ae79a6fc",
    "trigger claims_stay": "a8bcdb8f4fd6ebd4",
    "trigger consents_identity": "35b9e1c24c1ab0d7",
    "trigger consents_limits": "d8306db48f5fe2ab",
    "trigger consents_revoked": "5e167d7a23c2421d",
    "trigger consents_stay": "4982c9d2faa827bd",
    "trigger consents_version": "2bbbe44ea847e893",
    "trigger instances_fixed": "8f84e3edaddf8ba4",
    "trigger instances_stay": "c8a02eeda9746c79",
    "trigger limit_reservations_fixed": "9e865a0011b04978",
    "trigger limit_reservations_released": "a351d27ce79c59a9",
    "trigger limit_reservations_stay": "67816e155ba39ba1",
    "trigger limit_windows_fixed": "61ac2434df498c2d",
    "trigger limit_windows_stay": "1da95232f104183d",
    "trigger log_checkpoints_fixed": "ed7e7e60ee64b895",
    "trigger log_checkpoints_stay": "b6d32e86fa2dc4ac",
    "trigger log_heads_grow": "cdb01219b656bed2",
    "trigger log_heads_stay": "c61f4560219d4f83",
    "trigger log_leaves_fixed": "33ce7a89c08d4862",
    "trigger log_leaves_stay": "690980ce2ca5d680",
    "trigger payments_epoch": "a2214e508ec70524",
    "trigger payments_final": "4b96421e0fc31e67",
    "trigger payments_instruction": "fc01cd1f7e4559e4",
    "trigger payments_resolution": "9dc0188d5c8498af",
    "trigger payments_resolution_fixed": "b1066cf820ac55ab",
    "trigger payments_resolved": "ac2e9f2556c6511f",
    "trigger payments_stay": "af94a9539644776d",
    "trigger relocations_fixed": "ac908d6a48a827ca",
    "trigger relocations_stay": "96cea0d7fb18e0a3",
}
