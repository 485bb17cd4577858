"""A server that speaks by lines as a test has it, for what no real POP3 or ManageSieve server can be made to do."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress


class Client:
    """The other end, as the server sees it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def line(self) -> bytes:
        """What it says next, without the end of the line; nothing when it has gone."""
        return self._file.readline().rstrip(b"\r\n")

    def exactly(self, size: int) -> bytes:
        return self._file.read(size)

    def say(self, *lines: bytes) -> None:
        self._connection.sendall(b"".join(line + b"\r\n" for line in lines))

    def secure(self, context: ssl.SSLContext) -> None:
        """Go on with TLS."""
        self._connection = context.wrap_socket(self._connection, server_side=True)
        self._file = self._connection.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._connection.close()

    def raw(self, data: bytes) -> None:
        self._connection.sendall(data)


@contextmanager
def serving(script: Callable[[Client], None]) -> Iterator[int]:
    """A port of 127.0.0.1 at which each client is served by ``script``, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        open_now: list[socket.socket] = []

        def serve() -> None:
            with suppress(OSError):  # it is closed at the end, or the client has left
                while True:
                    connection, _ = listener.accept()
                    open_now.append(connection)
                    client = Client(connection)
                    with closing(client), suppress(OSError):
                        script(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for connection in open_now:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)
