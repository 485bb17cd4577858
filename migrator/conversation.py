"""A conversation by lines with a server that may be slow, endless or hostile: POP3 and ManageSieve.

poplib waits anew for every read and keeps whatever it is sent; nothing else here does.
"""

from __future__ import annotations

import socket
import ssl
import time
from types import TracebackType

from bascule.errors import LegacyUnavailable
from bascule.legacy import Service, Trust, plainly

PIECE = 1 << 16  # bytes


class Conversation:
    """A connection to ``service`` of ``host``; use it in a ``with`` statement.

    It ends ``seconds`` after its beginning, whatever the server does, and after
    ``most`` bytes from the server. TLS from the first byte is made here, STARTTLS
    by :meth:`secure`, after the protocol's own command.

    Every method raises LegacyUnavailable, in plain words, when the connection
    fails or comes to its end.
    """

    def __init__(self, name: str, host: str, service: Service, trust: Trust, *, seconds: float, most: int) -> None:
        self._name, self._host, self._port, self._trust = name, host, service.port, trust
        self._deadline = time.monotonic() + seconds
        self._left = most
        self._buffer = bytearray()
        try:
            self._socket = socket.create_connection((host, service.port), timeout=self._time_left())
        except OSError as error:
            raise self._unavailable(plainly(error, host, service.port)) from error
        if service.tls == "implicit":
            self.secure()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def secure(self) -> None:
        """Go on with TLS. What came before it in clear is not taken for what comes after it (CVE-2011-0411)."""
        if self._buffer:
            self._socket.close()
            raise self._unavailable(f"{self._host}:{self._port} sends more before TLS than it was asked for")
        try:
            self._socket.settimeout(self._time_left())
            self._socket = self._trust.context().wrap_socket(self._socket, server_hostname=self._host)
        except (OSError, ssl.SSLError) as error:
            self._socket.close()
            raise self._unavailable(plainly(error, self._host, self._port)) from error

    def send(self, data: bytes) -> None:
        try:
            self._socket.settimeout(self._time_left())
            self._socket.sendall(data)
        except OSError as error:
            raise self._unavailable(plainly(error, self._host, self._port)) from error

    def line(self, limit: int) -> bytes:
        """The next line without its end; what it has beyond ``limit`` bytes is dropped."""
        kept = bytearray()
        while (end := self._buffer.find(b"\n")) < 0:
            kept += self._buffer[: max(0, limit + 1 - len(kept))]  # and one, for a CR
            self._buffer.clear()
            self._receive()
        kept += self._buffer[:end]
        del self._buffer[: end + 1]
        return bytes(kept).removesuffix(b"\r")[:limit]

    def exactly(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        while len(self._buffer) < size:
            self._receive()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _receive(self) -> None:
        try:
            self._socket.settimeout(self._time_left())
            piece = self._socket.recv(PIECE)
        except OSError as error:
            raise self._unavailable(plainly(error, self._host, self._port)) from error
        if not piece:
            raise self._unavailable(f"{self._host}:{self._port} closed the connection")
        self._left -= len(piece)
        if self._left < 0:
            raise self._unavailable(f"{self._host}:{self._port} sends without end")
        self._buffer += piece

    def _time_left(self) -> float:
        """Seconds that the next step may take: until the server must answer, or until the end of the conversation."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._unavailable(f"{self._host}:{self._port} is too slow")
        return min(left, self._trust.timeout)

    def _unavailable(self, reason: str) -> LegacyUnavailable:
        return LegacyUnavailable(f"{self._name}: {reason}")
