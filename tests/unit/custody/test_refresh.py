"""The background renews tokens in time, spread out, bounded at each provider, once across all sidecars."""

import asyncio
from datetime import timedelta

import pytest

from sidecar.custody.refresh import AT_ONCE
from sidecar.custody.tokens import RefreshEnd
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ProviderId
from sidecar.domain.provider import NotSent
from sidecar.domain.secrets import SecretKind
from sidecar.errors import Unavailable
from sidecar.ports import SecretsChange
from tests.fakes.bank import answer
from tests.unit.custody.support import Core, World, draft
from tests.unit.store.support import draft as store_draft

OTHER = ProviderId("other-bank")


async def round_of(core: Core) -> int:
    """One round, and the end of what it began."""
    begun = await core.refresher.run_due()
    await core.tasks.drain(seconds=5)
    return begun


async def consents(world: World, count: int, **changes: object) -> list[Consent]:
    return [await world.consent(**changes) for _ in range(count)]  # type: ignore[arg-type]


async def newest(world: World, consent: Consent) -> int:
    found = (await world.store.secrets(consent.id)).newest(SecretKind.REFRESH_TOKEN)
    assert found is not None
    return found.row_version


async def test_a_token_that_nobody_uses_is_renewed_between_40_and_50_per_cent_of_its_life() -> None:
    """No call comes: the background renews it, at its own time, and again in its next life."""
    world = World(token_seconds=1000)
    consent = await world.consent()
    assert consent.refresh_time is not None
    for _ in range(2):
        due = (await world.stored(consent)).refresh_time
        assert due is not None
        assert timedelta(seconds=400) <= due - world.clock.now() <= timedelta(seconds=500)
        world.clock.advance((due - world.clock.now()).total_seconds() - 0.001)
        early = await round_of(world.core)
        world.clock.advance(0.001)

        assert (early, await round_of(world.core), await round_of(world.core)) == (0, 1, 0)

    assert await newest(world, consent) == 3
    assert world.core.refreshes == [RefreshEnd.GRANTED] * 2


async def test_tokens_of_one_moment_are_not_renewed_at_once() -> None:
    """Three hundred tokens that live 1,000 seconds: with a round a second each is renewed before half of its life, and no second
    sees more than a few."""
    world = World(token_seconds=1000)
    made = await consents(world, 300)
    world.clock.advance(400)

    begun = []
    for _ in range(101):
        begun.append(await round_of(world.core))
        world.clock.advance(1)

    assert sum(begun) == 300
    assert max(begun) <= 12
    assert {await newest(world, consent) for consent in made} == {2}


async def test_at_one_provider_only_so_many_are_under_way() -> None:
    """A hundred overdue tokens at a provider that hangs: no more than AT_ONCE requests are open, in however many rounds; another
    provider's tokens are renewed meanwhile."""
    world = World(token_seconds=1000)
    world.core.connectors[OTHER] = world.connector
    await consents(world, 100)
    world.clock.advance(900)
    hanging = asyncio.Event()
    started = 0

    async def hang() -> None:
        nonlocal started
        started += 1
        await hanging.wait()

    world.core.egress.gates["request_tokens"] = hang
    rounds = []
    for _ in range(4):
        rounds.append(await world.core.refresher.run_due())
        await asyncio.sleep(0.01)
    opened = started
    del world.core.egress.gates["request_tokens"]
    elsewhere = (await consents(world, 1, provider=OTHER))[0]
    world.clock.advance(1000)
    await world.core.refresher.run_due()
    await asyncio.sleep(0.01)
    renewed_elsewhere = await newest(world, elsewhere)
    hanging.set()
    await world.core.tasks.drain(seconds=5)

    assert rounds == [AT_ONCE, 0, 0, 0]
    assert opened == AT_ONCE
    assert renewed_elsewhere == 2


async def test_a_round_begins_only_so_many() -> None:
    """However fast a provider answers, a round of one second begins no more than its share."""
    world = World(token_seconds=1000)
    await consents(world, AT_ONCE + 10)
    world.clock.advance(900)

    assert [await round_of(world.core) for _ in range(3)] == [AT_ONCE, 10, 0]


async def test_overlapping_rounds_begin_nothing_twice() -> None:
    """A round that comes before the first one's refreshes have taken their leases finds nothing new to do."""
    world = World(token_seconds=1000)
    await consents(world, 3)
    world.clock.advance(600)

    assert [await world.core.refresher.run_due() for _ in range(3)] == [3, 0, 0]
    await world.core.tasks.drain(seconds=5)


async def test_many_sidecars_renew_each_token_once() -> None:
    """R6 in the background: five sidecars do their rounds at the same time; each token is sent once."""
    world = World(token_seconds=1000)
    made = await consents(world, 30)
    world.clock.advance(600)
    sidecars = [world.start(f"sidecar-{number}") for number in range(5)]

    for _ in range(6):
        await asyncio.gather(*(round_of(core) for core in sidecars))

    assert world.bank.refreshes == 30
    assert world.bank.reuses == 0
    assert {await newest(world, consent) for consent in made} == {2}
    assert sum(len(core.refreshes) for core in sidecars) == 30


async def test_a_provider_that_is_away_is_asked_less_and_less() -> None:
    """Nothing can be sent for ten minutes: the pauses grow to a minute, and once the provider is back the token is renewed."""
    world = World(token_seconds=1200)
    consent = await world.consent()
    world.clock.advance(600)
    world.bank.script["token"] = [NotSent(code="CONNECT_FAILED")] * 1000

    for _ in range(600):
        await round_of(world.core)
        world.clock.advance(1)
    away = len(world.core.refreshes)
    world.bank.script["token"].clear()
    world.clock.advance(60)
    await round_of(world.core)

    assert 8 < away < 60
    assert await newest(world, consent) == 2


async def test_a_provider_that_refuses_us_is_asked_every_half_minute_at_most() -> None:
    """invalid_client: the operator has to act; the consent stays, and the provider is not flooded."""
    world = World(token_seconds=3600)
    consent = await world.consent()
    world.clock.advance(1800)
    world.bank.script["token"] = [answer(401, {"error": "invalid_client"})] * 1000

    for _ in range(300):
        await round_of(world.core)
        world.clock.advance(1)

    assert 4 <= len(world.core.refreshes) <= 10
    assert set(world.core.refreshes) == {RefreshEnd.REFUSED}
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_consents_without_a_refresh_token_are_left_alone() -> None:
    """There is nothing to renew with."""
    world = World(token_seconds=1000)
    consent = await world.consent(refresh=False)
    world.clock.advance(999)

    assert consent.refresh_time is None
    assert await round_of(world.core) == 0


async def test_what_fails_is_said_by_the_next_round() -> None:
    """The HSM is away: the round that comes after says so, once, and begins what it can all the same."""
    world = World(token_seconds=1000)
    await world.consent()
    world.clock.advance(900)
    world.hsm.available = False
    await round_of(world.core)
    world.hsm.available = True
    world.clock.advance(60)

    with pytest.raises(Unavailable) as away:
        await world.core.refresher.run_due()
    await world.core.tasks.drain(seconds=5)

    assert away.value.reason == "HSM_UNAVAILABLE"
    assert world.core.refreshes == [RefreshEnd.NOT_SENT, RefreshEnd.GRANTED]
    assert await round_of(world.core) == 0


async def test_a_damaged_consent_keeps_no_other_waiting() -> None:
    """An active consent whose tokens are gone: said, and the others are renewed."""
    world = World(token_seconds=1000)
    damaged, whole = await consents(world, 2)
    await world.store.change_consent(
        damaged.with_changes(), secrets=SecretsChange(delete_all=True), audit=[store_draft()]
    )
    world.clock.advance(600)
    await round_of(world.core)

    assert await newest(world, whole) == 2
    with pytest.raises(Exception, match="no access token"):
        await world.core.refresher.run_due()
    await world.core.tasks.drain(seconds=5)


async def test_a_consent_that_was_revoked_since_it_was_listed_is_not_brought_back() -> None:
    """R8: the background meets a consent that has just ended."""
    world = World(token_seconds=1000)
    consent = await world.consent()
    world.clock.advance(600)
    await world.core.refresher.run_due()
    revoked = (await world.stored(consent)).to(ConsentState.REVOKED)
    await world.store.change_consent(revoked, audit=[draft(AuditEvent.CONSENT_REVOKED)])
    await world.core.tasks.drain(seconds=5)

    assert (await world.stored(consent)).state is ConsentState.REVOKED
