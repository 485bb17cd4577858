"""Who may log in where, for every login that the SQL passdb does not know."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bascule import log
from bascule.address import Address
from bascule.attempts import Attempts
from bascule.credential import Password, Sealer
from bascule.directory import Directory, Domain, State
from bascule.errors import BadAddress, LegacyRefusedLogin, LegacyUnavailable
from bascule.hooks import metrics
from bascule.hooks.legacy_logins import LegacyLogins
from bascule.hooks.protocol import Reply, Request
from bascule.legacy import Service

DATABASE_TIMEOUT = 2.0  # seconds that a login waits for the database before it goes on without
LOOK_AGAIN = 1.0  # seconds between looks at the state while a login waits for the flip

Pool = AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a login is to be checked now; the hash only for a user in state local.

    Whether the credential is wanted is not known without the database.
    """

    state: State
    password_hash: str | None = None
    store: str = ""
    store_host: str | None = None
    wants_credential: bool = True


def proxy_fields(domain: Domain, service_name: str, address: Address) -> dict[str, str] | None:
    """The passdb fields that have Dovecot proxy a session to the legacy server; None: it has no such service.

    Postfix asks Dovecot to check a login (service smtp, its SASL) and keeps the
    session to itself: there is nothing to proxy.
    """
    if service_name == "smtp":
        return {}
    legacy = domain.legacy
    services: dict[str, Service | None] = {
        "imap": legacy.imap,
        "pop3": legacy.pop3,
        "submission": legacy.submission,
        "sieve": legacy.sieve,
    }
    service = services.get(service_name)
    if service is None:
        return None
    fields = {"proxy": "y", "host": legacy.imap_host, "port": str(service.port)}
    if service.tls == "implicit":
        fields["ssl"] = "yes"
    elif service.tls == "starttls":
        fields["starttls"] = "yes"
    if legacy.login_name(address) != str(address):
        fields["destuser"] = legacy.login_name(address)
    return fields


def store_fields(standing: Standing, service_name: str, here: str) -> dict[str, str]:
    """The passdb fields that have Dovecot proxy a session to the store of a mailbox; none if that is ``here``."""
    if standing.store == here or standing.store_host is None or service_name == "smtp":
        return {}
    return {"proxy": "y", "host": standing.store_host, "starttls": "yes"}


class Authenticator:
    """The decisions. ``directory`` is the last known state; the database is asked first."""

    def __init__(
        self,
        directory: Directory,
        pool: Pool,
        *,
        sealer: Sealer,
        legacy_logins: LegacyLogins,
        attempts: Attempts,
        store: str,
        cutover_wait: float,
    ) -> None:
        self._directory = directory
        self._pool = pool
        self._sealer = sealer
        self._legacy_logins = legacy_logins
        self._attempts = attempts
        self._store = store
        self._cutover_wait = cutover_wait
        self._state_changed = asyncio.Condition()
        # A hash takes 64 MiB and a tenth of a second of a processor.
        self._hashing = asyncio.Semaphore(os.cpu_count() or 1)
        self._log = log.get()

    async def state_changed(self) -> None:
        """Wake the logins that wait for a flip."""
        async with self._state_changed:
            self._state_changed.notify_all()

    async def decide(self, request: Request) -> Reply:
        """The reply to one login."""
        try:
            address = Address.parse(request.user)
        except BadAddress:
            return Reply("unknown")
        if not self._directory.loaded:
            return Reply("temporary")
        domain = self._directory.domains.get(address.domain)
        # Before the activation users come to the legacy server this way, too; afterwards it is not asked any more.
        if domain is None or domain.mode == "closed":
            return Reply("unknown")
        reply = await self._decide(domain, address, request)
        if reply.result == "ok" and request.user != str(address):
            return Reply("ok", reply.fields | {"user": str(address)})
        return reply

    async def _decide(self, domain: Domain, address: Address, request: Request) -> Reply:
        deadline = asyncio.get_running_loop().time() + self._cutover_wait
        while True:
            standing = await self._standing(address)
            if standing.state == "local":
                return await self._check_here(standing, address, request)
            if standing.state in {"cutover", "returning"}:
                if not await self._wait_for_change(deadline):
                    return Reply("temporary")
                continue
            reply = await self._check_at_legacy(domain, standing, address, request)
            # The cutover may have begun while the legacy server was asked: then look again.
            if reply.result != "ok" or address not in self._directory.mailboxes:
                return reply
            if not await self._wait_for_change(deadline):
                return Reply("temporary")

    async def _standing(self, address: Address) -> Standing:
        with contextlib.suppress(psycopg.Error, PoolTimeout, TimeoutError):
            async with asyncio.timeout(DATABASE_TIMEOUT), self._pool.connection() as connection:
                cursor = await connection.execute(
                    "SELECT state, password_hash, store, store_host, wants_credential FROM bascule.login_state(%s)",
                    (str(address),),
                )
                row = await cursor.fetchone()
                return Standing("legacy") if row is None else Standing(*row)
        mailbox = self._directory.mailboxes.get(address)
        return Standing("legacy" if mailbox is None else mailbox.state)

    async def _check_here(self, standing: Standing, address: Address, request: Request) -> Reply:
        if standing.password_hash is None:  # the database is away; the legacy server is no longer asked
            return Reply("temporary")
        if self._barred(address, request.source):
            return Reply("temporary")
        async with self._hashing:
            matches = await asyncio.to_thread(request.password.matches, standing.password_hash)
        if not matches:
            self._attempts.failed(address, request.password, request.source)
            return Reply("refused")
        return Reply("ok", store_fields(standing, request.service, self._store))

    def _barred(self, address: Address, source: str) -> bool:
        reason = self._attempts.barred(address, source)
        if reason is not None:
            metrics.BARRED.inc()
            self._log.warning("login not tried", address=str(address), source=source, reason=reason)
        return reason is not None

    async def _wait_for_change(self, deadline: float) -> bool:
        """Return at the next change of any state, or after a moment; False once ``deadline`` is past."""
        now = asyncio.get_running_loop().time()
        if now >= deadline:
            return False
        # Woken by the change itself; the short limit covers one that came just before we began to wait.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(deadline, now + LOOK_AGAIN)), self._state_changed:
                await self._state_changed.wait()
        return True

    async def _check_at_legacy(self, domain: Domain, standing: Standing, address: Address, request: Request) -> Reply:
        fields = proxy_fields(domain, request.service, address)
        if fields is None:
            return Reply("unknown")
        password = request.password
        answer = self._attempts.answer(address, password)
        if answer is not None:
            metrics.REMEMBERED.inc()
            return Reply("ok", fields) if answer else Reply("refused")
        if self._barred(address, request.source):
            return Reply("temporary")
        try:
            await self._legacy_logins.check(domain.legacy, address, password)
        except LegacyRefusedLogin:
            self._attempts.failed(address, password, request.source)
            return Reply("refused")
        except LegacyUnavailable as error:
            self._log.warning("login cannot be checked now", address=str(address), reason=error.message)
            return Reply("temporary")
        if not standing.wants_credential or await self._record(address, password):
            self._attempts.succeeded(address, password, request.source)
        return Reply("ok", fields)

    async def _record(self, address: Address, password: Password) -> bool:
        """Keep the credential; without the database the login goes on, and the next one is recorded."""
        try:
            async with asyncio.timeout(DATABASE_TIMEOUT), self._pool.connection() as connection:
                await connection.execute(
                    "SELECT bascule.record_login(%s, %s)", (str(address), self._sealer.seal(password))
                )
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            self._log.warning(
                "login not recorded, the next one will be", address=str(address), reason=type(error).__name__
            )
            return False
        return True
