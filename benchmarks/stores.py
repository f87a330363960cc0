"""Stores without the rest of the sidecar: many of them on one PostgreSQL, and one consent among many on either database.

A worker. It speaks through the port only; what the baseline does otherwise is said where it is set.
"""

import argparse
import itertools
import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.parts import Signer
from benchmarks.workers import Work, run_load, serve
from sidecar.clock import SystemClock
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, ProviderId, RequestId, WorkloadId, new_consent_id
from sidecar.ports import Claim
from sidecar.store import SqliteStore, SqlStore, committer
from sidecar.store.postgresql import PostgresqlStore

__all__ = ["CLUSTER", "consent_name", "main"]

CLUSTER = "benchmark"
_CALLER = WorkloadId("workload:shop")
_OPENED = AuditDraft(event=AuditEvent.SIDECAR_STARTED, outcome=AuditOutcome.SUCCEEDED)


def consent_name(number: int) -> ConsentId:
    """Of the consents that a benchmark puts into a database by SQL."""
    return ConsentId(f"c-{number:024d}")


async def main(arguments: Sequence[str]) -> tuple[dict[str, Any], Work]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="", help="of a PostgreSQL")
    parser.add_argument("--file", type=Path, help="of an SQLite database")
    parser.add_argument("--first", type=int, default=0, help="the number of the first instance")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--one-commit-per-command", action="store_true")
    options = parser.parse_args(arguments)
    if options.one_commit_per_command:
        committer._MAX_GROUP = 1
    numbers = range(options.first, options.first + options.instances)
    stores = [await _opened(options.url, options.file, f"pod-{number}") for number in numbers]

    async def work(command: dict[str, Any]) -> dict[str, Any]:
        what, _, argument = command["work"].partition("@")
        turns = itertools.cycle(stores)
        if what == "change":
            return await run_load(command, lambda: _change(next(turns)))
        chance = random.Random(1)
        return await run_load(command, lambda: _read(stores[0], consent_name(chance.randrange(int(argument)))))

    return {}, work


async def _opened(url: str, file: Path | None, instance: str) -> SqlStore:
    clock = SystemClock()
    store: SqlStore
    if file is not None:
        store = await SqliteStore.open(path=file, cluster=CLUSTER, signer=Signer(), clock=clock)
    else:
        store = await PostgresqlStore.open(url=url, instance=instance, cluster=CLUSTER, signer=Signer(), clock=clock)
    await store.record([_OPENED])
    return store


async def _change(store: SqlStore) -> None:
    """A change of state with its claim and its entry in the log."""
    now = datetime.now(UTC)
    consent = Consent(
        id=new_consent_id(now),
        caller=_CALLER,
        owner=OwnerId("person-1"),
        provider=ProviderId("bank"),
        purposes=frozenset({Purpose.PAYMENTS}),
        accounts=(AccountReference(iban="DE19100100100000000404"),),
        state=ConsentState.CREATED,
        subject_key=bytes(16),
        redirect_uri="https://shop.example/back",
        create_time=now,
        expire_time=now + timedelta(days=90),
    )
    claim = Claim(
        caller=_CALLER,
        request_id=RequestId(str(uuid.uuid4())),
        method="CreateConsent",
        digest=bytes(32),
        resource=consent.id,
    )
    entry = AuditDraft(event=AuditEvent.CONSENT_CREATED, outcome=AuditOutcome.SUCCEEDED, consent=consent.id)
    assert await store.claim_consent(consent, claim, entry) is None


async def _read(store: SqlStore, consent: ConsentId) -> None:
    found = await store.consent(consent)
    assert found is not None
    assert found.id == consent


if __name__ == "__main__":
    serve(main)
