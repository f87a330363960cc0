"""What may be sent again after a lost answer, by the provider's kind of rotation; and when tokens are renewed."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from sidecar.domain.ids import ConsentId
from sidecar.domain.rotation import CLOCK_ERROR_SECONDS, RotationKind, may_send, refresh_time

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
CALL_SECONDS = 10.0
YEAR_SECONDS = 365 * 86_400.0


def sent(kind: RotationKind, age_seconds: float | None, *, grace_seconds: float | None = None) -> bool:
    since = None if age_seconds is None else NOW - timedelta(seconds=age_seconds)
    return may_send(kind, grace_seconds=grace_seconds, unresolved_since=since, now=NOW, call_seconds=CALL_SECONDS)


@pytest.mark.parametrize("kind", RotationKind)
def test_what_was_never_handed_over_may_be_sent(kind: RotationKind) -> None:
    """Nothing is unresolved: the first attempt is everybody's."""
    assert sent(kind, None, grace_seconds=60.0 if kind is RotationKind.GRACE else None)


@pytest.mark.parametrize("age_seconds", [-YEAR_SECONDS, -1.0, 0.0, 0.001, 29.0, 60.0, YEAR_SECONDS])
def test_at_a_strict_provider_nothing_is_ever_sent_again(age_seconds: float) -> None:
    """However little or much time has gone by, and whatever the clock says."""
    assert not sent(RotationKind.STRICT, age_seconds)


@pytest.mark.parametrize("kind", [RotationKind.WHEN_FIRST_USED, RotationKind.NONE])
@pytest.mark.parametrize("age_seconds", [-YEAR_SECONDS, 0.0, YEAR_SECONDS])
def test_where_only_the_new_pair_ends_the_old_one_it_may_always_be_sent(kind: RotationKind, age_seconds: float) -> None:
    """A pair that never arrived is used by nobody."""
    assert sent(kind, age_seconds)


LAST_SECONDS = 60.0 - CALL_SECONDS - CLOCK_ERROR_SECONDS


@pytest.mark.parametrize(
    ("age_seconds", "may"),
    [
        (0.0, True),
        (LAST_SECONDS, True),
        (LAST_SECONDS + 0.000001, False),
        (60.0, False),
        (YEAR_SECONDS, False),
        (-CLOCK_ERROR_SECONDS, True),
        (-CLOCK_ERROR_SECONDS - 0.000001, False),
        (-YEAR_SECONDS, False),
    ],
)
def test_in_a_grace_period_the_whole_repeat_must_fit(age_seconds: float, may: bool) -> None:
    """The repeat's whole call ends within the period, less what two clocks may differ by; a clock that stands clearly before the
    first attempt tells nothing, so nothing is sent."""
    assert sent(RotationKind.GRACE, age_seconds, grace_seconds=60.0) is may


def test_tokens_of_one_moment_are_renewed_over_a_tenth_of_their_life() -> None:
    """Ten thousand tokens that live an hour: none before 40 per cent, none after half, and in no second more than a few times the
    even share of 28."""
    expires = NOW + timedelta(hours=1)
    times = [refresh_time(ConsentId(f"consent-{n}"), issued=NOW, expires=expires) for n in range(10_000)]
    seconds = Counter(int((time - NOW).total_seconds()) for time in times)

    assert NOW + timedelta(minutes=24) <= min(times)
    assert max(times) <= NOW + timedelta(minutes=30)
    assert len(seconds) >= 355
    assert max(seconds.values()) < 60


def test_the_time_of_a_consent_is_the_same_everywhere() -> None:
    """No process, no hash seed and no second call has part in it."""
    expires = NOW + timedelta(seconds=1000)

    time = refresh_time(ConsentId("consent-1"), issued=NOW, expires=expires)

    assert time == NOW + timedelta(seconds=455.429893)
    assert time == refresh_time(ConsentId("consent-1"), issued=NOW, expires=expires)
