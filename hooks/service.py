"""The process: the authenticator's socket, its directory, and the kicking of proxied sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine

import uvloop

from bascule import log, netstring, program, settings
from bascule.address import Address
from bascule.attempts import Attempts
from bascule.credential import Sealer
from bascule.database import connect_async
from bascule.directory import Directory, Mailbox
from bascule.errors import BasculeError
from bascule.follower import Follower
from bascule.hooks import metrics
from bascule.hooks.authenticator import DATABASE_TIMEOUT, Authenticator, Pool
from bascule.hooks.legacy_logins import LegacyLogins
from bascule.hooks.protocol import Reply, Request
from bascule.legacy import Trust
from bascule.metrics import serve, watch
from bascule.serving import Server, read, until_told
from bascule.shared import Shared
from bascule.snapshot import Snapshot

PART = "authenticator"
SERVICES = ("imap", "pop3", "submission", "sieve", "smtp")
KICK_ATTEMPTS = 20
KICK_PAUSE = 0.1  # seconds


class Resident:
    """One authenticator process: socket, directory, kicking of proxied sessions."""

    def __init__(self, configuration: settings.Settings) -> None:
        self._settings = configuration
        self._log = log.get()
        self._dsn = configuration.dsn(PART)
        mine = configuration.authenticator
        self._directory = Directory(delimiter=configuration.dovecot.recipient_delimiter)
        self._follower = Follower(
            self._directory,
            Snapshot(mine.snapshot),
            self._dsn,
            node=configuration.node,
            part=PART,
            on_change=self._changed,
            on_update=lambda: self._start(self._authenticator.state_changed()),
        )
        self._proxied = Shared(self._list)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second signal ends the process at once."""
        mine, legacy = self._settings.authenticator, self._settings.legacy
        self._follower.restore()
        watch(self._directory, self._follower)
        serve(mine.metrics)
        async with Pool(
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
                legacy_logins=LegacyLogins(Trust(legacy.ca_file, legacy.timeout)),
                attempts=Attempts(self._settings.trusted_sources),
                store=self._settings.worker.store,
                cutover_wait=mine.cutover_wait,
            )
            server = Server(f"unix:{mine.socket}", self._answer)
            await server.start()
            await until_told(self._follower.run())
            await server.stop()
        with contextlib.suppress(BasculeError):  # silence is noticed as well, only later
            async with connect_async(self._dsn) as connection:
                await self._follower.sign_off(connection)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one reply."""
        parser = netstring.Parser()
        while data := await read(reader, pending=True):
            for payload in parser.feed(data)[:1]:
                reply = await self._decide(Request.decode(payload))
                writer.write(reply.encode())
                await writer.drain()
                return

    async def _decide(self, request: Request) -> Reply:
        try:
            reply = await self._authenticator.decide(request)
        except Exception as error:  # noqa: BLE001 (a login must be answered, and never by "wrong password")
            self._log.error("login could not be decided", error=type(error).__name__, exc_info=error)
            reply = Reply("temporary")
        service = request.service if request.service in SERVICES else "other"
        metrics.LOGINS.labels(service, reply.result).inc()
        return reply

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
        if str(address) not in await self._proxied():
            return False
        await self._doveadm("kick", str(address))
        return True

    async def _list(self) -> set[str]:
        """The users who have proxied sessions."""
        listing = await self._doveadm("list")
        return {line.split()[0] for line in listing.splitlines() if line.strip()}

    async def _doveadm(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "doveadm",
            "-c",
            str(self._settings.dovecot.config_file),
            "proxy",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        if process.returncode != 0:
            raise BasculeError(f"doveadm proxy failed: {errors.decode(errors='replace').strip()}")
        return output.decode(errors="replace")


def _run(configuration: settings.Settings) -> None:
    uvloop.run(Resident(configuration).run())


main = program.command(PART, "Decide the logins of users who have not moved.", _run)
