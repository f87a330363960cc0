"""custodyctl payment: looks only. Nothing here can move money."""

from datetime import datetime
from heapq import nlargest
from typing import TYPE_CHECKING

import click

from sidecar.cli.consents import PAGE_SIZE, full_name
from sidecar.cli.documents import document, payment_document
from sidecar.cli.output import Cell, Marked, Table, time_text
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from custody.values import Payment

__all__ = ["STATES", "list_payments", "payment", "show_payment"]

STATES = (
    "IN_PROGRESS",
    "AWAITING_AUTHORISATION",
    "ACCEPTED",
    "SETTLED",
    "REJECTED",
    "CANCELLED",
    "UNKNOWN",
    "NEEDS_ATTENTION",
)

payment = CommandGroup(
    "payment",
    help="Payments that applications made, of every owner.",
    entries={
        "list": Entry("sidecar.cli.payments:list_payments", "List them, newest first."),
        "show": Entry("sidecar.cli.payments:show_payment", "Show one."),
    },
)


@click.command("list", cls=Command)
@click.option("--owner", metavar="OWNER", help="Only those of this owner.")
@click.option("--consent", metavar="CONSENT", help="Only those made with this consent.")
@click.option("--state", type=click.Choice(STATES, case_sensitive=False), help="Only those in this state.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, the newest."
)
@pass_session
def list_payments(session: Session, owner: str | None, consent: str | None, state: str | None, limit: int) -> None:
    """List payments, newest first. Shows no name and no account."""
    with session.client() as client:
        made_with = full_name("consents", consent) if consent else ""
        listed = client.payments.list(owner=owner, consent=made_with, page_size=PAGE_SIZE)
        matching = (each for each in listed if state in (None, each.state.value))
        found = nlargest(limit + 1, matching, key=lambda each: each.create_time)
    more = len(found) > limit
    found = found[:limit]
    now = session.now()
    session.show(
        document("payments", payments=[payment_document(each) for each in found], more=more),
        Table(
            columns=("name", "state", "amount", "consent", "owner", "created"),
            rows=[_row(each, now) for each in found],
        ),
    )
    if more:
        session.say(f"there are more than {limit}; --limit shows more")


@click.command("show", cls=Command)
@click.argument("name", metavar="PAYMENT")
@pass_session
def show_payment(session: Session, name: str) -> None:
    """Show one payment as it stands. Where it is not final, the sidecar asks the provider for news by itself."""
    with session.client() as client:
        found = client.payments.get(full_name("payments", name))
    now = session.now()
    rows: list[tuple[str, Cell]] = [
        ("name", found.name),
        ("state", _state(found)),
        ("provider's status", found.provider_status or "-"),
        ("reason", found.status_reason or "-"),
        ("amount", str(found.amount)),
        ("product", found.product.value),
        ("consent", found.consent),
        ("owner", found.owner),
        ("request id", found.request_id),
        ("debtor account", found.debtor_account.iban if found.debtor_account else "-"),
        ("creditor account", found.creditor_account.iban),
        ("creditor name", found.creditor_name),
        ("remittance information", found.remittance_information or "-"),
        ("end-to-end id", found.end_to_end_id or "-"),
        ("created", time_text(found.create_time, now=now)),
        ("updated", time_text(found.update_time, now=now)),
    ]
    session.show(document("payment", **payment_document(found)), Table(rows=rows))
    advice = _ADVICE.get(found.state.value)
    if advice:
        session.say(advice)


_ADVICE = {
    "UNKNOWN": "money may or may not have moved; the sidecar goes on asking the provider. Never have it paid again",
    "NEEDS_ATTENTION": "money may or may not have moved, and the provider cannot be asked: a person has to ask the bank. "
    "Never have it paid again",
}


def _row(each: "Payment", now: datetime) -> tuple[Cell, ...]:
    return (each.name, _state(each), str(each.amount), each.consent, each.owner, time_text(each.create_time, now=now))


def _state(each: "Payment") -> Cell:
    state = each.state.value
    if state in _ADVICE:
        return Marked(state, "bad")
    return Marked(state, "good") if state in {"ACCEPTED", "SETTLED"} else state
