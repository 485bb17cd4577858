"""Postfix's two protocols, and the next hop of held mail, on asyncio streams.

A client that sends what it must not, too much of it, or half of it and then
nothing, loses its connection; Postfix then tries again and at last answers the
mail with 4xx.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from bascule import log
from bascule.policy_daemon import netstring
from bascule.policy_daemon.routes import Routes

READ_SIZE = 4096
IDLE_TIMEOUT = 3600.0  # seconds; longer than Postfix keeps an idle connection
REQUEST_TIMEOUT = 10.0  # seconds from the first to the last byte of one request
MAX_POLICY_REQUEST = 65_536  # bytes; SMTPD_POLICY_README sends about 1 kB

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class BadRequest(Exception):
    """The client does not keep to the protocol."""


async def listen(endpoint: str, handler: Handler) -> asyncio.Server:
    """Serve ``unix:/path`` or ``inet:host:port``. A Unix socket may be used by Postfix and its group."""

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (BadRequest, netstring.NetstringError) as error:
            log.get().warning("client dropped", endpoint=endpoint, reason=str(error))
        except (ConnectionError, TimeoutError) as error:
            log.get().info("client gone", endpoint=endpoint, reason=str(error) or type(error).__name__)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    kind, _, rest = endpoint.partition(":")
    if kind == "unix":
        path = Path(rest)
        path.unlink(missing_ok=True)  # noqa: ASYNC240 (once, before anybody is served)
        server = await asyncio.start_unix_server(guarded, path)
        path.chmod(0o666)  # noqa: ASYNC240 (as above); who may reach it is decided by its directory
        return server
    host, _, port = rest.rpartition(":")
    return await asyncio.start_server(guarded, host, int(port))


async def _read(reader: asyncio.StreamReader, *, pending: bool) -> bytes:
    async with asyncio.timeout(REQUEST_TIMEOUT if pending else IDLE_TIMEOUT):
        return await reader.read(READ_SIZE)


def socketmap(routes: Routes) -> Handler:
    """socketmap_table(5): a netstring ``map key`` is answered by a netstring ``status text``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = netstring.Parser()
        while data := await _read(reader, pending=parser.pending):
            for request in parser.feed(data):
                map_name, space, key = request.decode(errors="surrogateescape").partition(" ")
                if not space:
                    raise BadRequest("a request is a map's name, a space and a key")
                reply = str(routes.lookup(map_name, key))
                writer.write(netstring.encode(reply.encode(errors="surrogateescape")))
            await writer.drain()

    return handle


def policy(answer: Callable[[dict[str, str]], str]) -> Handler:
    """SMTPD_POLICY_README: lines ``name=value`` up to an empty line are answered by ``action=...``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        while data := await _read(reader, pending=bool(buffer)):
            buffer += data
            while (end := buffer.find(b"\n\n")) >= 0:
                request = bytes(buffer[:end]).decode(errors="surrogateescape")
                del buffer[: end + 2]
                writer.write(f"action={answer(_attributes(request))}\n\n".encode(errors="surrogateescape"))
            if len(buffer) > MAX_POLICY_REQUEST:
                raise BadRequest(f"a policy request of more than {MAX_POLICY_REQUEST} bytes")
            await writer.drain()

    return handle


def _attributes(request: str) -> dict[str, str]:
    attributes = {}
    for line in request.splitlines():
        name, equals, value = line.partition("=")
        if not equals:
            raise BadRequest("a policy request is made of lines name=value")
        attributes[name] = value
    if attributes.get("request") != "smtpd_access_policy":
        raise BadRequest("the request is not smtpd_access_policy")
    return attributes


async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The next hop of held mail: always come back later (RFC 5321 section 3.8)."""
    writer.write(b"421 4.2.1 bascule holds this mail while the mailbox is moved; it is delivered in a moment\r\n")
    await writer.drain()
