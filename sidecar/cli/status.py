"""custodyctl status."""

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

import click

from sidecar.cli.documents import document, status_document
from sidecar.cli.failures import ExitCode
from sidecar.cli.output import Cell, Marked, Table, time_text
from sidecar.cli.plumbing import Command
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from custody.values import HsmToken, Status

__all__ = ["degradations", "status"]


@click.command(cls=Command)
@pass_session
def status(session: Session) -> None:
    """How the sidecar, its processes, its HSM and its log are.

    Exit status 3 when something needs attention; it says what.
    """
    with session.client() as client:
        seen = client.keys.status()
    degraded = list(degradations(seen))
    session.exit_code = ExitCode.DEGRADED if degraded else ExitCode.OK
    verdict = "degraded" if degraded else "ok"
    session.show(
        document("status", verdict=verdict, degradations=degraded, **status_document(seen)),
        *_tables(seen, degraded, session.now()),
    )


def degradations(seen: "Status") -> Iterator[str]:
    """What needs an administrator's attention, in words."""
    for process in seen.processes:
        if process.state != "READY":
            yield f"the process {process.process} is {process.state}"
    yield from _token_degradations(seen.hsm_token)
    if not seen.ready:
        yield "the sidecar is not ready"
    if not seen.master_key:
        yield "there is no master key"


def _token_degradations(token: "HsmToken | None") -> Iterator[str]:
    if token is None or not token.logged_in:
        yield "the HSM token is not logged in"
    if token is None:
        return
    if token.user_pin_locked:
        yield "the token's user PIN is locked"
    elif token.user_pin_final_try:
        yield "one more wrong user PIN locks the token"
    elif token.user_pin_count_low:
        yield "a wrong user PIN was given since the last right one"


def _tables(seen: "Status", degraded: list[str], now: datetime) -> Iterator[Table]:
    verdict = Marked("degraded", "bad") if degraded else Marked("ok", "good")
    rows: list[tuple[str, Cell]] = [
        ("status", verdict),
        *(("attention", Marked(each, "bad")) for each in degraded),
        ("version", seen.version),
        ("cluster", seen.cluster),
        ("instance", seen.instance),
        ("started", time_text(now - seen.uptime, now=now)),
        ("root key", seen.root_key or "-"),
        ("master key", f"{seen.master_key} (version {seen.master_key_version})" if seen.master_key else "-"),
    ]
    yield Table(rows=rows)
    yield Table(
        title="Processes",
        columns=("process", "state", "restarts", "started"),
        rows=[
            (
                each.process,
                Marked(each.state, "good" if each.state == "READY" else "bad"),
                str(each.restart_count),
                time_text(each.start_time, now=now),
            )
            for each in seen.processes
        ],
    )
    yield Table(title="HSM token", rows=_token_rows(seen.hsm_token), empty="not reached")
    yield Table(
        title="Log",
        rows=[
            ("origin", seen.log.origin),
            ("entries", str(seen.log.entry_count)),
            ("covered", f"until size {seen.log.checkpoint_size}"),
            ("checkpoint", time_text(seen.log.checkpoint_time, now=now)),
        ],
    )
    yield Table(
        title="Consents",
        columns=("state", "count"),
        rows=[(state.value, str(count)) for state, count in seen.consent_counts.items()],
    )


def _token_rows(token: "HsmToken | None") -> list[tuple[str, Cell]]:
    if token is None:
        return []
    pin = list(_token_degradations(token))
    return [
        ("label", token.label),
        ("serial", token.serial),
        ("model", token.model),
        ("module", token.module),
        ("login", Marked("; ".join(pin), "bad") if pin else Marked("logged in, no wrong PIN on record", "good")),
    ]
