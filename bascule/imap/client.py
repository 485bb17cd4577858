"""imapclient on a connection of ours, for what it does that is not read or written here.

imaplib reads and writes through methods that are made to be overridden, so
every limit and every error of the wire holds for it, too.
"""

from __future__ import annotations

import imaplib

from imapclient import IMAPClient

from bascule.imap.pipeline import MAX_RESPONSE, Connection
from bascule.imap.responses import Malformed, announced


class _Imaplib(imaplib.IMAP4):
    """imaplib on a wire; what it reads first is a greeting that says what is so."""

    def __init__(self, connection: Connection, *, logged_in: bool) -> None:
        self._wire = connection.pipeline.wire
        self._greeting = [b"* PREAUTH ready\r\n" if logged_in else b"* OK ready\r\n"]
        self._logged_in = logged_in
        super().__init__()

    def open(self, host: str = "", port: int = 143, timeout: float | None = None) -> None:  # noqa: ARG002
        self.host, self.port = host, port
        self.sock = self._wire.socket  # type: ignore[assignment]

    def read(self, size: int) -> bytes:
        if size > MAX_RESPONSE:
            raise self._wire.peer.too_much(f"{size} bytes that were not asked for")
        parts = []
        while size > 0:
            parts.append(self._wire.read(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def readline(self) -> bytes:
        if self._greeting:
            return self._greeting.pop()
        line = self._wire.readline()
        try:
            announced(line.rstrip(b"\r\n"))
        except Malformed as error:  # imaplib would take the number as it is
            raise self._wire.peer.violates(line) from error
        return line

    def send(self, data: bytes) -> None:  # type: ignore[override]
        if self._logged_in:
            self._wire.allow()
        self._wire.send(data)

    def shutdown(self) -> None:
        self._wire.close()


class _Client(IMAPClient):  # type: ignore[misc]
    def __init__(self, connection: Connection, host: str, *, logged_in: bool) -> None:
        self._connection = connection
        self._logged_in = logged_in
        super().__init__(host, ssl=False)

    def _create_IMAP4(self) -> _Imaplib:  # noqa: N802 (imapclient's own name)
        return _Imaplib(self._connection, logged_in=self._logged_in)


def on(connection: Connection, host: str, *, logged_in: bool) -> IMAPClient:
    """A client on a connection on which nothing is under way."""
    made = _Client(connection, host, logged_in=logged_in)
    made.normalise_times = False
    made.folder_encode = False
    return made
