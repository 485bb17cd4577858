"""ARC (RFC 8617): a seal on mail that is relayed, so that the legacy server may trust what was found here.

What is sealed are the Authentication-Results of the milter before ours; without
them there is nothing to vouch for, and no seal.
"""

from __future__ import annotations

import dkim

from bascule import program
from bascule.settings import Arc

MAX_SIZE = 16 * 1024 * 1024  # bytes; a message is held in memory to be sealed


class Sealer:
    """Makes ARC sets in the name of one domain."""

    def __init__(self, arc: Arc) -> None:
        self._domain, self._selector = arc.domain.encode(), arc.selector.encode()
        self._authserv_id = arc.authserv_id.encode()
        self._key = program.read_secret(arc.key, "ARC key")

    def seal(self, message: bytes) -> list[tuple[str, str]]:
        """The header fields to be put above ``message`` (CRLF throughout), the first on top; none if it is not sealed.

        Raises:
            dkim.DKIMException: the key or the message cannot be used.
        """
        lines = dkim.arc_sign(message, self._selector, self._domain, self._key, self._authserv_id)
        return [_field(line) for line in lines]


def _field(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode().partition(":")
    return name, value.strip().replace("\r\n", "\n")
