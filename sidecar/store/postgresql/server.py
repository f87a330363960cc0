"""Whether this server, this role and this schema can be trusted with payments.

Each check raises StoreRefused, with one message for each thing that is not as it must be.
"""

from sidecar.store.errors import RESTORING, StoreRefused
from sidecar.store.postgresql.catalogue import OBJECTS, SCHEMA_OBJECTS, fingerprints
from sidecar.store.postgresql.connection import PostgresqlConnection
from sidecar.store.postgresql.rights import RIGHTS, SCHEMA, TABLE_RIGHTS
from sidecar.store.schema import SCHEMA_REVISION
from sidecar.store.statements import Row

__all__ = ["check_revision", "check_rights", "check_role", "check_schema", "check_server", "stored_revision"]

_OLDEST_VERSION = 130000
_OLDEST_WITH_MAINTAIN = 170000

_SERVER = """
SELECT current_setting('server_version_num')::int, current_setting('server_encoding'), current_setting('fsync'),
  current_setting('full_page_writes'), current_setting('session_replication_role'), pg_catalog.pg_is_in_recovery(),
  current_setting('transaction_read_only')
"""
_ROLE = """
SELECT rolsuper, rolcreaterole, rolreplication, rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user
"""
_ROLE_NAMES = ("SUPERUSER", "CREATEROLE", "REPLICATION", "BYPASSRLS")
_MEMBERSHIPS = """
SELECT rolname FROM pg_catalog.pg_roles WHERE rolname IN ('pg_execute_server_program', 'pg_write_server_files',
  'pg_read_server_files', 'pg_write_all_data', 'pg_read_all_data')
  AND pg_has_role(current_user, oid, 'MEMBER')
"""
_OWNED = f"""
SELECT relname::text FROM pg_catalog.pg_class WHERE relnamespace = '{SCHEMA}'::regnamespace AND pg_has_role(current_user, relowner, 'MEMBER')
UNION ALL SELECT proname::text FROM pg_catalog.pg_proc WHERE pronamespace = '{SCHEMA}'::regnamespace AND pg_has_role(current_user, proowner, 'MEMBER')
UNION ALL SELECT 'the schema' FROM pg_catalog.pg_namespace WHERE nspname = '{SCHEMA}' AND pg_has_role(current_user, nspowner, 'MEMBER')
UNION ALL SELECT 'the schema' WHERE has_schema_privilege(current_user, '{SCHEMA}', 'CREATE')
UNION ALL SELECT 'the database' FROM pg_catalog.pg_database WHERE datname = current_database() AND pg_has_role(current_user, datdba, 'MEMBER')
"""  # noqa: S608, E501 - of constants
_RIGHTS = f"""
SELECT relname::text, wanted, has_table_privilege(current_user, relation.oid, wanted), has_table_privilege(current_user, relation.oid, wanted)
    OR (wanted IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES') AND has_any_column_privilege(current_user, relation.oid, wanted))
  FROM pg_catalog.pg_class relation CROSS JOIN unnest(%s::text[]) AS wanted
  WHERE relnamespace = '{SCHEMA}'::regnamespace AND relkind = 'r'
"""  # noqa: S608, E501 - of constants


def check_server(connection: PostgresqlConnection, *, where: str) -> None:
    """Asked on every connection of the writer: after a fail-over it is another server."""
    ((version, encoding, fsync, full_page_writes, replication_role, standby, read_only),) = _rows(connection, _SERVER)
    if version < _OLDEST_VERSION:
        raise StoreRefused("the server is older than PostgreSQL 13", path=where)
    if encoding != "UTF8":
        raise StoreRefused("the encoding of the database must be UTF8", path=where)
    if fsync != "on" or full_page_writes != "on":
        raise StoreRefused(
            "fsync and full_page_writes must be on: without, a power cut can undo a payment's record", path=where
        )
    if replication_role != "origin":
        raise StoreRefused("session_replication_role must be origin: else no trigger keeps the rules", path=where)
    if standby or read_only != "off":
        raise StoreRefused("the server takes no writes: it is a standby, or transactions are read-only", path=where)


def check_role(connection: PostgresqlConnection, *, where: str) -> None:
    """The role that a sidecar has can do what a sidecar does, and nothing else."""
    (flags,) = _rows(connection, _ROLE)
    held = [name for name, flag in zip(_ROLE_NAMES, flags, strict=True) if flag]
    held += [str(name) for (name,) in _rows(connection, _MEMBERSHIPS)]
    if held:
        raise StoreRefused(f"the sidecar's role must not be {', '.join(held)}: give it a role of its own", path=where)
    owned = [str(name) for (name,) in _rows(connection, _OWNED)]
    if owned:
        raise StoreRefused(
            f"the sidecar's role owns {owned[0]}, or may become its owner, or may create in it; "
            "another role must own the schema and run the migrations",
            path=where,
        )


def check_rights(connection: PostgresqlConnection, *, where: str) -> None:
    rights = sorted(TABLE_RIGHTS)
    if connection.driver.info.server_version >= _OLDEST_WITH_MAINTAIN:
        rights.append("MAINTAIN")
    for table, right, whole, part in _rows(connection, _RIGHTS, rights):
        wanted = right in RIGHTS.get(table, frozenset())
        if wanted and not whole:
            raise StoreRefused(f"the sidecar's role lacks {right} on {table}; {_GRANTING}", path=where)
        if part and not wanted:
            raise StoreRefused(f"the sidecar's role must not have {right} on {table}; {_GRANTING}", path=where)


_GRANTING = "python -m sidecar.store.migrate --grant ROLE sets its rights"


def check_revision(connection: PostgresqlConnection, *, where: str) -> None:
    revision = stored_revision(connection, where=where)
    if revision is None or revision < SCHEMA_REVISION:
        raise StoreRefused("the database has an older schema; run python -m sidecar.store.migrate", path=where)
    if revision != SCHEMA_REVISION:
        raise StoreRefused("the database has a newer schema than this sidecar knows; use a newer sidecar", path=where)


def check_schema(connection: PostgresqlConnection, *, where: str) -> None:
    found = fingerprints(_rows(connection, OBJECTS))
    for name in sorted(SCHEMA_OBJECTS.keys() | found.keys()):
        if name not in found:
            raise StoreRefused(f"the database lacks the {name}; {RESTORING}", path=where)
        if name not in SCHEMA_OBJECTS:
            raise StoreRefused(
                f"schema {SCHEMA} has a table, index, view, trigger, function or rule that is not ours; remove it",
                path=where,
            )
        if found[name] != SCHEMA_OBJECTS[name]:
            raise StoreRefused(f"the {name} of the database is not as our migrations made it", path=where)


def stored_revision(connection: PostgresqlConnection, *, where: str) -> str | None:
    """None where there is no schema yet."""
    ((table, usable, readable),) = _rows(connection, _REVISION_TABLE)
    if table is None:
        return None
    if not usable or not readable:
        raise StoreRefused(f"the role may not read schema {SCHEMA}; {_GRANTING}", path=where)
    revisions = _rows(connection, f"SELECT version_num FROM {SCHEMA}.alembic_version")  # noqa: S608 - a constant
    if len(revisions) != 1:
        raise StoreRefused("the database does not say which schema it has", path=where)
    return str(revisions[0][0])


_REVISION_TABLE = f"""
SELECT max(c.oid), bool_and(has_schema_privilege(current_user, n.oid, 'USAGE')), bool_and(has_table_privilege(current_user, c.oid, 'SELECT'))
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = relnamespace
  WHERE nspname = '{SCHEMA}' AND relname = 'alembic_version'
"""  # noqa: S608, E501 - of constants


def _rows(connection: PostgresqlConnection, text: str, *values: list[str]) -> list[Row]:
    return connection.driver.execute(text, values or None).fetchall()
