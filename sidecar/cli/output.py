"""What custodyctl writes: data to standard output as table, JSON or YAML; talk to standard error.

Rules: JSON and YAML show the same document, which is a contract (docs/custodyctl.md); a table is for people and may change.
Text from outside cannot steer the terminal: control characters and direction marks are shown as what they are.
On a terminal a table is drawn by rich; elsewhere it is plain columns that no width cuts off.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias

__all__ = [
    "Cell",
    "Document",
    "Format",
    "Marked",
    "Mood",
    "Output",
    "ReaderGone",
    "Table",
    "clean",
    "relative",
    "time_text",
]

Format: TypeAlias = Literal["table", "json", "yaml"]
Document: TypeAlias = Mapping[str, Any]  # plain values: what JSON can say
Mood: TypeAlias = Literal["good", "warning", "bad"]

_COLOURS: Mapping[str, str] = {"good": "green", "warning": "yellow", "bad": "red"}
# C0 and C1 controls steer terminals; direction and zero-width marks make one text look like another (CVE-2021-42574).
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class ReaderGone(Exception):
    """Nobody reads standard output any more. Not an OSError, because click ends the process for a broken pipe in its own way."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A cell that is good or bad news."""

    text: str
    mood: Mood


Cell: TypeAlias = str | Marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under column names. Without names: pairs of a name and what it is."""

    rows: Sequence[Sequence[Cell]]
    columns: Sequence[str] = ()
    title: str = ""
    empty: str = "none"


@dataclass(slots=True, kw_only=True)
class Output:
    """Where a command writes to. The streams are looked up at each use, as Python's own print does."""

    form: Format = "table"
    colour: bool = True

    def show(self, document: Document, tables: Iterable[Table]) -> None:
        """Write a result: the document, or the tables that say the same to a person. Raises ReaderGone, as all of these do."""
        with _standard_output():
            if self.form != "table":
                sys.stdout.write(_encoded(document, self.form))
                return
            for number, table in enumerate(tables):
                sys.stdout.write("\n" if number else "")
                self._draw(table)

    def show_line(self, document: Document, text: str) -> None:
        """Write one of a stream of results: a line of JSON, a document of YAML, or a line of text."""
        with _standard_output():
            if self.form == "json":
                sys.stdout.write(json.dumps(document) + "\n")
            elif self.form == "yaml":
                sys.stdout.write("---\n" + _encoded(document, "yaml"))
            else:
                sys.stdout.write(clean(text) + "\n")

    def raw(self, text: str) -> None:
        """Write text as it is: a shell script, a PEM."""
        with _standard_output():
            sys.stdout.write(text)

    def say(self, text: str) -> None:
        """Tell the person something. Not data."""
        print(clean(text), file=sys.stderr, flush=True)

    def _draw(self, table: Table) -> None:
        if sys.stdout.isatty():
            _draw_on_terminal(table, colour=self.colour)
            return
        if table.title:
            sys.stdout.write(f"{table.title}\n")
        sys.stdout.writelines(f"{line}\n" for line in _plain_lines(table))


@contextmanager
def _standard_output() -> Iterator[None]:
    """Whole when this ends: what is left in a buffer could fail when nobody looks any more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise ReaderGone from error


def clean(text: str) -> str:
    """Text that cannot steer a terminal."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def time_text(time: datetime | None, *, now: datetime) -> str:
    """For people: RFC 3339 in UTC, and how far away it is."""
    if time is None:
        return "-"
    return f"{time:%Y-%m-%dT%H:%M:%SZ} ({relative(time - now)})"


def relative(distance: timedelta) -> str:
    """ "in 3 d", "2 h ago", "now": the largest unit that fits."""
    seconds = distance.total_seconds()
    for name, length_seconds in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count = int(abs(seconds) // length_seconds)
        if count:
            return f"in {count} {name}" if seconds > 0 else f"{count} {name} ago"
    return "now"


def _encoded(document: Document, form: Format) -> str:
    if form == "json":
        return json.dumps(document, indent=2) + "\n"
    import yaml

    text: str = yaml.safe_dump(document, sort_keys=False)
    return text


def _plain_lines(table: Table) -> Iterable[str]:
    rows = [[_text(cell) for cell in row] for row in table.rows]
    if not rows:
        yield table.empty
        return
    if table.columns:
        rows.insert(0, [name.upper() for name in table.columns])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _draw_on_terminal(table: Table, *, colour: bool) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=sys.stdout, no_color=not colour, highlight=False, markup=False, emoji=False)
    drawn = RichTable(box=None, pad_edge=False, show_header=bool(table.columns), header_style="bold")
    for name in table.columns or ("", ""):
        drawn.add_column(name.upper(), overflow="fold")  # a narrow terminal breaks lines, and loses nothing
    for row in table.rows:
        drawn.add_row(*(Text(_text(cell), style=_style(cell)) for cell in row))
    if table.title:
        console.print(Text(table.title, style="bold"))
    console.print(drawn if table.rows else Text(table.empty))


def _text(cell: Cell) -> str:
    return clean(cell.text if isinstance(cell, Marked) else cell)


def _style(cell: Cell) -> str:
    return _COLOURS[cell.mood] if isinstance(cell, Marked) else ""
