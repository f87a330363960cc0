"""What payments have reserved of periodic limits: one sum for each window of each limit, and what each payment put into it.

Rules: a sum changes only by a statement that compares and sets, so two payments cannot both take the last of it, also where
several sidecars write at once; a payment gives back exactly what it took, once, whatever its consent or the policy say by then.
"""

from collections.abc import Sequence

from sqlalchemy import insert, select, update

from sidecar.domain.ids import PaymentId
from sidecar.domain.limits import Reservation
from sidecar.errors import Internal
from sidecar.store.rows import to_microseconds
from sidecar.store.schema import LIMIT_RESERVATIONS, LIMIT_WINDOWS
from sidecar.store.statements import Connection, SqlDialect, Statement, Value, named

__all__ = ["LimitTables"]

_KEY = ("scope", "period_type", "alignment", "start_time", "currency")


class LimitTables:
    def __init__(self, dialect: SqlDialect) -> None:
        windows, reservations = LIMIT_WINDOWS.c, LIMIT_RESERVATIONS.c
        of_window = [windows[name] == named(f"at_{name}") for name in _KEY]
        of_payment = (reservations.payment == named("at_payment"), reservations.released == 0)
        amount = named("amount")
        self._begin = Statement(dialect.insert_unless_there(LIMIT_WINDOWS), dialect)
        self._take = Statement(
            update(LIMIT_WINDOWS)
            .where(*of_window, windows.reserved + amount <= named("most"))
            .values(reserved=windows.reserved + amount),
            dialect,
        )
        self._give_back = Statement(
            update(LIMIT_WINDOWS)
            .where(*of_window, windows.reserved >= amount)
            .values(reserved=windows.reserved - amount),
            dialect,
        )
        self._note = Statement(insert(LIMIT_RESERVATIONS), dialect)
        self._held = Statement(
            select(*(reservations[name] for name in _KEY), reservations.minor_units)
            .where(*of_payment)
            .order_by(*(reservations[name] for name in _KEY)),
            dialect,
        )
        self._release = Statement(
            update(LIMIT_RESERVATIONS)
            .where(*of_payment, *(reservations[name] == named(f"at_{name}") for name in _KEY))
            .values(released=1),
            dialect,
        )

    def reserve(self, connection: Connection, payment: PaymentId, reservations: Sequence[Reservation]) -> None:
        """All of them or none: raises Refused(LIMIT_EXCEEDED) at the first limit without room, and the command is undone.

        Windows are taken in one order everywhere, so that two payments of several limits do not wait for each other.
        """
        keyed = [(_key(reservation), reservation) for reservation in reservations]
        for key, reservation in sorted(keyed, key=lambda pair: tuple(pair[0].values())):
            minor_units = reservation.amount.minor_units
            values: dict[str, Value] = {**_at(key), "amount": minor_units, "most": reservation.limit.amount.minor_units}
            connection.change(self._begin, {**key, "reserved": 0})
            if connection.change(self._take, values) != 1:
                raise reservation.exceeded()
            connection.change(self._note, {**key, "payment": payment, "minor_units": minor_units, "released": 0})

    def release(self, connection: Connection, payment: PaymentId) -> None:
        """Gives back what the payment holds; what it has given back already stays where it is."""
        for row in connection.rows(self._held, {"at_payment": payment}):
            key: dict[str, Value] = dict(zip(_KEY, row, strict=False))
            if connection.change(self._release, {**_at(key), "at_payment": payment}) != 1:
                continue
            if connection.change(self._give_back, {**_at(key), "amount": row[len(_KEY)]}) != 1:
                raise Internal("a window of a limit holds less than was reserved in it")


def _key(reservation: Reservation) -> dict[str, Value]:
    limit = reservation.limit
    return {
        "scope": reservation.scope,
        "period_type": limit.period_type.value,
        "alignment": limit.alignment.value,
        "start_time": to_microseconds(reservation.window.start),
        "currency": reservation.amount.currency_code,
    }


def _at(key: dict[str, Value]) -> dict[str, Value]:
    return {f"at_{name}": value for name, value in key.items()}
