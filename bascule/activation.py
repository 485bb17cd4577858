"""Listening sockets, our own or the service manager's (sd_listen_fds(3)).

systemd listens before a part starts, and while it is restarted: who connects
meanwhile waits instead of failing. Without systemd a part listens by itself.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from bascule.endpoint import address_of

_FIRST = 3  # SD_LISTEN_FDS_START


def listening(endpoint: str) -> socket.socket:
    """A stream socket at ``unix:/path`` or ``inet:host:port`` that takes connections.

    Who may reach a Unix socket of our own is decided by its directory.

    Raises:
        OSError: nobody can listen there.
    """
    address = address_of(endpoint)
    inherited = _inherited().get(str(address) if isinstance(address, Path) else address)
    if inherited is not None:
        return inherited
    if isinstance(address, Path):
        address.unlink(missing_ok=True)
        own = socket.socket(socket.AF_UNIX)
        own.bind(str(address))
        address.chmod(0o666)
        own.listen(socket.SOMAXCONN)
        return own
    return socket.create_server(address, backlog=socket.SOMAXCONN)


@cache
def _inherited() -> dict[object, socket.socket]:
    """The service manager's sockets, by their address."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    passed = [socket.socket(fileno=_FIRST + number) for number in range(int(os.environ.get("LISTEN_FDS", "0")))]
    for each in passed:
        each.set_inheritable(False)
    return {each.getsockname(): each for each in passed}
