"""Connections to PostgreSQL, and its refusals as our errors.

Every connection is in autocommit mode: an act is one function call, hence one
transaction, and a waiting daemon never holds a lock that an upgrade needs.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from bascule.errors import BasculeError, DatabaseUnavailable, Refused

Connection = psycopg.Connection[TupleRow]
AsyncConnection = psycopg.AsyncConnection[TupleRow]

#: Seconds that a program of which somebody waits for an answer waits for the database.
PATIENCE = 10.0


def translated(error: psycopg.Error) -> BasculeError:
    """What an error of the database means to an operator."""
    if error.sqlstate is not None and error.sqlstate.startswith("BA"):
        hint = error.diag.message_hint or ""
        return Refused(error.diag.message_primary or "refused", code=error.sqlstate, hint=hint)
    if error.sqlstate is None and "session is read-only" in str(error):  # libpq's, for target_session_attrs
        return DatabaseUnavailable(
            "the database takes no changes: it is a standby, or set to read-only",
            hint="Name the primary in database, or all hosts of the cluster: libpq finds the primary among them.",
        )
    away = error.sqlstate is None or error.sqlstate[:2] in {"08", "53", "57"}  # PostgreSQL manual, appendix A
    if isinstance(error, psycopg.OperationalError) and away:
        return DatabaseUnavailable(
            f"the database does not answer: {' '.join(str(error).split())}",
            hint="Is PostgreSQL running? Nothing was changed.",
        )
    return BasculeError(
        f"the database refuses: {error.diag.message_primary or error}",
        hint="See PostgreSQL's log. Nothing was changed. Is the schema this version's? bascule db status says.",
    )


@contextmanager
def connect(dsn: str) -> Iterator[Connection]:
    """A connection for the ``with`` block.

    Raises:
        Refused, DatabaseUnavailable: from any statement in the block.
    """
    try:
        with psycopg.connect(dsn, autocommit=True, connect_timeout=10) as connection:
            yield connection
    except psycopg.Error as error:
        raise translated(error) from error


class Pool:
    """Connections that are kept, for programs that ask often; threads may share it."""

    def __init__(self, dsn: str, size: int) -> None:
        """At most ``size`` connections (libpq's connection string). That the database is away now is no error yet."""
        self._overdue: dict[Connection, float] = {}
        self._pool = ConnectionPool(
            dsn,
            min_size=1,
            max_size=size,
            timeout=PATIENCE,
            kwargs={"autocommit": True, "connect_timeout": 10},
            check=self._check,
            open=True,
        )
        threading.Thread(target=self._cut_what_hangs, name="database-watch", daemon=True).start()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """:func:`connect`, but for a connection that is there already, and for PATIENCE seconds at most."""
        try:
            with self._pool.connection() as connection, self._watched(connection):
                yield connection
        except PoolTimeout as error:
            raise DatabaseUnavailable(
                "the database does not answer", hint="Is PostgreSQL running? Nothing was changed."
            ) from error
        except psycopg.Error as error:
            raise translated(error) from error

    def _check(self, connection: Connection) -> None:
        """Whether a connection that was kept is still good: the server is asked only if it has said something.

        Raises:
            psycopg.Error: it is not; the pool takes another one.
        """
        waiting = select.poll()
        waiting.register(connection.fileno(), select.POLLIN)
        if waiting.poll(0):  # a farewell, as a rule
            with self._watched(connection):
                ConnectionPool.check_connection(connection)

    @contextmanager
    def _watched(self, connection: Connection) -> Iterator[None]:
        """A server that has stopped without a word, or is behind a network that swallows all, would be waited for."""
        self._overdue[connection] = time.monotonic() + PATIENCE
        try:
            yield
        finally:
            self._overdue.pop(connection, None)

    def _cut_what_hangs(self) -> None:
        """End the conversation with a server that is silent for too long: whoever waits is told by libpq."""
        while True:
            time.sleep(1)
            now = time.monotonic()
            for connection, deadline in list(self._overdue.items()):
                if now > deadline:
                    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as wire:
                        wire.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def connect_async(dsn: str) -> AsyncIterator[AsyncConnection]:
    """:func:`connect` for asyncio."""
    try:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, connect_timeout=10) as connection:
            yield connection
    except psycopg.Error as error:
        raise translated(error) from error


def value(connection: Connection, query: str, *parameters: object) -> Any:
    """The first column of the first row, None if there is no row."""
    row = connection.execute(query.encode(), parameters).fetchone()
    return None if row is None else row[0]
