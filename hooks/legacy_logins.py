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
DEADLINE = 30.0  # seconds that a login as a whole may take, whatever drips from the server

_Server = tuple[str, int]


class LegacyLogins:
    """Each legacy server has its own share of the threads; one that does not answer is tried by one login at a time."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="legacy-login")
        self._under_way: Counter[_Server] = Counter()  # threads, also those that nobody waits for any more
        self._awaited: Counter[_Server] = Counter()
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
        if server in self._down and self._awaited[server]:
            raise LegacyUnavailable(f"{where} did not answer lately")
        if self._under_way[server] >= AT_ONE_SERVER:
            raise LegacyUnavailable(f"{where} is slow, too many logins wait for it")
        self._under_way[server] += 1
        self._awaited[server] += 1
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(self._threads, authenticate, legacy, self._trust, address, password)
        asked.add_done_callback(lambda done: self._ended(server, done))
        try:
            with metrics.LEGACY_LOGIN.time():
                await asyncio.wait([asked], timeout=DEADLINE)
        finally:
            self._awaited[server] -= 1
        if not asked.done():
            self._down.add(server)
            raise LegacyUnavailable(f"{where} takes longer than {DEADLINE:g} s for a login")
        error = asked.exception()
        if isinstance(error, LegacyUnavailable) and isinstance(error.__cause__, OSError):
            self._down.add(server)
        else:
            self._down.discard(server)  # it answers, be it "no" or "not now"
        if error is not None:
            raise error

    def _ended(self, server: _Server, done: asyncio.Future[None]) -> None:
        self._under_way[server] -= 1
        if not done.cancelled():
            done.exception()  # whoever asked has heard it, or has gone
