"""What our sockets do with clients that go away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import uvloop

from bascule.serving import Server, read, write


def test_a_client_that_does_not_wait_for_its_answer_is_no_error(tmp_path: Path) -> None:
    """As a hook whose time is over, while the part was stopped: with uvloop a write is then refused otherwise."""
    raised: list[object] = []
    gone = asyncio.Event()
    told: list[type[BaseException]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader, pending=True)
        writer.transport.abort()  # what a lost connection leaves behind
        try:
            write(writer, b"answer")
        except BaseException as error:
            told.append(type(error))
            raise
        finally:
            gone.set()

    async def talk() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
        server = Server(f"unix:{tmp_path}/s", handler)
        await server.start()
        _, writer = await asyncio.open_unix_connection(f"{tmp_path}/s")
        writer.write(b"question")
        async with asyncio.timeout(10):
            await gone.wait()
        writer.close()
        await server.stop()

    uvloop.run(talk())
    assert told == [ConnectionResetError]
    assert raised == []
