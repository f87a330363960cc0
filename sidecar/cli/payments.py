"""custodyctl payment: looks at payments, and writes down what a person found out about one. Nothing here can move money."""

from datetime import datetime
from heapq import nlargest
from typing import TYPE_CHECKING

import click

from sidecar.cli.consents import PAGE_SIZE, full_name
from sidecar.cli.documents import document, payment_document
from sidecar.cli.failures import Failure
from sidecar.cli.output import Cell, Marked, Table, time_text
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from custody.values import Payment

__all__ = ["STATES", "list_payments", "payment", "resolve_payment", "show_payment"]

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
        "resolve": Entry("sidecar.cli.payments:resolve_payment", "Write down what the bank says became of one."),
    },
)


class _State(click.Choice[str]):
    """A state as the contract writes it, or in lower case with dashes: needs-attention."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(value.replace("-", "_"), param, ctx)


@click.command("list", cls=Command)
@click.option("--owner", metavar="OWNER", help="Only those of this owner.")
@click.option("--consent", metavar="CONSENT", help="Only those made with this consent.")
@click.option("--state", type=_State(STATES, case_sensitive=False), help="Only those in this state: unknown, …")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, the newest."
)
@pass_session
def list_payments(session: Session, owner: str | None, consent: str | None, state: str | None, limit: int) -> None:
    """List payments, newest first. Shows no name and no account."""
    from custody.values import PaymentState

    with session.client() as client:
        made_with = full_name("consents", consent) if consent else ""
        states = [PaymentState(state)] if state else []
        listed = client.payments.list(owner=owner, consent=made_with, states=states, page_size=PAGE_SIZE)
        found = nlargest(limit + 1, listed, key=lambda each: each.create_time)
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
    _show(session, found)


@click.command("resolve", cls=Command)
@click.argument("name", metavar="PAYMENT")
@click.option(
    "--finding",
    type=click.Choice(("executed", "not-executed")),
    required=True,
    help="executed: it is in the bank's books. not-executed: the bank says that it never will be.",
)
@click.option(
    "--reason", metavar="TEXT", required=True, help="What was checked, and with whom; it stays with the payment."
)
@pass_session
def resolve_payment(session: Session, name: str, finding: str, reason: str) -> None:
    """Write down, for good, what the bank says became of a payment in NEEDS_ATTENTION. You are on record with it.

    Ask the bank first, and be sure: "not-executed" tells the application that it may pay again.
    """
    from custody.values import Finding

    with session.client() as client:
        found = client.payments.get(full_name("payments", name))
        if found.state.value != "NEEDS_ATTENTION":
            raise Failure(f"{found.name} is {found.state.value}; only one in NEEDS_ATTENTION is resolved")
        if not session.options.yes:
            for label, text in _identifying(found):
                session.say(f"{label}: {text}")
        session.confirm(f"{_FOR_GOOD[finding]} This cannot be taken back.", type_this=found.name)
        resolved = client.payments.resolve(
            found.name, finding=Finding(finding.replace("-", "_").upper()), reason=reason
        )
    _show(session, resolved)
    session.say(f"{resolved.name} is {resolved.state.value}")


_FOR_GOOD = {
    "executed": "The payment becomes SETTLED: the application is told that the money has moved.",
    "not-executed": "The payment becomes REJECTED: the application is told that no money moved, and may pay again.",
}


def _identifying(found: "Payment") -> list[tuple[str, str]]:
    """What a person compares with the bank's books."""
    return [
        ("payment", f"{found.name}, {found.state.value} ({found.status_reason or '-'})"),
        ("amount", str(found.amount)),
        ("from", found.debtor_account.iban if found.debtor_account else "-"),
        ("to", f"{found.creditor_account.iban}, {found.creditor_name}"),
        ("remittance information", found.remittance_information or "-"),
        ("end-to-end id", found.end_to_end_id or "-"),
        ("created", f"{found.create_time:%Y-%m-%dT%H:%M:%SZ}"),
        ("owner", found.owner),
    ]


def _show(session: Session, found: "Payment") -> None:
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
    if found.resolution:
        rows += [
            ("found", found.resolution.finding.value),
            ("what was checked", found.resolution.reason),
            ("by", found.resolution.administrator),
            ("resolved", time_text(found.resolution.resolve_time, now=now)),
        ]
    session.show(document("payment", **payment_document(found)), Table(rows=rows))
    advice = _ADVICE.get(found.state.value)
    if advice:
        session.say(advice)


_ADVICE = {
    "UNKNOWN": "money may or may not have moved; the sidecar goes on asking the provider. Never have it paid again",
    "NEEDS_ATTENTION": "money may or may not have moved, and the provider cannot be asked: a person has to ask the bank, "
    "and write down what it says with custodyctl payment resolve. Never have it paid again",
}


def _row(each: "Payment", now: datetime) -> tuple[Cell, ...]:
    return (each.name, _state(each), str(each.amount), each.consent, each.owner, time_text(each.create_time, now=now))


def _state(each: "Payment") -> Cell:
    state = each.state.value
    if state in _ADVICE:
        return Marked(state, "bad")
    return Marked(state, "good") if state in {"ACCEPTED", "SETTLED"} else state
