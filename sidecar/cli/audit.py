"""custodyctl audit: the log for those who check it. `verify` needs neither sidecar nor HSM."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from sidecar.cli.documents import document, entry_document, timestamp
from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.output import Marked, Table
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from custody.client import Client
    from custody.values import AuditEntry

    from sidecar.audit.verifier import Report

__all__ = ["audit", "export", "tail", "verify"]

_EXPORT_SECONDS = 3600.0
_POLL_SECONDS = 1.0
_MAX_SMALL_FILE_BYTES = 65_536

audit = CommandGroup(
    "audit",
    help="The log: every use of a token, on record before it happened.",
    entries={
        "tail": Entry("sidecar.cli.audit:tail", "Show the last entries, and with -f the new ones as they come."),
        "export": Entry("sidecar.cli.audit:export", "Write the whole log into a file that can be verified anywhere."),
        "verify": Entry("sidecar.cli.audit:verify", "Verify an exported log with the public key alone."),
    },
)


@click.command(cls=Command)
@click.option("-n", "--entries", "count", type=click.IntRange(min=0), default=20, show_default=True, help="How many.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new entries until Ctrl-C.")
@click.option("--consent", default="", metavar="CONSENT", help="Only what concerns this consent.")
@click.option("--payment", default="", metavar="PAYMENT", help="Only what concerns this payment.")
@pass_session
def tail(session: Session, count: int, follow: bool, consent: str, payment: str) -> None:  # noqa: FBT001 (click)
    """Show the last entries of the log, oldest first. As JSON: one line for each entry."""
    consent = f"consents/{consent.removeprefix('consents/')}" if consent else ""
    payment = f"payments/{payment.removeprefix('payments/')}" if payment else ""
    with session.client() as client:
        newest = client.audit.entries(
            consent=consent, payment=payment, newest_first=True, page_size=max(1, min(count, 200))
        )
        last = _write(session, islice(newest, count), since=-1)
        if last < 0:
            last = next((each.index for each in islice(newest, 1)), -1)
        while follow:
            session.sleep(_POLL_SECONDS)
            last = _write(session, _after(client, last, consent, payment), since=last)


@click.command(cls=Command)
@click.option("--output", "output", required=True, metavar="FILE", help="A file that does not exist yet.")
@pass_session
def export(session: Session, output: str) -> None:
    """Write the whole log, up to a checkpoint that is signed now, into FILE. A partial file is removed.

    FILE becomes readable for you alone, and an existing one is never replaced. Check it with audit verify.
    """
    timeout_seconds = session.options.timeout_seconds or _EXPORT_SECONDS
    with _new_file(Path(output)) as file, session.client() as client:
        for chunk in client.audit.export(timeout_seconds=timeout_seconds):
            file.write(chunk)
        written_bytes = file.tell()
    session.show(
        document("audit-export", file=output, written_bytes=written_bytes),
        Table(rows=[("file", output), ("bytes", str(written_bytes))]),
    )
    session.say(f"verify it with: custodyctl audit verify {output} --key PUBLIC_AUDIT_KEY.pem")


@click.command(cls=Command)
@click.argument("file", metavar="FILE")
@click.option("--key", "key_file", required=True, metavar="PEM", help="The public audit key, from a safe source.")
@click.option("--origin", metavar="ORIGIN", help="The log that it must be (default: the name in the export).")
@click.option(
    "--witnessed",
    multiple=True,
    metavar="NOTE",
    help="A checkpoint that was kept elsewhere; finds a log that was cut back or forked. Repeatable.",
)
@pass_session
def verify(session: Session, file: str, key_file: str, origin: str | None, witnessed: tuple[str, ...]) -> None:
    """Verify an exported log, offline: exit status 0 only if every entry is proven, else 4."""
    from sidecar.audit.verifier import verify_export

    public_key = _small_file(key_file)
    notes = [_small_file(note) for note in witnessed]
    try:
        with Path(file).open("rb") as stream:
            report = verify_export(stream, public_key=public_key, origin=origin, witnessed=notes)
    except OSError as error:
        raise _unreadable(file, error) from error
    session.exit_code = ExitCode.OK if report.ok else ExitCode.VERIFICATION_FAILED
    session.show(
        document("audit-verification", **_report_document(report)),
        *_report_tables(report, witness_given=bool(witnessed)),
    )


def _after(client: "Client", last: int, consent: str, payment: str) -> "Iterator[AuditEntry]":
    for entry in client.audit.entries(consent=consent, payment=payment, newest_first=True):
        if entry.index <= last:
            return
        yield entry


def _write(session: Session, newest_first: "Iterable[AuditEntry]", *, since: int) -> int:
    """Writes the entries oldest first. The index of the last one, or `since` where there is none."""
    entries = list(newest_first)[::-1]
    for entry in entries:
        session.output.show_line(document("audit-entry", **entry_document(entry)), _line(entry))
    return entries[-1].index if entries else since


def _line(entry: "AuditEntry") -> str:
    about = (entry.provider, entry.consent, entry.payment, entry.reason, entry.caller)
    time = timestamp(entry.create_time)
    return "  ".join(
        [f"{entry.index:>8}", f"{time}", f"{entry.event:<28}", f"{entry.outcome:<9}", *filter(None, about)]
    )


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file of our own making that only its owner may read; on disk when this ends, or gone when it ends in an error."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise Failure(
            f"{path} exists already", advice="give a name that is not taken: an export never replaces a file"
        ) from error
    except OSError as error:
        raise Failure(f"{path} cannot be made ({error.strerror})") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Failure(f"{path} cannot be written ({error.strerror}); nothing is left of it") from error
        raise


def _small_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_SMALL_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> Failure:
    return Failure(f"{path} cannot be read ({error.strerror})")


def _report_document(report: "Report") -> dict[str, Any]:
    return {
        "verdict": report.verdict.value,
        "failure": None if report.failure is None else str(report.failure),
        "violations": [str(each) for each in report.violations],
        "violation_count": report.violation_count,
        "origin": report.origin,
        "origin_pinned": report.origin_pinned,
        "entry_count": report.entries,
        "covered_size": report.covered,
        "checkpoint_count": report.checkpoints,
        "witnessed_sizes": sorted(report.witnessed),
        "payments_dispatched": report.payments_dispatched,
        "first_time": _time_of(report.first_time_ns),
        "last_time": _time_of(report.last_time_ns),
        "clock_steps_back": report.clock_steps_back,
        "events": dict(report.events),
    }


def _report_tables(report: "Report", *, witness_given: bool) -> Iterator[Table]:
    verdict = Marked(report.verdict.value, "good" if report.ok else "bad")
    witness = "not checked: a log cut back to an older checkpoint would look whole (--witnessed)"
    if witness_given:
        witness = (
            "agrees at size " + ", ".join(map(str, sorted(report.witnessed))) if report.witnessed else "not confirmed"
        )
    yield Table(
        rows=[
            ("verdict", verdict),
            *([("failure", Marked(str(report.failure), "bad"))] if report.failure else []),
            *(("violation", Marked(str(each), "bad")) for each in report.violations),
            (
                "log",
                f"{report.origin or '-'}{'' if report.origin_pinned else ' (by its own account; pin it with --origin)'}",
            ),
            ("entries", str(report.entries)),
            ("covered", f"until size {report.covered}"),
            ("checkpoints", str(report.checkpoints)),
            ("witness", witness),
            ("payments", f"{report.payments_dispatched} dispatched"),
            ("first entry", _time_of(report.first_time_ns) or "-"),
            ("last entry", _time_of(report.last_time_ns) or "-"),
            (
                "clock",
                f"stepped back {report.clock_steps_back} times" if report.clock_steps_back else "never stepped back",
            ),
        ]
    )
    yield Table(
        title="Events", columns=("event", "count"), rows=[(name, str(count)) for name, count in report.events.items()]
    )


def _time_of(nanoseconds: int | None) -> str | None:
    return None if nanoseconds is None else timestamp(datetime.fromtimestamp(nanoseconds // 10**9, tz=UTC))
