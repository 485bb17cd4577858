"""How many logins may be under way at legacy servers, so that one that does not answer delays only its own users.

For every part that asks a legacy server while somebody waits. Threads may share it.
"""

from __future__ import annotations

import threading
from collections import Counter

from bascule.errors import LegacyUnavailable

#: A legacy server: host and port.
Server = tuple[str, int]


class Shares:
    """Each legacy server has a share of what may be under way; one that did not answer lately, one login at a time."""

    def __init__(self, *, in_all: int, at_one_server: int) -> None:
        self._in_all = in_all
        self._at_one_server = at_one_server
        self._under_way: Counter[Server] = Counter()
        self._down: set[Server] = set()
        self._lock = threading.Lock()

    def take(self, server: Server) -> None:
        """Begin a login; whoever does must say by :meth:`give_back` that it has ended.

        Raises:
            LegacyUnavailable: at once, where it would have to wait for others.
        """
        with self._lock:
            if self._under_way[server] >= (1 if server in self._down else self._at_one_server):
                why = "did not answer lately" if server in self._down else "is slow, too many logins wait for it"
                raise LegacyUnavailable(f"{server[0]}:{server[1]} {why}")
            if self._under_way.total() >= self._in_all:
                raise LegacyUnavailable(f"{server[0]}:{server[1]} was not asked: too many logins are under way")
            self._under_way[server] += 1

    def give_back(self, server: Server) -> None:
        """A login has ended."""
        with self._lock:
            self._under_way[server] -= 1
            if not self._under_way[server]:
                del self._under_way[server]

    def judge(self, server: Server, *, answers: bool) -> None:
        """Whether a server answered, if only by "no" or "not now"; this may be known before the login has ended."""
        with self._lock:
            if answers:
                self._down.discard(server)
            else:
                self._down.add(server)
