"""Asking legacy servers whether a password is right, so that a dead one delays nobody but its own users."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyUnavailable
from bascule.hooks import metrics
from bascule.legacy import LegacySettings, Trust, authenticate

AT_ONCE = 1024  # logins that are checked at the same time; each waits in a thread
AT_ONE_SERVER = 64  # of them at one legacy server

_Server = tuple[str, int]


class LegacyLogins:
    """Each legacy server has its own share of the threads; one that does not answer is tried by one login at a time."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="legacy-login")
        self._under_way: Counter[_Server] = Counter()
        self._down: set[_Server] = set()

    async def check(self, legacy: LegacySettings, address: Address, password: Password) -> None:
        """
        Raises:
            LegacyRefusedLogin: the password is wrong.
            LegacyUnavailable: it cannot be said now; at once if the server is
                known to be down and another login is waiting for it already.
        """
        server = (legacy.imap_host, legacy.imap.port)
        where = f"{legacy.imap_host}:{legacy.imap.port}"
        if self._under_way[server] >= (1 if server in self._down else AT_ONE_SERVER):
            reason = "did not answer lately" if server in self._down else "is slow, too many logins wait for it"
            raise LegacyUnavailable(f"{where} {reason}")
        self._under_way[server] += 1
        loop = asyncio.get_running_loop()
        answered = True  # also by "no" and by "not now"
        try:
            with metrics.LEGACY_LOGIN.time():
                await loop.run_in_executor(self._threads, authenticate, legacy, self._trust, address, password)
        except LegacyUnavailable as error:
            answered = not isinstance(error.__cause__, OSError)
            raise
        finally:
            self._under_way[server] -= 1
            if answered:
                self._down.discard(server)
            else:
                self._down.add(server)
