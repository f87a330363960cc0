"""The real store on a real SQLite file, its group committer run by the loop instead of by its thread, with commits that fail.

Why without the thread: two threads run in an order that nothing can play again. What the thread adds is kept: a command is executed
some time after it was queued, together with those that wait by then; its caller hears of it some time after the commit, or never;
and readers see the database before and after, because a transaction is a matter of one moment for them, with or without the thread.
"""

import contextlib
import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import Unavailable
from sidecar.ports import CheckpointSigner, Clock
from sidecar.store import SqliteStore, committer, store
from sidecar.store.committer import GroupCommitter
from sidecar.store.sqlite import FileLock, SqliteConnection, SqliteDatabase, check_file

__all__ = ["STALL_SECONDS", "StoreFaults", "abandon", "open_store", "simulated_committer"]

CLUSTER = "test-cluster"
_COMMIT_SECONDS = 0.002
STALL_SECONDS = 11.0  # longer than a caller of the store waits


@dataclass(kw_only=True)
class StoreFaults:
    """What goes wrong, by chance. `rate` is of commands and of commits."""

    chance: random.Random
    rate: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def strikes(self, name: str) -> bool:
        struck = self.rate > 0 and self.chance.random() < self.rate
        if struck:
            self.counts[name] = self.counts.get(name, 0) + 1
        return struck

    def pause_seconds(self) -> float:
        return _COMMIT_SECONDS * self.chance.random()


class _LoopCommitter(GroupCommitter):
    faults: StoreFaults

    def _work(self) -> None:
        """The thread has nothing to do and ends."""

    def _enqueue(self, waiting: Any) -> None:
        super()._enqueue(waiting)
        stalled = self.faults.strikes("writer stalled")
        self._loop.call_later(STALL_SECONDS if stalled else self.faults.pause_seconds(), self._turn)

    def _turn(self) -> None:
        """One turn of the writer: all that wait now, in one transaction."""
        queue = self._queue
        while queue.waiting and queue.waiting[0].future.done():
            queue.waiting.popleft()  # its caller has given up
        if queue.waiting and not queue.closed:
            group = self._next_group()
            self._commit_group(group)
            self._answer(group)
            self._flush(group)

    def _answer(self, group: Sequence[Any]) -> None:
        late = self.faults.strikes("answer of a commit lost")
        pause_seconds = STALL_SECONDS if late else self.faults.pause_seconds()
        self._loop.call_later(pause_seconds, committer._hand_out, group)

    def _signed(self, body: bytes) -> str:
        if self.faults.strikes("signature too late"):
            raise committer._CheckpointFailed(Unavailable("AUDIT_UNAVAILABLE", "the checkpoint could not be signed"))
        signing = self._signer.sign_checkpoint(body)
        try:
            signing.send(None)
        except StopIteration as signed:
            return str(signed.value)
        except Unavailable as error:
            raise committer._CheckpointFailed(error) from error
        raise AssertionError("the simulated signer never waits")


class _FailingDatabase(SqliteDatabase):
    def __init__(self, path: Path, faults: StoreFaults) -> None:
        self._faults = faults
        super().__init__(path)

    def connect(self, *, read_only: bool = False) -> SqliteConnection:
        connection = super().connect(read_only=read_only)
        if not read_only:
            really_commit = connection.commit

            def commit() -> None:
                if self._faults.strikes("commit failed before"):
                    raise sqlite3.OperationalError("disk I/O error")
                really_commit()
                if self._faults.strikes("commit failed after"):
                    raise sqlite3.OperationalError("disk I/O error")

            connection.commit = commit  # type: ignore[method-assign]
        return connection


@contextlib.contextmanager
def simulated_committer(faults: StoreFaults) -> Iterator[None]:
    """While it lasts, a store that is opened writes by the running loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "GroupCommitter", type("LoopCommitter", (_LoopCommitter,), {"faults": faults}))
        yield


def open_store(path: Path, *, signer: CheckpointSigner, clock: Clock, faults: StoreFaults) -> SqliteStore:
    """As `SqliteStore.open` does, without a process for migrations."""
    lock = FileLock(check_file(path))
    try:
        return SqliteStore(
            database=_FailingDatabase(path, faults),
            lock=lock,
            cluster=CLUSTER,
            signer=signer,
            clock=clock,
            linger_seconds=0.0,
        )
    except BaseException:
        lock.release()
        raise


def abandon(opened: SqliteStore) -> None:
    """What the death of the process does to its store: what was not committed is gone, the kernel takes back lock and files."""
    opened._committer._queue.closed = True
    opened._committer._queue.waiting.clear()
    opened._committer._drop_connection()
    database = opened._database
    assert isinstance(database, _FailingDatabase)
    if database._reader is not None:
        database._reader.close()
        database._reader = None
    opened._lock.release()
