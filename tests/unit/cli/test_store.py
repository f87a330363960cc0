"""custodyctl store migrate: what it writes, how it ends, what a watcher sees. What moves: tests/unit/store/test_relocation.py."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO, cast

import pytest

from sidecar.cli.failures import ExitCode
from sidecar.cli.session import Session
from sidecar.cli.store import _Events
from sidecar.store.relocation.relocation import Phase, Progress
from tests.unit.cli.support import NOW, Ran, assert_golden, run
from tests.unit.cli.test_line import COMMAND, ROOT, environment
from tests.unit.store.postgresql import cluster, execute, new_database, url_of
from tests.unit.store.vaults import full_vault

_SHA = re.compile(r"\b[0-9a-f]{64}\b")


def migrate(path: Path, database: str, *options: str, url: str | None = None) -> Ran:
    return run(
        *("store", "migrate", "--from", str(path), "--to", url or url_of(database), "--instance", "shop-0", *options),
        session=Session(now=lambda: NOW),
    )


def events(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.err.splitlines() if line.startswith("{")]


def test_a_migration_from_start_to_end(tmp_path: Path) -> None:
    """Exit status 0; the document is the contract's, on standard output; the events are on standard error, a line each."""
    path, database = full_vault(tmp_path), new_database()

    ran = migrate(path, database, "--format", "json")

    assert ran.code == 0, ran.err
    told = events(ran)
    assert [(each["phase"], each["row_count"]) for each in told] == [
        ("copy", 0),
        ("copy", told[0]["total_row_count"]),
        ("verify", 0),
        ("verify", told[0]["total_row_count"]),
    ]
    assert {each["schema"] for each in told} == {"custodyctl.store-migration-progress/1"}
    assert "start this one with store.url" in ran.err
    assert ran.document()["tables"][0]["source_sha256"] == ran.document()["tables"][0]["target_sha256"]
    assert_golden("store-migration.json", _SHA.sub("SHA-256", ran.out).replace(str(path), "/DIRECTORY/store.db"))


def test_a_table_names_every_table_with_count_and_digest(tmp_path: Path) -> None:
    """For people."""
    path, database = full_vault(tmp_path), new_database()

    ran = migrate(path, database)

    assert ran.code == 0
    assert re.search(r"outcome +migrated", ran.out)
    assert re.search(r"claims +7 +[0-9a-f]{64} +the same", ran.out)
    assert re.search(r"log's end +\d+ entries, covered until size \d+", ran.out)


def test_what_differs_is_exit_status_4(tmp_path: Path) -> None:
    """Table, key and column are named, for people and for scripts; a value is not."""
    path, database = full_vault(tmp_path), new_database()
    migrate(path, database)
    execute(database, "UPDATE custody.claims SET resource = 'CANARY' WHERE caller = 'Z-0'")

    table = migrate(path, database, "--verify-only")
    document = migrate(path, database, "--verify-only", "--format", "json")

    assert (table.code, document.code) == (ExitCode.VERIFICATION_FAILED, ExitCode.VERIFICATION_FAILED)
    assert r"the row with the key (Z-0, \N-6) is different in resource" in table.out
    found = next(each for each in document.document()["tables"] if each["table"] == "claims")
    assert found["difference"] == {"kind": "different", "key": ["Z-0", r"\N-6"], "columns": ["resource"]}
    assert document.document()["outcome"] == "different"
    assert "CANARY" not in table.out + table.err + document.out + document.err


def test_again_verify_and_back(tmp_path: Path) -> None:
    """The same command again does nothing; --verify-only compares; --undo gives the file back."""
    path, database = full_vault(tmp_path), new_database()
    ran = [migrate(path, database, "--format", "json", *more) for more in ((), (), ("--verify-only",), ("--undo",))]

    assert [each.code for each in ran] == [0, 0, 0, 0]
    outcomes = [each.document()["outcome"] for each in ran]
    assert outcomes == ["migrated", "already-migrated", "verified", "undone"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--from", "a", "--to", "b"], "--instance"),
        (["--from", "a", "--to", "b", "--instance", "Shop"], "--instance must be 1 to 128 of a-z"),
        (["--from", "a", "--to", "b", "--instance", "shop", "--undo", "--verify-only"], "exclude each other"),
        (["--from", "a", "--to", "b", "--instance", "shop", "--from", "c"], "--from was given more than once"),
    ],
)
def test_wrong_usage(options: list[str], told: str) -> None:
    """Exit status 2, before any database is looked at."""
    ran = run("store", "migrate", *options)

    assert ran.code == ExitCode.USAGE
    assert told in ran.err


def test_a_refusal_is_one_line_with_advice(tmp_path: Path) -> None:
    """Exit status 1; a password in the URL is not repeated."""
    refused = migrate(full_vault(tmp_path), "", url="postgresql://sidecar:HUNTER2@db.example/custody")
    missing = migrate(tmp_path / "none.db", "", url="postgresql://sidecar@db.example/custody")

    assert (refused.code, missing.code) == (ExitCode.FAILED, ExitCode.FAILED)
    assert "must not hold a password" in refused.err
    assert "advice: see docs/store.md" in refused.err
    assert "HUNTER2" not in refused.out + refused.err
    assert "there is no database file" in missing.err


def test_events_are_bounded_in_number() -> None:
    """The first and the last of a phase, and one a second in between, however many pages there are."""
    seconds = [0.0]
    told: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            told.extend(line for line in text.splitlines() if line)

        def flush(self) -> None:
            """Nothing is kept back."""

    stream, sys.stderr = sys.stderr, cast("TextIO", Stream())
    try:
        tell = _Events(clock=lambda: seconds[0])
        for rows in range(0, 10_001, 10):
            seconds[0] += 0.01
            tell(Progress(phase=Phase.COPY, table="claims", rows=rows, total_rows=10_000))
    finally:
        sys.stderr = stream

    counts = [json.loads(line)["row_count"] for line in told]
    assert (counts[0], counts[-1]) == (0, 10_000)
    assert 10 <= len(counts) <= 13


def _process(path: Path, database: str, stderr: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*COMMAND, "store", "migrate", "--from", str(path), "--to", url_of(database), "--instance", "shop-0"],
        cwd=ROOT,
        env=environment(TERM="xterm", COLUMNS="120"),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    """With rows, rows a second and the time that is left, for the copy and for the comparison."""
    leader, follower = pty.openpty()
    running = _process(full_vault(tmp_path), new_database(), follower)
    os.close(follower)
    shown = b""
    try:
        while piece := _read(leader):
            shown += piece
        code = running.wait(60)
    finally:
        running.kill()
        running.wait()
        os.close(leader)

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert code == 0, text
    assert re.search(r"copy.*━.*\d+/\d+.*rows/s.*0:00:0", text)
    assert re.search(r"verify.*━.*\d+/\d+.*rows/s.*0:00:0", text)
    assert "{" not in text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when nobody has the other end any more
        return b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_it_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    """While it waits for a lock of somebody else: the shell's exit status, what to do, and the same command finishes."""
    path, database = full_vault(tmp_path), new_database()
    with cluster().connect(database) as stranger:
        stranger.execute("BEGIN")
        stranger.execute("LOCK TABLE custody.payments IN SHARE MODE")  # it can be read, not written
        running = _process(path, database, subprocess.PIPE)
        try:
            assert running.stderr is not None
            running.stderr.readline()
            running.send_signal(number)
            _, said = running.communicate(timeout=30)
        finally:
            running.kill()
            running.wait()

    assert running.returncode == code, said
    assert b"run the same command again" in said
    assert b"Traceback" not in said
    assert migrate(path, database).code == 0
