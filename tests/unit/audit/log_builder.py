"""Logs for tests, made by the real writer and signed by a key in software that answers as PKCS#11 does (`r || s`)."""

import base64
import hashlib
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sidecar.audit.checkpoint import assemble_note, checkpoint_body, der_from_p1363
from sidecar.audit.export import export_lines
from sidecar.audit.log import LogHead
from sidecar.audit.verifier import Report, verify_export
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome

ORIGIN = "audit/test/4be0643f1d98"
VECTORS = Path(__file__).parents[2] / "vectors" / "audit"


class AuditKey:
    """The audit key: signs as the HSM does."""

    def __init__(self) -> None:
        self._private = ec.generate_private_key(ec.SECP256R1())
        public = self._private.public_key()
        self.spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, message: bytes) -> bytes:
        """`r || s`, 64 bytes."""
        r, s = decode_dss_signature(self._private.sign(message, ec.ECDSA(SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def note(self, origin: str, size: int, root: bytes, *, key_name: str | None = None) -> str:
        body = checkpoint_body(origin, size, root)
        return assemble_note(body, key_name or origin, self.spki, der_from_p1363(self.sign(body)))


KEY = AuditKey()
OTHER_KEY = AuditKey()


@dataclass
class LogBuilder:
    """A log in the making: `put` appends, `checkpoint` signs what is there."""

    origin: str = ORIGIN
    key: AuditKey = KEY
    head: LogHead = field(init=False)
    leaves: list[bytes] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    clock_ns: int = 1_795_420_800_000_000_000
    boot_ns: int = 1_000_000_000

    def __post_init__(self) -> None:
        self.head = LogHead.empty(self.origin)

    def put(
        self,
        event: AuditEvent,
        outcome: AuditOutcome = AuditOutcome.SUCCEEDED,
        *,
        payment: str = "",
        epoch: int = 0,
        reason: str = "",
        consent: str = "",
        caller: str = "spiffe://example.org/ns/shop/sa/checkout",
        detail_digest: bytes = b"",
    ) -> "LogBuilder":
        self.clock_ns += 1_000_000
        self.boot_ns += 1_000_000
        draft = AuditDraft(
            event=event,
            outcome=outcome,
            caller=caller,
            payment=payment,
            consent=consent,
            epoch=epoch,
            reason=reason,
            subject=hashlib.sha256(consent.encode()).digest() if consent else b"",
            detail_digest=detail_digest,
        )
        self.head, leaf = self.head.append(draft, time_ns=self.clock_ns, boot_time_ns=self.boot_ns)
        self.leaves.append(leaf.entry)
        return self

    def checkpoint(self) -> "LogBuilder":
        self.notes.append(self.key.note(self.origin, self.head.size, self.head.root()))
        self.sizes.append(self.head.size)
        return self

    def export(self) -> bytes:
        return b"".join(export_lines(self.origin, self.leaves, self.notes))


def random_log(rng: random.Random, *, key: AuditKey = KEY, origin: str = ORIGIN) -> LogBuilder:
    """A clean log of some 3 to 15 entries, as a sidecar would write it: payments under checkpoints, refusals, restarts."""
    log = LogBuilder(origin=origin, key=key)
    log.put(AuditEvent.SIDECAR_STARTED)
    for _ in range(rng.randint(1, 3)):
        rng.choice((_pay, _refuse, _consent, _restart))(log, rng)
        if rng.random() < 0.3 and log.sizes[-1:] != [log.head.size]:
            log.checkpoint()
    log.put(AuditEvent.LOG_EXPORTED)
    return log.checkpoint()


def _pay(log: LogBuilder, rng: random.Random) -> None:
    payment = f"p-{rng.getrandbits(96):024x}"
    log.put(AuditEvent.PAYMENT_INTENT, AuditOutcome.INTENDED, payment=payment, epoch=1)
    log.put(AuditEvent.PAYMENT_DISPATCHED, AuditOutcome.INTENDED, payment=payment, epoch=1).checkpoint()
    if rng.random() < 0.5:
        log.put(AuditEvent.PAYMENT_OUTCOME, AuditOutcome.SUCCEEDED, payment=payment, epoch=1)
        return
    log.put(AuditEvent.PAYMENT_RECONCILING, AuditOutcome.UNKNOWN, payment=payment, epoch=2)
    log.put(AuditEvent.PAYMENT_DISPATCHED, AuditOutcome.INTENDED, payment=payment, epoch=2).checkpoint()
    log.put(AuditEvent.PAYMENT_OUTCOME, AuditOutcome.SUCCEEDED, payment=payment, epoch=2)


def _refuse(log: LogBuilder, rng: random.Random) -> None:
    log.put(AuditEvent.CALL_REFUSED, AuditOutcome.REFUSED, reason=rng.choice(("METHOD_NOT_ALLOWED", "OWNER_MISMATCH")))


def _consent(log: LogBuilder, rng: random.Random) -> None:
    consent = f"c-{rng.getrandbits(96):024x}"
    log.put(AuditEvent.CONSENT_CREATED, consent=consent).put(AuditEvent.CONSENT_ACTIVATED, consent=consent)


def _restart(log: LogBuilder, rng: random.Random) -> None:
    log.boot_ns = rng.randint(0, 1_000)
    log.clock_ns -= rng.randint(0, 1_000_000_000)  # a corrected clock is no fault
    log.put(AuditEvent.SIDECAR_STARTED)


def assemble(origin: str, records: Iterable[tuple[str, bytes]]) -> bytes:
    """An export of any records in any order, with a last line that counts right: what a careful forger would write."""
    records = list(records)
    lines = [f"custody-audit-export/1 {origin}"]
    lines += [f"{kind} {base64.b64encode(data).decode()}" for kind, data in records]
    kinds = [kind for kind, _ in records]
    lines.append(f"end {kinds.count('leaf')} {kinds.count('note')}")
    return ("\n".join(lines) + "\n").encode()


def verify(export: bytes, *, key: AuditKey = KEY, origin: str | None = ORIGIN, witnessed: Sequence[str] = ()) -> Report:
    return verify_export(
        io.BytesIO(export), public_key=key.pem, origin=origin, witnessed=[note.encode() for note in witnessed]
    )


def draft_with(draft: AuditDraft, **changes: Any) -> AuditDraft:
    return replace(draft, **changes)
