"""The single writer: commands that wait are executed in one transaction, which one fsync makes durable (group commit).

Rules
- One thread owns the write connection. Each command runs in a savepoint of its own: one that fails harms no other.
- What a command puts on record is part of the same transaction. Where a command needs it, one checkpoint over the whole log is
  signed before the commit, so a note is never published before the entries under it are.
- Nobody is answered before the commit, and all outcomes of a group that did not commit are void, refusals too: they may rest
  on what another command of the group had written.
- Where the database rolls a transaction back because of another one (40001, 40P01), at whatever statement or at COMMIT, the
  group is run again, some times at most. So a command may run more than once: it is a function of the transaction alone.
- Where COMMIT itself fails, the database is asked on a fresh connection whether it happened. If that cannot be told, the
  answer is Unavailable, which every command must bear (repeat, or read the row).
- The head of the log in memory is replaced after a commit only, and read again after every failure.
- A database that has lost commits of ours (a replica that took over too early, a backup) is never written to again: dispatch
  records may be among them.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from sidecar.audit.checkpoint import checkpoint_body
from sidecar.audit.errors import LogCorrupt
from sidecar.domain.audit import AuditDraft
from sidecar.errors import CustodyError, Internal, Unavailable
from sidecar.ports import CheckpointSigner, Clock
from sidecar.store.log import LogState, LogTables
from sidecar.store.rows import to_microseconds
from sidecar.store.statements import Connection, Row, Statement, Value

__all__ = ["Database", "GroupCommitter", "Transaction", "WriteConnection"]

_MAX_WAITING = 1024
_MAX_GROUP = 128
_SIGN_SECONDS = 4.5  # less than the 5 s in which a hanging HSM must fail its callers
_COMMAND_SECONDS = 10.0
_CLOSE_SECONDS = 60.0
_MAX_RUNS = 6  # of a group that meets conflicts
_CONFLICT_PAUSE_SECONDS = 0.005  # at most, after the first; twice as long each time: those who met must not meet again

T = TypeVar("T")


class WriteConnection(Connection, Protocol):
    """Raises `Database.driver_error` where the database does not do it."""

    def begin(self) -> None: ...

    def commit(self) -> None: ...

    def roll_back(self) -> None: ...

    def save(self) -> None:
        """Begins a command: a savepoint."""

    def keep(self) -> None: ...

    def undo(self) -> None:
        """Takes back what the command wrote; the transaction goes on."""

    def flush(self) -> None:
        """Returns when all that was ever committed is in its final place on disk, and its former copies are gone."""

    def close(self) -> None: ...


class Database(Protocol):
    @property
    def driver_error(self) -> type[Exception]: ...

    def connect(self) -> WriteConnection: ...

    def check_unchanged(self) -> None:
        """Raises Unavailable where commits would go into a file that is no longer the database."""

    def our_error(self, error: Exception) -> CustodyError: ...

    def spoils_transaction(self, error: Exception) -> bool:
        """Whether the transaction cannot go on after this error of one of its statements."""

    def is_conflict(self, error: Exception) -> bool:
        """Whether this error says that the transaction was rolled back because of another one, and may be run again."""

    def is_disconnect(self, error: Exception) -> bool:
        """Whether this error says that the connection is of no more use."""


class Transaction:
    """What a command works on: rows by `change` and `rows`, the record by `append`. It is a Connection."""

    def __init__(self, *, connection: Connection, log: LogTables, state: LogState, clock: Clock) -> None:
        self.state = state
        self.wrote = False
        self._connection = connection
        self._log = log
        self._clock = clock
        self.now = clock.now()

    def change(self, statement: Statement, values: Mapping[str, Value]) -> int:
        count = self._connection.change(statement, values)
        self.wrote = self.wrote or count > 0
        return count

    def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        return self._connection.rows(statement, values)

    def append(self, *drafts: AuditDraft) -> None:
        """Puts entries on record. Raises EntryRefused for a draft that breaks the log's format."""
        for draft in drafts:
            time_ns = to_microseconds(self._clock.now()) * 1000
            head, leaf = self.state.head.append(draft, time_ns=time_ns, boot_time_ns=self._clock.boot_time_ns())
            self._log.add_leaf(self, head.origin, leaf)
            self.state = replace(self.state, head=head)


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """A command on its way; `value` and `error` are set by the writer and handed to `future` by the loop."""

    command: Callable[[Transaction], T]
    future: asyncio.Future[T]
    signed: bool
    shreds: bool
    value: T | None = None
    error: CustodyError | None = None

    def fail(self, error: CustodyError) -> None:
        self.value, self.error = None, error


@dataclass(slots=True)
class _Queue:
    """Between the loop and the writer. Bounded."""

    condition: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Waiting[object]] = field(default_factory=deque)
    closed: bool = False


class _CheckpointFailed(Exception):
    def __init__(self, error: Unavailable) -> None:
        super().__init__()
        self.error = error


class GroupCommitter:
    def __init__(
        self,
        *,
        database: Database,
        log: LogTables,
        origin: str,
        signer: CheckpointSigner,
        clock: Clock,
        linger_seconds: float,
        alarm: Callable[[str], None],
    ) -> None:
        """To be made inside the running loop, which the signer and the answers use. `alarm` is told the name of an event that
        somebody must look at; it is called in the writer's thread."""
        self._database = database
        self._log = log
        self._origin = origin
        self._signer = signer
        self._clock = clock
        self._linger_seconds = linger_seconds
        self._loop = asyncio.get_running_loop()
        self._queue = _Queue()
        self._connection: WriteConnection | None = None
        self._state: LogState | None = None
        self._alarm = alarm
        self._known_commits = 0  # that took place: the database may never say less
        self._has_lost_commits = False
        self._busy = False  # the last group had company: others are likely to be just behind the next command
        self._flush_due = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    async def run(self, command: Callable[[Transaction], T], *, signed: bool = False, shreds: bool = False) -> T:
        """The value of `command` once its transaction is durable and, if `signed`, the log is covered by a checkpoint.

        `shreds` says that the command destroys keys: their former copies on disk are overwritten soon after. Raises what
        the command raises, and Unavailable (STORE_UNAVAILABLE, AUDIT_UNAVAILABLE, or the signer's own).
        """
        future: asyncio.Future[T] = self._loop.create_future()
        waiting = _Waiting(command=command, future=future, signed=signed, shreds=shreds)
        self._enqueue(waiting)
        deadline = self._loop.call_later(_COMMAND_SECONDS, _give_up, future)
        try:
            return await future
        finally:
            deadline.cancel()

    async def close(self) -> None:
        """Refuses new commands, finishes those that wait. Raises Unavailable when the database does not let it end."""
        with self._queue.condition:
            self._queue.closed = True
            self._queue.condition.notify()
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)
        if self._thread.is_alive():
            raise Unavailable("STORE_UNAVAILABLE", "the database did not finish its last transaction")

    def _enqueue(self, waiting: _Waiting[T]) -> None:
        queue = self._queue
        with queue.condition:
            if queue.closed:
                raise Unavailable("STORE_UNAVAILABLE", "the store is closed")
            if len(queue.waiting) >= _MAX_WAITING:
                raise Unavailable("STORE_UNAVAILABLE", "too many changes wait for the database; try again")
            queue.waiting.append(waiting)  # type: ignore[arg-type]
            queue.condition.notify()

    # -- from here on: the writer's thread

    def _work(self) -> None:
        while group := self._next_group():
            self._commit_group(group)
            self._answer(group)
            self._flush(group)
        self._drop_connection()

    def _next_group(self) -> list[_Waiting[object]]:
        """Blocks until a command waits. Empty when the store is closed and nothing waits any more."""
        queue = self._queue
        while True:
            with queue.condition:
                queue.condition.wait_for(lambda: queue.waiting or queue.closed)
                company = self._busy or len(queue.waiting) > 1
            if company and self._linger_seconds and not queue.closed and len(queue.waiting) < _MAX_GROUP:
                time.sleep(self._linger_seconds)
            with queue.condition:
                taken = [queue.waiting.popleft() for _ in range(min(_MAX_GROUP, len(queue.waiting)))]
                group = [waiting for waiting in taken if not waiting.future.done()]  # else its caller has given up
                self._busy = len(group) > 1
                if group or queue.closed:
                    return group

    def _commit_group(self, group: Sequence[_Waiting[object]]) -> None:
        """Sets value or error of each command."""
        try:
            self._transact(group)
        except _CheckpointFailed as failure:
            for waiting in group:
                if waiting.signed and waiting.error is None:
                    waiting.fail(failure.error)
            others = [waiting for waiting in group if not waiting.signed]
            if others:
                self._commit_group(others)

    def _transact(self, group: Sequence[_Waiting[object]]) -> None:
        try:
            self._database.check_unchanged()
            run = 1
            while not self._run_once(group, is_last=run == _MAX_RUNS):
                time.sleep(random.uniform(0, _CONFLICT_PAUSE_SECONDS * 2**run))  # noqa: S311 - no secret
                run += 1
        except _CheckpointFailed:
            self._drop_connection()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the writer lives on and nobody is told of a success
            self._drop_connection()
            for waiting in group:
                waiting.fail(self._store_error(error))

    def _run_once(self, group: Sequence[_Waiting[object]], *, is_last: bool) -> bool:
        """False where a conflict has undone it all; the last run raises it instead."""
        try:
            connection, state = self._begin()
            transaction = Transaction(connection=connection, log=self._log, state=state, clock=self._clock)
            for waiting in group:
                self._execute(transaction, connection, waiting)
            self._sign_if_needed(transaction, group)
            self._commit(transaction, connection, state)
        except self._database.driver_error as error:
            if is_last or not self._database.is_conflict(error):
                raise
            if self._connection is not None:
                self._connection.roll_back()
            return False
        return True

    def _begin(self) -> tuple[WriteConnection, LogState]:
        """A transaction is begun. A connection may have died while nobody used it: then a new one takes its place."""
        try:
            return self._begun()
        except self._database.driver_error as error:
            if not self._database.is_disconnect(error):
                raise
        self._drop_connection()
        return self._begun()

    def _begun(self) -> tuple[WriteConnection, LogState]:
        connection, state = self._ready()
        connection.begin()
        return connection, state

    def _ready(self) -> tuple[WriteConnection, LogState]:
        """The connection and the head; after a failure both are made anew from the database."""
        if self._has_lost_commits:
            raise _lost_commits()
        if self._connection is None or self._state is None:
            self._drop_connection()
            self._connection = self._database.connect()
            self._state = self._state_at_rest(self._connection)
        return self._connection, self._state

    def _state_at_rest(self, connection: WriteConnection) -> LogState:
        """Waits until a transaction of ours that may still be under way, on a connection that we gave up, has ended."""
        connection.begin()
        state = self._log.state(connection, self._origin)
        connection.roll_back()
        if state.commits < self._known_commits:
            self._has_lost_commits = True
            self._alarm("store_lost_commits")
            raise _lost_commits()
        return state

    def _execute(self, transaction: Transaction, connection: WriteConnection, waiting: _Waiting[object]) -> None:
        state, wrote = transaction.state, transaction.wrote
        connection.save()
        try:
            waiting.value, waiting.error = waiting.command(transaction), None
        except LogCorrupt:
            raise  # no entry of anybody's can be written
        except Exception as error:  # a defect in one command must not harm the others
            if self._database.spoils_transaction(error):
                raise
            connection.undo()
            transaction.state, transaction.wrote = state, wrote
            waiting.fail(self._command_error(error))
        else:
            connection.keep()

    def _sign_if_needed(self, transaction: Transaction, group: Sequence[_Waiting[object]]) -> None:
        wanted = any(waiting.signed and waiting.error is None for waiting in group)
        if not wanted or not transaction.state.waits_for_checkpoint:
            return
        head = transaction.state.head
        note = self._signed(checkpoint_body(head.origin, head.size, head.root()))
        try:
            self._log.add_note(transaction, head, note, self._clock.now())
        except LogCorrupt as error:
            raise _CheckpointFailed(_no_checkpoint()) from error
        transaction.state = replace(transaction.state, covered_size=head.size)

    def _signed(self, body: bytes) -> str:
        signing = asyncio.run_coroutine_threadsafe(self._signer.sign_checkpoint(body), self._loop)
        try:
            return signing.result(_SIGN_SECONDS)
        except Unavailable as error:
            raise _CheckpointFailed(error) from error
        except Exception as error:
            signing.cancel()
            raise _CheckpointFailed(_no_checkpoint()) from error

    def _commit(self, transaction: Transaction, connection: WriteConnection, before: LogState) -> None:
        if not transaction.wrote:
            connection.roll_back()
            return
        after = replace(transaction.state, commits=before.commits + 1)
        self._log.move(connection, before=before, after=after)
        try:
            connection.commit()
        except self._database.driver_error as error:
            if self._database.is_conflict(error):
                raise
            if not self._happened(after):
                raise Unavailable("STORE_UNAVAILABLE", "the database did not commit; try again") from error
        else:
            self._keep(after)

    def _happened(self, after: LogState) -> bool:
        """Whether the commit that failed took place. The count of commits tells: only this thread moves it.

        What is only visible may still be lost, so it counts after one more commit has succeeded: logs are flushed, and sent to
        replicas, in order. Raises Unavailable where it cannot be told: the group must not run again, it may have happened.
        """
        self._drop_connection()
        try:
            connection, state = self._ready()
            if state != after:
                return False
            proof = replace(after, commits=after.commits + 1)
            connection.begin()
            self._log.move(connection, before=after, after=proof)
            connection.commit()
            connection.flush()
        except self._database.driver_error as error:
            raise Unavailable(
                "STORE_UNAVAILABLE", "the database does not say what it has committed; ask again"
            ) from error
        self._keep(proof)
        return True

    def _keep(self, state: LogState) -> None:
        """The transaction that led to `state` is durable."""
        self._state, self._known_commits = state, state.commits

    def _answer(self, group: Sequence[_Waiting[object]]) -> None:
        self._loop.call_soon_threadsafe(_hand_out, group)

    def _flush(self, group: Sequence[_Waiting[object]]) -> None:
        """Overwrites the copies of destroyed keys in the write-ahead log; where a reader is in the way, after the next group."""
        self._flush_due = self._flush_due or any(waiting.shreds and waiting.error is None for waiting in group)
        if not self._flush_due or self._connection is None:
            return
        try:
            self._connection.flush()
            self._flush_due = False
        except self._database.driver_error:
            self._flush_due = True

    def _drop_connection(self) -> None:
        connection, self._connection, self._state = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(self._database.driver_error):  # closing rolls back as well
                connection.roll_back()
            connection.close()

    def _command_error(self, error: Exception) -> CustodyError:
        if isinstance(error, CustodyError):
            return error
        ours = self._database.our_error(error) if isinstance(error, self._database.driver_error) else Internal()
        ours.__cause__ = error
        return ours

    def _store_error(self, error: Exception) -> CustodyError:
        """A new one each time: an exception that several tasks raise collects the tracebacks of all."""
        if isinstance(error, self._database.driver_error):
            ours = self._database.our_error(error)
        elif isinstance(error, Unavailable):
            ours = Unavailable(error.reason, error.message)
        elif isinstance(error, LogCorrupt):
            ours = Unavailable("AUDIT_UNAVAILABLE", "the log cannot be continued; page somebody")
        else:
            ours = Unavailable("STORE_UNAVAILABLE", "the database does not answer; try again")
        ours.__cause__ = error
        return ours


def _lost_commits() -> Unavailable:
    return Unavailable(
        "AUDIT_UNAVAILABLE",
        "the database has lost transactions that were committed, and is not written to; page somebody",
    )


def _no_checkpoint() -> Unavailable:
    return Unavailable("AUDIT_UNAVAILABLE", "the log's checkpoint could not be signed; try again")


def _give_up(future: "asyncio.Future[T]") -> None:
    if not future.done():
        future.set_exception(Unavailable("STORE_UNAVAILABLE", "the database does not answer in time; try again"))


def _hand_out(group: Sequence[_Waiting[object]]) -> None:
    for waiting in group:
        if waiting.future.done():  # its caller has given up
            continue
        if waiting.error is not None:
            waiting.future.set_exception(waiting.error)
        else:
            waiting.future.set_result(waiting.value)
