"""What is remembered of logins for a short time: which passwords were right, who guesses, and from where owners come.

Nothing here can be turned back into a password: pairs of name and password are
kept as keyed hashes, under a key that exists in this process's memory only.
Threads may share it.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal

from cachetools import TTLCache
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from bascule.address import Address
from bascule.credential import Password

REMEMBERED = 60.0  # seconds that an answer is good for
COUNTED_ONCE = 600.0  # seconds in which the same wrong password again is no further guess
AT_HOME = 24 * 3600.0  # seconds that a source is known for an account that logged in from there
SHARED_AGAIN = 3600.0  # seconds after which a known source is told to the others anew
MOST = 200_000  # entries of each memory; the oldest go first

#: Wrong passwords in ten minutes, after which one more is looked at only at a slow pace.
PER_ACCOUNT = RateLimitItemPerMinute(20, 10, namespace="account")
PER_SOURCE = RateLimitItemPerMinute(50, 10, namespace="source")
#: Of all accounts of a domain together: one password tried at each of many accounts.
PER_DOMAIN = RateLimitItemPerMinute(500, 10, namespace="domain")
#: Not a limit: how often a source was slowed down.
_SLOWED = RateLimitItemPerMinute(1000, 10, namespace="slowed")
_IPV6_SITE = 64  # bits that one customer of a provider has (RFC 6177)

Kind = Literal["account", "source", "domain"]
_LIMITS: dict[Kind, RateLimitItem] = {"account": PER_ACCOUNT, "source": PER_SOURCE, "domain": PER_DOMAIN}


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that is reached: whose, and how it is said."""

    kind: Kind
    subject: str

    def __str__(self) -> str:
        at = {"account": "for", "source": "from", "domain": "in all of"}[self.kind]
        return f"too many wrong passwords {at} {self.subject}"


class Attempts:
    """The answers and the wrong passwords of the last minutes."""

    def __init__(self, trusted_sources: Sequence[IPv4Network | IPv6Network]) -> None:
        self._trusted = trusted_sources
        self._key = secrets.token_bytes(32)
        self._answers: TTLCache[bytes, bool] = TTLCache(MOST, REMEMBERED)
        self._counted: TTLCache[bytes, bool] = TTLCache(MOST, COUNTED_ONCE)
        self._at_home: TTLCache[tuple[Address, str], bool] = TTLCache(MOST, AT_HOME)
        self._shared: TTLCache[tuple[Address, str], bool] = TTLCache(MOST, SHARED_AGAIN)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._under_way: Counter[tuple[Kind, str]] = Counter()
        self._lock = threading.Lock()
        #: What the other instances have not heard yet; see :meth:`untold`.
        self._guesses: Counter[tuple[Kind, str]] = Counter()
        self._sources: list[tuple[str, str]] = []

    def answer(self, address: Address, password: Password, *, now_held_by: str = "") -> bool | None:
        """Whether this was just found right or wrong; None: not asked lately.

        ``now_held_by`` is the hash that the password was compared with, if it
        is not the legacy server that says: another hash, and nothing is known.
        """
        with self._lock:
            return self._answers.get(self._digest(address, password, now_held_by))

    def barred(self, address: Address, source: str) -> str | None:
        """Why this login is not to be tried now, if so."""
        reached = self.reached(address, source)
        return str(reached[0]) if reached else None

    def reached(self, address: Address, source: str) -> list[Limit]:
        """The limits that are reached for a login now, those of the same account, source, domain that are under way
        counted as if they were wrong.

        An account that others guess at, and a domain, stay open to where the
        account's owner logs in from.
        """
        site = self.site(source)
        with self._lock:
            at_home = bool(site) and (address, site) in self._at_home
            subjects = self._subjects(address, site)
            return [
                Limit(kind, subject)
                for kind, subject in subjects
                if not (at_home and kind != "source")
                and not self._limiter.test(_LIMITS[kind], subject, cost=self._under_way[kind, subject] + 1)
            ]

    @contextmanager
    def trying(self, address: Address, source: str) -> Iterator[None]:
        """For the ``with`` block, a password is being checked: it counts before there is an answer."""
        subjects = self._subjects(address, self.site(source))
        with self._lock:
            self._under_way.update(subjects)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.subtract(subjects)
                for subject in subjects:
                    if not self._under_way[subject]:
                        del self._under_way[subject]

    def succeeded(self, address: Address, password: Password, source: str, *, now_held_by: str = "") -> None:
        site = self.site(source)
        with self._lock:
            self._answers[self._digest(address, password, now_held_by)] = True
            if site:  # who stands for many people is at home nowhere
                self._at_home[address, site] = True
                if (address, site) not in self._shared:
                    self._shared[address, site] = True
                    self._sources.append((str(address), site))

    def failed(self, address: Address, password: Password, source: str, *, now_held_by: str = "") -> None:
        """Count a wrong password; the same one again is no further guess and is not counted."""
        digest = self._digest(address, password, now_held_by)
        with self._lock:
            self._answers[digest] = False
            if digest in self._counted:
                return
            self._counted[digest] = True
            for kind, subject in self._subjects(address, self.site(source)):
                self._limiter.hit(_LIMITS[kind], subject)
                self._guesses[kind, subject] += 1

    def rank(self, source: str) -> int:
        """Whom to let go first of those who are slowed down: how often somebody there guessed, or was so, lately.

        This call counts as one. Many people stand where a busy guesser does.
        """
        site = self.site(source)
        if not site:
            return PER_SOURCE.amount
        with self._lock:
            known = [
                limit.amount - self._limiter.get_window_stats(limit, site).remaining for limit in (PER_SOURCE, _SLOWED)
            ]
            self._limiter.hit(_SLOWED, site)
        return sum(known)

    # What instances share; see schema/functions/logins.sql, share_guesses() and share_sources() -------------------

    def untold(self) -> tuple[list[tuple[Kind, str, int]], list[tuple[str, str]]]:
        """Guesses (kind, subject, number) and sources (address, site) since the last call."""
        with self._lock:
            guesses, self._guesses = self._guesses, Counter()
            sources, self._sources = self._sources, []
        return [(kind, subject, number) for (kind, subject), number in guesses.items()], sources

    def told_not(self, guesses: Iterable[tuple[Kind, str, int]], sources: Iterable[tuple[str, str]]) -> None:
        """Keep for the next time what :meth:`untold` gave, for nobody heard it; no more than fits."""
        with self._lock:
            for kind, subject, number in guesses:
                if len(self._guesses) < MOST:
                    self._guesses[kind, subject] += number
            self._sources = [*sources, *self._sources][:MOST]

    def hear(self, guesses: Iterable[tuple[str, str, int]], sources: Iterable[tuple[str, str]]) -> None:
        """Take up what another instance counted."""
        with self._lock:
            for kind, subject, number in guesses:
                if (limit := _LIMITS.get(kind)) is not None:  # type: ignore[call-overload]
                    for _ in range(min(number, limit.amount)):
                        self._limiter.hit(limit, subject)
            for address, site in sources:
                self._at_home[Address.parse(address), site] = True

    def site(self, source: str) -> str:
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

    @staticmethod
    def _subjects(address: Address, site: str) -> list[tuple[Kind, str]]:
        subjects: list[tuple[Kind, str]] = [("account", str(address)), ("domain", address.domain)]
        return [("source", site), *subjects] if site else subjects

    def _digest(self, address: Address, password: Password, held_by: str) -> bytes:
        text = f"{address}\0{password.secret}\0{held_by}"
        return blake2b(text.encode(), key=self._key, digest_size=32).digest()
