"""The schema: what the migrations make, what the code believes, what a file must have, and what the database itself refuses."""

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from sidecar.domain.consent import ConsentState
from sidecar.domain.ids import WorkloadId
from sidecar.domain.limits import PeriodAlignment, PeriodicLimit, PeriodType
from sidecar.domain.payment import TERMINAL, Finding, IdempotencyClass, PaymentProduct, PaymentState, Resolution
from sidecar.domain.secrets import SecretKind
from sidecar.store import SqliteStore, SqlStore, StoreRefused
from sidecar.store.consents import ConsentTables
from sidecar.store.fingerprint import SCHEMA_OBJECTS, fingerprints
from sidecar.store.limits import LimitTables
from sidecar.store.migrate import migrate
from sidecar.store.payments import PaymentTable
from sidecar.store.rows import consent_row, payment_row
from sidecar.store.schema import METADATA, SCHEMA_REVISION
from sidecar.store.sqlite import APPLICATION_ID, FileLock, SqliteDialect
from sidecar.store.statements import Statement
from tests.fakes.store import HandClock, SoftwareSigner
from tests.unit.store.support import (
    NOW,
    active_consent,
    claim_of,
    dispatch_draft,
    draft,
    intent_draft,
    new_claim,
    new_database,
    new_payment,
    opened,
)


def _open(path: Path, *, migrate: bool = False) -> None:
    async def run() -> None:
        store = await SqliteStore.open(
            path=path, cluster="test", signer=SoftwareSigner(), clock=HandClock(), migrate=migrate
        )
        await store.close()

    asyncio.run(run())


def _execute(path: Path, *statements: str) -> None:
    driver = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            driver.execute(statement)
    finally:
        driver.close()


def test_the_list_of_objects_is_what_the_migrations_make(tmp_path: Path) -> None:
    """SCHEMA_OBJECTS is exactly the schema of a migrated file. Where this fails, copy the printed list."""
    driver = sqlite3.connect(new_database(tmp_path))
    found = fingerprints(driver)
    driver.close()

    assert dict(SCHEMA_OBJECTS) == found, "\n".join(f'    "{name}": "{digest}",' for name, digest in found.items())


def test_the_code_believes_what_the_migrations_make(tmp_path: Path) -> None:
    """Tables, columns, nullability and unique constraints of schema.py are those of a migrated file."""
    engine = create_engine(f"sqlite:///{new_database(tmp_path)}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = [change for change in compare_metadata(context, METADATA) if change[0] != "remove_index"]
    engine.dispose()

    assert differences == []


def test_the_newest_revision_is_the_last_migration() -> None:
    """SCHEMA_REVISION, which the running store compares without Alembic, is Alembic's only head."""
    configuration = Config()
    configuration.set_main_option("script_location", "sidecar.store:migrations")

    assert ScriptDirectory.from_config(configuration).get_heads() == [SCHEMA_REVISION]


def test_the_database_knows_every_state(tmp_path: Path) -> None:
    """The CHECK constraints and triggers name exactly the states of the domain."""
    driver = sqlite3.connect(new_database(tmp_path))
    sql = dict(driver.execute("SELECT name, sql FROM sqlite_master").fetchall())
    driver.close()

    def named_in(text: str, start: str) -> set[str]:
        return set(
            text.partition(start)[2].partition(")")[0].replace("'", "").replace("\n", " ").replace(" ", "").split(",")
        )

    assert named_in(sql["consents"], "state IN (") == set(ConsentState)
    assert named_in(sql["payments"], "state IN (") == set(PaymentState)
    assert named_in(sql["payments"], "product IN (") == set(PaymentProduct)
    assert named_in(sql["payments"], "idempotency_class IN (") == set(IdempotencyClass)
    assert named_in(sql["payments_final"], "state IN (") == TERMINAL
    assert named_in(sql["payments"], "resolution_finding IN (") == set(Finding)
    assert named_in(sql["limit_windows"], "period_type IN (") == set(PeriodType)
    assert named_in(sql["limit_windows"], "alignment IN (") == set(PeriodAlignment)
    unknown = {PaymentState.DISPATCHED, PaymentState.RECONCILING}
    assert named_in(sql["payments_due_unknown"], "state IN (") == unknown
    assert named_in(sql["payments_due_others"], "state NOT IN (") == TERMINAL | unknown
    assert f"kind BETWEEN {min(SecretKind)} AND {max(SecretKind)}" in sql["secrets"]


def test_a_migration_runs_once_and_from_empty(tmp_path: Path) -> None:
    """From no file at all to the newest schema; a second run changes nothing."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    path = directory / "store.db"
    migration = [sys.executable, "-m", "sidecar.store.migrate", "--url", f"sqlite:///{path}"]

    first = subprocess.run(migration, timeout=60, check=False, capture_output=True)
    content = path.read_bytes()
    second = subprocess.run(migration, timeout=60, check=False, capture_output=True)

    assert (first.returncode, first.stderr, second.returncode, second.stderr) == (0, b"", 0, b"")
    assert path.read_bytes() == content
    _open(path)


def test_a_file_of_the_first_revision_is_brought_on(tmp_path: Path) -> None:
    """0002 gives each active consent with a refresh token its time, and takes a lease that was never released for what it is: an
    attempt whose outcome nobody knows. Other rows stay as they were."""
    path, driver = _file_of_revision(tmp_path, "0001")
    columns = "id, caller, owner, provider, purposes, accounts, subject_key, redirect_uri, create_time, expire_time"
    more = "provider_consent_id, state_digest, authorisation_uri, wrapped_data_key, failure_reason"
    for number, (state, refresh_token) in enumerate([("active", True), ("active", False), ("revoked", True)]):
        driver.execute(
            f"INSERT INTO consents ({columns}, {more}, state, version, access_issue_time, access_expire_time) VALUES"
            f" ('c-{number}', 'c', 'o', 'p', '[]', '[]', x'', '', 0, 1, '', x'', '', x'', '', '{state}', 3, 1000, 3000)"
        )
        driver.execute(f"INSERT INTO secrets VALUES ('c-{number}', {4 if refresh_token else 3}, 1, x'00')")
    driver.execute("INSERT INTO refresh_leases VALUES ('c-0', 'one', 4, 90000000), ('c-1', 'one', 2, 0)")
    _migrated(path, driver)

    driver = sqlite3.connect(path)
    consents = driver.execute("SELECT id, refresh_time, version FROM consents ORDER BY id").fetchall()
    leases = driver.execute("SELECT consent, epoch, expire_time, unresolved_since FROM refresh_leases").fetchall()
    driver.close()
    assert consents == [("c-0", 1900, 4), ("c-1", None, 3), ("c-2", None, 3)]
    assert leases == [("c-0", 4, 90000000, 10000000), ("c-1", 2, 0, None)]
    _open(path)


def test_a_file_of_the_second_revision_is_brought_on(tmp_path: Path) -> None:
    """0003 leaves every row as it was: a consent has no periodic limits, a payment no finding."""
    path, driver = _file_of_revision(tmp_path, "0002")
    consent = consent_row(active_consent())
    payment = payment_row(new_payment(active_consent(id=consent["id"])))
    claim = (payment["caller"], payment["request_id"], "InitiatePayment", b"d", payment["id"], 1)
    driver.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?)", claim)
    for table, row, new in (("consents", consent, _NEW_CONSENT), ("payments", payment, _NEW_PAYMENT)):
        kept = {name: value for name, value in row.items() if name not in new}
        if table == "payments":
            kept["dispatch_epoch"] = 0
        marks = ", ".join("?" * len(kept))
        driver.execute(f"INSERT INTO {table} ({', '.join(kept)}) VALUES ({marks})", tuple(kept.values()))
    _migrated(path, driver)

    driver = sqlite3.connect(path)
    driver.row_factory = sqlite3.Row
    brought_on = [dict(driver.execute(f"SELECT * FROM {table}").fetchone()) for table in ("consents", "payments")]
    driver.close()
    assert brought_on == [consent, {**payment, "dispatch_epoch": 0}]
    _open(path)


_NEW_CONSENT = {"periodic_limits"}
_NEW_PAYMENT = {"resolution_finding", "resolution_reason", "resolution_administrator", "resolve_time"}


def _file_of_revision(folder: Path, revision: str) -> tuple[Path, sqlite3.Connection]:
    """A file as an earlier version of ours left it, open."""
    directory = folder / "data"
    directory.mkdir(mode=0o700)
    path = directory / "store.db"
    driver = sqlite3.connect(path, isolation_level=None)
    engine = create_engine("sqlite://", creator=lambda: driver, poolclass=StaticPool)
    configuration = Config()
    configuration.set_main_option("script_location", "sidecar.store:migrations")
    with engine.connect() as connection:
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, revision)
        connection.commit()
    return path, driver


def _migrated(path: Path, driver: sqlite3.Connection) -> None:
    driver.close()
    path.chmod(0o600)
    _execute(path, f"PRAGMA application_id = {APPLICATION_ID}")
    migrate(path)


def test_the_command_says_in_one_line_why_it_refuses(tmp_path: Path) -> None:
    """Exit status 1 and one line on standard error."""
    migration = [sys.executable, "-m", "sidecar.store.migrate", "--url", f"sqlite:///{tmp_path}/none/store.db"]

    result = subprocess.run(migration, timeout=60, check=False, capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "directory of the database" in result.stderr


def test_a_migration_does_not_run_beside_a_sidecar(tmp_path: Path) -> None:
    """Whoever has the file, keeps it."""
    path = new_database(tmp_path)
    _execute(path, "UPDATE alembic_version SET version_num = '0000'")
    lock = FileLock(path)

    with pytest.raises(StoreRefused, match="another sidecar"):
        migrate(path)
    lock.release()


def test_a_migration_that_fails_has_not_happened(tmp_path: Path) -> None:
    """All of it or nothing: a file in which it cannot succeed is left as it was."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    path = directory / "store.db"
    # The last object that the migration makes is in its way.
    _execute(path, "PRAGMA application_id = 1129665364", "CREATE TABLE log_checkpoints (x INTEGER)")
    path.chmod(0o600)

    with pytest.raises(StoreRefused, match="as it was before"):
        migrate(path)

    driver = sqlite3.connect(path)
    assert driver.execute("SELECT name FROM sqlite_master").fetchall() == [("log_checkpoints",)]
    driver.close()


@pytest.mark.parametrize("migrating", [False, True])
def test_a_newer_schema_is_refused(tmp_path: Path, migrating: bool) -> None:
    """An older sidecar does not touch a newer file (H17)."""
    path = new_database(tmp_path)
    _execute(path, "UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(StoreRefused, match="newer schema"):
        _open(path, migrate=migrating)


def test_an_older_schema_is_refused_unless_it_is_migrated(tmp_path: Path) -> None:
    """Without leave to migrate, an empty file and an older schema are refused with what to do."""
    path = new_database(tmp_path)
    _execute(path, "UPDATE alembic_version SET version_num = '0000'")
    empty = new_database(tmp_path)
    empty.write_bytes(b"")

    for refused in (path, empty):
        with pytest.raises(StoreRefused, match=r"older schema; run python -m sidecar\.store\.migrate"):
            _open(refused)


TAMPERED: dict[str, tuple[tuple[str, ...], str]] = {
    "a unique index is gone": (
        ("DROP INDEX one_current_master_key",),
        "lacks the index one_current_master_key; .*a repeat may pay again",
    ),
    "an index is of another kind": (
        ("DROP INDEX one_current_master_key", "CREATE INDEX one_current_master_key ON master_keys (current)"),
        "not as our migrations made it",
    ),
    "a guard is gone": (("DROP TRIGGER payments_final",), "lacks the trigger payments_final"),
    "a guard is toothless": (
        (
            "DROP TRIGGER claims_stay",
            "CREATE TRIGGER claims_stay BEFORE DELETE ON claims WHEN 0 BEGIN SELECT RAISE(ABORT, 'x'); END",
        ),
        "not as our migrations made it",
    ),
    "a foreign trigger": (
        ("CREATE TRIGGER spy AFTER INSERT ON secrets BEGIN SELECT 1; END",),
        "table, index, view or trigger that is not ours",
    ),
    "a foreign table": (("CREATE TABLE spy (x)",), "not ours"),
    "a view in the place of a table": (
        ("ALTER TABLE refresh_leases RENAME TO hidden", "CREATE VIEW refresh_leases AS SELECT * FROM hidden"),
        "lacks the table refresh_leases|not ours|not as our migrations",
    ),
    "a constraint is gone": (
        ("DROP TABLE log_checkpoints", "CREATE TABLE log_checkpoints (origin TEXT, size INTEGER, note TEXT)"),
        "not as our migrations made it",
    ),
    "a column's type is another": (
        (
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = replace(sql, 'wrapped BLOB', 'wrapped TEXT') WHERE name = 'master_keys'",
        ),
        "not as our migrations made it",
    ),
    "no revision at all": (("DELETE FROM alembic_version",), "does not say which schema"),
    "two revisions": (("INSERT INTO alembic_version VALUES ('0000')",), "does not say which schema"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_schema_that_is_not_ours_is_refused(tmp_path: Path, case: str) -> None:
    """Lost constraints and foreign objects are found at the start (H17, H18, H19, H25)."""
    statements, message = TAMPERED[case]
    path = new_database(tmp_path)
    _execute(path, *statements)

    with pytest.raises(StoreRefused, match=message):
        _open(path)


async def _filled(path: Path) -> None:
    async with opened(path) as store:
        await fill(store)


async def fill(store: SqlStore) -> None:
    """A row in every table: p-1 is final, p-2 is dispatched, p-3 needs attention, p-4 has a finding and is not final."""
    consent = active_consent(id="c-1")
    await store.claim_consent(consent, new_claim("c-1"), draft())
    for identifier, states in _LIVES.items():
        payment = new_payment(consent, id=identifier)
        limit = PeriodicLimit(amount=payment.instruction.amount, period_type=PeriodType.DAY)
        taken = limit.reservation(payment.instruction.amount, NOW, scope=f"consent:{identifier}", since=NOW.date())
        await store.claim_payment(payment, claim_of(payment), intent_draft(payment), reservations=[taken])
        before = payment.to(PaymentState.DISPATCHED, now=NOW)
        await store.record_dispatch(before, expected_epoch=1, audit=dispatch_draft(before))
        for state in states:
            found = before.state is PaymentState.NEEDS_ATTENTION
            after = before.to(state, now=NOW, resolution=_RESOLUTION if found else None)
            await store.change_payment(
                after, expected_states=frozenset({before.state}), expected_epoch=1, audit=[draft()]
            )
            before = after
    await store.change_consent(consent.to(ConsentState.REVOKED), audit=[draft()])


_RESOLUTION = Resolution(
    finding=Finding.EXECUTED, reason="asked", administrator=WorkloadId("workload:operator"), resolve_time=NOW
)
_LIVES: dict[str, tuple[PaymentState, ...]] = {
    "p-1": (PaymentState.REJECTED,),
    "p-2": (),
    "p-3": (PaymentState.RECONCILING, PaymentState.NEEDS_ATTENTION),
    "p-4": (PaymentState.RECONCILING, PaymentState.NEEDS_ATTENTION, PaymentState.ACCEPTED),
}
_FINDING = (
    "state = 'settled', resolution_finding = 'executed', resolution_reason = 'asked', resolution_administrator = 'a',"
    " resolve_time = 1"
)
FORBIDDEN = {
    "delete a claim": "DELETE FROM claims",
    "change a claim": "UPDATE claims SET digest = x'00'",
    "delete a consent": "DELETE FROM consents",
    "give a consent to somebody else": "UPDATE consents SET owner = 'thief', version = version + 1",
    "change a consent without a version": "UPDATE consents SET failure_reason = 'x'",
    "bring a revoked consent back": "UPDATE consents SET state = 'active', version = version + 1",
    "delete a payment": "DELETE FROM payments",
    "change a final payment": "UPDATE payments SET status_reason = 'x' WHERE id = 'p-1'",
    "bring a final payment back": "UPDATE payments SET state = 'intent' WHERE id = 'p-1'",
    "change an amount": "UPDATE payments SET amount_minor_units = 1 WHERE id = 'p-2'",
    "change the receiver": "UPDATE payments SET creditor_iban = 'X' WHERE id = 'p-2'",
    "change the bank key": "UPDATE payments SET bank_key = 'X' WHERE id = 'p-2'",
    "lower an epoch": "UPDATE payments SET epoch = 0 WHERE id = 'p-2'",
    "forget a permit": "UPDATE payments SET dispatch_epoch = 0, state = 'intent' WHERE id = 'p-2'",
    "invent a state": "UPDATE payments SET state = 'odd' WHERE id = 'p-2'",
    "delete a window of a limit": "DELETE FROM limit_windows",
    "move a window of a limit": "UPDATE limit_windows SET start_time = 1",
    "give a window to another scope": "UPDATE limit_windows SET scope = 'caller:x'",
    "reserve less than nothing": "UPDATE limit_windows SET reserved = -1",
    "delete a reservation": "DELETE FROM limit_reservations",
    "reserve less afterwards": "UPDATE limit_reservations SET minor_units = 1",
    "give a reservation to another payment": "UPDATE limit_reservations SET payment = 'p-2' WHERE payment = 'p-1'",
    "take a reservation that was given back": "UPDATE limit_reservations SET released = 0 WHERE payment = 'p-1'",
    "give back twice": "UPDATE limit_reservations SET released = 1 WHERE payment = 'p-1'",
    "give back by half": "UPDATE limit_reservations SET released = 2 WHERE payment = 'p-2'",
    "invent a period": "UPDATE limit_windows SET period_type = 'decade'",
    "widen a consent": "UPDATE consents SET periodic_limits = '[1]', version = version + 1",
    "settle what needs a person": "UPDATE payments SET state = 'settled' WHERE id = 'p-3'",
    "half a finding": (
        "UPDATE payments SET state = 'settled', resolution_finding = 'executed', resolve_time = 1 WHERE id = 'p-3'"
    ),
    "a finding that nobody knows": f"UPDATE payments SET {_FINDING.replace('executed', 'guessed')} WHERE id = 'p-3'",
    "a finding without words": f"UPDATE payments SET {_FINDING.replace('asked', '')} WHERE id = 'p-3'",
    "resolve what needs nobody": f"UPDATE payments SET {_FINDING} WHERE id = 'p-2'",
    "find before it is said": "UPDATE payments SET "
    + _FINDING.replace("settled", "needs-attention")
    + " WHERE id = 'p-3'",
    "change a finding": "UPDATE payments SET resolution_finding = 'not-executed' WHERE id = 'p-4'",
    "change what was checked": "UPDATE payments SET resolution_reason = 'x' WHERE id = 'p-4'",
    "change who found out": "UPDATE payments SET resolution_administrator = 'x' WHERE id = 'p-4'",
    "change when": "UPDATE payments SET resolve_time = 2 WHERE id = 'p-4'",
    "take a finding back": "UPDATE payments SET resolution_finding = NULL, resolution_reason = NULL,"
    " resolution_administrator = NULL, resolve_time = NULL WHERE id = 'p-4'",
    "delete a leaf": "DELETE FROM log_leaves",
    "change a leaf": "UPDATE log_leaves SET entry = x'00'",
    "replace a leaf": "INSERT INTO log_leaves SELECT origin, \"index\", x'00' FROM log_leaves LIMIT 1",
    "delete a checkpoint": "DELETE FROM log_checkpoints",
    "change a checkpoint": "UPDATE log_checkpoints SET note = ''",
    "shorten the log": "UPDATE log_heads SET size = 1, covered_size = 0, commits = commits + 1",
    "delete the head": "DELETE FROM log_heads",
    "change the instance": "UPDATE instances SET id = 'x'",
    "a second current master key": (
        "INSERT INTO master_keys VALUES (1, x'01', x'01', 'r', 1, 1), (2, x'02', x'02', 'r', 1, 1)"
    ),
    "text where bytes belong": "INSERT INTO master_keys VALUES (1, 'key', 'wrapped', 'r', 0, 1)",
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_the_database_itself_refuses(tmp_path: Path, case: str) -> None:
    """What must never happen is refused by the database, whatever code asks for it."""
    path = new_database(tmp_path)
    asyncio.run(_filled(path))

    with pytest.raises(sqlite3.IntegrityError):
        _execute(path, "PRAGMA foreign_keys = ON", FORBIDDEN[case])


def test_frequent_reads_use_an_index(tmp_path: Path) -> None:
    """No read of the running sidecar goes through a whole table (H21: a million expired rows)."""
    driver = sqlite3.connect(new_database(tmp_path))
    dialect = SqliteDialect()
    payments, consents = PaymentTable(dialect), ConsentTables(dialect)
    ended = tuple(sorted(("expired", "failed", "revoked")))
    statements: dict[str, Statement] = {
        "payments_due_unknown": payments._due_unknown,
        "payments_due_others": payments._due_others,
        "consents_by_expiry": consents._expired,
        "consents_by_token_expiry": consents._expiring,
        "consents_by_caller": consents._list._compile(("caller",), None, ()),
        "consents_holding_key": consents._list._compile((), ended, ("length(wrapped_data_key) > 0",)),
        "consents_by_refresh_time": consents._due,
        "refresh_leases_unresolved": consents._unresolved,
        "payments_by_consent": payments._list._compile(("consent",), None, ()),
        "payments_by_owner": payments._list._compile(("owner",), ("reconciling",), ()),
        "payments_by_state": payments._list._compile((), ("settled",), ()),
        "limit_windows": LimitTables(dialect)._take,
        "limit_reservations": LimitTables(dialect)._held,
    }

    for index, statement in statements.items():
        values = [1] * len(statement._names)
        plan = [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement.text}", values)]
        assert any(index in step for step in plan), (index, plan)
        assert not any("TEMP B-TREE" in step for step in plan if index.startswith("payments")), plan
    driver.close()
