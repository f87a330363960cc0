"""The audit log's tables: the head, the leaves and the signed checkpoints of this instance.

Rule: the head that is in memory is only ever what the database has committed; a transaction works on its own copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select, update

from sidecar.audit.checkpoint import checkpoint_body, parse_checkpoint, parse_note
from sidecar.audit.errors import LogCorrupt
from sidecar.audit.log import Leaf, LogHead
from sidecar.ports import LogPosition, StoredLeaf
from sidecar.store.rows import from_microseconds, to_microseconds
from sidecar.store.schema import INSTANCES, LOG_CHECKPOINTS, LOG_HEADS, LOG_LEAVES
from sidecar.store.statements import Connection, SqlDialect, Statement, Value, named

__all__ = ["LogState", "LogTables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """Where the log stands. `commits` counts this instance's transactions, whether or not they wrote an entry."""

    head: LogHead
    covered_size: int
    commits: int

    @property
    def waits_for_checkpoint(self) -> bool:
        return self.covered_size < self.head.size


class LogTables:
    """Reads and writes on the connection that is handed in; decides nothing about transactions."""

    def __init__(self, dialect: SqlDialect) -> None:
        heads, leaves, notes = LOG_HEADS, LOG_LEAVES, LOG_CHECKPOINTS
        this_log = leaves.c.origin == named("origin")
        self._instances = Statement(select(INSTANCES.c.id, INSTANCES.c.origin), dialect)
        self._add_instance = Statement(insert(INSTANCES), dialect)
        self._add_head = Statement(insert(heads), dialect)
        head = select(heads.c.head, heads.c.size, heads.c.covered_size, heads.c.commits).where(
            heads.c.origin == named("origin")
        )
        self._head = Statement(head, dialect)
        self._head_at_rest = Statement(head.with_for_update(), dialect)
        self._move_head = Statement(
            update(heads)
            .where(heads.c.origin == named("at_origin"), heads.c.commits == named("at_commits"))
            .values({name: named(name) for name in ("head", "size", "covered_size", "commits")}),
            dialect,
        )
        self._add_leaf = Statement(dialect.insert_unless_there(leaves), dialect)
        self._leaves = Statement(
            select(leaves.c["index"], leaves.c.entry)
            .where(this_log, leaves.c["index"] >= named("start"))
            .order_by(leaves.c["index"])
            .limit(named("limit")),
            dialect,
        )
        self._last_leaf = Statement(
            select(leaves.c["index"], leaves.c.entry).where(this_log).order_by(leaves.c["index"].desc()).limit(1),
            dialect,
        )
        self._add_note = Statement(insert(notes), dialect)
        self._notes = Statement(
            select(notes.c.size, notes.c.note)
            .where(notes.c.origin == named("origin"), notes.c.size >= named("start_size"))
            .order_by(notes.c.size)
            .limit(named("limit")),
            dialect,
        )
        self._last_note = Statement(
            select(notes.c.size, notes.c.note, notes.c.create_time)
            .where(notes.c.origin == named("origin"))
            .order_by(notes.c.size.desc())
            .limit(1),
            dialect,
        )

    def origins(self, connection: Connection) -> dict[str, str]:
        """The origin of each instance's log."""
        return dict(connection.rows(self._instances, {}))

    def add_instance(self, connection: Connection, *, identifier: str, origin: str, now: datetime) -> None:
        """A new instance with an empty log."""
        created: dict[str, Value] = {"id": identifier, "origin": origin, "create_time": to_microseconds(now)}
        connection.change(self._add_instance, created)
        empty: dict[str, Value] = {
            "origin": origin,
            "head": LogHead.empty(origin).to_bytes(),
            "size": 0,
            "covered_size": 0,
            "commits": 0,
        }
        connection.change(self._add_head, empty)

    def state(self, connection: Connection, origin: str) -> LogState:
        """The head, once no earlier transaction of this instance is under way any more: to be called in a transaction.

        Raises LogCorrupt where the head is gone, damaged or of another log.
        """
        rows = connection.rows(self._head_at_rest, {"origin": origin})
        if not rows:
            raise LogCorrupt("the log has no head")
        data, size, covered_size, commits = rows[0]
        head = LogHead.from_bytes(data)
        if head.origin != origin or head.size != size:
            raise LogCorrupt("the head of the log contradicts its row")
        return LogState(head=head, covered_size=covered_size, commits=commits)

    def check_end(self, connection: Connection, state: LogState) -> None:
        """Whether the newest leaf and the newest checkpoint are those that the head speaks of. Raises LogCorrupt."""
        leaf = connection.rows(self._last_leaf, {"origin": state.head.origin})
        if leaf != ([] if state.head.size == 0 else [(state.head.size - 1, leaf[0][1] if leaf else b"")]):
            raise LogCorrupt("the log does not end where its head says")
        if leaf:
            Leaf(index=leaf[0][0], entry=leaf[0][1], leaf_hash=state.head.last_leaf_hash)
        note = connection.rows(self._last_note, {"origin": state.head.origin})
        if (note[0][0] if note else 0) != state.covered_size:
            raise LogCorrupt("the newest checkpoint is not the one that the log's head speaks of")
        if note:
            self._check_note(note[0][1], state)

    def add_leaf(self, connection: Connection, origin: str, leaf: Leaf) -> None:
        """Raises LogCorrupt when the place is taken: somebody else writes this instance's log."""
        if connection.change(self._add_leaf, {"origin": origin, "index": leaf.index, "entry": leaf.entry}) != 1:
            raise _another_writer()

    def add_note(self, connection: Connection, head: LogHead, note: str, now: datetime) -> None:
        """Raises LogCorrupt when `note` does not say what was asked to be signed."""
        if parse_note(note).body.encode() != checkpoint_body(head.origin, head.size, head.root()):
            raise LogCorrupt("the signer answered a note over something else")
        created: dict[str, Value] = {
            "origin": head.origin,
            "size": head.size,
            "note": note,
            "create_time": to_microseconds(now),
        }
        connection.change(self._add_note, created)

    def move(self, connection: Connection, *, before: LogState, after: LogState) -> None:
        """Raises LogCorrupt when the head in the database is not `before`: somebody else writes this instance's log."""
        values: dict[str, Value] = {
            "at_origin": before.head.origin,
            "at_commits": before.commits,
            "head": after.head.to_bytes(),
            "size": after.head.size,
            "covered_size": after.covered_size,
            "commits": after.commits,
        }
        if connection.change(self._move_head, values) != 1:
            raise _another_writer()

    def leaves(self, connection: Connection, origin: str, *, start: int, limit: int) -> Sequence[StoredLeaf]:
        rows = connection.rows(self._leaves, {"origin": origin, "start": start, "limit": limit})
        return [StoredLeaf(index=index, entry=entry) for index, entry in rows]

    def checkpoints(
        self, connection: Connection, origin: str, *, start_size: int, limit: int
    ) -> Sequence[tuple[int, str]]:
        rows = connection.rows(self._notes, {"origin": origin, "start_size": start_size, "limit": limit})
        return [(size, note) for size, note in rows]

    def position(self, connection: Connection, origin: str) -> LogPosition:
        ((_, size, covered_size, _),) = connection.rows(self._head, {"origin": origin})
        note = connection.rows(self._last_note, {"origin": origin})
        return LogPosition(
            origin=origin,
            size=size,
            covered_size=covered_size,
            checkpoint_time=from_microseconds(note[0][2]) if note else None,
        )

    def _check_note(self, note: str, state: LogState) -> None:
        checkpoint = parse_checkpoint(parse_note(note).body)
        if checkpoint.origin != state.head.origin or checkpoint.size != state.covered_size:
            raise LogCorrupt("the newest checkpoint is of another log or size")
        if not state.waits_for_checkpoint and checkpoint.root != state.head.root():
            raise LogCorrupt("the newest checkpoint has another root than the log")


def _another_writer() -> LogCorrupt:
    return LogCorrupt("somebody else has written to this instance's log")
