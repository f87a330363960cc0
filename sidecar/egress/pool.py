"""Kept connections to one origin, for requests that may be repeated.

Rules: at most `limit` at a time; one request at a time on each; a connection that is not alive when it is to be used is
replaced before anything is written, and that is the only replacing there is. Money never comes here.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from sidecar.egress.connection import TlsConnection

__all__ = ["ConnectionPool"]

_IDLE_SECONDS: Final = 30.0


class ConnectionPool:
    def __init__(self, *, connect: Callable[[], Awaitable[TlsConnection]], limit: int) -> None:
        self._connect = connect
        self._places = asyncio.Semaphore(limit)
        self._idle: dict[TlsConnection, asyncio.TimerHandle] = {}

    async def acquire(self) -> TlsConnection:
        """Waits for a place. Raises ConnectFailed where a new connection is needed and does not come about."""
        await self._places.acquire()
        try:
            return await self._take_idle() or await self._connect()
        except BaseException:
            self._places.release()
            raise

    def release(self, connection: TlsConnection, *, keep: bool) -> None:
        """Gives the place back. `keep` says that the answer was complete and that the provider keeps the connection open."""
        self._places.release()
        if not keep or not connection.alive:
            connection.close()
            return
        self._idle[connection] = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._drop, connection)
        connection.on_death(lambda: self._forget(connection))

    def close(self) -> None:
        for connection in tuple(self._idle):
            self._drop(connection)

    async def _take_idle(self) -> TlsConnection | None:
        while self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
            try:
                await connection.settle()
            except asyncio.CancelledError:
                connection.abort()
                raise
            if connection.alive:
                return connection
            connection.abort()
        return None

    def _drop(self, connection: TlsConnection) -> None:
        self._forget(connection)
        connection.close()

    def _forget(self, connection: TlsConnection) -> None:
        timer = self._idle.pop(connection, None)
        if timer is not None:
            timer.cancel()
