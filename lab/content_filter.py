"""A content filter after the queue, on a host of the lab: in by one port, a header more, back by another.

Run there by the system's own Python, with nothing of bascule's. SMTP is handed on as
it is spoken, so that what Postfix says of a message behind the filter it says to
Postfix before it.
"""

from __future__ import annotations

import asyncio

HERE, BACK = 10024, 10025
HEADER = b"X-Filtered: by the shop\r\n"
UNHEARD = b"250-STARTTLS\r\n"  # of TLS it understands nothing
LONGEST = 2**20  # bytes of a line


class Session:
    """One connection of Postfix's, and ours to the port that takes mail back."""

    def __init__(self) -> None:
        self._begins = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on in both directions until either side has enough."""
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", BACK, limit=LONGEST)
        try:
            ways = {
                asyncio.create_task(self._answers(back_reader, writer)),
                asyncio.create_task(self._commands(reader, back_writer)),
            }
            _, waiting = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for each in waiting:
                each.cancel()
        finally:
            writer.close()
            back_writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            self._begins = line.startswith(b"354")  # nothing is answered before a text is over
            if line != UNHEARD:
                writer.write(line)
            await writer.drain()

    async def _commands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if self._begins:
                self._begins = False
                writer.write(HEADER)
            writer.write(line)
            await writer.drain()


async def main() -> None:
    """Serve for ever."""
    server = await asyncio.start_server(
        lambda reader, writer: Session().serve(reader, writer), "127.0.0.1", HERE, limit=LONGEST
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
