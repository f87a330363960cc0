"""Data keys: asked for once, kept for a while, wiped when they go."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from sidecar.domain.secrets import SecretContext
from sidecar.egress import datakeys, hsmlink
from sidecar.egress.datakeys import DataKeys, data_key_context
from sidecar.egress.deadline import Deadline
from sidecar.egress.hsmlink import HsmLink
from sidecar.errors import Corrupt, Unavailable
from tests.fakes.egress import SoftwareKeys
from tests.unit.egress.process import HsmStandIn

CONTEXT = data_key_context(
    SecretContext(cluster="test", owner="o", consent="c", provider_origin="https://bank.example:443", row_version=7)
)


class Lab:
    def __init__(self, *, cache_seconds: float = 60.0, cache_size: int = 3) -> None:
        self.software = SoftwareKeys()
        self.hsm = HsmStandIn(self.software)
        self.link = HsmLink()
        self.keys = DataKeys(hsm=self.link, cache_seconds=cache_seconds, cache_size=cache_size)
        self.link.wire(self.hsm.new_end())

    async def lease(self, wrapped: bytes, *, for_seconds: float = 1.0, deadline_seconds: float = 5.0) -> bytes:
        deadline = Deadline.after(deadline_seconds)
        with await self.keys.lease(wrapped, CONTEXT, for_seconds=for_seconds, deadline=deadline) as lease:
            return bytes(lease.key)

    def slab_holds(self, key: bytes) -> bool:
        return key in bytes(self.keys._slab.view)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Lab"]:
        try:
            yield self
        finally:
            await self.link.close()
            await self.keys.close()
            self.hsm.close()


def _run(test: Callable[[Lab], Coroutine[None, None, None]], **settings: float) -> None:
    async def run() -> None:
        async with Lab(**settings).running() as lab:  # type: ignore[arg-type]
            await test(lab)

    asyncio.run(run())


def test_a_key_is_asked_for_once() -> None:
    """Fifty at the same time, and more afterwards, make one question to hsm."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)

        leased = await asyncio.gather(*(lab.lease(wrapped) for _ in range(50)))
        leased.append(await lab.lease(wrapped))

        assert set(leased) == {key}
        assert lab.hsm.questions == 1
        assert lab.keys.count == 1

    _run(test)


def test_the_cache_is_bounded_and_wipes_what_it_drops() -> None:
    """The oldest goes first, and its key with it."""

    async def test(lab: Lab) -> None:
        made = [lab.software.create_data_key(CONTEXT) for _ in range(4)]

        for wrapped, _ in made:
            await lab.lease(wrapped)

        assert lab.keys.count == 3
        assert [lab.slab_holds(key) for _, key in made] == [False, True, True, True]

    _run(test)


def test_a_key_leaves_the_cache_by_itself() -> None:
    """After `cache_seconds` it is wiped, without anybody asking for anything."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)
        await lab.lease(wrapped, for_seconds=0)
        assert lab.slab_holds(key)

        async with asyncio.timeout(10):
            while lab.slab_holds(key):
                await asyncio.sleep(0.05)

        assert lab.keys.count == 0

    _run(test, cache_seconds=0.3)


def test_a_key_that_would_end_too_soon_is_opened_anew() -> None:
    """A lease is never given on a key that has less to live than the work needs."""

    async def test(lab: Lab) -> None:
        wrapped, _ = lab.software.create_data_key(CONTEXT)
        await lab.lease(wrapped, for_seconds=1.0)
        await asyncio.sleep(0.6)

        await lab.lease(wrapped, for_seconds=1.0)
        assert lab.hsm.questions == 1
        await lab.lease(wrapped, for_seconds=1.9)
        assert lab.hsm.questions == 2

    _run(test, cache_seconds=2.0)


def test_forget_wipes_now_what_nobody_uses_and_later_what_somebody_does() -> None:
    """A key in use stays until its lease ends; it is no longer in the cache at once."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)
        lease = await lab.keys.lease(wrapped, CONTEXT, for_seconds=1, deadline=Deadline.after(5))

        with lease:
            lab.keys.forget(wrapped)
            assert lab.keys.count == 0
            assert bytes(lease.key) == key
        assert not lab.slab_holds(key)

    _run(test)


def test_forget_is_not_undone_by_a_question_under_way() -> None:
    """A key that comes in after forget does not get into the cache."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)
        waiting = asyncio.ensure_future(lab.lease(wrapped))
        await asyncio.sleep(0)
        lab.keys.forget(wrapped)

        with pytest.raises(Unavailable):
            await waiting

        assert lab.keys.count == 0
        assert not lab.slab_holds(key)

    _run(test)


def test_a_forgotten_key_does_not_come_back_into_the_cache() -> None:
    """Who still needs it gets it for one use; afterwards it is wiped, and after the cache's time it is a key like others."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)
        lab.keys.forget(wrapped)

        assert [await lab.lease(wrapped) for _ in range(2)] == [key, key]
        assert lab.keys.count == 0
        assert not lab.slab_holds(key)
        assert lab.hsm.questions == 2
        await asyncio.sleep(1.1)
        assert await lab.lease(wrapped, for_seconds=0.1) == key
        assert lab.keys.count == 1

    _run(test, cache_seconds=1.0)


def test_what_is_remembered_of_forgotten_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes first, and what is past its time goes by itself."""
    monkeypatch.setattr(datakeys, "_MAX_FORGOTTEN", 3)

    async def test(lab: Lab) -> None:
        for number in range(5):
            lab.keys.forget(b"%d" % number)
        assert len(lab.keys._forgotten) == 3
        await asyncio.sleep(0.3)
        lab.keys.forget(b"another")
        assert len(lab.keys._forgotten) == 1

    _run(test, cache_seconds=0.2)


def test_a_cancelled_caller_takes_the_key_from_nobody() -> None:
    """One of two who wait gives up: the other gets the key."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)
        first, second = asyncio.ensure_future(lab.lease(wrapped)), asyncio.ensure_future(lab.lease(wrapped))
        await asyncio.sleep(0)

        first.cancel()

        assert await second == key
        with pytest.raises(asyncio.CancelledError):
            await first

    _run(test)


def test_a_silent_hsm_fails_its_askers_in_time() -> None:
    """By the asker's deadline, and nothing is left waiting or in the slab."""

    async def test(lab: Lab) -> None:
        wrapped, _ = lab.software.create_data_key(CONTEXT)
        lab.hsm.silent = True

        with pytest.raises(Unavailable) as caught:
            await lab.lease(wrapped, deadline_seconds=0.3)

        assert caught.value.reason == "HSM_UNAVAILABLE"

    _run(test)


def test_askers_that_give_up_leave_the_link_whole() -> None:
    """More questions than the socket takes, all of them given up while hsm does not read: then it reads on, and all is well."""

    async def test(lab: Lab) -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["message"]))
        slow, peer = socket.socketpair()
        lab.link.wire(peer)
        wrapped, key = lab.software.create_data_key(CONTEXT)
        places = [bytearray(32) for _ in range(900)]
        results = await asyncio.gather(
            *(
                lab.link.open_data_key(
                    wrapped=wrapped, context=CONTEXT, into=memoryview(place), deadline=Deadline.after(0.5)
                )
                for place in places
            ),
            return_exceptions=True,
        )
        gc.collect()

        assert {type(result) for result in results} == {Unavailable}
        assert lab.link.connected
        assert errors == []
        lab.hsm.serve(slow)
        assert await lab.lease(wrapped) == key

    _run(test)


def test_askers_of_a_link_that_breaks_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """hsm closes while questions are stuck in the socket: each asker gets its error, and the loop has nothing to complain of."""
    monkeypatch.setattr(hsmlink, "_ANSWER_SECONDS", 60.0)

    async def test(lab: Lab) -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["message"]))
        closing, peer = socket.socketpair()
        lab.link.wire(peer)
        asking = asyncio.gather(
            *(
                lab.link.open_data_key(
                    wrapped=b"w" * 150, context=CONTEXT, into=memoryview(bytearray(32)), deadline=Deadline.after(60)
                )
                for _ in range(900)
            ),
            return_exceptions=True,
        )
        await asyncio.sleep(0.2)
        closing.close()
        results = await asyncio.wait_for(asking, 20)
        del asking
        gc.collect()

        assert {type(result) for result in results} == {Unavailable}
        assert not lab.link.connected
        assert errors == []

    _run(test)


def test_a_new_hsm_takes_over() -> None:
    """Who waits on the old socket is told at once; the next question goes over the new one."""

    async def test(lab: Lab) -> None:
        wrapped, key = lab.software.create_data_key(CONTEXT)
        lab.hsm.silent = True
        waiting = asyncio.ensure_future(lab.lease(wrapped))
        await asyncio.sleep(0.1)

        lab.hsm.silent = False
        lab.link.wire(lab.hsm.new_end())

        with pytest.raises(Unavailable):
            await waiting
        assert await lab.lease(wrapped) == key

    _run(test)


def test_a_key_that_does_not_open_is_corrupt_and_not_cached() -> None:
    """For another context, or damaged."""

    async def test(lab: Lab) -> None:
        wrapped, _ = lab.software.create_data_key(CONTEXT)

        with pytest.raises(Corrupt):
            await lab.lease(wrapped[:-1] + bytes([wrapped[-1] ^ 1]))

        assert lab.keys.count == 0

    _run(test)


def test_closing_wipes_everything() -> None:
    """Keys in the cache and keys in use."""

    async def test(lab: Lab) -> None:
        made = [lab.software.create_data_key(CONTEXT) for _ in range(2)]
        await lab.lease(made[0][0])
        lease = await lab.keys.lease(made[1][0], CONTEXT, for_seconds=1, deadline=Deadline.after(5))
        view = lab.keys._slab.view[:]

        await lab.keys.close()

        assert all(key not in bytes(view) for _, key in made)
        assert bytes(lease.key) == bytes(32)

    _run(test)
