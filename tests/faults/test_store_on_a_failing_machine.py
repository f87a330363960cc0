"""fi_L3, fi_L6, fi_L7: power cuts, a write-ahead log that nobody empties, and copies made while it is written."""

import asyncio
import copy
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sidecar.domain.audit import AuditEvent
from sidecar.errors import Corrupt
from sidecar.store import SqliteStore
from sidecar.store.errors import StoreRefused
from tests.fakes.store import SoftwareSigner
from tests.faults.extent import everything, seed
from tests.faults.sweeps import Harness, Place
from tests.faults.tracing import why_not
from tests.unit.store.crash_writer import SEED, SystemClock
from tests.unit.store.support import draft, new_database, opened

Record = Callable[[str, object], None]
SECTOR_BYTES = 512
_CALL = re.compile(
    r"^(\w+)\(\d+<((?:\\x[0-9a-f]{2})+|[^>]*)>(?:, \"((?:\\x[0-9a-f]{2})*)\", \d+, (\d+)|, (\d+))?\)\s+= (?!-)",
    re.MULTILINE,
)


# --- L3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    file: str
    data: bytes
    offset: int


@dataclass(slots=True, kw_only=True)
class _Disk:
    """What a disk that loses power may hold: all that was written before the last sync of its file, and any part of the rest, in
    any order, each write perhaps torn between two sectors."""

    files: dict[str, bytearray]
    unsynced: list[_Write] = field(default_factory=list)

    def write(self, write: _Write) -> None:
        self.unsynced.append(write)

    def sync(self, file: str) -> None:
        for write in [write for write in self.unsynced if write.file == file]:
            self._apply(write)
        self.unsynced = [write for write in self.unsynced if write.file != file]

    def truncate(self, file: str, length: int) -> None:
        self.sync(file)
        del self.files[file][length:]

    def after_a_cut(self, chance: random.Random) -> dict[str, bytes]:
        copy = _Disk(files={name: bytearray(content) for name, content in self.files.items()})
        for write in chance.sample(self.unsynced, chance.randint(0, len(self.unsynced))):
            kept = len(write.data)
            if chance.random() < 0.3:
                kept = SECTOR_BYTES * chance.randrange(kept // SECTOR_BYTES + 1)
            copy._apply(_Write(file=write.file, data=write.data[:kept], offset=write.offset))
        return {name: bytes(content) for name, content in copy.files.items()}

    def _apply(self, write: _Write) -> None:
        content = self.files[write.file]
        if len(content) < write.offset:
            content.extend(bytes(write.offset - len(content)))
        content[write.offset : write.offset + len(write.data)] = write.data


def _plain(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", "")) if escaped.startswith("\\x") else escaped.encode()


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("name", ["payment, class A", "payment, class C", "revocation"])
def test_power_cut(harness: Harness, name: str, record_property: Record) -> None:
    """fi_L3: the writes of a run are recorded, and the machine loses power after each of its syncs: what was answered is there."""
    whole = harness.place(name, "recorded")
    _, tracer = whole.act_traced("writer", ("pwrite64", "fdatasync", "fsync", "ftruncate"), data=True)
    held = {path.name: path.read_bytes() for path in whole.at_hold.glob("store.db*")}
    calls = _recorded(tracer.output.read_text())
    assert "store.db-wal" in held
    chance = random.Random(f"{seed()} {name}")
    cuts = [number for number, (call, _) in enumerate(calls) if call in ("fdatasync", "fsync")]
    assert len(cuts) >= 3
    times = 10 if everything() else 1
    for cut in cuts * times:
        until = calls[: cut + 1 + chance.randrange(25)]
        place = harness.place(name, f"power cut after call {cut} (seed {seed()})")
        _put_in_place(place, held, until, chance)
        # A payment is sent after the second sync, that of the dispatch record, and before the third, that of its outcome.
        syncs = sum(call in ("fdatasync", "fsync") for call, _ in until)
        if place.prepared.scenario.work != "payment" or syncs >= 2 + chance.randrange(2):
            place.use_bank(copy.deepcopy(whole.bank))
        place.nothing_was_told()
        place.recover(number=chance.randrange(6))
        place.judge()
        harness.done(place)
    harness.done(whole)
    record_property("injected", len(cuts) * times)


Recorded = list[tuple[str, _Write]]


def _recorded(trace: str) -> Recorded:
    """The calls on the database's files, in order; those that fail are not there."""
    found: Recorded = []
    for match in _CALL.finditer(trace):
        name, path, data, offset, length = match.groups()
        file = Path(_plain(path).decode()).name
        if file.startswith("store.db") and not file.endswith("-shm"):
            number = int(offset or length or 0)
            found.append((name, _Write(file=file, data=_plain(data or ""), offset=number)))
    return found


def _put_in_place(place: Place, held: dict[str, bytes], calls: Recorded, chance: random.Random) -> None:
    """The files as the disk may have them after these calls."""
    disk = _Disk(files={file: bytearray(content) for file, content in held.items() if not file.endswith("-shm")})
    for call, write in calls:
        if call == "pwrite64":
            disk.write(write)
        elif call == "ftruncate":
            disk.truncate(write.file, write.offset)
        else:
            disk.sync(write.file)
    for file in place.database.parent.glob("store.db*"):
        file.unlink()
    for name, content in disk.after_a_cut(chance).items():
        target = place.database.with_name(name)
        target.write_bytes(content)
        target.chmod(0o600)


# --- L6


def test_a_reader_that_keeps_the_write_ahead_log(tmp_path: Path) -> None:
    """fi_L6: a stranger reads for ever, so nothing can be moved into the file: commits go on, and afterwards the log is emptied."""

    async def run() -> None:
        path = new_database(tmp_path)
        async with opened(path) as store:
            stranger = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            stranger.execute("BEGIN")
            stranger.execute("SELECT count(*) FROM log_leaves").fetchone()
            for _ in range(120):
                await store.record([draft(AuditEvent.TOKEN_USE) for _ in range(20)])
            grown = path.with_name("store.db-wal").stat().st_size
            assert (await store.log_position()).size == 2400
            stranger.close()
            for _ in range(120):
                await store.record([draft(AuditEvent.TOKEN_USE) for _ in range(20)])
            assert path.with_name("store.db-wal").stat().st_size < 2 * grown
            assert (await store.log_position()).size == 4800
        assert not path.with_name("store.db-wal").exists() or path.with_name("store.db-wal").stat().st_size == 0

    asyncio.run(run())


# --- L7


def test_a_copy_made_while_it_is_written(tmp_path: Path) -> None:
    """fi_L7: `cp` of file and log at different moments: the copy opens with a log that is whole up to its end, or is refused,
    at the start or where the damage is met."""

    async def run() -> None:
        path, refused, taken = new_database(tmp_path), 0, 0
        async with opened(path, clock=SystemClock()) as store:
            await store.record([draft(AuditEvent.SIDECAR_STARTED)])
            for _ in range(6):
                writing = asyncio.ensure_future(_write(store, 60))
                copy = new_database(tmp_path)
                for suffix in ("", "-wal"):  # one after the other, as cp does; -shm is not data
                    source = path.with_name(path.name + suffix)
                    await asyncio.to_thread(shutil.copyfile, source, copy.with_name(copy.name + suffix))
                    await asyncio.sleep(0.01)
                await writing
                whole = await _opens_whole(copy)
                taken, refused = taken + whole, refused + (not whole)
        assert taken + refused == 6

    asyncio.run(run())


async def _write(store: SqliteStore, count: int) -> None:
    for _ in range(count):
        await store.record([draft(AuditEvent.TOKEN_USE)])


async def _opens_whole(path: Path) -> bool:
    """False where the store refuses the file. One that it takes has a log without a gap, which goes on."""
    try:
        store = await SqliteStore.open(
            path=path, cluster="test", signer=SoftwareSigner(seed=SEED), clock=SystemClock(), migrate=False
        )
    except StoreRefused:
        return False
    try:
        return await _goes_on(store)
    except Corrupt:
        return False
    finally:
        await store.close()


async def _goes_on(store: SqliteStore) -> bool:
    size = (await store.log_position()).size
    leaves = await store.leaves(start=0, limit=1_000_000)
    assert [leaf.index for leaf in leaves] == list(range(size))
    await store.record([draft(AuditEvent.TOKEN_USE)])
    assert (await store.log_position()).size == size + 1
    return True
