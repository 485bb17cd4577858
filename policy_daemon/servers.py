"""Postfix's protocols: socketmap, policy, and LMTP for held mail and barriers.

Postfix asks several times for each message and waits each time, so this is
the one place where it counts how fast an answer is given: a request is answered
in the callback that brings its last byte, unless the legacy server must be
asked first. A client that does not keep to the protocol is dropped; Postfix then
tries again and at last answers the mail with 4xx.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
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

    def answer(self, data: bytes) -> bytes | Awaitable[bytes]:
        """The replies to what is complete now; if they take time, the client is not listened to meanwhile.

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

    def __init__(self, decide: Callable[[dict[str, str]], str | Awaitable[str]]) -> None:
        self._decide = decide
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        return bool(self._buffer)

    def answer(self, data: bytes) -> bytes | Awaitable[bytes]:
        self._buffer += data
        *requests, rest = self._buffer.split(b"\n\n")
        if len(rest) > MAX_POLICY_REQUEST:
            raise BadRequest(f"a policy request of more than {MAX_POLICY_REQUEST} bytes")
        self._buffer = rest
        actions = [self._decide(_attributes(each.decode(errors="surrogateescape"))) for each in requests]
        ready = [each for each in actions if isinstance(each, str)]
        if len(ready) == len(actions):
            return b"".join(map(_action, ready))
        return self._later(actions)

    async def _later(self, actions: list[str | Awaitable[str]]) -> bytes:
        return b"".join([_action(each if isinstance(each, str) else await each) for each in actions])


def _action(action: str) -> bytes:
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


HELD = b"450 4.2.1 bascule holds this mail while the mailbox is moved; it is delivered in a moment\r\n"
_OK = b"250 2.0.0 ok\r\n"


class Lmtp:
    """LMTP (RFC 2033), the next hop of held mail and of barriers. Held mail is put off at RCPT TO, always.

    ``arrived`` is called with each recipient of a complete message that ``takes`` let in.
    """

    def __init__(self, takes: Callable[[str], bool], arrived: Callable[[str], None]) -> None:
        self._takes = takes
        self._arrived = arrived

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until QUIT or its end."""
        recipients: list[str] = []
        writer.write(b"220 bascule\r\n")
        while line := await _line(reader):
            verb = line[:4].upper()
            if verb == b"LHLO":
                writer.write(b"250 bascule\r\n")
            elif verb == b"RCPT":
                recipient = line.partition(b"<")[2].rpartition(b">")[0].decode(errors="replace")
                takes = self._takes(recipient)
                if takes:
                    recipients.append(recipient)
                writer.write(_OK if takes else HELD)
            elif verb == b"DATA" and recipients:
                writer.write(b"354 go on\r\n")
                await writer.drain()
                while (text := await _line(reader)) != b".\r\n":
                    if not text:
                        return  # it broke off: nothing has arrived
                for each in recipients:
                    self._arrived(each)
                    writer.write(_OK)
                recipients = []
            elif verb == b"DATA":
                writer.write(b"503 5.5.1 no recipient\r\n")
            elif verb == b"QUIT":
                writer.write(b"221 2.0.0 bye\r\n")
                await writer.drain()
                return
            else:  # MAIL, RSET, NOOP
                recipients = []
                writer.write(_OK)
            await writer.drain()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(IDLE_TIMEOUT):
            return await reader.readline()
    except ValueError as error:
        raise BadRequest("a line that has no end") from error


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: PromptServer, conversation: Conversation) -> None:
        self._server = server
        self._conversation = conversation
        self._heard = time.monotonic()
        self.answering: asyncio.Future[bytes] | None = None

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
        if not isinstance(reply, bytes):
            # Not listened to meanwhile: Postfix waits for this answer before it asks again.
            self.transport.pause_reading()
            self.answering = asyncio.ensure_future(reply)
            self.answering.add_done_callback(self._answered)
        elif reply:
            self.transport.write(reply)

    def _answered(self, answering: asyncio.Future[bytes]) -> None:
        self.answering = None
        if answering.cancelled() or self.transport.is_closing():
            return
        error = answering.exception()
        if error is not None:
            log.get().error("a request could not be answered", endpoint=self._server.endpoint, exc_info=error)
            self.transport.close()
            return
        self._heard = time.monotonic()
        self.transport.write(answering.result())
        self.transport.resume_reading()

    def pause_writing(self) -> None:
        """It asks and does not read: it is not listened to until it does."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.answering is None:
            self.transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        self._server.clients.discard(self)
        if self.answering is not None:
            self.answering.cancel()

    def look_at(self, now: float) -> None:
        """Drop a client that is silent for too long."""
        if self.answering is not None:
            return  # it is we who are silent
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
        """Take no new client; what was asked wholly is answered."""
        self._server.close()
        self._watching.cancel()
        if answering := [client.answering for client in self.clients if client.answering is not None]:
            await asyncio.wait(answering, timeout=REQUEST_TIMEOUT)
            await asyncio.sleep(0)  # they are written by callbacks
        for client in list(self.clients):
            client.transport.close()
        await asyncio.sleep(0)
