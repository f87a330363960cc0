"""Whether two databases hold the same vault: row by row, table by table, and the end of its log.

Rules: every row of both is read, in the order of the key; what is told of a difference is the table, the key and the names of
columns, never a value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sidecar.audit.errors import LogCorrupt
from sidecar.store.relocation.source import Source
from sidecar.store.relocation.tables import Digest, MovingTable
from sidecar.store.relocation.target import Target
from sidecar.store.statements import Connection, Row

__all__ = ["Difference", "LogComparison", "Report", "TableComparison", "compare"]

_PAGE_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first one of a table. `columns` are those that differ, where both have the row."""

    kind: Literal["missing", "unexpected", "different"]
    key: Row
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableComparison:
    """The digests are `sidecar.store.relocation.tables.Digest`."""

    name: str
    source_rows: int
    target_rows: int
    source_sha256: str
    target_sha256: str
    difference: Difference | None

    @property
    def ok(self) -> bool:
        return self.difference is None and self.source_sha256 == self.target_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class LogComparison:
    """`problem` says why newest leaf, head and newest checkpoint of the target do not fit, as a start of the sidecar would."""

    origin: str
    size: int
    covered_size: int
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    tables: Sequence[TableComparison]
    log: LogComparison

    @property
    def ok(self) -> bool:
        return not self.log.problem and all(table.ok for table in self.tables)


def compare(source: Source, target: Target, *, seen: Callable[[str, int], None]) -> Report:
    """`seen` is told of a table and how many of the source's rows were read since it was told last."""
    tables = [
        _compare_table((ours, source.connection), (theirs, target.connection), seen)
        for ours, theirs in zip(source.tables, target.tables, strict=True)
    ]
    return Report(tables=tables, log=_compare_log(source, target))


_Side = tuple[MovingTable, Connection]


def _compare_table(ours: _Side, theirs: _Side, seen: Callable[[str, int], None]) -> TableComparison:
    table = ours[0]
    source, target = Digest(table), Digest(theirs[0])
    difference = None
    for mine, its in _side_by_side(ours, theirs):
        if mine is not None:
            source.add(mine)
            if source.count % _PAGE_ROWS == 0:
                seen(table.name, _PAGE_ROWS)
        if its is not None:
            target.add(its)
        if difference is None and mine != its:
            difference = _difference(table, mine, its)
    seen(table.name, source.count % _PAGE_ROWS)
    return TableComparison(
        name=table.name,
        source_rows=source.count,
        target_rows=target.count,
        source_sha256=source.hex(),
        target_sha256=target.hex(),
        difference=difference,
    )


def _side_by_side(ours: _Side, theirs: _Side) -> Iterator[tuple[Row | None, Row | None]]:
    """Rows of one key together, None where a side has none. Python orders keys as both databases do: text by code points, which
    is the order of its UTF-8 bytes."""
    key_of = ours[0].key_of
    mine, its = (table.rows(connection, page_size=_PAGE_ROWS) for table, connection in (ours, theirs))
    left, right = next(mine, None), next(its, None)
    while left is not None or right is not None:
        if right is None or (left is not None and key_of(left) < key_of(right)):
            yield left, None
            left = next(mine, None)
        elif left is None or key_of(right) < key_of(left):
            yield None, right
            right = next(its, None)
        else:
            yield left, right
            left, right = next(mine, None), next(its, None)


def _difference(table: MovingTable, mine: Row | None, its: Row | None) -> Difference:
    if its is None:
        return Difference(kind="missing", key=table.key_of(mine or ()))
    if mine is None:
        return Difference(kind="unexpected", key=table.key_of(its))
    columns = tuple(name for name, a, b in zip(table.columns, mine, its, strict=True) if a != b)
    return Difference(kind="different", key=table.key_of(mine), columns=columns)


def _compare_log(source: Source, target: Target) -> LogComparison:
    """The head is among the compared rows; here it is read as the store reads it, with leaf and checkpoint."""
    connection = target.connection
    connection.begin()
    try:
        state = target.log.state(connection, source.origin)
        target.log.check_end(connection, state)
    except LogCorrupt as error:
        return LogComparison(origin=source.origin, size=0, covered_size=0, problem=error.message)
    finally:
        connection.roll_back()
    return LogComparison(origin=source.origin, size=state.head.size, covered_size=state.covered_size)
