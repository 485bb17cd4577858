"""What is remembered of logins for a short time: which passwords were right, and who guesses.

Nothing here can be turned back into a password: pairs of name and password are
kept as keyed hashes, under a key that exists in this process's memory only.
Threads may share it.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from cachetools import TTLCache
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from bascule.address import Address
from bascule.credential import Password

REMEMBERED = 60.0  # seconds that an answer of the legacy server is good for
AT_HOME = 24 * 3600.0  # seconds that a source is trusted for an account that logged in from there
MOST = 200_000  # entries of each memory; the oldest go first

#: Wrong passwords in ten minutes, after which the legacy server is not asked any more.
PER_ACCOUNT = RateLimitItemPerMinute(20, 10, namespace="account")
PER_SOURCE = RateLimitItemPerMinute(50, 10, namespace="source")
_IPV6_SITE = 64  # bits that one customer of a provider has (RFC 6177)


class Attempts:
    """The answers and the wrong passwords of the last minutes."""

    def __init__(self, trusted_sources: Sequence[IPv4Network | IPv6Network]) -> None:
        self._trusted = trusted_sources
        self._key = secrets.token_bytes(32)
        self._answers: TTLCache[bytes, bool] = TTLCache(MOST, REMEMBERED)
        self._at_home: TTLCache[tuple[Address, str], bool] = TTLCache(MOST, AT_HOME)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._lock = threading.Lock()

    def answer(self, address: Address, password: Password) -> bool | None:
        """Whether this was just found right or wrong; None: not asked lately."""
        with self._lock:
            return self._answers.get(self._digest(address, password))

    def barred(self, address: Address, source: str) -> str | None:
        """Why this login is not to be tried now, if so.

        An account that others guess at stays open to where its owner logs in from.
        """
        site = self._site(source)
        with self._lock:
            if site and not self._limiter.test(PER_SOURCE, site):
                return f"too many wrong passwords from {site}"
            if (address, site) not in self._at_home and not self._limiter.test(PER_ACCOUNT, str(address)):
                return f"too many wrong passwords for {address}"
        return None

    def succeeded(self, address: Address, password: Password, source: str) -> None:
        with self._lock:
            self._answers[self._digest(address, password)] = True
            self._at_home[address, self._site(source)] = True

    def failed(self, address: Address, password: Password, source: str) -> None:
        """Count a wrong password; the same one again is no further guess and is not counted."""
        with self._lock:
            self._answers[self._digest(address, password)] = False
            self._limiter.hit(PER_ACCOUNT, str(address))
            if site := self._site(source):
                self._limiter.hit(PER_SOURCE, site)

    def _digest(self, address: Address, password: Password) -> bytes:
        return blake2b(f"{address}\0{password.secret}".encode(), key=self._key, digest_size=32).digest()

    def _site(self, source: str) -> str:
        """Who is behind a source, or empty: not known, or many people."""
        try:
            address = ip_address(source)
        except ValueError:
            return ""
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if any(address in network for network in self._trusted):
            return ""
        if isinstance(address, IPv6Address):
            return str(IPv6Network((address, _IPV6_SITE), strict=False))
        return str(address)
