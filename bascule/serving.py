"""Serving on sockets: clients with time limits, and an end in good order.

A client that sends what it must not, too much of it, or half of it and then
nothing, loses its connection. When a server stops, what was asked wholly is
answered first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from bascule import log, readiness
from bascule.activation import listening

READ_SIZE = 4096
IDLE_TIMEOUT = 3600.0  # seconds; longer than Postfix keeps an idle connection
REQUEST_TIMEOUT = 10.0  # seconds from one read of a request to the next
ANSWER_TIMEOUT = 30.0  # seconds that a stopping server gives to what it is answering; a login may wait for a flip

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class BadRequest(Exception):
    """The client does not keep to the protocol."""


async def read(reader: asyncio.StreamReader, *, pending: bool) -> bytes:
    """The next bytes, empty at the end; ``pending`` says that a request has begun.

    Raises:
        TimeoutError: the client is silent for too long.
    """
    async with asyncio.timeout(REQUEST_TIMEOUT if pending else IDLE_TIMEOUT):
        return await reader.read(READ_SIZE)


def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Answer, unless the client has gone meanwhile.

    Raises:
        ConnectionResetError: it has; uvloop's own error would be none of the network's.
    """
    if writer.is_closing():
        raise ConnectionResetError("the client did not wait for the answer")
    writer.write(data)


class Server:
    """One listening socket and its clients."""

    def __init__(self, endpoint: str, handler: Handler) -> None:
        self._endpoint = endpoint
        self._handler = handler
        self._clients: dict[asyncio.Task[None], tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def start(self) -> None:
        """Listen, as :func:`bascule.activation.listening` does."""
        sock = listening(self._endpoint)
        start = asyncio.start_unix_server if sock.family is socket.AF_UNIX else asyncio.start_server
        self._server = await start(self._serve, sock=sock)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a client is served by a task")
        self._clients[task] = (reader, writer)
        try:
            await self._handler(reader, writer)
        except BadRequest as error:
            log.get().warning("client dropped", endpoint=self._endpoint, reason=str(error))
        except (ConnectionError, TimeoutError) as error:
            log.get().info("client gone", endpoint=self._endpoint, reason=str(error) or type(error).__name__)
        finally:
            del self._clients[task]
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def stop(self) -> None:
        """Take no new client, let those be answered that have asked, and end."""
        self._server.close()
        for reader, writer in self._clients.values():
            if not reader.at_eof():
                # The handler reads what has come until now, and then the end.
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # of every transport of a stream
                reader.feed_eof()
        if self._clients:
            _, late = await asyncio.wait(self._clients, timeout=ANSWER_TIMEOUT)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


async def until_told(work: Coroutine[Any, Any, None]) -> None:
    """Serve, with ``work`` in the background, until SIGTERM or SIGINT; another one then ends the process at once.

    Raises:
        Exception: whatever ends ``work``. It must not go on without.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    told, living, working = (asyncio.create_task(each) for each in (_wait(stop), readiness.stay_alive(), work))
    readiness.ready()
    try:
        await asyncio.wait([told, working], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        readiness.stopping()
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        for task in (told, living, working):
            task.cancel()
        await asyncio.gather(told, living, working, return_exceptions=True)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
