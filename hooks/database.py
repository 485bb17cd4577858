"""Questions to PostgreSQL for which no login waits longer than a moment."""

from __future__ import annotations

import asyncio

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bascule.errors import DatabaseUnavailable

PATIENCE = 1.0  # seconds
AT_ONCE = 4  # questions; when so many wait for a database that hangs, further ones fail at once

Pool = AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]]


class Database:
    def __init__(self, dsn: str) -> None:
        self._pool = Pool(
            dsn,
            min_size=1,
            max_size=AT_ONCE,
            kwargs={"autocommit": True, "connect_timeout": 10},
            timeout=10,
            open=False,
        )
        self._asked: set[asyncio.Task[list[TupleRow]]] = set()

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        """End, however the database is."""
        for task in self._asked:
            task.cancel()
        await self._pool.close(timeout=2)

    async def ask(self, query: str, *parameters: object, patience: float = PATIENCE) -> list[TupleRow]:
        """The rows of the answer.

        Raises:
            DatabaseUnavailable: there is none in time. It may come later: a
                question that was asked is not taken back, for psycopg would wait
                for the database to agree.
        """
        if len(self._asked) >= AT_ONCE:
            raise DatabaseUnavailable("the database does not answer, and others wait for it already")
        task = asyncio.create_task(self._rows(query, parameters))
        self._asked.add(task)
        task.add_done_callback(self._answered)
        done, _ = await asyncio.wait([task], timeout=patience)
        if not done:
            raise DatabaseUnavailable(f"the database does not answer in {patience:g} s")
        try:
            return task.result()
        except (psycopg.Error, PoolTimeout) as error:
            raise DatabaseUnavailable(f"the database does not answer: {type(error).__name__}") from error

    def _answered(self, task: asyncio.Task[list[TupleRow]]) -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked has heard it, or has gone

    async def _rows(self, query: str, parameters: tuple[object, ...]) -> list[TupleRow]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query.encode(), parameters)
            return await cursor.fetchall() if cursor.description else []
