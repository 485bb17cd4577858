"""Postfix's two protocols, and the next hop of held mail.

Postfix asks several times for each message and waits each time, so this is
the one place where it counts how fast an answer is given: a request is answered
in the callback that brings its last byte. A client that does not keep to the
protocol is dropped; Postfix then tries again and at last answers the mail with
4xx.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Protocol, cast

from bascule import log, netstring
from bascule.activation import listening
from bascule.policy_daemon import metrics
from bascule.policy_daemon.routes import Routes
from bascule.serving import IDLE_TIMEOUT, REQUEST_TIMEOUT, BadRequest

MAX_POLICY_REQUEST = 65_536  # bytes; SMTPD_POLICY_README sends about 1 kB


class Conversation(Protocol):
    """The requests of one client, in pieces as they come."""

    @property
    def pending(self) -> bool:
        """Whether a request has begun and is not complete."""

    def answer(self, data: bytes) -> bytes:
        """The replies to what is complete now.

        Raises:
            BadRequest: the client does not keep to the protocol.
        """


class Socketmap:
    """socketmap_table(5): a netstring ``map key`` is answered by a netstring ``status text``."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._parser = netstring.Parser()

    @property
    def pending(self) -> bool:
        return self._parser.pending

    def answer(self, data: bytes) -> bytes:
        return b"".join(self._reply(request) for request in self._parser.feed(data))

    def _reply(self, request: bytes) -> bytes:
        map_name, space, key = request.decode(errors="surrogateescape").partition(" ")
        if not space:
            raise BadRequest("a request is a map's name, a space and a key")
        reply = self._routes.lookup(map_name, key)
        metrics.LOOKUPS.labels(map_name if map_name in self._routes.maps else "unknown", reply.status).inc()
        return netstring.encode(str(reply).encode(errors="surrogateescape"))


class Policy:
    """SMTPD_POLICY_README: lines ``name=value`` up to an empty line are answered by ``action=...``."""

    def __init__(self, decide: Callable[[dict[str, str]], str]) -> None:
        self._decide = decide
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        return bool(self._buffer)

    def answer(self, data: bytes) -> bytes:
        self._buffer += data
        *requests, rest = self._buffer.split(b"\n\n")
        if len(rest) > MAX_POLICY_REQUEST:
            raise BadRequest(f"a policy request of more than {MAX_POLICY_REQUEST} bytes")
        self._buffer = rest
        return b"".join(self._reply(bytes(request)) for request in requests)

    def _reply(self, request: bytes) -> bytes:
        action = self._decide(_attributes(request.decode(errors="surrogateescape")))
        return f"action={action}\n\n".encode(errors="surrogateescape")


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


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: PromptServer, conversation: Conversation) -> None:
        self._server = server
        self._conversation = conversation
        self._heard = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # of a stream socket
        self._server.clients.add(self)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        try:
            reply = self._conversation.answer(data)
        except BadRequest as error:
            self._drop(str(error))
            return
        if reply:
            self.transport.write(reply)

    def pause_writing(self) -> None:
        """It asks and does not read: it is not listened to until it does."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        self._server.clients.discard(self)

    def look_at(self, now: float) -> None:
        """Drop a client that is silent for too long."""
        limit = REQUEST_TIMEOUT if self._conversation.pending else IDLE_TIMEOUT
        if now - self._heard > limit:
            self._drop("silent for too long")

    def _drop(self, reason: str) -> None:
        log.get().warning("client dropped", endpoint=self._server.endpoint, reason=reason)
        self.transport.close()


class PromptServer:
    """A listening socket whose clients are answered at once; ``converse`` begins the conversation of each."""

    def __init__(self, endpoint: str, converse: Callable[[], Conversation]) -> None:
        self.endpoint = endpoint
        self._converse = converse
        self.clients: set[_Client] = set()

    async def start(self) -> None:
        """Listen, as :func:`bascule.activation.listening` does."""
        loop = asyncio.get_running_loop()

        def connected() -> _Client:
            return _Client(self, self._converse())

        sock = listening(self.endpoint)
        create = loop.create_unix_server if sock.family is socket.AF_UNIX else loop.create_server
        self._server: asyncio.Server = await create(connected, sock=sock)
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REQUEST_TIMEOUT / 4)
            now = time.monotonic()
            for client in list(self.clients):
                client.look_at(now)

    async def stop(self) -> None:
        """Take no new client. What was asked wholly is answered already; answers that are under way are sent."""
        self._server.close()
        self._watching.cancel()
        for client in list(self.clients):
            client.transport.close()
        await asyncio.sleep(0)
