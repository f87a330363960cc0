"""Data keys, for as short as is useful.

Rules:
- A key, and what is derived from it, lives in one locked slab and nowhere else; a place in it is wiped before it is given to
  anybody else.
- A key leaves the cache at the latest `cache_seconds` after hsm opened it, at once when it is forgotten, and with the process.
  A forgotten one does not come back for `cache_seconds`: whoever still needs it gets it for one use, beside the cache.
  Who works with it when it leaves keeps it until that work ends, and work is never begun that could outlast the key.
- One question to hsm serves all who wait for the same key.
"""

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Self

import msgspec

from sidecar.domain.secrets import SecretContext
from sidecar.egress.deadline import Deadline
from sidecar.egress.hsmlink import HsmLink
from sidecar.errors import Unavailable
from sidecar.sealing import KEY_BYTES, WrappingKey
from sidecar.secretbuffer import SecretBuffer, wipe

__all__ = ["DATA_KEY_VERSION", "DataKeys", "Lease", "data_key_context"]

DATA_KEY_VERSION: Final = 1
"""Data keys have no versions: a consent gets one, and it ends with the consent."""
_PLACES_BESIDE_CACHE: Final = 1024  # keys in use by requests in flight, after they left the cache
_MAX_FORGOTTEN: Final = 65_536
_encoder = msgspec.msgpack.Encoder()


def data_key_context(context: SecretContext) -> SecretContext:
    """The context of the data key under which a secret of `context` is sealed (docs/sealed-token.md)."""
    return replace(context, provider_origin="", row_version=1)


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    place: int
    room: memoryview = field(repr=False)
    key: WrappingKey = field(repr=False)
    key_id: bytes
    wrapped_digest: bytes
    ends: Deadline
    users: int = 0
    cached: bool = True


class Lease:
    """A data key in use; leave the `with` block soon."""

    __slots__ = ("_entry", "_keys")

    def __init__(self, keys: "DataKeys", entry: _Entry) -> None:
        self._keys = keys
        self._entry = entry

    @property
    def key(self) -> memoryview:
        return self._entry.key.key

    @property
    def opening(self) -> WrappingKey:
        """The same key, for opening: it remembers what it has derived."""
        return self._entry.key

    @property
    def key_id(self) -> bytes:
        return self._entry.key_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keys._release(self._entry)


class DataKeys:
    def __init__(self, *, hsm: HsmLink, cache_seconds: float, cache_size: int) -> None:
        self._hsm = hsm
        self._cache_seconds = cache_seconds
        self._cache_size = cache_size
        places = cache_size + _PLACES_BESIDE_CACHE
        self._slab = SecretBuffer(places * WrappingKey.ROOM_BYTES)
        self._free = list(range(places))
        self._cached: dict[bytes, _Entry] = {}  # by age: keys go in at the end
        self._opening: dict[bytes, asyncio.Task[_Entry]] = {}
        self._forgotten: dict[bytes, Deadline] = {}  # by age, until when
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        return len(self._cached)

    async def lease(self, wrapped: bytes, context: SecretContext, *, for_seconds: float, deadline: Deadline) -> Lease:
        """The key that hsm finds in `wrapped` under `context` (a data key's), good for `for_seconds` at least.

        Raises Corrupt, or Unavailable when hsm does not answer.
        """
        if self._is_forgotten(_digest(wrapped)):
            return await self._lease_beside_cache(wrapped, context, deadline)
        name = _name(wrapped, context)
        entry = self._cached.get(name)
        needed = min(for_seconds, self._cache_seconds)
        if entry is None or entry.ends.remaining_seconds < needed:
            entry = await self._opened(name, wrapped, context, deadline)
            if not entry.cached:  # forgotten or pushed out before its turn came
                raise Unavailable("HSM_UNAVAILABLE", "the data key was dropped meanwhile; try again")
        entry.users += 1
        return Lease(self, entry)

    async def create(self, context: SecretContext, *, deadline: Deadline) -> tuple[Lease, bytes]:
        """A new data key for `context`, and the same key wrapped by hsm. It is not cached: its consent has no token yet."""
        place, room = self._take_place()
        try:
            material = await self._hsm.create_data_key(context=context, into=room[:KEY_BYTES], deadline=deadline)
        except BaseException:
            self._give_place_back(place, room)
            raise
        entry = self._entry(place, room, material.key_id, material.wrapped)
        entry.cached = False
        entry.users = 1
        return Lease(self, entry), material.wrapped

    async def _lease_beside_cache(self, wrapped: bytes, context: SecretContext, deadline: Deadline) -> Lease:
        place, room = self._take_place()
        try:
            material = await self._hsm.open_data_key(
                wrapped=wrapped, context=context, into=room[:KEY_BYTES], deadline=deadline
            )
        except BaseException:
            self._give_place_back(place, room)
            raise
        entry = self._entry(place, room, material.key_id, wrapped)
        entry.cached = False
        entry.users = 1
        return Lease(self, entry)

    def forget(self, wrapped: bytes) -> None:
        """Drops `wrapped`'s key; no question to hsm, under way or later, brings it back for `cache_seconds`."""
        digest = _digest(wrapped)
        for name, entry in tuple(self._cached.items()):
            if entry.wrapped_digest == digest:
                self._drop(name)
        self._forgotten.pop(digest, None)
        self._forgotten[digest] = Deadline.after(self._cache_seconds)
        self._drop_old_forgotten()

    def _is_forgotten(self, digest: bytes) -> bool:
        until = self._forgotten.get(digest)
        return until is not None and not until.passed

    def _drop_old_forgotten(self) -> None:
        while self._forgotten:
            oldest, until = next(iter(self._forgotten.items()))
            if not until.passed and len(self._forgotten) <= _MAX_FORGOTTEN:
                return
            del self._forgotten[oldest]

    async def close(self) -> None:
        """Wipes every key, in use or not."""
        tasks = tuple(self._opening.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        self._cached.clear()
        self._slab.close()

    async def _opened(self, name: bytes, wrapped: bytes, context: SecretContext, deadline: Deadline) -> _Entry:
        task = self._opening.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._open(name, wrapped, context))
            self._opening[name] = task
        try:
            async with deadline.timeout():
                return await asyncio.shield(task)
        except TimeoutError:
            raise Unavailable("HSM_UNAVAILABLE", "the HSM process does not answer; try again") from None

    async def _open(self, name: bytes, wrapped: bytes, context: SecretContext) -> _Entry:
        """Runs on its own, so that no waiter's cancellation takes the key from the others."""
        place, room = self._take_place()
        try:
            # Its end is counted from before the question, so that no delay makes a key live longer.
            ends = Deadline.after(self._cache_seconds)
            material = await self._hsm.open_data_key(
                wrapped=wrapped, context=context, into=room[:KEY_BYTES], deadline=Deadline.after(self._cache_seconds)
            )
        except BaseException:
            self._give_place_back(place, room)
            raise
        finally:
            self._opening.pop(name, None)
        entry = self._entry(place, room, material.key_id, wrapped)
        entry.ends = ends
        self._cache(name, entry)
        return entry

    def _entry(self, place: int, room: memoryview, key_id: bytes, wrapped: bytes) -> _Entry:
        return _Entry(
            place=place,
            room=room,
            key=WrappingKey(room),
            key_id=key_id,
            wrapped_digest=_digest(wrapped),
            ends=Deadline.after(self._cache_seconds),
        )

    def _cache(self, name: bytes, entry: _Entry) -> None:
        self._drop(name)
        while len(self._cached) >= self._cache_size:
            self._drop(next(iter(self._cached)))
        self._cached[name] = entry
        if self._is_forgotten(entry.wrapped_digest):
            self._drop(name)
        self._set_timer()

    def _drop(self, name: bytes) -> None:
        entry = self._cached.pop(name, None)
        if entry is not None:
            entry.cached = False
            self._wipe_if_unused(entry)

    def _drop_ended(self) -> None:
        self._timer = None
        for name, entry in tuple(self._cached.items()):
            if entry.ends.passed:
                self._drop(name)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is None and self._cached:
            next_end = min(entry.ends.remaining_seconds for entry in self._cached.values())
            self._timer = asyncio.get_running_loop().call_later(next_end + 0.001, self._drop_ended)

    def _release(self, entry: _Entry) -> None:
        entry.users -= 1
        if not entry.cached:
            self._wipe_if_unused(entry)

    def _wipe_if_unused(self, entry: _Entry) -> None:
        if entry.users == 0:
            entry.key.release()
            self._give_place_back(entry.place, entry.room)

    def _take_place(self) -> tuple[int, memoryview]:
        if not self._free:
            raise Unavailable("HSM_UNAVAILABLE", "too many data keys are in use; try again")
        place = self._free.pop()
        size = WrappingKey.ROOM_BYTES
        return place, self._slab.view[place * size : (place + 1) * size]

    def _give_place_back(self, place: int, room: memoryview) -> None:
        wipe(room)
        room.release()
        self._free.append(place)


def _name(wrapped: bytes, context: SecretContext) -> bytes:
    return hashlib.sha256(len(wrapped).to_bytes(8, "big") + wrapped + _encoder.encode(context)).digest()


def _digest(wrapped: bytes) -> bytes:
    return hashlib.sha256(wrapped).digest()
