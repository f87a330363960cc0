"""A writer for `test_crash`: makes and dispatches payments as fast as it can and says so, a line each, until it is killed.

Arguments: the database, and where to kill itself: `never`, or `before-commit:N`, `after-commit:N`, `at-signature:N`.
"""

import asyncio
import os
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from sidecar.domain.audit import AuditEvent
from sidecar.domain.ids import PaymentId, RequestId
from sidecar.domain.payment import PaymentState
from sidecar.store import SqliteStore
from sidecar.store.sqlite import SqliteConnection
from tests.fakes.store import SoftwareSigner
from tests.unit.store.support import (
    active_consent,
    claim_of,
    dispatch_draft,
    draft,
    intent_draft,
    new_claim,
    new_payment,
)

SEED = 20261123


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def boot_time_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        return "boot"

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Killer:
    """Ends this process as the kernel would, the n-th time that it comes to a place."""

    def __init__(self, plan: str) -> None:
        self._place, _, count = plan.partition(":")
        self._left = int(count or 0)

    def reached(self, place: str) -> None:
        if place == self._place:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class MortalSigner(SoftwareSigner):
    def __init__(self, killer: Killer) -> None:
        super().__init__(seed=SEED)
        self._killer = killer

    async def sign_checkpoint(self, body: bytes) -> str:
        note = await super().sign_checkpoint(body)
        self._killer.reached("at-signature")
        return note


def make_commits_mortal(killer: Killer) -> None:
    real = SqliteConnection.commit

    def commit(connection: SqliteConnection) -> None:
        killer.reached("before-commit")
        real(connection)
        killer.reached("after-commit")

    SqliteConnection.commit = commit  # type: ignore[assignment,method-assign]


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def pay(store: SqliteStore) -> None:
    consent = active_consent(id=f"c-{uuid4().hex[:12]}", expire_time=datetime.now(UTC) + timedelta(days=1))
    await store.claim_consent(consent, new_claim(request_id=RequestId(str(uuid4()))), draft(AuditEvent.CONSENT_CREATED))
    say("consent", consent.id)
    while True:
        identifier = PaymentId(f"p-{uuid4().hex[:12]}")
        payment = new_payment(consent, id=identifier, request_id=RequestId(str(uuid4())), bank_key=str(uuid4()))
        await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
        say("intent", payment.id)
        dispatched = payment.to(PaymentState.DISPATCHED, now=datetime.now(UTC))
        permit = await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
        say("permit", permit.payment)


async def main(path: Path, plan: str) -> None:
    killer = Killer(plan)
    store = await SqliteStore.open(
        path=path, cluster="test", signer=MortalSigner(killer), clock=SystemClock(), migrate=False
    )
    await store.record([draft(AuditEvent.SIDECAR_STARTED)])
    say("ready")
    make_commits_mortal(killer)
    async with asyncio.timeout(60):
        await asyncio.gather(*(pay(store) for _ in range(8)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
