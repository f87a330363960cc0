"""A consent's tokens: which one to use, and replacing them before they end.

Rules: one refresher per consent in this process (single flight) and across processes (lease with an epoch); the intent is on
record before the call; the new pair is stored before it is used; the old pair stays until the pair after the next replaces it;
a refresh whose outcome is unknown is never reported as failed: the old access token goes on while it lives.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from sidecar.connectors.base import Connector
from sidecar.connectors.descriptor import origin_of
from sidecar.custody.access import connector_for
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.persisting import persist
from sidecar.custody.provider_calls import new_assertion_id, sign_request
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ConsentId, ProviderId
from sidecar.domain.provider import NotSent, TokenGrant, TokenOutcome, TokensRefused, Unknown
from sidecar.domain.secrets import SealedSecret, SecretContext, SecretKind
from sidecar.errors import Corrupt, CustodyError, StaleVersion, Unavailable
from sidecar.ports import Clock, ConsentSecrets, Hsm, OpenSecret, SecretsChange, Store, TokenEgress

__all__ = ["Access", "Tokens", "granted_secrets"]

# A refresh is bounded by the provider's call_seconds; the rest is for signing, for the store and for a pause after a failure.
_LEASE_MARGIN_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A consent as it stands now, with the sealed access token to use."""

    consent: Consent
    secret: OpenSecret


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
    ) -> None:
        self._cluster = cluster
        self._instance = instance
        self._store = store
        self._egress = egress
        self._hsm = hsm
        self._clock = clock
        self._connectors = connectors
        self._tasks = tasks
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
        newest = await self._newest_access(consent.id)
        expired = self._is_refused(consent, newest, refuse_older_than)
        if expired or self._is_due(consent):
            consent = await self._refreshed(consent, must=expired)
            newest = await self._newest_access(consent.id)
            if self._is_refused(consent, newest, refuse_older_than):
                raise Unavailable(
                    "PROVIDER_UNAVAILABLE", "the access token has expired and could not be renewed yet; try again"
                )
        return Access(
            consent=consent,
            secret=OpenSecret(secret=newest, context=self.access_context(consent, newest.row_version)),
        )

    async def _newest_access(self, consent_id: ConsentId) -> SealedSecret:
        newest = (await self._store.secrets(consent_id)).newest(SecretKind.ACCESS_TOKEN)
        if newest is not None:
            return newest
        current = await self._store.consent(consent_id)
        if current is not None and current.state is not ConsentState.ACTIVE:
            raise current.not_active()  # it ended between the caller's look and ours, and its secrets are destroyed
        raise Corrupt("ENVELOPE_CORRUPT", "an active consent has no access token")

    def _is_refused(self, consent: Consent, newest: SealedSecret, refuse_older_than: int) -> bool:
        return newest.row_version <= refuse_older_than or self._is_expired(consent)

    async def renew_ended(self, consent: Consent) -> Consent:
        """A consent that has ended here, with an access token that lives, so that the provider can be told with it.

        Raises Unavailable where no living token is to be had.
        """
        await self._join_flight(consent)
        latest = await self._store.consent(consent.id)
        if latest is None or self._is_expired(latest):
            raise Unavailable("PROVIDER_UNAVAILABLE", "the access token has expired and could not be renewed")
        return latest

    async def mark_ended(self, consent: Consent, *, reason: str) -> None:
        """The provider no longer honours the consent: say so to everybody, once."""
        if consent.state is not ConsentState.ACTIVE:
            return
        draft = self._draft(consent, AuditEvent.CONSENT_NEEDS_REAUTHORISATION, AuditOutcome.SUCCEEDED, reason=reason)
        try:
            await self._store.change_consent(
                consent.to(ConsentState.NEEDS_REAUTHORISATION, failure_reason=reason), audit=[draft]
            )
        except StaleVersion:
            return  # somebody else changed it first; whoever reads it next sees what it is now

    async def _refreshed(self, consent: Consent, *, must: bool) -> Consent:
        if (await self._store.secrets(consent.id)).newest(SecretKind.REFRESH_TOKEN) is None:
            if must:
                await self.mark_ended(consent, reason="NO_REFRESH_TOKEN")
                raise consent.to(ConsentState.NEEDS_REAUTHORISATION).not_active()
            return consent
        try:
            await self._join_flight(consent)
        except Unavailable:
            if must:
                raise
            return consent  # the old access token goes on while it lives
        latest = await self._store.consent(consent.id)
        if latest is None or latest.state is not ConsentState.ACTIVE:
            raise (latest or consent.to(ConsentState.REVOKED)).not_active()
        return latest

    async def _join_flight(self, consent: Consent) -> None:
        flight = self._flights.get(consent.id)
        if flight is None:
            flight = asyncio.ensure_future(self._tasks.run(self._refresh(consent)))
            self._flights[consent.id] = flight
            flight.add_done_callback(lambda done: self._landed(consent.id, done))
        await asyncio.shield(flight)

    def _landed(self, consent_id: ConsentId, flight: "asyncio.Task[None]") -> None:
        self._flights.pop(consent_id, None)
        if not flight.cancelled():
            flight.exception()  # whoever waited has it; where nobody waits any more it is not "never retrieved"

    async def _refresh(self, consent: Consent) -> None:
        """One refresh under the lease; leaves the new pair, or a consent marked as ended, or everything as it was.

        After an outcome that is unknown or was refused the lease is left to run out: nobody tries the same token again at once.
        """
        connector = connector_for(self._connectors, consent.provider)
        draft = self._draft(consent, AuditEvent.TOKEN_REFRESH_INTENT, AuditOutcome.INTENDED)
        epoch = await self._store.take_refresh_lease(
            consent.id,
            holder=self._instance,
            now=self._clock.now(),
            seconds=connector.descriptor.call_seconds + _LEASE_MARGIN_SECONDS,
            audit=draft,
        )
        if epoch is None:
            return  # another sidecar is at it, or has just failed at it
        try:
            current = await self._store.consent(consent.id)
            unchanged = current is not None and current.version == consent.version
            asked = await self._ask_for_tokens(current, connector) if current is not None and unchanged else None
        except CustodyError:
            await self._store.release_refresh_lease(consent.id, epoch=epoch)
            raise  # nothing was handed over to the provider
        if asked is None or await self._settle(asked):
            await self._store.release_refresh_lease(consent.id, epoch=epoch)

    async def _ask_for_tokens(self, consent: Consent, connector: Connector) -> "_Asked | None":
        """What the token endpoint said; None where there is nothing to ask with. Raises only where nothing was sent."""
        secrets = await self._store.secrets(consent.id)
        refresh_token = secrets.newest(SecretKind.REFRESH_TOKEN)
        if refresh_token is None:
            return None
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

    async def _settle(self, asked: "_Asked") -> bool:
        """Writes down what came of it; whether the next refresh may come at once. Where writing fails it may not: the lease
        runs out by itself."""
        consent, outcome = asked.consent, asked.outcome
        match outcome:
            case TokenGrant():
                await self._save(consent, asked.secrets, outcome, asked.row_version, asked.asked_time)
            case TokensRefused(error="invalid_grant"):
                await self.mark_ended(consent, reason="REFRESH_REFUSED")
            case _:
                failed = AuditOutcome.UNKNOWN if isinstance(outcome, Unknown) else AuditOutcome.FAILED
                await self._store.record([self._draft(consent, AuditEvent.TOKEN_REFRESH_FAILED, failed)])
                return isinstance(outcome, NotSent)
        return True

    async def _save(
        self, consent: Consent, secrets: ConsentSecrets, grant: TokenGrant, row_version: int, asked_time: datetime
    ) -> None:
        """The new pair, before anybody uses it: the provider will not give it again, so it is kept whatever else has changed in
        the row meanwhile, unless the consent's key is gone."""
        connector = connector_for(self._connectors, consent.provider)
        lifetime = timedelta(seconds=grant.expires_in_seconds or connector.descriptor.oauth.access_token_seconds)
        change = SecretsChange(put=granted_secrets(grant, row_version), delete=_outdated(secrets))
        while consent.wrapped_data_key:
            renewed = consent.with_changes(access_issue_time=asked_time, access_expire_time=asked_time + lifetime)
            draft = self._draft(consent, AuditEvent.TOKEN_REFRESHED, AuditOutcome.SUCCEEDED)
            try:
                await persist(self._clock, partial(self._store.change_consent, renewed, secrets=change, audit=[draft]))
            except StaleVersion:
                latest = await self._store.consent(consent.id)
                newest = (await self._store.secrets(consent.id)).newest(SecretKind.ACCESS_TOKEN)
                if latest is None or (newest is not None and newest.row_version >= row_version):
                    return  # an answer of the store was lost, and this very change is there
                consent = latest
            else:
                return

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


def _outdated(secrets: ConsentSecrets) -> tuple[tuple[SecretKind, int], ...]:
    """What goes when a new pair comes: all but the newest of each kind. That stays, until the new one is replaced in its turn;
    where the provider sent no refresh token the old one is the one to use."""
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
