"""Where recipients' mail goes, asked of the policy daemon as Postfix asks it (socketmap_table(5))."""

from __future__ import annotations

from collections.abc import Sequence

from bascule import netstring
from bascule.endpoint import connected

TIMEOUT = 2.0  # seconds; it answers from memory

#: ``unknown``: the policy daemon does not answer. None: the recipient is of no domain of ours.
Route = str | None


class Routes:
    """Asks at ``endpoint``, ``unix:/path`` or ``inet:host:port``."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def of(self, recipients: Sequence[str]) -> list[Route]:
        """``local``, ``legacy``, ``held`` or ``unknown`` for each recipient, in order; None if it is not ours."""
        try:
            return self._ask(recipients)
        except (OSError, netstring.NetstringError):
            return ["unknown"] * len(recipients)

    def _ask(self, recipients: Sequence[str]) -> list[Route]:
        parser = netstring.Parser()
        replies: list[bytes] = []
        with connected(self._endpoint, TIMEOUT) as connection:
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
