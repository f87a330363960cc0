"""The schema on PostgreSQL: what the migrations make, what the code believes, and what the database itself refuses."""

import asyncio
import re
import subprocess
import sys

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from sidecar.store.consents import ConsentTables
from sidecar.store.payments import PaymentTable
from sidecar.store.postgresql.catalogue import OBJECTS, SCHEMA_OBJECTS, fingerprints
from sidecar.store.postgresql.connection import PostgresqlDialect
from sidecar.store.postgresql.rights import RIGHTS, SCHEMA
from sidecar.store.schema import METADATA
from sidecar.store.statements import Statement
from tests.unit.store.postgresql import cluster, execute, new_database, opened, url_of
from tests.unit.store.test_schema import FORBIDDEN, fill
from tools.postgresql.cluster import OWNER, SIDECAR


def test_the_list_of_objects_is_what_the_migrations_make() -> None:
    """SCHEMA_OBJECTS is exactly the schema of a migrated database. Where this fails, copy the printed list."""
    with cluster().connect(new_database()) as connection:
        connection.execute(f"SET search_path = pg_catalog, {SCHEMA}, pg_temp")
        found = fingerprints(connection.execute(OBJECTS).fetchall())

    assert dict(SCHEMA_OBJECTS) == found, "\n".join(f'    "{name}": "{digest}",' for name, digest in found.items())


def test_the_code_believes_what_the_migrations_make() -> None:
    """Tables, columns, types, nullability and unique constraints of schema.py are those of a migrated database."""
    with cluster().connect(new_database()) as driver:
        driver.execute(f"SET search_path = {SCHEMA}")
        engine = create_engine("postgresql+psycopg://", creator=lambda: driver, poolclass=StaticPool)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            differences = [change for change in compare_metadata(context, METADATA) if change[0] != "remove_index"]

    assert differences == []


def test_every_table_has_its_rights() -> None:
    """A table that nobody thought of would have none, and the sidecar would not work; and a right to a table that is gone."""
    assert RIGHTS.keys() == {*METADATA.tables, "alembic_version"}


def test_the_command_migrates_and_grants() -> None:
    """From an empty database to one that a sidecar starts on; one line says why it refuses."""
    name = cluster().create_database()
    command = [sys.executable, "-m", "sidecar.store.migrate", "--url"]

    done = subprocess.run(
        [*command, url_of(name, role=OWNER), "--grant", SIDECAR], timeout=60, check=False, capture_output=True
    )
    refused = subprocess.run(
        [*command, "postgresql://owner:PASSWORD@db/custody"], timeout=60, check=False, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "must not hold a password" in refused.stderr
    assert "PASSWORD" not in refused.stderr

    async def run() -> None:
        async with opened(name):
            pass

    asyncio.run(run())


_OF_SQLITE_ONLY = {"text where bytes belong"}  # on PostgreSQL such a literal is bytes
_MORE = {
    "empty the claims": "TRUNCATE custody.claims CASCADE",
    "empty the payments": "TRUNCATE custody.payments CASCADE",
    "empty the consents": "TRUNCATE custody.consents CASCADE",
    "empty the log": "TRUNCATE custody.log_leaves CASCADE",
    "empty the checkpoints": "TRUNCATE custody.log_checkpoints CASCADE",
    "empty the heads": "TRUNCATE custody.log_heads CASCADE",
    "empty the instances": "TRUNCATE custody.instances CASCADE",
    "change an amount by a detour": (
        "INSERT INTO custody.payments SELECT * FROM custody.payments WHERE id = 'p-2'"
        " ON CONFLICT (id) DO UPDATE SET amount_minor_units = 1"
    ),
}


@pytest.mark.parametrize("case", [*sorted(FORBIDDEN.keys() - _OF_SQLITE_ONLY), *_MORE])
def test_the_database_itself_refuses(case: str) -> None:
    """What must never happen is refused by the database, whatever code asks for it, be it the owner's."""
    name = new_database()

    async def run() -> None:
        async with opened(name) as store:
            await fill(store)

    asyncio.run(run())
    statement = re.sub(r"x'([0-9]*)'", r"'\\x\1'::bytea", FORBIDDEN.get(case) or _MORE[case])
    with cluster().connect(name, role=OWNER) as owner:
        owner.execute(f"SET search_path = {SCHEMA}")
        with pytest.raises(psycopg.IntegrityError):
            owner.execute(statement)


def test_the_sidecars_role_cannot_even_try() -> None:
    """Its rights stop it before any trigger does."""
    with cluster().connect(new_database(), role=SIDECAR) as sidecar:
        for statement in (
            "DELETE FROM custody.claims",
            "TRUNCATE custody.payments CASCADE",
            "UPDATE custody.log_leaves SET entry = ''",
            "ALTER TABLE custody.payments DISABLE TRIGGER ALL",
            "DROP TRIGGER payments_final ON custody.payments",
            "SET session_replication_role = replica",
            "CREATE TABLE custody.spy (id int)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                sidecar.execute(statement)


def test_frequent_reads_use_an_index() -> None:
    """No read of a running sidecar goes through a whole table, nor sorts what is due, also once the server has made a plan for
    all values (H21)."""
    name = new_database()
    execute(name, *_MANY_ROWS, "ANALYZE")
    dialect = PostgresqlDialect()
    payments, consents = PaymentTable(dialect), ConsentTables(dialect)
    ended = tuple(sorted(("expired", "failed", "revoked")))
    statements: dict[str, Statement] = {
        "payments_due_unknown": payments._due_unknown,
        "payments_due_others": payments._due_others,
        "consents_by_expiry": consents._expired,
        "consents_by_token_expiry": consents._expiring,
        "consents_by_caller": consents._list._compile(("caller",), None, ()),
        "consents_holding_key": consents._list._compile((), ended, ("length(wrapped_data_key) > 0",)),
        "payments_by_consent": payments._list._compile(("consent",), None, ()),
        "payments_pkey": payments._get,
        "consents_pkey": consents._get,
    }
    with cluster().connect(name) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        for index, statement in statements.items():
            names = [each for each in statement._names if each not in statement._fixed]
            text = statement.text
            for position, each in enumerate(statement._names):
                value = f"'{statement._fixed[each]}'" if each in statement._fixed else f"${names.index(each) + 1}"
                text = text.replace("%s", value, 1)
                assert position >= 0
            connection.execute(f"PREPARE {index}_read AS {text}")
            values = ", ".join("'1'" for _ in names)
            plan = [step for (step,) in connection.execute(f"EXPLAIN EXECUTE {index}_read ({values})").fetchall()]
            assert any(index in step for step in plan), (index, plan)
            assert not any("Seq Scan" in step or "Sort" in step for step in plan), (index, plan)


# Twenty thousand of each, in the proportions of a vault that has been in use: most is over, little is due.
_MANY_ROWS = (
    """
    INSERT INTO custody.consents SELECT 'c-' || n, 'caller-' || n % 100, 'owner-' || n % 5000, 'bank-' || n % 5, '[]', '[]',
      CASE n % 10 WHEN 0 THEN 'active' WHEN 1 THEN 'revoked' ELSE 'expired' END, '', '', n, n, NULL, NULL, '', '', '',
      CASE n % 10 WHEN 0 THEN '\\x01'::bytea ELSE '' END, n, n, n, NULL, '', 1 FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO custody.payments SELECT 'p-' || n, 'caller-' || n % 100, 'r-' || n, 'c-' || n % 5000, 'owner-' || n % 5000, 'bank',
      'EUR', 1, '', '', '', '', '', 'sepa-credit-transfer', '', '',
      CASE n % 100 WHEN 0 THEN 'accepted' WHEN 1 THEN 'reconciling' ELSE 'settled' END, 'A', 'key-' || n, n, n, 1, 0, '', '', 0,
      NULL, NULL, CASE WHEN n % 100 < 2 THEN n END, '', '', '', '', 0 FROM generate_series(1, 20000) n
    """,
)
