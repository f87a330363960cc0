"""The database file: who may open it, where it may lie, and the settings that every connection proves."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.store import SqliteStore, StoreRefused
from sidecar.store import sqlite as module
from sidecar.store.sqlite import FileLock, SqliteConnection, SqliteDatabase, path_of_url
from tests.fakes.store import HandClock, SoftwareSigner
from tests.unit.store.support import draft, new_database, opened


def _open(path: Path, *, migrate: bool = False, cluster: str = "test", synchronous: str = "FULL") -> str:
    """Opens and closes; the origin of the log."""

    async def run() -> str:
        store = await SqliteStore.open(
            path=path,
            cluster=cluster,
            signer=SoftwareSigner(),
            clock=HandClock(),
            migrate=migrate,
            synchronous=synchronous,
        )
        await store.close()
        return store.origin

    return asyncio.run(run())


def _pragma(connection: SqliteConnection, name: str) -> object:
    return connection.driver.execute(f"PRAGMA {name}").fetchone()[0]


@pytest.mark.parametrize("read_only", [False, True])
def test_every_connection_has_the_settings(tmp_path: Path, read_only: bool) -> None:
    """Durable, constrained, and not waiting for ever: on the writer's and on the readers' connection."""
    connection = SqliteDatabase(new_database(tmp_path)).connect(read_only=read_only)

    assert _pragma(connection, "journal_mode") == "wal"
    assert _pragma(connection, "synchronous") == 2
    assert _pragma(connection, "foreign_keys") == 1
    assert _pragma(connection, "busy_timeout") == 2000
    assert _pragma(connection, "secure_delete") == 1
    assert _pragma(connection, "trusted_schema") == 0
    assert _pragma(connection, "query_only") == int(read_only)
    assert _pragma(connection, "application_id") == module.APPLICATION_ID
    connection.close()


def test_a_readers_connection_cannot_write(tmp_path: Path) -> None:
    """What reads cannot change anything, whatever statement it is given."""
    connection = SqliteDatabase(new_database(tmp_path)).connect(read_only=True)

    with pytest.raises(sqlite3.OperationalError):
        connection.driver.execute("INSERT INTO instances VALUES ('a', 'b', 1)")
    connection.close()


@pytest.mark.parametrize("level", ["OFF", "NORMAL", "normal", "", "1", "ALWAYS"])
def test_less_than_full_synchronous_is_refused(tmp_path: Path, level: str) -> None:
    """A configuration that asks for less than FULL does not start."""
    with pytest.raises(StoreRefused, match="synchronous"):
        _open(new_database(tmp_path), synchronous=level)


def test_extra_synchronous_is_taken(tmp_path: Path) -> None:
    """More than FULL may be asked for, and is set."""
    connection = SqliteDatabase(new_database(tmp_path), synchronous="EXTRA").connect()

    assert _pragma(connection, "synchronous") == 3
    connection.close()


def test_a_setting_that_does_not_take_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite ignores what it does not know; a setting that reads back differently is a refusal, and not a hope."""
    path = new_database(tmp_path)
    monkeypatch.setitem(module._SYNCHRONOUS, "FULL", 7)  # a level that SQLite cuts down to one it knows

    with pytest.raises(StoreRefused, match="does not take the setting synchronous"):
        _open(path)


def test_a_new_file_is_made_for_us_alone(tmp_path: Path) -> None:
    """open() makes and migrates the file; it, its write-ahead log and its lock can be read by nobody else."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    path = directory / "store.db"

    async def run() -> set[str]:
        async with asyncio.timeout(60):
            store = await SqliteStore.open(path=path, cluster="test", signer=SoftwareSigner(), clock=HandClock())
        await store.record([draft()])
        modes = {f"{file.name} {stat.S_IMODE(file.stat().st_mode):o}" for file in directory.iterdir()}
        await store.close()
        return modes

    assert asyncio.run(run()) == {"store.db 600", "store.db-wal 600", "store.db-shm 600", "store.db.lock 600"}


def test_the_sidecar_does_not_load_alembic(tmp_path: Path) -> None:
    """Opening a file that has the newest schema loads no migration code: it costs memory and start-up time."""
    path = new_database(tmp_path)
    code = (
        "import asyncio, sys, pathlib\n"
        "from sidecar.store import SqliteStore\n"
        "from tests.fakes.store import HandClock, SoftwareSigner\n"
        "async def run():\n"
        f"    path = pathlib.Path({str(path)!r})\n"
        "    store = await SqliteStore.open(path=path, cluster='test', signer=SoftwareSigner(), clock=HandClock())\n"
        "    await store.close()\n"
        "asyncio.run(run())\n"
        "sys.exit(any(name.partition('.')[0] in ('alembic', 'mako') for name in sys.modules))\n"
    )

    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_two_sidecars_cannot_have_one_file(tmp_path: Path) -> None:
    """The second one is refused while the first is there, in another process too, and welcome afterwards (F21, P13)."""
    path = new_database(tmp_path)

    async def run() -> None:
        async with opened(path):
            with pytest.raises(StoreRefused, match="another sidecar"):
                await SqliteStore.open(
                    path=path, cluster="test", signer=SoftwareSigner(), clock=HandClock(), migrate=False
                )
            code = f"import pathlib; from sidecar.store.sqlite import FileLock; FileLock(pathlib.Path({str(path)!r}))"
            other = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
            )
            assert other.returncode == 1
            assert b"another sidecar" in other.stderr

    asyncio.run(run())
    assert _open(path).startswith("audit/test/")


def test_a_symbolic_link_leads_to_the_same_lock(tmp_path: Path) -> None:
    """A second way to the file is not a second lock."""
    path = new_database(tmp_path)
    link = path.with_name("link.db")
    link.symlink_to(path)

    async def run() -> None:
        async with opened(path):
            with pytest.raises(StoreRefused, match="another sidecar"):
                await SqliteStore.open(
                    path=link, cluster="test", signer=SoftwareSigner(), clock=HandClock(), migrate=False
                )

    asyncio.run(run())


def test_the_lock_is_free_after_a_refusal(tmp_path: Path) -> None:
    """A start that fails after the lock was taken leaves nothing behind."""
    path = new_database(tmp_path)
    with pytest.raises(StoreRefused):
        _open(path, synchronous="OFF")

    FileLock(path).release()


def test_a_file_belongs_to_one_cluster(tmp_path: Path) -> None:
    """The log's name is made once for each file and kept; another cluster's file is refused."""
    path, other = new_database(tmp_path), new_database(tmp_path)
    origin = _open(path)

    assert _open(path) == origin
    assert _open(other) != origin
    with pytest.raises(StoreRefused, match="another cluster"):
        _open(path, cluster="production")
    with pytest.raises(StoreRefused, match="visible ASCII"):
        _open(new_database(tmp_path), cluster="with blank")


def _world_readable(path: Path) -> Path:
    path.chmod(0o640)
    return path


def _in_public_directory(path: Path) -> Path:
    path.parent.chmod(0o777)
    return path


def _second_name(path: Path) -> Path:
    os.link(path, path.with_name("second.db"))
    return path


def _not_a_database(path: Path) -> Path:
    path.write_bytes(b"something else, and more than sixteen bytes of it" * 100)
    return path


def _of_another_application(path: Path) -> Path:
    path.unlink()
    driver = sqlite3.connect(path)
    driver.execute("CREATE TABLE things (id INTEGER)")
    driver.close()
    path.chmod(0o600)
    return path


def _a_directory(path: Path) -> Path:
    path.unlink()
    path.mkdir(mode=0o700)
    return path


def _cut_off(path: Path) -> Path:
    os.truncate(path, 5000)
    return path


REFUSALS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "others can read it": (_world_readable, "mode to 0600"),
    "everybody may write to its directory": (_in_public_directory, "mode to 0700"),
    "it has a second name": (_second_name, "more than one name"),
    "it is no database": (_not_a_database, "not a database that can be read"),
    "it is another application's": (_of_another_application, "another application"),
    "it is a directory": (_a_directory, "not a regular file"),
    "it is cut off": (_cut_off, "not a database that can be read"),
    "it is not there": (lambda path: path.with_name("none.db"), "no database file"),
    "its directory is not there": (lambda path: path.parent / "none" / "store.db", "directory of the database"),
    "it is in memory": (lambda path: Path(":memory:"), "absolute path"),
    "it is named like one in memory": (lambda path: path.parent / ":memory:", "absolute path"),
    "its path is relative": (lambda path: Path("store.db"), "absolute path"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_that_is_not_safe_is_refused(tmp_path: Path, case: str) -> None:
    """Each with one message that says what is wrong, and nothing is changed or made."""
    spoil, message = REFUSALS[case]
    path = spoil(new_database(tmp_path))
    before = sorted(file.name for file in tmp_path.rglob("*") if not file.name.endswith((".lock", "-wal", "-shm")))

    with pytest.raises(StoreRefused, match=message) as refusal:
        _open(path)

    after = sorted(file.name for file in tmp_path.rglob("*") if not file.name.endswith((".lock", "-wal", "-shm")))
    assert "\n" not in str(refusal.value)
    assert before == after


@pytest.mark.parametrize("magic", [0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400])
def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int) -> None:
    """Locks and shared memory do not work across machines (F15)."""
    monkeypatch.setattr(module, "file_system_type", lambda path: magic)

    with pytest.raises(StoreRefused, match="network file system"):
        _open(new_database(tmp_path))


def test_the_file_systems_type_is_read(tmp_path: Path) -> None:
    """statfs(2) answers for a real directory: /proc has its own magic number (linux/magic.h)."""
    assert module.file_system_type(Path("/proc")) == 0x9FA0
    assert module.file_system_type(tmp_path) not in (0, 0x9FA0)
    assert module.file_system_type(tmp_path / "none") == 0


def test_a_read_only_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume mounted read-only is named as such (L8)."""
    real = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, *real[9:]))
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)

    with pytest.raises(StoreRefused, match="read-only"):
        _open(new_database(tmp_path))


def test_an_old_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STRICT tables need SQLite 3.37; an older one would not enforce the columns' types."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))

    with pytest.raises(StoreRefused, match=r"older than 3\.37"):
        _open(new_database(tmp_path))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///relative.db", "postgresql:///x", "/data/x", "xsqlite:////x"])
def test_other_urls_are_refused(url: str) -> None:
    """One form of URL only."""
    with pytest.raises(StoreRefused):
        path_of_url(url)


def test_the_url_names_the_file() -> None:
    """sqlite:/// and the absolute path."""
    assert path_of_url("sqlite:////data/store.db") == Path("/data/store.db")


def test_another_applications_file_is_left_as_it_is(tmp_path: Path) -> None:
    """A refusal does not so much as change a setting in a file that is not ours."""
    path = _of_another_application(new_database(tmp_path))
    content = path.read_bytes()

    for migrate in (False, True):
        with pytest.raises(StoreRefused, match="another application"):
            _open(path, migrate=migrate)

    assert path.read_bytes() == content
