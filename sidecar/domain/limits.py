"""How much may be paid within a period: the windows that time is cut into, and what one payment reserves in them.

The terms are those of UK variable recurring payments (Open Banking Read/Write API, VRP control parameters, `PeriodicLimits`).

Rules: each moment lies in exactly one window; a window ends where the next one begins; days are UTC days, so there is no
daylight saving; a month that is too short for the day on which windows begin begins its window on its last day.
"""

import calendar
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum

from sidecar.domain.money import Money
from sidecar.errors import FieldViolation, InvalidField, Refused

__all__ = [
    "CALENDAR_ANCHOR",
    "PeriodAlignment",
    "PeriodType",
    "PeriodicLimit",
    "Reservation",
    "Window",
    "check_periodic_limits",
    "window_at",
]

# Monday and the first day of a year: weeks, fortnights, months, half-years and years all begin with it. What a fortnight of the
# calendar is no standard says; here it is two ISO weeks, counted from this day.
CALENDAR_ANCHOR = date(2001, 1, 1)


class PeriodType(StrEnum):
    DAY = "day"
    WEEK = "week"
    FORTNIGHT = "fortnight"
    MONTH = "month"
    HALF_YEAR = "half-year"
    YEAR = "year"


class PeriodAlignment(StrEnum):
    CALENDAR = "calendar"  # a month is from its first day to its last
    CONSENT = "consent"  # a month is from the day of the month on which the consent was created


_DAYS = {PeriodType.DAY: 1, PeriodType.WEEK: 7, PeriodType.FORTNIGHT: 14}
_MONTHS = {PeriodType.MONTH: 1, PeriodType.HALF_YEAR: 6, PeriodType.YEAR: 12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """From `start` on, before `end`. Both are midnight in UTC."""

    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicLimit:
    """The most that all payments of one window may move together."""

    amount: Money
    period_type: PeriodType
    alignment: PeriodAlignment = PeriodAlignment.CALENDAR

    def reservation(self, amount: Money, moment: datetime, *, scope: str, since: date) -> "Reservation":
        """What a payment of `amount` at `moment` takes of this limit. `since` is the day that the consent was created on."""
        anchor = since if self.alignment is PeriodAlignment.CONSENT else CALENDAR_ANCHOR
        window = window_at(moment, self.period_type, anchor=anchor)
        return Reservation(scope=scope, limit=self, window=window, amount=amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What one payment takes of one limit. `scope` is whose limit it is: `consent:ID` or `caller:WORKLOAD`."""

    scope: str
    limit: PeriodicLimit
    window: Window
    amount: Money

    def exceeded(self) -> Refused:
        """Why the payment is not made. How much others have paid is not told."""
        return Refused(
            "LIMIT_EXCEEDED",
            "with this payment, those of the period would exceed the limit; pay less, or once the period has ended",
            metadata={
                "limitScope": self.scope.partition(":")[0],
                "periodType": self.limit.period_type.name,
                "periodAlignment": self.limit.alignment.name,
                "periodEndTime": self.window.end.strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
        )


def window_at(moment: datetime, period_type: PeriodType, *, anchor: date) -> Window:
    """The window in which `moment` lies, where one of this type begins on the day `anchor`."""
    day = moment.astimezone(UTC).date()
    if period_type in _DAYS:
        length = _DAYS[period_type]
        first = day - timedelta(days=(day - anchor).days % length)
        return Window(start=_midnight(first), end=_midnight(first + timedelta(days=length)))
    length = _MONTHS[period_type]
    months = (day.year - anchor.year) * 12 + day.month - anchor.month
    months -= months % length
    if _months_after(anchor, months) > day:
        months -= length
    return Window(start=_midnight(_months_after(anchor, months)), end=_midnight(_months_after(anchor, months + length)))


def check_periodic_limits(limits: Sequence[PeriodicLimit], payment_limit: Money | None) -> None:
    """Each period once in each alignment, and all in one currency, that of the limit of a single payment too.

    Raises InvalidField with every mistake.
    """
    currency = (payment_limit or limits[0].amount).currency_code if limits else ""
    seen: set[tuple[PeriodType, PeriodAlignment]] = set()
    violations = []
    for index, limit in enumerate(limits):
        field, kind = f"periodic_limits[{index}]", (limit.period_type, limit.alignment)
        if kind in seen:
            violations.append(_violation(field, "unique", "must differ from the others in period_type or alignment"))
        if limit.amount.currency_code != currency:
            violations.append(
                _violation(
                    f"{field}.amount.currency_code", "currency", "must be the currency of all limits of the consent"
                )
            )
        seen.add(kind)
    if violations:
        raise InvalidField(*violations)


def _months_after(anchor: date, months: int) -> date:
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + months, 12)
    last_day = calendar.monthrange(year, month + 1)[1]
    return date(year, month + 1, min(anchor.day, last_day))


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), tzinfo=UTC)


def _violation(field: str, rule: str, description: str) -> FieldViolation:
    return FieldViolation(field=field, rule=rule, description=description)
