"""Payments. Their row is changed only where state and epoch are what the caller saw, and never once it is final."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any

from sqlalchemy import Select, func, insert, select, text, tuple_, update
from sqlalchemy.sql.elements import ColumnElement, TextClause

from sidecar.domain.ids import PaymentId
from sidecar.domain.payment import TERMINAL, TRANSITIONS, Payment, PaymentState
from sidecar.errors import Corrupt, Internal, StaleVersion
from sidecar.ports import PaymentFilter
from sidecar.store.rows import corrupt, payment_of, payment_row, to_microseconds
from sidecar.store.schema import PAYMENTS
from sidecar.store.statements import Connection, Listing, Row, SqlDialect, Statement, Value, named

__all__ = ["PaymentTable"]

_CHANGING = (
    "state",
    "update_time",
    "epoch",
    "attempts",
    "rendered_request",
    "dispatch_boot_id",
    "dispatch_boot_time_ns",
    "dispatch_time",
    "send_deadline_time",
    "next_attempt_time",
    "provider_payment_id",
    "provider_status",
    "authorisation_uri",
    "status_reason",
    "resolution_finding",
    "resolution_reason",
    "resolution_administrator",
    "resolve_time",
)
_FIXED = (
    "caller",
    "request_id",
    "consent",
    "owner",
    "provider",
    "amount_currency",
    "amount_minor_units",
    "creditor_iban",
    "creditor_currency",
    "creditor_name",
    "debtor_iban",
    "debtor_currency",
    "product",
    "remittance_information",
    "end_to_end_id",
    "idempotency_class",
    "bank_key",
    "create_time",
)
_COLUMNS = tuple(column for column in PAYMENTS.columns if column.name != "dispatch_epoch")
_OUTCOME_UNKNOWN = frozenset({PaymentState.DISPATCHED, PaymentState.RECONCILING})


def _words(states: Iterable[PaymentState]) -> str:
    return ", ".join(repr(state.value) for state in sorted(states))


_NOT_FINAL = f"state NOT IN ({_words(TERMINAL)})"
# Written out, as in the indexes payments_due_*: SQLite takes a partial index only for the same words.
_IS_UNKNOWN = f"IN ({_words(_OUTCOME_UNKNOWN)})"
_IS_OTHER = f"state NOT IN ({_words(TERMINAL | _OUTCOME_UNKNOWN)})"
_BEFORE_ALL = (-(2**63), "")  # next_attempt_time and id, below those of every row
_TIME, _ID = ([column.name for column in _COLUMNS].index(name) for name in ("next_attempt_time", "id"))


class PaymentTable:
    def __init__(self, dialect: SqlDialect) -> None:
        table = PAYMENTS
        as_seen: tuple[ColumnElement[bool] | TextClause, ...] = (
            table.c.id == named("at_id"),
            table.c.state == named("at_state"),
            table.c.epoch == named("at_epoch"),
            text(_NOT_FINAL),
            *(table.c[name] == named(f"at_{name}") for name in _FIXED),
        )
        changes = {name: named(name) for name in _CHANGING}
        self._list = Listing(dialect, _COLUMNS)
        self._insert = Statement(insert(table), dialect)
        self._seen = Statement(
            select(table.c.state, table.c.epoch, table.c.dispatch_epoch)
            .where(table.c.id == named("id"))
            .with_for_update(),  # so that what was seen is what the change meets, also where others write at the same time
            dialect,
        )
        self._update = Statement(update(table).where(*as_seen).values(changes), dialect)
        self._dispatch = Statement(
            update(table)
            .where(*as_seen, table.c.dispatch_epoch < named("before_dispatch_epoch"))
            .values({**changes, "dispatch_epoch": named("dispatch_epoch")}),
            dialect,
        )
        self._get = Statement(select(*_COLUMNS).where(table.c.id == named("id")), dialect)
        self._due_unknown = Statement(_due(f"{dialect.without_index('state')} {_IS_UNKNOWN}"), dialect)
        self._due_others = Statement(_due(_IS_OTHER), dialect)
        self._counts = Statement(select(table.c.state, func.count()).group_by(table.c.state), dialect)

    def insert(self, connection: Connection, payment: Payment) -> None:
        if payment.state is not PaymentState.INTENT:
            raise Internal("a payment begins as an intent")
        connection.change(self._insert, {**payment_row(payment), "dispatch_epoch": 0})

    def change(
        self, connection: Connection, payment: Payment, *, expected_states: frozenset[PaymentState], expected_epoch: int
    ) -> None:
        """Raises StaleVersion where the row's state or epoch is another, Internal for a change that no table allows."""
        before, _ = self._check_seen(connection, payment, expected_states, expected_epoch)
        if payment.state is PaymentState.DISPATCHED:
            raise Internal("only the dispatch record makes a payment dispatched")
        _check_change(before, payment.state)
        self._write(connection, self._update, payment, before, expected_epoch)

    def dispatch(self, connection: Connection, payment: Payment, *, expected_epoch: int) -> None:
        """Raises StaleVersion where the row's state or epoch is another, or this epoch has had its permit."""
        expected = frozenset({PaymentState.INTENT, PaymentState.RECONCILING})
        before, dispatched = self._check_seen(connection, payment, expected, expected_epoch)
        if payment.state not in (PaymentState.DISPATCHED, PaymentState.RECONCILING):
            raise Internal("a dispatch record leaves a payment dispatched or reconciling")
        _check_change(before, payment.state)
        if dispatched >= payment.epoch:
            raise StaleVersion
        self._write(connection, self._dispatch, payment, before, expected_epoch)

    def get(self, connection: Connection, payment: PaymentId) -> Payment | None:
        rows = connection.rows(self._get, {"id": payment})
        return payment_of(rows[0]) if rows else None

    def list(self, connection: Connection, where: PaymentFilter, *, after: str, limit: int) -> Sequence[Payment]:
        equal = {"caller": where.caller, "owner": where.owner, "consent": where.consent}
        if where.states is None or any(equal.values()):
            rows = self._list.rows(connection, equal, where.states, after=after, limit=limit)
        else:  # state by state, each in the order of the index: all at once, every row in them would be sorted for each page
            pages = [self._list.rows(connection, {}, {state}, after=after, limit=limit) for state in where.states]
            rows = sorted((row for page in pages for row in page), key=itemgetter(_ID))[:limit]
        return [payment_of(row) for row in rows]

    def due(self, connection: Connection, now: datetime, *, limit: int) -> Sequence[Payment]:
        """One row that cannot be read keeps no other payment from its turn: it is passed over while any other is due.

        Raises Corrupt where all that is due cannot be read.
        """
        found: dict[PaymentId, Payment] = {}  # by id: a row that changes between two pages may be met twice
        unreadable: Corrupt | None = None
        for row in self._due_rows(connection, to_microseconds(now), page=limit):
            try:
                payment = payment_of(row)
            except Corrupt as error:
                unreadable = error
                continue
            found[payment.id] = payment
            if len(found) == limit:
                break
        if unreadable and not found:
            raise unreadable
        return list(found.values())

    def _due_rows(self, connection: Connection, now: int, *, page: int) -> Iterator[Row]:
        """All rows that are due, those of unknown outcome first; read on only as far as they are asked for."""
        for statement in (self._due_unknown, self._due_others):
            time, identifier = _BEFORE_ALL
            while rows := connection.rows(
                statement, {"now": now, "after_time": time, "after_id": identifier, "limit": page}
            ):
                yield from rows
                time, identifier = rows[-1][_TIME], rows[-1][_ID]

    def counts(self, connection: Connection) -> dict[PaymentState, int]:
        try:
            return {PaymentState(state): count for state, count in connection.rows(self._counts, {})}
        except ValueError as error:
            raise corrupt() from error

    def _check_seen(
        self, connection: Connection, payment: Payment, expected_states: frozenset[PaymentState], expected_epoch: int
    ) -> tuple[PaymentState, int]:
        """State and epoch of the newest permit, as they are."""
        rows = connection.rows(self._seen, {"id": payment.id})
        if not rows:
            raise StaleVersion
        state, epoch, dispatch_epoch = rows[0]
        try:
            before = PaymentState(state)
        except ValueError as error:
            raise corrupt() from error
        if before in TERMINAL or before not in expected_states or epoch != expected_epoch:
            raise StaleVersion
        if payment.epoch < epoch:
            raise Internal("the epoch of a payment cannot go back")
        return before, int(dispatch_epoch)

    def _write(
        self, connection: Connection, statement: Statement, payment: Payment, before: PaymentState, expected_epoch: int
    ) -> None:
        row = payment_row(payment)
        fixed = {f"at_{name}": row[name] for name in _FIXED}
        seen: dict[str, Value] = {"at_id": payment.id, "at_state": before.value, "at_epoch": expected_epoch}
        epochs: dict[str, Value] = {"before_dispatch_epoch": payment.epoch, "dispatch_epoch": payment.epoch}
        if connection.change(statement, {**row, **fixed, **seen, **epochs}) != 1:
            raise Internal("what a payment orders never changes")  # state and epoch were as expected a statement ago


def _due(condition: str) -> Select[Any]:
    """A page of the payments that are due and fulfil `condition`, the longest waiting first."""
    columns = PAYMENTS.c
    after = tuple_(columns.next_attempt_time, columns.id) > tuple_(named("after_time"), named("after_id"))
    page = select(*_COLUMNS).where(columns.next_attempt_time <= named("now"), after, text(condition))
    return page.order_by(columns.next_attempt_time, columns.id).limit(named("limit"))


def _check_change(before: PaymentState, after: PaymentState) -> None:
    if after is not before and after not in TRANSITIONS[before]:
        raise Internal("a payment cannot make this change of state")
