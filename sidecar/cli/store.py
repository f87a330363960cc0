"""custodyctl store: the database, while no sidecar uses it. `migrate` moves a vault from SQLite to PostgreSQL."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli.documents import document
from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.output import Cell, Marked, Table
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from sidecar.store.relocation.comparison import Difference, Report, TableComparison
    from sidecar.store.relocation.relocation import Progress, Relocation

__all__ = ["migrate", "store"]

_EVENT_SECONDS = 1.0  # between two events of one phase, where nobody watches

store = CommandGroup(
    "store",
    help="The database, while no sidecar uses it.",
    entries={"migrate": Entry("sidecar.cli.store:migrate", "Move a vault from a SQLite file to PostgreSQL.")},
)


@click.command(cls=Command)
@click.option("--from", "source", required=True, metavar="FILE", help="The SQLite file of the sidecar, store.path.")
@click.option("--to", "target", required=True, metavar="URL", help="postgresql://…, as the sidecar's role: store.url.")
@click.option("--instance", required=True, metavar="NAME", help="The sidecar's name there: store.instance.")
@click.option("--verify-only", is_flag=True, help="Compare again what was migrated; change nothing.")
@click.option("--undo", is_flag=True, help="Go back to the file, as long as no sidecar has used the database.")
@pass_session
def migrate(session: Session, source: str, target: str, instance: str, verify_only: bool, undo: bool) -> None:  # noqa: FBT001 (click)
    """Move a vault from a SQLite file to PostgreSQL, with the sidecar stopped. Neither HSM nor sidecar is needed.

    Every row is copied and then compared. Only when all are the same, the file is closed to sidecars and the database opened to
    them. If it is interrupted, run the same command again: it goes on where it was. Exit status 4: something differs.
    """
    if verify_only and undo:
        raise click.UsageError("--verify-only and --undo exclude each other")
    _check_instance(instance)
    with _relocation(session, source, target, instance) as relocation:
        if undo:
            relocation.undo()
            report, outcome = None, "undone"
        elif verify_only:
            report = relocation.compare()
            outcome = "verified" if report.ok else "different"
        else:
            report = relocation.run()
            outcome = "already-migrated" if report is None else "migrated" if report.ok else "different"
        origin = relocation.origin
    session.exit_code = ExitCode.VERIFICATION_FAILED if outcome == "different" else ExitCode.OK
    session.show(
        document(
            "store-migration",
            outcome=outcome,
            source=source,
            instance=instance,
            **_report_document(report, origin),
        ),
        *_report_tables(outcome, report, source, instance, origin),
    )
    session.say(_NEXT[outcome])


_NEXT = {
    "migrated": "the file is closed to sidecars; start this one with store.url and store.instance (docs/store.md)",
    "already-migrated": "nothing was done: the vault was moved before, and the database is open to sidecars",
    "verified": "nothing was changed",
    "different": "the file is still the vault; see docs/store.md, If it fails half way",
    "undone": "the file is the vault again; the database is closed to sidecars for good, remove it",
}


def _check_instance(name: str) -> None:
    import msgspec

    from sidecar.config import InstanceName

    try:
        msgspec.convert(name, InstanceName)
    except msgspec.ValidationError as error:
        raise click.UsageError("--instance must be 1 to 128 of a-z, 0-9 and inner '-' and '.'") from error


@contextmanager
def _relocation(session: Session, source: str, target: str, instance: str) -> "Iterator[Relocation]":
    """Lets out only Failure, and what ends the process: then it says how to go on."""
    from sidecar.errors import CustodyError
    from sidecar.store.relocation.relocation import opened_relocation

    with _progress(session) as observe:
        try:
            with opened_relocation(
                path=Path(source).absolute(), url=target, instance=instance, now=session.now, observe=observe
            ) as relocation:
                yield relocation
        except CustodyError as error:
            raise Failure(str(error), advice="see docs/store.md, From SQLite to PostgreSQL") from error
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, SIGTERM, SIGHUP
                session.say("interrupted; run the same command again: it goes on where it was")
            raise


# --- progress -------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(session: Session) -> "Iterator[Callable[[Progress], None]]":
    """A bar for whoever watches standard error; a line of JSON for each event where nobody does."""
    if not sys.stderr.isatty():
        yield _Events()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, no_color=not session.output.colour, highlight=False, markup=False, emoji=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} rows/s"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        yield _Bar(bars)


class _Bar:
    """One for each phase."""

    def __init__(self, bars: Any) -> None:  # noqa: ANN401 (rich is loaded late)
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, progress: "Progress") -> None:
        task = self._tasks.get(progress.phase)
        if task is None:  # the rows that were there before are no speed
            begun = {"total": progress.total_rows, "completed": progress.rows, "rate": "-"}
            self._tasks[progress.phase] = self._bars.add_task(progress.phase, **begun)
            return
        speed = next(each.speed for each in self._bars.tasks if each.id == task)
        rate = f"{speed:,.0f}" if speed else "-"
        self._bars.update(task, completed=progress.rows, description=f"{progress.phase} {progress.table}", rate=rate)


class _Events:
    """At the first and the last row of a phase, and every second in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: tuple[str, int] = ("", 0)
        self._told_seconds = 0.0

    def __call__(self, progress: "Progress") -> None:
        now, (phase, rows) = self._clock(), self._told
        is_new = (progress.phase, progress.rows) != (phase, rows)
        is_edge = progress.phase != phase or progress.rows == progress.total_rows
        if not is_new or not (is_edge or now - self._told_seconds >= _EVENT_SECONDS):
            return
        self._told, self._told_seconds = (progress.phase, progress.rows), now
        event = document(
            "store-migration-progress",
            phase=progress.phase.value,
            table=progress.table or None,
            row_count=progress.rows,
            total_row_count=progress.total_rows,
        )
        print(json.dumps(event), file=sys.stderr, flush=True)


# --- the report -----------------------------------------------------------------------------------------------------------


def _report_document(report: "Report | None", origin: str) -> dict[str, Any]:
    if report is None:
        return {"log": {"origin": origin}, "tables": []}
    log = report.log
    return {
        "log": {
            "origin": origin,
            "entry_count": log.size,
            "covered_size": log.covered_size,
            "problem": log.problem or None,
        },
        "tables": [_table_document(table) for table in report.tables],
    }


def _table_document(table: "TableComparison") -> dict[str, Any]:
    difference = table.difference
    return {
        "table": table.name,
        "source_row_count": table.source_rows,
        "target_row_count": table.target_rows,
        "source_sha256": table.source_sha256,
        "target_sha256": table.target_sha256,
        "difference": None
        if difference is None
        else {"kind": difference.kind, "key": _plain(difference.key), "columns": list(difference.columns)},
    }


def _plain(key: Sequence[Any]) -> list[Any]:
    return [part.hex() if isinstance(part, bytes) else part for part in key]


def _report_tables(outcome: str, report: "Report | None", source: str, instance: str, origin: str) -> Iterator[Table]:
    rows: list[tuple[Cell, Cell]] = [
        ("outcome", Marked(outcome, "bad" if outcome == "different" else "good")),
        ("file", source),
        ("instance", instance),
        ("log", origin),
    ]
    if report is not None:
        size = f"{report.log.size} entries, covered until size {report.log.covered_size}"
        rows.append(("log's end", Marked(report.log.problem, "bad") if report.log.problem else size))
    yield Table(rows=rows)
    if report is not None:
        yield Table(
            title="Tables",
            columns=("table", "rows", "sha256", "verdict"),
            rows=[
                (table.name, str(table.source_rows), table.source_sha256, _verdict(table)) for table in report.tables
            ],
        )


def _verdict(table: "TableComparison") -> Cell:
    if table.ok:
        return Marked("the same", "good")
    return Marked(
        f"{_difference_text(table.difference)}; {table.target_rows} rows, sha256 {table.target_sha256} in the database",
        "bad",
    )


def _difference_text(difference: "Difference | None") -> str:
    if difference is None:
        return "different"
    key = ", ".join(map(str, _plain(difference.key)))
    columns = f" in {', '.join(difference.columns)}" if difference.columns else ""
    return f"the row with the key ({key}) is {difference.kind}{columns}"
