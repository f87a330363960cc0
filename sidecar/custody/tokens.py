"""A consent's tokens: which one to use, and replacing them before they end.

Rules:
- One refresher per consent: single flight in this process, a lease with an epoch across all. The lease is the intent on record,
  and from then on the refresh token counts as handed over.
- Nobody hands it over again unless `domain/rotation.py` says that this provider takes it twice. Where it does not, the consent
  asks for its owner, and the living access token goes on to its end. The lease of such a token is never free again.
- The new pair is stored before anybody uses it, only by the newest holder of the lease, and in one transaction with the lease's
  release.
- The old pair stays until the new one has worked.
- A refresh whose outcome is unknown is never reported as failed. What is known is written down until the store takes it.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial

from sidecar.connectors.base import Connector
from sidecar.connectors.descriptor import Descriptor, origin_of
from sidecar.custody.access import connector_for
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.persisting import persist
from sidecar.custody.provider_calls import new_assertion_id, sign_request
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ConsentId, ProviderId
from sidecar.domain.provider import NotSent, TokenGrant, TokenOutcome, TokensRefused, Unknown
from sidecar.domain.rotation import may_send, refresh_time
from sidecar.domain.secrets import SealedSecret, SecretContext, SecretKind
from sidecar.errors import Corrupt, CustodyError, Internal, StaleVersion, Unavailable
from sidecar.ports import Clock, ConsentSecrets, Hsm, OpenSecret, SecretsChange, Store, TokenEgress

__all__ = ["Access", "RefreshEnd", "RefreshObserver", "Tokens", "granted_secrets"]

# A refresh is bounded by the provider's call_seconds; the rest is for signing and for the store.
_LEASE_MARGIN_SECONDS = 20.0
_NEVER = datetime(9999, 1, 1, tzinfo=UTC)

# Pauses for every sidecar, as (shortest, longest): a growing part of how long it has been going on.
_AFTER_LOST_ANSWER_SECONDS = (1.0, 30.0)
_AFTER_NOTHING_SENT_SECONDS = (2.0, 60.0)
_AFTER_REFUSAL_SECONDS = (30.0, 300.0)

REFRESH_TOKEN_LOST = "REFRESH_TOKEN_LOST"  # noqa: S105 - the name of a reason


class RefreshEnd(StrEnum):
    """What became of one attempt to refresh."""

    GRANTED = "granted"
    ENDED = "ended"  # invalid_grant: the provider no longer knows the refresh token
    REFUSED = "refused"
    NOT_SENT = "not_sent"
    UNKNOWN = "unknown"  # and the same token may be sent again
    LOST = "lost"  # unknown, and it must not be sent again: the owner is needed
    FENCED = "fenced"  # granted, but too late: another sidecar has refreshed since


RefreshObserver = Callable[[ProviderId, RefreshEnd], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A consent as it stands now, with the sealed access token to use. `outdated`: what is kept in case this one does not work."""

    consent: Consent
    secret: OpenSecret
    outdated: tuple[tuple[SecretKind, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lease:
    """What this sidecar holds while it refreshes. `open_before`: since when an earlier attempt with the same token is unresolved;
    `open_since`: the same with this attempt."""

    epoch: int
    open_before: datetime | None
    open_since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A refresh that was handed over to the provider, and what it was made with."""

    consent: Consent
    secrets: ConsentSecrets
    outcome: TokenOutcome
    row_version: int
    asked_time: datetime


class Tokens:
    def __init__(
        self,
        *,
        cluster: str,
        instance: str,
        store: Store,
        egress: TokenEgress,
        hsm: Hsm,
        clock: Clock,
        connectors: Mapping[ProviderId, Connector],
        tasks: OwnedTasks,
        observe: RefreshObserver | None = None,
    ) -> None:
        self._cluster = cluster
        self._instance = instance
        self._store = store
        self._egress = egress
        self._hsm = hsm
        self._clock = clock
        self._connectors = connectors
        self._tasks = tasks
        self._observe = observe or (lambda _provider, _end: None)
        self._flights: dict[ConsentId, asyncio.Task[None]] = {}

    def access_context(self, consent: Consent, row_version: int) -> SecretContext:
        api = self._connectors[consent.provider].descriptor.api
        return self._context(consent, origin_of(api), row_version)

    def refresh_context(self, consent: Consent, row_version: int) -> SecretContext:
        """Also that of the PKCE verifier: both go to the token endpoint."""
        endpoint = self._connectors[consent.provider].descriptor.oauth.token_endpoint
        return self._context(consent, origin_of(endpoint), row_version)

    async def access(self, consent: Consent, *, refuse_older_than: int = 0) -> Access:
        """The access token to use now, refreshed first where half of its life is over.

        `refuse_older_than` is a row version that the provider has just refused as expired.
        Raises PreconditionFailed where the consent has ended, Unavailable where no living token is to be had now.
        """
        secrets, newest = await self._newest_access(consent.id)
        expired = self._is_refused(consent, newest, refuse_older_than)
        if expired or self._is_due(consent):
            consent = await self._refreshed(consent, newest.row_version, must=expired)
            secrets, newest = await self._newest_access(consent.id)
            if self._is_refused(consent, newest, refuse_older_than):
                raise Unavailable(
                    "PROVIDER_UNAVAILABLE", "the access token has expired and could not be renewed yet; try again"
                )
        return Access(
            consent=consent,
            secret=OpenSecret(secret=newest, context=self.access_context(consent, newest.row_version)),
            outdated=_all_but_newest(secrets),
        )

    async def _newest_access(self, consent_id: ConsentId) -> tuple[ConsentSecrets, SealedSecret]:
        secrets = await self._store.secrets(consent_id)
        newest = secrets.newest(SecretKind.ACCESS_TOKEN)
        if newest is not None:
            return secrets, newest
        current = await self._store.consent(consent_id)
        if current is not None and current.state is not ConsentState.ACTIVE:
            raise current.not_active()  # it ended between the caller's look and ours, and its secrets are destroyed
        raise Corrupt("ENVELOPE_CORRUPT", "an active consent has no access token")

    def _is_refused(self, consent: Consent, newest: SealedSecret, refuse_older_than: int) -> bool:
        return newest.row_version <= refuse_older_than or self._is_expired(consent)

    async def renew(self, consent: Consent) -> None:
        """One attempt to refresh, unless somebody is at it or must not try: for the background.

        Raises Unavailable or Corrupt where nothing was handed over to the provider.
        """
        _, newest = await self._newest_access(consent.id)
        await self._join_flight(consent, newest.row_version)

    async def renew_ended(self, consent: Consent) -> Consent:
        """A consent that has ended here, with an access token that lives, so that the provider can be told with it.

        Raises Unavailable where no living token is to be had.
        """
        await self.renew(consent)
        latest = await self._store.consent(consent.id)
        if latest is None or self._is_expired(latest):
            raise Unavailable("PROVIDER_UNAVAILABLE", "the access token has expired and could not be renewed")
        return latest

    def confirm(self, access: Access) -> None:
        """The provider has taken this access token: what was kept in case it would not is destroyed, and nobody waits for that."""
        if access.outdated:
            self._tasks.begin(self._drop_outdated(access))

    async def mark_ended(self, consent: Consent, *, reason: str) -> None:
        """The provider no longer honours the consent: say so to everybody, once. Its access token is over too."""
        if not consent.is_usable(self._clock.now()):
            return
        ended = consent.with_changes(
            state=ConsentState.NEEDS_REAUTHORISATION,
            failure_reason=reason,
            access_expire_time=self._ended_now(consent),
        )
        draft = self._draft(consent, AuditEvent.CONSENT_NEEDS_REAUTHORISATION, AuditOutcome.SUCCEEDED, reason=reason)
        try:
            await self._store.change_consent(ended, audit=[draft])
        except StaleVersion:
            return  # somebody else changed it first; whoever reads it next sees what it is now

    async def _refreshed(self, consent: Consent, seen_version: int, *, must: bool) -> Consent:
        renewable = (await self._store.secrets(consent.id)).newest(SecretKind.REFRESH_TOKEN) is not None
        if consent.state is ConsentState.NEEDS_REAUTHORISATION or not renewable:
            if must:
                await self.mark_ended(consent, reason=consent.failure_reason or "NO_REFRESH_TOKEN")
                raise replace(consent, state=ConsentState.NEEDS_REAUTHORISATION).not_active()
            return consent
        try:
            await self._join_flight(consent, seen_version)
        except Unavailable:
            if must:
                raise
            return consent  # the old access token goes on while it lives
        latest = await self._store.consent(consent.id)
        if latest is None or not latest.is_usable(self._clock.now()):
            raise (latest or consent.to(ConsentState.REVOKED)).not_active()
        return latest

    async def _join_flight(self, consent: Consent, seen_version: int) -> None:
        flight = self._flights.get(consent.id)
        if flight is None:
            flight = asyncio.ensure_future(self._tasks.run(self._refresh(consent, seen_version)))
            self._flights[consent.id] = flight
            flight.add_done_callback(lambda done: self._landed(consent.id, done))
        await asyncio.shield(flight)

    def _landed(self, consent_id: ConsentId, flight: "asyncio.Task[None]") -> None:
        self._flights.pop(consent_id, None)
        if not flight.cancelled():
            flight.exception()  # whoever waited has it; where nobody waits any more it is not "never retrieved"

    async def _refresh(self, consent: Consent, seen_version: int) -> None:
        """One refresh under the lease; leaves the new pair, or a consent that asks for its owner, or everything as it was.

        `consent` and the access token of `seen_version` are what was found to be due; where they were replaced, nothing is to do.
        """
        connector = connector_for(self._connectors, consent.provider)
        lease = await self._take_lease(consent, connector.descriptor)
        if lease is None:
            return
        try:
            asked = await self._ask_for_tokens(consent, connector, seen_version)
        except Internal:
            raise  # a defect: what it left is not known, so the lease runs out with its question open
        except CustodyError:
            await self._release_unsent(consent, lease)
            raise
        if asked is None:
            await self._release(consent, lease.epoch, open_since=lease.open_before)
        else:
            await self._settle(asked, lease, connector.descriptor)

    async def _take_lease(self, consent: Consent, descriptor: Descriptor) -> _Lease | None:
        """The lease, with which the intent is on record. None where another sidecar is at it or has just failed at it, and where
        the refresh token must not be handed over again."""
        now = self._clock.now()
        last = await self._store.refresh_lease(consent.id)
        if last is not None and last.is_held(now):
            return None
        open_before = last.unresolved_since if last is not None else None
        last_epoch = last.epoch if last is not None else 0
        if not _may_send(descriptor, open_before, now):
            await self._give_up(consent, last_epoch, open_before)
            return None
        epoch = await self._store.take_refresh_lease(
            consent.id,
            holder=self._instance,
            now=now,
            seconds=descriptor.call_seconds + _LEASE_MARGIN_SECONDS,
            after_epoch=last_epoch,
            audit=self._draft(consent, AuditEvent.TOKEN_REFRESH_INTENT, AuditOutcome.INTENDED),
        )
        if epoch is None:
            return None
        return _Lease(epoch=epoch, open_before=open_before, open_since=open_before or now)

    async def _release(
        self, consent: Consent, epoch: int, *, open_since: datetime | None, free_time: datetime | None = None
    ) -> None:
        """What is known now would be taken for lost if it were not written."""
        release = partial(
            self._store.release_refresh_lease,
            consent.id,
            epoch=epoch,
            unresolved_since=open_since,
            free_time=free_time,
        )
        await persist(self._clock, release)

    async def _release_unsent(self, consent: Consent, lease: _Lease) -> None:
        """Nothing of this attempt was handed over, so it leaves nothing open; an earlier one may have."""
        self._observe(consent.provider, RefreshEnd.NOT_SENT)
        free_time = self._after_pause(consent, _AFTER_NOTHING_SENT_SECONDS)
        await self._release(consent, lease.epoch, open_since=lease.open_before, free_time=free_time)

    async def _ask_for_tokens(self, seen: Consent, connector: Connector, seen_version: int) -> "_Asked | None":
        """What the token endpoint said; None where there is nothing to ask with or for. Raises only where nothing was sent."""
        consent = await self._store.consent(seen.id)
        secrets = await self._store.secrets(seen.id)
        access_token, refresh_token = secrets.newest(SecretKind.ACCESS_TOKEN), secrets.newest(SecretKind.REFRESH_TOKEN)
        if consent is None or access_token is None or refresh_token is None:
            return None
        if access_token.row_version > seen_version or consent.access_issue_time != seen.access_issue_time:
            return None  # another sidecar has renewed it since it was found to be due
        row_version = max(secret.row_version for secret in secrets.secrets) + 1
        asked_time = self._clock.now()  # a token's life begins when it is made, not when its answer is read
        unsigned = connector.refresh(now=asked_time, assertion_id=new_assertion_id())
        outcome = await self._egress.request_tokens(
            await sign_request(self._hsm, unsigned),
            wrapped_data_key=consent.wrapped_data_key,
            secrets=[
                OpenSecret(secret=refresh_token, context=self.refresh_context(consent, refresh_token.row_version))
            ],
            seal_access_as=self.access_context(consent, row_version),
            seal_refresh_as=self.refresh_context(consent, row_version),
            deadline_seconds=connector.descriptor.call_seconds,
        )
        return _Asked(consent=consent, secrets=secrets, outcome=outcome, row_version=row_version, asked_time=asked_time)

    async def _settle(self, asked: "_Asked", lease: _Lease, descriptor: Descriptor) -> None:
        """Writes down what came of it."""
        consent, outcome = asked.consent, asked.outcome
        match outcome:
            case TokenGrant():
                await self._save(asked, outcome, lease)
            case TokensRefused(error="invalid_grant"):
                self._observe(consent.provider, RefreshEnd.ENDED)
                await self._ask_for_owner(consent, "REFRESH_REFUSED", AuditOutcome.SUCCEEDED)
                await self._release(consent, lease.epoch, open_since=lease.open_since, free_time=_NEVER)
            case TokensRefused():
                self._observe(consent.provider, RefreshEnd.REFUSED)
                await self._record_failure(consent, AuditOutcome.FAILED)
                free_time = self._after_pause(consent, _AFTER_REFUSAL_SECONDS)
                await self._release(consent, lease.epoch, open_since=lease.open_before, free_time=free_time)
            case NotSent():
                await self._record_failure(consent, AuditOutcome.FAILED)
                await self._release_unsent(consent, lease)
            case Unknown():
                await self._after_lost_answer(consent, lease, descriptor)

    async def _after_lost_answer(self, consent: Consent, lease: _Lease, descriptor: Descriptor) -> None:
        """The token may be used up. Either the same one may be sent again soon, or the owner is needed; both is known at once."""
        await self._record_failure(consent, AuditOutcome.UNKNOWN)
        now = self._clock.now()
        pause_seconds = _part_of((now - lease.open_since) / 4, _AFTER_LOST_ANSWER_SECONDS)
        again = now + timedelta(seconds=pause_seconds)
        if not _may_send(descriptor, lease.open_since, again):
            await self._give_up(consent, lease.epoch, lease.open_since)
            return
        self._observe(consent.provider, RefreshEnd.UNKNOWN)
        await self._release(consent, lease.epoch, open_since=lease.open_since, free_time=again)

    async def _give_up(self, consent: Consent, epoch: int, open_since: datetime | None) -> None:
        """The refresh token must never be handed over again. First the consent says so, then the lease is closed for good; the
        epoch stays, so that a sidecar that has the pair after all can still write it."""
        flagged = await self._ask_for_owner(consent, REFRESH_TOKEN_LOST, AuditOutcome.UNKNOWN)
        self._observe(consent.provider, RefreshEnd.LOST if flagged else RefreshEnd.UNKNOWN)
        await self._release(consent, epoch, open_since=open_since, free_time=_NEVER)

    async def _ask_for_owner(self, consent: Consent, reason: str, outcome: AuditOutcome) -> bool:
        """Whether the consent now needs its owner; not where it ended meanwhile. What the provider has refused is over at once;
        what was lost takes nothing from the living access token."""
        while True:
            current = await persist(self._clock, partial(self._store.consent, consent.id))
            if current is None or current.state is not ConsentState.ACTIVE:
                return current is not None and current.state is ConsentState.NEEDS_REAUTHORISATION
            flagged = current.to(ConsentState.NEEDS_REAUTHORISATION, failure_reason=reason)
            if outcome is not AuditOutcome.UNKNOWN:
                flagged = replace(flagged, access_expire_time=self._ended_now(current))
            draft = self._draft(current, AuditEvent.CONSENT_NEEDS_REAUTHORISATION, outcome, reason=reason)
            try:
                await persist(self._clock, partial(self._store.change_consent, flagged, audit=[draft]))
            except StaleVersion:
                continue  # changed meanwhile, or the answer to this very change was lost
            return True

    def _ended_now(self, consent: Consent) -> datetime:
        now = self._clock.now()
        return min(now, consent.access_expire_time or now)

    async def _record_failure(self, consent: Consent, outcome: AuditOutcome) -> None:
        draft = self._draft(consent, AuditEvent.TOKEN_REFRESH_FAILED, outcome)
        await persist(self._clock, partial(self._store.record, [draft]))

    async def _save(self, asked: "_Asked", grant: TokenGrant, lease: _Lease) -> None:
        """The new pair, before anybody uses it: the provider will not give it again, so it is kept whatever else has changed in the
        row meanwhile, unless the consent's key is gone or another sidecar has handed the token over since."""
        consent = asked.consent
        change = SecretsChange(put=granted_secrets(grant, asked.row_version), delete=_all_but_newest(asked.secrets))
        while consent.wrapped_data_key:
            renewed = self._renewed(consent, grant, asked.asked_time)
            draft = self._draft(consent, AuditEvent.TOKEN_REFRESHED, AuditOutcome.SUCCEEDED)
            save = partial(self._store.change_consent, renewed, secrets=change, lease_epoch=lease.epoch, audit=[draft])
            try:
                await persist(self._clock, save)
            except StaleVersion:
                latest = await persist(self._clock, partial(self._store.consent, consent.id))
                stored = await persist(self._clock, partial(self._store.secrets, consent.id))
                if latest is None or grant.access_token in [secret.sealed for secret in stored.secrets]:
                    break  # an answer of the store was lost, and this very change is there
                held = await persist(self._clock, partial(self._store.refresh_lease, consent.id))
                if held is None or held.epoch != lease.epoch:
                    self._observe(consent.provider, RefreshEnd.FENCED)
                    return  # whoever has the lease now was allowed to repeat, and has or gets a pair at least as new
                consent = latest
            else:
                break
        self._observe(consent.provider, RefreshEnd.GRANTED)

    def _renewed(self, consent: Consent, grant: TokenGrant, asked_time: datetime) -> Consent:
        oauth = self._connectors[consent.provider].descriptor.oauth
        expires = asked_time + timedelta(seconds=grant.expires_in_seconds or oauth.access_token_seconds)
        changes = {
            "access_issue_time": asked_time,
            "access_expire_time": expires,
            "refresh_time": refresh_time(consent.id, issued=asked_time, expires=expires),
        }
        found = consent.state is ConsentState.NEEDS_REAUTHORISATION and consent.failure_reason == REFRESH_TOKEN_LOST
        if found:  # another sidecar had taken this pair for lost
            return consent.to(ConsentState.ACTIVE, failure_reason="", **changes)
        return consent.with_changes(**changes)

    async def _drop_outdated(self, access: Access) -> None:
        current = await self._store.consent(access.consent.id)
        newest = (await self._store.secrets(access.consent.id)).newest(SecretKind.ACCESS_TOKEN)
        if current is None or newest != access.secret.secret:
            return
        try:
            change = SecretsChange(delete=access.outdated)
            await self._store.change_consent(current.with_changes(), secrets=change, audit=[])
        except (StaleVersion, Unavailable):
            return  # the next call that works drops them, or else the next refresh

    def _after_pause(self, consent: Consent, bounds: tuple[float, float]) -> datetime:
        """The longer a refresh has been due, the longer the pause until the next attempt."""
        now = self._clock.now()
        overdue = now - consent.refresh_time if consent.refresh_time is not None else timedelta()
        return now + timedelta(seconds=_part_of(overdue / 8, bounds))

    def _is_expired(self, consent: Consent) -> bool:
        return consent.access_expire_time is not None and self._clock.now() >= consent.access_expire_time

    def _is_due(self, consent: Consent) -> bool:
        if consent.access_issue_time is None or consent.access_expire_time is None:
            return False
        half_life = (consent.access_expire_time - consent.access_issue_time) / 2
        return self._clock.now() >= consent.access_issue_time + half_life

    def _context(self, consent: Consent, origin: str, row_version: int) -> SecretContext:
        return SecretContext(
            cluster=self._cluster,
            owner=consent.owner,
            consent=consent.id,
            provider_origin=origin,
            row_version=row_version,
        )

    def _draft(self, consent: Consent, event: AuditEvent, outcome: AuditOutcome, *, reason: str = "") -> AuditDraft:
        return AuditDraft(
            event=event,
            outcome=outcome,
            provider=consent.provider,
            consent=consent.id,
            subject=consent.subject(),
            reason=reason,
        )


def _may_send(descriptor: Descriptor, open_since: datetime | None, now: datetime) -> bool:
    rotation = descriptor.oauth.rotation
    return may_send(
        rotation.kind,
        grace_seconds=rotation.seconds,
        unresolved_since=open_since,
        now=now,
        call_seconds=descriptor.call_seconds,
    )


def _part_of(span: timedelta, bounds: tuple[float, float]) -> float:
    shortest, longest = bounds
    return min(max(span.total_seconds(), shortest), longest)


def _all_but_newest(secrets: ConsentSecrets) -> tuple[tuple[SecretKind, int], ...]:
    """The tokens that are no longer the ones to use. Where the provider sent no refresh token the old one still is."""
    kinds = (SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN)
    kept = {(kind, newest.row_version) for kind in kinds if (newest := secrets.newest(kind)) is not None}
    return tuple(
        (secret.kind, secret.row_version) for secret in secrets.secrets if (secret.kind, secret.row_version) not in kept
    )


def granted_secrets(grant: TokenGrant, row_version: int) -> tuple[SealedSecret, ...]:
    access = SealedSecret(kind=SecretKind.ACCESS_TOKEN, row_version=row_version, sealed=grant.access_token)
    if grant.refresh_token is None:
        return (access,)
    return (access, SealedSecret(kind=SecretKind.REFRESH_TOKEN, row_version=row_version, sealed=grant.refresh_token))
