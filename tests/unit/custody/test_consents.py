"""Consents: asked for, authorised, used, ended; a code is exchanged once, and an ended consent is unusable at once."""

import asyncio
import json
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from sidecar.audit.entry import AuditEntry
from sidecar.custody.consents import ImportTokens
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, ProviderId, WorkloadId
from sidecar.domain.money import Money
from sidecar.domain.provider import NotSent, Unknown
from sidecar.domain.secrets import SecretKind
from sidecar.errors import (
    Conflict,
    Corrupt,
    CustodyError,
    InvalidField,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from sidecar.ports import ConsentFilter
from tests.fakes.bank import IBAN, answer, error, lost
from tests.unit.custody.support import (
    ADMINISTRATOR,
    OWNER,
    PROVIDER,
    World,
    caller,
    create_request,
    draft,
    payment_request,
    redirect,
    request_id,
)

C = ConsentState
OTHER = WorkloadId("workload:other")
DAY = 86_400
STORE_AWAY = Unavailable("STORE_UNAVAILABLE", "away")


async def created(world: World, **changes: Any) -> tuple[Consent, str]:
    """A consent that awaits its owner, and the `state` that the redirect brings back."""
    consent = await world.core.consents.create(caller(), create_request(world, **changes))
    return consent, pushed_state(world)


def pushed_state(world: World) -> str:
    (pushed,) = [asked for asked in world.bank.requests if world.bank.kind(asked) == "par"][-1:]
    return parse_qs(pushed.body.decode())["state"][0]


async def completed(world: World, **changes: Any) -> Consent:
    consent, state = await created(world, **changes)
    code = world.bank.authorise()
    return await world.core.consents.complete(caller(), consent.id, OWNER, redirect(state, code), request_id())


# --- create


async def test_create_answers_with_where_the_owner_goes() -> None:
    """Registered at the bank, pushed (RFC 9126), awaiting; what is stored of `state` is its digest, of the verifier its seal."""
    world = World()

    consent, state = await created(world)

    assert consent.state is C.AWAITING_AUTHORISATION
    assert consent.authorisation_uri.startswith("https://issuer.bank.example/authorize?client_id=PSDDE-BAFIN-123456&")
    assert consent.provider_consent_id == "bank-consent-1"
    assert consent == await world.stored(consent)
    assert state.encode() not in repr(world.store._state).encode()
    assert [secret.kind for secret in (await world.store.secrets(consent.id)).secrets] == [SecretKind.PKCE_VERIFIER]
    assert world.events() == [AuditEvent.CONSENT_CREATED, AuditEvent.CONSENT_AUTHORISATION_STARTED]


async def test_create_repeated_is_the_same_consent_and_asks_the_bank_once() -> None:
    """Idempotent for ever."""
    world = World()
    request = create_request(world)

    first = await world.core.consents.create(caller(), request)
    again = await world.core.consents.create(caller(), request)

    assert first == again
    assert (world.bank.count("register"), world.bank.count("par")) == (1, 1)


async def test_create_at_the_same_moment_is_one_consent() -> None:
    """Ten calls with one request id: all name one consent with one authorisation."""
    world = World()
    request = create_request(world)

    answers = await asyncio.gather(*(world.core.consents.create(caller(), request) for _ in range(10)))

    assert len({one.id for one in answers}) == 1
    stored = await world.stored(answers[0])
    assert {one.authorisation_uri for one in answers} == {stored.authorisation_uri}


@pytest.mark.parametrize(
    "changes",
    [
        {"owner": OwnerId("owner-2")},
        {"purposes": frozenset({Purpose.PAYMENTS})},
        {"accounts": ()},
        {"payment_limit": Money(currency_code="EUR", minor_units=1)},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_create_with_a_used_request_id_and_another_content_is_refused(changes: dict[str, Any]) -> None:
    """Each part alone."""
    world = World()
    request = create_request(world)
    await world.core.consents.create(caller(), request)

    with pytest.raises(Conflict):
        await world.core.consents.create(caller(), replace(request, **changes))


async def test_a_request_id_serves_one_method() -> None:
    """What was used for a consent is not free for a payment."""
    world = World()
    request = create_request(world)
    await world.core.consents.create(caller(), request)
    consent = await world.consent()

    with pytest.raises(Conflict):
        await world.core.payments.initiate(caller(), payment_request(consent, request_id=request.request_id))


@pytest.mark.parametrize(
    ("policy", "changes", "reason"),
    [
        ({"providers": frozenset()}, {}, "POLICY_REFUSED"),
        ({}, {"provider": ProviderId("unknown-bank")}, "POLICY_REFUSED"),
        ({"providers": frozenset({ProviderId("gone")})}, {"provider": ProviderId("gone")}, "PROVIDER_NOT_FOUND"),
        ({"purposes": frozenset()}, {}, "POLICY_REFUSED"),
        ({"owners": frozenset({OwnerId("owner-2")})}, {}, "OWNER_MISMATCH"),
        ({}, {"redirect_uri": "https://app.example/callback/"}, "FIELD_INVALID"),
        ({}, {"redirect_uri": "https://evil.example/callback"}, "FIELD_INVALID"),
        ({}, {"accounts": (AccountReference(iban="DE00"),)}, "FIELD_INVALID"),
    ],
)
async def test_what_may_not_be_asked_for_is_refused_before_anything_is_written(
    policy: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    """Policy, provider, owner, registered redirect URI (character for character), accounts."""
    world = World()

    with pytest.raises(CustodyError) as refused:
        await world.core.consents.create(caller(**policy), create_request(world, **changes))

    assert refused.value.reason == reason
    assert not world.events()
    assert not world.bank.requests


@pytest.mark.parametrize("seconds", [0, -1, 180 * DAY + 1])
async def test_a_consent_lives_at_most_180_days(seconds: int) -> None:
    """Not now, not before now, not longer than strong authentication lasts."""
    world = World()

    with pytest.raises(InvalidField) as refused:
        await created(world, expire_time=world.clock.now() + timedelta(seconds=seconds))

    assert refused.value.violations[0].field == "expire_time"


@pytest.mark.parametrize("kind", ["register", "par"])
@pytest.mark.parametrize(
    ("trouble", "reason", "state"),
    [
        (Unknown(code="ANSWER_TIMEOUT"), "PROVIDER_UNAVAILABLE", C.CREATED),
        (NotSent(code="CONNECT_FAILED"), "PROVIDER_UNAVAILABLE", C.CREATED),
        (answer(500, {}), "PROVIDER_UNAVAILABLE", C.CREATED),
        (answer(201, {}), "PROVIDER_ANSWER_INVALID", C.CREATED),
    ],
)
async def test_what_may_pass_leaves_a_consent_that_a_repeat_completes(
    kind: str, trouble: object, reason: str, state: ConsentState
) -> None:
    """The same request id goes on where it stopped."""
    world = World()
    request = create_request(world)
    world.bank.script[kind] = [trouble]  # type: ignore[list-item]

    with pytest.raises(Unavailable) as away:
        await world.core.consents.create(caller(), request)
    (stored,) = world.store._state.consents.values()

    assert (away.value.reason, stored.state) == (reason, state)
    assert (await world.core.consents.create(caller(), request)).state is C.AWAITING_AUTHORISATION


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("register", error(400, "FORMAT_ERROR")),
        ("register", error(404, "RESOURCE_UNKNOWN")),
        ("register", error(401, "CONSENT_INVALID")),
        ("par", answer(401, {"error": "invalid_client"})),
    ],
)
async def test_a_provider_that_refuses_has_refused(kind: str, refusal: object) -> None:
    """PROVIDER_REFUSED, and the consent has failed: a repeat asks nobody."""
    world = World()
    request = create_request(world)
    world.bank.script[kind] = [refusal]  # type: ignore[list-item]

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.consents.create(caller(), request)
    asked = len(world.bank.requests)

    assert refused.value.reason == "PROVIDER_REFUSED"
    assert (await world.core.consents.create(caller(), request)).state is C.FAILED
    assert len(world.bank.requests) == asked


async def test_a_consent_to_payments_alone_registers_no_account_access() -> None:
    """There is no account access to register; the scope asks for payments only."""
    world = World()

    consent, _ = await created(world, purposes=frozenset({Purpose.PAYMENTS}))

    assert world.bank.count("register") == 0
    assert consent.provider_consent_id == ""


# --- complete


async def test_complete_exchanges_the_code_and_activates() -> None:
    """Tokens sealed, verifier gone, state digest gone, on record in this order: intent, activated."""
    world = World()

    consent = await completed(world)

    assert consent.state is C.ACTIVE
    assert consent == await world.stored(consent)
    assert consent.state_digest == b""
    kinds = {secret.kind for secret in (await world.store.secrets(consent.id)).secrets}
    assert kinds == {SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN}
    assert (await world.token(consent)).startswith("access-token")
    assert world.events()[2:4] == [AuditEvent.CONSENT_CODE_EXCHANGE, AuditEvent.CONSENT_ACTIVATED]
    assert (await world.core.payments.initiate(caller(), payment_request(consent))).state.value == "settled"


async def test_where_the_owner_chose_the_accounts_the_consent_has_them() -> None:
    """Asked without accounts: those that the bank names; if the bank does not answer it stays as it was asked for."""
    world = World()
    chosen = await completed(world, accounts=())
    world.bank.script["details"] = [Unknown(code="ANSWER_TIMEOUT")]
    unnamed = await completed(world, accounts=())

    assert chosen.accounts == (AccountReference(iban=IBAN, currency_code="EUR"),)
    assert unnamed.accounts == ()
    assert unnamed.state is C.ACTIVE


async def test_an_hsm_that_is_away_after_the_exchange_does_not_unmake_it() -> None:
    """The consent is active; naming its accounts is not worth an error."""
    world = World()
    consent, state = await created(world, accounts=())
    record = world.store.record

    world.store.record = _failing  # type: ignore[assignment, method-assign]
    done = await world.core.consents.complete(
        caller(), consent.id, OWNER, redirect(state, world.bank.authorise()), request_id()
    )
    world.store.record = record  # type: ignore[method-assign]

    assert done.state is C.ACTIVE


async def _failing(*args: object, **kwargs: object) -> object:
    raise STORE_AWAY


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "wrong"}, "STATE_MISMATCH"),
        ({"state": ""}, "STATE_MISMATCH"),
        ({"iss": "https://evil.example"}, "ISSUER_MISMATCH"),
        ({"iss": "https://issuer.bank.example/"}, "ISSUER_MISMATCH"),
        ({"iss": ""}, "ISSUER_MISMATCH"),
        ({"state": "wrong", "error": "access_denied", "code": ""}, "STATE_MISMATCH"),
        ({"iss": "https://evil.example", "error": "access_denied", "code": ""}, "ISSUER_MISMATCH"),
    ],
)
async def test_bi_d9_a_foreign_redirect_leaves_the_consent_unharmed(changes: dict[str, str], reason: str) -> None:
    """D9: wrong state or issuer, also of a redirect that says no: refused, nothing written, and the right one completes."""
    world = World()
    consent, state = await created(world)
    entries = len(world.events())
    code = world.bank.authorise()
    wrong = replace(redirect(state, code), **changes)

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.consents.complete(caller(), consent.id, OWNER, wrong, request_id())

    assert refused.value.reason == reason
    assert len(world.events()) == entries
    right = redirect(state, code)
    done = await world.core.consents.complete(caller(), consent.id, OWNER, right, request_id())
    assert done.state is C.ACTIVE


async def test_bi_d9_the_state_of_another_consent_does_not_fit() -> None:
    """Login CSRF: the redirect of one consent cannot complete another."""
    world = World()
    first, _ = await created(world)
    _, state_of_second = await created(world)

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.consents.complete(caller(), first.id, OWNER, redirect(state_of_second), request_id())

    assert refused.value.reason == "STATE_MISMATCH"


async def test_a_replayed_redirect_is_refused() -> None:
    """With another request id, after the consent is active: its state is used up."""
    world = World()
    consent, state = await created(world)
    used = redirect(state, world.bank.authorise())
    await world.core.consents.complete(caller(), consent.id, OWNER, used, request_id())

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.consents.complete(caller(), consent.id, OWNER, used, request_id())

    assert refused.value.reason == "STATE_MISMATCH"
    assert world.bank.count("token") == 1
    assert (await world.stored(consent)).state is C.ACTIVE


async def test_complete_repeated_gets_the_same_consent_and_another_content_a_refusal() -> None:
    """Idempotent by request id; the code is not sent again."""
    world = World()
    consent, state = await created(world)
    first, identifier = redirect(state, world.bank.authorise()), request_id()
    complete = world.core.consents.complete

    done = await complete(caller(), consent.id, OWNER, first, identifier)

    assert await complete(caller(), consent.id, OWNER, first, identifier) == done
    with pytest.raises(Conflict):
        await complete(caller(), consent.id, OWNER, replace(first, code="other"), identifier)
    assert world.bank.count("token") == 1


@pytest.mark.parametrize("same", [True, False], ids=["same request id", "other request ids"])
async def test_a_code_is_exchanged_once_however_many_calls_come_at_once(same: bool) -> None:
    """Twenty calls at the same moment: one exchange."""
    world = World()
    consent, state = await created(world)
    back, identifier = redirect(state, world.bank.authorise()), request_id()
    calls = [
        world.core.consents.complete(caller(), consent.id, OWNER, back, identifier if same else request_id())
        for _ in range(20)
    ]

    results = await asyncio.gather(*calls, return_exceptions=True)

    assert world.bank.count("token") == 1
    assert all(isinstance(result, Consent | PreconditionFailed) for result in results)
    assert any(isinstance(result, Consent) and result.state is C.ACTIVE for result in results)
    assert (await world.stored(consent)).state is C.ACTIVE


@pytest.mark.parametrize(
    "outcome",
    [
        Unknown(code="ANSWER_TIMEOUT"),
        lost,
        NotSent(code="CONNECT_FAILED"),
        answer(400, {"error": "invalid_grant"}),
        answer(503, {}),
        answer(200, {"access_token": "x", "token_type": "mac"}),
    ],
)
async def test_an_exchange_that_brings_no_tokens_ends_the_consent(outcome: object) -> None:
    """A code is never sent twice: FAILED, and neither a repeat nor another request sends it again."""
    world = World()
    consent, state = await created(world)
    back, identifier = redirect(state, world.bank.authorise()), request_id()
    world.bank.script["token"] = [outcome]  # type: ignore[list-item]

    with pytest.raises(PreconditionFailed) as failed:
        await world.core.consents.complete(caller(), consent.id, OWNER, back, identifier)
    with pytest.raises(PreconditionFailed) as repeated:
        await world.core.consents.complete(caller(), consent.id, OWNER, back, identifier)
    with pytest.raises(PreconditionFailed):
        await world.core.consents.complete(caller(), consent.id, OWNER, back, request_id())

    assert failed.value.reason == repeated.value.reason == "AUTHORISATION_FAILED"
    assert (await world.stored(consent)).state is C.FAILED
    assert world.bank.count("token") <= 1


@pytest.mark.parametrize("trouble", [Unavailable("HSM_UNAVAILABLE", "away"), Corrupt("ENVELOPE_CORRUPT", "bad")])
async def test_an_exchange_that_fails_here_ends_the_consent_too(trouble: CustodyError) -> None:
    """The intent to exchange is on record: whatever stops it afterwards, the code is not tried again."""
    world = World()
    consent, state = await created(world)
    world.core.egress.trouble["request_tokens"] = [trouble]

    with pytest.raises(CustodyError) as failed:
        await world.core.consents.complete(caller(), consent.id, OWNER, redirect(state), request_id())

    assert failed.value.reason == trouble.reason
    assert (await world.stored(consent)).state is C.FAILED


async def test_a_denied_authorisation_fails_the_consent() -> None:
    """access_denied with the right state: FAILED; a repeat says so again."""
    world = World()
    consent, state = await created(world)
    denied, identifier = redirect(state, "", error="access_denied"), request_id()

    for _ in range(2):
        with pytest.raises(PreconditionFailed) as refused:
            await world.core.consents.complete(caller(), consent.id, OWNER, denied, identifier)
        assert refused.value.reason == "AUTHORISATION_DENIED"
    assert (await world.stored(consent)).state is C.FAILED
    assert world.bank.count("token") == 0


async def test_a_consent_that_has_expired_meanwhile_is_not_completed() -> None:
    """The owner came back too late: no exchange."""
    world = World()
    consent, state = await created(world, expire_time=world.clock.now() + timedelta(seconds=60))
    world.clock.advance(60)

    with pytest.raises(PreconditionFailed) as refused:
        await world.core.consents.complete(caller(), consent.id, OWNER, redirect(state), request_id())

    assert refused.value.reason == "CONSENT_EXPIRED"
    assert world.bank.count("token") == 0


async def test_revoked_during_the_exchange_stays_revoked_and_keeps_no_tokens() -> None:
    """R8: the tokens that come afterwards are not stored."""
    world = World()
    consent, state = await created(world)
    code = world.bank.authorise()

    async def revoke() -> None:
        await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    world.core.egress.gates["request_tokens"] = revoke
    with pytest.raises(CustodyError):
        await world.core.consents.complete(caller(), consent.id, OWNER, redirect(state, code), request_id())

    assert (await world.stored(consent)).state is C.REVOKED
    assert not (await world.store.secrets(consent.id)).secrets


async def test_the_tokens_survive_a_store_that_is_away_for_seconds() -> None:
    """They come once: storing them is tried again."""
    world = World()
    consent, state = await created(world)
    code = world.bank.authorise()

    async def away() -> None:
        world.store.failures.extend([STORE_AWAY] * 4)

    world.core.egress.gates["request_tokens"] = away
    done = await world.core.consents.complete(caller(), consent.id, OWNER, redirect(state, code), request_id())

    assert done.state is C.ACTIVE


async def test_an_exchange_whose_sidecar_died_fails_after_a_while() -> None:
    """COMPLETING with nobody at it: after two minutes of seeing it so, another sidecar ends it; not sooner."""
    world = World()
    consent, state = await created(world)
    world.core.egress.gates["request_tokens"] = asyncio.Event().wait  # type: ignore[assignment]
    call = asyncio.ensure_future(
        world.core.consents.complete(caller(), consent.id, OWNER, redirect(state), request_id())
    )
    for _ in range(20):
        await asyncio.sleep(0)
    after = world.start("two")

    states = []
    for _ in range(4):
        await after.consents.finish_ended()
        states.append((await world.stored(consent)).state)
        world.clock.advance(60)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    assert states == [C.COMPLETING, C.COMPLETING, C.COMPLETING, C.FAILED]


async def test_an_exchange_that_runs_here_is_not_failed_under_its_own_run() -> None:
    """However long it takes."""
    world = World()
    consent, state = await created(world)
    code = world.bank.authorise()

    async def slow() -> None:
        for _ in range(4):
            world.clock.advance(60)
            await world.core.consents.finish_ended()

    world.core.egress.gates["request_tokens"] = slow

    done = await world.core.consents.complete(caller(), consent.id, OWNER, redirect(state, code), request_id())
    assert done.state is C.ACTIVE


# --- who may touch a consent


async def test_what_a_caller_may_not_see_looks_like_what_does_not_exist() -> None:
    """Another owner, another workload, a provider that the policy no longer has, an unknown id: the same refusal."""
    world = World()
    consent = await world.consent()
    get = world.core.consents.get
    seen = set()
    for who, which, owner in [
        (caller(), consent.id, OwnerId("owner-2")),
        (caller(OTHER), consent.id, OWNER),
        (caller(providers=frozenset()), consent.id, OWNER),
        (caller(), ConsentId("c-unknown"), OWNER),
    ]:
        with pytest.raises(NotFound) as refused:
            await get(who, which, owner)
        seen.add((refused.value.reason, refused.value.message))

    assert len(seen) == 1
    assert await get(caller(), consent.id, OWNER) == consent


async def test_administrators_see_all_and_need_name_no_owner() -> None:
    """But a wrong owner is a wrong owner for them too; applications have to name one."""
    world = World()
    consent = await world.consent()

    assert await world.core.consents.get(ADMINISTRATOR, consent.id, None) == consent
    with pytest.raises(NotFound):
        await world.core.consents.get(ADMINISTRATOR, consent.id, OwnerId("owner-2"))
    with pytest.raises(InvalidField):
        await world.core.consents.get(caller(), consent.id, None)


async def test_list_is_newest_first_of_one_owner_and_the_callers_own() -> None:
    """The contract's order; pages go on after the last id."""
    world = World()
    made = []
    for _ in range(4):
        world.clock.advance(1)
        made.append(await world.consent())
    await world.consent(caller=OTHER)
    await world.consent(owner=OwnerId("owner-2"))
    where = ConsentFilter(owner=OWNER)

    first = await world.core.consents.list(caller(), where, after="", limit=3)
    rest = await world.core.consents.list(caller(), where, after=first[-1].id, limit=3)

    assert [consent.id for consent in [*first, *rest]] == [consent.id for consent in reversed(made)]
    assert len(await world.core.consents.list(ADMINISTRATOR, ConsentFilter(), after="", limit=10)) == 6
    assert not await world.core.consents.list(caller(providers=frozenset()), where, after="", limit=3)
    with pytest.raises(InvalidField):
        await world.core.consents.list(caller(), ConsentFilter(), after="", limit=3)
    with pytest.raises(CustodyError):
        await world.core.consents.list(caller(owners=frozenset()), where, after="", limit=3)


# --- revoke


async def test_revoke_tells_the_provider_then_destroys_the_key_and_keeps_the_tombstone() -> None:
    """DELETE at the bank, token revocation, then key and secrets gone; the row and its entries stay."""
    world = World()
    consent = await world.consent()

    ended = await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    assert (ended.state, ended.wrapped_data_key, ended.subject_key) == (C.REVOKED, b"", b"")
    assert ended.revoke_time is not None
    assert (world.bank.count("end"), world.bank.count("revoke")) == (1, 1)
    assert not (await world.store.secrets(consent.id)).secrets
    assert world.events()[-4:] == [
        AuditEvent.CONSENT_REVOKED,
        AuditEvent.TOKEN_USE,  # the consent is ended at the bank
        AuditEvent.TOKEN_USE,  # and its refresh token revoked
        AuditEvent.CONSENT_KEY_DESTROYED,
    ]


async def test_revoke_repeated_with_any_request_id_gets_the_revoked_consent() -> None:
    """D19: the bank is told once."""
    world = World()
    consent = await world.consent()
    identifier = request_id()
    first = await world.core.consents.revoke(caller(), consent.id, OWNER, identifier)

    assert await world.core.consents.revoke(caller(), consent.id, OWNER, identifier) == first
    assert await world.core.consents.revoke(caller(), consent.id, OWNER, request_id()) == first
    assert world.bank.count("end") == 1


async def test_revoke_with_a_request_id_of_something_else_is_refused() -> None:
    """Also where the consent is revoked already."""
    world = World()
    consent = await world.consent()
    used = payment_request(consent)
    await world.core.payments.initiate(caller(), used)
    for _ in range(2):
        with pytest.raises(Conflict):
            await world.core.consents.revoke(caller(), consent.id, OWNER, used.request_id)
        await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())


@pytest.mark.parametrize("kind", ["end", "revoke"])
@pytest.mark.parametrize("trouble", [NotSent(code="CONNECT_FAILED"), error(500, "X_Y"), error(429, "ACCESS_EXCEEDED")])
async def test_bi_d22_a_provider_that_cannot_be_told_is_told_later(kind: str, trouble: object) -> None:
    """D22: unusable here at once, though the bank did not hear; the key stays to tell it with, and goes when it was told."""
    world = World()
    consent = await world.consent()
    world.bank.script[kind] = [trouble]  # type: ignore[list-item]

    revoked = await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())
    with pytest.raises(PreconditionFailed) as refused:
        await world.core.payments.initiate(caller(), payment_request(consent))
    await world.core.consents.finish_ended()
    ended = await world.stored(consent)

    assert (revoked.state, bool(revoked.wrapped_data_key)) == (C.REVOKED, True)
    assert refused.value.reason == "CONSENT_REVOKED"
    assert ended.wrapped_data_key == b""
    assert world.bank.count("end") == 2


async def test_a_provider_that_stays_away_for_a_day_is_told_no_more() -> None:
    """The key is destroyed without it: within a day the trying goes on, after it the key goes."""
    world = World()
    consent = await world.consent()
    world.bank.script["end"] = [NotSent(code="CONNECT_FAILED")] * 10
    await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    world.clock.advance(DAY - 1)
    await world.core.consents.finish_ended()
    before = await world.stored(consent)
    world.clock.advance(2)
    await world.core.consents.finish_ended()
    after = await world.stored(consent)

    assert before.wrapped_data_key
    assert not after.wrapped_data_key


async def test_a_provider_that_is_away_keeps_no_other_consent_waiting() -> None:
    """More consents than one page cannot be told: those behind them are ended all the same."""
    world = World()
    stuck = [await world.consent() for _ in range(3)]
    for consent in stuck:
        world.bank.script["end"] = [NotSent(code="CONNECT_FAILED")]
        await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())
    world.clock.step_wall_clock(-10)  # an older consent stands behind the newer ones
    last = await world.consent()
    world.bank.script["end"] = [NotSent(code="CONNECT_FAILED")]
    await world.core.consents.revoke(caller(), last.id, OWNER, request_id())
    world.bank.script["end"] = [NotSent(code="CONNECT_FAILED")] * 3

    assert await world.core.consents.finish_ended(limit=2) == 4
    assert not (await world.stored(last)).wrapped_data_key


async def test_an_expired_access_token_is_renewed_to_tell_the_provider() -> None:
    """Days after its last use the consent's access token is over: the bank's own consent is ended with a new one."""
    world = World()
    consent = await world.consent()
    world.bank.expire_tokens()
    world.clock.advance(5 * DAY)

    ended = await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    assert world.bank.consents == {"bank-consent-0": "terminatedByTpp"}
    assert world.bank.refreshes == 1
    assert (ended.state, ended.wrapped_data_key) == (C.REVOKED, b"")


async def test_where_no_token_is_to_be_had_the_refresh_token_is_revoked() -> None:
    """The grant is gone at the bank, so the DELETE is refused: RFC 7009 is still told, and the key destroyed."""
    world = World()
    consent = await world.consent()
    world.bank.expire_tokens()
    world.clock.advance(5 * DAY)
    world.bank.script["token"] = [answer(400, {"error": "invalid_grant"})]

    ended = await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    assert ended.wrapped_data_key == b""
    assert world.bank.count("revoke") == 1


async def test_an_egress_that_is_away_after_the_key_is_destroyed_has_forgotten_it() -> None:
    """The revocation stands and is answered."""
    world = World()
    consent = await world.consent()
    world.core.egress.trouble["forget"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]

    ended = await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    assert (ended.state, ended.wrapped_data_key) == (C.REVOKED, b"")


async def test_a_consent_that_was_never_active_needs_no_telling() -> None:
    """Awaiting its owner: revoked and destroyed without a call to the bank."""
    world = World()
    consent, _ = await created(world)
    asked = len(world.bank.requests)

    ended = await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())

    assert (ended.state, ended.wrapped_data_key) == (C.REVOKED, b"")
    assert len(world.bank.requests) == asked


async def test_revoking_wins_against_other_changes() -> None:
    """The row changes while it is being revoked: revoking is tried again with what it is now."""
    world = World()
    consent = await world.consent()
    change = world.store.change_consent
    raced: list[bool] = []

    async def racing(wanted: Consent, **kwargs: object) -> object:
        if wanted.state is C.REVOKED and not raced:
            raced.append(True)
            current = await world.stored(consent)
            await change(current.with_changes(), audit=[draft(AuditEvent.TOKEN_USE)])
        return await change(wanted, **kwargs)  # type: ignore[arg-type]

    world.store.change_consent = racing  # type: ignore[assignment, method-assign]

    assert (await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())).state is C.REVOKED
    assert raced


async def test_administrators_may_revoke_and_are_named_in_the_log() -> None:
    """Without naming the owner; the entry's caller is the administrator."""
    world = World()
    consent = await world.consent()

    ended = await world.core.consents.revoke(ADMINISTRATOR, consent.id, None, request_id())

    assert ended.state is C.REVOKED
    entries = [AuditEntry.decode(leaf.entry).draft for leaf in world.store._state.leaves]
    (entry,) = [entry for entry in entries if entry.event is AuditEvent.CONSENT_REVOKED]
    assert entry.caller == ADMINISTRATOR.workload


# --- expiry


async def test_expiry_ends_tells_and_destroys() -> None:
    """At expire_time: unusable, the bank told, the key destroyed; not before."""
    world = World()
    consent = await world.consent(expire_time=world.clock.now() + timedelta(seconds=100))
    world.clock.advance(99)
    assert await world.core.consents.expire_due() == 0
    world.clock.advance(1)

    assert await world.core.consents.expire_due() == 1

    ended = await world.stored(consent)
    assert (ended.state, ended.wrapped_data_key) == (C.EXPIRED, b"")
    assert world.bank.count("end") == 1
    assert await world.core.consents.expire_due() == 0


async def test_one_consent_that_cannot_be_expired_now_does_not_keep_the_others() -> None:
    """The store fails for one of three: the round says so, and the other two have expired."""
    world = World()
    consents = [await world.consent(expire_time=world.clock.now() + timedelta(seconds=1)) for _ in range(3)]
    world.clock.advance(2)
    world.store.failures.append(STORE_AWAY)

    with pytest.raises(Unavailable):
        await world.core.consents.expire_due()

    states = [(await world.stored(consent)).state for consent in consents]
    assert sorted(states) == [C.ACTIVE, C.EXPIRED, C.EXPIRED]


# --- import


def info_of(identifier: str, provider: str = f"providers/{PROVIDER}") -> bytes:
    parts = (b"custody/v1/import", OWNER.encode(), provider.encode(), identifier.encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


async def import_request(world: World, **changes: Any) -> ImportTokens:
    access, refresh = world.bank.mint()
    key = await world.core.egress.import_key()
    identifier = request_id()
    plaintext = json.dumps({"access_token": access, "refresh_token": refresh}).encode()
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    sealed = suite.encrypt(plaintext, X25519PublicKey.from_public_bytes(key.public_key), info_of(identifier))
    request = ImportTokens(
        owner=OWNER,
        provider=PROVIDER,
        purposes=frozenset({Purpose.PAYMENTS}),
        accounts=(AccountReference(iban=IBAN),),
        expire_time=world.clock.now() + timedelta(days=30),
        access_expire_time=world.clock.now() + timedelta(hours=1),
        provider_consent_id="bank-consent-7",
        import_key_id=key.key_id,
        sealed_tokens=sealed,
        info=info_of(identifier),
        request_id=identifier,
    )
    return replace(request, **changes)


async def test_import_makes_an_active_consent_that_pays() -> None:
    """Tokens from elsewhere, sealed to egress: usable at once, and no request has an empty header."""
    world = World()
    request = await import_request(world)

    consent = await world.core.consents.import_tokens(caller(), request)
    payment = await world.core.payments.initiate(caller(), payment_request(consent))

    assert consent.state is C.ACTIVE
    assert payment.state.value == "settled"
    (sent,) = [asked for asked in world.bank.requests if world.bank.kind(asked) == "initiate"]
    assert all(sent.headers.values())
    assert "tpp-redirect-uri" not in sent.headers
    assert await world.core.consents.import_tokens(caller(), request) == consent


async def test_import_sealed_again_is_another_request() -> None:
    """The contract: to seal again is other content."""
    world = World()
    request = await import_request(world)
    await world.core.consents.import_tokens(caller(), request)
    again = replace(await import_request(world), request_id=request.request_id, info=request.info)

    with pytest.raises(Conflict):
        await world.core.consents.import_tokens(caller(), again)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"import_key_id": "0" * 16}, "IMPORT_KEY_UNKNOWN"),
        ({"sealed_tokens": b"x" * 100}, "IMPORT_REFUSED"),
        ({"info": info_of("other")}, "IMPORT_REFUSED"),
        ({"info": info_of("x", "providers/other")}, "IMPORT_REFUSED"),
    ],
)
async def test_an_import_that_does_not_open_is_refused_for_good(changes: dict[str, Any], reason: str) -> None:
    """The contract's reason, nothing kept but the tombstone; a repeat is refused the same way without opening anything."""
    world = World()
    request = await import_request(world, **changes)

    with pytest.raises(CustodyError) as refused:
        await world.core.consents.import_tokens(caller(), request)
    with pytest.raises(PreconditionFailed) as repeated:
        await world.core.consents.import_tokens(caller(), request)
    (stored,) = world.store._state.consents.values()

    assert refused.value.reason == repeated.value.reason == reason
    assert stored.state is C.FAILED
    assert not world.store._state.secrets


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"imports": False}, "POLICY_REFUSED"),
        ({"providers": frozenset()}, "POLICY_REFUSED"),
        ({"owners": frozenset()}, "OWNER_MISMATCH"),
        ({"purposes": frozenset()}, "POLICY_REFUSED"),
    ],
)
async def test_only_whom_the_policy_lets_may_import(policy: dict[str, Any], reason: str) -> None:
    """Importing is a permission of its own."""
    world = World()
    request = await import_request(world)

    with pytest.raises(CustodyError) as refused:
        await world.core.consents.import_tokens(caller(**policy), request)

    assert refused.value.reason == reason
    assert not world.store._state.consents


async def test_the_import_key_is_for_importers() -> None:
    """And for nobody else."""
    world = World()

    assert len((await world.core.consents.import_key(caller())).public_key) == 32
    with pytest.raises(CustodyError):
        await world.core.consents.import_key(caller(imports=False))
