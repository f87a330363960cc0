"""Tokens: renewed at half of their life by one refresher, never lost, and never reported as failed when the outcome is unknown."""

import asyncio
from dataclasses import replace

import pytest

from sidecar.custody.tokens import Access
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.provider import NotSent, Unknown
from sidecar.domain.secrets import SecretKind
from sidecar.errors import Corrupt, PreconditionFailed, Unavailable
from sidecar.ports import SecretsChange
from tests.fakes.bank import answer, lost
from tests.unit.custody.support import World, draft

INVALID_GRANT = answer(400, {"error": "invalid_grant"})
STORE_AWAY = Unavailable("STORE_UNAVAILABLE", "away")


async def versions(world: World, consent: Consent, kind: SecretKind) -> list[int]:
    secrets = (await world.store.secrets(consent.id)).secrets
    return [secret.row_version for secret in secrets if secret.kind is kind]


async def access(world: World, consent: Consent, **arguments: int) -> Access:
    current = await world.stored(consent)
    return await world.core.tokens.access(current, **arguments)


async def test_a_token_in_the_first_half_of_its_life_is_used_as_it_is() -> None:
    """599 seconds are not yet half of 1200: no refresh."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(599)

    assert (await access(world, consent)).secret.secret.row_version == 1
    assert world.bank.refreshes == 0


async def test_at_half_of_its_life_a_token_is_renewed_and_the_new_one_used() -> None:
    """The new pair is stored, the old pair kept beside it, and the answer has the new token and the new row."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(600)

    got = await access(world, consent)

    assert world.bank.refreshes == 1
    assert got.secret.secret.row_version == 2
    assert got.consent == await world.stored(consent)
    assert await versions(world, consent, SecretKind.ACCESS_TOKEN) == [2, 1]
    assert await versions(world, consent, SecretKind.REFRESH_TOKEN) == [2, 1]
    assert world.events()[-2:] == [AuditEvent.TOKEN_REFRESH_INTENT, AuditEvent.TOKEN_REFRESHED]


async def test_fifty_calls_at_once_refresh_once() -> None:
    """Single flight: one refresh, and all go on with its token."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)

    got = await asyncio.gather(*(access(world, consent) for _ in range(50)))

    assert world.bank.refreshes == 1
    assert {one.secret.secret.row_version for one in got} == {2}


async def test_a_call_with_an_old_look_at_the_consent_does_not_refresh_again() -> None:
    """Who read the row before the refresh of somebody else gets the new token."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(1300)
    await access(world, consent)

    got = await world.core.tokens.access(consent)

    assert world.bank.refreshes == 1
    assert got.secret.secret.row_version == 2


async def test_the_pair_before_is_kept_until_the_next_replaces_it() -> None:
    """Four refreshes: always the newest two of each kind, with row versions that only grow."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    for number in range(2, 6):
        world.clock.advance(700)
        await access(world, consent)
        assert await versions(world, consent, SecretKind.ACCESS_TOKEN) == [number, number - 1]
        assert await versions(world, consent, SecretKind.REFRESH_TOKEN) == [number, number - 1]


async def test_a_provider_that_sends_no_new_refresh_token_keeps_the_old_one() -> None:
    """D14: the old refresh token stays, however often; when a new one comes at last the old one stays beside it."""
    world = World(token_seconds=1200, rotates=False)
    consent = await world.consent()
    for _ in range(3):
        world.clock.advance(700)
        await access(world, consent)
    kept = await versions(world, consent, SecretKind.REFRESH_TOKEN)
    world.bank.rotates = True
    world.clock.advance(700)
    await access(world, consent)

    assert kept == [1]
    assert await versions(world, consent, SecretKind.ACCESS_TOKEN) == [5, 4]
    assert await versions(world, consent, SecretKind.REFRESH_TOKEN) == [5, 1]
    assert (await world.token(consent)).startswith("access-token")


@pytest.mark.parametrize("outcome", [Unknown(code="ANSWER_TIMEOUT"), lost, NotSent(code="CONNECT_FAILED")])
async def test_a_refresh_that_brings_nothing_leaves_the_living_token_in_use(outcome: object) -> None:
    """Unknown is not failed: the old access token goes on while it lives, and where the provider takes the refresh token twice the
    consent stays active."""
    world = World(token_seconds=1200, rotation="when-first-used")
    consent = await world.consent()
    world.clock.advance(700)
    world.bank.script["token"] = [outcome]  # type: ignore[list-item]

    got = await access(world, consent)

    assert got.secret.secret.row_version == 1
    assert (await world.stored(consent)).state is ConsentState.ACTIVE
    assert world.events()[-1] is AuditEvent.TOKEN_REFRESH_FAILED


@pytest.mark.parametrize("part", ["hsm", "egress", "store"])
async def test_what_fails_here_leaves_the_living_token_in_use(part: str) -> None:
    """No signature, no egress, no store for the refresh: the call is made with the token that lives."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    if part == "hsm":
        world.hsm.available = False
    elif part == "egress":
        world.core.egress.trouble["request_tokens"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    else:
        world.store.failures.append(STORE_AWAY)

    assert (await access(world, consent)).secret.secret.row_version == 1


async def test_an_expired_token_that_cannot_be_renewed_is_unavailable() -> None:
    """The outcome of the refresh is unknown and the old token is over: try again later; nothing is said to have ended."""
    world = World(token_seconds=1200, rotation="when-first-used")
    consent = await world.consent()
    world.clock.advance(1200)
    world.bank.script["token"] = [Unknown(code="ANSWER_TIMEOUT")]

    with pytest.raises(Unavailable) as away:
        await access(world, consent)

    assert away.value.reason == "PROVIDER_UNAVAILABLE"
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_after_an_unknown_outcome_the_token_is_not_tried_again_at_once() -> None:
    """There is a pause, for every sidecar, and then one more try where the provider takes the token twice."""
    world = World(token_seconds=1200, rotation="when-first-used")
    consent = await world.consent()
    world.clock.advance(700)
    world.bank.script["token"] = [Unknown(code="ANSWER_TIMEOUT")]
    await access(world, consent)

    for _ in range(20):
        await access(world, consent)
    await world.start("two").tokens.access(consent)
    tried_in_the_pause = world.bank.count("token")
    world.clock.advance(31)
    await access(world, consent)

    assert tried_in_the_pause == 1
    assert world.bank.count("token") == 2


async def test_an_unknown_outcome_that_cannot_be_recorded_is_not_tried_again_at_once() -> None:
    """The store goes away between the refresh and its entry: the lease stays, so the token is not used twice in a row."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    world.bank.script["token"] = [Unknown(code="ANSWER_TIMEOUT")]

    async def store_goes_away() -> None:
        world.store.failures.append(Unavailable("STORE_UNAVAILABLE", "away"))

    world.core.egress.gates["request_tokens"] = store_goes_away
    await access(world, consent)
    world.core.egress.gates.clear()
    world.store.failures.clear()
    await access(world, consent)

    assert world.bank.count("token") == 1


async def test_invalid_grant_means_that_the_owner_has_to_come_again() -> None:
    """The token endpoint's word is final: NEEDS_REAUTHORISATION, on record, and further calls are refused without asking."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    world.bank.script["token"] = [INVALID_GRANT]

    with pytest.raises(PreconditionFailed) as ended:
        await access(world, consent)

    assert ended.value.reason == "CONSENT_NEEDS_REAUTHORISATION"
    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION
    assert world.events()[-1] is AuditEvent.CONSENT_NEEDS_REAUTHORISATION


async def test_other_refusals_are_the_operators_and_end_nothing() -> None:
    """D40: invalid_client is a matter between us and the provider; the consent stays."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    world.bank.script["token"] = [answer(401, {"error": "invalid_client"})]

    await access(world, consent)

    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_a_lease_of_another_sidecar_means_to_wait() -> None:
    """Somebody else refreshes: with a living token the call goes on, with an expired one it is to be tried again."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    record = draft(AuditEvent.TOKEN_REFRESH_INTENT)
    await world.store.take_refresh_lease(
        consent.id, holder="two", now=world.clock.now(), seconds=1000, after_epoch=0, audit=record
    )

    assert (await access(world, consent)).secret.secret.row_version == 1
    world.clock.advance(600)
    with pytest.raises(Unavailable):
        await access(world, consent)
    assert world.bank.refreshes == 0


async def test_two_sidecars_refresh_once() -> None:
    """R6: the lease is the store's; both go on with the one new pair, or with the old one."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    one, two = world.core, world.start("two")

    await asyncio.gather(one.tokens.access(consent), two.tokens.access(consent))

    assert world.bank.refreshes == 1
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_the_lease_outlives_the_longest_call() -> None:
    """While a refresh may be under way nobody else gets the lease."""
    world = World(token_seconds=1200)
    world.replace_connector(call_seconds=60.0)
    consent = await world.consent()
    world.clock.advance(700)
    lease: list[int | None] = []

    async def look() -> None:
        world.clock.advance(60)
        record = draft(AuditEvent.TOKEN_REFRESH_INTENT)
        lease.append(
            await world.store.take_refresh_lease(
                consent.id, holder="x", now=world.clock.now(), seconds=1, after_epoch=1, audit=record
            )
        )

    world.core.egress.gates["request_tokens"] = look
    await access(world, consent)

    assert lease == [None]


async def test_without_a_refresh_token_the_living_token_goes_on_to_its_end() -> None:
    """No refresh token: used until it expires, then the owner has to come again."""
    world = World(token_seconds=1200)
    consent = await world.consent(refresh=False)
    world.clock.advance(1199)
    assert (await access(world, consent)).secret.secret.row_version == 1
    world.clock.advance(1)

    with pytest.raises(PreconditionFailed) as ended:
        await access(world, consent)

    assert ended.value.reason == "CONSENT_NEEDS_REAUTHORISATION"
    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION


async def test_a_token_that_the_provider_refused_is_renewed_though_it_should_live() -> None:
    """`refuse_older_than`: what the provider just refused is not given out again."""
    world = World(token_seconds=1200)
    consent = await world.consent()

    got = await access(world, consent, refuse_older_than=1)

    assert got.secret.secret.row_version == 2
    world.bank.script["token"] = [NotSent(code="CONNECT_FAILED")]
    with pytest.raises(Unavailable):
        await access(world, consent, refuse_older_than=2)


async def test_the_new_pair_survives_a_store_that_is_away_for_seconds() -> None:
    """The provider has rotated and will not give the pair again: storing it is tried again."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)

    async def away() -> None:
        world.store.failures.extend([STORE_AWAY] * 4)

    world.core.egress.gates["request_tokens"] = away

    assert (await access(world, consent)).secret.secret.row_version == 2


async def test_the_new_pair_survives_another_change_of_the_row() -> None:
    """While the provider answers, the row changes: the pair is kept with what the row says now."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)

    async def change() -> None:
        current = await world.stored(consent)
        changed = current.with_changes(failure_reason="SEEN")
        await world.store.change_consent(changed, audit=[draft(AuditEvent.TOKEN_USE)])

    world.core.egress.gates["request_tokens"] = change
    await access(world, consent)
    current = await world.stored(consent)

    assert await versions(world, consent, SecretKind.REFRESH_TOKEN) == [2, 1]
    assert (current.failure_reason, current.state) == ("SEEN", ConsentState.ACTIVE)


async def test_a_consent_revoked_while_its_token_is_renewed_is_revoked() -> None:
    """R8: the refresh does not bring it back."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)

    async def revoke() -> None:
        current = await world.stored(consent)
        revoked = current.to(ConsentState.REVOKED)
        await world.store.change_consent(revoked, audit=[draft(AuditEvent.CONSENT_REVOKED)])

    world.core.egress.gates["request_tokens"] = revoke

    with pytest.raises(PreconditionFailed) as ended:
        await access(world, consent)

    assert ended.value.reason == "CONSENT_REVOKED"
    assert (await world.stored(consent)).state is ConsentState.REVOKED


@pytest.mark.parametrize("ended", [True, False])
async def test_missing_tokens_are_corrupt_only_where_the_consent_is_active(ended: bool) -> None:
    """A consent that ended between two looks has ended; an active one without a token is damaged."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    change = SecretsChange(delete_all=True)
    gone = replace(consent, version=consent.version + 1)
    gone = replace(gone, state=ConsentState.REVOKED) if ended else gone
    await world.store.change_consent(gone, secrets=change, audit=[draft(AuditEvent.CONSENT_KEY_DESTROYED)])

    with pytest.raises(PreconditionFailed if ended else Corrupt):
        await world.core.tokens.access(consent)


async def test_a_provider_that_says_no_lifetime_gets_the_descriptors() -> None:
    """Without expires_in the descriptor's access_token_seconds counts, from when the token was asked for."""
    world = World(token_seconds=None)
    consent = await world.consent(life_seconds=100)
    world.clock.advance(60)

    async def slow() -> None:
        world.clock.advance(7)

    world.core.egress.gates["request_tokens"] = slow
    asked = world.clock.now()
    renewed = (await access(world, consent)).consent

    assert renewed.access_issue_time == asked
    assert (renewed.access_expire_time - asked).total_seconds() == 300  # type: ignore[operator]


async def test_a_waiter_that_gives_up_does_not_end_the_refresh() -> None:
    """The refresh is the sidecar's: its pair is stored though nobody waits for it any more."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(700)
    call = asyncio.ensure_future(access(world, consent))
    for _ in range(8):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await world.core.tasks.drain(seconds=5)

    assert await versions(world, consent, SecretKind.REFRESH_TOKEN) in ([2, 1], [1])
    assert (await versions(world, consent, SecretKind.REFRESH_TOKEN) == [2, 1]) == (world.bank.refreshes == 1)
