"""Windows of limits: a table a banker can read, and the rule that they cut time without gap and overlap."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.domain.limits import (
    CALENDAR_ANCHOR,
    PeriodAlignment,
    PeriodicLimit,
    PeriodType,
    Window,
    check_periodic_limits,
    window_at,
)
from sidecar.domain.money import Money
from sidecar.errors import InvalidField

T = PeriodType

# moment, type, day on which windows begin (None: the calendar), first day of the window, first day of the next
WINDOWS = {
    "a day": ("2026-11-23T08:00", T.DAY, None, "2026-11-23", "2026-11-24"),
    "a day begins at midnight": ("2026-11-23T00:00", T.DAY, None, "2026-11-23", "2026-11-24"),
    "a day ends before midnight": ("2026-11-22T23:59:59.999999", T.DAY, None, "2026-11-22", "2026-11-23"),
    "a leap day": ("2028-02-29T12:00", T.DAY, None, "2028-02-29", "2028-03-01"),
    "the last day of a year": ("2026-12-31T23:59", T.DAY, None, "2026-12-31", "2027-01-01"),
    "clocks go forward in Europe": ("2026-03-29T02:30", T.DAY, None, "2026-03-29", "2026-03-30"),
    "clocks go back in Europe": ("2026-10-25T02:30", T.DAY, None, "2026-10-25", "2026-10-26"),
    "a week from Monday": ("2026-11-23T00:00", T.WEEK, None, "2026-11-23", "2026-11-30"),
    "a week to Sunday": ("2026-11-29T23:59", T.WEEK, None, "2026-11-23", "2026-11-30"),
    "ISO week 53 goes over the year's end": ("2027-01-01T00:00", T.WEEK, None, "2026-12-28", "2027-01-04"),
    "ISO week 1 begins in the old year": ("2024-12-31T10:00", T.WEEK, None, "2024-12-30", "2025-01-06"),
    "a fortnight's first day": ("2001-01-01T00:00", T.FORTNIGHT, None, "2001-01-01", "2001-01-15"),
    "a fortnight's last day": ("2001-01-14T23:59", T.FORTNIGHT, None, "2001-01-01", "2001-01-15"),
    "a fortnight before the anchor": ("2000-12-31T23:59", T.FORTNIGHT, None, "2000-12-18", "2001-01-01"),
    "a fortnight now": ("2026-11-23T08:00", T.FORTNIGHT, None, "2026-11-16", "2026-11-30"),
    "a fortnight over the year's end": ("2027-01-01T00:00", T.FORTNIGHT, None, "2026-12-28", "2027-01-11"),
    "a month": ("2026-11-30T23:59", T.MONTH, None, "2026-11-01", "2026-12-01"),
    "February of a leap year": ("2028-02-29T23:59", T.MONTH, None, "2028-02-01", "2028-03-01"),
    "February of 2100, no leap year": ("2100-02-28T23:59", T.MONTH, None, "2100-02-01", "2100-03-01"),
    "December": ("2026-12-31T23:59", T.MONTH, None, "2026-12-01", "2027-01-01"),
    "the first half of a year": ("2026-06-30T23:59", T.HALF_YEAR, None, "2026-01-01", "2026-07-01"),
    "the second half of a year": ("2026-07-01T00:00", T.HALF_YEAR, None, "2026-07-01", "2027-01-01"),
    "a year": ("2026-12-31T23:59", T.YEAR, None, "2026-01-01", "2027-01-01"),
    "a leap year": ("2028-02-29T00:00", T.YEAR, None, "2028-01-01", "2029-01-01"),
    "a consent's week begins on its weekday": ("2026-11-24T08:00", T.WEEK, "2026-11-18", "2026-11-18", "2026-11-25"),
    "a consent's fortnight": ("2026-12-02T08:00", T.FORTNIGHT, "2026-11-18", "2026-12-02", "2026-12-16"),
    "a consent's month": ("2026-12-17T23:59", T.MONTH, "2026-11-18", "2026-11-18", "2026-12-18"),
    "a consent's next month": ("2026-12-18T00:00", T.MONTH, "2026-11-18", "2026-12-18", "2027-01-18"),
    "from the 31st, in a month of 30 days": ("2026-04-30T00:00", T.MONTH, "2026-01-31", "2026-04-30", "2026-05-31"),
    "from the 31st, the day before": ("2026-04-29T23:59", T.MONTH, "2026-01-31", "2026-03-31", "2026-04-30"),
    "from the 31st, in February": ("2026-02-28T00:00", T.MONTH, "2026-01-31", "2026-02-28", "2026-03-31"),
    "from the 31st, after February": ("2026-03-30T23:59", T.MONTH, "2026-01-31", "2026-02-28", "2026-03-31"),
    "from the 30th, in a leap February": ("2028-02-29T00:00", T.MONTH, "2028-01-30", "2028-02-29", "2028-03-30"),
    "from a leap day, a year": ("2029-02-28T00:00", T.YEAR, "2028-02-29", "2029-02-28", "2030-02-28"),
    "from a leap day, the day before": ("2029-02-27T23:59", T.YEAR, "2028-02-29", "2028-02-29", "2029-02-28"),
    "from a leap day, the next leap year": ("2032-02-29T00:00", T.YEAR, "2028-02-29", "2032-02-29", "2033-02-28"),
    "a consent's half-year": ("2027-02-28T00:00", T.HALF_YEAR, "2026-08-31", "2027-02-28", "2027-08-31"),
    "a consent's half-year, the day before": (
        "2027-02-27T23:59",
        T.HALF_YEAR,
        "2026-08-31",
        "2026-08-31",
        "2027-02-28",
    ),
    "before the consent's day": ("2026-11-17T23:59", T.MONTH, "2026-11-18", "2026-10-18", "2026-11-18"),
}


def midnight(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize("case", WINDOWS)
def test_the_window_of_a_moment(case: str) -> None:
    """Month ends, leap years, ISO weeks, year ends; local time plays no part."""
    moment, period_type, since, first, following = WINDOWS[case]
    anchor = date.fromisoformat(since) if since else CALENDAR_ANCHOR

    window = window_at(midnight(moment), period_type, anchor=anchor)

    assert window == Window(start=midnight(first), end=midnight(following))


def test_a_moment_of_another_time_zone_counts_in_utc() -> None:
    """Half past midnight in Vienna is still the day before."""
    vienna = datetime(2026, 12, 1, 0, 30, tzinfo=timezone(timedelta(hours=1)))

    assert window_at(vienna, T.MONTH, anchor=CALENDAR_ANCHOR).start == midnight("2026-11-01")


MOMENTS = st.datetimes(
    min_value=datetime(1990, 1, 1),  # noqa: DTZ001 - Hypothesis adds the time zone
    max_value=datetime(2150, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)
ANCHORS = st.just(CALENDAR_ANCHOR) | st.dates(min_value=date(2000, 1, 1), max_value=date(2100, 12, 31))
A_MICROSECOND = timedelta(microseconds=1)


@given(moment=MOMENTS, period_type=st.sampled_from(T), anchor=ANCHORS)
@example(moment=datetime(2028, 2, 29, tzinfo=UTC), period_type=T.YEAR, anchor=date(2024, 2, 29))
def test_windows_tile_time(moment: datetime, period_type: PeriodType, anchor: date) -> None:
    """Each moment lies in exactly one window: the one it is in is the one of its first and its last moment, and on both sides
    another one begins where it ends."""
    window = window_at(moment, period_type, anchor=anchor)

    def at(time: datetime) -> Window:
        return window_at(time, period_type, anchor=anchor)

    assert window.start <= moment < window.end
    assert at(window.start) == at(window.end - A_MICROSECOND) == window
    assert at(window.start - A_MICROSECOND).end == window.start
    assert at(window.end).start == window.end


@given(moment=MOMENTS, period_type=st.sampled_from(T), anchor=ANCHORS)
def test_a_window_begins_on_the_day_of_its_kind(moment: datetime, period_type: PeriodType, anchor: date) -> None:
    """On the weekday, or on the day of the month, of the anchor; where a month has no such day, on its last."""
    first = window_at(moment, period_type, anchor=anchor).start

    if period_type in (T.WEEK, T.FORTNIGHT):
        assert first.weekday() == anchor.weekday()
    elif period_type is not T.DAY:
        last_of_month = (first + timedelta(days=1)).month != first.month
        assert first.day == anchor.day or (last_of_month and first.day < anchor.day)


def limit(
    units: int = 1000, period_type: PeriodType = T.DAY, currency_code: str = "EUR", **changes: PeriodAlignment
) -> PeriodicLimit:
    return PeriodicLimit(
        amount=Money(currency_code=currency_code, minor_units=units), period_type=period_type, **changes
    )


EUR = Money(currency_code="EUR", minor_units=500)
CONSENT = PeriodAlignment.CONSENT


@pytest.mark.parametrize(
    ("limits", "single", "mistakes"),
    [
        ([], None, {}),
        ([limit(), limit(period_type=T.WEEK), limit(alignment=CONSENT)], EUR, {}),
        ([limit(currency_code="GBP")], None, {}),
        ([limit(), limit(units=5)], None, {"periodic_limits[1]": "unique"}),
        ([limit(currency_code="GBP")], EUR, {"periodic_limits[0].amount.currency_code": "currency"}),
        (
            [limit(), limit(period_type=T.WEEK, currency_code="GBP")],
            None,
            {"periodic_limits[1].amount.currency_code": "currency"},
        ),
        (
            [limit(), limit(currency_code="GBP"), limit()],
            None,
            {
                "periodic_limits[1]": "unique",
                "periodic_limits[1].amount.currency_code": "currency",
                "periodic_limits[2]": "unique",
            },
        ),
    ],
)
def test_limits_that_contradict_each_other_are_named(
    limits: list[PeriodicLimit], single: Money | None, mistakes: dict[str, str]
) -> None:
    """A period twice in one alignment, and a currency that is not that of the others: each by its field."""
    if not mistakes:
        check_periodic_limits(limits, single)
        return
    with pytest.raises(InvalidField) as refused:
        check_periodic_limits(limits, single)

    assert {violation.field: violation.rule for violation in refused.value.violations} == mistakes


def test_a_refusal_says_whose_limit_and_until_when_and_no_amount() -> None:
    """The caller learns what to wait for; what others have paid is not told."""
    reservation = limit(units=77_777, period_type=T.HALF_YEAR).reservation(
        EUR, midnight("2026-11-23T08:00"), scope="caller:spiffe://example.org/shop", since=CALENDAR_ANCHOR
    )

    refused = reservation.exceeded()

    assert refused.reason == "LIMIT_EXCEEDED"
    assert dict(refused.metadata) == {
        "limitScope": "caller",
        "periodType": "HALF_YEAR",
        "periodAlignment": "CALENDAR",
        "periodEndTime": "2027-01-01T00:00:00Z",
    }
    assert "777" not in refused.message
