"""Where recipients' mail goes, asked of the policy daemon as Postfix asks it (socketmap_table(5))."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

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
            return [_route(*reply) for reply in self._ask("route", recipients)]
        except (OSError, netstring.NetstringError):
            return ["unknown"] * len(recipients)

    def accepted(self, recipients: Sequence[str]) -> None:
        """Tell of recipients for whom a message was accepted; if nobody listens, it is not counted."""
        if recipients:
            with suppress(OSError, netstring.NetstringError):
                self._ask("accepted", recipients)

    def _ask(self, map_name: str, recipients: Sequence[str]) -> list[tuple[str, str]]:
        parser = netstring.Parser()
        replies: list[bytes] = []
        with connected(self._endpoint, TIMEOUT) as connection:
            requests = [f"{map_name} {recipient}".encode(errors="surrogateescape") for recipient in recipients]
            connection.sendall(b"".join(netstring.encode(request) for request in requests))
            while len(replies) < len(recipients):
                data = connection.recv(65_536)
                if not data:
                    raise ConnectionResetError("the policy daemon ended the conversation")
                replies += parser.feed(data)
        return [(status, text) for status, _, text in (reply.decode().partition(" ") for reply in replies)]


def _route(status: str, text: str) -> Route:
    if status == "OK":
        return text
    return None if status == "NOTFOUND" else "unknown"
