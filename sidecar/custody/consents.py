"""Consents: asked for, authorised by their owner at the provider, used, ended.

Rules: a code is exchanged once and never repeated; a redirect with a wrong, foreign or replayed `state` leaves the consent as it
is (RFC 9700); a consent that has ended is unusable here at once, then the provider is told, then its data key is destroyed.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

from sidecar.connectors.base import Connector, Problem, ProblemKind
from sidecar.custody.access import (
    check_same_request,
    connector_for,
    consent_for,
    permitted_page,
    request_digest,
)
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.payments import NETWORK_LIFE_SECONDS
from sidecar.custody.persisting import persist
from sidecar.custody.provider_calls import (
    answer_of,
    new_assertion_id,
    new_call_id,
    refused_or,
    sign_request,
)
from sidecar.custody.tokens import Tokens, granted_secrets
from sidecar.domain.account import PsuContext
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller
from sidecar.domain.consent import TRANSITIONS, AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, ProviderId, RequestId, new_consent_id
from sidecar.domain.limits import PeriodicLimit, check_periodic_limits
from sidecar.domain.money import Money
from sidecar.domain.payment import PaymentState
from sidecar.domain.provider import Answer, ProviderRequest, SendOutcome, TokenGrant
from sidecar.domain.rotation import refresh_time
from sidecar.domain.secrets import SealedSecret, SecretKind
from sidecar.domain.text import check_iban
from sidecar.errors import (
    CustodyError,
    FieldViolation,
    Internal,
    InvalidField,
    PreconditionFailed,
    StaleVersion,
    Unavailable,
)
from sidecar.ports import (
    Claim,
    Clock,
    ConsentFilter,
    Hsm,
    ImportKey,
    OpenSecret,
    PaymentFilter,
    SecretsChange,
    Store,
    TokenEgress,
)

__all__ = ["Consents", "CreateConsent", "ImportTokens", "Redirect"]

_LONGEST_LIFE = timedelta(
    days=180
)  # Regulation (EU) 2018/389 art. 10a: strong authentication is renewed after 180 days
_TELL_FOR = timedelta(days=1)
# Longer than the longest exchange of a code: a provider's call_seconds (at most 60) and what the HSM and the store may take.
_EXCHANGE_SECONDS = 120.0
# Longer than the longest send (a descriptor's send_seconds, at most 10) and what two clocks may differ by.
_LONGEST_PERMIT_SECONDS = 10.0 + NETWORK_LIFE_SECONDS
_PERMIT_POLL_SECONDS = 0.1
_PAGE = 100
_DISPATCHED = frozenset({PaymentState.DISPATCHED, PaymentState.RECONCILING})
_ENDED = frozenset({ConsentState.REVOKED, ConsentState.EXPIRED, ConsentState.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateConsent:
    owner: OwnerId
    provider: ProviderId
    purposes: frozenset[Purpose]
    accounts: tuple[AccountReference, ...]
    expire_time: datetime
    redirect_uri: str
    request_id: RequestId
    payment_limit: Money | None = None
    periodic_limits: tuple[PeriodicLimit, ...] = ()
    psu: PsuContext | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """What the provider's redirect brought: `code`, or `error` (RFC 6749 section 4.1.2.1)."""

    state: str
    iss: str
    code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportTokens:
    """`info` is the HPKE info string that binds the ciphertext to owner, provider and request id (the contract says how)."""

    owner: OwnerId
    provider: ProviderId
    purposes: frozenset[Purpose]
    accounts: tuple[AccountReference, ...]
    expire_time: datetime
    access_expire_time: datetime
    provider_consent_id: str
    import_key_id: str
    sealed_tokens: bytes
    info: bytes
    request_id: RequestId
    payment_limit: Money | None = None
    periodic_limits: tuple[PeriodicLimit, ...] = ()


class Consents:
    def __init__(
        self,
        *,
        store: Store,
        egress: TokenEgress,
        hsm: Hsm,
        clock: Clock,
        connectors: Mapping[ProviderId, Connector],
        tokens: Tokens,
        tasks: OwnedTasks,
    ) -> None:
        self._store = store
        self._egress = egress
        self._hsm = hsm
        self._clock = clock
        self._connectors = connectors
        self._tokens = tokens
        self._tasks = tasks
        self._exchanging: set[ConsentId] = set()
        self._seen_completing: dict[ConsentId, int] = {}  # boot time in nanoseconds

    # -- create

    async def create(self, caller: Caller, request: CreateConsent) -> Consent:
        """A consent that awaits its owner's authorisation; a repeat with the same request id gives the same one."""
        caller.check_provider(request.provider)  # first: an unknown provider must look like one that is not allowed
        connector = connector_for(self._connectors, request.provider)
        self._check_terms(caller, connector, request.owner, request.purposes)
        self._check_form(request, connector)
        consent = self._new_consent(caller, request, redirect_uri=request.redirect_uri)
        claim = _claim(caller, request.request_id, "CreateConsent", consent.id, _create_digest(request))
        draft = _draft(consent, AuditEvent.CONSENT_CREATED, AuditOutcome.INTENDED)
        earlier = await self._store.claim_consent(consent, claim, draft)
        if earlier is not None:
            check_same_request(earlier, claim)
            consent = await self._existing(ConsentId(earlier.resource))
        if consent.state is not ConsentState.CREATED:
            return consent
        return await self._tasks.run(self._start_authorisation(consent, connector, request.psu))

    async def _start_authorisation(self, consent: Consent, connector: Connector, psu: PsuContext | None) -> Consent:
        """Registers the consent at the provider and pushes the authorisation request. May be repeated until it has worked."""
        try:
            consent = await self._register(consent, connector, psu)
            made = await self._egress.new_secrets(self._tokens.refresh_context(consent, 1))
            state = secrets.token_urlsafe(32)
            unsigned = connector.push_authorisation(
                consent,
                state=state,
                code_challenge=made.code_challenge,
                now=self._clock.now(),
                assertion_id=new_assertion_id(),
            )
            request = await sign_request(self._hsm, unsigned)
            outcome = await self._egress.call_once(request, deadline_seconds=connector.descriptor.call_seconds)
            pushed = connector.read_pushed_authorisation(answer_of(outcome))
            if isinstance(pushed, Problem):
                raise refused_or(pushed)
        except PreconditionFailed as refusal:
            await self._fail(consent, refusal.reason)
            raise
        waiting = consent.to(
            ConsentState.AWAITING_AUTHORISATION,
            state_digest=hashlib.sha256(state.encode()).digest(),
            authorisation_uri=pushed.value,
            wrapped_data_key=made.wrapped_data_key,
        )
        verifier = SealedSecret(kind=SecretKind.PKCE_VERIFIER, row_version=1, sealed=made.pkce_verifier)
        draft = _draft(waiting, AuditEvent.CONSENT_AUTHORISATION_STARTED, AuditOutcome.SUCCEEDED)
        try:
            await self._store.change_consent(waiting, secrets=SecretsChange(put=(verifier,)), audit=[draft])
        except StaleVersion:
            return await self._existing(consent.id)  # a repeat of this call was faster: its authorisation is the one
        return waiting

    async def _register(self, consent: Consent, connector: Connector, psu: PsuContext | None) -> Consent:
        call_id = new_call_id()
        unsigned = connector.register_consent(consent, psu=psu, call_id=call_id)
        if unsigned is None:
            return consent
        request = await sign_request(self._hsm, unsigned)
        outcome = await self._egress.call_once(request, deadline_seconds=connector.descriptor.call_seconds)
        registered = connector.read_registration(answer_of(outcome), call_id=call_id)
        if isinstance(registered, Problem):
            raise refused_or(registered)
        return replace(consent, provider_consent_id=registered.value)

    # -- complete

    async def complete(
        self, caller: Caller, consent_id: ConsentId, owner: OwnerId, redirect: Redirect, request_id: RequestId
    ) -> Consent:
        """Exchanges the redirect's code, once. The consent is active when this returns it."""
        consent = await consent_for(self._store, caller, consent_id, owner)
        digest = request_digest(consent.id, redirect.state, redirect.iss, redirect.code, redirect.error)
        claim = _claim(caller, request_id, "CompleteConsent", consent.id, digest)
        earlier = await self._store.claim(caller.workload, request_id)
        if earlier is not None:
            check_same_request(earlier, claim)
            return self._completed(consent)
        connector = connector_for(self._connectors, consent.provider)
        self._check_redirect(consent, connector, redirect)
        if redirect.error:
            await self._deny(consent, claim)
            raise PreconditionFailed("AUTHORISATION_DENIED", "the owner or the provider did not authorise the consent")
        return await self._tasks.run(self._exchange(consent, connector, redirect.code, claim))

    def _check_redirect(self, consent: Consent, connector: Connector, redirect: Redirect) -> None:
        """RFC 9700 section 2.1: state first, then the issuer (RFC 9207); nothing changes when either is wrong."""
        digest = hashlib.sha256(redirect.state.encode()).digest()
        if not consent.state_digest or not hmac.compare_digest(digest, consent.state_digest):
            raise PreconditionFailed("STATE_MISMATCH", "the redirect does not belong to this consent's authorisation")
        if redirect.iss != connector.descriptor.oauth.issuer:
            raise PreconditionFailed("ISSUER_MISMATCH", "the redirect does not come from this consent's provider")
        if consent.state is not ConsentState.AWAITING_AUTHORISATION:
            raise consent.not_active()
        if self._clock.now() >= consent.expire_time:
            raise PreconditionFailed("CONSENT_EXPIRED", "the consent has expired; ask the owner for a new one")

    async def _exchange(self, consent: Consent, connector: Connector, code: str, claim: Claim) -> Consent:
        intent = consent.to(ConsentState.COMPLETING, authorisation_uri="")
        draft = _draft(intent, AuditEvent.CONSENT_CODE_EXCHANGE, AuditOutcome.INTENDED)
        try:
            earlier = await self._store.change_consent(intent, claim=claim, audit=[draft])
        except StaleVersion as stale:
            raise (await self._existing(consent.id)).not_active() from stale
        if earlier is not None:
            check_same_request(earlier, claim)
            return self._completed(await self._existing(consent.id))
        self._exchanging.add(consent.id)
        try:
            asked_time = self._clock.now()
            grant = await self._request_tokens(intent, connector, code)
            active = await self._activate(intent, connector, grant, asked_time)
        finally:
            self._exchanging.discard(consent.id)
        return await self._with_accounts(active, connector)

    async def _request_tokens(self, consent: Consent, connector: Connector, code: str) -> TokenGrant:
        """The tokens for the code. Whatever else comes back ends the consent: a code is never sent twice."""
        try:
            verifier = (await self._store.secrets(consent.id)).newest(SecretKind.PKCE_VERIFIER)
            if verifier is None:
                raise Internal
            context = self._tokens.refresh_context(consent, verifier.row_version)
            unsigned = connector.exchange_code(
                consent, code=code, now=self._clock.now(), assertion_id=new_assertion_id()
            )
            outcome = await self._egress.request_tokens(
                await sign_request(self._hsm, unsigned),
                wrapped_data_key=consent.wrapped_data_key,
                secrets=[OpenSecret(secret=verifier, context=context)],
                seal_access_as=self._tokens.access_context(consent, 1),
                seal_refresh_as=self._tokens.refresh_context(consent, 1),
                deadline_seconds=connector.descriptor.call_seconds,
            )
        except CustodyError:
            await self._fail(consent, "AUTHORISATION_FAILED")
            raise
        if not isinstance(outcome, TokenGrant):
            await self._fail(consent, "AUTHORISATION_FAILED")
            raise PreconditionFailed(
                "AUTHORISATION_FAILED", "the provider gave no tokens for the code; ask the owner to start again"
            )
        return outcome

    async def _activate(
        self, consent: Consent, connector: Connector, grant: TokenGrant, asked_time: datetime
    ) -> Consent:
        lifetime = grant.expires_in_seconds or connector.descriptor.oauth.access_token_seconds
        expires = asked_time + timedelta(seconds=lifetime)
        active = consent.to(
            ConsentState.ACTIVE,
            activate_time=self._clock.now(),
            access_issue_time=asked_time,
            access_expire_time=expires,
            refresh_time=_refresh_time(consent, grant.refresh_token, asked_time, expires),
            state_digest=b"",
        )
        change = SecretsChange(put=granted_secrets(grant, 1), delete=((SecretKind.PKCE_VERIFIER, 1),))
        draft = _draft(active, AuditEvent.CONSENT_ACTIVATED, AuditOutcome.SUCCEEDED)
        try:
            await persist(self._clock, lambda: self._store.change_consent(active, secrets=change, audit=[draft]))
        except StaleVersion as stale:
            current = await self._existing(consent.id)
            if current != active:  # revoked or expired while the provider answered: the tokens are not kept
                raise current.not_active() from stale
        return active

    async def _with_accounts(self, consent: Consent, connector: Connector) -> Consent:
        """The consent with the accounts that the owner chose at the provider. Without an answer it stays as it was asked for."""
        call_id = new_call_id()
        unsigned = connector.consent_details(consent, call_id=call_id)
        if unsigned is None or consent.accounts:
            return consent
        try:
            outcome = await self._call_with_token(consent, connector, await sign_request(self._hsm, unsigned))
        except Unavailable:
            return consent
        if not isinstance(outcome, Answer):
            return consent
        details = connector.read_consent_details(outcome, call_id=call_id)
        if isinstance(details, Problem) or not details.value.accounts:
            return consent
        named = consent.with_changes(accounts=details.value.accounts)
        draft = _draft(named, AuditEvent.TOKEN_USE, AuditOutcome.SUCCEEDED)
        try:
            await self._store.change_consent(named, audit=[draft])
        except StaleVersion:
            return await self._existing(consent.id)
        return named

    async def _deny(self, consent: Consent, claim: Claim) -> None:
        failed = consent.to(
            ConsentState.FAILED, failure_reason="AUTHORISATION_DENIED", authorisation_uri="", state_digest=b""
        )
        draft = _draft(failed, AuditEvent.CONSENT_FAILED, AuditOutcome.REFUSED, reason="AUTHORISATION_DENIED")
        try:
            await self._store.change_consent(failed, claim=claim, audit=[draft])
        except StaleVersion as stale:
            raise (await self._existing(consent.id)).not_active() from stale

    def _completed(self, consent: Consent) -> Consent:
        """What a repeat of CompleteConsent gets: the first call's result, as it stands now."""
        if consent.state is ConsentState.FAILED:
            raise PreconditionFailed(consent.failure_reason, "the authorisation of this consent has failed")
        return consent

    # -- import

    async def import_key(self, caller: Caller) -> ImportKey:
        caller.check_import()
        return await self._egress.import_key()

    async def import_tokens(self, caller: Caller, request: ImportTokens) -> Consent:
        """A consent whose tokens the platform holds elsewhere; they come as HPKE ciphertext that only egress can open."""
        caller.check_import()
        caller.check_provider(request.provider)  # first: an unknown provider must look like one that is not allowed
        connector = connector_for(self._connectors, request.provider)
        self._check_terms(caller, connector, request.owner, request.purposes)
        self._check_life(request.expire_time)
        consent = self._new_consent(caller, request, redirect_uri="")
        claim = _claim(caller, request.request_id, "ImportConsent", consent.id, _import_digest(request))
        draft = _draft(consent, AuditEvent.CONSENT_CREATED, AuditOutcome.INTENDED)
        earlier = await self._store.claim_consent(consent, claim, draft)
        if earlier is not None:
            check_same_request(earlier, claim)
            consent = await self._existing(ConsentId(earlier.resource))
        if consent.state is not ConsentState.CREATED:
            return self._completed(consent)
        return await self._tasks.run(self._import(consent, request))

    async def _import(self, consent: Consent, request: ImportTokens) -> Consent:
        """Activates the consent with the tokens; a ciphertext that is refused would be refused again, so the consent has failed."""
        try:
            imported = await self._egress.import_tokens(
                key_id=request.import_key_id,
                sealed_tokens=request.sealed_tokens,
                info=request.info,
                seal_access_as=self._tokens.access_context(consent, 1),
                seal_refresh_as=self._tokens.refresh_context(consent, 1),
            )
        except PreconditionFailed as refusal:
            await self._fail(consent, refusal.reason)
            raise
        except InvalidField as refusal:
            await self._fail(consent, "IMPORT_REFUSED")
            raise _import_refused(refusal) from refusal
        now = self._clock.now()
        active = consent.to(
            ConsentState.ACTIVE,
            provider_consent_id=request.provider_consent_id,
            wrapped_data_key=imported.wrapped_data_key,
            activate_time=now,
            access_issue_time=now,
            access_expire_time=request.access_expire_time,
            refresh_time=_refresh_time(consent, imported.refresh_token, now, request.access_expire_time),
        )
        grant = TokenGrant(
            access_token=imported.access_token,
            refresh_token=imported.refresh_token,
            expires_in_seconds=None,
            scope=None,
        )
        draft = _draft(active, AuditEvent.CONSENT_IMPORTED, AuditOutcome.SUCCEEDED)
        try:
            await self._store.change_consent(
                active, secrets=SecretsChange(put=granted_secrets(grant, 1)), audit=[draft]
            )
        except StaleVersion:
            return await self._existing(consent.id)
        return active

    # -- read

    async def get(self, caller: Caller, consent_id: ConsentId, owner: OwnerId | None) -> Consent:
        return await consent_for(self._store, caller, consent_id, owner)

    async def list(self, caller: Caller, where: ConsentFilter, *, after: str, limit: int) -> Sequence[Consent]:
        """A page of the caller's own consents of one owner; administrators may leave both open."""
        if not caller.is_administrator:
            if where.owner is None:
                raise InvalidField(FieldViolation(field="owner", rule="required", description="must name the owner"))
            caller.check_owner(where.owner)
            where = replace(where, caller=caller.workload)
        return await permitted_page(partial(self._store.consents, where), caller, after=after, limit=limit)

    # -- end

    async def revoke(
        self, caller: Caller, consent_id: ConsentId, owner: OwnerId | None, request_id: RequestId
    ) -> Consent:
        """Unusable here at once; then the provider is told and the data key destroyed. A repeat gives the same answer.

        Answered only when no payment can leave any more on a permit that was given before.
        """
        consent = await consent_for(self._store, caller, consent_id, owner)
        claim = _claim(caller, request_id, "RevokeConsent", consent.id, request_digest(consent.id))
        earlier = await self._store.claim(caller.workload, request_id)
        if earlier is not None:
            check_same_request(earlier, claim)
        if consent.state is not ConsentState.REVOKED:
            consent = await self._mark_revoked(consent, claim)
        ended = await self._tasks.run(self._finish(consent))
        await self._until_no_permit_is_left(consent.id)
        return ended

    async def _until_no_permit_is_left(self, consent_id: ConsentId) -> None:
        """A permit is sent on before its deadline or never. No new one is given: the store refuses that since the revocation."""
        began_ns = self._clock.boot_time_ns()
        while (self._clock.boot_time_ns() - began_ns) / 1e9 < _LONGEST_PERMIT_SECONDS:
            if not await self._has_permit(consent_id):
                return
            await self._clock.sleep(_PERMIT_POLL_SECONDS)

    async def _has_permit(self, consent_id: ConsentId) -> bool:
        """Whether a payment without an outcome may still be sent, also by a sidecar whose clock is a little behind this one."""
        over = self._clock.now() - timedelta(seconds=NETWORK_LIFE_SECONDS)
        where, after = PaymentFilter(consent=consent_id, states=_DISPATCHED), ""
        while page := await self._store.payments(where, after=after, limit=_PAGE):
            if any(payment.send_deadline_time and payment.send_deadline_time > over for payment in page):
                return True
            after = page[-1].id
        return False

    async def _mark_revoked(self, consent: Consent, claim: Claim) -> Consent:
        for _ in range(3):  # another change of the same row may be faster; revoking wins in the end
            revoked = consent.to(
                ConsentState.REVOKED, revoke_time=self._clock.now(), authorisation_uri="", state_digest=b""
            )
            draft = replace(_draft(revoked, AuditEvent.CONSENT_REVOKED, AuditOutcome.SUCCEEDED), caller=claim.caller)
            try:
                earlier = await self._store.change_consent(revoked, claim=claim, audit=[draft])
            except StaleVersion:
                consent = await self._existing(consent.id)
                if consent.state is ConsentState.REVOKED:
                    return consent
                continue
            if earlier is not None:
                check_same_request(earlier, claim)
                return await self._existing(consent.id)
            return revoked
        raise Internal

    async def expire_due(self, *, limit: int = 100) -> int:
        """Ends the consents whose time has come; returns how many there were."""
        due = await self._store.expired_consents(self._clock.now(), limit=limit)
        await _all_of([self._expire(consent) for consent in due])
        return len(due)

    async def _expire(self, consent: Consent) -> None:
        expired = consent.to(ConsentState.EXPIRED, authorisation_uri="", state_digest=b"")
        draft = _draft(expired, AuditEvent.CONSENT_EXPIRED, AuditOutcome.SUCCEEDED)
        try:
            await self._store.change_consent(expired, audit=[draft])
        except StaleVersion:
            return  # changed meanwhile; the next round looks again
        await self._tasks.run(self._finish(expired))

    async def finish_ended(self, *, limit: int = 100) -> int:
        """Tells providers of consents that ended while they could not be told, and destroys what is left of them.

        A provider that cannot be told within a day is told no more: the key goes without it. `limit` bounds how many are told at
        the same time; all have their turn, so that those of a provider that is away keep no others waiting.
        """
        await self._fail_lost_exchanges(limit=limit)
        where, count, after = ConsentFilter(states=_ENDED, holds_key=True), 0, ""
        while ended := await self._store.consents(where, after=after, limit=limit):
            await _all_of([self._tasks.run(self._finish_again(consent)) for consent in ended])
            count, after = count + len(ended), ended[-1].id
        return count

    async def _finish_again(self, consent: Consent) -> None:
        since = consent.revoke_time or min(consent.expire_time, self._clock.now())
        await self._finish(consent, keep_if_untold=self._clock.now() - since < _TELL_FOR)

    async def _fail_lost_exchanges(self, *, limit: int) -> None:
        """Consents whose exchange of the code has no end: the sidecar that ran it is gone, and the code is not sent again.

        Every exchange ends in bounded time, so one that is seen for longer than that, from here, is nobody's.
        """
        where = ConsentFilter(states=frozenset({ConsentState.COMPLETING}))
        now_ns, found, after = self._clock.boot_time_ns(), dict[ConsentId, int](), ""
        while completing := await self._store.consents(where, after=after, limit=limit):
            for consent in completing:
                found[consent.id] = self._seen_completing.get(consent.id, now_ns)
                if consent.id not in self._exchanging and now_ns - found[consent.id] > _EXCHANGE_SECONDS * 1e9:
                    await self._fail(consent, "AUTHORISATION_FAILED")
            after = completing[-1].id
        self._seen_completing = found

    async def _finish(self, consent: Consent, *, keep_if_untold: bool = True) -> Consent:
        """Tells the provider, then destroys the data key and all sealed secrets; tombstone and log entries stay."""
        if not consent.wrapped_data_key:
            return consent
        consent = await self._with_living_token(consent)
        told = await self._tell_provider(consent)
        if not told and keep_if_untold:
            return consent
        draft = _draft(
            consent, AuditEvent.CONSENT_KEY_DESTROYED, AuditOutcome.SUCCEEDED if told else AuditOutcome.UNKNOWN
        )
        destroyed = consent.with_changes(wrapped_data_key=b"", subject_key=b"")
        try:
            await self._store.change_consent(destroyed, secrets=SecretsChange(delete_all=True), audit=[draft])
        except StaleVersion:
            return await self._existing(consent.id)
        with suppress(Unavailable):  # an egress that is gone has forgotten everything
            await self._egress.forget(consent.wrapped_data_key)
        return destroyed

    async def _with_living_token(self, consent: Consent) -> Consent:
        """Most consents have an access token that has run out when they end, and a provider ends its own consent resource only
        for one that lives. Where none is to be had, the provider is told with the refresh token alone."""
        connector = self._connectors.get(consent.provider)
        expired = consent.access_expire_time is not None and self._clock.now() >= consent.access_expire_time
        if not expired or connector is None or connector.end_consent(consent, call_id=new_call_id()) is None:
            return consent
        try:
            return await self._tokens.renew_ended(consent)
        except CustodyError:
            return await self._existing(consent.id)

    async def _tell_provider(self, consent: Consent) -> bool:
        """Whether the provider has ended the consent, or has nothing to end."""
        connector = self._connectors.get(consent.provider)
        if connector is None or consent.activate_time is None:
            return True
        try:
            problem = await self._end_at_provider(consent, connector)
            if problem is not None and problem.kind not in (ProblemKind.TOKEN_EXPIRED, ProblemKind.REFUSED):
                return False
            return await self._revoke_token(consent, connector)
        except CustodyError:
            return False

    async def _end_at_provider(self, consent: Consent, connector: Connector) -> Problem | None:
        """None when the provider has ended its consent resource, or has none."""
        unsigned = connector.end_consent(consent, call_id=new_call_id())
        if unsigned is None:
            return None
        request = await sign_request(self._hsm, unsigned)
        outcome = await self._call_with_token(consent, connector, request)
        return connector.read_end(answer_of(outcome))

    async def _revoke_token(self, consent: Consent, connector: Connector) -> bool:
        """RFC 7009: the provider answers 200 also for a token that it no longer knows."""
        unsigned = connector.revoke_token(now=self._clock.now(), assertion_id=new_assertion_id())
        newest = (await self._store.secrets(consent.id)).newest(SecretKind.REFRESH_TOKEN)
        if unsigned is None or newest is None:
            return True
        context = self._tokens.refresh_context(consent, newest.row_version)
        request = await sign_request(self._hsm, unsigned)
        await self._store.record([_draft(consent, AuditEvent.TOKEN_USE, AuditOutcome.INTENDED)])
        outcome = await self._egress.call_once(
            request,
            wrapped_data_key=consent.wrapped_data_key,
            secrets=[OpenSecret(secret=newest, context=context)],
            deadline_seconds=connector.descriptor.call_seconds,
        )
        status = answer_of(outcome).status
        return 200 <= status < 300 or status == 400  # 400: it does not know such a token, or revokes none of this kind

    async def _call_with_token(self, consent: Consent, connector: Connector, request: ProviderRequest) -> SendOutcome:
        """One call with the newest access token, as it is: no refresh for a consent that is being completed or ended."""
        newest = (await self._store.secrets(consent.id)).newest(SecretKind.ACCESS_TOKEN)
        if newest is None:
            raise Internal
        await self._store.record([_draft(consent, AuditEvent.TOKEN_USE, AuditOutcome.INTENDED)])
        context = self._tokens.access_context(consent, newest.row_version)
        return await self._egress.call_once(
            request,
            wrapped_data_key=consent.wrapped_data_key,
            secrets=[OpenSecret(secret=newest, context=context)],
            deadline_seconds=connector.descriptor.call_seconds,
        )

    # -- parts

    def _check_terms(
        self,
        caller: Caller,
        connector: Connector,
        owner: OwnerId,
        purposes: frozenset[Purpose],
    ) -> None:
        caller.check_purposes(purposes)
        caller.check_owner(owner)
        if not purposes <= set(connector.descriptor.purposes):
            raise _violation("purposes", "provider", "must be purposes that the provider offers")

    def _check_form(self, request: CreateConsent, connector: Connector) -> None:
        self._check_life(request.expire_time)
        if request.redirect_uri not in connector.descriptor.oauth.redirect_uris:
            raise _violation("redirect_uri", "registered", "must be a redirect URI that is registered for the provider")

    def _check_life(self, expire_time: datetime) -> None:
        now = self._clock.now()
        if not now < expire_time <= now + _LONGEST_LIFE:
            raise _violation("expire_time", "range", "must be in the future and at most 180 days ahead")

    def _new_consent(self, caller: Caller, request: CreateConsent | ImportTokens, *, redirect_uri: str) -> Consent:
        for index, account in enumerate(request.accounts):
            check_iban(account.iban, field=f"accounts[{index}].iban")
        check_periodic_limits(request.periodic_limits, request.payment_limit)
        return Consent(
            id=new_consent_id(self._clock.now()),
            caller=caller.workload,
            owner=request.owner,
            provider=request.provider,
            purposes=request.purposes,
            accounts=request.accounts,
            state=ConsentState.CREATED,
            subject_key=secrets.token_bytes(16),
            redirect_uri=redirect_uri,
            create_time=self._clock.now(),
            expire_time=request.expire_time,
            payment_limit=request.payment_limit,
            periodic_limits=request.periodic_limits,
        )

    async def _existing(self, consent_id: ConsentId) -> Consent:
        consent = await self._store.consent(consent_id)
        if consent is None:
            raise Internal
        return consent

    async def _fail(self, consent: Consent, reason: str) -> None:
        current = await self._existing(consent.id)
        if ConsentState.FAILED not in TRANSITIONS[current.state]:
            return
        failed = current.to(ConsentState.FAILED, failure_reason=reason, authorisation_uri="", state_digest=b"")
        draft = _draft(failed, AuditEvent.CONSENT_FAILED, AuditOutcome.FAILED, reason=reason)
        try:
            await self._store.change_consent(failed, audit=[draft])
        except StaleVersion:
            return  # it was revoked or has expired meanwhile: ended either way


def _refresh_time(
    consent: Consent, refresh_token: bytes | None, issued: datetime, expires: datetime
) -> datetime | None:
    return refresh_time(consent.id, issued=issued, expires=expires) if refresh_token is not None else None


def _claim(caller: Caller, request_id: RequestId, method: str, resource: str, digest: bytes) -> Claim:
    return Claim(caller=caller.workload, request_id=request_id, method=method, digest=digest, resource=resource)


def _create_digest(request: CreateConsent) -> bytes:
    return request_digest(
        request.owner,
        request.provider,
        ",".join(sorted(request.purposes)),
        *(f"{account.iban}/{account.currency_code}" for account in request.accounts),
        request.expire_time.isoformat(),
        request.redirect_uri,
        _limit_text(request.payment_limit),
        *_periodic_texts(request.periodic_limits),
    )


def _import_digest(request: ImportTokens) -> bytes:
    return request_digest(
        request.owner,
        request.provider,
        ",".join(sorted(request.purposes)),
        *(f"{account.iban}/{account.currency_code}" for account in request.accounts),
        request.expire_time.isoformat(),
        request.access_expire_time.isoformat(),
        request.provider_consent_id,
        request.import_key_id,
        request.sealed_tokens,
        _limit_text(request.payment_limit),
        *_periodic_texts(request.periodic_limits),
    )


def _limit_text(limit: Money | None) -> str:
    return f"{limit.currency_code} {limit.minor_units}" if limit else ""


def _periodic_texts(limits: Sequence[PeriodicLimit]) -> list[str]:
    """Nothing where there is none: a request without them has the digest that it had before there were any."""
    return [f"{each.period_type} {each.alignment} {_limit_text(each.amount)}" for each in limits]


def _import_refused(refusal: InvalidField) -> InvalidField:
    """The same violations under the reason that the contract has for them."""
    error = InvalidField(*refusal.violations)
    error.reason = "IMPORT_REFUSED"
    return error


async def _all_of(work: Sequence[Coroutine[object, object, object]]) -> None:
    """Does all of it at the same time; raises the first error after everything has ended."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _draft(consent: Consent, event: AuditEvent, outcome: AuditOutcome, *, reason: str = "") -> AuditDraft:
    return AuditDraft(
        event=event,
        outcome=outcome,
        caller=consent.caller,
        provider=consent.provider,
        consent=consent.id,
        subject=consent.subject(),
        reason=reason,
    )


def _violation(field: str, rule: str, description: str) -> InvalidField:
    return InvalidField(FieldViolation(field=field, rule=rule, description=description))
