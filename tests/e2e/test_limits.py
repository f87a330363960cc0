"""Real processes: the sum of a period holds when payments race, and a person's finding is seen by whoever asked for a payment."""

import json
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from custody import (
    Consent,
    CustodyError,
    LimitExceededError,
    Money,
    Payment,
    PaymentState,
    PeriodicLimit,
    PeriodType,
    Purpose,
)

from tests.e2e.system import System, eventually

ROOT = Path(__file__).resolve().parents[2]
PAYMENTS = "/v1/payments/"
REASON = "Statement of the day, by phone with the bank (ticket 17)"


def limited(system: System, amount: str) -> Consent:
    """An active consent whose payments of one year may move `amount` together."""
    pending = system.client.consents.create(
        provider="providers/sandbox-bank",
        purposes=[Purpose.ACCOUNTS, Purpose.PAYMENTS],
        expire_time=datetime.now(UTC) + timedelta(days=30),
        redirect_uri=system.development.redirect_uri,
        periodic_limits=[PeriodicLimit(amount=Money(amount, "EUR"), period_type=PeriodType.YEAR)],
    )
    return system.client.consents.complete(pending.consent.name, system.approve(pending))


def custodyctl(system: System, *arguments: str) -> Any:
    """The document that an administrator gets."""
    done = said_by_custodyctl(system, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said_by_custodyctl(system: System, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sidecar.cli.main", "--address", system.development.admin_address, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_payments_that_race_for_a_limit(system: System) -> None:
    """C14: eight payments of ten euros at once, room for two: the bank executes two, the others are told which limit, and
    nothing of them is kept, so that their request ids are free."""
    consent = limited(system, "25.00")
    request_ids = [str(uuid.uuid4()) for _ in range(8)]

    def pay(request_id: str) -> Payment | CustodyError:
        try:
            return system.pay(consent, amount="10.00", request_id=request_id, end_to_end_id=request_id.replace("-", ""))
        except LimitExceededError as refused:
            return refused

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(pay, request_ids))
    executed = sum(len(system.bank.ledger(request_id.replace("-", ""))) for request_id in request_ids)
    refused = [answer for answer in answers if isinstance(answer, LimitExceededError)]

    assert (executed, len(refused)) == (2, 6)
    assert {(each.metadata["limitScope"], each.metadata["periodType"]) for each in refused} == {("consent", "YEAR")}
    assert len(list(system.client.payments.list(consent=consent.name))) == 2
    free = request_ids[answers.index(refused[0])]
    assert system.pay(consent, amount="5.00", request_id=free).name
    with pytest.raises(LimitExceededError):
        system.pay(consent, amount="0.01")


@pytest.mark.parametrize(
    ("fault", "finding", "state"),
    [
        ({"kind": "cut_after_commit"}, "executed", PaymentState.SETTLED),
        ({"kind": "answer", "status": 500, "body": "{}"}, "not-executed", PaymentState.REJECTED),
    ],
    ids=["executed", "not executed"],
)
def test_a_person_finds_out(
    system: System, tmp_path: Path, fault: dict[str, Any], finding: str, state: PaymentState
) -> None:
    """A class C payment whose answer was lost: listed for the administrator, resolved with custodyctl, and seen as final by the
    application under the same request id. Only "not executed" gives the limit back. Everything is on record, in a log that
    verifies."""
    consent = limited(system, "10.00")
    request_id, end_to_end_id = str(uuid.uuid4()), uuid.uuid4().hex
    fields = {name: value for name, value in fault.items() if name != "kind"}
    system.bank.set_fault(fault["kind"], PAYMENTS, method="POST", **fields)
    payment = system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id)
    flagged = eventually(
        lambda: system.client.payments.get(payment.name), lambda seen: seen.state is PaymentState.NEEDS_ATTENTION
    )
    system.bank.clear_faults()
    listed = custodyctl(system, "--format", "json", "payment", "list", "--state", "needs-attention")
    with pytest.raises(LimitExceededError):
        system.pay(consent, amount="0.01")

    resolving = ("payment", "resolve", payment.name, "--finding", finding, "--reason", REASON, "--yes")
    # "Not executed" is refused as long as a request could be under way.
    refused_or_done = eventually(
        lambda: said_by_custodyctl(system, "--format", "json", *resolving), _is_done, seconds=30
    )
    resolved = json.loads(refused_or_done.stdout)
    seen = system.client.payments.get(payment.name)
    again = system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id)

    assert flagged.state is PaymentState.NEEDS_ATTENTION
    assert payment.name in [each["name"] for each in listed["payments"]]
    assert (resolved["state"], resolved["resolution"]["reason"]) == (state.value, REASON)
    assert resolved["resolution"]["administrator"] == "workload:operator"
    assert (seen.state, again.state, again.name) == (state, state, payment.name)
    assert (seen.resolution, again.resolution) == (None, None)
    assert len(system.bank.ledger(end_to_end_id)) == (1 if finding == "executed" else 0)
    still_full = finding == "executed"
    assert _is_refused(system, consent) is still_full
    events = [entry for entry in system.admin.audit.entries(payment=payment.name) if entry.event == "PAYMENT_RESOLVED"]
    assert [(entry.caller, entry.reason) for entry in events] == [
        ("workload:operator", finding.replace("-", "_").upper())
    ]
    assert _verdict(system, tmp_path) == "verified"


def _is_done(said: "subprocess.CompletedProcess[str]") -> bool:
    return said.returncode == 0


def _is_refused(system: System, consent: Consent) -> bool:
    try:
        system.pay(consent, amount="10.00")
    except LimitExceededError:
        return True
    return False


def _verdict(system: System, folder: Path) -> str:
    """What the independent verifier says of the whole log, with the public key alone."""
    export, key = folder / "log", folder / "audit.pem"
    key.write_bytes(system.development.public_key_pem("audit"))
    custodyctl(system, "--format", "json", "audit", "export", "--output", str(export))
    verdict: str = custodyctl(system, "--format", "json", "audit", "verify", str(export), "--key", str(key))["verdict"]
    return verdict
