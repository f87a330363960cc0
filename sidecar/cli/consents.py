"""custodyctl consent: looks at consents of every owner, and ends them. No token is in any answer."""

from collections.abc import Iterable
from datetime import datetime
from heapq import nlargest
from typing import TYPE_CHECKING

import click

from sidecar.cli.documents import consent_document, document
from sidecar.cli.output import Cell, Marked, Table, time_text
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from custody.values import Consent, PeriodicLimit

__all__ = ["PAGE_SIZE", "STATES", "consent", "full_name", "list_consents", "revoke_consent", "show_consent"]

STATES = (
    "AWAITING_AUTHORISATION",
    "COMPLETING",
    "ACTIVE",
    "NEEDS_REAUTHORISATION",
    "REVOKED",
    "EXPIRED",
    "FAILED",
)
PAGE_SIZE = 200  # the sidecar lists in an order of its own, so all pages are gone through, and only the newest are kept
_ENDED = frozenset({"REVOKED", "EXPIRED", "FAILED"})

consent = CommandGroup(
    "consent",
    help="Consents in custody, of every owner.",
    entries={
        "list": Entry("sidecar.cli.consents:list_consents", "List them, newest first."),
        "show": Entry("sidecar.cli.consents:show_consent", "Show one."),
        "revoke": Entry("sidecar.cli.consents:revoke_consent", "End one for good."),
    },
)


@click.command("list", cls=Command)
@click.option("--owner", metavar="OWNER", help="Only those of this owner.")
@click.option("--provider", metavar="PROVIDER", help="Only those at this provider.")
@click.option("--state", type=click.Choice(STATES, case_sensitive=False), help="Only those in this state.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, the newest."
)
@pass_session
def list_consents(session: Session, owner: str | None, provider: str | None, state: str | None, limit: int) -> None:
    """List consents, newest first. Shows no account."""
    with session.client() as client:
        matching = (
            each
            for each in client.consents.list(owner=owner, page_size=PAGE_SIZE)
            if state in (None, each.state.value)
            and (provider is None or each.provider == full_name("providers", provider))
        )
        found = nlargest(limit + 1, matching, key=lambda each: each.create_time)
    more = len(found) > limit
    found = found[:limit]
    now = session.now()
    session.show(
        document("consents", consents=[consent_document(each) for each in found], more=more),
        Table(
            columns=("name", "owner", "provider", "state", "purposes", "expires"),
            rows=[_row(each, now) for each in found],
        ),
    )
    if more:
        session.say(f"there are more than {limit}; --limit shows more")


@click.command("show", cls=Command)
@click.argument("name", metavar="CONSENT")
@pass_session
def show_consent(session: Session, name: str) -> None:
    """Show one consent."""
    with session.client() as client:
        found = client.consents.get(full_name("consents", name))
    _show(session, found)


@click.command("revoke", cls=Command)
@click.argument("name", metavar="CONSENT")
@click.option("--dry-run", is_flag=True, help="Show what would be ended, and change nothing.")
@pass_session
def revoke_consent(session: Session, name: str, dry_run: bool) -> None:  # noqa: FBT001 (click passes options so)
    """End a consent for good: the provider is told, the data key is destroyed, and nothing can open its tokens again.

    What the log says of it stays. Revoking twice does no harm.
    """
    with session.client() as client:
        found = client.consents.get(full_name("consents", name))
        if dry_run:
            _show(session, found)
            session.say(_forecast(found))
            return
        session.confirm(
            f"{found.name} of {found.owner} at {found.provider} is {found.state.value}. {_FOR_GOOD}",
            type_this=found.name,
        )
        revoked = client.consents.revoke(found.name)
    _show(session, revoked)
    session.say(f"{revoked.name} is {revoked.state.value}")


_FOR_GOOD = "Revoking it destroys its key: payments and reads with it end, and only a new consent of the person brings them back."


def full_name(collection: str, name: str) -> str:
    """`consents/ID` from either that or the bare ID."""
    return name if name.startswith(f"{collection}/") else f"{collection}/{name}"


def _forecast(found: "Consent") -> str:
    if found.state.value in _ENDED:
        return f"dry run: {found.name} has ended already, nothing would change"
    return f"dry run: {found.name} would be revoked; nothing was changed"


def _show(session: Session, found: "Consent") -> None:
    now = session.now()
    rows: list[tuple[str, Cell]] = [
        ("name", found.name),
        ("owner", found.owner),
        ("provider", found.provider),
        ("state", _state(found)),
        ("usable until", time_text(found.usable_until_time, now=now)),
        ("failure reason", found.failure_reason or "-"),
        ("purposes", _words(found.purposes)),
        ("accounts", _words(each.iban for each in found.accounts) if found.accounts else "all that the person chose"),
        ("payment limit", str(found.payment_limit) if found.payment_limit else "-"),
        ("periodic limits", _words(_limit(each) for each in found.periodic_limits) or "-"),
        ("created", time_text(found.create_time, now=now)),
        ("activated", time_text(found.activate_time, now=now)),
        ("expires", time_text(found.expire_time, now=now)),
        ("access expires", time_text(found.access_expire_time, now=now)),
        ("revoked", time_text(found.revoke_time, now=now)),
    ]
    session.show(document("consent", **consent_document(found)), Table(rows=rows))


def _row(each: "Consent", now: datetime) -> tuple[Cell, ...]:
    return (
        each.name,
        each.owner,
        each.provider,
        _state(each),
        _words(each.purposes),
        time_text(each.expire_time, now=now),
    )


def _state(each: "Consent") -> Cell:
    state = each.state.value
    if state == "ACTIVE":
        return Marked(state, "good")
    return Marked(state, "warning") if state == "NEEDS_REAUTHORISATION" else state


def _limit(limit: "PeriodicLimit") -> str:
    return f"{limit.amount} a {limit.period_type.value} ({limit.alignment.value})"


def _words(values: Iterable[str]) -> str:
    return ", ".join(str(value) for value in values)
