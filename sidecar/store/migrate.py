"""Brings a database to the newest schema:  python -m sidecar.store.migrate --url sqlite:////ABSOLUTE/PATH

A process of its own, so that the sidecar never loads Alembic (11 MiB, 0.4 s). Rules: forward only; one transaction, so that a
migration that is interrupted has not happened; never beside a running sidecar; a newer schema than ours is refused.

Exit status 0: the schema is the newest. 1: refused or failed; one line on standard error says why.
"""

import argparse
import sqlite3
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from sidecar.errors import CustodyError
from sidecar.store.errors import StoreRefused
from sidecar.store.prepare import migration_is_needed
from sidecar.store.schema import SCHEMA_REVISION
from sidecar.store.sqlite import APPLICATION_ID, FileLock, check_file, create_file, path_of_url

__all__ = ["main", "migrate"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="sqlite:////ABSOLUTE/PATH")
    try:
        migrate(path_of_url(parser.parse_args().url))
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


def _upgrade(path: Path) -> None:
    driver = sqlite3.connect(path, isolation_level=None)
    try:
        driver.execute("PRAGMA synchronous = FULL")
        engine = create_engine("sqlite://", creator=lambda: driver, poolclass=StaticPool)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")  # sqlite3's own habit is to commit before each CREATE TABLE

        configuration = Config()
        configuration.set_main_option("script_location", "sidecar.store:migrations")
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            configuration.attributes["connection"] = connection
            command.upgrade(configuration, SCHEMA_REVISION)
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise StoreRefused("a migration failed; the database is as it was before", path=path) from error
    finally:
        driver.close()


if __name__ == "__main__":
    sys.exit(main())
