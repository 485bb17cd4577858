"""The resident authenticator: who may log in where, for every login that the SQL passdb does not know.

One JSON object a line is answered by one. The request has ``user``,
``password``, ``service`` (Dovecot's name: imap, pop3, submission) and
``source``; the reply has ``result``:

``ok``         with ``fields``: passdb fields, those of a proxy to the legacy
               server, or none for a user who is served here
``refused``    the password is wrong
``unknown``    not a user of a domain in migration; other passdbs may know them
``temporary``  cannot say now; never taken for a wrong password
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bascule import log, program, settings
from bascule.address import Address
from bascule.credential import Password, Sealer
from bascule.database import connect_async
from bascule.directory import Directory, Domain, Follower, Mailbox, State
from bascule.errors import BadAddress, BasculeError, LegacyRefusedLogin, LegacyUnavailable
from bascule.legacy import Service, Trust, authenticate
from bascule.readiness import ready

PART = "authenticator"
MAX_REQUEST = 65_536  # bytes
LEGACY_LOGINS = 128  # that are checked at legacy servers at the same time; each waits in a thread
DATABASE_TIMEOUT = 2.0  # seconds that a login waits for the database before it goes on without
LOOK_AGAIN = 1.0  # seconds between looks at the state while a login waits for the flip
KICK_ATTEMPTS = 20
KICK_PAUSE = 0.1  # seconds

Result = Literal["ok", "refused", "unknown", "temporary"]


@dataclass(frozen=True, slots=True)
class Reply:
    result: Result
    fields: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps({"result": self.result, "fields": self.fields}).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a login is to be checked now; the hash only for a user in state local."""

    state: State
    password_hash: str | None = None


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


class Authenticator:
    """The decisions. ``directory`` is the last known state; the database is asked first."""

    def __init__(
        self,
        directory: Directory,
        pool: AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]],
        *,
        sealer: Sealer,
        trust: Trust,
        cutover_wait: float,
    ) -> None:
        self._directory = directory
        self._pool = pool
        self._sealer = sealer
        self._trust = trust
        self._cutover_wait = cutover_wait
        self._state_changed = asyncio.Condition()
        self._log = log.get()

    async def state_changed(self) -> None:
        """Wake the logins that wait for a flip."""
        async with self._state_changed:
            self._state_changed.notify_all()

    async def decide(self, user: str, password: Password, service: str) -> Reply:
        """The reply to one login."""
        try:
            address = Address.parse(user)
        except BadAddress:
            return Reply("unknown")
        if not self._directory.loaded:
            return Reply("temporary")
        domain = self._directory.domains.get(address.domain)
        if domain is None or domain.mode != "active":
            return Reply("unknown")
        deadline = asyncio.get_running_loop().time() + self._cutover_wait
        while True:
            standing = await self._standing(address)
            if standing.state == "local":
                return await self._check_here(standing, password)
            if standing.state in {"cutover", "returning"}:
                if not await self._wait_for_change(deadline):
                    return Reply("temporary")
                continue
            reply = await self._check_at_legacy(domain, service, address, password)
            # The cutover may have begun while the legacy server was asked: then look again.
            if reply.result != "ok" or address not in self._directory.mailboxes:
                return reply
            if not await self._wait_for_change(deadline):
                return Reply("temporary")

    async def _standing(self, address: Address) -> Standing:
        with contextlib.suppress(psycopg.Error, PoolTimeout, TimeoutError):
            async with asyncio.timeout(DATABASE_TIMEOUT), self._pool.connection() as connection:
                cursor = await connection.execute(
                    "SELECT state, password_hash FROM bascule.login_state(%s)", (str(address),)
                )
                row = await cursor.fetchone()
                return Standing("legacy") if row is None else Standing(row[0], row[1])
        mailbox = self._directory.mailboxes.get(address)
        return Standing("legacy" if mailbox is None else mailbox.state)

    async def _check_here(self, standing: Standing, password: Password) -> Reply:
        if standing.password_hash is None:  # the database is away; the legacy server is no longer asked
            return Reply("temporary")
        matches = await asyncio.to_thread(password.matches, standing.password_hash)
        return Reply("ok" if matches else "refused")

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

    async def _check_at_legacy(self, domain: Domain, service: str, address: Address, password: Password) -> Reply:
        fields = proxy_fields(domain, service, address)
        if fields is None:
            return Reply("unknown")
        try:
            await asyncio.to_thread(authenticate, domain.legacy, self._trust, address, password)
        except LegacyRefusedLogin:
            return Reply("refused")
        except LegacyUnavailable as error:
            self._log.warning("login cannot be checked now", address=str(address), reason=error.message)
            return Reply("temporary")
        await self._record(address, password)
        return Reply("ok", fields)

    async def _record(self, address: Address, password: Password) -> None:
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


class Resident:
    """One authenticator process: socket, directory, kicking of proxied sessions."""

    def __init__(self, configuration: settings.Settings) -> None:
        self._settings = configuration
        self._log = log.get()
        self._dsn = configuration.dsn(PART)
        self._directory = Directory(delimiter=configuration.dovecot.recipient_delimiter)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LEGACY_LOGINS))
        self._follower = Follower(
            self._directory,
            self._dsn,
            node=self._settings.node,
            part=PART,
            on_change=self._changed,
            on_update=lambda: self._start(self._authenticator.state_changed()),
        )
        legacy = self._settings.legacy
        async with AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]](
            self._dsn,
            min_size=1,
            max_size=4,
            kwargs={"autocommit": True},
            timeout=DATABASE_TIMEOUT,
            open=False,
        ) as pool:
            self._authenticator = Authenticator(
                self._directory,
                pool,
                sealer=Sealer(self._settings.keys.public),
                trust=Trust(legacy.ca_file, legacy.timeout),
                cutover_wait=self._settings.authenticator.cutover_wait,
            )
            path = self._settings.authenticator.socket
            path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._handle, path, limit=MAX_REQUEST)
            path.chmod(0o666)  # who may reach it is decided by its directory
            following = asyncio.create_task(self._follower.run())
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            ready()
            await stop.wait()
            server.close()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        with contextlib.suppress(BasculeError):  # silence is noticed as well, only later
            async with connect_async(self._dsn) as connection:
                await self._follower.sign_off(connection)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reply = Reply("temporary")
        try:
            request = json.loads(await reader.readuntil(b"\n"))
            reply = await self._authenticator.decide(
                str(request["user"]), Password(str(request["password"])), str(request["service"])
            )
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            writer.close()
            return
        except (ValueError, KeyError, TypeError):
            self._log.warning("a request that is not ours was dropped")
        except Exception as error:  # noqa: BLE001 (a login must be answered, and never by "wrong password")
            self._log.error("login could not be decided", error=type(error).__name__, exc_info=error)
        with contextlib.suppress(ConnectionError):
            writer.write(reply.encode())
            await writer.drain()
        writer.close()

    # Changes of state -----------------------------------------------------------

    def _changed(self, _before: Mailbox | None, after: Mailbox | None) -> None:
        if after is not None and after.state in {"cutover", "local", "returning"}:
            self._start(self._put_into_force(after))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("a change of state is not in force here", exc_info=error)

    async def _put_into_force(self, mailbox: Mailbox) -> None:
        """End the user's proxied sessions, and say so."""
        for _ in range(KICK_ATTEMPTS):
            if not await self._kick(mailbox.address):
                break
            await asyncio.sleep(KICK_PAUSE)
        else:
            self._log.warning("proxied sessions do not end", address=str(mailbox.address))
            return
        await self._follower.acknowledge(mailbox)

    async def _kick(self, address: Address) -> bool:
        """End the proxied sessions of ``address``; whether there were any."""
        command = ["doveadm", "-c", str(self._settings.dovecot.config_file), "proxy"]
        listing = await self._doveadm(*command, "list")
        if not any(line.split()[:1] == [str(address)] for line in listing.splitlines()):
            return False
        await self._doveadm(*command, "kick", str(address))
        return True

    async def _doveadm(self, *command: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        if process.returncode != 0:
            raise BasculeError(f"doveadm proxy failed: {errors.decode(errors='replace').strip()}")
        return output.decode(errors="replace")


def _run(configuration: settings.Settings) -> None:
    asyncio.run(Resident(configuration).run())


main = program.command(PART, "Decide the logins of users who have not moved.", _run)
