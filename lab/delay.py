"""A round trip: a TCP proxy on loopback that holds every byte back for half of it, each way.

It is a process of its own, so that its work is not done on the processor time of who measures.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from types import TracebackType

from bascule.lab.process import LabError

CHUNK = 1 << 18  # bytes


class Delay:
    """Listens on ``port`` and connects to ``target`` on 127.0.0.1; ``round_trip`` is in seconds."""

    def __init__(self, target: int, round_trip: float) -> None:
        self._command = [sys.executable, "-m", "bascule.lab.delay", str(target), str(round_trip)]
        self.port = 0

    def __enter__(self) -> Delay:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._process.stdout is None or not (line := self._process.stdout.readline()):
            raise LabError("the delaying proxy does not start")
        self.port = int(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way: float) -> None:
    """Bytes leave in order, each ``one_way`` seconds after they came; the pipe between holds any number."""
    loop = asyncio.get_running_loop()
    pipe: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def leave() -> None:
        while True:
            due, data = await pipe.get()
            if (early := due - loop.time()) > 0:
                await asyncio.sleep(early)
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    leaving = asyncio.create_task(leave())
    try:
        while data := await reader.read(CHUNK):
            pipe.put_nowait((loop.time() + one_way, data))
        pipe.put_nowait((loop.time() + one_way, b""))
        await leaving
    except ConnectionError:
        leaving.cancel()
        writer.close()


async def _serve(target: int, one_way: float) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target, limit=CHUNK)
        with suppress(ConnectionError):
            await asyncio.gather(_pass(reader, there_writer, one_way), _pass(there_reader, writer, one_way))

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=CHUNK)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2]) / 2))
