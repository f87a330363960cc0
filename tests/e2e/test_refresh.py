"""Tokens are renewed by the running sidecar itself, and one that is lost on its way is said at once while the old one goes on."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from custody import ConsentState, ConsentUnusableError

from tests.e2e.system import System, eventually

TOKEN_SECONDS = 16


def metric(system: System, name: str) -> float:
    (value,) = re.findall(rf"^{re.escape(name)} ([0-9.]+)$", system.sidecar.get("/metrics")[1], re.MULTILINE)
    return float(value)


def test_the_background_renews_before_anybody_asks(new_system: Callable[..., System]) -> None:
    """Nobody calls for longer than a token lives: the consent is ready all the same."""
    system = new_system(bank_arguments=["--access-token-seconds", "10"])
    consent = system.consent()
    first = consent.access_expire_time
    assert first is not None

    renewed = eventually(
        lambda: system.client.consents.get(consent.name),
        lambda seen: seen.access_expire_time is not None and seen.access_expire_time > first,
    )
    time.sleep(max(0.0, (first - datetime.now(UTC)).total_seconds()))

    assert renewed.state is ConsentState.ACTIVE
    assert len(system.client.accounts.list(consent.name)) >= 1
    assert metric(system, 'custody_token_refreshes_total{outcome="granted",provider="sandbox-bank"}') >= 1
    assert metric(system, 'custody_refresh_tokens_lost_total{provider="sandbox-bank"}') == 0


def test_a_token_that_is_lost_on_its_way_is_said_while_the_old_one_works(new_system: Callable[..., System]) -> None:
    """The bank rotates and its answer is lost: the owner's consent says so, metric and log too; accounts are read until the old
    access token ends, then the reason is given."""
    system = new_system(bank_arguments=["--access-token-seconds", str(TOKEN_SECONDS)])
    consent = system.consent()
    system.bank.set_fault("cut_after_commit", "/oauth/token", method="POST")

    flagged = eventually(
        lambda: system.client.consents.get(consent.name),
        lambda seen: seen.state is ConsentState.NEEDS_REAUTHORISATION,
        seconds=TOKEN_SECONDS,
    )
    accounts = system.client.accounts.list(consent.name)
    lost = eventually(
        lambda: metric(system, 'custody_refresh_tokens_lost_total{provider="sandbox-bank"}'), lambda seen: seen > 0
    )
    assert flagged.usable_until_time is not None
    left_seconds = (flagged.usable_until_time - datetime.now(UTC)).total_seconds()
    time.sleep(max(0.0, left_seconds))

    assert flagged.state is ConsentState.NEEDS_REAUTHORISATION
    assert flagged.usable_until_time == consent.access_expire_time
    assert len(accounts) >= 1
    assert lost == 1
    assert '"event":"refresh_token_lost"' in system.development.log_file.read_text().replace(" ", "")
    with pytest.raises(ConsentUnusableError):
        system.client.accounts.list(consent.name)
