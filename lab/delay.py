"""A round trip: a TCP proxy on loopback that holds every byte back for half of it, each way."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

CHUNK = 256 * 1024  # bytes


class Delay:
    """Listens on ``port`` and connects to ``target`` on 127.0.0.1; ``round_trip`` is in seconds."""

    def __init__(self, target: int, round_trip: float) -> None:
        self._target = target
        self._one_way = round_trip / 2
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    async def _start(self) -> int:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0, limit=CHUNK)
        return int(server.sockets[0].getsockname()[1])

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target, limit=CHUNK)
        await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes leave in order, each ``one_way`` seconds after they came; the pipe between holds any number."""
        pipe: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def leave() -> None:
            while True:
                due, data = await pipe.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        leaving = asyncio.create_task(leave())
        try:
            while data := await reader.read(CHUNK):
                pipe.put_nowait((self._loop.time() + self._one_way, data))
            pipe.put_nowait((self._loop.time() + self._one_way, b""))
            await leaving
        except ConnectionError:
            leaving.cancel()
            writer.close()

    def __enter__(self) -> Delay:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
