"""The marks of a vault that moves: which of the two databases may be used.

Rules: the newest mark of a database decides, and one without marks may be used. At no time may both be used: the new one is
opened only after the old one was left, and the old one returned to only after the new one was withdrawn. A mark says a thing
once it is committed, so whatever ends between two marks leaves neither open, or the one that was open before.

    new:  begun → verified → open       begun: rows may be missing; verified: all are there, and the old one may be left
    old:               left ↗           left: never used again, unless the new one is withdrawn unused
    new:  open → withdrawn              back, as long as nobody has used the new one
    old:               returned ↗
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import insert, select

from sidecar.store.errors import StoreRefused
from sidecar.store.rows import from_microseconds, to_microseconds
from sidecar.store.schema import RELOCATIONS
from sidecar.store.statements import Connection, SqlDialect, Statement

__all__ = ["Mark", "Marks", "Step"]


class Step(StrEnum):
    BEGUN = "begun"
    VERIFIED = "verified"
    OPEN = "open"
    WITHDRAWN = "withdrawn"
    LEFT = "left"
    RETURNED = "returned"


_MAY_BE_USED = frozenset({Step.OPEN, Step.RETURNED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """`relocation` is the same in both databases; `origin` and `commits` say which vault moves, and that it has not changed since;
    `instance` and `place` are where it moves to."""

    relocation: str
    step: Step
    origin: str
    commits: int
    instance: str
    place: str
    create_time: datetime


class Marks:
    """Reads and writes on the connection that is handed in; decides nothing about transactions."""

    def __init__(self, dialect: SqlDialect) -> None:
        columns = [column for column in RELOCATIONS.columns if column.name != "number"]
        self._newest = Statement(
            select(RELOCATIONS.c.number, *columns).order_by(RELOCATIONS.c.number.desc()).limit(1), dialect
        )
        self._insert = Statement(insert(RELOCATIONS), dialect)

    def newest(self, connection: Connection) -> Mark | None:
        for _, relocation, step, origin, commits, instance, place, create_time in connection.rows(self._newest, {}):
            return Mark(
                relocation=relocation,
                step=Step(step),
                origin=origin,
                commits=commits,
                instance=instance,
                place=place,
                create_time=from_microseconds(create_time),
            )
        return None

    def add(self, connection: Connection, mark: Mark) -> None:
        """The key refuses it where somebody else has added one at the same time."""
        newest = connection.rows(self._newest, {})
        connection.change(
            self._insert,
            {
                "number": newest[0][0] + 1 if newest else 1,
                "relocation": mark.relocation,
                "step": mark.step.value,
                "origin": mark.origin,
                "commits": mark.commits,
                "instance": mark.instance,
                "place": mark.place,
                "create_time": to_microseconds(mark.create_time),
            },
        )

    def check_may_be_used(self, connection: Connection, *, where: str) -> None:
        """To be asked with the lock that keeps a relocation out. Raises StoreRefused."""
        mark = self.newest(connection)
        if mark is not None and mark.step not in _MAY_BE_USED:
            raise StoreRefused(_REFUSALS[mark.step].format(mark=mark), path=where)


_REFUSALS = {
    Step.BEGUN: "a vault is moving into this database and is not complete; run custodyctl store migrate again",
    Step.VERIFIED: "a vault is moving into this database and the file is not closed yet; run custodyctl store migrate again",
    Step.WITHDRAWN: "the vault of this database went back to the file that it came from; make a new database",
    Step.LEFT: (
        "the vault has moved to {mark.place} on {mark.create_time:%Y-%m-%d}: "
        "give the sidecar store.url and the instance {mark.instance} instead of this file"
    ),
}
