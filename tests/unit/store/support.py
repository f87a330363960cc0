"""What tests of the store share: a migrated file to copy, a store that is open for the length of a block, and values to store."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from uuid import UUID

from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.money import Money
from sidecar.domain.payment import IdempotencyClass, Payment, PaymentInstruction, PaymentProduct, PaymentState
from sidecar.ports import CheckpointSigner, Claim, Clock, Store
from sidecar.store import SqliteStore
from tests.fakes.store import HandClock, SoftwareSigner

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
CALLER = WorkloadId("spiffe://example.org/shop")
_numbers = itertools.count(1)


@cache
def _template() -> bytes:
    """The bytes of a freshly migrated database; made once a run, because a process of its own makes it."""
    directory = Path(tempfile.mkdtemp(prefix="store-template-"))
    try:
        path = directory / "store.db"
        command = [sys.executable, "-m", "sidecar.store.migrate", "--url", f"sqlite:///{path}"]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        return path.read_bytes()
    finally:
        shutil.rmtree(directory)


def new_database(directory: Path) -> Path:
    """A migrated, empty database in a new directory that is ours alone."""
    place = directory / f"store-{next(_numbers)}"
    place.mkdir(mode=0o700)
    path = place / "store.db"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_template())
    return path


@contextlib.asynccontextmanager
async def opened(
    path: Path,
    *,
    signer: CheckpointSigner | None = None,
    clock: Clock | None = None,
    cluster: str = "test",
    linger_seconds: float = 0.002,
) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(
        path=path,
        cluster=cluster,
        signer=signer or SoftwareSigner(),
        clock=clock or HandClock(),
        linger_seconds=linger_seconds,
        migrate=False,
    )
    try:
        yield store
    finally:
        await store.close()


def draft(event: AuditEvent = AuditEvent.TOKEN_USE, **changes: object) -> AuditDraft:
    return replace(AuditDraft(event=event, outcome=AuditOutcome.INTENDED, caller=CALLER), **changes)  # type: ignore[arg-type]


def request_id() -> RequestId:
    return RequestId(str(UUID(int=next(_numbers))))


def new_claim(resource: str = "resource", **changes: object) -> Claim:
    claim = Claim(caller=CALLER, request_id=request_id(), method="Method", digest=b"d" * 32, resource=resource)
    return replace(claim, **changes)  # type: ignore[arg-type]


def new_consent(**changes: object) -> Consent:
    consent = Consent(
        id=ConsentId(f"c-{next(_numbers):06d}"),
        caller=CALLER,
        owner=OwnerId("owner-1"),
        provider=ProviderId("bank"),
        purposes=frozenset({Purpose.ACCOUNTS, Purpose.PAYMENTS}),
        accounts=(AccountReference(iban="DE89370400440532013000", currency_code="EUR"), AccountReference(iban="X")),
        state=ConsentState.CREATED,
        subject_key=b"s" * 16,
        redirect_uri="https://shop.example/back",
        create_time=NOW,
        expire_time=NOW + timedelta(days=90, microseconds=1),
        payment_limit=Money(currency_code="EUR", minor_units=10_000),
        wrapped_data_key=b"wrapped",
    )
    return replace(consent, **changes)  # type: ignore[arg-type]


def active_consent(**changes: object) -> Consent:
    """A consent under which payments may be dispatched."""
    return new_consent(**{"state": ConsentState.ACTIVE, "activate_time": NOW, **changes})


def new_payment(consent: Consent, **changes: object) -> Payment:
    identifier = PaymentId(f"p-{next(_numbers):06d}")
    payment = Payment(
        id=identifier,
        caller=CALLER,
        request_id=request_id(),
        consent=consent.id,
        owner=consent.owner,
        provider=consent.provider,
        instruction=PaymentInstruction(
            amount=Money(currency_code="EUR", minor_units=1250),
            creditor_account=AccountReference(iban="FR1420041010050500013M02606"),
            creditor_name="Élodie",
            debtor_account=consent.accounts[0],
            product=PaymentProduct.SEPA_CREDIT_TRANSFER,
            remittance_information="Invoice 7",
            end_to_end_id="E2E-7",
        ),
        state=PaymentState.INTENT,
        idempotency_class=IdempotencyClass.NONE,
        bank_key=f"key-{identifier}",
        create_time=NOW,
        update_time=NOW,
        next_attempt_time=NOW + timedelta(minutes=1),
    )
    return replace(payment, **changes)  # type: ignore[arg-type]


def claim_of(payment: Payment) -> Claim:
    return new_claim(resource=payment.id, request_id=payment.request_id)


def intent_draft(payment: Payment) -> AuditDraft:
    return draft(AuditEvent.PAYMENT_INTENT, payment=payment.id, consent=payment.consent, epoch=payment.epoch)


def dispatch_draft(payment: Payment) -> AuditDraft:
    return draft(AuditEvent.PAYMENT_DISPATCHED, payment=payment.id, consent=payment.consent, epoch=payment.epoch)


async def stored_intent(store: Store) -> tuple[Consent, Payment]:
    """An active consent and a payment under it that may be dispatched, both stored."""
    consent = active_consent()
    await store.claim_consent(consent, new_claim(), draft())
    payment = new_payment(consent)
    await store.claim_payment(payment, claim_of(payment), intent_draft(payment))
    return consent, payment
