"""The bytes of an IMAP connection, with limits for whoever is at its other end.

Here, and nowhere else, are bytes of the network read and written: what goes
wrong there becomes the :class:`~bascule.errors.ServerUnavailable` of the peer.
An OSError that comes from elsewhere is thus about a disk.

A peer may be silent only so long, and has a budget of waiting for each
command. Every byte that it sends adds to the budget, so that a large body at a
reasonable rate may take hours, and a byte a second may not. Only the time that
is spent waiting for the peer counts, not what we do ourselves meanwhile.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from bascule.errors import LocalUnavailable, ServerUnavailable
from bascule.imap.responses import printable

PIECE = 1 << 18  # bytes of a body that are in memory at a time
CHUNK = 1 << 16  # bytes that are asked of the network at a time
MAX_LINE = 1 << 20  # bytes of one line; the UIDs of a SEARCH response are one
FLOOR = 2_000  # bytes a second, below which a peer uses up its budget
PATIENCE = 10  # times the silence that it may keep: the budget for one command

T = TypeVar("T")


class Peer:
    """Who is at the other end, in words for an operator, and the errors that speak of it."""

    #: As it is put into a sentence.
    name = "the IMAP server"

    def unavailable(self, message: str, *, hint: str = "") -> ServerUnavailable:
        """The error that the peer cannot be used now."""
        return ServerUnavailable(message, hint=hint)

    def busy(self, message: str, *, code: str, wait: float) -> ServerUnavailable:  # noqa: ARG002
        """The error that the peer says itself that it cannot now; ``wait`` is in seconds, 0 for not said."""
        return self.unavailable(message)

    def lost(self, error: OSError) -> ServerUnavailable:
        """The error that the connection failed."""
        reason = "does not answer in time" if isinstance(error, TimeoutError) else f"is lost: {error.strerror or error}"
        return self.unavailable(f"{self.name} {reason}")

    def closed(self) -> ServerUnavailable:
        """The error that the peer closed the connection."""
        return self.unavailable(f"{self.name} closed the connection")

    def violates(self, said: bytes | str) -> ServerUnavailable:
        """The error that what it says is not IMAP."""
        return self.unavailable(f"{self.name} does not speak IMAP: {printable(said, 80)!r}")

    def too_much(self, what: str) -> ServerUnavailable:
        """The error that it sends more than anybody could need."""
        return self.unavailable(f"{self.name} sends {what}")


class DovecotHere(Peer):
    """This host's own Dovecot."""

    name = "Dovecot here"

    def unavailable(self, message: str, *, hint: str = "") -> LocalUnavailable:
        return LocalUnavailable(message, hint=hint or "See Dovecot's log on this host.")


class Stream(Protocol):
    """A connected stream socket."""

    def recv(self, size: int, /) -> bytes: ...
    def send(self, data: memoryview, /) -> int: ...
    def settimeout(self, seconds: float, /) -> None: ...
    def close(self) -> None: ...


class Wire:
    """A connected stream socket, used by one thread at a time.

    ``silence``: for how many seconds the peer may send and take nothing.
    ``under_way``: how many commands are not yet answered.
    """

    def __init__(self, connection: Stream, peer: Peer, *, silence: float) -> None:
        self.socket = connection
        self.peer = peer
        self.silence = silence
        self.under_way = 0
        self._buffer = bytearray()
        self._read_from = 0  # where in the buffer what was not yet read begins
        self._budget = self._left = silence * PATIENCE

    def allow(self, seconds: float | None = None) -> None:
        """From now on the peer has so many seconds of waiting; those for one command, if it is not said how many."""
        self._budget = self._left = self.silence * PATIENCE if seconds is None else seconds

    def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Secure the connection (RFC 3501 section 6.2.1).

        Raises:
            ServerUnavailable: it fails, or the peer sent something ahead that would be taken for secured.
        """
        if self._read_from < len(self._buffer):
            raise self.peer.violates(b"text behind the answer to STARTTLS: " + bytes(self._buffer[self._read_from :]))
        plain = self.socket
        if not isinstance(plain, socket.socket):
            raise TypeError("only a socket can be secured")
        self.socket = self._timed(lambda: context.wrap_socket(plain, server_hostname=host))

    def send(self, data: bytes) -> None:
        """
        Raises:
            ServerUnavailable: the peer does not take it.
        """
        rest = memoryview(data)
        while rest:
            sent = self._timed(partial(self.socket.send, rest[:CHUNK]))
            self._left = min(self._left + sent / FLOOR, self._budget)
            rest = rest[sent:]

    def readline(self) -> bytes:
        """The next line, with its end.

        Raises:
            ServerUnavailable: there is none, or it is too long.
        """
        searched = self._read_from
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched - self._read_from > MAX_LINE:
                raise self.peer.too_much(f"a line of more than {MAX_LINE} bytes")
            read = self._read_from
            self._fill()
            searched -= read - self._read_from
        line = bytes(self._buffer[self._read_from : end + 1])
        self._read_from = end + 1
        return line

    def read(self, size: int) -> bytes:
        """The next bytes: all ``size``, or a :data:`PIECE`.

        Raises:
            ServerUnavailable
        """
        size = min(size, PIECE)
        parts = [bytes(self._buffer[self._read_from : self._read_from + size])]
        self._read_from += len(parts[0])
        size -= len(parts[0])
        while size > 0:
            parts.append(self._receive(min(size, CHUNK)))
            size -= len(parts[-1])
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def close(self) -> None:
        """End the connection, without a word."""
        try:
            self.socket.close()
        except OSError:
            return  # it was lost before

    def _fill(self) -> None:
        """Receive more, and forget what was read."""
        if self._read_from:
            del self._buffer[: self._read_from]
            self._read_from = 0
        self._buffer += self._receive(CHUNK)

    def _receive(self, size: int) -> bytes:
        data = self._timed(lambda: self.socket.recv(size))
        if not data:
            raise self.peer.closed()
        self._left = min(self._left + len(data) / FLOOR, self._budget)
        return data

    def _timed(self, work: Callable[[], T]) -> T:
        """Do what may wait for the peer, within its budget."""
        began = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError("the peer is too slow")
            self.socket.settimeout(min(self.silence, self._left))
            return work()
        except OSError as error:
            self.close()  # so that a server that counts sessions counts this one no more
            raise self.peer.lost(error) from error
        finally:
            self._left -= time.monotonic() - began
