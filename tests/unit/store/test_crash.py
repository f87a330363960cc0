"""kill -9 at any moment: what was acknowledged is there, what was not is whole or absent, and the log verifies."""

import asyncio
import io
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.audit.entry import AuditEntry
from sidecar.audit.export import export_lines
from sidecar.audit.verifier import verify_export
from sidecar.domain.audit import AuditEvent
from sidecar.domain.ids import ConsentId, PaymentId
from sidecar.domain.payment import PaymentState
from sidecar.ports import PaymentFilter
from sidecar.store import SqliteStore
from tests.fakes.store import SoftwareSigner
from tests.unit.store.crash_writer import SEED, SystemClock
from tests.unit.store.support import new_database

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    consents: frozenset[str]
    intents: frozenset[str]
    permits: frozenset[str]


def _write_until_killed(path: Path, plan: str, *, kill_after_seconds: float | None = None) -> Acknowledged:
    """What the writer was told before it died."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.store.crash_writer", str(path), plan],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first == b"ready\n"
        if kill_after_seconds is not None:
            time.sleep(kill_after_seconds)
            os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().decode()
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()
    lines = [line.split() for line in rest.splitlines() if rest.endswith("\n") or line != rest.splitlines()[-1]]
    told = {
        kind: frozenset(words[1] for words in lines if words[0] == kind) for kind in ("consent", "intent", "permit")
    }
    return Acknowledged(consents=told["consent"], intents=told["intent"], permits=told["permit"])


async def _check(path: Path, told: Acknowledged) -> None:
    signer = SoftwareSigner(seed=SEED)
    store = await SqliteStore.open(path=path, cluster="test", signer=signer, clock=SystemClock(), migrate=False)
    try:
        covered = (await store.log_position()).covered_size
        leaves = [leaf.entry for leaf in await store.leaves(start=0, limit=1_000_000)]
        entries = [AuditEntry.decode(leaf) for leaf in leaves]
        dispatched = {
            entry.draft.payment: entry.index for entry in entries if entry.draft.event is AuditEvent.PAYMENT_DISPATCHED
        }
        intended = {entry.draft.payment for entry in entries if entry.draft.event is AuditEvent.PAYMENT_INTENT}
        stored = {payment.id: payment for payment in await store.payments(PaymentFilter(), after="", limit=1_000_000)}

        for identifier in told.consents:
            assert await store.consent(ConsentId(identifier)) is not None
        assert told.intents <= stored.keys()
        for identifier in told.permits:
            assert stored[PaymentId(identifier)].state is PaymentState.DISPATCHED
        # Told or not: a row and its entry are there together, and no dispatch without a checkpoint over it.
        assert intended == set(stored)
        assert set(dispatched) == {key for key, payment in stored.items() if payment.state is PaymentState.DISPATCHED}
        assert all(index < covered for index in dispatched.values())
        for payment in stored.values():
            assert await store.claim(payment.caller, payment.request_id) is not None

        await store.sign_pending()
        notes = [note for _, note in await store.checkpoints(start_size=0, limit=1_000_000)]
        export = io.BytesIO(b"".join(export_lines(store.origin, leaves, notes)))
        report = verify_export(export, public_key=signer.pem, origin=store.origin)
        assert report.ok, report
    finally:
        await store.close()
    driver = sqlite3.connect(path)
    assert driver.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    driver.close()


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """One file, killed again and again while 8 tasks write: each time all that was acknowledged is there (P1, L1)."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    chance = random.Random(seed)
    path = new_database(tmp_path)
    permits = 0

    for _ in range(5):
        told = _write_until_killed(path, "never", kill_after_seconds=chance.uniform(0.01, 0.4))
        asyncio.run(_check(path, told))
        permits += len(told.permits)

    assert permits > 0  # else nothing was proven


@pytest.mark.parametrize("plan", ["before-commit:6", "after-commit:6", "at-signature:3"])
def test_kill_9_at_the_worst_moments(tmp_path: Path, plan: str) -> None:
    """Before COMMIT, after COMMIT with nobody told yet, and with a note signed that is not committed."""
    path = new_database(tmp_path)

    told = _write_until_killed(path, plan)

    asyncio.run(_check(path, told))
