"""Where somebody listens: ``unix:/path`` and ``inet:host:port``, as Postfix writes them, or ``host:port``."""

from __future__ import annotations

import socket
from pathlib import Path


def address_of(endpoint: str) -> Path | tuple[str, int]:
    """The path of a Unix socket, or host and port."""
    kind, _, rest = endpoint.partition(":")
    if kind == "unix":
        return Path(rest)
    return host_and_port(rest)


def host_and_port(listen: str) -> tuple[str, int]:
    """The two parts of ``host:port``."""
    host, _, port = listen.rpartition(":")
    return host, int(port)


def connected(endpoint: str, timeout: float | None = None) -> socket.socket:
    """A connection, to be closed by the caller; ``timeout`` (seconds) holds for whatever is done with it.

    Raises:
        OSError: nobody listens there.
    """
    address = address_of(endpoint)
    connection = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
    try:
        connection.settimeout(timeout)
        connection.connect(str(address) if isinstance(address, Path) else address)
    except BaseException:
        connection.close()
        raise
    return connection
