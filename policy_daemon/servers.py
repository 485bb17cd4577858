"""Postfix's two protocols, and the next hop of held mail, on asyncio streams.

A client that does not keep to the protocol is dropped; Postfix then tries again
and at last answers the mail with 4xx.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bascule import netstring
from bascule.policy_daemon import metrics
from bascule.policy_daemon.routes import Routes
from bascule.serving import BadRequest, Handler, read

MAX_POLICY_REQUEST = 65_536  # bytes; SMTPD_POLICY_README sends about 1 kB


def socketmap(routes: Routes) -> Handler:
    """socketmap_table(5): a netstring ``map key`` is answered by a netstring ``status text``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = netstring.Parser()
        while data := await read(reader, pending=parser.pending):
            for request in parser.feed(data):
                map_name, space, key = request.decode(errors="surrogateescape").partition(" ")
                if not space:
                    raise BadRequest("a request is a map's name, a space and a key")
                reply = routes.lookup(map_name, key)
                metrics.LOOKUPS.labels(map_name if map_name in routes.maps else "unknown", reply.status).inc()
                writer.write(netstring.encode(str(reply).encode(errors="surrogateescape")))
            await writer.drain()

    return handle


def policy(answer: Callable[[dict[str, str]], str]) -> Handler:
    """SMTPD_POLICY_README: lines ``name=value`` up to an empty line are answered by ``action=...``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        while data := await read(reader, pending=bool(buffer)):
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
    for line in request.split("\n"):
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
