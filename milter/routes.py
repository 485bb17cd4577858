"""Where recipients' mail goes, asked of the policy daemon as Postfix asks it (socketmap_table(5))."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from bascule import netstring

TIMEOUT = 2.0  # seconds; it answers from memory

#: ``unknown``: the policy daemon does not answer. None: the recipient is of no domain of ours.
Route = str | None


class Routes:
    """Asks at ``endpoint``, ``unix:/path`` or ``inet:host:port``."""

    def __init__(self, endpoint: str) -> None:
        kind, _, rest = endpoint.partition(":")
        host, _, port = rest.rpartition(":")
        self._family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        self._address: str | tuple[str, int] = rest if kind == "unix" else (host, int(port))

    def of(self, recipients: Sequence[str]) -> list[Route]:
        """``local``, ``legacy``, ``held`` or ``unknown`` for each recipient, in order; None if it is not ours."""
        try:
            return self._ask(recipients)
        except (OSError, netstring.NetstringError):
            return ["unknown"] * len(recipients)

    def _ask(self, recipients: Sequence[str]) -> list[Route]:
        parser = netstring.Parser()
        replies: list[bytes] = []
        with socket.socket(self._family, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(self._address)
            requests = [f"route {recipient}".encode(errors="surrogateescape") for recipient in recipients]
            connection.sendall(b"".join(netstring.encode(request) for request in requests))
            while len(replies) < len(recipients):
                data = connection.recv(65_536)
                if not data:
                    raise ConnectionResetError("the policy daemon ended the conversation")
                replies += parser.feed(data)
        return [_route(*reply.decode().split(" ", 1)) for reply in replies]


def _route(status: str, text: str) -> Route:
    if status == "OK":
        return text
    return None if status == "NOTFOUND" else "unknown"
