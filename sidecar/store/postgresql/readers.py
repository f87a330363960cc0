"""Reads: a small number of connections in the loop, each used by one query at a time.

Rules: opened when they are needed, at most `size`; every wait is bounded, for a connection as for an answer, and so is the number
of those who wait; one that was left idle and has died is replaced, because a read may be repeated; none outlives the writer's.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Self, TypeVar

import psycopg
from psycopg import waiting
from psycopg.abc import PQGen

from sidecar.errors import Internal, Unavailable
from sidecar.store.postgresql.address import Address
from sidecar.store.postgresql.connection import SET_ALL, adapt, check_settings, session_settings
from sidecar.store.postgresql.errors import connection_refused, is_disconnect
from sidecar.store.statements import Connection, Row, Statement, Value

__all__ = ["Readers"]

READ_SECONDS = 5.0
_MAX_WAITING = 1024

T = TypeVar("T")
RV = TypeVar("RV")
Query = Callable[[Connection], T]


class Readers:
    def __init__(self, address: Address, *, size: int, synchronous_commit: str) -> None:
        self._address = address
        self._settings = session_settings(address, synchronous_commit=synchronous_commit, read_only=True)
        self._slots = asyncio.Semaphore(size)
        self._idle: list[_Reader] = []
        self._waiting = 0
        self._generation = 0
        self._closed = False

    async def read(self, query: Query[T]) -> T:
        """Raises psycopg's errors, and Unavailable(STORE_UNAVAILABLE) where no connection is free in time, or no answer."""
        if self._closed:
            raise Unavailable("STORE_UNAVAILABLE", "the store is closed")
        if self._waiting >= _MAX_WAITING:
            raise Unavailable("STORE_UNAVAILABLE", "too many reads wait for the database; try again")
        try:
            async with asyncio.timeout(READ_SECONDS), self._slot():
                return await self._answer(query)
        except TimeoutError as error:
            raise Unavailable("STORE_UNAVAILABLE", "the database does not answer in time; try again") from error

    def renew(self) -> None:
        """No connection that is open now is used again: the writer has found that its own was lost. From any thread."""
        self._generation += 1  # they are closed in the loop, which may be using them

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._slots.release()

    async def _answer(self, query: Query[T]) -> T:
        kept = await self._kept()
        if kept is not None:
            try:
                return await self._run(kept, query)
            except psycopg.Error as error:
                if not is_disconnect(error):
                    raise  # else it died while nobody used it, or its server did
        generation = self._generation
        return await self._run(await _Reader.open(self._address, self._settings, generation=generation), query)

    async def _kept(self) -> "_Reader | None":
        while self._idle:
            reader = self._idle.pop()
            if reader.generation == self._generation:
                return reader
            await reader.close()
        return None

    async def _run(self, reader: "_Reader", query: Query[T]) -> T:
        try:
            return await _with_answers(query, reader)
        finally:
            if reader.is_ready() and not self._closed:
                self._idle.append(reader)
            else:
                await reader.close()


class _LoopConnection(psycopg.AsyncConnection[Row]):
    """One that is given up is closed, not asked to cancel: that would be another wait, and the server has its own limit."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        return await waiting.wait_async(gen, self.pgconn.socket, interval=interval, timeout=timeout)


class _Reader:
    """A connection in the loop. `rows` is what a query asks for."""

    @classmethod
    async def open(cls, address: Address, settings: Mapping[str, str], *, generation: int) -> Self:
        try:
            driver = await _LoopConnection.connect(**address.parameters, autocommit=True)  # type: ignore[arg-type]
        except psycopg.Error as error:
            raise Unavailable("STORE_UNAVAILABLE", "the database cannot be reached; try again") from connection_refused(
                error, where=str(address)
            )
        try:
            adapt(driver)
            cursor = await driver.execute(SET_ALL, (list(settings), list(settings.values())))
            check_settings(settings, await cursor.fetchall(), where=str(address))
        except BaseException:
            await driver.close()
            raise
        return cls(driver, generation=generation)

    def __init__(self, driver: "psycopg.AsyncConnection[Row]", *, generation: int) -> None:
        self.driver = driver
        self.generation = generation
        self._cursor = driver.cursor(binary=True)

    def is_ready(self) -> bool:
        return self.driver.info.transaction_status is psycopg.pq.TransactionStatus.IDLE

    async def close(self) -> None:
        await self.driver.close()

    async def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        await self._cursor.execute(statement.text, statement.bind(values))
        return await self._cursor.fetchall()


async def _with_answers(query: Query[T], reader: _Reader) -> T:
    """The value of `query`, a plain function of what it reads: it is run as far as to rows that are not there yet, and then,
    when they are, again from its start. So one way of writing queries serves a database that answers at once and one that does
    not."""
    answers: list[Sequence[Row]] = []
    while True:
        try:
            return query(_Answered(answers))
        except _Asked as asked:
            answers.append(await reader.rows(asked.statement, asked.values))


class _Asked(BaseException):
    """Passes through every handler of a query."""

    def __init__(self, statement: Statement, values: Mapping[str, Value]) -> None:
        super().__init__()
        self.statement = statement
        self.values = values


class _Answered:
    """The connection that a query sees. It reads only."""

    def __init__(self, answers: Sequence[Sequence[Row]]) -> None:
        self._left = iter(answers)

    def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        for rows in self._left:
            return rows
        raise _Asked(statement, values)

    def change(self, statement: Statement, values: Mapping[str, Value]) -> int:  # noqa: ARG002 - the port's
        raise Internal("a query changes nothing")
