"""An SMTP session whose end holds nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiosmtplib

FAREWELL = 1.0  # seconds for the reply to QUIT


@asynccontextmanager
async def session(client: aiosmtplib.SMTP) -> AsyncIterator[aiosmtplib.SMTP]:
    """Connected for the ``with`` block. After a failure, and for who is cancelled, there is no farewell: the client's
    own context manager would wait for the reply to QUIT from a server that says nothing."""
    await client.connect()
    try:
        yield client
        with suppress(aiosmtplib.SMTPException, TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await client.quit()
    finally:
        client.close()
