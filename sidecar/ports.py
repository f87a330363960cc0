"""What the core needs from outside. Adapters let out only errors of `sidecar.errors` (and `StaleVersion` from the store).

Egress, the HSM and the store each have a fake for tests which passes the same contract suite as the real thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from sidecar.domain.audit import AuditDraft
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.limits import Reservation
from sidecar.domain.payment import DispatchPermit, Payment, PaymentState
from sidecar.domain.provider import KeyPurpose, ProviderRequest, SendOutcome, TokenOutcome
from sidecar.domain.secrets import SealedSecret, SecretContext, SecretKind

__all__ = [
    "CheckpointSigner",
    "Claim",
    "Clock",
    "ConsentFilter",
    "ConsentSecrets",
    "Hsm",
    "ImportKey",
    "ImportedTokens",
    "LogPosition",
    "MasterKeyRecord",
    "NewSecrets",
    "OpenSecret",
    "PaymentFilter",
    "Prepared",
    "PublicKey",
    "RefreshLease",
    "SecretsChange",
    "Store",
    "StoredLeaf",
    "TokenEgress",
]


# --- time -------------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    def now(self) -> datetime:
        """UTC, with time zone."""

    def boot_time_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds: goes on through suspend, never steps; the same in every process of this machine."""

    def boot_id(self) -> str:
        """This run of the machine (random(4), /proc/sys/kernel/random/boot_id): boot times of two runs do not compare."""

    async def sleep(self, seconds: float) -> None: ...


# --- the HSM, as the gateway sees it ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """The public half of a signing key in the HSM. `key_id` is the first 16 hex digits of SHA-256 over the SPKI."""

    purpose: KeyPurpose
    key_id: str
    algorithm: str  # JOSE name: ES256
    spki_der: bytes


class Hsm(Protocol):
    """Signatures only: nothing that opens a secret is offered to the gateway."""

    async def sign(self, purpose: KeyPurpose, digest: bytes) -> bytes:
        """ECDSA P-256 over a SHA-256 `digest` (32 bytes); r || s, 64 bytes. Root keys do not sign.

        Raises Unavailable(HSM_UNAVAILABLE) when the HSM does not answer within its deadline.
        """

    async def public_key(self, purpose: KeyPurpose) -> PublicKey: ...


# --- egress ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSecrets:
    """A new consent's data key, wrapped, and its PKCE verifier, sealed (RFC 7636, S256)."""

    wrapped_data_key: bytes
    pkce_verifier: bytes
    code_challenge: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSecret:
    """A sealed secret and all that must match for it to open."""

    secret: SealedSecret
    context: SecretContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request whose secrets have been proven to open and whose connection is open, waiting in egress under `handle`."""

    handle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportKey:
    """HPKE public key (X25519, 32 bytes) of this run of egress; the private half exists only there."""

    key_id: str
    public_key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedTokens:
    wrapped_data_key: bytes
    access_token: bytes
    refresh_token: bytes | None


class TokenEgress(Protocol):
    """Every method raises Unavailable(PROVIDER_UNAVAILABLE | HSM_UNAVAILABLE) only where nothing can have left, and
    Corrupt(ENVELOPE_CORRUPT) where a secret does not open. All times are seconds from now."""

    async def new_secrets(self, context: SecretContext) -> NewSecrets:
        """Makes a data key and a sealed PKCE verifier; `context` has the origin of the token endpoint."""

    async def call(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        """Sends once, on a kept connection; for requests that may be repeated (reads)."""

    async def call_once(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        """Sends once, on a connection of its own; for requests that must not be doubled but move no money."""

    async def request_tokens(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
        deadline_seconds: float,
    ) -> TokenOutcome:
        """Sends to a token endpoint once; the tokens of the answer are sealed before they leave egress.

        The two contexts differ in their origin: the access token goes to the API, the refresh token to the token endpoint.
        """

    async def prepare(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        deadline_seconds: float,
    ) -> Prepared:
        """Everything that can fail for local reasons, before the point of no return: secrets open, connection open."""

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        """Redeems the permit and sends the prepared request, once, on its connection; closes the connection at the deadline."""

    async def discard(self, prepared: Prepared) -> None: ...

    async def import_key(self) -> ImportKey: ...

    async def import_tokens(
        self,
        *,
        key_id: str,
        sealed_tokens: bytes,
        info: bytes,
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
    ) -> ImportedTokens:
        """Opens an HPKE ciphertext (RFC 9180) and seals its tokens. Raises PreconditionFailed(IMPORT_KEY_UNKNOWN) or
        InvalidField for a ciphertext that does not open or hold what it must."""

    async def forget(self, wrapped_data_key: bytes) -> None:
        """Drops a data key from the cache at once (its consent has ended)."""


# --- the store ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One use of a request id: unique by caller and request id, kept for ever.

    `digest` tells whether a repeat has the same body.
    """

    caller: WorkloadId
    request_id: RequestId
    method: str
    digest: bytes
    resource: str  # id of the consent, payment or signature that this call makes or changes


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretsChange:
    """Secrets written in the same transaction as the row. Deletions come first: those that `delete` names by kind and row version,
    or all of the consent's with `delete_all`. Then `put` is inserted; versions that are not deleted stay beside it, and putting
    one that is still there is refused."""

    put: tuple[SealedSecret, ...] = ()
    delete: tuple[tuple[SecretKind, int], ...] = ()
    delete_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsentSecrets:
    """All sealed secrets of a consent, newest row version first within a kind."""

    secrets: tuple[SealedSecret, ...]

    def newest(self, kind: SecretKind) -> SealedSecret | None:
        return next((secret for secret in self.secrets if secret.kind is kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshLease:
    """Who may refresh a consent's tokens, as far as others need to know. `unresolved_since`: when the refresh token was first
    handed over (as far as anybody can tell) without an answer that is known; None where nothing is open."""

    epoch: int
    expire_time: datetime
    unresolved_since: datetime | None

    def is_held(self, now: datetime) -> bool:
        return now < self.expire_time


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsentFilter:
    """None means any. `holds_key`: whether the consent's data key still exists."""

    caller: WorkloadId | None = None
    owner: OwnerId | None = None
    provider: ProviderId | None = None
    states: frozenset[ConsentState] | None = None
    holds_key: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentFilter:
    caller: WorkloadId | None = None
    owner: OwnerId | None = None
    consent: ConsentId | None = None
    states: frozenset[PaymentState] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterKeyRecord:
    """One version of the master key, wrapped by the root key in the HSM. Exactly one record is `current`."""

    key_id: bytes  # 16 random bytes
    version: int
    wrapped: bytes
    root_key_id: str
    current: bool
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLeaf:
    index: int
    entry: bytes  # canonical bytes of the audit entry (docs/audit-log.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPosition:
    """`covered_size` is the size of the newest signed checkpoint; entries from there on wait for the next one."""

    origin: str
    size: int
    covered_size: int
    checkpoint_time: datetime | None


class CheckpointSigner(Protocol):
    async def sign_checkpoint(self, body: bytes) -> str:
        """The signed note over a checkpoint body. Raises Unavailable when the HSM does not sign."""


class Store(Protocol):
    """Atomic commands, each with its audit entries in the same transaction: no entry, no act.

    Commands return when the transaction is durable. They raise StaleVersion where a compare-and-set fails (nothing was
    written), Unavailable(STORE_UNAVAILABLE) where the database does not answer, Unavailable(AUDIT_UNAVAILABLE) where the
    entry cannot be written or, for commands that need it, a checkpoint over it cannot be signed. In each case nothing was
    written, or the same command with the same values may be repeated.
    Reads return committed data. A row that cannot be read raises Corrupt(ENVELOPE_CORRUPT).
    """

    # -- consents

    async def claim_consent(self, consent: Consent, claim: Claim, audit: AuditDraft) -> Claim | None:
        """Inserts the consent and its claim. Returns None when this call won, else the claim that was there first."""

    async def change_consent(
        self,
        consent: Consent,
        *,
        secrets: SecretsChange | None = None,
        claim: Claim | None = None,
        lease_epoch: int | None = None,
        audit: Sequence[AuditDraft],
    ) -> Claim | None:
        """Writes `consent` where the row has version `consent.version - 1`. With a claim: returns the earlier claim and
        writes nothing when the request id was used before. With `lease_epoch`: only while the refresh lease still has this epoch,
        and releases it, resolved."""

    async def consent(self, consent: ConsentId) -> Consent | None: ...

    async def consents(self, where: ConsentFilter, *, after: str, limit: int) -> Sequence[Consent]:
        """By ascending id, those after `after` ("" from the start), at most `limit`."""

    async def expired_consents(self, now: datetime, *, limit: int) -> Sequence[Consent]:
        """Consents whose expire_time has passed and whose state is not final."""

    async def secrets(self, consent: ConsentId) -> ConsentSecrets: ...

    async def refresh_lease(self, consent: ConsentId) -> RefreshLease | None:
        """None where it was never taken."""

    async def take_refresh_lease(
        self, consent: ConsentId, *, holder: str, now: datetime, seconds: float, after_epoch: int, audit: AuditDraft
    ) -> int | None:
        """The lease's new epoch; None while somebody holds it, and where its epoch is not `after_epoch` (0: never taken). From here
        on the refresh token counts as handed over: `unresolved_since` is now, where nothing was open before."""

    async def release_refresh_lease(
        self,
        consent: ConsentId,
        *,
        epoch: int,
        unresolved_since: datetime | None = None,
        free_time: datetime | None = None,
    ) -> None:
        """Ends the lease if it still has this epoch. It is free from `free_time` on, at once where that is None."""

    async def due_refreshes(self, provider: ProviderId, now: datetime, *, limit: int) -> Sequence[ConsentId]:
        """Active consents of this provider whose lease is free and has something unresolved, then those whose lease is free and
        whose refresh_time has come; the longest waiting first within both. Ids only: a damaged row keeps no other waiting."""

    # -- payments

    async def claim_payment(
        self, payment: Payment, claim: Claim, audit: AuditDraft, *, reservations: Sequence[Reservation] = ()
    ) -> Claim | None:
        """Inserts the intent and its claim, and reserves the payment's amount in each of the limits. Returns None when this call
        won, else the claim that was there first, for which nothing is reserved again.

        Raises Refused(LIMIT_EXCEEDED) where one of the limits has no room; then nothing was written, no claim either.
        """

    async def change_payment(
        self,
        payment: Payment,
        *,
        expected_states: frozenset[PaymentState],
        expected_epoch: int,
        claim: Claim | None = None,
        audit: Sequence[AuditDraft],
    ) -> Claim | None:
        """Writes `payment` where the row's state and epoch are as expected; a terminal row never changes. A state of
        NEVER_EXECUTED gives back, once, what the payment had reserved; no other does.

        With a claim: returns the earlier claim and writes nothing when the request id was used before.
        """

    async def record_dispatch(self, payment: Payment, *, expected_epoch: int, audit: AuditDraft) -> DispatchPermit:
        """INTENT or RECONCILING becomes what `payment` says, under an HSM-signed checkpoint that covers `audit`.

        This is the only maker of permits. In the same transaction the payment's consent must be active, not past its
        expire_time at the clock's present, and still have its data key; else PreconditionFailed (the consent's own reason) and
        nothing was written: a revocation that was answered lets no payment out any more.
        """

    async def payment(self, payment: PaymentId) -> Payment | None: ...

    async def payments(self, where: PaymentFilter, *, after: str, limit: int) -> Sequence[Payment]: ...

    async def due_payments(self, now: datetime, *, limit: int) -> Sequence[Payment]:
        """Payments that are not final and whose next_attempt_time has come: those of unknown outcome (DISPATCHED, RECONCILING)
        before all others, the longest waiting first within both. A row that cannot be read is passed over while any other is
        due; raises Corrupt(ENVELOPE_CORRUPT) where nothing that is due can be read."""

    # -- requests, keys, log

    async def claim(self, caller: WorkloadId, request_id: RequestId) -> Claim | None: ...

    async def record(self, audit: Sequence[AuditDraft], *, claim: Claim | None = None) -> Claim | None:
        """Puts entries on record (and, with a claim, uses a request id up); durable when it returns."""

    async def add_master_key(self, record: MasterKeyRecord, audit: AuditDraft) -> None:
        """Raises StaleVersion when that version exists already."""

    async def master_keys(self) -> Sequence[MasterKeyRecord]: ...

    async def leaves(self, *, start: int, limit: int) -> Sequence[StoredLeaf]: ...

    async def checkpoints(self, *, start_size: int, limit: int) -> Sequence[tuple[int, str]]:
        """(size, signed note) with size >= start_size, by ascending size."""

    async def log_position(self) -> LogPosition: ...

    async def sign_pending(self) -> None:
        """Signs a checkpoint over the whole log if entries wait for one (called at least once a second)."""

    async def consent_counts(self) -> dict[ConsentState, int]: ...

    async def payment_counts(self) -> dict[PaymentState, int]: ...

    async def tokens_expiring(self, before: datetime) -> dict[ProviderId, int]:
        """Active consents whose access token expires before `before`, by provider."""

    async def close(self) -> None: ...
