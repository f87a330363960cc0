"""Moves the vault of a file into a PostgreSQL database, and puts the marks of `sidecar.store.relocation.marks`.

Rules: both databases are locked against sidecars for as long as this runs; whatever ends it, the same call goes on where it was;
the file is left only when every row was read back from the target and found the same, and the target is opened only after that.
"""

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import psycopg

from sidecar.store.errors import StoreRefused
from sidecar.store.relocation.comparison import Report, compare
from sidecar.store.relocation.marks import Mark, Step
from sidecar.store.relocation.source import Source
from sidecar.store.relocation.tables import MovingTable
from sidecar.store.relocation.target import Target, refusal
from sidecar.store.statements import Row

__all__ = ["Phase", "Progress", "Relocation", "opened_relocation"]

PAGE_ROWS = 1000  # rows of one transaction


class Phase(StrEnum):
    COPY = "copy"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`rows` of `total_rows` of all tables are done in this phase; the newest were rows of `table`. The first of a phase says
    where it begins: a copy that goes on after an interruption does so with the rows that are there."""

    phase: Phase
    table: str
    rows: int
    total_rows: int


Observe = Callable[[Progress], None]


@contextmanager
def opened_relocation(
    *,
    path: Path,
    url: str,
    instance: str,
    now: Callable[[], datetime],
    observe: Observe = lambda progress: None,  # noqa: ARG005 - nobody looks
    page_rows: int = PAGE_ROWS,
) -> Iterator["Relocation"]:
    """Both databases, checked and locked. Lets out StoreRefused only, and whatever `observe` raises."""
    with closing(Source(path, instance=instance)) as source, closing(Target(url)) as target:
        relocation = Relocation(
            source=source, target=target, instance=instance, now=now, observe=observe, page_rows=page_rows
        )
        try:
            yield relocation
        except psycopg.Error as error:
            raise refusal(error, where=str(target)) from error
        except sqlite3.Error as error:
            raise StoreRefused("the file cannot be read or written", path=path) from error


class Relocation:
    def __init__(
        self,
        *,
        source: Source,
        target: Target,
        instance: str,
        now: Callable[[], datetime],
        observe: Observe,
        page_rows: int,
    ) -> None:
        self._source = source
        self._target = target
        self._instance = instance
        self._now = now
        self._observe = observe
        self._page_rows = page_rows

    @property
    def origin(self) -> str:
        return self._source.origin

    def run(self) -> Report | None:
        """What was found when all was copied; None where the vault had been moved already. The file is left and the target opened
        only where the report is ok. Raises StoreRefused."""
        mark = self._mark_begun()
        if mark.step is Step.OPEN:
            return None
        self._copy()
        report = self.compare()
        if report.ok:
            self._change_over(mark)
        return report

    def compare(self) -> Report:
        """Raises StoreRefused where this file was never moved into this database."""
        mark = self._target.mark
        if mark is None or mark.origin != self._source.origin or mark.instance != self._instance:
            raise self._refused("the vault of this file was not migrated into this database under this instance name")
        done = _Counter(self._observe, Phase.VERIFY, total_rows=self._total_rows())
        done.add("", 0)
        return compare(self._source, self._target, seen=done.add)

    def undo(self) -> None:
        """The file may be used again, and the target never. Raises StoreRefused where a sidecar has used the target already."""
        left, mark = self._source.mark, self._target.mark
        if left is None or left.step is not Step.LEFT:
            raise StoreRefused("the file was not left: a sidecar may use it; nothing to undo", path=str(self._source))
        if mark is None or mark.relocation != left.relocation:
            raise self._refused(f"the vault of this file has moved to {left.place}, not into this database")
        if mark.step is Step.OPEN:
            self._check_unused(mark)
        self._target.add_mark(self._next(mark, Step.WITHDRAWN))  # again where it is: it proves that the first one stays
        self._source.add_mark(self._next(mark, Step.RETURNED))

    # -- before

    def _mark_begun(self) -> Mark:
        """The mark under which the target is filled, made where there is none."""
        left, mark = self._source.mark, self._target.mark
        if left is not None and left.step is Step.LEFT and (mark is None or mark.relocation != left.relocation):
            raise self._refused(f"the vault of this file has moved to {left.place} already, and not into this database")
        if mark is None:
            return self._begin()
        if mark.step is Step.WITHDRAWN:
            raise self._refused("a migration into this database was undone; make a new database")
        self._check_continues(mark)
        return mark

    def _begin(self) -> Mark:
        self._check_empty()
        mark = Mark(
            relocation=str(uuid.uuid4()),
            step=Step.BEGUN,
            origin=self._source.origin,
            commits=self._source.log.commits,
            instance=self._instance,
            place=str(self._target),
            create_time=self._now(),
        )
        self._target.add_mark(mark)
        return mark

    def _check_empty(self) -> None:
        filled = self._target.first_filled()
        if filled is None:
            return
        cluster = _cluster(self._source.origin)
        others = sorted({_cluster(origin) for origin in self._target.origins().values()} - {cluster})
        if others:
            raise self._refused(f"the database belongs to cluster {others[0]}, and the file to cluster {cluster}")
        raise self._refused(
            f"the database holds a vault already (table {filled.name}); two vaults are never merged: make a new database"
        )

    def _check_continues(self, mark: Mark) -> None:
        if _cluster(mark.origin) != _cluster(self._source.origin):
            raise self._refused(
                f"the vault that moves into this database is of cluster {_cluster(mark.origin)},"
                f" and the file of cluster {_cluster(self._source.origin)}"
            )
        if mark.origin != self._source.origin:
            raise self._refused("the vault of another file moves into this database; make a new database")
        if mark.instance != self._instance:
            raise self._refused(f"the migration was begun with --instance {mark.instance}")
        left = self._source.mark
        if mark.step is Step.OPEN and (left is None or left.step is not Step.LEFT):
            raise self._refused("the database is in use, and this file is an older copy of the one that was migrated")
        if mark.commits != self._source.log.commits:
            raise self._refused(
                "a sidecar has used the file since the migration began, or this is another copy of it;"
                " make a new database and begin anew"
            )

    # -- the rows

    def _copy(self) -> None:
        source, target = self._source, self._target
        last_keys = [table.last_key(target.connection) for table in target.tables]
        done = _Counter(self._observe, Phase.COPY, total_rows=self._total_rows())
        done.add("", sum(map(self._rows_until, source.tables, last_keys)))
        for ours, theirs, last in zip(source.tables, target.tables, last_keys, strict=True):
            for rows in ours.pages(source.connection, after=last, size=self._page_rows):
                target.insert(theirs, rows)
                done.add(ours.name, len(rows))

    def _rows_until(self, table: MovingTable, last: Row | None) -> int:
        return 0 if last is None else table.count(self._source.connection, until=last)

    def _total_rows(self) -> int:
        return sum(table.count(self._source.connection) for table in self._source.tables)

    # -- after

    def _change_over(self, mark: Mark) -> None:
        """Each line is durable before the next begins. VERIFIED is written again by whoever goes on: a commit that succeeds proves
        that all before it stay, also those that were only seen."""
        self._target.add_mark(self._next(mark, Step.VERIFIED))
        if self._source.mark is None or self._source.mark.step is not Step.LEFT:
            self._source.add_mark(self._next(mark, Step.LEFT))
        self._target.add_mark(self._next(mark, Step.OPEN))

    def _check_unused(self, mark: Mark) -> None:
        """A sidecar that starts begins a log of its own or goes on with the one that moved."""
        connection = self._target.connection
        connection.begin()
        commits = self._target.log.state(connection, mark.origin).commits
        connection.roll_back()
        if commits != mark.commits or self._target.origins() != {mark.instance: mark.origin}:
            raise self._refused(
                "a sidecar has used the database since: the file lacks what was done there, and may pay again what was paid"
            )

    def _next(self, mark: Mark, step: Step) -> Mark:
        return Mark(
            relocation=mark.relocation,
            step=step,
            origin=mark.origin,
            commits=mark.commits,
            instance=mark.instance,
            place=mark.place,
            create_time=self._now(),
        )

    def _refused(self, message: str) -> StoreRefused:
        return StoreRefused(message, path=str(self._target))


class _Counter:
    def __init__(self, observe: Observe, phase: Phase, *, total_rows: int) -> None:
        self._observe = observe
        self._phase = phase
        self._total_rows = total_rows
        self._rows = 0

    def add(self, table: str, rows: int) -> None:
        self._rows += rows
        self._observe(Progress(phase=self._phase, table=table, rows=self._rows, total_rows=self._total_rows))


def _cluster(origin: str) -> str:
    """Of a log's origin, audit/CLUSTER/UUID."""
    return origin.removeprefix("audit/").rpartition("/")[0]
