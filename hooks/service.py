"""The process: the authenticator's socket, its directory, and the kicking of proxied sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from bascule import log, netstring, program, settings
from bascule.address import Address
from bascule.attempts import Attempts
from bascule.credential import Sealer
from bascule.database import AsyncConnection, connect_async
from bascule.directory import NOT_AT_LEGACY, Directory, Mailbox
from bascule.errors import BadAddress, BasculeError
from bascule.follower import Follower
from bascule.hooks import metrics
from bascule.hooks.authenticator import Authenticator, left_for_domain, left_for_mailbox
from bascule.hooks.database import Database
from bascule.hooks.deputy import Deputy
from bascule.hooks.legacy_logins import LegacyLogins
from bascule.hooks.protocol import AT_WORK, Login, Reply, Request, Users, decode, encoded
from bascule.hooks.sharing import Sharing
from bascule.legacy import Trust
from bascule.metrics import serve, watch
from bascule.serving import Server, read, until_told, write
from bascule.shared import Shared
from bascule.snapshot import Snapshot

PART = "authenticator"
SERVICES = ("imap", "pop3", "submission", "sieve", "smtp")
KICK_ATTEMPTS = 20
KICK_PAUSE = 0.1  # seconds
DOVEADM_TIMEOUT = 10.0  # seconds
NO_SUCH_USER = 68  # doveadm kick: nobody with that name is logged in


class Resident:
    """One authenticator process: socket, directory, kicking of proxied sessions."""

    def __init__(self, configuration: settings.Settings) -> None:
        self._settings = configuration
        self._log = log.get()
        self._dsn = configuration.dsn(PART)
        mine = configuration.authenticator
        self._directory = Directory(delimiter=configuration.dovecot.recipient_delimiter)
        worker = configuration.worker
        self._deputy = Deputy(
            mine.deputy,
            mine.deputy_until,
            self._directory,
            mailbox=lambda mailbox, domain: left_for_mailbox(mailbox, domain, worker.store, worker.mail_root),
            domain=left_for_domain,
        )
        self._follower = Follower(
            self._directory,
            Snapshot(mine.snapshot),
            self._dsn,
            node=configuration.node,
            part=PART,
            on_change=self._changed,
            view="login_mailbox",
            on_update=self._updated,
            on_beat=self._beat,
            keepers=[self._deputy],
            on_sure=self._deputy.sure,
        )
        self._listed: frozenset[str] | None = None
        self._proxied = Shared(self._list)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second signal ends the process at once."""
        mine, legacy = self._settings.authenticator, self._settings.legacy
        self._follower.restore()
        self._list_domains()
        watch(self._directory, self._follower)
        serve(mine.metrics)
        database = Database(self._dsn)
        await database.open()
        attempts = Attempts(self._settings.trusted_sources)
        self._authenticator = Authenticator(
            self._directory,
            database,
            sealer=Sealer(self._settings.keys.public),
            legacy_logins=LegacyLogins(Trust(legacy.ca_file, legacy.timeout)),
            attempts=attempts,
            store=self._settings.worker.store,
            mail_root=self._settings.worker.mail_root,
            cutover_wait=mine.cutover_wait,
        )
        server = Server(f"unix:{mine.socket}", self._answer)
        await server.start()
        sharing = Sharing(attempts, database, node=self._settings.node)
        await until_told(self._follow(sharing))
        await server.stop()
        await sharing.once()
        await database.close()
        with contextlib.suppress(BasculeError):  # silence is noticed as well, only later
            async with connect_async(self._dsn) as connection:
                await self._follower.sign_off(connection)

    async def _follow(self, sharing: Sharing) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follower.run())
            group.create_task(self._deputy.keep())
            group.create_task(sharing.run())

    async def _beat(self, connection: AsyncConnection) -> None:
        await connection.execute("SELECT bascule.request_due_first_logins()")

    def _updated(self) -> None:
        self._list_domains()
        self._start(self._authenticator.state_changed())

    def _list_domains(self) -> None:
        """Say which domains are ours, for hooks that decide without us."""
        domains = frozenset(self._directory.domains)
        if not self._directory.loaded or domains == self._listed:
            return
        path = self._settings.authenticator.domains
        try:
            write_domains(path, domains)
        except OSError as error:
            self._log.error("the list of domains cannot be written", path=str(path), reason=error.strerror)
        else:
            self._listed = domains

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one reply."""
        parser = netstring.Parser()
        while data := await read(reader, pending=True):
            for payload in parser.feed(data)[:1]:
                request = decode(payload)
                if isinstance(request, Login) and request.wants_sign:
                    write(writer, AT_WORK)
                write(writer, await self._reply(request))
                await writer.drain()
                return

    async def _reply(self, request: Request) -> bytes:
        if isinstance(request, Users):
            if not self._directory.loaded:
                return Reply("temporary").encode()
            return encoded("ok", self._authenticator.users())
        if isinstance(request, Login):
            return (await self._log_in(request)).encode()
        return (await self._authenticator.look_up(request)).encode()

    async def _log_in(self, request: Login) -> Reply:
        try:
            reply = await self._authenticator.log_in(request)
        except Exception as error:  # noqa: BLE001 (a login must be answered, and never by "wrong password")
            self._log.error("login could not be decided", error=type(error).__name__, exc_info=error)
            reply = Reply("temporary")
        service = request.service if request.service in SERVICES else "other"
        metrics.LOGINS.labels(service, reply.result).inc()
        return reply

    # Changes of state -----------------------------------------------------------

    def _changed(self, before: Mailbox | None, after: Mailbox | None) -> None:
        if after is None:
            return
        if has_new_password(before, after):
            self._start(self._end_sessions(after.address))
        elif after.state in NOT_AT_LEGACY and (before is None or before.epoch != after.epoch):
            self._start(self._put_into_force(after))

    async def _end_sessions(self, address: Address) -> None:
        """Put out whoever logged in with the former password."""
        await self._doveadm("kick", str(address), good=(0, NO_SUCH_USER))
        await self._kick(address)
        self._log.info("the password has changed, sessions are ended", address=str(address))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("a change of state is not in force here", exc_info=error)

    async def _put_into_force(self, mailbox: Mailbox) -> None:
        """Have Dovecot know it, also without us, end the user's proxied sessions, and say so."""
        await self._deputy.written(mailbox.address)
        for _ in range(KICK_ATTEMPTS):
            if not await self._kick(mailbox.address):
                break
            await asyncio.sleep(KICK_PAUSE)
        else:
            self._log.warning("proxied sessions do not end", address=str(mailbox.address))
            return
        await self._follower.acknowledge(mailbox)

    async def _kick(self, address: Address) -> bool:
        """End the proxied sessions of ``address``, under whichever of its names; whether there were any."""
        names = [name for name in await self._proxied() if self._is_of(name, address)]
        for name in names:
            await self._doveadm("proxy", "kick", name)
        return bool(names)

    def _is_of(self, name: str, address: Address) -> bool:
        try:
            user = Address.parse(name)
        except BadAddress:
            return False
        return address in {user, self._directory.owner(user)}

    async def _list(self) -> set[str]:
        """The users who have proxied sessions."""
        listing = await self._doveadm("proxy", "list")
        return {line.split()[0] for line in listing.splitlines() if line.strip()}

    async def _doveadm(self, *arguments: str, good: tuple[int, ...] = (0,)) -> str:
        process = await asyncio.create_subprocess_exec(
            "doveadm",
            "-c",
            str(self._settings.dovecot.config_file),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(DOVEADM_TIMEOUT):
                output, errors = await process.communicate()
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(error, TimeoutError):
                raise BasculeError(f"doveadm {arguments[0]} did not end in {DOVEADM_TIMEOUT:g} s") from error
            raise
        if process.returncode not in good:
            raise BasculeError(f"doveadm {arguments[0]} failed: {errors.decode(errors='replace').strip()}")
        return output.decode(errors="replace")


def has_new_password(before: Mailbox | None, after: Mailbox) -> bool:
    """Whether it has moved, before as after, and another password is good now."""
    if before is None or before.account is None or after.account is None:
        return False
    if before.account.password_hash is None or (before.account.imported and not after.account.imported):
        return False  # the first one, or the same one in a better hash
    return before.state == after.state == "local" and before.account.password_hash != after.account.password_hash


def write_domains(path: Path, domains: frozenset[str]) -> None:
    """A list that passdb.lua and bascule-checkpassword look into, whole or not at all; for every user to read."""
    lines = "".join(f"{name}\n" for name in sorted(domains))
    new = path.with_name(f".{path.name}.new")
    new.write_text(f"# Domains in migration, by bascule-authenticator, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n{lines}")
    new.chmod(0o644)
    new.replace(path)


def _run(configuration: settings.Settings) -> None:
    uvloop.run(Resident(configuration).run())


main = program.command(PART, "Decide who may log in where, and where mailboxes are.", _run)
