"""Brings a database to the newest schema:

    python -m sidecar.store.migrate --url sqlite:////ABSOLUTE/PATH
    python -m sidecar.store.migrate --url postgresql://OWNER@HOST/DATABASE?sslrootcert=... --grant SIDECAR_ROLE

A process of its own, so that the sidecar never loads Alembic (11 MiB, 0.4 s). Rules: forward only; one transaction, so that a
migration that is interrupted has not happened; never beside a running sidecar; a newer schema than ours is refused. On
PostgreSQL the role that migrates owns schema `custody`; `--grant` gives the sidecars' role exactly the rights that it needs, and
may be repeated.

Exit status 0: the schema is the newest. 1: refused or failed; one line on standard error says why.
"""

import argparse
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from sidecar.errors import CustodyError
from sidecar.store.errors import StoreRefused
from sidecar.store.postgresql.address import Address, is_postgresql
from sidecar.store.postgresql.database import SCHEMA_LOCK
from sidecar.store.postgresql.errors import connection_refused
from sidecar.store.postgresql.rights import RIGHTS, SCHEMA
from sidecar.store.prepare import migration_is_needed
from sidecar.store.schema import SCHEMA_REVISION
from sidecar.store.sqlite import APPLICATION_ID, FileLock, check_file, create_file, path_of_url

__all__ = ["main", "migrate", "migrate_postgresql"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="sqlite:////ABSOLUTE/PATH or postgresql://…")
    parser.add_argument("--grant", metavar="ROLE", help="PostgreSQL: the role of the sidecars, which gets its rights")
    options = parser.parse_args()
    try:
        if is_postgresql(options.url):
            migrate_postgresql(options.url, grant=options.grant)
        else:
            migrate(path_of_url(options.url))
    except CustodyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def migrate(path: Path) -> None:
    """Makes the file where there is none and brings it to the newest schema.

    Raises StoreRefused, and then nothing has changed.
    """
    create_file(path)
    path = check_file(path)
    lock = FileLock(path)
    try:
        if migration_is_needed(path):
            _upgrade(path)
    finally:
        lock.release()


def migrate_postgresql(url: str, *, grant: str | None = None) -> None:
    """Makes schema `custody` where there is none and brings it to the newest schema. Raises StoreRefused, and then nothing has
    changed."""
    address = Address.of_url(url, application="custody migration")
    try:
        with psycopg.connect(**{**address.parameters, "options": _OPTIONS}) as driver:  # type: ignore[arg-type]
            _upgrade_postgresql(driver, grant, where=str(address))
    except psycopg.OperationalError as error:
        raise connection_refused(error, where=str(address)) from error


_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 30, 0.1
# A schema that somebody else made cannot be in the way of our tables, and nobody waits for us without end.
_OPTIONS = f"-c search_path={SCHEMA},pg_temp -c lock_timeout=5s -c synchronous_commit=on"


def _upgrade_postgresql(driver: "psycopg.Connection[Any]", grant: str | None, *, where: str) -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: driver, poolclass=StaticPool)
    try:
        with engine.begin() as connection:
            _lock_schema(connection, where)
            connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            _check_not_newer(connection, where)
            _run_migrations(connection)
            if grant is not None:
                _grant(connection, grant)
    except SQLAlchemyError as error:
        raise StoreRefused("a migration failed; the database is as it was before", path=where) from error


def _lock_schema(connection: Connection, where: str) -> None:
    """A sidecar that has just ended may still be connected for the server, for a moment."""
    for _ in range(_LOCK_TRIES):
        if connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({SCHEMA_LOCK})").scalar():
            return
        time.sleep(_LOCK_PAUSE_SECONDS)
    raise StoreRefused("a sidecar uses the database; stop it first", path=where)


def _check_not_newer(connection: Connection, where: str) -> None:
    if connection.exec_driver_sql(f"SELECT to_regclass('{SCHEMA}.alembic_version')").scalar() is None:
        return
    revision = connection.exec_driver_sql(f"SELECT version_num FROM {SCHEMA}.alembic_version").scalar()  # noqa: S608
    if revision is not None and revision > SCHEMA_REVISION:
        raise StoreRefused("the database has a newer schema than this sidecar knows; use a newer sidecar", path=where)


def _grant(connection: Connection, role: str) -> None:
    """Exactly the rights of `RIGHTS`: what there was before is taken back first."""
    quoted = sql.Identifier(role).as_string()
    connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA {SCHEMA} TO {quoted}")
    connection.exec_driver_sql(f"REVOKE ALL ON ALL TABLES IN SCHEMA {SCHEMA} FROM {quoted}")
    for table, rights in RIGHTS.items():
        connection.exec_driver_sql(f"GRANT {', '.join(sorted(rights))} ON {SCHEMA}.{table} TO {quoted}")


def _upgrade(path: Path) -> None:
    driver = sqlite3.connect(path, isolation_level=None)
    try:
        driver.execute("PRAGMA synchronous = FULL")
        engine = create_engine("sqlite://", creator=lambda: driver, poolclass=StaticPool)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")  # sqlite3's own habit is to commit before each CREATE TABLE

        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            _run_migrations(connection)
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise StoreRefused("a migration failed; the database is as it was before", path=path) from error
    finally:
        driver.close()


def _run_migrations(connection: Connection) -> None:
    configuration = Config()
    configuration.set_main_option("script_location", "sidecar.store:migrations")
    configuration.attributes["connection"] = connection
    command.upgrade(configuration, SCHEMA_REVISION)


if __name__ == "__main__":
    sys.exit(main())
