"""What a sidecar refuses to start on: an address, a server, a role, a right or a schema that is not as it must be."""

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.store import StoreRefused
from sidecar.store.migrate import migrate_postgresql
from sidecar.store.postgresql import PostgresqlStore
from sidecar.store.postgresql.address import Address
from sidecar.store.postgresql.connection import PostgresqlConnection, check_settings, session_settings
from sidecar.store.postgresql.server import check_server
from tests.fakes.store import HandClock, SoftwareSigner
from tests.unit.store.postgresql import cluster, execute, migrated_on, new_database, opened, until, url_of
from tests.unit.store.support import draft, new_claim
from tools.postgresql.cluster import OWNER, SIDECAR, ScratchCluster


def _open(url: str, *, cluster_name: str = "test") -> None:
    async def run() -> None:
        store = await PostgresqlStore.open(
            url=url, instance="pod-1", cluster=cluster_name, signer=SoftwareSigner(), clock=HandClock()
        )
        await store.close()

    asyncio.run(run())


def _refused(url: str) -> str:
    with pytest.raises(StoreRefused) as refused:
        _open(url)
    return str(refused.value)


# --- the address ------------------------------------------------------------------------------------------------------

_TLS = "postgresql://sidecar@db.example/custody?sslrootcert=system"
_PASSWORD = "PASSWORD-CANARY"

WRONG_ADDRESSES = {
    "a database that is none": ("mysql://sidecar@db/custody", "must begin with postgresql://"),
    "a password": (f"postgresql://sidecar:{_PASSWORD}@db/custody", "must not hold a password"),
    "a password as a parameter": (f"postgresql://sidecar@db/custody?password={_PASSWORD}", "must not hold a password"),
    "a password of a key": (f"{_TLS}&sslpassword={_PASSWORD}", "must not hold a password"),
    "no host": ("postgresql://sidecar@/custody", "must name its host"),
    "an empty host among others": ("postgresql://sidecar@one,,two/custody", "must name its host"),
    "no role": ("postgresql://db.example/custody?sslrootcert=system", "must name its user"),
    "no database": ("postgresql://sidecar@db.example?sslrootcert=system", "must name its dbname"),
    "no TLS": (f"{_TLS}&sslmode=disable", "sslmode must be verify-full"),
    "TLS if the server likes": (f"{_TLS}&sslmode=prefer", "sslmode must be verify-full"),
    "TLS with anybody": (f"{_TLS}&sslmode=require", "sslmode must be verify-full"),
    "TLS with any host": (f"{_TLS}&sslmode=verify-ca", "sslmode must be verify-full"),
    "no authority": ("postgresql://sidecar@db.example/custody", "must name sslrootcert"),
    "TLS for one host of two": (
        "postgresql://sidecar@/custody?host=/run/postgresql,db.example&sslmode=disable",
        "sslmode must be verify-full",
    ),
    "an address behind a socket's name": (
        "postgresql://sidecar@/custody?host=/run/postgresql&hostaddr=192.0.2.1",
        "must name sslrootcert",
    ),
    "options": (f"{_TLS}&options=-csynchronous_commit%3Doff", "not supported: options"),
    "a service file": (f"{_TLS}&service=other", "not supported: service"),
    "a parameter that nobody knows": (f"{_TLS}&sslmod=verify-full", "that PostgreSQL does not know"),
    "any server": (f"{_TLS}&target_session_attrs=any", "target_session_attrs must be read-write"),
    "a standby": (f"{_TLS}&target_session_attrs=prefer-standby", "target_session_attrs must be read-write"),
    "a file that is not there": (f"{_TLS}&passfile=/nowhere/pass", "passfile cannot be read"),
    "a file that is none": (f"{_TLS}&passfile=/", "passfile must be a regular file"),
}


@pytest.mark.parametrize("name", WRONG_ADDRESSES)
def test_a_wrong_address_is_refused(name: str) -> None:
    """One message that names the rule, and nothing of the URL that may be a secret."""
    url, message = WRONG_ADDRESSES[name]

    with pytest.raises(StoreRefused, match=message) as refused:
        Address.of_url(url, application="test")

    assert _PASSWORD not in str(refused.value) + repr(refused.value) + str(refused.value.__cause__)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_password_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """As libpq would ignore it; and the same for a key."""
    for parameter in ("passfile", "sslkey"):
        file = tmp_path / parameter
        file.write_text("secret")
        file.chmod(mode)
        with pytest.raises(StoreRefused, match=f"others may read or write {parameter}"):
            Address.of_url(f"{_TLS}&{parameter}={file}", application="test")


@pytest.mark.parametrize("variable", ["PGPASSWORD", "PGOPTIONS", "PGSERVICE", "PGSSLMODE", "PGSSLROOTCERT"])
def test_the_environment_says_nothing_about_the_connection(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """What libpq would take from the environment is refused by name; a value is not repeated."""
    monkeypatch.setenv(variable, _PASSWORD)

    with pytest.raises(StoreRefused, match=variable) as refused:
        Address.of_url(_TLS, application="test")

    assert _PASSWORD not in str(refused.value)


def test_what_the_url_does_not_say_is_safe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """verify-full, writable servers of several, bounded waits, dead connections noticed, no password from the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))

    several = Address.of_url("postgresql://u@one,two/db?sslrootcert=system", application="test").parameters
    local = Address.of_url("postgresql://u@/db?host=/run/postgresql", application="test").parameters

    assert several["sslmode"] == "verify-full"
    assert several["target_session_attrs"] == "read-write"
    assert several["gssencmode"] == "disable"
    assert several["keepalives"] == 1
    assert {"connect_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"} <= set(
        several
    )
    assert "target_session_attrs" not in local
    assert not Path(str(local["passfile"])).exists()


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spare() -> Iterator[ScratchCluster]:
    """A server whose settings are this module's to change."""
    with ScratchCluster.create() as made:
        yield made


WRONG_SETTINGS = {
    "no fsync": ({"fsync": "off"}, "fsync and full_page_writes must be on"),
    "no full pages": ({"full_page_writes": "off"}, "fsync and full_page_writes must be on"),
    "read-only transactions": ({"default_transaction_read_only": "on"}, "the server takes no writes"),
    "triggers that do not fire": ({"session_replication_role": "replica"}, "session_replication_role must be origin"),
}


def test_a_server_with_weaker_settings_is_refused(spare: ScratchCluster) -> None:
    """One message for each setting without which a payment's record would not be safe."""
    name = migrated_on(spare)
    before = dict(spare.settings)
    for settings, message in WRONG_SETTINGS.values():
        spare.stop()
        spare.settings = {**before, **settings}
        spare.start()
        assert message in _refused(spare.url(name))
    spare.stop()
    spare.settings = before
    spare.start()
    _open(spare.url(name))


def test_a_standby_is_refused(spare: ScratchCluster) -> None:
    """Named alone it connects, and is refused for what it is; among several it is passed over."""
    name = migrated_on(spare)
    with spare.replica() as standby:
        assert "the server takes no writes: it is a standby" in _refused(standby.url(name))
        both = f"postgresql://{SIDECAR}@/{name}?host={standby.sockets},{spare.sockets}&port={standby.port},{spare.port}"
        _open(both)
        spare.stop()
        try:
            assert "no server of the URL takes writes" in _refused(both) or "does not answer" in _refused(both)
        finally:
            spare.start()


def test_a_database_of_another_encoding_is_refused() -> None:
    """Names would not come back as they were stored."""
    name = f"latin_{secrets.token_hex(4)}"
    with cluster().connect() as connection:
        connection.execute(
            f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
        )

    assert "the encoding of the database must be UTF8" in _refused(url_of(name))


@dataclass(frozen=True, slots=True)
class _Answers:
    """A connection to a server that says this of itself."""

    row: tuple[object, ...]

    @property
    def driver(self) -> "_Answers":
        return self

    def execute(self, text: str, values: object) -> "_Answers":
        return self

    def fetchall(self) -> Sequence[tuple[object, ...]]:
        return [self.row]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((120022, "UTF8", "on", "on", "origin", False, "off"), "older than PostgreSQL 13"),
        ((170002, "SQL_ASCII", "on", "on", "origin", False, "off"), "must be UTF8"),
        ((170002, "UTF8", "on", "on", "local", False, "off"), "must be origin"),
        ((170002, "UTF8", "on", "on", "origin", True, "on"), "it is a standby"),
    ],
)
def test_what_a_server_says_of_itself_is_judged(row: tuple[object, ...], message: str) -> None:
    """Also what no server of this machine would say."""
    with pytest.raises(StoreRefused, match=message):
        check_server(_Answers(row), where="db/custody")  # type: ignore[arg-type]


def test_a_setting_that_the_server_does_not_take_is_refused() -> None:
    """Each setting of a session is read back; one that reads otherwise is named."""
    wanted = session_settings(Address.of_url(_TLS, application="test"), synchronous_commit="on", read_only=False)
    for name in wanted:
        found = [(each, "off" if each == name else value) for each, value in wanted.items()]
        with pytest.raises(StoreRefused, match=f"does not take the setting {name} = "):
            check_settings(wanted, found, where="db")
        with pytest.raises(StoreRefused, match=f"does not take the setting {name} = "):
            check_settings(wanted, [pair for pair in found if pair[0] != name], where="db")


@pytest.mark.parametrize("synchronous_commit", ["on", "remote_apply"])
def test_a_roles_own_settings_are_overruled(synchronous_commit: str) -> None:
    """What an administrator has set for the role or the database does not make a commit weaker or a wait endless."""
    name = new_database()
    for setting in ("synchronous_commit = off", "lock_timeout = 0", "statement_timeout = 0", "search_path = public"):
        execute("postgres", f"ALTER DATABASE {name} SET {setting}")

    address = Address.of_url(url_of(name), application="test")
    connection = PostgresqlConnection.open(address, synchronous_commit=synchronous_commit)
    try:
        (row,) = connection.driver.execute(
            "SELECT current_setting('synchronous_commit'), current_setting('lock_timeout'), current_setting('search_path')"
        ).fetchall()
    finally:
        connection.close()

    assert row == (synchronous_commit, "2s", "pg_catalog, custody, pg_temp")


def test_whatever_keeps_it_from_connecting_is_told_in_words_of_ours() -> None:
    """No such database, no such role, no such server: one message each."""
    assert "no such database" in _refused(url_of("nowhere"))
    assert "no such role" in _refused(url_of("postgres", role="nobody_at_all"))
    assert "does not answer" in _refused(f"postgresql://{SIDECAR}@/custody?host=/nowhere")


# --- the role ---------------------------------------------------------------------------------------------------------


@contextmanager
def _role(database: str) -> Iterator[str]:
    """A role of a sidecar, for one test."""
    name = f"role_{secrets.token_hex(4)}"
    execute("postgres", f"CREATE ROLE {name} LOGIN")
    migrate_postgresql(url_of(database, role=OWNER), grant=name)
    try:
        yield name
    finally:
        execute(database, f"DROP OWNED BY {name} CASCADE")
        execute("postgres", f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


def test_a_role_with_exactly_its_rights_is_taken() -> None:
    """What `migrate --grant` gives is what a start wants."""
    name = new_database()

    with _role(name) as role:
        _open(url_of(name, role=role))


WRONG_ROLES = {
    "superuser": ("ALTER ROLE {role} SUPERUSER", "must not be SUPERUSER"),
    "maker of roles": ("ALTER ROLE {role} CREATEROLE", "must not be CREATEROLE"),
    "replica": ("ALTER ROLE {role} REPLICATION", "must not be REPLICATION"),
    "above policies": ("ALTER ROLE {role} BYPASSRLS", "must not be BYPASSRLS"),
    "runs programs": ("GRANT pg_execute_server_program TO {role}", "must not be pg_execute_server_program"),
    "writes everywhere": ("GRANT pg_write_all_data TO {role}", "must not be pg_write_all_data"),
    "may become the owner": (f"GRANT {OWNER} TO {{role}}", "owns"),
    "owns a table": ("ALTER TABLE custody.claims OWNER TO {role}", "owns claims"),
    "owns the schema": ("ALTER SCHEMA custody OWNER TO {role}", "owns the schema"),
    "owns the database": ("ALTER DATABASE {database} OWNER TO {role}", "owns the database"),
    "owns the triggers' function": ("ALTER FUNCTION custody.refuse OWNER TO {role}", "owns refuse"),
    "may make tables beside ours": ("GRANT CREATE ON SCHEMA custody TO {role}", "the schema"),
    "deletes claims": ("GRANT DELETE ON custody.claims TO {role}", "must not have DELETE on claims"),
    "deletes payments": ("GRANT DELETE ON custody.payments TO PUBLIC", "must not have DELETE on payments"),
    "empties the log": ("GRANT TRUNCATE ON custody.log_leaves TO {role}", "must not have TRUNCATE on log_leaves"),
    "makes triggers": ("GRANT TRIGGER ON custody.consents TO {role}", "must not have TRIGGER on consents"),
    "changes the log": ("GRANT UPDATE ON custody.log_leaves TO {role}", "must not have UPDATE on log_leaves"),
    "changes a column of claims": ("GRANT UPDATE (digest) ON custody.claims TO {role}", "must not have UPDATE on claims"),
    "changes the revision": ("GRANT UPDATE ON custody.alembic_version TO {role}", "must not have UPDATE on alembic_version"),
    "cannot claim": ("REVOKE INSERT ON custody.claims FROM {role}", "lacks INSERT on claims"),
    "cannot forget a secret": ("REVOKE DELETE ON custody.secrets FROM {role}", "lacks DELETE on secrets"),
    "cannot read the revision": ("REVOKE SELECT ON custody.alembic_version FROM {role}", "may not read schema custody"),
    "cannot enter": ("REVOKE USAGE ON SCHEMA custody FROM {role}", "may not read schema custody"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ROLES)
def test_a_role_with_more_or_less_is_refused(case: str) -> None:
    """A right that a sidecar does not need is a right of whoever gets hold of it; one that it lacks is named."""
    statement, message = WRONG_ROLES[case]
    name = new_database()

    with _role(name) as role:
        execute(name, statement.format(role=role, database=name))
        try:
            assert message in _refused(url_of(name, role=role))
        finally:
            execute(name, f"REASSIGN OWNED BY {role} TO {OWNER}", f"REVOKE {OWNER} FROM {role}")
            execute("postgres", f"ALTER DATABASE {name} OWNER TO {OWNER}")


def test_the_owner_is_no_sidecar() -> None:
    """The role that migrates could drop every rule."""
    assert "owns" in _refused(url_of(new_database(), role=OWNER))
    assert "SUPERUSER" in _refused(url_of(new_database(), role="postgres"))


# --- the schema -------------------------------------------------------------------------------------------------------

WRONG_SCHEMAS: dict[str, tuple[str | tuple[str, ...], str]] = {
    "no schema": ("DROP SCHEMA custody CASCADE", "an older schema"),
    "an older schema": ("UPDATE custody.alembic_version SET version_num = '0000'", "an older schema"),
    "a newer schema": ("UPDATE custody.alembic_version SET version_num = '9999'", "a newer schema"),
    "no revision": ("DELETE FROM custody.alembic_version", "does not say which schema"),
    "a table is missing": ("DROP TABLE custody.refresh_leases", "lacks the "),
    "a column more": ("ALTER TABLE custody.claims ADD note text", "table claims of the database is not as"),
    "a column may be empty": (
        "ALTER TABLE custody.claims ALTER digest DROP NOT NULL",
        "table claims of the database is not as",
    ),
    "a column of another type": (
        "ALTER TABLE custody.claims ALTER create_time TYPE numeric",
        "table claims of the database",
    ),
    "a column of another order": (
        'ALTER TABLE custody.claims ALTER resource TYPE text COLLATE "POSIX"',
        "table claims of the",
    ),
    "a default": ("ALTER TABLE custody.payments ALTER epoch SET DEFAULT 1", "table payments of the database is not as"),
    "not logged": ("ALTER TABLE custody.refresh_leases SET UNLOGGED", "table refresh_leases of the database is not as"),
    "row security": ("ALTER TABLE custody.claims ENABLE ROW LEVEL SECURITY", "table claims of the database is not as"),
    "an heir": ("CREATE TABLE public.heir () INHERITS (custody.claims)", "table claims of the database is not as"),
    "one id twice": (
        "ALTER TABLE custody.payments DROP CONSTRAINT payments_caller_request_id_key",
        "payments_caller_request_id_key",
    ),
    "a claim twice": (
        (
            "ALTER TABLE custody.payments DROP CONSTRAINT payments_caller_request_id_fkey",
            "ALTER TABLE custody.claims DROP CONSTRAINT claims_pkey",
        ),
        "claims_pkey",
    ),
    "a check is missing": ("ALTER TABLE custody.payments DROP CONSTRAINT payments_epoch_check", "payments_epoch_check"),
    "a check is weaker": (
        (
            "ALTER TABLE custody.payments DROP CONSTRAINT payments_epoch_check",
            "ALTER TABLE custody.payments ADD CONSTRAINT payments_epoch_check CHECK (epoch >= 0)",
        ),
        "constraint payments.payments_epoch_check of the database is not as",
    ),
    "a check of others": ("ALTER TABLE custody.claims ADD CHECK (method <> 'x')", "that is not ours"),
    "an index is missing": ("DROP INDEX custody.payments_by_owner", "lacks the index payments_by_owner"),
    "an index is another": (
        ("DROP INDEX custody.payments_by_owner", "CREATE INDEX payments_by_owner ON custody.payments (id)"),
        "index payments_by_owner of the database is not as",
    ),
    "an index is not valid": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'custody.one_current_master_key'::regclass",
        "index one_current_master_key of the database is not as",
    ),
    "a trigger is missing": (
        "DROP TRIGGER payments_final ON custody.payments",
        "lacks the trigger payments.payments_final",
    ),
    "a trigger is off": (
        "ALTER TABLE custody.payments DISABLE TRIGGER payments_final",
        "trigger payments.payments_final of the database is not as",
    ),
    "a foreign key is off": ("ALTER TABLE custody.payments DISABLE TRIGGER ALL", "of the database is not as"),
    "a trigger of others": (
        (
            "CREATE FUNCTION public.spy() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            "CREATE TRIGGER spy BEFORE INSERT ON custody.secrets FOR EACH ROW EXECUTE FUNCTION public.spy()",
        ),
        "that is not ours",
    ),
    "a rule of others": ("CREATE RULE spy AS ON INSERT TO custody.claims DO ALSO SELECT 1", "that is not ours"),
    "a view of others": ("CREATE VIEW custody.spy AS SELECT 1 AS one", "that is not ours"),
    "a table of others": ("CREATE TABLE custody.spy (id int)", "that is not ours"),
    "a function of others": (
        "CREATE FUNCTION custody.spy() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "that is not ours",
    ),
    "an operator of others": (
        "CREATE OPERATOR custody.= (FUNCTION = pg_catalog.int84eq, LEFTARG = bigint, RIGHTARG = integer)",
        "that is not ours",
    ),
    "a policy of others": ("CREATE POLICY spy ON custody.claims USING (true)", "that is not ours"),
    "triggers that only look": (
        "CREATE OR REPLACE FUNCTION custody.refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "function refuse of the database is not as",
    ),
    "no head": ("DELETE FROM custody.log_heads", "the log has no head"),
    "a shorter log": ("DELETE FROM custody.log_leaves", "the log does not end where its head says"),
}


@pytest.mark.parametrize("case", WRONG_SCHEMAS)
def test_a_schema_that_is_not_ours_is_refused(case: str) -> None:
    """Whatever was dropped, changed, disabled or added in our schema keeps a sidecar from starting."""
    statements, message = WRONG_SCHEMAS[case]
    name = new_database()

    async def run() -> None:
        async with opened(name) as store:
            await store.record([draft()])

    asyncio.run(run())
    execute(name, *([statements] if isinstance(statements, str) else statements))

    assert message in _refused(url_of(name))


def test_a_shadowed_table_is_not_taken_for_ours() -> None:
    """Tables of our names in other schemas, ahead in the role's own search path, and temporary ones, are never looked at."""
    name = new_database()
    execute(
        name,
        "CREATE SCHEMA evil",
        "CREATE TABLE evil.claims (LIKE custody.claims)",
        "CREATE TABLE evil.log_heads (LIKE custody.log_heads)",
        "CREATE FUNCTION evil.eq(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'",
        "CREATE OPERATOR evil.= (FUNCTION = evil.eq, LEFTARG = text, RIGHTARG = text)",
        f"GRANT USAGE ON SCHEMA evil TO {SIDECAR}",
        f"ALTER DATABASE {name} SET search_path = evil, pg_catalog",
    )

    async def run() -> None:
        async with opened(name) as store:
            store._database.first.driver.execute("CREATE TEMP TABLE claims (LIKE custody.claims)")  # type: ignore[attr-defined]
            await store.record([draft()])
            assert (await store.log_position()).size == 1
            store._database.first.driver.execute("SET search_path = evil, custody")  # type: ignore[attr-defined]
            await store.record(
                [draft()], claim=new_claim()
            )  # not even where the path is another: each name has its schema
            assert (await store.log_position()).size == 2

    asyncio.run(run())


def test_a_sidecar_with_a_file_does_not_load_the_driver() -> None:
    """What is not there cannot be attacked, and takes no memory."""
    program = "import sys, sidecar.wiring; sys.exit('psycopg' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_a_database_of_another_cluster_is_refused() -> None:
    """Tokens are sealed for their cluster, and so is the log named."""
    name = new_database()
    _open(url_of(name))

    with pytest.raises(StoreRefused, match="belongs to another cluster"):
        _open(url_of(name), cluster_name="other")


def test_no_refusal_leaves_a_connection_behind() -> None:
    """Whoever is refused has let go of the server."""
    name = new_database()
    execute(name, "CREATE TABLE custody.spy (id int)")

    _refused(url_of(name))

    def only_who_asks() -> bool:
        return execute(name, f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'") == [(1,)]

    asyncio.run(until(only_who_asks))  # the server needs a moment to see that a connection was closed


# --- migrations -------------------------------------------------------------------------------------------------------


def test_a_migration_is_repeatable_and_grants_again() -> None:
    """On the newest schema nothing changes; rights that were added are taken back."""
    name = new_database()
    execute(name, f"GRANT DELETE, TRUNCATE ON custody.claims TO {SIDECAR}")

    migrate_postgresql(url_of(name, role=OWNER), grant=SIDECAR)

    _open(url_of(name))


def test_no_migration_runs_beside_a_sidecar() -> None:
    """The running sidecar holds the schema; the migration says so and changes nothing."""
    name = new_database()

    async def run() -> None:
        async with opened(name):
            with pytest.raises(StoreRefused, match="a sidecar uses the database; stop it first"):
                await asyncio.to_thread(migrate_postgresql, url_of(name, role=OWNER))

    asyncio.run(run())
    migrate_postgresql(url_of(name, role=OWNER))


def test_no_sidecar_starts_beside_a_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a moment, and then says what it waits for."""
    monkeypatch.setattr("sidecar.store.postgresql.connection.LOCK_SECONDS", 1)
    from sidecar.store.postgresql.database import SCHEMA_LOCK

    name = new_database()
    with cluster().connect(name) as migration:
        migration.execute("BEGIN")
        migration.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))

        assert "a migration of the database is under way" in _refused(url_of(name))


def test_a_newer_schema_is_not_migrated() -> None:
    """An older sidecar's migration does not touch it."""
    name = new_database()
    execute(name, "UPDATE custody.alembic_version SET version_num = '9999'")

    with pytest.raises(StoreRefused, match="a newer schema"):
        migrate_postgresql(url_of(name, role=OWNER))


@pytest.mark.parametrize(
    "in_the_way", ["CREATE TABLE custody.payments (id int)", "CREATE TABLE custody.log_checkpoints (id int)"]
)
def test_a_migration_that_fails_has_not_happened(in_the_way: str) -> None:
    """Something of its name is in the way: the database is as it was before, whether that was early or late."""
    name = cluster().create_database()
    execute(name, f"CREATE SCHEMA custody AUTHORIZATION {OWNER}", in_the_way)

    with pytest.raises(StoreRefused, match="a migration failed; the database is as it was before"):
        migrate_postgresql(url_of(name, role=OWNER), grant=SIDECAR)

    assert execute(
        name, "SELECT count(*) FROM pg_class WHERE relnamespace = 'custody'::regnamespace AND relkind = 'r'"
    ) == [(1,)]
