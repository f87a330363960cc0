"""Lost answers, crashes and late answers in a refresh, by kind of provider: what is sent again, what never, and what is said."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import pytest

from sidecar.custody.accounts import AccountRead
from sidecar.custody.tokens import RefreshEnd
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.payment import PaymentState
from sidecar.domain.provider import Answer, NotSent, SendOutcome, Unknown
from sidecar.domain.secrets import SecretKind
from sidecar.errors import Internal, PreconditionFailed, Unavailable
from tests.fakes.bank import answer, error, lost
from tests.fakes.store import FakeStore
from tests.unit.custody.support import SIGNER, Core, World, caller, draft, payment_request

T = TypeVar("T")

LEASE_SECONDS = 30.0  # the sandbox bank's call_seconds, and the margin
AWAY = Unavailable("STORE_UNAVAILABLE", "away")
LOST = Unknown(code="DEADLINE_AFTER_SEND")
KINDS: dict[str, dict[str, Any]] = {
    "strict": {"rotation": "strict"},
    "grace": {"rotation": "grace", "grace_seconds": 120.0},
    "grace that is over": {"rotation": "grace", "grace_seconds": 16.0},
    "when first used": {"rotation": "when-first-used"},
    "none": {"rotation": "none", "rotates": False},
}
REPEATABLE = ("grace", "when first used", "none")


class Killed(BaseException):
    """The process is gone: nothing of ours runs any more, no handler and no clean-up."""


class MortalStore(FakeStore):
    """Dies (once) before or after the command of a name; `before_change` happens before the next change of a consent."""

    def __init__(self, world: World) -> None:
        super().__init__(signer=SIGNER, clock=world.clock)
        self.dies: tuple[str, str] | None = None
        self.before_change: list[Callable[[], Awaitable[None]]] = []

    async def take_refresh_lease(self, *arguments: Any, **named: Any) -> int | None:
        return await self._mortal("take", lambda: super(MortalStore, self).take_refresh_lease(*arguments, **named))

    async def change_consent(self, *arguments: Any, **named: Any) -> Any:
        if self.before_change:
            await self.before_change.pop(0)()
        return await self._mortal("change", lambda: super(MortalStore, self).change_consent(*arguments, **named))

    async def release_refresh_lease(self, *arguments: Any, **named: Any) -> None:
        await self._mortal("release", lambda: super(MortalStore, self).release_refresh_lease(*arguments, **named))

    async def _mortal(self, name: str, command: Callable[[], Awaitable[T]]) -> T:
        self._die_at((name, "before"))
        result = await command()
        self._die_at((name, "after"))
        return result

    def _die_at(self, place: tuple[str, str]) -> None:
        if self.dies == place:
            self.dies = None
            raise Killed


def new_world(kind: str, **arguments: Any) -> World:
    world = World(token_seconds=1200, **{**KINDS[kind], **arguments})
    world.store = world.core.store = MortalStore(world)
    world.start()
    return world


async def due(world: World) -> Consent:
    """A consent at half of its access token's life."""
    consent = await world.consent()
    world.clock.advance(600)
    return consent


async def round_of(core: Core) -> None:
    """One round of the background, and what it began."""
    await core.refresher.run_due()
    await core.tasks.drain(seconds=5)


def die(_answer: Answer) -> SendOutcome:
    raise Killed


async def killed(world: World, consent: Consent, place: str) -> None:
    """A refresh whose process is killed at `place`."""
    assert isinstance(world.store, MortalStore)

    async def gone() -> None:
        raise Killed

    match place:
        case "before the intent":
            world.store.dies = ("take", "before")
        case "after the intent":
            world.store.dies = ("take", "after")
        case "before the bank has it":
            world.core.egress.gates["request_tokens"] = gone
        case "after the bank has acted":
            world.bank.script["token"] = [die]
        case "before the pair is written":
            world.store.dies = ("change", "before")
        case "after the pair was written":
            world.store.dies = ("change", "after")
    with pytest.raises(Killed):
        await world.core.tokens.renew(await world.stored(consent))
    assert world.store.dies is None


NOTHING_OPEN = ("before the intent", "after the pair was written")
OPEN = (
    "after the intent",
    "before the bank has it",
    "after the bank has acted",
    "before the pair is written",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", NOTHING_OPEN)
async def test_a_crash_that_leaves_nothing_open_is_as_if_it_had_not_been(place: str, kind: str) -> None:
    """Before the intent, or once the pair is written: at every kind of provider the next sidecar has a working pair after one
    refresh in all, and the bank sees no token twice."""
    world = new_world(kind)
    consent = await due(world)
    await killed(world, consent, place)

    two = world.start("two")
    await round_of(two)

    assert (await world.stored(consent)).state is ConsentState.ACTIVE
    assert (await two.tokens.access(await world.stored(consent))).secret.secret.row_version == 2
    assert (world.bank.refreshes, world.bank.reuses) == (1, 0)


@pytest.mark.parametrize("kind", REPEATABLE)
@pytest.mark.parametrize("place", OPEN)
async def test_where_the_provider_allows_it_a_crash_is_repaired_by_the_same_token(place: str, kind: str) -> None:
    """The next sidecar waits for the end of the lease, and not longer; then it sends the same token and has a pair that works."""
    world = new_world(kind)
    consent = await due(world)
    await killed(world, consent, place)

    two = world.start("two")
    world.clock.advance(LEASE_SECONDS - 1)
    await round_of(two)
    waiting = two.refreshes.copy()
    world.clock.advance(1)
    await round_of(two)

    assert (waiting, two.refreshes) == ([], [RefreshEnd.GRANTED])
    assert (await world.stored(consent)).state is ConsentState.ACTIVE
    assert await world.token(consent) in world.bank._tokens
    assert world.bank.reuses == 0


@pytest.mark.parametrize("kind", ["strict", "grace that is over"])
@pytest.mark.parametrize("place", OPEN)
async def test_where_it_does_not_the_owner_is_asked_and_nothing_is_sent(place: str, kind: str) -> None:
    """A crash after the intent counts as a token that was handed over: within one round of the lease's end the consent asks for its
    owner, the old access token goes on, and the token never leaves again, not even for a sidecar that is asked for it."""
    world = new_world(kind)
    consent = await due(world)
    await killed(world, consent, place)
    sent = world.bank.refreshes

    two = world.start("two")
    world.clock.advance(LEASE_SECONDS)
    await round_of(two)
    flagged = await world.stored(consent)
    got = await two.tokens.access(flagged)
    for _ in range(3):
        world.clock.advance(60)
        await round_of(two)
        await two.tokens.renew(flagged)

    assert flagged.state is ConsentState.NEEDS_REAUTHORISATION
    assert (got.secret.secret.row_version, two.refreshes) == (1, [RefreshEnd.LOST])
    assert (world.bank.refreshes, world.bank.reuses) == (sent, 0)


async def test_a_lost_answer_at_a_strict_provider_is_said_at_once() -> None:
    """No time passes between the loss and the flag, on record with both entries; nobody waits for a lease to end."""
    world = new_world("strict")
    consent = await due(world)
    world.bank.script["token"] = [lost]
    before = world.clock.now()

    await world.core.tokens.renew(await world.stored(consent))

    assert world.clock.now() - before < timedelta(seconds=5)
    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION
    assert world.core.refreshes == [RefreshEnd.LOST]
    assert world.events()[-2:] == [AuditEvent.TOKEN_REFRESH_FAILED, AuditEvent.CONSENT_NEEDS_REAUTHORISATION]


async def test_a_flag_outlives_a_store_that_is_away() -> None:
    """The store is away when the loss becomes known: it is written as soon as the store takes it."""
    world = new_world("strict")
    consent = await due(world)

    async def away() -> None:
        world.store.failures.extend([AWAY] * 3)

    world.core.egress.gates["request_tokens"] = away
    world.bank.script["token"] = [LOST]

    await world.core.tokens.renew(await world.stored(consent))

    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION


@pytest.mark.parametrize("answered", [lost, lambda _answer: answer(400, {"error": "invalid_grant"})])
@pytest.mark.parametrize("trouble", ["away", "changed"])
async def test_what_the_owner_must_know_is_written_whatever_happens(trouble: str, answered: Any) -> None:
    """The store is away, or the row changes, just when it is to be written that the owner is needed: it is written all the same."""
    world = new_world("strict")
    consent = await due(world)
    assert isinstance(world.store, MortalStore)
    world.bank.script["token"] = [answered]

    async def happens() -> None:
        if trouble == "away":
            world.store.failures.extend([AWAY] * 2)
        else:
            current = await world.stored(consent)
            await world.store.change_consent(current.with_changes(), audit=[draft(AuditEvent.TOKEN_USE)])

    world.store.before_change = [happens]
    await world.core.tokens.renew(await world.stored(consent))

    assert world.store.before_change == []
    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION


async def test_the_old_access_token_goes_on_to_its_end() -> None:
    """After the loss accounts are read and payments made with the old token, as long as it lives and not a second longer; then the
    consent's own reason is given."""
    world = new_world("strict")
    consent = await due(world)
    world.bank.script["token"] = [lost]
    await world.core.tokens.renew(await world.stored(consent))
    read = AccountRead(consent=consent.id, owner=consent.owner, account="", psu=None)

    world.clock.advance(599)
    accounts = await world.core.accounts.list_accounts(caller(), read)
    paid = await world.core.payments.initiate(caller(), payment_request(consent))
    world.clock.advance(1)
    with pytest.raises(PreconditionFailed) as no_reading:
        await world.core.accounts.list_accounts(caller(), read)
    with pytest.raises(PreconditionFailed) as no_paying:
        await world.core.payments.initiate(caller(), payment_request(consent))

    assert len(accounts) == 1
    assert paid.state is PaymentState.SETTLED
    assert {no_reading.value.reason, no_paying.value.reason} == {"CONSENT_NEEDS_REAUTHORISATION"}
    assert world.bank.refreshes == 1


async def test_what_the_provider_refuses_afterwards_is_over_at_once() -> None:
    """The old token should live, but the bank refuses it: nothing can renew it, so the consent is not usable any more."""
    world = new_world("strict")
    consent = await due(world)
    world.bank.script["token"] = [lost]
    await world.core.tokens.renew(await world.stored(consent))
    world.bank.expire_tokens()
    read = AccountRead(consent=consent.id, owner=consent.owner, account="", psu=None)

    for _ in range(2):
        with pytest.raises(PreconditionFailed) as ended:
            await world.core.accounts.list_accounts(caller(), read)
        assert ended.value.reason == "CONSENT_NEEDS_REAUTHORISATION"

    assert world.bank.count("accounts") == 1
    assert world.bank.refreshes == 1


@pytest.mark.parametrize("kind", REPEATABLE)
async def test_lost_answers_are_repeated_until_one_arrives(kind: str) -> None:
    """Three answers are lost; after growing pauses the same token brings the pair, and the bank takes nothing for stolen."""
    world = new_world(kind)
    consent = await due(world)
    world.bank.script["token"] = [lost, lost, lost]

    for _ in range(60):
        await round_of(world.core)
        world.clock.advance(1)

    unknown = [RefreshEnd.UNKNOWN] * 3
    assert world.core.refreshes == [*unknown, RefreshEnd.GRANTED]
    assert await world.token(consent) in world.bank._tokens
    assert (world.bank.refreshes, world.bank.reuses) == (4, 0)
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_a_grace_period_ends() -> None:
    """Every answer is lost: the token is sent again only while its whole call fits into the period, then the owner is asked; the
    old access token still works."""
    world = new_world("grace")
    consent = await due(world)
    began = world.clock.now()
    world.bank.script["token"] = [lost] * 100
    times = []

    async def look() -> None:
        times.append((world.clock.now() - began).total_seconds())

    world.core.egress.gates["request_tokens"] = look
    for _ in range(240):
        await round_of(world.core)
        world.clock.advance(1)
    flagged = await world.stored(consent)

    assert world.core.refreshes == [*[RefreshEnd.UNKNOWN] * (len(times) - 1), RefreshEnd.LOST]
    assert 5 < len(times) < 25
    assert max(times) <= 120 - 10 - 5
    assert flagged.state is ConsentState.NEEDS_REAUTHORISATION
    assert (await world.core.tokens.access(flagged)).secret.secret.row_version == 1
    assert world.bank.reuses == 0


@pytest.mark.parametrize("trouble", ["not sent", "hsm", "egress"])
async def test_what_was_never_sent_leaves_nothing_open(trouble: str) -> None:
    """At a strict provider too: it is proven that nothing left, so the next attempt is made, after a pause and not before; also
    where the store is away when that is to be written down."""
    world = new_world("strict")
    consent = await due(world)

    async def away() -> None:
        world.store.failures.extend([AWAY] * 2)

    world.core.egress.gates["request_tokens"] = away
    if trouble == "not sent":
        world.bank.script["token"] = [NotSent(code="CONNECT_FAILED")]
    elif trouble == "hsm":
        world.hsm.available = False
    else:
        world.core.egress.trouble["request_tokens"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    await round_of(world.core)
    world.core.egress.gates.clear()
    world.hsm.available = True
    world.store.failures.clear()
    with pytest.raises(Unavailable) if trouble != "not sent" else nullcontext():
        await round_of(world.core)
    paused = world.bank.refreshes
    world.clock.advance(60)
    await round_of(world.core)

    assert paused == 0
    assert world.core.refreshes == [RefreshEnd.NOT_SENT, RefreshEnd.GRANTED]
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_an_attempt_that_sent_nothing_does_not_settle_the_one_before() -> None:
    """In a grace period: the first answer is lost, and then the provider cannot be reached until the period is over. The token may
    be used up, so it is not sent after that."""
    world = new_world("grace")
    consent = await due(world)
    world.bank.script["token"] = [lost, *[NotSent(code="CONNECT_FAILED")] * 200]

    for _ in range(130):
        await round_of(world.core)
        world.clock.advance(1)
    world.bank.script["token"].clear()
    await round_of(world.core)

    assert world.core.refreshes[0] is RefreshEnd.UNKNOWN
    assert world.core.refreshes[-1] is RefreshEnd.LOST
    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION
    assert (world.bank.refreshes, world.bank.reuses) == (1, 0)


async def test_a_defect_counts_as_handed_over() -> None:
    """Egress fails in a way that tells nothing: at a strict provider the owner is asked once the lease has ended."""
    world = new_world("strict")
    consent = await due(world)
    world.core.egress.trouble["request_tokens"] = [Internal()]

    with pytest.raises(Internal):
        await world.core.tokens.renew(await world.stored(consent))
    world.clock.advance(LEASE_SECONDS)
    await round_of(world.core)

    assert world.core.refreshes == [RefreshEnd.LOST]
    assert world.bank.refreshes == 0


async def test_a_pair_that_was_taken_for_lost_is_taken_back() -> None:
    """A sidecar has the pair and cannot reach the store; another one finds its lease over and asks for the owner. The pair arrives:
    the consent is active again, and nobody has sent the token twice."""
    world = new_world("strict")
    consent = await due(world)
    one, states = world.core, []

    async def another_finds_it_over() -> None:
        world.clock.advance(LEASE_SECONDS)
        two = world.start("two")
        await round_of(two)
        states.append((await world.stored(consent)).state)

    one.egress.gates["request_tokens"] = another_finds_it_over
    await one.tokens.renew(consent)
    current = await world.stored(consent)

    assert states == [ConsentState.NEEDS_REAUTHORISATION]
    assert (current.state, current.failure_reason) == (ConsentState.ACTIVE, "")
    assert (await one.tokens.access(current)).secret.secret.row_version == 2
    assert await world.token(consent) in world.bank._tokens
    assert (world.bank.refreshes, world.bank.reuses) == (1, 0)
    world.clock.advance(700)
    await round_of(one)
    assert one.refreshes == [RefreshEnd.GRANTED, RefreshEnd.GRANTED]


async def test_a_late_pair_does_not_overwrite_a_newer_one() -> None:
    """In a grace period two sidecars get a pair each. The one with the newer lease writes; the late one is fenced off."""
    world = new_world("grace")
    consent = await due(world)
    one = world.core

    async def another_repeats() -> None:
        world.clock.advance(LEASE_SECONDS)
        await round_of(world.start("two"))

    one.egress.gates["request_tokens"] = another_repeats
    await one.tokens.renew(consent)
    two = world.core
    stored = await world.token(consent)

    assert (one.refreshes, two.refreshes) == ([RefreshEnd.FENCED], [RefreshEnd.GRANTED])
    assert stored == "access-token-0002"  # the other sidecar's: ours was made after it
    assert (world.bank.refreshes, world.bank.reuses) == (2, 0)
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_the_lease_of_a_pair_is_free_with_its_writing() -> None:
    """One transaction: a process that dies right after it leaves no lease that would look like a lost token."""
    world = new_world("strict")
    consent = await due(world)
    await killed(world, consent, "after the pair was written")

    lease = await world.store.refresh_lease(consent.id)

    assert lease is not None
    assert (lease.is_held(world.clock.now()), lease.unresolved_since) == (False, None)


@pytest.mark.parametrize("place", [("change", "before"), ("change", "after"), ("release", "before")])
async def test_a_crash_while_the_loss_is_written_is_made_up_for(place: tuple[str, str]) -> None:
    """The flag, and then the closing of the lease: wherever it dies, the next sidecar flags the consent once and sends nothing."""
    world = new_world("strict")
    consent = await due(world)
    world.bank.script["token"] = [lost]
    assert isinstance(world.store, MortalStore)
    world.store.dies = place
    with pytest.raises(Killed):
        await world.core.tokens.renew(await world.stored(consent))

    world.clock.advance(LEASE_SECONDS)
    two = world.start("two")
    for _ in range(3):
        await round_of(two)

    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION
    assert world.events().count(AuditEvent.CONSENT_NEEDS_REAUTHORISATION) == 1
    assert world.bank.refreshes == 1


async def test_the_end_of_a_grant_is_written_whatever_else_changes() -> None:
    """invalid_grant, while the row changes under us: the consent ends all the same, and the dead token is not sent again."""
    world = new_world("strict")
    consent = await due(world)

    async def change() -> None:
        current = await world.stored(consent)
        await world.store.change_consent(current.with_changes(), audit=[draft(AuditEvent.TOKEN_USE)])

    def changed_meanwhile(_answer: Answer) -> SendOutcome:
        return answer(400, {"error": "invalid_grant"})

    world.core.egress.gates["request_tokens"] = change
    world.bank.script["token"] = [changed_meanwhile]
    await world.core.tokens.renew(await world.stored(consent))
    world.clock.advance(LEASE_SECONDS)
    await world.core.tokens.renew(await world.stored(consent))

    ended = await world.stored(consent)
    assert (ended.state, ended.failure_reason) == (ConsentState.NEEDS_REAUTHORISATION, "REFRESH_REFUSED")
    assert not ended.is_usable(world.clock.now())
    assert world.bank.refreshes == 1


async def test_a_revoked_consent_is_not_called_lost() -> None:
    """The answer is lost for a consent that was revoked meanwhile: it stays revoked, no alarm, and the token is not sent again."""
    world = new_world("strict")
    consent = await due(world)

    async def revoke() -> None:
        revoked = (await world.stored(consent)).to(ConsentState.REVOKED)
        await world.store.change_consent(revoked, audit=[draft(AuditEvent.CONSENT_REVOKED)])

    world.core.egress.gates["request_tokens"] = revoke
    world.bank.script["token"] = [lost]
    await world.core.tokens.renew(await world.stored(consent))
    world.clock.advance(LEASE_SECONDS)
    await world.core.tokens.renew(await world.stored(consent))

    assert (await world.stored(consent)).state is ConsentState.REVOKED
    assert world.core.refreshes == [RefreshEnd.UNKNOWN]
    assert world.bank.refreshes == 1


async def versions(world: World, consent: Consent) -> list[tuple[SecretKind, int]]:
    return [(secret.kind, secret.row_version) for secret in (await world.store.secrets(consent.id)).secrets]


async def test_the_old_pair_stays_until_the_new_one_has_worked() -> None:
    """After a refresh both pairs are there; a call that the bank refuses keeps them, one that it takes destroys the old pair."""
    world = new_world("when first used")
    consent = await due(world)
    read = AccountRead(consent=consent.id, owner=consent.owner, account="", psu=None)
    await world.core.tokens.renew(await world.stored(consent))
    renewed = await versions(world, consent)
    world.bank.script["accounts"] = [error(429, "ACCESS_EXCEEDED")]
    with pytest.raises(Exception, match="no more accesses"):
        await world.core.accounts.list_accounts(caller(), read)
    await world.core.tasks.drain(seconds=5)
    refused = await versions(world, consent)

    await world.core.accounts.list_accounts(caller(), read)
    await world.core.tasks.drain(seconds=5)

    access, refresh = SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN
    assert renewed == refused == [(access, 2), (access, 1), (refresh, 2), (refresh, 1)]
    assert await versions(world, consent) == [(access, 2), (refresh, 2)]


async def test_a_pair_of_which_only_the_access_token_is_new_keeps_its_refresh_token() -> None:
    """A provider that sends no new refresh token: what worked destroys the old access token, and never the only refresh token."""
    world = new_world("none")
    consent = await due(world)
    await world.core.tokens.renew(await world.stored(consent))
    read = AccountRead(consent=consent.id, owner=consent.owner, account="", psu=None)

    await world.core.accounts.list_accounts(caller(), read)
    await world.core.tasks.drain(seconds=5)

    assert await versions(world, consent) == [(SecretKind.ACCESS_TOKEN, 2), (SecretKind.REFRESH_TOKEN, 1)]


async def test_a_stale_confirmation_destroys_nothing() -> None:
    """A call worked with a token that was replaced meanwhile: the pair that is in use now stays whole."""
    world = new_world("strict")
    consent = await due(world)
    await world.core.tokens.renew(await world.stored(consent))
    early = await world.core.tokens.access(await world.stored(consent))
    world.clock.advance(600)
    await world.core.tokens.renew(await world.stored(consent))
    before = await versions(world, consent)

    world.core.tokens.confirm(early)
    await world.core.tasks.drain(seconds=5)

    assert await versions(world, consent) == before
    await asyncio.sleep(0)
