"""A vault moves from SQLite to PostgreSQL: every row, found again after any interruption, and never usable in two places."""

import asyncio
import io
import os
import signal
import sqlite3
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import LargeBinary, Text
from sqlalchemy.sql.schema import Table

from sidecar.audit.export import export_lines
from sidecar.audit.verifier import verify_export
from sidecar.domain.audit import AuditEvent, AuditOutcome
from sidecar.domain.payment import PaymentState
from sidecar.errors import Corrupt, Unavailable
from sidecar.ports import ConsentFilter, PaymentFilter
from sidecar.store import StoreRefused
from sidecar.store.postgresql.connection import PostgresqlConnection
from sidecar.store.relocation.comparison import Report
from sidecar.store.relocation.relocation import PAGE_ROWS, Observe, Phase, Progress, Relocation, opened_relocation
from sidecar.store.relocation.tables import encoded
from sidecar.store.schema import METADATA, RELOCATIONS
from sidecar.store.sqlite import SqliteConnection
from tests.fakes.store import SoftwareSigner
from tests.unit.store.postgresql import cluster, execute, new_database, opened, terminate, url_of
from tests.unit.store.support import CALLER, NOW, draft
from tests.unit.store.support import new_database as new_file
from tests.unit.store.support import opened as opened_file
from tests.unit.store.vaults import ROWS, UsedVault, contents, full_vault, select_all, tables, used_vault
from tools.postgresql.cluster import OWNER

INSTANCE = "shop-0"


@contextmanager
def relocation(
    path: Path,
    database: str,
    *,
    instance: str = INSTANCE,
    url: str | None = None,
    observe: Observe = lambda progress: None,
    page_rows: int = PAGE_ROWS,
) -> Iterator[Relocation]:
    with opened_relocation(
        path=path,
        url=url or url_of(database),
        instance=instance,
        now=lambda: NOW,
        observe=observe,
        page_rows=page_rows,
    ) as opened:
        yield opened


def move(path: Path, database: str, **options: Any) -> Report | None:
    with relocation(path, database, **options) as opened:
        return opened.run()


def undo(path: Path, database: str) -> None:
    with relocation(path, database) as opened:
        opened.undo()


def refused(path: Path, database: str, **options: Any) -> str:
    with pytest.raises(StoreRefused) as refusal:
        move(path, database, **options)
    return str(refusal.value)


def moved_contents(database: str) -> dict[str, list[tuple[Any, ...]]]:
    """As `vaults.contents`, read by nothing of ours."""
    with cluster().connect(database) as connection:
        return {
            table.name: sorted(connection.execute(select_all(table, schema="custody.")).fetchall(), key=repr)
            for table in tables()
        }


def under_its_new_name(rows: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[tuple[Any, ...]]]:
    ((_, *others),) = rows["instances"]
    return {**rows, "instances": [(INSTANCE, *others)]}


def file_opens(path: Path) -> bool:
    """Whether a sidecar could start on it."""

    async def run() -> None:
        async with opened_file(path):
            pass

    return _opens(run)


def database_opens(database: str) -> bool:
    """Whether a sidecar could start on the vault in it. That an empty database is open to a new vault does not count."""
    if not execute(database, "SELECT 1 FROM custody.relocations"):
        return False

    async def run() -> None:
        async with opened(database, instance=INSTANCE):
            pass

    return _opens(run)


def use(database: str, vault: UsedVault, *, instance: str = INSTANCE) -> None:
    """A sidecar starts on the vault that has moved there, and puts something on record."""

    async def run() -> None:
        async with opened(database, instance=instance, clock=vault.clock) as store:
            await store.record([draft()])

    asyncio.run(run())


def _opens(run: Callable[[], Any]) -> bool:
    try:
        asyncio.run(run())
    except StoreRefused:
        return False
    return True


# --- every row --------------------------------------------------------------------------------------------------------


def test_every_table_is_covered(tmp_path: Path) -> None:
    """The vault that these tests move has several pages of rows in every table that there is; of the file itself speaks one
    table alone."""
    rows = contents(full_vault(tmp_path))

    assert {*rows, RELOCATIONS.name} == METADATA.tables.keys()
    assert {name: len(each) for name, each in rows.items()} == {
        name: 1 if name in ("instances", "log_heads") else ROWS for name in rows
    }


@pytest.mark.parametrize("page_rows", [1, 3, ROWS, PAGE_ROWS])
def test_every_row_moves_as_it_is(tmp_path: Path, page_rows: int) -> None:
    """Texts of all scripts, bytes of all values, the greatest and the least number, absent ones: nothing is changed but the name
    of the instance, whatever the size of a page."""
    path, database = full_vault(tmp_path), new_database()
    before = contents(path)

    report = move(path, database, page_rows=page_rows)

    assert moved_contents(database) == under_its_new_name(before)
    assert report is not None
    assert report.ok
    assert [table.name for table in report.tables] == [table.name for table in tables()]
    assert {table.name: table.target_rows for table in report.tables} == {
        name: len(rows) for name, rows in before.items()
    }
    assert contents(path) == before


def test_a_sidecar_goes_on_where_the_vault_moved_to(tmp_path: Path) -> None:
    """Everything reads the same through the port, what is on its way can be finished, and the log of both is one log."""
    vault, database = used_vault(tmp_path), new_database()
    with closing(sqlite3.connect(vault.path)) as driver:
        ((origin, size),) = driver.execute("SELECT origin, size FROM log_heads").fetchall()

    move(vault.path, database)

    async def run() -> None:
        async with opened(database, instance=INSTANCE, signer=vault.signer, clock=vault.clock) as store:
            assert (store.origin, (await store.log_position()).size) == (origin, size)
            await _check_values(store, vault)
            await store.record([draft()])
            await _finish_payment(store, vault)
            await store.sign_pending()
            leaves = [leaf.entry for leaf in await store.leaves(start=0, limit=1000)]
            notes = [note for _, note in await store.checkpoints(start_size=0, limit=1000)]
            export = io.BytesIO(b"".join(export_lines(origin, leaves, notes)))
            verified = verify_export(export, public_key=vault.signer.pem, origin=origin)
            assert verified.ok, verified
            assert verified.entries > size

    asyncio.run(run())


async def _check_values(store: Any, vault: UsedVault) -> None:
    every: dict[str, Any] = {"after": "", "limit": 100}
    assert tuple(await store.consents(ConsentFilter(), **every)) == vault.consents
    assert tuple(await store.payments(PaymentFilter(), **every)) == vault.payments
    assert tuple(await store.master_keys()) == (vault.master_key,)
    assert set((await store.secrets(vault.consents[0].id)).secrets) == set(vault.secrets)
    for claim in vault.claims:
        assert await store.claim(CALLER, claim.request_id) == claim
    lease: dict[str, Any] = {"holder": "other", "seconds": 60.0, "after_epoch": 1, "audit": draft()}
    consent = vault.consents[0].id
    assert await store.take_refresh_lease(consent, now=NOW, **lease) is None  # somebody has it
    assert await store.take_refresh_lease(consent, now=NOW + timedelta(hours=1), **lease) == 2
    repeated = await store.claim_payment(vault.payments[1], vault.claims[3], draft())
    assert repeated == vault.claims[3]


async def _finish_payment(store: Any, vault: UsedVault) -> None:
    payment = vault.payments[0]
    settled = payment.to(PaymentState.SETTLED, now=NOW)
    outcome = draft(AuditEvent.PAYMENT_OUTCOME, outcome=AuditOutcome.SUCCEEDED, payment=payment.id, epoch=payment.epoch)
    await store.change_payment(
        settled, expected_states=frozenset({payment.state}), expected_epoch=payment.epoch, audit=[outcome]
    )
    assert (await store.payment(payment.id)).state is PaymentState.SETTLED


def test_the_write_ahead_log_moves_too(tmp_path: Path) -> None:
    """What a sidecar that was killed had committed, and SQLite had not moved into its file yet, is of the vault."""
    path, database = full_vault(tmp_path), new_database()
    copy = tmp_path / "crashed" / "store.db"
    copy.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path, isolation_level=None)) as driver:
        driver.execute("INSERT INTO claims VALUES ('caller', 'newest', 'Method', x'01', 'resource', 1)")
        for suffix in ("", "-wal"):
            target = copy.with_name(copy.name + suffix)
            target.write_bytes(path.with_name(path.name + suffix).read_bytes())
            target.chmod(0o600)

    move(copy, database)

    assert execute(database, "SELECT count(*) FROM custody.claims WHERE request_id = 'newest'") == [(1,)]


def test_progress_is_told_page_by_page(tmp_path: Path) -> None:
    """From nothing to all, for the copy and for the comparison; one that goes on begins with what is there."""
    path, database = full_vault(tmp_path), new_database()
    told: list[Progress] = []

    def stop(progress: Progress) -> None:
        told.append(progress)
        if progress.rows == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move(path, database, observe=stop, page_rows=3)
    first, told[:] = list(told), []
    move(path, database, observe=told.append, page_rows=3)
    total = sum(len(rows) for rows in contents(path).values())

    assert [progress.rows for progress in first] == [0, 3, 6, 7, 10]
    copied = [progress.rows for progress in told if progress.phase is Phase.COPY]
    compared = [progress.rows for progress in told if progress.phase is Phase.VERIFY]
    assert (copied[0], copied[-1]) == (10, total)
    assert (compared[0], compared[-1]) == (0, total)
    assert copied == sorted(copied)
    assert {progress.total_rows for progress in (*first, *told)} == {total}


def decoded(data: bytes) -> tuple[Any, ...]:
    """By docs/store.md, What is compared."""
    values: list[Any] = []
    (kind, count), rest = struct.unpack_from(">BQ", data), data[9:]
    assert kind == 0
    for _ in range(count):
        kind, rest = rest[0], rest[1:]
        if kind == 0:
            values.append(None)
            continue
        (number,) = struct.unpack_from(">q", rest)
        rest = rest[8:]
        if kind == 1:
            values.append(number)
            continue
        value, rest = rest[:number], rest[number:]
        values.append(value.decode() if {2: True, 3: False}[kind] else value)
    assert rest == b""
    return tuple(values)


def test_the_canonical_encoding_says_all_of_a_row(tmp_path: Path) -> None:
    """An independent decoder gets every row back as it was, so no two rows have one encoding; what is none of the kinds of the
    schema has none."""
    rows = [row for table in contents(full_vault(tmp_path)).values() for row in table]
    for row in [*rows, (), (None,), ("",), (b"",), (0,)]:
        found = decoded(encoded(row))

        assert (found, [type(value) for value in found]) == (row, [type(value) for value in row])
    for odd in (1.0, True, memoryview(b"x")):
        with pytest.raises(Corrupt):
            encoded((odd,))


# --- what differs is found --------------------------------------------------------------------------------------------


def _changed(table: Table) -> Iterator[str]:
    """Statements of which the first that the table's rules let through changes a value of one row that is no key."""
    for column in reversed(table.columns):
        if not column.primary_key:
            kind = column.type
            other = (
                f"{column.name} || '\\x00'::bytea"
                if isinstance(kind, LargeBinary)
                else f"{column.name} || 'x'"
                if isinstance(kind, Text)
                else f"{column.name} + 1"
            )
            last = f"(SELECT max(ctid) FROM custody.{table.name} WHERE {column.name} IS NOT NULL)"
            yield f"UPDATE custody.{table.name} SET {column.name} = {other} WHERE ctid = {last} RETURNING {_key(table)}"


def _key(table: Table) -> str:
    return ", ".join(f'"{column.name}"' for column in table.primary_key.columns)


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_one_changed_value_is_found(tmp_path: Path, table: Table) -> None:
    """In any table: the report names it, and the key of the row."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)
    key = _first_that_works(database, _changed(table))

    with relocation(path, database) as opened:
        report = opened.compare()

    assert not report.ok
    assert [each.name for each in report.tables if not each.ok] == [table.name]
    found = next(each for each in report.tables if not each.ok)
    assert found.difference is not None
    assert (found.difference.kind, found.difference.key) == ("different", key)
    assert len(found.difference.columns) == 1
    assert found.source_rows == found.target_rows
    assert found.source_sha256 != found.target_sha256


def _first_that_works(database: str, statements: Iterator[str]) -> tuple[Any, ...]:
    for statement in statements:
        try:
            return execute(database, statement)[0]
        except (psycopg.IntegrityError, psycopg.DataError, IndexError):
            continue
    raise AssertionError("no value of this table can be changed")


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_one_missing_row_is_found(tmp_path: Path, table: Table) -> None:
    """At the end of a table too, where there is no next row to tell."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)
    ((*key,),) = execute(
        database,
        f"DELETE FROM custody.{table.name} WHERE ctid = (SELECT max(ctid) FROM custody.{table.name}) RETURNING {_key(table)}",
    )

    with relocation(path, database) as opened:
        report = opened.compare()

    (found,) = [each for each in report.tables if not each.ok]
    assert found.name == table.name
    assert found.difference is not None
    assert (found.difference.kind, found.difference.key) == ("missing", tuple(key))
    assert found.target_rows == found.source_rows - 1


def test_one_row_too_many_is_found(tmp_path: Path) -> None:
    """Before, between and behind those of the file."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)
    for caller in ("!", "a-1x", "\U0010ffff"):
        execute(database, f"INSERT INTO custody.claims VALUES ('{caller}', 'x', 'm', '', 'r', 1)")

        with relocation(path, database) as opened:
            (found,) = [each for each in opened.compare().tables if not each.ok]

        execute(database, f"DELETE FROM custody.claims WHERE caller = '{caller}'")
        assert found.difference is not None
        assert (found.name, found.difference.kind, found.difference.key) == ("claims", "unexpected", (caller, "x"))


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DELETE FROM custody.log_heads", "no head"),
        ("DELETE FROM custody.log_leaves WHERE index = (SELECT max(index) FROM custody.log_leaves)", "does not end"),
        (
            "DELETE FROM custody.log_checkpoints WHERE size = (SELECT max(size) FROM custody.log_checkpoints)",
            "checkpoint",
        ),
        ("UPDATE custody.log_leaves SET entry = 'x' WHERE index = (SELECT max(index) FROM custody.log_leaves)", "hash"),
    ],
)
def test_a_log_that_does_not_end_as_its_head_says_is_found(tmp_path: Path, statement: str, problem: str) -> None:
    """As a start of the sidecar finds it: newest leaf, head and newest checkpoint fit, or it is told why not."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)
    execute(database, statement)

    with relocation(path, database) as opened:
        report = opened.compare()

    assert problem in report.log.problem


def test_a_difference_keeps_the_database_closed(tmp_path: Path) -> None:
    """What was changed while it was copied is found at the end of the same run: the file stays the vault; and what was changed
    back lets the next run finish."""
    path, database = full_vault(tmp_path), new_database()
    change = "UPDATE custody.claims SET resource = resource || {} WHERE caller = 'Z-0'"

    def meddle(progress: Progress) -> None:
        if (progress.phase, progress.rows) == (Phase.VERIFY, 0):
            execute(database, change.format("'x'"))

    report = move(path, database, observe=meddle)

    assert report is not None
    assert not report.ok
    assert (file_opens(path), database_opens(database)) == (True, False)
    execute(database, "UPDATE custody.claims SET resource = '' WHERE caller = 'Z-0'")
    again = move(path, database)
    assert again is not None
    assert again.ok
    assert (file_opens(path), database_opens(database)) == (False, True)


# --- interruptions ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Killer:
    """Ends this process as the kernel would, at the n-th event whose name is one of `places`."""

    places: frozenset[str]
    left: int

    def reached(self, place: str) -> None:
        if place in self.places:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, kind: type, method: str, name: str) -> None:
        original = getattr(kind, method)

        def watched(this: Any, *values: Any) -> Any:
            self.reached(f"before {name}")
            answer = original(this, *values)
            self.reached(f"after {name}")
            return answer

        setattr(kind, method, watched)


def killed(work: Callable[[], object], *places: str, count: int = 1) -> bool:
    """Runs `work` in a process that is killed at the `count`-th of these places. False where it ended by itself before that."""
    child = os.fork()
    if child == 0:
        try:
            killer = Killer(frozenset(places), count)
            killer.watch(PostgresqlConnection, "commit", "commit")
            killer.watch(SqliteConnection, "commit", "commit")
            killer.watch(SqliteConnection, "flush", "flush")
            killer.watch(psycopg.Copy, "write_row", "row")
            work()
        except BaseException:  # noqa: BLE001 - it must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


COMMITS = len(tables()) + 4  # one page of each table, and the marks BEGUN, VERIFIED, LEFT, OPEN


@pytest.mark.parametrize("place", ["before commit", "after commit"])
def test_killed_at_any_commit_it_goes_on(tmp_path: Path, place: str) -> None:
    """SIGKILL before and after each commit of a whole run: never are both usable, the file is usable until all was verified, and
    the same command finishes it, with every row once."""
    template = full_vault(tmp_path)
    before = under_its_new_name(contents(template))
    seen = []
    for count in range(1, COMMITS + 1):
        path, database = _copied(template, tmp_path / f"{count}"), new_database()

        assert killed(lambda: move(path, database), place, count=count)  # noqa: B023 - it runs at once

        usable = file_opens(path), database_opens(database)
        seen.append(usable)
        report = move(path, database)
        assert (report is None) == (usable == (False, True))
        assert moved_contents(database) == before
        assert (file_opens(path), database_opens(database)) == (False, True)
    assert not killed(lambda: move(_copied(template, tmp_path / "all"), new_database()), place, count=COMMITS + 1)
    usable_after = [*[(True, False)] * (COMMITS - 2), (False, False), (False, True)]  # as many commits
    assert seen == ([(True, False), *usable_after[:-1]] if place == "before commit" else usable_after)


def _copied(template: Path, directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    path = directory / "store.db"
    path.touch(0o600)
    path.write_bytes(template.read_bytes())
    return path


def test_killed_in_every_page_it_goes_on(tmp_path: Path) -> None:
    """Killed within each page, then before and after its commit, again and again on the same databases: each page is there once,
    and the end is the same as without any of it."""
    path, database = full_vault(tmp_path), new_database()
    before = under_its_new_name(contents(path))
    killed(lambda: move(path, database), "after commit")  # the mark BEGUN
    kills = 0

    while killed(_until_all_is_copied(path, database), "after row"):
        assert killed(_until_all_is_copied(path, database), "before commit")
        assert killed(_until_all_is_copied(path, database), "after commit")
        kills += 1
        assert not database_opens(database)

    assert kills >= len(tables())
    report = move(path, database, page_rows=3)
    assert report is not None
    assert report.ok
    assert moved_contents(database) == before


class _AllIsCopied(Exception):
    pass


def _until_all_is_copied(path: Path, database: str) -> Callable[[], None]:
    def stop(progress: Progress) -> None:
        if progress.phase is Phase.VERIFY:
            raise _AllIsCopied

    def work() -> None:
        with suppress(_AllIsCopied):
            move(path, database, page_rows=3, observe=stop)

    return work


def test_killed_before_the_file_is_flushed_it_goes_on(tmp_path: Path) -> None:
    """The mark of the file is committed and not yet in its place: neither is usable, and the next run finishes."""
    path, database = full_vault(tmp_path), new_database()

    assert killed(lambda: move(path, database), "before flush", count=2)  # the first is that of the start

    assert (file_opens(path), database_opens(database)) == (False, False)
    move(path, database)
    assert (file_opens(path), database_opens(database)) == (False, True)


def test_the_file_alone_says_that_it_was_left(tmp_path: Path) -> None:
    """Before the database is opened, the mark has left SQLite's write-ahead log: who copies the file without it is told, too."""
    path, database = full_vault(tmp_path), new_database()
    assert killed(lambda: move(path, database), "before commit", count=COMMITS)

    assert not file_opens(_copied(path, tmp_path / "alone"))


@pytest.mark.parametrize("at", [0, 7, 8, 30])
def test_a_lost_connection_is_one_message_and_it_goes_on(tmp_path: Path, at: int) -> None:
    """The server ends the connection: the message says to run it again, which finishes."""
    path, database = full_vault(tmp_path), new_database()

    def cut(progress: Progress) -> None:
        if progress.rows >= at:
            terminate(database)

    message = refused(path, database, observe=cut, page_rows=3)

    assert "the connection to the database was lost; run the same command again" in message
    report = move(path, database, page_rows=3)
    assert report is not None
    assert report.ok


def test_a_replica_that_lacks_the_last_commits_is_filled_again(tmp_path: Path) -> None:
    """A fail-over that lost the end of the migration, after the file was left: neither is usable, and the same command puts back
    what is missing, compares all and opens the database."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)
    execute(
        database,
        "DELETE FROM custody.relocations WHERE step <> 'begun'",
        "DELETE FROM custody.secrets",
        "DELETE FROM custody.refresh_leases WHERE consent = (SELECT max(consent) FROM custody.refresh_leases)",
    )
    assert (file_opens(path), database_opens(database)) == (False, False)

    report = move(path, database)

    assert report is not None
    assert report.ok
    assert moved_contents(database) == under_its_new_name(contents(path))
    assert (file_opens(path), database_opens(database)) == (False, True)


def test_a_finished_migration_is_not_done_again(tmp_path: Path) -> None:
    """Also when a sidecar has worked there since: nothing is compared or changed."""
    vault, database = used_vault(tmp_path), new_database()
    move(vault.path, database)
    use(database, vault)
    before = moved_contents(database)

    assert move(vault.path, database) is None
    assert moved_contents(database) == before


def test_what_was_used_since_is_different(tmp_path: Path) -> None:
    """--verify-only is for before the first start: afterwards the database has more than the file."""
    vault, database = used_vault(tmp_path), new_database()
    move(vault.path, database)
    use(database, vault)
    with relocation(vault.path, database) as opened_again:
        report = opened_again.compare()

    assert sorted(table.name for table in report.tables if not table.ok) == ["log_heads", "log_leaves"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_neither_may_be_used_while_it_moves(tmp_path: Path) -> None:
    """A sidecar that starts on the file or on the database in the midst of it is told why it cannot."""
    path, database = full_vault(tmp_path), new_database()
    messages: list[str] = []

    async def start_on_file() -> None:
        async with opened_file(path):
            pass

    async def start_on_database() -> None:
        async with opened(database, instance="other"):
            pass

    def start(progress: Progress) -> None:
        if progress.rows == 7:
            for run in (start_on_file, start_on_database):
                with pytest.raises(StoreRefused) as refusal:
                    asyncio.run(run())
                messages.append(str(refusal.value))

    move(path, database, observe=start, page_rows=7)

    assert "another sidecar uses this database" in messages[0]
    assert "a migration of the database is under way" in messages[1]


def test_a_database_that_is_half_full_is_refused_under_any_name(tmp_path: Path) -> None:
    """A sidecar of another name would begin a log of its own on half a vault."""
    path, database = full_vault(tmp_path), new_database()
    killed(lambda: move(path, database), "after commit", count=4)

    async def start() -> None:
        async with opened(database, instance="other"):
            pass

    with pytest.raises(StoreRefused, match="is not complete; run custodyctl store migrate again"):
        asyncio.run(start())
    assert execute(database, "SELECT count(*) FROM custody.instances WHERE id = 'other'") == [(0,)]


def test_a_file_that_was_left_says_where_the_vault_is(tmp_path: Path) -> None:
    """One message, with the place, the name and the day; nothing is written."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)
    before = path.read_bytes()

    async def start() -> None:
        async with opened_file(path):
            pass

    with pytest.raises(StoreRefused) as refusal:
        asyncio.run(start())

    assert f"/{database} on 2026-11-23" in str(refusal.value)
    assert f"the instance {INSTANCE}" in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("on", ["file", "database"])
def test_a_running_sidecar_is_in_the_way(tmp_path: Path, on: str) -> None:
    """Whichever of the two it uses."""
    path, database = full_vault(tmp_path), new_database()

    async def run() -> str:
        async with opened_file(path) if on == "file" else opened(database):
            return await asyncio.to_thread(refused, path, database)

    message = asyncio.run(run())

    assert "a sidecar, or another migration, uses the" in message
    assert "stop it first" in message


def _use(database: str, *, cluster: str = "test") -> None:
    """A sidecar has been there."""

    async def run() -> None:
        from sidecar.store.postgresql import PostgresqlStore
        from tests.fakes.store import HandClock

        store = await PostgresqlStore.open(
            url=url_of(database), instance="pod-1", cluster=cluster, signer=SoftwareSigner(), clock=HandClock()
        )
        await store.record([draft()])
        await store.close()

    asyncio.run(run())


def test_a_database_that_is_not_as_it_must_be_is_refused(tmp_path: Path) -> None:
    """One message each; the file stays as it is, and nothing is written into the database."""
    path = full_vault(tmp_path)
    before = path.read_bytes()
    cases: dict[str, tuple[Callable[[str], object], str]] = {
        "in use": (_use, "holds a vault already .*two vaults are never merged"),
        "of another cluster": (
            lambda name: _use(name, cluster="red"),
            "belongs to cluster red, and the file to cluster test",
        ),
        "one row": (
            lambda name: execute(name, "INSERT INTO custody.claims VALUES ('c', 'r', 'm', '', 'r', 1)"),
            "holds a vault already .table claims.",
        ),
        "newer": (
            lambda name: execute(name, "UPDATE custody.alembic_version SET version_num = '9999'"),
            "newer schema than this sidecar knows",
        ),
        "older": (
            lambda name: execute(name, "UPDATE custody.alembic_version SET version_num = '0000'"),
            "older schema; run python -m sidecar.store.migrate",
        ),
        "no schema": (
            lambda name: execute(name, "DROP SCHEMA custody CASCADE"),
            "older schema; run python -m sidecar.store.migrate",
        ),
        "a guard is gone": (
            lambda name: execute(name, "DROP TRIGGER claims_stay ON custody.claims"),
            "lacks the trigger claims.claims_stay",
        ),
    }
    for case, (spoil, message) in cases.items():
        database = new_database()
        spoil(database)
        rows = execute(database, "SELECT count(*) FROM pg_class WHERE relname = 'relocations'")[0][0]

        with pytest.raises(StoreRefused, match=message):
            move(path, database)

        assert not rows or not execute(database, "SELECT * FROM custody.relocations"), case
    assert path.read_bytes() == before


def test_the_role_must_be_the_sidecars(tmp_path: Path) -> None:
    """No more rights than a sidecar has; the owner of the schema, who could do anything, is refused."""
    path, database = full_vault(tmp_path), new_database()

    assert "another role must own the schema" in refused(path, database, url=url_of(database, role=OWNER))
    assert "must not be SUPERUSER" in refused(path, database, url=url_of(database, role="postgres"))


def test_a_password_in_the_url_is_not_repeated(tmp_path: Path) -> None:
    """It is refused, with the rule and without the value."""
    message = refused(full_vault(tmp_path), "", url="postgresql://sidecar:HUNTER2@db.example/custody")

    assert "must not hold a password" in message
    assert "HUNTER2" not in message


def test_a_file_that_holds_no_vault_is_refused(tmp_path: Path) -> None:
    """A file that no sidecar has used; one that is not there; one whose log is damaged; and one of a newer schema."""
    unused, damaged, newer = new_file(tmp_path), full_vault(tmp_path), full_vault(tmp_path)
    for path, *statements in (
        (damaged, "DROP TRIGGER log_leaves_stay", 'DELETE FROM log_leaves WHERE "index" = 6'),
        (newer, "UPDATE alembic_version SET version_num = '9999'"),
    ):
        with closing(sqlite3.connect(path, isolation_level=None)) as driver:
            guards = driver.execute("SELECT sql FROM sqlite_master WHERE name = 'log_leaves_stay'").fetchone()
            for statement in statements:
                driver.execute(statement)
            if len(statements) == 2:
                driver.execute(guards[0])
    database = new_database()

    assert "no sidecar has used it yet" in refused(unused, database)
    assert "there is no database file" in refused(tmp_path / "none.db", database)
    assert "the log does not end where its head says; nothing was migrated" in refused(damaged, database)
    assert "newer schema than this sidecar knows" in refused(newer, database)
    assert not (tmp_path / "none.db").exists()
    assert execute(database, "SELECT count(*) FROM custody.relocations") == [(0,)]


def test_what_was_begun_is_gone_on_with_only_as_it_was_begun(tmp_path: Path) -> None:
    """Another name, another file, or a file that was used in between: refused, and what was copied stays as it is."""
    vault, database = used_vault(tmp_path), new_database()
    killed(lambda: move(vault.path, database), "after commit", count=3)
    other = used_vault(tmp_path)

    assert f"begun with --instance {INSTANCE}" in refused(vault.path, database, instance="shop-1")
    assert "the vault of another file moves into this database" in refused(other.path, database)

    async def run() -> None:
        async with opened_file(vault.path, clock=vault.clock) as store:  # as who goes back to the file for now
            await store.record([draft()])

    asyncio.run(run())
    assert "a sidecar has used the file since the migration began" in refused(vault.path, database)
    assert move(vault.path, new_database()) is not None


def test_rows_of_a_stranger_are_in_the_way(tmp_path: Path) -> None:
    """A row that somebody has put where one of the file belongs ends it with one message that shows no value."""
    path, database = full_vault(tmp_path), new_database()
    killed(lambda: move(path, database), "after commit")
    keys = "('FR7630006000011234567890189', 'r', 'm', '', 'r', 1)"

    def meddle(progress: Progress) -> None:
        if progress.rows == 0 and progress.phase is Phase.COPY:
            execute(
                database,
                f"INSERT INTO custody.claims VALUES {keys}",
                f"INSERT INTO custody.instances VALUES ('x', '{contents(path)['instances'][0][1]}', 1)",
            )

    message = refused(path, database, observe=meddle)

    assert "holds rows that did not come from this file" in message
    assert "FR76" not in message
    assert "audit/" not in message


def test_one_file_moves_to_one_place(tmp_path: Path) -> None:
    """Once it was left, no other database takes it; and an older copy of the file is not taken for it."""
    vault, first, second = used_vault(tmp_path), new_database(), new_database()
    path = vault.path
    copies = [_copied(path, tmp_path / "older")]

    async def run() -> None:
        async with opened_file(path, clock=vault.clock) as store:
            await store.record([draft()])

    asyncio.run(run())
    copies.append(_copied(path, tmp_path / "newer"))
    killed(lambda: move(path, second), "after commit", count=2)  # given up half way
    move(path, first)

    assert f"has moved to {url_place(first)} already" in refused(path, second)
    assert f"has moved to {url_place(first)} already" in refused(path, new_database())
    for copy in copies:
        assert "an older copy of the one that was migrated" in refused(copy, first)
    assert "or this is another copy of it" in refused(copies[0], second)
    assert not database_opens(second)


def url_place(database: str) -> str:
    return f"{cluster().sockets}/{database}"


def test_verify_only_needs_a_migration(tmp_path: Path) -> None:
    """Of this file, into this database, under this name."""
    path, database, unused = full_vault(tmp_path), new_database(), new_database()
    move(path, database)
    for other, instance in ((unused, INSTANCE), (database, "shop-1")):
        with (
            pytest.raises(StoreRefused, match="was not migrated into this database under this instance name"),
            relocation(path, other, instance=instance) as opened_again,
        ):
            opened_again.compare()


def test_a_strangers_lock_is_one_message_and_it_goes_on(tmp_path: Path) -> None:
    """It is waited for as long as for any lock; the message says to run it again."""
    path, database = full_vault(tmp_path), new_database()
    with cluster().connect(database) as stranger:
        stranger.execute("BEGIN")
        stranger.execute("LOCK TABLE custody.payments IN SHARE MODE")
        message = refused(path, database)

    assert "somebody holds a lock in the database for too long; run the same command again" in message
    assert move(path, database) is not None


# --- and back ---------------------------------------------------------------------------------------------------------


def test_an_unused_database_can_be_given_up(tmp_path: Path) -> None:
    """The file is the vault again, as it was; the database never is; and another one may take it."""
    vault, database, other = used_vault(tmp_path), new_database(), new_database()
    before = contents(vault.path)
    move(vault.path, database)

    undo(vault.path, database)

    assert (file_opens(vault.path), database_opens(database)) == (True, False)
    assert contents(vault.path) == before
    assert "a migration into this database was undone" in refused(vault.path, database)
    assert move(vault.path, other) is not None
    assert (file_opens(vault.path), database_opens(other)) == (False, True)


@pytest.mark.parametrize(
    ("place", "count"), [(place, n) for place in ("before commit", "after commit") for n in (1, 2)]
)
def test_killed_while_it_is_undone_it_goes_on(tmp_path: Path, place: str, count: int) -> None:
    """At no point are both usable; the same command finishes it."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)

    assert killed(lambda: undo(path, database), place, count=count)

    usable = file_opens(path), database_opens(database)
    assert usable == ((False, True), (False, False), (True, False))[count - 1 + (place == "after commit")]
    if usable != (True, False):
        undo(path, database)
    assert (file_opens(path), database_opens(database)) == (True, False)


def test_a_change_over_that_was_cut_in_two_can_be_undone(tmp_path: Path) -> None:
    """The file was left, and the database is gone or will not do: as long as it was not opened, the file can be the vault again."""
    path, database = full_vault(tmp_path), new_database()
    assert killed(lambda: move(path, database), "before commit", count=COMMITS)
    assert (file_opens(path), database_opens(database)) == (False, False)

    undo(path, database)

    assert (file_opens(path), database_opens(database)) == (True, False)


@pytest.mark.parametrize("instance", [INSTANCE, "pod-2"])
def test_a_used_database_cannot_be_given_up(tmp_path: Path, instance: str) -> None:
    """Whatever name the sidecar had that used it: the file lacks what was done since, and could pay again."""
    vault, database = used_vault(tmp_path), new_database()
    move(vault.path, database)
    use(database, vault, instance=instance)
    with pytest.raises(StoreRefused, match=r"a sidecar has used the database since: .* may pay again"):
        undo(vault.path, database)
    assert (file_opens(vault.path), database_opens(database)) == (False, True)


def test_there_is_nothing_to_undo_before_the_file_was_left(tmp_path: Path) -> None:
    """Half way the file is the vault anyway; and another database cannot give it back."""
    path, database = full_vault(tmp_path), new_database()
    with pytest.raises(StoreRefused, match="nothing to undo"):
        undo(path, database)
    move(path, database)
    with pytest.raises(StoreRefused, match="not into this database"):
        undo(path, new_database())


def test_a_file_whose_database_is_lost_comes_back_by_hand(tmp_path: Path) -> None:
    """With the statement of docs/store.md, which the guards of the table let through."""
    page = (Path(__file__).parents[3] / "docs" / "store.md").read_text()
    statement = page.partition("```sql\nINSERT INTO relocations")[2].partition("```")[0]
    path = full_vault(tmp_path)
    move(path, new_database())

    with closing(sqlite3.connect(path, isolation_level=None)) as driver:
        driver.execute(f"INSERT INTO relocations{statement}")

    assert file_opens(path)
    assert move(path, new_database()) is not None


# --- the marks themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement", ["DELETE FROM {}relocations", "UPDATE {}relocations SET step = 'open'", "TRUNCATE {}relocations"]
)
def test_a_mark_stays_as_it_is(tmp_path: Path, statement: str) -> None:
    """The databases themselves refuse to change or delete one, whoever asks."""
    path, database = full_vault(tmp_path), new_database()
    move(path, database)

    with cluster().connect(database, role=OWNER) as owner, pytest.raises(psycopg.IntegrityError):
        owner.execute(statement.format("custody."))
    if "TRUNCATE" not in statement:  # which SQLite does not know
        with closing(sqlite3.connect(path)) as driver, pytest.raises(sqlite3.IntegrityError):
            driver.execute(statement.format(""))


def test_a_sidecar_that_connects_again_looks_again(tmp_path: Path) -> None:
    """One that had opened the database and lost its connection does not write into what was given up meanwhile."""
    vault, database = used_vault(tmp_path), new_database()
    move(vault.path, database)

    async def run() -> None:
        async with opened(database, instance=INSTANCE, clock=vault.clock) as store:
            await asyncio.to_thread(terminate, database)
            await asyncio.to_thread(undo, vault.path, database)
            with pytest.raises(Unavailable):
                await store.record([draft()])

    asyncio.run(run())
    assert (file_opens(vault.path), database_opens(database)) == (True, False)
