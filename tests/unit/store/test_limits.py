"""The tables of limits by themselves: what not even a caller that has lost its way can do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.domain.ids import PaymentId
from sidecar.domain.limits import CALENDAR_ANCHOR, PeriodicLimit, PeriodType, Reservation
from sidecar.domain.money import Money
from sidecar.errors import Internal
from sidecar.store.limits import LimitTables
from sidecar.store.sqlite import SqliteConnection, SqliteDialect
from tests.unit.store.support import NOW, new_database

PAYMENT = PaymentId("p-1")
LIMITS = LimitTables(SqliteDialect())


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[SqliteConnection]:
    """Without foreign keys: no payment is needed to reserve something for one."""
    connection = SqliteConnection(new_database(tmp_path))
    connection.driver.execute("PRAGMA foreign_keys = OFF")
    yield connection
    connection.close()


def reservation(units: int) -> Reservation:
    limit = PeriodicLimit(amount=Money(currency_code="EUR", minor_units=1000), period_type=PeriodType.DAY)
    amount = Money(currency_code="EUR", minor_units=units)
    return limit.reservation(amount, NOW, scope="consent:c-1", since=CALENDAR_ANCHOR)


def reserved(connection: SqliteConnection) -> int:
    ((sum_of_window,),) = connection.driver.execute("SELECT reserved FROM limit_windows").fetchall()
    return int(sum_of_window)


def test_a_second_release_gives_back_nothing(connection: SqliteConnection) -> None:
    """The row of the reservation says that it was given back, whoever asks again; what others hold stays."""
    LIMITS.reserve(connection, PAYMENT, [reservation(300)])
    LIMITS.reserve(connection, PaymentId("p-2"), [reservation(600)])

    for _ in range(3):
        LIMITS.release(connection, PAYMENT)
    LIMITS.release(connection, PaymentId("p-none"))

    assert reserved(connection) == 600


def test_a_sum_that_does_not_hold_what_was_reserved_is_a_defect(connection: SqliteConnection) -> None:
    """It is said and the command undone; no sum is guessed, and none becomes negative."""
    LIMITS.reserve(connection, PAYMENT, [reservation(300)])
    connection.driver.execute("UPDATE limit_windows SET reserved = 299")

    with pytest.raises(Internal):
        LIMITS.release(connection, PAYMENT)

    assert reserved(connection) == 299


def test_windows_are_taken_in_one_order(connection: SqliteConnection) -> None:
    """However the limits are given: two writers that wait for each other's rows would both have to give up."""
    day, year = PeriodType.DAY, PeriodType.YEAR
    amount = Money(currency_code="EUR", minor_units=1)
    orders = []
    for number, types in enumerate(((day, year), (year, day))):
        limits = [PeriodicLimit(amount=amount, period_type=each) for each in types]
        taken = [limit.reservation(amount, NOW, scope=f"c:{number}", since=CALENDAR_ANCHOR) for limit in limits]
        LIMITS.reserve(connection, PaymentId(f"p-{number}"), taken)
        rows = connection.driver.execute(
            "SELECT period_type FROM limit_windows WHERE scope = ? ORDER BY rowid", (f"c:{number}",)
        )
        orders.append([row[0] for row in rows])

    assert orders[0] == orders[1]
